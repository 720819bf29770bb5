"""The main job: a small GPT-2 trained from scratch on real English, dense and in low-rank form, side by side.

    bash scripts/quickstart.sh                            # installs first, then runs this
    python scripts/quickstart.py                          # 2 to 4 minutes on two CPU cores
    python scripts/quickstart.py --dataset my_text.txt    # any text: a file, a folder, a data set on the Hub
    python scripts/quickstart.py --seconds 120            # longer runs, better models

All runs start from the same dense weights and see the same batches in the same order; what differs is how the factors
of W = U Vᵀ start ("Exploring Low Rank Training of Deep Neural Networks", Kamalakara et al. 2022, arXiv 2209.13569).
They train beside each other, one on each core; their steps are timed afterwards, in turn, with nothing beside them.
The best low-rank model is saved with its card, then loaded in a new process by plain
`AutoModelForCausalLM.from_pretrained`.
"""

import argparse
import json
import math
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from queue import Empty
from typing import Any

RANK = 0.25
BLOCK, BATCH = 128, 8  # 1,024 tokens a step
MODEL = "n_layer=2,n_embd=128,n_head=4,n_positions=128,resid_pdrop=0,embd_pdrop=0,attn_pdrop=0"
LEARNING_RATE = 1e-3
VOCABULARY = 1024  # of a tokenizer trained on the text: words come sooner than from bytes
STEPS = 500
RUNS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "he": {"init": "he"},
    "spectral": {"init": "spectral"},
    "spectral ones": {"init": "spectral_ones"},  # singular values 1, as in the paper
    "ones, rms": {"init": "spectral_ones", "spectral_ones_scale": "rms"},  # equal ones of the dense weights' norm
}
NOTE = (
    "One seed, at a size, tokenizer and number of steps that were chosen so that the order of the runs shows within "
    "minutes: how much of the gap each closes differs a lot between such settings. scripts/reproduce/low_rank.py "
    "measures it over seeds."
)
PLOT, CHECK, RESULTS = "loss.png", "check.safetensors", "results.json"
TIMED_STEPS = 10
PROGRESS: Any = None  # in a process that trains: the queue of (run, step, note) that the first process shows


def main() -> None:
    """Runs the job."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dataset", help="text: a file, a folder, a Hub data set; default: Python's own library text")
    parser.add_argument("--text_column", default="text", help="where a table holds the text")
    parser.add_argument("--vocab_size", type=int, default=VOCABULARY, help="tokens of the tokenizer that is trained")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=cores(), help="runs beside each other (default: one a core)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, default=STEPS, help=f"optimiser steps of each run (default: {STEPS})")
    length.add_argument("--seconds", type=float, help="choose the steps so that the dense run takes about this long")
    parser.add_argument("--check", type=Path, metavar="FOLDER", help="only load a finished job's model and check it")
    parser.add_argument("--wait", action="store_true", help=argparse.SUPPRESS)  # with --check: for a line first
    options = parser.parse_args()
    check(options.check, options.wait) if options.check else job(options)


def job(options: argparse.Namespace) -> None:
    """Trains all runs, reports, saves the best low-rank model, and checks it in a new process."""
    start = time.perf_counter()
    print("Loading torch, transformers and the text ...", flush=True)
    queue = multiprocessing.get_context("spawn").Queue()
    with tempfile.TemporaryDirectory() as kept, worker_pool(min(options.workers, len(RUNS)), queue) as pool:
        from hf_efx.programs.causal_lm import DataOptions, load_corpus

        become_worker(None)
        data = {"block_size": BLOCK, "vocab_size": options.vocab_size}
        corpus = load_corpus(DataOptions(options.dataset, options.text_column, **data))
        print(
            f"{corpus.name}: {len(corpus.train) * BLOCK:,} tokens to train on, {len(corpus.validation) * BLOCK:,} "
            f"held out ({corpus.bytes_per_token:.1f} bytes a token).\n"
            f"GPT-2 ({MODEL}), {BATCH * BLOCK:,} tokens a step, rank {RANK}.",
            flush=True,
        )
        steps = options.steps if options.seconds is None else steps_in(options.seconds, corpus, options.seed)
        command = [sys.executable, __file__, "--check", str(options.output_dir), "--wait"]

        def get_ready() -> tuple[Any, dict[str, Any]]:
            """What comes after training, on a core that is free: a new process imports, other runs are made."""
            checking = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
            return checking, {name: step_of(name, corpus, options.seed) for name in RUNS}

        rows, logs, (checking, step) = train_all(pool, queue, corpus, steps, options, Path(kept), get_ready)
        pool.shutdown()
        for name, seconds in step_seconds(step).items():
            rows[name]["step_seconds"] = seconds
        show(rows)
        best = min((name for name in RUNS if name != "dense"), key=lambda name: rows[name]["eval_perplexity"])
        folder: Path = options.output_dir
        shutil.copytree(Path(kept, best), folder, dirs_exist_ok=True)
    save(folder, best, corpus, rows, logs, steps, options.seed)
    print(f"\nThe best low-rank model ({best}), its card, {PLOT} and {RESULTS} are in {folder}.")
    print("A new process: import hf_efx, then AutoModelForCausalLM.from_pretrained ...", flush=True)
    checking.communicate("go on\n")
    if checking.returncode:
        sys.exit(checking.returncode)
    print(f"\nDone in {time.perf_counter() - start:.0f} s{peak_memory()}.")


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def worker_pool(workers: int, queue: Any) -> ProcessPoolExecutor:
    """Processes that train; they start at once, and import while the first one loads the text."""
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), become_worker, (queue,))
    for _ in range(workers):
        pool.submit(cores)
    return pool


def become_worker(queue: Any) -> None:
    """Readies a process to train, quietly and on one thread."""
    global PROGRESS
    import datasets
    import torch
    import transformers

    import hf_efx.low_rank  # noqa: F401

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    # Matrices this small gain little from more threads, and lose much where these wait for a core that is busy.
    torch.set_num_threads(1)
    PROGRESS = queue


def trainer_of(name: str, corpus: Any, steps: int, seed: int, callbacks: Any = (), model: Any = None) -> Any:
    """A trainer for one of `RUNS`; all start from the same dense weights and see the same batches."""
    from transformers import PrinterCallback

    from hf_efx import LowRankArguments, LowRankConfig
    from hf_efx.low_rank.program import low_rank_trainer, prepared
    from hf_efx.programs.model_options import ModelOptions
    from hf_efx.programs.task_data import causal_task

    factors = RUNS[name]
    config = LowRankConfig(rank=RANK, **factors) if factors else None
    quiet: dict[str, Any] = {"disable_tqdm": True, "dataloader_pin_memory": False, "report_to": "none"}
    sizes = {"per_device_train_batch_size": BATCH, "per_device_eval_batch_size": 64}
    times = {"max_steps": steps, "logging_steps": max(steps // 40, 1), "eval_steps": max(steps // 2, 1)}
    args = LowRankArguments(
        output_dir=tempfile.gettempdir(),  # nothing is saved during these runs
        save_strategy="no",
        eval_strategy="steps",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        seed=seed,
        **{**quiet, **sizes, **times},
    )
    task = causal_task(corpus)
    if model is None:
        model = prepared(task.model_init(seed, ModelOptions(config_overrides=MODEL)), config)
    trainer = low_rank_trainer(task, model, args, callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    return trainer


def steps_in(seconds: float, corpus: Any, seed: int) -> int:
    """How many dense steps fit into a time, by a short trial."""
    trainer = trainer_of("dense", corpus, 30, seed)
    trainer.args.eval_strategy = "no"
    start = time.perf_counter()
    trainer.train()
    return max(int(seconds / (time.perf_counter() - start) * 30), 40)


def train_one(name: str, corpus: Any, steps: int, seed: int, folder: Path) -> tuple[dict[str, Any], list[Any]]:
    """In a process of the pool: one of `RUNS`, saved with its logits for the check; its figures and its log."""
    import torch
    from safetensors.torch import save_file
    from transformers import TrainerCallback

    from hf_efx.low_rank.program import cost_figures
    from hf_efx.programs.task_data import causal_task
    from hf_efx.programs.task_run import finish_run

    class Progress(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            PROGRESS.put((name, state.global_step, None))

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                PROGRESS.put((name, state.global_step, f"loss {float(logs['loss']):.3f}"))

    PROGRESS.put((name, 0, ""))
    trainer = trainer_of(name, corpus, steps, seed, [Progress()])
    run = finish_run(name, trainer, causal_task(corpus), trainer.train().metrics)
    row = {**run.figures, **cost_figures(trainer)}
    PROGRESS.put((name, steps, f"validation perplexity {row['eval_perplexity']:.2f}"))
    model = trainer.model.eval().cpu()
    model.save_pretrained(folder)
    ids = torch.tensor(corpus.validation[:2]["input_ids"])
    with torch.no_grad():
        save_file({"input_ids": ids, "logits": model(input_ids=ids).logits}, folder / CHECK)
    return row, trainer.state.log_history


def train_all(
    pool: ProcessPoolExecutor, queue: Any, corpus: Any, steps: int, options: Any, kept: Path, get_ready: Any
) -> tuple[dict[str, dict[str, Any]], dict[str, list[Any]], Any]:
    """Trains each of `RUNS` under a live progress bar, the models in folders of `kept`.

    Returns:
        Figures and logs by name, and what `get_ready` gave, which is called once a core is free.
    """
    from rich import progress as shown

    columns = [shown.TextColumn("{task.description:14}"), shown.BarColumn(), shown.MofNCompleteColumn()]
    columns += [shown.TimeElapsedColumn(), shown.TimeRemainingColumn(), shown.TextColumn("{task.fields[note]}")]
    ready: Any = None
    with shown.Progress(*columns, refresh_per_second=2) as progress:
        tasks = {name: progress.add_task(name, total=steps, start=False, note="") for name in RUNS}
        # The dense run takes longest and goes first.
        runs = {name: pool.submit(train_one, name, corpus, steps, options.seed, kept / name) for name in RUNS}
        for name, step, note in reports(queue, runs):
            if step == 0:
                progress.start_task(tasks[name])
            changed: dict[str, Any] = {} if note is None else {"note": note}
            progress.update(tasks[name], completed=step, **changed)
            if note and note.startswith("validation"):
                progress.stop_task(tasks[name])
                if not progress.console.is_terminal:  # a log file shows no bars
                    print(f"{name}: {note}", flush=True)
            if ready is None and sum(not run.done() for run in runs.values()) < options.workers:
                ready = get_ready()
    rows, logs = {name: run.result()[0] for name, run in runs.items()}, {n: r.result()[1] for n, r in runs.items()}
    dense, he = rows["dense"]["eval_perplexity"], rows["he"]["eval_perplexity"]
    for row in rows.values():
        row["gap_closed"] = (he - row["eval_perplexity"]) / (he - dense) if he != dense else math.nan
    return rows, logs, ready or get_ready()


def reports(queue: Any, runs: dict[str, Future]) -> Iterator[tuple[str, int, str | None]]:
    """What the processes report, until all runs are done; the error of a run that failed."""
    while True:
        done = [run for run in runs.values() if run.done()]
        for run in done:
            run.result()
        try:
            yield queue.get(timeout=0.2)
        except Empty:
            if len(done) == len(runs):
                return


def step_of(name: str, corpus: Any, seed: int) -> Any:
    """One of `RUNS` as a function that takes a training step."""
    trainer = trainer_of(name, corpus, 1, seed)
    optimizer = trainer.create_optimizer()
    batch = trainer.data_collator([corpus.train[i] for i in range(min(BATCH, len(corpus.train)))])

    def step() -> None:
        optimizer.zero_grad()
        trainer.model(**batch).loss.backward()
        optimizer.step()

    return step


def step_seconds(steps: dict[str, Any]) -> dict[str, float]:
    """The median time of each step, in turn, with no other run beside them."""
    from benchmarks.step_time import side_by_side

    times = side_by_side(steps, TIMED_STEPS, "cpu", warm_up=2)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def table(rows: dict[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Titles and cells of the comparison; bytes of the optimiser's state in MB."""
    titles = ["run", "parameters", "optimiser", "step (ms)", "perplexity", "gap closed"]
    lines = []
    for name, row in rows.items():
        sizes = (f"{row['parameters']:,}", f"{row['optimizer_bytes'] / 1e6:.2f} MB")
        figures = (f"{row['step_seconds'] * 1e3:.1f}", f"{row['eval_perplexity']:.2f}", f"{row['gap_closed']:.0%}")
        lines.append([name, *sizes, *figures])
    return titles, lines


def show(rows: dict[str, dict[str, Any]]) -> None:
    """Prints the comparison."""
    from rich.console import Console
    from rich.table import Table

    titles, lines = table(rows)
    shown = Table(title="Validation perplexity per token; gap closed: from he (0%) to dense (100%)")
    for title in titles:
        shown.add_column(title, justify="left" if title == "run" else "right")
    for line in lines:
        shown.add_row(*line)
    Console().print(shown)
    print(NOTE)


def save(folder: Path, best: str, corpus: Any, rows: Any, logs: Any, steps: int, seed: int) -> None:
    """Tokenizer, plot, results and card beside the checkpoint."""
    from transformers import AutoModelForCausalLM

    from hf_efx.core.results.evidence import public_command, write_results
    from hf_efx.programs.task_data import causal_task
    from hf_efx.programs.task_report import plot_losses, write_task_card

    corpus.tokenizer.save_pretrained(folder)
    plot_losses(logs, folder / PLOT)
    trainer = trainer_of(best, corpus, steps, seed, model=AutoModelForCausalLM.from_pretrained(folder))
    training = {"learning_rate": LEARNING_RATE, "steps": steps, "tokens a step": BATCH * BLOCK, "seed": seed}
    training |= {"vocabulary": len(corpus.tokenizer), "optimiser": "AdamW", "schedule": "constant"}
    write_results(
        folder / RESULTS,
        title="Quickstart",
        command=public_command(),
        data={"name": corpus.name, "fingerprint": corpus.fingerprint},
        seeds=[seed],
        rows=[{"configuration": name, "seed": seed, **row} for name, row in rows.items()],
        claims=[],
        notes=[NOTE],
        settings={"rank": RANK, "model": MODEL, **training},
        plot=PLOT,
    )
    write_task_card(
        folder,
        trainer,
        causal_task(corpus),
        rows[best],
        method="low_rank",
        configuration={"rank": RANK, **(RUNS[best] or {})},
        note=NOTE,
        training=training,
        comparison=table(rows),
        plot=PLOT,
    )


def check(folder: Path, wait: bool) -> None:
    """Loads the model as anyone would, compares its logits with those kept before saving, and generates some text.

    With `wait` it waits for a line first, with everything imported; without a line there is no model.

    Raises:
        SystemExit: With status 1 if the logits differ.
    """
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging, set_seed

    import hf_efx  # noqa: F401  lets transformers read these weights

    if wait and not sys.stdin.readline():
        return
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    kept = load_file(folder / CHECK)
    with torch.no_grad():
        difference = (model(input_ids=kept["input_ids"]).logits - kept["logits"]).abs().max().item()
    print(f"largest difference of a logit: {difference:g}")
    if not difference <= 1e-5 * kept["logits"].abs().max().item():
        sys.exit("The loaded model isn't the one that was saved.")
    set_seed(0)
    for prompt in ("The", "Return a", "If the"):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        room = {"max_new_tokens": 60, "do_sample": True, "temperature": 0.7, "pad_token_id": tokenizer.eos_token_id}
        written = model.generate(ids, attention_mask=torch.ones_like(ids), **room)[0]
        print(f"  {json.dumps(tokenizer.decode(written, skip_special_tokens=True), ensure_ascii=False)}")


def peak_memory() -> str:
    """The peak memory of the largest process as words, where the system tells it."""
    try:
        import resource
    except ImportError:  # Windows
        return ""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return f", peak memory of a process {peak * unit / 2**30:.1f} GiB"


if __name__ == "__main__":
    main()

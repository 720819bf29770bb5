"""GoldiProx: a small proxy's selection sequence, replayed by a larger and by a different model.

Follows Mindermann et al. 2021, arXiv 2107.02565, on Fashion-MNIST with 10% of the labels redrawn. Compared with
uniform choice, and with a control: the same examples, as often, in shuffled order.

    python scripts/reproduce/goldiprox.py --data fashion_mnist
    python scripts/reproduce/goldiprox.py                       # scikit-learn's digits
    python scripts/reproduce/goldiprox.py --quick               # a smoke run

A killed study goes on where it stopped. Results: scripts/reproduce/results/goldiprox.json and goldiprox.png.
"""

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from noisy_images import NOISE, Images, accuracy, noisy_images
from selection_plots import plot
from selection_runs import (
    BATCH,
    LEARNING_RATE,
    RATIO,
    against_uniform,
    arguments,
    clock_and_curve,
    irreducible_table,
    thinned,
    train,
    training_flops,
)
from study_jobs import Job, run_all

HERE = Path(__file__).parent
PROXY = "mlp-512"
TARGETS = {"larger": "mlp-2048", "different": "cnn"}
TESTED = 2500  # test images of an evaluation, at most: the larger model takes a second for as many
CONFIGURATIONS = ("uniform", "replay", "replay, shuffled")


def run(job: Job, queue: Any, data: str | None, tables: str, every: int) -> dict[str, Any]:
    """Selects a sequence (part `proxy`) or trains a target, in this process, on one thread; returns its row."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import datasets
    import torch
    import transformers

    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    part, _, name = job.configuration.partition(": ")
    images = noisy_images(data, job.seed)
    folder = Path(tables, f"sequence-{job.seed}")
    if part == "proxy":
        return select(job, images, Path(tables), folder, every, queue)
    return train_target(job, images, TARGETS[part], name, folder, every, queue)


def select(job: Job, images: Images, tables: Path, folder: Path, every: int, queue: Any) -> dict[str, Any]:
    """Trains the proxy by RHO-LOSS and saves its sequence."""
    from hf_efx.goldiprox import GoldiProxTrainer

    table, figures = irreducible_table(images, job.seed, tables / f"holdout-{job.seed}")
    watch = clock_and_curve(lambda m: accuracy(m, *(part[:TESTED] for part in images.test)), every, queue)
    with tempfile.TemporaryDirectory() as temporary:
        args = arguments(
            temporary, job.seed, job.steps, corrupted_column="corrupted", scoring_task="classification"
        )  # fmt: skip
        trainer = GoldiProxTrainer(
            images.model(PROXY, job.seed),
            args,
            train_dataset=images.train,
            irreducible_losses=table,
            callbacks=[watch],
        )
        from transformers import PrinterCallback

        trainer.remove_callback(PrinterCallback)
        sequence = trainer.select(job.steps, fingerprint_columns=["labels"])
        shutil.rmtree(folder, ignore_errors=True)
        sequence.save_to_disk(str(folder))
        report = json.loads(Path(temporary, "selection_report.json").read_text())
    return {
        "best": max(figure for _, _, figure in watch.curve),
        "final": watch.curve[-1][2],
        "steps": job.steps,
        "seconds": watch.curve[-1][1],
        "table_seconds": figures["seconds"],
        "corrupted_share": report["corrupted_share"],
    }


def train_target(
    job: Job, images: Images, target: str, name: str, folder: Path, every: int, queue: Any
) -> dict[str, Any]:
    """Trains a target, uniformly or on the sequence."""
    from hf_efx.goldiprox import ReplayTrainer, SelectionSequence
    from hf_efx.rho_loss.trainer import RHOLossTrainer

    model = images.model(target, 1000 + job.seed)  # not the proxy's initial weights, where both are of one size
    watch = clock_and_curve(lambda m: accuracy(m, *(part[:TESTED] for part in images.test)), every, queue)
    with tempfile.TemporaryDirectory() as temporary:
        if name == "uniform":
            extra = {"selection_ratio": 1.0, "corrupted_column": "corrupted", "scoring_task": "classification"}
            args = arguments(temporary, job.seed, job.steps, **extra)
            row = train(RHOLossTrainer(model, args, train_dataset=images.train, callbacks=[watch]), watch, temporary)
        else:
            sequence = SelectionSequence.load_from_disk(str(folder))
            if name.endswith("shuffled"):
                sequence = sequence.shuffled(job.seed)
            args = plain_arguments(temporary, job)
            trainer = ReplayTrainer(model, args, train_dataset=images.train, sequence=sequence, callbacks=[watch])
            from transformers import PrinterCallback

            trainer.remove_callback(PrinterCallback)
            trainer.train()
            row = {"seconds": watch.curve[-1][1], "curve": watch.curve}
    rows = images.train.with_format("torch")[:BATCH]
    batch = {key: rows[key] for key in ("pixel_values", "labels")}
    figures = {"best": max(f for _, _, f in row["curve"]), "final": row["curve"][-1][2], "steps": job.steps}
    return {**figures, "table_seconds": 0.0, "flops_per_step": training_flops(model, batch, 0, None), **row}


def plain_arguments(folder: str, job: Job) -> Any:
    """What the study's RHOLossArguments say, without the options of selection."""
    from transformers import TrainingArguments

    return TrainingArguments(
        folder,
        max_steps=job.steps,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        per_device_train_batch_size=BATCH,
        weight_decay=0.01,
        max_grad_norm=0.0,
        logging_steps=100,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=job.seed,
    )


def make_claims(rows: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The bars of the study. A seed that never got there counts as infinite."""
    from hf_efx.core.results.evidence import claim

    def values(part: str, name: str, key: str) -> list[float]:
        found = {r["seed"]: r for r in rows if r["configuration"] == f"{part}: {name}"}
        return [found[s].get(key, float("inf")) for s in seeds]

    claims = []
    for part, target in TARGETS.items():
        text = f"{PROXY}'s sequence brings {target} to uniform's best"
        for key, unit, bar in (("steps_share", "steps", 0.25), ("time_share", "time", 1 / 3)):
            measured = values(part, "replay", key)
            claims.append(
                claim(f"{text}; {unit} over uniform's", source="ours", bar=bar, direction="at_most", measured=measured)
            )
        order, mixed = (values(part, n, "best") for n in ("replay", "replay, shuffled"))
        text = f"{target}: order counts; best accuracy on the sequence minus that on its examples in shuffled order"
        gain = [a - b for a, b in zip(order, mixed, strict=True)]
        claims.append(claim(text, source="ours", bar=0.0, direction="at_least", measured=gain, pair=(order, mixed)))
    return claims


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the study."""
    from hf_efx.core.data.fingerprints import data_fingerprint
    from hf_efx.core.results.evidence import StudyRows, print_results, public_command, write_results

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="idx folder or Hub name of images (default: scikit-learn's digits)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    parser.add_argument("--output", type=Path, help="results file (default: results/goldiprox.json here)")
    parser.add_argument("--quick", action="store_true", help="a smoke run: 1 seed, a few steps, written to runs/")
    options = parser.parse_args(argv)
    every = 25
    if options.quick:
        options.seeds, options.steps, every = options.seeds[:1], 20, 5
    path = options.output or (Path("runs/reproduce") if options.quick else HERE / "results") / "goldiprox.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    tables = path.with_suffix(".tables")
    images = noisy_images(options.data, options.seeds[0])
    data = {"name": images.name, "fingerprint": data_fingerprint(images.train, ["labels"])}
    settings = {
        "images": f"half trained on, half held out; {NOISE:.0%} of the labels of both redrawn; clean test images",
        "proxy": f"{PROXY}, {BATCH} of {round(BATCH / RATIO)} drawn",
        "optimiser": f"AdamW, constant rate {LEARNING_RATE}, weight decay 0.01",
        "steps": options.steps,
        "data": data,
    }
    rows = StudyRows(path, settings)
    proxies = [Job("proxy: " + PROXY, seed, options.steps) for seed in options.seeds]
    targets = [
        Job(f"{part}: {n}", s, options.steps) for s in options.seeds for part in TARGETS for n in CONFIGURATIONS
    ]
    for jobs in (proxies, targets):
        run_all(run, jobs, rows, options.workers, data=options.data, tables=str(tables), every=every)
    table = against_uniform([{**row, "part": row["configuration"].partition(": ")[0]} for row in rows.rows])
    claims = make_claims(table, options.seeds)
    plot(table, options.seeds, path.with_suffix(".png"), panels=2)
    found = [one["measured"] for one in claims]
    results = write_results(
        path,
        title="GoldiProx: a small proxy's sequence, replayed by other models",
        headline="see the claims"
        if None in (*found[:2], *found[3:5])
        else f"an MLP's sequence brings a four times wider one to uniform's best in {found[0]:.2f} of its steps and "
        f"{found[1]:.2f} of its time, a CNN in {found[3]:.2f} and {found[4]:.2f}",
        command=public_command(),
        data=data,
        seeds=options.seeds,
        rows=[thinned(row) for row in table],
        claims=claims,
        columns=[
            {"key": "best", "title": "best accuracy", "format": ".4f"},
            {"key": "steps_to", "title": "steps to uniform's best", "format": ",.0f"},
            {"key": "steps_share", "title": "/ uniform's", "format": ".3f"},
            {"key": "time_share", "title": "time / uniform's", "format": ".3f"},
            {"key": "corrupted_share", "title": "corrupted chosen", "format": ".3f"},
        ],
        plot=path.with_suffix(".png").name,
        settings=settings,
        notes=[
            f"Evaluated every {every} steps on up to {TESTED:,} clean test images; the best of these counts.",
            "Seconds are CPU seconds of one thread, the Trainer's making and loading included, evaluation not.",
            "The proxy's own training and the table are not in a replay's time: a sequence is made once and shared.",
            f"Evaluated on up to {TESTED:,} clean test images.",
        ],
    )
    print_results(results)
    rows.finish()
    shutil.rmtree(tables, ignore_errors=True)


if __name__ == "__main__":
    main()

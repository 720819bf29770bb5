"""Step times of the methods on one GPU beside the dense model and peers: GPT-2 124M and a Llama of 341M, in bf16.

    bash scripts/benchmarks/on_gpu.sh OUT                 # at most 7 minutes; needs no network, data or `datasets`
    bash scripts/benchmarks/on_gpu.sh OUT --minutes 3     # what doesn't fit is left out, and named in the notes
    bash scripts/benchmarks/on_gpu.sh OUT --quick         # a smoke run at a tiny size, on the CPU

A step is forward and backward on 8 rows of 1,024 random tokens under bf16 autocast over float32 weights, as a Trainer
with bf16=True has it, timed by CUDA events. The variants of a group live in one process and are timed in turn, round
by round. Peak memory is torch's: a step's own, with the variant's parameters, without those of its neighbours. A floor
is the share of the dense step outside matrix products plus the share inside times the ratio of FLOPs (step_time.py).

After each group OUT/<method>.json is whole: what ends early keeps what is timed.
"""

import argparse
import functools
import gc
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from step_time import product_share, ratio_of_medians, side_by_side, time_floor, timed, training_flops
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, set_seed

from hf_efx import step_context
from hf_efx.core.results.evidence import print_results, public_command, versions, write_results
from hf_efx.core.scoring.scorer import Scorer

ROWS, TOKENS, RATIO = 8, 1024, 0.1  # rows of a step, tokens of a row; share of the scored rows that is trained on
MINUTES, ROUNDS = 6.5, 20  # half a minute is left for Python's start and imports
GROUP_SECONDS = 40.0  # that a group may always take
COMPILE_SECONDS = 50.0  # that compiling is expected to take, until it was seen
COMPILED = "compiled, "
DENSE = "dense"
NO_DROPOUT: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
LLAMA: dict[str, Any] = {
    **{"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 16},
    "tie_word_embeddings": True,
}
TINY: dict[str, dict[str, Any]] = {
    "GPT-2": {"n_layer": 1, "n_embd": 64, "n_head": 4, "vocab_size": 128, "bos_token_id": 0, "eos_token_id": 0},
    "Llama": {**LLAMA, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 128},
}
VARIANTS: dict[str, tuple[str, ...]] = {
    "low_rank": (DENSE, "low rank 0.25", "low rank 0.5", "LoRA 16 (peft)"),
    "slice_out": (DENSE, "slice 0.25", "slice 0.5", "channel dropout 0.25", "layerdrop 0.25"),
    "targeted_dropout": (
        *(DENSE, "targeted weights", "targeted weights, renewed at each step", "targeted units"),
        *("torch.nn.utils.prune's mask", "weight dropout by parametrize"),
    ),
}
MAIN = {
    "low_rank": (DENSE, "low rank 0.25"),
    "slice_out": (DENSE, "slice 0.5"),
    "targeted_dropout": (DENSE, "targeted weights"),
}
RANDOM = ("layerdrop 0.25",)  # its FLOPs depend on chance
TITLES = {
    "low_rank": "Low rank",
    "slice_out": "SliceOut",
    "targeted_dropout": "Targeted dropout",
    "rho_loss": "RHO-LOSS, scoring",
}
COLUMNS = (
    {"key": "milliseconds", "title": "ms", "format": ",.1f"},
    {"key": "step_ratio", "title": "/ reference", "format": ".3f"},
    {"key": "time_floor", "title": "floor", "format": ".3f"},
    {"key": "over_floor", "title": "step / floor", "format": ".3f"},
    {"key": "peak_gigabytes", "title": "peak (GB)", "format": ".2f"},
    {"key": "peak_ratio", "title": "peak / reference", "format": ".3f"},
)
Row = dict[str, Any]


class Clock:
    """How much of the time that was asked for is left, and what was left out for it.

    Attributes:
        end: Of the whole run.
        group_end: Of the group at hand.
        notes: What was left out, in sentences.
        compiling: Seconds that compiling is expected to take.
    """

    def __init__(self, seconds: float) -> None:
        self.end = self.group_end = time.monotonic() + seconds
        self.notes: list[str] = []
        self.compiling = COMPILE_SECONDS

    def begin_group(self, left: int, compiled: bool) -> None:
        """Gives the next group twice its share of what is left, or what compiling may take."""
        now = time.monotonic()
        share = 2 * (self.end - now) / max(left, 1)
        self.group_end = min(self.end, now + max(share, GROUP_SECONDS, 2.5 * self.compiling if compiled else 0.0))

    def fits(self, what: str, seconds: float = 0.0) -> bool:
        """Whether something still fits into the group; where not, a note says so."""
        if time.monotonic() + seconds < self.group_end:
            return True
        self.notes.append(f"{what}: left out, no time was left.")
        return False


def dense_model(shape: str, quick: bool, device: str) -> Any:
    """A new model of a shape."""
    sizes: dict[str, Any] = TINY[shape] if quick else {} if shape == "GPT-2" else LLAMA
    with torch.device(device):
        if shape == "GPT-2":
            return GPT2LMHeadModel(GPT2Config(**{**sizes, **NO_DROPOUT}))
        return LlamaForCausalLM(LlamaConfig(**sizes))


def put_on(method: str, name: str, model: Any) -> Any:
    """A variant of a dense model, made as that method's own benchmark makes it."""
    import low_rank
    import slice_out
    import targeted_dropout

    modules = {"low_rank": low_rank, "slice_out": slice_out, "targeted_dropout": targeted_dropout}
    return modules[method].put_on(name.removeprefix(COMPILED), model)


def step_function(model: Any, batch: torch.Tensor, forward: Any = None) -> Callable[[], None]:
    """Forward and backward, the gradients gone at the next call; each call is a step with draws of its own."""
    context, steps = step_context(model), iter(range(1, 10**9))
    forward = model if forward is None else forward

    def step() -> None:
        model.zero_grad(set_to_none=True)
        if context is not None:
            context.begin_step(next(steps))
        with torch.autocast(batch.device.type, torch.bfloat16):
            loss = forward(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        if context is not None:
            context.end_step()

    return step


def measure(method: str, compiled: bool, shape: str, options: argparse.Namespace, clock: Clock) -> list[Row]:
    """A group: the variants of a method on a model, timed in turn; the dense one is the reference."""
    batch = torch.randint(0, 128, (options.rows, options.tokens), device=options.device)
    models: dict[str, Any] = {}
    steps: dict[str, Callable[[], None]] = {}
    once: dict[str, float] = {}
    for name in [COMPILED + name for name in MAIN[method]] if compiled else VARIANTS[method]:
        label = f"{shape}: {name}"
        if not clock.fits(label, clock.compiling if compiled else 0.0):
            continue
        try:
            set_seed(0)
            model = put_on(method, name, dense_model(shape, options.quick, options.device)).train()
            step = step_function(model, batch, torch.compile(model, backend=options.backend) if compiled else None)
            seconds = timed(step, options.device)
            once[name] = timed(step, options.device)
        except Exception as error:  # of one variant, such as a peer that isn't installed or too much for the memory
            clock.notes.append(f"{label}: not timed, {type(error).__name__}: {str(error)[:200]}")
            say(clock.notes[-1])
            if name.endswith(DENSE):
                return []
            continue
        models[name], steps[name] = model, step
        clock.compiling = seconds if compiled else clock.compiling
        say(f"{label}: first step {seconds:.1f} s")
    if not any(name.endswith(DENSE) for name in steps):
        return []
    rows = timed_rows(shape, steps, once, models, options, clock)
    floors = {} if compiled else time_floors(models, steps, batch, clock, shape)
    for name, row in zip(steps, rows, strict=True):
        if name in floors:
            row |= {**floors[name], "over_floor": row["step_ratio"] / floors[name]["time_floor"]}
    return rows


def timed_rows(
    shape: str,
    functions: Mapping[str, Callable[[], Any]],
    once: Mapping[str, float],
    models: Mapping[str, Any],
    options: argparse.Namespace,
    clock: Clock,
) -> list[Row]:
    """Times and peak memory of functions, in turn, over those of the first; `once` is what a call of each takes."""
    spare = max(clock.group_end - time.monotonic(), 0.0) / 2
    rounds = int(min(max(spare / sum(once.values()), 3), options.rounds))
    times = side_by_side(functions, rounds, options.device)
    reference = next(iter(functions))
    rows: list[Row] = [
        {
            "configuration": f"{shape}: {name}",
            "seed": 0,
            "rounds": rounds,
            "milliseconds": 1000 * statistics.median(times[name]),
            "step_ratio": ratio_of_medians(times, name, reference),
        }
        for name in functions
    ]
    if options.device == "cuda":
        peaks = [peak_bytes(models[name], list(models.values()), function) for name, function in functions.items()]
        for row, peak in zip(rows, peaks, strict=True):
            row |= {"peak_gigabytes": peak / 1e9, "peak_ratio": peak / peaks[0]}
    return rows


def peak_bytes(model: Any, neighbours: Sequence[Any], step: Callable[[], None]) -> int:
    """The most memory that a step holds, with the parameters of its own model."""
    for one in neighbours:
        one.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    own = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    return torch.cuda.max_memory_allocated() - before + own


def time_floors(
    models: Mapping[str, Any], steps: Mapping[str, Callable[[], None]], batch: torch.Tensor, clock: Clock, shape: str
) -> dict[str, dict[str, float]]:
    """The floor of each variant's step; FLOPs are counted on one row, since eager attention takes much memory."""
    if not clock.fits(f"{shape}: floors"):
        return {}
    try:
        share = product_share(steps[DENSE], batch.device.type)
        counted = [name for name in models if name not in RANDOM]
        flops = {name: training_flops(models[name], step_function(models[name], batch[:1])) for name in counted}
    except (RuntimeError, ValueError, AttributeError, KeyError) as error:
        clock.notes.append(f"{shape}: no floors, {type(error).__name__}: {str(error).splitlines()[0][:200]}")
        return {}
    return {
        name: {"flop_ratio": flops[name] / flops[DENSE], "time_floor": time_floor(share, flops[name] / flops[DENSE])}
        for name in counted
    }


def score(shape: str, options: argparse.Namespace, clock: Clock) -> list[Row]:
    """Scoring of a large batch beside a training step on a tenth of it, and a plain forward pass of as many rows."""
    set_seed(0)
    model = dense_model(shape, options.quick, options.device)
    drawn = torch.randint(0, 128, (round(options.rows / RATIO), options.tokens), device=options.device)
    columns = {"input_ids": drawn, "labels": drawn, "attention_mask": torch.ones_like(drawn)}

    def forward() -> None:
        with torch.no_grad(), torch.autocast(drawn.device.type, torch.bfloat16):
            for rows in drawn.split(options.rows):
                model(input_ids=rows, labels=rows, use_cache=False)

    functions: dict[str, Callable[[], Any]] = {
        f"a step on {options.rows} rows": step_function(model.train(), drawn[: options.rows]),
        f"plain forward of {len(drawn)} rows, {options.rows} a pass": forward,
    }
    for size in (options.rows, 2 * options.rows):
        scorer = Scorer(precision="bf16", batch_size=size)
        functions[f"scoring of {len(drawn)} rows, {size} a pass"] = functools.partial(scorer, model, columns)
    once = {name: timed(function, options.device) for name, function in functions.items()}
    say(f"{shape}: scoring, first passes {sum(once.values()):.1f} s")
    return timed_rows(shape, functions, once, dict.fromkeys(functions, model), options, clock)


def say(text: str) -> None:
    """A line on the screen, with or without a terminal."""
    print(f"on_gpu: {text}", flush=True)


def write(folder: Path, method: str, rows: Sequence[Row], notes: Sequence[str], options: argparse.Namespace) -> Any:
    """OUT/<method>.json."""
    return write_results(
        folder / f"{method}.json",
        title=f"{TITLES[method]}: steps of {options.rows} x {options.tokens:,} tokens in bf16 on {options.name}",
        command=public_command(["bash", "scripts/benchmarks/on_gpu.sh", *sys.argv[1:]]).removeprefix("python "),
        data={"name": "random tokens", "fingerprint": "made from the seed"},
        seeds=[0],
        rows=rows,
        claims=[],
        columns=[column for column in COLUMNS if any(column["key"] in row for row in rows)],
        settings={
            "models": "GPT-2, 12 x 768; Llama, 24 x 1024, tied" if not options.quick else "tiny ones",
            "dtype": "bf16 autocast over float32 weights",
            "clock": "CUDA events" if options.device == "cuda" else "perf_counter",
            "reference": "the dense model, compiled alike; of scoring a training step on a tenth of the rows",
        },
        notes=notes,
    )


def groups(compiled: bool) -> list[tuple[str, str, bool]]:
    """Method, model, whether compiled: what matters most comes first."""
    shapes = ("GPT-2", "Llama")
    plain = [(method, shape, False) for shape in shapes for method in (*VARIANTS, "rho_loss")]
    return plain + [(method, shape, True) for method in MAIN for shape in shapes if compiled]


def run(options: argparse.Namespace, clock: Clock) -> None:
    """All groups, as far as the time goes."""
    rows: dict[str, list[Row]] = {}

    def write_all() -> list[Any]:
        done = list(rows.items())
        return [write(options.out, method, list(found), clock.notes, options) for method, found in done if found]

    def out_of_time() -> None:
        clock.notes.append(f"{label}: left out, cut off when the time was up; so is what comes after it.")
        say(clock.notes[-1])
        write_all()
        os._exit(0)  # a compiler or a kernel that runs on can't be asked to stop

    watchdog = threading.Timer(max(clock.end - time.monotonic(), 0.0) + 5, out_of_time)
    watchdog.daemon = True
    watchdog.start()
    work = groups(options.compile)
    for i, (method, shape, compiled) in enumerate(work):
        label = f"{shape}: {COMPILED if compiled else ''}{TITLES[method]}"
        clock.begin_group(len(work) - i, compiled)
        if not clock.fits(label, clock.compiling if compiled else 0.0):
            say(clock.notes[-1])
            continue
        try:
            known = score if method == "rho_loss" else functools.partial(measure, method, compiled)
            found = known(shape, options, clock)
        except Exception as error:  # of one group: the others go on
            clock.notes.append(f"{label}: failed, {type(error).__name__}: {str(error)[:200]}")
            say(clock.notes[-1])
            found = []
        for row in found:
            say(f"{row['configuration']}: {row['milliseconds']:.1f} ms, {row['step_ratio']:.3f} of the reference")
        rows[method] = [*rows.get(method, []), *found]
        write_all()
        gc.collect()
        torch.compiler.reset()
        if options.device == "cuda":
            torch.cuda.empty_cache()
    watchdog.cancel()
    for results in write_all():
        print_results(results)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the results, one JSON file a method")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time for all of it")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave compiled models out")
    parser.add_argument("--quick", action="store_true", help="a smoke run: tiny models, 2 rounds, on the CPU")
    options = parser.parse_args(argv)
    options.device, options.rows, options.tokens, options.rounds = "cuda", ROWS, TOKENS, ROUNDS
    options.backend = "inductor"
    if options.quick:
        options.device, options.rows, options.tokens, options.rounds = "cpu", 2, 16, 2
        options.backend = "eager"
    elif not torch.cuda.is_available():
        parser.error("torch sees no CUDA GPU here; --quick is a smoke run on the CPU")
    options.name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    options.out.mkdir(parents=True, exist_ok=True)
    say(f"on {options.name}, {options.minutes:g} minutes; {', '.join(map(' '.join, versions().items()))}")
    run(options, Clock(60 * options.minutes))


if __name__ == "__main__":
    main()

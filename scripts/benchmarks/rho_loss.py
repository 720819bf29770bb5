"""What RHO-LOSS costs: steps, FLOPs and seconds to uniform's best accuracy, each option of cheaper scoring by itself.

    python scripts/benchmarks/rho_loss.py --data fashion_mnist      # as published: 3 seeds, 2 CPU cores
    python scripts/benchmarks/rho_loss.py                           # scikit-learn's digits
    python scripts/benchmarks/rho_loss.py --quick                   # a smoke run, written to runs/

All run in one process, one after the other, on a quiet machine: wall-clock seconds, in which the Trainer's making,
loading, scoring, choosing and steps are counted, evaluation is not. A run ends where it reaches uniform's best
accuracy of its seed. The peer is composer's SelectiveBackprop (Jiang et al. 2019, arXiv 1910.00762) as a plain loop of
the same rule, since composer takes no batches in the form of a dict.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from step_time import kept_rows, measured

from hf_efx.core.results.evidence import claim, print_results, public_command, write_results

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "reproduce"))

from noisy_images import Images, accuracy, noisy_images  # noqa: E402  # pyright: ignore[reportMissingImports]
from selection_runs import (  # noqa: E402  # pyright: ignore[reportMissingImports]
    BATCH,
    IRREDUCIBLE,
    LEARNING_RATE,
    RATIO,
    arguments,
    clock_and_curve,
    irreducible_table,
    quiet,
    reached,
    training_flops,
)

TARGETS = {"mlp": "mlp-512", "cnn": "cnn"}
SCORING_MODEL = "mlp-64"
COLUMNS = [
    {"key": "ms_per_step", "title": "step (ms)", "format": ".1f"},
    {"key": "step_share", "title": "/ uniform's", "format": ".2f"},
    {"key": "flops_share", "title": "FLOPs of a step / uniform's", "format": ".2f"},
    {"key": "steps_to", "title": "steps to uniform's best", "format": ",.0f"},
    {"key": "steps_to_share", "title": "/ uniform's", "format": ".3f"},
    {"key": "flops_to_share", "title": "FLOPs there / uniform's", "format": ".3f"},
    {"key": "ready_share", "title": "seconds there / uniform's", "format": ".3f"},
    {"key": "paid_share", "title": "table paid", "format": ".3f"},
]
Row = dict[str, Any]
# Each but the first ones is the paper's default with one option changed.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "plain Trainer": {},
    "uniform": {"selection_ratio": 1.0},
    "rho_loss": {},
    "fast preset": {"preset": "fast"},
    "scoring in bf16": {"scoring_precision": "bf16"},
    "scoring batch 64": {"scoring_batch_size": 64},
    "ratio 0.2": {"selection_ratio": 0.2},
    "rescored every 2 steps": {"rescore_every": 2},
    "rescored every 4 steps": {"rescore_every": 4},
    f"scoring model {SCORING_MODEL}": {"train_scoring_model": True},
    "a worker draws ahead": {"dataloader_num_workers": 1},
}
PEER = "SelectiveBackprop's rule, a plain loop"


def run(images: Images, part: str, name: str, seed: int, steps: int, every: int, table: Any, stop_at: float) -> Row:
    """Trains one configuration until it is as good as uniform's best, and returns its row."""
    from transformers import Trainer, TrainingArguments

    from hf_efx.rho_loss.trainer import RHOLossTrainer

    model = images.model(TARGETS[part], seed)
    scorer = images.model(SCORING_MODEL, seed) if "scoring model" in name else None
    watch = clock_and_curve(lambda m: accuracy(m, *images.test), every, clock=time.perf_counter, stop_at=stop_at)
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(folder, seed, steps, scoring_task="classification", **CONFIGURATIONS[name])
        if name == "plain Trainer":
            known = {field: getattr(args, field) for field in TrainingArguments.__dataclass_fields__}
            args = TrainingArguments(**{k: known[k] for k in PLAIN})
            trainer: Any = Trainer(model, args, train_dataset=images.train, callbacks=[watch])
        else:
            options = {"train_dataset": images.train, "irreducible_losses": table, "callbacks": [watch]}
            trainer = RHOLossTrainer(model, args, scoring_model=scorer, **options)
        quiet(trainer).train()
    drawn = 0
    if getattr(args, "selection_ratio", 1.0) < 1:  # pyright: ignore
        drawn = round(BATCH / args.selection_ratio / args.rescore_every)  # pyright: ignore
    return figures(watch.curve, stop_at) | {"flops_per_step": flops(images, model, drawn, scorer)}


PLAIN = (
    *("output_dir", "max_steps", "learning_rate", "lr_scheduler_type", "per_device_train_batch_size", "weight_decay"),
    *("max_grad_norm", "logging_steps", "save_strategy", "report_to", "disable_tqdm", "use_cpu", "seed", "data_seed"),
)


def flops(images: Images, model: Any, drawn: int, scorer: Any) -> int:
    """FLOPs of a step; a trained scoring model's own step is in it."""
    rows = images.train.with_format("torch")[:BATCH]
    batch = {key: rows[key] for key in ("pixel_values", "labels")}
    own = training_flops(scorer, batch, 0, None) if scorer is not None else 0
    return own + training_flops(model, batch, drawn, scorer)


def figures(curve: Sequence[tuple[int, float, float]], bar: float) -> Row:
    """What a curve shows."""
    steps, seconds = reached(curve, bar)
    last = curve[-1]
    return {
        "best": max(figure for _, _, figure in curve),
        "steps_to": steps,
        "seconds_to": seconds,
        # The first evaluation holds what is done once: warm-up, the check of the table.
        "ms_per_step": 1e3 * (last[1] - curve[0][1]) / (last[0] - curve[0][0]) if len(curve) > 1 else None,
    }


def selective_backprop(images: Images, part: str, seed: int, steps: int, every: int, stop_at: float) -> Row:
    """Trains by SelectiveBackprop's rule with composer's defaults, as a plain loop.

    Of each batch a half is kept, drawn with chances that grow with the rank of the loss; every second batch is trained
    on whole; so from 0.5 to 0.9 of the run. Batches of 64 are drawn, so that 32 are trained on where it selects.
    """
    keep, begin, end, interrupt = 0.5, 0.5, 0.9, 2
    model = images.model(TARGETS[part], seed)
    data = images.train.with_format("torch")[:]
    pixels, labels = data["pixel_values"], data["labels"]
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.01)
    generator = np.random.default_rng(seed)
    order, at, curve, spent, start = np.empty(0, np.int64), 0, [], 0.0, time.perf_counter()
    for step in range(1, steps + 1):
        selects = begin <= step / steps < end and step % interrupt
        size = round(BATCH / keep) if selects else BATCH
        if at + size > len(order):
            order, at = generator.permutation(len(labels)), 0
        rows = torch.from_numpy(order[at : at + size])
        at += size
        if selects:
            with torch.no_grad():
                losses = F.cross_entropy(model(pixels[rows])["logits"], labels[rows], reduction="none")
            chances = (losses.argsort().argsort().numpy() / size) ** (1 / keep - 1)
            chosen = generator.choice(size, BATCH, replace=False, p=chances / chances.sum())
            rows = rows[torch.from_numpy(chosen)]
        model(pixels[rows], labels[rows])["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % every == 0:
            spent = time.perf_counter() - start
            curve.append((step, spent, accuracy(model, *images.test)))
            start = time.perf_counter() - spent
            if curve[-1][2] >= stop_at:
                break
    share = (end - begin) / interrupt
    return figures(curve, stop_at) | {"flops_per_step": flops(images, model, round(share * BATCH / keep), None)}


def measure(part: str, seed: int, options: argparse.Namespace) -> list[Row]:
    """The runs of a seed and a model, one after the other."""
    images = noisy_images(options.data, seed)
    common = (seed, options.steps, options.every)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        table, _ = irreducible_table(images, seed, Path(folder), part)
    cost = time.perf_counter() - start
    best = run(images, part, "uniform", *common, table, float("inf"))["best"]
    rows: list[Row] = []
    for name in (*CONFIGURATIONS, PEER):
        print(f"{part}: {name}, seed {seed}", flush=True)
        if name == PEER:
            row = selective_backprop(images, part, *common, best)
        else:
            row = run(images, part, name, *common, table, best)
        scored = name not in ("plain Trainer", "uniform", PEER)
        row["table_seconds"] = cost if scored else 0.0
        rows.append({"configuration": f"{part}: {name}", "seed": seed, "part": part, **row})
    return [_with_shares(row, rows) for row in rows]


def _with_shares(row: Row, rows: Sequence[Row]) -> Row:
    """Adds shares of uniform's steps, FLOPs and seconds."""
    base = next(r for r in rows if r["configuration"] == f"{row['part']}: uniform" and r["seed"] == row["seed"])
    steps = base["ms_per_step"] and row["ms_per_step"] and row["ms_per_step"] / base["ms_per_step"]
    result = {**row, "step_share": steps, "flops_share": row["flops_per_step"] / base["flops_per_step"]}
    if row["steps_to"] is not None and base["steps_to"] is not None:
        work = result["flops_share"] * row["steps_to"] / base["steps_to"]
        result |= {"steps_to_share": row["steps_to"] / base["steps_to"], "flops_to_share": work}
        result |= {"ready_share": row["seconds_to"] / base["seconds_to"]}
        result |= {"paid_share": (row["seconds_to"] + row["table_seconds"]) / base["seconds_to"]}
    return result


def make_claims(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The bars in wall-clock time."""
    claims = []
    for part in TARGETS:
        for name in ("fast preset", "rho_loss"):
            found = [row for row in rows if row["configuration"] == f"{part}: {name}"]
            for key, text, bar in (
                ("ready_share", "with a ready table", 0.5),
                ("paid_share", "the table paid by one run", 0.8),
            ):
                claims.append(
                    claim(
                        f"{part}, {name}: seconds to uniform's best over uniform's, {text}",
                        source="ours",
                        bar=bar,
                        direction="at_most",
                        measured=[row.get(key, float("inf")) for row in found],
                    )
                )
    return claims


def plot(rows: Sequence[Row], path: Path) -> None:
    """Seconds to uniform's best over uniform's, with and without the table's cost."""
    from hf_efx.core.results.plots import matplotlib_pyplot, save_figure

    plt = matplotlib_pyplot()
    figure, axes = plt.subplots(1, len(TARGETS), figsize=(16, 5.5), sharey=True, layout="constrained")
    names = [*CONFIGURATIONS, PEER]
    for axis, part in zip(axes, TARGETS, strict=True):
        for y, name in enumerate(names):
            found = [row for row in rows if row["configuration"] == f"{part}: {name}" and "paid_share" in row]
            if not found:
                axis.text(0, y, " not reached", va="center", fontsize="small")
                continue
            ready, paid = (statistics.fmean(row[key] for row in found) for key in ("ready_share", "paid_share"))
            axis.barh(y, paid, color="C1", label="the table's cost" if y == 2 else None)
            axis.barh(y, ready, color="C0", label="training" if y == 2 else None)
        axis.set_xlim(0, 2)
        axis.set_title(f"{part}: seconds to uniform's best, over uniform's")
        axis.axvline(1, linestyle="--", color="black", linewidth=1)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    axes[0].legend(loc="lower right")
    save_figure(figure, path, dpi=100)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark."""
    from hf_efx.core.data.fingerprints import data_fingerprint

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="idx folder or Hub name of images (default: scikit-learn's digits)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--quick", action="store_true", help="a smoke run: 1 seed, a few steps, written to runs/")
    options = parser.parse_args(argv)
    options.every = 25
    if options.quick:
        options.seeds, options.steps, options.every = options.seeds[:1], 10, 5
    path = options.output or (Path("runs/benchmarks") if options.quick else HERE / "results") / "rho_loss.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    images = noisy_images(options.data, options.seeds[0])
    kept = kept_rows(path, options)
    work = [(part, seed) for seed in options.seeds for part in TARGETS]
    rows = measured(kept, work, lambda part, seed: measure(part, seed, options))
    claims = make_claims(rows)
    plot(rows, path.with_suffix(".png"))
    shown = {one["claim"]: one["measured"] for one in claims}
    ready, paid = list(shown.values())[:2]
    results = write_results(
        path,
        title=f"RHO-LOSS in wall-clock time: {BATCH} trained on, {round(BATCH / RATIO)} scored",
        headline="see the claims"
        if ready is None or paid is None
        else f"an MLP with the fast preset gets to uniform's best accuracy in {ready:.2f} of its seconds, {paid:.2f} "
        "with the irreducible losses paid for",
        command=public_command(),
        data={"name": images.name, "fingerprint": data_fingerprint(images.train, ["labels"])},
        seeds=options.seeds,
        rows=rows,
        claims=claims,
        columns=COLUMNS,
        plot=path.with_suffix(".png").name,
        settings={"steps": options.steps, "targets": TARGETS, "irreducible-loss models": IRREDUCIBLE},
        notes=[
            "uniform goes through our loader, plain Trainer through transformers'; both train on all that they draw.",
            f"{PEER}: outside the Trainer, so its steps are cheaper than any Trainer's.",
            "A cell with fewer seeds than the others: the rest never reached uniform's best within its steps.",
        ],
    )
    print_results(results)
    kept.finish()


if __name__ == "__main__":
    main()

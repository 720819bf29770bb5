"""What measuring prunability costs: bisection against scans of 100 points, and a GPT-2 of 124 million parameters.

    python scripts/benchmarks/prunability.py            # as published: 5 seeds, 2 CPU cores
    python scripts/benchmarks/prunability.py --quick    # a smoke run: small networks, written to runs/

Small networks are trained on scikit-learn's digits and measured by bisection, by the library's own scan, and by a scan
with torch.nn.utils.prune on a copy of the model at each point. The GPT-2 has its published shape and new weights; each
process measures one thing: one evaluation of the loss, prunability by bisection, one evaluation beside a copy of the
weights, or one of the model pruned by torch.nn.utils.prune. Memory is the process' peak above what it holds before
(Linux).
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from step_time import kept_rows, measured, process_memory
from torch import nn
from torch.nn.utils import prune

from hf_efx.core.results.evidence import claim, print_results, public_command, write_results
from hf_efx.prunability import measure_prunability
from hf_efx.prunability.weights import prunable_weights

HERE = Path(__file__).parent
PEER = "one evaluation pruned by torch.nn.utils.prune"
PARTS = ("one evaluation", "prunability", "one evaluation beside a copy", PEER)
COLUMNS = (
    ("bisection_fraction", "bisection", ".3f"),
    ("grid_fraction", "scan", ".3f"),
    ("peer_fraction", "scan with torch.nn.utils.prune", ".3f"),
    ("bisection_evaluations", "evaluations", ".1f"),
    ("seconds_share", "seconds / scan's", ".3f"),
    ("peer_share", "/ torch.nn.utils.prune's", ".3f"),
    ("passes", "forward passes", ".1f"),
    ("time_share", "seconds / one evaluation's", ".2f"),
    ("peak_bytes", "peak above the model (bytes)", ",.0f"),
    ("extra_share", "above one evaluation's, in copies of the weights", ".2f"),
)
NOTES = [
    "The networks of digits evaluate in a millisecond or a few, so that the interval, 1,000 resamplings of the "
    "examples whatever the network, weighs in the seconds of bisection; torch.nn.utils.prune's scan gives none.",
    "GPT-2 has new weights, which stand any pruning: bisection ends at the grid's lowest point, where the most is "
    "kept aside: the zeroed weights and a byte a ranked weight. Embeddings (0.32 of the weights) aren't ranked.",
    "torch.nn.utils.prune ranks the same weights by global_unstructured, half of GPT-2's; it keeps masks and pruned "
    "weights beside the originals.",
]
Row = dict[str, Any]


def trained_network(seed: int, width: int, steps: int) -> tuple[nn.Module, Any]:
    """A network of one hidden layer trained on digits, and its losses."""
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    pixels, labels = torch.tensor(data["data"][:1000] / 8 - 1).float(), torch.tensor(data["target"][:1000])
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(pixels), labels).backward()
        optimizer.step()
    return model, lambda model: F.cross_entropy(model(pixels), labels, reduction="none")


def against_grid(seed: int, width: int, steps: int) -> Row:
    """The three searches on one network."""
    model, losses = trained_network(seed, width, steps)
    row: Row = {}
    results = {}
    for name, exhaustive in (("bisection", False), ("grid", True)):
        start = time.perf_counter()
        results[name] = measure_prunability(model, losses, exhaustive=exhaustive)
        row[f"{name}_seconds"] = time.perf_counter() - start
        row[f"{name}_evaluations"] = results[name].evaluations
        row[f"{name}_fraction"] = results[name].fraction
    start = time.perf_counter()
    row["peer_fraction"] = peer_scan(model, losses, results["grid"].bound)
    row["peer_seconds"] = time.perf_counter() - start
    row["peer_share"] = row["bisection_seconds"] / row["peer_seconds"]
    grid = results["grid"]
    row |= {"lowest": grid.lowest, "monotone": grid.lowest == grid.fraction}
    row |= {"off": abs(row["bisection_fraction"] - grid.fraction)}
    return row | {"seconds_share": row["bisection_seconds"] / row["grid_seconds"]}


def pruned_by_peer(model: nn.Module, pruned: int | float) -> None:
    """Puts torch.nn.utils.prune's masks on the weights that prunability ranks: a number or a share of them all."""
    modules = [model.get_submodule(name.rpartition(".")[0]) for name in prunable_weights(model)]
    prune.global_unstructured([(module, "weight") for module in modules], prune.L1Unstructured, amount=pruned)


def peer_scan(model: nn.Module, losses: Any, bound: float) -> float:
    """The smallest of 100 fractions kept from which on all stay within the bound, by torch.nn.utils.prune."""
    count = sum(weight.numel() for weight in prunable_weights(model).values())
    found = 100
    for step in range(99, 0, -1):
        candidate = copy.deepcopy(model)
        pruned_by_peer(candidate, count - count * step // 100)
        with torch.no_grad():
            within = float(losses(candidate).mean()) <= bound
        found = step if within and found == step + 1 else found
    return found / 100


def gpt2_part(part: str, small: bool, batches: int) -> Row:
    """One measurement on GPT-2's shape, in this process: seconds, forward passes, and peak memory in bytes."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape: dict[str, Any] = {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 512} if small else {}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).eval()
    model.loss_type = "ForCausalLM"
    ids = torch.randint(model.config.vocab_size, (batches, 128))
    rows = [{"input_ids": one.tolist(), "labels": one.tolist()} for one in ids]
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    from hf_efx.prunability.sample import Sample

    sample = Sample(rows, None, batch_size=4)
    forwards = len(sample.batches)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    with torch.no_grad():
        model(ids[:1, :2])  # what is set up once
    calls.clear()
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is held now (Linux)
    held = process_memory("VmRSS")
    start = time.perf_counter()
    result = None
    if part == PARTS[1]:
        result = measure_prunability(model, sample)
    else:
        kept = [p.detach().clone() for p in model.parameters()] if part == PARTS[2] else []
        if part == PEER:
            pruned_by_peer(model, 0.5)
        sample(model)
        del kept
    row = {"seconds": time.perf_counter() - start, "passes": len(calls) / forwards, "weights_bytes": weights}
    row |= {"peak_bytes": process_memory("VmHWM") - held, "resident_bytes": held}
    if result is not None:
        ranked = sum(p.numel() for name, p in model.named_parameters() if name in result.kept)
        row |= {"evaluations": result.evaluations, "fraction": result.fraction, "ranked_share": 4 * ranked / weights}
    return row


def measure(name: str, seed: int, steps: int, quick: bool) -> list[Row]:
    """The row of one configuration; on GPT-2's shape in a process of its own: a peak of memory never falls."""
    kind, _, what = name.partition(": ")
    if kind == "digits":
        return [{"configuration": name, **against_grid(seed, int(what.split()[-1]), steps)}]
    words = [sys.executable, __file__, "--part", what, *(["--quick"] if quick else [])]
    output = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    return [{"configuration": name, **json.loads(output.splitlines()[-1])}]


def add_shares(rows: Sequence[Row]) -> None:
    """Sets the measurements on GPT-2's shape against the first one of the same seed, in place."""
    for row in rows:
        if "peak_bytes" in row:
            base = next(r for r in rows if r["seed"] == row["seed"] and r["configuration"] == f"GPT-2: {PARTS[0]}")
            row["extra_share"] = (row["peak_bytes"] - base["peak_bytes"]) / row["weights_bytes"]
            row["time_share"] = row["seconds"] / base["seconds"]


def make_claims(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The bars: evaluations, agreement with the grid, passes and memory on GPT-2's shape."""
    small = [row for row in rows if "grid_fraction" in row]
    large, peer = ([row for row in rows if row["configuration"] == f"GPT-2: {part}"] for part in (PARTS[1], PEER))
    common: dict[str, Any] = {"source": "ours", "direction": "at_most"}
    monotone = [row["off"] for row in small if row["monotone"]]
    return [
        claim(
            "loss evaluations of one measure",
            bar=12,
            measured=max(r["bisection_evaluations"] for r in small),
            **common,
        ),
        claim(
            f"largest distance from the scan's answer, {len(monotone)} of {len(small)} networks whose loss crosses "
            "the bound once",
            bar=0.01,
            measured=max(monotone, default=float("nan")),
            **common,
        ),
        claim(
            "largest distance between the scan's answer and torch.nn.utils.prune's",
            bar=0.01,
            measured=max(abs(row["peer_fraction"] - row["grid_fraction"]) for row in small),
            **common,
        ),
        claim("seconds over those of the scan", bar=0.15, measured=[row["seconds_share"] for row in small], **common),
        claim(
            "seconds over those of a scan with torch.nn.utils.prune",
            bar=0.15,
            measured=[row["peer_share"] for row in small],
            **common,
        ),
        claim("GPT-2: forward passes over the sample", bar=15, measured=[row["passes"] for row in large], **common),
        claim(
            "GPT-2: peak memory above that of one evaluation, in copies of the weights",
            bar=1.0,
            measured=[row["extra_share"] for row in large],
            **common,
        ),
        claim(
            "GPT-2: that peak over the one of a single evaluation pruned by torch.nn.utils.prune",
            bar=1.0,
            measured=[a["extra_share"] / b["extra_share"] for a, b in zip(large, peer, strict=True)],
            **common,
        ),
    ]


def headline(rows: Sequence[Row]) -> str:
    """Evaluations and seconds of the small networks, passes and memory of GPT-2."""
    small = [row for row in rows if "grid_fraction" in row]
    large = [row for row in rows if row["configuration"] == f"GPT-2: {PARTS[1]}"]
    share, passes, memory = (
        statistics.fmean(row[key] for row in part)
        for part, key in ((small, "peer_share"), (large, "passes"), (large, "extra_share"))
    )
    return (
        f"prunability in {max(row['bisection_evaluations'] for row in small)} evaluations at most, {share:.2f} of the "
        f"seconds of a scan with torch.nn.utils.prune; GPT-2's shape in {passes:.0f} forward passes, at its peak "
        f"{memory:.2f} copies of the weights above one evaluation"
    )


def plot(rows: Sequence[Row], path: Path) -> None:
    """Answers of both searches, evaluations, and GPT-2's memory."""
    from hf_efx.core.results.plots import matplotlib_pyplot, save_figure

    plt = matplotlib_pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    small = [row for row in rows if "grid_fraction" in row]
    axes[0].plot([0, 1], [0, 1], color="black", linewidth=1)
    for kind, color in ((True, "C0"), (False, "C3")):
        chosen = [row for row in small if row["monotone"] is kind]
        points = [row["grid_fraction"] for row in chosen], [row["bisection_fraction"] for row in chosen]
        label = "loss crosses the bound once" if kind else "more than once"
        axes[0].scatter(*points, color=color, label=label)
    axes[0].set(xlabel="scan of 100 points", ylabel="bisection", title="prunability")
    axes[0].legend()
    means = [statistics.fmean(row[f"{name}_evaluations"] for row in small) for name in ("bisection", "grid")]
    axes[1].bar(["bisection", "scan"], means)
    axes[1].set(title="loss evaluations")
    names = [f"GPT-2: {part}" for part in PARTS]
    shares = [[r["peak_bytes"] / r["weights_bytes"] for r in rows if r["configuration"] == name] for name in names]
    labels = [part.replace("one evaluation ", "one evaluation\n").replace("by ", "by\n") for part in PARTS]
    axes[2].bar(labels, [statistics.fmean(one) for one in shares])
    axes[2].tick_params(axis="x", labelsize="small")
    axes[2].set(title="GPT-2: peak memory above the model,\nin copies of its weights")
    for axis in axes:
        axis.grid(alpha=0.3)
    save_figure(figure, path, dpi=100)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--quick", action="store_true", help="a smoke run: small networks, written to runs/")
    parser.add_argument("--part", choices=PARTS, help="measure one thing on GPT-2's shape and print it")
    options = parser.parse_args(argv)
    if options.part:
        print(json.dumps(gpt2_part(options.part, options.quick, 4 if options.quick else 16)))
        return
    path = options.output or (Path("runs/benchmarks") if options.quick else HERE / "results") / "prunability.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    widths, steps = ((16, 64), 50) if options.quick else ((64, 128, 256, 512), 300)
    work = [(f"digits: width {width}", seed) for width in widths for seed in options.seeds]
    work += [(f"GPT-2: {part}", seed) for seed in options.seeds[: 1 if options.quick else 3] for part in PARTS]
    kept = kept_rows(path, options)
    rows = measured(kept, work, lambda name, seed: measure(name, seed, steps, options.quick))
    add_shares(rows)
    claims = make_claims(rows)
    plot(rows, path.with_suffix(".png"))
    results = write_results(
        path,
        title="Prunability: bisection against scans, and GPT-2's shape",
        headline=headline(rows),
        command=public_command(),
        data={"name": "digits; random tokens", "fingerprint": "of scikit-learn and of the seed"},
        seeds=options.seeds,
        rows=rows,
        claims=claims,
        columns=[{"key": key, "title": title, "format": spec} for key, title, spec in COLUMNS],
        plot=path.with_suffix(".png").name,
        settings={"digits": f"1,000 images, {steps} steps of Adam", "GPT-2": "16 examples of 128 tokens, 4 at a time"},
        notes=NOTES,
    )
    print_results(results)
    kept.finish()


if __name__ == "__main__":
    main()

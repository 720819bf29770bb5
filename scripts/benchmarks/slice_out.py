"""Step time and saved activations of GPT-2 (12 layers, 768 wide) with SliceOut beside no dropout, dropout and peers.

    python scripts/benchmarks/slice_out.py --compile        # as published: 1,024 tokens a step, 3 repeats, 2 CPU cores
    python scripts/benchmarks/slice_out.py                  # without the compiled variants
    python scripts/benchmarks/slice_out.py --quick          # a smoke run at a small size, written to runs/
    python scripts/benchmarks/slice_out.py --device cuda

A step is forward and backward; the optimiser, which has the same work everywhere, is apart. The variants of a group
live in one process and are timed in turn, round by round, with the model without dropout in every group: ratios to it
are what counts. A benchmark that was ended goes on at the group where it was.
"""

import argparse
import functools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from step_time import (
    kept_rows,
    measured,
    product_share,
    ratio_of_medians,
    saved_bytes,
    side_by_side,
    time_floor,
    training_flops,
)
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

from hf_efx import SliceOutConfig, get_efx_model, slice_out_report, step_context
from hf_efx.core.results.evidence import claim, print_results, public_command, write_results

HERE = Path(__file__).parent
NONE, DROPOUT, FAST_DROPOUT = "none", "dropout", "dropout, attention 0"
# GPT-2's own; "none" sets all three to 0.
DROPOUTS: dict[str, dict[str, Any]] = {DROPOUT: {}, FAST_DROPOUT: {"attn_pdrop": 0.0}}
NO_DROPOUT: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
SLICED: dict[str, dict[str, Any]] = {
    "slice 0.25": {"rate": 0.25},
    "slice 0.5": {"rate": 0.5},
    "slice 0.1": {"rate": 0.1},
    "slice 0.75": {"rate": 0.75},
    "slice 0.25, mlp": {"rate": 0.25, "targets": ("mlp",)},
    "slice 0.5, mlp": {"rate": 0.5, "targets": ("mlp",)},
    "slice 0.25, attention": {"rate": 0.25, "targets": ("attention",)},
    "slice 0.5, attention": {"rate": 0.5, "targets": ("attention",)},
    "slice 0.5, in place": {"rate": 0.5, "accumulate_in_place": True},
    "slice 0.5, circular": {"rate": 0.5, "starts": "circular"},
    "slice 0.5, all starts": {"rate": 0.5, "starts": "all"},
    "slice 0.5, probabilistic": {"rate": 0.5, "starts": "all", "normalization": "probabilistic"},
    "slice 0.5, head width": {"rate": 0.5, "attention": "head_dim"},
}
PEERS = {"channel dropout 0.25": 0.25, "layerdrop 0.25": 0.25}
MAIN = ("slice 0.25", "slice 0.5")
COMPILED = "compiled, "
GROUPS = (
    (NONE, DROPOUT, FAST_DROPOUT, *MAIN),
    (NONE, *PEERS, "slice 0.1", "slice 0.75"),
    (NONE, "slice 0.25, mlp", "slice 0.5, mlp", "slice 0.25, attention", "slice 0.5, attention"),
    (NONE, "slice 0.5, in place", "slice 0.5, circular", "slice 0.5, all starts", "slice 0.5, probabilistic"),
    (NONE, "slice 0.5, head width"),
)
COLUMNS = [
    {"key": "step_seconds", "title": "step (s)", "format": ".2f"},
    {"key": "step_ratio", "title": "/ none", "format": ".3f"},
    {"key": "flop_ratio", "title": "FLOPs / none", "format": ".3f"},
    {"key": "time_floor", "title": "floor", "format": ".3f"},
    {"key": "over_floor", "title": "step / floor", "format": ".3f"},
    {"key": "over_dropout", "title": "/ dropout", "format": ".3f"},
    {"key": "over_fast_dropout", "title": "/ dropout, attention 0", "format": ".3f"},
    {"key": "saved_ratio", "title": "saved bytes / none", "format": ".3f"},
    {"key": "over_predicted_bytes", "title": "/ by widths", "format": ".3f"},
]
NOTES = [
    "Dropout is GPT-2's own: .1 on residual branches, embeddings and attention weights.",
    "Channel dropout drops whole FFN units by a mask, layerdrop whole layers, each at the rate named.",
    "The bars' variants were measured at every seed, the others at the first.",
    "Compiled variants are over the compiled model without dropout.",
    "composer's GyroDropout was not timed: composer 0.32 asks for torch below 2.7.1.",
    "A step below its floor: the dense model ran slower in that group's rounds than the noise of its floor "
    "allows; such rows compare within their group alone. Dropout's own time moved most from seed to seed.",
]
Row = dict[str, Any]
Step = Callable[[], None]


def build(name: str, config: dict[str, Any], device: str) -> Any:
    """A variant's model, in training mode."""
    name = name.removeprefix(COMPILED)
    model = put_on(name, GPT2LMHeadModel(GPT2Config(**config, **DROPOUTS.get(name, NO_DROPOUT))))
    return model.to(device).train()


def put_on(name: str, model: Any) -> Any:
    """A variant of a GPT-2 or Llama without dropout."""
    if name in SLICED:
        get_efx_model(model, SliceOutConfig(**SLICED[name]))
    gpt2 = type(model) is GPT2LMHeadModel
    blocks: Any = (model.transformer.h if gpt2 else model.model.layers) if name in PEERS else ()
    for block in blocks:
        if name.startswith("channel"):
            act = block.mlp.act if gpt2 else block.mlp.act_fn
            act.register_forward_hook(functools.partial(_drop_channels, PEERS[name]))
        else:
            block.forward = functools.partial(_perhaps, block.forward, PEERS[name])
    return model


def _drop_channels(rate: float, module: nn.Module, inputs: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Drops the same units for all positions: what SliceOut drops in the FFN, by a mask."""
    kept = torch.rand(hidden.shape[-1], device=hidden.device) >= rate
    return hidden * (kept / (1 - rate))


def _perhaps(forward: Callable[..., Any], rate: float, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Stochastic depth (Huang et al. 2016): skips the layer at this rate."""
    return hidden if torch.rand(()).item() < rate else forward(hidden, *args, **kwargs)


def step_function(model: Any, batch: torch.Tensor, compiled: bool) -> Step:
    """Forward and backward, gradients left in place for the optimiser; each call is a step with slices of its own."""
    context, forward = step_context(model), torch.compile(model) if compiled else model
    steps = iter(range(10**9))

    def step() -> None:
        model.zero_grad(set_to_none=True)
        if context is not None:
            context.begin_step(next(steps))
        forward(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        if context is not None:
            context.end_step()

    return step


def measure(
    names: Sequence[str], config: dict[str, Any], options: argparse.Namespace, seed: int, counts: dict[str, Any]
) -> list[Row]:
    """One repeat of a group: fresh weights and data, timed in turn; the first is the reference.

    `counts` keeps what a variant's first repeat counted.
    """
    set_seed(seed)
    reference, device = names[0], options.device
    batch = torch.randint(0, GPT2Config(**config).vocab_size, (1, options.tokens), device=device)
    models = {name: build(name, config, device) for name in names}
    steps = {name: step_function(models[name], batch, name.startswith(COMPILED)) for name in names}
    times = side_by_side(steps, options.rounds, device)
    if reference != NONE:  # what is compiled hides its products from the counters
        return [
            {
                "configuration": name,
                "seed": seed,
                "step_seconds": statistics.median(times[name]),
                "step_ratio": ratio_of_medians(times, name, reference),
            }
            for name in names
        ]
    share = product_share(steps[reference], device)
    for name in names:
        if name not in counts:
            counts[name] = count(name, models[name], steps[name], batch)
    rows = []
    for name in names:
        row: Row = {
            "configuration": name,
            "seed": seed,
            "step_seconds": statistics.median(times[name]),
            "step_ratio": ratio_of_medians(times, name, reference),
            "product_share_of_none": share,
            **counts[name],
        }
        if counts[name]:
            row["saved_ratio"] = row["saved_bytes"] / counts[reference]["saved_bytes"]
            row["flop_ratio"] = row["flops"] / counts[reference]["flops"]
            row["time_floor"] = time_floor(share, row["flop_ratio"])
            row["over_floor"] = row["step_ratio"] / row["time_floor"]
        if name in MAIN:
            row["over_dropout"] = ratio_of_medians(times, name, DROPOUT)
            row["over_fast_dropout"] = ratio_of_medians(times, name, FAST_DROPOUT)
        rows.append(row)
    return rows


def count(name: str, model: Any, step: Step, batch: torch.Tensor) -> dict[str, float]:
    """FLOPs and bytes, which depend neither on values nor on where slices start."""
    if name.startswith("layerdrop"):  # there they do depend on chance
        return {}
    result: dict[str, float] = {"saved_bytes": saved_bytes(model, step), "flops": training_flops(model, step)}
    if name in MAIN:
        report = slice_out_report(model, {"input_ids": batch, "labels": batch, "use_cache": False}, rounds=1)
        result["over_predicted_bytes"] = report.bytes / report.predicted_bytes
    return result


def make_claims(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The bars of the benchmark."""
    claims = []
    for name, floor, dropout in (("slice 0.25", 1.08, 0.75), ("slice 0.5", 1.05, 0.6)):
        found = [row for row in rows if row["configuration"] == name]
        for key, text, bar in (
            ("over_floor", "time of a step over its time floor", floor),
            ("over_predicted_bytes", "bytes of saved activations over what the widths say", 1.1),
            ("over_dropout", "time of a step over that with GPT-2's own dropout, attention dropout .1", dropout),
        ):
            values = [row[key] for row in found]
            claims.append(claim(f"{name}: {text}", source="ours", bar=bar, direction="at_most", measured=values))
    return claims


def plot(rows: Sequence[Row], path: Path) -> None:
    """Step time with its floor, and saved activations, over those without dropout."""
    from hf_efx.core.results.plots import matplotlib_pyplot, save_figure

    plt = matplotlib_pyplot()
    names = list(dict.fromkeys(row["configuration"] for row in rows if not row["configuration"].startswith(COMPILED)))
    figure, axes = plt.subplots(1, 2, figsize=(12, 0.34 * len(names) + 1.2), sharey=True, layout="constrained")
    titles = ("forward and backward / none (dashes: time floor)", "saved activations / none")
    for axis, key, title in zip(axes, ("step_ratio", "saved_ratio"), titles, strict=True):
        for y, name in enumerate(names):
            values = [row[key] for row in rows if row["configuration"] == name and key in row]
            axis.barh(y, statistics.fmean(values or [0.0]), color="C0" if name in SLICED else "C7", alpha=0.6)
            axis.plot(values, [y] * len(values), "o", color="black", markersize=3)
            floors = [row["time_floor"] for row in rows if row["configuration"] == name and "time_floor" in row]
            if key == "step_ratio" and floors:
                axis.plot([statistics.fmean(floors)] * 2, [y - 0.4, y + 0.4], "--", color="C3")
        axis.set_title(title)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    save_figure(figure, path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one repeat each")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds in a repeat")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile", action="store_true", help="time the main variants under torch.compile too")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--quick", action="store_true", help="a smoke run: a small model, 2 rounds, written to runs/")
    options = parser.parse_args(argv)
    config: dict[str, Any] = {}
    if options.quick:
        options.seeds, options.rounds, options.tokens = options.seeds[:1], 2, 128
        config = {"n_layer": 2, "n_embd": 128, "n_head": 8, "vocab_size": 1000, "bos_token_id": 0, "eos_token_id": 0}
    path = options.output or (Path("runs/benchmarks") if options.quick else HERE / "results") / "slice_out.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    groups: dict[str, Sequence[str]] = {"; ".join(names): names for names in GROUPS}
    bars = next(iter(groups))
    if options.compile:
        names = tuple(COMPILED + name for name in (NONE, *MAIN))
        groups["; ".join(names)] = names
    first, *others = options.seeds
    work = [(group, first) for group in groups] + [(bars, seed) for seed in others]
    kept, counts = kept_rows(path, options), {}
    rows = measured(kept, work, lambda group, seed: measure(groups[group], config, options, seed, counts))
    plot(rows, path.with_suffix(".png"))
    claims = make_claims(rows)
    found = {one["claim"]: one["measured"] for one in claims}
    quarter, half = (found[next(key for key in found if key.startswith(f"{name}: time"))] for name in MAIN)
    shape = GPT2Config(**config)
    results = write_results(
        path,
        title=f"SliceOut on GPT-2, {shape.n_layer} layers, {shape.n_embd} wide, {options.tokens} tokens a step",
        headline=f"a training step takes {quarter:.2f} times its time floor at rate 0.25, {half:.2f} times at 0.5",
        command=public_command(),
        data={"name": "random tokens", "fingerprint": "made from the seed"},
        seeds=options.seeds,
        rows=rows,
        claims=claims,
        columns=COLUMNS,
        plot=path.with_suffix(".png").name,
        settings={
            "model": f"GPT-2, {shape.n_layer} x {shape.n_embd}",
            "rounds": options.rounds,
            "dtype": "float32",
            "device": torch.cuda.get_device_name() if options.device == "cuda" else "CPU",
        },
        notes=NOTES,
    )
    print_results(results)
    kept.finish()


if __name__ == "__main__":
    main()

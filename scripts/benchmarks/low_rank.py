"""Step time, memory and decoding speed of a low-rank GPT-2 (12 layers, 768 wide) beside the dense one and its peers.

    python scripts/benchmarks/low_rank.py                  # as published: 1,024 tokens a step, 3 repeats, 2 CPU cores
    python scripts/benchmarks/low_rank.py --quick          # a smoke run at a small size, written to runs/
    python scripts/benchmarks/low_rank.py --device cuda

All variants live in one process and are timed in turn, round by round; ratios are what counts. Peers: peft's LoRA, and
GaLore by galore-torch where that is installed (`pip install galore-torch`). A step is forward and backward; the
optimiser's time stands apart.
"""

import argparse
import importlib.util
import statistics
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from step_time import (
    kept_rows,
    measured,
    product_share,
    ratio_of_medians,
    side_by_side,
    time_floor,
    training_flops,
)
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

from hf_efx import LowRankConfig, get_efx_model
from hf_efx.core.results.evidence import claim, print_results, public_command, write_results

HERE = Path(__file__).parent
LORA_RANK, GALORE_RANK = 16, 128
DECODED = 48
COLUMNS = [
    {"key": "trained_parameters", "title": "trained parameters", "format": ","},
    {"key": "step_ratio", "title": "step / dense", "format": ".3f"},
    {"key": "time_floor", "title": "floor", "format": ".3f"},
    {"key": "over_floor", "title": "step / floor", "format": ".3f"},
    {"key": "optimiser_seconds", "title": "optimiser (s)", "format": ".3f"},
    {"key": "gradient_bytes", "title": "gradients (bytes)", "format": ","},
    {"key": "optimiser_bytes", "title": "optimiser (bytes)", "format": ","},
    {"key": "decode_tokens_per_second", "title": "decoded tokens/s", "format": ".1f"},
]
Row = dict[str, Any]


def put_on(name: str, model: Any) -> Any:
    """A variant of a dense model."""
    if name.startswith("low rank"):
        # He factors need no SVD, and what is timed doesn't depend on values.
        get_efx_model(model, LowRankConfig(rank=float(name.split()[-1]), init="he"))
    if name.startswith("LoRA"):
        from peft import LoraConfig, get_peft_model

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for a renamed attribute
            gpt2 = isinstance(model, GPT2LMHeadModel)
            model = get_peft_model(model, LoraConfig(r=LORA_RANK, target_modules="all-linear", fan_in_fan_out=gpt2))
    return model


def build(name: str, config: GPT2Config, device: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A variant's model and optimiser."""
    model = put_on(name, GPT2LMHeadModel(config))
    model = model.to(device).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    if name.startswith("GaLore"):
        from galore_torch import GaLoreAdamW  # pyright: ignore[reportMissingImports]

        # By hand: transformers' own option takes nn.Linear alone, and GPT-2 is made of Conv1D.
        projected = [p for n, p in model.named_parameters() if ".h." in n and p.ndim == 2]
        rest = [p for p in trained if all(p is not q for q in projected)]
        options = {"rank": GALORE_RANK, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
        groups = [{"params": rest}, {"params": projected, **options}]
        return model, GaLoreAdamW(groups, lr=1e-3, no_deprecation_warning=True)
    return model, torch.optim.AdamW(trained, lr=1e-3)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimiser's tensors; GaLore's projections count."""
    total = 0
    for state in optimizer.state.values():
        values = list(state.values()) + [getattr(state.get("projector"), "ortho_matrix", None)]
        total += sum(v.numel() * v.element_size() for v in values if torch.is_tensor(v) and v.numel() > 1)
    return total


def step_function(model: nn.Module, batch: torch.Tensor) -> Callable[[], None]:
    """Forward and backward, gradients left in place for the optimiser."""

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(input_ids=batch, labels=batch).loss.backward()

    return step


def decode_function(model: Any, prompt: torch.Tensor) -> Callable[[], None]:
    """Greedy decoding of `DECODED` tokens with a cache."""

    def decode() -> None:
        mode = model.training
        model.eval().generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=DECODED,
            min_new_tokens=DECODED,
            do_sample=False,
            pad_token_id=0,
        )
        model.train(mode)

    return decode


def measure(names: Sequence[str], config: GPT2Config, tokens: int, rounds: int, seed: int, device: str) -> list[Row]:
    """One repeat: all variants with fresh weights and data, timed in turn."""
    set_seed(seed)
    batch = torch.randint(0, config.vocab_size, (1, tokens), device=device)
    variants = {name: build(name, config, device) for name in names}
    steps = {name: step_function(model, batch) for name, (model, _) in variants.items()}
    times = side_by_side(steps, rounds, device)
    for name, (_, optimizer) in variants.items():
        steps[name]()
        optimizer.step()  # its first step makes the state, and GaLore's projections
    optimisers = {name: optimizer.step for name, (_, optimizer) in variants.items()}
    updates = side_by_side(optimisers, max(rounds // 2, 2), device)
    decoders = {name: decode_function(model, batch[:, :16]) for name, (model, _) in variants.items()}
    decoding = side_by_side(decoders, max(rounds // 3, 2), device)
    share = product_share(steps["dense"], device)
    flops = {name: training_flops(model, steps[name]) for name, (model, _) in variants.items()}
    rows = []
    for name, (model, optimizer) in variants.items():
        steps[name]()
        trained = [p for p in model.parameters() if p.requires_grad]
        floor = time_floor(share, flops[name] / flops["dense"])
        rows.append(
            {
                "configuration": name,
                "seed": seed,
                "parameters": sum(p.numel() for p in model.parameters()),
                "trained_parameters": sum(p.numel() for p in trained),
                "step_seconds": statistics.median(times[name]),
                "step_ratio": ratio_of_medians(times, name, "dense"),
                "flop_ratio": flops[name] / flops["dense"],
                "product_share_of_dense": share,
                "time_floor": floor,
                "over_floor": ratio_of_medians(times, name, "dense") / floor,
                "optimiser_seconds": statistics.median(updates[name]),
                "gradient_bytes": sum(p.grad.numel() * p.grad.element_size() for p in trained if p.grad is not None),
                "optimiser_bytes": state_bytes(optimizer),
                "decode_tokens_per_second": DECODED / statistics.median(decoding[name]),
                "decode_ratio": ratio_of_medians(decoding, name, "dense"),
            }
        )
    return rows


def make_claims(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The bars of the benchmark."""

    def values(name: str, key: str) -> list[float]:
        return [row[key] for row in rows if row["configuration"] == name]

    def memory_over_parameters(key: str) -> list[float]:
        columns = [values(n, k) for n in ("low rank 0.25", "dense") for k in (key, "trained_parameters")]
        return [(low / low_p) / (dense / dense_p) for low, low_p, dense, dense_p in zip(*columns, strict=True)]

    seconds = (values("low rank 0.25", "step_seconds"), values("dense", "step_seconds"))
    speeds = (values("low rank 0.25", "decode_tokens_per_second"), values("dense", "decode_tokens_per_second"))
    return [
        claim(
            "rank 0.25: time of a training step over its time floor",
            source="ours",
            bar=1.08,
            direction="at_most",
            measured=values("low rank 0.25", "over_floor"),
        ),
        claim(
            "rank 0.25: time of a training step over dense",
            source="ours",
            bar=1.0,
            direction="at_most",
            measured=values("low rank 0.25", "step_ratio"),
            pair=seconds,
        ),
        claim(
            "rank 0.25: optimiser memory over dense, by the ratio of parameters",
            source="ours",
            bar=1.02,
            direction="at_most",
            measured=memory_over_parameters("optimiser_bytes"),
        ),
        claim(
            "rank 0.25: gradient memory over dense, by the ratio of parameters",
            source="ours",
            bar=1.02,
            direction="at_most",
            measured=memory_over_parameters("gradient_bytes"),
        ),
        claim(
            "rank 0.25: tokens decoded per second over dense",
            source="ours",
            bar=1.0,
            direction="at_least",
            measured=[low / dense for low, dense in zip(*speeds, strict=True)],
            pair=speeds,
        ),
    ]


def plot(rows: Sequence[Row], path: Path) -> None:
    """Step time with its floor, and optimiser memory, for each variant."""
    from hf_efx.core.results.plots import matplotlib_pyplot, save_figure

    plt = matplotlib_pyplot()
    names = list(dict.fromkeys(row["configuration"] for row in rows))
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), sharey=True)

    def bars(axis: Any, key: str, title: str, scale: float = 1.0) -> None:
        groups = [[row[key] * scale for row in rows if row["configuration"] == name] for name in names]
        axis.barh(range(len(names)), [statistics.fmean(g) for g in groups], color="C0", alpha=0.55)
        for y, group in enumerate(groups):
            axis.plot(group, [y] * len(group), "o", color="black", markersize=3)
        axis.set_title(title)
        axis.grid(axis="x", alpha=0.3)

    bars(axes[0], "step_ratio", "forward and backward, over dense (dashes: floor)")
    for y, name in enumerate(names):
        floor = statistics.fmean(row["time_floor"] for row in rows if row["configuration"] == name)
        if not name.startswith("LoRA"):
            axes[0].plot([floor, floor], [y - 0.4, y + 0.4], "--", color="C3")
    bars(axes[1], "optimiser_bytes", "optimiser state (MB)", 1e-6)
    bars(axes[2], "decode_tokens_per_second", "tokens decoded per second")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    figure.tight_layout()
    save_figure(figure, path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one repeat each")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds in a repeat")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--quick", action="store_true", help="a smoke run: a small model, 2 rounds, written to runs/")
    options = parser.parse_args(argv)
    dropouts: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(**dropouts)
    if options.quick:
        options.seeds, options.rounds, options.tokens = options.seeds[:1], 2, 128
        config = GPT2Config(n_layer=2, n_embd=128, n_head=4, vocab_size=1000, bos_token_id=0, **dropouts)
    path = options.output or (Path("runs/benchmarks") if options.quick else HERE / "results") / "low_rank.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    names = ["dense", "low rank 0.25", "low rank 0.5", f"LoRA {LORA_RANK} (peft)"]
    notes = []
    if importlib.util.find_spec("galore_torch"):
        names.append(f"GaLore {GALORE_RANK} (galore-torch)")
        notes.append("GaLore's optimiser seconds leave out the SVD that it makes every 200 steps.")
    else:
        notes.append("galore-torch is not installed: GaLore was not timed.")
    kept = kept_rows(path, options)
    rows = measured(
        kept,
        [("; ".join(names), seed) for seed in options.seeds],
        lambda _, seed: measure(names, config, options.tokens, options.rounds, seed, options.device),
    )
    plot(rows, path.with_suffix(".png"))
    low = [row for row in rows if row["configuration"] == "low rank 0.25"]
    ratio, memory = (
        statistics.fmean(row["step_ratio"] for row in low),
        statistics.fmean(row["optimiser_bytes"] for row in low)
        / statistics.fmean(row["optimiser_bytes"] for row in rows if row["configuration"] == "dense"),
    )
    results = write_results(
        path,
        title=f"Low-rank GPT-2, {config.n_layer} layers, {config.n_embd} wide, {options.tokens} tokens a step",
        headline=f"at rank 0.25 a training step takes {ratio:.2f} of dense, the optimiser {memory:.2f} of its memory",
        command=public_command(),
        data={"name": "random tokens", "fingerprint": "made from the seed"},
        seeds=options.seeds,
        rows=rows,
        claims=make_claims(rows),
        columns=COLUMNS,
        plot=path.with_suffix(".png").name,
        settings={"model": f"GPT-2, {config.n_layer} x {config.n_embd}", "rounds": options.rounds, "dtype": "float32"},
        notes=notes,
    )
    print_results(results)
    kept.finish()


if __name__ == "__main__":
    main()

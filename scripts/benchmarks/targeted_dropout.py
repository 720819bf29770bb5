"""What targeted dropout costs a training step, and what pruning and shrinking take, beside the plain forms.

    python scripts/benchmarks/targeted_dropout.py            # as published: GPT-2 124M, 1,024 tokens a step, 3 repeats
    python scripts/benchmarks/targeted_dropout.py --quick    # a smoke run at a small size, written to runs/
    python scripts/benchmarks/targeted_dropout.py --device cuda

A step is forward, backward and AdamW. The variants of a group live in one process and are timed in turn, round by
round, with the dense model in every group: ratios to it are what counts. Candidates are renewed every 50 steps: a
variant's step is timed with the candidates at hand, and one that renews them at each step beside it; the default's
step is 49 of the one and one of the other.
"""

import argparse
import copy
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from step_time import kept_rows, measured, ratio_of_medians, saved_bytes, side_by_side, timed
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, set_seed

from hf_efx import Block, TargetedDropoutConfig, get_efx_model, prune, shrink, step_context
from hf_efx.core.model.masks import magnitude_matrix
from hf_efx.core.results.evidence import claim, print_results, public_command, write_results

HERE = Path(__file__).parent
EVERY, NEVER = 50, 10**9  # steps between new candidates: the default; none while it is timed
DENSE, OURS, RENEWED = "dense", "targeted weights", "targeted weights, renewed at each step"
PRUNING = "pruning and shrinking GPT-2"
MLP = ", MLP"  # the study's small network
PLAIN = "targeted weights, a sort at each step"
VARIANTS: dict[str, dict[str, Any]] = {
    OURS: {"refresh_every": NEVER},
    RENEWED: {"refresh_every": 1},
    "targeted units": {"granularity": "unit", "refresh_every": NEVER},
    "targeted units, renewed at each step": {"granularity": "unit", "refresh_every": 1},
    "random weights": {"selection": "random", "rate": 0.5},
}
MASKED, PARAMETRIZED = "torch.nn.utils.prune's mask", "weight dropout by parametrize"
GROUPS = (
    (DENSE, OURS, RENEWED, PLAIN),
    (DENSE, "targeted units", "targeted units, renewed at each step", "random weights", MASKED, PARAMETRIZED),
)
COLUMNS = [
    {"key": "milliseconds", "title": "ms", "format": ",.1f"},
    {"key": "step_ratio", "title": "/ dense", "format": ".3f"},
    {"key": "default_ratio", "title": "/ dense, renewed every 50", "format": ".3f"},
    {"key": "saved_ratio", "title": "saved bytes / dense", "format": ".3f"},
    {"key": "parameter_ratio", "title": "parameters / dense", "format": ".3f"},
]
NOTES = [
    "A step is forward, backward and AdamW; prune and a sort are one call over all layers.",
    "The targeted weights' rows were measured at every seed, GPT-2's other rows at the first.",
    "saved bytes: what autograd keeps for backward, without parameters and buffers.",
]
Row = dict[str, Any]


class _Sorted(nn.Module):
    """The plain form: a sort of every column at every step, Bernoulli numbers for all weights, a masked copy."""

    def __init__(self, module: nn.Module, targeting: float = 0.75, rate: float = 0.66) -> None:
        super().__init__()
        self.dim = 0 if type(module).__name__ == "Conv1D" else 1  # of the inputs
        self.targeting, self.rate = targeting, rate

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        size = weight.abs().detach()
        place = int(self.targeting * size.shape[self.dim])
        threshold = size.sort(self.dim).values.narrow(self.dim, place, 1)
        return weight * ~((size < threshold) & (torch.rand_like(size) < self.rate))


class _Dropped(nn.Module):
    """torch's dropout of a weight."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(weight, 0.5)


class MLPModel(nn.Module):
    """The study's MLP on Fashion-MNIST."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(784, 300), nn.Linear(300, 100), nn.Linear(100, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc3(self.fc2(self.fc1(x).relu()).relu())


def layers(model: nn.Module) -> list[nn.Module]:
    """The modules that all variants act on."""
    from hf_efx import default_targets

    names = default_targets(model) if isinstance(model, PreTrainedModel) else ["fc1", "fc2"]
    return [model.get_submodule(name) for name in names]


def put_on(name: str, model: nn.Module) -> nn.Module:
    """A variant of a dense model."""
    if name in VARIANTS:
        small: dict[str, Any] = {"exclude_modules": ["fc3"]}
        if VARIANTS[name].get("granularity") == "unit":
            small = {
                "blocks": [Block("mlp", emits=["fc1"], reads=["fc2"]), Block("mlp", emits=["fc2"], reads=["fc3"])]
            }
        more = {} if isinstance(model, PreTrainedModel) else small
        get_efx_model(model, TargetedDropoutConfig(**VARIANTS[name], **more))
    for module in layers(model) if name in (PLAIN, PARAMETRIZED, MASKED) else ():
        if name == MASKED:
            torch_prune.l1_unstructured(module, "weight", 0.75)
        else:
            parametrize.register_parametrization(module, "weight", _Sorted(module) if name == PLAIN else _Dropped())
    return model


def step_function(model: Any, batch: torch.Tensor, optimize: bool = True) -> Callable[[], None]:
    """A training step; each call has draws of its own."""
    context, steps = step_context(model), iter(range(1, 10**9))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        if context is not None:
            context.begin_step(next(steps))
        if isinstance(model, GPT2LMHeadModel):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        else:
            loss = model(batch).logsumexp(1).mean()
        loss.backward()
        if optimize:
            optimizer.step()
        if context is not None:
            context.end_step()

    return step


def measure(names: Sequence[str], dense: nn.Module, batch: torch.Tensor, rounds: int, suffix: str = "") -> list[Row]:
    """One repeat of a group: the same weights in all variants, timed in turn; the first is the reference."""
    device = str(batch.device.type)
    models = {name: put_on(name, copy.deepcopy(dense)).train() for name in names}
    steps = {name: step_function(model, batch) for name, model in models.items()}
    times = side_by_side(steps, rounds, device, warm_up=2)
    saved = {name: saved_bytes(models[name], step_function(models[name], batch, optimize=False)) for name in names}
    rows = []
    for name in names:
        row: Row = {
            "configuration": name + suffix,
            "milliseconds": 1000 * statistics.median(times[name]),
            "step_ratio": ratio_of_medians(times, name, names[0]),
            "saved_ratio": saved[name] / saved[names[0]],
        }
        if name == OURS:
            each = ratio_of_medians(times, RENEWED, names[0])
            row["default_ratio"] = ((EVERY - 1) * row["step_ratio"] + each) / EVERY
        rows.append(row)
    return rows


def list_work(groups: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, int]]:
    """The pieces of the benchmark; what isn't a bar's is measured at the first seed alone."""
    work = []
    for seed in seeds:
        first = seed == seeds[0]
        work += [(f"GPT-2: {group}", seed) for group in groups[: None if first else 1]]
        work += [(f"MLP: {group}", seed) for group in groups]
        work += [(PRUNING, seed)] if first else []
    return work


def measure_piece(
    name: str, seed: int, groups: Mapping[str, Sequence[str]], config: GPT2Config, options: argparse.Namespace
) -> list[Row]:
    """The rows of one piece; all pieces of a seed have the same weights and data."""
    set_seed(seed)
    dense: Any = GPT2LMHeadModel(config).to(options.device)
    batch = torch.randint(0, config.vocab_size, (1, options.tokens), device=options.device)
    images = torch.randn(128, 784, device=options.device)
    if name == PRUNING:
        return pruning(dense, batch, options.rounds)
    model, _, group = name.partition(": ")
    if model == "GPT-2":
        return measure(groups[group], dense, batch, options.rounds)
    return measure(groups[group], MLPModel().to(options.device), images, 40 * options.rounds, MLP)


def pruning(dense: GPT2LMHeadModel, batch: torch.Tensor, rounds: int) -> list[Row]:
    """Masks by hf_efx and torch.nn.utils.prune, and half of the feed-forward units taken off, by torch-pruning too."""
    device = str(batch.device.type)

    def ours(scope: Any) -> float:
        model = copy.deepcopy(dense)
        return timed(lambda: prune(model, 0.5, scope=scope), device)

    def theirs(scope: str) -> float:
        model = copy.deepcopy(dense)
        pairs = [(module, "weight") for module in layers(model)]
        if scope == "global":
            return timed(
                lambda: torch_prune.global_unstructured(pairs, torch_prune.L1Unstructured, amount=0.5), device
            )
        return timed(lambda: [torch_prune.l1_unstructured(*pair, 0.5) for pair in pairs], device)

    sorted_once = functools.partial(_sort_all, layers(dense))
    times: dict[str, list[float]] = {}
    for _ in range(rounds):
        for scope in ("layer", "global"):
            times.setdefault(f"prune, {scope}", []).append(ours(scope))
            times.setdefault(f"torch.nn.utils.prune, {scope}", []).append(theirs(scope))
        times.setdefault("prune, column", []).append(ours("column"))
        times.setdefault("a sort of every column", []).append(timed(sorted_once, device))
    rows: list[Row] = [
        {"configuration": name, "milliseconds": 1000 * statistics.median(seconds)} for name, seconds in times.items()
    ]
    small = copy.deepcopy(dense)
    prune(small, 0.5, "unit", target_modules=["c_fc"])
    models = {DENSE: dense, "half of the FFN shrunk": shrink(small), **_by_torch_pruning(dense, batch)}
    own = side_by_side({name: step_function(m.train(), batch) for name, m in models.items()}, rounds, device)
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    return rows + [
        {
            "configuration": name,
            "milliseconds": 1000 * statistics.median(own[name]),
            "step_ratio": ratio_of_medians(own, name, DENSE),
            "parameter_ratio": sizes[name] / sizes[DENSE],
        }
        for name in models
        if name != DENSE
    ]


def _sort_all(modules: Sequence[nn.Module]) -> None:
    for module in modules:
        magnitude_matrix(module).sort(0)


def _by_torch_pruning(dense: GPT2LMHeadModel, batch: torch.Tensor) -> dict[str, nn.Module]:
    """The same units by torch-pruning, where it is installed: it knows Linear, so Conv1D is turned into that."""
    try:
        import torch_pruning  # pyright: ignore[reportMissingImports]
    except ImportError:
        return {}
    model = copy.deepcopy(dense)
    for block in model.transformer.h:
        mlp: Any = block.mlp
        mlp.c_fc, mlp.c_proj = map(_as_linear, (mlp.c_fc, mlp.c_proj))
        order = mlp.c_fc.weight.detach().norm(dim=1).argsort()[: mlp.c_fc.out_features // 2].tolist()
        torch_pruning.prune_linear_out_channels(mlp.c_fc, order)
        torch_pruning.prune_linear_in_channels(mlp.c_proj, order)
    return {"half of the FFN by torch-pruning": model}


def _as_linear(conv: Any) -> nn.Linear:
    linear = nn.Linear(*conv.weight.shape, device=conv.weight.device)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.t())
        linear.bias.copy_(conv.bias)
    return linear


def make_claims(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The bars of the benchmark."""

    def of(name: str, key: str) -> list[float]:
        return [row[key] for row in rows if row["configuration"] == name]

    entries = (
        ("a training step with candidates renewed every 50 steps over dense", OURS, "default_ratio", 1.1),
        ("units: a training step over dense", "targeted units", "step_ratio", 1.1),
        ("a step without half of the feed-forward units over dense", "half of the FFN shrunk", "step_ratio", 0.9),
    )
    return [
        claim(text, source="ours", bar=bar, direction="at_most", measured=of(name, key))
        for text, name, key, bar in entries
    ]


def plot(rows: Sequence[Row], path: Path) -> None:
    """Step times over dense."""
    from hf_efx.core.results.plots import matplotlib_pyplot, save_figure

    plt = matplotlib_pyplot()
    timed_rows = [row for row in rows if "step_ratio" in row]
    names = list(dict.fromkeys(row["configuration"] for row in timed_rows))
    figure, axis = plt.subplots(figsize=(9, 0.36 * len(names) + 1.2), layout="constrained")
    for y, name in enumerate(names):
        values = [row["step_ratio"] for row in timed_rows if row["configuration"] == name]
        ours = name.startswith(("targeted weights", "targeted units", "half")) and name.removesuffix(MLP) != PLAIN
        axis.barh(y, statistics.fmean(values), color="C0" if ours else "C7", alpha=0.6)
        axis.plot(values, [y] * len(values), "o", color="black", markersize=3)
    axis.axvline(1.1, linestyle="--", color="C3", linewidth=1)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_title("training step / dense (dashes: 1.1)")
    axis.grid(axis="x", alpha=0.3)
    save_figure(figure, path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one repeat each")
    parser.add_argument("--rounds", type=int, default=4, help="timed rounds in a repeat")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--quick", action="store_true", help="a smoke run: a small model, 2 rounds, written to runs/")
    options = parser.parse_args(argv)
    shape: dict[str, Any] = {}
    if options.quick:
        options.seeds, options.rounds, options.tokens = options.seeds[:1], 2, 128
        shape = {"n_layer": 2, "n_embd": 128, "n_head": 8, "vocab_size": 1000, "bos_token_id": 0, "eos_token_id": 0}
    path = options.output or (Path("runs/benchmarks") if options.quick else HERE / "results") / "targeted_dropout.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    config = GPT2Config(**shape, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    groups = {"; ".join(names): names for names in GROUPS}
    kept = kept_rows(path, options)
    work = list_work(list(groups), options.seeds)
    rows = measured(kept, work, lambda name, seed: measure_piece(name, seed, groups, config, options))
    plot(rows, path.with_suffix(".png"))
    claims = make_claims(rows)
    results = write_results(
        path,
        title=f"Targeted dropout on GPT-2, {config.n_layer} x {config.n_embd}, {options.tokens} tokens a step",
        headline=f"a training step takes {claims[0]['measured']:.2f} times as long as dense",
        command=public_command(),
        data={"name": "random tokens", "fingerprint": "made from the seed"},
        seeds=options.seeds,
        rows=rows,
        claims=claims,
        columns=COLUMNS,
        plot=path.with_suffix(".png").name,
        settings={
            "model": f"GPT-2, {config.n_layer} x {config.n_embd}; MLP: 784-300-100-10, batches of 128",
            "method": "rate .66, targeting .75, no ramp; random: rate .5",
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

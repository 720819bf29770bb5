"""How networks stand pruning after training: targeted dropout beside nothing, L1, and plain weight and unit dropout.

Follows Gomez et al. 2019, arXiv 1905.13678, on an MLP and a small convolutional network with Fashion-MNIST, pruned
without fine-tuning by the criterion that `hf_efx.prune` has. A small GPT-2 on English loses half of its feed-forward
units and is then made smaller by `hf_efx.shrink`.

    python scripts/reproduce/targeted_dropout.py --data fashion_mnist --text english_paragraphs.tsv.gz
    python scripts/reproduce/targeted_dropout.py                   # scikit-learn's digits, the library's own text
    python scripts/reproduce/targeted_dropout.py --parts mlp cnn   # parts of it
    python scripts/reproduce/targeted_dropout.py --quick           # a smoke run

A killed study goes on where it stopped. Results: scripts/reproduce/results/targeted_dropout.json and .png.
"""

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from selection_runs import clock_and_curve
from slice_out_runs import BLOCK, LM, VOCABULARY, ConvNet, cnn_blocks, dataset, evaluation, fit, load, prepare
from study_jobs import Job, run_all
from torch import nn

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "benchmarks"))
PARTS = ("mlp", "cnn", "lm")
EPOCHS = [12, 8, 2]
IMAGES = {"mlp": 60_000, "cnn": 8_000}
BLOCKS = 2400  # of text
BATCHES = {"mlp": 128, "cnn": 64, "lm": 8}
RATES = {"mlp": 1e-3, "cnn": 1e-3, "lm": 2e-3}
HIDDEN = 300, 100  # of the MLP
FRACTIONS = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98)
DENSE = "none"
RAMPED = {"rate": 0.99, "ramp": "paper"}
RAMP_SHARE = 2 / 3  # of the run: the network then trains on at full rate while the rate of learning falls
WEIGHTS: dict[str, dict[str, Any]] = {
    DENSE: {},
    "L1 1e-5": {"rate": 0.0, "l1": 1e-5},
    "L1 1e-4": {"rate": 0.0, "l1": 1e-4},
    "dropout 0.5": {"selection": "random", "rate": 0.5},
    "targeted .66/.75": {"rate": 0.66, "targeting": 0.75},
    "targeted .66/.9": {"rate": 0.66, "targeting": 0.9},
    "ramped .99/.9": {"targeting": 0.9, **RAMPED},
    "ramped .99/.98": {"targeting": 0.98, **RAMPED},
}
UNITS: dict[str, dict[str, Any]] = {
    "dropout 0.5": {"selection": "random", "rate": 0.5},
    "targeted .66/.75": {"rate": 0.66, "targeting": 0.75},
    "ramped .99/.75": {"targeting": 0.75, **RAMPED},
    "ramped .99/.9": {"targeting": 0.9, **RAMPED},
}
FFN: dict[str, dict[str, Any]] = {
    DENSE: {},
    "dropout 0.25": {"selection": "random", "rate": 0.25},
    "targeted .66/.5": {"rate": 0.66, "targeting": 0.5},
    "ramped .99/.5": {"targeting": 0.5, **RAMPED},
}
# Each part and granularity: what is trained, and its method. The dense networks stand under weights and units alike.
CONFIGURATIONS = {
    **{f"{part}: weight: {name}": options for part in ("mlp", "cnn") for name, options in WEIGHTS.items()},
    **{f"{part}: unit: {name}": options for part in ("mlp", "cnn") for name, options in UNITS.items()},
    **{f"lm: unit: {name}": options for name, options in FFN.items()},
}


class MLP(nn.Module):
    """Two hidden layers on pixels."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = (
            nn.Linear(a, b) for a, b in ((inputs, HIDDEN[0]), HIDDEN, (HIDDEN[1], classes))
        )

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Logits [n, classes], and the mean cross-entropy where there are labels."""
        logits = self.fc3(self.fc2(self.fc1(pixel_values.flatten(1)).relu()).relu())
        return {"logits": logits} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}


def mlp_blocks() -> list[Any]:
    """Both hidden layers' features as units."""
    from hf_efx import Block

    return [Block("mlp", emits=["fc1"], reads=["fc2"]), Block("mlp", emits=["fc2"], reads=["fc3"])]


def where(part: str, granularity: str) -> dict[str, Any]:
    """What is dropped and pruned: all but the stem and the layer of the logits; of a GPT-2 feed-forward units."""
    if part == "lm":
        return {"granularity": granularity, "target_modules": ["c_fc"]}
    if granularity == "weight":
        return {"granularity": granularity, "exclude_modules": ["fc3"] if part == "mlp" else ["stem", "fc2"]}
    return {"granularity": granularity, "blocks": mlp_blocks() if part == "mlp" else cnn_blocks()}


def new_model(part: str, seed: int, data: Mapping[str, Any]) -> nn.Module:
    """A new model of a seed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    if part == "lm":
        config: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, **LM}
        return GPT2LMHeadModel(GPT2Config(**config, resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0))
    classes = int(data["labels"].max()) + 1
    return MLP(data["pixels"][0].numel(), classes) if part == "mlp" else ConvNet(data["pixels"].shape[1:], classes)


def run(job: Job, queue: Any, folder: str, **_: Any) -> dict[str, Any]:
    """Trains one configuration in this process, on one thread, prunes it at all fractions, and returns its row."""
    from hf_efx import TargetedDropoutCallback, TargetedDropoutConfig, get_efx_model, pruning_curve, unload

    part, granularity, _name = job.configuration.split(": ")
    options = dict(job.options["configuration"])
    if "ramp" in options:
        options["ramp_steps"] = max(round(RAMP_SHARE * job.steps), 1)
    data = load("lm" if part == "lm" else "cnn", folder)
    if part != "lm":
        data |= {name: data[name][: IMAGES[part]] for name in ("pixels", "labels")}
    model = new_model(part, job.seed, data)
    config = TargetedDropoutConfig(**options, **where(part, granularity)) if options else None
    callbacks = [TargetedDropoutCallback(config)] if config else []
    if config:
        get_efx_model(model, config)
    figure = evaluation(part, data)
    watch = clock_and_curve(figure, job.steps, queue)
    loss = fit(
        model,
        dataset(part, data),
        watch,
        job.seed,
        job.steps,
        callbacks,
        learning_rate=RATES[part],
        lr_scheduler_type="linear",
        per_device_train_batch_size=BATCHES[part],
        logging_steps=max(job.steps // 16, 1),
    )
    row: dict[str, Any] = {"steps": job.steps, "seconds": watch.curve[-1][1], "training_loss": loss}
    for kind in ("weight", "unit") if not options and part != "lm" else (granularity,):
        curve = pruning_curve(model, figure, FRACTIONS, metric="figure", higher_is_better=True, **where(part, kind))
        row |= {f"{kind}_{fraction:g}": value for fraction, value in curve.points}
    if config:
        unload(model)
    return row | (shrunk(model, figure, data, folder) if part == "lm" else {})


def shrunk(model: Any, figure: Any, data: Mapping[str, Any], folder: str) -> dict[str, float]:
    """Half of the feed-forward units taken off: perplexity, and bytes and time over those of the whole model."""
    from step_time import ratio_of_medians, side_by_side  # pyright: ignore[reportMissingImports]
    from transformers import GPT2LMHeadModel

    from hf_efx import prune, shrink

    batch = data["tokens"][: BATCHES["lm"]]
    with tempfile.TemporaryDirectory(dir=folder) as files:
        model.save_pretrained(f"{files}/whole")
        prune(model, 0.5, **where("lm", "unit"))
        shrink(model).save_pretrained(f"{files}/small")
        size = {name: os.path.getsize(f"{files}/{name}/model.safetensors") for name in ("whole", "small")}
        models: dict[str, Any] = {name: GPT2LMHeadModel.from_pretrained(f"{files}/{name}").train() for name in size}

    def step(name: str) -> None:
        models[name].zero_grad(set_to_none=True)
        models[name](input_ids=batch, labels=batch).loss.backward()

    times = side_by_side({name: lambda name=name: step(name) for name in models}, 20, "cpu")
    return {
        "shrunk_perplexity": figure(models["small"]),
        "bytes_ratio": size["small"] / size["whole"],
        "step_ratio": ratio_of_medians(times, "small", "whole"),
    }


def make_claims(rows: Sequence[dict[str, Any]], parts: Sequence[str]) -> list[dict[str, Any]]:
    """The bars of the study."""
    claims = []
    for part in parts:
        if part == "lm":
            claims += _lm_claims(rows)
            continue
        units = {DENSE: {}, **UNITS}
        bars = (
            ("weight", 0.9, "ramped .99/.9", WEIGHTS),
            ("weight", 0.9, "targeted .66/.9", WEIGHTS),
            ("unit", 0.75, "ramped .99/.75", units),
            ("unit", 0.75, "targeted .66/.75", units),
        )
        for kind, fraction, ours, group in bars:
            own = _at(rows, part, kind, ours, fraction)
            dense = _at(rows, part, kind, DENSE, 0.0)
            others = [name for name in group if not name.startswith(("targeted", "ramped"))]
            text = f"{part}, {fraction:.0%} of {kind}s pruned, {ours}: accuracy "
            claims.append(_claim(f"{text}below that of the unpruned dense network", 0.02, "at_most", dense, own))
            for other in others:
                its = _at(rows, part, kind, other, fraction)
                claims.append(_claim(f"{text}above that with {other}, pruned alike", 0.05, "at_least", own, its))
        from hf_efx.core.results.evidence import claim

        ramped = _at(rows, part, "weight", "ramped .99/.98", 0.98)
        text = f"{part}, 98% of weights pruned, ramped .99/.98: accuracy"
        claims.append(claim(text, source="ours", bar=0.85, direction="at_least", measured=ramped))
    return claims


def _lm_claims(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    from hf_efx.core.results.evidence import claim, figures

    claims = []
    dense = _at(rows, "lm", "unit", DENSE, 0.0)
    for name in (n for n in FFN if n != DENSE):
        own = figures(rows, f"lm: unit: {name}", "shrunk_perplexity")
        ratio = np.divide(own, dense).tolist()
        text = f"lm, half of the feed-forward units taken off, {name}: perplexity over the whole dense model's"
        claims.append(claim(text, source="ours", bar=1.1, direction="at_most", measured=ratio, pair=(own, dense)))
    for key, text in (("bytes_ratio", "bytes of the file"), ("step_ratio", "time of a step")):
        measured = figures(rows, "lm: unit: targeted .66/.5", key)
        text = f"lm, half of the feed-forward units taken off: {text} over the whole model's"
        claims.append(claim(text, source="ours", bar=0.9, direction="at_most", measured=measured))
    return claims


def _claim(text: str, bar: float, direction: Any, a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    from hf_efx.core.results.evidence import claim

    difference = np.subtract(a, b).tolist()
    return claim(text, source="ours", bar=bar, direction=direction, measured=difference, pair=(a, b))


def _at(rows: Sequence[dict[str, Any]], part: str, kind: str, name: str, fraction: float) -> list[float]:
    """A configuration's figures at a fraction pruned; the dense network of images stands under weights for both."""
    from hf_efx.core.results.evidence import figures

    under = "weight" if name == DENSE and part != "lm" else kind
    return figures(rows, f"{part}: {under}: {name}", f"{kind}_{fraction:g}")


def headline(rows: Sequence[dict[str, Any]], parts: Sequence[str]) -> str:
    """The result in one sentence."""
    shown = []
    for part in parts:
        if part == "lm":
            dense = statistics.fmean(_at(rows, "lm", "unit", DENSE, 0.0))
            small = statistics.fmean(_at(rows, "lm", "unit", "targeted .66/.5", 0.5))
            shown.append(f"GPT-2 without half of its feed-forward units: {small / dense - 1:+.1%} perplexity")
            continue
        ours, none, dense = (
            100 * statistics.fmean(_at(rows, part, "weight", name, fraction))
            for name, fraction in (("ramped .99/.9", 0.9), (DENSE, 0.9), (DENSE, 0.0))
        )
        shown.append(
            f"{part.upper()}, 90% of weights pruned: {ours:.1f}% ({none:.1f}% without; {dense:.1f}% unpruned)"
        )
    return "targeted dropout, no fine-tuning. " + "; ".join(shown)


def plot(rows: Sequence[Mapping[str, Any]], parts: Sequence[str], path: Path) -> None:
    """For each part and granularity the figure over the fraction pruned, mean and range over seeds."""
    from hf_efx.core.results.plots import matplotlib_pyplot, save_figure

    plt = matplotlib_pyplot()
    kinds = [(part, kind) for part in parts for kind in (("unit",) if part == "lm" else ("weight", "unit"))]
    figure, axes = plt.subplots(1, len(kinds), figsize=(5.2 * len(kinds), 4.4), layout="constrained", squeeze=False)
    names = list(dict.fromkeys([*WEIGHTS, *UNITS, *FFN]))
    for axis, (part, kind) in zip(axes[0], kinds, strict=True):
        found = {}
        for name in names:
            under = "weight" if name == DENSE and part != "lm" else kind
            found[name] = [r for r in rows if r["configuration"] == f"{part}: {under}: {name}"]
        for i, (name, chosen) in enumerate((n, c) for n, c in found.items() if c):
            values = np.array([[row[f"{kind}_{fraction:g}"] for fraction in FRACTIONS] for row in chosen])
            axis.plot(FRACTIONS, values.mean(0), "o-", markersize=3, color=f"C{i}", label=name)
            axis.fill_between(FRACTIONS, values.min(0), values.max(0), color=f"C{i}", alpha=0.15, linewidth=0)
        axis.set_title(f"{part}: {'perplexity' if part == 'lm' else 'accuracy'}, {kind}s pruned")
        axis.set_xlabel("fraction pruned")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
        if part == "lm":
            axis.set_yscale("log")
    save_figure(figure, path, dpi=90)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="idx folder or Hub name of images (default: scikit-learn's digits)")
    parser.add_argument("--text", help="file, folder or Hub name of a text (default: the standard library's own)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, nargs=3, default=EPOCHS, metavar=PARTS)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    parser.add_argument("--output", type=Path, help="results file (default: results/targeted_dropout.json here)")
    parser.add_argument("--quick", action="store_true", help="a smoke run: 1 seed, a few steps, written to runs/")
    options = parser.parse_args(argv)
    if options.quick:
        options.seeds, options.workers = options.seeds[:1], 1
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the study."""
    from hf_efx.core.results.evidence import StudyRows, print_results, public_command, write_results

    options = parse(argv)
    path = options.output or (Path("runs/reproduce") if options.quick else HERE / "results") / "targeted_dropout.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        needed = sorted({"lm" if part == "lm" else "cnn" for part in options.parts})
        kept = {"images_kept": max(IMAGES.values()), "blocks_kept": 200 if options.quick else BLOCKS}
        data, sizes = prepare(options.data, options.text, Path(folder), needed, **kept)
        lengths = {part: sizes["lm"] if part == "lm" else min(sizes["cnn"], IMAGES[part]) for part in options.parts}
        steps = {
            part: 6 if options.quick else epochs * (lengths[part] // BATCHES[part])
            for part, epochs in zip(PARTS, options.epochs, strict=True)
            if part in lengths
        }
        settings = {
            "mlp": f"hidden layers of {HIDDEN}",
            "cnn": "a stem, two blocks of two convolutions with batch norm, a hidden layer of 256",
            "lm": f"GPT-2, {LM}, blocks of {BLOCK} tokens, {VOCABULARY} byte-pair tokens; feed-forward units alone",
            "method": "rate / targeting; candidates renewed every 50 steps; a ramp takes two thirds of the run",
            "optimiser": f"AdamW without decay, rates {RATES}, falling to 0; batches {BATCHES}",
            "examples": lengths,
            "steps": steps,
            "data": data,
        }
        rows = StudyRows(path, settings)
        jobs = [
            Job(name, seed, steps[part], {"configuration": configuration})
            for seed in options.seeds
            for name, configuration in CONFIGURATIONS.items()
            if (part := name.partition(":")[0]) in options.parts
        ]
        run_all(run, jobs, rows, options.workers, folder=folder)
    wanted = [row for row in rows.rows if row["seed"] in options.seeds]
    plot(wanted, options.parts, path.with_suffix(".png"))
    results = write_results(
        path,
        title="Pruning after training with targeted dropout",
        headline=headline(wanted, options.parts),
        command=public_command(),
        data=data,
        seeds=options.seeds,
        rows=[with_columns(row) for row in wanted],
        claims=make_claims(wanted, options.parts),
        columns=COLUMNS,
        plot=path.with_suffix(".png").name,
        settings=settings,
        notes=NOTES,
    )
    print_results(results)
    rows.finish()


def with_columns(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with the figures of its own granularity under the names of the table."""
    kind = row["configuration"].split(": ")[1]
    return {**row, **{f"at_{fraction:g}": row[f"{kind}_{fraction:g}"] for fraction in FRACTIONS}}


COLUMNS = [
    *({"key": f"at_{fraction:g}", "title": f"{fraction:.0%} pruned", "format": ".3f"} for fraction in FRACTIONS),
    {"key": "seconds", "title": "CPU s", "format": ".0f"},
]
NOTES = [
    "mlp and cnn: accuracy on clean test images; lm: perplexity on held-out text. `weight` and `unit` say what is "
    "dropped and what is pruned; `none` stands under weight, its units' figures are in the JSON.",
    "Weights are pruned column by column, units layer by layer, always the weakest, without fine-tuning. The stem and "
    "the layer of the logits stay whole.",
    "Ramped networks are trained for the pruned network: unpruned they may be far worse.",
    "Seconds are CPU seconds of one thread inside the Trainer's loop.",
]

if __name__ == "__main__":
    main()

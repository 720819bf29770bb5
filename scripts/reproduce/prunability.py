"""Prunability and generalization: does the network that stands more pruning generalize better?

Follows Kuhn et al. 2021, arXiv 2103.06002, on small convolutional networks and Fashion-MNIST: a grid of networks is
trained to one training loss, then prunability and other measures are ranked by Kendall's tau with the generalization
gap. Beside it, over more seeds, a sweep of widths with label noise (double descent) and a control with permuted
labels.

    python scripts/reproduce/prunability.py --data fashion_mnist
    python scripts/reproduce/prunability.py                       # scikit-learn's digits
    python scripts/reproduce/prunability.py --quick               # a smoke run

Networks train two at a time, one thread each. A killed study goes on where it stopped. Results:
scripts/reproduce/results/prunability.json and prunability.png.
"""

import argparse
import functools
import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prunability_networks import SAMPLE, TEST_IMAGES, load_pixels, train_control, train_network, train_width
from prunability_plots import plot

HERE = Path(__file__).parent
Rows = Sequence[Mapping[str, Any]]
GRID: dict[str, tuple[Any, ...]] = {
    "width": (12, 24, 48),
    "depth": (2, 4),
    "dropout": (0.0, 0.3),
    "weight_decay": (0.0, 0.3),
    "batch": (32, 128),
    "images": (500, 2000),
}
TARGET = 0.05  # nats of cross-entropy; the lower, the further the gaps lie apart
IMAGES_SEEN = 240_000  # at most, of a network of the grid
WIDTHS = (2, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256)  # 784 inputs, 10,000 label bits: enough weights from 12 or so on
SWEEP = {"images": 1000, "label_noise": 0.2}
EPOCHS = 200  # of the sweep
CONTROL_IMAGES = 1000
MORE_SEEDS = tuple(range(8))  # of sweep and control, whose networks take seconds: three leave them undecided
GAPS = ("accuracy_gap", "loss_gap")
# The first is the library's default, and what the claims are about.
FORMS: dict[str, dict[str, Any]] = {
    "prunability": {},
    "prunability, absolute 0.1": {"tolerance_mode": "absolute"},
    "prunability, loss doubled": {"tolerance": 1.0},
    "prunability, by layer": {"scope": "layer"},
    "prunability, random": {"criterion": "random"},
}
MAIN = next(iter(FORMS))
RIVALS = ("parameter_count", "l2_norm", "distance_from_init", "random_perturbation")
SETTINGS = {
    "grid": "; ".join(f"{key} {', '.join(map(str, values))}" for key, values in GRID.items()),
    "networks": "convolutions of stride 2, 2, 1, 1, a hidden layer with dropout; ReLU, no normalisation",
    "optimiser": "AdamW, constant rate 1e-3 at batch 32 and with its square root",
    "stop": f"training loss {TARGET} in eval mode, or {IMAGES_SEEN:,} images",
    "measured on": f"{SAMPLE} training images, {TEST_IMAGES} test images",
}
COLUMNS = (
    ("accuracy_gap", "accuracy gap", ".3f"),
    ("loss_gap", "loss gap (nats)", ".3f"),
    ("train_loss", "training loss", ".3f"),
    ("prunability", "prunability", ".3f"),
    ("accuracy_tau", "tau with accuracy gap", ".2f"),
    ("accuracy_granulated", "granulated", ".2f"),
    ("accuracy_information", "information", ".3f"),
    ("loss_tau", "tau with loss gap", ".2f"),
    ("loss_granulated", "granulated", ".2f"),
    ("loss_information", "information", ".3f"),
)


def grid(quick: bool) -> list[dict[str, Any]]:
    """All combinations; four of them on few images for a smoke run."""
    if quick:
        return [dict(zip(GRID, (w, 2, p, 0.0, 32, 200), strict=True)) for w in (12, 24) for p in (0.0, 0.3)]
    return [dict(zip(GRID, values, strict=True)) for values in itertools.product(*GRID.values())]


def run(options: argparse.Namespace, rows: Any) -> tuple[Any, Any, Any]:
    """The grid, the sweep and the control, as far as they aren't done."""
    from hf_efx.prunability.study import generalization_study

    quick, common = options.quick, {"rows": rows, "workers": options.workers}
    seen = 20_000 if quick else IMAGES_SEEN
    seeds = sorted({*options.seeds, *(() if quick else MORE_SEEDS)})
    train = functools.partial(train_network, source=options.data, target=TARGET, most=seen)
    networks = generalization_study(grid(quick), train, seeds=options.seeds, gap=GAPS[0], forms=FORMS, **common)
    train = functools.partial(train_width, source=options.data, epochs=2 if quick else EPOCHS)
    widths = [{"hidden": width, **SWEEP} for width in (WIDTHS[2::4] if quick else WIDTHS)]
    sweep = generalization_study(widths, train, seeds=seeds, forms=FORMS, measures=RIVALS, **common)
    train = functools.partial(train_control, source=options.data, target=TARGET, most=4 * seen)
    kinds = [{"labels": kind, "images": 200 if quick else CONTROL_IMAGES} for kind in ("true", "permuted")]
    control = generalization_study(kinds, train, seeds=seeds, forms=FORMS, measures=RIVALS, **common)
    return networks, sweep, control


def rankings(study: Any) -> dict[str, list[dict[str, Any]]]:
    """For each gap the measures' lines."""
    from dataclasses import replace

    return {gap: replace(study, gap=gap).ranking() for gap in GAPS}


def make_claims(study: Any, sweep: Any, control: Any) -> list[dict[str, Any]]:
    """The bars: tau above 0 and above the rivals', for both gaps; most networks trained as far; the control."""
    from dataclasses import replace

    from hf_efx.core.results.evidence import NOT_SEPARATED, claim
    from hf_efx.core.results.statistics import t_interval

    def one(text: str, bar: float, measured: float, interval: tuple[float, float] | None, source: str = "ours") -> Any:
        if interval is not None and interval[0] <= 0 <= interval[1]:
            text = f"{text} ({NOT_SEPARATED})"
        return claim(text, source=source, bar=bar, direction="at_least", measured=measured, interval=interval)

    count, reached = len(study.rows), len(study.compared)
    text = f"share of the {count} networks that reach the common training loss of {TARGET}"
    claims = [one(text, 0.9, reached / count, None)]
    for gap in GAPS:
        chosen, name = replace(study, gap=gap), gap.replace("_", " ")
        line = next(line for line in chosen.ranking() if line["measure"] == MAIN)
        text = f"Kendall's tau of prunability with the {name}, {reached} networks"
        claims.append(one(text, 0.0, line["tau"], line["tau_interval"], "abstract"))
        for rival in RIVALS:
            text = f"its tau with the {name} less that of {rival.replace('_', ' ')}"
            claims.append(one(text, 0.0, *chosen.difference(MAIN, rival)))
    text = "sweep of widths with label noise: Kendall's tau of prunability with the test loss, mean over seeds"
    taus = sweep_taus(sweep.rows, MAIN)
    claims.append(one(text, 0.0, statistics.fmean(taus), t_interval(taus), "abstract"))
    difference = control_differences(control.rows, MAIN)
    text = "prunability of networks that memorised permuted labels less that of equal ones on true labels"
    claims.append(one(text, 0.1, statistics.fmean(difference), t_interval(difference)))
    return claims


def sweep_taus(rows: Rows, measure: str) -> list[float]:
    """For each seed the tau of a measure with the test loss over widths."""
    from hf_efx.prunability.statistics import kendall_tau

    seeds = sorted({row["seed"] for row in rows})
    by_seed = [[row for row in rows if row["seed"] == seed] for seed in seeds]
    return [kendall_tau([row[measure] for row in part], [row["test_loss"] for row in part]) for part in by_seed]


def control_differences(rows: Rows, measure: str) -> list[float]:
    """For each seed a measure on permuted labels less that on true ones."""
    by_key = {(row["labels"], row["seed"]): row[measure] for row in rows}
    seeds = sorted({row["seed"] for row in rows})
    return [by_key["permuted", seed] - by_key["true", seed] for seed in seeds]


def published(study: Any, sweep: Any, control: Any) -> list[dict[str, Any]]:
    """All rows under names that make a table of a readable length, and a row for each measure."""
    lines: dict[str, dict[str, Any]] = {}
    for gap, ranking in rankings(study).items():
        kind = gap.partition("_")[0]
        for line in ranking:
            row = lines.setdefault(line["measure"], {"configuration": f"measure: {line['measure']}", "seed": 0})
            row |= {f"{kind}_tau": line["tau"], f"{kind}_tau_interval": line["tau_interval"]}
            row |= {f"{kind}_granulated": line["granulated_tau"], f"{kind}_information": line["information"]}
            row[f"{kind}_granulated_by"] = line["granulated"]
    rows = list(lines.values())
    for part, name in (
        (study.compared, "grid: width {width}, {images} images"),
        ([row for row in study.rows if not row["reached"]], "grid, training loss not reached"),
        (sweep.rows, "sweep: hidden width {hidden}"),
        (control.rows, "control: {labels} labels"),
    ):
        rows += [{**row, "network": row["configuration"], "configuration": name.format(**row)} for row in part]
    return rows


def notes(study: Any, sweep: Any, control: Any) -> list[str]:
    """What the claims leave out."""
    from hf_efx.prunability.statistics import kendall_tau

    lines = {line["measure"]: line for line in rankings(study)[GAPS[0]]}
    tau, granulated = lines[MAIN]["tau"], lines[MAIN]["granulated"]
    missed = [row["configuration"] for row in study.rows if not row["reached"]]
    sharper = [name for name, line in lines.items() if name not in FORMS and line["tau"] > tau]
    within = []
    for images in sorted({row["images"] for row in study.compared}):
        part = [row for row in study.compared if row["images"] == images]
        taus = {gap: kendall_tau([row[MAIN] for row in part], [row[gap] for row in part]) for gap in GAPS}
        within.append(f"{images:,} images: {_figures(taus)}")
    kin = kendall_tau(study.values(MAIN), study.values("random_perturbation"))
    return [
        "Prunability is the library's default (magnitude, global, loss at most 10% higher), all measures are taken on "
        f"the same {SAMPLE} training images; gaps on up to {TEST_IMAGES:,} test images. Its other forms are rows of "
        "their own: what else was tried.",
        "Intervals of tau are bootstraps over networks; differences are paired: both taus of each draw of networks.",
        f"Tau of prunability with the accuracy gap where one hyperparameter alone differs: {_figures(granulated)}.",
        f"Tau of prunability among networks of as many images: {'; '.join(within)}.",
        f"Measures with a higher tau than prunability's: {', '.join(sharper) or 'none'}. Tau of prunability with "
        f"random_perturbation itself: {kin:.2f}.",
        f"Trained as far as they went, and left out of the taus: {'; '.join(missed) or 'none'}.",
        *_more_notes(sweep.rows, control.rows),
    ]


def _more_notes(sweep: Rows, control: Rows) -> list[str]:
    """What the sweep and the control say beside their claims; both have seeds of their own."""
    losses = {
        width: statistics.fmean(row["test_loss"] for row in sweep if row["hidden"] == width)
        for width in sorted({row["hidden"] for row in sweep})
    }
    alike = [row for row in sweep if row["train_loss"] <= TARGET]
    taus = {name: statistics.fmean(sweep_taus(alike, name)) for name in FORMS if alike}
    differences = {name: statistics.fmean(control_differences(control, name)) for name in FORMS}
    seeds = ", ".join(map(str, sorted({row["seed"] for row in control})))
    return [
        f"Sweep and control have the seeds {seeds}. The sweep trains one hidden layer on {SWEEP['images']:,} images, "
        f"{SWEEP['label_noise']:.0%} of the labels redrawn, for {EPOCHS} epochs whatever the loss. Mean test loss by "
        f"width: {', '.join(f'{width}: {loss:.2f}' for width, loss in losses.items())}.",
        f"Mean tau with the test loss in the sweep, where the training loss is at most {TARGET}: {_figures(taus)}.",
        f"Control, permuted less true labels by form: {_figures(differences)}.",
    ]


def _figures(figures: Mapping[str, float]) -> str:
    """Named figures in a line, without those that aren't defined."""
    return ", ".join(f"{name.replace('_', ' ')} {figure:+.2f}" for name, figure in figures.items() if figure == figure)


def headline(study: Any) -> str:
    """The taus, and the rivals that prunability isn't separated from or loses to."""
    from dataclasses import replace

    lines = [next(line for line in lines if line["measure"] == MAIN) for lines in rankings(study).values()]
    (low, high), chosen = lines[0]["tau_interval"], replace(study, gap=GAPS[0])
    behind = [name.replace("_", " ") for name in RIVALS if chosen.difference(MAIN, name)[1][0] <= 0]
    tail = f"; not above that of {', '.join(behind)}" if behind else ""
    return (
        f"Kendall's tau of prunability with the accuracy gap of {len(study.compared)} networks is "
        f"{lines[0]['tau']:.2f} ({low:.2f} to {high:.2f}), with the loss gap {lines[1]['tau']:.2f}{tail}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the study."""
    from hf_efx.core.data.example_ids import add_example_ids
    from hf_efx.core.data.fingerprints import data_fingerprint
    from hf_efx.core.results.evidence import StudyRows, print_results, public_command, write_results

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="idx folder or Hub name of images (default: scikit-learn's digits)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the grid; each costs 96 networks")
    parser.add_argument("--workers", type=int, default=2, help="networks at a time, one thread each")
    parser.add_argument("--output", type=Path, help="results file (default: results/prunability.json here)")
    parser.add_argument("--quick", action="store_true", help="a smoke run: few networks, written to runs/")
    options = parser.parse_args(argv)
    path = options.output or (Path("runs/reproduce") if options.quick else HERE / "results") / "prunability.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    _, name, images = load_pixels(options.data, TEST_IMAGES)
    data = {"name": name, "fingerprint": data_fingerprint(add_example_ids(images), ["label"])}
    settings = {**SETTINGS, "data": data}
    rows = StudyRows(path, settings)
    study, sweep, control = run(options, rows)
    claims = make_claims(study, sweep, control)
    plot(rankings(study), study.compared, sweep.rows, control.rows, MAIN, path.with_suffix(".png"))
    results = write_results(
        path,
        title="Prunability and the generalization gap",
        headline=headline(study),
        command=public_command(),
        data=data,
        seeds=options.seeds,
        rows=published(study, sweep, control),
        claims=claims,
        columns=[{"key": key, "title": title, "format": spec} for key, title, spec in COLUMNS],
        plot=path.with_suffix(".png").name,
        settings=settings,
        notes=notes(study, sweep, control),
    )
    print_results(results)
    rows.finish()


if __name__ == "__main__":
    main()

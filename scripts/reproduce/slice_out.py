"""SliceOut against dropout, at equal epochs and at equal time, where a network overfits.

Follows Notin et al. 2020, arXiv 2007.10909: a small convolutional network on few Fashion-MNIST images, and a small
GPT-2 on a little English. Peers drop at the same rate: single features of the same blocks, channels, whole layers,
and the language model's own dropout.

    python scripts/reproduce/slice_out.py --data fashion_mnist --text english_paragraphs.tsv.gz
    python scripts/reproduce/slice_out.py                       # scikit-learn's digits, the library's text
    python scripts/reproduce/slice_out.py --parts cnn           # a part of it
    python scripts/reproduce/slice_out.py --quick               # a smoke run

A killed study goes on where it stopped. Results: scripts/reproduce/results/slice_out.json and slice_out.png.
"""

import argparse
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from selection_runs import thinned
from slice_out_runs import BATCHES, BLOCK, LM, RATES, VOCABULARY, WARMUP, Configuration, prepare, run
from study_jobs import Job, run_all

HERE = Path(__file__).parent
PARTS = ("cnn", "lm")
EPOCHS = [12, 12]  # in a pilot dropout was at its best there
EVALUATIONS, SMOOTHED = 16, 3  # of a run; how many the figure at a time is the mean of
RATE = 0.25
_SLICED = {
    "SliceOut, flow": Configuration("slice_out"),
    "SliceOut, probabilistic": Configuration("slice_out", options={"normalization": "probabilistic"}),
    "SliceOut, circular": Configuration("slice_out", options={"starts": "circular"}),
}
HEADLINE, LAST_DENSE = "SliceOut, circular", "SliceOut, flow, last tenth dense"
CONFIGURATIONS = {
    "cnn": {
        "none": Configuration(),
        "dropout": Configuration("dropout"),
        "channel dropout": Configuration("channels"),
        **_SLICED,
        LAST_DENSE: Configuration("slice_out", options={"final_dense": 0.1}),
    },
    "lm": {
        "none": Configuration(),
        "dropout": Configuration("own"),
        "dropout, none in attention": Configuration("own0"),
        "layerdrop": Configuration("layers"),
        **_SLICED,
    },
}
KINDS = {"cnn": (("conv",), ("mlp",), None), "lm": (("attention",), ("mlp",), None)}
SWEPT = (0.1, 0.25, 0.5)
TITLES = {"cnn": "accuracy", "lm": "perplexity"}


def smoothed(curve: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """Seconds, and at each the mean of the last evaluations: single ones are noisy at a constant rate."""
    values = [figure for _, _, figure in curve]
    means = [float(np.mean(values[max(i - SMOOTHED + 1, 0) : i + 1])) for i in range(len(values))]
    return [seconds for _, seconds, _ in curve], means


def at_equal_time(curve: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Both smoothed figures at the time at which the faster one ended, between evaluations interpolated."""
    (times, figures), (other_times, other_figures) = smoothed(curve), smoothed(other)
    end = min(times[-1], other_times[-1])
    return float(np.interp(end, times, figures)), float(np.interp(end, other_times, other_figures))


def against_dropout(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds to each row its figure, its time over that of its seed's dropout, and dropout's figure at its time."""
    higher = {"cnn": max, "lm": min}
    base = {(r["part"], r["seed"]): r for r in rows if r["configuration"].endswith(": dropout")}
    results = []
    for row in rows:
        times, figures = smoothed(row["curve"])
        best = higher[row["part"]](figures)
        more = {"figure": figures[-1], "best": best, "milliseconds": 1000 * times[-1] / row["steps"]}
        dropout = base.get((row["part"], row["seed"]))
        if dropout is not None:
            own, its = at_equal_time(row["curve"], dropout["curve"])
            more |= {"time_share": times[-1] / dropout["curve"][-1][1], "at_time": own, "dropout_at_time": its}
        results.append({**row, **more})
    return results


def make_claims(rows: Sequence[dict[str, Any]], parts: Sequence[str], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The bars of the study."""
    from hf_efx.core.results.evidence import claim, figures

    claims = []
    chosen = [row for row in rows if row["seed"] in seeds]
    for part in parts:
        for name in (n for n in CONFIGURATIONS[part] if "SliceOut" in n):
            own, dropout, none = (figures(chosen, f"{part}: {other}", "figure") for other in (name, "dropout", "none"))
            at_time, dropout_at_time = (
                figures(chosen, f"{part}: {name}", key) for key in ("at_time", "dropout_at_time")
            )
            shares = figures(chosen, f"{part}: {name}", "time_share")
            ours: dict[str, Any] = {"source": "ours"}
            if part == "cnn":
                text, ours["direction"] = "accuracy above that of", "at_least"
                compare, bars = np.subtract, (-0.005, 0.0)
            else:
                text, ours["direction"] = "perplexity over that of", "at_most"
                compare, bars = np.divide, (1.01, 1.0)
            for words, bar, pair in (
                ("dropout at equal epochs", bars[0], (own, dropout)),
                ("dropout at equal time", bars[1], (at_time, dropout_at_time)),
                ("no dropout at equal epochs", bars[1], (own, none)),
            ):
                measured = compare(*map(np.array, pair)).tolist()
                claims.append(claim(f"{part}: {name}, {text} {words}", bar=bar, measured=measured, pair=pair, **ours))
            claims.append(
                claim(
                    f"{part}: {name}, CPU time of as many epochs over dropout's",
                    source="abstract: 10 to 40% less",
                    bar=0.9,
                    direction="at_most",
                    measured=shares,
                )
            )
    return claims


def make_jobs(options: argparse.Namespace) -> list[Job]:
    """All runs: seed by seed, so that what else the machine does falls on all configurations; then the sweep."""
    jobs = []
    for seed in options.seeds:
        for part in options.parts:
            for name, configuration in CONFIGURATIONS[part].items():
                extra = {"configuration": configuration}
                jobs.append(Job(f"{part}: {name}", seed, options.steps[part], extra))
    for part in options.parts if options.sweep else ():
        peer = CONFIGURATIONS[part]["dropout"]
        swept: list[tuple[str, str, Any]] = [("dropout", peer.kind, None)]
        swept += [(f"SliceOut, {targets[0] if targets else 'all'}", "slice_out", targets) for targets in KINDS[part]]
        for label, kind, targets in swept:
            for rate in SWEPT:
                if rate == RATE and targets is None:
                    continue  # among the runs above
                extra = {"configuration": Configuration(kind, rate, targets)}
                jobs.append(Job(f"{part}: sweep: {label}: {rate}", options.seeds[0], options.steps[part], extra))
    return jobs


def plot(rows: Sequence[Mapping[str, Any]], parts: Sequence[str], seeds: Sequence[int], path: Path) -> None:
    """For each part: by epochs, by CPU seconds, and the sweep over rates and blocks."""
    from hf_efx.core.results.plots import matplotlib_pyplot, save_figure

    plt = matplotlib_pyplot()
    figure, axes = plt.subplots(len(parts), 3, figsize=(16, 4.6 * len(parts)), layout="constrained", squeeze=False)
    for line, part in zip(axes, parts, strict=True):
        for i, name in enumerate(CONFIGURATIONS[part]):
            chosen = [r for r in rows if r["configuration"] == f"{part}: {name}" and r["seed"] in seeds]
            curves = [smoothed(r["curve"]) for r in chosen]
            values = np.mean([means for _, means in curves], 0)
            epochs = [step * chosen[0]["epochs"] / chosen[0]["steps"] for step, _, _ in chosen[0]["curve"]]
            style = {"color": f"C{i}", "linewidth": 2.0 if "SliceOut" in name else 1.2, "label": name}
            line[0].plot(epochs, values, **style)
            line[1].plot(np.mean([times for times, _ in curves], 0), values, **style)
            for axis in line[:2]:
                _limits(axis, part)
        line[0].set_xlabel("epochs")
        line[1].set_xlabel("CPU seconds of one thread, evaluation left out")
        line[0].set_title(f"{part}: {TITLES[part]}, mean over seeds")
        line[1].set_title(f"{part}: the same by time")
        line[0].legend(fontsize="small")
        _plot_sweep(line[2], [r for r in rows if r["part"] == part and r["seed"] == seeds[0]], part)
        for axis in line:
            axis.grid(alpha=0.3)
    save_figure(figure, path, dpi=90)


def _limits(axis: Any, part: str) -> None:
    """Keeps the first evaluations from flattening the rest."""
    values = np.concatenate([line.get_ydata()[len(line.get_ydata()) // 4 :] for line in axis.lines])
    margin = 0.05 * float(values.max() - values.min()) + 1e-6
    axis.set_ylim(values.min() - margin, values.max() + margin)


def _plot_sweep(axis: Any, rows: Sequence[Mapping[str, Any]], part: str) -> None:
    """Figure and time of each rate, a line for each kind of block."""
    points: dict[str, list[Any]] = {}
    for row in rows:
        _, sweep, name = row["configuration"].partition(": sweep: ")
        label, _, rate = name.rpartition(": ")
        if sweep:
            points.setdefault(label, []).append((float(rate), row["time_share"], row["figure"]))
        elif row["configuration"] in (f"{part}: dropout", f"{part}: SliceOut, flow"):
            label = "dropout" if row["configuration"].endswith(": dropout") else "SliceOut, all"
            points.setdefault(label, []).append((RATE, row["time_share"], row["figure"]))
    for i, label in enumerate(sorted(points)):
        rates, times, values = zip(*sorted(points[label]), strict=True)
        axis.plot(times, values, "o-", label=label, color=f"C{i}", linewidth=1.2)
        for rate, time, value in zip(rates, times, values, strict=True):
            axis.annotate(f"{rate:g}", (time, value), textcoords="offset points", xytext=(4, 4), fontsize=7)
    axis.set_xlabel(f"CPU time / that of dropout at {RATE}")
    axis.set_title(f"{part}: {TITLES[part]} by rate and blocks, seed {rows[0]['seed'] if rows else '-'}")
    if points:
        axis.legend(fontsize="small")


def headline(claims: Sequence[Mapping[str, Any]], parts: Sequence[str]) -> str:
    """The result in one sentence."""
    shown = []
    for part in parts:
        found = {c["claim"].removesuffix(" (not separated)"): c["measured"] for c in claims}
        figures = {name: [v for k, v in found.items() if k.startswith(f"{part}: {name}, ")] for name in _SLICED}
        epochs, time, _, share = figures[HEADLINE]
        aligned = _gain(part, figures["SliceOut, flow"][0])
        shown.append(
            f"{part.upper()}: {share:.2f} of dropout's CPU time, {_gain(part, epochs)} at equal epochs "
            f"(aligned, flow: {aligned}), {_gain(part, time)} at equal time"
        )
    return f"circular SliceOut at rate {RATE}, where the network overfits. " + "; ".join(shown)


def _gain(part: str, value: float) -> str:
    return f"accuracy {100 * value:+.1f} points" if part == "cnn" else f"perplexity {100 * (value - 1):+.1f}%"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="idx folder or Hub name of images (default: scikit-learn's digits)")
    parser.add_argument("--text", help="file, folder or Hub name of a text (default: the standard library's own)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, nargs=2, default=EPOCHS, metavar=PARTS, help="over images and text")
    parser.add_argument("--no-sweep", dest="sweep", action="store_false", help="leave out other rates and blocks")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    parser.add_argument("--output", type=Path, help="results file (default: results/slice_out.json here)")
    parser.add_argument("--quick", action="store_true", help="a smoke run: 1 seed, a few steps, written to runs/")
    options = parser.parse_args(argv)
    options.evaluations = EVALUATIONS
    if options.quick:
        options.seeds, options.sweep, options.workers, options.evaluations = options.seeds[:1], False, 1, 3
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the study."""
    from hf_efx.core.results.evidence import StudyRows, print_results, public_command, write_results

    options = parse(argv)
    path = options.output or (Path("runs/reproduce") if options.quick else HERE / "results") / "slice_out.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        data, sizes = prepare(options.data, options.text, Path(folder), options.parts)
        options.steps = {
            part: 6 if options.quick else epochs * (sizes[part] // BATCHES[part])
            for part, epochs in zip(PARTS, options.epochs, strict=True)
            if part in options.parts
        }
        settings = {
            "rate": f"{RATE} everywhere but in the sweep, on the same blocks",
            "cnn": "a stem, two blocks of two convolutions with batch norm (64 channels between them are sliced), a "
            f"hidden layer of 256 (sliced); batches of {BATCHES['cnn']}",
            "lm": f"GPT-2, {LM}; batches of {BATCHES['lm']} blocks of {BLOCK} tokens, {VOCABULARY} byte-pair tokens",
            "optimiser": f"AdamW, rate {RATES}, constant after {WARMUP:.0%} of warm-up; no weight decay",
            "steps": options.steps,
            "evaluations": options.evaluations,
            "data": data,
        }
        rows = StudyRows(path, settings)
        common = {"folder": folder, "evaluations": options.evaluations}
        run_all(run, make_jobs(options), rows, options.workers, **common)
    parts = [{**row, "part": row["configuration"].partition(": ")[0]} for row in rows.rows]
    for row in parts:
        row["epochs"] = row["steps"] / (sizes[row["part"]] // BATCHES[row["part"]])
    table = against_dropout(parts)
    claims = make_claims(table, options.parts, options.seeds)
    plot(table, options.parts, options.seeds, path.with_suffix(".png"))
    results = write_results(
        path,
        title="SliceOut against dropout, where a network overfits",
        headline=headline(claims, options.parts),
        command=public_command(),
        data=data,
        seeds=options.seeds,
        rows=[thinned(row) for row in table],
        claims=claims,
        columns=COLUMNS,
        plot=path.with_suffix(".png").name,
        settings=settings,
        notes=NOTES,
    )
    print_results(results)
    rows.finish()


COLUMNS = [
    {"key": "figure", "title": "cnn: accuracy; lm: perplexity", "format": ".4f"},
    {"key": "at_time", "title": "at equal time with dropout", "format": ".4f"},
    {"key": "dropout_at_time", "title": "dropout then", "format": ".4f"},
    {"key": "best", "title": "best on the way", "format": ".4f"},
    {"key": "training_loss", "title": "training loss", "format": ".3f"},
    {"key": "milliseconds", "title": "ms a step", "format": ".1f"},
    {"key": "time_share", "title": "time / dropout's", "format": ".3f"},
]
NOTES = [
    "Seconds are CPU seconds of one thread inside the Trainer's loop: loading and steps; evaluation is left out.",
    f"A figure is the mean of the last {SMOOTHED} of {EVALUATIONS} evaluations, since single ones are noisy at a "
    "constant rate of learning; at equal time both curves are read, smoothed and interpolated, where the faster run "
    "ended.",
    "lm: `dropout` is GPT-2's own: resid_pdrop and attn_pdrop. Attention dropout takes the CPU's fast attention away; "
    "`dropout, none in attention` has resid_pdrop alone.",
    "Within noise, set before the run: at most half a point of accuracy, or 1% of perplexity.",
    "The sweep has one seed: no claim rests on it.",
]

if __name__ == "__main__":
    main()

"""The plot of the study of prunability."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Rows = Sequence[Mapping[str, Any]]


def plot(rankings: Mapping[str, Rows], networks: Rows, sweep: Rows, control: Rows, measure: str, path: Path) -> None:
    """Gaps over prunability, the measures' taus, the sweep of widths, the control.

    Args:
        rankings: For each gap the measures' lines.
        networks: Of the grid.
        sweep: Networks of growing width.
        control: On true and on permuted labels.
        measure: Name of prunability in the rows.
        path: Of the PNG.
    """
    from hf_efx.core.results.plots import matplotlib_pyplot, save_figure

    plt = matplotlib_pyplot()
    figure, axes = plt.subplots(2, 3, figsize=(17, 10), layout="constrained")
    for axis, gap in zip(axes[0], rankings, strict=False):
        _scatter(axis, networks, measure, gap)
    _taus(axes[0][2], rankings)
    _sweep(axes[1][0], sweep, measure)
    _control(axes[1][1], control, measure)
    _by_setting(axes[1][2], rankings, measure)
    save_figure(figure, path, dpi=80)


def _scatter(axis: Any, rows: Rows, measure: str, gap: str) -> None:
    sizes, widths = (sorted({row[name] for row in rows}) for name in ("images", "width"))
    for i, images in enumerate(sizes):
        for j, width in enumerate(widths):
            chosen = [row for row in rows if row["images"] == images and row["width"] == width]
            points = [row[measure] for row in chosen], [row[gap] for row in chosen]
            label = f"{images:,} images, width {width}"
            axis.scatter(*points, color=f"C{i}", marker="osv^D"[j % 5], s=28, alpha=0.8, label=label)
    axis.set(xlabel="prunability (fraction kept)", ylabel=gap.replace("_", " "), title=f"{len(rows)} networks")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")


def _taus(axis: Any, rankings: Mapping[str, Rows]) -> None:
    """Taus with intervals, in the order of the first gap."""
    names = [line["measure"] for line in next(iter(rankings.values()))][::-1]
    for i, (gap, lines) in enumerate(rankings.items()):
        by = {line["measure"]: line for line in lines}
        for y, name in enumerate(names):
            line = by[name]
            low, high = line["tau_interval"]
            at = y + 0.2 - 0.4 * i
            axis.plot(
                [low, high], [at, at], color=f"C{i}", linewidth=1.5, label=gap.replace("_", " ") if not y else None
            )
            axis.plot(line["tau"], at, "o", color=f"C{i}", markersize=4)
    axis.set_yticks(range(len(names)), [name.replace("_", " ") for name in names], fontsize="small")
    for label in axis.get_yticklabels():
        if label.get_text().startswith("prunability"):
            label.set_fontweight("bold")
    axis.axvline(0, color="black", linewidth=1)
    axis.set(title="Kendall's tau with the gap, 95% intervals", xlim=(-1, 1))
    axis.grid(axis="x", alpha=0.3)
    axis.legend(fontsize="small")


def _mean_by(rows: Rows, key: str, figure: str) -> tuple[list[Any], list[float]]:
    values = sorted({row[key] for row in rows})
    return values, [statistics.fmean(row[figure] for row in rows if row[key] == value) for value in values]


def _sweep(axis: Any, rows: Rows, measure: str) -> None:
    """Test loss, test error, training error and prunability over the width."""
    axis.plot(*_mean_by(rows, "hidden", "test_loss"), marker="o", markersize=4, color="C1", label="test loss (nats)")
    for figure, label, color in (("test_accuracy", "test error", "C3"), ("train_accuracy", "training error", "C7")):
        widths, accuracies = _mean_by(rows, "hidden", figure)
        axis.plot(widths, [1 - a for a in accuracies], marker="o", markersize=4, color=color, label=label)
    for form, line in ((measure, "-"), (f"{measure}, absolute 0.1", "--")):
        axis.plot(*_mean_by(rows, "hidden", form), line, marker="s", markersize=4, color="C0", label=form)
    axis.set(
        xscale="log", xlabel="hidden width", title="label noise: test loss and prunability by width", ylim=(0, 1.9)
    )
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")


def _control(axis: Any, rows: Rows, measure: str) -> None:
    forms = [name for name in rows[0] if name.startswith(measure) and not name.endswith("seconds")]
    for i, kind in enumerate(("true", "permuted")):
        chosen = [row for row in rows if row["labels"] == kind]
        means = [statistics.fmean(row[form] for row in chosen) for form in forms]
        places = [x + 0.4 * i - 0.2 for x in range(len(forms))]
        axis.bar(places, means, width=0.38, color=f"C{2 + i}", label=f"{kind} labels")
        for x, form in zip(places, forms, strict=True):
            axis.plot([x] * len(chosen), [row[form] for row in chosen], "k.", markersize=4)
    axis.set_xticks(range(len(forms)), [form.replace(", ", "\n") for form in forms], fontsize="small")
    axis.set(ylabel="fraction kept", title="equal networks at equal training loss, true or permuted labels")
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize="small")


def _by_setting(axis: Any, rankings: Mapping[str, Rows], measure: str) -> None:
    """Prunability's tau where one hyperparameter alone differs."""
    for i, (gap, lines) in enumerate(rankings.items()):
        by = next(line["granulated"] for line in lines if line["measure"] == measure)
        places = [x + 0.4 * i - 0.2 for x in range(len(by))]
        axis.bar(places, list(by.values()), width=0.38, color=f"C{i}", label=gap.replace("_", " "))
        axis.set_xticks(range(len(by)), [name.replace("_", "\n") for name in by])
    axis.axhline(0, color="black", linewidth=1)
    axis.set(title="tau of prunability where one hyperparameter alone differs", ylim=(-1, 1))
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize="small")

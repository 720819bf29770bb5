"""The plots of the studies of RHO-LOSS and GoldiProx: figures by steps and seconds, and what was chosen over time."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Rows = Sequence[Mapping[str, Any]]


def _mean_curve(rows: Rows, key: str, column: int) -> tuple[np.ndarray, np.ndarray]:
    """A curve's mean over seeds: the first column (or another one) and the last."""
    curves = [np.array(row[key], float) for row in rows if row.get(key)]
    if not curves:
        return np.empty(0), np.empty(0)
    length = min(map(len, curves))
    stacked = np.stack([curve[:length] for curve in curves]).mean(0)
    return stacked[:, column], stacked[:, -1]


def plot(rows: Rows, seeds: Sequence[int], path: Path, panels: int = 4) -> None:
    """One line of panels for each part: by steps, by seconds, share of corrupted examples, share already right."""
    from hf_efx.core.results.plots import matplotlib_pyplot, save_figure

    plt = matplotlib_pyplot()
    parts = list(dict.fromkeys(row["part"] for row in rows if row.get("curve")))
    kinds = (
        ("curve", 0, "optimiser steps"),
        ("curve", 1, "CPU seconds, evaluation left out"),
        ("corrupted_share_curve", 0, "optimiser steps"),
        ("right_share_curve", 0, "optimiser steps"),
    )[:panels]
    titles = {
        "corrupted_share_curve": "share of corrupted examples chosen",
        "right_share_curve": "share already right",
    }
    figure, axes = plt.subplots(
        len(parts), panels, figsize=(5 * panels, 4.4 * len(parts)), layout="constrained", squeeze=False
    )
    for line, part in zip(axes, parts, strict=True):
        chosen = [row for row in rows if row["part"] == part and row["seed"] in seeds and row.get("curve")]
        names = list(dict.fromkeys(row["configuration"] for row in chosen))
        for axis, (key, column, label) in zip(line, kinds, strict=True):
            for i, name in enumerate(names):
                x, y = _mean_curve([row for row in chosen if row["configuration"] == name], key, column)
                if len(x):
                    axis.plot(x, y, label=name.partition(": ")[2], color=f"C{i}", linewidth=1.2)
            axis.set_xlabel(label)
            axis.grid(alpha=0.3)
            axis.set_title(f"{part}: " + titles.get(key, "clean loss" if part == "lm" else "clean test accuracy"))
        base = [row["drawn_corrupted_share"] for row in chosen if "drawn_corrupted_share" in row]
        if base and panels > 2:
            line[2].axhline(float(np.mean(base)), linestyle="--", color="black", linewidth=1)
        line[0].legend(fontsize="small")
        _limits(line[:2], chosen)
    save_figure(figure, path, dpi=90)


def _limits(axes: Any, rows: Rows) -> None:
    """Keeps the first evaluations, and configurations that fail, from flattening the rest."""
    finals = sorted(row["best"] for row in rows)
    low, high = finals[0], finals[-1]
    margin = max(0.15 * (high - low), 0.01)
    for axis in axes:
        bottom, top = axis.get_ylim()
        axis.set_ylim(max(bottom, low - 2 * margin), min(top, high + 2 * margin))

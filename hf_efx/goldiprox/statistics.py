"""What a selection sequence holds, in figures and as a plot: repeats, scores over time, shares of the labels."""

import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset

from hf_efx.core.data.example_ids import IdIndex
from hf_efx.goldiprox.recording import Steps, iterate_steps

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_COUNT_AFTER = 1 << 22  # ids gathered before they are counted
_MOST_LABELS = 64


def sequence_statistics(
    sequence: Dataset, data: Dataset | None = None, label_column: str | None = None, windows: int = 20
) -> dict[str, Any]:
    """Describes a sequence; see `SelectionSequence.statistics`."""
    if (data is None) != (label_column is None):
        raise ValueError(f"label_column={label_column!r} is read from dataset: give both or neither.")
    if windows < 1:
        raise ValueError(f"windows={windows}: expected 1 or more parts of the sequence.")
    unique, counts = _counts(sequence)
    times, examples = np.unique(counts, return_counts=True)
    figures: dict[str, Any] = {
        "steps": len(sequence),
        "examples": int(counts.sum()),
        "unique_examples": len(unique),
        "repeated": 1 - len(unique) / int(counts.sum()),
        "times_chosen": dict(zip(times.tolist(), examples.tolist(), strict=True)),
        "scores": [_score_row(steps) for steps in _windows(sequence, windows)],
    }
    if data is not None and label_column is not None:
        figures["labels"] = _label_shares(sequence, data, label_column, windows)
    return figures


def _counts(sequence: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Each id once, and how often it is chosen; a few million ids in memory at a time beside those."""
    unique = counts = np.empty(0, np.int64)
    gathered: list[np.ndarray] = []
    held = 0
    for steps in iterate_steps(sequence):
        gathered.append(steps.example_ids)
        held += len(steps.example_ids)
        if held >= _COUNT_AFTER:
            unique, counts = _merged(unique, counts, gathered)
            gathered, held = [], 0
    return _merged(unique, counts, gathered)


def _merged(unique: np.ndarray, counts: np.ndarray, ids: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    more, times = np.unique(np.concatenate([np.empty(0, np.int64), *ids]), return_counts=True)
    every, places = np.unique(np.concatenate([unique, more]), return_inverse=True)
    return every, np.bincount(places, np.concatenate([counts, times]), len(every)).astype(np.int64)


def _windows(sequence: Dataset, windows: int) -> Iterator[Steps]:
    """The sequence in so many parts of about as many steps each, one part in memory at a time."""
    edges = np.unique(np.linspace(0, len(sequence), min(windows, len(sequence)) + 1).round().astype(int))
    for first, end in zip(edges[:-1], edges[1:], strict=True):
        parts = list(iterate_steps(sequence.select(range(first, end))))
        ids, scores = (np.concatenate([getattr(part, name) for part in parts]) for name in ("example_ids", "scores"))
        yield Steps(np.arange(first, end), np.array([0, len(ids)]), ids, scores)


def _score_row(steps: Steps) -> dict[str, float | int]:
    """Quantiles of a window's finite scores; an example without a valid label has the score minus infinity."""
    finite = steps.scores[np.isfinite(steps.scores)]
    values = np.quantile(finite, QUANTILES).tolist() if len(finite) else [float("nan")] * len(QUANTILES)
    edges = {"first_step": int(steps.step[0]), "last_step": int(steps.step[-1])}
    return edges | {f"q{round(100 * q):02d}": value for q, value in zip(QUANTILES, values, strict=True)}


def _label_shares(sequence: Dataset, data: Dataset, column: str, windows: int) -> dict[str, Any]:
    if column not in data.column_names:
        raise ValueError(f"label_column={column!r}: the data set has no such column, only {data.column_names}.")
    index = IdIndex(data)
    values = np.asarray(data.with_format("numpy")[column][:])
    labels, codes = np.unique(values, return_inverse=True)
    if len(labels) > _MOST_LABELS:
        raise ValueError(f"label_column={column!r} has {len(labels)} values: shares are of {_MOST_LABELS} at most.")
    feature = data.features[column]
    names = [str(feature.int2str(int(v))) if isinstance(feature, ClassLabel) else str(v) for v in labels.tolist()]

    def counts(steps: Steps) -> np.ndarray:
        return np.bincount(codes[index.rows(steps.example_ids)], minlength=len(names))

    def shares(counts: np.ndarray) -> dict[str, float]:
        return dict(zip(names, (counts / counts.sum()).tolist(), strict=True))

    parts = [(steps.step, counts(steps)) for steps in _windows(sequence, windows)]
    return {
        "column": column,
        "in_the_data": shares(np.bincount(codes)),
        "in_the_sequence": shares(np.sum([part for _, part in parts], 0)),
        "by_step": [{"first_step": int(s[0]), "last_step": int(s[-1]), **shares(part)} for s, part in parts],
    }


def plot_statistics(figures: dict[str, Any]) -> Any:
    """Draws what `sequence_statistics` gave: scores by step, how often examples are chosen, and shares of the labels.

    Returns:
        A matplotlib figure.

    Raises:
        ImportError: If matplotlib isn't installed; it names the extra that installs it.
    """
    try:
        figure_class = importlib.import_module("matplotlib.figure").Figure
    except ImportError as error:
        raise ImportError(
            "plotting a sequence needs matplotlib: install it with pip install 'hf_efx[plot]'."
        ) from error
    # A Figure of its own, not pyplot's: no screen, no global state, nothing to close.
    figure = figure_class(figsize=(5 * (2 + ("labels" in figures)), 3.6), layout="constrained")
    axes = figure.subplots(1, 2 + ("labels" in figures))
    rows = figures["scores"]
    middle = [(row["first_step"] + row["last_step"]) / 2 for row in rows]
    for low, high, shade in (("q05", "q95", 0.2), ("q25", "q75", 0.4)):
        axes[0].fill_between(middle, [r[low] for r in rows], [r[high] for r in rows], alpha=shade, color="C0")
    axes[0].plot(middle, [row["q50"] for row in rows], color="C0", marker="." if len(rows) == 1 else None)
    axes[0].set(xlabel="step", ylabel="score", title="Scores of the chosen: median, 50%, 90%")
    times = figures["times_chosen"]
    axes[1].bar(list(times), list(times.values()), color="C0")
    axes[1].set(xlabel="times chosen", ylabel="examples", title=f"{figures['unique_examples']:,} examples")
    if "labels" in figures:
        labels = figures["labels"]
        middle = [(row["first_step"] + row["last_step"]) / 2 for row in labels["by_step"]]
        for index, (name, share) in enumerate(labels["in_the_data"].items()):
            axes[2].plot(middle, [row[name] for row in labels["by_step"]], color=f"C{index % 10}", label=name)
            axes[2].axhline(share, color=f"C{index % 10}", linestyle=":", linewidth=0.8)
        axes[2].set(xlabel="step", ylabel="share of the chosen", title=f"By {labels['column']} (dotted: the data)")
        axes[2].legend(fontsize="small", ncols=2)
    return figure

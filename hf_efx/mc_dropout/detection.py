"""How well a score tells shifted sources from others: AUROC, AUPR, FPR95, with bootstrap intervals."""

import importlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_efx.core.results.plots import matplotlib_pyplot, save_figure
from hf_efx.core.results.statistics import Interval, percentile_interval

Scores = Sequence[float] | np.ndarray
METRICS = ("auroc", "aupr", "fpr95")
_FOUND = 0.95  # share of the shifted sources that are found, for fpr95


@dataclass(frozen=True)
class Detection:
    """How well a score tells shifted sources from others.

    Attributes:
        auroc: Area under the ROC curve: how often a shifted source scores higher than another, ties counting half.
        aupr: Average precision, the shifted sources being the positive ones; by chance it is their share.
        fpr95: Share of the others above the highest threshold that finds 95% of the shifted sources.
        intervals: Of each by name; empty where there are none.
        sources: How many there were.
        shifted: How many of them were shifted.
        reason: Why the figures are NaN; empty where they aren't.
    """

    auroc: float
    aupr: float
    fpr95: float
    intervals: Mapping[str, Interval]
    sources: int
    shifted: int
    reason: str = ""


def detection_report(
    scores: Scores,
    is_shifted: Sequence[bool] | np.ndarray,
    *,
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Detection:
    """How well a score finds the shifted sources (Hendrycks and Gimpel 2017, arXiv 1610.02136: AUROC and AUPR).

    Intervals are the middle of bootstrap draws, of the shifted sources and of the others each with replacement.

    Args:
        scores: [n] higher for what should be shifted, as all of `UNCERTAINTIES` are.
        is_shifted: [n] true for the shifted sources.
        draws: Of the bootstrap; 0 for no intervals.
        seed: Of the draws.
        level: Of the intervals.

    Returns:
        Figures that are NaN, with the reason, where all sources are of one kind.

    Raises:
        ImportError: If scikit-learn isn't installed; it names the extra that installs it.
        ValueError: For a score that isn't finite, or lengths that differ.

    Example:
        >>> from hf_efx.mc_dropout import detection_report
        >>> detection_report([0.1, 0.4, 0.3, 0.9], [False, False, True, True], draws=0).auroc
        0.75
    """
    values, shifted = finite_scores(scores, "scores"), _labels(is_shifted)
    _same_length(values, shifted)
    sources, found = len(shifted), int(shifted.sum())
    if found in (0, sources):
        kind = "shifted" if found else "not shifted"
        reason = f"all of the {sources} sources are {kind}: there is nothing to tell apart."
        return Detection(math.nan, math.nan, math.nan, {}, sources, found, reason)
    drawn = np.array([_metrics(values[rows], shifted[rows]) for rows in _stratified(shifted, draws, seed)])
    intervals = {name: percentile_interval(column, level) for name, column in zip(METRICS, drawn.T, strict=False)}
    auroc, aupr, fpr95 = _metrics(values, shifted)
    return Detection(auroc, aupr, fpr95, intervals, sources, found)


def detection_difference(
    first: Scores,
    second: Scores,
    is_shifted: Sequence[bool] | np.ndarray,
    *,
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, tuple[float, Interval]]:
    """By how much one score tells shifted sources better than another of the same sources: a paired bootstrap.

    Args:
        first: [n], or [models, n] of the same sources by several models: the differences are their mean then.
        second: Of the same shape.
        is_shifted: [n].
        draws: Of the bootstrap, 1 or more; the same for both scores and all models.
        seed: Of the draws.
        level: Of the intervals.

    Returns:
        For each of auroc, aupr, fpr95 first - second and its interval.

    Raises:
        ImportError: If scikit-learn isn't installed.
        ValueError: As `detection_report`; where all sources are of one kind, too.
    """
    shifted = _labels(is_shifted)
    pair = [np.atleast_2d(finite_scores(scores, name)) for scores, name in ((first, "first"), (second, "second"))]
    if pair[0].shape != pair[1].shape:
        raise ValueError(f"first and second have shapes {[list(scores.shape) for scores in pair]}: expected the same.")
    _same_length(pair[0][0], shifted)
    if draws < 1 or shifted.all() or not shifted.any():
        raise ValueError(
            f"draws={draws}, {int(shifted.sum())} of {len(shifted)} shifted: expected a draw, both kinds."
        )

    def difference(rows: np.ndarray) -> np.ndarray:
        figures = np.array([[_metrics(scores[rows], shifted[rows]) for scores in models] for models in pair])
        return (figures[0] - figures[1]).mean(0)

    whole = difference(np.arange(len(shifted)))
    drawn = np.array([difference(rows) for rows in _stratified(shifted, draws, seed)])
    return {name: (float(whole[i]), percentile_interval(drawn[:, i], level)) for i, name in enumerate(METRICS)}


def plot_roc(
    scores: Mapping[str, Scores], is_shifted: Sequence[bool] | np.ndarray, path: str | os.PathLike[str]
) -> Path:
    """Draws the ROC curves of scores into a PNG, which is there whole or not at all.

    Args:
        scores: [n] by their names in the legend.
        is_shifted: [n].
        path: Of the PNG.

    Raises:
        ImportError: If matplotlib or scikit-learn isn't installed.
        ValueError: As `detection_report`; where all sources are of one kind, too.
    """
    shifted = _labels(is_shifted)
    reports = {name: detection_report(values, shifted, draws=0) for name, values in scores.items()}
    if reason := next((report.reason for report in reports.values() if report.reason), ""):
        raise ValueError(f"plot_roc: {reason}")
    figure, axes = matplotlib_pyplot().subplots(figsize=(5, 4), layout="constrained")
    for name, values in scores.items():
        wrong, right, _ = _sklearn_metrics().roc_curve(shifted, np.asarray(values, np.float64))
        axes.plot(wrong, right, label=f"{name} ({reports[name].auroc:.3f})")
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":", linewidth=0.8)
    axes.set(xlabel="share of the other sources deferred", ylabel="share of the shifted sources deferred")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return save_figure(figure, path)


def finite_scores(scores: Any, name: str) -> np.ndarray:
    """The scores as float64.

    Raises:
        ValueError: If there are none, or one isn't finite.
    """
    if isinstance(scores, Mapping):
        raise ValueError(f"{name}={list(scores)}: expected the numbers of one score.")
    values = np.asarray(scores, np.float64)
    wrong = int((~np.isfinite(values)).sum())
    if not values.size:
        raise ValueError(f"{name} are empty: expected the numbers of one score.")
    if wrong or values.ndim not in (1, 2):
        raise ValueError(
            f"{name} of shape {list(values.shape)}, of which {wrong} aren't finite: expected numbers; leave out the "
            f"sources without a score, such as empty ones."
        )
    return values


def _labels(is_shifted: Any) -> np.ndarray:
    labels = np.asarray(is_shifted)
    if labels.ndim != 1 or not np.isin(labels, (0, 1)).all():
        raise ValueError(f"is_shifted of shape {list(labels.shape)}: expected true or false for each source.")
    return labels.astype(bool)


def _same_length(scores: np.ndarray, shifted: np.ndarray) -> None:
    if scores.shape != shifted.shape:
        raise ValueError(f"scores of shape {list(scores.shape)} and is_shifted of {len(shifted)}: expected the same.")


def _stratified(shifted: np.ndarray, draws: int, seed: int) -> Iterator[np.ndarray]:
    """Rows [n] with replacement, as many of each kind as there are."""
    generator = np.random.default_rng(seed)
    kinds = np.flatnonzero(shifted), np.flatnonzero(~shifted)
    for _ in range(draws):
        yield np.concatenate([generator.choice(kind, len(kind)) for kind in kinds])


def _metrics(scores: np.ndarray, shifted: np.ndarray) -> tuple[float, float, float]:
    """auroc, aupr, fpr95. All from one ROC curve: a bootstrap takes thousands of them."""
    metrics = _sklearn_metrics()
    wrong, right, _ = metrics.roc_curve(shifted, scores, drop_intermediate=False)
    positive, negative = shifted.sum(), (~shifted).sum()
    precision = right[1:] * positive / (right[1:] * positive + wrong[1:] * negative)
    aupr = (np.diff(right) * precision).sum()  # scikit-learn's average_precision_score
    return float(metrics.auc(wrong, right)), float(aupr), float(wrong[np.searchsorted(right, _FOUND)])


def _sklearn_metrics() -> Any:
    try:
        return importlib.import_module("sklearn.metrics")
    except ImportError as error:
        raise ImportError("AUROC needs scikit-learn: install it with pip install 'hf_efx[mt]'.") from error

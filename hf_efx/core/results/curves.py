"""Curves of a metric over a fraction: of the weights that are pruned, or of the data that is retained."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Self

from huggingface_hub import EvalResult

from hf_efx.core.results.card import eval_results
from hf_efx.core.results.plots import matplotlib_pyplot, save_figure
from hf_efx.core.results.statistics import Interval


@dataclass(frozen=True)
class FractionCurve:
    """A metric at some fractions, with its area, as a plot, as JSON, and as results for a card.

    Attributes:
        points: (fraction, value) by rising fraction; fractions lie from 0 to 1, a value that isn't finite is kept.
        metric: What the values are, such as "accuracy": an identifier of letters, digits, ".", "_" and "-".
        higher_is_better: Whether more of it is better.
        settings: What the curve was made with, as JSON values; part of its JSON form.
        intervals: Of the value at each point, by rising fraction; empty where none were measured.
        area_interval: Of the area.

    Raises:
        ValueError: Without points, at fractions that repeat or lie outside of [0, 1], for a number of intervals that
            isn't that of the points.
    """

    points: tuple[tuple[float, float], ...]
    metric: str
    higher_is_better: bool
    settings: Mapping[str, Any] = field(default_factory=dict)
    intervals: tuple[Interval, ...] = ()
    area_interval: Interval | None = None

    axis: ClassVar[str]
    word: ClassVar[str]

    def __post_init__(self) -> None:
        points = tuple(sorted((float(fraction), float(value)) for fraction, value in self.points))
        object.__setattr__(self, "points", points)
        fractions = [fraction for fraction, _ in points]
        if not points or len(set(fractions)) < len(fractions) or not all(0 <= f <= 1 for f in fractions):
            raise ValueError(
                f"{type(self).__name__}: fractions={fractions}: expected one value or more, at different fractions "
                f"from 0 to 1."
            )
        if self.intervals and len(self.intervals) != len(points):
            raise ValueError(f"{type(self).__name__}: {len(self.intervals)} intervals for {len(points)} points.")

    @property
    def fractions(self) -> tuple[float, ...]:
        """The fractions, rising."""
        return tuple(fraction for fraction, _ in self.points)

    @property
    def values(self) -> tuple[float, ...]:
        """The metric at each fraction."""
        return tuple(value for _, value in self.points)

    @property
    def area(self) -> float:
        """Area under the curve by trapezoids over the width of its fractions: the metric's mean; of one point its own.

        Areas compare where the fractions are the same.
        """
        if len(self.points) == 1:
            return self.values[0]
        area = sum((b - a) * (x + y) / 2 for (a, x), (b, y) in pairwise(self.points))
        return area / (self.fractions[-1] - self.fractions[0])

    def at(self, fraction: float) -> float:
        """The metric at a fraction, between two points on the line that joins them.

        Raises:
            ValueError: Outside of the curve's fractions.
        """
        for there, value in self.points:
            if there == fraction:
                return value
        for (a, x), (b, y) in pairwise(self.points):
            if a < fraction < b:
                return x + (y - x) * (fraction - a) / (b - a)
        raise ValueError(
            f"fraction={fraction} lies outside of the curve's, {self.fractions[0]} to {self.fractions[-1]}."
        )

    def figures(self, prefix: str = "") -> dict[str, float]:
        """The points and the area as named figures for logs: `accuracy_pruned_90` is the accuracy at 90% pruned.

        Args:
            prefix: Before each name, such as "eval_".
        """
        name = f"{prefix}{self.metric}_{self.word}"
        result = {f"{name}_{100 * fraction:g}": value for fraction, value in self.points}
        return {**result, f"{name}_area": self.area}

    def to_eval_results(
        self, *, task_type: str, dataset_type: str, dataset_name: str, **more: Any
    ) -> list[EvalResult]:
        """The points and the area as results for a model card.

        Args:
            task_type: The task in the Hub's words, such as "text-generation".
            dataset_type: The data's identifier.
            dataset_name: The data's name for people.
            **more: Other fields of `huggingface_hub.EvalResult`, such as `dataset_split`.
        """
        data = {"task_type": task_type, "dataset_type": dataset_type, "dataset_name": dataset_name}
        return eval_results(self.figures(), **{**data, **more})

    def to_dict(self) -> dict[str, Any]:
        """JSON form; a value that isn't finite is written as text."""
        content = {
            "metric": self.metric,
            "higher_is_better": self.higher_is_better,
            "points": [[fraction, _json(value)] for fraction, value in self.points],
            "area": _json(self.area),
            "settings": dict(self.settings),
        }
        if self.intervals:
            content["intervals"] = [list(map(_json, interval)) for interval in self.intervals]
        if self.area_interval:
            content["area_interval"] = list(map(_json, self.area_interval))
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """The curve that `to_dict` wrote.

        Raises:
            ValueError: If a key is missing or malformed.
        """
        try:
            points = tuple((float(fraction), float(value)) for fraction, value in content["points"])
            intervals = tuple((float(low), float(high)) for low, high in content.get("intervals", ()))
            area = content.get("area_interval")
            return cls(
                points,
                content["metric"],
                content["higher_is_better"],
                dict(content.get("settings", {})),
                intervals,
                (float(area[0]), float(area[1])) if area else None,
            )
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{cls.__name__}: {json.dumps(content, default=str)[:200]} is none ({error!r}); expected what "
                f"to_dict() gives: points, metric, higher_is_better, settings."
            ) from error

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draws the curve into a PNG; see `plot_curves`."""
        return plot_curves({self.metric: self}, path)


@dataclass(frozen=True)
class PruningCurve(FractionCurve):
    """A metric over the fraction of weights or units that is pruned, 0 being the whole model."""

    axis: ClassVar[str] = "fraction pruned"
    word: ClassVar[str] = "pruned"


@dataclass(frozen=True)
class RetentionCurve(FractionCurve):
    """A metric over the fraction of the data that is retained, the surest first, 1 being all of it."""

    axis: ClassVar[str] = "fraction of the data retained"
    word: ClassVar[str] = "retained"


def _json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def plot_curves(curves: Mapping[str, FractionCurve], path: str | os.PathLike[str]) -> Path:
    """Draws curves of one kind and metric into a PNG, which is there whole or not at all.

    Args:
        curves: By their names in the legend, which one curve alone hasn't.
        path: Of the PNG.

    Returns:
        The path.

    Raises:
        ImportError: If matplotlib isn't installed; it names the extra that installs it.
        ValueError: Without curves, or if they have different metrics or axes.
    """
    kinds = {(type(curve), curve.metric) for curve in curves.values()}
    if len(kinds) != 1:
        raise ValueError(f"plot_curves: curves={list(curves)}: expected curves of one kind and one metric.")
    figure, axes = matplotlib_pyplot().subplots(figsize=(5, 4), layout="constrained")
    for name, curve in curves.items():
        (line,) = axes.plot(curve.fractions, curve.values, marker="o", markersize=3, label=name)
        if curve.intervals:
            low, high = zip(*curve.intervals, strict=True)
            axes.fill_between(curve.fractions, low, high, alpha=0.15, color=line.get_color())
    one = next(iter(curves.values()))
    axes.set(xlabel=one.axis, ylabel=f"{one.metric} ({'higher' if one.higher_is_better else 'lower'} is better)")
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend()
    return save_figure(figure, path)


def as_figure(result: float | Mapping[str, float] | Any, metric: str) -> float:
    """The metric in what an evaluation gave: a number, or a mapping with `metric` or `eval_<metric>` in it.

    Raises:
        ValueError: If the metric isn't there.
    """
    if not isinstance(result, Mapping):
        return float(result)
    for name in (metric, f"eval_{metric}"):
        if name in result:
            return float(result[name])
    raise ValueError(f"metric={metric!r} isn't among what the evaluation gave: {', '.join(map(str, result))}.")


def check_fractions(fractions: Iterable[float], name: str = "fractions") -> tuple[float, ...]:
    """The fractions to prune, rising.

    Raises:
        ValueError: If there are none, or one lies outside of [0, 1).
    """
    found = tuple(sorted({float(fraction) for fraction in fractions}))
    wrong = [fraction for fraction in found if not 0 <= fraction < 1]
    if wrong or not found:
        raise ValueError(f"{name}={list(found)}: expected fractions from 0 to below 1, such as [0, 0.5, 0.9].")
    return found

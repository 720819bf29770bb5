"""Prunability: the smallest fraction of weights that can be kept without harming the loss on the training data.

"Robustness to Pruning Predicts Generalization in Deep Neural Networks", Kuhn et al. 2021, arXiv 2103.06002. Of two
networks with one training loss the one that stands more pruning should generalize better. No retraining, no
validation set: the loss is that of a fixed sample of the training data.
"""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, Literal, get_args

from huggingface_hub import EvalResult
from torch import nn

from hf_efx.core.model.wrappers import unwrap_model
from hf_efx.core.results.card import eval_results
from hf_efx.core.results.curves import PruningCurve
from hf_efx.core.results.plots import matplotlib_pyplot, save_figure
from hf_efx.core.scoring.losses import Task
from hf_efx.core.scoring.scoring_state import scoring_state
from hf_efx.prunability.loss_curve import STEPS, LossCurve, bound_of, interval_of
from hf_efx.prunability.sample import EvaluateLoss, Sample, check_whole_number
from hf_efx.prunability.weights import Criterion, Scope, WeightOrder, prunable_weights

ToleranceMode = Literal["relative", "absolute"]

_DATA_SET = {"samples": 1000, "data_collator": None, "task": None, "batch_size": 64, "label_smoothing": 0.0}


@dataclass(frozen=True)
class PrunabilityResult:
    """What was found, and on what.

    Attributes:
        fraction: The smallest fraction kept, on a grid of hundredths, above which the loss stays within the tolerance
            at all that was evaluated. 1 if nothing may go.
        curve: The loss over the fraction *pruned*, 1 - kept, at all that was evaluated.
        evaluations: Of the loss over the whole sample.
        interval: 95% interval of `fraction` by bootstrap over examples; None for a loss that is one number, and of
            one example. Between evaluated fractions the loss is taken to be linear, so it is wider than a grid step
            only where the sample makes it so.
        lowest: The smallest fraction of the grid that stays within the tolerance at all, with `exhaustive=True`; it
            lies below `fraction` where the loss isn't monotone.
        loss: Of the whole model.
        bound: What the loss may be.
        weights: How many weights were ranked.
        kept: For each tensor, the share of its weights that is kept at `fraction`.
        samples: Examples; None for a loss that is one number.
        settings: Tolerance, criterion, scope and what else was asked for.
    """

    fraction: float
    curve: PruningCurve
    evaluations: int
    interval: tuple[float, float] | None
    lowest: float | None
    loss: float
    bound: float
    weights: int
    kept: dict[str, float]
    samples: int | None
    settings: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        interval = "" if self.interval is None else f" (95% interval {self.interval[0]:.2f} to {self.interval[1]:.2f})"
        over = "" if self.samples is None else f" over {self.samples:,} examples"
        lines = [
            f"prunability {self.fraction:.2f}{interval}: of {self.weights:,} weights in {len(self.kept)} tensors, by "
            f"{self.settings['criterion']}, {self.settings['scope']}, embeddings "
            f"{'in' if self.settings['embeddings'] else 'left out'}",
            f"loss {self.loss:.4g}{over}, at most {self.bound:.4g} ({self.settings['tolerance_mode']} tolerance "
            f"{self.settings['tolerance']:g}); {self.evaluations} evaluations",
            "share kept of each tensor:",
        ]
        return "\n".join([*lines, *(f"  {share:6.1%}  {name}" for name, share in self.kept.items())])

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draws the loss over the fraction kept, with bound, prunability and interval, into a PNG."""
        plt = matplotlib_pyplot()
        figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
        kept = [1 - pruned for pruned in self.curve.fractions]
        axes.plot(kept, self.curve.values, marker="o", markersize=3, label="loss")
        axes.axhline(self.bound, linestyle="--", color="black", linewidth=1, label="bound")
        axes.axvline(self.fraction, color="C1", label=f"prunability {self.fraction:.2f}")
        if self.interval is not None:
            axes.axvspan(*self.interval, color="C1", alpha=0.2, linewidth=0)
        finite = [value for value in self.curve.values if math.isfinite(value)]
        if max(finite) > 0 and min(finite) > 0 and max(finite) > 20 * min(finite):
            axes.set_yscale("log")
        axes.set(xlabel="fraction of weights kept", ylabel="loss on the sample")
        axes.grid(alpha=0.3)
        axes.legend()
        return save_figure(figure, path, dpi=100)

    def to_eval_results(
        self, *, task_type: str, dataset_type: str, dataset_name: str, **more: Any
    ) -> list[EvalResult]:
        """Prunability as a result for a model card.

        Args:
            task_type: The task in the Hub's words, such as "text-generation".
            dataset_type: The data's identifier.
            dataset_name: The data's name for people.
            **more: Other fields of `huggingface_hub.EvalResult`, such as `dataset_split`.
        """
        data = {"task_type": task_type, "dataset_type": dataset_type, "dataset_name": dataset_name}
        settings = {"metric_config": f"{self.settings['criterion']}, {self.settings['scope']}"}
        return eval_results({"prunability": self.fraction}, **{**settings, **data, **more})


def measure_prunability(
    model: nn.Module,
    losses: EvaluateLoss | Any,
    tolerance: float = 0.1,
    criterion: Criterion = "magnitude",
    scope: Scope = "global",
    tolerance_mode: ToleranceMode = "relative",
    exhaustive: bool = False,
    samples: int | None = 1000,
    seed: int = 0,
    *,
    embeddings: bool = False,
    data_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    task: Task | None = None,
    batch_size: int = 64,
    label_smoothing: float = 0.0,
) -> PrunabilityResult:
    """Finds the smallest fraction of the weights that can be kept within a tolerance of the loss.

    Bisection on a grid of hundredths, which supposes that the loss falls as more is kept: 9 evaluations. The model
    comes back bit for bit, after an exception and Ctrl-C too: weights, buffers, gradients, training modes, random
    states. Nothing is rescaled and nothing retrained.

    Args:
        model: Any model, on any device, in any mode; it is looked at in eval mode, without wrappers.
        losses: A data set, of which `Sample` draws examples and computes the losses; or a function of the model that
            returns one loss an example [n], (losses [n], weights [n]) for a weighted mean, or one number. It must be
            of training data, the same at every call, and needs neither `no_grad` nor `eval`.
        tolerance: By how much the loss may rise. More prunes deeper and is steadier, and asks less of the model.
            Default: 0.1 relative.
        criterion: `"magnitude"` keeps the largest weights, `"random"` any (one random order, drawn from the seed; not
            rescaled).
        scope: `"global"` ranks all weights together, `"layer"` keeps the same fraction of each tensor.
        tolerance_mode: `"relative"` allows loss * (1 + tolerance), `"absolute"` loss + tolerance. Of a training loss
            near 0 a relative tolerance is one near 0 too, and the measure turns to noise.
        exhaustive: Evaluate the whole grid: 101 evaluations, right also where the loss isn't monotone.
        samples: Examples drawn from a data set; more narrow the interval and cost their forward passes. None for all.
        seed: Of the sample, the random criterion and the bootstrap.
        embeddings: Whether embedding tables count: see `prunable_weights`.
        data_collator: Of a data set's rows, as `Sample` takes it; so are the next three.
        task: Which loss to compute; None for the model's own.
        batch_size: Examples a forward pass.
        label_smoothing: As the model was trained with.

    Raises:
        TypeError: An option of another type, or no model.
        ValueError: An option out of range; weights that can't be ranked; an empty sample; a loss that isn't finite,
            differs from call to call, is 0 under a relative tolerance, or isn't one of these weights.
    """
    settings: dict[str, Any] = {
        "tolerance": tolerance,
        "tolerance_mode": tolerance_mode,
        "criterion": criterion,
        "scope": scope,
        "embeddings": embeddings,
        "exhaustive": exhaustive,
        "seed": seed,
    }
    check_options(**settings)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: expected a torch.nn.Module, such as AutoModel loads")
    evaluate = losses_of(losses, samples, seed, data_collator, task, batch_size, label_smoothing)
    model = unwrap_model(model)
    with scoring_state(model, copy_buffers=True):  # a loss function may switch to training mode
        curve = LossCurve(model, WeightOrder(prunable_weights(model, embeddings), criterion, scope, seed), evaluate)
        curve.check_whole(tolerance_mode)
        bound = bound_of(curve.at(STEPS), tolerance, tolerance_mode)
        found, lowest = (_scan if exhaustive else _bisect)(lambda step: curve.at(step) <= bound)
        if found == 1 and curve.at(1) == curve.at(STEPS):
            curve.check_seen()
        return _result(curve, found, lowest, bound, settings)


def _result(
    curve: LossCurve, found: int, lowest: int | None, bound: float, settings: dict[str, Any]
) -> PrunabilityResult:
    """What was found, in steps of the grid; inside `scoring_state`."""
    order, points = curve.order, tuple((1 - step / STEPS, mean) for step, mean in curve.means.items())
    return PrunabilityResult(
        fraction=found / STEPS,
        curve=PruningCurve(points, "loss", higher_is_better=False, settings=settings),
        evaluations=curve.evaluations,
        interval=interval_of(curve, settings["tolerance"], settings["tolerance_mode"], settings["seed"]),
        lowest=None if lowest is None else lowest / STEPS,
        loss=curve.at(STEPS),
        bound=bound,
        weights=order.count,
        kept={name: count / order.weights[name].numel() for name, count in order.kept(found / STEPS).items()},
        samples=curve.samples,
        settings=settings,
    )


def check_options(
    *,
    tolerance: float,
    criterion: str,
    scope: str,
    tolerance_mode: str,
    exhaustive: bool,
    embeddings: bool,
    seed: int,
) -> None:
    """Refuses options of `measure_prunability`.

    Raises:
        TypeError: For one of another type.
        ValueError: For one out of range.
    """
    if isinstance(tolerance, bool) or not isinstance(tolerance, Real):
        raise TypeError(f"tolerance={tolerance!r}: expected a number; 0.1 lets the loss rise by a tenth")
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"tolerance={tolerance}: expected 0 or more; 0.1 lets the loss rise by a tenth")
    choices = {"criterion": (criterion, Criterion), "scope": (scope, Scope)}
    for name, (value, kind) in {**choices, "tolerance_mode": (tolerance_mode, ToleranceMode)}.items():
        if value not in get_args(kind):
            raise ValueError(f"{name}={value!r} is unknown; choose from {', '.join(get_args(kind))}")
    for name, value in {"exhaustive": exhaustive, "embeddings": embeddings}.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}={value!r}: expected True or False")
    check_whole_number("seed", seed, 0)


def losses_of(losses: Any, samples: int | None, seed: int, *options: Any) -> EvaluateLoss:
    """A function of the model: the user's, or a `Sample` of a data set with these options.

    Raises:
        ValueError: As `Sample` does; or for options of a data set beside a function, which has its own.
    """
    function: EvaluateLoss = losses
    if not callable(losses):
        return Sample(losses, samples, seed, *options)
    names = ("samples", "data_collator", "task", "batch_size", "label_smoothing")
    given = dict(zip(names, (samples, *options), strict=True))
    if changed := [name for name in names if given[name] != _DATA_SET[name]]:
        raise ValueError(f"{', '.join(changed)}: only for a data set, but the losses come from a function")
    return function


def _scan(within: Callable[[int], bool]) -> tuple[int, int]:
    """The smallest step from 1 to STEPS from which on all are within, and the smallest that is at all."""
    good = [within(step) for step in range(1, STEPS + 1)]
    bad = [step for step, is_good in enumerate(good, 1) if not is_good]
    return max(bad, default=0) + 1, good.index(True) + 1


def _bisect(within: Callable[[int], bool]) -> tuple[int, None]:
    """The smallest step from 1 to STEPS that is within, if all above it are; STEPS itself always is."""
    below, found = 0, STEPS
    while found - below > 1:
        middle = (below + found) // 2
        below, found = (below, middle) if within(middle) else (middle, found)
    return found, None

"""The loss over the fraction kept: evaluated when it is asked for, checked, with its interval over examples."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from hf_efx.prunability.sample import EvaluateLoss
from hf_efx.prunability.weights import WeightOrder

STEPS = 100  # grid points; bisection finds one of them in 7 evaluations, and 2 more look at the whole model
_BOOTSTRAP = 1000
_REPEAT = 1e-5  # two evaluations of one model may differ by this share: sums on a GPU have no fixed order


def bound_of(loss: Any, tolerance: float, mode: str) -> Any:
    """L(1) (1 + beta), or L(1) + beta; of a number or an array of them."""
    return loss * (1 + tolerance) if mode == "relative" else loss + tolerance


class LossCurve:
    """The loss at steps of the grid, evaluated when first asked for, and that of every example.

    Args:
        model: Inside `scoring_state`.
        order: The order of its weights.
        evaluate: The losses.
    """

    def __init__(self, model: nn.Module, order: WeightOrder, evaluate: EvaluateLoss) -> None:
        self.model, self.order, self.evaluate = model, order, evaluate
        self.means: dict[int, float] = {}
        self.losses: dict[int, np.ndarray] = {}
        self.weights: np.ndarray | None = None
        self.evaluations = 0

    @property
    def samples(self) -> int | None:
        """Examples; None for a loss that is one number."""
        return len(self.losses[STEPS]) if self.losses else None

    def at(self, step: int) -> float:
        """The loss with step / STEPS of the weights kept."""
        if step not in self.means:
            with self.order.pruned(step / STEPS):
                mean = self._evaluate(step)
            if math.isnan(mean):
                raise ValueError(
                    f"the loss is NaN with {step / STEPS:.0%} of the weights kept: check the loss function"
                )
            self.means[step] = mean
        return self.means[step]

    def check_whole(self, mode: str) -> None:
        """Raises for a loss of the whole model that nothing can be compared with; evaluates it twice."""
        loss = self.at(STEPS)
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss of the whole model is {loss}: check the model, its inputs and the loss function"
            )
        if mode == "relative" and loss <= 0:
            raise ValueError(
                f"the loss of the whole model is {loss}, of which a relative tolerance allows nothing more: use "
                f"tolerance_mode='absolute'"
            )
        again = self._evaluate(STEPS)
        if not abs(again - loss) <= _REPEAT * abs(loss) + 1e-12:
            raise ValueError(
                f"the loss of the whole model was {loss}, then {again}: a random loss can't be compared. Take one "
                f"fixed sample without augmentation, and leave the model in eval mode"
            )

    def check_seen(self) -> None:
        """Raises where the loss is one of other weights: nothing in it changes, whatever becomes of these.

        A loss that is the same without a single weight may be that of a new head, whose weights are all zero; NaN
        reaches it all the same.
        """
        whole = self.at(STEPS)
        with self.order.pruned(0):  # all of them, so that all are put back
            unseen = self._evaluate(0) == whole
            if unseen:
                for weight in self.order.weights.values():
                    weight.data.fill_(math.nan)
                unseen = math.isfinite(self._evaluate(0))
        self.losses.pop(0, None)
        if unseen:
            raise ValueError(
                f"the loss stays {whole} whatever becomes of the {self.order.count} weights of the model: the loss "
                f"function computes it with another model, such as a copy. Compute it with the model that it is given"
            )

    def _evaluate(self, step: int) -> float:
        self.evaluations += 1
        values, weights, is_number = self._losses()
        if values.size == 0:
            raise ValueError("the loss function returned no losses: its sample is empty")
        if values.ndim != 1:
            raise ValueError(
                f"the loss function returned shape {list(values.shape)}: expected one loss an example [n]"
            )
        if self.losses and values.shape != self.losses[STEPS].shape:
            raise ValueError(f"the loss function returned {values.size} losses, before {self.samples}: fix its sample")
        if not is_number:
            self.losses[step] = values
        if weights is not None:
            self.weights = weights
            if weights.shape != values.shape or (weights < 0).any():
                raise ValueError(
                    f"the loss function returned weights of shape {list(weights.shape)}, at least {weights.min():g}: "
                    f"expected one weight a loss, 0 or more"
                )
            if not weights.sum() > 0:
                raise ValueError("the weights of the losses sum to 0: no example of the sample has a label")
        return float(np.average(values, weights=self.weights)) if np.isfinite(values).all() else float(values.mean())

    def _losses(self) -> tuple[np.ndarray, np.ndarray | None, bool]:
        """Losses [n], their weights [n], and whether it is one number."""
        versions = [weight._version for weight in self.order.weights.values()]
        returned: Any = self.evaluate(self.model)
        if versions != [weight._version for weight in self.order.weights.values()]:
            raise ValueError("the loss function changed the weights of the model: it must only look at them")
        parts = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned,)
        try:
            arrays = [torch.as_tensor(part).detach().double().cpu().numpy() for part in parts]
        except (TypeError, RuntimeError, ValueError) as error:
            raise TypeError(
                f"the loss function returned a {type(returned).__name__}: expected one loss an example [n], (losses, "
                f"weights), or one number"
            ) from error
        return np.atleast_1d(arrays[0]), arrays[1] if len(arrays) > 1 else None, not arrays[0].ndim


def interval_of(curve: LossCurve, tolerance: float, mode: str, seed: int) -> tuple[float, float] | None:
    """Percentiles of the fraction over samples drawn with replacement from the examples, from the losses at hand."""
    if curve.samples in (None, 1):
        return None
    steps = np.array(sorted(curve.losses))
    losses = np.nan_to_num(np.stack([curve.losses[step] for step in steps]), posinf=1e30)
    n = losses.shape[1]
    weights = np.ones(n) if curve.weights is None else curve.weights
    generator, found = np.random.default_rng(seed), []
    for _ in range(_BOOTSTRAP):  # one by one: all at once would hold 1,000 counts of each example
        counts = np.bincount(generator.integers(n, size=n), minlength=n) * weights
        means = losses @ counts / counts.sum()  # [steps]
        excess = means - bound_of(means[-1], tolerance, mode)
        found.append(math.ceil(_crossing(steps, excess) - 1e-9) / STEPS)
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def _crossing(steps: np.ndarray, excess: Sequence[float] | np.ndarray) -> float:
    """The step from which on no excess is above 0, between two evaluated steps on the line that joins them."""
    above = np.flatnonzero(np.asarray(excess) > 0)
    if not len(above):
        return float(steps[0])
    last = above[-1]
    share = excess[last] / (excess[last] - excess[last + 1]) if excess[last] < 1e29 else 1.0
    return float(steps[last] + share * (steps[last + 1] - steps[last]))

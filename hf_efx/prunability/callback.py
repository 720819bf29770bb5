"""Prunability during training: a sign of how the model generalizes at every evaluation, without held-out data."""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_efx.core.data.fingerprints import weights_fingerprint
from hf_efx.core.model.wrappers import unwrap_model
from hf_efx.core.scoring.losses import Task
from hf_efx.core.scoring.scoring_state import scoring_state
from hf_efx.prunability.loss_curve import LossCurve
from hf_efx.prunability.measure import (
    PrunabilityResult,
    ToleranceMode,
    check_options,
    losses_of,
    measure_prunability,
)
from hf_efx.prunability.sample import EvaluateLoss, Sample
from hf_efx.prunability.weights import Criterion, Scope, WeightOrder, prunable_weights

logger = logging.getLogger(__name__)


class PrunabilityCallback(TrainerCallback):
    """Measures prunability at every evaluation, and adds it to the evaluation's metrics as `eval_prunability`.

    With `metric_for_best_model="prunability"` and `greater_is_better=False` the Trainer keeps the most prunable
    checkpoint; `EarlyStoppingCallback`, given *after* this callback, stops by it. The figures stand in the
    evaluation's row of `state.log_history` and in the message log; reporters get an evaluation's metrics before
    callbacks do, so they don't show them. Networks compare at one training loss alone, so `eval_prunability_loss`
    stands beside it: early in training, the less a network has learnt the less it has to lose.

    The loss of a data set is the model's own, with the run's label smoothing. A Trainer with a `compute_loss` or
    `compute_loss_func` of its own needs a function here that returns the same losses: a callback can't reach its
    Trainer, but sees before the first optimizer step whether the model's loss is what is trained on.

    Under several processes each measures the same, without communication. Sharded models (FSDP, DeepSpeed stage 3)
    can't be measured: no process has their weights.

    Args:
        losses: The training set, of which a sample is drawn once, or a function of the model: see
            `measure_prunability`, whose options the others are.
        tolerance: By how much the loss may rise.
        criterion: Which weights go.
        scope: Whether all weights are ranked together.
        tolerance_mode: What the tolerance is relative to.
        exhaustive: Evaluate the whole grid.
        embeddings: Whether embedding tables count.
        seed: Of the sample, the random criterion and the bootstrap.
        samples: Examples drawn from a data set.
        data_collator: Makes batches of a data set's rows.
        task: Which loss to compute of a data set.
        batch_size: Examples of a data set a forward pass.

    Attributes:
        results: (step, result) of each evaluation in this call of `train()`.

    Raises:
        TypeError: An option of another type.
        ValueError: An option out of range, or as `Sample` does. When training begins: weights that can't be ranked, a
            loss that can't be computed or is another model's. Before the first optimizer step: a Trainer that trains
            on another loss than the model's own; with a `task` it is a warning.
    """

    def __init__(
        self,
        losses: EvaluateLoss | Any,
        *,
        tolerance: float = 0.1,
        criterion: Criterion = "magnitude",
        scope: Scope = "global",
        tolerance_mode: ToleranceMode = "relative",
        exhaustive: bool = False,
        embeddings: bool = False,
        seed: int = 0,
        samples: int | None = 1000,
        data_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
        task: Task | None = None,
        batch_size: int = 64,
    ) -> None:
        self.options: dict[str, Any] = {
            "tolerance": tolerance,
            "criterion": criterion,
            "scope": scope,
            "tolerance_mode": tolerance_mode,
            "exhaustive": exhaustive,
            "embeddings": embeddings,
            "seed": seed,
        }
        check_options(**self.options)
        self.losses = losses_of(losses, samples, seed, data_collator, task, batch_size, 0.0)
        self._own_sample = self.losses is not losses
        self._watch: _LossWatch | None = None
        self.results: list[tuple[int, PrunabilityResult]] = []
        self._measured: str | None = None  # fingerprint of the weights that the last result is of

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Forgets an earlier run, and sees to it that the evaluations won't fail."""
        self.results, self._measured = [], None
        self.on_train_end(args, state, control)  # of a run that was cut in its first step
        model = unwrap_model(model)
        if isinstance(self.losses, Sample) and self._own_sample:
            self.losses = self.losses.smoothed(args.label_smoothing_factor)
        order = WeightOrder(prunable_weights(model, self.options["embeddings"]))
        with scoring_state(model, copy_buffers=True):
            LossCurve(model, order, self.losses).check_seen()
        if self._own_sample and not args.label_smoothing_factor:  # with it the Trainer computes from the logits
            self._watch = _LossWatch(model)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the first step: refuses, or with a task warns, where the Trainer trains on another loss."""
        watch, self._watch = self._watch, None
        if watch is None or watch.model_loss_is_trained():
            return
        task = self.losses.scorer.task if isinstance(self.losses, Sample) else None
        told = (
            "The Trainer doesn't train on the loss that the model returns, but on one of its own (compute_loss_func, "
            "or a compute_loss), which prunability doesn't know"
        )
        way_out = "give PrunabilityCallback a function of the model that returns the Trainer's losses [n]"
        if task is None:
            raise ValueError(f"{told}: {way_out}, or name the task, if the loss is as of that.")
        logger.warning("%s: it is measured by the loss of task=%r. Where that differs, %s.", told, task, way_out)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes the hook off a model that made no step."""
        if self._watch is not None:
            self._watch.model_loss_is_trained()
            self._watch = None

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Measures the weights at hand, once however many data sets are evaluated with them."""
        start = time.perf_counter()
        weights = weights_fingerprint(model)
        if weights != self._measured:
            self.results.append((state.global_step, measure_prunability(model, self.losses, **self.options)))
            self._measured = weights
        result = self.results[-1][1]
        figures = {"eval_prunability": result.fraction, "eval_prunability_loss": result.loss}
        if result.interval is not None:
            figures |= dict(zip(("eval_prunability_low", "eval_prunability_high"), result.interval, strict=True))
        figures["eval_prunability_seconds"] = time.perf_counter() - start
        for row in (metrics, state.log_history[-1] if state.log_history else None):
            if row is not None:
                row.update(figures)
        if state.is_world_process_zero:
            logger.info(
                "step %d: prunability %.2f at training loss %.4g", state.global_step, result.fraction, result.loss
            )


class _LossWatch:
    """Sees in a training step whether the gradient comes through the loss that the model itself returns.

    Args:
        model: An unwrapped model, which is hooked until `model_loss_is_trained` is asked.
    """

    def __init__(self, model: nn.Module) -> None:
        self._passes = self._reached = 0
        after_forward: Any = torch.compiler.disable(self._after_forward)
        self._hook = model.register_forward_hook(after_forward)

    def model_loss_is_trained(self) -> bool:
        """Whether it did; also where no forward pass was seen. Takes the hook off."""
        self._hook.remove()
        return not self._passes or bool(self._reached)

    def _after_forward(self, module: nn.Module, args: Any, outputs: Any) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        self._passes += 1
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        loss = loss[0] if isinstance(loss, (tuple, list)) else loss
        if isinstance(loss, torch.Tensor) and loss.requires_grad:
            loss.register_hook(self._count)

    def _count(self, gradient: torch.Tensor) -> None:
        self._reached += 1

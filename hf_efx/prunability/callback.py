"""Prunability during training: a sign of how the model generalizes at every evaluation, without held-out data."""

import logging
import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_efx.prunability.measure import PrunabilityResult, prunability
from hf_efx.prunability.sample import Sample

logger = logging.getLogger(__name__)
_SAMPLE_OPTIONS = ("samples", "data_collator", "task", "batch_size")


class PrunabilityCallback(TrainerCallback):
    """Measures prunability at every evaluation, and adds it to the evaluation's metrics as `eval_prunability`.

    With `metric_for_best_model="prunability"` and `greater_is_better=False` the Trainer keeps the most prunable
    checkpoint; `EarlyStoppingCallback`, given *after* this callback, stops by it. The figures stand in the
    evaluation's row of `state.log_history` and in the message log; reporters get an evaluation's metrics before
    callbacks do, so they don't show them. Networks compare at one training loss alone, so `eval_prunability_loss`
    stands beside it: early in training, the less a network has learnt the less it has to lose.

    Under several processes each measures the same, without communication. Sharded models (FSDP, DeepSpeed stage 3)
    can't be measured: no process has their weights.

    Args:
        losses: The training set, of which a sample is drawn once, or a function of the model: see `prunability`.
        **options: Of `prunability`; for a data set also `samples`, `data_collator`, `task` and `batch_size` of
            `Sample`.

    Attributes:
        results: (step, result) of each evaluation.

    Raises:
        ValueError: As `Sample` does.
    """

    def __init__(self, losses: Any, **options: Any) -> None:
        if not callable(losses):
            chosen = {name: options.pop(name) for name in _SAMPLE_OPTIONS if name in options}
            losses = Sample(losses, seed=options.get("seed", 0), **chosen)
        self.losses, self.options = losses, options
        self.results: list[tuple[int, PrunabilityResult]] = []

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Measures, once a step however many data sets are evaluated at it."""
        start = time.perf_counter()
        if not self.results or self.results[-1][0] != state.global_step:
            self.results.append((state.global_step, prunability(model, self.losses, **self.options)))
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

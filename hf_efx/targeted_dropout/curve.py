"""How a network stands pruning: a metric over the fraction pruned, at once or at each evaluation while training."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_efx.core.model.block_map import Block
from hf_efx.core.model.pruned import zeroed
from hf_efx.core.results.curves import PruningCurve, as_figure, check_fractions
from hf_efx.core.scoring.scoring_state import scoring_state
from hf_efx.targeted_dropout.config import TargetedDropoutConfig
from hf_efx.targeted_dropout.plan import PruningPlan
from hf_efx.targeted_dropout.pruning import Granularity, Scope

logger = logging.getLogger(__name__)

Evaluate = Callable[[Any], float | Mapping[str, float]]

FRACTIONS = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98)
# As the Trainer's `greater_is_better` has it for names that end in "loss"; the others are our programs' metrics.
_LOWER_IS_BETTER = ("loss", "perplexity", "bits_per_byte", "error")


def pruning_curve(
    model: nn.Module,
    evaluate: Evaluate,
    fractions: Iterable[float] = FRACTIONS,
    *,
    granularity: Granularity | None = None,
    scope: Scope | None = None,
    metric: str = "loss",
    higher_is_better: bool | None = None,
    target_modules: list[str] | str | None = None,
    exclude_modules: list[str] | str | None = None,
    blocks: Sequence[Block] | None = None,
    config: TargetedDropoutConfig | None = None,
) -> PruningCurve:
    """Evaluates a model at several fractions pruned, each by `prune`'s masks, without fine-tuning.

    The weights come back bit by bit, also after an exception or Ctrl-C, so do the modules' modes and the random state;
    there are no gradients meanwhile. Beside the masks (a byte a weight) only the values that are zeroed are kept.

    Args:
        model: Any `torch.nn.Module`.
        evaluate: From the model, in evaluation mode, to the metric; or to figures by name, of which `metric` or
            `eval_<metric>` is taken: `lambda model: trainer.evaluate()` will do. Use the same data at every call.
        fractions: From 0, the whole model, to below 1; each costs an evaluation.
        granularity: As in `prune`, like scope, target_modules, exclude_modules, blocks and config.
        scope: See `prune`.
        metric: Its name.
        higher_is_better: Whether more of it is better; None: not of losses, perplexities, bits per byte, errors.
        target_modules: See `prune`.
        exclude_modules: See `prune`.
        blocks: See `prune`.
        config: See `prune`.

    Raises:
        ValueError: As in `prune`, before the first evaluation; or if the metric isn't among the figures.
    """
    fractions = check_fractions(fractions)
    plan = PruningPlan.of(model, granularity, scope, target_modules, exclude_modules, blocks, config)
    plan.changes(fractions[-1])  # what it raises costs no evaluation: smaller fractions empty no more
    points = []
    with scoring_state(model, copy_buffers=True):
        for fraction in fractions:
            changes = plan.changes(fraction) if fraction else []
            with zeroed(zero for change in changes for zero in change.zeros):
                points.append((fraction, as_figure(evaluate(model), metric)))
    better = not metric.endswith(_LOWER_IS_BETTER) if higher_is_better is None else higher_is_better
    return PruningCurve(tuple(points), metric, better, {"granularity": plan.granularity, "scope": plan.scope})


class PruningCurveCallback(TrainerCallback):
    """Draws a pruning curve at each evaluation of a run, and logs it with the evaluation's figures.

    The names are `eval_<metric>_pruned_<percent>` and `eval_<metric>_pruned_area`, in the row of the log and among the
    metrics that `metric_for_best_model` chooses from: so a run can keep the checkpoint that is best when pruned. (An
    early-stopping callback that looks at them comes after this one.)

        trainer.add_callback(PruningCurveCallback(trainer, fractions=[0.5, 0.9]))

    Args:
        evaluate: The Trainer, whose evaluation set is used, or a function as in `pruning_curve`. On several processes
            all call it.
        fractions: As in `pruning_curve`: each costs an evaluation. 0 is what the evaluation itself shows.
        metric: As in `pruning_curve`, like all that follow.
        granularity: See `pruning_curve`.
        scope: See `pruning_curve`.
        higher_is_better: See `pruning_curve`.
        target_modules: See `pruning_curve`.
        exclude_modules: See `pruning_curve`.
        blocks: See `pruning_curve`.
        config: See `pruning_curve`.

    Attributes:
        curves: By global step, those of this call of `train()`.

    Raises:
        ValueError: For a fraction outside of [0, 1); when training begins for a Trainer without one evaluation set or
            of another model, and for what `prune` refuses.
    """

    def __init__(
        self,
        evaluate: Trainer | Evaluate,
        fractions: Iterable[float] = (0.5, 0.75, 0.9),
        *,
        metric: str = "loss",
        granularity: Granularity | None = None,
        scope: Scope | None = None,
        higher_is_better: bool | None = None,
        target_modules: list[str] | str | None = None,
        exclude_modules: list[str] | str | None = None,
        blocks: Sequence[Block] | None = None,
        config: TargetedDropoutConfig | None = None,
    ) -> None:
        self.evaluate = evaluate
        self.fractions = check_fractions(fractions)
        self.metric = metric
        self.higher_is_better = higher_is_better
        self.criterion: dict[str, Any] = {
            "granularity": granularity,
            "scope": scope,
            "target_modules": target_modules,
            "exclude_modules": exclude_modules,
            "blocks": blocks,
            "config": config,
        }
        self.curves: dict[int, PruningCurve] = {}
        self._running = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forgets the curves of an earlier run, and refuses what couldn't be drawn."""
        self.curves = {}
        self._function(kwargs["model"])
        PruningPlan.of(kwargs["model"], **self.criterion)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draws the curve."""
        if self._running:  # the function evaluates with the Trainer itself
            return
        self._running = True
        try:
            curve = pruning_curve(
                kwargs["model"],
                self._function(kwargs["model"]),
                self.fractions,
                metric=self.metric,
                higher_is_better=self.higher_is_better,
                **self.criterion,
            )
        finally:
            self._running = False
        self.curves[state.global_step] = curve
        figures = curve.figures("eval_")
        if kwargs.get("metrics") is not None:
            kwargs["metrics"].update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)
        if isinstance(self.evaluate, Trainer):  # reporters have had the evaluation's own row already
            self.evaluate.callback_handler.on_log(args, state, control, {**figures, "step": state.global_step})
        elif state.is_world_process_zero:
            logger.info("Step %s: %s", state.global_step, figures)

    def _function(self, model: nn.Module) -> Evaluate:
        if not isinstance(self.evaluate, Trainer):
            return self.evaluate
        trainer, data = self.evaluate, self.evaluate.eval_dataset
        if trainer.model is not model:
            raise ValueError(
                "PruningCurveCallback: the Trainer that was passed has another model than the one that is trained. "
                "Pass the Trainer that the callback is added to."
            )
        if data is None or isinstance(data, dict):
            raise ValueError(
                "PruningCurveCallback: the Trainer has no single evaluation set. Pass a function from the model to "
                "the metric in its place."
            )
        # `predict` evaluates without a row in the log of its own, and without this callback.
        return lambda model: trainer.predict(data, metric_key_prefix="eval").metrics or {}  # pyright: ignore

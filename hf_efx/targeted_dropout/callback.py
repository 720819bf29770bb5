"""TargetedDropoutCallback: targeted dropout under any Trainer, with its ramp in the logs."""

from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_efx.core.model.adapter import get_efx_model
from hf_efx.core.training.step_context import StepContextCallback
from hf_efx.targeted_dropout.config import TargetedDropoutConfig
from hf_efx.targeted_dropout.layers import Dropping, droppings_of


class TargetedDropoutCallback(StepContextCallback):
    """Drives targeted dropout and its ramp along with a Trainer and logs them (docs/metrics.md).

    An EfxTrainer drives it without the callback; there it adds the figures alone.

    Args:
        config: Put on the model when training begins, where the model has none yet. None: the model has it.

    Attributes:
        droppings: What the model of the run at hand drops, config by config.

    Raises:
        ValueError: When training begins, if the model has no targeted dropout and no config was given, or another one
            than was given.
    """

    def __init__(self, config: TargetedDropoutConfig | None = None) -> None:
        super().__init__()
        self.config = config
        self.droppings: list[Dropping] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Puts the config on where it isn't yet."""
        model = kwargs["model"]
        self.droppings = droppings_of(model)
        if not self.droppings and self.config is not None:
            get_efx_model(model, self.config)
            self.droppings = droppings_of(model)
        if not self.droppings:
            raise ValueError(
                "TargetedDropoutCallback: the model has no targeted dropout. Pass a TargetedDropoutConfig, or call "
                "get_efx_model(model, TargetedDropoutConfig(...)) first."
            )
        if self.config is not None:
            self._check_same(self.config)
        super().on_train_begin(args, state, control, **kwargs)

    def _check_same(self, config: TargetedDropoutConfig) -> None:
        """Refuses a model with another config than the callback's; only the fields that differ are named."""
        own, way_out = config.method_fields(), "Leave the callback's config out, or call hf_efx.unload(model) first."
        if len(self.droppings) > 1:
            raise ValueError(f"TargetedDropoutCallback: the model has {len(self.droppings)} configs. {way_out}")
        there = self.droppings[0].config.method_fields()
        if differing := [name for name in own if own[name] != there[name]]:
            pairs = "; ".join(f"{name}={there[name]!r}, the callback {name}={own[name]!r}" for name in differing)
            raise ValueError(f"TargetedDropoutCallback: the model has {pairs}. {way_out}")

    def metrics(self) -> dict[str, float]:
        """Targeting and rate of the last step, and the share of weights or units that a pass drops.

        Of several configs they are means by the weights of their modules.
        """
        total = sum(dropping.size() for dropping in self.droppings)
        means = dict.fromkeys(("targeting", "rate", "dropped"), 0.0)
        for dropping in self.droppings:
            figures = (*dropping.factors(), dropping.dropped_share())
            for name, value in zip(means, figures, strict=True):
                means[name] += value * dropping.size() / total
        return {f"targeted_dropout/{name}": value for name, value in means.items()} if total else {}

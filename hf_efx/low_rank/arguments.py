"""Options of one low-rank run, as a plain dataclass mixin and as ready TrainingArguments."""

from dataclasses import dataclass, field

from hf_efx.core.training.arguments import EfxArguments

FACTOR_DECAYS = ("frobenius", "l2")
SWITCH_STATES = ("project", "reset")


@dataclass
class LowRankArgumentsMixin:
    """Options of low-rank training; goes onto any TrainingArguments class.

    Raises:
        ValueError: For a value out of range.
    """

    dense_warmup_steps: int = field(
        default=0,
        metadata={
            "help": "Optimiser steps to train dense before the layers are factorised inside the run; 0 factorises "
            "at the start. More steps cost more time and memory, and start the factors from trained weights."
        },
    )
    # "project" and "reset" came out alike in this package's study (one seed); the former leaves no jump.
    switch_optimizer_state: str = field(
        default="project",
        metadata={
            "help": "What becomes of the optimiser's moments at the switch: 'project' carries them onto the factors "
            "by the chain rule, 'reset' starts them anew."
        },
    )
    # Half the rate did worse in this package's study (one seed).
    switch_learning_rate_scale: float = field(
        default=1.0, metadata={"help": "Factor on the learning rate from the switch on, schedule included."}
    )
    factor_decay: float = field(
        default=0.0,
        metadata={
            "help": "Strength of the decay on factors; above 0 the factors leave the ordinary weight decay. Higher "
            "shrinks the layers faster."
        },
    )
    factor_decay_kind: str = field(
        default="frobenius",
        metadata={
            "help": "'frobenius' decays the product, λ/2 ‖UVᵀ‖²; 'l2' each factor, which presses the product towards "
            "lower rank."
        },
    )
    factor_decay_decoupled: bool = field(
        default=True,
        metadata={
            "help": "Apply the decay beside the optimiser's step, as AdamW does; False adds it to the gradient, "
            "where Adam rescales it."
        },
    )
    log_factor_metrics: bool = field(
        default=False,
        metadata={
            "help": "Log norm, effective step size, effective and stable rank of the factorised layers (means): with "
            "each training log, and in the summary at the end, which is all that logging_strategy='no' leaves."
        },
    )

    def __post_init__(self) -> None:
        self.check_low_rank()
        super_post_init = getattr(super(), "__post_init__", None)
        if super_post_init is not None:
            super_post_init()

    def check_low_rank(self) -> None:
        """Checks the values, once more when training begins: they may have been set since.

        Raises:
            ValueError: For a value out of range.
        """
        if self.dense_warmup_steps < 0:
            raise ValueError(f"dense_warmup_steps={self.dense_warmup_steps}: expected 0 or more optimiser steps.")
        if self.switch_optimizer_state not in SWITCH_STATES:
            raise ValueError(
                f"switch_optimizer_state={self.switch_optimizer_state!r}: expected one of {', '.join(SWITCH_STATES)}."
            )
        if not self.switch_learning_rate_scale > 0:
            raise ValueError(
                f"switch_learning_rate_scale={self.switch_learning_rate_scale}: expected a number above 0."
            )
        if not self.factor_decay >= 0:
            raise ValueError(f"factor_decay={self.factor_decay}: expected a strength of 0 or more.")
        if self.factor_decay_kind not in FACTOR_DECAYS:
            raise ValueError(
                f"factor_decay_kind={self.factor_decay_kind!r}: expected one of {', '.join(FACTOR_DECAYS)}."
            )


@dataclass
class LowRankArguments(LowRankArgumentsMixin, EfxArguments):
    """TrainingArguments with the options of low-rank training."""

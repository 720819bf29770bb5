"""Options of one RHO-LOSS run, as a plain dataclass mixin and as ready TrainingArguments."""

import logging
from dataclasses import dataclass, field, fields
from typing import Any, get_args

from hf_efx.core.scoring.losses import Task
from hf_efx.core.training.arguments import EfxArguments
from hf_efx.rho_loss.selection import SELECTION_FUNCTIONS

logger = logging.getLogger(__name__)

_CHOICES = {
    "score_mode": ("eval", "train"),
    "selection_scope": ("process", "global"),
    "granularity": ("example", "token"),
    "scoring_precision": (None, "training", "bf16", "fp16", "auto"),
    "scoring_task": (None, *get_args(Task)),
}

# What a preset sets, where the option wasn't set: the benchmark's (scripts/benchmarks/rho_loss.py) fastest.
# On a CPU without bfloat16 units scores in bfloat16 took twice the time of the paper's rule, hence "auto".
PRESETS: dict[str, dict[str, Any]] = {"fast": {"selection_ratio": 0.2, "scoring_precision": "auto"}}

# A number of its own: the same one passed, by code, file or command line, is another object, which a preset leaves.
_DEFAULT_RATIO = float("0.1")


@dataclass
class RHOLossArgumentsMixin:
    """Options of data selection; goes onto any TrainingArguments class.

    `per_device_train_batch_size` is what is trained on. What is drawn to choose from is that divided by
    `selection_ratio`.

    Raises:
        ValueError: For a value out of range, or options that contradict each other.
    """

    # n_b = 32 of n_B = 320 in the paper's configs (github.com/OATML/RHO-Loss).
    selection_ratio: float = field(
        default=_DEFAULT_RATIO,
        metadata={
            "help": "Share of the examples drawn that is trained on, above 0 up to 1. Lower chooses more sharply and "
            "scores more examples to each one trained on; 1 trains on everything, scores nothing."
        },
    )
    selection: str = field(
        default="rho_loss",
        metadata={
            "help": "What is chosen: the name of one of SELECTION_FUNCTIONS. 'rho_loss' takes the highest loss minus "
            "irreducible loss; 'uniform' is the baseline that scores nothing."
        },
    )
    granularity: str = field(
        default="example",
        metadata={
            "help": "'example' chooses whole examples out of a larger draw; 'token' draws no more than is trained on "
            "and leaves the other tokens' labels out of the loss."
        },
    )
    # The paper's code scores in training mode; there, dropout makes scores noisy and batch norm couples examples.
    score_mode: str = field(
        default="eval",
        metadata={
            "help": "Mode of the model while it scores: 'eval', or 'train' as in the paper's code (dropout noise in "
            "the scores; batch statistics are put back)."
        },
    )
    selection_scope: str = field(
        default="process",
        metadata={
            "help": "'process' chooses from each process' own draw, without communication; 'global' from the union "
            "of all processes' draws, as one process with the whole batch would, and exchanges the chosen rows."
        },
    )
    rescore_every: int = field(
        default=1,
        metadata={
            "help": "Steps that are served by one large draw: above 1 drawing and scoring cost that much less a "
            "step, scores are up to that many steps minus one old, and the choice is less sharp."
        },
    )
    scoring_precision: str | None = field(
        default=None,
        metadata={
            "help": "Precision of the scoring forward: 'bf16' or 'fp16' is faster where the device has units for it, "
            "at coarser scores; 'auto' takes 'bf16' where it has; 'training' means as in training, and so does "
            "nothing, unless a preset sets it."
        },
    )
    scoring_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Examples scored at once, sorted by length. Lower needs less memory and less padding, higher "
            "fewer calls; nothing means the whole draw."
        },
    )
    scoring_task: str | None = field(
        default=None,
        metadata={
            "help": "What the labels mean: 'causal', 'seq2seq', 'masked', 'token_classification', 'classification' "
            "or 'regression'; nothing infers it from the model's class."
        },
    )
    check_scored_loss: bool = field(
        default=True,
        metadata={
            "help": "Compare the loss that examples are scored by with the one that is trained, at the first choice "
            "and after 10, 100, ... steps (four forward passes each), and stop where they differ; False lets them."
        },
    )
    # 10 in the paper's code (its BALD baseline).
    mc_samples: int = field(
        default=10,
        metadata={"help": "Dropout samples of the selections that need them ('bald'); scoring costs that many times."},
    )
    train_scoring_model: bool = field(
        default=False,
        metadata={
            "help": "Train the `scoring_model` too, on the chosen examples, with AdamW at the run's learning rate. "
            "Costs its training step; without it its scores stay as they are."
        },
    )
    report_selection: bool = field(
        default=True,
        metadata={
            "help": "Log what is chosen (share corrupted, already right, repeated; cost of scoring) and save it as "
            "selection_report.json. Costs a few bytes an example, and under several processes one exchange of ids a "
            "step."
        },
    )
    corrupted_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the training set that says (true or false) which labels are known to be wrong; only "
            "the report reads it."
        },
    )
    preset: str | None = field(
        default=None,
        metadata={
            "help": "'fast' sets the options that win in wall-clock time over the paper's rule, where you set none: "
            + ", ".join(f"{name}={value}" for name, value in PRESETS["fast"].items())
            + "."
        },
    )

    def __post_init__(self) -> None:
        self.check_selection()
        super_post_init = getattr(super(), "__post_init__", None)
        if super_post_init is not None:
            super_post_init()

    def check_selection(self) -> None:
        """Applies the preset and checks the options of selection; called again when training begins.

        Raises:
            ValueError: For a value out of range, or options that contradict each other.
        """
        self._apply_preset()
        self._check_options()

    def _apply_preset(self) -> None:
        if self.preset is None:
            return
        if self.preset not in PRESETS:
            raise ValueError(f"preset={self.preset!r}: expected one of {', '.join(PRESETS)}, or nothing.")
        defaults = {f.name: f.default for f in fields(RHOLossArgumentsMixin)}
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is defaults[name]:
                setattr(self, name, value)
                logger.info("preset=%r sets %s=%r.", self.preset, name, value)

    def _check_options(self) -> None:
        if not 0 < self.selection_ratio <= 1:
            raise ValueError(
                f"selection_ratio={self.selection_ratio}: expected a share above 0 up to 1; 0.1 trains on a tenth of "
                f"what is drawn."
            )
        if self.selection not in SELECTION_FUNCTIONS:
            raise ValueError(
                f"selection={self.selection!r}: expected one of {', '.join(SELECTION_FUNCTIONS)}; others are added "
                f"with register_selection_function."
            )
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                expected = ", ".join("nothing" if choice is None else repr(choice) for choice in choices)
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {expected}.")
        for name, least in (("rescore_every", 1), ("scoring_batch_size", 1), ("mc_samples", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value}: expected {least} or more.")
        if self.rescore_every > 1 and self.rescore_every * self.selection_ratio >= 1:
            raise ValueError(
                f"rescore_every={self.rescore_every} with selection_ratio={self.selection_ratio}: the steps of one "
                f"draw would train on all of it, or more than it has. Keep their product below 1."
            )
        if self.granularity == "token":
            self._check_token_options()

    def _check_token_options(self) -> None:
        if self.selection_scope == "global":
            raise ValueError(
                "selection_scope='global' needs granularity='example': tokens are chosen within each process' batch. "
                "Leave it at 'process'."
            )
        if self.rescore_every > 1:
            raise ValueError(
                f"rescore_every={self.rescore_every} needs granularity='example': there is no larger draw whose "
                f"scores could serve more steps. Leave it at 1."
            )
        if SELECTION_FUNCTIONS[self.selection].sampled:
            raise ValueError(
                f"selection={self.selection!r} samples with weights, which granularity='token' doesn't have. Use "
                f"granularity='example'."
            )


@dataclass
class RHOLossArguments(RHOLossArgumentsMixin, EfxArguments):
    """TrainingArguments with the options of RHO-LOSS."""

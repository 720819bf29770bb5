"""Options of scripts/prune.py: what is pruned, and what becomes of it."""

from dataclasses import dataclass, field
from typing import Any, Literal

from hf_efx.core.results.curves import check_fractions
from hf_efx.targeted_dropout.curve import FRACTIONS

PLOT = "pruning_curve.png"


@dataclass
class PruneOptions:
    """What is pruned, and what becomes of it."""

    fraction: float | None = field(
        default=None,
        metadata={
            "help": "Share to prune for good, from 0 to below 1: more is smaller, and costs more of the metric, as "
            "the curve shows. Without it nothing is pruned and no checkpoint written."
        },
    )
    granularity: Literal["weight", "unit"] | None = field(
        default=None,
        metadata={
            "help": "'weight' costs the metric least, but only makes zeros, which take as many bytes and as much "
            "time; 'unit' prunes FFN features, heads and channels, which --shrink can take out. Without it as `prune` "
            "has it."
        },
    )
    scope: Literal["column", "layer", "global"] | None = field(
        default=None,
        metadata={
            "help": "Among which the weakest are found: each output unit's weights, as targeted dropout trains by "
            "default, each layer's, or all. 'global' puts the cut where it costs least, may empty a layer, which is "
            "refused, and leaves unequal counts of units, which can't be shrunk. Without it as `prune` has it."
        },
    )
    target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Modules to prune, by suffix. Without it those that targeted dropout was trained on, else every "
            "Linear, Conv1D and Conv2d that is no embedding, stem or head."
        },
    )
    exclude_modules: list[str] | None = field(default=None, metadata={"help": "Modules to leave alone."})
    fractions: list[float] = field(
        default_factory=lambda: list(FRACTIONS),
        metadata={"help": "Shares at which the curve is drawn; each costs an evaluation."},
    )
    shrink: bool = field(
        default=False,
        metadata={"help": "Take pruned units out: fewer bytes and less time. It needs granularity 'unit'."},
    )
    timed_rounds: int = field(
        default=5, metadata={"help": "Steps that are timed of each model, in turn; more are surer, and take longer."}
    )
    plot: bool = field(default=True, metadata={"help": f"Draw the curve into {PLOT}; needs matplotlib."})

    def __post_init__(self) -> None:
        if self.fraction is not None:
            check_fractions([self.fraction], "fraction")
        check_fractions(self.fractions)
        if self.timed_rounds < 1:
            raise ValueError(f"timed_rounds={self.timed_rounds}: expected 1 or more.")

    @property
    def selection(self) -> dict[str, Any]:
        """Those of the options that `prune` and `pruning_curve` share which were given."""
        names = ("granularity", "scope", "target_modules", "exclude_modules")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

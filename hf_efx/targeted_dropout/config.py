"""TargetedDropoutConfig: what is dropped in training so that the network stands its pruning."""

import logging
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from hf_efx.core.model.block_map import Block, block_entry, block_fields
from hf_efx.core.model.masks import SCOPES, UnitGroup, candidate_count
from hf_efx.core.model.method_config import EfxMethodConfig
from hf_efx.core.model.peft_bridge import EfxType, RefusingTuner, register_adapter
from hf_efx.core.model.targets import match_targets
from hf_efx.core.model.weight_view import WeightView
from hf_efx.core.training.step_context import attach_step_context, detach_step_context, step_context
from hf_efx.targeted_dropout.layers import Dropping, Role, TargetedMember, attach, detach
from hf_efx.targeted_dropout.schedule import RAMPS
from hf_efx.targeted_dropout.units import chosen_groups, planned_groups

logger = logging.getLogger(__name__)

GRANULARITIES = ("weight", "unit")
SELECTIONS = ("targeted", "random")


@dataclass
class TargetedDropoutConfig(EfxMethodConfig):
    """Config of targeted dropout (Gomez et al. 2019, arXiv 1905.13678): drops among the weakest weights or units.

    It acts in training steps alone: evaluation and generation see the dense model, checkpoints are the dense model's,
    and only `prune` sets anything to zero.

    Raises:
        ValueError: For a value out of range; the field, the value and the way out are named.
    """

    method: ClassVar[str] = "targeted_dropout"
    changes_skeleton: ClassVar[bool] = False

    granularity: str = field(
        default="weight",
        metadata={
            "help": "What is dropped and later pruned: 'weight' (single weights: stands the highest fractions, but "
            "zeros alone make nothing smaller) or 'unit' (FFN features, heads, channels: `shrink` then makes the "
            "model smaller and faster)."
        },
    )
    # (.66, .75) is of the settings in the authors' repository; it stands pruning to three quarters.
    targeting: float = field(
        default=0.75,
        metadata={
            "help": "gamma: share of the weights or units that are candidates, the weakest. Set it to the fraction "
            "that is to be pruned: the network stands that much, and hardly more."
        },
    )
    rate: float = field(
        default=0.66,
        metadata={
            "help": "alpha: probability with which a candidate is dropped. Higher makes the network depend less on "
            "what is pruned, and the unpruned one worse."
        },
    )
    ramp: str = field(
        default="none",
        metadata={
            "help": "How targeting and rate rise over training: 'none', 'linear' (both evenly from 0), 'paper' "
            "(targeting to .95 of its end in the first half). A ramp makes rates near 1 trainable, for the highest "
            "fractions; the network before pruning may then be far worse than the pruned one."
        },
    )
    ramp_steps: int | None = field(
        default=None, metadata={"help": "Optimizer steps that a ramp takes; None means the whole run."}
    )
    scope: str = field(
        default="column",
        metadata={
            "help": "Among which the weakest are found: 'column' (each output unit's weights, as in the paper), "
            "'layer', or 'global' (may prune small-scaled layers away). Units: 'column' and 'layer' are the same."
        },
    )
    # The paper's 1 costs a search for the weakest at each step; weights hardly change their order in 50.
    refresh_every: int = field(
        default=50,
        metadata={"help": "Optimizer steps between new candidates. 1 is the paper, and dearer."},
    )
    selection: str = field(
        default="targeted",
        metadata={
            "help": "'targeted', or for comparison 'random': plain dropout of weights or units at `rate`, whatever "
            "their size, what is kept scaled by 1 / (1 - rate)."
        },
    )
    l1: float = field(
        default=0.0,
        metadata={
            "help": "For comparison or beside it: this times the sum of the layers' |weights| is added to the loss, "
            "through its gradient, once a step. Weights alone; not under fp16, whose gradient scaler would scale it."
        },
    )
    blocks: list[Block] | None = field(
        default=None,
        metadata={
            "help": "The blocks of units of a model that hf_efx doesn't know, or others than it knows of: "
            "[Block('mlp', emits=['fc1'], reads=['fc2'])].",
            "command_line": False,
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = EfxType.EFX_TARGETED_DROPOUT  # pyright: ignore[reportAttributeAccessIssue]
        choices = (("granularity", GRANULARITIES), ("ramp", RAMPS), ("scope", SCOPES), ("selection", SELECTIONS))
        for name, known in choices:
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(known)}.")
        for name in ("targeting", "rate"):
            if not _is_number(getattr(self, name)) or not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected a share from 0 to 1.")
        for name in ("refresh_every", "ramp_steps"):
            value = getattr(self, name)
            if (name, value) != ("ramp_steps", None) and (type(value) is not int or value < 1):
                raise ValueError(f"{name}={value!r}: expected a whole number of 1 or more.")
        if not _is_number(self.l1) or not 0 <= self.l1 < math.inf:
            raise ValueError(f"l1={self.l1!r}: expected a number of 0 or more, such as 1e-5.")
        if self.selection == "random" and self.rate == 1:
            raise ValueError("rate=1 with selection='random' drops everything: set it below 1.")
        if self.granularity == "unit" and self.l1:
            raise ValueError(f"l1={self.l1!r} acts on weights: set it to 0, or granularity='weight'.")
        if self.granularity == "weight" and self.blocks is not None:
            raise ValueError("blocks describe units: set granularity='unit', or leave them out.")
        self._check_inert()
        if self.blocks is not None:
            self.blocks = [block_entry(entry) for entry in self.blocks]

    def _check_inert(self) -> None:
        """Refuses settings that can't act; `scope` always does, in `prune`."""
        if self.rate == 0:
            if not self.l1:
                raise ValueError("rate=0 drops nothing: raise it, or set l1 for a penalty alone.")
            self.refuse_inert(("targeting", "ramp", "refresh_every", "selection"), "at rate=0: raise the rate")
        if self.ramp == "none":
            self.refuse_inert(("ramp_steps",), "at ramp='none': set ramp='linear' or 'paper'")
        if self.selection == "random":
            self.refuse_inert(("targeting", "refresh_every"), "at selection='random': set selection='targeted'")

    def method_fields(self) -> dict[str, Any]:
        """See `EfxMethodConfig.method_fields`; blocks as dicts."""
        result = super().method_fields()
        if self.blocks is not None:
            result["blocks"] = [block_fields(block) for block in self.blocks]
        return result

    def match(self, model: nn.Module) -> dict[str, nn.Module]:
        """The layers, or all modules of the chosen groups of units, by name; see `EfxMethodConfig.match`."""
        if self.granularity == "weight":
            return match_targets(model, self)
        return {name: model.get_submodule(name) for group in self.groups(model) for name in group.members}

    def groups(self, model: nn.Module) -> list[UnitGroup]:
        """The groups of units that the config chooses."""
        return chosen_groups(model, self, self.blocks)

    def plan(self, model: nn.Module, targets: dict[str, nn.Module], pretrained: bool) -> dict[str, dict[str, Any]]:
        """Which modules drop their weights, or which hold which units.

        Raises:
            ValueError: If the targeting, rounded down, leaves no candidate anywhere.
        """
        if self.granularity == "weight":
            views = {name: WeightView(module) for name, module in targets.items()}
            sizes = {n: v.in_dim if self.scope == "column" else v.weight.numel() for n, v in views.items()}
            self._check_candidates(sizes, "weights of a column" if self.scope == "column" else "weights")
            return {name: {} for name in targets}
        groups = self.groups(model)
        self._check_candidates({group.name: group.size for group in groups}, "units")
        result: dict[str, dict[str, Any]] = {}
        for i, group in enumerate(groups):
            for name, stacked in group.emits.items():
                spec = {"units": i, "stacked": stacked}
                if name == group.name:
                    spec |= {"size": group.size, "kind": group.kind}
                result.setdefault(name, {})["emits"] = spec
            for role, names in (("scales", group.norms), ("reads", group.reads)):
                for name in names:
                    result.setdefault(name, {})[role] = {"units": i}
        return result

    def _check_candidates(self, sizes: dict[str, int], what: str) -> None:
        if self.selection == "random" or self.rate == 0:
            return
        total = sum(sizes.values())
        empty = [name for name, size in sizes.items() if not candidate_count(self.targeting, size)]
        if candidate_count(self.targeting, total) == 0 or (self.scope != "global" and len(empty) == len(sizes)):
            raise ValueError(
                f"targeting={self.targeting!r} leaves no candidate: rounded down it is none of the "
                f"{max(sizes.values()):,} {what} of any layer. Raise it, or widen the scope."
            )
        if empty and self.scope != "global":
            logger.warning(
                "targeting=%s, rounded down, leaves no candidate among the %s %s of %s%s: it stays dense.",
                self.targeting, sizes[empty[0]], what, empty[0], f" and {len(empty) - 1} more" if empty[1:] else "",
            )  # fmt: skip

    def describe(self, plan: dict[str, dict[str, Any]]) -> dict[str, str]:
        """See `EfxMethodConfig.describe`."""
        what = f"{self.rate:g} of " + ("" if self.selection == "random" else f"the weakest {self.targeting:g} of ")
        if self.granularity == "weight":
            return dict.fromkeys(plan, f"drops {what}the weights")
        sizes = {s["emits"]["units"]: s["emits"]["size"] for s in plan.values() if "size" in s.get("emits", {})}
        verbs = {"emits": "emits", "scales": "normalises", "reads": "reads"}
        result = {}
        for name, spec in plan.items():
            parts = [f"{verb} {sizes[spec[role]['units']]} units" for role, verb in verbs.items() if role in spec]
            result[name] = f"{', '.join(parts)}, of which {what}them are dropped"
        return result

    def apply(self, model: nn.Module, plan: dict[str, dict[str, Any]]) -> None:
        """Gives the planned modules the classes that drop; what is on already stays as it is."""
        if any(isinstance(model.get_submodule(name), TargetedMember) for name in plan):
            return
        groups = planned_groups(plan)
        names = [name for group in groups for name in group.emits] if groups else plan
        context = attach_step_context(model)
        dropping = Dropping(self, context, model, {name: model.get_submodule(name) for name in names}, groups)
        for name in () if groups else plan:
            attach(name, dropping, Role(name))
        for group in groups:
            # What nobody reads is dropped where readers read it; a layer of its own, where it is emitted.
            roles = dict.fromkeys(group.reads, 0) or group.emits
            for name, stacked in roles.items():
                attach(name, dropping, Role(group.name, group.size, stacked))
        context.listeners.append(dropping.at_step_begin)
        context.stateful.append(dropping)

    def restore(self, model: nn.Module, plan: dict[str, dict[str, Any]]) -> None:
        """The same as `apply`: there are no values to start."""
        self.apply(model, plan)

    def merge(self, model: nn.Module, plan: dict[str, dict[str, Any]]) -> None:
        """Gives the modules their own classes back."""
        gone = [dropping for name in plan if (dropping := detach(model.get_submodule(name))) is not None]
        context = step_context(model)
        if context is not None:
            context.listeners = [one for one in context.listeners if getattr(one, "__self__", None) not in gone]
            context.stateful = [one for one in context.stateful if one not in gone]
        if not any(hasattr(module, "efx_method") for module in model.modules()):
            detach_step_context(model)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


register_adapter(EfxType.EFX_TARGETED_DROPOUT, TargetedDropoutConfig, RefusingTuner)

"""SliceOutConfig: which blocks are sliced, at which rate, and how slices are drawn."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft.utils.other import get_pattern_key
from torch import nn

from hf_efx.core.model.block_map import KINDS, Block, FoundBlock, block_entry, block_fields
from hf_efx.core.model.block_units import model_blocks, named
from hf_efx.core.model.method_config import EfxMethodConfig
from hf_efx.core.model.peft_bridge import EfxType, RefusingTuner, register_adapter
from hf_efx.core.model.probe import what_breaks
from hf_efx.core.model.targets import check_entries
from hf_efx.core.training.step_context import step_context
from hf_efx.slice_out.apply import put_on, take_off, watch_settings
from hf_efx.slice_out.blocks import check_model, check_modules, own_dropouts, plan_blocks
from hf_efx.slice_out.schedule import NORMALIZATIONS, STARTS, RateSchedule, slice_width

ATTENTION = ("heads", "head_dim")


@dataclass
class SliceOutConfig(EfxMethodConfig):
    """Config of SliceOut (Notin et al. 2020, arXiv 2007.10909): dropout that drops a contiguous slice of units.

    It acts in training steps alone: evaluation and generation see the dense model, checkpoints are the dense model's.

    Raises:
        ValueError: For a value out of range; the field, the value and the way out are named.
    """

    method: ClassVar[str] = "slice_out"
    changes_skeleton: ClassVar[bool] = False

    # This package's choice: the milder of the two rates that its benchmark measures.
    rate: float | dict[str, float] = field(
        default=0.25,
        metadata={
            "help": "Share of each block's units that a step leaves out, from 0 to below 1, or one share for each "
            "kind of block, such as {'mlp': 0.5, 'attention': 0.25}. Higher is faster and leaner, and regularises "
            "more."
        },
    )
    rate_pattern: dict[str, float] = field(
        default_factory=dict,
        metadata={
            "help": "Rates for blocks whose first module's name matches a pattern (regular expression), before "
            "`rate`: {'h.0.mlp.c_fc': 0.1}. Rate 0 leaves a block dense."
        },
    )
    targets: Sequence[str] = field(
        default=KINDS,
        metadata={
            "help": "Kinds of blocks to slice, of 'mlp' (hidden features), 'attention' (heads) and 'conv' (channels "
            "between two convolutions)."
        },
    )
    # Multiples keep the matrices on fast memory boundaries.
    starts: str = field(
        default="aligned",
        metadata={
            "help": "Where slices may start: 'aligned' (multiples of align: the fastest), 'all' (everywhere that "
            "fits: most variety, but outer units are kept seldom), 'circular' (past the end it goes on at the "
            "beginning: all units are kept equally often, at the price of two smaller products)."
        },
    )
    # Tensor cores want multiples of 8.
    align: int = field(
        default=8,
        metadata={
            "help": "Widths are multiples of this many features, and so are aligned starts. Larger is friendlier to "
            "hardware, smaller comes nearer to the rate in narrow layers."
        },
    )
    # As dropout scales.
    normalization: str = field(
        default="flow",
        metadata={
            "help": "How kept units are scaled up: 'flow' (all by n / width, as dropout does) or 'probabilistic' "
            "(each by 1 / its probability of being kept: unbiased for each unit, at a little more work)."
        },
    )
    attention: str = field(
        default="heads",
        metadata={
            "help": "What is sliced in attention: whole 'heads' (with grouped queries whole groups), or 'head_dim', "
            "the same features of every head, for models with few heads. Not under rotary embeddings."
        },
    )
    ramp_steps: int = field(
        default=0,
        metadata={
            "help": "Optimizer steps in which the rate rises from 0. A ramp is gentler at the start and slower there."
        },
    )
    final_dense_steps: int = field(
        default=0,
        metadata={
            "help": "Last optimizer steps without slices: the model that is evaluated gets trained as it is, at the "
            "price of dense steps."
        },
    )
    same_on_all_ranks: bool = field(
        default=False,
        metadata={
            "help": "Whether all processes keep the same units at a step. False averages the gradients of different "
            "slices, so that nearly every unit is trained at every step; True gives the gradient of one slice, "
            "outside which it is zero."
        },
    )
    accumulate_in_place: bool = field(
        default=False,
        metadata={
            "help": "Add gradients straight into the slice of each parameter's .grad: less memory traffic, but "
            "autograd's hooks don't see them. Refused where hooks or DDP need them."
        },
    )
    blocks: list[Block] | None = field(
        default=None,
        metadata={
            "help": "The blocks of a model that hf_efx doesn't know, or others than it knows of: "
            "[Block('mlp', emits=['fc1'], reads=['fc2'])].",
            "command_line": False,
        },
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Blocks to slice, by any of their modules: names or suffixes, or one regular expression that "
            "matches whole names. None means all blocks of the kinds in targets."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Blocks to leave dense, by any of their modules, in the same form as target_modules."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = EfxType.EFX_SLICE_OUT  # pyright: ignore[reportAttributeAccessIssue]
        self._check_targets()
        self._check_rates()
        for name, known in (("starts", STARTS), ("normalization", NORMALIZATIONS), ("attention", ATTENTION)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(known)}.")
        for name, least in (("align", 1), ("ramp_steps", 0), ("final_dense_steps", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r}: expected a whole number of {least} or more.")
        if "attention" not in self.targets:
            self.refuse_inert(("attention",), f"at targets={self.targets!r}: add 'attention' to them")
        if self.blocks is not None:
            self.blocks = [block_entry(entry) for entry in self.blocks]

    def _check_targets(self) -> None:
        targets: Any = (self.targets,) if isinstance(self.targets, str) else self.targets
        if not isinstance(targets, (list, tuple, set)) or not targets or any(kind not in KINDS for kind in targets):
            raise ValueError(f"targets={self.targets!r}: expected some of {', '.join(KINDS)}.")
        self.targets = tuple(kind for kind in KINDS if kind in targets)

    def _check_rates(self) -> None:
        by_kind = self.rate if isinstance(self.rate, dict) else {}
        unknown = sorted(set(by_kind) - set(self.targets))
        if unknown:
            raise ValueError(f"rate={self.rate!r} names {unknown[0]!r}, which isn't among targets={self.targets!r}.")
        if not isinstance(self.rate_pattern, dict):
            raise ValueError(f"rate_pattern={self.rate_pattern!r}: expected a dict, such as {{'h.0.mlp.c_fc': 0.1}}.")
        rates = {f"rate[{kind!r}]": rate for kind, rate in by_kind.items()} or {"rate": self.rate}
        rates |= {f"rate_pattern[{pattern!r}]": rate for pattern, rate in self.rate_pattern.items()}
        for name, rate in rates.items():
            if not isinstance(rate, (int, float)) or isinstance(rate, bool) or not 0 <= rate < 1:
                raise ValueError(
                    f"{name}={rate!r}: expected the share of units to leave out, from 0 to below 1 (at 1 nothing "
                    f"would be left)."
                )

    def method_fields(self) -> dict[str, Any]:
        """See `EfxMethodConfig.method_fields`; blocks as dicts."""
        result = super().method_fields()
        if self.blocks is not None:
            result["blocks"] = [block_fields(block) for block in self.blocks]
        return result

    def match(self, model: nn.Module) -> dict[str, nn.Module]:
        """The modules of all chosen blocks, by name; see `EfxMethodConfig.match`."""
        found, rates = self._blocks(model)
        chosen = [block for block in found if rates[block.name]]
        check_modules(model, chosen)
        return {name: model.get_submodule(name) for block in chosen for name in block.members}

    def plan(self, model: nn.Module, targets: dict[str, nn.Module], pretrained: bool) -> dict[str, dict[str, Any]]:
        """Which units each module emits or reads, and what is set while the method is on.

        Raises:
            ValueError: Where a block can't be sliced as the config says; the reason and the way out are named.
        """
        found, rates = self._blocks(model)
        check_model(model, found, rates, self.attention)
        plan = plan_blocks(model, found, rates, attention=self.attention, align=self.align)
        if self.blocks is not None or _has_foreign_code(model):  # the rest is as tried out for the block map
            self._try_out(model, plan)
        return plan

    def _try_out(self, model: nn.Module, plan: dict[str, dict[str, Any]]) -> None:
        """Refuses a model whose forward fails on slices."""

        def slice_it(copy: nn.Module) -> None:
            put_on(copy, plan, schedule=RateSchedule(), **self._span_options())
            context = step_context(copy)
            assert context is not None
            context.begin_step(0)

        if broken := what_breaks(model, slice_it):
            raise ValueError(
                f"SliceOutConfig: with slices {broken}. Between the modules that emit units and those that read them "
                f"may stand only what takes any number of units and treats each alone (see Block). Leave that block "
                f"out with exclude_modules, or name another."
            )

    def own_dropouts(self, model: nn.Module) -> dict[str, float]:
        """The model's own dropouts on the blocks that are sliced: an attribute's path -> that block's rate.

        Raises:
            ValueError: As `match`.
        """
        self.match(model)
        return own_dropouts(*self._blocks(model))

    def _blocks(self, model: nn.Module) -> tuple[list[FoundBlock], dict[str, float]]:
        """All blocks of a model, and the rate of each by its name: 0 for those that stay dense.

        Raises:
            ValueError: If the model has no blocks, a pattern matches none, or none is chosen.
        """
        found = model_blocks(model, self.blocks)
        if not found:
            raise ValueError(
                f"SliceOutConfig: hf_efx knows no blocks of {type(model).__name__}. Name them, for example "
                f"SliceOutConfig(blocks=[Block('mlp', emits=['fc1'], reads=['fc2'])]), names relative to any module."
            )
        self._check_kinds({block.block.kind for block in found}, type(model).__name__)
        chosen = [block for block in found if block.block.kind in self.targets and named(block.members, self)]
        patterns = {block.name: get_pattern_key(list(self.rate_pattern), block.name) for block in chosen}
        for pattern in self.rate_pattern:
            if pattern not in patterns.values():
                raise ValueError(
                    f"rate_pattern[{pattern!r}] matches no block that targets, target_modules and the fields beside "
                    f"it choose. Blocks are called by their first modules, for example {found[0].name!r}."
                )
        rates = dict.fromkeys((block.name for block in found), 0.0)
        for block in chosen:
            rate = self.rate.get(block.block.kind, 0.0) if isinstance(self.rate, dict) else self.rate
            rates[block.name] = float(self.rate_pattern.get(patterns[block.name], rate))
        if not any(rates.values()):
            raise ValueError(
                f"SliceOutConfig: targets={self.targets!r}, rate={self.rate!r}, target_modules="
                f"{self.target_modules!r} (exclude_modules={self.exclude_modules!r}, layers_to_transform="
                f"{self.layers_to_transform!r}) choose no block of {type(model).__name__}. Its blocks are called by "
                f"their first modules, among others: {', '.join(sorted(rates)[:6])}."
            )
        rated = [block for block in chosen if rates[block.name] or patterns[block.name] in self.rate_pattern]
        sliced = [name for block in rated for name in block.members]
        check_entries(self, sliced, f"in a block that is sliced (targets={self.targets!r}, rate={self.rate!r})")
        return found, rates

    def _check_kinds(self, there: set[str], model: str) -> None:
        """Refuses settings for a kind of block that the model lacks."""
        only = f"on {model}, whose blocks are of the kinds {sorted(there)}: take out what it lacks"
        if set(self.targets) - there and there & set(self.targets):
            self.refuse_inert(("targets",), only)
        if isinstance(self.rate, dict) and (lacking := sorted(set(self.rate) - there)):
            raise ValueError(f"rate={self.rate!r}: {lacking[0]!r} has no effect {only}.")
        if "attention" not in there:
            self.refuse_inert(("attention",), only)

    def describe(self, plan: dict[str, dict[str, Any]]) -> dict[str, str]:
        """See `EfxMethodConfig.describe`."""
        spans = {spec["emits"]["span"]: spec["span"] for spec in plan.values() if "span" in spec}
        roles = {"emits": "emits", "channels": "normalises", "reads": "reads"}
        result = {}
        for name, spec in plan.items():
            parts = []
            for role, verb in roles.items():
                if role in spec:
                    span = spans[spec[role]["span"]]
                    width = slice_width(span["size"], span["rate"], span["align"])
                    parts.append(f"{verb} {width} of {span['size']} {self._units(span['kind'])}")
            if parts:
                result[name] = ", ".join(parts)
        return result

    def _units(self, kind: str) -> str:
        if kind == "attention":
            return "heads" if self.attention == "heads" else "features of each head"
        return "features" if kind == "mlp" else "channels"

    def apply(self, model: nn.Module, plan: dict[str, dict[str, Any]]) -> None:
        """Gives the planned modules their sliced classes; what is on already stays as it is."""
        schedule = RateSchedule(self.ramp_steps, self.final_dense_steps)
        if put_on(model, plan, schedule=schedule, **self._span_options()):
            watch_settings(model, self.method_fields)

    def _span_options(self) -> dict[str, Any]:
        return {
            "starts": self.starts,
            "normalization": self.normalization,
            "shared": self.same_on_all_ranks,
            "accumulate_in_place": self.accumulate_in_place,
        }

    def restore(self, model: nn.Module, plan: dict[str, dict[str, Any]]) -> None:
        """The same as `apply`: there are no values to start."""
        self.apply(model, plan)

    def merge(self, model: nn.Module, plan: dict[str, dict[str, Any]]) -> None:
        """Gives the modules their own classes and dropouts back."""
        take_off(model, plan)


def _has_foreign_code(model: nn.Module) -> bool:
    """Whether a model has modules that aren't as transformers or torch has them."""
    return any(
        type(m).__module__.partition(".")[0] not in ("transformers", "torch", "hf_efx") for m in model.modules()
    )


register_adapter(EfxType.EFX_SLICE_OUT, SliceOutConfig, RefusingTuner)

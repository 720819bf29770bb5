"""From a model's blocks and their rates to the plan of a SliceOut: which modules emit and read which units.

Everything that can't be is refused here, before anything changes. The plan is JSON, module by module, and stands in
`config.efx`:

    {"emits": {"span": 0, "blocks": 3}}    the module emits the units of span 0, three projections side by side
    {"reads": {"span": 0, "blocks": 1}}    it reads them; with "channels" it is a batch norm, with "bias" a bias a head
    {"span": {"kind": "mlp", "size": 3072, "rate": 0.25, "align": 8}}    at the first emitter: the span itself
    {"follows": {"split_size": {"span": 0, "times": 64}}}    an attribute that is `times` the units that are kept
    {"dropouts": {"p": 0.1}}    an attribute that is 0 while the method is on

Rates go by a block's name; those of blocks that stay dense are 0.
"""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_efx.core.model.block_map import FoundBlock, block_map
from hf_efx.core.model.block_units import block_units, columns, head_width, owner_of
from hf_efx.core.model.masks import UnitGroup
from hf_efx.core.model.targets import unsuitable, weight_owners
from hf_efx.slice_out.schedule import slice_width

logger = logging.getLogger(__name__)

Plan = dict[str, dict[str, Any]]
Rates = Mapping[str, float]


def check_modules(model: nn.Module, blocks: Sequence[FoundBlock]) -> None:
    """Refuses blocks with a module that can't be sliced.

    Raises:
        ValueError: With the module's name and the reason.
    """
    owners = weight_owners(model)
    norms = {block.path(name) for block in blocks for name in block.block.norms}
    for name in (name for block in blocks for name in block.members):
        module = model.get_submodule(name)
        if name in norms:
            reason = None if type(module) is nn.BatchNorm2d else f"it is a {type(module).__name__}, not a BatchNorm2d"
        else:
            reason = unsuitable(model, name, module, owners)
        if reason:
            raise ValueError(
                f"SliceOutConfig: module {name!r} can't be sliced, since {reason}. Leave its block out with "
                f"exclude_modules=[{name!r}]."
            )


def check_model(model: nn.Module, found: Sequence[FoundBlock], rates: Rates, attention: str) -> None:
    """Refuses what a model as a whole forbids.

    Raises:
        ValueError: If rotary embeddings forbid to slice features of heads, the model skips layers itself, or some
            layers alone, or all at several rates, would be sliced where they add one bias for each head.
    """
    own = block_map(model)
    sliced = [block for block in found if rates[block.name]]
    if attention == "head_dim" and own.rotary and any(block.block.kind == "attention" for block in sliced):
        raise ValueError(
            f"attention='head_dim' can't be: {type(model).__name__} has rotary embeddings, which turn a head's "
            f"features in pairs, each by an angle of its own. Use attention='heads', or targets=['mlp']."
        )
    for name in own.layerdrop:
        value = getattr(model.config, name, 0.0)
        if value > 0:
            raise ValueError(
                f"SliceOutConfig: the model skips layers itself ({name}={value}), a second dropout of the same "
                f"blocks. Build or load the model with {name}=0.0."
            )
    for block in sliced if attention == "heads" else ():
        for other in found if block.block.shared else ():
            if _stack(other) == _stack(block) and rates[other.name] != rates[block.name]:
                raise ValueError(
                    f"SliceOutConfig: the heads of {block.name!r} and {other.name!r} need one shared slice, since "
                    f"their layers add the same position bias, one for each head: slice all layers at one rate, or "
                    f"none (without layers_to_transform, targets=('mlp',)), or use attention='head_dim'."
                )


def _stack(block: FoundBlock) -> str:
    """What the same block of all layers has in common."""
    return re.sub(r"(^|\.)\d+(?=\.)", r"\1*", block.name)


def plan_blocks(model: nn.Module, found: Sequence[FoundBlock], rates: Rates, *, attention: str, align: int) -> Plan:
    """The plan for the blocks that are sliced.

    Args:
        model: The model.
        found: All its blocks.
        rates: Of all blocks.
        attention: "heads" or "head_dim".
        align: Of how many features widths are multiples.

    Raises:
        ValueError: Where widths or heads stand in the way.
    """
    plan: Plan = {}
    spans: dict[str, int] = {}
    for block in found:
        rate = rates[block.name]
        if not rate:
            continue
        units = _units(model, block, attention, align)
        key = _stack(block) if block.block.shared and attention == "heads" else block.name
        if key not in spans:
            spans[key] = len(spans)
            _check_width(block, units, rate)
            span = {"kind": block.block.kind, "size": units.size, "rate": rate, "align": units.align}
            plan.setdefault(block.name, {})["span"] = span
        for name, role, times in units.roles:
            plan.setdefault(name, {})[role] = {"span": spans[key], "blocks": times}
        for path, times in units.follows.items():
            owner, attribute = owner_of(path)
            follows = plan.setdefault(owner, {}).setdefault("follows", {})
            follows[attribute] = {"span": spans[key], "times": times}
    for path, value in _dropouts_off(model, found, rates).items():
        owner, attribute = owner_of(path)
        plan.setdefault(owner, {}).setdefault("dropouts", {})[attribute] = value
    return plan


def _check_width(block: FoundBlock, units: "Units", rate: float) -> None:
    try:
        slice_width(units.size, rate, units.align)
    except ValueError as error:
        raise ValueError(
            f"SliceOutConfig: block {block.name!r} has {units.size} {units.what}. {error} (Here align counts "
            f"{units.what}.) Rates may differ: rate={{'{block.block.kind}': ...}}, or rate_pattern={{{block.name!r}: "
            f"...}}, where 0 leaves the block dense."
        ) from None


@dataclass(frozen=True)
class Units:
    """What a block is sliced into.

    Attributes:
        what: What one unit is, in the plural, for errors.
        size: How many units there are.
        align: Of how many units widths are multiples.
        roles: (module, role, how many times the units stand side by side in its columns).
        follows: An attribute's path, with its value for each unit that is kept.
    """

    what: str
    size: int
    align: int
    roles: list[tuple[str, str, int]]
    follows: dict[str, int]


def _units(model: nn.Module, block: FoundBlock, attention: str, align: int) -> Units:
    group = block_units(model, block)
    if block.block.kind == "attention":
        return (_heads if attention == "heads" else _features_of_heads)(model, block, group, align)
    what = "channels" if block.block.kind == "conv" else "features"
    return Units(what, group.size, align, _roles(group), dict.fromkeys(map(block.path, block.block.follows), 1))


def _roles(group: UnitGroup) -> list[tuple[str, str, int]]:
    roles = [(name, "emits", times) for name, times in group.emits.items()]
    return roles + [(name, "channels", 1) for name in group.norms] + [(name, "reads", 1) for name in group.reads]


def _heads(model: nn.Module, block: FoundBlock, group: UnitGroup, align: int) -> Units:
    """Whole heads, or the groups of them that share a key and a value."""
    head = head_width(model, block)
    unit = columns(model, group.reads[0])[0] // group.size
    counts = {"width": unit, "heads": unit // head}
    present = {name for name, _ in model.named_modules()}
    biases = [(name, "bias", 1) for name in map(block.path, block.block.biases) if name in present]
    return Units(
        what="heads" if unit == head else "groups of heads",
        size=group.size,
        align=align // math.gcd(align, head),
        roles=_roles(group) + biases,
        follows={block.path(path): counts[what] for path, what in block.block.follows.items()},
    )


def _features_of_heads(model: nn.Module, block: FoundBlock, group: UnitGroup, align: int) -> Units:
    """The same features of every head, so that the units stand side by side once for each head."""
    row, head = block.block, head_width(model, block)
    if not isinstance(row.head_dim, str):
        raise ValueError(
            f"attention='head_dim': block {block.name!r} gives the heads' width as a number, so that nothing could "
            f"tell the code around it that it changes. Name the attribute that holds it, or use attention='heads'."
        )
    roles = [(name, "emits", columns(model, name)[1] // head) for name in group.emits]
    roles += [(name, "reads", columns(model, name)[0] // head) for name in group.reads]
    heads = roles[-1][2]
    follows = {block.path(row.head_dim): 1}
    follows |= {block.path(path): heads for path, what in row.follows.items() if what == "width"}
    return Units("features of a head", head, align, roles, follows)


def own_dropouts(found: Sequence[FoundBlock], rates: Rates) -> dict[str, float]:
    """The model's own dropouts on the blocks that are sliced: the attribute's path -> the block's rate.

    Where blocks share one, the highest of their rates.
    """
    result: dict[str, float] = {}
    for block in found:
        for path in map(block.path, block.block.dropouts if rates[block.name] else ()):
            result[path] = max(result.get(path, 0.0), rates[block.name])
    return result


def _dropouts_off(model: nn.Module, found: Sequence[FoundBlock], rates: Rates) -> dict[str, float]:
    """The dropouts to switch off, with their probabilities.

    One that also sits on a block which isn't sliced stays on, since that block would be left without.
    """
    dense = {path for block in found if not rates[block.name] for path in map(block.path, block.block.dropouts)}
    off, kept = {}, []
    for path in own_dropouts(found, rates):
        owner, attribute = owner_of(path)
        value = getattr(model.get_submodule(owner), attribute)
        if value > 0 and path in dense:
            kept.append(path)
        elif value > 0:
            off[path] = value
    if kept:
        logger.warning(
            "Left on, since blocks that aren't sliced share them: dropout %s. Sliced blocks are dropped out twice.",
            ", ".join(kept),
        )
    return off

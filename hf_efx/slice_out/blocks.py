"""From a model's blocks to the plan of a SliceOut: which blocks are sliced, in which units, at which rate.

Everything that can't be is refused here, before anything changes. The plan is JSON, module by module, and stands in
`config.efx`:

    {"emits": {"span": 0, "blocks": 3}}    the module emits the units of span 0, three projections side by side
    {"reads": {"span": 0, "blocks": 1}}    it reads them; with "channels" it is a batch norm, with "bias" a bias a head
    {"span": {"kind": "mlp", "size": 3072, "rate": 0.25, "align": 8}}    at the first emitter: the span itself
    {"follows": {"split_size": {"span": 0, "times": 64}}}    an attribute that is `times` the units that are kept
    {"dropouts": {"p": 0.1}}    an attribute that is 0 while the method is on
"""

import logging
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peft.utils.other import get_pattern_key
from torch import nn

from hf_efx.core.model.block_map import FoundBlock, block_map, find_blocks
from hf_efx.core.model.block_units import named
from hf_efx.core.model.targets import unsuitable
from hf_efx.core.model.weight_view import WeightView
from hf_efx.slice_out.schedule import slice_width

if TYPE_CHECKING:
    from hf_efx.slice_out.config import SliceOutConfig

logger = logging.getLogger(__name__)

Plan = dict[str, dict[str, Any]]


def choose_blocks(model: nn.Module, config: "SliceOutConfig") -> list[FoundBlock]:
    """The blocks of a model that a config slices, their modules checked.

    Raises:
        ValueError: If no block is known or chosen, or one that is holds a module that can't be sliced.
    """
    found = all_blocks(model, config)
    rates = block_rates(found, config)
    chosen = [block for block in found if rates[block.name] > 0 and named(block.members, config)]
    if not chosen:
        there = sorted({block.name for block in found})
        raise ValueError(
            f"SliceOutConfig: targets={config.targets!r}, rate={config.rate!r}, target_modules="
            f"{config.target_modules!r} (exclude_modules={config.exclude_modules!r}, layers_to_transform="
            f"{config.layers_to_transform!r}) choose no block of {type(model).__name__}. Its blocks are called by "
            f"their first modules, among others: {', '.join(there[:6])}."
        )
    for block in chosen:
        _check_modules(model, block)
    _check_shared(found, chosen, rates, config)
    return chosen


def all_blocks(model: nn.Module, config: "SliceOutConfig") -> list[FoundBlock]:
    """The blocks that a model has, by `config.blocks` or by the block map.

    Raises:
        ValueError: If there is none.
    """
    rows = block_map(model).blocks if config.blocks is None else config.blocks
    if not rows:
        raise ValueError(
            f"SliceOutConfig: hf_efx knows no blocks of {type(model).__name__}. Name them, for example "
            f"SliceOutConfig(blocks=[Block('mlp', emits=['fc1'], reads=['fc2'])]), names relative to any module."
        )
    found = find_blocks(model, rows)
    for row in rows if config.blocks is not None else ():
        if not any(block.block is row for block in found):
            raise ValueError(
                f"SliceOutConfig: blocks has {row!r}, but no module of {type(model).__name__} has all of "
                f"{', '.join((*row.emits, *row.norms, *row.reads))} below it, or other blocks took them."
            )
    if not found:
        raise ValueError(f"SliceOutConfig: {type(model).__name__} has none of its model type's blocks. Pass `blocks`.")
    return found


def block_rates(found: list[FoundBlock], config: "SliceOutConfig") -> dict[str, float]:
    """The rate of each block by its name; 0 for kinds that aren't among the targets.

    Raises:
        ValueError: If a pattern of rate_pattern matches no block.
    """
    rates, used = {}, set()
    for block in found:
        key = get_pattern_key(list(config.rate_pattern), block.name)
        used.add(key)
        rate = config.rate_pattern.get(key, config.rate_of(block.block.kind))
        rates[block.name] = float(rate) if block.block.kind in config.targets else 0.0
    unused = [pattern for pattern in config.rate_pattern if pattern not in used]
    if unused:
        raise ValueError(
            f"rate_pattern[{unused[0]!r}] matches no block. Blocks are called by their first modules, for example "
            f"{found[0].name!r}."
        )
    return rates


def _check_modules(model: nn.Module, block: FoundBlock) -> None:
    norms = set(map(block.path, block.block.norms))
    for name in block.members:
        module = model.get_submodule(name)
        if name in norms:
            reason = None if type(module) is nn.BatchNorm2d else f"it is a {type(module).__name__}, not a BatchNorm2d"
        else:
            reason = unsuitable(model, name, module)
        if reason:
            raise ValueError(
                f"SliceOutConfig: module {name!r} can't be sliced, since {reason}. Leave its block out with "
                f"exclude_modules=[{name!r}]."
            )


def _check_shared(
    found: list[FoundBlock], chosen: list[FoundBlock], rates: dict[str, float], config: "SliceOutConfig"
) -> None:
    """Refuses to slice some of the layers, or at several rates, where they all add one bias for each head."""
    if config.attention == "head_dim":  # all heads stay
        return
    names = {block.name for block in chosen}
    for block in chosen:
        if not block.block.shared:
            continue
        for other in (b for b in found if _stack(b) == _stack(block)):
            if other.name not in names or rates[other.name] != rates[block.name]:
                raise ValueError(
                    f"SliceOutConfig: the heads of {block.name!r} and {other.name!r} need one shared slice, since "
                    f"their layers add the same position bias, one for each head: slice all layers at one rate, or "
                    f"none (without layers_to_transform, targets=('mlp',)), or use attention='head_dim'."
                )


def _stack(block: FoundBlock) -> str:
    """What the same block of all layers has in common."""
    return re.sub(r"(^|\.)\d+(?=\.)", r"\1*", block.name)


def plan_blocks(model: nn.Module, config: "SliceOutConfig", chosen: list[FoundBlock]) -> Plan:
    """The plan for blocks that `choose_blocks` chose.

    Raises:
        ValueError: Where widths, heads or the model's own regularisation stand in the way.
    """
    _check_model(model, config)
    found = all_blocks(model, config)
    rates = block_rates(found, config)
    plan: Plan = {}
    spans: dict[str, int] = {}
    for block in chosen:
        units = block_units(model, block, config)
        key = _stack(block) if block.block.shared and config.attention == "heads" else block.name
        if key not in spans:
            spans[key] = len(spans)
            _check_width(block, units, rates[block.name])
            plan.setdefault(block.name, {})["span"] = {
                "kind": block.block.kind,
                "size": units.size,
                "rate": rates[block.name],
                "align": units.align,
            }
        for name, role, blocks in units.roles:
            plan.setdefault(name, {})[role] = {"span": spans[key], "blocks": blocks}
        for owner, attribute, times in units.follows:
            follows = plan.setdefault(owner, {}).setdefault("follows", {})
            follows[attribute] = {"span": spans[key], "times": times}
    for owner, attribute, value in _dropouts(model, found, chosen):
        plan.setdefault(owner, {}).setdefault("dropouts", {})[attribute] = value
    return plan


def _check_model(model: nn.Module, config: "SliceOutConfig") -> None:
    own = block_map(model)
    if config.attention == "head_dim" and "attention" in config.targets and own.rotary:
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
        follows: (module, attribute, its value for each unit that is kept).
    """

    what: str
    size: int
    align: int
    roles: list[tuple[str, str, int]]
    follows: list[tuple[str, str, int]]


def block_units(model: nn.Module, block: FoundBlock, config: "SliceOutConfig") -> Units:
    """The units of a block.

    Raises:
        ValueError: If its modules don't fit together, or heads don't divide.
    """
    fused = {
        name: block.block.fused.get(name, block_map(model).blocks_of(block.path(name))) for name in block.block.emits
    }
    widths = {name: _widths(model, block.path(name))[1] / fused[name] for name in fused}
    widths |= {name: _widths(model, block.path(name))[0] for name in (*block.block.norms, *block.block.reads)}
    if block.block.kind == "attention":
        return _head_units(model, block, config, fused, widths)
    size = widths[block.block.emits[0]]
    for name, width in widths.items():
        if width != size:
            raise ValueError(
                f"SliceOutConfig: block {block.name!r} emits {size:g} units, but {block.path(name)!r} has {width:g}: "
                f"emitters, norms and readers of a block have the same units. Name another block."
            )
    return Units(
        what="channels" if block.block.kind == "conv" else "features",
        size=int(size),
        align=config.align,
        roles=_roles(block, dict.fromkeys(widths, 1) | fused),
        follows=[(*owner_of(block.path(path)), 1) for path in block.block.follows],
    )


def _head_units(
    model: nn.Module, block: FoundBlock, config: "SliceOutConfig", fused: dict[str, int], widths: dict[str, float]
) -> Units:
    row, path = block.block, block.path
    head_dim = row.head_dim
    if isinstance(head_dim, str):
        owner, attribute = owner_of(path(head_dim))
        head_dim = getattr(model.get_submodule(owner), attribute)
    assert isinstance(head_dim, int)
    heads = {name: int(width // head_dim) for name, width in widths.items()}
    size = max(1, min(heads.values()))  # of keys and values, where queries share them
    for name, width in widths.items():
        if width != heads[name] * head_dim or heads[name] % size:
            raise ValueError(
                f"SliceOutConfig: {path(name)!r} has {width:g} features, which isn't a whole number of heads of width "
                f"{head_dim}, or of groups of {size}. Leave the block out with exclude_modules=[{block.name!r}], or "
                f"correct its head_dim or fused."
            )
    per_group = heads[row.reads[0]] // size
    if config.attention == "heads":
        values = {"width": per_group * head_dim, "heads": per_group}
        present = {name for name, _ in model.named_modules()}
        return Units(
            what="heads" if per_group == 1 else "groups of heads",
            size=size,
            align=config.align // math.gcd(config.align, head_dim),
            roles=_roles(block, dict.fromkeys(widths, 1) | fused)
            + [(path(name), "bias", 1) for name in row.biases if path(name) in present],
            follows=[(*owner_of(path(p)), values[counts]) for p, counts in row.follows.items()],
        )
    if not isinstance(row.head_dim, str):
        raise ValueError(
            f"attention='head_dim': block {block.name!r} gives the heads' width as a number, so that nothing could "
            f"tell the code around it that it changes. Name the attribute that holds it, or use attention='heads'."
        )
    follows = [(*owner_of(path(row.head_dim)), 1)]
    follows += [(*owner_of(path(p)), heads[row.reads[0]]) for p, counts in row.follows.items() if counts == "width"]
    stacked = {name: heads[name] * fused.get(name, 1) for name in widths}
    return Units("features of a head", head_dim, config.align, _roles(block, stacked), follows)


def _roles(block: FoundBlock, stacked: dict[str, int]) -> list[tuple[str, str, int]]:
    parts = (("emits", block.block.emits), ("channels", block.block.norms), ("reads", block.block.reads))
    return [(block.path(name), role, stacked[name]) for role, names in parts for name in names]


def _widths(model: nn.Module, name: str) -> tuple[int, int]:
    """Features or channels that a module takes and gives."""
    module = model.get_submodule(name)
    if isinstance(module, nn.BatchNorm2d):
        return module.num_features, module.num_features
    if isinstance(module, nn.Conv2d):
        return module.in_channels, module.out_channels
    view = WeightView(module)
    return view.in_dim, view.out_dim


def owner_of(path: str) -> tuple[str, str]:
    """The module and the attribute that a path such as "attn.attn_dropout.p" names."""
    owner, _, attribute = path.rpartition(".")
    return owner, attribute


def own_dropouts(model: nn.Module, config: "SliceOutConfig") -> dict[str, float]:
    """The model's own dropouts on the blocks that a config slices: the attribute's path -> that block's rate.

    Where blocks share one, the highest of their rates.

    Raises:
        ValueError: As `choose_blocks`.
    """
    chosen = choose_blocks(model, config)
    rates = block_rates(all_blocks(model, config), config)
    result: dict[str, float] = {}
    for block in chosen:
        for path in map(block.path, block.block.dropouts):
            result[path] = max(result.get(path, 0.0), rates[block.name])
    return result


def _dropouts(model: nn.Module, found: list[FoundBlock], chosen: list[FoundBlock]) -> list[tuple[str, str, float]]:
    """Dropouts on sliced blocks, as (module, attribute, probability).

    One that also sits on a block which isn't sliced stays on, since that block would be left without.
    """
    users: dict[str, set[str]] = {}
    for block in found:
        for path in map(block.path, block.block.dropouts):
            users.setdefault(path, set()).add(block.name)
    sliced = {block.name for block in chosen}
    result, kept = [], []
    for path, names in users.items():
        owner, attribute = owner_of(path)
        value = getattr(model.get_submodule(owner), attribute)
        if value > 0 and names <= sliced:
            result.append((owner, attribute, value))
        elif value > 0 and names & sliced:
            kept.append(path)
    if kept:
        logger.warning(
            "Left on, since blocks that aren't sliced share them: dropout %s. Sliced blocks are dropped out twice.",
            ", ".join(kept),
        )
    return result

"""The groups of units of a model: from the names in `core/model/block_map.py` to widths, heads and columns."""

from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from torch import nn

from hf_efx.core.model.block_map import Block, FoundBlock, block_map, find_blocks
from hf_efx.core.model.masks import UnitGroup
from hf_efx.core.model.targets import default_targets
from hf_efx.core.model.weight_view import WeightView


def model_blocks(model: nn.Module, blocks: Iterable[Block] | None = None) -> list[FoundBlock]:
    """The blocks of a model; none of one without a row in the block map.

    Args:
        model: The model.
        blocks: Rows that describe its blocks, in the place of the block map's.

    Raises:
        ValueError: If a row fits nowhere.
    """
    if blocks is None:
        return find_blocks(model, block_map(model).blocks)
    rows = tuple(blocks)
    found = find_blocks(model, rows)
    for row in rows:
        if not any(block.block is row for block in found):
            raise ValueError(f"blocks has {row!r}, but {_why_nowhere(model, row)}.")
    return found


def _why_nowhere(model: nn.Module, row: Block) -> str:
    """Why no place of a model has the block of a row."""
    names, kind = [f".{name}" for name, _ in model.named_modules()], type(model).__name__
    members = (*row.emits, *row.norms, *row.reads)
    unknown = [name for name in members if not any(there.endswith(f".{name}") for there in names)]
    if unknown:
        return f"no module of {kind} is called {unknown[0]!r}"
    if find_blocks(model, [row]):
        return f"the rows before it name its modules in {kind} already"
    return f"no module of {kind} has all of {', '.join(members)} below it"


def unit_groups(model: nn.Module, blocks: Iterable[Block] | None = None) -> list[UnitGroup]:
    """All groups of units that a model has.

    Args:
        model: The model.
        blocks: Rows that describe its blocks, in the place of the block map's.

    Returns:
        A group for each block. Of a model without a row in the block map, a group for each default target (see
        `core.model.targets.default_targets`), whose units are the module's own output columns.

    Raises:
        ValueError: If a row fits nowhere, or the modules of a block don't fit together.
    """
    if blocks is None and not block_map(model).blocks:
        return [own_columns(model, name) for name in default_targets(model)]
    return [block_units(model, block) for block in model_blocks(model, blocks)]


def named(members: Sequence[str], config: Any) -> bool:
    """Whether a config chooses a block or group, by any of its modules.

    Args:
        members: Names of its modules.
        config: An object with the fields target_modules, exclude_modules, layers_to_transform and layers_pattern, as
            in `core.method_config.EfxMethodConfig`.
    """
    targets = config.target_modules
    if targets in (None, "all-linear"):
        targets = [name.rpartition(".")[2] for name in members]
    options = SimpleNamespace(
        target_modules=targets,
        exclude_modules=config.exclude_modules,
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
    )
    hits = [check_target_module_exists(options, name) for name in members]
    return any(hits) and not any(isinstance(hit, _ExcludedModule) for hit in hits)


def own_columns(model: nn.Module, name: str) -> UnitGroup:
    """The output columns of one module as units."""
    return UnitGroup(name, "layer", WeightView(model.get_submodule(name)).out_dim, {name: 1})


def block_units(model: nn.Module, block: FoundBlock) -> UnitGroup:
    """The units of a block: its features or channels, or its heads, where keys and values have fewer their groups.

    Raises:
        ValueError: If its modules don't fit together, or heads don't divide.
    """
    row, path = block.block, block.path
    stacked = {path(name): row.fused.get(name, block_map(model).blocks_of(path(name))) for name in row.emits}
    norms, reads = (tuple(map(path, names)) for names in (row.norms, row.reads))
    widths = {name: columns(model, name)[1] / times for name, times in stacked.items()}
    widths |= {name: columns(model, name)[0] for name in (*norms, *reads)}
    size = widths[block.name] if row.kind != "attention" else _heads(model, block, widths)
    for name, width in widths.items():
        if row.kind != "attention" and width != size:
            raise ValueError(
                f"Block {block.name!r} emits {size:g} units, but {name!r} has {width:g}: emitters, norms and readers "
                f"of a block have the same units. Name another block."
            )
    return UnitGroup(block.name, row.kind, int(size), stacked, norms, reads)


def _heads(model: nn.Module, block: FoundBlock, widths: dict[str, float]) -> int:
    """How many heads there are; where keys and values have fewer than queries, their number."""
    width = head_width(model, block)
    heads = {name: int(features // width) for name, features in widths.items()}
    size = max(1, min(heads.values()))
    for name, features in widths.items():
        if features != heads[name] * width or heads[name] % size:
            raise ValueError(
                f"{name!r} has {features:g} features, which isn't a whole number of heads of width {width}, or of "
                f"groups of {size}. Leave the block out with exclude_modules=[{block.name!r}], or correct its "
                f"head_dim or fused."
            )
    return size


def head_width(model: nn.Module, block: FoundBlock) -> int:
    """Features of one head of an attention block."""
    width = block.block.head_dim
    if isinstance(width, str):
        owner, attribute = owner_of(block.path(width))
        width = getattr(model.get_submodule(owner), attribute)
    assert isinstance(width, int)
    return width


def owner_of(path: str) -> tuple[str, str]:
    """The module and the attribute that a path such as "attn.attn_dropout.p" names."""
    owner, _, attribute = path.rpartition(".")
    return owner, attribute


def columns(model: nn.Module, name: str) -> tuple[int, int]:
    """Features or channels that a module takes and gives."""
    module = model.get_submodule(name)
    if isinstance(module, nn.BatchNorm2d):
        return module.num_features, module.num_features
    if isinstance(module, nn.Conv2d):
        return module.in_channels, module.out_channels
    view = WeightView(module)
    return view.in_dim, view.out_dim

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


def unit_groups(model: nn.Module, blocks: Iterable[Block] | None = None) -> list[UnitGroup]:
    """All groups of units that a model has.

    Args:
        model: The model.
        blocks: Rows that describe its blocks, in the place of the block map's.

    Returns:
        A group for each block. Of a model without a row in the block map, a group for each default target (see
        `core.adapter.default_targets`), whose units are the module's own output columns.

    Raises:
        ValueError: If a row fits nowhere, or the modules of a block don't fit together.
    """
    rows = block_map(model).blocks if blocks is None else tuple(blocks)
    if not rows:
        return [own_columns(model, name) for name in default_targets(model)]
    found = find_blocks(model, rows)
    for row in rows if blocks is not None else ():
        if not any(block.block is row for block in found):
            raise ValueError(
                f"blocks has {row!r}, but no module of {type(model).__name__} has all of "
                f"{', '.join((*row.emits, *row.norms, *row.reads))} below it, or other blocks took them."
            )
    return [block_units(model, block) for block in found]


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
    widths = {name: _widths(model, name)[1] / times for name, times in stacked.items()}
    widths |= {name: _widths(model, name)[0] for name in (*norms, *reads)}
    size = widths[block.name] if row.kind != "attention" else _heads(model, block, widths)
    for name, width in widths.items():
        if row.kind != "attention" and width != size:
            raise ValueError(
                f"Block {block.name!r} emits {size:g} units, but {name!r} has {width:g}: emitters, norms and readers "
                f"of a block have the same units. Name another block."
            )
    return UnitGroup(block.name, row.kind, int(size), stacked, norms, reads)


def _heads(model: nn.Module, block: FoundBlock, widths: dict[str, float]) -> int:
    head_dim = block.block.head_dim
    if isinstance(head_dim, str):
        owner, _, attribute = block.path(head_dim).rpartition(".")
        head_dim = getattr(model.get_submodule(owner), attribute)
    assert isinstance(head_dim, int)
    heads = {name: int(width // head_dim) for name, width in widths.items()}
    size = max(1, min(heads.values()))  # of keys and values, where queries share them
    for name, width in widths.items():
        if width != heads[name] * head_dim or heads[name] % size:
            raise ValueError(
                f"{name!r} has {width:g} features, which isn't a whole number of heads of width {head_dim}, or of "
                f"groups of {size}. Leave the block out with exclude_modules=[{block.name!r}], or correct its "
                f"head_dim or fused."
            )
    return size


def _widths(model: nn.Module, name: str) -> tuple[int, int]:
    """Features or channels that a module takes and gives."""
    module = model.get_submodule(name)
    if isinstance(module, nn.BatchNorm2d):
        return module.num_features, module.num_features
    if isinstance(module, nn.Conv2d):
        return module.in_channels, module.out_channels
    view = WeightView(module)
    return view.in_dim, view.out_dim

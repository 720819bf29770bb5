"""Units that are dropped, pruned and taken out as one: which a config chooses, and where their weights lie."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_efx.core.model.block_map import Block
from hf_efx.core.model.block_units import named, unit_groups
from hf_efx.core.model.masks import UnitGroup
from hf_efx.core.model.method_config import EfxMethodConfig
from hf_efx.core.model.targets import check_entries, unsuitable, weight_owners


def chosen_groups(model: nn.Module, targets: EfxMethodConfig, blocks: Iterable[Block] | None) -> list[UnitGroup]:
    """The groups of units that the options name; by default those all of whose modules can be changed."""
    found = find_groups(model, blocks)
    by_default = targets.target_modules in (None, "all-linear") and blocks is None
    owners = weight_owners(model)
    reasons = {group.name: group_unsuitable(model, group, owners) for group in found}
    chosen = [g for g in found if not (by_default and reasons[g.name]) and named(g.members, targets)]
    for group in chosen:
        if reasons[group.name]:
            raise ValueError(
                f"{reasons[group.name]}. Leave its block out with exclude_modules=[{group.members[0]!r}]."
            )
    if not chosen:
        there = ", ".join(group.name for group in found[:6])
        raise ValueError(
            f"target_modules={targets.target_modules!r}, exclude_modules={targets.exclude_modules!r} leave no units "
            f"of {type(model).__name__} to prune. Its blocks are called by their first modules, among others: "
            f"{there or 'none (name them with blocks=[Block(...)])'}."
        )
    check_entries(targets, (name for group in chosen for name in group.members), "in a group of units that is chosen")
    return chosen


def find_groups(model: nn.Module, blocks: Iterable[Block] | None) -> list[UnitGroup]:
    """All groups of units of a model, see `core.block_units.unit_groups`.

    Raises:
        ValueError: If a row fits nowhere, or one of its modules holds no plain matrix.
    """
    try:
        return unit_groups(model, blocks)
    except TypeError as error:
        raise ValueError(
            f"Units can't be found where a layer's weight isn't one plain matrix: {error} Call "
            f"hf_efx.merge_and_unload(model) on a factorised model, or unload(model) on one with SliceOut, first."
        ) from error


def group_unsuitable(model: nn.Module, group: UnitGroup, owners: dict[int, list[str]]) -> str | None:
    """Why the units of a group can't be pruned, naming the module in the way; None if they can (see `unsuitable`)."""
    for name in group.members:
        module = model.get_submodule(name)
        if name in group.norms:
            reason = None if isinstance(module, nn.BatchNorm2d) else f"it is a {type(module).__name__}"
        else:
            reason = unsuitable(model, name, module, owners)
        if reason:
            return f"Units of {group.name!r} can't be pruned: module {name!r} can't be changed, since {reason}"
    return None


def planned_groups(plan: Mapping[str, Mapping[str, Any]]) -> list[UnitGroup]:
    """The groups that a plan of units describes, under the names of its modules.

    Raises:
        ValueError: If it says what this version doesn't know.
    """
    for name, spec in plan.items():
        unknown = sorted(set(spec) - {"emits", "scales", "reads"}) if isinstance(spec, dict) else [spec]
        if unknown:
            raise ValueError(
                f"config.efx says {spec!r} of module {name!r}, where {unknown[0]!r} is unknown. If a newer hf_efx "
                f"wrote it, upgrade hf_efx."
            )
    groups = []
    for first, spec in plan.items():
        if "size" not in spec.get("emits", {}):
            continue
        units = spec["emits"]["units"]

        def members(role: str, units: int = units) -> list[str]:
            return [name for name, spec in plan.items() if spec.get(role, {}).get("units") == units]

        emits = {name: plan[name]["emits"]["stacked"] for name in members("emits")}
        size, kind = spec["emits"]["size"], spec["emits"]["kind"]
        groups.append(UnitGroup(first, kind, size, emits, tuple(members("scales")), tuple(members("reads"))))
    return groups


def out_features(module: nn.Module) -> int:
    """Features or channels that a Linear, Conv1D or Conv2d gives."""
    weight: Any = module.weight
    return weight.shape[1 if isinstance(module, Conv1D) else 0]


def in_features(module: nn.Module) -> int:
    """Features or channels that a Linear, Conv1D or Conv2d takes."""
    weight: Any = module.weight
    return weight.shape[0 if isinstance(module, Conv1D) else 1]


def along(columns: torch.Tensor, module: nn.Module, reads: bool) -> torch.Tensor:
    """A value for each output (`reads`: input) of a module, spread over its weight's shape: a view."""
    weight: Any = module.weight
    dim = int(reads != isinstance(module, Conv1D))
    return columns.view([-1 if i == dim else 1 for i in range(weight.dim())]).expand_as(weight)

"""Takes the units that pruning emptied out of a model for real: smaller matrices, an ordinary config, equal outputs.

A unit goes where nothing reads it, that is, where the inputs of its readers are all zero: what its emitters give is
then of no account. Transformers builds all layers of a stack by one width, so its models shrink by equal counts, which
`prune(granularity="unit")` gives with scope "column" or "layer".
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_efx.core.model.adapter import unload
from hf_efx.core.model.block_map import Block
from hf_efx.core.model.masks import UnitGroup, unit_columns
from hf_efx.core.model.pruned import empty_outputs
from hf_efx.core.model.record import mark_pruned, pruned_modules
from hf_efx.core.model.swap import refuse_offloaded
from hf_efx.core.model.targets import unsuitable
from hf_efx.targeted_dropout.pruning import check_model, find_groups, in_features, out_features, whole

logger = logging.getLogger(__name__)

ModelT = TypeVar("ModelT", bound=nn.Module)


@dataclass(frozen=True)
class Widths:
    """How a config says the widths of some blocks.

    Attributes:
        pattern: A regular expression that finds the blocks among their names.
        width: The field that holds the FFN's width.
        heads: Fields that count heads, each a multiple of the heads (or groups of heads) that there are.
        head_dim: The field that holds a head's width, which then stays.
        attributes: Attributes of an attention that count its heads.
    """

    pattern: str
    width: str | None = None
    heads: tuple[str, ...] = ()
    head_dim: str | None = None
    attributes: tuple[str, ...] = ()


_HEADS = Widths(r"q_proj$", heads=("num_attention_heads", "num_key_value_heads"), head_dim="head_dim")
_LLAMA = (Widths(r"gate_proj$", "intermediate_size"), _HEADS)

# By model type. What isn't here can't be said: GPT-2, BERT and Marian derive a head's width from the number of heads,
# T5 adds one position bias in all layers, and a ResNet's widths follow from those of its stages.
WIDTHS: dict[str, tuple[Widths, ...]] = {
    "gpt2": (Widths(r"c_fc$", "n_inner"),),
    "bert": (Widths(r"intermediate\.dense$", "intermediate_size"),),
    "vit": (
        Widths(r"fc1$", "intermediate_size"),
        Widths(r"q_proj$", heads=("num_attention_heads",), head_dim="head_dim", attributes=("num_attention_heads",)),
    ),
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "t5": (Widths(r"DenseReluDense\.wi(_0)?$", "d_ff"),),
    "marian": (Widths(r"encoder\..*fc1$", "encoder_ffn_dim"), Widths(r"decoder\..*fc1$", "decoder_ffn_dim")),
}


@dataclass
class _Cut:
    """What is taken out: of each group the kept units, and the config's new values."""

    keep: dict[str, torch.Tensor] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)


def shrink(model: ModelT, *, blocks: Sequence[Block] | None = None) -> ModelT:
    """Removes the units that nothing reads any more, as `prune(model, fraction, "unit")` leaves them.

    Training-time methods are taken off (`unload`), since they go by the old widths. Parameters are new ones: make the
    optimizer afterwards. A transformers model keeps its class, and its config says the new widths: GPT-2's `n_inner`,
    `intermediate_size` of BERT, ViT, Llama and Qwen2, T5's `d_ff`, Marian's two; plain transformers loads it. Heads go
    where the config can say so (Llama, Qwen2, ViT: equally many of each layer); elsewhere they stay as zeros, with a
    warning.

    Args:
        model: The pruned model. It is changed in place.
        blocks: Rows that describe the blocks of units, in the place of the block map's. A plain module needs them, and
            may have another width in each block.

    Returns:
        The same object.

    Raises:
        ValueError: If there is nothing to remove, layers that share a width have kept unequal counts, or a module
            can't be changed; the reason is named, and the model is unchanged.
    """
    check_model(model)
    with whole(model):
        groups = [group for group in find_groups(model, blocks) if group.reads]
        kept = {group.name: ~_unread(model, group) for group in groups}
        groups = [group for group in groups if not kept[group.name].all()]
        _check_groups(model, groups, kept)
        cut = _plan(model, groups, kept)
    unload(model)
    pruned = pruned_modules(model)
    with torch.no_grad():
        for group in groups:
            if group.name in cut.keep:
                _slice(model, group, cut.keep[group.name])
    _tell(model, cut)
    mark_pruned(model, _still_pruned(model, pruned))
    return model


def _unread(model: nn.Module, group: UnitGroup) -> torch.Tensor:
    """Which units have inputs of zero alone in all readers, [size]."""
    empty = torch.ones(group.size, dtype=torch.bool)
    for name in group.reads:
        module: Any = model.get_submodule(name)
        weight = module.weight.detach()
        rows = weight if isinstance(module, Conv1D) else weight.transpose(0, 1)
        counts = rows.flatten(1).count_nonzero(1)  # [in]
        empty &= (counts.view(group.size, -1).sum(1) == 0).cpu()
    return empty


def _check_groups(model: nn.Module, groups: list[UnitGroup], kept: Mapping[str, torch.Tensor]) -> None:
    if not groups:
        raise ValueError(
            f"shrink: {type(model).__name__} has no units that could go, those whose readers are all zero: prune "
            f"first, with prune(model, fraction, granularity='unit')"
            + ("." if isinstance(model, PreTrainedModel) else ", and name the blocks in both: blocks=[Block(...)].")
        )
    for group in groups:
        for name in group.members:
            module = model.get_submodule(name)
            refuse_offloaded(name, module)
            reason = None if name in group.norms else unsuitable(model, name, module)
            if reason:
                raise ValueError(f"shrink: module {name!r} can't be made smaller, since {reason}.")
        if not kept[group.name].any():
            raise ValueError(f"shrink: no unit of {group.name!r} is left. Prune a smaller fraction of the model.")


def _plan(model: nn.Module, groups: list[UnitGroup], kept: Mapping[str, torch.Tensor]) -> _Cut:
    if not isinstance(model, PreTrainedModel):
        return _Cut(keep={group.name: kept[group.name] for group in groups})
    cut, left = _Cut(), {}
    rows = WIDTHS.get(model.config.model_type, ())
    everything = find_groups(model, None)
    for group in groups:
        row = next((row for row in rows if re.search(row.pattern, group.name)), None)
        if row is None:
            left[group.name] = _why_not(model, group)
            continue
        alike = [g for g in everything if re.search(row.pattern, g.name)]
        count = _common_count(row, alike, kept)
        cut.keep[group.name] = kept[group.name]
        if group.kind != "attention":
            cut.fields[str(row.width)] = count
            continue
        old = {name: getattr(model.config, name) for name in row.heads}
        cut.fields |= {name: value * count // group.size for name, value in old.items()}
        owner = group.name.rpartition(".")[0]
        cut.fields[str(row.head_dim)] = model.get_submodule(owner).head_dim
        cut.attributes[owner] = {name: cut.fields[name] for name in row.attributes}
    if not cut.keep:
        name, reason = next(iter(left.items()))
        raise ValueError(f"shrink: the empty units of {name!r} can't go, since {reason}.")
    for name, reason in left.items():
        logger.warning("The empty units of %s stay, as zeros: %s.", name, reason)
    try:
        type(model.config).from_dict({**model.config.to_dict(), **cut.fields})
    except (ValueError, StrictDataclassError) as error:
        raise ValueError(f"shrink: {type(model.config).__name__} refuses {cut.fields}: {error}") from error
    return cut


def _why_not(model: PreTrainedModel, group: UnitGroup) -> str:
    """Why a transformers model without a row for a group can't be built without some of its units."""
    name = type(model.config).__name__
    if group.kind == "attention":
        return f"{name} has no field for fewer heads of the same width"
    return f"{name} has no field for this width"


def _common_count(row: Widths, alike: list[UnitGroup], kept: Mapping[str, torch.Tensor]) -> int:
    """The number of units that every layer keeps.

    Raises:
        ValueError: If it isn't the same number.
    """
    counts = {group.name: int(kept[group.name].sum()) for group in alike}
    if len(set(counts.values())) > 1:
        few, many = min(counts, key=lambda n: counts[n]), max(counts, key=lambda n: counts[n])
        word = row.width or row.heads[0]
        raise ValueError(
            f"shrink: {few!r} keeps {counts[few]} units and {many!r} {counts[many]}, but the config says {word!r} "
            f"once for all layers. Prune all of them with scope='layer', which leaves equal counts (not 'global')."
        )
    return next(iter(counts.values()))


def _slice(model: nn.Module, group: UnitGroup, keep: torch.Tensor) -> None:
    """Takes units out of all modules of a group."""
    for name, stacked in group.emits.items():
        module: Any = model.get_submodule(name)
        columns = unit_columns(keep, out_features(module), stacked)
        _set(module, "weight", _select(module.weight, int(isinstance(module, Conv1D)), columns))
        if module.bias is not None:
            _set(module, "bias", _select(module.bias, 0, columns))
        size = int(columns.sum())
        for attribute in ("out_features", "out_channels", "nf"):
            if hasattr(module, attribute):
                setattr(module, attribute, size)
    for name in group.norms:
        norm: Any = model.get_submodule(name)
        for attribute in ("weight", "bias", "running_mean", "running_var"):
            if getattr(norm, attribute) is not None:
                _set(norm, attribute, _select(getattr(norm, attribute), 0, keep))
        norm.num_features = int(keep.sum())
    for name in group.reads:
        reader: Any = model.get_submodule(name)
        columns = unit_columns(keep, in_features(reader))
        _set(reader, "weight", _select(reader.weight, int(not isinstance(reader, Conv1D)), columns))
        for attribute in ("in_features", "in_channels", "nx"):
            if hasattr(reader, attribute):
                setattr(reader, attribute, int(columns.sum()))


def _select(tensor: torch.Tensor, dim: int, columns: torch.Tensor) -> torch.Tensor:
    index = columns.nonzero()[:, 0].to(tensor.device)
    return tensor.detach().index_select(dim, index)


def _set(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Puts a smaller tensor in the place of a parameter or buffer."""
    old = getattr(module, name)
    new = nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value
    setattr(module, name, new)


def _tell(model: nn.Module, cut: _Cut) -> None:
    """Writes the new widths where the model's config and its modules have the old ones."""
    for config in {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values():
        for name, value in cut.fields.items():
            setattr(config, name, value)
    module: Any
    for module in model.modules():
        if "intermediate_size" in vars(module) and "intermediate_size" in cut.fields:
            module.intermediate_size = cut.fields["intermediate_size"]
    for owner, values in cut.attributes.items():
        for name, value in values.items():
            setattr(model.get_submodule(owner), name, value)


def _still_pruned(model: nn.Module, pruned: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The modules that have zeros left to hold."""
    result = {}
    for name, spec in pruned.items():
        module: Any = model.get_submodule(str(spec.get("follows", name)))
        zeros = empty_outputs(module) if "follows" in spec else module.weight == 0
        if bool(zeros.any()):
            result[name] = dict(spec)
    return result

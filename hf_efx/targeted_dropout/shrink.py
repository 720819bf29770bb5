"""Takes the units that pruning emptied out of a model for real: smaller matrices, an ordinary config, equal outputs.

A unit goes where nothing reads it, that is, where the inputs of its readers are all zero: what its emitters give is
then of no account. Transformers builds all layers of a stack by one width, so its models shrink by equal counts, which
`prune(granularity="unit")` gives with scope "column" or "layer".
"""

import copy
import itertools
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_efx.core.model.adapter import unload
from hf_efx.core.model.block_map import BLOCK_MAPS, Block
from hf_efx.core.model.masks import UnitGroup, unit_columns
from hf_efx.core.model.pruned import empty_outputs
from hf_efx.core.model.record import check_pruned, mark_pruned
from hf_efx.core.model.swap import refuse_offloaded
from hf_efx.core.model.targets import unsuitable, weight_owners
from hf_efx.core.model.weight_view import DENSE_TYPES
from hf_efx.core.model.wrappers import inner_model, refuse_data_parallel, unwrap_model
from hf_efx.core.scoring.scoring_state import scoring_state
from hf_efx.targeted_dropout.plan import check_model, whole
from hf_efx.targeted_dropout.units import find_groups, in_features, out_features

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
    """What is taken out: the groups, of each the kept units, and the config's new values."""

    groups: list[UnitGroup] = field(default_factory=list)
    keep: dict[str, torch.Tensor] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)


def shrink(model: ModelT, *, blocks: Sequence[Block] | None = None, inputs: Any = None) -> ModelT:
    """Removes the units that nothing reads any more, as `prune(model, fraction, "unit")` leaves them.

    Training-time methods are taken off (`unload`), since they go by the old widths. Parameters are new ones: make the
    optimizer afterwards. A transformers model keeps its class, and its config says the new widths: GPT-2's `n_inner`,
    `intermediate_size` of BERT, ViT, Llama and Qwen2, T5's `d_ff`, Marian's two; plain transformers loads it. Heads go
    where the config can say so (Llama, Qwen2, ViT: equally many of each layer); elsewhere they stay as zeros, with a
    warning.

    Args:
        model: The pruned model, or what wraps it. It is changed in place.
        blocks: Rows that describe the blocks of units, in the place of the block map's. A plain module needs them, and
            may have another width in each block.
        inputs: What the model is called with: a dict of named arguments, a tuple, or one tensor. Then a smaller copy
            has to give the same outputs on them before the model is changed. It is asked for where a module of one's
            own could stand between the modules of a block.

    Returns:
        The same object.

    Raises:
        ValueError: If there is nothing to remove, layers that share a width have kept unequal counts, a module can't
            be changed, or the smaller model wouldn't run, load or give the same outputs; the reason is named, and the
            model is unchanged.
    """
    check_model(unwrap_model(model))
    refuse_data_parallel(model, "shrink")
    inner = inner_model(model)
    check_model(inner)
    with whole(inner):
        groups = _readable(inner, blocks)
        kept = {group.name: ~_unread(inner, group) for group in groups}
        groups = [group for group in groups if not kept[group.name].all()]
        _check_groups(inner, groups, kept)
        cut = _plan(inner, groups, kept)
        if inputs is None:
            _refuse_between(inner, cut.groups)
        _check_skeleton(inner, cut)
    if inputs is not None:
        _try_out(inner, cut, inputs)
    _take_out(inner, cut)
    return model


def _readable(model: nn.Module, blocks: Sequence[Block] | None) -> list[UnitGroup]:
    """The groups whose readers are known."""
    known = getattr(getattr(model, "config", None), "model_type", None) in BLOCK_MAPS
    if isinstance(model, PreTrainedModel) and not known:
        raise ValueError(
            f"shrink: hf_efx doesn't know which fields of {type(model.config).__name__} say the widths of its blocks "
            f"(it knows those of {', '.join(WIDTHS)}), so that a smaller model couldn't be loaded. Its pruned units "
            f"stay as zeros."
        )
    return [group for group in find_groups(model, blocks) if group.reads]


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
    owners = weight_owners(model)
    for group in groups:
        for name in group.members:
            module = model.get_submodule(name)
            refuse_offloaded(name, module)
            reason = None if name in group.norms else unsuitable(model, name, module, owners)
            if reason:
                raise ValueError(f"shrink: module {name!r} can't be made smaller, since {reason}.")
        if not kept[group.name].any():
            raise ValueError(f"shrink: no unit of {group.name!r} is left. Prune a smaller fraction of the model.")


def _plan(model: nn.Module, groups: list[UnitGroup], kept: Mapping[str, torch.Tensor]) -> _Cut:
    if not isinstance(model, PreTrainedModel):
        return _Cut(groups, {group.name: kept[group.name] for group in groups})
    cut, left = _Cut(), {}
    rows = WIDTHS.get(model.config.model_type, ())
    everything = find_groups(model, None)
    for group in groups:
        row = next((row for row in rows if re.search(row.pattern, group.name)), None)
        if row is None:
            what = "for fewer heads of the same width" if group.kind == "attention" else "for this width"
            left[group.name] = f"{type(model.config).__name__} has no field {what}"
            continue
        alike = [g for g in everything if re.search(row.pattern, g.name)]
        count = _common_count(row, alike, kept)
        cut.groups.append(group)
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
    return cut


def _common_count(row: Widths, alike: list[UnitGroup], kept: Mapping[str, torch.Tensor]) -> int:
    """The number of units that every layer keeps.

    Raises:
        ValueError: If it isn't the same number.
    """
    counts = {group.name: int(kept[group.name].sum()) if group.name in kept else group.size for group in alike}
    if len(set(counts.values())) > 1:
        few, many = min(counts, key=lambda n: counts[n]), max(counts, key=lambda n: counts[n])
        word = row.width or row.heads[0]
        raise ValueError(
            f"shrink: {few!r} keeps {counts[few]} units and {many!r} {counts[many]}, but the config says {word!r} "
            f"once for all layers. Prune all of them with scope='layer', which leaves equal counts (not 'global')."
        )
    return next(iter(counts.values()))


def _refuse_between(model: nn.Module, groups: Sequence[UnitGroup]) -> None:
    """Raises where a module beside a block has a number for each of its units, and may have to lose some too."""
    for group in (one for one in groups if one.kind != "attention"):  # there units are heads, not columns
        root = _common(group.members)
        members = {model.get_submodule(name) for name in group.members}
        for name, module in model.get_submodule(root).named_modules(prefix=root):
            mixes = isinstance(module, (*DENSE_TYPES, nn.Embedding)) and getattr(module, "groups", 1) == 1
            tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            if module not in members and not mixes and any(group.size in tensor.shape for tensor in tensors):
                raise ValueError(
                    f"shrink: {name or 'the model itself'} ({type(module).__name__}) beside {group.name!r} holds "
                    f"{group.size} numbers, as many as there are units. If it stands between emitters and readers, "
                    f"the units can't go; if not, pass inputs=..., on which a smaller copy is tried first."
                )


def _common(names: Sequence[str]) -> str:
    """The name of the module that holds all of these."""
    owners = [name.split(".")[:-1] for name in names]
    levels = zip(*owners, strict=False)
    return ".".join(level[0] for level in itertools.takewhile(lambda level: len(set(level)) == 1, levels))


def _check_skeleton(model: nn.Module, cut: _Cut) -> None:
    """Builds a transformers model of the new widths, without memory, and compares shapes.

    Raises:
        ValueError: If the smaller model couldn't be loaded.
    """
    if not isinstance(model, PreTrainedModel):
        return
    name = type(model.config).__name__
    try:
        config = type(model.config).from_dict({**model.config.to_dict(), **cut.fields})
        with torch.device("meta"):
            skeleton = type(model)(config)
    except (ValueError, TypeError, RuntimeError, StrictDataclassError) as error:
        raise ValueError(f"shrink: {name} refuses {cut.fields}: {error}") from error
    wanted = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    for group in cut.groups:
        for owner, attribute, dim, columns in _cuts(model, group, cut.keep[group.name]):
            wanted[f"{owner}.{attribute}"][dim] = int(columns.sum())
    for key, tensor in skeleton.state_dict().items():
        if wanted.get(key, list(tensor.shape)) != list(tensor.shape):
            raise ValueError(
                f"shrink: with {cut.fields} in {name}, {type(model).__name__} has {key} of shape "
                f"{list(tensor.shape)}, where {wanted[key]} would be left. The blocks don't describe this model."
            )


def _try_out(model: nn.Module, cut: _Cut, inputs: Any) -> None:
    """Raises where a smaller copy doesn't give the model's outputs."""
    small = copy.deepcopy(model)
    _take_out(small, cut)
    with scoring_state(model), scoring_state(small):
        expected = _outputs(model, inputs)
        try:
            found = _outputs(small, inputs)
        except Exception as error:
            raise ValueError(
                f"shrink: without its pruned units {type(model).__name__} doesn't run on the inputs: "
                f"{type(error).__name__}: {error}. Something between emitters and readers goes by the old width."
            ) from error
    for old, new in zip(expected, found, strict=True):
        scale = float(old.abs().max()) if old.numel() else 0.0
        if old.shape != new.shape or not torch.allclose(old, new, rtol=0, atol=1e-3 * scale):
            raise ValueError(
                f"shrink: without its pruned units {type(model).__name__} gives other outputs on the inputs. "
                f"Something between emitters and readers mixes the units."
            )


def _outputs(model: nn.Module, inputs: Any) -> list[torch.Tensor]:
    if isinstance(inputs, Mapping):
        output = model(**inputs)
    else:
        output = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    return [leaf for leaf in tree_leaves(output) if torch.is_tensor(leaf) and leaf.is_floating_point()]


def _take_out(model: nn.Module, cut: _Cut) -> None:
    unload(model)
    pruned = check_pruned(model)
    with torch.no_grad():
        for group in cut.groups:
            for owner, attribute, dim, columns in list(_cuts(model, group, cut.keep[group.name])):
                module = model.get_submodule(owner)
                _set(module, attribute, _select(getattr(module, attribute), dim, columns))
            _tell_modules(model, group)
    _tell(model, cut)
    mark_pruned(model, _still_pruned(model, pruned))


def _cuts(model: nn.Module, group: UnitGroup, keep: torch.Tensor) -> Iterator[tuple[str, str, int, torch.Tensor]]:
    """What goes of the modules of a group: module, tensor, dimension, and which of its entries are kept."""
    for name, stacked in group.emits.items():
        module: Any = model.get_submodule(name)
        columns = unit_columns(keep, out_features(module), stacked)
        yield name, "weight", int(isinstance(module, Conv1D)), columns
        if module.bias is not None:
            yield name, "bias", 0, columns
    for name in group.norms:
        norm: Any = model.get_submodule(name)
        for attribute in ("weight", "bias", "running_mean", "running_var"):
            if getattr(norm, attribute) is not None:
                yield name, attribute, 0, keep
    for name in group.reads:
        reader: Any = model.get_submodule(name)
        yield name, "weight", int(not isinstance(reader, Conv1D)), unit_columns(keep, in_features(reader))


def _tell_modules(model: nn.Module, group: UnitGroup) -> None:
    """Writes the widths of a group's modules where they say them."""
    for name in group.members:
        module: Any = model.get_submodule(name)
        if name in group.norms:
            module.num_features = module.running_mean.shape[0] if module.weight is None else module.weight.shape[0]
        elif isinstance(module, Conv1D):
            module.nx, module.nf = module.weight.shape
        elif isinstance(module, nn.Conv2d):
            module.out_channels, module.in_channels = module.weight.shape[:2]
        else:
            module.out_features, module.in_features = module.weight.shape


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

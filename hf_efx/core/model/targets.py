"""Which modules of a model a config acts on, and why a module may not be changed."""

import copy
import difflib
import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.parametrize import is_parametrized

from hf_efx.core.model.weight_view import DENSE_TYPES, is_factorised
from hf_efx.core.model.wrappers import inner_model

logger = logging.getLogger(__name__)

# Their forward reads the weights of these children directly, in a fused fast path.
_FUSED_PARENTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def default_targets(model: nn.Module) -> list[str]:
    """Every Linear, Conv1D and Conv2d that is no embedding, stem or head: what a config without targets acts on.

    Heads are what a transformers model holds outside its base model, its output embeddings, and modules called
    `classifier`, `score` or `lm_head`; in a plain module the last Linear. The stem is the first Conv2d. Modules whose
    weight is shared with another module, grouped convolutions and modules that a fused kernel of torch reads are left
    out too. Names are those inside wrappers, see `inner_model`.
    """
    model = inner_model(model)
    layers = {name: m for name, m in model.named_modules() if type(m) in DENSE_TYPES}
    owners = weight_owners(model)
    skipped = {name for name, m in layers.items() if unsuitable(model, name, m, owners)}
    skipped |= _heads(model, layers)
    skipped |= set([name for name, m in layers.items() if isinstance(m, nn.Conv2d)][:1])
    return [name for name in layers if name not in skipped]


def _heads(model: nn.Module, layers: dict[str, nn.Module]) -> set[str]:
    if not hasattr(model, "base_model_prefix"):
        return set([name for name, m in layers.items() if isinstance(m, nn.Linear)][-1:])
    output: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # pyright: ignore
    base = f"{model.base_model_prefix}."
    has_base = any(name.startswith(base) for name in layers)
    return {
        name
        for name, m in layers.items()
        if m is output
        or (has_base and not name.startswith(base))
        or name.rpartition(".")[2] in ("classifier", "score", "lm_head")
    }


def weight_owners(model: nn.Module) -> dict[int, list[str]]:
    """The names of each parameter, by its id: several where it is tied."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    return owners


def _is_parametrised(module: nn.Module) -> bool:
    """Whether a layer's weight is computed: by torch's parametrizations, or by pruning and older norms."""
    if is_parametrized(module):
        return issubclass(type(module), DENSE_TYPES)
    return type(module) in DENSE_TYPES and "weight" not in module._parameters


def unsuitable(
    model: nn.Module, name: str, module: nn.Module, owners: dict[int, list[str]] | None = None
) -> str | None:
    """Why no method may change this module, None if it may.

    Args:
        model: The model.
        name: The module's name in it.
        module: The module.
        owners: `weight_owners` of the model, for who asks about many modules; None finds them.
    """
    if _is_parametrised(module):
        return "its weight is no parameter (weight norm, spectral norm and pruning compute it): remove that first"
    if type(module) not in DENSE_TYPES:
        if hasattr(module, "base_layer"):
            return "peft has already adapted it: merge that adapter first, or put hf_efx on first and LoRA on top"
        if is_factorised(module):
            return "it is already factorised"
        if (method := _acting_method(module)) is not None:
            return f"{method} acts on it already: part the two by target_modules, or call hf_efx.unload(model) first"
        kind = type(module).__name__
        return f"it is a {kind}, not a plain Linear, Conv1D or Conv2d (quantised or custom layers aren't)"
    own_forward = vars(module).get("_old_forward", vars(module).get("forward"))  # the former under accelerate's hooks
    if own_forward is not None and getattr(own_forward, "__func__", None) is not type(module).forward:
        return "its forward was replaced on the instance, and would go on to read a dense weight"
    weight: torch.Tensor = module.weight  # pyright: ignore[reportAssignmentType]
    if isinstance(weight, DTensor):
        return "its weight is sharded: call this before the model is wrapped"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}: quantised layers can't be changed, load the model unquantised"
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        return f"it is a grouped convolution (groups={module.groups})"
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, _FUSED_PARENTS):
        return f"its parent {type(parent).__name__} reads its weight in a fused kernel"
    names = (weight_owners(model) if owners is None else owners).get(id(weight), [])
    if len(names) > 1:
        return f"its weight is tied ({', '.join(sorted(names))}): changing one side would break the tie silently"
    return None


def _acting_method(module: nn.Module) -> str | None:
    """The training-time method whose class the module has been given, None if none."""
    return getattr(type(module), "efx_method", None)


def match_targets(
    model: nn.Module, config: PeftConfig, layers: Mapping[str, nn.Module] | None = None
) -> dict[str, nn.Module]:
    """The modules that a config acts on, by name.

    Args:
        model: The model.
        config: A method's config; its target_modules, exclude_modules, layers_to_transform and layers_pattern choose.
        layers: The modules to choose from, by name; all of the model's if None.

    Raises:
        ValueError: If nothing matches, a name matches nothing, or a module that was named can't be changed (with the
            reason).
    """
    check_names(model, config)
    layers = dict(model.named_modules()) if layers is None else layers
    if getattr(config, "target_modules", None) in (None, "all-linear"):
        names = _chosen_by_default(model, config)
    else:
        names = [name for name in layers if name and chooses(config, name)]
    owners = weight_owners(model)
    found = {n: layers[n] for n in names if n in layers and _changeable(model, config, n, layers[n], owners)}
    if not found:
        raise ValueError(_nothing_matches(model, config))
    check_entries(config, found, "in the layers to transform, or left to them by modules_to_save")
    return found


def check_entries(config: Any, chosen: Iterable[str], which: str) -> None:
    """Refuses an entry of target_modules that stands for none of the chosen modules, unless it is excluded by name.

    Args:
        config: A method's config.
        chosen: Names of those modules.
        which: What such a module must be.

    Raises:
        ValueError: The entry.
    """
    names, entries = list(chosen), config.target_modules
    for entry in entries if isinstance(entries, list) else ():
        if not _under(entry, names) and entry not in (config.exclude_modules or ()):
            raise ValueError(
                f"{type(config).__name__}: target_modules={entries!r}: no module called {entry!r} is {which}, so it "
                f"would have no effect. Take it out, or choose others there."
            )


def chooses(config: PeftConfig, name: str) -> bool:
    """Whether target_modules choose a module of that name, and exclude_modules don't take it out."""
    hit = check_target_module_exists(config, name)
    return bool(hit) and not isinstance(hit, _ExcludedModule)


def _chosen_by_default(model: nn.Module, config: PeftConfig) -> list[str]:
    """The default targets that are neither excluded nor in another layer.

    Raises:
        ValueError: If a training-time method acts on some of the model already.
    """
    for name, module in model.named_modules():
        if (method := _acting_method(module)) is not None:
            raise ValueError(
                f"{type(config).__name__}: {method} acts on module {name!r} and others already. Name the modules that "
                f"are left in target_modules, or call hf_efx.unload(model) first."
            )
    # peft's wrapper holds a default target of an earlier adapter one level further down.
    names = [name.removesuffix(".base_layer") for name in default_targets(model)]
    options: Any = copy.copy(config)
    # As suffixes: peft takes a module whose whole name is listed without looking at layers_to_transform.
    options.target_modules = sorted({name.rpartition(".")[2] for name in names})
    if options.layers_to_transform is not None:
        names = [name for name in names if "." in name]
    return [name for name in names if chooses(options, name)]


def _changeable(
    model: nn.Module, config: PeftConfig, name: str, module: nn.Module, owners: dict[int, list[str]]
) -> bool:
    """Whether a chosen module is a layer; containers, which a pattern such as ".*mlp.*" also matches, aren't.

    Raises:
        ValueError: If it is a layer that no method may change.
    """
    reason = unsuitable(model, name, module, owners)
    if reason and _is_layer(module):
        raise ValueError(
            f"{type(config).__name__}: module {name!r} can't be changed, since {reason}. Leave it out with "
            f"exclude_modules."
        )
    return not reason


def _is_layer(module: nn.Module) -> bool:
    return hasattr(module, "weight") or hasattr(module, "base_layer")


def check_names(model: nn.Module, config: Any) -> None:
    """Refuses names in target_modules and the three fields beside it that match nothing in the model.

    Beside others that match they would be settings that silently aren't there.

    Args:
        model: The model.
        config: An object with these fields, as every method's config has them.

    Raises:
        ValueError: The name, and what it may have meant.
    """
    layers = [name for name, module in model.named_modules() if name and _is_layer(module)]
    who = type(config).__name__
    for field in ("target_modules", "exclude_modules"):
        value = getattr(config, field)
        if value in (None, "all-linear"):
            continue
        if isinstance(value, str):
            if not any(re.fullmatch(value, name) for name in layers):
                way_out = f" To name modules write {field}=[{value!r}]." if _under(value, layers) else ""
                raise ValueError(
                    f"{who}: {field}={value!r} matches no module of {type(model).__name__}: a string is one regular "
                    f"expression over whole names, such as {', '.join(map(repr, layers[:2]))}.{way_out}"
                )
            continue
        for entry in value:
            if not _under(entry, layers):
                raise ValueError(f"{who}: {field}={value!r}: {_no_layer(model, entry, layers)}")
    patterns = config.layers_pattern or ()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if not any(re.search(rf"(^|\.){pattern}\.\d+\.", name) for name in layers):
            raise ValueError(
                f"{who}: layers_pattern={config.layers_pattern!r}: {type(model).__name__} has no list of layers that "
                f"is called {pattern!r}: write the name before a layer's number, such as 'h' for 'transformer.h.0'."
            )
    indices = config.layers_to_transform
    for index in [indices] if isinstance(indices, int) else indices or ():
        if not any(str(index) in name.split(".") for name in layers):
            raise ValueError(
                f"{who}: layers_to_transform={indices!r}: {index} matches no module of {type(model).__name__}."
            )


def _under(entry: str, names: Iterable[str]) -> list[str]:
    """The names that an entry of a list stands for: itself, or those that end in it."""
    return [name for name in names if f".{name}".endswith(f".{entry}")]


def _no_layer(model: nn.Module, entry: str, layers: list[str]) -> str:
    """Why an entry matches no layer, and what may have been meant."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if own := _under(entry, shapes):
        return f"{entry!r} is a parameter of shape {shapes[own[0]]}, not a module, and no method acts on it."
    ends = {name.rpartition(".")[2] for name in layers}
    if inside := {name.rpartition(".")[2] for name in layers if f".{entry}." in f".{name}"}:
        return f"{entry!r} holds layers and is none: name them ({', '.join(sorted(inside))})."
    near = difflib.get_close_matches(entry, ends | set(layers), n=3) or sorted(ends)[:8]
    return f"{entry!r} matches no module of {type(model).__name__}; did you mean one of {', '.join(near)}?"


def _nothing_matches(model: nn.Module, config: Any) -> str:
    there = [name for name, m in model.named_modules() if type(m) in DENSE_TYPES]
    return (
        f"{type(config).__name__}: target_modules={config.target_modules!r} (exclude_modules="
        f"{config.exclude_modules!r}, layers_to_transform={config.layers_to_transform!r}) matches no module of "
        f"{type(model).__name__}. It has, among others: {', '.join(there[:8]) or 'no Linear, Conv1D or Conv2d'}."
    )


def warn_of_skipped(model: nn.Module) -> None:
    """Warns of layers with a computed weight, and of much in three-dimensional weights: no method reaches either.

    The latter are the experts of mixture models (Mixtral and others hold them as parameters [experts, out, in], not as
    Linear modules) and Conv1d layers. Call it once where default targets are taken.

    Args:
        model: The model.
    """
    model = inner_model(model)
    computed = [name for name, module in model.named_modules() if _is_parametrised(module)]
    if computed:
        logger.warning(
            "Left alone by default, since weight norm, spectral norm or pruning computes their weights: %s. Make them "
            "plain first (torch.nn.utils.parametrize.remove_parametrizations or torch.nn.utils.prune.remove): "
            "transformers couldn't load such a model from a checkpoint either.",
            ", ".join(computed),
        )
    # A first dimension of 1 is a position embedding's, or a factor's.
    stacked = [p.numel() for p in model.parameters() if p.dim() == 3 and p.shape[0] > 1]
    share = sum(stacked) / max(1, sum(p.numel() for p in model.parameters()))
    if share >= 0.01:
        logger.warning(
            "%s holds %.0f%% of its weights in three-dimensional parameters (experts of a mixture, or Conv1d), which "
            "stay as they are: methods act on Linear, Conv1D and Conv2d modules alone.",
            type(model).__name__,
            100 * share,
        )

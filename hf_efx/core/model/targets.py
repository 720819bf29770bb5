"""Which modules of a model a config acts on, and why a module may not be changed."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_efx.core.model.weight_view import DENSE_TYPES

if TYPE_CHECKING:
    from hf_efx.core.model.method_config import EfxMethodConfig

# Their forward reads the weights of these children directly, in a fused fast path.
_FUSED_PARENTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def default_targets(model: nn.Module) -> list[str]:
    """Every Linear, Conv1D and Conv2d that is no embedding, stem or head: the default at all doors.

    Heads are what a transformers model holds outside its base model, its output embeddings, and modules called
    `classifier`, `score` or `lm_head`; in a plain module the last Linear. The stem is the first Conv2d. Modules whose
    weight is shared with another module, grouped convolutions and modules that a fused kernel of torch reads are left
    out too.
    """
    layers = {name: m for name, m in model.named_modules() if type(m) in DENSE_TYPES}
    skipped = {name for name, m in layers.items() if unsuitable(model, name, m)}
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


def unsuitable(model: nn.Module, name: str, module: nn.Module) -> str | None:
    """Why no method may change this module, None if it may."""
    if type(module) not in DENSE_TYPES:
        if hasattr(module, "base_layer"):
            return "peft has already adapted it: merge that adapter first, or put hf_efx on first and LoRA on top"
        if hasattr(module, "dense_class"):
            return "it is already factorised"
        if (method := _acting_method(module)) is not None:
            return f"{method} acts on it already: part the two by target_modules, or call hf_efx.unload(model) first"
        kind = type(module).__name__
        return f"it is a {kind}, not a plain Linear, Conv1D or Conv2d (quantised or custom layers aren't)"
    if "weight" not in module._parameters:
        return "its weight is no parameter (weight norm, spectral norm and pruning compute it): remove that first"
    own_forward = vars(module).get("_old_forward", vars(module).get("forward"))  # the former under accelerate's hooks
    if own_forward is not None and getattr(own_forward, "__func__", None) is not type(module).forward:
        return "its forward was replaced on the instance, and would go on to read a dense weight"
    weight: torch.Tensor = module.weight  # pyright: ignore[reportAssignmentType]
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}: quantised layers can't be changed, load the model unquantised"
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        return f"it is a grouped convolution (groups={module.groups})"
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, _FUSED_PARENTS):
        return f"its parent {type(parent).__name__} reads its weight in a fused kernel"
    owners = {n for n, p in model.named_parameters(remove_duplicate=False) if p is weight}
    if len(owners) > 1:
        return f"its weight is tied ({', '.join(sorted(owners))}): changing one side would break the tie silently"
    return None


def _acting_method(module: nn.Module) -> str | None:
    """The training-time method whose class the module has been given, None if none."""
    return getattr(type(module), "efx_method", None)


def match_targets(
    model: nn.Module, config: "EfxMethodConfig", layers: dict[str, nn.Module] | None = None
) -> dict[str, nn.Module]:
    """The modules that a config acts on, by name.

    Args:
        model: The model.
        config: Whose target_modules, exclude_modules and layers_to_transform choose.
        layers: The modules to choose from, by name; all of the model's if None.

    Raises:
        ValueError: If nothing matches, or a module that was named can't be changed (with the reason).
    """
    from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists

    by_default = config.target_modules in (None, "all-linear")
    defaults: set[str] = set()
    resolved = config
    if by_default:  # peft's wrapper holds a default target of an earlier adapter one level further down
        defaults = {name.removesuffix(".base_layer") for name in default_targets(model)}
        # As suffixes: peft takes a module whose whole name is listed without looking at layers_to_transform.
        suffixes = sorted({name.rpartition(".")[2] for name in defaults})
        resolved = type(config)(**{**config.method_fields(), "target_modules": suffixes})
        if config.layers_to_transform is not None:
            defaults = {name for name in defaults if "." in name}
        taken = [(name, method) for name, m in model.named_modules() if (method := _acting_method(m)) is not None]
        if taken:
            raise ValueError(
                f"{type(config).__name__}: {taken[0][1]} acts on module {taken[0][0]!r} and others already. Name the "
                f"modules that are left in target_modules, or call hf_efx.unload(model) first."
            )
    found = {}
    for name, module in (layers or dict(model.named_modules())).items():
        chosen = name in defaults if by_default else bool(name)
        hit = check_target_module_exists(resolved, name) if chosen else False
        if hit and not isinstance(hit, _ExcludedModule):
            reason = unsuitable(model, name, module)
            # A pattern such as "mlp" also matches containers; only a layer that was meant deserves an error.
            if reason and (hasattr(module, "weight") or hasattr(module, "base_layer")):
                raise ValueError(
                    f"{type(config).__name__}: module {name!r} can't be changed, since {reason}. Leave it out with "
                    f"exclude_modules."
                )
            if not reason:
                found[name] = module
    if not found:
        there = [name for name, m in model.named_modules() if type(m) in DENSE_TYPES]
        raise ValueError(
            f"{type(config).__name__}: target_modules={config.target_modules!r} (exclude_modules="
            f"{config.exclude_modules!r}, layers_to_transform={config.layers_to_transform!r}) matches no module of "
            f"{type(model).__name__}. It has, among others: {', '.join(there[:8]) or 'no Linear, Conv1D or Conv2d'}."
        )
    return found

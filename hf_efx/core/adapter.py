"""The one engine that matches modules and swaps them: door 1 (`get_efx_model`), `unload` and `merge_and_unload`.

A module is swapped in place, by its `__class__`, not wrapped: references to it, hooks and device placement stay.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook, add_hook_to_module, remove_hook_from_module
from torch import nn

from hf_efx.core.efx_config import QUANT_METHOD, EfxConfig, check_record, entry_config
from hf_efx.core.record import efx_record, hold_pruned, plan_for, pruned_modules, write_record
from hf_efx.core.weight_view import DENSE_TYPES

if TYPE_CHECKING:
    from hf_efx.core.method_config import EfxMethodConfig

ModelT = TypeVar("ModelT", bound=nn.Module)

# Their forward reads the weights of these children directly, in a fused fast path.
_FUSED_PARENTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def get_efx_model(
    model: ModelT,
    configs: "EfxConfig | EfxMethodConfig | Iterable[EfxMethodConfig] | None" = None,
    *,
    pretrained: bool = False,
) -> ModelT:
    """Puts methods into a model, in memory.

    Args:
        model: Any `torch.nn.Module`. It is changed in place.
        configs: Method configs, applied in order. None puts back what `model.config.efx` names and the model lacks;
            what is there already stays as it is.
        pretrained: True says that the weights are trained, so that configs which would discard them are refused.

    Returns:
        The same object.

    Raises:
        ValueError: If a config can't be carried out on this model (the reason and the way out are named). Everything
            is checked first: the model is unchanged then.
    """
    if configs is None:
        record = efx_record(model)
        if record is None:
            raise ValueError("get_efx_model(model) without configs restores what config.efx names, but there is none.")
        restore_efx_model(model, record, initialise=True)
        return model
    methods = (configs if isinstance(configs, EfxConfig) else EfxConfig(configs)).methods
    _refuse_foreign(model)
    old = (efx_record(model) or {"methods": []})["methods"]
    dormant = {name: entry["method"] for entry in old for name in plan_for(model, entry["modules"])}
    entries, taken = [], {}
    for config in methods:
        targets = config.match(model)
        for name in targets:
            if name in taken:
                raise ValueError(
                    f"{type(config).__name__}: module {name!r} is already taken by the {taken[name]} config before "
                    f"it in the list. Part them with target_modules or exclude_modules."
                )
            if name in dormant:
                raise ValueError(
                    f"{type(config).__name__}: module {name!r} belongs to the {dormant[name]} method which the loaded "
                    f"checkpoint was trained with (config.efx). Put it back with get_efx_model(model), or take it "
                    f"off for good with hf_efx.unload(model) first."
                )
        plan = config.plan(model, targets, pretrained)
        for name in plan:
            refuse_offloaded(name, model.get_submodule(name))
        _refuse_pruned(model, config, plan)
        taken.update(dict.fromkeys(plan, config.method))
        entries.append((config, plan))
    for config, plan in entries:
        config.apply(model, plan)
    new = [{"method": c.method, "config": c.method_fields(), "modules": plan} for c, plan in entries]
    write_record(model, [*old, *new])
    hold_pruned(model)
    return model


def restore_efx_model(model: nn.Module, record: dict[str, Any], initialise: bool = False, revive: bool = True) -> None:
    """Rebuilds the structure that a record (`config.efx`) describes on a model, in place.

    Args:
        model: The dense model, on any device, meta included. Modules that are rebuilt already stay as they are.
        record: As returned by `efx_record`.
        initialise: Start the rebuilt parameters from the weights that are there, as the configs say. False leaves
            their values for a checkpoint to fill.
        revive: Put methods that act in training alone back, too. False leaves them to the record: inference needs
            nothing of them.

    Raises:
        ValueError: If the record is malformed, newer than this version, or names modules that the model lacks.
    """
    entries = [(entry_config(e), plan_for(model, e["modules"]), e) for e in check_record(record)["methods"]]
    for config, plan, _ in entries:
        if config.changes_skeleton:
            plan = {name: spec for name, spec in plan.items() if not hasattr(model.get_submodule(name), "dense_class")}
        elif not revive:
            continue
        (config.apply if initialise else config.restore)(model, plan)
    write_record(model, [{**entry, "modules": plan} for _, plan, entry in entries], record.get("pruned"))
    if revive:
        hold_pruned(model)


def _refuse_pruned(model: nn.Module, config: "EfxMethodConfig", plan: dict[str, Any]) -> None:
    """Raises where a method would replace pruned weights, and with them the zeros."""
    pruned = [name for name in pruned_modules(model) if name in plan]
    if config.changes_skeleton and pruned:
        raise ValueError(
            f"{type(config).__name__}: module {pruned[0]!r} is pruned (config.efx), and its zeros would be filled. "
            f"Leave it out with exclude_modules, or give the zeros up with prune(model, 0)."
        )


def merge_and_unload(model: ModelT) -> ModelT:
    """Takes all methods off: a plain dense model with the same outputs and state-dict keys.

    Raises:
        ValueError: If a peft adapter is still on the model, or a method can't be merged (the reason is named). The
            model is unchanged then.
    """
    _refuse_foreign(model)
    record = efx_record(model)
    entries = [
        (entry_config(entry), plan_for(model, entry["modules"]))
        for entry in reversed(record["methods"] if record else [])
    ]
    for config, plan in entries:
        config.check_merge()
        for name in plan:
            refuse_offloaded(name, model.get_submodule(name))
    for config, plan in entries:
        config.merge(model, plan)
    write_record(model, [])
    return model


def unload(model: ModelT) -> ModelT:
    """Takes the training-time methods off and leaves what changes the skeleton (low rank) in place."""
    record = efx_record(model)
    kept = []
    for entry in record["methods"] if record else []:
        config = entry_config(entry)
        if config.changes_skeleton:
            kept.append(entry)
        else:
            config.merge(model, plan_for(model, entry["modules"]))
    write_record(model, kept)
    return model


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


def _refuse_foreign(model: nn.Module) -> None:
    """Raises where the whole model is in a state that no method may change."""
    if hasattr(model, "peft_config"):
        raise ValueError(
            f"{type(model).__name__} already carries a peft adapter. Put hf_efx on first and the adapter on top, or "
            f"merge or unload the adapter first. (A low-rank adapter: peft.get_peft_model(model, LowRankConfig()).)"
        )
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and quantizer.quantization_config.quant_method != QUANT_METHOD:
        raise ValueError(
            f"The model is quantised ({quantizer.quantization_config.quant_method}): its weights are packed integers, "
            f"which have no factors. Load it without quantization_config first."
        )


def refuse_offloaded(name: str, module: nn.Module) -> None:
    """Raises where accelerate's hook keeps the module's weights elsewhere: nothing is there to be read or changed."""
    hook: ModelHook | None = getattr(module, "_hf_hook", None)
    inner = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    if any(isinstance(h, AlignDevicesHook) and h.offload for h in inner):
        raise ValueError(
            f"The device map offloads the weights of module {name!r} to CPU or disk: call this before dispatching the "
            f"model, or with a device_map that holds it whole."
        )


def swap_class(module: Any, new_class: type[nn.Module]) -> None:
    """Makes a module an instance of another class, in place."""
    module.__class__ = new_class


@contextmanager
def hook_kept(module: nn.Module) -> Iterator[None]:
    """Lifts accelerate's hook (a device map's) off a module while its class is swapped, and puts it back.

    Such a hook holds the bound forward of the old class.
    """
    hook: ModelHook | None = getattr(module, "_hf_hook", None)
    if hook is not None:
        remove_hook_from_module(module)
        module.__dict__.pop("forward", None)  # of the old class, left there: it would hide the new one
    try:
        yield
    finally:
        if hook is not None:
            add_hook_to_module(module, hook)

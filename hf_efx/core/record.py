"""What a model's config says of it, under `config.efx`: its methods and which of its modules are pruned."""

import copy
from typing import Any

from torch import nn
from transformers.configuration_utils import PreTrainedConfig

from hf_efx.core.efx_config import FORMAT_VERSION, QUANT_METHOD, entry_config
from hf_efx.core.pruned import hold


def efx_record(model: nn.Module) -> dict[str, Any] | None:
    """What stands in `model.config.efx` (without a transformers config: in `model.efx`), None if nothing."""
    return getattr(_record_holder(model), "efx", None)


def _record_holder(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    return config if isinstance(config, PreTrainedConfig) else model


def write_record(
    model: nn.Module, methods: list[dict[str, Any]], pruned: dict[str, dict[str, Any]] | None = None
) -> None:
    """Writes the methods, and the pruned modules, which None leaves as they are."""
    pruned = (efx_record(model) or {}).get("pruned") if pruned is None else pruned
    holder: Any = _record_holder(model)
    if holder is not model:
        # A model keeps the config object that it was built from. Its dense twin, built from the same object, must not
        # be recorded as factorised.
        shared, holder = holder, copy.deepcopy(holder)
        for module in model.modules():
            if getattr(module, "config", None) is shared:
                module.config = holder
    if methods or pruned:
        flag = {"pruned": pruned} if pruned else {}
        holder.efx = {"format_version": FORMAT_VERSION, "methods": methods, **flag}
    elif hasattr(holder, "efx"):
        del holder.efx
    if holder is model:
        return
    # Read by core/loading.py. On the live model it is a plain dict: transformers and the Trainer take only a model
    # that carries an `hf_quantizer` for a quantised one, and `save_pretrained` writes it as it stands.
    mark = {"quant_method": QUANT_METHOD}
    if any(entry_config(entry).changes_skeleton for entry in methods):
        holder.quantization_config = mark
        # Files name tensors as modules do. transformers would save a ViT or DINOv2 under an older layout's names, with
        # weights joined that are factors here.
        model._weight_conversions = []  # pyright: ignore[reportArgumentType]
    elif getattr(holder, "quantization_config", None) == mark:
        del holder.quantization_config, model._weight_conversions


def plan_for(model: nn.Module, modules: dict[str, Any]) -> dict[str, Any]:
    """A record's modules under the names they have in this model.

    A checkpoint of `GPT2LMHeadModel` says `transformer.h.0...` where `GPT2Model` says `h.0...`, and the reverse.

    Raises:
        ValueError: If a module can't be found.
    """
    names = {name for name, _ in model.named_modules()}
    prefix = getattr(model, "base_model_prefix", "")
    result = {}
    for name, spec in modules.items():
        candidates = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
        found = next((c for c in candidates if c in names), None)
        if found is None:
            raise ValueError(
                f"config.efx names the module {name!r}, which {type(model).__name__} doesn't have: the checkpoint "
                f"belongs to another architecture, or its config.json was changed."
            )
        result[found] = spec
    return result


def hold_pruned(model: nn.Module) -> None:
    """Lets optimizers leave the zeros of a pruned model at zero, as `config.efx` says.

    Nothing is done without that flag, and under an adapter of peft, which freezes the model's own weights.

    Raises:
        ValueError: If the record names modules that the model lacks.
    """
    pruned = (efx_record(model) or {}).get("pruned")
    if pruned and not hasattr(model, "peft_config"):
        hold(model, _pruned_for(model, pruned))


def mark_pruned(model: nn.Module, modules: dict[str, dict[str, Any]]) -> None:
    """Writes into `config.efx` which modules are pruned (see core/pruned.py), and holds their zeros; {} ends both."""
    write_record(model, (efx_record(model) or {"methods": []})["methods"], modules)
    hold(model, modules)


def pruned_modules(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The modules that `config.efx` says are pruned, under the names that they have in this model."""
    return _pruned_for(model, (efx_record(model) or {}).get("pruned") or {})


def _pruned_for(model: nn.Module, pruned: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    plan = {}
    for name, spec in plan_for(model, pruned).items():
        follows = [("follows", next(iter(plan_for(model, {spec["follows"]: None}))))] if "follows" in spec else []
        plan[name] = {**spec, **dict(follows)}
    return plan

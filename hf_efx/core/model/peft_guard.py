"""What may not be done to a factorised or pruned model through peft: refused with the reason, before peft does it.

peft adds to, decomposes or refills `weight`: of a factorised layer that is one factor, so that the outcome is a shape
error, or, for a square layer at full rank, a silently corrupted model; of a pruned layer it fills the zeros. peft has
no hook for this, so two methods of its tuners' base class are wrapped, once there is a model of ours; on any other
model they return at once.
"""

import copy
from typing import Any

import wrapt
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from torch import nn

from hf_efx.core.model.method_config import EfxMethodConfig
from hf_efx.core.model.pruned import has_zeros, is_held
from hf_efx.core.model.targets import chooses
from hf_efx.core.model.weight_view import is_factorised

# Each gives the outputs that it gives on the merged dense layer (tests/core/model/test_peft_guard.py): they read the
# layer's widths and output, not its weight.
_ON_FACTORS = {
    "ADALORA", "BEFT", "BOFT", "C3A", "FOURIERFT", "GRALORA", "IA3", "LILY", "LORA", "MISS", "OFT", "PVERA",
    "RANDLORA", "ROAD", "UNILORA", "VBLORA", "VERA", "WAVEFT",
}  # fmt: skip
# Other starts of LoRA take their part out of the weight, and write what is left back.
_LORA_STARTS = (True, False, "gaussian", "orthogonal", "eva")
_LORA_VARIANTS = ("use_dora", "use_qalora", "use_bdlora", "kasa_config", "velora_config", "target_parameters")

_installed: list[str] = []


def guard_adapters() -> None:
    """From now on peft's tuners refuse what would go wrong on a factorised or pruned layer."""
    if not _installed:
        for name, wrapper in (("inject_adapter", _check_injection), ("_check_merge_allowed", _check_merge)):
            wrapt.wrap_function_wrapper("peft.tuners.tuners_utils", f"BaseTuner.{name}", wrapper)
            _installed.append(name)


def _ours(model: nn.Module) -> dict[str, str]:
    """What is special about layers of a model, by name: "factorised" or "pruned"; empty for a foreign model."""
    pruned = (getattr(getattr(model, "config", None), "efx", None) or {}).get("pruned", {})
    found = {}
    for name, module in model.named_modules():
        layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if is_factorised(layer):
            found[name] = "factorised"
        elif (name in pruned or is_held(layer)) and has_zeros(layer):
            found[name] = "pruned"
    return found


def _check_injection(wrapped: Any, tuner: BaseTuner, args: Any, kwargs: Any) -> None:
    model, adapter_name = _injected(*args, **kwargs)
    config: Any = tuner.peft_config[adapter_name]
    ours = {} if isinstance(config, EfxMethodConfig) else _ours(model)
    if ours:
        config = tuner._prepare_adapter_config(copy.copy(config), tuner.get_model_config(model))
        config = _maybe_include_all_linear_layers(config, model)
        for name, kind in ours.items():
            reason = _unsafe(config, kind)
            if reason and _reaches(config, name):
                raise ValueError(
                    f"{type(config).__name__}: {reason}, but layer {name!r} is {kind}. Put a plain LoRA there, leave "
                    f"it out of target_modules, or make the model plain first ("
                    + ("hf_efx.merge_and_unload(model))." if kind == "factorised" else "hf_efx.prune(model, 0)).")
                )
    wrapped(*args, **kwargs)


def _injected(model: nn.Module, adapter_name: str, *_: Any, **__: Any) -> tuple[nn.Module, str]:
    return model, adapter_name


def _reaches(config: Any, name: str) -> bool:
    """Whether an adapter goes on a layer, or on its weight by itself."""
    parameters = getattr(config, "target_parameters", None) or ()
    named = getattr(config, "target_modules", None) is not None and chooses(config, name)
    return named or any(f".{name}.weight".endswith(f".{parameter}") for parameter in parameters)


def _unsafe(config: Any, kind: str) -> str | None:
    """What an adapter does with the weight that it may not do, None if nothing."""
    method: str = config.peft_type.value
    start = getattr(config, "init_lora_weights", True)
    if method == "LORA" and start not in _LORA_STARTS:
        return f"init_lora_weights={start!r} rewrites the layer's weight"
    if kind == "pruned":
        return None
    variant = next((name for name in _LORA_VARIANTS if getattr(config, name, None)), None)
    if method in _ON_FACTORS and variant is None:
        return None
    return f"{variant or method} needs the layer's dense weight"


def _check_merge(wrapped: Any, tuner: BaseTuner, args: Any, kwargs: Any) -> None:
    wrapped(*args, **kwargs)
    reasons = {
        "pruned": "pruned and the update would fill its zeros. Keep the adapter unmerged; or give the zeros up with "
        "hf_efx.prune(model, 0) on the base model before putting the adapter on, merge, and prune again.",
        "factorised": "factorised and a sum of its product and a dense update is no product of its rank. Keep the "
        "adapter unmerged, or call hf_efx.merge_and_unload on the base model before putting the adapter on.",
    }
    for name, kind in _ours(tuner.model).items():
        if isinstance(tuner.model.get_submodule(name), BaseTunerLayer):
            raise ValueError(
                f"{type(tuner).__name__}: the adapter on {name!r} can't be merged, since that layer is {reasons[kind]}"
            )

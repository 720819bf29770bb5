"""Door 3: our configs in peft's registry, so that `peft.get_peft_model`, `PeftModel.from_pretrained` and AutoPeftModel
take them.

The only file that touches peft's internals: `register_peft_method` refuses names outside peft's own enum, so the
mappings are filled directly. They are no promised API; peft's version is bounded in pyproject.toml and
tests/core/test_peft_bridge.py holds the behaviour.
"""

import importlib
from enum import Enum
from typing import Any

import wrapt
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

from hf_efx.core.model.pruned import is_held
from hf_efx.registry import METHODS


class EfxType(str, Enum):  # noqa: UP042  (peft compares its own `class PeftType(str, enum.Enum)` the same way)
    """Our names in peft's registry, beside `peft.PeftType`."""

    EFX_LOW_RANK = "EFX_LOW_RANK"
    EFX_SLICE_OUT = "EFX_SLICE_OUT"
    EFX_TARGETED_DROPOUT = "EFX_TARGETED_DROPOUT"


def register_peft() -> None:
    """Makes peft know all hf_efx adapters.

    Importing a config such as `LowRankConfig` does this already; call it before `PeftModel.from_pretrained` in a
    program that names no config, which would otherwise end in peft's bare `KeyError: 'EFX_LOW_RANK'`.
    """
    for method in METHODS.values():
        if method.config:
            importlib.import_module(method.config.rpartition(".")[0])


class RefusingTuner:
    """In peft's mappings for methods without weights of their own: peft would leave nothing trainable."""

    prefix = "efx_"

    def __init__(self, model: Any, peft_config: Any, adapter_name: str, **kwargs: Any) -> None:
        config = peft_config[adapter_name] if isinstance(peft_config, dict) else peft_config
        name = type(config).__name__
        raise ValueError(
            f"{name} is no adapter: it has no weights of its own, so peft.get_peft_model would leave nothing to "
            f"train. Call hf_efx.get_efx_model(model, {name}(...)); an adapter such as LoRA goes on top afterwards."
        )


def register_adapter(peft_type: EfxType, config: type, tuner: type[BaseTuner] | type[RefusingTuner]) -> None:
    """Enters one adapter into peft's mappings.

    Args:
        peft_type: Its name.
        config: Its config class.
        tuner: Its tuner; parameters that belong to the adapter start with `tuner.prefix`.
    """
    mappings: list[tuple[Any, Any]] = [
        (PEFT_TYPE_TO_CONFIG_MAPPING, config),
        (PEFT_TYPE_TO_TUNER_MAPPING, tuner),
        (PEFT_TYPE_TO_PREFIX_MAPPING, tuner.prefix),
    ]
    for mapping, value in mappings:
        mapping[peft_type] = value


@wrapt.patch_function_wrapper("peft.tuners.tuners_utils", "BaseTuner._check_merge_allowed")
def _refuse_merge(wrapped: Any, tuner: BaseTuner, args: Any, kwargs: Any) -> None:
    """Refuses to merge another adapter's dense update into a factorised or a pruned layer.

    peft adds the update to `weight`: that is one factor of the former, an obscure shape error, or, for a square layer
    at full rank, a silently corrupted model; and it fills the latter's zeros.
    """
    wrapped(*args, **kwargs)
    pruned = (getattr(getattr(tuner.model, "config", None), "efx", None) or {}).get("pruned", {})
    for name, module in tuner.model.named_modules():
        if isinstance(module, BaseTunerLayer) and (name in pruned or is_held(module.get_base_layer())):
            raise ValueError(
                f"{type(tuner).__name__}: the adapter on {name!r} can't be merged, since that layer is pruned and the "
                f"update would fill its zeros. Keep the adapter unmerged; or give the zeros up with "
                f"hf_efx.prune(model, 0) on the base model before putting the adapter on, merge, and prune again."
            )
        if isinstance(module, BaseTunerLayer) and hasattr(module.get_base_layer(), "dense_class"):
            raise ValueError(
                f"{type(tuner).__name__}: the adapter on {name!r} can't be merged, since that layer is factorised "
                f"and a sum of its product and a dense update is no product of its rank. Keep the adapter unmerged, "
                f"or call hf_efx.merge_and_unload on the base model before putting the adapter on."
            )

"""Our configs in peft's registry, so that `peft.get_peft_model`, `PeftModel.from_pretrained` and AutoPeftModel take
them.

`register_peft_method` refuses names outside peft's own enum, so the mappings are filled directly. They are no promised
API; peft's version is bounded in pyproject.toml and tests/core/model/test_peft_bridge.py holds the behaviour.
"""

import importlib
from enum import Enum
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner

from hf_efx.core.model.peft_guard import guard_adapters
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
    guard_adapters()

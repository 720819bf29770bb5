"""Putting a checkpoint's weights back into the model that they came from: all of them, or an error.

transformers' own Trainer loads non-strictly, under the names that stand in the files. Where `save_pretrained` writes
an older layout (ViT, DINOv2, Mixtral), resuming and `load_best_model_at_end` then mix two sets of weights.
"""

import copy
import json
import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model, revert_weight_conversion
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME


def load_weights(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Loads a checkpoint of a Trainer into the model that was saved, in one process or in each one of DDP.

    Args:
        model: Not wrapped and not sharded. A `PeftModel` gets all its adapters back.
        folder: The checkpoint, whole or sharded, safetensors or torch.save, under the model's names or those of the
            layout that `save_pretrained` writes.

    Raises:
        ValueError: If the folder holds no weights, or weights of another model: missing, unexpected or of another
            shape. The model is unchanged then (but for adapters).
    """
    if isinstance(model, PeftModel):
        return _load_adapters(model, Path(folder))
    state, unexpected = _read(Path(folder)), set[str]()
    if isinstance(model, PreTrainedModel) and _is_converted_on_save(model):
        state, unexpected = _convert(model, state)
    own = model.state_dict()
    unexpected |= state.keys() - own.keys()
    loaded = {_place(own[name]) for name in state.keys() & own.keys()}
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    missing = {name for name in own if name not in ignored and _place(own[name]) not in loaded}
    other = {name for name in state.keys() & own.keys() if state[name].shape != own[name].shape}
    _refuse(folder, model, missing=missing, unexpected=unexpected, of_another_shape=other)
    model.load_state_dict(state, strict=False)  # what is tied or not saved has no entry


def _place(value: torch.Tensor) -> tuple[Any, ...]:
    """The same for tied weights, of which one is saved."""
    return value.untyped_storage().data_ptr(), value.storage_offset(), value.shape


def _read(folder: Path) -> dict[str, torch.Tensor]:
    for whole, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if (folder / whole).is_file():
            names = {whole}
        elif (folder / index).is_file():
            names = set(json.loads((folder / index).read_bytes())["weight_map"].values())
        else:
            continue
        files = [str(folder / name) for name in sorted(names)]
        if whole == SAFE_WEIGHTS_NAME:
            states = [load_file(file) for file in files]
        else:
            states = [torch.load(file, map_location="cpu", weights_only=True) for file in files]
        return {name: value for state in states for name, value in state.items()}
    raise ValueError(
        f"The checkpoint {os.fspath(folder)!r} holds no {SAFE_WEIGHTS_NAME} or {WEIGHTS_NAME}, whole or in shards. On "
        f"several nodes without a common file system it is written on each one with save_on_each_node=True."
    )


def _is_converted_on_save(model: PreTrainedModel) -> bool:
    state = {name: value.to("meta") for name, value in model.state_dict().items()}
    saved = revert_weight_conversion(model, state)
    return any(saved.get(name) is not value for name, value in state.items())


def _convert(model: PreTrainedModel, state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], set[str]]:
    """A checkpoint's weights under the model's own names, and the names that fit nowhere."""
    tensors = [*model.parameters(), *model.buffers()]
    empty: Any = copy.deepcopy(model, {id(tensor): _on_meta(tensor) for tensor in tensors})
    mapping: Any = get_model_conversion_mapping(model)
    info, _ = convert_and_load_state_dict_in_model(empty, state, LoadStateDictConfig(weight_mapping=mapping))
    if info.conversion_errors or info.mismatched_keys:
        problems = {**info.conversion_errors, **{name: str(shapes) for name, *shapes in info.mismatched_keys}}
        raise ValueError(f"The checkpoint's weights can't be converted into a {type(model).__name__}: {problems}.")
    return {name: value for name, value in empty.state_dict().items() if not value.is_meta}, set(info.unexpected_keys)


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _load_adapters(model: PeftModel, folder: Path) -> None:
    for name in model.peft_config:
        own = folder if name == "default" else folder / name
        if not any(own.glob("adapter_model.*")):
            raise ValueError(f"The checkpoint {os.fspath(folder)!r} holds no weights of the adapter {name!r}.")
        found = model.load_adapter(str(own), name, is_trainable=True)
        _refuse(own, model, missing={*found.missing_keys}, unexpected={*found.unexpected_keys})


def _refuse(folder: str | os.PathLike[str], model: nn.Module, **names: set[str]) -> None:
    wrong = [f"{kind.replace('_', ' ')} {sorted(keys)[:3]} ({len(keys)})" for kind, keys in names.items() if keys]
    if wrong:
        raise ValueError(
            f"The checkpoint {os.fspath(folder)!r} doesn't hold the weights of this {type(model).__name__}: "
            f"{', '.join(wrong)}. Give the Trainer the model that was saved there."
        )

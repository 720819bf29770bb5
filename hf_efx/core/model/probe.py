"""Tries a change out on a model's skeleton: a copy on the meta device, which holds no values and computes none.

What the change breaks shows before the model itself is touched.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

# Images whose sides may fit a network that says nothing of them, the common ones first.
_SIDES = (32, 28, 64, 224)


def what_breaks(model: nn.Module, change: Callable[[nn.Module], None]) -> str | None:
    """What fails in a forward pass in training mode after a change, though the model ran before it.

    Args:
        model: It stays as it is.
        change: Made to a skeleton of the model.

    Returns:
        The innermost module whose forward failed, and why; None where nothing fails, or where it can't be tried: no
        guess at its inputs lets the model itself run, or its forward looks at values.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for inputs in _inputs(model):
            try:
                skeleton(model).train()(**inputs) if isinstance(inputs, dict) else skeleton(model).train()(inputs)
            except Exception:  # noqa: BLE001, S112  (whatever it is, the model can't be tried like this)
                continue
            changed = skeleton(model).train()
            change(changed)
            return _failure(changed, inputs)
    return None


def skeleton(model: nn.Module, device: str = "meta") -> nn.Module:
    """A copy of a model without values; on a CPU its parameters take no memory as long as nothing writes to them."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_like(tensor, device=device)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


def _inputs(model: nn.Module) -> Iterator[Any]:
    """Inputs that the model may take: keyword arguments of a transformers model, one tensor of another."""
    if isinstance(model, PreTrainedModel):
        ids = torch.zeros(2, 8, dtype=torch.long, device="meta")
        if model.main_input_name == "input_ids":
            yield {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
        elif model.main_input_name == "pixel_values":
            for side in (getattr(model.config, "image_size", _SIDES[0]), *_SIDES):
                channels = getattr(model.config, "num_channels", 3)
                yield {"pixel_values": torch.empty(2, channels, side, side, device="meta")}
        return
    first = next((m for m in model.modules() if isinstance(m, (nn.Linear, Conv1D, nn.Conv2d, nn.Embedding))), None)
    if isinstance(first, nn.Conv2d):
        for side in _SIDES:
            yield torch.empty(2, first.in_channels, side, side, dtype=first.weight.dtype, device="meta")
    elif isinstance(first, nn.Embedding):
        yield torch.zeros(2, 8, dtype=torch.long, device="meta")
    elif first is not None:
        width = first.nx if isinstance(first, Conv1D) else first.in_features
        yield torch.empty(2, width, dtype=first.weight.dtype, device="meta")


def _failure(model: nn.Module, inputs: Any) -> str | None:
    """The innermost module whose forward fails, and its error's first line."""
    running: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: running.append(name))
        module.register_forward_hook(lambda *_: running.pop() and None)
    try:
        model(**inputs) if isinstance(inputs, dict) else model(inputs)
    except Exception as error:  # noqa: BLE001  (whatever it is, training would end in it)
        name = running[-1] if running else ""
        module = model.get_submodule(name)
        what = type(module).__name__ if list(module.children()) else repr(module)
        return f"the forward of {f'module {name!r}' if name else 'the model'}, {what}, fails ({_first_line(error)})"
    return None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

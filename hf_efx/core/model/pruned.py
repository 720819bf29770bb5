"""Zeros that stay zeros: what a pruned model's training must not fill again.

A pruned model is flagged in `config.efx`, beside its methods:

    "pruned": {"h.0.mlp.c_fc": {"bias": true}, "h.0.mlp.c_proj": {}, "layer.0.norm": {"follows": "layer.0.conv"}}

The mask itself is `weight != 0` and isn't stored. `{"bias": true}` says that whole units were pruned, so that the bias
of an output without any weight is zero too; `follows` names the module whose outputs a batch norm scales and shifts.

Zeros are held at the optimizer's step, not in the gradient: momentum and weight decay would move them without one.
Hooks on every torch optimizer look where the zeros are just before a step, empty the gradient there, and write the
zeros again after it, under any Trainer or loop. Whatever becomes zero by itself stays so too. The norm that gradients
are clipped by still counts those of the zeros.
"""

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers.pytorch_utils import Conv1D

Zeros = tuple[torch.Tensor, torch.Tensor]  # a tensor, and where it is to be zero: bool, of its shape

_MARK = "_efx_pruned"  # in the __dict__ of a held module
_held: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_found: weakref.WeakKeyDictionary[torch.optim.Optimizer, list[Zeros]] = weakref.WeakKeyDictionary()
_hooks: list[Any] = []


@dataclass(frozen=True)
class _Held:
    """What of a module is held: its weight; with `bias` that of empty outputs; with `follows` what scales them."""

    bias: bool = False
    follows: nn.Module | None = None


def hold(model: nn.Module, modules: Mapping[str, Mapping[str, Any]]) -> None:
    """From now on optimizers leave the zeros of these modules at zero. A copy of the model isn't held.

    Args:
        model: The model.
        modules: As in `config.efx`, under the names that they have in this model.
    """
    release(model)
    for name, spec in modules.items():
        module = model.get_submodule(name)
        follows = spec.get("follows")
        module.__dict__[_MARK] = _Held(bool(spec.get("bias")), follows and model.get_submodule(follows))
        _held.add(module)
    if _held and not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before_step))
        _hooks.append(register_optimizer_step_post_hook(_after_step))


def release(model: nn.Module) -> None:
    """Lets the zeros of a model be trained again."""
    for module in model.modules():
        module.__dict__.pop(_MARK, None)
        _held.discard(module)


def is_held(module: nn.Module) -> bool:
    """Whether optimizers leave a module's zeros at zero."""
    return module in _held


@torch.no_grad()
def zeros_of(module: nn.Module) -> list[Zeros]:
    """Where a held module is zero now, tensor by tensor."""
    held: _Held = module.__dict__[_MARK]
    weight: Any = module.weight
    bias: Any = module.bias
    if held.follows is not None:
        empty = empty_outputs(held.follows)
        return [(parameter, empty) for parameter in (weight, bias) if parameter is not None]
    zeros = [(weight, weight == 0)]
    return [*zeros, (bias, empty_outputs(module))] if held.bias and bias is not None else zeros


def empty_outputs(module: nn.Module) -> torch.Tensor:
    """Which outputs of a Linear, Conv1D or Conv2d have no weight that isn't zero, [out]."""
    weight: Any = module.weight
    return (weight.t() if isinstance(module, Conv1D) else weight.flatten(1)).count_nonzero(1) == 0


@contextmanager
def zeroed(zeros: Iterable[Zeros]) -> Iterator[None]:
    """Sets entries to zero inside, and puts their bits back at the end, after an exception or Ctrl-C too.

    Of each tensor the mask is kept (a byte an entry) and, in the host's memory, the values that are zeroed.
    """
    saved: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    try:
        with torch.no_grad():
            for tensor, mask in zeros:
                saved.append((tensor, mask, tensor.masked_select(mask).cpu()))  # before the entries go
                tensor.masked_fill_(mask, 0)
        yield
    finally:
        _put_back(saved)


@torch.no_grad()
def _put_back(saved: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> None:
    """Writes the values back, the last first; an interrupt waits until all is done."""
    interrupt = None
    while saved:
        try:
            tensor, mask, values = saved[-1]
            tensor.masked_scatter_(mask, values.to(tensor.device))
            saved.pop()
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


@torch.no_grad()
def _before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if not _held:
        return
    ours = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    zeros = [zero for module in list(_held) for zero in zeros_of(module) if id(zero[0]) in ours]
    for parameter, mask in zeros:
        if parameter.grad is not None:
            parameter.grad.masked_fill_(mask, 0)
    _found[optimizer] = zeros


@torch.no_grad()
def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for parameter, mask in _found.pop(optimizer, []):
        parameter.masked_fill_(mask, 0)

"""Zeros that stay zeros: what a pruned model's training must not fill again.

A pruned model is flagged in `config.efx`, beside its methods:

    "pruned": {"h.0.mlp.c_fc": {"bias": true}, "h.0.mlp.c_proj": {}, "layer.0.norm": {"follows": "layer.0.conv"}}

The mask itself is `weight != 0` and isn't stored. `{"bias": true}` says that whole units were pruned, so that the bias
of an output without any weight is zero too; `follows` names the module whose outputs a batch norm scales and shifts.

Zeros are held at the optimizer's step, not in the gradient: momentum and weight decay would move them without one. A
hook on torch's optimizers, which is there only while a pruned model is, looks where the zeros are just before a step
of those that hold its parameters, empties the gradient there, and writes the zeros again after it, under any Trainer
or loop. Whatever becomes zero by itself stays so too. The norm that gradients are clipped by still counts those of the
zeros. Copies of a pruned model, by deepcopy or pickle and of any part of it, are held as it is; checkpoints hold
nothing of this but the flag.
"""

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers.pytorch_utils import Conv1D

Zeros = tuple[torch.Tensor, torch.Tensor]  # a tensor, and where it is to be zero: bool, of its shape

_MARK = "_efx_pruned"  # in the __dict__ of a held module, and of the model that it was held in
_marks: "weakref.WeakSet[_Mark]" = weakref.WeakSet()
_found: weakref.WeakKeyDictionary[torch.optim.Optimizer, list[Zeros]] = weakref.WeakKeyDictionary()
_hooks: list[Any] = []


class _Mark:
    """What of a module's own parts is held, by name: {"": {"bias": True}} in a held module, all of them in the model.

    The model's mark finds a part again that was replaced (`resize_token_embeddings` makes a new head), a module's own
    goes along where it is copied alone. Copying or unpickling the module copies its mark, which enters itself anew.
    """

    def __init__(self, owner: nn.Module, specs: Mapping[str, Mapping[str, Any]]) -> None:
        self.__setstate__({"owner": owner, "specs": specs})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.owner: nn.Module = state["owner"]
        self.specs: Mapping[str, Mapping[str, Any]] = state["specs"]
        _marks.add(self)
        if not _hooks:
            _hooks.append(register_optimizer_step_pre_hook(_before_step))
            _hooks.append(register_optimizer_step_post_hook(_after_step))

    def parts(self) -> dict[str, tuple[nn.Module, Mapping[str, Any]]]:
        """The parts that are there, by name, each with its spec; `follows` in it is a module."""
        there: dict[Any, nn.Module] = dict(self.owner.named_modules())
        found = {name: (there[name], spec) for name, spec in self.specs.items() if name in there}
        return {n: (m, {**s, "follows": there.get(s.get("follows"), s.get("follows"))}) for n, (m, s) in found.items()}


def hold(model: nn.Module, modules: Mapping[str, Mapping[str, Any]]) -> None:
    """From now on optimizers leave the zeros of these modules, and of the model's copies, at zero.

    Args:
        model: The model.
        modules: As in `config.efx`, under the names that they have in this model.
    """
    release(model)
    if not modules:
        return
    model.__dict__[_MARK] = mark = _Mark(model, modules)
    for module, spec in mark.parts().values():
        module.__dict__[_MARK] = _Mark(module, {"": spec})


def release(model: nn.Module) -> None:
    """Lets the zeros of a model, or of a part of one, be trained again."""
    released = set(model.modules())
    for mark in list(_marks):
        mark.specs = {n: mark.specs[n] for n, (module, _) in mark.parts().items() if module not in released}
        if not mark.specs:
            mark.owner.__dict__.pop(_MARK, None)
            _marks.discard(mark)
    _remove_idle_hooks()


def _remove_idle_hooks() -> None:
    if not _marks:
        while _hooks:
            _hooks.pop().remove()


def is_held(module: nn.Module) -> bool:
    """Whether optimizers leave a module's zeros at zero."""
    return "" in getattr(module.__dict__.get(_MARK), "specs", ())


def has_zeros(module: Any) -> bool:
    """Whether some weight of a module is zero, or may be (on the meta device, or in DeepSpeed's shards)."""
    return module.weight.is_meta or not module.weight.numel() or bool((module.weight == 0).any())


def _zeros_of(module: Any, spec: Mapping[str, Any]) -> list[Zeros]:
    """Where a held module is zero now, tensor by tensor."""
    if spec["follows"] is not None:
        empty = empty_outputs(spec["follows"])
        return [(parameter, empty) for parameter in (module.weight, module.bias) if parameter is not None]
    zeros = [(module.weight, module.weight == 0)]
    return [*zeros, (module.bias, empty_outputs(module))] if spec.get("bias") and module.bias is not None else zeros


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
    ours = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    parts = {id(module): (module, spec) for mark in list(_marks) for module, spec in mark.parts().values()}
    zeros: list[Zeros] = []
    for module, spec in parts.values():
        if any(id(parameter) in ours for parameter in module.parameters(recurse=False)):
            zeros += [zero for zero in _zeros_of(module, spec) if id(zero[0]) in ours]
    for parameter, mask in zeros:
        if parameter.grad is not None:
            parameter.grad.masked_fill_(mask, 0)
    if zeros:
        _found[optimizer] = zeros
    _remove_idle_hooks()


@torch.no_grad()
def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for parameter, mask in _found.pop(optimizer, []):
        parameter.masked_fill_(mask, 0)

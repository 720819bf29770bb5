"""Looking at a model in the middle of its training, without a trace in it or in the random state."""

import copy
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from hf_efx.core.model.wrappers import unwrap_model
from hf_efx.core.training.step_context import StepContext

# What is random in training beside dropout, by the ends of its names on modules and configs: LayerDrop (the fields of
# core/model/block_map, and the numbers that they become on encoders and decoders), routers' noise, SpecAugment.
_OTHER_NOISE = ("layerdrop", "jitter_noise", "moe_jitter_eps", "apply_spec_augment")
# Stochastic depth that isn't called DropPath: these modules' `dropout` is EfficientNet's drop connect.
_DROPS_BRANCH = ("EfficientNetFinalBlockLayer", "AlignVisionFinalBlockLayer")


def base_model(model: nn.Module) -> Any:
    """The transformers model inside wrappers and peft's adapters, whose class and signature say what it takes."""
    model = unwrap_model(model)
    is_peft = any(cls.__name__ == "PeftModel" for cls in type(model).__mro__)  # importing peft takes seconds
    return model.get_base_model() if is_peft else model  # pyright: ignore[reportCallIssue]


@contextmanager
def untouched(model: nn.Module, copy_buffers: bool = True) -> Iterator[None]:
    """Puts back what passes through a model move, after an exception too.

    That is every module's own training flag, buffers (running statistics, as the very tensors they were), and the
    random states of torch on the CPU and the model's devices, of numpy and of Python. Weights and gradients aren't.

    Args:
        model: An unwrapped model; see `unwrap_model`.
        copy_buffers: Whether to work on copies of the buffers. Without, one that is changed in place stays changed.
    """
    modules = list(model.modules())
    training = [module.training for module in modules]
    with random_state_kept(model), _kept_buffers(modules, copy_buffers):
        try:
            yield
        finally:
            for module, flag in zip(modules, training, strict=True):
                module.training = flag


@contextmanager
def scoring_state(
    model: nn.Module, mode: Literal["eval", "train", "dropout"] = "eval", *, copy_buffers: bool | None = None
) -> Iterator[None]:
    """Puts a model into a mode for looking at it, and everything back afterwards: see `untouched`.

    Inside there are no gradients, no gradient checkpointing and no draws of methods of ours (`StepContext`).

    Args:
        model: An unwrapped model; see `unwrap_model`.
        mode: `"eval"`; `"train"`, with all that is random there and batch statistics; or `"dropout"`, training but for
            layers with running statistics, which keep to them, and for LayerDrop, stochastic depth, routers' noise and
            SpecAugment, which are off.
        copy_buffers: As in `untouched`; None copies them in all modes but `"eval"`, where layers leave them alone.
    """
    modules = list(model.modules())
    checkpointing = [module for module in modules if vars(module).get("gradient_checkpointing")]
    contexts = {id(value): value for m in modules for value in vars(m).values() if isinstance(value, StepContext)}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())  # inference_mode would leave tensors behind that training can't use
        for context in contexts.values():
            stack.enter_context(context.disabled())
        stack.enter_context(untouched(model, mode != "eval" if copy_buffers is None else copy_buffers))
        try:
            _set_mode(model, modules, mode)
            if mode == "dropout":
                stack.enter_context(_other_noise_off(modules))
            for module in checkpointing:
                setattr(module, "gradient_checkpointing", False)  # noqa: B010
            yield
        finally:
            for module in checkpointing:
                setattr(module, "gradient_checkpointing", True)  # noqa: B010
            # In torch before pull request 165068 (December 2025), casts that autocast cached without gradients would
            # cut the weights off in a training step of the same autocast region.
            torch.clear_autocast_cache()


def _set_mode(model: nn.Module, modules: list[nn.Module], mode: str) -> None:
    if mode == "eval":
        for module in modules:  # not eval(): a layer that merges weights there would stay merged
            module.training = False
        return
    model.train()  # not the flags: a model may keep frozen parts in eval
    if mode == "dropout":
        for module in modules:
            kind = type(module).__name__
            if vars(module).get("track_running_stats") or kind.endswith(("DropPath", "StochasticDepth")):
                module.training = False
            elif kind in _DROPS_BRANCH:
                module.get_submodule("dropout").training = False


@contextmanager
def _other_noise_off(modules: list[nn.Module]) -> Iterator[None]:
    """Puts the numbers to 0 that make training random beside dropout, on modules and in their configs."""
    holders = {id(holder): holder for module in modules for holder in (module, vars(module).get("config"))}
    kept = [
        (holder, name, value)
        for holder in holders.values()
        if holder is not None
        for name, value in vars(holder).items()
        if name.endswith(_OTHER_NOISE) and isinstance(value, (int, float)) and value
    ]
    try:
        for holder, name, value in kept:
            setattr(holder, name, type(value)(0))
        yield
    finally:
        for holder, name, value in kept:
            setattr(holder, name, value)


@contextmanager
def random_state_kept(model: nn.Module) -> Iterator[None]:
    """Puts the random states back that a forward pass may draw from (wav2vec2's masks use numpy's, for one)."""
    devices = {parameter.device for parameter in model.parameters()} - {torch.device("cpu"), torch.device("meta")}
    kind = next((device.type for device in devices), "cpu")
    python, numpy = random.getstate(), np.random.get_state()
    mps = torch.mps.get_rng_state() if kind == "mps" else None  # one state, which fork_rng would ask for by device
    forked = [] if kind == "mps" else [device for device in devices if device.type == kind]
    try:
        with torch.random.fork_rng(forked, device_type=kind):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        if mps is not None:
            torch.mps.set_rng_state(mps)


@contextmanager
def _kept_buffers(modules: list[nn.Module], copied: bool) -> Iterator[None]:
    """Puts the buffers back, as the very tensors they were; a forward pass works on copies of them if `copied`.

    A module that puts another tensor into a buffer's place keeps books on that beside it (RoPE that grows with the
    longest row notes its length): its numbers and tensors are put back too.
    """
    owners = [module for module in modules if module._buffers]
    numbers = [_numbers(module) for module in owners]
    kept = [dict(module._buffers) for module in owners]
    lent = copy.deepcopy(kept) if copied else kept  # all at once: what is shared stays shared
    try:
        for module, buffers in zip(owners, lent, strict=True):
            module._buffers.update(buffers)
        yield
    finally:
        for module, buffers, given, books in zip(owners, kept, lent, numbers, strict=True):
            if any(module._buffers.get(name) is not buffer for name, buffer in given.items()):
                for name in _numbers(module).keys() - books.keys():
                    delattr(module, name)
                vars(module).update(books)
            module._buffers.clear()
            module._buffers.update(buffers)


def _numbers(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if isinstance(value, (int, float, torch.Tensor))}

"""A module is swapped in place, by its `__class__`, not wrapped: references to it, hooks and device placement stay."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook, add_hook_to_module, remove_hook_from_module
from torch import nn


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

"""Puts a plan (`blocks.py`) on a model, and takes it off again.

Beside the members' classes three things change while the method is on: attributes that say how wide an attention is
follow the slice, the dropouts of sliced blocks are 0, and a hook refuses what can't be trained.
"""

import copy
import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache

from hf_efx.core.model.swap import hook_kept, swap_class
from hf_efx.core.training.step_context import attach_step_context, detach_step_context, step_context
from hf_efx.slice_out.blocks import Plan
from hf_efx.slice_out.layers import SlicedMember, attach, detach
from hf_efx.slice_out.span import Span

logger = logging.getLogger(__name__)

_HOOK = "_slice_out_hook"
_FOLLOWS = "_slice_out_follows"
ROLES = ("emits", "reads", "channels")


class SlicedBias(nn.Embedding):
    """A position bias with a column for each head, of which it gives those of the kept heads.

    Attributes:
        emits: The span of the heads.
        efx_method: For `core.adapter`, which lets no other method change the module.
    """

    efx_method = "slice_out"
    emits: Span

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Buckets [queries, keys] -> [queries, keys, heads]."""
        kept = self.emits.index(1, 1, self.weight.device) if self.training else None
        if kept is None:
            return nn.Embedding.forward(self, input)
        return F.embedding(input, self.weight.index_select(1, kept))


def put_on(model: nn.Module, plan: Plan, **options: Any) -> bool:
    """Carries a plan out; does nothing, and returns False, where it is carried out already.

    Args:
        model: The model.
        plan: See `blocks.py`.
        **options: What the plan doesn't say of its spans: starts, normalization, shared, schedule and
            accumulate_in_place of `Span`.

    Raises:
        ValueError: If the plan doesn't fit the model.
    """
    _check_plan(plan)
    if _members(model, plan):
        return False
    context = attach_step_context(model)
    spans = {
        spec["emits"]["span"]: Span(name, context=context, **spec["span"], **options)
        for name, spec in plan.items()
        if "span" in spec
    }
    for name, spec in plan.items():
        _put_on(model.get_submodule(name), spec, spans)
    if _HOOK not in model.__dict__:
        model.__dict__[_HOOK] = model.register_forward_pre_hook(_before_forward, with_kwargs=True)
        context.listeners.append(functools.partial(_at_step_begin, model))
    return True


def _put_on(module: nn.Module, spec: dict[str, Any], spans: dict[int, Span]) -> None:
    """Does to one module what the plan says of it."""
    for role in ROLES:
        if role in spec:
            attach(module, role, spans[spec[role]["span"]], spec[role]["blocks"])
    if "bias" in spec:
        with hook_kept(module):
            swap_class(module, SlicedBias)
        vars(module)["emits"] = spans[spec["bias"]["span"]]
    if "follows" in spec:
        _follow(module, {name: (spans[f["span"]], f["times"]) for name, f in spec["follows"].items()})
    for attribute in spec.get("dropouts", ()):
        setattr(module, attribute, 0.0)


def take_off(model: nn.Module, plan: Plan) -> None:
    """Undoes a plan, what it brought onto adapters of peft included; does nothing where it isn't on."""
    gone = {id(member.emits) for member in _members(model, plan)}
    if not gone:
        return
    for module in model.modules():
        if isinstance(module, SlicedMember) and gone & {id(module.emits), id(module.reads)}:
            detach(module)
    for name, spec in plan.items():
        _take_off(model.get_submodule(name), spec)
    if not spans_of(model):
        for module in model.modules():
            if _HOOK in module.__dict__:
                module.__dict__.pop(_HOOK).remove()
        detach_step_context(model)


def _take_off(module: nn.Module, spec: dict[str, Any]) -> None:
    """Undoes to one module what `_put_on` did, but for its membership in spans."""
    with hook_kept(module):
        if isinstance(module, SlicedBias):
            del module.emits
            swap_class(module, nn.Embedding)
        if module.__dict__.pop(_FOLLOWS, None) is not None:
            swap_class(module, type(module).__mro__[1])
    for attribute, value in spec.get("dropouts", {}).items():
        setattr(module, attribute, value)


def _members(model: nn.Module, plan: Plan) -> list[SlicedMember]:
    """The first emitters of the plan's spans that have their sliced classes."""
    modules = (model.get_submodule(name) for name, spec in plan.items() if "span" in spec)
    return [module for module in modules if isinstance(module, SlicedMember)]


def spans_of(model: nn.Module) -> list[Span]:
    """The spans on a model, each once, in the order of the modules that emit them."""
    members = [module for module in model.modules() if isinstance(module, SlicedMember)]
    return list({id(m.emits): m.emits for m in members if m.emits is not None}.values())


def _check_plan(plan: Any) -> None:
    """Checks what a checkpoint says of its modules."""
    known = {"span", "emits", "reads", "channels", "bias", "follows", "dropouts"}
    for name, spec in plan.items():
        unknown = sorted(set(spec) - known) if isinstance(spec, dict) else [spec]
        if unknown:
            raise ValueError(
                f"config.efx says {spec!r} of module {name!r}, where {unknown[0]!r} is unknown. If a newer hf_efx "
                f"wrote it, upgrade hf_efx."
            )


# --- attributes that follow


def _follow(module: nn.Module, attributes: dict[str, tuple[Span, int]]) -> None:
    """Makes attributes of a module give, in a sliced forward, what the span keeps times a number."""
    module.__dict__[_FOLLOWS] = attributes
    with hook_kept(module):
        swap_class(module, _following(type(module), tuple(attributes)))


@functools.cache
def _following(base: type[nn.Module], attributes: tuple[str, ...]) -> type[nn.Module]:
    """A subclass of the same name in which these attributes follow; their own values stay below, in `__dict__`."""

    def reader(attribute: str) -> property:
        def read(self: Any) -> Any:
            span, times = self.__dict__[_FOLLOWS][attribute]
            kept = span.kept() if self.training else None
            return self.__dict__[attribute] if kept is None else kept * times

        return property(read)

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:  # pickle doesn't find a class made here by its name
        return _new, (base, attributes), self.__getstate__()

    body = {name: reader(name) for name in attributes}
    return type(base.__name__, (base,), {**body, "__reduce_ex__": reduce, "__module__": base.__module__})


def _new(base: type[nn.Module], attributes: tuple[str, ...]) -> nn.Module:
    cls = _following(base, attributes)
    return cls.__new__(cls)


# --- what happens at each step and each forward


def watch_settings(model: nn.Module, settings: Callable[[], dict[str, Any]]) -> None:
    """Refuses to begin a step once the settings aren't those of now any more: they were read when slices were put on.

    Args:
        model: A model with slices.
        settings: Gives them, by name.
    """
    listener = functools.partial(_refuse_changes, settings, copy.deepcopy(settings()))
    attach_step_context(model).listeners.append(listener)


def _refuse_changes(settings: Callable[[], dict[str, Any]], before: dict[str, Any]) -> None:
    now = settings()
    for name in before | now if now != before else ():
        if now.get(name) != before.get(name):
            raise ValueError(
                f"SliceOutConfig.{name} was changed after get_efx_model, from {before.get(name, 'its default')!r} to "
                f"{now.get(name, 'its default')!r}, which the model's slices don't know of. Put them on anew: "
                f"get_efx_model(unload(model), config)."
            )


def _at_step_begin(model: nn.Module) -> None:
    """Tells the spans their width, and takes in adapters that came on top.

    Raises:
        ValueError: If the run would have no sliced step, or an adapter can't train on slices.
    """
    for span in spans_of(model):
        span.schedule.check_length(span.context.max_steps)
        span.refresh()
    if hasattr(model, "peft_config"):
        _take_adapters_in(model)


def _before_forward(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuses a cache in a training step, and says so once where nothing begins any step."""
    if torch.compiler.is_compiling() or not model.training:  # compiled, it would cut the graph
        return
    context = step_context(model)
    if context is None:
        return
    if context.active and (
        kwargs.get("use_cache") or any(isinstance(value, Cache) for value in (*args, *kwargs.values()))
    ):
        raise ValueError(
            "A KV cache in a training step: SliceOut keeps other heads at each step, so that keys and values of one "
            "fit no other. Pass use_cache=False and no past_key_values, or call model.eval() first to generate."
        )
    if torch.is_grad_enabled() and not context.started:
        context.started = True
        logger.warning(
            "SliceOut is on, but no training step has begun, so that the model trains dense: use EfxTrainer, pass "
            "SliceOutCallback() to another Trainer, or call begin_step and end_step of hf_efx.step_context(model) in "
            "a loop of your own."
        )


def _take_adapters_in(model: nn.Module) -> None:
    """Makes the factors of LoRAs on sliced layers members too: the one that emits, and the one that reads.

    Raises:
        ValueError: For another kind of adapter.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.named_modules():
        layer: Any = module if isinstance(module, BaseTunerLayer) else None
        base = None if layer is None else layer.get_base_layer()
        if not isinstance(base, SlicedMember):
            continue
        if not isinstance(layer, LoraLayer) or any(layer.use_dora.values()):
            raise ValueError(
                f"{type(layer).__name__} on {name!r}, a layer that SliceOut slices: plain LoRA alone can train on "
                f"such layers. Leave it out of the adapter's target_modules, or call hf_efx.unload(model) first."
            )
        for adapter, reads in layer.lora_A.items():
            emits: Any = layer.lora_B[adapter]
            if base.reads is not None and not isinstance(reads, SlicedMember):
                attach(reads, "reads", base.reads, base.blocks)
            if base.emits is not None and not isinstance(emits, SlicedMember):
                attach(emits, "emits", base.emits, base.blocks)

"""Methods go into a model in memory and come off it: `get_efx_model`, `unload` and `merge_and_unload`.

A module is swapped in place, by its `__class__`, not wrapped: references to it, hooks and device placement stay.
"""

import logging
from collections.abc import Iterable
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

from hf_efx.core.model.method_config import EfxMethodConfig, fields_of
from hf_efx.core.model.pretrained import weights_were_loaded
from hf_efx.core.model.record import (
    EfxConfig,
    check_pruned,
    check_record,
    config_class,
    efx_record,
    entry_config,
    foreign_methods,
    hold_pruned,
    plan_for,
    pruned_modules,
    recorded_methods,
    refuse_foreign,
    write_record,
)
from hf_efx.core.model.swap import refuse_offloaded
from hf_efx.core.model.targets import check_names, warn_of_skipped
from hf_efx.core.model.weight_view import is_factorised
from hf_efx.core.model.wrappers import inner_model, refuse_data_parallel

logger = logging.getLogger(__name__)

_ADAPTER = (
    "put hf_efx on first and the adapter on top, or merge or unload the adapter first. (A low-rank adapter: "
    "peft.get_peft_model(model, LowRankConfig()).)"
)

ModelT = TypeVar("ModelT", bound=nn.Module)


def get_efx_model(
    model: ModelT,
    configs: EfxConfig | EfxMethodConfig | Iterable[EfxMethodConfig] | None = None,
    *,
    pretrained: bool | None = None,
) -> ModelT:
    """Puts methods into a model, in memory.

    Args:
        model: Any `torch.nn.Module`. It is changed in place; of a wrapped one the model inside, which is what is saved
            (see `inner_model`).
        configs: Method configs, applied in order. None puts back what `model.config.efx` names and the model lacks;
            what is there already stays as it is.
        pretrained: Whether the weights are trained, so that configs which would discard them are refused. None takes
            those for trained that `from_pretrained` loaded (see `weights_were_loaded`).

    Returns:
        The same object.

    Raises:
        ValueError: If a config can't be carried out on this model (the reason and the way out are named). Everything
            is checked first: the model is unchanged then.
    """
    inner = inner_model(model)
    if configs is None:
        record = efx_record(inner)
        if record is None:
            raise ValueError("get_efx_model(model) without configs restores what config.efx names, but there is none.")
        check_record(record)
        check_pruned(inner)
        if record := efx_record(inner):  # else it said nothing but of zeros that are gone
            restore_efx_model(model, record, initialise=True)
        return model
    methods = (configs if isinstance(configs, EfxConfig) else EfxConfig(configs)).methods
    if not methods:
        raise ValueError("get_efx_model was given an empty list: pass a config, such as LowRankConfig(rank=0.25).")
    refuse_foreign(inner, adapter=_ADAPTER)
    if any(config.changes_skeleton for config in methods):
        refuse_data_parallel(model, "A method that changes the skeleton")
    if foreign := foreign_methods(inner):
        logger.warning(
            "config.efx names %s, but its layers are dense here: the config is another model's, and that entry goes.",
            ", ".join(entry["method"] for entry in foreign),
        )
    if any(config.target_modules in (None, "all-linear") for config in methods):
        warn_of_skipped(inner)
    plans, kept = _plan_all(inner, methods, pretrained), recorded_methods(inner)
    check_pruned(inner)
    for config, plan in plans:
        config.apply(inner, plan)
    new = [{"method": c.method, "config": c.method_fields(), "modules": plan} for c, plan in plans]
    write_record(inner, [*kept, *new])
    hold_pruned(inner)
    return model


def _plan_all(
    model: nn.Module, methods: list[EfxMethodConfig], pretrained: bool | None
) -> list[tuple[EfxMethodConfig, dict[str, Any]]]:
    """What each method does to which modules; raises where one can't be carried out, the model untouched."""
    dormant = {n: e["method"] for e in recorded_methods(model) for n in plan_for(model, e["modules"])}
    plans, taken = [], {}
    for config in methods:
        _refuse_own_fields(config)
        check_names(model, config)
        targets = config.match(model)
        for name in targets:
            if name in taken:
                raise ValueError(
                    f"{type(config).__name__}: module {name!r} is already taken by the {taken[name]} config before "
                    f"it in the list. Part them with target_modules or exclude_modules."
                )
            if name in dormant:
                raise ValueError(
                    f"{type(config).__name__}: module {name!r} belongs to the {dormant[name]} method which the loaded "
                    f"checkpoint was trained with (config.efx). Put it back with get_efx_model(model), or take it "
                    f"off for good with hf_efx.unload(model) first."
                )
        trained = weights_were_loaded(model, targets) if pretrained is None else pretrained
        plan = config.plan(model, targets, trained)
        for name in plan:
            refuse_offloaded(name, model.get_submodule(name))
        _refuse_pruned(model, config, plan)
        _refuse_tied(model, config, plan)
        taken.update(dict.fromkeys(plan, config.method))
        plans.append((config, plan))
    return plans


def _refuse_own_fields(config: EfxMethodConfig) -> None:
    """Raises for a field of a subclass: `config.efx` goes by the method's name, and couldn't be read back."""
    known = config_class(config.method)
    if own := [name for name in fields_of(type(config)) if name not in fields_of(known)]:
        raise ValueError(
            f"{type(config).__name__}: the field {own[0]!r} isn't one of {known.__name__}, as which config.efx is "
            f"read back, so that the model couldn't be loaded. Keep it elsewhere, such as in a class attribute."
        )


def restore_efx_model(model: nn.Module, record: dict[str, Any], initialise: bool = False, revive: bool = True) -> None:
    """Rebuilds the structure that a record (`config.efx`) describes on a model, in place.

    Args:
        model: The dense model, on any device, meta included. Modules that are rebuilt already stay as they are.
        record: As returned by `efx_record`.
        initialise: Start the rebuilt parameters from the weights that are there, as the configs say. False leaves
            their values for a checkpoint to fill.
        revive: Put methods that act in training alone back, too. False leaves them to the record: inference needs
            nothing of them.

    Raises:
        ValueError: If the record is malformed, newer than this version, or names modules that the model lacks.
    """
    inner = inner_model(model)
    methods = []
    for entry in check_record(record)["methods"]:
        config, plan = entry_config(entry), plan_for(inner, entry["modules"])
        methods.append({**entry, "config": config.method_fields(), "modules": plan})
        if config.changes_skeleton:
            plan = {name: spec for name, spec in plan.items() if not is_factorised(inner.get_submodule(name))}
            if plan:
                refuse_data_parallel(model, type(config).__name__)
        elif not revive:
            continue
        (config.apply if initialise else config.restore)(inner, plan)
    write_record(inner, methods, record.get("pruned"))
    if revive:
        hold_pruned(inner)


def _refuse_pruned(model: nn.Module, config: EfxMethodConfig, plan: dict[str, Any]) -> None:
    """Raises where a method would replace pruned weights, and with them the zeros."""
    pruned = [name for name in pruned_modules(model) if name in plan]
    if config.changes_skeleton and pruned:
        raise ValueError(
            f"{type(config).__name__}: module {pruned[0]!r} is pruned (config.efx), and its zeros would be filled. "
            f"Leave it out with exclude_modules, or give the zeros up with prune(model, 0)."
        )


def _refuse_tied(model: nn.Module, config: EfxMethodConfig, plan: dict[str, Any]) -> None:
    """Raises where transformers would tie what a method has replaced: tie_weights, which loading calls, too."""
    if not config.changes_skeleton or not isinstance(model, PreTrainedModel):
        return
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    names = {key.rpartition(".")[0] for pair in tied.items() for key in pair}
    if found := [name for name in plan if name in names]:
        raise ValueError(
            f"{type(config).__name__}: module {found[0]!r} has a weight of its own, but the model's config ties it "
            f"(tie_word_embeddings), and tie_weights() or loading would undo the factors. Set "
            f"model.config.tie_word_embeddings=False first, or leave it out with exclude_modules."
        )


def merge_and_unload(model: ModelT) -> ModelT:
    """Takes all methods off: a plain dense model with the same outputs and state-dict keys.

    Raises:
        ValueError: If a peft adapter is still on the model, or a method can't be merged (the reason is named). The
            model is unchanged then.
    """
    inner = inner_model(model)
    refuse_foreign(inner, adapter=_ADAPTER)
    entries = [(entry_config(e), plan_for(inner, e["modules"])) for e in reversed(recorded_methods(inner))]
    for config, plan in entries:
        if config.changes_skeleton:
            refuse_data_parallel(model, "merge_and_unload")
        config.check_merge()
        for name in plan:
            refuse_offloaded(name, inner.get_submodule(name))
    for config, plan in entries:
        config.merge(inner, plan)
    write_record(inner, [])
    return model


def unload(model: ModelT) -> ModelT:
    """Takes the training-time methods off and leaves what changes the skeleton (low rank) in place.

    Methods that `config.efx` names and the model lacks (a config reused for a new model) go from it, too.
    """
    inner = inner_model(model)
    kept = []
    for entry in recorded_methods(inner):
        config = entry_config(entry)
        if config.changes_skeleton:
            kept.append(entry)
        else:
            config.merge(inner, plan_for(inner, entry["modules"]))
    write_record(inner, kept)
    return model

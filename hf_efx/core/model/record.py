"""EfxConfig, the ordered list of method configs that a checkpoint carries, and what a model's config says of it.

A checkpoint's `config.json` holds it under `efx`:

    {"format_version": 1, "methods": [{"method": "low_rank", "config": {...}, "modules": {"h.0.attn.c_attn": {...}}}]}

`config` are the user's settings, `modules` the structure they led to. Loading takes targets and ranks from `modules`,
so that a checkpoint outlives changes in how they are chosen; `pruned` beside them names pruned modules. What the
version promises stands in docs/checkpoints.md.

This file must not import peft: transformers' loading imports it.
"""

import copy
import difflib
import importlib
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_efx.core.model.pruned import has_zeros, hold
from hf_efx.core.model.weight_view import is_factorised
from hf_efx.core.model.wrappers import transformers_models, unwrap_model
from hf_efx.registry import METHODS

if TYPE_CHECKING:
    from hf_efx.core.model.method_config import EfxMethodConfig

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
QUANT_METHOD = "hf_efx"


class EfxConfig(QuantizationConfigMixin):
    """Ordered list of method configs.

    Pass it to `from_pretrained(..., quantization_config=EfxConfig([...]))` to make an efx model out of a dense
    checkpoint while it loads, or to `get_efx_model`. It is a quantization config in form only, the official way into
    transformers' loading; nothing is quantised.

    Args:
        methods: Method configs, in the order in which they are applied.

    Raises:
        ValueError: For something that is no method config.
    """

    def __init__(self, methods: "Iterable[EfxMethodConfig] | EfxMethodConfig" = (), **unused: Any) -> None:
        self.quant_method = QUANT_METHOD  # pyright: ignore[reportAttributeAccessIssue]
        unused.pop("quant_method", None)
        if unused:
            raise ValueError(f"EfxConfig: unknown key {next(iter(unused))!r}; it takes a list of method configs.")
        single = isinstance(methods, (str, type)) or hasattr(methods, "method_fields")
        self.methods: list[Any] = [methods] if single or not isinstance(methods, Iterable) else list(methods)
        for config in self.methods:
            if isinstance(config, type) or not hasattr(config, "method_fields"):
                raise ValueError(
                    f"EfxConfig: {config!r} is no config of an hf_efx method. {_what_to_write(config)}; LoRA and "
                    f"other peft configs go on top, with peft.get_peft_model."
                )

    @property
    def base_model_name_or_path(self) -> Any:
        """What peft.get_peft_model asks a config for first.

        Raises:
            ValueError: Always: this is no adapter of peft.
        """
        raise ValueError(
            "peft.get_peft_model takes no EfxConfig: call hf_efx.get_efx_model(model, EfxConfig([...])), or pass a "
            "single LowRankConfig to train it as an adapter of peft."
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON form for `config.quantization_config`: the methods themselves stand in `config.efx`."""
        return {"quant_method": QUANT_METHOD}


def _what_to_write(wrong: Any) -> str:
    name = wrong.__name__ if isinstance(wrong, type) else str(wrong)
    known = {m: row.config.rpartition(".")[2] for m, row in METHODS.items() if row.config}
    known |= {config: config for config in known.values()}
    near = difflib.get_close_matches(name.replace("-", "_"), known, n=1)
    return f"Write {known[near[0]]}()" if near else "Pass for example LowRankConfig(rank=0.25)"


def config_class(method: str) -> "type[EfxMethodConfig]":
    """The config class of a method by its registry name.

    Raises:
        ValueError: If this version knows no model method of that name.
    """
    row = METHODS.get(method)
    if row is None or row.config is None:
        known = ", ".join(name for name, m in METHODS.items() if m.config)
        raise ValueError(
            f"config.efx names the method {method!r}, which this hf_efx lacks (it has: {known}). Upgrade hf_efx."
        )
    module, _, name = row.config.rpartition(".")
    return getattr(importlib.import_module(module), name)


def check_record(record: Any) -> dict[str, Any]:
    """Checks what stands in `config.efx`.

    Returns:
        The record.

    Raises:
        ValueError: If it is malformed or written in a newer format.
    """
    if not isinstance(record, dict) or not isinstance(record.get("methods"), list):
        raise ValueError(f"config.efx is {record!r}; expected {{'format_version': ..., 'methods': [...]}}.")
    version = record.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(
            f"config.efx has format_version={version!r}; expected a whole number from 1 to {FORMAT_VERSION}."
        )
    if version > FORMAT_VERSION:
        raise ValueError(
            f"config.efx has format_version={version}, this one reads up to {FORMAT_VERSION}: a newer one wrote the "
            f"checkpoint. Upgrade with `pip install -U hf_efx`."
        )
    if "pruned" in record:
        _check_pruned(record["pruned"])
    for entry in record["methods"]:
        if not isinstance(entry, dict) or not isinstance(entry.get("modules"), dict) or "method" not in entry:
            raise ValueError(f"config.efx has the entry {entry!r}; expected {{'method': ..., 'modules': {{...}}}}.")
        unknown = sorted(set(entry) - {"method", "config", "modules"})
        if unknown:
            raise ValueError(
                f"config.efx has the unknown key {unknown[0]!r} in its {entry['method']!r} entry. Known keys: method, "
                f"config, modules. If a newer hf_efx wrote the checkpoint, upgrade hf_efx."
            )
    return record


def _check_pruned(pruned: Any) -> None:
    entries = pruned.items() if isinstance(pruned, dict) else [(None, None)]
    for name, spec in entries:
        if not isinstance(spec, dict) or set(spec) - {"bias", "follows"}:
            raise ValueError(
                f"config.efx has pruned={pruned if name is None else {name: spec}!r}; expected {{module: {{}}}}, with "
                f"'bias' or 'follows' in it. If a newer hf_efx wrote the checkpoint, upgrade hf_efx."
            )


def entry_config(entry: dict[str, Any]) -> "EfxMethodConfig":
    """The method config that an entry of `config.efx` describes.

    Raises:
        ValueError: For an unknown method, key or value.
    """
    return config_class(entry["method"])(**entry.get("config", {}))


def efx_record(model: nn.Module) -> dict[str, Any] | None:
    """What stands in `model.config.efx` (without a transformers config: in `model.efx`), None if nothing.

    Of a wrapped model it is that of the model inside, see `wrappers.inner_model`; of several side by side none.
    """
    return getattr(_record_holder(_keeper(model)), "efx", None)


def recorded_methods(model: nn.Module) -> list[dict[str, Any]]:
    """The record's entries of methods, without those of `foreign_methods`."""
    foreign = foreign_methods(model)
    return [entry for entry in (efx_record(model) or {"methods": []})["methods"] if entry not in foreign]


def foreign_methods(model: nn.Module) -> list[dict[str, Any]]:
    """Entries that name factorised layers, though all of these are dense: the config came from another model.

    `AutoModel.from_config(config)` builds a dense model whatever `config.efx` says, and saved like that it couldn't be
    loaded.
    """
    result = []
    for entry in (efx_record(model) or {"methods": []})["methods"]:
        if config_class(entry["method"]).changes_skeleton:
            names = plan_for(_keeper(model), entry["modules"])
            if not any(is_factorised(_keeper(model).get_submodule(name)) for name in names):
                result.append(entry)
    return result


def refuse_foreign_methods(model: nn.Module) -> None:
    """Raises ValueError, before any work, for a model that a config of another one claims to be factorised."""
    if foreign := foreign_methods(model):
        raise ValueError(
            f"config.efx says that {type(model).__name__} was made by {foreign[0]['method']}, but its layers are "
            f"dense: its config is another model's, and what is saved couldn't be loaded. Call "
            f"hf_efx.get_efx_model(model) to put the method on, or hf_efx.unload(model) to drop the entry."
        )


def refuse_foreign(model: nn.Module, adapter: str) -> None:
    """Raises ValueError for a model with an adapter of peft on it, or one whose weights are quantised.

    Args:
        model: The model.
        adapter: The way out of the first.
    """
    if hasattr(model, "peft_config"):
        raise ValueError(f"{type(model).__name__} already carries a peft adapter: {adapter}")
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and quantizer.quantization_config.quant_method != QUANT_METHOD:
        raise ValueError(
            f"The model is quantised ({quantizer.quantization_config.quant_method}): its weights are packed integers. "
            f"Load it without quantization_config, and quantise at the end."
        )


def _keeper(model: nn.Module) -> nn.Module:
    found = list(transformers_models(model).values())
    return found[0] if len(found) == 1 else unwrap_model(model)


def _record_holder(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    return config if isinstance(config, PreTrainedConfig) else model


def write_record(
    model: nn.Module, methods: list[dict[str, Any]], pruned: dict[str, dict[str, Any]] | None = None
) -> None:
    """Writes the methods, and the pruned modules, which None leaves as they are."""
    pruned = pruned_modules(model) if pruned is None else pruned
    model = _keeper(model)
    holder: Any = _record_holder(model)
    if holder is not model:
        holder = _own_config(model, holder)
    if methods or pruned:
        flag = {"pruned": pruned} if pruned else {}
        holder.efx = {"format_version": FORMAT_VERSION, "methods": methods, **flag}
    elif hasattr(holder, "efx"):
        del holder.efx
    if holder is model:
        return
    # Read by core/model/loading.py. On the live model it is a plain dict: transformers and the Trainer take only a
    # model that carries an `hf_quantizer` for a quantised one, and `save_pretrained` writes it as it stands.
    mark = {"quant_method": QUANT_METHOD}
    if any(config_class(entry["method"]).changes_skeleton for entry in methods):
        holder.quantization_config = mark
        # Files name tensors as modules do. transformers would save a ViT or DINOv2 under an older layout's names, with
        # weights joined that are factors here.
        model._weight_conversions = []  # pyright: ignore[reportArgumentType]
    elif getattr(holder, "quantization_config", None) == mark:
        del holder.quantization_config
        model.__dict__.pop("_weight_conversions", None)
    _guard_resizing(model)


def _guard_resizing(model: Any) -> None:
    """transformers would resize the input embeddings, and only then find no two-dimensional weight in the head."""
    model.__dict__.pop("resize_token_embeddings", None)
    if isinstance(head := model.get_output_embeddings(), nn.Module) and is_factorised(head):
        model.__dict__["resize_token_embeddings"] = _refuse_resizing


def _refuse_resizing(*args: Any, **kwargs: Any) -> None:
    raise ValueError(
        "resize_token_embeddings: the output embeddings are factorised, and a row can't be added to factors. Call "
        "hf_efx.merge_and_unload(model) first, and put the method on again afterwards."
    )


def _own_config(model: nn.Module, config: PreTrainedConfig) -> PreTrainedConfig:
    """Gives the model, in all its parts, a copy of the config.

    A model keeps the config object that it was built from: its dense twin, built from the same object, must not be
    recorded as factorised. Parts of a composite model (Llava, an encoder-decoder) read configs inside that one.
    """
    copies: dict[int, Any] = {}
    own = copy.deepcopy(config, copies)
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, PreTrainedConfig) and id(value) in copies:
                module.__dict__[name] = copies[id(value)]
    return own


def plan_for(model: nn.Module, modules: dict[str, Any]) -> dict[str, Any]:
    """A record's modules under the names they have in this model.

    A checkpoint of `GPT2LMHeadModel` says `transformer.h.0...` where `GPT2Model` says `h.0...`, and the reverse.

    Raises:
        ValueError: If a module can't be found.
    """
    names = {name for name, _ in model.named_modules()}
    prefix = getattr(model, "base_model_prefix", "")
    result = {}
    for name, spec in modules.items():
        candidates = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
        found = next((c for c in candidates if c in names), None)
        if found is None:
            raise ValueError(
                f"config.efx names the module {name!r}, which {type(model).__name__} doesn't have: the checkpoint "
                f"belongs to another architecture, or its config.json was changed."
            )
        result[found] = spec
    return result


def hold_pruned(model: nn.Module) -> None:
    """Lets optimizers leave the zeros of a pruned model at zero, as `config.efx` says.

    Nothing is done without that flag, and under an adapter of peft, which freezes the model's own weights.

    Raises:
        ValueError: If the record names modules that the model lacks.
    """
    model = _keeper(model)
    if not hasattr(model, "peft_config") and (flagged := _flagged(model)):
        _hold(model, flagged)


def check_pruned(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The pruned modules, whose names alone `config.efx` keeps, with a log line where others lose theirs.

    Dense weights that were loaded, or written by hand, over pruned ones leave the flag behind.

    Raises:
        ValueError: If the record names modules that the model lacks.
    """
    there = pruned_modules(model)
    if gone := [name for name in _flagged(model) if name not in there]:
        logger.warning(
            "config.efx says that %s%s pruned, but no weight there is zero: others were written or loaded since, and "
            "that entry goes. To prune them again call hf_efx.prune.",
            *(gone[0], f" and {len(gone) - 1} more are" if gone[1:] else " is"),
        )
        write_record(model, (efx_record(model) or {"methods": []})["methods"], there)
        _hold(_keeper(model), there)
    return there


def mark_pruned(model: nn.Module, modules: dict[str, dict[str, Any]]) -> None:
    """Writes into `config.efx` which modules are pruned (see pruned.py), and holds their zeros; {} ends both."""
    write_record(model, recorded_methods(model), modules)
    _hold(_keeper(model), modules)


def _hold(model: nn.Module, modules: dict[str, dict[str, Any]]) -> None:
    from hf_efx.core.model.peft_guard import guard_adapters  # imports peft

    hold(model, modules)
    guard_adapters()


def pruned_modules(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The modules that `config.efx` says are pruned, under the names that they have in this model.

    Those without a zero aren't: the config came from another model, or dense weights were loaded since.
    """
    result = {}
    for name, spec in _flagged(model).items():
        if has_zeros(_keeper(model).get_submodule(spec.get("follows", name))):
            result[name] = spec
    return result


def _flagged(model: nn.Module) -> dict[str, dict[str, Any]]:
    model = _keeper(model)
    result = {}
    for name, spec in plan_for(model, (efx_record(model) or {}).get("pruned") or {}).items():
        follows = [("follows", next(iter(plan_for(model, {spec["follows"]: None}))))] if "follows" in spec else []
        result[name] = {**spec, **dict(follows)}
    return result

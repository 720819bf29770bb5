"""The base of the methods' PEFT-style configs: what a config must be able to do for `core/model/adapter.py`."""

import dataclasses
import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft import PeftConfig
from torch import nn

from hf_efx.core.model.targets import match_targets

# Fields of PeftConfig that describe an adapter file or a run, not the method: they stay out of `config.efx`.
_HOUSEKEEPING = {field.name for field in dataclasses.fields(PeftConfig)}
# What other configs of peft call the same thing.
_PEFT_NAMES = {"r": "rank", "init_lora_weights": "init", "init_weights": "init", "lora_dropout": "rate", "p": "rate"}


@dataclass
class EfxMethodConfig(PeftConfig):
    """Config of a model method, a PeftConfig in form.

    Subclasses set the two class attributes and implement `plan`, `apply`, `restore` and `merge`, the last so that it
    does nothing to a module that the method isn't on.

    Attributes:
        method: Name of the method, as in `hf_efx.registry.METHODS`.
        changes_skeleton: True where the method replaces parameters, so that loading a checkpoint has to rebuild it;
            False for methods that act in training alone.
    """

    method: ClassVar[str]
    changes_skeleton: ClassVar[bool]

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Modules to act on: names or suffixes, one regular expression that matches whole names, or None / "
            "'all-linear' for every Linear, Conv1D and Conv2d that is no embedding, stem or head."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules to leave alone, in the same form as target_modules."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to act on; None means all of them."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Name of the module list that layers_to_transform counts in, such as 'h', where it can't be found."
        },
    )

    def __new__(cls, *args: Any, **kwargs: Any) -> "EfxMethodConfig":
        fields = {f.name for f in dataclasses.fields(cls) if f.init}
        if args:
            own = [name for name in fields_of(cls) if name not in fields_of(EfxMethodConfig)]
            first = (own or fields_of(cls))[0]
            raise TypeError(
                f"{cls.__name__} takes keywords alone, such as {cls.__name__}({first}={args[0]!r}), but got the "
                f"positional value {args[0]!r}."
            )
        # peft drops unknown keys with a warning; a key that is dropped is a setting that silently isn't there.
        unknown = sorted(set(kwargs) - fields)
        if unknown:
            name, value = unknown[0], kwargs[unknown[0]]
            known = fields_of(cls)
            near = [n for n in (_PEFT_NAMES.get(name), *difflib.get_close_matches(name, known, n=1)) if n in known]
            raise ValueError(
                f"{cls.__name__}: unknown key {name!r} (value {value!r})"
                + (f"; write {near[0]}={value!r}" if near else "")
                + f". Known keys: {', '.join(sorted(known))}. If a newer hf_efx wrote this config, upgrade hf_efx."
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), (set, tuple)):
                setattr(self, name, sorted(getattr(self, name)))
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            if self.target_modules != "all-linear":
                raise ValueError(
                    f"layers_to_transform={self.layers_to_transform!r} has no effect where target_modules is a "
                    f"regular expression ({self.target_modules!r}): put them into it, or list module names."
                )

        if self.layers_to_transform == []:
            raise ValueError("layers_to_transform=[] chooses no layer: list some, or leave it out for all of them.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r} has no effect without layers_to_transform: list the layers, "
                f"or leave it out."
            )

    def refuse_inert(self, names: Iterable[str], reason: str) -> None:
        """Raises ValueError for a field of those named that was set away from its default, and can't act."""
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for name in names:
            if (value := getattr(self, name)) != defaults[name]:
                raise ValueError(f"{name}={value!r} has no effect {reason}, or leave it at {defaults[name]!r}.")

    def method_fields(self) -> dict[str, Any]:
        """The method's own fields, defaults too, as JSON values: what `config.efx` keeps."""
        values = {name: getattr(self, name) for name in fields_of(type(self))}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def changed_fields(self) -> dict[str, Any]:
        """Those of them that differ from their defaults."""
        defaults = type(self)().method_fields()
        return {name: value for name, value in self.method_fields().items() if value != defaults[name]}

    def match(self, model: nn.Module) -> dict[str, nn.Module]:
        """The modules that the config acts on, by name, as `target_modules` and the fields beside it choose.

        Raises:
            ValueError: If nothing matches, or a module that was named can't be changed (with the reason).
        """
        return match_targets(model, self)

    def check_pretrained(self) -> None:
        """Raises ValueError where the config would discard trained weights; called before they are loaded."""

    def check_merge(self) -> None:
        """Raises ValueError where the method can't be merged; called before any module is touched."""

    def plan(self, model: nn.Module, targets: dict[str, nn.Module], pretrained: bool) -> dict[str, dict[str, Any]]:
        """Decides what happens to each target, and refuses what can't be done, without touching the model.

        Args:
            model: The model.
            targets: Matched modules by name.
            pretrained: True where the weights are known to be trained, so that discarding them is an error.

        Returns:
            For each module that is changed, JSON values from which `restore` rebuilds its structure.
        """
        raise NotImplementedError

    def describe(self, plan: dict[str, dict[str, Any]]) -> dict[str, str]:
        """What the plan does to each module, in short, for `hf-efx plan`."""
        return {name: ", ".join(f"{key} {value}" for key, value in spec.items()) for name, spec in plan.items()}

    def apply(self, model: nn.Module, plan: dict[str, dict[str, Any]]) -> None:
        """Carries the plan out, keeping or initialising values as the config says."""
        raise NotImplementedError

    def restore(self, model: nn.Module, plan: dict[str, dict[str, Any]]) -> None:
        """Rebuilds the structure that the plan describes on a dense model, leaving values to be loaded."""
        raise NotImplementedError

    def merge(self, model: nn.Module, plan: dict[str, dict[str, Any]]) -> None:
        """Takes the method off: dense modules with the same outputs and keys as before it came."""
        raise NotImplementedError

    def expected_tensors(self, plan: dict[str, dict[str, Any]]) -> dict[str, list[int]]:
        """Names and shapes of the tensors that a checkpoint of this plan must hold beyond a dense model's.

        Empty for methods that leave the skeleton as it is.
        """
        return {}


def fields_of(config_class: type[EfxMethodConfig]) -> list[str]:
    """Names of a config's own fields, in order, without those that every config of peft has."""
    return [f.name for f in dataclasses.fields(config_class) if f.init and f.name not in _HOUSEKEEPING]

"""Which model a program trains: a checkpoint, or a new one from a config."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from hf_efx.programs.command_line import was_given


def computing_device(name: str | None) -> torch.device:
    """The device of that name; None is the accelerator, if there is one.

    Raises:
        ValueError: If it can't be used.
    """
    try:
        if name is None and torch.accelerator.is_available():
            return torch.empty(0, device=torch.accelerator.current_accelerator()).device
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={name!r} can't be used ({str(error).splitlines()[0]}).") from error


@dataclass
class ModelOptions:
    """Which model."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "A checkpoint to start from, dense or of hf_efx: a folder or a name on the Hub. Without it the "
            "model is trained from scratch.",
            "aliases": ["--model"],
        },
    )
    model_type: str = field(
        default="gpt2", metadata={"help": "Architecture of a model from scratch, by its transformers name."}
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Settings of a model from scratch in place of the defaults: 'n_layer=2,n_embd=128'."},
    )

    def check(self) -> None:
        """Refuses settings of a model from scratch beside a checkpoint, which has its own."""
        for name in (f.name for f in fields(self)):
            if self.model_name_or_path and name != "model_name_or_path" and was_given(self, name):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is for a model from scratch, but "
                    f"model_name_or_path={self.model_name_or_path!r} names a checkpoint: give one of them."
                )


def scratch_config(
    model_type: str, overrides: str | Mapping[str, Any] | None, tokenizer: PreTrainedTokenizerBase | None = None
) -> PreTrainedConfig:
    """The config of a new model.

    Args:
        model_type: transformers' name of the architecture.
        overrides: Settings in place of the defaults, as a mapping or as in `"n_layer=2,n_embd=128"`.
        tokenizer: Gives the vocabulary's size and the special tokens; None leaves the architecture's own.

    Raises:
        ValueError: For an unknown architecture or setting, or a malformed text.
    """
    settings = dict(parse_overrides(overrides) if isinstance(overrides, str) else overrides or {})
    known = AutoConfig.for_model(model_type)
    for name, value in settings.items():
        if not hasattr(known, name):
            raise ValueError(
                f"config_overrides: {name!r} is no setting of {type(known).__name__}; it has, among others: "
                f"{', '.join(sorted(set(known.to_dict()) - set(PreTrainedConfig().to_dict())))}."
            )
        if isinstance(getattr(known, name), float) and isinstance(value, str):
            settings[name] = float(value)  # YAML takes 1e-5 for a text
    vocabulary: dict[str, Any] = {}
    if tokenizer is not None:
        vocabulary = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        vocabulary["vocab_size"] = len(tokenizer)
    return AutoConfig.for_model(model_type, **{**vocabulary, **settings})


def parse_overrides(text: str) -> dict[str, Any]:
    """Reads `"n_layer=2,hidden_sizes=[16,32]"`; values as YAML has them. No value raises ValueError."""
    parts = re.split(r",(?![^\[]*\])", text)  # not inside of hidden_sizes=[16,32]
    pairs = [part.partition("=") for part in parts if part.strip()]
    wrong = next((part for part in pairs if not part[1]), None)
    if wrong:
        raise ValueError(f"config_overrides={text!r}: {wrong[0]!r} has no value; expected 'n_layer=2,n_embd=128'.")
    return {name.strip(): yaml.safe_load(value) for name, _, value in pairs}


def checkpoint_config(name: str) -> PreTrainedConfig:
    """The config of a checkpoint.

    Raises:
        OSError: If there is no such checkpoint.
    """
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():  # transformers would ask the Hub, and say so
        raise FileNotFoundError(f"model_name_or_path={name!r}: there is no such folder.")
    return AutoConfig.from_pretrained(name)

"""Our options, as plain dataclass mixins: the same ones go onto any training arguments.

    @dataclass
    class MySFTConfig(EfxArgumentsMixin, SFTConfig): ...

An option's one text is its field's `metadata["help"]`: the command line and the docs pages read it there.
"""

import math
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, NamedTuple

from transformers import TrainingArguments


@dataclass
class EfxArgumentsMixin:
    """Options of every `EfxTrainerMixin`. Add it before the training arguments of your Trainer."""

    model_card: bool = field(
        default=True,
        metadata={
            "help": "Write our model card (README.md: the method, its settings, the run's last figures) where the "
            "Trainer writes its own, on every push. False writes none and leaves a README.md of your own alone."
        },
    )


@dataclass
class EfxArguments(EfxArgumentsMixin, TrainingArguments):
    """`transformers.TrainingArguments` with our options."""


class Option(NamedTuple):
    """One option, as `describe_options` lists it."""

    name: str
    default: Any
    help: str


def describe_options(options: type) -> list[Option]:
    """Lists a dataclass' options in the order of its fields, for docs pages and the command line.

    Args:
        options: A dataclass: a mixin for its own options, full arguments for all of them.

    Returns:
        Name, default (`dataclasses.MISSING` where a value must be given) and help text of each field that can be set.

    Raises:
        ValueError: If a field has no help text.
    """
    result = []
    for f in fields(options):
        if not f.init:
            continue
        text = f.metadata.get("help")
        if not text:
            raise ValueError(f"{options.__name__}.{f.name} has no help text; give its field metadata={{'help': ...}}.")
        result.append(Option(f.name, f.default if f.default_factory is MISSING else f.default_factory(), text))
    return result


def parse_number(value: str | int | float, name: str, words: tuple[str, ...] = ()) -> int | float | str:
    """Reads an option that is a whole number, a fraction, or one of some words.

    HfArgumentParser takes a `float | int | str` field for an int and rejects 0.25; so such a field is annotated `str`,
    and its dataclass calls this in `__post_init__`.

    Args:
        value: What was given: "4", "0.25", "1e-3", "auto", or a number already.
        name: The option's name, for the error.
        words: Words that are allowed as they stand.

    Returns:
        An int where the text is a whole number ("4"), a float for any other finite number ("4.0" too), or the word.

    Raises:
        ValueError: For anything else.
    """
    if value in words:
        return value
    for kind in (int, float):
        # A bool is an int in Python, and a float would be cut to one.
        if isinstance(value, str) or type(value) is kind:
            try:
                number = kind(value)
            except ValueError:
                continue
            if math.isfinite(number):
                return number
    expected = " or ".join(["a number", *(f"'{word}'" for word in words)])
    raise ValueError(f"{name}={value!r} is not {expected}, such as 4 or 0.25.")

"""Options of a program: dataclasses and a method's config, from a YAML file and from the command line on top of it.

A YAML file is turned into the arguments that it stands for, so that a value is read in one way wherever it is given.
"""

import argparse
import dataclasses
import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser

from hf_efx.core.training.arguments import parse_number


class OptionParser(HfArgumentParser):
    """HfArgumentParser with `--config run.yaml`, a method's config beside the dataclasses, and short errors.

    Args:
        options: Dataclasses; each of their fields is an option.
        config: A method's config class; its own fields (not those of every peft config) are options too.
        prog: The command's name.
        description: What the command does.
    """

    def __init__(self, options: Sequence[type], config: type | None, prog: str, description: str) -> None:
        super().__init__(
            options,  # pyright: ignore[reportArgumentType]
            prog=prog,
            description=description,
            usage=f"{prog} [--config run.yaml] [--option value ...]",  # with every option it would fill the screen
            allow_abbrev=False,
        )
        for action in self._actions:  # argparse formats help texts with %
            action.help = action.help and re.sub(r"(?<!%)%(?![%(])", "%%", action.help)
        self.options, self.config = list(options), config
        self.given: frozenset[str] = frozenset()  # names of the options that `read` found
        self.add_argument("--config", help="YAML file of options, which the command line overrides.")
        self._config_fields = config_option_fields(config) if config else []
        if config:
            group = self.add_argument_group(
                config.__name__, 'A list is written as several values or "[a, b]", a mapping as "{pattern: value}".'
            )
            for f in self._config_fields:
                default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
                text = f"{f.metadata['help']} (default: {default})".replace("%", "%%")
                names = dict.fromkeys((f"--{f.name}", f"--{f.name.replace('_', '-')}"))
                group.add_argument(
                    *names, dest=f.name, nargs="+", default=argparse.SUPPRESS, metavar="VALUE", help=text
                )

    def read(self, arguments: Sequence[str]) -> tuple[Any, ...]:
        """Reads the options.

        Args:
            arguments: The command line without the program's name.

        Returns:
            One instance of each dataclass, then one of the config class, if there is one. Wrong input ends the program
            with status 2 and a line that names the option, the value and the way out.
        """
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.error = self.error
        first.add_argument("--config", action="append", default=[])
        paths = first.parse_known_args(arguments)[0].config
        try:
            if len(paths) > 1:
                raise ValueError(f"config={paths[0]!r} and config={paths[1]!r}: give one file.")
            from_file = self._file_arguments(Path(paths[0])) if paths else []
            found, unknown = self.parse_known_args([*from_file, *arguments])
            if unknown:
                raise ValueError(f"unknown option {unknown[0]}{self._near(unknown[0])}.")
            values = vars(found)
            unset = argparse.Namespace(**dict.fromkeys(values))
            words = vars(self.parse_known_args([*from_file, *arguments], unset)[0])
            self.given = frozenset(name for name, value in words.items() if value is not None)
            fields = [[f.name for f in dataclasses.fields(kind) if f.init] for kind in self.options]
            read = [kind(**{n: values[n] for n in names}) for kind, names in zip(self.options, fields, strict=True)]
            if self.config:
                read.append(self.config(**self._config_values(values)))
            return tuple(read)
        except (ValueError, OSError, ImportError) as error:  # --deepspeed without deepspeed is the last
            self.error(str(error))

    def error(self, message: str) -> NoReturn:
        """Ends the program with status 2 and the message, without a list of all options."""
        self.exit(2, f"{self.prog}: error: {message}\n")

    def _file_arguments(self, path: Path) -> list[str]:
        """The command line that a YAML file stands for."""
        where = f"config={str(path)!r}"
        try:
            text = path.read_text(encoding="utf-8")
            # As written: YAML's own types would make `no` False and `1e-3` a string. A mapping alone needs them.
            written, typed = yaml.load(text, _OnceLoader), yaml.safe_load(text)
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{where} can't be read ({error}): name a YAML file.") from None
        except yaml.YAMLError as error:
            raise ValueError(f"{where} is no YAML: {error}") from None
        if not isinstance(written, dict):
            raise ValueError(f"{where} holds no `option: value` lines.")
        result, named = [], dict[str, str]()
        for key, value in written.items():
            option = f"--{key}"
            if option not in self._option_string_actions or option in ("--config", "--help"):
                raise ValueError(f"{where}: unknown key {key!r}{self._near(option)}.")
            name = self._option_string_actions[option].dest
            if name in named:
                raise ValueError(
                    f"{where} says {name} twice, as {named[name]!r} and as {key!r}: leave one of them out."
                )
            named[name] = key
            result += self._words(option, value, typed[key], where)
        return result

    def _words(self, option: str, written: Any, typed: Any, where: str) -> list[str]:
        """The words of one line of a YAML file; none where it says what holds without it."""
        default = self._option_string_actions[option].default
        if isinstance(written, dict):
            return [f"{option}={json.dumps(typed)}"]
        if isinstance(written, list):
            if not all(isinstance(one, str) for one in written):
                raise ValueError(f"{where}: {option[2:]}={typed!r} holds more than values: write it as [a, b].")
            return [option, *written] if written or default not in (None, []) else []
        if written not in ("", "~", "null"):
            return [f"{option}={written}"]
        if default not in (None, argparse.SUPPRESS):
            raise ValueError(f"{where}: {option[2:]} has no value: give one, or leave the line out.")
        return [] if default is None else [f"{option}=null"]

    def _near(self, option: str) -> str:
        wanted = option.lstrip("-").partition("=")[0].replace("-", "_")
        known = {name.lstrip("-").replace("-", "_") for name in self._option_string_actions}
        near = difflib.get_close_matches(wanted, sorted(known), n=3)
        return f"; did you mean {' or '.join(near)}" if near else f"; {self.prog} --help lists all"

    def _config_values(self, found: dict[str, Any]) -> dict[str, Any]:
        hints = get_type_hints(self.config)
        return {f.name: _value(found[f.name], hints[f.name], f.name) for f in self._config_fields if f.name in found}


class _OnceLoader(yaml.BaseLoader):
    """YAML as written, in which no key may stand twice: the first would be dropped."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := [key for i, key in enumerate(keys) if key in keys[:i]]:
            raise yaml.YAMLError(f"the key {twice[0]!r} stands twice in it.")
        return super().construct_mapping(node, deep)


def was_given(options: Any, name: str) -> bool:
    """Whether an option has another value than its default.

    Args:
        options: An instance of a dataclass.
        name: Of the option.
    """
    default = next(f for f in dataclasses.fields(options) if f.name == name)
    factory = default.default_factory
    return getattr(options, name) != (default.default if factory is dataclasses.MISSING else factory())


def resume_point(value: str | None) -> str | bool | None:
    """What `--resume_from_checkpoint` says: "true" is the newest checkpoint, "false" none, else a folder."""
    return {"true": True, "false": None}.get(str(value).lower(), value)


def config_option_fields(config: type) -> list[dataclasses.Field[Any]]:
    """The fields of a method's config that are the method's own, with a help text, not those of every peft config.

    One whose metadata says `"command_line": False` holds more than words can say, and is left out.
    """
    from peft import PeftConfig

    common = {f.name for f in dataclasses.fields(PeftConfig)}
    own = (f for f in dataclasses.fields(config) if f.init and f.name not in common)
    return [f for f in own if f.metadata.get("command_line", True)]


def _value(words: Sequence[str], annotation: Any, name: str) -> Any:
    """A config field's value from the words of its option."""
    if len(words) > 1:
        return [_scalar(word) for word in words]
    word = words[0]
    if annotation is bool:
        if word.lower() not in ("true", "false"):
            raise ValueError(f"{name}={word!r}: expected true or false.")
        return word.lower() == "true"
    if word[:1] in ("[", "{"):
        try:
            return yaml.safe_load(word)
        except yaml.YAMLError:
            return word  # a regular expression may begin like a list
    value = _scalar(word)
    takes_lists = any(getattr(kind, "__origin__", kind) is list for kind in get_args(annotation))
    # A name alone, such as c_attn, is a suffix; as a regular expression it would match next to nothing.
    return [value] if takes_lists and isinstance(value, str) and value.isidentifier() else value


def _scalar(word: str) -> Any:
    if word.lower() in ("null", "none"):
        return None
    try:
        return parse_number(word, "")
    except ValueError:
        return word

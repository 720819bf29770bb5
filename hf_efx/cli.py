"""The command `hf-efx`.

    hf-efx list                                       the methods
    hf-efx METHOD --config run.yaml [--option value]  trains; METHOD --help lists the options
    hf-efx plan --method METHOD --model MODEL         what a config would do to a model, without its weights
    hf-efx env                                        versions and devices, for a bug report

This module imports nothing heavy: `list` answers at once.
"""

import importlib
import importlib.metadata
import importlib.util
import logging
import os
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_efx.registry import METHODS, Method
from hf_efx.version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: The command line without the program's name; None for `sys.argv[1:]`.

    Returns:
        The exit status: 2 for wrong input.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    name, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    commands: dict[str, Callable[[], None]] = {"list": _list, "env": _env}
    if name in ("-h", "--help"):
        print("\n".join((__doc__ or "").splitlines()[2:-3]))
        return 0
    if name == "--version":
        print(f"hf_efx {__version__}")
        return 0
    if name == "plan":
        return _plan(rest)
    if name in commands:
        if rest:
            return _fail(f"{name} takes no options, but got {rest[0]!r}.")
        commands[name]()
        return 0
    method = METHODS.get(name.replace("-", "_"))
    if method is None:
        return _fail(f"unknown command {name!r}{_near(name, ['list', 'plan', 'env', *_commands(METHODS.values())])}")
    if method.program is None:
        available = ", ".join(_commands(m for m in METHODS.values() if m.program))
        return _fail(f"{method.command} ({method.title}) is planned and not here yet. Available now: {available}.")
    return _load(method.program)(rest)


def _commands(methods: Iterable[Method]) -> list[str]:
    return [method.command for method in methods]


def _near(word: str, known: Sequence[str]) -> str:
    import difflib

    near = difflib.get_close_matches(word, known, n=3)
    return f"; did you mean {' or '.join(near)}?" if near else f"; there are {', '.join(known)}."


def _fail(message: str) -> int:
    print(f"hf-efx: error: {message}", file=sys.stderr)
    return 2


def _load(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _print_table(titles: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[int] = ()) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    for i, title in enumerate(titles):
        table.add_column(title, justify="right" if i in right else "left", overflow="fold", no_wrap=i == 0)
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _list() -> None:
    rows = []
    for m in METHODS.values():
        rows.append((m.command, m.task, f"{m.authors.split(',')[0]} et al. {m.year}, arXiv {m.arxiv}", m.status))
    _print_table(("method", "what it is for", "paper", "status"), rows)


def _env() -> None:
    import torch

    from hf_efx.core.results.evidence import cpu

    names = ("torch", "transformers", "accelerate", "peft", "datasets", "evaluate", "safetensors", "huggingface_hub")
    rows = [("hf_efx", __version__), ("python", f"{platform.python_version()} on {platform.platform()}")]
    rows += [(name, importlib.metadata.version(name)) for name in names]
    optional = {"plot": "matplotlib", "mt": "sacrebleu", "tabular": "sklearn", "dev": "pytest"}
    there = [extra for extra, module in optional.items() if importlib.util.find_spec(module)]
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    rows += [
        ("extras", ", ".join(there) or "none"),
        ("CPU", "{} ({})".format(*cpu())),
        ("CPU cores", os.cpu_count()),
        ("torch threads", torch.get_num_threads()),
        ("accelerator", torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "none"),
        ("GPUs", ", ".join(gpus) or "none"),
        ("accelerate config", _accelerate_config()),
    ]
    _print_table(("", ""), rows)


def _accelerate_config() -> str:
    from accelerate.commands.config.config_args import default_config_file

    return default_config_file if os.path.isfile(default_config_file) else "none (defaults)"


@dataclass
class PlanOptions:
    """Options of `hf-efx plan` beside the model's and the method's."""

    method: str = field(default="low-rank", metadata={"help": "The method, as `hf-efx list` names it."})
    weights: bool = field(
        default=False, metadata={"help": "Load the checkpoint's weights, which rank='auto' reads. Takes its memory."}
    )


def _plan(argv: Sequence[str]) -> int:
    """Shows what a method's config would do to a model."""
    import argparse

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--method", default="low-rank")
    wanted = first.parse_known_args(argv)[0].method
    method = METHODS.get(wanted.replace("-", "_"))
    if method is None or method.config is None:
        known = [m.command for m in METHODS.values() if m.config]
        return _fail(f"--method {wanted!r} has no config to plan with; there are {', '.join(known)}.")

    from hf_efx.programs.command_line import OptionParser
    from hf_efx.programs.model_options import ModelOptions

    parser = OptionParser((ModelOptions, PlanOptions), _load(method.config), "hf-efx plan", "What a config would do.")
    model_options, options, config = parser.read(argv)
    messages = logging.getLogger("hf_efx.low_rank")
    level = messages.level
    messages.setLevel(logging.ERROR)  # the table says which layers stay dense
    try:
        _show_plan(_skeleton(model_options, options.weights), config)
    except (ValueError, OSError) as error:
        parser.error(f"{error} Pass --weights to load them." if "meta device" in str(error) else str(error))
    finally:
        messages.setLevel(level)
    return 0


def _skeleton(options: Any, weights: bool) -> Any:
    """A model of any kind, not only a causal one: on the meta device, unless its weights are asked for."""
    import torch
    import transformers

    from hf_efx.programs.model_options import checkpoint_config, scratch_config

    name = options.model_name_or_path
    config = checkpoint_config(name) if name else scratch_config(options.model_type, options.config_overrides)
    options.check()
    if getattr(config, "efx", None):
        raise ValueError(f"{name!r} carries methods already (config.efx): load it, and its report tells what it has.")
    if weights and not name:
        raise ValueError("weights=True needs a checkpoint: name it with --model.")
    named = getattr(transformers, (config.architectures or [""])[0], None)
    if weights:
        return (named or transformers.AutoModel).from_pretrained(name)
    with torch.device("meta"):
        if named:
            return named(config)
        causal = not name and type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        return (transformers.AutoModelForCausalLM if causal else transformers.AutoModel).from_config(config)


def _show_plan(model: Any, config: Any) -> None:
    """Applies a config to a model and prints parameters before and after, layers of one kind in one row."""
    from hf_efx.core.model.adapter import efx_record, get_efx_model
    from hf_efx.core.model.weight_view import DENSE_TYPES

    dense = {name: _count(module) for name, module in model.named_modules() if type(module) in DENSE_TYPES}
    before = _count(model)
    get_efx_model(model, config, pretrained=bool(getattr(model.config, "name_or_path", "")))
    plan = config.describe((efx_record(model) or {"methods": [{"modules": {}}]})["methods"][-1]["modules"])
    kinds: dict[tuple[str, str], list[str]] = {}
    for name in dense:
        pattern = ".".join("*" if part.isdigit() else part for part in name.split("."))
        kinds.setdefault((pattern, plan.get(name, "stays dense")), []).append(name)
    rows = []
    for (pattern, spec), names in kinds.items():
        old, new = sum(dense[n] for n in names), sum(_count(model.get_submodule(n)) for n in names)
        rows.append((pattern, len(names), spec, f"{old:,}", f"{new:,}", f"{new / old:.2f}"))
    after = _count(model)
    if not config.changes_skeleton:
        _print_table(("layer", "count", "plan"), [row[:3] for row in rows], right=(1,))
        print(f"{type(model).__name__}: {after:,} parameters, as before; it acts in training steps alone.")
        return
    _print_table(("layer", "count", "plan", "parameters", "after", "ratio"), rows, right=(1, 3, 4, 5))
    print(f"{type(model).__name__}: {before:,} parameters before, {after:,} after ({after / before:.2f}).")


def _count(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


if __name__ == "__main__":
    sys.exit(main())

"""The frame of every program: reads its options, refuses what can't work before anything is loaded, ends it."""

import gc
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id
from transformers import SchedulerType, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import get_available_reporting_integrations

from hf_efx.core.results.evidence import public_command
from hf_efx.core.results.plots import matplotlib_pyplot
from hf_efx.programs.command_line import OptionParser
from hf_efx.programs.model_options import ModelOptions, checkpoint_config
from hf_efx.programs.tasks import CheckpointTaskOptions

# Training arguments that do nothing in a program that evaluates, times a step and saves, by their beginnings.
_OF_TRAINING = ("optim", "learning_rate", "weight_decay", "adam_", "max_grad_norm", "lr_scheduler", "warmup_")
_OF_TRAINING += ("num_train_epochs", "max_steps", "gradient_", "neftune", "torch_empty_cache", "auto_find_batch")
_OF_TRAINING += ("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "logging_s", "logging_first")
_OF_TRAINING += ("logging_nan", "save_s", "save_total", "save_on_each", "save_only", "load_best", "metric_for_best")
_OF_TRAINING += ("greater_is_better", "resume_from", "ignore_data_skip", "train_sampling", "restore_callback")
_OF_TRAINING += ("include_num_input", "average_tokens", "enable_jit_checkpoint", "stateful_", "batch_eval")


def run_program(
    body: Callable[..., None],
    argv: Sequence[str] | None,
    *,
    prog: str,
    description: str | None,
    options: Sequence[type],
    config: type | None = None,
    trains: bool = True,
    **defaults: Any,
) -> int:
    """Runs a program from its command line to its exit status.

    What `body` raises as ValueError, OSError or ImportError is the input's fault and becomes one line; what happens
    after the first step is not, see `not_the_input`.

    Args:
        body: The program: called with the command that others can type, then one instance of each of `options`, then
            one of `config`, if there is one.
        argv: The command line without the program's name; None for `sys.argv[1:]`.
        prog: `hf-efx METHOD`, or the name of a file in scripts/.
        description: Its first line says what the program does.
        options: Dataclasses, each of whose fields is an option.
        config: A method's config class, whose own fields are options too.
        trains: Whether it does; otherwise training arguments that act in training alone are refused.
        **defaults: Of options, where they differ from the dataclasses'.

    Returns:
        The exit status: 0, or 130 after Ctrl-C. Wrong input ends with SystemExit(2) and a line that says what to do.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = OptionParser(options, config, prog, (description or "").splitlines()[0])
    parser.set_defaults(**defaults)
    read = parser.read(argv)
    if idle := [] if trains else sorted(name for name in parser.given if name.startswith(_OF_TRAINING)):
        parser.error(f"--{idle[0]} acts in training alone, and this program trains nothing: leave it out.")
    for one in read:
        if isinstance(one, CheckpointTaskOptions):
            one.given = parser.given
    words = ["-m", "hf_efx.cli", prog.removeprefix("hf-efx ")] if prog.startswith("hf-efx ") else [f"scripts/{prog}"]
    try:
        for one in read:
            _check_start(one)
        body(public_command([*words, *argv]), *read)
    except (ValueError, OSError, ImportError) as error:
        parser.error(" ".join(str(error).split()))
    except KeyboardInterrupt:
        return 130
    end_processes()
    return 0


def _check_start(options: Any) -> None:
    """Refuses options that would fail later, once data are loaded or a model is trained."""
    if getattr(options, "plot", False):
        matplotlib_pyplot()
    if isinstance(options, ModelOptions) and options.model_name_or_path:
        checkpoint_config(options.model_name_or_path)
    if output_dir := getattr(options, "output_dir", None):
        _check_writable(str(output_dir))
    if isinstance(options, TrainingArguments):
        _set_up_logging(options.process_index)
        _check_arguments(options)
        if options.push_to_hub:
            name = options.hub_model_id or Path(str(options.output_dir)).absolute().name
            check_push("hub_model_id", name, options.hub_token)


def _check_arguments(args: TrainingArguments) -> None:
    """Refuses arguments that transformers would first look at when training begins, or when it has ended."""
    for name in args.report_to or []:
        if name not in ("none", "all", *get_available_reporting_integrations()):
            raise ValueError(f"report_to={name!r} isn't installed: install it, or pass --report_to none.")
    if args.prediction_loss_only or (args.label_names and "labels" not in args.label_names):
        name = "prediction_loss_only" if args.prediction_loss_only else "label_names"
        raise ValueError(f"{name}={getattr(args, name)!r} leaves an evaluation without its metric: leave it out.")
    if args.do_predict:
        raise ValueError("do_predict=True: programs train and evaluate, and predict nothing. Leave it out.")
    options: Any = args.lr_scheduler_kwargs or {}
    try:
        get_scheduler(
            args.lr_scheduler_type,
            torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0),
            num_warmup_steps=1,
            num_training_steps=10,
            scheduler_specific_kwargs=dict(options),
        )
    except (TypeError, ValueError) as error:
        name = SchedulerType(args.lr_scheduler_type).value
        raise ValueError(
            f"lr_scheduler_type={name!r} can't be made ({error}): give its options with "
            f"--lr_scheduler_kwargs, as in '{{\"num_decay_steps\": 10}}', or choose another."
        ) from error


def _check_writable(output_dir: str) -> None:
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise ValueError(
            f"output_dir={output_dir!r} can't be written ({error.strerror or error}): name another with --output_dir."
        ) from error


def check_push(field: str, name: str, token: str | None = None) -> None:
    """Asks the Hub whether what a program makes may be pushed in the end, under this name.

    Args:
        field: The option that names it.
        name: Of the repository, with or without its owner.
        token: Of the Hub; None for the one that is logged in.

    Raises:
        ValueError: For a name that the Hub wouldn't take, without a token that it knows, or for another's repository.
    """
    try:
        validate_repo_id(name)
        user = HfApi().whoami(token)
    except (ValueError, OSError) as error:  # the Hub's own errors are among them
        raise ValueError(
            f"{field}={name!r} can't be pushed to ({error}): log in with `hf auth login`, name another repository, or "
            f"push nothing."
        ) from error
    owners = [user["name"], *(one["name"] for one in user.get("orgs", []))]
    if "/" in name and name.partition("/")[0] not in owners:
        raise ValueError(f"{field}={name!r} isn't of {' or '.join(owners)}, who would push: name one of these.")


@contextmanager
def not_the_input(what: str) -> Iterator[None]:
    """What fails in here isn't the input's fault: it leaves the program with a traceback, not as a short line.

    Args:
        what: What was being done, for the error.
    """
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise RuntimeError(f"{what} failed: {error}") from error


def _set_up_logging(process: int) -> None:
    """Shows this package's messages: of the first process all, of others warnings."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("hf_efx").setLevel(logging.INFO if process == 0 else logging.WARNING)


def end_processes() -> None:
    """Ends the process group, if there is one; the Trainers must be gone by now, as `EfxTrainerMixin.end` says."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        state = PartialState()
        state.wait_for_everyone()
        gc.collect()
        state.destroy_process_group()

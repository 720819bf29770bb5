"""The program `hf-efx slice-out`: trains a text, image or causal language model with slices of its layers.

    hf-efx slice-out --task causal_lm --compare none dropout        # Python's own text, no file needed
    hf-efx slice-out --task image_classification --dataset fashion_mnist/ --rate 0.5 --compare none
    hf-efx slice-out --config run.yaml --rate "{mlp: 0.5, attention: 0.25}" --starts circular
    hf-efx slice-out --task causal_lm --model_name_or_path gpt2 --dataset my_text.jsonl --targets mlp
    accelerate launch scripts/train_slice_out.py --config run.yaml

"SliceOut: Training Transformers and CNNs faster while using less memory", Notin et al. 2020, arXiv 2007.10909.
"""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_efx.core.data.fingerprints import data_fingerprint
from hf_efx.core.model.adapter import get_efx_model, unload
from hf_efx.core.model.block_units import owner_of
from hf_efx.core.results.plots import matplotlib_pyplot
from hf_efx.core.training.arguments import EfxArguments
from hf_efx.core.training.checkpoints import last_complete_checkpoint
from hf_efx.core.training.step_cost import TrainingClock
from hf_efx.core.training.trainer import EfxTrainer
from hf_efx.programs.command_line import OptionParser, config_option_fields, resume_point
from hf_efx.programs.model_options import checkpoint_config
from hf_efx.programs.task_data import load_task
from hf_efx.programs.task_run import (
    Run,
    RunOptions,
    compared_arguments,
    data_settings,
    program_defaults,
    push_and_end,
    run_settings,
    set_up_logging,
    train_run,
    write_runs,
)
from hf_efx.programs.tasks import LearningTask, TaskModelOptions, TaskOptions
from hf_efx.slice_out.callback import SliceOutCallback
from hf_efx.slice_out.config import SliceOutConfig

COMPARISONS = ("none", "dropout")
# The tasks' own new models have two heads, of which no quarter can be left out.
_HEADS = {"causal_lm": "n_head=4", "text_classification": "num_attention_heads=4"}


@dataclass
class ProgramOptions(RunOptions):
    """What the program does beside training."""

    compare: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Runs beside it, from the same weights and for as many steps: 'none' drops nothing in the blocks "
            "that are sliced here, 'dropout' has the model's own dropouts there at the same rate. Each costs a run."
        },
    )

    def __post_init__(self) -> None:
        for name in self.compare:
            if name not in COMPARISONS:
                raise ValueError(f"compare={name!r}: expected some of {', '.join(COMPARISONS)}.")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program.

    Args:
        argv: The command line without the program's name; None for `sys.argv[1:]`.

    Returns:
        The exit status: 0, or 130 after Ctrl-C. Wrong input ends with SystemExit(2) and a line that says what to do.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    options = (TaskModelOptions, TaskOptions, ProgramOptions, EfxArguments)
    parser = OptionParser(options, SliceOutConfig, "hf-efx slice-out", (__doc__ or "").splitlines()[0])
    parser.set_defaults(**program_defaults(), output_dir="runs/slice_out", num_train_epochs=5)
    model_options, task_options, program, args, config = parser.read(argv)
    set_up_logging(args)
    try:
        if program.plot:
            matplotlib_pyplot()
        if model_options.model_name_or_path:  # a wrong name shows before the data is read
            checkpoint_config(model_options.model_name_or_path)
        with args.main_process_first(desc="loading the data"):
            task = _load_task(task_options, model_options)
        model_options = _with_heads(model_options, task)
        for name in program.compare:  # what can't be compared shows before anything is trained
            _compared_model(name, task, model_options, args.seed, config)
        keep_card, args.model_card = args.model_card, False  # the card below says more than one written on a push
        trainer, run = _train(task, model_options, args, config)
        runs = [run]
        for name in program.compare:
            runs.append(_compared(name, task, model_options, args, config, run.figures["steps"]))
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130
    if trainer.is_world_process_zero():
        write_runs(
            Path(str(args.output_dir)),
            "slice_out",
            runs,
            trainer,
            task,
            command=["-m", "hf_efx.cli", "slice-out", *argv],
            plot=program.plot,
            card=keep_card,
            configuration={f.name: getattr(config, f.name) for f in config_option_fields(SliceOutConfig)},
            settings=data_settings(task_options, task),
            baseline=program.compare[0] if program.compare else None,
            note="Slices were dropped in training steps alone: this is an ordinary dense model.",
        )
        if "time_ratio" in run.figures:
            print(f"a forward and backward pass takes {run.figures['time_ratio']:.2f} of the time without slices")
        print(f"checkpoint: {args.output_dir}")
    push_and_end(trainer)
    return 0


def _load_task(task_options: TaskOptions, model_options: TaskModelOptions) -> LearningTask:
    """The task's data, of which nothing is held out unless that is asked for."""
    options = dataclasses.replace(task_options, holdout_share=task_options.holdout_share or 0.0)
    return load_task(options, model_options.model_name_or_path)


def _with_heads(options: TaskModelOptions, task: LearningTask) -> TaskModelOptions:
    """The options with heads enough to slice, where the task's own new model is trained."""
    heads, given = _HEADS.get(task.task), options.config_overrides or ""
    if heads is None or options.model_name_or_path or options.model_type or heads.partition("=")[0] in given:
        return options
    return dataclasses.replace(options, config_overrides=",".join(filter(None, (heads, given))))


def _train(
    task: LearningTask, model_options: TaskModelOptions, args: Any, config: SliceOutConfig
) -> tuple[EfxTrainer, Run]:
    """The program's own run, and its saved model; a finished one is taken from the folder where a run is resumed."""
    folder, resume = Path(str(args.output_dir)), resume_point(args.resume_from_checkpoint)
    settings = _settings("slice_out", task, args, config, model_options)
    done = Run.load(folder, settings) if resume is True else None
    clock = TrainingClock()
    if done is not None:
        model = task.model_init(args.seed, TaskModelOptions(model_name_or_path=str(folder)))
        return _trainer(model, task, args, clock), done
    model = get_efx_model(_dense_model(task, model_options, args.seed), config)
    measurable = not (args.fsdp or args.deepspeed or args.torch_compile)
    trainer = _trainer(model, task, args, clock, SliceOutCallback(measure_time=measurable, clock=clock))
    return trainer, train_run("slice_out", trainer, task, settings, resume, save=True, figures=_saved)


def _dense_model(task: LearningTask, options: TaskModelOptions, seed: int) -> PreTrainedModel:
    """The model; what a checkpoint says of the slices that it was trained with before gives way to the config."""
    return unload(task.model_init(seed, options))


def _trainer(model: PreTrainedModel, task: LearningTask, args: Any, *callbacks: Any) -> EfxTrainer:
    return EfxTrainer(model, args, train_dataset=task.train, callbacks=list(callbacks), **task.trainer_parts)


def _saved(trainer: EfxTrainer) -> dict[str, float]:
    """What slices saved, as the callback measured it."""
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, SliceOutCallback))
    figures = {name.rpartition("/")[2]: value for name, value in callback.metrics().items()}
    return {name: figures[name] for name in ("time_ratio", "seconds_saved") if name in figures}


def _compared(
    name: str,
    task: LearningTask,
    model_options: TaskModelOptions,
    args: Any,
    config: SliceOutConfig,
    steps: int,
) -> Run:
    """A run beside the program's own: the same weights to start from, as many steps, no slices."""
    resume = resume_point(args.resume_from_checkpoint) is not None
    args = compared_arguments(args, name, max_steps=steps)
    folder, settings = Path(str(args.output_dir)), _settings(name, task, args, config, model_options)
    if resume and (done := Run.load(folder, settings)):
        return done
    model = _compared_model(name, task, model_options, args.seed, config)
    trainer = _trainer(model, task, args, TrainingClock())
    return train_run(name, trainer, task, settings, resume and last_complete_checkpoint(folder) is not None)


def _compared_model(
    name: str, task: LearningTask, model_options: TaskModelOptions, seed: int, config: SliceOutConfig
) -> PreTrainedModel:
    """The dense model with its own dropouts on the blocks that are sliced here: off, or at the same rate.

    Raises:
        ValueError: If the blocks can't be sliced, or have no dropout where one is asked for.
    """
    model = _dense_model(task, model_options, seed)
    rates = config.own_dropouts(model)
    if name == "dropout" and not rates:
        raise ValueError(
            f"compare='dropout': {type(model).__name__} has no dropout of its own on the blocks that are sliced: "
            f"compare with 'none', or slice others with --targets."
        )
    for path, rate in rates.items():
        owner, attribute = owner_of(path)
        setattr(model.get_submodule(owner), attribute, rate if name == "dropout" else 0.0)
    return model


def _settings(
    name: str, task: LearningTask, args: Any, config: SliceOutConfig, model_options: TaskModelOptions
) -> dict[str, Any]:
    """What a finished run must share to be taken for this one."""
    own = {**config.method_fields(), **dataclasses.asdict(model_options)}
    data = data_fingerprint(task.train, task.fingerprint_columns)
    return {"run": name, "data": data, **run_settings(args), **own}

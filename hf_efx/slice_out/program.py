"""The program `hf-efx slice-out`: trains a text, image or causal language model with slices of its layers.

    hf-efx slice-out --task causal_lm --compare none dropout        # Python's own text, no file needed
    hf-efx slice-out --task image_classification --dataset fashion_mnist/ --rate 0.5 --compare none
    hf-efx slice-out --config run.yaml --rate "{mlp: 0.5, attention: 0.25}" --starts circular
    hf-efx slice-out --task causal_lm --model_name_or_path gpt2 --dataset my_text.jsonl --targets mlp
    accelerate launch scripts/train_slice_out.py --config run.yaml

"SliceOut: Training Transformers and CNNs faster while using less memory", Notin et al. 2020, arXiv 2007.10909.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import PreTrainedModel

from hf_efx.core.model.adapter import get_efx_model, unload
from hf_efx.core.model.block_units import owner_of
from hf_efx.core.training.arguments import EfxArguments
from hf_efx.core.training.step_cost import TrainingClock
from hf_efx.core.training.trainer import EfxTrainer
from hf_efx.programs.frame import run_program
from hf_efx.programs.task_report import Report, own_fields, report_runs
from hf_efx.programs.task_run import CompareOptions, PlannedRun, TaskJob, program_defaults, task_trainer
from hf_efx.programs.tasks import TaskModelOptions, TaskOptions
from hf_efx.slice_out.callback import SliceOutCallback
from hf_efx.slice_out.config import SliceOutConfig

# The tasks' own new models have two heads, of which no quarter can be left out.
_HEADS = {"causal_lm": "n_head=4", "text_classification": "num_attention_heads=4"}


@dataclass
class ProgramOptions(CompareOptions):
    """What the program does beside training."""

    comparisons: ClassVar = ("none", "dropout")

    compare: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Runs beside it, from the same weights and for as many steps: 'none' drops nothing in the blocks "
            "that are sliced here, 'dropout' has the model's own dropouts there at the same rate. Each costs a run."
        },
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program, as `run_program` says."""
    return run_program(
        _program,
        argv,
        prog="hf-efx slice-out",
        description=__doc__,
        options=(TaskModelOptions, TaskOptions, ProgramOptions, EfxArguments),
        config=SliceOutConfig,
        **{**program_defaults(), "output_dir": "runs/slice_out", "num_train_epochs": 5},
    )


def _program(
    command: str,
    model_options: TaskModelOptions,
    task_options: TaskOptions,
    program: ProgramOptions,
    args: EfxArguments,
    config: SliceOutConfig,
) -> None:
    model_options = _with_heads(model_options, task_options.task)
    job = TaskJob.load("slice_out", command, args, task_options, model_options, program.plot)
    settings = config.method_fields()

    def sliced(args: Any) -> EfxTrainer:
        clock = TrainingClock()
        model = get_efx_model(unload(job.model()), config)  # slices that a checkpoint was trained with give way
        measurable = not (args.fsdp or args.deepspeed or args.torch_compile)
        callbacks = [SliceOutCallback(measure_time=measurable, clock=clock), clock]
        return task_trainer(job.task, EfxTrainer, model, args, callbacks)

    def beside(name: str) -> PlannedRun:
        def whole(args: Any) -> EfxTrainer:
            return task_trainer(job.task, EfxTrainer, _with_own_dropouts(unload(job.model()), name, config), args)

        return PlannedRun(name, job.beside(name), whole, settings)

    own = PlannedRun("slice_out", args, sliced, settings, figures=_saved)
    trainer, runs = job.train(own, [beside(name) for name in program.compare])
    report = Report(
        configuration=own_fields(config),
        note="Slices were dropped in training steps alone: this is an ordinary dense model.",
        baseline=program.baseline,
    )
    report_runs(job, trainer, runs, report)
    if "time_ratio" in runs[0].figures and trainer.is_world_process_zero():
        print(f"a forward and backward pass takes {runs[0].figures['time_ratio']:.2f} of the time without slices")


def _with_heads(options: TaskModelOptions, task: str) -> TaskModelOptions:
    """The options with heads enough to slice, where the task's own new model is trained."""
    heads, given = _HEADS.get(task), options.config_overrides or ""
    if heads is None or options.model_name_or_path or options.model_type or heads.partition("=")[0] in given:
        return options
    return dataclasses.replace(options, config_overrides=",".join(filter(None, (heads, given))))


def _saved(trainer: EfxTrainer) -> dict[str, float]:
    """What slices saved, as the callback measured it."""
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, SliceOutCallback))
    figures = {name.rpartition("/")[2]: value for name, value in callback.metrics().items()}
    return {name: figures[name] for name in ("time_ratio", "seconds_saved") if name in figures}


def _with_own_dropouts(model: PreTrainedModel, name: str, config: SliceOutConfig) -> PreTrainedModel:
    """The dense model with its own dropouts on the blocks that are sliced here: off, or at the same rate.

    Raises:
        ValueError: If the blocks can't be sliced, or have no dropout where one is asked for.
    """
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

"""The program `hf-efx low-rank`: trains any causal language model, dense or low-rank, on any text.

    hf-efx low-rank --config_overrides n_layer=2,n_embd=128,n_head=4 --rank 0.25 --max_steps 500 --learning_rate 1e-3
    hf-efx low-rank --config run.yaml --learning_rate 5e-4
    hf-efx low-rank --model_name_or_path gpt2 --dataset my_text.jsonl --block_size 512 --rank 0.5
    hf-efx low-rank --method dense --output_dir runs/dense --config run.yaml
    accelerate launch scripts/train_low_rank_gpt2.py --config run.yaml

"Exploring Low Rank Training of Deep Neural Networks", Kamalakara et al. 2022, arXiv 2209.13569.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, TrainerCallback

from hf_efx.core.model.adapter import get_efx_model, unload
from hf_efx.core.model.record import efx_record
from hf_efx.core.training.step_cost import StepTimer, optimizer_bytes
from hf_efx.low_rank.arguments import LowRankArguments, LowRankArgumentsMixin
from hf_efx.low_rank.config import LowRankConfig
from hf_efx.low_rank.decay import factorised_layers
from hf_efx.low_rank.report import low_rank_report
from hf_efx.low_rank.trainer import LowRankTrainer
from hf_efx.programs.causal_lm import DataOptions
from hf_efx.programs.frame import run_program
from hf_efx.programs.model_options import ModelOptions
from hf_efx.programs.task_report import Report, own_fields, plot_losses, report_runs
from hf_efx.programs.task_run import PlannedRun, TaskJob, task_trainer
from hf_efx.programs.tasks import LearningTask, TaskOptions

PLOT = "loss.png"


@dataclass
class ProgramOptions:
    """What the program does beside training."""

    method: Literal["low_rank", "dense"] = field(
        default="low_rank",
        metadata={"help": "'dense' trains the dense twin: the same weights to start from, the same batches."},
    )
    plot: bool = field(default=True, metadata={"help": f"Draw the losses into {PLOT}; needs matplotlib."})


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program, as `run_program` says."""
    return run_program(
        _program,
        argv,
        prog="hf-efx low-rank",
        description=__doc__,
        options=(ModelOptions, DataOptions, ProgramOptions, LowRankArguments),
        config=LowRankConfig,
        output_dir="runs/low_rank",
        logging_steps=20,
        dataloader_pin_memory=torch.accelerator.is_available(),
        ddp_find_unused_parameters=False,  # a language model uses all of them at each step
    )


def _program(
    command: str,
    model_options: ModelOptions,
    data_options: DataOptions,
    program: ProgramOptions,
    args: LowRankArguments,
    config: LowRankConfig,
) -> None:
    task_options = TaskOptions(task="causal_lm", **dataclasses.asdict(data_options))
    job = TaskJob.load("low_rank", command, args, task_options, model_options, program.plot)
    wanted = config if program.method == "low_rank" else None

    def trainer(args: LowRankArguments) -> LowRankTrainer:
        model = prepared(job.model(), wanted, later=bool(args.dense_warmup_steps))
        return low_rank_trainer(job.task, model, args, wanted if args.dense_warmup_steps else None)

    settings = wanted.method_fields() if wanted else {}
    made, runs = job.train(PlannedRun(program.method, args, trainer, settings, figures=cost_figures))
    report = Report(
        configuration=own_fields(config) if wanted else {},
        settings={f.name: getattr(args, f.name) for f in dataclasses.fields(LowRankArgumentsMixin)},
        plot=PLOT,
        draw=lambda runs, metric, path: plot_losses({program.method: made.state.log_history}, path),
    )
    report_runs(job, made, runs, report)
    if made.is_world_process_zero():
        print("parameters: {parameters:,} (dense: {dense_parameters:,})".format(**runs[0].figures))


def prepared(model: PreTrainedModel, config: LowRankConfig | None, later: bool = False) -> PreTrainedModel:
    """The model as it is trained: factorised by the config, or dense where there is none or it comes `later`.

    What a checkpoint says of methods that act in training alone gives way.

    Raises:
        ValueError: If the checkpoint is factorised, and a config asks for something else or there is none.
    """
    name = model.config.name_or_path
    if factorised_layers(model):
        if config is None:
            raise ValueError(
                f"model_name_or_path={name!r} is factorised: method='dense' needs merge_and_unload first, or leave "
                f"--method out."
            )
        if given := _given(config):
            raise ValueError(
                f"model_name_or_path={name!r} is factorised already, so {', '.join(given)} can't be chosen: leave "
                f"them out, or make it dense with merge_and_unload first."
            )
        return model
    model = unload(model) if efx_record(model) else model
    return get_efx_model(model, config, pretrained=bool(name)) if config and not later else model


def _given(config: LowRankConfig) -> list[str]:
    """The config's fields that differ from their defaults."""
    default = LowRankConfig()
    return [name for name, value in own_fields(config).items() if value != getattr(default, name)]


def low_rank_trainer(
    task: LearningTask,
    model: PreTrainedModel,
    args: LowRankArguments,
    config: LowRankConfig | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> LowRankTrainer:
    """A Trainer that times its steps, for `cost_figures`."""
    return task_trainer(task, LowRankTrainer, model, args, [StepTimer(), *callbacks], low_rank_config=config)


def cost_figures(trainer: Any) -> dict[str, Any]:
    """What a run cost.

    Returns:
        `dense_parameters` (of the same model with dense layers), `optimizer_bytes` (on one process), `step_seconds`
        (median of the training steps).
    """
    model: Any = trainer.model
    timer = next(c for c in trainer.callback_handler.callbacks if isinstance(c, StepTimer))
    dense = low_rank_report(model).total_dense_parameters if factorised_layers(model) else model.num_parameters()
    return {
        "dense_parameters": dense,
        "optimizer_bytes": optimizer_bytes(trainer.optimizer),
        "step_seconds": statistics.median(timer.seconds) if timer.seconds else None,
    }

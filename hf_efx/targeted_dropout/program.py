"""The program `hf-efx targeted-dropout`: trains a text, image or causal language model that stands pruning.

    hf-efx targeted-dropout --task image_classification --compare none dropout       # bundled digits, no file needed
    hf-efx targeted-dropout --task causal_lm --granularity unit --targeting 0.5 --target_modules c_fc
    hf-efx targeted-dropout --config run.yaml --targeting 0.98 --rate 0.99 --ramp paper --fractions 0.9 0.98
    accelerate launch scripts/train_targeted_dropout.py --config run.yaml

Each trained model is evaluated pruned, by the criterion that it was trained with; nothing is pruned for good: that
does scripts/prune.py (python -m hf_efx.targeted_dropout.prune_program).

"Learning Sparse Networks Using Targeted Dropout", Gomez et al. 2019, arXiv 1905.13678.
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
from hf_efx.core.results.curves import PruningCurve, check_fractions, plot_curves
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
from hf_efx.targeted_dropout.callback import TargetedDropoutCallback
from hf_efx.targeted_dropout.config import TargetedDropoutConfig
from hf_efx.targeted_dropout.curve import pruning_curve

COMPARISONS = ("none", "l1", "dropout")
PLOT = "pruning_curves.png"


@dataclass
class ProgramOptions(RunOptions):
    """What the program does beside training."""

    compare: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Runs beside it, from the same weights and for as many steps: 'none', 'l1' (--compare_l1) or "
            "'dropout', plain dropout of the same weights or units (--compare_rate). Each costs a run."
        },
    )
    # Strength and rate as in scripts/reproduce/targeted_dropout.py.
    compare_l1: float = field(
        default=1e-5,
        metadata={"help": "Strength of the L1 penalty of --compare l1: higher prunes better, fits worse."},
    )
    compare_rate: float = field(
        default=0.5,
        metadata={"help": "Rate of --compare dropout: higher prunes better, up to a point, and fits worse."},
    )
    fractions: list[float] = field(
        default_factory=lambda: [0.0, 0.5, 0.75, 0.9, 0.95],
        metadata={"help": "Shares pruned at which each trained model is evaluated; each costs an evaluation."},
    )

    def __post_init__(self) -> None:
        for name in self.compare:
            if name not in COMPARISONS:
                raise ValueError(f"compare={name!r}: expected some of {', '.join(COMPARISONS)}.")
        self.fractions = list(check_fractions(self.fractions))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program.

    Args:
        argv: The command line without the program's name; None for `sys.argv[1:]`.

    Returns:
        The exit status: 0, or 130 after Ctrl-C. Wrong input ends with SystemExit(2) and a line that says what to do.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    options = (TaskModelOptions, TaskOptions, ProgramOptions, EfxArguments)
    parser = OptionParser(options, TargetedDropoutConfig, "hf-efx targeted-dropout", (__doc__ or "").splitlines()[0])
    parser.set_defaults(**program_defaults(), output_dir="runs/targeted_dropout", num_train_epochs=5)
    model_options, task_options, program, args, config = parser.read(argv)
    set_up_logging(args)
    try:
        if program.plot:
            matplotlib_pyplot()
        if model_options.model_name_or_path:  # a wrong name shows before the data is read
            checkpoint_config(model_options.model_name_or_path)
        with args.main_process_first(desc="loading the data"):
            options = dataclasses.replace(task_options, holdout_share=task_options.holdout_share or 0.0)
            task = load_task(options, model_options.model_name_or_path)
        configs = {"targeted_dropout": config} | {name: _compared(name, config, program) for name in program.compare}
        for one in configs.values():  # what can't be done shows before anything is trained
            _model(task, model_options, args.seed, one)
        keep_card, args.model_card = args.model_card, False  # the card below says more than one written on a push
        resume = resume_point(args.resume_from_checkpoint)
        trainer, run = _train("targeted_dropout", task, model_options, args, resume, config, config, program)
        runs = [run]
        for name in program.compare:
            beside = compared_arguments(args, name, max_steps=run.figures["steps"])
            runs.append(_train(name, task, model_options, beside, resume, configs[name], config, program)[1])
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130
    if trainer.is_world_process_zero():
        folder = Path(str(args.output_dir))
        if program.plot:
            plot_curves({one.name: _curve(one, task, program) for one in runs}, folder / PLOT)
        write_runs(
            folder,
            "targeted_dropout",
            runs,
            trainer,
            task,
            command=["-m", "hf_efx.cli", "targeted-dropout", *argv],
            plot=program.plot,
            card=keep_card,
            configuration={f.name: getattr(config, f.name) for f in config_option_fields(TargetedDropoutConfig)},
            settings=data_settings(task_options, task),
            baseline=program.compare[0] if program.compare else None,
            note="Nothing is pruned yet: this is an ordinary dense model, made to stand it.",
            columns=[
                {"key": _key(fraction), "title": f"{fraction:.0%} pruned", "format": ".4g"}
                for fraction in program.fractions
            ],
        )
        print(f"checkpoint: {folder}; to prune it: python scripts/prune.py --model {folder} --fraction ...")
    push_and_end(trainer)
    return 0


def _compared(name: str, config: TargetedDropoutConfig, program: ProgramOptions) -> TargetedDropoutConfig | None:
    """What a compared run trains with; None for nothing."""
    if name == "none":
        return None
    changed: dict[str, Any] = {"selection": "random", "rate": program.compare_rate, "l1": 0.0}
    if name == "l1":
        changed = {"rate": 0.0, "l1": program.compare_l1}
    return TargetedDropoutConfig(**{**config.method_fields(), "ramp": "none", "ramp_steps": None, **changed})


def _model(
    task: LearningTask, options: TaskModelOptions, seed: int, config: TargetedDropoutConfig | None
) -> PreTrainedModel:
    """The model; what a checkpoint says of training before gives way to the config."""
    model = unload(task.model_init(seed, options))
    return model if config is None else get_efx_model(model, config)


def _train(
    name: str,
    task: LearningTask,
    model_options: TaskModelOptions,
    args: Any,
    resume: Any,
    config: TargetedDropoutConfig | None,
    criterion: TargetedDropoutConfig,
    program: ProgramOptions,
) -> tuple[EfxTrainer, Run]:
    """A run, the program's own with its saved model; a finished one is taken from its folder on resuming."""
    folder, own = Path(str(args.output_dir)), name == "targeted_dropout"
    settings = _settings(name, task, args, config, model_options, program)
    clock = TrainingClock()
    parts: dict[str, Any] = {"train_dataset": task.train, **task.trainer_parts}
    done = Run.load(folder, settings) if (resume is True if own else resume is not None) else None
    if done is not None:
        model = task.model_init(args.seed, TaskModelOptions(model_name_or_path=str(folder)) if own else model_options)
        return EfxTrainer(model, args, callbacks=[clock], **parts), done
    model = _model(task, model_options, args.seed, config)
    callbacks: list[Any] = [clock] if config is None else [TargetedDropoutCallback(), clock]
    trainer = EfxTrainer(model, args, callbacks=callbacks, **parts)
    if not own:  # the option names the program's own checkpoint
        resume = resume is not None and last_complete_checkpoint(folder) is not None

    return trainer, train_run(
        name,
        trainer,
        task,
        settings,
        resume,
        save=own,
        figures=lambda trainer: _pruned(trainer, task, criterion, program),
    )


def _pruned(
    trainer: EfxTrainer, task: LearningTask, criterion: TargetedDropoutConfig, program: ProgramOptions
) -> dict[str, float]:
    """The metric at each share pruned, by the criterion of the program's own config."""

    def evaluate(model: Any) -> float:
        return trainer.predict(task.validation, metric_key_prefix="eval").metrics[f"eval_{task.metric}"]  # pyright: ignore

    curve = pruning_curve(
        trainer.accelerator.unwrap_model(trainer.model),
        evaluate,
        program.fractions,
        granularity=criterion.granularity,  # pyright: ignore[reportArgumentType]
        scope=criterion.scope,  # pyright: ignore[reportArgumentType]
        metric=task.metric,
        higher_is_better=task.higher_is_better,
        target_modules=criterion.target_modules,
        exclude_modules=criterion.exclude_modules,
    )
    return {_key(fraction): value for fraction, value in curve.points}


def _curve(run: Run, task: LearningTask, program: ProgramOptions) -> PruningCurve:
    points = tuple((fraction, run.figures[_key(fraction)]) for fraction in program.fractions)
    return PruningCurve(points, task.metric, task.higher_is_better)


def _key(fraction: float) -> str:
    return f"pruned_{100 * fraction:g}"


def _settings(
    name: str,
    task: LearningTask,
    args: Any,
    config: TargetedDropoutConfig | None,
    model_options: TaskModelOptions,
    program: ProgramOptions,
) -> dict[str, Any]:
    """What a finished run must share to be taken for this one."""
    own = {**(config.method_fields() if config else {}), **dataclasses.asdict(model_options)}
    data = data_fingerprint(task.train, task.fingerprint_columns)
    return {"run": name, "data": data, "fractions": program.fractions, **run_settings(args), **own}

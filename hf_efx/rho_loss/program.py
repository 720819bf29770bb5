"""The program `hf-efx rho-loss`: trains on the examples that are learnable, worth learning and not yet learnt.

    hf-efx rho-loss --label_noise 0.1 --compare uniform                # Python's own text by its part of the library
    hf-efx rho-loss --config run.yaml --irreducible_losses you/table   # a ready table: a folder or on the Hub
    hf-efx rho-loss --task image_classification --dataset fashion_mnist/ --label_noise 0.1 --compare uniform loss
    hf-efx rho-loss --task causal_lm --dataset my_text.jsonl --granularity token --irreducible cross_fit
    accelerate launch scripts/train_rho_loss.py --config run.yaml

"Prioritized Training on Points that are Learnable, Worth Learning, and Not Yet Learnt", Mindermann et al. 2022,
arXiv 2206.07137.
"""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset

from hf_efx.core.data.tables import settings_of
from hf_efx.core.results.plots import matplotlib_pyplot
from hf_efx.core.training.checkpoints import last_complete_checkpoint
from hf_efx.core.training.step_cost import TrainingClock
from hf_efx.programs import task_run
from hf_efx.programs.command_line import OptionParser, resume_point
from hf_efx.programs.model_options import checkpoint_config
from hf_efx.programs.task_data import load_task
from hf_efx.programs.task_run import (
    Run,
    RunOptions,
    compared_arguments,
    data_settings,
    program_defaults,
    push_and_end,
    set_up_logging,
    write_runs,
)
from hf_efx.programs.tasks import CORRUPTED_COLUMN, SIDE_MODEL_HELP, LearningTask, TaskModelOptions, TaskOptions
from hf_efx.rho_loss.arguments import RHOLossArguments, RHOLossArgumentsMixin
from hf_efx.rho_loss.irreducible_run import (
    IrreducibleOptions,
    how_made,
    load_or_none,
    make_irreducible_losses,
    with_holdout_share,
)
from hf_efx.rho_loss.report import means
from hf_efx.rho_loss.selection import get_selection_function
from hf_efx.rho_loss.trainer import RHOLossTrainer


@dataclass
class ProgramOptions(RunOptions):
    """What the program does beside training."""

    compare: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Selections to run beside it, from the same weights and for as many steps: 'uniform' is a plain "
            "Trainer, which draws what it trains on; others are names of SELECTION_FUNCTIONS. Each costs a run."
        },
    )
    scoring_model: str | None = field(
        default=None,
        metadata={"help": "A model that scores in the trained one's place, for its smaller cost: " + SIDE_MODEL_HELP},
    )

    def __post_init__(self) -> None:
        for name in self.compare:
            get_selection_function(name)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program.

    Args:
        argv: The command line without the program's name; None for `sys.argv[1:]`.

    Returns:
        The exit status: 0, or 130 after Ctrl-C. Wrong input ends with SystemExit(2) and a line that says what to do.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    options = (TaskModelOptions, TaskOptions, IrreducibleOptions, ProgramOptions, RHOLossArguments)
    parser = OptionParser(options, None, "hf-efx rho-loss", (__doc__ or "").splitlines()[0])
    # 25 passes of drawing at a tenth train on two and a half times as many examples as there are.
    parser.set_defaults(**program_defaults(), output_dir="runs/rho_loss", num_train_epochs=25)
    model_options, task_options, irreducible, program, args = parser.read(argv)
    set_up_logging(args)
    try:
        if program.plot:
            matplotlib_pyplot()
        task, table, seconds = prepare(model_options, task_options, irreducible, args, _selections(program, args))
        keep_card, args.model_card = args.model_card, False  # the card below says more than one written on a push
        trainer, run = _train(task, table, model_options, program, args)
        runs = [run]
        for name in program.compare:
            runs.append(_compared(name, task, table, model_options, args, run.figures["steps"]))
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130
    if trainer.is_world_process_zero():
        run.figures["irreducible_seconds"] = seconds
        write_runs(
            Path(str(args.output_dir)),
            "rho_loss",
            runs,
            trainer,
            task,
            command=["-m", "hf_efx.cli", "rho-loss", *argv],
            plot=program.plot,
            card=keep_card,
            configuration={f.name: getattr(args, f.name) for f in dataclasses.fields(RHOLossArgumentsMixin)},
            settings=data_settings(task_options, task),
            baseline=program.compare[0] if program.compare else None,
            note=how_made(table) if table is not None else "",
        )
        if table is not None:
            print(f"irreducible losses: {seconds:.1f} s, beside the seconds above")
        print(f"checkpoint: {args.output_dir}")
    push_and_end(trainer)
    return 0


def prepare(
    model_options: TaskModelOptions,
    task_options: TaskOptions,
    irreducible: IrreducibleOptions,
    args: Any,
    selections: Sequence[str],
) -> tuple[LearningTask, Dataset | None, float]:
    """Loads the task, and loads or makes the table that a selection needs.

    Returns:
        The task, the table (None where none is needed), and the seconds that making it took.
    """
    if model_options.model_name_or_path:  # a wrong name shows before the data is read
        checkpoint_config(model_options.model_name_or_path)
    needed = any(get_selection_function(name).needs_irreducible_loss for name in selections)
    table = load_or_none(irreducible) if needed else None
    source = None
    if needed:
        source = irreducible.irreducible if table is None else settings_of(table)
    with args.main_process_first(desc="loading the data"):
        task = load_task(with_holdout_share(task_options, source), model_options.model_name_or_path)
    if CORRUPTED_COLUMN in task.train.column_names:
        args.corrupted_column = args.corrupted_column or CORRUPTED_COLUMN
    if not needed or table is not None:
        return task, table, 0.0
    return task, *make_irreducible_losses(task, irreducible, args, args.granularity)


def _selections(program: ProgramOptions, args: Any) -> list[str]:
    return ([args.selection] if args.selection_ratio < 1 else []) + program.compare


def _train(
    task: LearningTask,
    table: Dataset | None,
    model_options: TaskModelOptions,
    program: ProgramOptions,
    args: Any,
) -> tuple[RHOLossTrainer, Run]:
    """The program's own run, and its saved model; a finished one is taken from the folder where a run is resumed."""
    folder, resume = Path(str(args.output_dir)), resume_point(args.resume_from_checkpoint)
    done = Run.load(folder, run_settings(args)) if resume is True else None
    if done is not None:
        model_options = TaskModelOptions(model_name_or_path=str(folder))
    trainer = RHOLossTrainer(
        task.model_init(args.seed, model_options),
        args,
        train_dataset=task.train,
        irreducible_losses=table,
        scoring_model=task.side_model(program.scoring_model, args.seed + 2) if program.scoring_model else None,
        callbacks=[TrainingClock()],
        **task.trainer_parts,
    )
    return trainer, done or train_run(args.selection, trainer, task, resume, save=True)


def _compared(
    name: str, task: LearningTask, table: Dataset | None, model_options: TaskModelOptions, args: Any, steps: int
) -> Run:
    """A run beside the program's own: the same weights to start from, as many steps, another selection."""
    changed: dict[str, Any] = {"selection": name, "max_steps": steps}
    if name == "uniform":  # what a plain Trainer does, bit for bit, at its cost
        changed |= {"selection_ratio": 1.0, "rescore_every": 1, "preset": None, "train_scoring_model": False}
    resume = resume_point(args.resume_from_checkpoint) is not None
    args = compared_arguments(args, name, **changed)
    folder = Path(str(args.output_dir))
    if resume and (done := Run.load(folder, run_settings(args))):
        return done
    trainer = RHOLossTrainer(
        task.model_init(args.seed, model_options),
        args,
        train_dataset=task.train,
        irreducible_losses=table,
        callbacks=[TrainingClock()],
        **task.trainer_parts,
    )
    return train_run(name, trainer, task, resume and last_complete_checkpoint(folder) is not None)


def train_run(
    name: str,
    trainer: Any,
    task: LearningTask,
    resume: Any = None,
    save: bool = False,
    settings: dict[str, Any] | None = None,
) -> Run:
    """`task_run.train_run` with the figures of the selection report among the others.

    Args:
        name: Of the run.
        trainer: With a `TrainingClock` among its callbacks.
        task: The task.
        resume: As in `Trainer.train`.
        save: Whether to save the model and what makes its inputs.
        settings: By which a resumed program knows the finished run; None for `run_settings`.
    """
    settings = settings or run_settings(trainer.args)
    return task_run.train_run(name, trainer, task, settings, resume, save, _selection_figures)


def _selection_figures(trainer: Any) -> dict[str, Any]:
    report = getattr(trainer, "selection_report", None)
    return {} if report is None else means(report.totals(trainer.args.device)[0])


def run_settings(args: Any) -> dict[str, Any]:
    """What of the arguments a finished run must share to be taken for this one."""
    names = [f.name for f in dataclasses.fields(RHOLossArgumentsMixin) if hasattr(args, f.name)]
    return task_run.run_settings(args, names)

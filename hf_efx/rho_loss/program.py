"""The programs `hf-efx rho-loss`, training on what is learnable and not yet learnt, and of its tables.

    hf-efx rho-loss --label_noise 0.1 --compare uniform                # Python's own text by its part of the library
    hf-efx rho-loss --config run.yaml --irreducible_losses you/table   # a ready table: a folder or on the Hub
    hf-efx rho-loss --task image_classification --dataset fashion_mnist/ --label_noise 0.1 --compare uniform loss
    hf-efx rho-loss --task causal_lm --dataset my_text.jsonl --granularity token --irreducible cross_fit
    accelerate launch scripts/train_rho_loss.py --config run.yaml

A table of irreducible losses by itself, saved and pushed:

    python scripts/compute_irreducible_losses.py --label_noise 0.1 --push_table_to you/irreducible-losses
    python scripts/compute_irreducible_losses.py --irreducible cross_fit --irreducible_folds 4

"Prioritized Training on Points that are Learnable, Worth Learning, and Not Yet Learnt", Mindermann et al. 2022,
arXiv 2206.07137.
"""

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from datasets import Dataset

from hf_efx.core.data.fingerprints import weights_fingerprint
from hf_efx.core.data.tables import settings_of
from hf_efx.core.training.arguments import EfxArguments
from hf_efx.programs.command_line import was_given
from hf_efx.programs.frame import check_push, not_the_input, run_program
from hf_efx.programs.task_data import HOLDOUT_SHARE
from hf_efx.programs.task_report import Report, report_runs
from hf_efx.programs.task_run import (
    CompareOptions,
    PlannedRun,
    TaskJob,
    program_defaults,
    task_trainer,
    training_settings,
)
from hf_efx.programs.tasks import CORRUPTED_COLUMN, SIDE_MODEL_HELP, LearningTask, TaskModelOptions, TaskOptions
from hf_efx.rho_loss.arguments import RHOLossArguments, RHOLossArgumentsMixin
from hf_efx.rho_loss.cross_fit import cross_fit_irreducible_losses
from hf_efx.rho_loss.irreducible import compute_irreducible_losses
from hf_efx.rho_loss.irreducible_table import (
    load_irreducible_losses,
    push_irreducible_losses,
    save_irreducible_losses,
)
from hf_efx.rho_loss.report import means
from hf_efx.rho_loss.selection import get_selection_function
from hf_efx.rho_loss.side_models import train_irreducible_model
from hf_efx.rho_loss.trainer import RHOLossTrainer

# In the output folder. The Trainer pushes nothing that begins with an underscore.
FOLDER = "_irreducible_losses"
EPOCHS = 10


@dataclass
class IrreducibleOptions:
    """Where irreducible losses come from."""

    irreducible_losses: str | None = field(
        default=None,
        metadata={
            "help": "A ready table: a folder, or a data set on the Hub. It costs nothing, and must be of this data "
            "(label noise and holdout_share included). Without it one is made and kept in the output folder."
        },
    )
    irreducible: Literal["holdout", "cross_fit"] = field(
        default="holdout",
        metadata={
            "help": "How one is made: 'holdout' trains one model on the holdout; 'cross_fit' keeps none, and trains a "
            "model for each fold of the training data on the other folds."
        },
    )
    irreducible_folds: int = field(
        default=2, metadata={"help": "Folds of 'cross_fit': more leave each model more to learn from, and cost more."}
    )
    irreducible_model: str = field(
        default="tiny",
        metadata={
            "help": "The model that gives them: " + SIDE_MODEL_HELP + " A small one costs little, and does in the "
            "paper."
        },
    )
    irreducible_steps: int | None = field(
        default=None,
        metadata={
            "help": "Steps it is trained at most; the weights that were best on the training data are kept. Nothing "
            "means as many as trains on the holdout (on a fold's rest) ten times."
        },
    )
    irreducible_learning_rate: float | None = field(
        default=None, metadata={"help": "Its learning rate; nothing means the run's."}
    )

    def __post_init__(self) -> None:
        if self.irreducible_folds < 2:
            raise ValueError(f"irreducible_folds={self.irreducible_folds}: expected 2 or more.")
        if self.irreducible_steps is not None and self.irreducible_steps < 1:
            raise ValueError(f"irreducible_steps={self.irreducible_steps}: expected 1 or more.")
        if self.irreducible == "holdout" and was_given(self, "irreducible_folds"):
            raise ValueError(f"irreducible_folds={self.irreducible_folds} goes with --irreducible cross_fit.")
        if self.irreducible_losses and (made := [name for name in self.given if name != "irreducible_losses"]):
            raise ValueError(
                f"irreducible_losses={self.irreducible_losses!r} names a ready table, but {', '.join(made)} would "
                f"make one: give one of them."
            )

    @property
    def given(self) -> list[str]:
        """The options that aren't as they are by default."""
        return [f.name for f in dataclasses.fields(self) if was_given(self, f.name)]


@dataclass
class ProgramOptions(CompareOptions):
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

    @property
    def comparisons(self) -> Sequence[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Those that are named, each of which must be known."""
        return [name for name in self.compare if get_selection_function(name)]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `hf-efx rho-loss`, as `run_program` says."""
    return run_program(
        _program,
        argv,
        prog="hf-efx rho-loss",
        description="Trains on the examples that are learnable, worth learning and not yet learnt.",
        options=(TaskModelOptions, TaskOptions, IrreducibleOptions, ProgramOptions, RHOLossArguments),
        # 25 passes of drawing at a tenth train on two and a half times as many examples as there are.
        **{**program_defaults(), "output_dir": "runs/rho_loss", "num_train_epochs": 25},
    )


def _program(
    command: str,
    model_options: TaskModelOptions,
    task_options: TaskOptions,
    irreducible: IrreducibleOptions,
    program: ProgramOptions,
    args: RHOLossArguments,
) -> None:
    if args.selection in program.compare:
        raise ValueError(f"compare={args.selection!r} is the program's own selection: compare with others.")
    selections = ([args.selection] if args.selection_ratio < 1 else []) + program.compare
    job, table = load_selecting_job(
        "rho_loss", command, args, task_options, model_options, irreducible, selections, program.plot
    )

    def plan(name: str, args: Any, side: str | None) -> PlannedRun:
        def trainer(args: Any) -> RHOLossTrainer:
            parts: dict[str, Any] = {"irreducible_losses": table.losses}
            parts["scoring_model"] = side and job.task.side_model(side, args.seed + 2)
            return task_trainer(job.task, RHOLossTrainer, job.model(), args, **parts)

        return PlannedRun(name, args, trainer, {"table": table.settings, "scoring_model": side}, selection_figures)

    # A plain Trainer scores nothing; the others are scored by what scores for the program's own run.
    sides = {name: None if name == "uniform" else program.scoring_model for name in program.compare}
    beside = [plan(name, job.beside(name, **_selecting(name)), side) for name, side in sides.items()]
    made, runs = job.train(plan(args.selection, args, program.scoring_model), beside)
    runs[0].figures["irreducible_seconds"] = table.seconds
    report = Report(
        configuration={f.name: getattr(args, f.name) for f in dataclasses.fields(RHOLossArgumentsMixin)},
        note=table.note,
        baseline=program.baseline,
    )
    report_runs(job, made, runs, report)
    if table.losses is not None and made.is_world_process_zero():
        print(f"irreducible losses: {table.seconds:.1f} s, beside the seconds above")


def _selecting(name: str) -> dict[str, Any]:
    """What differs in the arguments of a run with another selection."""
    if name != "uniform":
        return {"selection": name}
    # What a plain Trainer does, bit for bit, at its cost.
    plain = {"selection_ratio": 1.0, "rescore_every": 1, "preset": None, "train_scoring_model": False}
    return {"selection": name, **plain}


def selection_figures(trainer: Any) -> dict[str, Any]:
    """Means of a run's selection report."""
    report = getattr(trainer, "selection_report", None)
    return {} if report is None else means(report.totals(trainer.args.device)[0])


@dataclass
class Table:
    """Irreducible losses of a job, if its selections read any.

    Attributes:
        losses: The table.
        seconds: That making it took; next to none where it was there.
    """

    losses: Dataset | None = None
    seconds: float = 0.0

    @property
    def settings(self) -> Mapping[str, Any] | None:
        """How it was made, for a run's settings."""
        return None if self.losses is None else settings_of(self.losses)

    @property
    def note(self) -> str:
        """In a few words, for cards."""
        if self.losses is None:
            return ""
        settings = settings_of(self.losses)
        way = f"cross-fit over {settings['folds']} folds" if "folds" in settings else "a model trained on other data"
        return f"Irreducible losses of {settings['rows']:,} examples by {way} ({settings['model_name']})."


def load_selecting_job(
    method: str,
    command: str,
    args: Any,
    task_options: TaskOptions,
    model_options: TaskModelOptions,
    irreducible: IrreducibleOptions,
    selections: Sequence[str],
    plot: bool = True,
) -> tuple[TaskJob, Table]:
    """Loads the task and the model, and loads or makes the table that one of the selections needs."""
    needed = any(get_selection_function(name).needs_irreducible_loss for name in selections)
    if irreducible.given and not needed:
        raise ValueError(
            f"{', '.join(irreducible.given)}: {' or '.join(selections) or 'selection_ratio=1'} reads no irreducible "
            f"losses. Leave that out, or choose another selection."
        )
    ready = irreducible.irreducible_losses if needed else None
    losses = load_irreducible_losses(ready) if ready else None
    source = (irreducible.irreducible if losses is None else settings_of(losses)) if needed else None
    if task_options.label_noise:
        args.corrupted_column = args.corrupted_column or CORRUPTED_COLUMN
    job = TaskJob.load(method, command, args, with_holdout_share(task_options, source), model_options, plot)
    if not needed or losses is not None:
        return job, Table(losses)
    return job, make_irreducible_losses(job, irreducible, args.granularity)


def with_holdout_share(options: TaskOptions, irreducible: dict[str, Any] | str | None) -> TaskOptions:
    """The task's options with the share of the holdout that goes with its irreducible losses, if none was given.

    Args:
        options: The task's.
        irreducible: A table's settings, or how one will be made; None where none is needed.
    """
    if options.holdout_share is not None:
        return options
    by_holdout = irreducible == "holdout" or (isinstance(irreducible, dict) and "folds" not in irreducible)
    return dataclasses.replace(options, holdout_share=HOLDOUT_SHARE if by_holdout else 0.0)


def make_irreducible_losses(job: TaskJob, options: IrreducibleOptions, granularity: str) -> Table:
    """Makes a table in `<output_dir>/_irreducible_losses/<settings' hash>`; what is there is gone on from.

    Args:
        job: Whose task it is of; with a holdout where the table is made by one. Its optimiser, batch sizes and seed
            are the irreducible-loss model's too.
        options: How.
        granularity: Of the selection.

    Raises:
        ValueError: If there is no holdout to train on.
    """
    start, task, args = time.perf_counter(), job.task, job.args
    if options.irreducible == "holdout" and task.holdout is None:
        raise ValueError(
            "irreducible='holdout' needs a holdout: give a holdout_share above 0, or irreducible='cross_fit'."
        )
    seed = args.seed + 1  # other weights than the trained model's, where both are of one size
    model = task.side_model(options.irreducible_model, seed)
    own = _own_arguments(args, options, task)
    settings = {**dataclasses.asdict(options), "granularity": granularity, "model": weights_fingerprint(model)}
    choosing = {f.name for f in dataclasses.fields(RHOLossArgumentsMixin)}  # which the table has nothing to do with
    settings |= {k: v for k, v in training_settings(own).items() if k not in choosing}
    settings |= {"data": job.start["data"], "holdout": job.start["holdout"], "steps": own.max_steps}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]
    folder = job.folder / FOLDER / digest
    own = dataclasses.replace(own, output_dir=str(folder / "training"))
    common: dict[str, Any] = {"data_collator": task.data_collator, "processing_class": task.tokenizer}
    scored: dict[str, Any] = {"task": task.loss_task, "granularity": granularity, "output_dir": folder / "table"}
    scored |= {"fingerprint_columns": task.fingerprint_columns, **common}
    if options.irreducible == "cross_fit":
        table = cross_fit_irreducible_losses(
            lambda: task.side_model(options.irreducible_model, seed),
            task.train,
            options.irreducible_folds,
            args=own,
            label_column="label" if task.labels else None,
            **scored,
        )
    elif (folder / "table" / "dataset_info.json").is_file():
        table = load_irreducible_losses(folder / "table")
    else:
        model = train_irreducible_model(model, own, task.holdout, task.train, **common)  # pyright: ignore
        smoothing, size = args.label_smoothing_factor, args.per_device_eval_batch_size
        table = compute_irreducible_losses(model, task.train, label_smoothing=smoothing, batch_size=size, **scored)
        if args.should_save:
            shutil.rmtree(folder / "training", ignore_errors=True)
    return Table(table, time.perf_counter() - start)


def _own_arguments(args: Any, options: IrreducibleOptions, task: LearningTask) -> Any:
    """The run's arguments for the irreducible-loss model: nothing of it is pushed, reported or resumed by hand."""
    examples, folds = len(task.holdout or ()), options.irreducible_folds
    if options.irreducible == "cross_fit":
        examples = len(task.train) * (folds - 1) // folds
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps = options.irreducible_steps or max(EPOCHS * examples // batch, 1)
    return dataclasses.replace(
        args,
        max_steps=steps,
        learning_rate=options.irreducible_learning_rate or args.learning_rate,
        eval_strategy="steps",
        eval_steps=max(steps // EPOCHS, 1),
        logging_strategy="no",
        push_to_hub=False,
        resume_from_checkpoint=None,
        report_to=[],
        load_best_model_at_end=False,
        metric_for_best_model=None,
    )


@dataclass
class TableOptions:
    """What becomes of the table."""

    granularity: Literal["example", "token"] = field(
        default="example",
        metadata={"help": "'token' keeps a loss for each token of a causal model: larger, and for selecting tokens."},
    )
    push_table_to: str | None = field(
        default=None,
        metadata={"help": "Data set on the Hub that the table is pushed to, with its card and histogram."},
    )


def irreducible_main(argv: Sequence[str] | None = None) -> int:
    """Runs scripts/compute_irreducible_losses.py, as `run_program` says."""
    return run_program(
        _make_table,
        argv,
        prog="compute_irreducible_losses.py",
        description="Computes irreducible losses.",
        options=(TaskModelOptions, TaskOptions, IrreducibleOptions, TableOptions, EfxArguments),
        **{**program_defaults(), "output_dir": "runs/irreducible_losses"},
    )


def _make_table(
    command: str,
    model_options: TaskModelOptions,
    task_options: TaskOptions,
    irreducible: IrreducibleOptions,
    table_options: TableOptions,
    args: EfxArguments,
) -> None:
    if irreducible.irreducible_losses:
        raise ValueError("irreducible_losses names a ready table, but this program makes one: leave it out.")
    if table_options.push_table_to:
        check_push("push_table_to", table_options.push_table_to)
    options = with_holdout_share(task_options, irreducible.irreducible)
    job = TaskJob.load("rho_loss", command, args, options, model_options)
    table = make_irreducible_losses(job, irreducible, table_options.granularity)
    if args.process_index == 0:
        with not_the_input("saving the table"):
            assert table.losses is not None
            folder = save_irreducible_losses(table.losses, job.folder / "table")
            print(f"{table.note}\n{table.seconds:.1f} s, table: {folder}")
            if table_options.push_table_to:
                print(f"pushed: {push_irreducible_losses(table.losses, table_options.push_table_to).commit_url}")

"""Irreducible losses for a program: a ready table, or one made on the spot by holdout or cross-fit."""

import dataclasses
import hashlib
import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset
from transformers import TrainingArguments

from hf_efx.core.data.fingerprints import data_fingerprint
from hf_efx.core.data.tables import settings_of
from hf_efx.programs.task_data import HOLDOUT_SHARE
from hf_efx.programs.tasks import SIDE_MODEL_HELP, LearningTask, TaskOptions
from hf_efx.rho_loss.cross_fit import cross_fit_irreducible_losses
from hf_efx.rho_loss.irreducible import compute_irreducible_losses, train_irreducible_model
from hf_efx.rho_loss.irreducible_table import load_irreducible_losses

# In the output folder. The Trainer pushes nothing that begins with an underscore.
FOLDER = "_irreducible_losses"


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


EPOCHS = 10


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


def load_or_none(options: IrreducibleOptions) -> Dataset | None:
    """The ready table that the options name, None if they name none.

    Raises:
        FileNotFoundError: If it isn't there.
        ValueError: If it is no such table.
    """
    return load_irreducible_losses(options.irreducible_losses) if options.irreducible_losses else None


def make_irreducible_losses(
    task: LearningTask, options: IrreducibleOptions, args: TrainingArguments, granularity: str
) -> tuple[Dataset, float]:
    """Makes a table in `<output_dir>/_irreducible_losses/<settings' hash>`; what is there is gone on from.

    Args:
        task: The task; with a holdout where the table is made by one.
        options: How.
        args: Of the run, whose optimiser, batch sizes and seed the irreducible-loss model shares.
        granularity: Of the selection.

    Returns:
        The table, and the seconds that it took; next to none where it was there.

    Raises:
        ValueError: If there is no holdout to train on.
    """
    start = time.perf_counter()
    if options.irreducible == "holdout" and task.holdout is None:
        raise ValueError(
            "irreducible='holdout' needs a holdout: give a holdout_share above 0, or irreducible='cross_fit'."
        )
    seed = args.seed + 1  # other weights than the trained model's, where both are of one size
    settings = {**dataclasses.asdict(options), "granularity": granularity, "seed": seed, "rate": args.learning_rate}
    settings["data"] = data_fingerprint(task.train, task.fingerprint_columns)
    settings["smoothing"], settings["batch"] = args.label_smoothing_factor, args.per_device_train_batch_size
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    folder = Path(str(args.output_dir), FOLDER, digest)
    common: dict[str, Any] = {"data_collator": task.data_collator, "processing_class": task.tokenizer}
    scored: dict[str, Any] = {
        "task": task.loss_task,
        "granularity": granularity,
        "fingerprint_columns": task.fingerprint_columns,
        "output_dir": folder / "table",
        **common,
    }
    if options.irreducible == "cross_fit":
        rest = len(task.train) * (options.irreducible_folds - 1) // options.irreducible_folds
        own = _own_arguments(args, options, folder / "training", rest)
        table = cross_fit_irreducible_losses(
            lambda: task.side_model(options.irreducible_model, seed),
            task.train,
            options.irreducible_folds,
            args=own,
            label_column="label" if task.labels else None,
            **scored,
        )
        return table, time.perf_counter() - start
    if (folder / "table" / "dataset_info.json").is_file():
        return load_irreducible_losses(folder / "table"), time.perf_counter() - start
    assert task.holdout is not None
    own = _own_arguments(args, options, folder / "training", len(task.holdout))
    model = train_irreducible_model(
        task.side_model(options.irreducible_model, seed), own, task.holdout, task.train, **common
    )
    smoothing, batch_size = args.label_smoothing_factor, args.per_device_eval_batch_size
    table = compute_irreducible_losses(model, task.train, label_smoothing=smoothing, batch_size=batch_size, **scored)
    if args.should_save:
        shutil.rmtree(folder / "training", ignore_errors=True)
    return table, time.perf_counter() - start


def how_made(table: Dataset) -> str:
    """A table in a few words, for cards."""
    settings = settings_of(table)
    way = f"cross-fit over {settings['folds']} folds" if "folds" in settings else "a model trained on other data"
    return f"Irreducible losses of {settings['rows']:,} examples by {way} ({settings['model_name']})."


def _own_arguments(args: Any, options: IrreducibleOptions, folder: Path, examples: int) -> Any:
    """The run's arguments for the irreducible-loss model: nothing of it is pushed, reported or resumed by hand."""
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps = options.irreducible_steps or max(EPOCHS * examples // batch, 1)
    return dataclasses.replace(
        args,
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=options.irreducible_learning_rate or args.learning_rate,
        eval_strategy="steps",
        eval_steps=max(steps // EPOCHS, 1),
        logging_strategy="no",
        push_to_hub=False,
        hub_model_id=None,
        resume_from_checkpoint=None,
        report_to=[],
        load_best_model_at_end=False,
        metric_for_best_model=None,
    )

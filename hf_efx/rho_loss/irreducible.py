"""Irreducible losses: how hard each example stays for a model that was trained on other data.

"Prioritized Training on Points that are Learnable, Worth Learning, and Not Yet Learnt", Mindermann et al. 2022,
arXiv 2206.07137, section 3: the loss of a model trained on a holdout set stands for the part of an example's loss that
no training removes. It is computed once, in evaluation mode, and kept as a table by example id.
"""

import inspect
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value
from torch import nn
from transformers import (
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from hf_efx.core.data.example_ids import add_example_ids
from hf_efx.core.data.tables import (
    ID_COLUMN,
    IdIndex,
    check_dataset,
    data_fingerprint,
    settings_of,
    tokenizer_fingerprint,
    weights_fingerprint,
    with_settings,
)
from hf_efx.core.data.text_data import source_name
from hf_efx.core.scoring.losses import Task
from hf_efx.core.scoring.scorer import Precision, Scorer, infer_task
from hf_efx.core.scoring.scoring_state import base_model
from hf_efx.core.training.checkpoints import last_complete_checkpoint
from hf_efx.core.training.trainer import EfxTrainer
from hf_efx.rho_loss.irreducible_table import (
    KIND,
    LOSS_COLUMN,
    Granularity,
    load_irreducible_losses,
    save_irreducible_losses,
)
from hf_efx.rho_loss.shards import Shards, changes, check_kept_settings, fill_shards, process_rank, wait_for_all

logger = logging.getLogger(__name__)

# What of the training arguments a model depends on; the rest (logging, saving, places) may change on the way.
TRAINING = (
    *("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("optim", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "lr_scheduler_type"),
    *("warmup_steps", "lr_scheduler_kwargs", "optim_args", "neftune_noise_alpha", "label_smoothing_factor", "bf16"),
    *("fp16", "seed", "data_seed", "eval_strategy", "eval_steps", "train_sampling_strategy", "dataloader_drop_last"),
)
_TEMPORARY: list[tempfile.TemporaryDirectory] = []  # tables without an output_dir, until the process ends


def compute_irreducible_losses(
    model: nn.Module,
    dataset: Dataset,
    *,
    data_collator: Callable[[list[Any]], Any] | None = None,
    processing_class: Any = None,
    batch_size: int = 64,
    task: Task | None = None,
    granularity: Granularity = "example",
    label_smoothing: float = 0.0,
    precision: Precision | None = None,
    fingerprint_columns: Sequence[str] | None = None,
    remove_unused_columns: bool = True,
    output_dir: str | os.PathLike[str] | None = None,
    save_every: int = 4096,
    num_workers: int = 0,
) -> Dataset:
    """Computes the loss of every example under a model that was trained on other data.

    The model stays as it is. Started by several processes (torchrun, accelerate launch, process group initialised),
    each computes a share; all get the whole table.

    Args:
        model: A model trained on a holdout set, on the device where it is to compute.
        dataset: What will be trained on, with `example_id`: see `add_example_ids`.
        data_collator: As the Trainer's, without randomness; None for the Trainer's default.
        processing_class: The tokenizer or processor; its hash is kept, and the table is refused with another.
        batch_size: Examples a forward pass; more is faster and takes more memory.
        task: See `per_example_loss`; None reads it off the model.
        granularity: `"example"`, or `"token"` for selection among tokens.
        label_smoothing: That of the run that uses the table.
        precision: `"bf16"` or `"fp16"` autocast: faster where the device has units for it, and two or three digits.
        fingerprint_columns: The columns by which the data set is known again; None for all. With those that the
            examples were made from (text, label) the table fits a copy that was tokenized another way.
        remove_unused_columns: As in TrainingArguments; False where the collator or a transform needs other columns.
        output_dir: Where the table is saved, and, in `<output_dir>.partial` beside it, what is done so far: the same
            call goes on from there. None keeps it in a temporary folder that lives as long as this process.
        save_every: Rows after which what is done is written: an interrupted run loses at most so many.
        num_workers: Processes that load examples.

    Returns:
        `example_id` (int64, ascending) and `irreducible_loss` (float32; by token a list of those of its valid tokens
        in their order), memory-mapped, with settings. An example without a valid label has loss 0.

    Raises:
        ValueError: Ids missing, doubled or of another type; a loss that isn't finite; an `output_dir` that holds what
            was made with other settings.
    """
    index = IdIndex(check_dataset(dataset, "dataset", ids=True))
    for name, value in (("len(dataset)", len(dataset)), ("batch_size", batch_size), ("save_every", save_every)):
        if value < 1:
            raise ValueError(f"{name}={value}: it must be at least 1")
    task = task or infer_task(model)
    config = getattr(base_model(model), "config", None)
    settings = {
        **run_settings(dataset, fingerprint_columns, processing_class, task, granularity, label_smoothing, precision),
        "model_name": source_name(getattr(config, "name_or_path", "") or type(base_model(model)).__name__),
        "model_weights": weights_fingerprint(model),
    }
    done = finished_table(output_dir, settings)
    if done is not None:
        return done
    value = Value("float32")
    features = Features({ID_COLUMN: Value("int64"), LOSS_COLUMN: List(value) if granularity == "token" else value})
    folder = work_folder(output_dir)
    shards = Shards(folder, settings, features, len(dataset), save_every)
    collator = data_collator or default_collator(processing_class)
    feed = _model_columns(model, dataset) if remove_unused_columns else dataset
    scorer = Scorer(
        task=task,
        granularity=granularity,
        label_smoothing=label_smoothing,
        precision=precision,
        batch_size=batch_size,
    )
    fill_shards(shards, model, feed, scorer, collator, index, num_workers)
    return finish_table(shards.merge, settings, folder, output_dir)


def train_irreducible_model(
    model: nn.Module | Callable[[], nn.Module],
    args: TrainingArguments,
    holdout: Dataset,
    target: Dataset,
    *,
    data_collator: Callable[[list[Any]], Any] | None = None,
    processing_class: Any = None,
    **trainer_options: Any,
) -> nn.Module:
    """Trains a model on holdout data and keeps it as it was when its loss on the target's data was lowest.

    The lowest loss, not the best accuracy: that is the rule of the paper's code (github.com/OATML/RHO-Loss).
    Checkpoints go to `args.output_dir`, with the settings that they were made with; the same call goes on from the
    newest complete one there.

    Args:
        model: The model, or a function that makes it.
        args: How it is trained. It is evaluated and saved each epoch, or as often as `eval_strategy` says.
        holdout: What it is trained on.
        target: What it will score, and the run with RHO-LOSS will train on.
        data_collator: As the Trainer's.
        processing_class: As the Trainer's.
        **trainer_options: Further arguments of the Trainer.

    Returns:
        The model, for `compute_irreducible_losses`.

    Raises:
        ValueError: If `args.output_dir` holds checkpoints of other data, arguments or initial weights, or of a run
            whose settings aren't known.
    """
    parts = {"data_collator": data_collator, **trainer_options}
    _check_same_model(model, args, holdout, target, processing_class, parts)
    trainer = LowestLossTrainer(
        **_model_argument(model),
        args=best_by_loss(args),
        train_dataset=_without_ids(holdout),
        eval_dataset=_without_ids(target),
        data_collator=data_collator,
        processing_class=processing_class,
        **trainer_options,
    )
    return trainer.train_to_lowest_loss()


def _check_same_model(
    model: Any,
    args: TrainingArguments,
    holdout: Dataset,
    target: Dataset,
    processing_class: Any,
    parts: Mapping[str, Any],
) -> None:
    """Keeps what the model depends on in `args.output_dir`, or compares it with what is there; on every process."""
    folder, kept = Path(str(args.output_dir)), Path(str(args.output_dir), "settings.json")
    if last_complete_checkpoint(str(folder)) is not None and not kept.is_file():
        raise ValueError(
            f"output_dir={str(folder)!r} holds checkpoints of another run: name a folder of its own for this model, "
            f"or delete them."
        )
    set_seed(args.seed)
    initial = model if isinstance(model, nn.Module) else model()
    training = args.to_dict()
    settings = {
        **{name: _fingerprint(data) for name, data in (("holdout", holdout), ("target", target))},
        "tokenizer": tokenizer_fingerprint(processing_class),
        "initial_weights": weights_fingerprint(initial),
        "training": {name: training[name] for name in TRAINING},
        "parts": {name: _named(value) for name, value in parts.items() if name != "callbacks" and value is not None},
    }
    if process_rank()[0] == 0 and last_complete_checkpoint(str(folder)) is None:
        kept.unlink(missing_ok=True)  # nothing was made with them
        check_kept_settings(folder, settings)
    wait_for_all()
    check_kept_settings(folder, settings)


def _named(value: Any) -> Any:
    """A part of a Trainer as far as JSON tells one from another: names of functions and classes, plain values."""
    if isinstance(value, tuple | list):
        return [_named(one) for one in value]
    if isinstance(value, Mapping):
        return {str(key): _named(one) for key, one in value.items()}
    if isinstance(value, str | int | float | bool | None):
        return value
    return getattr(value, "__qualname__", type(value).__qualname__)


def default_collator(processing_class: Any) -> Callable[[list[Any]], Any]:
    """The Trainer's default data collator."""
    if isinstance(processing_class, PreTrainedTokenizerBase):
        return DataCollatorWithPadding(processing_class)
    return default_data_collator


def run_settings(
    dataset: Dataset,
    fingerprint_columns: Sequence[str] | None,
    processing_class: Any,
    task: Task,
    granularity: Granularity,
    label_smoothing: float,
    precision: Precision | None,
) -> dict[str, Any]:
    """What a table is compared by before it is used, and how its losses were computed, but for the model."""
    columns = sorted(set(dataset.column_names if fingerprint_columns is None else fingerprint_columns) - {ID_COLUMN})
    return {
        "kind": KIND,
        "data_fingerprint": data_fingerprint(dataset, columns),
        "fingerprint_columns": columns,
        "rows": len(dataset),
        "tokenizer": tokenizer_fingerprint(processing_class),
        "task": task,
        "granularity": granularity,
        "label_smoothing": label_smoothing,
        "precision": precision,
    }


def work_folder(output_dir: str | os.PathLike[str] | None) -> Path:
    """Where the parts of a table lie until it is whole; without an `output_dir` as long as this process lives.

    Raises:
        ValueError: If several processes have no folder in common.
    """
    if output_dir is not None:
        folder = Path(output_dir)
        return folder.with_name(f"{folder.name}.partial")
    if process_rank()[1] > 1:
        raise ValueError("output_dir=None: several processes need one, in a folder that they share")
    _TEMPORARY.append(tempfile.TemporaryDirectory(prefix="irreducible-losses-", ignore_cleanup_errors=True))
    return Path(_TEMPORARY[-1].name)


def finished_table(output_dir: str | os.PathLike[str] | None, settings: dict[str, Any]) -> Dataset | None:
    """The table that was saved before, if its settings are these.

    Raises:
        ValueError: If it was made with others.
    """
    if output_dir is None or not (Path(output_dir) / "dataset_info.json").is_file():
        return None
    table = load_irreducible_losses(output_dir)
    there = {key: value for key, value in settings_of(table, KIND).items() if key in settings}
    if changed := changes(there, settings):
        raise ValueError(
            f"output_dir={os.fspath(output_dir)!r} holds a table made with other settings ({changed}): name another "
            "folder, or delete that table"
        )
    logger.info("%s holds this table already", output_dir)
    if process_rank()[0] == 0:  # of a run that was killed at its very end
        shutil.rmtree(work_folder(output_dir), ignore_errors=True)
    return table


def finish_table(
    merge: Callable[[Path], Dataset],
    settings: dict[str, Any],
    folder: Path,
    output_dir: str | os.PathLike[str] | None,
) -> Dataset:
    """Merges what the processes wrote, saves the table where that is wanted, and deletes the parts.

    Args:
        merge: Makes one table of the parts in a file, which it is given.
        settings: The table's.
        folder: Where the parts lie.
        output_dir: Where the table goes; None leaves it in `folder`.
    """
    wait_for_all()
    table = None
    if process_rank()[0] == 0:
        table = with_settings(merge(folder / "merged.arrow"), settings)
        if output_dir is not None:
            save_irreducible_losses(table, output_dir)
    if output_dir is not None:
        wait_for_all()
        table = load_irreducible_losses(output_dir)
        if process_rank()[0] == 0:
            shutil.rmtree(folder)
    assert table is not None, "output_dir is None in one process alone"
    return table


def _model_columns(model: nn.Module, dataset: Dataset) -> Dataset:
    """The columns that the model's forward takes, as the Trainer keeps them."""
    known = {*inspect.signature(base_model(model).forward).parameters, "label", "label_ids", "labels"}
    kept = [name for name in dataset.column_names if name in known]
    if not any(name not in ("label", "label_ids", "labels") for name in kept):
        raise ValueError(
            f"none of the columns {', '.join(dataset.column_names)} is an input of "
            f"{type(base_model(model)).__name__}: prepare the data set for the model first, or pass "
            "remove_unused_columns=False where the data_collator or a transform does it"
        )
    return dataset.select_columns([ID_COLUMN, *kept])


class LowestLossTrainer(EfxTrainer):
    """Trains to the lowest loss on the evaluation data."""

    def train_to_lowest_loss(self) -> nn.Module:
        begun = last_complete_checkpoint(str(self.args.output_dir)) is not None
        self.train(resume_from_checkpoint=begun)
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)


def _without_ids(dataset: Dataset) -> Dataset:
    return dataset.remove_columns(ID_COLUMN) if ID_COLUMN in dataset.column_names else dataset


def _fingerprint(dataset: Dataset) -> str:
    named = dataset if ID_COLUMN in dataset.column_names else add_example_ids(dataset)
    return data_fingerprint(named, dataset.column_names)


def _model_argument(model: Any) -> dict[str, Any]:
    return {"model": model} if isinstance(model, nn.Module) else {"model_init": model}


def best_by_loss(args: TrainingArguments, output_dir: str | None = None) -> TrainingArguments:
    """The arguments with an evaluation and a checkpoint at the same moments, the best one being kept."""
    when = IntervalStrategy(args.eval_strategy).value
    when = "epoch" if when == "no" else when
    return replace(
        args,
        output_dir=output_dir or args.output_dir,
        eval_strategy=when,
        save_strategy=SaveStrategy(when),
        save_steps=args.eval_steps if when == "steps" and args.eval_steps else args.save_steps,
        save_total_limit=max(args.save_total_limit or 2, 2),  # at 1 the Trainer ends by deleting the newest
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
    )

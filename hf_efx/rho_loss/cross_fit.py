"""Irreducible losses without a holdout: each fold of the data is scored by a model that was trained on the others.

"Prioritized Training on Points that are Learnable, Worth Learning, and Not Yet Learnt", Mindermann et al. 2022,
arXiv 2206.07137: two halves of the training set, each scored by the other's model. Folds are dealt and tables put
together by example id; by position, losses would end up with other examples wherever ids aren't 0, 1, 2, ...
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, Value
from torch import nn
from transformers import TrainingArguments, set_seed

from hf_efx.core.data.tables import (
    ID_COLUMN,
    IdIndex,
    Ids,
    as_ids,
    check_dataset,
    settings_of,
    table_column,
    weights_fingerprint,
    write_arrow,
)
from hf_efx.core.scoring.losses import Task
from hf_efx.core.scoring.scorer import Precision, infer_task
from hf_efx.rho_loss.irreducible import (
    TRAINING,
    LowestLossTrainer,
    best_by_loss,
    compute_irreducible_losses,
    default_collator,
    finish_table,
    finished_table,
    run_settings,
    work_folder,
)
from hf_efx.rho_loss.irreducible_table import KIND, Granularity
from hf_efx.rho_loss.loader import ExtraColumnsCollator
from hf_efx.rho_loss.shards import check_kept_settings, process_rank

FOLD_COLUMN = "fold"

_MERGED_AT_ONCE = 100_000  # rows


def cross_fit_irreducible_losses(
    model_init: Callable[[], nn.Module],
    dataset: Dataset,
    folds: int = 2,
    *,
    args: TrainingArguments,
    data_collator: Callable[[list[Any]], Any] | None = None,
    processing_class: Any = None,
    label_column: str | None = None,
    task: Task | None = None,
    granularity: Granularity = "example",
    precision: Precision | None = None,
    fingerprint_columns: Sequence[str] | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    **trainer_options: Any,
) -> Dataset:
    """Computes irreducible losses of a data set with models trained on parts of it.

    For each fold a model is trained on the others, kept as it was when its loss on the fold was lowest, and scores it.
    Costs `folds - 1` times the training of one model on the whole.

    Args:
        model_init: Makes a model, as the Trainer's `model_init`; all folds start from the same weights.
        dataset: What will be trained on, with `example_id`.
        folds: Parts. More leave each model more to learn from, and cost more.
        args: How each model is trained; `seed` also deals the folds, `label_smoothing_factor` is the scores' too, and
            `per_device_eval_batch_size` is what is scored at a time.
        data_collator: As the Trainer's, without randomness.
        processing_class: As in `compute_irreducible_losses`.
        label_column: Its classes are spread evenly over the folds; None takes `label` or `labels` where that is one
            class an example.
        task: As in `compute_irreducible_losses`.
        granularity: As there.
        precision: As there, of the scoring.
        fingerprint_columns: As there.
        output_dir: As there. What is done lies in `<output_dir>.partial`, checkpoints too; the same call goes on from
            there, within a fold as well.
        **trainer_options: Further arguments of the Trainer: `callbacks`, `optimizer_cls_and_kwargs`, ...

    Returns:
        `example_id`, `irreducible_loss` and `fold` (int32), ascending by id, memory-mapped, with settings.

    Raises:
        ValueError: As `compute_irreducible_losses`; too few folds or rows; a label column that is missing.
        RuntimeError: If an example were to train the model that scores it. This can't happen, and is looked after.
    """
    index = IdIndex(check_dataset(dataset, "dataset", ids=True))
    if not 2 <= folds <= len(dataset):
        raise ValueError(f"folds={folds}: it must be from 2 to the number of rows, {len(dataset)}")
    label_column = _label_column(dataset, label_column)
    set_seed(args.seed)
    model = model_init()
    training = args.to_dict()
    settings = {
        **run_settings(
            dataset,
            fingerprint_columns,
            processing_class,
            task or infer_task(model),
            granularity,
            args.label_smoothing_factor,
            precision,
        ),
        "initial_weights": weights_fingerprint(model),
        "training": {name: training[name] for name in TRAINING},
        "folds": folds,
        "stratified_by": label_column,
    }
    done = finished_table(output_dir, settings)
    if done is not None:
        return done
    folder = work_folder(output_dir)
    check_kept_settings(folder, settings)
    fold_of = deal_folds(dataset, folds, args.seed, label_column, index)
    tables = []
    for fold in range(folds):
        scored, others = (dataset.select(np.flatnonzero(chosen)) for chosen in (fold_of == fold, fold_of != fold))
        place = folder / f"fold-{fold}"
        table = finished_table(place, {"rows": len(scored)})
        if table is None:
            options = {"data_collator": data_collator, "processing_class": processing_class}
            model = _train_fold(model_init, args, others, scored, place, **options, **trainer_options)
            table = _score_fold(model, args, scored, place, settings, **options)
        tables.append(table)
    settings["model_weights"] = [settings_of(table, KIND)["model_weights"] for table in tables]
    settings["model_name"] = settings_of(tables[0], KIND)["model_name"]
    sorted_folds = fold_of[index.rows_by_id(0, len(index))]

    def merge(path: Path) -> Dataset:
        features = Features({**tables[0].features, FOLD_COLUMN: Value("int32")})
        write_arrow(path, features.arrow_schema, _merged(tables, index, sorted_folds))
        return Dataset.from_file(str(path))

    return finish_table(merge, settings, folder, output_dir)


def deal_folds(
    dataset: Dataset, folds: int, seed: int, label_column: str | None = None, index: IdIndex | None = None
) -> np.ndarray:
    """Deals examples to folds at random, each class evenly.

    Who is dealt where depends on ids, classes and seed, not on the order of the rows.

    Args:
        dataset: With `example_id`.
        folds: Their number.
        seed: For the shuffle.
        label_column: The class; None for one class.
        index: Of the data set, if there is one already.

    Returns:
        The fold of each row, int32 [rows]: sizes differ by one at most, those of a class too.
    """
    by_id = (index or IdIndex(dataset)).rows_by_id(0, len(dataset))
    order = np.random.default_rng(seed).permutation(len(dataset))
    if label_column is not None:
        labels = table_column(dataset, label_column).to_numpy()
        classes = np.unique(labels, return_inverse=True)[1].reshape(-1)[by_id]
        order = order[np.argsort(classes[order], kind="stable")]
    fold_of = np.empty(len(dataset), np.int32)
    fold_of[by_id[order]] = np.arange(len(dataset)) % folds
    return fold_of


def _train_fold(
    model_init: Any,
    args: TrainingArguments,
    others: Dataset,
    scored: Dataset,
    place: Path,
    data_collator: Callable[[list[Any]], Any] | None = None,
    processing_class: Any = None,
    **trainer_options: Any,
) -> nn.Module:
    """Trains the model of a fold, whose table will go to `place`."""
    trainer = _FoldTrainer(
        model_init=model_init,
        args=best_by_loss(args, _checkpoints(place)),
        train_dataset=others,
        eval_dataset=scored,
        data_collator=ExtraColumnsCollator(data_collator or default_collator(processing_class), (ID_COLUMN,)),
        processing_class=processing_class,
        scored=IdIndex(scored),
        **trainer_options,
    )
    return trainer.train_to_lowest_loss()


def _score_fold(
    model: nn.Module,
    args: TrainingArguments,
    scored: Dataset,
    place: Path,
    settings: Mapping[str, Any],
    **options: Any,
) -> Dataset:
    """Makes the table of a fold, and deletes the checkpoints of its model."""
    names = ("task", "granularity", "label_smoothing", "precision", "fingerprint_columns")
    table = compute_irreducible_losses(
        model,
        scored,
        batch_size=args.per_device_eval_batch_size,
        remove_unused_columns=bool(args.remove_unused_columns),
        output_dir=place,
        num_workers=args.dataloader_num_workers,
        **{name: settings[name] for name in names},
        **options,
    )
    if process_rank()[0] == 0:
        shutil.rmtree(_checkpoints(place))
    return table


def _checkpoints(place: Path) -> str:
    return str(place.with_name(f"{place.name}-training"))


class _FoldTrainer(LowestLossTrainer):
    """Refuses to train on what its model is to score.

    Args:
        *args: As the Trainer's.
        scored: What is scored.
        **kwargs: As the Trainer's. The collator hands `example_id` on.
    """

    extra_columns: ClassVar[tuple[str, ...]] = (ID_COLUMN,)

    def __init__(self, *args: Any, scored: IdIndex, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._scored = scored

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> Any:
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches:
            refuse_scored(batch[ID_COLUMN], self._scored)
        return batches, count


def refuse_scored(ids: Ids, scored: IdIndex) -> None:
    """Raises RuntimeError if one of the ids of a batch is among those that the model will score."""
    seen = scored.contains(ids)
    if seen.any():
        raise RuntimeError(
            f"{seen.sum()} examples were to train the model that scores them, {ID_COLUMN} "
            f"{as_ids(ids)[seen][0]} among them: the data set has changed under this run"
        )


def _label_column(dataset: Dataset, name: str | None) -> str | None:
    """The column whose classes are spread, None if there is none."""
    if name is not None:
        if name not in dataset.column_names:
            raise ValueError(f"label_column={name!r} is no column; there are {', '.join(dataset.column_names)}")
        return name
    for name in ("label", "labels"):
        kind = getattr(dataset.features.get(name), "dtype", "")
        if kind.startswith(("int", "uint", "bool", "string")):
            return name
    return None


def _merged(tables: Sequence[Dataset], index: IdIndex, folds: np.ndarray) -> Iterator[pa.Table]:
    """The folds' tables as one in ascending order of ids, a piece at a time, each checked against what was dealt."""
    places = [IdIndex(table) for table in tables]
    for start in range(0, len(index), _MERGED_AT_ONCE):
        ids, dealt = index.sorted_ids(start, start + _MERGED_AT_ONCE), folds[start : start + _MERGED_AT_ONCE]
        parts = []
        for fold, (table, place) in enumerate(zip(tables, places, strict=True)):
            part: Any = table.with_format("arrow")[place.place(ids[0]) : place.place(ids[-1] + 1)]
            column = pa.array(np.full(len(part), fold, np.int32))
            parts.append(part.append_column(FOLD_COLUMN, column).replace_schema_metadata(None))
        merged = pa.concat_tables(parts).sort_by(ID_COLUMN)
        scored, by = merged.column(ID_COLUMN).to_numpy(), merged.column(FOLD_COLUMN).to_numpy()
        if not (np.array_equal(scored, ids) and np.array_equal(by, dealt)):
            raise RuntimeError("examples were scored twice, not at all, or by a model of another fold: start anew")
        yield merged

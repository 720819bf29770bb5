"""Irreducible losses without a holdout: each fold of the data is scored by a model that was trained on the others.

"Prioritized Training on Points that are Learnable, Worth Learning, and Not Yet Learnt", Mindermann et al. 2022,
arXiv 2206.07137: two halves of the training set, each scored by the other's model. Folds are dealt and tables put
together by example id; by position, losses would end up with other examples wherever ids aren't 0, 1, 2, ...
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
    write_arrow,
)
from hf_efx.core.scoring.losses import Task
from hf_efx.core.scoring.scorer import Precision
from hf_efx.rho_loss.exchange import process_rank
from hf_efx.rho_loss.irreducible import Scoring, compute_irreducible_losses, default_collator
from hf_efx.rho_loss.irreducible_table import (
    KIND,
    Granularity,
    check_kept_settings,
    finish_table,
    finished_table,
    work_folder,
)
from hf_efx.rho_loss.loader import ExtraColumnsCollator
from hf_efx.rho_loss.side_models import LowestLossTrainer, best_by_loss, initial_settings

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
    scoring = Scoring(
        data_collator or default_collator(processing_class),
        processing_class,
        args.per_device_eval_batch_size,
        task,
        granularity,
        args.label_smoothing_factor,
        precision,
        fingerprint_columns,
        bool(args.remove_unused_columns),
        args.dataloader_num_workers,
    )
    set_seed(args.seed)
    model = model_init()
    settings = {
        **scoring.settings(model, dataset),
        **initial_settings(model, args),
        "folds": folds,
        "stratified_by": label_column,
    }
    done = finished_table(output_dir, settings)
    if done is not None:
        return done
    scoring.check(model, dataset)
    folder = work_folder(output_dir)
    check_kept_settings(folder, settings)
    fold_of = deal_folds(dataset, folds, args.seed, label_column, index)
    models = _FoldModels(model_init, args, scoring, trainer_options)
    tables = [models.losses(dataset, fold_of == fold, folder / f"fold-{fold}") for fold in range(folds)]
    made = [settings_of(table, KIND) for table in tables]
    settings |= {"model_name": made[0]["model_name"], "model_weights": [each["model_weights"] for each in made]}
    return finish_table(partial(_merge, tables, index, fold_of), settings, folder, output_dir)


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


@dataclass(frozen=True)
class _FoldModels:
    """How the model of every fold is made, trained, and asked for its losses.

    Attributes:
        model_init: Makes it.
        args: Of its training.
        scoring: Of its losses.
        trainer_options: Further arguments of the Trainer.
    """

    model_init: Callable[[], nn.Module]
    args: TrainingArguments
    scoring: Scoring
    trainer_options: Mapping[str, Any]

    def losses(self, dataset: Dataset, chosen: np.ndarray, place: Path) -> Dataset:
        """The table of the chosen rows at `place`, if need be by a model trained on the others."""
        scored, others = (dataset.select(np.flatnonzero(rows)) for rows in (chosen, ~chosen))
        table = finished_table(place, {"rows": len(scored)})
        return self.score(self.train(others, scored, place), scored, place) if table is None else table

    def train(self, others: Dataset, scored: Dataset, place: Path) -> nn.Module:
        """Trains the model of a fold, whose table will go to `place`."""
        trainer = _FoldTrainer(
            model_init=self.model_init,
            args=best_by_loss(self.args, _checkpoints(place)),
            train_dataset=others,
            eval_dataset=scored,
            data_collator=ExtraColumnsCollator(self.scoring.data_collator, (ID_COLUMN,)),
            processing_class=self.scoring.processing_class,
            scored=IdIndex(scored),
            **self.trainer_options,
        )
        return trainer.train_to_lowest_loss()

    def score(self, model: nn.Module, scored: Dataset, place: Path) -> Dataset:
        """Makes the table of a fold, and deletes the checkpoints of its model."""
        table = compute_irreducible_losses(model, scored, output_dir=place, **vars(self.scoring))
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


def _merge(tables: Sequence[Dataset], index: IdIndex, fold_of: np.ndarray, path: Path) -> Dataset:
    """Puts the folds' tables into one file, and maps it."""
    features = Features({**tables[0].features, FOLD_COLUMN: Value("int32")})
    write_arrow(path, features.arrow_schema, _merged(tables, index, fold_of[index.rows_by_id(0, len(index))]))
    return Dataset.from_file(str(path))


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

"""Irreducible losses: how hard each example stays for a model that was trained on other data.

"Prioritized Training on Points that are Learnable, Worth Learning, and Not Yet Learnt", Mindermann et al. 2022,
arXiv 2206.07137, section 3: the loss of a model trained on a holdout set stands for the part of an example's loss that
no training removes. It is computed once, in evaluation mode, and kept as a table by example id.
"""

import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Features, List, Value
from datasets.utils import tqdm
from torch import nn
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, default_data_collator

from hf_efx.core.data.tables import (
    ID_COLUMN,
    IdIndex,
    check_dataset,
    data_fingerprint,
    tokenizer_fingerprint,
    weights_fingerprint,
)
from hf_efx.core.data.text_data import source_name
from hf_efx.core.scoring.batches import check_rows, take_rows
from hf_efx.core.scoring.losses import Task
from hf_efx.core.scoring.scorer import Precision, Scorer, infer_task
from hf_efx.core.scoring.scoring_state import base_model
from hf_efx.rho_loss.checks import check_same_twice
from hf_efx.rho_loss.exchange import process_rank, wait_for_all
from hf_efx.rho_loss.irreducible_table import (
    KIND,
    LOSS_COLUMN,
    Granularity,
    Shards,
    finish_table,
    finished_table,
    work_folder,
)
from hf_efx.rho_loss.loader import ColumnRows, ExtraColumnsCollator, can_fetch_columns

_POOL = 16  # batches that are drawn together where examples differ in length: like lengths then share a batch
_SHOWN = 5
_CHECKED_ROWS = 32  # that are collated twice before anything is scored
_SEVERAL_LABELS = (
    "several labels an example (problem_type='multi_label_classification') aren't scored: train on one label an "
    "example, or compute the losses in a loop of your own and choose with select_examples"
)


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
        ValueError: Ids missing, doubled or of another type; rows that can't be scored one by one, or that a collator
            or transform makes another way each time; several labels an example; a loss that isn't finite, or isn't the
            model's own; an `output_dir` that holds what was made with other settings.
    """
    index = IdIndex(check_dataset(dataset, "dataset", ids=True))
    for name, value in (("len(dataset)", len(dataset)), ("batch_size", batch_size), ("save_every", save_every)):
        if value < 1:
            raise ValueError(f"{name}={value}: it must be at least 1")
    scoring = Scoring(
        data_collator or default_collator(processing_class),
        processing_class,
        batch_size,
        task,
        granularity,
        label_smoothing,
        precision,
        fingerprint_columns,
        remove_unused_columns,
        num_workers,
    )
    settings = {**scoring.settings(model, dataset), **_model_settings(model)}
    done = finished_table(output_dir, settings)
    if done is not None:
        return done
    scoring.check(model, dataset)
    folder = work_folder(output_dir)
    shards = Shards(folder, settings, scoring.features, len(dataset), save_every)
    _fill_shards(shards, model, dataset, scoring, index)
    return finish_table(shards.merge, settings, folder, output_dir)


@dataclass(frozen=True)
class Scoring:
    """How a table's losses are computed, whichever model gives them: arguments of `compute_irreducible_losses`."""

    data_collator: Callable[[list[Any]], Any]
    processing_class: Any
    batch_size: int
    task: Task | None
    granularity: Granularity
    label_smoothing: float
    precision: Precision | None
    fingerprint_columns: Sequence[str] | None
    remove_unused_columns: bool
    num_workers: int

    def settings(self, model: nn.Module, dataset: Dataset) -> dict[str, Any]:
        """What a table is compared by before it is used, and how its losses were computed, but for the weights.

        Raises:
            ValueError: If the task isn't clear.
        """
        named = dataset.column_names if self.fingerprint_columns is None else self.fingerprint_columns
        columns = sorted(set(named) - {ID_COLUMN})
        return {
            "kind": KIND,
            "data_fingerprint": data_fingerprint(dataset, columns),
            "fingerprint_columns": columns,
            "rows": len(dataset),
            "tokenizer": tokenizer_fingerprint(self.processing_class),
            "task": self._task(model),
            "granularity": self.granularity,
            "label_smoothing": self.label_smoothing,
            "precision": self.precision,
        }

    @property
    def features(self) -> Features:
        """The table's columns."""
        value = Value("float32")
        losses = List(value) if self.granularity == "token" else value
        return Features({ID_COLUMN: Value("int64"), LOSS_COLUMN: losses})

    @property
    def scorer(self) -> Scorer:
        """What computes the losses; without a task it compares them with the model's own loss."""
        return Scorer(
            task=self.task,
            granularity=self.granularity,
            label_smoothing=self.label_smoothing,
            precision=self.precision,
            batch_size=self.batch_size,
        )

    def source(self, model: nn.Module, dataset: Dataset) -> tuple[Any, ExtraColumnsCollator]:
        """What a loader draws, `example_id` and what the model takes, and what makes batches of it."""
        kept = _model_columns(model, dataset) if self.remove_unused_columns else dataset
        rows = ColumnRows(kept) if can_fetch_columns(kept, self.data_collator) else kept
        return rows, ExtraColumnsCollator(self.data_collator, (ID_COLUMN,))

    def check(self, model: nn.Module, dataset: Dataset) -> None:
        """Looks at a few rows before any work.

        Raises:
            ValueError: If they can't be scored one by one, have several labels each, or get others each time; if the
                model's own loss is another one.
        """
        rows, collate = self.source(model, dataset)
        first = list(range(min(_CHECKED_ROWS, len(dataset))))
        check_same_twice(lambda: collate(rows.__getitems__(first)), self.data_collator)
        batch = dict(collate(rows.__getitems__(first)))
        del batch[ID_COLUMN]
        check_rows(batch, len(first))
        labels = batch.get("labels")
        if self._task(model) == "classification" and isinstance(labels, torch.Tensor) and labels[0].numel() > 1:
            raise ValueError(f"labels of shape {list(labels.shape)}: {_SEVERAL_LABELS}")
        self.scorer(model, take_rows(batch, slice(0, 8)))  # refuses what it can't score

    def _task(self, model: nn.Module) -> Task:
        config = getattr(base_model(model), "config", None)
        if self.task is None and getattr(config, "problem_type", None) == "multi_label_classification":
            raise ValueError(f"task=None: {_SEVERAL_LABELS}")
        return self.task or infer_task(model)


def default_collator(processing_class: Any) -> Callable[[list[Any]], Any]:
    """The Trainer's default data collator."""
    if isinstance(processing_class, PreTrainedTokenizerBase):
        return DataCollatorWithPadding(processing_class)
    return default_data_collator


def _model_settings(model: nn.Module) -> dict[str, str]:
    base = base_model(model)
    name = getattr(getattr(base, "config", None), "name_or_path", "") or type(base).__name__
    return {"model_name": source_name(name), "model_weights": weights_fingerprint(model)}


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


def _fill_shards(shards: Shards, model: nn.Module, dataset: Dataset, scoring: Scoring, index: IdIndex) -> None:
    """Computes the shards that are missing; of several processes each takes every n-th.

    Raises:
        ValueError: For a loss that isn't finite; it names the examples. What was written stays.
    """
    rows, collate = scoring.source(model, dataset)
    scorer = scoring.scorer
    rank, world = process_rank()
    missing = shards.missing()
    wait_for_all()  # until every process has seen the same shards missing
    mine = missing[rank::world]
    todo = sum(stop - start for start, stop in map(shards.bounds, mine))
    draw = _draw_size(shards, rows, collate, index, scoring.batch_size)
    plan = [(shard, at) for shard in mine for at in range(*shards.bounds(shard), draw)]
    loader = DataLoader(
        rows,
        batch_sampler=_Draws(plan, shards, index, draw),  # type: ignore[arg-type]
        collate_fn=collate,
        num_workers=scoring.num_workers,
        generator=torch.Generator(),  # else it would draw from the one that training goes by
    )
    ids: list[np.ndarray] = []
    losses: list[pa.Array] = []
    whole = shards.total // world
    with tqdm(total=whole, initial=whole - todo, desc="Irreducible losses", unit=" rows", disable=rank > 0) as bar:
        for (shard, at), batch in zip(plan, loader, strict=True):
            batch = dict(batch)
            ids.append(batch.pop(ID_COLUMN).numpy())
            check_rows(batch, len(ids[-1]))
            losses.append(_losses(scorer(model, batch), ids[-1]))
            bar.update(len(ids[-1]))
            if at + draw >= shards.bounds(shard)[1]:
                shards.write(shard, np.concatenate(ids), pa.concat_arrays(losses))
                ids, losses = [], []


class _Draws:
    """Row numbers of each draw of a plan, made as they are needed."""

    def __init__(self, plan: Sequence[tuple[int, int]], shards: Shards, index: IdIndex, draw: int):
        self.plan, self.shards, self.index, self.draw = plan, shards, index, draw

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[list[int]]:
        for shard, at in self.plan:
            stop = min(at + self.draw, self.shards.bounds(shard)[1])
            yield self.index.rows_by_id(at, stop).tolist()


def _draw_size(shards: Shards, rows: Any, collate: Callable[[Any], Any], index: IdIndex, batch_size: int) -> int:
    """A batch, or many where examples are padded: the scorer then puts those of like length together."""
    first = index.rows_by_id(0, min(batch_size, shards.total)).tolist()
    padded = "attention_mask" in collate(rows.__getitems__(first))
    return min(shards.rows, batch_size * _POOL if padded else batch_size)


def _losses(scores: Mapping[str, torch.Tensor], ids: np.ndarray) -> pa.Array:
    """One float32 an example, or a list of those of its valid tokens in their order."""
    losses = scores["loss"].float().cpu()
    finite = losses.isfinite().reshape(len(losses), -1).all(-1).numpy()
    if not finite.all():
        raise ValueError(
            f"the loss of {(~finite).sum()} examples isn't finite, of {ID_COLUMN} "
            f"{', '.join(map(str, ids[~finite][:_SHOWN].tolist()))} among them: look at these, at the model's "
            "weights, or leave precision=None if it is 'fp16'"
        )
    if "mask" not in scores:
        return pa.array(losses.numpy())
    mask = scores["mask"].cpu()
    borders = np.concatenate([[0], mask.sum(-1).cumsum(0).numpy()]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(borders), pa.array(losses[mask].numpy()))

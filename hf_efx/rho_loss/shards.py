"""Losses of a whole data set, written shard by shard, so that an interrupted run goes on where it stopped."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Features
from datasets.utils import tqdm
from torch import nn
from torch.utils.data import DataLoader

from hf_efx.core.data.tables import ID_COLUMN, IdIndex, write_arrow
from hf_efx.core.files import write_atomically
from hf_efx.core.scoring.scorer import Scorer
from hf_efx.rho_loss.loader import ColumnRows, ExtraColumnsCollator, can_fetch_columns

_POOL = 16  # batches that are drawn together where examples differ in length: like lengths then share a batch
_SHOWN = 5


class Shards:
    """The parts of a table that is being made, each of `rows` ids in ascending order and a file of its own.

    Args:
        folder: Where they lie, made if missing.
        settings: All that the losses depend on. Shards made with others are refused.
        features: The table's columns.
        total: Rows of the whole table.
        rows: Rows of a shard.

    Raises:
        ValueError: If the folder holds shards made with other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], features: Features, total: int, rows: int):
        self.folder, self.rows, self.total = folder, rows, total
        self.count = -(-total // rows)
        self._schema = features.arrow_schema
        check_kept_settings(folder, {**settings, "save_every": rows})

    def missing(self) -> list[int]:
        """Shards that aren't written yet."""
        return [shard for shard in range(self.count) if not self._path(shard).is_file()]

    def bounds(self, shard: int) -> tuple[int, int]:
        """The first of its places in ascending order of ids, and the place after its last."""
        return shard * self.rows, min((shard + 1) * self.rows, self.total)

    def write(self, shard: int, ids: np.ndarray, losses: pa.Array) -> None:
        """Writes a shard, whole or not at all."""
        write_arrow(
            self._path(shard), self._schema, [pa.Table.from_arrays([pa.array(ids), losses], self._schema.names)]
        )

    def merge(self, path: Path) -> Dataset:
        """Puts all shards into one file, one at a time in memory, and maps it."""
        shards = (pa.ipc.open_stream(pa.memory_map(str(self._path(i)))).read_all() for i in range(self.count))
        write_arrow(path, self._schema, shards)
        return Dataset.from_file(str(path))

    def _path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:06d}.arrow"


def check_kept_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Keeps the settings of what is begun in a folder, or compares them with those that are there.

    Raises:
        ValueError: If what is there was made with others.
    """
    kept, settings = folder / "settings.json", json.loads(json.dumps(settings))
    if not kept.is_file():
        write_atomically(kept, json.dumps(settings, indent=1) + "\n")
    elif changed := changes(json.loads(kept.read_bytes()), settings):
        raise ValueError(
            f"{folder} holds the beginning of what was made with other settings ({changed}): go on with those, or "
            "delete it to start anew"
        )


def changes(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Names settings that differ, with both values; empty if none does."""
    keys = sorted(key for key in {*there, *here} if there.get(key) != here.get(key))
    return ", ".join(f"{key}: {there.get(key)!r}, now {here.get(key)!r}" for key in keys)


def process_rank() -> tuple[int, int]:
    """This process' rank and the number of processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def wait_for_all() -> None:
    """Returns once every process got here."""
    if process_rank()[1] > 1:
        torch.distributed.barrier()


def fill_shards(
    shards: Shards,
    model: nn.Module,
    dataset: Dataset,
    scorer: Scorer,
    collator: Callable[[list[Any]], Any],
    index: IdIndex,
    num_workers: int,
) -> None:
    """Computes the shards that are missing; of several processes each takes every n-th.

    Args:
        shards: Where they go.
        model: Scores, where it is.
        dataset: `example_id` and what the model takes.
        scorer: Gives `loss` and `count`; its `batch_size` is a forward pass'.
        collator: Makes batches of what the data set gives.
        index: Of the data set.
        num_workers: Processes that load rows.

    Raises:
        ValueError: For a loss that isn't finite; it names the examples. What was written stays.
    """
    collate = ExtraColumnsCollator(collator, (ID_COLUMN,))
    rows: Any = ColumnRows(dataset) if can_fetch_columns(dataset, collate.collator) else dataset
    rank, world = process_rank()
    missing = shards.missing()
    wait_for_all()  # until every process has seen the same shards missing
    mine = missing[rank::world]
    todo = sum(stop - start for start, stop in map(shards.bounds, mine))
    draw = _draw_size(shards, rows, collate, index, scorer.batch_size or 1)
    plan = [(shard, at) for shard in mine for at in range(*shards.bounds(shard), draw)]
    loader = DataLoader(
        rows,
        batch_sampler=_Draws(plan, shards, index, draw),  # type: ignore[arg-type]
        collate_fn=collate,
        num_workers=num_workers,
        generator=torch.Generator(),  # else it would draw from the one that training goes by
    )
    ids: list[np.ndarray] = []
    losses: list[pa.Array] = []
    whole = shards.total // world
    with tqdm(total=whole, initial=whole - todo, desc="Irreducible losses", unit=" rows", disable=rank > 0) as bar:
        for (shard, at), batch in zip(plan, loader, strict=True):
            batch = dict(batch)
            ids.append(batch.pop(ID_COLUMN).numpy())
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

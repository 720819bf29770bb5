"""Examples by id: giving a data set ids, and finding rows by id.

Ids, not positions: they survive shuffling, filtering, other machines and several processes.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset

ID_COLUMN = "example_id"

Ids = Sequence[int] | np.ndarray | torch.Tensor

_IN_ONE_PIECE = 32 * 2**20  # bytes: a column up to this size is copied into one piece, whose lookups are fastest
_SHOWN = 5  # ids that an error names


def add_example_ids(dataset: Dataset) -> Dataset:
    """Gives each row its place as an int64 id, in the column `example_id`.

    Do this first, before any map, filter or shuffle: from then on the ids go where the rows go.

    Args:
        dataset: A data set. One that has ids already is returned as it is.

    Raises:
        ValueError: If it is a stream, or its column `example_id` is no int64 or holds an id twice or none.
    """
    check_dataset(dataset, "dataset")
    if ID_COLUMN in dataset.column_names:
        IdIndex(dataset)
        return dataset
    return dataset.add_column(ID_COLUMN, np.arange(len(dataset), dtype=np.int64))  # type: ignore[call-arg]


def check_dataset(dataset: Any, name: str, ids: bool = False) -> Dataset:
    """Returns a data set that has rows and, where wanted, ids; raises ValueError, naming the argument, for others."""
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"{name} is a {type(dataset).__name__}, but examples are found by id, which needs a datasets.Dataset: "
            "load one split without streaming=True, or make one with Dataset.from_generator or Dataset.from_dict"
        )
    if ids and ID_COLUMN not in dataset.column_names:
        raise ValueError(
            f"{name} has no column {ID_COLUMN!r}, only {', '.join(dataset.column_names)}: call "
            "add_example_ids(dataset) before any map, filter or shuffle"
        )
    return dataset


class MappedColumn:
    """A column of numbers, read where it lies: pages of a memory-mapped table are touched only as they are needed.

    Args:
        column: Numbers without nulls. Up to 32 MiB are copied into one piece, which is looked up fastest.

    Attributes:
        chunks: The column's pieces, each a numpy array.
    """

    def __init__(self, column: pa.ChunkedArray):
        if column.null_count:
            raise ValueError(f"a column of type {column.type} holds {column.null_count} nulls")
        self.chunks = [chunk.to_numpy() for chunk in column.chunks if len(chunk)]
        if column.nbytes <= _IN_ONE_PIECE:
            self.chunks = [np.concatenate(self.chunks)] if self.chunks else []
        self.starts = np.cumsum([0, *map(len, self.chunks)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The values of some rows, in their order."""
        if len(self.chunks) == 1:
            return self.chunks[0][rows]
        values = np.empty(len(rows), self.chunks[0].dtype if self.chunks else np.float32)
        for chunk, places in _by_chunk(self.starts[1:-1], rows):
            values[places] = self.chunks[chunk][rows[places] - self.starts[chunk]]
        return values


class IdIndex:
    """Finds rows by example id.

    Sorted ids, as tables have them, stay where they are, memory-mapped; of others a sorted copy is made (12 bytes a
    row).

    Args:
        ids: A data set with a column `example_id`, or such a column.

    Attributes:
        sorted: Whether the ids stand in ascending order.

    Raises:
        ValueError: If the ids are no int64, one is missing (null) or there twice; it names them.
    """

    def __init__(self, ids: Dataset | pa.ChunkedArray | pa.Array | np.ndarray):
        column = _id_column(ids)
        if column.type != pa.int64():
            raise ValueError(
                f"the ids in column {ID_COLUMN!r} are {column.type}, not int64: make them with add_example_ids, or "
                f"cast_column({ID_COLUMN!r}, Value('int64'))"
            )
        if column.null_count:
            raise ValueError(f"column {ID_COLUMN!r} holds {column.null_count} nulls: every example needs an id")
        self._ids = MappedColumn(column)
        self._order: np.ndarray | None = None
        del column
        ordered = [bool((chunk[1:] > chunk[:-1]).all()) for chunk in self._ids.chunks]
        firsts, lasts = ([chunk[place] for chunk in self._ids.chunks] for place in (0, -1))
        self.sorted = all(ordered) and all(a < b for a, b in zip(lasts, firsts[1:], strict=False))
        if not self.sorted:
            chunks = self._ids.chunks
            copy = chunks[0] if len(chunks) == 1 else np.concatenate(chunks)
            self._order = np.argsort(copy).astype(np.min_scalar_type(len(copy)))
            copy = copy[self._order]
            if (twice := copy[1:] == copy[:-1]).any():
                raise ValueError(f"ids stand twice in column {ID_COLUMN!r}: {_named(np.unique(copy[1:][twice]))}")
            self._ids = MappedColumn(pa.chunked_array([pa.array(copy)]))
        self._firsts = np.array([chunk[0] for chunk in self._ids.chunks], np.int64)

    def __len__(self) -> int:
        return len(self._ids)

    def rows(self, ids: Ids) -> np.ndarray:
        """The rows of some examples, int64, in their order.

        Raises:
            ValueError: If an id is no whole number or isn't there.
        """
        wanted = as_ids(ids)
        places, found = self._search(wanted)
        if not found.all():
            raise ValueError(
                f"{(~found).sum()} ids are not among the {len(self):,} examples: {_named(wanted[~found])}. The data "
                "set they come from is another one, or its ids were made anew after a filter or shuffle"
            )
        return places if self._order is None else self._order[places].astype(np.int64)

    def contains(self, ids: Ids) -> np.ndarray:
        """For each id whether it is there, as bool."""
        return self._search(as_ids(ids))[1]

    def sorted_ids(self, start: int, stop: int) -> np.ndarray:
        """The ids from the `start`-th smallest to before the `stop`-th, ascending."""
        return self._ids.take(np.arange(start, min(stop, len(self))))

    def place(self, smallest: int) -> int:
        """How many ids are smaller than this one."""
        if not len(self):
            return 0
        chunk = max(int(np.searchsorted(self._firsts, smallest, "right")) - 1, 0)
        return int(self._ids.starts[chunk] + np.searchsorted(self._ids.chunks[chunk], smallest))

    def rows_by_id(self, start: int, stop: int) -> np.ndarray:
        """The rows of `sorted_ids(start, stop)`."""
        stop = min(stop, len(self))
        return np.arange(start, stop) if self._order is None else self._order[start:stop].astype(np.int64)

    def _search(self, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places in ascending order and whether the id stands there. A binary search, so few pages are touched."""
        places, found = np.zeros(len(wanted), np.int64), np.zeros(len(wanted), bool)
        for chunk, asked in _by_chunk(self._firsts[1:], wanted):
            if not len(self):
                break
            values = self._ids.chunks[chunk]
            inside = np.minimum(np.searchsorted(values, wanted[asked]), len(values) - 1)
            places[asked] = self._ids.starts[chunk] + inside
            found[asked] = values[inside] == wanted[asked]
        return places, found


def as_ids(ids: Ids) -> np.ndarray:
    """Ids as int64 [n]; raises ValueError for what holds no whole numbers."""
    array = ids.detach().cpu().numpy() if isinstance(ids, torch.Tensor) else np.asarray(ids)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"example ids must be whole numbers, but they are {array.dtype}")
    return array.astype(np.int64, copy=False).reshape(-1)


def _id_column(ids: Any) -> pa.ChunkedArray:
    if isinstance(ids, Dataset):
        check_dataset(ids, "the data set", ids=True)
        return table_column(ids, ID_COLUMN)
    if isinstance(ids, pa.ChunkedArray):
        return ids
    return pa.chunked_array([ids if isinstance(ids, pa.Array) else pa.array(np.asarray(ids))])


def table_column(dataset: Dataset, name: str) -> pa.ChunkedArray:
    """A column as Arrow: where it lies if the rows are the table's own, a copy if they were selected or shuffled."""
    if dataset._indices is None:
        return dataset.data.column(name)
    # In one piece: gathering from many chunks takes minutes and gigabytes at ten million rows.
    rows = dataset._indices.column(0).combine_chunks()
    return pa.chunked_array([dataset.data.column(name).combine_chunks().take(rows)])


def _by_chunk(borders: np.ndarray, values: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Chunk after chunk with the places of the values that belong to it; `borders`: where chunks 1, 2, ... begin.

    Ascending by value within a chunk: neighbouring look-ups share pages and caches.
    """
    if not len(values):
        return
    order = np.argsort(values)
    where = np.searchsorted(borders, values[order], "right")
    chunks, starts = np.unique(where, return_index=True)
    for chunk, start, stop in zip(chunks.tolist(), starts, np.append(starts, len(order))[1:], strict=True):
        yield chunk, order[start:stop]


def _named(ids: np.ndarray) -> str:
    more = f" and {len(ids) - _SHOWN:,} more" if len(ids) > _SHOWN else ""
    return ", ".join(map(str, ids[:_SHOWN].tolist())) + more

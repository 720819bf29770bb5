"""The Arrow form of a selection sequence, one row a step, and the writer that lays it down while a proxy trains."""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset, concatenate_datasets

from hf_efx.core.data.tables import write_arrow
from hf_efx.core.files import write_atomically

logger = logging.getLogger(__name__)

COLUMNS = ("step", "example_ids", "scores")
SCHEMA = pa.schema([("step", pa.int64()), ("example_ids", pa.list_(pa.int64())), ("scores", pa.list_(pa.float32()))])

_SETTINGS = "settings.json"
_SHARD = re.compile(r"steps-(\d+)-(\d+)\.arrow")
_FLUSH_AFTER = 1 << 20  # examples kept in memory at most, 12 MB
_READ_AT_ONCE = 4096  # steps


class Steps(NamedTuple):
    """Some steps in a row: `example_ids[offsets[i] : offsets[i + 1]]` are those of `step[i]`, in the order trained.

    Attributes:
        step: int64 [n], optimizer steps from 0.
        offsets: int64 [n + 1].
        example_ids: int64 [offsets[-1]].
        scores: float32 [offsets[-1]].
    """

    step: np.ndarray
    offsets: np.ndarray
    example_ids: np.ndarray
    scores: np.ndarray


def iterate_steps(dataset: Dataset, first: int = 0) -> Iterator[Steps]:
    """Reads the rows of a sequence from `first` on, a few thousand at a time.

    Raises:
        ValueError: If a row's ids and scores aren't as many, or either is empty.
    """
    table = dataset.with_format("arrow")
    for start in range(first, len(dataset), _READ_AT_ONCE):
        part: Any = table[start : start + _READ_AT_ONCE]
        ids, scores = (_one_array(part.column(name)) for name in COLUMNS[1:])
        lengths = ids.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        if not lengths.all() or not scores.value_lengths().equals(ids.value_lengths()):
            raise ValueError(
                f"a step from {start} on has no example_ids, or another number of scores than of example_ids: each "
                f"row of a selection sequence holds one score for each id."
            )
        yield Steps(
            part.column("step").to_numpy(),
            np.concatenate([[0], np.cumsum(lengths)]),
            ids.flatten().to_numpy(zero_copy_only=False),
            scores.flatten().to_numpy(zero_copy_only=False),
        )


def describe_content(dataset: Dataset) -> dict[str, Any]:
    """Counts and hashes a sequence's steps, whatever files they lie in.

    Returns:
        `steps`, `examples` (over all steps), `examples_per_step` (of the largest step), `fewest_examples` (of the
        smallest), `digest` (64 hexadecimal digits over steps, ids and scores).

    Raises:
        ValueError: If there is no step, a row isn't in the sequence's form, or the steps aren't 0, 1, 2, ...
    """
    digests = [hashlib.sha256() for _ in range(4)]
    count, examples, largest, smallest = 0, 0, 0, 1 << 62
    for steps in iterate_steps(dataset):
        if not np.array_equal(steps.step, np.arange(count, count + len(steps.step))):
            raise ValueError(
                f"the rows from {count} on aren't the steps {count}, {count + 1}, ...: one is missing or moved."
            )
        lengths = np.diff(steps.offsets)
        parts = (steps.step, lengths, steps.example_ids, steps.scores)
        for digest, values, kind in zip(digests, parts, ("<i8", "<i8", "<i8", "<f4"), strict=True):
            digest.update(np.ascontiguousarray(values, kind).data)
        count, examples = count + len(lengths), examples + len(steps.example_ids)
        largest, smallest = max(largest, int(lengths.max())), min(smallest, int(lengths.min()))
    if not count:
        raise ValueError("it has no steps.")
    return {
        "steps": count,
        "examples": examples,
        "examples_per_step": largest,
        "fewest_examples": smallest,
        "digest": hashlib.sha256(b"".join(digest.digest() for digest in digests)).hexdigest(),
    }


def steps_table(first: int, ids: Sequence[np.ndarray], scores: Sequence[np.ndarray]) -> pa.Table:
    """Puts the ids and scores of steps `first`, `first + 1`, ... into an Arrow table of the sequence's form."""
    offsets = pa.array(np.concatenate([[0], np.cumsum([len(each) for each in ids])]), pa.int32())
    lists = [
        pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(values).astype(kind)))
        for values, kind in ((ids, np.int64), (scores, np.float32))
    ]
    return pa.table([pa.array(np.arange(first, first + len(ids))), *lists], schema=SCHEMA)


class SequenceRecorder:
    """Writes steps to disk as they are selected, in shards that are whole or not there.

    Args:
        folder: Where the shards lie.
        steps: Steps that lie there already.

    Attributes:
        folder: Where the shards lie.
        steps: Steps recorded so far, those in memory included.
    """

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps = folder, steps
        self._ids: list[np.ndarray] = []
        self._scores: list[np.ndarray] = []
        self._held = 0

    @classmethod
    def begin(cls, folder: str | os.PathLike[str], settings: dict[str, Any]) -> "SequenceRecorder":
        """Starts a recording anew; one that lies in the folder is replaced.

        Args:
            folder: Where to write.
            settings: What is known of the run at its start; a resumed run reads it with `settings`.
        """
        folder = Path(folder)
        earlier = _shards(folder)
        if earlier:
            logger.warning("Replacing the recording of an earlier run in %s.", folder)
        for _, _, path in earlier:
            path.unlink()
        write_atomically(folder / _SETTINGS, json.dumps(settings, indent=1))
        return cls(folder, 0)

    @classmethod
    def resume(cls, folder: str | os.PathLike[str], step: int) -> "SequenceRecorder":
        """Goes on with a recording from a checkpoint on: what was recorded after it is cut off.

        Args:
            folder: Where the recording lies.
            step: The checkpoint's step, so many steps are kept.

        Raises:
            ValueError: If the recording is missing or ends before the checkpoint.
        """
        folder = Path(folder)
        kept = 0
        # Two shards of one beginning: a cut was killed before the longer one was deleted, so the shorter one counts.
        for first, last, path in _shards(folder):
            if first != kept:
                continue
            if last < step:
                kept = last + 1
            elif first < step:
                whole = Dataset.from_file(str(path)).with_format("arrow")
                _write_shard(folder, first, whole[: step - first])  # pyright: ignore[reportArgumentType]
                kept = step
        if kept != step or not (folder / _SETTINGS).is_file():
            raise ValueError(
                f"the recording in {str(folder)!r} has {kept} whole steps, the checkpoint {step}: a selection can be "
                f"resumed only where its recording lies. Move it there (output_dir), name an earlier checkpoint, or "
                f"start anew."
            )
        end = 0
        for first, last, path in _shards(folder):
            if first == end and last < step:
                end = last + 1
            else:
                path.unlink()
        return cls(folder, step)

    @property
    def settings(self) -> dict[str, Any]:
        """What `begin` was given."""
        return json.loads((self.folder / _SETTINGS).read_text(encoding="utf-8"))

    def add(self, step: int, example_ids: np.ndarray, scores: np.ndarray) -> None:
        """Records a step.

        Args:
            step: Optimizer steps before this one.
            example_ids: int64 [n], in the order trained.
            scores: float32 [n].

        Raises:
            ValueError: If it isn't the next step, or its ids and scores aren't as many.
        """
        if step != self.steps or len(example_ids) != len(scores) or not len(example_ids):
            raise ValueError(
                f"step {step} with {len(example_ids)} ids and {len(scores)} scores can't follow the {self.steps} "
                f"steps recorded: each step is recorded once, in order, with one score for each of its ids."
            )
        self._ids.append(np.asarray(example_ids))
        self._scores.append(np.asarray(scores))
        self.steps += 1
        self._held += len(example_ids)
        if self._held >= _FLUSH_AFTER:
            self.flush()

    def flush(self) -> None:
        """Writes what is in memory: before each checkpoint, so that a checkpoint never lies ahead of the recording."""
        if self._ids:
            first = self.steps - len(self._ids)
            _write_shard(self.folder, first, steps_table(first, self._ids, self._scores))
            self._ids, self._scores, self._held = [], [], 0

    def finish(self) -> Dataset:
        """Writes the rest and gives the whole recording, memory-mapped."""
        self.flush()
        return concatenate_datasets([Dataset.from_file(str(path)) for _, _, path in _shards(self.folder)])


def _one_array(column: pa.ChunkedArray) -> Any:
    array = column.combine_chunks()
    return pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array


def _shards(folder: Path) -> list[tuple[int, int, Path]]:
    """First step, last step and path of each shard, in order, a shorter one first."""
    found = [(_SHARD.fullmatch(path.name), path) for path in folder.glob("steps-*.arrow")]
    return sorted((int(match[1]), int(match[2]), path) for match, path in found if match)


def _write_shard(folder: Path, first: int, table: pa.Table) -> None:
    path = folder / f"steps-{first:09d}-{first + len(table) - 1:09d}.arrow"
    write_arrow(path, SCHEMA, [table])

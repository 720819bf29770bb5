"""A table of irreducible losses: looking losses up by id, checking what it is for, making it in parts, sharing it."""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Features
from huggingface_hub import CommitInfo

from hf_efx.core.data.tables import (
    ID_COLUMN,
    IdIndex,
    Ids,
    MappedColumn,
    TableCard,
    as_ids,
    check_dataset,
    data_fingerprint,
    histogram,
    load_table,
    plot_histogram,
    push_table,
    save_table,
    settings_of,
    table_column,
    tokenizer_fingerprint,
    with_settings,
    write_arrow,
)
from hf_efx.core.files import write_atomically
from hf_efx.core.scoring.losses import Task
from hf_efx.registry import METHODS
from hf_efx.rho_loss.exchange import process_rank, wait_for_all

logger = logging.getLogger(__name__)

KIND = "irreducible_losses"
LOSS_COLUMN = "irreducible_loss"

Granularity = Literal["example", "token"]

_TEMPORARY: list[tempfile.TemporaryDirectory] = []  # tables without an output_dir, until the process ends
_IDS_AT_ONCE = 100_000  # that are compared with a data set's


class IrreducibleLosses:
    """Looks losses up by example id, in a table that stays memory-mapped.

    Args:
        table: Of `compute_irreducible_losses`, `cross_fit_irreducible_losses` or `load_irreducible_losses`.
            Losses of your own become such a table by `with_settings(Dataset.from_dict(...), settings)`.

    Attributes:
        table: The table.
        settings: Its settings.
        granularity: `"example"` or `"token"`.

    Raises:
        ValueError: If it is no such table, was truncated or extended, an id is missing, doubled or of another type,
            or a loss isn't finite.
    """

    def __init__(self, table: Dataset):
        self.table = check_dataset(table, "irreducible_losses")
        self.settings = settings_of(table, KIND)
        self.granularity: Granularity = self.settings["granularity"]
        if missing := {ID_COLUMN, LOSS_COLUMN} - set(table.column_names):
            raise ValueError(f"irreducible_losses lacks the column {missing.pop()!r}; it has {table.column_names}")
        self.index = IdIndex(table)
        self._lists = table.select_columns(LOSS_COLUMN).with_format("arrow")
        self._losses = None
        if self.granularity == "example":
            self._losses = MappedColumn(table_column(table, LOSS_COLUMN))
            for chunk, start in zip(self._losses.chunks, self._losses.starts.tolist(), strict=False):
                self._check_finite(chunk, np.arange(start, start + len(chunk)))

    def __len__(self) -> int:
        return len(self.table)

    def lookup(self, ids: Ids, mask: torch.Tensor | None = None) -> torch.Tensor:
        """The losses of some examples.

        Args:
            ids: [n] example ids.
            mask: [n, seq] bool, for a table by token: where an example has a target (`Scorer`'s `mask`).

        Returns:
            float32 [n] on the CPU; by token [n, seq] on the mask's device, 0 where there is no target.

        Raises:
            ValueError: An unknown id; by token no mask, one with more or fewer targets than the table has, or a loss
                that isn't finite.
        """
        rows = self.index.rows(ids)
        if self._losses is not None:
            return torch.from_numpy(self._losses.take(rows).astype(np.float32))
        if mask is None:
            raise ValueError("mask=None: a table of granularity='token' needs to know where the targets are")
        lists: Any = self._lists[rows.tolist()].column(LOSS_COLUMN)  # type: ignore[union-attr]
        lengths = np.array([len(value) for value in lists])
        if (wrong := lengths != mask.sum(-1).cpu().numpy()).any():
            first = int(wrong.argmax())
            raise ValueError(
                f"example {as_ids(ids)[first]} has {int(mask[first].sum())} targets here and {lengths[first]} in the "
                "table of irreducible losses: use the tokenizer, maximal length and labels that it was made with"
            )
        values = np.concatenate([chunk.flatten().to_numpy() for chunk in lists.chunks])
        self._check_finite(values, np.repeat(rows, lengths))
        losses = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
        losses[mask.bool()] = torch.from_numpy(values.astype(np.float32)).to(mask.device)
        return losses

    def check(
        self,
        dataset: Dataset,
        *,
        task: Task | None = None,
        granularity: Granularity | None = None,
        label_smoothing: float | None = None,
        tokenizer: Any = None,
    ) -> None:
        """Compares a run with the one that the table was made for. What is None isn't compared.

        Args:
            dataset: What is trained on.
            task: Which loss it is.
            granularity: Of the selection.
            label_smoothing: Of the loss.
            tokenizer: The tokenizer or processor.

        Raises:
            ValueError: If one of them is another; it names both.
        """
        check_dataset(dataset, "train_dataset", ids=True)
        here = {
            "task": task,
            "granularity": granularity,
            "label_smoothing": label_smoothing,
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "rows": len(dataset),
        }
        there = {name: self.settings[name] for name in here}
        for name, value in here.items():
            if value is not None and there[name] is not None and value != there[name]:
                raise ValueError(
                    f"the table of irreducible losses was made with {name}={there[name]!r}, but here it is {value!r}: "
                    "train with that, or compute a table for this run (compute_irreducible_losses)"
                )
        own = IdIndex(dataset)
        for start in range(0, len(own), _IDS_AT_ONCE):
            self.index.rows(own.sorted_ids(start, start + _IDS_AT_ONCE))
        fingerprint = data_fingerprint(dataset, self.settings["fingerprint_columns"])
        if fingerprint != self.settings["data_fingerprint"]:
            raise ValueError(
                "the table of irreducible losses was made for another data set: the fingerprint over "
                f"{', '.join([ID_COLUMN, *self.settings['fingerprint_columns']])} is "
                f"{self.settings['data_fingerprint']}, that of train_dataset {fingerprint}. Train on that data, or "
                "compute a table for this; fingerprint_columns chooses what is compared"
            )

    def _check_finite(self, values: np.ndarray, rows: np.ndarray) -> None:
        finite = np.isfinite(values)
        if not finite.all():
            row = int(rows[(~finite).argmax()])
            raise ValueError(
                f"{(~finite).sum()} irreducible losses aren't finite, that of {ID_COLUMN} "
                f"{self.table[row][ID_COLUMN]} (row {row}) among them: compute the table anew"
            )


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


def save_irreducible_losses(table: Dataset, folder: str | os.PathLike[str]) -> Path:
    """Saves a table with its card: see `save_table`."""
    return save_table(table, folder, *_card(table))


def load_irreducible_losses(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
) -> Dataset:
    """Maps a table from a folder or fetches it from the Hub: see `load_table`."""
    return load_table(source, KIND, revision=revision, token=token, cache_dir=cache_dir)


def push_irreducible_losses(table: Dataset, repo_id: str, **options: Any) -> CommitInfo:
    """Sends a table to the Hub.

    Args:
        table: The table.
        repo_id: The repository.
        **options: private, token, revision and commit_message, as in `push_table`.
    """
    return push_table(table, repo_id, *_card(table), **options)


def _card(table: Dataset) -> tuple[TableCard, Callable[[Path], None]]:
    settings = settings_of(table, KIND)
    figures = histogram(table, LOSS_COLUMN)
    by_token = settings["granularity"] == "token"
    unit = "squared error" if settings["task"] == "regression" else "nats"
    meaning = f"its loss ({unit}) under a model that wasn't trained on it"
    if by_token:
        meaning = f"the losses ({unit}) of its valid tokens, in their order, under such a model"
    columns = {ID_COLUMN: "the example", LOSS_COLUMN: meaning, "fold": "the fold whose model scored it"}
    card = TableCard(
        title="Irreducible losses",
        description=(
            f"For each of {len(table):,} examples the loss of a model (`{settings['model_name']}`) that was trained "
            "on other data: the part of its loss that training can't remove. RHO-LOSS trains on the examples whose "
            "loss exceeds it the most."
        ),
        columns=columns,
        usage=(
            "from hf_efx.rho_loss import RHOLossTrainer, load_irreducible_losses\n\n"
            'irreducible_losses = load_irreducible_losses("{source}")\n'
            "trainer = RHOLossTrainer(model, args, train_dataset=train_dataset, irreducible_losses=irreducible_losses)"
        ),
        figures={name: figures[name] for name in ("count", "mean", "std", "min", "max") if name in figures},
        caption=f"Histogram of the irreducible losses ({unit})",
        tags=["rho-loss", "data-selection"],
        citations=[METHODS["rho_loss"].citation],
    )
    return card, lambda path: plot_histogram(figures, path, f"irreducible loss ({unit})")

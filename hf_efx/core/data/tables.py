"""Tables of ours as data sets: a memory-mapped `datasets.Dataset` that carries settings, in a folder or on the Hub.

The settings say what the table was made from and stand as JSON in `dataset.info.description`: they go with it through
`save_to_disk` and `load_from_disk`, and through `select` or `sort`. A folder holds Arrow files, which are mapped as
they are; a repository on the Hub holds Parquet files, which the data set viewer shows, `settings.json` and a card. No
function here holds a table in memory.
"""

import copy
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, load_from_disk
from huggingface_hub import CommitInfo, HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from hf_efx.core.data.example_ids import (
    ID_COLUMN,
    IdIndex,
    Ids,
    MappedColumn,
    add_example_ids,
    as_ids,
    check_dataset,
    table_column,
)
from hf_efx.core.data.fingerprints import data_fingerprint, tokenizer_fingerprint, weights_fingerprint
from hf_efx.core.data.table_card import CARD_FILE, PLOT_FILE, TableCard, histogram, plot_histogram, write_table_card
from hf_efx.core.files import replace_folder, staging_folder, whole_file, write_atomically

__all__ = [  # with what example_ids.py and fingerprints.py have, whose users are the same
    "FORMAT_VERSION",
    "ID_COLUMN",
    "IdIndex",
    "Ids",
    "MappedColumn",
    "TableCard",
    "add_example_ids",
    "as_ids",
    "check_dataset",
    "check_settings",
    "data_fingerprint",
    "histogram",
    "load_table",
    "plot_histogram",
    "push_table",
    "save_table",
    "settings_of",
    "table_column",
    "tokenizer_fingerprint",
    "weights_fingerprint",
    "with_settings",
    "write_arrow",
]

FORMAT_VERSION = 1
SETTINGS_FILE = "settings.json"
_BATCH_ROWS, _BATCH_BYTES = 1_000_000, 32 * 2**20  # of a record batch
_SHARD_BYTES = 500 * 2**20  # of a Parquet file, as in datasets


def with_settings(dataset: Dataset, settings: Mapping[str, Any]) -> Dataset:
    """A copy of the table (sharing its memory) that carries settings.

    Args:
        dataset: The table.
        settings: JSON's own types. `kind` says what kind of table it is; `format_version` and `table_rows`, by which
            a truncated table is known, are set here.

    Raises:
        ValueError: If `kind` is missing or the settings are no JSON.
    """
    if not isinstance(settings.get("kind"), str):
        raise ValueError(f"settings need a 'kind', the sort of table that it is, but have {sorted(settings)}")
    settings = {**settings, "format_version": FORMAT_VERSION, "table_rows": len(dataset)}
    try:
        text = json.dumps(settings, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"settings of kind={settings['kind']!r} are no JSON: {error}") from error
    dataset = copy.deepcopy(dataset)
    dataset.info.description = text
    return dataset


def settings_of(dataset: Dataset, kind: str | None = None) -> dict[str, Any]:
    """The settings that a table carries.

    Args:
        dataset: The table.
        kind: The kind that is wanted; None for any.

    Raises:
        ValueError: If it carries none, is of another kind, of a newer format, or has other than its first rows.
    """
    try:
        settings = json.loads(dataset.info.description)
    except json.JSONDecodeError:
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(
            f"the data set with columns {', '.join(dataset.column_names)} carries no settings, so it is no table of "
            f"ours{f' of kind {kind!r}' if kind else ''}: read one with the function that loads that kind, not with "
            "load_dataset, and don't rebuild it with from_dict"
        )
    check_settings(settings, kind, "the table")
    if len(dataset) != settings["table_rows"]:
        raise ValueError(
            f"the table of kind={settings['kind']!r} has {len(dataset):,} rows but was made with "
            f"{settings['table_rows']:,}: it is truncated or extended. Use the whole one, or make it anew"
        )
    return settings


def check_settings(settings: Mapping[str, Any], kind: str | None, source: str) -> None:
    """Raises ValueError, naming the source, where settings are of another kind or of a format that is unknown here."""
    found, version = settings.get("kind"), settings.get("format_version")
    if kind is not None and found != kind:
        raise ValueError(f"{source} is of kind={found!r}, but kind={kind!r} is needed: give a table of that kind")
    if not isinstance(version, int) or version > FORMAT_VERSION or "table_rows" not in settings:
        raise ValueError(
            f"{source} has format_version={version!r}; this hf_efx reads up to {FORMAT_VERSION}: install a newer one, "
            "or make the table anew"
        )


def save_table(
    dataset: Dataset,
    folder: str | os.PathLike[str],
    card: TableCard,
    plot: Callable[[Path], object] | None = None,
) -> Path:
    """Writes a table as Arrow, with a card, whole or not at all.

    `load_table` and `datasets.load_from_disk` map it from there.

    Args:
        dataset: A table that carries settings.
        folder: A new or empty folder, or one that holds a table of the same kind, which is replaced.
        card: What the card says.
        plot: Writes a picture to the path that it is given. Without matplotlib (extra `plot`) the table is saved
            without the picture, which is logged.

    Raises:
        ValueError: If the table carries no settings or the folder holds something else.
    """
    settings = settings_of(dataset)
    folder = Path(folder)
    _refuse_foreign(folder, settings["kind"])
    with staging_folder(folder.parent) as staging:
        dataset.save_to_disk(staging)
        for file in staging.glob("*.arrow"):
            rows = pa.ipc.open_stream(pa.memory_map(str(file)))
            write_arrow(file, rows.schema, _large_batches(rows))
        write_table_card(staging, dataset, settings, card, plot, source=folder.name, hub=False)
        replace_folder(staging, folder)
    return folder


def push_table(
    dataset: Dataset,
    repo_id: str,
    card: TableCard,
    plot: Callable[[Path], object] | None = None,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> CommitInfo:
    """Sends a table to the Hub as a data set, in one commit: Parquet for the viewer, settings, card and picture.

    Args:
        dataset: A table that carries settings.
        repo_id: The repository, made if missing. A table of the same kind there is replaced.
        card: What the card says.
        plot: As in `save_table`.
        private: Whether a new repository is private; None for the organisation's default.
        token: As in huggingface_hub.
        revision: The branch; None for main.
        commit_message: None names the kind.

    Returns:
        The commit; its `oid` is the revision that others should name to get exactly this table.

    Raises:
        ValueError: If the table carries no settings, or the repository holds another data set.
    """
    settings = settings_of(dataset)
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True).repo_id
    there = set(api.list_repo_files(repo_id, repo_type="dataset", revision=revision)) - {".gitattributes", CARD_FILE}
    if there:
        if SETTINGS_FILE not in there:
            raise ValueError(f"repo_id={repo_id!r} holds another data set ({min(there)}): name another repository")
        check_settings(_hub_settings(api, repo_id, revision), settings["kind"], f"repo_id={repo_id!r}")
    with tempfile.TemporaryDirectory() as staging:
        folder = Path(staging)
        (folder / "data").mkdir()
        count = max(1, math.ceil(dataset.data.nbytes / _SHARD_BYTES))
        for i in range(count):
            part = dataset.shard(count, i, contiguous=True)
            part.to_parquet(folder / "data" / f"train-{i:05d}-of-{count:05d}.parquet", batch_size=_BATCH_ROWS)
        write_atomically(folder / SETTINGS_FILE, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
        write_table_card(folder, dataset, settings, card, plot, source=repo_id, hub=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            repo_type="dataset",
            revision=revision,
            commit_message=commit_message or f"Table of kind {settings['kind']}",
            delete_patterns=["data/*", PLOT_FILE],
        )


def write_arrow(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    """Writes tables into a file that `Dataset.from_file` maps, under a temporary name until it is whole.

    Each becomes one record batch: few large ones are looked up in the fastest.
    """
    with whole_file(path) as temporary, pa.ipc.new_stream(temporary, schema) as writer:
        for table in tables:
            writer.write_table(table.cast(schema).combine_chunks())


def _large_batches(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    held: list[pa.RecordBatch] = []
    rows = size = 0
    for batch in batches:
        held.append(batch)
        rows, size = rows + len(batch), size + batch.nbytes
        if rows >= _BATCH_ROWS or size >= _BATCH_BYTES:
            yield pa.Table.from_batches(held)
            held, rows, size = [], 0, 0
    if held:
        yield pa.Table.from_batches(held)


def load_table(
    source: str | os.PathLike[str],
    kind: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
) -> Dataset:
    """Maps a table from a folder, or fetches it from the Hub and maps it from the cache.

    Args:
        source: A folder that `save_table` or `Dataset.save_to_disk` wrote, a copy of a repository, or a repository.
        kind: The kind that is wanted.
        revision: Branch, tag or commit of the repository.
        token: As in huggingface_hub.
        cache_dir: Where `datasets` keeps the Arrow files of a repository's table; None for its default.

    Raises:
        FileNotFoundError: If there is no such folder or repository.
        ValueError: If it holds no table, one of another kind or of a newer format, or can't be read.
    """
    name, folder = repr(os.fspath(source)), Path(source).expanduser()
    if not folder.is_dir():
        if str(source).startswith((".", "/", "~")):
            raise FileNotFoundError(f"source={name}: there is no such folder")
        folder = _fetch(os.fspath(source), revision, token)
    try:
        if (folder / "state.json").is_file():
            dataset = load_from_disk(folder)
        elif (folder / SETTINGS_FILE).is_file():
            settings = json.loads((folder / SETTINGS_FILE).read_bytes())
            check_settings(settings, kind, f"source={name}")
            files = sorted(map(str, (folder / "data").glob("*.parquet")))
            if not files:
                raise ValueError(f"source={name} has {SETTINGS_FILE} but no data/*.parquet: fetch all of its files")
            dataset = Dataset.from_parquet(files, cache_dir=cache_dir)  # type: ignore[arg-type]
            assert isinstance(dataset, Dataset)
            dataset.info.description = json.dumps(settings, ensure_ascii=False)
        else:
            raise ValueError(f"source={name} holds no table: there is neither state.json nor {SETTINGS_FILE} in it")
    except (pa.ArrowInvalid, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"source={name} can't be read ({error}): it is damaged, save or fetch it again") from error
    dataset = check_dataset(dataset, f"source={name}")
    settings_of(dataset, kind)
    return dataset


def _fetch(repo_id: str, revision: str | None, token: str | bool | None) -> Path:
    """The repository's files of one revision, in huggingface_hub's cache."""
    patterns = [SETTINGS_FILE, "data/*.parquet"]
    try:
        folder = snapshot_download(
            repo_id, repo_type="dataset", revision=revision, token=token, allow_patterns=patterns
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(f"source={repo_id!r} is no folder here, and the Hub says: {error}") from error
    return Path(folder)


def _hub_settings(api: HfApi, repo_id: str, revision: str | None) -> dict[str, Any]:
    path = api.hf_hub_download(repo_id, SETTINGS_FILE, repo_type="dataset", revision=revision)
    return json.loads(Path(path).read_bytes())


def _refuse_foreign(folder: Path, kind: str) -> None:
    """Raises ValueError unless the folder is new, empty, or holds a table of this kind."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    found = None
    if (folder / "dataset_info.json").is_file():
        try:
            found = json.loads(json.loads((folder / "dataset_info.json").read_bytes())["description"])["kind"]
        except (ValueError, KeyError, TypeError):
            found = None
    if found != kind:
        what = f"a table of kind={found!r}" if found else "something else"
        raise ValueError(f"folder={str(folder)!r} holds {what}, which isn't written over: name a new folder")

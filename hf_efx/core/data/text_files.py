"""Tables of text: files, folders of files and Hub data sets, as splits with their text columns under fixed names."""

import codecs
import csv
import gzip
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetGenerationError

from hf_efx.core.data.library_text import hash_place, split_of

logger = logging.getLogger(__name__)

_SPLIT_NAMES = {"training": "train", **dict.fromkeys(("valid", "val", "dev", "eval"), "validation")}
# "NA" and "null" are text; a byte-order mark, as spreadsheets write it, isn't.
_CSV: dict[str, Any] = {"keep_default_na": False, "encoding": "utf-8-sig"}
_LOADERS: dict[str, tuple[str, dict[str, Any]]] = {
    **dict.fromkeys((".txt", ".md", ".rst"), ("text", {})),
    **dict.fromkeys((".json", ".jsonl"), ("json", {})),
    ".csv": ("csv", _CSV),
    ".tsv": ("csv", {**_CSV, "delimiter": "\t", "quoting": csv.QUOTE_NONE}),  # a line is a row, whatever its quotes
    ".parquet": ("parquet", {}),
}


def load_splits(
    source: str | os.PathLike[str],
    columns: Mapping[str, str],
    sample_by: str = "document",
    cache_dir: str | None = None,
) -> dict[str, Dataset]:
    """Loads the splits that a source has, with its text columns under fixed names; rows that lack a text are dropped.

    Args:
        source: A file, a folder or a data set's name, as in `load_text`.
        columns: The text columns: the names they get, and where a table holds them; a dot reaches into nested ones.
        sample_by: As in `load_text`.
        cache_dir: As in `load_text`.

    Raises:
        FileNotFoundError: If the source isn't there.
        ValueError: If it can't be read, has no train split, or lacks a column of text.
    """
    parts = _own_splits(source, columns, sample_by, cache_dir)
    if "train" not in parts:
        raise ValueError(f"source={source!r} has no 'train' split, only {sorted(parts)}")
    return {name: _read_columns(part, columns, source, drop_empty=True) for name, part in parts.items()}


def load_rows(
    source: str | os.PathLike[str], columns: Mapping[str, str], split: str | None = None, cache_dir: str | None = None
) -> Dataset:
    """Loads all rows of a source, or those of a split, in their order, empty ones too.

    Args:
        source: As in `load_splits`; of plain text a line is a row.
        columns: As in `load_splits`; a column that isn't named is looked for under the fixed name, of plain text
            under "text".
        split: Which; None for all together.
        cache_dir: As in `load_text`.

    Raises:
        FileNotFoundError: If the source isn't there.
        ValueError: If it can't be read, lacks a column of text or the split.
    """
    source = os.fspath(source)
    plain = _LOADERS.get(_suffix(Path(source)), ("",))[0] == "text"
    columns = {"source": "text" if plain else "source", **columns}
    parts = _own_splits(source, columns, "line", cache_dir)
    if split is not None and split not in parts:
        raise ValueError(f"source={source!r} has no split {split!r}, only {', '.join(parts)}")
    chosen = list(parts.values()) if split is None else [parts[split]]
    return datasets.concatenate_datasets([_read_columns(part, columns, source, drop_empty=False) for part in chosen])


def _read_columns(
    part: Dataset, columns: Mapping[str, str], source: str | os.PathLike[str], drop_empty: bool
) -> Dataset:
    """`text_columns`, naming the byte where a file turns out not to be UTF-8: Arrow doesn't look at JSON's."""
    source = os.fspath(source)
    try:
        return text_columns(part, columns, source, drop_empty)
    except UnicodeDecodeError as error:
        reason = _no_utf8(_files(Path(source).expanduser())) or error
        raise ValueError(f"source={source!r} can't be read: {reason}") from error


def _own_splits(
    source: str | os.PathLike[str], columns: Mapping[str, str], sample_by: str, cache_dir: str | None
) -> dict[str, Dataset]:
    """The splits that a source has, by their usual names."""
    source = os.fspath(source)
    path = Path(source).expanduser()
    if path.exists():
        parts = _load_files(path, columns, sample_by, cache_dir)
    elif _suffix(path) in _LOADERS or source.startswith((".", "/", "~")):
        raise FileNotFoundError(f"source={source!r}: there is no such file or folder")
    else:
        parts = _load_from_hub(source, cache_dir)
    first = next(iter(parts.values()))
    if len(parts) == 1 and "split" in first.column_names:
        values = np.array([str(value).lower() for value in first["split"]], object)
        parts = {name: first.select(np.flatnonzero(values == name)) for name in np.unique(values)}
        parts = {name: part.remove_columns("split") for name, part in parts.items()}
    parts = {_SPLIT_NAMES.get(name, str(name)): part for name, part in parts.items()}
    return parts


def _suffix(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if _suffix(file) in _LOADERS)


def _load_files(path: Path, columns: Mapping[str, str], sample_by: str, cache_dir: str | None) -> dict[Any, Dataset]:
    """Reads a file, or a folder's files of one kind: a file named after a split makes that split, all others train."""
    files = _files(path)
    suffixes = {_suffix(file) for file in files}
    known = ", ".join(_LOADERS)
    if not files:
        raise FileNotFoundError(f"source={str(path)!r}: the folder holds none of {known}")
    if unknown := suffixes - set(_LOADERS):
        raise ValueError(f"source={str(path)!r}: unknown suffix {unknown.pop()!r}; known are {known}")
    kind, options = _LOADERS[min(suffixes)]
    if any(_LOADERS[suffix] != (kind, options) for suffix in suffixes):
        raise ValueError(f"source={str(path)!r} mixes {sorted(suffixes)}: name one file, or a folder of one kind")
    if kind == "text":
        options = {"sample_by": sample_by, "encoding": "utf-8-sig"}
    elif kind == "csv":
        options = {**options, "converters": dict.fromkeys(columns.values(), str)}  # "007" is text too
    names = {"train", "validation", "test", *_SPLIT_NAMES}
    data_files: dict[str, Any] = {}
    for file in files:
        stem = file.name.split(".")[0].lower()
        split = _SPLIT_NAMES.get(stem, stem) if path.is_dir() and stem in names else "train"
        data_files.setdefault(split, []).append(str(file))
    try:
        return dict(datasets.load_dataset(kind, data_files=data_files, cache_dir=cache_dir, **options))  # type: ignore[call-overload]
    except (DatasetGenerationError, StopIteration) as error:
        reason = _no_utf8(files if kind != "parquet" else ()) or error.__cause__ or "it is empty"
        raise ValueError(f"source={str(path)!r} can't be read as {kind}: {reason}") from error


def _no_utf8(files: Iterable[Path]) -> str | None:
    """Which of the files isn't UTF-8, and from which byte on."""
    for file in files:
        read, decoder = 0, codecs.getincrementaldecoder("utf-8")()
        with gzip.open(file) if file.suffix.lower() == ".gz" else open(file, "rb") as stream:
            for block in iter(lambda: stream.read(2**20), None):
                held = len(decoder.getstate()[0])
                try:
                    decoder.decode(block, final=not block)
                except UnicodeDecodeError as error:
                    byte, value = read - held + error.start, error.object[error.start]
                    return f"{file.name} isn't UTF-8 from byte {byte} on (0x{value:02x}): convert it"
                if not block:
                    break
                read += len(block)
    return None


def _load_from_hub(source: str, cache_dir: str | None) -> dict[Any, Dataset]:
    name, _, config = source.partition(":")
    try:
        return dict(datasets.load_dataset(name, config or None, cache_dir=cache_dir))
    except (ConnectionError, FileNotFoundError) as error:
        raise FileNotFoundError(f"source={source!r} is no file or folder here, and the Hub says: {error}") from error


def text_columns(dataset: Dataset, columns: Mapping[str, str], source: str, drop_empty: bool = True) -> Dataset:
    """Names the text columns and drops rows that lack a text in one of them, counted in the log.

    Args:
        dataset: A split.
        columns: As in `load_splits`.
        source: Its name, for errors.
        drop_empty: Whether to drop such rows.

    Raises:
        ValueError: If a column is missing or holds no text.
    """
    if any("." in column for column in columns.values()):
        dataset = dataset.flatten()
    for name, column in columns.items():
        argument = f"{name}_column"
        if column not in dataset.column_names:
            raise ValueError(
                f"source={source!r} has no column {argument}={column!r}; it has {', '.join(dataset.column_names)}"
            )
        feature = dataset.features[column]
        if getattr(feature, "dtype", "") not in ("string", "large_string"):
            raise ValueError(f"source={source!r}: column {argument}={column!r} holds {feature}, not text")
    kept = set(columns.values())
    dataset = dataset.remove_columns([name for name in columns if name in dataset.column_names and name not in kept])
    dataset = dataset.rename_columns({column: name for name, column in columns.items() if column != name})
    if not drop_empty:
        return dataset
    filled = np.ones(len(dataset), bool)
    for name in columns:
        filled &= np.fromiter(
            (bool(text and text.strip()) for text in column_texts(dataset, name)), bool, len(dataset)
        )
    if filled.all():
        return dataset
    logger.info("%s: %d of %d rows hold no text and are left out", source, (~filled).sum(), len(dataset))
    return dataset.select(np.flatnonzero(filled))


def column_texts(dataset: Dataset, column: str) -> Iterator[Any]:
    """A column's values, one after the other."""
    for batch in dataset.select_columns(column).iter(1000):
        yield from batch[column]  # type: ignore[index]


def cut_splits(parts: dict[str, Dataset], column: str, source: str | os.PathLike[str]) -> DatasetDict:
    """Cuts the splits that are missing out of `train`, by the hash of a column's text.

    Raises:
        ValueError: If a split is empty, or there is too little for a validation split.
    """
    source = os.fspath(source)
    empty = [name for name, part in parts.items() if not len(part)]
    if empty:
        raise ValueError(f"source={source!r}: all text of {empty[0]!r} is empty")
    if "validation" in parts:
        return ordered_splits(parts)
    train = parts["train"]
    places = np.fromiter((hash_place(text) for text in column_texts(train, column)), float, len(train))
    splits = np.array([split_of(place) for place in places], object)
    if not (splits == "validation").any():
        splits[places == places.min()] = "validation"  # little text: one document must do
    if "test" in parts or not (splits == "train").any():
        splits[splits == "test"] = "train"
    if not (splits == "train").any():
        kind, way = ("document", ", or sample_by='line'") if column == "text" else ("pair", "")
        raise ValueError(
            f"source={source!r} holds one {kind}, too little for a validation split: give more text, a validation "
            f"file, a `split` column{way}"
        )
    cut = {name: train.select(np.flatnonzero(splits == name)) for name in np.unique(splits)}
    return ordered_splits({**parts, **cut})


def ordered_splits(parts: dict[str, Dataset]) -> DatasetDict:
    """The splits with train, validation and test first."""
    first = ["train", "validation", "test"]
    return DatasetDict([(name, parts[name]) for name in [*first, *sorted(parts)] if name in parts])

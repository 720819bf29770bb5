"""Text for language models: loading and splitting it, byte-level tokenizers, blocks of tokens, a content fingerprint.

Without a source it is the English text that every Python installation carries: documentation strings and comments of
the standard library, and the language reference behind `help()`. Only a Hub data set's name asks for a network.
"""

import csv
import hashlib
import json
import logging
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetGenerationError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hf_efx.core.data.library_text import hash_place, split_of, standard_library_text

logger = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"  # GPT-2's name for it
_SPLIT_NAMES = {"training": "train", **dict.fromkeys(("valid", "val", "dev", "eval"), "validation")}
_CSV: dict[str, Any] = {"keep_default_na": False}  # "NA" and "null" are text
_LOADERS: dict[str, tuple[str, dict[str, Any]]] = {
    **dict.fromkeys((".txt", ".md", ".rst"), ("text", {})),
    **dict.fromkeys((".json", ".jsonl"), ("json", {})),
    ".csv": ("csv", _CSV),
    ".tsv": ("csv", {**_CSV, "delimiter": "\t", "quoting": csv.QUOTE_NONE}),  # a line is a row, whatever its quotes
    ".parquet": ("parquet", {}),
}


def load_text(
    source: str | os.PathLike[str] | None = None,
    text_column: str = "text",
    *,
    sample_by: Literal["paragraph", "line", "document"] = "paragraph",
    cache_dir: str | None = None,
) -> DatasetDict:
    """Loads text as `train`, `validation` and, where there is enough of it, `test`.

    A source's own splits are kept: a Hub data set's, a `split` column's, or a folder's file names (`train.jsonl`,
    `validation.jsonl`). What is missing is cut from `train` by the text's hash: 3% each for validation and test.

    Args:
        source: None for `standard_library_text()`; a .txt, .md, .rst, .json, .jsonl, .csv, .tsv (no quoting: a line is
            a row) or .parquet file, all but the last also as .gz; a folder of such files of one kind; else a data set
            on the Hub, `"name"` or `"name:config"`.
        text_column: Where a table holds the text. It is called `text` in what comes back; other columns are kept.
        sample_by: What one document of a plain text file is. A paragraph ends at an empty line.
        cache_dir: Where `datasets` keeps its Arrow files; None for its default.

    Raises:
        FileNotFoundError: If the source is no file, no folder with such files and no data set that the Hub hands out.
        ValueError: If the suffix is unknown, the file can't be read, the column is missing or no text, all of it is
            empty, or too little for a validation split.
    """
    if source is None:
        return _in_order({name: Dataset.from_dict({"text": texts}) for name, texts in standard_library_text().items()})
    if sample_by not in ("paragraph", "line", "document"):
        raise ValueError(f"sample_by={sample_by!r}: it is 'paragraph', 'line' or 'document'")
    source = os.fspath(source)
    path = Path(source).expanduser()
    if path.exists():
        parts = _load_files(path, text_column, sample_by, cache_dir)
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
    if "train" not in parts:
        raise ValueError(f"source={source!r} has no 'train' split, only {sorted(parts)}")
    return _complete({name: _only_text(part, text_column, source) for name, part in parts.items()}, source)


def source_name(source: str | os.PathLike[str] | None) -> str:
    """What results and cards call a source: no folder of this machine is in it."""
    if source is None:
        return f"standard library text of Python {platform.python_version()}"
    path = Path(source).expanduser()
    return path.resolve().name if path.exists() else os.fspath(source)


def _suffix(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def _load_files(path: Path, text_column: str, sample_by: str, cache_dir: str | None) -> dict[Any, Dataset]:
    """Reads a file, or a folder's files of one kind: a file named after a split makes that split, all others train."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if _suffix(file) in _LOADERS)
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
        options = {"sample_by": sample_by}
    elif kind == "csv":
        options = {**options, "converters": {text_column: str}}  # "007" is text too
    names = {"train", "validation", "test", *_SPLIT_NAMES}
    data_files: dict[str, Any] = {}
    for file in files:
        stem = file.name.split(".")[0].lower()
        split = _SPLIT_NAMES.get(stem, stem) if path.is_dir() and stem in names else "train"
        data_files.setdefault(split, []).append(str(file))
    try:
        return dict(datasets.load_dataset(kind, data_files=data_files, cache_dir=cache_dir, **options))  # type: ignore[call-overload]
    except (DatasetGenerationError, StopIteration) as error:
        reason = error.__cause__ or "it is empty"
        raise ValueError(f"source={str(path)!r} can't be read as {kind}: {reason}") from error


def _load_from_hub(source: str, cache_dir: str | None) -> dict[Any, Dataset]:
    name, _, config = source.partition(":")
    try:
        return dict(datasets.load_dataset(name, config or None, cache_dir=cache_dir))
    except (ConnectionError, FileNotFoundError) as error:
        raise FileNotFoundError(f"source={source!r} is no file or folder here, and the Hub says: {error}") from error


def _only_text(dataset: Dataset, text_column: str, source: str) -> Dataset:
    """Names the text column `text` and drops rows without text."""
    if text_column not in dataset.column_names:
        raise ValueError(
            f"source={source!r} has no column text_column={text_column!r}; it has {', '.join(dataset.column_names)}"
        )
    feature = dataset.features[text_column]
    if getattr(feature, "dtype", "") not in ("string", "large_string"):
        raise ValueError(f"source={source!r}: column text_column={text_column!r} holds {feature}, not text")
    if text_column != "text":
        if "text" in dataset.column_names:
            dataset = dataset.remove_columns("text")
        dataset = dataset.rename_column(text_column, "text")
    filled = np.fromiter((bool(text and text.strip()) for text in _texts(dataset)), bool, len(dataset))
    if filled.all():
        return dataset
    logger.info("%s: %d of %d rows hold no text and are left out", source, (~filled).sum(), len(dataset))
    return dataset.select(np.flatnonzero(filled))


def _texts(dataset: Dataset) -> Iterator[Any]:
    for batch in dataset.select_columns("text").iter(1000):
        yield from batch["text"]  # type: ignore[index]


def _complete(parts: dict[str, Dataset], source: str) -> DatasetDict:
    """Cuts the splits that are missing out of `train`, by the text's hash."""
    empty = [name for name, part in parts.items() if not len(part)]
    if empty:
        raise ValueError(f"source={source!r}: all text of {empty[0]!r} is empty")
    if "validation" in parts:
        return _in_order(parts)
    train = parts["train"]
    places = np.fromiter((hash_place(text) for text in _texts(train)), float, len(train))
    splits = np.array([split_of(place) for place in places], object)
    if not (splits == "validation").any():
        splits[places == places.min()] = "validation"  # little text: one document must do
    if "test" in parts or not (splits == "train").any():
        splits[splits == "test"] = "train"
    if not (splits == "train").any():
        raise ValueError(
            f"source={source!r} holds one document, too little for a validation split: give more text, a validation "
            "file, a `split` column, or sample_by='line'"
        )
    cut = {name: train.select(np.flatnonzero(splits == name)) for name in np.unique(splits)}
    return _in_order({**parts, **cut})


def _in_order(parts: dict[str, Dataset]) -> DatasetDict:
    first = ["train", "validation", "test"]
    return DatasetDict([(name, parts[name]) for name in [*first, *sorted(parts)] if name in parts])


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Builds a tokenizer whose tokens are the 256 bytes, a byte's id its value, and `<|endoftext|>` (256).

    It needs no file, loses no character, and is saved and loaded like any other.
    """
    vocabulary = {character: byte for byte, character in bytes_to_unicode().items()} | {END_OF_TEXT: 256}
    # Without merges there is nothing that words could keep apart: use_regex would only cost time.
    return _byte_level(Tokenizer(models.BPE(vocab=vocabulary, merges=[])), use_regex=False)


def train_tokenizer(dataset: Dataset | DatasetDict, vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer, GPT-2's kind.

    Args:
        dataset: With a `text` column; of several splits `train` is read.
        vocab_size: Tokens at most, the 256 bytes and `<|endoftext|>` among them.

    Raises:
        ValueError: If `vocab_size` has no room for the bytes.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size={vocab_size} has no room for the 256 bytes and {END_OF_TEXT}: give at least 257")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # bytes that don't occur here are tokens too
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(dataset["train"] if isinstance(dataset, DatasetDict) else dataset), trainer)
    return _byte_level(tokenizer, use_regex=True)


def _byte_level(tokenizer: Tokenizer, use_regex: bool) -> PreTrainedTokenizerFast:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def tokenize_blocks(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, block_size: int, mode: Literal["pack", "line"] = "pack"
) -> Dataset:
    """Turns documents into training examples; `TextCollator` makes batches of them.

    Args:
        dataset: A data set with a `text` column.
        tokenizer: Any tokenizer with an end-of-text token, which ends each document.
        block_size: Tokens of an example: exactly so many in pack mode, at most so many in line mode.
        mode: `"pack"` joins the documents and cuts them into blocks: nothing is padded, a block may hold parts of
            several documents, and what is left at the end is dropped. `"line"` makes one example of each document, cut
            at `block_size`: examples keep their identity and their other columns, short ones cost padding.

    Returns:
        A data set with `input_ids` (int32).

    Raises:
        ValueError: If an argument can't be used, or the text fills not even one block.
    """
    if mode not in ("pack", "line"):
        raise ValueError(f"mode={mode!r}: it is 'pack' or 'line'")
    if block_size < 2:
        raise ValueError(f"block_size={block_size}: a causal model predicts from a second token on, give at least 2")
    if "text" not in dataset.column_names:
        raise ValueError(f"the data set has no column 'text', only {', '.join(dataset.column_names)}")
    encode, eos = _encoder(tokenizer), tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise ValueError("the tokenizer has no eos_token, which ends each document: set tokenizer.eos_token")
    left = np.empty(0, np.int32)  # tokens that wait for their block to be full

    def pack(texts: list[str]) -> dict[str, np.ndarray]:
        nonlocal left
        tokens = [np.asarray([*ids, eos], np.int32) for ids in encode(texts)]
        stream = np.concatenate([left, *tokens])
        blocks, left = np.split(stream, [len(stream) // block_size * block_size])
        return {"input_ids": blocks.reshape(-1, block_size)}

    def line(texts: list[str]) -> dict[str, list[list[int]]]:
        return {"input_ids": [[*ids[:block_size], eos][:block_size] for ids in encode(texts)]}

    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})
    if mode == "line":
        features |= {name: feature for name, feature in dataset.features.items() if name != "text"}
    # A cache key of our own: the functions hold state and a tokenizer, whose hashes differ from process to process.
    vocabulary = sorted(tokenizer.get_vocab().items())
    backend = tokenizer.backend_tokenizer.to_str() if isinstance(tokenizer, PreTrainedTokenizerFast) else vocabulary
    state = [dataset._fingerprint, type(tokenizer).__name__, backend, eos, block_size, mode]
    blocks = dataset.with_format(None).map(
        pack if mode == "pack" else line,
        batched=True,
        input_columns="text",
        remove_columns=dataset.column_names if mode == "pack" else "text",
        features=datasets.Features(features),
        new_fingerprint=hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16],
        desc=f"Tokenizing ({mode})",
    )
    if not len(blocks):
        raise ValueError(f"the text has fewer tokens than one block of block_size={block_size}: lower it or add text")
    if len(left):
        logger.info("%d blocks of %d tokens; %d tokens at the end dropped", len(blocks), block_size, len(left))
    return blocks


def _encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[str]], list[list[int]]]:
    """Texts to ids without special tokens. A fast tokenizer's backend does it three times as fast as the tokenizer."""
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # ours: truncation stays off
        backend.no_truncation()
        backend.no_padding()
        return lambda texts: [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]
    return lambda texts: tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[return-value]


@dataclass(frozen=True)
class TextCollator:
    """Batches the examples of `tokenize_blocks` for a causal model; columns of numbers beside the tokens are kept.

    Labels are the tokens, -100 where an example is padded. They go by the examples' lengths, so that the end-of-text
    token is learnt even where it also pads (transformers' `DataCollatorForLanguageModeling` masks it then).

    Attributes:
        pad_token_id: What fills short examples; they are masked, so the end-of-text token is fine.
    """

    pad_token_id: int

    def __call__(self, features: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        rows = [np.asarray(feature["input_ids"], np.int64) for feature in features]
        lengths = np.array([len(row) for row in rows])
        inside = np.arange(lengths.max()) < lengths[:, None]
        ids = np.full(inside.shape, self.pad_token_id, np.int64)
        ids[inside] = np.concatenate(rows)
        batch = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(np.where(inside, ids, -100))}
        if not inside.all():  # without a mask attention takes its faster causal path
            batch["attention_mask"] = torch.from_numpy(inside.astype(np.int64))
        for name in features[0]:
            if name not in ("input_ids", "labels", "attention_mask") and not isinstance(features[0][name], str):
                batch[name] = torch.as_tensor(np.asarray([feature[name] for feature in features]))
        return batch


def content_fingerprint(dataset: Dataset | DatasetDict) -> str:
    """Hashes what the rows hold, in their order: the same on every machine, unlike the fingerprint of `datasets`.

    Returns:
        SHA-256 over columns by name, as 64 hexadecimal digits; of several splits, over their names too.
    """
    digest = hashlib.sha256()
    parts = sorted(dataset.items()) if isinstance(dataset, DatasetDict) else [("", dataset)]
    for name, part in parts:
        columns = sorted(part.column_names)
        digest.update(json.dumps([str(name), columns]).encode() + b"\n")
        for table in part.with_format("arrow").iter(1000):  # what is stored: images stay bytes
            values = [table.column(column).to_pylist() for column in columns]  # type: ignore[union-attr]
            for row in zip(*values, strict=True):
                digest.update(json.dumps(row, default=_hex_or_text).encode() + b"\n")
    return digest.hexdigest()


def _hex_or_text(value: Any) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)

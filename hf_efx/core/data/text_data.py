"""Text for language models: loading and splitting it, byte-level tokenizers, blocks of tokens, a content fingerprint.

Without a source it is the English text that every Python installation carries: documentation strings and comments of
the standard library, and the language reference behind `help()`. Only a Hub data set's name asks for a network.
"""

import hashlib
import json
import logging
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hf_efx.core.data.library_text import standard_library_text
from hf_efx.core.data.text_files import column_texts, cut_splits, load_splits, ordered_splits

logger = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"  # GPT-2's name for it


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
        texts = standard_library_text()
        return ordered_splits({name: Dataset.from_dict({"text": part}) for name, part in texts.items()})
    if sample_by not in ("paragraph", "line", "document"):
        raise ValueError(f"sample_by={sample_by!r}: it is 'paragraph', 'line' or 'document'")
    parts = load_splits(source, {"text": text_column}, sample_by, cache_dir)
    return cut_splits(parts, "text", source)


def source_name(source: str | os.PathLike[str] | None) -> str:
    """What results and cards call a source: no folder of this machine is in it."""
    if source is None:
        return f"standard library text of Python {platform.python_version()}"
    path = Path(source).expanduser()
    return path.resolve().name if path.exists() else os.fspath(source)


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
    texts = dataset["train"] if isinstance(dataset, DatasetDict) else dataset
    tokenizer.train_from_iterator(column_texts(texts, "text"), trainer)
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

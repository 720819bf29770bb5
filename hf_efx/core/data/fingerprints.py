"""Fingerprints: what a data set, a model or a tokenizer holds, as a hash that is the same on every machine."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from datasets.table import embed_table_storage
from torch import nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, ProcessorMixin

from hf_efx.core.data.example_ids import ID_COLUMN, check_dataset
from hf_efx.core.model.wrappers import unwrap_model

_FINGERPRINT_BYTES = 16 * 2**20  # of rows that are hashed at a time


def data_fingerprint(dataset: Dataset, columns: Sequence[str] | None = None) -> str:
    """Hashes what each id stands for, whatever the order of the rows and however they are stored.

    Integers of every width count alike, so do floats, strings and lists, and images by their bytes. Every row has a
    128-bit BLAKE2 digest; their sum is what is hashed, so that the order doesn't matter. About 2 us a row, or 1 GB/s.

    Args:
        dataset: A data set with `example_id`.
        columns: What belongs to an example; None for all columns. Those that the examples started from (text, label)
            make a table fit every tokenizer's copy of the data.

    Returns:
        64 hexadecimal digits, the same on every machine.

    Raises:
        ValueError: If a column is missing.
    """
    check_dataset(dataset, "dataset", ids=True)
    names = sorted(set(dataset.column_names if columns is None else columns) - {ID_COLUMN})
    if missing := [name for name in names if name not in dataset.column_names]:
        raise ValueError(
            f"the data set has no column {missing[0]!r}, which its fingerprint is made of; it has "
            f"{', '.join(dataset.column_names)}. Keep that column, or make the fingerprint of others"
        )
    names = [ID_COLUMN, *names]
    kinds = {name: _kind(dataset.features.arrow_schema.field(name).type) for name in names}
    sums = np.zeros(2, np.uint64)
    for table in _blocks(dataset, names):
        sums += _digest_rows(embed_table_storage(table)).sum(0, dtype=np.uint64)  # modulo 2^64
    state = json.dumps([len(dataset), kinds], sort_keys=True)
    return hashlib.sha256(state.encode() + sums.astype("<u8").tobytes()).hexdigest()


def _blocks(dataset: Dataset, names: list[str]) -> Iterator[pa.Table]:
    """The rows in the order in which they are stored, a few at a time, however they were shuffled."""
    schema = dataset.select_columns(names).features.arrow_schema
    row_bytes = dataset.data.nbytes / max(len(dataset.data), 1)
    size = int(np.clip(_FINGERPRINT_BYTES / max(row_bytes, 1), 1, 10_000))
    rows = None if dataset._indices is None else np.sort(dataset._indices.column(0).to_numpy()).astype(np.int64)
    for start in range(0, len(dataset.data), size):
        block = dataset.data.fast_slice(start, size).select(names).cast(schema).combine_chunks()
        if rows is not None:
            first, last = np.searchsorted(rows, [start, start + size])
            block = block.take(rows[first:last] - start)
        if len(block):
            yield block


def _digest_rows(table: pa.Table) -> np.ndarray:
    """128-bit digests of rows, [rows, 2] uint64. They depend on nothing but the row."""
    arrays = [_plain(table.column(name).combine_chunks()) for name in sorted(table.column_names)]
    rows = list(_row_bytes(arrays))
    for i in np.flatnonzero(np.any([_nulls(array) for array in arrays], axis=0)):  # `_row_bytes` doesn't tell them
        values = [array[int(i)].as_py() for array in arrays]
        rows[i] = b"null" + json.dumps(values, default=str, sort_keys=True).encode()
    digests = [hashlib.blake2b(row, digest_size=16).digest() for row in rows]
    return np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)


def _row_bytes(arrays: list[pa.Array]) -> Iterator[bytes]:
    """What each row holds: its numbers and the lengths of its bytes, 8 bytes each, and then those bytes."""
    pieces = [piece for array in arrays for piece in _pieces(array)]
    numbers = np.stack([values if ends is None else np.diff(ends) for values, ends in pieces], 1).astype("<i8")
    heads, width = memoryview(numbers.tobytes()), 8 * len(pieces)
    tails = [(values.data, ends.tolist()) for values, ends in pieces if ends is not None]
    for i in range(len(numbers)):
        yield b"".join([heads[i * width : (i + 1) * width], *(tail[ends[i] : ends[i + 1]] for tail, ends in tails)])


def _plain(array: pa.Array) -> pa.Array:
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks() if array.num_chunks != 1 else array.chunk(0)
    if isinstance(array, pa.ExtensionArray):  # datasets' Array2D and the like
        array = array.storage
    return array.dictionary_decode() if isinstance(array, pa.DictionaryArray) else array


def _kind(kind: pa.DataType) -> Any:
    """A type without its width and layout."""
    if isinstance(kind, pa.ExtensionType):
        kind = kind.storage_type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_boolean(kind) or pa.types.is_integer(kind):
        return "int"
    if pa.types.is_floating(kind):
        return "float"
    if _is_bytes(kind):
        return "bytes"
    if _is_list(kind):
        return [_kind(kind.value_type)]
    if pa.types.is_struct(kind):
        return {field.name: _kind(field.type) for field in _fields(kind)}
    return str(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    """Strings are their UTF-8 bytes."""
    binary = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return any(is_one(kind) for is_one in binary)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _fields(kind: pa.DataType) -> list[pa.Field]:
    """A struct's fields by name; an image's or a sound's path isn't its content."""
    fields = sorted((kind.field(i) for i in range(kind.num_fields)), key=lambda field: field.name)
    return fields[:1] if [field.name for field in fields] == ["bytes", "path"] else fields


def _pieces(array: pa.Array) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """What rows hold, nulls aside: 8-byte values [rows], or bytes with their borders [rows + 1]."""
    array, kind = _plain(array), _plain(array).type
    if _is_list(kind):
        lengths = _lengths(array)
        borders = np.concatenate([[0], np.cumsum(lengths)])
        inner = [_as_bytes(*piece) for piece in _pieces(array.flatten())]
        return [(lengths, None), *((values, ends[borders]) for values, ends in inner)]
    if pa.types.is_struct(kind):
        return [piece for field in _fields(kind) for piece in _pieces(array.field(field.name))]
    if _is_bytes(kind):
        array = pc.fill_null(array.cast(pa.large_binary()), b"")
        _, ends, values = array.buffers()
        ends = (
            np.frombuffer(ends, np.int64)[array.offset : array.offset + len(array) + 1] if ends else np.zeros(1, int)
        )
        return [(np.frombuffer(values or b"", np.uint8), ends)]
    if pa.types.is_boolean(kind) or pa.types.is_integer(kind):
        return [(pc.fill_null(array.cast(pa.int64(), safe=False), 0).to_numpy(zero_copy_only=False), None)]
    if pa.types.is_floating(kind):
        values = pc.fill_null(array.cast(pa.float64()), 0.0).to_numpy(zero_copy_only=False)
        return [(values.view(np.int64), None)]
    return _pieces(pa.array([str(value) for value in array.to_pylist()], pa.large_string()))


def _as_bytes(values: np.ndarray, ends: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    if ends is not None:
        return values, ends
    return np.ascontiguousarray(values, "<i8").view(np.uint8), np.arange(len(values) + 1) * 8


def _lengths(array: pa.Array) -> np.ndarray:
    return pc.fill_null(pc.call_function("list_value_length", [array]).cast(pa.int64()), 0).to_numpy(
        zero_copy_only=False
    )


def _nulls(array: pa.Array) -> np.ndarray:
    """For each row whether a null is in it, at any depth."""
    array = _plain(array)
    here = array.is_null().to_numpy(zero_copy_only=False)
    if _is_list(array.type):
        inner = np.concatenate([[0], np.cumsum(_nulls(array.flatten()))])
        borders = np.concatenate([[0], np.cumsum(_lengths(array))])
        return here | (np.diff(inner[borders]) > 0)
    if pa.types.is_struct(array.type):
        return np.any([here, *(_nulls(array.field(field.name)) for field in _fields(array.type))], axis=0)
    return here


def weights_fingerprint(model: nn.Module) -> str:
    """Hashes a model's weights and buffers by name, wherever they lie: 64 hexadecimal digits, about 1 s a gigabyte."""
    digest = hashlib.sha256()
    for name, value in sorted(unwrap_model(model).state_dict().items()):
        if isinstance(value, torch.Tensor):
            digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return digest.hexdigest()


def tokenizer_fingerprint(processing_class: Any) -> str | None:
    """Hashes what a tokenizer or processor does to its input; None for None.

    How long it makes sequences is left out, since it is set anew by every call.
    """
    if processing_class is None:
        return None
    parts: list[Any] = [type(processing_class).__name__]
    tokenizer = processing_class
    if isinstance(processing_class, ProcessorMixin):
        tokenizer = getattr(processing_class, "tokenizer", None)
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        parts.append({key: value for key, value in backend.items() if key not in ("truncation", "padding")})
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        parts += [sorted(tokenizer.get_vocab().items()), str(tokenizer.special_tokens_map)]
    if tokenizer is not processing_class or len(parts) == 1:
        parts.append(processing_class.to_dict())
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

"""Example ids, the index over them and fingerprints of data sets, weights and tokenizers."""

from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, Features, Value
from PIL import Image
from torch import nn

from hf_efx.core.data import example_ids
from hf_efx.core.data.example_ids import ID_COLUMN, IdIndex, MappedColumn, add_example_ids
from hf_efx.core.data.fingerprints import data_fingerprint, tokenizer_fingerprint, weights_fingerprint
from hf_efx.core.data.text_data import byte_tokenizer


def with_ids(ids, **columns) -> Dataset:
    return Dataset.from_dict({ID_COLUMN: np.asarray(ids, np.int64), **columns})


def test_add_example_ids_counts_and_keeps_what_is_right():
    dataset = add_example_ids(Dataset.from_dict({"x": [5, 6, 7]}))
    assert dataset.features[ID_COLUMN] == Value("int64")
    assert dataset[ID_COLUMN][:] == [0, 1, 2]
    shuffled = dataset.select([2, 0])
    assert add_example_ids(shuffled)[ID_COLUMN][:] == [2, 0]  # not made anew


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, 2, 1, 3, 3], "ids stand twice in column 'example_id': 1, 3"),
        ([1, None, 2], "holds 1 nulls: every example needs an id"),
        (["a", "b"], "are string, not int64"),
        ([0.0, 1.0], "are double, not int64"),
        (pa.array([0, 1], pa.int32()), "are int32, not int64"),
    ],
)
def test_wrong_ids_are_refused(values, message):
    dataset = Dataset(pa.table({ID_COLUMN: values}))
    with pytest.raises(ValueError, match=message):
        add_example_ids(dataset)


def test_a_stream_and_a_data_set_without_ids_are_refused():
    stream = Dataset.from_dict({"x": [1]}).to_iterable_dataset()
    with pytest.raises(ValueError, match="IterableDataset.*without streaming=True"):
        add_example_ids(stream)
    with pytest.raises(ValueError, match="no column 'example_id', only x: call add_example_ids"):
        IdIndex(Dataset.from_dict({"x": [1]}))


@pytest.mark.parametrize("in_one_piece", [True, False])
@pytest.mark.parametrize("ids", [[-5, 0, 3, 9, 2**40], [9, -5, 2**40, 0, 3]])
def test_index_finds_rows_in_chunks_and_in_any_order(ids, in_one_piece, monkeypatch):
    if not in_one_piece:
        monkeypatch.setattr(example_ids, "_IN_ONE_PIECE", 0)
    index = IdIndex(pa.chunked_array([ids[:2], [], ids[2:3], ids[3:]], type=pa.int64()))
    assert index.sorted == (ids[0] == -5)
    assert len(index) == 5
    for wanted in ([3], [9, 9, -5], torch.tensor([2**40, 0]), np.array([0], np.int32), []):
        assert index.rows(wanted).tolist() == [ids.index(int(one)) for one in wanted]
    assert index.contains([-6, -5, 4, 2**40, 2**41]).tolist() == [False, True, False, True, False]
    assert index.sorted_ids(1, 4).tolist() == [0, 3, 9]
    assert [ids[row] for row in index.rows_by_id(3, 9)] == [9, 2**40]
    assert [index.place(smallest) for smallest in (-6, -5, 1, 9, 2**50)] == [0, 0, 2, 3, 5]
    with pytest.raises(ValueError, match="2 ids are not among the 5 examples: 4, 7. The data set"):
        index.rows([3, 4, 7])
    with pytest.raises(ValueError, match="must be whole numbers, but they are float64"):
        index.rows([0.5])


def test_index_of_selected_rows_is_theirs():
    dataset = with_ids(range(0, 100, 10)).select([4, 9, 1])
    assert IdIndex(dataset).rows([10, 40]).tolist() == [2, 0]
    with pytest.raises(ValueError, match="not among the 3 examples: 0"):
        IdIndex(dataset).rows([0])
    assert not IdIndex(with_ids([])).contains([1]).any()


def test_sorted_ids_in_doubled_pieces_are_refused():
    with pytest.raises(ValueError, match="ids stand twice in column 'example_id': 2"):
        IdIndex(pa.chunked_array([[1, 2], [2, 3]]))


def test_large_columns_stay_where_they_are(monkeypatch):
    monkeypatch.setattr(example_ids, "_IN_ONE_PIECE", 16)
    column = pa.chunked_array([pa.array([1.5, 2.5]), pa.array([3.5, 4.5])])
    mapped = MappedColumn(column)
    assert [chunk.ctypes.data for chunk in mapped.chunks] == [chunk.buffers()[1].address for chunk in column.chunks]
    assert mapped.take(np.array([3, 0, 2, 3])).tolist() == [4.5, 1.5, 3.5, 4.5]


# Of the columns text and ids below: it stands in published tables, so it must never change.
FINGERPRINT = "9dbf14b2954208634c3c63cf9580a45ec7e2921d8a36aa08f0378ad6a93885d1"


def rich_rows() -> dict[str, list]:
    return {
        ID_COLUMN: [7, 3, 11],
        "text": ["naïve", "", "\x00b"],
        "ids": [[1, 2], [], [3]],
        "weight": [0.1, -0.0, float("inf")],
        "deep": [[[1], [2, 3]], [[]], []],
        "named": [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}, {"a": 3, "b": ""}],
    }


def test_fingerprint_goes_by_content_alone():
    """Order, chunks, widths and selection don't count."""
    dataset = Dataset.from_dict(rich_rows())
    expected = data_fingerprint(dataset)
    assert expected == data_fingerprint(dataset.select([2, 0, 1]))
    assert expected == data_fingerprint(datasets.concatenate_datasets([dataset.select([1]), dataset.select([2, 0])]))
    padding = Dataset.from_dict({name: values + values[:1] for name, values in rich_rows().items()})
    assert expected == data_fingerprint(padding.select([3, 1, 2]))
    narrow = Features({**dataset.features, "ids": datasets.LargeList(Value("int16")), "text": Value("large_string")})
    assert expected == data_fingerprint(dataset.cast(narrow))
    assert expected == data_fingerprint(dataset.with_format("torch"))
    assert expected == data_fingerprint(dataset, sorted(dataset.column_names, reverse=True))
    assert data_fingerprint(dataset, ["text", "ids"]) == FINGERPRINT


@pytest.mark.parametrize(
    ("column", "values"),
    [
        (ID_COLUMN, [7, 3, 12]),
        ("text", ["naïve", "\x00b", ""]),  # two swapped
        ("ids", [[1], [2], [3]]),  # the same numbers, cut elsewhere
        ("weight", [0.1, 0.0, float("-inf")]),
        ("deep", [[[1, 2], [3]], [[]], []]),
        ("deep", [[[1], [2, 3]], [], []]),
        ("named", [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}, {"a": 3, "b": None}]),
        ("text", ["naïve", None, "\x00b"]),
        ("ids", [[1, 2], None, [3]]),
        ("ids", [[1, 2], [], [None]]),
    ],
)
def test_fingerprint_sees_every_change(column, values):
    dataset = Dataset.from_dict(rich_rows())
    assert data_fingerprint(dataset) != data_fingerprint(Dataset.from_dict(rich_rows() | {column: values}))
    others = [name for name in dataset.column_names if name != column]
    if column != ID_COLUMN:
        changed = Dataset.from_dict(rich_rows() | {column: values})
        assert data_fingerprint(dataset, others) == data_fingerprint(changed, others)


def test_fingerprint_of_a_row_with_nulls_is_its_own():
    """Nulls go another way, chunk by chunk: what stands beside them mustn't matter."""
    rows = [{"a": 1, "b": [1, None]}, {"a": None, "b": [2]}, {"a": 3, "b": None}, {"a": 4, "b": [5]}]
    dataset = add_example_ids(Dataset.from_list(rows))
    parts = [dataset.select([i]).flatten_indices() for i in (2, 0, 3, 1)]
    assert data_fingerprint(datasets.concatenate_datasets(parts)) == data_fingerprint(dataset)
    moved = Dataset.from_list([{"a": None, "b": [1]}, {"a": 2, "b": [None]}])
    other = Dataset.from_list([{"a": 1, "b": [None]}, {"a": None, "b": [2]}])
    assert data_fingerprint(add_example_ids(moved)) != data_fingerprint(add_example_ids(other))


def test_fingerprint_of_images_is_that_of_their_bytes(tmp_path):
    paths = []
    for i in range(2):
        Image.new("L", (2, 2), color=i).save(tmp_path / f"{i}.png")
        paths.append(str(tmp_path / f"{i}.png"))
    stored = with_ids([0, 1], image=paths).cast_column("image", datasets.Image())
    buffers = [{"bytes": Path(path).read_bytes(), "path": None} for path in paths]
    embedded = with_ids([0, 1], image=buffers).cast_column("image", datasets.Image())
    swapped = with_ids([0, 1], image=buffers[::-1]).cast_column("image", datasets.Image())
    assert data_fingerprint(stored) == data_fingerprint(embedded) != data_fingerprint(swapped)


def test_fingerprint_names_a_missing_column():
    with pytest.raises(ValueError, match="no column 'text'.*it has example_id, x. Keep that column"):
        data_fingerprint(with_ids([0], x=[1]), ["text"])


def test_weights_fingerprint_sees_values_names_and_types():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    first = weights_fingerprint(model)
    assert first == weights_fingerprint(nn.DataParallel(model))
    assert first != weights_fingerprint(model.bfloat16())
    model.float()
    second = weights_fingerprint(model)  # rounded
    model[1].running_mean[1] = 1.0  # type: ignore[index]
    assert len({first, second, weights_fingerprint(model)}) == 3


def test_tokenizer_fingerprint_ignores_length_and_sees_words():
    tokenizer, other = byte_tokenizer(), byte_tokenizer()
    first = tokenizer_fingerprint(tokenizer)
    tokenizer(["some text"], truncation=True, max_length=3, padding="max_length" if tokenizer.pad_token else False)
    other.add_tokens(["word"])
    assert tokenizer_fingerprint(tokenizer) == first != tokenizer_fingerprint(other)
    assert tokenizer_fingerprint(None) is None

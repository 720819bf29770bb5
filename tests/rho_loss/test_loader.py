"""Rows by column, and columns that pass a data collator by."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Array2D, Dataset, Features, List, Value, concatenate_datasets
from transformers import DefaultDataCollator, default_data_collator

from hf_efx.rho_loss.loader import ColumnRows, ExtraColumnsCollator, can_fetch_columns

IDS = ("example_id",)


def dataset(rows: int = 20) -> Dataset:
    """Numbers in every form that is fetched by column."""
    draw = np.random.default_rng(0)
    columns = {
        "float": draw.standard_normal(rows).astype(np.float64),
        "half": draw.standard_normal((rows, 3)).astype(np.float16),
        "fixed": draw.standard_normal((rows, 4)).astype(np.float32),
        "list": draw.integers(0, 9, (rows, 2)),
        "image": draw.integers(0, 255, (rows, 2, 3)).astype(np.uint8),
        "flag": draw.random(rows) < 0.5,
        "label": draw.integers(0, 5, rows).astype(np.int8),
        "example_id": draw.permutation(rows),
    }
    features = Features({
        "float": Value("float64"), "half": List(Value("float16")), "fixed": List(Value("float32"), length=4),
        "list": List(Value("int32")), "image": Array2D((2, 3), "uint8"), "flag": Value("bool"), "label": Value("int8"),
        "example_id": Value("int64"),
    })  # fmt: skip
    return Dataset.from_dict(columns, features=features)


def assert_alike(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, value in other.items():
        assert one[name].dtype == value.dtype and torch.equal(one[name], value), name


@pytest.mark.parametrize("form", [None, "torch", "numpy"])
@pytest.mark.parametrize("change", ["none", "shuffled", "sliced", "chunks", "chunks, filtered"])
def test_columns_are_what_the_default_collator_makes_of_rows(form: Any, change: str) -> None:
    rows = dataset()
    if change == "shuffled":
        rows = rows.shuffle(seed=1)
    elif change == "sliced":
        rows = rows.select(range(5, 17))
    elif change.startswith("chunks"):
        rows = concatenate_datasets([rows.select(range(7)), dataset(3), rows.select(range(7, 20))])
        rows = rows.filter(lambda row: row["label"] < 4) if "filtered" in change else rows
    rows = rows.with_format(form)
    assert can_fetch_columns(rows, default_data_collator) and can_fetch_columns(rows, DefaultDataCollator())
    places = [3, 0, 11, 7, 3]
    fetched = ColumnRows(rows)
    collate = ExtraColumnsCollator(default_data_collator, IDS)
    expected = default_data_collator(rows.__getitems__(places))
    assert_alike(collate(fetched.__getitems__(places)), expected)
    assert_alike(collate(rows.__getitems__(places)), expected)
    assert len(fetched) == len(rows) and str(fetched[2]) == str(rows[2])
    assert_alike(collate(pickle.loads(pickle.dumps(fetched)).__getitems__(places)), expected)


def test_what_isnt_fetched_by_column() -> None:
    rows = dataset()
    ragged = [[1] * (1 + i % 2) for i in range(20)]
    for other, collator in [
        (rows, lambda features: {}),
        (rows.add_column("text", ["word"] * 20), default_data_collator),
        (rows.add_column("ragged", ragged), default_data_collator),
        (rows.add_column("missing", [None, *range(19)]), default_data_collator),
        (rows.add_column("label_ids", [0] * 20), default_data_collator),
        (rows.with_format("torch", dtype=torch.float64), default_data_collator),
        (rows.with_format("torch", columns=["fixed"]), default_data_collator),
        (rows.with_transform(lambda batch: batch), default_data_collator),
        (rows.select([]), default_data_collator),
        ([{"a": 1}], default_data_collator),
    ]:
        assert not can_fetch_columns(other, collator)


def test_the_collator_gets_the_rest_and_leaves_the_rows_alone() -> None:
    given = []

    def collator(features: list[dict[str, Any]]) -> dict[str, Any]:
        given.extend(features)
        return {"n": torch.tensor(len(features))}

    rows = [
        {"text": "a", "example_id": 5, "wrong": True},
        {"text": "b", "example_id": torch.tensor(6), "wrong": False},
    ]
    before = copy.deepcopy(rows)
    batch = ExtraColumnsCollator(collator, ("example_id", "wrong"))(rows)
    assert given == [{"text": "a"}, {"text": "b"}] and rows == before
    assert batch["example_id"].tolist() == [5, 6] and batch["wrong"].tolist() == [1, 0]
    assert batch["example_id"].dtype == batch["wrong"].dtype == torch.int64


@pytest.mark.parametrize("value", ["7", 7.0, None, [7]])
def test_ids_of_another_type_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="example_id must be one whole number an example, but one is"):
        ExtraColumnsCollator(default_data_collator, IDS)([{"x": 1, "example_id": value}])


def test_a_missing_id_is_refused() -> None:
    with pytest.raises(ValueError, match="1 of 2 examples drawn have no example_id, only x"):
        ExtraColumnsCollator(default_data_collator, IDS)([{"x": 1, "example_id": 2}, {"x": 1}])

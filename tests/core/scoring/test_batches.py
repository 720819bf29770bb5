"""Operations on collated batches, against rows written out by hand."""

import pytest
import torch
import transformers

from hf_efx.core.scoring.batches import (
    align_left,
    batch_size,
    check_rows,
    concatenate_rows,
    sequence_names,
    take_rows,
    trim_padding,
)


def _right():
    return {
        "input_ids": torch.tensor([[5, 6, 7, 0, 0], [8, 0, 0, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]),
        "labels": torch.tensor([[5, 6, 7, -100, -100], [8, -100, -100, -100, -100]]),
    }


def _left():
    return {name: value.flip(1) for name, value in _right().items()}


def test_batch_size_is_the_shared_first_dimension():
    assert (
        batch_size({"pixel_values": torch.zeros(3, 1, 2, 2), "labels": torch.zeros(3), "scale": torch.tensor(2.0)})
        == 3
    )
    with pytest.raises(ValueError, match=r"can't be told apart: its tensors have \{'pixel_values': 7, 'labels': 3\}"):
        batch_size({"pixel_values": torch.zeros(7, 4), "labels": torch.zeros(3)})
    with pytest.raises(ValueError, match="no rows"):
        batch_size({"text": ["a"]})


def test_rows_of_several_examples_are_refused():
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8, 9], "labels": [8, 9]}]
    flat = transformers.DataCollatorWithFlattening()(rows)
    with pytest.raises(ValueError, match="several examples each, as position_ids say.*DataCollatorWithPadding"):
        batch_size(flat)
    with pytest.raises(ValueError, match="made 1 rows of 2 examples"):
        check_rows({name: value for name, value in flat.items() if name != "position_ids"}, 2)
    # Positions of padding don't count, and repeated ones are no restart.
    left = _left() | {"position_ids": torch.tensor([[1, 1, 0, 1, 2], [1, 1, 1, 1, 0]])}
    assert batch_size(left) == 2 and batch_size({"position_ids": torch.tensor([[0, 1, 1, 2]])}) == 1
    check_rows(left, 2)


@pytest.mark.parametrize("rows", [torch.tensor([2, 0, 0]), slice(1, 3)], ids=["indices", "slice"])
def test_take_rows(rows):
    batch = {"x": torch.arange(6).reshape(3, 2), "names": ["a", "b", "c"], "scale": 2.0, "pair": torch.tensor(1)}
    taken = take_rows(batch, rows)
    picked = [2, 0, 0] if isinstance(rows, torch.Tensor) else [1, 2]
    assert taken["x"].tolist() == [[2 * row, 2 * row + 1] for row in picked]
    assert taken["names"] == ["abc"[row] for row in picked]
    assert taken["scale"] == 2.0 and taken["pair"] is batch["pair"]
    assert list(batch) == list(taken)


def test_a_slice_copies_nothing():
    batch = _right()
    taken = take_rows(batch, slice(1, 2))
    assert taken["input_ids"].data_ptr() == batch["input_ids"][1:].data_ptr()


def test_trimming_drops_the_padding_of_all_rows():
    trimmed = trim_padding(_right())
    assert {name: value.tolist() for name, value in trimmed.items()} == {
        "input_ids": [[5, 6, 7], [8, 0, 0]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[5, 6, 7], [8, -100, -100]],
    }
    assert all(value.is_contiguous() for value in trimmed.values())
    assert trim_padding(_left())["input_ids"].tolist() == [[7, 6, 5], [0, 0, 8]]
    assert trim_padding(take_rows(_left(), torch.tensor([1])))["labels"].tolist() == [[8]]


def test_trimming_never_drops_a_target_or_the_last_column():
    batch = _right()
    batch["labels"][1, 4] = 0  # a careless collator's label at a place that is masked
    assert trim_padding(batch)["input_ids"].shape == (2, 5)
    empty = {"input_ids": torch.zeros(2, 3), "attention_mask": torch.zeros(2, 3)}
    assert trim_padding(empty)["input_ids"].shape == (2, 3)


def test_trimming_takes_what_is_beside_the_tokens_along():
    batch = _right() | {
        "token_type_ids": torch.ones(2, 5, dtype=torch.int64),
        "bbox": torch.arange(40).reshape(2, 5, 4),
        "pixel_values": torch.zeros(2, 3, 5, 5),
        "scores": torch.zeros(2),
    }
    trimmed = trim_padding(batch)
    assert trimmed["token_type_ids"].shape == (2, 3)
    assert torch.equal(trimmed["bbox"], batch["bbox"][:, :3])
    assert trimmed["pixel_values"].shape == (2, 3, 5, 5) and trimmed["scores"].shape == (2,)


@pytest.mark.parametrize(
    "name, value",
    [("pixel_values", torch.zeros(2, 5, 8, 8)), ("teacher", torch.zeros(2, 5))],
    ids=["channels", "floats"],
)
def test_a_batch_in_doubt_stays_as_it_is(name, value):
    batch = _right() | {name: value}
    assert sequence_names(batch) == []
    assert all(trim_padding(batch)[key] is batch[key] for key in batch)
    aligned, shift = align_left(_left() | {name: value})
    assert shift is None and torch.equal(aligned["input_ids"], _left()["input_ids"])


def test_without_a_mask_labels_stay_as_wide_as_the_tokens():
    batch = {"input_ids": torch.ones(2, 3), "labels": torch.tensor([[1, 2, -100], [1, -100, -100]])}
    assert trim_padding(batch)["labels"].shape == (2, 3)


def test_regression_targets_of_the_mask_s_width_are_no_sequence():
    batch = _right() | {"labels": torch.zeros(2, 5)}
    assert sequence_names(batch) == ["input_ids", "attention_mask"]
    assert trim_padding(batch)["labels"].shape == (2, 5)


def test_seq2seq_sides_are_trimmed_apart():
    labels = torch.tensor([[1, 2, -100, -100], [3, -100, -100, -100]])
    batch = _right() | {"labels": labels}
    trimmed = trim_padding(batch)
    assert trimmed["input_ids"].shape == (2, 3) and trimmed["labels"].tolist() == [[1, 2], [3, -100]]
    batch["decoder_input_ids"] = torch.tensor([[0, 1, 2, 2], [0, 3, 2, 2]])
    batch["decoder_attention_mask"] = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    trimmed = trim_padding(batch)  # the decoder's mask keeps a third column
    assert trimmed["decoder_input_ids"].tolist() == [[0, 1, 2], [0, 3, 2]]
    assert trimmed["labels"].shape == trimmed["decoder_attention_mask"].shape == (2, 3)
    # Of one width by accident: what both sides can spare goes.
    trimmed = trim_padding(_right() | {"labels": torch.tensor([[1, 2, 3, 4, -100], [1, -100, -100, -100, -100]])})
    assert trimmed["labels"].tolist() == [[1, 2, 3, 4], [1, -100, -100, -100]]


def test_align_left_moves_padding_to_the_right():
    batch = _left() | {"bbox": torch.arange(20).reshape(2, 5, 2)}
    aligned, shift = align_left(batch)
    assert shift is not None and shift.tolist() == [2, 4]
    assert aligned["input_ids"].tolist() == [[7, 6, 5, 0, 0], [8, 0, 0, 0, 0]]
    assert aligned["labels"].tolist() == [[7, 6, 5, -100, -100], [8, -100, -100, -100, -100]]
    assert aligned["bbox"][1].tolist() == [[18, 19], [10, 11], [12, 13], [14, 15], [16, 17]]
    assert align_left(_right())[1] is None


def test_concatenating_pads_to_one_width():
    short = take_rows(_right(), torch.tensor([1]))
    short = {name: value[:, :2] for name, value in short.items()} | {"example_id": torch.tensor([9])}
    long = _right() | {"example_id": torch.tensor([3, 4])}
    joined = concatenate_rows([short, long], {"input_ids": 1})
    assert joined["input_ids"].tolist() == [[8, 0, 1, 1, 1], [5, 6, 7, 0, 0], [8, 0, 0, 0, 0]]
    assert joined["attention_mask"][0].tolist() == [1, 0, 0, 0, 0]
    assert joined["labels"][0].tolist() == [8, -100, -100, -100, -100]
    assert joined["example_id"].tolist() == [9, 3, 4]
    joined = concatenate_rows([short, long], {"input_ids": 1}, side="left")
    assert joined["input_ids"][0].tolist() == [1, 1, 1, 8, 0] and joined["attention_mask"][0].tolist() == [
        0,
        0,
        0,
        1,
        0,
    ]


def test_concatenating_gives_every_row_a_mask_where_one_is_needed():
    full = {"input_ids": torch.tensor([[5, 6]])}
    padded = {"input_ids": torch.tensor([[7, 0]]), "attention_mask": torch.tensor([[1, 0]])}
    assert concatenate_rows([full, padded])["attention_mask"].tolist() == [[1, 1], [1, 0]]
    joined = concatenate_rows([full, {"input_ids": torch.tensor([[1, 2, 3]])}], {"input_ids": 0})
    assert joined["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert "attention_mask" not in concatenate_rows([full, full])


def test_concatenating_embeddings_lists_and_numbers():
    one = {"inputs_embeds": torch.ones(1, 2, 3), "names": ["a"], "scale": 2.0}
    two = {"inputs_embeds": torch.ones(2, 4, 3), "names": ["b", "c"], "scale": 2.0}
    joined = concatenate_rows([one, two], {"inputs_embeds": 0.0})
    assert joined["inputs_embeds"].shape == (3, 4, 3) and joined["inputs_embeds"][0].sum(1).tolist() == [3, 3, 0, 0]
    assert joined["names"] == ["a", "b", "c"] and joined["scale"] == 2.0


@pytest.mark.parametrize(
    "batches, options, message",
    [
        ([{"input_ids": torch.ones(1, 2)}, {"input_ids": torch.ones(1, 3)}], {}, r"input_ids has widths \[2, 3\]"),
        ([{"x": torch.ones(1)}, {"y": torch.ones(1)}], {}, "different names"),
        ([{"x": torch.ones(1, 2, 3)}, {"x": torch.ones(1, 2, 4)}], {}, r"different shapes, \[\[2, 3\], \[2, 4\]\]"),
        ([{"scale": 1.0}, {"scale": 2.0}], {}, "scale differs"),
        ([{"x": torch.ones(1)}], {"side": "up"}, "side='up'"),
        ([], {}, r"batches=\[\]"),
    ],
)
def test_what_does_not_fit_together_is_refused(batches, options, message):
    with pytest.raises(ValueError, match=message):
        concatenate_rows(batches, **options)

"""Tables of irreducible losses: lookup, what they are checked for, the Hub."""

import json

import pytest
import torch
from datasets import Dataset

from hf_efx.core.data.tables import settings_of, with_settings
from hf_efx.core.data.text_data import byte_tokenizer
from hf_efx.rho_loss.irreducible_table import IrreducibleLosses, load_irreducible_losses, save_irreducible_losses
from rho_loss.test_irreducible import ROWS, compute, examples


@pytest.fixture(scope="module")
def table() -> Dataset:
    return compute(processing_class=byte_tokenizer())


def test_lookup_goes_by_id(table):
    losses = IrreducibleLosses(table)
    assert len(losses) == ROWS
    by_id = dict(zip(table["example_id"][:], table["irreducible_loss"][:], strict=True))
    wanted = torch.tensor([-20, 127, 1, 1])
    found = losses.lookup(wanted)
    assert found.dtype == torch.float32
    assert found.tolist() == [by_id[i] for i in wanted.tolist()]
    with pytest.raises(ValueError, match="1 ids are not among the 50 examples: 2"):
        losses.lookup([1, 2])


def test_check_accepts_the_run_that_the_table_was_made_for(table, tmp_path):
    save_irreducible_losses(table, tmp_path / "t")
    losses = IrreducibleLosses(load_irreducible_losses(tmp_path / "t"))
    settings = {"task": "classification", "granularity": "example", "label_smoothing": 0.0}
    losses.check(examples().shuffle(seed=3), tokenizer=byte_tokenizer(), **settings)
    losses.check(examples())  # what isn't known isn't compared
    card = (tmp_path / "t" / "README.md").read_text()
    assert 'load_irreducible_losses("t")' in card and "@article{mindermann" in card and "histogram.png" in card


def test_check_refuses_everything_else(table):
    losses, dataset = IrreducibleLosses(table), examples()
    other_tokenizer = byte_tokenizer()
    other_tokenizer.add_tokens(["word"])
    for name, value in {"task": "regression", "granularity": "token", "label_smoothing": 0.1}.items():
        with pytest.raises(ValueError, match=f"was made with {name}=.*, but here it is {value!r}"):
            losses.check(dataset, **{name: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="was made with tokenizer='"):
        losses.check(dataset, tokenizer=other_tokenizer)
    with pytest.raises(ValueError, match="was made with rows=50, but here it is 49"):
        losses.check(dataset.select(range(49)))
    with pytest.raises(ValueError, match="train_dataset has no column 'example_id'"):
        losses.check(dataset.remove_columns("example_id"))
    ids = dataset["example_id"][:]
    for new_ids, message in (
        ([*ids[:-1], 1000], "1 ids are not among the 50 examples: 1000"),
        ([*ids[:-1], ids[0]], f"ids stand twice in column 'example_id': {ids[0]}"),
        ([*ids[1:], ids[0]], "made for another data set: the fingerprint over example_id, input_ids, label, text is"),
    ):
        with pytest.raises(ValueError, match=message):
            losses.check(dataset.remove_columns("example_id").add_column("example_id", new_ids))  # type: ignore
    changed = dataset.map(lambda row: {"label": 1 - row["label"]} if row["example_id"] == 1 else {})
    with pytest.raises(ValueError, match="made for another data set"):
        losses.check(changed)


def test_raw_columns_fit_another_tokenizers_copy():
    losses = IrreducibleLosses(compute(fingerprint_columns=["text", "label"]))
    retokenized = examples().map(lambda row: {"input_ids": [1, *row["input_ids"]]})
    losses.check(retokenized)
    with pytest.raises(ValueError, match="no column 'text', which its fingerprint is made of"):
        losses.check(retokenized.remove_columns("text"))


def test_unusable_tables_are_refused(table):
    settings = settings_of(table)
    columns = table[:]

    def changed(**new):
        return with_settings(Dataset.from_dict({**columns, **new}), settings)

    losses = columns["irreducible_loss"]
    ids = columns["example_id"]
    for bad, message in (
        (table.select(range(49)), "has 49 rows but was made with 50: it is truncated or extended"),
        (Dataset.from_dict(columns), "carries no settings"),
        (
            changed(irreducible_loss=[*losses[:-1], float("nan")]),
            r"1 irreducible losses aren't finite, .* 127 \(row 49\)",
        ),
        (
            changed(irreducible_loss=[float("inf"), *losses[1:]]),
            r"1 irreducible losses aren't finite, .* -20 \(row 0\)",
        ),
        (changed(irreducible_loss=[None, *losses[1:]]), "holds 1 nulls"),
        (changed(example_id=[ids[1], *ids[1:]]), "ids stand twice in column 'example_id': -17"),
        (changed(example_id=list(map(str, ids))), "are string, not int64"),
        (changed().remove_columns("irreducible_loss"), "lacks the column 'irreducible_loss'"),
    ):
        with pytest.raises(ValueError, match=message):
            IrreducibleLosses(bad)


PUSH = """
    import json, sys
    from hf_efx.core.data.tables import settings_of
    from hf_efx.rho_loss.irreducible_table import load_irreducible_losses, push_irreducible_losses

    push_irreducible_losses(load_irreducible_losses(sys.argv[1]), "tester/irreducible", private=True)
    pulled = load_irreducible_losses("tester/irreducible")
    print(json.dumps([pulled[:], settings_of(pulled)]))
"""


def test_hub_round_trip_is_identical(table, hub, run_python, tmp_path):
    save_irreducible_losses(table, tmp_path / "t")
    pulled = json.loads(run_python(PUSH, env=hub.env, args=[tmp_path / "t"]).splitlines()[-1])
    assert pulled == [table[:], settings_of(table)]

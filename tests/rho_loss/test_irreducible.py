"""Computing irreducible losses, resuming, looking them up, and refusing tables of something else."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithFlattening,
    GPT2Config,
    GPT2LMHeadModel,
)

from hf_efx.core.data.tables import settings_of
from hf_efx.core.data.text_data import TextCollator, byte_tokenizer
from hf_efx.rho_loss import irreducible
from hf_efx.rho_loss.irreducible import compute_irreducible_losses
from hf_efx.rho_loss.irreducible_table import IrreducibleLosses

ROWS = 50


def bert(seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = BertConfig(vocab_size=50, max_position_embeddings=16, initializer_range=0.5, **sizes)
    return BertForSequenceClassification(config).train()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config)


def examples(labels: bool = True) -> Dataset:
    """Sentences of 1 to 8 tokens, ids neither positions nor in order."""
    draw = np.random.default_rng(0)
    ids = draw.permutation(ROWS) * 3 - 20
    columns = {"example_id": ids, "input_ids": [draw.integers(1, 50, draw.integers(1, 9)).tolist() for _ in ids]}
    if labels:
        columns |= {"label": draw.integers(0, 2, ROWS), "text": [f"sentence {i}" for i in ids]}
    return Dataset.from_dict(columns)


def pad(features):
    width = max(len(feature["input_ids"]) for feature in features)
    ids = [feature["input_ids"] + [0] * (width - len(feature["input_ids"])) for feature in features]
    batch = {"input_ids": torch.tensor(ids), "labels": torch.tensor([feature["label"] for feature in features])}
    return batch | {"attention_mask": (batch["input_ids"] != 0).long()}


def compute(model=None, dataset=None, **options) -> Dataset:
    options = {"data_collator": pad, "batch_size": 4, "save_every": 10} | options
    return compute_irreducible_losses(model or bert(), dataset or examples(), **options)


@pytest.fixture(scope="module")
def table() -> Dataset:
    return compute(processing_class=byte_tokenizer())


def test_losses_are_those_of_one_example_at_a_time(table):
    model, dataset = bert().eval(), examples()
    expected = {}
    for row in dataset:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits
        expected[row["example_id"]] = F.cross_entropy(logits, torch.tensor([row["label"]])).item()
    assert table["example_id"][:] == sorted(expected)
    np.testing.assert_allclose(table["irreducible_loss"][:], [expected[i] for i in sorted(expected)], atol=1e-5)
    assert np.std(list(expected.values())) > 0.1
    assert [str(kind) for kind in table.features.values()] == ["Value('int64')", "Value('float32')"]
    assert table.cache_files  # mapped from a file
    settings = settings_of(table, "irreducible_losses")
    assert {name: settings[name] for name in ("rows", "model_name", "task", "granularity", "label_smoothing")} == {
        "rows": ROWS,
        "model_name": "BertForSequenceClassification",
        "task": "classification",
        "granularity": "example",
        "label_smoothing": 0.0,
    }
    assert settings["fingerprint_columns"] == ["input_ids", "label", "text"]


def test_neither_order_nor_model_nor_random_state_changes(table):
    model = bert()
    state, before = torch.get_rng_state(), {name: value.clone() for name, value in model.state_dict().items()}
    again = compute(model, examples().shuffle(seed=1), processing_class=byte_tokenizer(), batch_size=7)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    np.testing.assert_allclose(again["irreducible_loss"][:], table["irreducible_loss"][:], atol=1e-5)
    assert settings_of(again) == settings_of(table)
    assert settings_of(compute(bert(1)))["model_weights"] != settings_of(table)["model_weights"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_token_losses_are_found_wherever_the_padding_is(side):
    model, dataset = gpt2(), examples(labels=False)
    losses = IrreducibleLosses(compute(model, dataset, granularity="token", data_collator=TextCollator(0)))
    rows = [7, 3, 11]
    texts = [dataset[row]["input_ids"] for row in rows]
    width = max(map(len, texts)) + 1
    mask, expected = torch.zeros(3, width, dtype=torch.bool), torch.zeros(3, width)
    for i, text in enumerate(texts):
        with torch.no_grad():
            logits = model.eval()(input_ids=torch.tensor([text])).logits[0, :-1]
        start = 0 if side == "right" else width - len(text)
        mask[i, start : start + len(text) - 1] = True
        expected[i, start : start + len(text) - 1] = F.cross_entropy(logits, torch.tensor(text[1:]), reduction="none")
    assert mask.sum() > 3
    torch.testing.assert_close(losses.lookup(dataset[rows]["example_id"], mask), expected, atol=1e-5, rtol=0)
    longest = int(mask.sum(-1).argmax())
    mask[longest, mask[longest].nonzero()[0]] = False
    with pytest.raises(ValueError, match=f"has {mask[longest].sum()} targets here and .* use the tokenizer"):
        losses.lookup(dataset[rows]["example_id"], mask)
    with pytest.raises(ValueError, match="mask=None: a table of granularity='token' needs to know"):
        losses.lookup(dataset[rows]["example_id"])


def test_an_example_without_a_target_has_loss_0():
    dataset = Dataset.from_dict({"example_id": [4, 9], "input_ids": [[3], [3, 4, 5]]})  # one token predicts nothing
    for granularity, empty in (("example", 0.0), ("token", [])):
        table = compute(gpt2(), dataset, data_collator=TextCollator(0), granularity=granularity)
        assert table[0]["irreducible_loss"] == empty
        assert np.min(table[1]["irreducible_loss"]) > 0


@pytest.fixture
def scored(monkeypatch):
    """Ids in the order in which they are scored; fails before the example whose id is put into `fail_at`."""

    class Scored(list):
        fail_at: int | None = None

    ids, finish = Scored(), irreducible._losses

    def record(scores, drawn):
        if ids.fail_at in drawn:
            raise KeyboardInterrupt
        ids.extend(drawn.tolist())
        return finish(scores, drawn)

    monkeypatch.setattr(irreducible, "_losses", record)
    return ids


def test_an_interrupted_table_goes_on_where_it_stopped(tmp_path, scored, table):
    every = sorted(examples()["example_id"][:])
    scored.fail_at = every[25]  # in the third shard of 10 rows
    with pytest.raises(KeyboardInterrupt):
        compute(output_dir=tmp_path / "t")
    assert scored == every[: len(scored)] and 20 <= len(scored) <= 25
    assert [path.name for path in tmp_path.iterdir()] == ["t.partial"]
    with pytest.raises(ValueError, match=r"beginning of what was made with other settings \(label_smoothing: 0.0, "):
        compute(output_dir=tmp_path / "t", label_smoothing=0.1)
    scored.clear()
    scored.fail_at = None
    resumed = compute(output_dir=tmp_path / "t")
    assert scored == every[20:]
    whole = compute()
    assert resumed[:] == whole[:]  # to the bit
    assert [path.name for path in tmp_path.iterdir()] == ["t"]

    scored.clear()
    assert compute(output_dir=tmp_path / "t")[:] == resumed[:]
    assert not scored  # it was there
    with pytest.raises(
        ValueError, match=r"holds a table made with other settings \(model_weights: .*name another folder"
    ):
        compute(bert(1), output_dir=tmp_path / "t")


KILLED = """
    import os, signal, sys
    sys.path.insert(0, sys.argv[1])
    import rho_loss.test_irreducible as tests
    from hf_efx.rho_loss.irreducible_table import Shards

    write = Shards.write

    def kill_in_the_third(self, shard, *arrays):
        if shard == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, shard, *arrays)

    Shards.write = kill_in_the_third
    tests.compute(output_dir=sys.argv[2])
"""


def test_a_killed_table_goes_on_where_it_stopped(tmp_path, scored, run_python):
    with pytest.raises(RuntimeError, match="status -9"):
        run_python(KILLED, args=[Path(__file__).parents[1], tmp_path / "t"])
    kept = sorted(path.name for path in (tmp_path / "t.partial").iterdir())
    assert kept == ["settings.json", "shard-000000.arrow", "shard-000001.arrow"]
    resumed = compute(output_dir=tmp_path / "t")
    assert scored == sorted(examples()["example_id"][:])[20:]
    assert resumed[:] == compute()[:]


def test_a_loss_that_is_not_finite_names_the_example():
    model, dataset = bert(), examples()
    token = max(dataset[5]["input_ids"])
    model.bert.embeddings.word_embeddings.weight.data[token] = float("inf")
    bad = [row["example_id"] for row in dataset if token in row["input_ids"]]
    with pytest.raises(ValueError, match=f"isn't finite, of example_id ({'|'.join(map(str, bad))})") as error:
        compute(model, dataset)
    assert "precision=None" in str(error.value)


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        (Dataset.from_dict({"input_ids": [[1]]}), {}, "dataset has no column 'example_id'"),
        (Dataset.from_dict({"example_id": [1, 1]}), {}, "ids stand twice in column 'example_id': 1"),
        (Dataset.from_dict({"example_id": [1.0]}), {}, "are double, not int64"),
        (examples().select([]), {}, r"len\(dataset\)=0: it must be at least 1"),
        (examples(), {"batch_size": 0}, "batch_size=0: it must be at least 1"),
        (examples(), {"save_every": 0}, "save_every=0: it must be at least 1"),
        (examples(), {"fingerprint_columns": ["sentence"]}, "no column 'sentence', which its fingerprint"),
        (
            examples().remove_columns("input_ids"),
            {},
            "none of the columns example_id, label, text is an input of Bert",
        ),
    ],
)
def test_unusable_input_is_refused(dataset, options, message):
    with pytest.raises(ValueError, match=message):
        compute_irreducible_losses(bert(), dataset, data_collator=pad, **options)


def several_labels(features):
    batch = pad([{**feature, "label": 0} for feature in features])
    return batch | {"labels": torch.tensor([feature["labels"] for feature in features])}


def masked(features):
    """Other labels each time, as DataCollatorForLanguageModeling makes them."""
    batch = pad(features)
    return batch | {"labels": torch.randint(2, (len(features),))}


MULTI_LABEL = examples().remove_columns("label").add_column("labels", [[1.0, 0.0]] * ROWS)


@pytest.mark.parametrize(
    ("problem", "dataset", "collator", "message"),
    [
        ("multi_label_classification", MULTI_LABEL, several_labels, "task=None: several labels an example"),
        (None, MULTI_LABEL, several_labels, r"labels of shape \[32, 2\]: several labels an example"),
        (None, examples(), masked, "data_collator=masked .* makes other labels of the same rows each time"),
        (None, examples(labels=False), DataCollatorWithFlattening(), "rows hold several examples each"),
        (
            None,
            examples(labels=False),
            DataCollatorWithFlattening(return_position_ids=False),
            "made 1 rows of 32 examples: they can't be told apart",
        ),
    ],
)
def test_rows_that_can_not_be_scored_are_refused_before_any_work(tmp_path, problem, dataset, collator, message):
    model = bert()
    model.config.problem_type = problem
    with pytest.raises(ValueError, match=message):
        compute(model, dataset, data_collator=collator, output_dir=tmp_path / "t")
    assert not list(tmp_path.iterdir())


def test_a_model_with_another_loss_of_its_own_is_refused():
    class Weighted(BertForSequenceClassification):
        def forward(self, input_ids, attention_mask, labels=None):
            outputs = super().forward(input_ids, attention_mask, labels=labels)
            return {**outputs, "loss": 2 * outputs["loss"]} if "loss" in outputs else outputs

    with pytest.raises(ValueError, match="Weighted computes a loss of .* for a batch whose mean classification loss"):
        compute(Weighted(bert().config))


class AlwaysLoss(torch.nn.Module):
    """Its labels have a default, and it fails without them."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(50, 2)

    def forward(self, input_ids, attention_mask, labels=None):
        logits = (self.embedding(input_ids) * attention_mask[..., None]).sum(1)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class AlwaysTuple(AlwaysLoss):
    def forward(self, input_ids, attention_mask, labels=None):
        return tuple(super().forward(input_ids, attention_mask, labels).values())


@pytest.mark.parametrize("cls", [AlwaysLoss, AlwaysTuple])
def test_a_module_that_always_computes_its_loss_gives_a_table(cls):
    torch.manual_seed(0)
    model, dataset = cls(), examples()
    found = compute(model, dataset, task="classification")
    logits = torch.stack([model.embedding(torch.tensor(ids)).sum(0) for ids in dataset["input_ids"]])
    losses = F.cross_entropy(logits, torch.tensor(dataset["label"][:]), reduction="none")
    order = np.argsort(dataset["example_id"][:])
    np.testing.assert_allclose(found["irreducible_loss"][:], losses.detach()[order], rtol=1e-5)

"""Tasks: ids, splits and noise by hand, batches, and models that fit."""

import collections
import dataclasses

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from hf_efx.core.data.library_text import REFERENCE, labelled_library_text, standard_library_text
from hf_efx.programs.model_options import parse_overrides
from hf_efx.programs.task_data import LabelledTextCollator, accuracy, load_task, most_likely
from hf_efx.programs.tasks import SIZES, CheckpointTaskOptions, LearningTask, TaskModelOptions, TaskOptions

WORDS = ("cats purr", "dogs bark", "cows moo")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """600 rows of three animals and a split column; the first 540 are to train on."""
    path = tmp_path_factory.mktemp("text") / "animals.tsv"
    rows = [
        f"{'train' if i < 540 else 'validation'}\t{WORDS[i % 3].split()[0]}\t{WORDS[i % 3]} {i}" for i in range(600)
    ]
    path.write_text("\n".join(["split\tkind\ttext", *rows]) + "\n")
    return path


@pytest.fixture(scope="module")
def load(table):
    """Loads the table as a task."""
    base = TaskOptions(dataset=str(table), label_column="kind", vocab_size=300, block_size=16)

    def load_(**changes: object) -> LearningTask:
        return load_task(dataclasses.replace(base, **changes))  # type: ignore[arg-type]

    return load_


def ids(part) -> list[int]:
    return list(part["example_id"])


def test_ids_are_places_in_the_source_and_the_split_goes_by_them(load):
    task = load()
    assert task.labels == ("cats", "cows", "dogs") and task.name == "animals.tsv"
    train, holdout = ids(task.train), ids(task.holdout)
    assert sorted(train + holdout) == list(range(540)) and not set(train) & set(holdout)
    assert 220 < len(train) < 320 and len(task.validation) == 60
    for part in (task.train, task.holdout):
        for row in part.select(range(20)):
            assert row["text"] == f"{WORDS[row['example_id'] % 3]} {row['example_id']}"
            assert task.labels[row["label"]] == row["text"].split()[0]
    assert str(task.train.features["example_id"].dtype) == "int64"
    assert "corrupted" not in task.train.column_names


def test_the_holdout_share(load):
    whole = load(holdout_share=0.0)
    assert whole.holdout is None and ids(whole.train) == list(range(540))
    tenth = load(holdout_share=0.1)
    assert 30 < len(tenth.holdout) < 80 and set(ids(tenth.holdout)) < set(ids(load().holdout))


def test_a_part_of_the_source_keeps_ids_split_and_noise(load):
    whole, part = load(label_noise=0.3), load(label_noise=0.3, max_train_examples=100, max_eval_blocks=10)
    assert len(part.train) + len(part.holdout) == 100 and len(part.validation) == 10
    assert set(ids(part.train)) < set(ids(whole.train)) and set(ids(part.holdout)) < set(ids(whole.holdout))
    labels = dict(zip(ids(whole.train), whole.train["label"], strict=True))
    assert [labels[i] for i in ids(part.train)] == list(part.train["label"])
    spread = np.array(ids(part.train) + ids(part.holdout))
    assert spread.min() < 60 and spread.max() > 480  # not the first rows: a file may be sorted


def test_label_noise_is_marked_where_it_changed_a_label(load):
    clean, noisy, other = load(), load(label_noise=0.5), load(label_noise=0.5, label_noise_seed=1)
    assert ids(clean.train) == ids(noisy.train)
    for name in ("train", "holdout"):
        before, after = np.array(getattr(clean, name)["label"]), np.array(getattr(noisy, name)["label"])
        assert (before != after).tolist() == list(getattr(noisy, name)["corrupted"])
        # Half are redrawn, a third of these to what they were: 1/3 are changed, 18 of 270 is three deviations.
        assert abs((before != after).mean() - 1 / 3) < 0.09
    assert list(noisy.train["corrupted"]) != list(other.train["corrupted"])
    assert list(noisy.validation["label"]) == list(clean.validation["label"])
    drawn = collections.Counter(noisy.train["label"][i] for i, is_so in enumerate(noisy.train["corrupted"]) if is_so)
    assert set(drawn) == {0, 1, 2}
    everything = load(label_noise=1.0)
    assert abs(np.mean(everything.train["corrupted"]) - 2 / 3) < 0.1


def test_a_causal_task_redraws_all_tokens_of_a_noisy_example(table):
    options = TaskOptions(task="causal_lm", dataset=str(table))
    clean, noisy = load_task(options), load_task(dataclasses.replace(options, label_noise=0.2))
    assert ids(clean.train) == ids(noisy.train) and clean.metric == "perplexity" and not clean.higher_is_better
    tokens = {name: [list(row) for row in task.train["input_ids"]] for name, task in (("c", clean), ("n", noisy))}
    changed = [a != b for a, b in zip(tokens["c"], tokens["n"], strict=True)]
    assert changed == list(noisy.train["corrupted"]) and 0.1 < np.mean(changed) < 0.3
    assert list(map(len, tokens["c"])) == list(map(len, tokens["n"]))
    drawn = np.concatenate([row for row, is_so in zip(tokens["n"], changed, strict=True) if is_so])
    assert drawn.max() > 200 and drawn.min() < 32  # of all 257, not of the text's
    row = clean.train[5]
    assert bytes(row["input_ids"][:-1]).decode() == f"{WORDS[row['example_id'] % 3]} {row['example_id']}"


def test_packed_blocks_have_ids_of_their_own(table):
    task = load_task(TaskOptions(task="causal_lm", mode="pack", block_size=32, dataset=str(table), holdout_share=0.0))
    assert ids(task.train) == list(range(len(task.train))) and set(map(len, task.train["input_ids"])) == {32}


def test_batches_have_the_class_as_label_and_masks():
    collator = LabelledTextCollator(9)
    batch = collator([{"input_ids": [1, 2, 3], "label": 2, "text": "x"}, {"input_ids": [4], "label": 0, "text": "y"}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]] and batch["labels"].tolist() == [2, 0]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]] and set(batch) == {
        "input_ids",
        "attention_mask",
        "labels",
    }


def test_accuracy_by_hand():
    logits = torch.tensor([[0.0, 1.0], [2.0, 1.0], [0.0, 3.0]])
    best = most_likely((logits, "hidden states"), torch.zeros(3))
    assert best.tolist() == [1, 0, 1] and most_likely(logits, torch.zeros(3)).equal(best)
    assert accuracy(EvalPrediction(best.numpy(), np.array([1, 1, 1]))) == {"accuracy": pytest.approx(2 / 3)}


def test_equal_seeds_give_equal_models_with_the_task_s_classes(load):
    task = load()
    one, same, other = (task.model_init(seed, size="tiny") for seed in (0, 0, 1))
    assert all(a.equal(b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not one.classifier.weight.equal(other.classifier.weight)  # pyright: ignore
    assert one.config.id2label == {0: "cats", 1: "cows", 2: "dogs"} and one.config.vocab_size == 300
    assert one.config.pad_token_id == task.tokenizer.pad_token_id  # pyright: ignore
    assert one.num_parameters() < task.model_init(0).num_parameters()


def test_texts_begin_and_end_with_the_special_token(load):
    task = load()
    end = task.tokenizer.eos_token_id
    assert all(row[0] == end and row[-1] == end and len(row) <= 16 for row in task.train["input_ids"])


def test_side_models(load, tmp_path):
    task = load()
    assert task.side_model("tiny", 0).num_parameters() == task.model_init(0, size="tiny").num_parameters()
    written = task.side_model("bert:hidden_size=8,num_hidden_layers=1,num_attention_heads=2,intermediate_size=8", 0)
    assert written.config.hidden_size == 8 and written.config.num_labels == 3
    written.save_pretrained(tmp_path)
    task.save_processor(tmp_path)
    loaded = task.side_model(str(tmp_path), 5)
    assert all(a.equal(b) for a, b in zip(loaded.parameters(), written.parameters(), strict=True))
    load(vocab_size=400).save_processor(tmp_path)
    with pytest.raises(ValueError, match="has another tokenizer than the task"):
        task.side_model(str(tmp_path), 0)
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        task.side_model("./not-there", 0)


def test_a_checkpoint_takes_no_overrides_and_may_get_a_new_head(load, tmp_path):
    task = load()
    task.model_init(0, size="tiny").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is for a model from scratch"):
        task.model_init(0, TaskModelOptions(model_name_or_path=str(tmp_path), config_overrides="hidden_size=8"))


def test_the_task_of_a_checkpoint_and_what_was_not_trained_for_it(load, tmp_path):
    task = load(max_train_examples=20)
    task.model_init(seed=0).save_pretrained(tmp_path / "bert")
    options = CheckpointTaskOptions(block_size=8)
    found = options.of_checkpoint(str(tmp_path / "bert"))
    assert found == CheckpointTaskOptions(block_size=8, task="text_classification", holdout_share=0.0)
    assert CheckpointTaskOptions(task="causal_lm").of_checkpoint(str(tmp_path / "bert")).task == "causal_lm"
    checkpoint = TaskModelOptions(model_name_or_path=str(tmp_path / "bert"))
    assert task.model_init(0, checkpoint, trained=True).num_labels == len(task.labels)
    other = dataclasses.replace(task, labels=("a", *task.labels))
    assert other.model_init(0, checkpoint).num_labels == len(other.labels)
    with pytest.raises(ValueError, match=r"BertForSequenceClassification, has no 'classifier.* would be random"):
        other.model_init(0, checkpoint, trained=True)
    task.model_init(0).bert.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"bare' was saved as BertModel, which doesn't tell its task: .* --task"):
        options.of_checkpoint(str(tmp_path / "bare"))
    with pytest.raises(ValueError, match="saved as BertModel, has no 'classifier"):
        task.model_init(0, TaskModelOptions(model_name_or_path=str(tmp_path / "bare")), trained=True)


def test_images_fit_their_model():
    task = load_task(TaskOptions(task="image_classification", label_noise=0.1))
    train = task.train
    assert len(task.labels) == 10 and task.tokenizer is None and "corrupted" in train.column_names
    assert 0.04 < np.mean(train["corrupted"]) < 0.15
    batch = task.data_collator(train.__getitems__([0, 1, 2]))
    for options in (
        None,
        TaskModelOptions(
            model_type="vit",
            config_overrides="patch_size=4,hidden_size=8,num_hidden_layers=1,num_attention_heads=2,intermediate_size=8",
        ),
    ):
        model = task.model_init(0, options).eval()
        assert model(**batch).logits.shape == (3, 10)
    assert abs(float(task.data_collator(train.__getitems__(range(500)))["pixel_values"].mean())) < 0.1


def test_the_library_s_text_is_labelled_by_its_part():
    rows = labelled_library_text(5)
    counts = collections.Counter(part for part, _ in rows)
    assert len(counts) == 5 and REFERENCE in counts and max(counts.values()) < 0.5 * len(rows)
    everything = {text for texts in standard_library_text().values() for text in texts}
    assert {text for _, text in rows} < everything
    task = load_task(TaskOptions(max_train_examples=200, block_size=32, vocab_size=300))
    assert len(task.labels) == 10 and not {*task.train["text"], *task.holdout["text"]} & set(task.validation["text"])  # pyright: ignore


def test_lists_in_overrides():
    assert parse_overrides("hidden_sizes=[16,32],depths=[1, 1],a=1e-3") == {
        "hidden_sizes": [16, 32],
        "depths": [1, 1],
        "a": "1e-3",
    }


@pytest.mark.parametrize(
    "text, words",
    [
        (
            "split\tkind\ttext\ntrain\ta\tone\ntrain\tb\ttwo\nvalidation\tc\tthree\n",
            "holds 'c' in the validation split",
        ),
        (
            "split\tkind\ttext\n" + "".join(f"train\tk{i}\tword {i}\n" for i in range(9)) + "validation\tk0\tx\n",
            "holds 9 labels in 9 rows",
        ),
        (
            "split\tsort\ttext\ntrain\ta\tone\ntrain\tb\ttwo\nvalidation\ta\tthree\n",
            "has no label_column='kind'; it has sort, text",
        ),
    ],
)
def test_labels_that_cannot_be_used(tmp_path, text, words):
    (tmp_path / "t.tsv").write_text(text)
    with pytest.raises(ValueError) as caught:
        load_task(TaskOptions(dataset=str(tmp_path / "t.tsv"), label_column="kind", vocab_size=300))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"holdout_share": 1.0}, "holdout_share=1.0"),
        ({"label_noise": -0.1}, "label_noise=-0.1"),
        ({"max_train_examples": 1}, "max_train_examples=1"),
        ({"image_size": 0}, "image_size=0"),
        ({"tokenizer": "x", "vocab_size": 300}, "exclude each other"),
    ],
)
def test_options_out_of_range(options, words):
    with pytest.raises(ValueError, match=words):
        TaskOptions(**options)


def test_an_empty_part_is_refused(load):
    with pytest.raises(ValueError, match="leaves one part of 2 examples empty"):
        load(max_train_examples=2, holdout_share=0.001)


def test_every_task_has_both_sizes():
    assert {name: set(sizes) for name, sizes in SIZES.items()} == dict.fromkeys(SIZES, {"small", "tiny"})

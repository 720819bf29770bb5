"""RHOLossTrainer on texts: padding, token granularity, Seq2SeqTrainer, trl's SFTTrainer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from hf_efx.rho_loss.arguments import RHOLossArgumentsMixin
from hf_efx.rho_loss.irreducible import compute_irreducible_losses
from hf_efx.rho_loss.trainer import RHOLossMixin, RHOLossTrainer
from rho_loss.runs import assert_same, logs, weights
from rho_loss.texts import TokenRecorder, gpt2, table, text_trainer, texts, tokenizer


class TokenTrainer(TokenRecorder, RHOLossTrainer):
    pass


def token_losses(model: Any, row: dict[str, Any]) -> list[tuple[int, float]]:
    """Position of each valid label but the first, and its loss, of one row alone."""
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
    with torch.no_grad():
        log_probs = model(input_ids=ids).logits[0].log_softmax(-1)
    return [(t, -log_probs[t - 1, labels[t]].item()) for t in range(1, len(labels)) if labels[t] != -100]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_padding_is_trimmed_to_what_was_chosen(side: str, accumulation: int, tmp_path: Path) -> None:
    run = text_trainer(tmp_path, side, cls=TokenTrainer, gradient_accumulation_steps=accumulation, max_steps=4)
    run.train()
    lengths = {row["example_id"]: len(row["input_ids"]) for row in texts()}
    ids = [i for step in range(4) for i in run.ids[step]]
    assert [batch["input_ids"].shape[0] for batch in run.batches] == [4] * 4 * accumulation
    for batch in run.batches:
        mine, ids = ids[:4], ids[4:]
        assert batch["attention_mask"].sum(1).tolist() == [lengths[i] for i in mine]
        assert batch["input_ids"].shape[1] == max(lengths[i] for i in mine)
        assert (batch["input_ids"][batch["attention_mask"] == 0] == 0).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_are_mean_token_losses(side: str, tmp_path: Path) -> None:
    model = gpt2()
    means = {}
    for row in texts():
        each = [loss for _, loss in token_losses(model, row)]
        means[row["example_id"]] = sum(each) / len(each)
    run = text_trainer(tmp_path, side, model, selection="loss", max_steps=1)
    run.train()
    torch.testing.assert_close(run.scores[0], torch.tensor([means[i] for i in run.ids[0]]), atol=1e-5, rtol=0)


def test_ratio_1_of_a_language_model_is_the_plain_trainer(tmp_path: Path) -> None:
    options = {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 10}
    collator = DataCollatorForSeq2Seq(tokenizer())
    fixed = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "learning_rate": 0.02}
    plain = Trainer(
        gpt2(dropout=0.1),
        TrainingArguments(str(tmp_path), **fixed, **options),  # type: ignore[arg-type]
        train_dataset=texts(),  # type: ignore[arg-type]
        data_collator=collator,
    )
    plain.train()
    for granularity in ("example", "token"):
        run = text_trainer(tmp_path, model=gpt2(dropout=0.1), selection_ratio=1.0, granularity=granularity, **options)
        run.data_collator = collator
        run.train()
        assert_same(weights(run), weights(plain))


# --- tokens


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_best_tokens_are_trained_on(side: str, tmp_path: Path) -> None:
    """Over the step's two micro-batches together, by loss less irreducible loss, computed row by row."""
    model, data = gpt2(), {row["example_id"]: row for row in texts()}
    losses = table("token", side)
    irreducible = {row["example_id"]: row["irreducible_loss"] for row in losses}
    scores = {}
    for i, row in data.items():
        for (t, loss), less in zip(token_losses(model, row), irreducible[i], strict=True):
            scores[i, t] = loss - less
    options = {"granularity": "token", "gradient_accumulation_steps": 2, "max_steps": 1, "selection_ratio": 0.3}
    run = text_trainer(tmp_path, side, model, cls=TokenTrainer, irreducible_losses=losses, **options)
    run.train()
    mine = {place: score for place, score in scores.items() if place[0] in run.ids[0]}
    assert len(run.ids[0]) == 8
    best = set(sorted(mine, key=lambda place: -mine[place])[: int(0.3 * len(mine))])
    trained, ids = set(), run.ids[0]
    for batch in run.batches:
        for row, i in zip(range(4), ids[:4], strict=True):
            kept = batch["labels"][row][batch["attention_mask"][row] == 1]
            trained |= {(i, t) for t in (kept != -100).nonzero()[:, 0].tolist()}
            assert [t for t in range(len(kept)) if kept[t] not in (-100, data[i]["labels"][t])] == []
        ids = ids[4:]
    assert trained == best


def test_token_selection_trains_on_the_mean_over_the_chosen(tmp_path: Path) -> None:
    run = text_trainer(tmp_path, cls=TokenTrainer, granularity="token", selection_ratio=0.3, max_steps=1)
    model = gpt2()
    run.train()
    (batch,) = run.batches
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert logs(run, "loss") == pytest.approx([expected.item()], rel=1e-4)
    assert 0 < logs(run, "rho_loss/drawn_right_share")[0] < 1


@pytest.mark.parametrize("granularity", ["example", "token"])
def test_smoothing_accumulation_and_padding_together(granularity: str, tmp_path: Path) -> None:
    """The step is the gradient of the smoothed mean over all targets of all micro-batches."""
    options = {"granularity": granularity, "label_smoothing_factor": 0.1, "gradient_accumulation_steps": 3}
    sgd = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    run = text_trainer(tmp_path, cls=TokenTrainer, selection="loss", **options, **sgd, max_steps=1)
    model = gpt2()
    run.train()
    total, count = torch.zeros(()), 0
    for batch in run.batches:
        labels = batch.pop("labels")[:, 1:].flatten()
        logits = model(**batch).logits[:, :-1].flatten(0, 1)
        total = total + F.cross_entropy(logits, labels, label_smoothing=0.1, reduction="sum")
        count += int((labels != -100).sum())
    assert len(run.batches) == 3
    (total / count).backward()
    trained = dict(run.model.named_parameters())
    for name, start in gpt2().named_parameters():
        torch.testing.assert_close(start - trained[name], model.get_parameter(name).grad, rtol=1e-4, atol=1e-6)


def test_flattened_batches_are_refused_before_the_first_step(tmp_path: Path) -> None:
    """Several examples in one row have one id and one score: refused by example, by token and in a table."""
    for granularity in ("example", "token"):
        options = {"granularity": granularity, "selection": "loss", "max_steps": 1}
        run = text_trainer(tmp_path, cls=TokenTrainer, **options)
        run.data_collator = DataCollatorWithFlattening()
        with pytest.raises(ValueError, match="rows hold several examples each"):
            run.train()
        assert run.state.global_step == 0 and run.ids == {}
        with pytest.raises(ValueError, match="rows hold several examples each"):
            compute_irreducible_losses(gpt2(), texts(), data_collator=run.data_collator, granularity=granularity)


def test_flattened_batches_without_positions_are_refused_too(tmp_path: Path) -> None:
    for options in ({"granularity": "example"}, {"granularity": "token"}, {"selection": "uniform"}):
        run = text_trainer(tmp_path, cls=TokenTrainer, **{"selection": "loss", "max_steps": 1, **options})
        run.data_collator = DataCollatorWithFlattening(return_position_ids=False)
        with pytest.raises(ValueError, match="the data collator made 1 rows of . examples"):
            run.train()
        assert run.state.global_step == 0 and run.ids == {}


@dataclass
class MaskingCollator:
    """Labels of other tokens each time, as DataCollatorForLanguageModeling makes them."""

    inner: Any

    def __call__(self, features: Any) -> Any:
        batch = self.inner(features)
        batch["labels"] = batch["labels"].where(torch.rand(batch["labels"].shape) < 0.5, -100)
        return batch


def test_masks_drawn_anew_are_refused_where_a_table_is_read(tmp_path: Path) -> None:
    run = text_trainer(tmp_path, max_steps=1)
    run.data_collator = MaskingCollator(run.data_collator)
    with pytest.raises(ValueError, match="data_collator=MaskingCollator .* makes other labels of the same rows each"):
        run.train()
    assert run.state.global_step == 0
    run = text_trainer(tmp_path, max_steps=1, selection="loss")  # scores the very batch that it trains on
    run.data_collator = MaskingCollator(run.data_collator)
    run.train()


def test_random_tokens(tmp_path: Path) -> None:
    run = text_trainer(tmp_path, cls=TokenTrainer, granularity="token", selection="uniform", max_steps=2)
    run.train()
    counts = [(batch["labels"] != -100).sum().item() for batch in run.batches]
    lengths = {row["example_id"]: len(token_losses(gpt2(), row)) for row in texts()}
    assert counts == [sum(lengths[i] for i in run.ids[step]) // 2 for step in range(2)]


# --- other Trainers


class RHOLossSeq2SeqTrainer(TokenRecorder, RHOLossMixin, Seq2SeqTrainer):
    pass


@dataclass
class RHOLossSeq2SeqArguments(RHOLossArgumentsMixin, Seq2SeqTrainingArguments):
    pass


@pytest.mark.parametrize("granularity", ["example", "token"])
def test_seq2seq(granularity: str, tmp_path: Path) -> None:
    config = T5Config(
        vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    options = RHOLossSeq2SeqArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=4, selection_ratio=0.5, selection="loss", report_to=[],
        use_cpu=True, disable_tqdm=True, save_strategy="no", granularity=granularity, predict_with_generate=True,
        generation_max_length=4, gradient_accumulation_steps=2, logging_steps=1,
    )  # fmt: skip
    trainer = RHOLossSeq2SeqTrainer(
        T5ForConditionalGeneration(config), options, train_dataset=texts(), eval_dataset=texts(8),
        data_collator=DataCollatorForSeq2Seq(tokenizer()), processing_class=tokenizer(),
    )  # fmt: skip
    trainer.train()
    assert [len(ids) for ids in trainer.ids.values()] == [8] * 4
    data = {row["example_id"]: row for row in texts()}
    ids = [i for step in range(4) for i in trainer.ids[step]]
    for batch in trainer.batches[:8]:
        for row in range(4):
            full = data[ids.pop(0)]["labels"]
            kept = [label for label in batch["labels"][row].tolist() if label != -100]
            if granularity == "example":
                assert kept == [label for label in full if label != -100]
            else:  # what was left out is still what the decoder reads
                reads = batch["decoder_input_ids"][row].tolist()
                assert reads[1 : len(full)] == [max(label, 0) for label in full[:-1]]
    assert trainer.evaluate()["eval_loss"] > 0


class RHOLossSFTTrainer(TokenRecorder, RHOLossMixin, SFTTrainer):
    pass


@dataclass
class RHOLossSFTConfig(RHOLossArgumentsMixin, SFTConfig):
    pass


def sft(folder: Path, dataset: Any = None, **options: Any) -> RHOLossSFTTrainer:
    fixed = {"max_steps": 4, "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    fixed |= {"activation_checkpointing": False, "bf16": False, "selection_ratio": 0.5, "logging_steps": 1}
    config = RHOLossSFTConfig(str(folder), per_device_train_batch_size=4, **{**fixed, **options})  # type: ignore
    dataset = texts() if dataset is None else dataset
    return RHOLossSFTTrainer(gpt2(), config, train_dataset=dataset, processing_class=tokenizer())


@pytest.mark.parametrize("granularity", ["example", "token"])
def test_trls_sft_trainer(granularity: str, tmp_path: Path) -> None:
    run = sft(tmp_path, selection="loss", granularity=granularity, gradient_accumulation_steps=2)
    run.train()
    assert [len(ids) for ids in run.ids.values()] == [8] * 4
    assert len(logs(run, "mean_token_accuracy")) == 4 and logs(run, "loss")[0] > 1
    lengths = {row["example_id"]: len(row["input_ids"]) for row in texts()}
    widths = [batch["attention_mask"].sum(1).tolist() for batch in run.batches]
    assert sum(widths, []) == [lengths[i] for step in range(4) for i in run.ids[step]]


def test_trls_sft_trainer_on_raw_text(tmp_path: Path) -> None:
    """The ids pass through trl's preparation of the data."""
    rows = {"text": [f"w{i % 14 + 2} w{i % 5 + 2}" for i in range(32)], "example_id": list(range(500, 532))}
    run = sft(tmp_path, dataset=Dataset.from_dict(rows), selection="loss")
    run.train()
    assert {i for ids in run.ids.values() for i in ids} <= set(range(500, 532))


@pytest.mark.parametrize("option", ["packing", "padding_free"])
def test_packed_rows_are_refused(option: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{option}=True puts several examples into one row"):
        sft(tmp_path, selection="loss", max_length=None if option == "padding_free" else 8, **{option: True})

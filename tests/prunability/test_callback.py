"""PrunabilityCallback: figures, model selection, early stopping, cost, and a training that it doesn't change."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_efx import PrunabilityCallback, measure_prunability
from prunability.networks import Digits, digits


def data(count: int = 120) -> Dataset:
    pixels, labels = digits(count)
    return Dataset.from_dict({"pixel_values": pixels.tolist(), "labels": labels.tolist()})


def run(tmp_path, callbacks, kind=Trainer, model=None, own_loss=None, **options) -> Trainer:
    torch.manual_seed(0)
    arguments = {"max_steps": 12, "eval_steps": 4, "save_steps": 4, "learning_rate": 0.01, **options}
    args = TrainingArguments(
        str(tmp_path),
        eval_strategy="steps",
        per_device_train_batch_size=20,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **arguments,
    )
    rows = data()
    parts = {"train_dataset": rows, "eval_dataset": rows.select(range(20)), "callbacks": callbacks}
    trainer = kind(model or Digits(16), args, **parts, **({} if own_loss is None else {"compute_loss_func": own_loss}))
    trainer.train()
    return trainer


def test_figures_at_evaluations_and_a_training_unchanged(tmp_path):
    callback = PrunabilityCallback(data(), samples=100, task="classification", batch_size=50)
    trainer = run(tmp_path / "with", [callback])
    plain = run(tmp_path / "without", [])
    assert trainer.model is not None and plain.model is not None
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), plain.model.parameters(), strict=True))
    rows = [row for row in trainer.state.log_history if "eval_loss" in row]
    assert [step for step, _ in callback.results] == [4, 8, 12] == [row["step"] for row in rows]
    for (_, result), row in zip(callback.results, rows, strict=True):
        assert row["eval_prunability"] == result.fraction and row["eval_prunability_loss"] == result.loss
        assert row["eval_prunability_low"] <= result.fraction <= row["eval_prunability_high"] + 1e-12


def test_an_evaluation_costs_at_most_15_forwards(tmp_path):
    callback = PrunabilityCallback(data(), samples=100, task="classification", batch_size=100)
    calls = []
    torch.manual_seed(0)
    model = Digits(16)
    model.register_forward_hook(lambda *_: calls.append(1))
    state = Trainer(model, TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)).state
    metrics: dict[str, float] = {}
    for _ in range(2):  # two data sets evaluated at one step
        callback.on_evaluate(None, state, None, model=model, metrics=metrics)  # pyright: ignore
    assert 0 < len(calls) <= 15 and len(callback.results) == 1 and 0 < metrics["eval_prunability"] <= 1


def test_the_figure_is_of_the_weights_at_hand(tmp_path):
    """Another run of the same Trainer, as in a search, and weights that change while no step is made."""
    callback = PrunabilityCallback(data(), samples=40, task="classification")
    trainer = run(tmp_path, [callback], max_steps=4)
    first = callback.results
    trainer.args.learning_rate = 0.0001
    torch.manual_seed(1)
    trainer.model_init = lambda: Digits(16)  # pyright: ignore
    trainer.train()
    model: Any = trainer.model
    ((step, result),) = callback.results
    assert step == 4 and result == measure_prunability(model, callback.losses) != first[0][1]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data.mul_(0.5)
    assert trainer.evaluate()["eval_prunability_loss"] != result.loss


def test_the_most_prunable_checkpoint_is_loaded_and_training_stops(tmp_path):
    answers = [0.9, 0.3, 0.5, 0.6, 0.7]  # at each evaluation so many weights are needed

    def losses(model):
        weights = torch.cat([p.flatten() for p in model.parameters() if p.dim() == 2])
        kept = float((weights != 0).float().mean())
        return torch.ones(3) if kept > answers[len(callback.results)] - 0.002 else torch.full((3,), 2.0)

    callback = PrunabilityCallback(losses)
    trainer = run(
        tmp_path,
        [callback, EarlyStoppingCallback(2)],
        max_steps=20,
        load_best_model_at_end=True,
        metric_for_best_model="prunability",
        greater_is_better=False,
    )
    assert [result.fraction for _, result in callback.results] == [0.9, 0.3, 0.5, 0.6]
    assert trainer.state.global_step == 16  # two evaluations without a better one
    assert trainer.state.best_metric == 0.3
    assert str(trainer.state.best_model_checkpoint).endswith("checkpoint-8")


def test_label_smoothing_of_the_run_counts(tmp_path):
    callback = PrunabilityCallback(data(40), task="classification")
    torch.manual_seed(0)
    model, args = Digits(16), TrainingArguments(str(tmp_path), label_smoothing_factor=0.2, report_to=[], use_cpu=True)
    callback.on_train_begin(args, TrainerState(), TrainerControl(), model=model)
    callback.on_evaluate(args, TrainerState(), TrainerControl(), model=model)
    pixels, labels = digits(40)
    loss = torch.nn.functional.cross_entropy(model(pixels)["logits"], labels, label_smoothing=0.2)
    assert callback.results[-1][1].loss == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("losses", "options", "message"),
    [
        (data().select([]), {}, "dataset is empty"),
        (data(), {"criterion": "size"}, "criterion='size'"),
        (data(), {"tolerance": -1}, "tolerance=-1"),
        (torch.sum, {"samples": 10}, "samples: only for a data set"),
    ],
)
def test_bad_input_shows_at_construction(losses, options, message):
    with pytest.raises(ValueError, match=message):
        PrunabilityCallback(losses, **options)


def test_what_cant_be_measured_ends_training_before_its_first_step(tmp_path):
    steps = []

    class Steps(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            steps.append(1)

    def losses(model):
        raise RuntimeError("told to fail")

    with pytest.raises(RuntimeError, match="told to fail"):
        run(tmp_path, [PrunabilityCallback(losses), Steps()])
    with pytest.raises(ValueError, match="Digits doesn't say which loss it computes; name the task"):
        run(tmp_path, [PrunabilityCallback(data()), Steps()])
    assert not steps


class Classifier(BertForSequenceClassification):
    """Says by its class which loss it computes; of pixels."""

    def __init__(self) -> None:
        sizes = {"hidden_size": 4, "num_hidden_layers": 0, "num_attention_heads": 1, "intermediate_size": 4}
        super().__init__(BertConfig(vocab_size=4, num_labels=10, **sizes))
        self.layers = nn.Linear(64, 10)

    def forward(self, pixel_values, labels=None, **kwargs):  # pyright: ignore
        logits = self.layers(pixel_values)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class FocalTrainer(Trainer):
    """As the docs show it: the labels are there, and the model's own loss is left aside."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = focal(outputs, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


def focal(outputs, labels, num_items_in_batch=None):
    losses = F.cross_entropy(outputs["logits"], labels, reduction="none")
    return ((1 - torch.exp(-losses)) * losses).mean()


class LoggedTrainer(Trainer):
    """Overrides compute_loss, and trains on the model's loss."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("own", [{"own_loss": focal}, {"kind": FocalTrainer}])
def test_a_loss_of_the_trainers_own_is_refused_before_the_first_step(tmp_path, own, caplog):
    model = Classifier()
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match="doesn't train on the loss that the model returns.*give PrunabilityCallback"):
        run(tmp_path, [PrunabilityCallback(data(40))], model=model, **own)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not model._forward_hooks
    run(tmp_path, [PrunabilityCallback(data(40), task="classification")], model=model, max_steps=1, **own)
    assert "is measured by the loss of task='classification'" in caplog.text
    assert not model._forward_hooks


@pytest.mark.parametrize(
    "own", [{}, {"kind": LoggedTrainer}, {"gradient_accumulation_steps": 2}, {"label_smoothing_factor": 0.1}]
)
def test_the_models_own_loss_is_taken_without_a_word(tmp_path, own, caplog):
    callback = PrunabilityCallback(data(40))
    model = Classifier()
    run(tmp_path, [callback], model=model, max_steps=2, eval_steps=1, **own)
    assert len(callback.results) == 2 and "doesn't train on the loss" not in caplog.text
    assert not model._forward_hooks


def test_a_loss_of_another_model_shows_when_training_begins(tmp_path):
    other, (pixels, labels) = Digits(16), digits(20)
    with pytest.raises(ValueError, match="computes it with another model"):
        run(tmp_path, [PrunabilityCallback(lambda _: other(pixels, labels)["loss"])])

"""Cross-fit irreducible losses: who trains, who scores, which checkpoint, by which id, and resuming."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, Features, List, Value
from torch import nn
from transformers import (
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    default_data_collator,
)

from hf_efx.core.data.tables import IdIndex, settings_of
from hf_efx.rho_loss import cross_fit
from hf_efx.rho_loss.cross_fit import cross_fit_irreducible_losses, deal_folds, refuse_scored
from hf_efx.rho_loss.irreducible import Scoring
from hf_efx.rho_loss.irreducible_table import IrreducibleLosses, load_irreducible_losses
from hf_efx.rho_loss.side_models import train_irreducible_model

ROWS = 60


def examples(rows: int = ROWS, classes: int = 3) -> Dataset:
    """Ids that aren't contiguous and stand in no order, as a half of another data set has them; x knows the id."""
    draw = np.random.default_rng(0)
    ids = draw.permutation(rows) * 2 + 100
    x = np.stack([ids, *draw.standard_normal((3, rows))], 1).astype(np.float32)
    features = Features({"example_id": Value("int64"), "x": List(Value("float32")), "label": Value("int64")})
    return Dataset.from_dict({"example_id": ids, "x": x, "label": draw.integers(0, classes, rows)}, features)


class Recorder(nn.Module):
    """Its loss for an example is log(1 + exp(-id / 100)), and 0 once it was trained on it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.register_buffer("seen", torch.zeros(1000, dtype=torch.bool))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        ids = x[:, 0].long()
        if self.training:
            self.seen[ids] = True  # type: ignore[index]
        margin = torch.where(self.seen[ids], 1000.0, x[:, 0] / 100)  # type: ignore[index]
        logits = torch.zeros(len(x), 3).index_put((torch.arange(len(x)), labels), margin + 0 * self.weight)
        logits = logits.index_put((torch.arange(len(x)), (labels + 1) % 3), torch.full((len(x),), -1000.0))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.layer(x[:, 1:])
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    options = {"num_train_epochs": 3, "per_device_train_batch_size": 4, "learning_rate": 0.1} | options
    return TrainingArguments(str(folder), use_cpu=True, report_to=[], disable_tqdm=True, **options)


def cross_fit_table(folder: Path, model_init: Any = Linear, dataset: Dataset | None = None, **options: Any) -> Dataset:
    folds = options.pop("folds", 2)
    args = arguments(folder / "unused", **options.pop("training", {}))
    dataset = dataset or examples()
    return cross_fit_irreducible_losses(model_init, dataset, folds, args=args, task="classification", **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The rows of a cross-fit without a break."""
    return cross_fit_table(tmp_path_factory.mktemp("whole"))[:]


@pytest.mark.parametrize("folds", [2, 3])
def test_every_example_is_scored_by_a_model_that_never_saw_it(tmp_path, folds, monkeypatch):
    """By the id, too: the losses say which example they are of. (The paper's code writes them by position.)"""
    monkeypatch.setattr(cross_fit, "_MERGED_AT_ONCE", 7)
    table = cross_fit_table(tmp_path, Recorder, folds=folds, training={"num_train_epochs": 1})
    ids = sorted(examples()["example_id"][:])
    assert table["example_id"][:] == ids
    expected = [math.log1p(math.exp(-i / 100)) for i in ids]
    np.testing.assert_allclose(table["irreducible_loss"][:], expected, rtol=1e-5)
    assert np.bincount(table["fold"][:]).tolist() == [ROWS // folds] * folds
    assert not list(tmp_path.iterdir())  # nothing in args.output_dir


def test_the_recorder_would_have_told(tmp_path):
    """What the test above stands on: an example that was trained on gives another loss."""
    dataset = examples()
    model = train_irreducible_model(Recorder(), arguments(tmp_path, num_train_epochs=1), dataset, dataset)
    assert model.eval()(x=torch.tensor(dataset["x"][:8]), labels=torch.tensor(dataset["label"][:8]))["loss"] == 0


def test_table_fits_its_data_and_carries_how_it_was_made(tmp_path):
    table = cross_fit_table(tmp_path, output_dir=tmp_path / "t", training={"seed": 3})
    settings = settings_of(table, "irreducible_losses")
    assert (settings["folds"], settings["stratified_by"], settings["rows"]) == (2, "label", ROWS)
    assert settings["training"]["learning_rate"] == 0.1 and settings["training"]["seed"] == 3
    assert len(set(settings["model_weights"])) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["t"]
    losses = IrreducibleLosses(load_irreducible_losses(tmp_path / "t"))
    losses.check(examples().shuffle(seed=1), task="classification", label_smoothing=0.0)
    assert losses.lookup([100]).item() == table["irreducible_loss"][0]


def test_folds_spread_classes_and_follow_ids():
    dataset = examples(rows=50)
    folds = deal_folds(dataset, 4, seed=0, label_column="label")
    assert sorted(np.bincount(folds)) == [12, 12, 13, 13]
    for label in range(3):
        counts = np.bincount(folds[np.array(dataset["label"][:]) == label], minlength=4)
        assert counts.max() - counts.min() <= 1
    order = np.random.default_rng(1).permutation(50)
    np.testing.assert_array_equal(deal_folds(dataset.select(order), 4, seed=0, label_column="label"), folds[order])
    assert (deal_folds(dataset, 4, seed=1, label_column="label") != folds).any()
    assert np.ptp(np.bincount(deal_folds(dataset, 3, seed=0))) == 1


def test_labels_of_one_class_each_are_spread_and_others_not():
    dataset = examples()
    floats = dataset.cast_column("label", Value("float32"))
    assert cross_fit._label_column(dataset, None) == "label"
    assert cross_fit._label_column(floats, None) is None  # regression
    assert cross_fit._label_column(dataset.rename_column("label", "labels"), None) == "labels"
    assert cross_fit._label_column(dataset.remove_columns("label"), None) is None
    with pytest.raises(ValueError, match="label_column='source' is no column; there are example_id, x, label"):
        cross_fit._label_column(dataset, "source")


@pytest.mark.parametrize(("folds", "rows"), [(1, 60), (0, 60), (5, 4)])
def test_too_few_folds_or_rows_are_refused(tmp_path, folds, rows):
    with pytest.raises(ValueError, match=f"folds={folds}: it must be from 2 to the number of rows, {rows}"):
        cross_fit_table(tmp_path, dataset=examples(rows), folds=folds)


def test_labels_at_random_are_refused_before_a_fold_is_trained(tmp_path):
    def masked(rows):
        return {**default_data_collator(rows), "labels": torch.randint(3, (len(rows),))}

    steps = Steps()
    with pytest.raises(ValueError, match="data_collator=masked .* makes other labels of the same rows each time"):
        cross_fit_table(tmp_path, data_collator=masked, callbacks=[steps], output_dir=tmp_path / "t")
    assert not steps.steps and not list(tmp_path.iterdir())


class Stop(TrainerCallback):
    """Interrupts the run at a step of the n-th training."""

    def __init__(self, training: int, step: int) -> None:
        self.training, self.step, self.begun = training, step, 0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begun += 1

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.begun == self.training and state.global_step == self.step:
            raise KeyboardInterrupt


class Steps(TrainerCallback):
    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(state.global_step)


def test_an_interrupted_cross_fit_goes_on_inside_its_fold(whole, tmp_path):
    """Stopped in the second fold's third epoch: the first fold isn't trained again, nor are two of the epochs."""
    with pytest.raises(KeyboardInterrupt):
        cross_fit_table(tmp_path, output_dir=tmp_path / "t", callbacks=[Stop(2, 20)])
    assert sorted(path.name for path in (tmp_path / "t.partial").iterdir()) == [
        "fold-0",
        "fold-1-training",
        "settings.json",
    ]
    with pytest.raises(ValueError, match="other settings .*'learning_rate': 0.1.*now .*'learning_rate': 0.2"):
        cross_fit_table(tmp_path, output_dir=tmp_path / "t", training={"learning_rate": 0.2})
    steps = Steps()
    resumed = cross_fit_table(tmp_path, output_dir=tmp_path / "t", callbacks=[steps])
    assert steps.steps == list(range(17, 25))  # 8 steps an epoch
    assert resumed[:] == whole  # to the bit
    assert [path.name for path in tmp_path.iterdir()] == ["t"]

    steps.steps.clear()
    assert cross_fit_table(tmp_path, output_dir=tmp_path / "t", callbacks=[steps])[:] == resumed[:]
    assert not steps.steps  # it was there


def test_a_trained_fold_is_scored_without_training_again(whole, tmp_path, monkeypatch):
    compute = cross_fit.compute_irreducible_losses
    monkeypatch.setattr(cross_fit, "compute_irreducible_losses", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cross_fit_table(tmp_path, output_dir=tmp_path / "t")
    monkeypatch.setattr(cross_fit, "compute_irreducible_losses", compute)
    steps = Steps()
    resumed = cross_fit_table(tmp_path, output_dir=tmp_path / "t", callbacks=[steps])
    assert steps.steps == list(range(1, 25))  # the second fold alone
    assert resumed[:] == whole


class Weights(TrainerCallback):
    """Keeps the loss of each evaluation, and a Linear's weights."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.weights: list[torch.Tensor] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, model: Any, **kwargs: Any) -> None:
        self.losses.append(metrics["eval_loss"])
        if isinstance(model, Linear):
            self.weights.append(model.layer.weight.detach().clone())


@pytest.mark.parametrize("strategy", [{}, {"eval_strategy": "steps", "eval_steps": 5, "save_steps": 500}])
def test_the_checkpoint_with_the_lowest_loss_on_the_target_is_kept(tmp_path, strategy):
    dataset = examples()
    holdout, target = dataset.select(range(20)), dataset.select(range(20, 60))
    seen = Weights()
    args = arguments(tmp_path, num_train_epochs=8, lr_scheduler_type="constant", learning_rate=0.03, **strategy)
    model: Any = train_irreducible_model(Linear, args, holdout, target, callbacks=[seen])
    best = int(np.argmin(seen.losses))
    assert len(seen.losses) == 8
    assert 0 < best < 7, "neither the first nor the last, or the rule would decide nothing here"
    assert torch.equal(model.layer.weight, seen.weights[best])
    assert args.load_best_model_at_end is False  # the caller's own stay


def test_the_best_comes_back_whole_from_an_older_layout(tmp_path):
    """transformers saves a ViT under an older layout's names: a mixture of two models would have another loss."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(24, 1, 8, 8, generator=generator)
    rows = Dataset.from_dict({"pixel_values": pixels.tolist(), "labels": [i % 2 for i in range(24)]})
    holdout, target = rows.select(range(8)), rows.select(range(8, 24))
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=1))
    options = {"max_steps": 24, "eval_strategy": "steps", "eval_steps": 3, "lr_scheduler_type": "constant"}
    seen = Weights()
    best = train_irreducible_model(
        model, arguments(tmp_path, learning_rate=0.03, **options), holdout, target, callbacks=[seen]
    )
    assert 0 < int(np.argmin(seen.losses)) < 7
    with torch.no_grad():
        loss = best.eval()(pixel_values=pixels[8:], labels=torch.tensor(target["labels"][:])).loss
    assert loss.item() == pytest.approx(min(seen.losses), rel=1e-5)


def test_an_example_that_will_be_scored_is_refused():
    scored = IdIndex(np.array([2, 4, 6]))
    refuse_scored(torch.tensor([1, 3, 5]), scored)
    with pytest.raises(RuntimeError, match="2 examples were to train the model that scores them, example_id 6 among"):
        refuse_scored(torch.tensor([1, 6, 2]), scored)


def test_the_trainer_looks_after_it(tmp_path):
    """Folds that overlap end in an error at the first step, whatever mixed them."""
    dataset = examples()
    scoring = Scoring(default_data_collator, None, 8, "classification", "example", 0.0, None, None, True, 0)
    models = cross_fit._FoldModels(Linear, arguments(tmp_path), scoring, {})
    with pytest.raises(RuntimeError, match="were to train the model that scores them"):
        models.train(dataset, dataset.select(range(30)), tmp_path / "fold")


def test_a_table_of_a_wrong_fold_is_refused():
    dataset = examples(rows=4)
    dataset = dataset.select(np.argsort(dataset["example_id"][:]))
    tables = [dataset.select([0, 2]), dataset.select([1, 3])]
    merged = [part for part in cross_fit._merged(tables, IdIndex(dataset), np.array([0, 1, 0, 1], np.int32))]
    assert merged[0].column("example_id").to_pylist() == [100, 102, 104, 106]
    for dealt in ([1, 0, 0, 1], [0, 0, 1, 1]):
        with pytest.raises(RuntimeError, match="scored twice, not at all, or by a model of another fold"):
            list(cross_fit._merged(tables, IdIndex(dataset), np.array(dealt, np.int32)))

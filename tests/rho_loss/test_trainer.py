"""RHOLossTrainer: what is chosen and trained on. Resume: test_trainer_resume.py; tokens and foreign Trainers:
test_trainer_text.py; several processes: test_processes.py."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import Trainer, TrainingArguments, default_data_collator

from hf_efx.core.scoring.losses import per_example_loss
from hf_efx.rho_loss.checks import rows_to_draw
from hf_efx.rho_loss.irreducible_table import IrreducibleLosses
from hf_efx.rho_loss.selection import SELECTION_FUNCTIONS
from rho_loss.runs import (
    ROWS,
    Net,
    Plain,
    arguments,
    assert_same,
    data,
    logs,
    standard_table,
    table,
    trainer,
    weights,
    with_losses,
)


def by_id(dataset: Dataset) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    columns = dataset.with_format("torch")[:]
    return columns["x"], columns["labels"], columns["example_id"]


def losses_of(model: Any, dataset: Dataset) -> dict[int, float]:
    """Each example's loss, one at a time."""
    x, labels, ids = by_id(dataset)
    with torch.no_grad():
        each = [F.cross_entropy(model(x[i : i + 1])["logits"], labels[i : i + 1]).item() for i in range(len(ids))]
    return dict(zip(ids.tolist(), each, strict=True))


# --- ratio 1 and uniform


@pytest.mark.parametrize("options", [{}, {"report_selection": False}, {"gradient_accumulation_steps": 3}], ids=str)
def test_ratio_1_is_the_plain_trainer_bit_for_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    common = {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 12}  # a short batch at the end
    common |= {"gradient_accumulation_steps": options.get("gradient_accumulation_steps", 1)}
    plain = Trainer(Net(), arguments(tmp_path, TrainingArguments, **common), train_dataset=data())  # pyright: ignore
    plain.train()
    ours = trainer(tmp_path, selection_ratio=1.0, **{**common, **options})
    ours.train()
    assert_same(weights(ours), weights(plain))
    assert logs(ours, "loss") == logs(plain, "loss")
    assert sorted(i for step in range(len(ours.ids) // 2) for i in ours.ids[step]) == sorted(data()["example_id"])
    assert ours.scores[0].isnan().all()


def test_uniform_is_the_plain_trainer_on_the_same_ids(tmp_path: Path) -> None:
    ours = trainer(tmp_path, Plain(), selection="uniform")
    ours.train()
    rows = {i: row for row, i in enumerate(data()["example_id"])}
    order = [rows[i] for step in range(12) for i in ours.ids[step]]
    assert len(order) == 48 and all(len(ids) == 4 for ids in ours.ids.values())
    options = arguments(tmp_path, TrainingArguments, train_sampling_strategy="sequential")
    plain = Trainer(Plain(), options, train_dataset=data().select(order))  # pyright: ignore
    plain.train()
    assert_same(weights(ours), weights(plain))


def test_uniform_draws_each_example_alike_and_differently_each_step(tmp_path: Path) -> None:
    run = trainer(tmp_path, selection="uniform", max_steps=20)
    run.train()
    places = [sorted(ids) for ids in run.ids.values()]
    assert len({tuple(place) for place in places}) == 20
    other = trainer(tmp_path, selection="uniform", max_steps=20, seed=7)
    other.train()
    assert other.ids != run.ids


# --- the rule


def test_the_rows_of_the_highest_reducible_loss_are_chosen(tmp_path: Path) -> None:
    """One draw is the whole data set: what must be chosen doesn't depend on the sampler."""
    model = Plain()
    losses = losses_of(model, data())
    irreducible = IrreducibleLosses(standard_table())
    run = trainer(tmp_path, model, per_device_train_batch_size=ROWS // 4, max_steps=1)
    run.train()
    reducible = {i: loss - irreducible.lookup([i]).item() for i, loss in losses.items()}
    best = sorted(reducible, key=lambda i: -reducible[i])[: ROWS // 4]
    assert set(run.ids[0]) == set(best) and len(run.ids[0]) == ROWS // 4
    expected = torch.tensor([reducible[i] for i in run.ids[0]])
    torch.testing.assert_close(run.scores[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("selection", sorted(set(SELECTION_FUNCTIONS)))
def test_every_selection_function_trains(tmp_path: Path, selection: str) -> None:
    run = trainer(tmp_path, selection=selection, irreducible_losses=standard_table(), max_steps=3, mc_samples=3)
    before = weights(run)
    run.train()
    assert [len(ids) for ids in run.ids.values()] == [4, 4, 4]
    assert any(not torch.equal(value, before[name]) for name, value in weights(run).items())


def test_permuted_irreducible_losses_change_the_choice(tmp_path: Path) -> None:
    right = standard_table()
    order = np.random.default_rng(1).permutation(ROWS)
    permuted = with_losses(right, np.asarray(right["irreducible_loss"])[order] * 5)
    runs = [trainer(tmp_path, irreducible_losses=losses, max_steps=1) for losses in (right, permuted)]
    for run in runs:
        run.train()
    assert set(runs[0].ids[0]) != set(runs[1].ids[0])


def test_examples_without_a_label_are_never_chosen(tmp_path: Path) -> None:
    columns = data().to_dict()
    columns["labels"] = [-100 if row % 2 else label for row, label in enumerate(columns["labels"])]
    dataset = Dataset.from_dict(columns, features=data().features)
    unlabelled = set(dataset["example_id"][1::2])
    for selection in ("rho_loss", "negative_irreducible_loss", "grad_norm_is"):
        run = trainer(tmp_path, train_dataset=dataset, irreducible_losses=table(dataset), selection=selection)
        run.train()
        assert not unlabelled & {i for ids in run.ids.values() for i in ids}


def test_accumulation_selects_from_the_union(tmp_path: Path) -> None:
    runs = []
    for size, accumulation in ((16, 1), (4, 4)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        runs.append(trainer(tmp_path, Plain(), max_steps=5, max_grad_norm=0, **options))
        runs[-1].train()
    assert runs[0].ids == runs[1].ids  # in the same order
    assert [len(x) for x in runs[0].seen] == [16, 16, 8, 16, 16]  # 160 rows are two draws and a half
    assert [len(x) for x in runs[1].seen] == [4] * 18
    for name, value in weights(runs[0]).items():
        torch.testing.assert_close(weights(runs[1])[name], value, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(logs(runs[1], "loss"), logs(runs[0], "loss"), atol=1e-6, rtol=0)


def test_a_short_draw_gives_its_share(tmp_path: Path) -> None:
    """160 rows are 3 draws of 48 and one of 16, of which a twelfth is chosen: 4, 4, 4 and 1."""
    options = {"selection_ratio": 1 / 12, "max_steps": -1, "num_train_epochs": 1}
    run = trainer(tmp_path, Plain(), **options)
    run.train()
    assert [len(ids) for ids in run.ids.values()] == [4, 4, 4, 1]
    together = trainer(tmp_path, Plain(), gradient_accumulation_steps=2, **options)
    together.train()
    assert [len(ids) for ids in together.ids.values()] == [8, 5]
    assert [len(x) for x in together.seen] == [4, 4, 3, 2]


def test_weights_of_sampled_rows_reach_the_loss(tmp_path: Path) -> None:
    """The gradient of a step is that of mean(weight * loss), weight = mean norm / norm."""
    model = Plain()
    x, labels, ids = by_id(data())
    run = trainer(tmp_path, model, selection="grad_norm_is", per_device_train_batch_size=ROWS // 8, max_steps=1,
                  gradient_accumulation_steps=2, max_grad_norm=0, optim="sgd", learning_rate=1.0)  # fmt: skip
    before = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    logits = torch.func.functional_call(model, before, (x,))["logits"]
    norms = (logits.softmax(-1) - F.one_hot(labels, 3)).norm(dim=1).detach()
    run.train()
    places = {i: place for place, i in enumerate(ids.tolist())}
    chosen = torch.tensor([places[i] for i in run.ids[0]])
    assert len(chosen) == ROWS // 4
    each, _ = per_example_loss(logits, labels, "classification")
    (each[chosen] * norms.mean() / norms[chosen]).mean().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), (before[name] - before[name].grad).detach(), atol=1e-5, rtol=1e-4)


# --- rescoring every k steps


def test_one_scoring_serves_k_steps(tmp_path: Path) -> None:
    """160 rows in draws of 8 are 20 steps an epoch, served by ten scorings of 16 rows."""
    model, scored = Plain(), []

    def count(module: Any, args: Any, kwargs: Any) -> None:
        if not torch.is_grad_enabled():
            scored.append(len(kwargs["x"]))

    model.register_forward_pre_hook(count, with_kwargs=True)
    options = {"rescore_every": 2, "max_steps": -1, "num_train_epochs": 1, "check_scored_loss": False}
    run = trainer(tmp_path, model, **options)
    run.train()
    assert sum(scored) == ROWS + 2 * 8 and len(run.ids) == 20  # two passes compare with the model's own loss
    everything = [i for ids in run.ids.values() for i in ids]
    assert len(everything) == len(set(everything)) == 80  # 8 of each 16, 4 a step


def test_a_cycle_ends_with_the_epoch(tmp_path: Path) -> None:
    """Draws of 16 / 3 = 5 rows: 32 of them in an epoch, ten cycles of three and one of two."""
    run = trainer(tmp_path, rescore_every=3, max_steps=40)
    run.train()
    assert rows_to_draw(run.args, 4) == 5
    epochs = [{i for step in part for i in run.ids[step]} for part in (range(32), range(32, 40))]
    assert len(epochs[0]) == 32 * 4 and len(epochs[1]) == 8 * 4  # nobody twice in an epoch


# --- ids


@pytest.mark.parametrize("workers", [0, 1])
def test_ids_stay_with_their_rows(tmp_path: Path, workers: int) -> None:
    dataset = data().shuffle(seed=3).filter(lambda row: row["labels"] != 2)
    dataset = dataset.map(lambda row: {"wrong": not row["wrong"]})
    run = trainer(tmp_path, Plain(), train_dataset=dataset, dataloader_num_workers=workers)
    run.train()
    chosen = torch.tensor([i for ids in run.ids.values() for i in ids])
    torch.testing.assert_close(torch.cat(run.seen), chosen / 1000)
    assert set(chosen.tolist()) <= set(dataset["example_id"]) and len(set(chosen.tolist())) > 20


def test_rows_by_column_and_rows_as_dicts_train_alike(tmp_path: Path) -> None:
    fast = trainer(tmp_path)
    fast.train()
    slow = trainer(tmp_path)
    slow.data_collator = lambda features: default_data_collator(features)
    slow.train()
    assert type(fast.get_train_dataloader().dataset).__name__ == "ColumnRows"
    assert type(slow.get_train_dataloader().dataset).__name__ == "Dataset"
    assert fast.ids == slow.ids
    assert_same(weights(fast), weights(slow))


def test_lists_of_rows_without_a_table(tmp_path: Path) -> None:
    rows = [{**row, "x": torch.tensor(row["x"])} for row in data()]
    run = trainer(tmp_path, train_dataset=rows, selection="loss")
    run.train()
    whole = trainer(tmp_path, selection="loss")
    whole.train()
    assert run.ids == whole.ids
    assert set(rows[0]) == {"x", "labels", "example_id", "wrong"}  # the collator left the rows as they were


def test_streams_with_ids_train(tmp_path: Path) -> None:
    run = trainer(tmp_path, train_dataset=data().to_iterable_dataset(), selection="loss", max_steps=10)
    run.train()
    assert [len(ids) for ids in run.ids.values()] == [4] * 10


def test_evaluation_is_the_trainers_own(tmp_path: Path) -> None:
    run = trainer(tmp_path, eval_dataset=data().select(range(20)), eval_strategy="steps", eval_steps=4)
    run.train()
    with torch.no_grad():
        run.model.eval()
        x, labels, _ = by_id(data().select(range(20)))
        expected = run.model(x, labels)["loss"].item()
    assert run.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)
    assert run.predict(data()).predictions.shape == (ROWS, 3)

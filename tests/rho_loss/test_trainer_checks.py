"""What RHOLossTrainer refuses, before any work."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Value
from transformers import TrainingArguments

from hf_efx.core.data.tables import settings_of, with_settings
from hf_efx.core.training.arguments import EfxArguments
from hf_efx.rho_loss.trainer import RHOLossTrainer
from rho_loss.runs import Net, Plain, arguments, data, standard_table, trainer, with_losses
from rho_loss.texts import Collator, gpt2, table, text_trainer, texts, tokenizer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"irreducible_losses": None}, "selection='rho_loss' needs irreducible_losses"),
        ({"train_scoring_model": True}, "train_scoring_model=True needs a scoring_model"),
        ({"train_sampling_strategy": "batch_rebalance"}, "train_sampling_strategy='batch_rebalance' makes batches"),
        ({"selection_scope": "global", "accelerator_config": {"even_batches": False}}, "set even_batches=True"),
        ({"corrupted_column": "noisy"}, "no column 'noisy', only .*: name another corrupted_column, or none"),
        ({"selection_ratio": 0.9, "per_device_train_batch_size": 2}, "draw 2 rows to choose .*=2 from"),
        ({"scoring_task": None}, "task=None, but Net doesn't say which loss it computes"),
        ({"scoring_task": "regression"}, "made with task='classification', but here it is 'regression'"),
    ],
    ids=str,
)
def test_options_that_cant_be(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **options)


@pytest.mark.parametrize("rank", [0, 1])
def test_unequal_draws_of_two_processes_are_refused_on_each(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = arguments(tmp_path, selection="loss", accelerator_config={"even_batches": False})
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self: 2))
    monkeypatch.setattr(TrainingArguments, "process_index", property(lambda self: rank))
    with pytest.raises(ValueError, match="even_batches=False in accelerator_config lets processes draw unequal"):
        RHOLossTrainer(Net(), args, train_dataset=data())


@pytest.mark.parametrize("cls", [TrainingArguments, EfxArguments])
def test_arguments_without_our_options(tmp_path: Path, cls: Any) -> None:
    with pytest.raises(ValueError, match=f"args is a {cls.__name__}: pass RHOLossArguments"):
        RHOLossTrainer(Net(), arguments(tmp_path, cls), train_dataset=data())  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own, of its tracing
def test_compiled_models_are_refused_unless_their_columns_are_named(tmp_path: Path) -> None:
    compiled: Any = torch.compile(gpt2(), backend="eager")
    with pytest.raises(ValueError, match="model is a OptimizedModule, .*torch_compile=True"):
        text_trainer(tmp_path, model=compiled)
    named = {"remove_unused_columns": False, "label_names": ["labels"]}
    runs = [text_trainer(tmp_path, max_steps=2), text_trainer(tmp_path, model=compiled, max_steps=2, **named)]
    for run in runs:
        run.train()
    assert runs[0].ids == runs[1].ids


def test_training_sets_without_right_ids(tmp_path: Path) -> None:
    rows = data()
    twice = rows["example_id"][:-1] + rows["example_id"][:1]
    bare = rows.remove_columns("example_id")
    way = "call add_example_ids\\(dataset\\) before any map"
    for dataset, message in [
        (bare, f"train_dataset has no column 'example_id', only x, labels, wrong: {way}"),
        (bare.to_iterable_dataset(), f"train_dataset has no column 'example_id', only x, labels, wrong: {way}"),
        ([{"x": torch.zeros(4), "labels": 0}], "train_dataset has no column 'example_id', only x, labels"),
        (rows.cast_column("example_id", Value("int32")), "int32, not int64"),
        (bare.add_column("example_id", twice), "ids stand twice in column 'example_id'"),
    ]:
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, train_dataset=dataset, selection="loss")


def test_tables_of_another_run(tmp_path: Path) -> None:
    right, rows = standard_table(), data()
    settings = settings_of(right)
    ids, losses = right["example_id"][:], right["irreducible_loss"][:]
    moved = Dataset.from_dict({**rows.to_dict(), "x": [row[::-1] for row in rows["x"]]}, features=rows.features)
    for losses_table, dataset, message in [
        (with_losses(right, [float("nan"), *losses[1:]]), rows, "1 irreducible losses aren't finite"),
        (with_losses(right, [float("inf"), *losses[1:]]), rows, "1 irreducible losses aren't finite"),
        (right, rows.select(range(100)), "made with rows=160, but here it is 100"),
        (right, moved, "made for another data set"),
        (right.select(range(100)), rows, "100"),
        (with_settings(Dataset.from_dict({"example_id": ids}), settings), rows, "lacks the column 'irreducible_loss'"),
    ]:
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, train_dataset=dataset, irreducible_losses=losses_table)


def test_another_granularity_tokenizer_or_smoothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="made with label_smoothing=0.0, but here it is 0.1"):
        text_trainer(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="made with granularity='example', but here it is 'token'"):
        text_trainer(tmp_path, granularity="token", irreducible_losses=table())
    run = text_trainer(tmp_path)
    other = tokenizer()
    other.add_tokens(["more"])
    with pytest.raises(ValueError, match="made with tokenizer="):
        RHOLossTrainer(
            gpt2(), run.args, train_dataset=texts(), processing_class=other, data_collator=Collator(other),
            irreducible_losses=run.irreducible_losses,
        )  # fmt: skip


def test_scores_that_arent_numbers(tmp_path: Path) -> None:
    model = Plain()
    model.layers[0].weight.data[:] = float("nan")
    run = trainer(tmp_path, model)
    with pytest.raises(ValueError, match="16 scores can't be ranked .*diverged"):
        run.train()


def test_a_run_without_a_table_checks_nothing_of_it(tmp_path: Path) -> None:
    """A table that isn't read may be of anything."""
    text_trainer(tmp_path, selection="loss", irreducible_losses=standard_table(), label_smoothing_factor=0.1)

"""GoldiProxTrainer.select: it records what is trained on, a replay gives the same weights, a killed run resumes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from matrix import ARCHITECTURES
from transformers import TrainerCallback
from two_processes import Kill, losses

from hf_efx.core.data.fingerprints import weights_fingerprint
from hf_efx.core.data.tables import data_fingerprint
from hf_efx.goldiprox.replay import ReplayTrainer
from hf_efx.goldiprox.sequence import SelectionSequence
from hf_efx.goldiprox.trainer import RECORDING_FOLDER, GoldiProxTrainer
from hf_efx.rho_loss.trainer import RHOLossTrainer

from .tiny import (
    BERT,
    COLUMNS,
    ROWS,
    arguments,
    assert_equal_weights,
    data,
    ids_of,
    irreducible_losses,
    model,
    proxy,
    replay,
    weights,
)

# Of 48 rows 16 are drawn for a micro-batch: an epoch is 3 draws, under accumulation 2 a whole step and a short one.
STEPS = 7
GPT2 = next(architecture for architecture in ARCHITECTURES if architecture.name == "gpt2")


class Watching:
    """Put before a Trainer: keeps the ids of each micro-batch that is trained on."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training:
            self.seen = [*getattr(self, "seen", []), ids_of(inputs)]
        return super().compute_loss(model, inputs, *args, **kwargs)  # pyright: ignore


class WatchedProxy(Watching, GoldiProxTrainer):
    """A proxy that is watched."""


def watched(*args: Any, **kwargs: Any) -> Any:
    trainer = proxy(*args, **kwargs)
    trainer.__class__ = WatchedProxy
    return trainer


def flat(batches: list[list[int]]) -> list[int]:
    return [i for batch in batches for i in batch]


def mean_over_the_step(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch


def pad(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    return {k: torch.tensor([row[k] + [v] * (width - len(row[k])) for row in rows]) for k, v in fill.items()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 3},  # a step is an epoch
        {"gradient_accumulation_steps": 3, "rescore_every": 2, "per_device_train_batch_size": 2},
        {"selection": "loss", "optim": "sgd", "lr_scheduler_type": "cosine", "selection_scope": "global"},
    ],
    ids=["plain", "accumulation", "rescoring", "loss"],
)
def test_replay_of_its_own_trace_gives_the_same_weights(options: dict[str, Any], tmp_path: Path) -> None:
    live = watched(tmp_path / "live", **options)
    trace = live.select(4)  # into a second epoch
    assert len(trace) == live.state.global_step == 4
    assert flat([row["example_ids"] for row in trace.dataset]) == flat(live.seen)
    split = {name: options[name] for name in ("optim", "lr_scheduler_type") if name in options}
    split["gradient_accumulation_steps"] = options.get("gradient_accumulation_steps", 1)
    split["per_device_train_batch_size"] = options.get("per_device_train_batch_size", 4)
    again = replay(tmp_path / "again", trace, **split)
    again.train()
    assert again.seen == live.seen
    assert_equal_weights(again, live)
    assert losses(again) == losses(live)
    assert trace.settings["proxy"]["initial_weights"] == weights_fingerprint(model())
    assert trace.settings["proxy"]["final_weights"] == weights_fingerprint(again.model)


def test_steps_that_end_an_epoch_short_are_the_same_up_to_rounding(tmp_path: Path) -> None:
    live = watched(tmp_path / "live", gradient_accumulation_steps=2, optim="sgd")
    live.compute_loss_func = mean_over_the_step
    trace = live.select(3)
    assert [len(ids) for ids in trace.dataset["example_ids"]] == [8, 4, 8]
    again = replay(
        tmp_path / "again", trace, per_device_train_batch_size=4, gradient_accumulation_steps=2, optim="sgd"
    )
    again.compute_loss_func = mean_over_the_step
    again.train()
    assert [len(batch) for batch in live.seen] == [4, 4, 4, 4, 4]
    assert [len(batch) for batch in again.seen] == [4, 4, 2, 2, 4, 4]
    assert flat(again.seen) == flat(live.seen)
    for name, value in weights(live).items():
        torch.testing.assert_close(weights(again)[name], value, rtol=1e-5, atol=1e-6)


def test_replay_of_ragged_text_gives_the_same_weights(tmp_path: Path) -> None:
    """The live run cuts a chosen micro-batch's padding as the collator would have made it."""
    tokens = GPT2.batch(ROWS)["input_ids"].tolist()
    lengths = np.random.default_rng(0).integers(3, 13, ROWS)
    cut = [row[:n] for row, n in zip(tokens, lengths, strict=True)]
    rows = Dataset.from_dict({"example_id": list(range(ROWS)), "input_ids": cut, "labels": cut})
    torch.manual_seed(0)
    nets = [GPT2.auto.from_config(GPT2.config()) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    live = proxy(tmp_path / "live", nets[0], rows, selection="loss", gradient_accumulation_steps=3)
    live.data_collator = pad
    trace = live.select(2)
    split = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
    again = ReplayTrainer(nets[1], arguments(tmp_path / "again", **split), pad, rows, sequence=trace)
    again.train()
    assert_equal_weights(again, live)
    assert losses(again) == losses(live)  # pyright: ignore


def test_selecting_changes_nothing_in_the_training(tmp_path: Path) -> None:
    live = proxy(tmp_path / "live", model(dropout=0.1))
    live.select(4)
    plain = RHOLossTrainer(
        model(dropout=0.1),
        proxy(tmp_path / "plain", max_steps=4).args,
        train_dataset=data(),
        irreducible_losses=irreducible_losses(),
    )
    plain.train()
    assert_equal_weights(live, plain)
    assert live.args.max_steps == -1
    live.train()  # records nothing
    assert len(live.select(2)) == 2


def test_recorded_scores_are_the_reducible_losses(tmp_path: Path) -> None:
    net = model()
    ids, scores = proxy(tmp_path, net).select(1)[0]
    rows = data(seed=None).with_format("torch").select(((ids - 5) // 3).tolist())
    fresh = model().eval()
    with torch.no_grad():
        logits = fresh(input_ids=rows["input_ids"][:]).logits
    expected = torch.nn.functional.cross_entropy(logits, rows["labels"][:], reduction="none").numpy()
    table = irreducible_losses()
    by_id = dict(zip(table["example_id"][:], table["irreducible_loss"][:], strict=True))
    assert scores == pytest.approx(expected - np.array([by_id[int(i)] for i in ids]), rel=1e-4, abs=1e-5)
    assert len(set(ids.tolist())) == 4


def test_settings_say_how_it_was_selected(tmp_path: Path) -> None:
    settings = proxy(tmp_path, label_smoothing_factor=0.0, seed=5).select(2).settings
    assert settings["data"] == {"fingerprint": data_fingerprint(data(), COLUMNS), "columns": COLUMNS, "rows": ROWS}
    score = settings["score"]
    assert score["irreducible_losses"]["model_name"] == "made-up"
    assert {name: score[name] for name in ("selection", "selection_ratio", "score_mode", "examples_per_step")} == {
        "selection": "rho_loss",
        "selection_ratio": 0.25,
        "score_mode": "eval",
        "examples_per_step": 4,
    }
    assert settings["proxy"]["model"] == "BertForSequenceClassification" and settings["proxy"]["seed"] == 5
    by_labels = proxy(tmp_path, selection="loss").select(1, fingerprint_columns=["labels"]).settings
    assert by_labels["data"]["fingerprint"] == data_fingerprint(data(), ["labels"])
    assert by_labels["score"]["irreducible_losses"] is None
    whole = proxy(tmp_path, selection="uniform").select(1)
    assert whole.settings["data"]["columns"] == COLUMNS and np.isnan(whole[0][1]).all()


# Checkpoints lie at 2, 4 and 6. The kill comes at a step's end, before its checkpoint.
@pytest.mark.parametrize(
    "step, options", [(3, {}), (4, {"gradient_accumulation_steps": 2}), (5, {"rescore_every": 2})]
)
def test_killed_and_resumed_it_selects_the_same(step: int, options: dict[str, Any], tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, **options}
    whole = proxy(tmp_path / "whole", model(dropout=0.1), **options)
    expected = whole.select(STEPS)
    killed = proxy(tmp_path / "killed", model(dropout=0.1), **options)
    killed.add_callback(Kill(step))
    with pytest.raises(KeyboardInterrupt):
        killed.select(STEPS)
    resumed = proxy(tmp_path / "killed", model(dropout=0.1, seed=9), **options)  # the checkpoint's weights count
    found = resumed.select(STEPS, resume_from_checkpoint=True)
    assert found.settings == expected.settings
    assert found.dataset.to_dict() == expected.dataset.to_dict()
    assert_equal_weights(resumed, whole)
    if options.keys() > {"save_strategy", "save_steps"}:
        return
    # Going on from the end, for no step and for more.
    checkpoint = str(tmp_path / "killed" / "checkpoint-6")
    assert proxy(tmp_path / "killed", model(), **options).select(6, checkpoint).dataset.to_dict() == {
        name: values[:6] for name, values in expected.dataset.to_dict().items()
    }
    longer = proxy(tmp_path / "killed", model(), **options).select(9, checkpoint)
    assert len(longer) == 9 and longer.dataset[:6] == expected.dataset[:6]


def test_resume_is_refused_where_the_recording_does_not_fit(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    proxy(tmp_path, **saving).select(4)
    folder = tmp_path / RECORDING_FOLDER
    with pytest.raises(ValueError, match="num_steps=3, but resume_from_checkpoint=.*is at step 4 already"):
        proxy(tmp_path, **saving).select(3, resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"made with other settings \(selection_ratio: 0.25, now 0.5\)"):
        proxy(tmp_path, selection_ratio=0.5, **saving).select(6, resume_from_checkpoint=True)
    whole = json.loads((folder / "settings.json").read_text())
    assert whole["proxy"]["initial_weights"] == weights_fingerprint(model())
    for shard in sorted(folder.glob("*.arrow"))[1:]:
        shard.unlink()
    with pytest.raises(ValueError, match="has 2 whole steps, the checkpoint 4"):
        proxy(tmp_path, **saving).select(6, resume_from_checkpoint=True)


def test_early_stop_gives_a_shorter_sequence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 3

    trainer = proxy(tmp_path)
    trainer.add_callback(Stop())
    assert len(trainer.select(STEPS)) == 3
    assert "The selection was stopped at step 3 of 7" in caplog.text


@pytest.mark.parametrize(
    "options, steps, words",
    [
        ({}, 0, "num_steps=0: expected 1 or more"),
        ({"selection_ratio": 1.0}, 3, "selection_ratio=1 chooses nothing"),
        ({"selection": "grad_norm_is"}, 3, "selection='grad_norm_is' weighs its examples"),
        ({"granularity": "token", "selection": "loss"}, 3, "granularity='token': a sequence names whole examples"),
    ],
)
def test_what_a_sequence_cannot_hold_is_refused(
    options: dict[str, Any], steps: int, words: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        proxy(tmp_path, **options).select(steps)
    assert not (tmp_path / RECORDING_FOLDER).exists()


def test_options_set_on_the_arguments_later_are_read_when_select_begins(tmp_path: Path) -> None:
    changed = {"selection": "loss", "selection_ratio": 0.5, "scoring_precision": "auto"}
    late = proxy(tmp_path / "late")
    for name, value in changed.items():
        setattr(late.args, name, value)
    trace, expected = late.select(2), proxy(tmp_path / "early", **changed).select(2)
    assert trace.settings == expected.settings and trace.dataset.to_dict() == expected.dataset.to_dict()
    assert trace.settings["score"]["selection"] == "loss" and trace.settings["data"]["columns"] == COLUMNS
    assert trace.settings["score"]["scoring_precision"] in (None, "bf16")  # what ran
    late.args.selection = "grad_norm_is"
    with pytest.raises(ValueError, match="selection='grad_norm_is' weighs its examples"):
        late.select(2)


def test_larger_model_replays_a_shared_sequence(tmp_path: Path) -> None:
    proxy(tmp_path / "proxy").select(3).save_to_disk(tmp_path / "shared")
    shared = SelectionSequence.load_from_disk(tmp_path / "shared")
    torch.manual_seed(0)
    config = BERT.config()
    config.update({"hidden_size": 64, "num_hidden_layers": 3})
    larger = BERT.auto.from_config(config)
    before = weights_fingerprint(larger)
    trainer = replay(tmp_path / "large", shared, larger, per_device_train_batch_size=4)
    trainer.train()
    assert trainer.seen == [row["example_ids"] for row in shared.dataset]
    assert weights_fingerprint(larger) != before
    assert weights(trainer)["bert.embeddings.word_embeddings.weight"].shape[1] == 64

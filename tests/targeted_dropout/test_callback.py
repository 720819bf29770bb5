"""Targeted dropout under Trainers: who drives it, what is logged, and that runs resume exactly."""

import logging
from pathlib import Path
from typing import Any

import pytest
from matrix import ARCHITECTURES
from transformers import Trainer, TrainingArguments

from hf_efx import EfxTrainer, TargetedDropoutCallback, TargetedDropoutConfig, get_efx_model, step_context
from hf_efx.core.model.adapter import efx_record

GPT2 = next(architecture for architecture in ARCHITECTURES if architecture.name == "gpt2")


def config(**fields: Any) -> TargetedDropoutConfig:
    return TargetedDropoutConfig(**{"targeting": 0.5, "rate": 0.5, **fields})


def targeted(seed: int = 0, **fields: Any) -> Any:
    return get_efx_model(GPT2.build(seed), config(**fields))


def run(make: Any, model: Any, folder: Path, callbacks: Any = (), resume: Any = None, **options: Any) -> list[Any]:
    """Trains, and returns the log."""
    arguments = TrainingArguments(
        str(folder),
        **{
            "max_steps": 6,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            "save_steps": 4,
            "learning_rate": 1e-2,
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            **options,
        },
    )
    batch = GPT2.batch(12)
    data = [{name: values[i] for name, values in batch.items()} for i in range(12)]
    trainer = make(model, arguments, train_dataset=data, callbacks=list(callbacks))
    trainer.train(resume)
    return trainer.state.log_history


def losses(log: list[dict[str, float]]) -> list[float]:
    return [entry["loss"] for entry in log if "loss" in entry]


def test_any_trainer_drives_it(tmp_path: Path) -> None:
    ours = run(EfxTrainer, targeted(), tmp_path)
    other = run(Trainer, targeted(), tmp_path, [TargetedDropoutCallback()])
    put_on = run(Trainer, GPT2.build(), tmp_path, [TargetedDropoutCallback(config())])
    both = run(EfxTrainer, targeted(), tmp_path, [TargetedDropoutCallback(config())])
    dense = run(EfxTrainer, GPT2.build(), tmp_path)
    assert losses(ours) == losses(other) == losses(put_on) == losses(both) != losses(dense)


@pytest.mark.parametrize("granularity", ["weight", "unit"])
@pytest.mark.parametrize("resume_at", [2, 4])
def test_a_resumed_run_has_the_same_trace(granularity: str, resume_at: int, tmp_path: Path) -> None:
    """Also between two renewals of the candidates: those of a checkpoint's step are found anew in both runs."""
    fields = {"granularity": granularity, "refresh_every": 5, "ramp": "paper"}
    whole = run(EfxTrainer, targeted(**fields), tmp_path, save_steps=2)
    checkpoint = str(tmp_path / f"checkpoint-{resume_at}")
    loaded = GPT2.auto.from_pretrained(checkpoint)
    assert step_context(loaded) is None and efx_record(loaded) is not None
    for model in (loaded, GPT2.build(1), targeted(1, **fields)):
        assert losses(run(EfxTrainer, model, tmp_path, resume=checkpoint, save_steps=2)) == losses(whole)


def test_the_ramp_is_logged(tmp_path: Path) -> None:
    fields = {"targeting": 0.75, "rate": 0.8, "ramp": "linear", "ramp_steps": 4, "refresh_every": 1}
    log = [e for e in run(Trainer, targeted(**fields), tmp_path, [TargetedDropoutCallback()]) if "loss" in e]
    assert [e["targeted_dropout/targeting"] for e in log] == pytest.approx([0, 0.1875, 0.375, 0.5625, 0.75, 0.75])
    assert [e["targeted_dropout/rate"] for e in log] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 0.8])
    assert log[0]["targeted_dropout/dropped"] == 0 and log[-1]["targeted_dropout/dropped"] == pytest.approx(0.6)


def test_every_micro_batch_has_its_own_draw(tmp_path: Path) -> None:
    model, seen = targeted(), []
    context: Any = step_context(model)
    model.register_forward_pre_hook(lambda *_: seen.append((context.step, context.micro_step)))
    run(EfxTrainer, model, tmp_path, [TargetedDropoutCallback()], gradient_accumulation_steps=2, max_steps=2)
    assert seen == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_a_trainer_that_drives_nothing_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "hf_efx"):
        log = run(Trainer, targeted(), tmp_path, max_steps=2)
    assert losses(log) == losses(run(Trainer, GPT2.build(), tmp_path, max_steps=2))
    assert caplog.text.count("Targeted dropout is on, but no training step has begun") == 1


def test_what_a_run_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the model has no targeted dropout. Pass a TargetedDropoutConfig"):
        run(Trainer, GPT2.build(), tmp_path, [TargetedDropoutCallback()])
    with pytest.raises(ValueError, match="Leave the callback's config out"):
        run(Trainer, targeted(), tmp_path, [TargetedDropoutCallback(config(rate=0.1))])

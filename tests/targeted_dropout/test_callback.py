"""Targeted dropout under Trainers: who drives it, what is logged, and that runs resume exactly."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from matrix import ARCHITECTURES
from transformers import Trainer, TrainingArguments

from hf_efx import EfxTrainer, TargetedDropoutCallback, TargetedDropoutConfig, get_efx_model, step_context, unload
from hf_efx.core.model.record import efx_record
from hf_efx.targeted_dropout.layers import droppings_of

GPT2 = next(architecture for architecture in ARCHITECTURES if architecture.name == "gpt2")


def config(**fields: Any) -> TargetedDropoutConfig:
    return TargetedDropoutConfig(**{"targeting": 0.5, "rate": 0.5, **fields})


def targeted(seed: int = 0, **fields: Any) -> Any:
    return get_efx_model(GPT2.build(seed), config(**fields))


def training_arguments(folder: Path, **options: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_steps": 4,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
    }
    return TrainingArguments(str(folder), **{**settings, **options})


def rows() -> Any:
    batch = GPT2.batch(12)
    return [{name: values[i] for name, values in batch.items()} for i in range(12)]


def run(make: Any, model: Any, folder: Path, callbacks: Any = (), resume: Any = None, **options: Any) -> list[Any]:
    """Trains, and returns the log."""
    data, arguments = rows(), training_arguments(folder, **options)
    trainer = make(model, arguments, train_dataset=data, eval_dataset=data, callbacks=list(callbacks))
    trainer.train(resume)
    return trainer.state.log_history


def losses(log: list[dict[str, float]]) -> list[float]:
    return [entry["loss"] for entry in log if "loss" in entry]


def test_any_trainer_drives_it(tmp_path: Path) -> None:
    options = {"max_steps": 2, "save_strategy": "no"}
    ours = run(EfxTrainer, targeted(), tmp_path, **options)
    other = run(Trainer, targeted(), tmp_path, [TargetedDropoutCallback()], **options)
    put_on = run(Trainer, GPT2.build(), tmp_path, [TargetedDropoutCallback(config())], **options)
    both = run(EfxTrainer, targeted(), tmp_path, [TargetedDropoutCallback(config())], **options)
    dense = run(EfxTrainer, GPT2.build(), tmp_path, **options)
    assert losses(ours) == losses(other) == losses(put_on) == losses(both) != losses(dense)


@pytest.mark.parametrize("granularity", ["weight", "unit"])
def test_saving_changes_nothing_and_a_resumed_run_has_the_same_trace(granularity: str, tmp_path: Path) -> None:
    """Also between two renewals of the candidates, which a checkpoint keeps."""
    fields = {"granularity": granularity, "refresh_every": 5, "ramp": "paper", "targeting": 0.75, "rate": 0.9}
    options = {"max_steps": 8, "learning_rate": 3e-2}
    whole = losses(run(EfxTrainer, targeted(**fields), tmp_path / "whole", save_strategy="no", **options))
    assert losses(run(EfxTrainer, targeted(**fields), tmp_path, save_steps=2, **options)) == whole
    loaded = GPT2.auto.from_pretrained(tmp_path / "checkpoint-4")
    assert step_context(loaded) is None and efx_record(loaded) is not None
    dense, of_another_run = GPT2.build(1), targeted(1, **fields)
    run(EfxTrainer, of_another_run, tmp_path / "other", max_steps=3, save_strategy="no")
    for model, step in ((loaded, 4), (dense, 2), (of_another_run, 6)):
        checkpoint = str(tmp_path / f"checkpoint-{step}")
        assert losses(run(EfxTrainer, model, tmp_path, resume=checkpoint, save_strategy="no", **options)) == whole


@pytest.mark.parametrize("saving", [{"save_strategy": "epoch"}, {"save_strategy": "best", "eval_strategy": "steps"}])
def test_whatever_a_checkpoint_is_taken_for_it_keeps_the_candidates(saving: dict[str, str], tmp_path: Path) -> None:
    options: dict[str, Any] = {"metric_for_best_model": "loss", "eval_steps": 3, "learning_rate": 3e-2, **saving}
    model = targeted(refresh_every=5)
    whole = run(Trainer, model, tmp_path, [TargetedDropoutCallback()], **{**options, "max_steps": 8})
    checkpoint = str(min(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2])))
    assert int(checkpoint.rpartition("-")[2]) % 5
    again = targeted(1, refresh_every=5)
    log = run(Trainer, again, tmp_path, [TargetedDropoutCallback()], checkpoint, **{**options, "max_steps": 8})
    assert losses(log) == losses(whole)


def test_a_second_run_starts_from_the_beginning(tmp_path: Path) -> None:
    fields = {"ramp": "linear", "refresh_every": 4}
    for make, callbacks in ((EfxTrainer, ()), (Trainer, (TargetedDropoutCallback(config(**fields)),))):
        model = targeted(**fields)
        options = {"max_steps": 3, "save_strategy": "no"}
        run(make, model, tmp_path, callbacks, **options)
        fresh = get_efx_model(copy.deepcopy(unload(copy.deepcopy(model))), config(**fields))
        assert losses(run(make, model, tmp_path, callbacks, **options)) == losses(
            run(make, fresh, tmp_path, callbacks, **options)
        )


def test_each_run_of_a_search_has_a_model_and_a_config_of_its_own(tmp_path: Path) -> None:
    callback = TargetedDropoutCallback(config())
    arguments = training_arguments(tmp_path, max_steps=2, save_strategy="no")
    trainer = Trainer(args=arguments, model_init=lambda: GPT2.build(), train_dataset=rows(), callbacks=[callback])
    logs = []
    for rate in (0.5, 0.9):
        callback.config = config(rate=rate)  # set between two runs: it acts
        trainer.train()  # model_init makes a new model
        assert callback.droppings == droppings_of(trainer.model)  # pyright: ignore[reportArgumentType]
        logs.append([e["targeted_dropout/rate"] for e in trainer.state.log_history if "loss" in e])
    assert logs == [[0.5, 0.5], [0.9, 0.9]]


def test_the_ramp_is_logged(tmp_path: Path) -> None:
    fields = {"targeting": 0.75, "rate": 0.8, "ramp": "linear", "ramp_steps": 4, "refresh_every": 1}
    log = [
        e
        for e in run(Trainer, targeted(**fields), tmp_path, [TargetedDropoutCallback()], save_strategy="no")
        if "loss" in e
    ]
    assert [e["targeted_dropout/targeting"] for e in log] == pytest.approx([0, 0.1875, 0.375, 0.5625, 0.75, 0.75])
    assert [e["targeted_dropout/rate"] for e in log] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 0.8])
    assert log[0]["targeted_dropout/dropped"] == 0 and log[-1]["targeted_dropout/dropped"] == pytest.approx(0.6)


def test_figures_of_several_configs_are_their_mean_by_weights(tmp_path: Path) -> None:
    parts = [config(target_modules=["c_fc"], rate=0.25), config(target_modules=["c_attn"], rate=0.75)]
    model = get_efx_model(GPT2.build(), parts)
    log = run(Trainer, model, tmp_path, [TargetedDropoutCallback()], max_steps=1, save_strategy="no")
    # 32 x 128 weights in c_fc, 32 x 96 in c_attn.
    rate = (0.25 * 128 + 0.75 * 96) / 224
    assert log[0]["targeted_dropout/rate"] == pytest.approx(rate)
    assert log[0]["targeted_dropout/dropped"] == pytest.approx(rate / 2)
    with pytest.raises(ValueError, match="the model has 2 configs. Leave the callback"):
        run(Trainer, model, tmp_path, [TargetedDropoutCallback(parts[0])])


def test_every_micro_batch_has_its_own_draw(tmp_path: Path) -> None:
    model, seen = targeted(), []
    context: Any = step_context(model)
    model.register_forward_pre_hook(lambda *_: seen.append((context.step, context.micro_step)))
    run(
        EfxTrainer,
        model,
        tmp_path,
        [TargetedDropoutCallback()],
        gradient_accumulation_steps=2,
        max_steps=2,
        save_strategy="no",
    )
    assert seen == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_a_trainer_that_drives_nothing_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "hf_efx"):
        log = run(Trainer, targeted(), tmp_path, max_steps=2)
    assert losses(log) == losses(run(Trainer, GPT2.build(), tmp_path, max_steps=2))
    assert caplog.text.count("Targeted dropout is on, but no training step has begun") == 1


def test_a_checkpoint_of_accelerate_keeps_the_candidates_beside_it(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model: Any = targeted()
    context: Any = step_context(model)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))

    def loss(step: int) -> float:
        context.begin_step(step)
        result = model.train()(**GPT2.batch()).loss
        accelerator.backward(result)
        optimizer.step()
        optimizer.zero_grad()
        return result.item()

    loss(0)
    accelerator.save_state(str(tmp_path))
    context.save(tmp_path)
    whole = loss(1)
    accelerator.load_state(str(tmp_path))
    context.load(tmp_path)
    assert loss(1) == whole


def test_what_a_run_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the model has no targeted dropout. Pass a TargetedDropoutConfig"):
        run(Trainer, GPT2.build(), tmp_path, [TargetedDropoutCallback()])
    with pytest.raises(ValueError, match=r"the model has rate=[\d.]+, the callback rate=0.1\. Leave the"):
        run(Trainer, targeted(), tmp_path, [TargetedDropoutCallback(config(rate=0.1))])
    differing = "has rate=0.5, the callback rate=0.1; scope='column', the callback scope='global'. Leave the callback"
    with pytest.raises(ValueError, match=differing):
        run(Trainer, targeted(), tmp_path, [TargetedDropoutCallback(config(rate=0.1, scope="global"))])

"""SliceOut under Trainers: who moves the slices, what is logged, and that runs resume exactly."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from matrix import ARCHITECTURES
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_efx import (
    EfxTrainer,
    RHOLossArguments,
    RHOLossTrainer,
    SliceOutCallback,
    SliceOutConfig,
    get_efx_model,
    step_context,
)
from hf_efx.core.model.adapter import efx_record
from hf_efx.core.training.step_context import StepContext, StepContextCallback
from hf_efx.slice_out.apply import spans_of

GPT2 = next(architecture for architecture in ARCHITECTURES if architecture.name == "gpt2")
WIDTHS = {"slice_out/mlp_width", "slice_out/attention_width"}


def sliced(seed: int = 0, **fields: Any) -> Any:
    return get_efx_model(GPT2.build(seed), SliceOutConfig(**{"rate": 0.5, "align": 2, **fields}))


class Watch(TrainerCallback):
    """Notes which units of the first MLP a step left without gradient, before the optimizer moves anything."""

    def __init__(self) -> None:
        self.shares: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gradient = kwargs["model"].transformer.h[0].mlp.c_fc.bias.grad
        self.shares.append(float((gradient == 0).float().mean()))


def run(
    make: Any, model: Any, folder: Path, callbacks: Any = (), resume: Any = None, **options: Any
) -> tuple[list[dict[str, float]], list[float]]:
    """Trains, and returns the log and the share of units without gradient, step by step."""
    arguments = TrainingArguments(
        str(folder),
        **{
            "max_steps": 6,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            "save_strategy": "no",
            "learning_rate": 1e-2,
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            **options,
        },
    )
    batch = GPT2.batch(12)
    data = [{name: values[i] for name, values in batch.items()} for i in range(12)]
    watch = Watch()
    trainer = make(model, arguments, train_dataset=data, callbacks=[*callbacks, watch])
    trainer.train(resume)
    return trainer.state.log_history, watch.shares


def losses(log: list[dict[str, float]]) -> list[float]:
    return [entry["loss"] for entry in log if "loss" in entry]


def test_efx_trainer_moves_the_slices_by_itself_and_another_with_the_callback(tmp_path: Path) -> None:
    ours, shares = run(EfxTrainer, sliced(), tmp_path, max_steps=3)
    assert shares == [0.5] * 3 and not WIDTHS & ours[0].keys()
    other, again = run(Trainer, sliced(), tmp_path, [SliceOutCallback()], max_steps=3)
    both, third = run(EfxTrainer, sliced(), tmp_path, [SliceOutCallback()], max_steps=3)
    assert losses(ours) == losses(other) == losses(both) and again == third == shares
    assert "slice_out/mlp_width" in other[0] and not any("time_ratio" in name for name in other[0])  # nothing timed
    seeded, _ = run(EfxTrainer, sliced(), tmp_path, seed=7, data_seed=42, max_steps=2)
    assert losses(seeded)[1] != losses(ours)[1]  # the slices follow the run's seed


def test_every_micro_batch_has_its_own_slice(tmp_path: Path) -> None:
    _, shares = run(EfxTrainer, sliced(starts="all"), tmp_path, gradient_accumulation_steps=3, max_steps=2)
    assert max(shares) < 0.5


def test_resume_gives_the_same_trace_whatever_the_model_was_loaded_as(tmp_path: Path) -> None:
    whole, _ = run(EfxTrainer, sliced(), tmp_path, save_strategy="steps", save_steps=3)
    checkpoint = str(tmp_path / "checkpoint-3")
    loaded = GPT2.auto.from_pretrained(checkpoint)
    assert step_context(loaded) is None and efx_record(loaded) is not None
    for model in (loaded, GPT2.build(1), sliced(1)):  # with the config's entry alone, dense, sliced
        log, shares = run(EfxTrainer, model, tmp_path, resume=checkpoint)
        assert losses(log) == losses(whole) and shares == [0.5] * 3
    # A seed that was given by mistake gives way to the checkpoint's.
    log, _ = run(EfxTrainer, GPT2.build(), tmp_path, resume=checkpoint, seed=9, data_seed=42)
    assert losses(log) == losses(whole)


def test_model_init_gets_its_slices_moved(tmp_path: Path) -> None:
    def make(model: Any, arguments: TrainingArguments, **options: Any) -> Trainer:
        return EfxTrainer(args=arguments, model_init=lambda: sliced(), **options)

    _, shares = run(make, None, tmp_path)
    assert shares == [0.5] * 6


def test_a_loaded_model_trains_dense_and_that_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sliced().save_pretrained(tmp_path / "saved")
    caplog.set_level(logging.WARNING, "hf_efx")  # the command line sets it for the whole process
    _, shares = run(EfxTrainer, GPT2.auto.from_pretrained(tmp_path / "saved"), tmp_path, max_steps=1)
    assert shares == [0.0] and "config.efx names slice_out, which loading doesn't put back" in caplog.text
    caplog.clear()
    _, shares = run(EfxTrainer, GPT2.build(), tmp_path, max_steps=1)
    assert shares == [0.0] and "config.efx" not in caplog.text


def test_a_trainer_that_moves_nothing_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "hf_efx"):
        _, shares = run(Trainer, sliced(), tmp_path, max_steps=2)
    assert shares == [0.0, 0.0]
    assert caplog.text.count("SliceOut is on, but no training step has begun") == 1


# --- what is logged


@pytest.mark.parametrize("make", [Trainer, EfxTrainer])
def test_widths_and_time_saved_are_logged(make: Any, tmp_path: Path) -> None:
    callback = SliceOutCallback(measure_time=True)
    log, _ = run(
        make,
        sliced(rate={"mlp": 0.25, "attention": 0.5}),
        tmp_path,
        [callback],
        gradient_accumulation_steps=2,
        max_steps=3,
    )
    training = [entry for entry in log if "loss" in entry]
    assert len(training) == 3 and "train_loss" in log[-1]
    for entry in (*training, log[-1]):
        assert entry["slice_out/mlp_width"] == 0.75 and entry["slice_out/attention_width"] == 0.5
        assert entry["slice_out/time_ratio"] == training[0]["slice_out/time_ratio"] > 0
    assert callback._times is not None
    dense, slices = callback._times
    for i, entry in enumerate(training, start=1):  # two micro-batches a step
        assert entry["slice_out/seconds_saved"] == pytest.approx(2 * i * (dense - slices))


def test_ramp_and_final_dense_steps(tmp_path: Path) -> None:
    model = sliced(rate=0.5, ramp_steps=2, final_dense_steps=2)
    callback = SliceOutCallback(measure_time=True)
    log, shares = run(Trainer, model, tmp_path, [callback])
    assert shares == [0.0, 0.25, 0.5, 0.5, 0.0, 0.0]
    entries = [entry for entry in log if "loss" in entry]
    assert [entry["slice_out/mlp_width"] for entry in entries] == [1.0, 0.75, 0.5, 0.5, 1.0, 1.0]
    assert callback._times is not None
    saved = [entry["slice_out/seconds_saved"] for entry in entries]
    difference = callback._times[0] - callback._times[1]
    assert saved == pytest.approx([f * difference for f in (0, 0.5, 1.5, 2.5, 2.5, 2.5)])
    assert step_context(model).max_steps == 6  # pyright: ignore


def test_measuring_changes_nothing(tmp_path: Path) -> None:
    resnet = next(a for a in ARCHITECTURES if a.name == "resnet")
    states = []
    for measure in (False, True):  # with running statistics
        model = get_efx_model(resnet.build(), SliceOutConfig(rate=0.5, align=2))
        arguments = TrainingArguments(str(tmp_path), max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True)
        data = [{k: v[i] for k, v in resnet.batch(8).items()} for i in range(8)]
        Trainer(model, arguments, train_dataset=data, callbacks=[SliceOutCallback(measure_time=measure)]).train()
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_the_training_batch_is_timed_and_not_the_scoring_draw(tmp_path: Path) -> None:
    rows = {k: v.tolist() for k, v in GPT2.batch(8).items()} | {"example_id": list(range(8))}
    callback, seen = SliceOutCallback(measure_time=True), []
    measure = callback._measure
    callback._measure = lambda model: (seen.append(callback._batch), measure(model))[1]
    arguments = RHOLossArguments(
        str(tmp_path),
        selection="loss",
        selection_ratio=0.5,
        score_mode="train",
        per_device_train_batch_size=2,
        **{"max_steps": 1, "use_cpu": True, "report_to": [], "disable_tqdm": True},
    )
    model = sliced()
    RHOLossTrainer(model, arguments, train_dataset=Dataset.from_dict(rows), callbacks=[callback]).train()
    ((_, batch),) = seen
    assert len(batch["input_ids"]) == 2 and "labels" in batch


def test_a_second_training_starts_clean(tmp_path: Path) -> None:
    callback = SliceOutCallback(measure_time=True)
    log, _ = run(Trainer, sliced(), tmp_path, [callback], max_steps=2)
    again, _ = run(Trainer, sliced(rate={"mlp": 0.25}), tmp_path, [callback], max_steps=1)
    assert "slice_out/attention_width" in log[0] and "slice_out/attention_width" not in again[0]
    assert again[0]["slice_out/mlp_width"] == 0.75 and callback._times is not None
    dense, slices = callback._times
    assert again[0]["slice_out/seconds_saved"] == pytest.approx(dense - slices)


# --- what is refused when training begins


@pytest.mark.parametrize(
    ("make", "model", "callback", "options", "words"),
    [
        (Trainer, GPT2.build, SliceOutCallback(), {}, "SliceOutCallback: the model has no slices. Call get_efx_model"),
        (Trainer, sliced, SliceOutCallback(), {"use_cache": True}, "use_cache=True: SliceOut keeps other heads"),
        (EfxTrainer, lambda: sliced(final_dense_steps=6), None, {}, "final_dense_steps=6 leave no sliced step of"),
    ],
    ids=["dense", "cache", "no sliced step"],
)
def test_what_a_run_cannot_be(
    make: Any, model: Any, callback: Any, options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        run(make, model(), tmp_path, [callback] if callback else [], **options)


def test_time_that_cannot_be_measured(tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), use_cpu=True)
    arguments.torch_compile = True
    callback: Any = SliceOutCallback(measure_time=True)
    with pytest.raises(ValueError, match=r"measure_time=True.*passes can't be timed.*torch_compile=True"):
        callback.on_train_begin(arguments, TrainerState(max_steps=3), TrainerControl(), model=sliced())
    SliceOutCallback().on_train_begin(arguments, TrainerState(max_steps=3), TrainerControl(), model=sliced())


def test_a_context_of_ones_own_stays_the_callback_s() -> None:
    context = StepContext(seed=3)
    callback: Any = StepContextCallback(context)
    state: Any = type("State", (), {"max_steps": 5, "stateful_callbacks": {}})
    args: Any = type("Args", (), {"process_index": 0, "seed": 42})
    callback.on_train_begin(args, state, None, model=GPT2.build())
    assert callback.context is context and context.seed == 3 and context.max_steps == 5


def test_a_model_without_methods_needs_no_context(tmp_path: Path) -> None:
    log, _ = run(Trainer, GPT2.build(), tmp_path, [StepContextCallback()], max_steps=1)
    assert len(losses(log)) == 1


def test_spans_are_moved_once_a_micro_batch(tmp_path: Path) -> None:
    """With a callback passed, an EfxTrainer adds no second one, which would go on twice."""
    seen: list[tuple[int, int]] = []
    model = sliced()
    context: Any = step_context(model)
    hook = model.register_forward_pre_hook(lambda *_: seen.append((context.step, context.micro_step)))
    run(EfxTrainer, model, tmp_path, [SliceOutCallback()], gradient_accumulation_steps=2, max_steps=2)
    hook.remove()
    assert seen == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert len(spans_of(model)) == 4

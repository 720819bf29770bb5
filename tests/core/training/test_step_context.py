"""Draws of training-time methods: repeated by recomputation and resume, absent outside training steps."""

import json

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_efx.core.training.step_context import StepContext, StepContextCallback, derive_seed


def draw(context, name="drop", **kwargs):
    generator = context.generator(name, **kwargs)
    return None if generator is None else torch.rand(3, generator=generator).tolist()


class Dropping(nn.Module):
    """A linear layer with a mask of its own, which notes every mask that it draws."""

    def __init__(self, context, width=4):
        super().__init__()
        self.context, self.linear, self.masks = context, nn.Linear(width, width), []

    def forward(self, x):
        generator = self.context.generator("drop")
        if generator is None:
            self.masks.append(None)
            return self.linear(x)
        mask = torch.bernoulli(torch.full((x.shape[-1],), 0.5), generator=generator)
        self.masks.append("".join(str(int(v)) for v in mask))
        return self.linear(x * mask)


def test_seeds_are_pinned_and_differ():
    # Pinned: a change would break the exact resume of every checkpoint that is out there.
    assert derive_seed(0, 0, 0, 0, "drop") == 4021385194639004183
    places = [
        (seed, step, micro, rank, name)
        for seed in (0, 1)
        for step in (0, 1, 11)
        for micro in (0, 1)
        for rank in (None, 0, 1)
        for name in ("a", "b", "1/a")
    ]
    assert len({derive_seed(*place) for place in places}) == len(places)
    assert all(0 <= derive_seed(*place) < 2**63 for place in places)


def test_draws_repeat_in_place_and_differ_between_places():
    context = StepContext(seed=1)
    context.begin_step(5)
    first = draw(context)
    assert draw(context) == first != draw(context, "other")
    context.next_micro_step()
    second = draw(context)
    assert second != first
    context.end_step()
    context.begin_step(6)
    assert draw(context) not in (first, second)
    context.begin_step(5)
    assert draw(context) == first


def test_ranks_draw_apart_or_together():
    one, two = StepContext(seed=1, rank=0), StepContext(seed=1, rank=1)
    for context in (one, two):
        context.begin_step(0)
    assert draw(one) != draw(two)
    assert draw(one, shared=True) == draw(two, shared=True)
    assert one.seed_for("drop") == derive_seed(1, 0, 0, 0, "drop")
    assert one.seed_for("drop", shared=True) == derive_seed(1, 0, 0, None, "drop")


def test_no_draws_outside_steps_or_when_disabled():
    context = StepContext(seed=0)
    assert draw(context) is None and context.seed_for("drop") is None
    context.begin_step(0)
    first = draw(context)
    with context.disabled():
        assert draw(context) is None
        with context.disabled():
            assert draw(context) is None
        assert not context.active
    assert draw(context) == first
    with pytest.raises(RuntimeError, match="boom"):
        with context.disabled():
            raise RuntimeError("boom")
    assert draw(context) == first
    context.end_step()
    assert draw(context) is None


def test_the_global_random_state_is_left_alone():
    before = torch.random.get_rng_state()
    context = StepContext(seed=0)
    context.begin_step(0)
    draw(context)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_repeats_the_mask(use_reentrant):
    gradients = {}
    for recompute in (False, True):
        torch.manual_seed(0)
        context = StepContext(seed=3)
        layer = Dropping(context)
        x = torch.ones(2, 4, requires_grad=True)
        for step in range(2):
            context.begin_step(step)
            for micro_step in range(2):
                if micro_step:
                    context.next_micro_step()
                # preserve_rng_state restores the global random state alone: the draws must not need it.
                y = (
                    checkpoint(layer, x, use_reentrant=use_reentrant, preserve_rng_state=False)
                    if recompute
                    else layer(x)
                )
                y.square().sum().backward()
            context.end_step()
        gradients[recompute] = layer.linear.weight.grad
        if recompute:
            assert layer.masks[0::2] == layer.masks[1::2]  # each forward, and its second run in the backward pass
            assert len(layer.masks) == 8 and len(set(layer.masks[0::2])) > 1
    torch.testing.assert_close(gradients[True], gradients[False], rtol=0, atol=0)


def test_state_dict_is_json_and_restores():
    context = StepContext(seed=7)
    context.begin_step(4)
    expected = draw(context)
    context.end_step()
    state = json.loads(json.dumps(context.state_dict()))
    assert state == {"seed": 7, "step": 4}
    other = StepContext(seed=0)
    other.load_state_dict(state)
    assert draw(other) is None
    other.begin_step(other.step)
    assert draw(other) == expected
    with pytest.raises(ValueError, match="needs 'seed' and 'step'"):
        other.load_state_dict({"seed": 1})


class Net(nn.Module):
    """Regression net under a Trainer; it stays in training mode, so that only the context switches the draws off."""

    def __init__(self, context):
        super().__init__()
        torch.manual_seed(0)
        self.drop, self.head = Dropping(context), nn.Linear(4, 1)

    def forward(self, x, labels):
        return {"loss": (self.head(self.drop(x)).squeeze(-1) - labels).square().mean(), "logits": labels}


class AlwaysTraining(Net):
    def eval(self):
        return self


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def run(folder, seed=5, model_class=Net, stop_at=None, resume=None, **options):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(24, 5, generator=generator)
    data = [{"x": row[:4], "labels": row[4]} for row in rows]
    context = StepContext(seed=seed)
    model = model_class(context)
    args = TrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        max_steps=6,
        save_steps=2,
        learning_rate=0.05,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    callbacks = [StepContextCallback(context), *([StopAt(stop_at)] if stop_at else [])]
    trainer = Trainer(model, args, train_dataset=data, eval_dataset=data[:4], callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return model, trainer


def test_under_a_trainer_each_micro_batch_has_its_own_draw(tmp_path):
    model, _ = run(tmp_path)
    expected = StepContext(seed=5)
    masks = []
    for step in range(6):
        for micro_step in range(3):
            expected.begin_step(step)
            expected.micro_step = micro_step
            mask = torch.bernoulli(torch.full((4,), 0.5), generator=expected.generator("drop"))
            masks.append("".join(str(int(v)) for v in mask))
    assert model.drop.masks == masks


def test_evaluation_draws_nothing_even_in_training_mode(tmp_path):
    model, trainer = run(tmp_path, model_class=AlwaysTraining, eval_strategy="steps", eval_steps=1, eval_on_start=True)
    evaluations = 7  # one at the start, one after each of 6 steps; 4 rows are one batch of the default 8
    assert model.drop.masks.count(None) == evaluations and len(model.drop.masks) == 18 + evaluations
    trainer.evaluate()
    assert model.drop.masks[-1] is None


@pytest.mark.parametrize("restore_callbacks", [False, True])
def test_resume_gives_the_same_trace(tmp_path, restore_callbacks, caplog):
    whole, _ = run(tmp_path / "whole")
    run(tmp_path / "cut", stop_at=4)
    state = json.loads((tmp_path / "cut/checkpoint-4/trainer_state.json").read_text())
    assert state["stateful_callbacks"]["hf_efx.step_context"] == {"seed": 5, "step": 3}
    # The checkpoint's seed wins over another one given by mistake, which is said.
    resumed, _ = run(
        tmp_path / "cut", seed=6, resume=True, restore_callback_states_from_checkpoint=restore_callbacks
    )
    assert resumed.drop.masks == whole.drop.masks[12:]
    assert "seed=5, not 6" in caplog.text
    for mine, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)

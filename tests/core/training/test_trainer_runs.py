"""What the end of a run doesn't depend on: when it was saved, what was before, in which layout it is kept."""

import inspect
import json

import pytest
import torch
from test_trainer import arguments, assert_same, gpt2, rows, trainer_for, weights
from test_weights import build
from torch import nn
from transformers import (
    OPTConfig,
    OPTForCausalLM,
    Seq2SeqTrainer,
    Trainer,
    TrainerCallback,
    TrainerState,
)

from hf_efx import EfxTrainer, EfxTrainerMixin, TargetedDropoutConfig, get_efx_model
from hf_efx.core.training.checkpoints import explain_incomplete
from hf_efx.core.training.step_context import StepContext, StepContextCallback
from hf_efx.core.training.step_cost import StepTimer, TrainingClock


def layer_drop():
    """Dropout, and whole layers that are left out by a draw of the global generator."""
    options = {"hidden_size": 8, "ffn_dim": 8, "word_embed_proj_dim": 8, "num_hidden_layers": 3}
    ids = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1, "vocab_size": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = OPTConfig(**options, **ids, num_attention_heads=2, layerdrop=0.5, max_position_embeddings=8)
        return OPTForCausalLM(config)


def targeted():
    return get_efx_model(gpt2(), TargetedDropoutConfig(targeting=0.5, refresh_every=5))


@pytest.mark.parametrize(
    "trainer_class, make", [(EfxTrainer, layer_drop), (EfxTrainer, targeted), (Trainer, targeted)]
)
def test_a_run_ends_the_same_whenever_it_was_saved(trainer_class, make, tmp_path):
    def end(save_steps, resume=None):
        options = {"save_steps": save_steps, "max_steps": 7, "gradient_accumulation_steps": 2}
        callbacks = [StepContextCallback()]
        trainer = trainer_for(tmp_path, make(), cls=trainer_class, callbacks=callbacks, **options)
        trainer.train(resume)
        return weights(trainer.model)

    expected = end(100)
    assert_same(end(3), expected)  # between two renewals of the candidates, and at step 6 after the second
    assert (tmp_path / "checkpoint-3/step_context.pt").exists() == (make is targeted)
    for step in (3, 6):
        assert_same(end(3, str(tmp_path / f"checkpoint-{step}")), expected)


def test_evaluating_moves_the_global_random_numbers(tmp_path):
    """transformers' own: an evaluation's data loader draws a seed, so that dropout goes on from another place."""

    def end(folder, model, eval_strategy, resume=None):
        options = {"max_steps": 4, "eval_strategy": eval_strategy, "eval_steps": 1, "save_steps": 2}
        trainer = EfxTrainer(model, arguments(folder, **options), train_dataset=rows(), eval_dataset=rows(4))
        trainer.train(resume)
        return weights(trainer.model)

    def changed(make):
        one, other = (end(tmp_path, make(), strategy) for strategy in ("no", "steps"))
        return any(not torch.equal(one[name], other[name]) for name in one)

    def still():
        model = gpt2()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return model

    assert changed(gpt2) and not changed(still)
    expected = end(tmp_path, gpt2(), "steps")
    assert_same(end(tmp_path, gpt2(seed=1), "steps", str(tmp_path / "checkpoint-2")), expected)


def test_candidates_that_a_checkpoint_lacks_make_it_incomplete(tmp_path):
    trainer_for(tmp_path, targeted(), max_steps=2).train()
    folder = tmp_path / "checkpoint-2"
    assert explain_incomplete(folder) is None
    (folder / "step_context.pt").unlink()
    assert explain_incomplete(folder) == "step_context.pt, which trainer_state.json names, is missing"
    plain = trainer_for(tmp_path, targeted(), cls=Trainer, callbacks=[StepContextCallback()], max_steps=3)
    with pytest.raises(ValueError, match="step_context.pt has the state of 0 methods, the model has 1"):
        plain.train(str(folder))


@pytest.mark.parametrize("by", ["max_steps", "num_train_epochs"])
def test_a_finished_run_resumed_trains_no_step(by, tmp_path):
    def make(cls=EfxTrainer):
        options = {"max_steps": 3} if by == "max_steps" else {"max_steps": -1, "num_train_epochs": 1}
        return trainer_for(tmp_path, cls=cls, save_steps=1, **options)

    whole = make()
    whole.train()
    folders = sorted(path.name for path in tmp_path.iterdir())
    again = make()
    output = again.train(True)
    assert again.state.global_step == output.global_step == whole.state.global_step
    assert_same(weights(again.model), weights(whole.model))
    assert sorted(path.name for path in tmp_path.iterdir()) == folders
    if by == "max_steps":  # what is mended
        plain = make(Trainer)
        plain.train(True)
        assert plain.state.global_step == 4


@pytest.mark.parametrize("name", ["ViTForImageClassification", "MixtralForCausalLM"])
def test_the_best_model_comes_back_from_an_older_layout(name, tmp_path):
    generator = torch.Generator().manual_seed(0)
    if name.startswith("ViT"):
        data = [{"pixel_values": torch.randn(1, 8, 8, generator=generator), "labels": i % 2} for i in range(8)]
    else:
        data = rows(8)
    options = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "score",
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "max_steps": 3,
    }

    def make(scores, **other):
        return EfxTrainer(
            args=arguments(tmp_path, **options),
            train_dataset=data,
            eval_dataset=data,
            compute_metrics=lambda _: {"score": scores.pop()},
            **other,
        )

    trainer = make([0.0, 1.0, 2.0, 3.0], model=build(name))  # the first evaluation is the best
    trainer.train()
    best = str(tmp_path / "checkpoint-1")
    assert trainer.state.best_model_checkpoint == best
    assert_same(weights(trainer.model), weights(type(trainer.model).from_pretrained(best)))
    first = next(row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(first, rel=1e-6)
    resumed = make([1.0], model=build(name, seed=1))
    resumed.train(str(tmp_path / "checkpoint-2"))
    assert_same(weights(resumed.model), weights(trainer.model))


def test_arguments_are_the_trainers_own_named_and_described():
    own = inspect.signature(EfxTrainer).parameters
    assert own == inspect.signature(Trainer).parameters
    assert all(f"        {name}: " in str(EfxTrainer.__doc__) for name in own)

    class EfxSeq2SeqTrainer(EfxTrainerMixin, Seq2SeqTrainer):
        pass

    assert inspect.signature(EfxSeq2SeqTrainer) == inspect.signature(Seq2SeqTrainer)


def test_the_mixin_must_come_first():
    with pytest.raises(TypeError, match=r"class Late\(EfxTrainerMixin, Seq2SeqTrainer\)"):

        class Late(Seq2SeqTrainer, EfxTrainerMixin):
            pass


def test_a_stale_optimizer_is_refused(tmp_path):
    from hf_efx import LowRankConfig

    model = gpt2()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    get_efx_model(model, LowRankConfig(rank=2, only_if_smaller=False))
    trainer = EfxTrainer(model, arguments(tmp_path), train_dataset=rows(), optimizers=(optimizer, None))
    with pytest.raises(ValueError, match=r"lacks \d+ that it has, such as .*they would not be trained"):
        trainer.train()
    extra = nn.Parameter(torch.ones(1))  # of a loss of one's own, say
    trainer.optimizer = torch.optim.SGD([*model.parameters(), extra], lr=0.1)
    assert trainer.train().global_step == 6


def test_weights_alone_are_resumed_from_with_a_warning(tmp_path, caplog):
    trainer_for(tmp_path, max_steps=2, save_only_model=True).train()
    trainer_for(tmp_path, max_steps=3).train(True)
    assert "checkpoint-2 has weights alone (save_only_model)" in caplog.text


class Failing(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise RuntimeError("boom")


def test_a_second_run_starts_clean(tmp_path):
    """Callbacks and figures of a run, or of a search's trial, don't reach into the next."""
    timer, clock, failing = StepTimer(), TrainingClock(), Failing()
    trainer = EfxTrainer(
        args=arguments(tmp_path, max_steps=3, logging_steps=3),
        train_dataset=rows(),
        model_init=targeted,
        callbacks=[timer, clock, failing],
    )
    trainer.add_metrics({"efx/figure": 1.0})
    with pytest.raises(RuntimeError, match="boom"):
        trainer.train()
    trainer.remove_callback(failing)
    clock.seconds = 1000.0
    ends = []
    for _ in range(2):
        trainer.train()
        ends.append(weights(trainer.model))
        assert len(timer.seconds) == 3 and 0 < clock.seconds < 1000
        assert not any("efx/figure" in row for row in trainer.state.log_history)
    assert_same(*ends)
    state = json.loads((tmp_path / "checkpoint-3/trainer_state.json").read_text())["stateful_callbacks"]
    assert state["hf_efx.training_clock"] == pytest.approx(clock.seconds)
    # A new process counts on from there.
    resumed, again = TrainerState(global_step=3, stateful_callbacks=state), TrainingClock()  # pyright: ignore
    again.on_train_begin(trainer.args, resumed, trainer.control)
    assert again.seconds == state["hf_efx.training_clock"]


def test_another_models_context_is_refused(tmp_path):
    trainer = trainer_for(tmp_path, targeted(), callbacks=[StepContextCallback(StepContext(seed=0))])
    with pytest.raises(ValueError, match="was given another model's StepContext"):
        trainer.train()

"""The switch from dense to factorised inside a run. Two processes: test_matrix_processes.py."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from two_processes import Kill

from hf_efx import LowRankConfig, LowRankTrainer
from hf_efx.core.model.adapter import efx_record
from hf_efx.low_rank.decay import factorised_layers
from low_rank.switching import DATA, STEPS, SWITCH, TOKENS, arguments, build, losses, run, state, trainer

FULL = {"rank": 1.0, "only_if_smaller": False}
SAVED = {"save_strategy": "steps", "save_steps": 2}  # at 2, 3 (the switch, still dense), 4 and 6


def assert_same_run(one: Trainer, other: Trainer) -> None:
    """The same losses and the same last parameters and optimiser moments, bit for bit."""
    assert losses(one) == losses(other)
    assert state(one).keys() == state(other).keys()
    for key, value in state(other).items():
        assert torch.equal(state(one)[key], value), key
    names = [{p: name for name, p in each.model.named_parameters()} for each in (one, other)]  # pyright: ignore
    moments = [
        {table[p]: values["exp_avg_sq"] for p, values in each.optimizer.state.items()}  # pyright: ignore
        for table, each in zip(names, (one, other), strict=True)
    ]
    assert moments[0].keys() == moments[1].keys()
    assert all(torch.equal(moments[0][name], value) for name, value in moments[1].items())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> LowRankTrainer:
    """A run without a break."""
    return run(tmp_path_factory.mktemp("whole"), **SAVED)


# --- kill and resume


@pytest.mark.parametrize("step", [SWITCH, SWITCH + 1, 5])  # the kill comes at a step's end, before its checkpoint
def test_killed_before_at_and_after_the_switch_it_resumes_bit_for_bit(
    step: int, tmp_path: Path, whole: LowRankTrainer
) -> None:
    killed = trainer(tmp_path, **SAVED)
    killed.add_callback(Kill(step))
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = trainer(tmp_path, **SAVED)
    resumed.train(True)
    assert_same_run(resumed, whole)


def test_killed_while_it_switches_it_resumes_bit_for_bit(
    tmp_path: Path, whole: LowRankTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = trainer(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("hf_efx.low_rank.switch.convert_optimizer_state", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            killed.train()
    assert (tmp_path / f"checkpoint-{SWITCH}").is_dir()
    resumed = trainer(tmp_path)
    resumed.train(True)
    assert_same_run(resumed, whole)
    assert not list(tmp_path.glob("factorised-*"))
    made = LowRankTrainer(
        args=arguments(tmp_path, dense_warmup_steps=SWITCH),
        model_init=lambda: build(),
        train_dataset=DATA,
        low_rank_config=LowRankConfig(),
    )
    for _ in range(2):  # the second time the model in memory is the first one's, factorised
        made.train(str(tmp_path / f"checkpoint-{SWITCH}"))
        assert losses(made) == pytest.approx(losses(whole), rel=1e-5)


def _interrupt(*args: Any, **kwargs: Any) -> None:
    raise KeyboardInterrupt


def test_checkpoints_are_dense_up_to_the_switch_and_load_alone(whole: LowRankTrainer, tmp_path: Path) -> None:
    folder = Path(str(whole.args.output_dir))
    saved = {int(path.name.rpartition("-")[2]): path for path in folder.iterdir() if path.is_dir()}
    assert sorted(saved) == [2, SWITCH, 4, STEPS]
    loaded = {step: AutoModelForCausalLM.from_pretrained(path) for step, path in saved.items()}
    assert {step: efx_record(model) is not None for step, model in loaded.items()} == {s: s > SWITCH for s in saved}
    assert all(torch.equal(value, state(whole)[key]) for key, value in loaded[STEPS].state_dict().items())
    resumed = trainer(tmp_path)
    resumed.train(str(saved[4]))
    assert_same_run(resumed, whole)


def test_checkpoints_of_other_options_are_refused(whole: LowRankTrainer, tmp_path: Path) -> None:
    folder = Path(str(whole.args.output_dir))
    for step, options, words in (
        (2, {"dense_warmup_steps": 1}, "is dense at step 2, past dense_warmup_steps=1: name an earlier checkpoint"),
        (4, {"dense_warmup_steps": 5}, "is factorised at step 4, but dense_warmup_steps=5 trains dense up to there"),
        (4, {"config": LowRankConfig(rank=2)}, "factorised already, with rank=0.25, but low_rank_config has rank=2"),
    ):
        with pytest.raises(ValueError, match=f"checkpoint-{step}'.* {words}"):
            trainer(tmp_path, **options).train(str(folder / f"checkpoint-{step}"))


# --- the switch itself


def own_loader(rows: Any) -> type[LowRankTrainer]:
    class Own(LowRankTrainer):
        def get_train_dataloader(self) -> DataLoader:
            return DataLoader(rows, batch_size=2, collate_fn=self.data_collator)

    return Own


ROWS = [{"input_ids": row, "labels": row} for row in TOKENS.tolist()]


@pytest.mark.parametrize("data", ["map", "stream", "loader"])
def test_the_data_go_on_where_they_were(data: str, tmp_path: Path) -> None:
    """At full rank and rate zero the losses show the rows that each step saw, beyond the first epoch too."""
    rows: Any = IterableDataset.from_generator(lambda: iter(ROWS)) if data == "stream" else Dataset.from_list(ROWS)
    cls, options = own_loader(DATA) if data == "loader" else LowRankTrainer, {"learning_rate": 0.0}
    dense = cls(build(0.0), arguments(tmp_path, **options), train_dataset=rows)
    switched = cls(
        build(0.0),
        arguments(tmp_path, dense_warmup_steps=SWITCH, **options),
        train_dataset=rows,
        low_rank_config=LowRankConfig(**FULL),
    )
    for each in (dense, switched):
        each.train()
    assert losses(switched) == pytest.approx(losses(dense), abs=1e-5)
    assert min(abs(a - b) for a, b in zip(losses(dense), losses(dense)[1:], strict=False)) > 1e-4
    assert len(factorised_layers(switched.model)) == 8  # pyright: ignore


def test_switch_at_full_rank_leaves_the_loss_where_it_was(whole: LowRankTrainer, tmp_path: Path) -> None:
    plain = arguments(tmp_path / "dense", TrainingArguments, activation_checkpointing=True)
    dense = Trainer(build(), plain, train_dataset=DATA)
    dense.train()
    before = losses(dense)
    for mode in ("project", "reset"):
        options = {"switch_optimizer_state": mode, "activation_checkpointing": True}
        after = losses(run(tmp_path / mode, LowRankConfig(**FULL), **options))
        assert after[:SWITCH] == before[:SWITCH] == losses(whole)[:SWITCH]
        assert abs(after[SWITCH] - before[SWITCH]) < 1e-5  # the first factorised forward
        assert after[SWITCH + 1] != before[SWITCH + 1]
    assert abs(losses(whole)[SWITCH] - before[SWITCH]) > 1e-4  # of a low rank


def rates(run: Trainer) -> list[float]:
    return [entry["learning_rate"] for entry in run.state.log_history if "learning_rate" in entry]


def test_learning_rate_is_scaled_from_the_switch_on(whole: LowRankTrainer, tmp_path: Path) -> None:
    scaled = rates(run(tmp_path, switch_learning_rate_scale=0.5))
    # linear from 0.01 to 0; a step's log shows the rate of that step
    assert rates(whole) == pytest.approx([0.01 * (1 - i / STEPS) for i in range(STEPS)])
    expected = [rate * (0.5 if i >= SWITCH else 1.0) for i, rate in enumerate(rates(whole))]
    assert scaled == pytest.approx(expected)


class Look(TrainerCallback):
    """The optimiser's states and rates as the first factorised step finds them, by name."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == SWITCH:
            optimizer = kwargs["optimizer"].optimizer
            names = {p: name for name, p in kwargs["model"].named_parameters()}
            self.states = {name: copy.deepcopy(optimizer.state.get(p, {})) for p, name in names.items()}
            groups = [(names.get(p), group["lr"]) for group in optimizer.param_groups for p in group["params"]]
            self.rates = dict(groups)


def looked_at(cls: type[LowRankTrainer], folder: Path, **options: Any) -> Look:
    look = Look()
    switching = cls(
        build(),
        arguments(folder, dense_warmup_steps=SWITCH, **options),
        train_dataset=DATA,
        low_rank_config=LowRankConfig(),
        callbacks=[look],
    )
    switching.train()
    assert switching.state.global_step == STEPS
    return look


FACTOR, UNTOUCHED = "transformer.h.0.mlp.c_fc.factor_v", "transformer.wte.weight"


@pytest.mark.parametrize(
    ("optim", "key"), [("adamw_torch", "exp_avg"), ("rmsprop", "square_avg"), ("adagrad", "sum"), ("adafactor", "")]
)
def test_projected_moments_reach_the_optimiser_and_reset_ones_don_t(optim: str, key: str, tmp_path: Path) -> None:
    modes = ("project", "reset") if key else ("reset",)
    seen = {mode: looked_at(LowRankTrainer, tmp_path, optim=optim, switch_optimizer_state=mode) for mode in modes}
    if optim == "adagrad":  # makes its states at the start
        assert seen["reset"].states[FACTOR][key].count_nonzero() == 0
    else:
        assert not seen["reset"].states[FACTOR]
    if not key:
        assert seen["reset"].states[UNTOUCHED]["step"] == SWITCH
        return
    moment = seen["project"].states[FACTOR][key]
    assert moment.shape == (8, 32) and moment.abs().max() > 0
    assert torch.equal(seen["reset"].states[UNTOUCHED][key], seen["project"].states[UNTOUCHED][key])


class GroupAParameter(LowRankTrainer):
    """Rates by name, and a parameter that isn't the model's, in an optimizer and a loss of its own."""

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None:
            self.temperature = torch.nn.Parameter(torch.ones(()))
            names = dict(self.model.named_parameters())  # pyright: ignore
            groups = [{"params": [p], "lr": 1e-3 * (1 + ("c_fc" in name))} for name, p in names.items()]
            self.optimizer = torch.optim.AdamW([*groups, {"params": [self.temperature], "lr": 0.5}])
        return self.optimizer

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss: Any = super().compute_loss(model, inputs, False, num_items_in_batch)
        return loss * self.temperature


def test_an_optimizer_and_a_loss_of_one_s_own_go_through_the_switch(tmp_path: Path) -> None:
    look = looked_at(GroupAParameter, tmp_path, lr_scheduler_type="constant", switch_learning_rate_scale=0.5)
    assert {name: rate for name, rate in look.rates.items() if name} == pytest.approx(
        {name: 5e-4 * (1 + ("c_fc" in name)) for name in look.states}
    )
    assert look.rates[None] == 0.25  # pyright: ignore
    assert all(value["step"] == SWITCH for value in look.states.values())


@pytest.mark.parametrize("warmup", [0, SWITCH])
def test_factor_decay_takes_the_factors_out_of_weight_decay(warmup: int, tmp_path: Path) -> None:
    for strength, decayed in ((0.0, True), (0.05, False)):
        done = run(tmp_path, dense_warmup_steps=warmup, factor_decay=strength, max_steps=SWITCH + 1)
        groups = done.optimizer.param_groups  # pyright: ignore
        held = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
        for layer in factorised_layers(done.model).values():  # pyright: ignore
            assert {held[id(layer.weight)], held[id(layer.factor_v)]} == {0.1 if decayed else 0.0}
        assert held[id(done.model.transformer.wte.weight)] == 0.1  # pyright: ignore
        assert held[id(done.model.transformer.h[0].mlp.c_fc.bias)] == 0.0  # pyright: ignore


def test_one_summary_says_what_the_whole_run_took(tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []

    class Logs(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append(logs)

    running = trainer(tmp_path)
    running.add_callback(Logs())
    output = running.train()
    (summary,) = [logs for logs in seen if "train_loss" in logs]
    expected = sum(losses(running)) / STEPS
    assert output.training_loss == pytest.approx(expected) == summary["train_loss"] == output.metrics["train_loss"]
    runtime, per_second = summary["train_runtime"], summary["train_steps_per_second"]
    assert runtime * per_second == pytest.approx(STEPS, rel=0.05)
    assert summary["train_samples_per_second"] == pytest.approx(4 * per_second, rel=0.05)


# --- the best checkpoint, and a run that ends before the switch

EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}


def test_best_dense_checkpoint_is_not_loaded_into_the_factorised_model(tmp_path: Path) -> None:
    # The rate grows so much after the switch that the best loss is a dense one.
    options = {"switch_learning_rate_scale": 300.0, "save_total_limit": 1, "load_best_model_at_end": True}
    done = LowRankTrainer(
        build(),
        arguments(tmp_path, dense_warmup_steps=SWITCH, **EVALUATED, **options),
        train_dataset=DATA,
        eval_dataset=DATA[:4],
        low_rank_config=LowRankConfig(),
    )
    done.train()
    figures = {e["step"]: e["eval_loss"] for e in done.state.log_history if "eval_loss" in e}
    assert min(figures, key=figures.__getitem__) <= SWITCH
    assert done.state.best_global_step > SWITCH  # pyright: ignore
    assert len(factorised_layers(done.model)) == 8  # pyright: ignore
    assert done.evaluate()["eval_loss"] == pytest.approx(figures[done.state.best_global_step])  # pyright: ignore


def test_stopped_before_the_switch_it_stays_dense_and_keeps_the_best(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            control.should_training_stop = state.global_step == 2
            return control

    stopped = LowRankTrainer(  # the rate is so high that the first step is the better one
        build(),
        arguments(tmp_path, dense_warmup_steps=SWITCH, learning_rate=1.0, load_best_model_at_end=True, **EVALUATED),
        train_dataset=DATA,
        eval_dataset=DATA[:4],
        low_rank_config=LowRankConfig(),
        callbacks=[Stop()],
    )
    stopped.train()
    assert stopped.state.global_step == 2 and efx_record(stopped.model) is None  # pyright: ignore
    assert "Training ended at step 2, before dense_warmup_steps=3: the model is dense" in caplog.text
    figures = [e["eval_loss"] for e in stopped.state.log_history if "eval_loss" in e]
    assert figures[0] < figures[1]
    assert stopped.evaluate()["eval_loss"] == pytest.approx(figures[0])


def test_logs_and_evaluations_by_epoch_aren_t_broken_by_the_switch(tmp_path: Path) -> None:
    options = {f"{kind}_strategy": "epoch" for kind in ("eval", "save", "logging")}
    done = LowRankTrainer(
        build(),
        arguments(tmp_path, dense_warmup_steps=SWITCH, **options),
        train_dataset=DATA,
        eval_dataset=DATA[:4],
        low_rank_config=LowRankConfig(),
    )
    done.train()
    assert [e["step"] for e in done.state.log_history if "eval_loss" in e] == [4, STEPS]
    assert [e["step"] for e in done.state.log_history if "loss" in e] == [4, STEPS]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-4", "checkpoint-6"]


def test_a_run_that_saves_the_best_alone_has_the_switch_s_checkpoint_too(tmp_path: Path) -> None:
    best = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best", "metric_for_best_model": "loss"}
    done = LowRankTrainer(  # the rate is so high that the first step is the best one
        build(),
        arguments(tmp_path, dense_warmup_steps=SWITCH, learning_rate=1.0, load_best_model_at_end=True, **best),
        train_dataset=DATA,
        eval_dataset=DATA[:4],
        low_rank_config=LowRankConfig(),
    )
    done.train()
    figures = {e["step"]: e["eval_loss"] for e in done.state.log_history if "eval_loss" in e}
    assert figures[SWITCH] > figures[1] and done.state.best_global_step > SWITCH  # pyright: ignore
    assert done.evaluate()["eval_loss"] == pytest.approx(figures[done.state.best_global_step])  # pyright: ignore

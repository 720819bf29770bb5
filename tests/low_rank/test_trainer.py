"""The switch from dense to factorised inside a run. Decay: test_decay.py; two processes: test_matrix_processes.py."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import ARCHITECTURES
from transformers import AutoModelForCausalLM, HfArgumentParser, Trainer, TrainerCallback, TrainingArguments
from two_processes import Kill, losses

from hf_efx import LowRankArguments, LowRankConfig, LowRankTrainer, get_efx_model
from hf_efx.core.model.adapter import efx_record
from hf_efx.low_rank.arguments import LowRankArgumentsMixin
from hf_efx.low_rank.decay import factorised_layers

GPT2 = next(architecture for architecture in ARCHITECTURES if architecture.name == "gpt2")
STEPS, SWITCH = 10, 5
TOKENS = GPT2.batch(32)["input_ids"]
DATA = [{"input_ids": tokens, "labels": tokens} for tokens in TOKENS]
FULL = {"rank": 1.0, "only_if_smaller": False}


def build(dropout: float = 0.1) -> Any:
    """Dropout draws random numbers, so that a resume which loses their state shows."""
    torch.manual_seed(0)
    config = GPT2.config()
    config.update({"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout})
    return GPT2.auto.from_config(config)


def arguments(folder: Path, cls: Any = LowRankArguments, **options: Any) -> Any:
    defaults = {"max_steps": STEPS, "save_steps": 2, "learning_rate": 1e-2, "weight_decay": 0.1, "logging_steps": 1}
    fixed = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "report_to": [], "disable_tqdm": True}
    return cls(str(folder), use_cpu=True, **{**defaults, **fixed, **options})


def trainer(folder: Path, config: Any = None, model: Any = None, **options: Any) -> LowRankTrainer:
    options = {"dense_warmup_steps": SWITCH, **options}
    config = LowRankConfig() if config is None else config
    return LowRankTrainer(
        build() if model is None else model,
        arguments(folder, **options),
        train_dataset=DATA,  # pyright: ignore
        low_rank_config=config,
    )


def run(folder: Path, **kwargs: Any) -> LowRankTrainer:
    result = trainer(folder, **kwargs)
    result.train()
    return result


def state(run: Trainer) -> dict[str, torch.Tensor]:
    return run.model.state_dict()  # pyright: ignore


def assert_same_run(one: Trainer, other: Trainer) -> None:
    """The same losses and the same last parameters and optimiser moments, bit for bit."""
    assert losses(one) == losses(other)  # pyright: ignore
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
    return run(tmp_path_factory.mktemp("whole"))


# --- kill and resume


# Checkpoints lie at 2, 4, 5 (the switch, still dense), 6, 8. The kill comes at a step's end, before its checkpoint.
@pytest.mark.parametrize("step", [3, 5, 6, 7, 9])
def test_killed_before_at_and_after_the_switch_it_resumes_bit_for_bit(
    step: int, tmp_path: Path, whole: LowRankTrainer
) -> None:
    killed = trainer(tmp_path)
    killed.add_callback(Kill(step))
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = trainer(tmp_path)
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


def _interrupt(*args: Any, **kwargs: Any) -> None:
    raise KeyboardInterrupt


def test_named_checkpoint_of_each_phase_resumes(tmp_path: Path, whole: LowRankTrainer) -> None:
    folder = Path(str(whole.args.output_dir))
    for step in (2, SWITCH, 8):
        resumed = trainer(tmp_path)
        resumed.train(str(folder / f"checkpoint-{step}"))
        assert_same_run(resumed, whole)


def test_checkpoints_are_dense_up_to_the_switch_and_load_alone(whole: LowRankTrainer) -> None:
    folder = Path(str(whole.args.output_dir))
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == sorted(
        f"checkpoint-{step}" for step in (2, 4, 5, 6, 8, 10)
    )
    for step in (2, 4, 5, 6, 8, 10):
        model = AutoModelForCausalLM.from_pretrained(folder / f"checkpoint-{step}")
        assert (efx_record(model) is not None) == (step > SWITCH)
    assert all(torch.equal(value, state(whole)[key]) for key, value in model.state_dict().items())


# --- the switch itself


@pytest.mark.parametrize("optimizer_state", ["project", "reset"])
def test_switch_at_full_rank_leaves_the_loss_where_it_was(optimizer_state: str, tmp_path: Path) -> None:
    options = arguments(tmp_path / "dense", TrainingArguments)
    dense = Trainer(build(), options, train_dataset=DATA)  # pyright: ignore
    dense.train()
    config = LowRankConfig(**FULL)
    switched = run(tmp_path / "switched", config=config, switch_optimizer_state=optimizer_state)
    before, after = losses(dense), losses(switched)  # pyright: ignore
    assert after[:SWITCH] == before[:SWITCH]
    assert abs(after[SWITCH] - before[SWITCH]) < 1e-5  # the first factorised forward
    assert after[SWITCH + 1] != before[SWITCH + 1]


def test_low_rank_switch_changes_the_loss(whole: LowRankTrainer, tmp_path: Path) -> None:
    full = run(tmp_path, config=LowRankConfig(**FULL))
    assert losses(whole)[:SWITCH] == losses(full)[:SWITCH]
    assert abs(losses(whole)[SWITCH] - losses(full)[SWITCH]) > 1e-4


def rates(run: Trainer) -> list[float]:
    return [entry["learning_rate"] for entry in run.state.log_history if "learning_rate" in entry]


def test_learning_rate_is_scaled_from_the_switch_on(whole: LowRankTrainer, tmp_path: Path) -> None:
    scaled = rates(run(tmp_path, switch_learning_rate_scale=0.5))
    # linear from 0.01 to 0 in 10 steps; a step's log shows the rate of that step
    assert rates(whole) == pytest.approx([0.01 * (1 - i / STEPS) for i in range(STEPS)])
    expected = [rate * (0.5 if i >= SWITCH else 1.0) for i, rate in enumerate(rates(whole))]
    assert scaled == pytest.approx(expected)


def test_projected_moments_reach_the_optimiser_and_reset_ones_don_t(tmp_path: Path) -> None:
    class Look(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == SWITCH:
                states = kwargs["optimizer"].state
                self.states = {n: copy.deepcopy(states.get(p, {})) for n, p in kwargs["model"].named_parameters()}

    seen = {}
    for mode in ("project", "reset"):
        look = Look()
        switching = trainer(tmp_path / mode, switch_optimizer_state=mode)
        switching.add_callback(look)
        switching.train()
        seen[mode] = look.states
    name = "transformer.h.0.mlp.c_fc.factor_v"
    assert seen["project"][name]["step"] == SWITCH and seen["project"][name]["exp_avg"].abs().max() > 0
    assert seen["project"][name]["exp_avg"].shape == (8, 32)
    assert not seen["reset"][name]
    untouched = "transformer.wte.weight"
    assert torch.equal(seen["reset"][untouched]["exp_avg"], seen["project"][untouched]["exp_avg"])


@pytest.mark.parametrize("warmup", [0, SWITCH])
def test_factor_decay_takes_the_factors_out_of_weight_decay(warmup: int, tmp_path: Path) -> None:
    for strength, decayed in ((0.0, True), (0.05, False)):
        done = run(tmp_path / str(strength), dense_warmup_steps=warmup, factor_decay=strength)
        groups = done.optimizer.param_groups  # pyright: ignore
        held = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
        for layer in factorised_layers(done.model).values():  # pyright: ignore
            assert {held[id(layer.weight)], held[id(layer.factor_v)]} == {0.1 if decayed else 0.0}
        assert held[id(done.model.transformer.wte.weight)] == 0.1  # pyright: ignore
        assert held[id(done.model.transformer.h[0].mlp.c_fc.bias)] == 0.0  # pyright: ignore


def test_factor_metrics_are_logged(tmp_path: Path) -> None:
    done = run(tmp_path, log_factor_metrics=True)
    names = {"frobenius_norm", "effective_learning_rate", "effective_rank_share", "stable_rank"}
    logs = [entry for entry in done.state.log_history if "loss" in entry]
    for i, entry in enumerate(logs):
        assert {key.removeprefix("low_rank/") for key in entry if key.startswith("low_rank/")} == (
            names if i >= SWITCH else set()
        )
    assert 0 < logs[-1]["low_rank/effective_rank_share"] <= 1
    assert logs[-1]["low_rank/stable_rank"] >= 1


def test_best_dense_checkpoint_is_not_loaded_into_the_factorised_model(tmp_path: Path) -> None:
    # The rate grows so much after the switch that the best loss is a dense one.
    done = LowRankTrainer(
        build(),
        arguments(
            tmp_path,
            dense_warmup_steps=SWITCH,
            switch_learning_rate_scale=300.0,
            eval_strategy="steps",
            eval_steps=1,
            save_steps=1,
            save_total_limit=1,
            load_best_model_at_end=True,
        ),
        train_dataset=DATA,  # pyright: ignore
        eval_dataset=DATA[:4],  # pyright: ignore
        low_rank_config=LowRankConfig(),
    )
    done.train()
    figures = {e["step"]: e["eval_loss"] for e in done.state.log_history if "eval_loss" in e}
    assert min(figures, key=figures.__getitem__) <= SWITCH
    assert done.state.best_global_step > SWITCH  # pyright: ignore
    assert len(factorised_layers(done.model)) == 8  # pyright: ignore
    assert done.evaluate()["eval_loss"] == pytest.approx(figures[done.state.best_global_step])  # pyright: ignore


def test_stopped_before_the_switch_it_stays_dense(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            control.should_training_stop = state.global_step == 3
            return control

    stopped = trainer(tmp_path)
    stopped.add_callback(Stop())
    stopped.train()
    assert stopped.state.global_step == 3 and efx_record(stopped.model) is None  # pyright: ignore


# --- without a switch


def test_it_factorises_at_the_start(tmp_path: Path) -> None:
    made = trainer(tmp_path, dense_warmup_steps=0)
    assert len(factorised_layers(made.model)) == 8  # pyright: ignore
    ready = get_efx_model(build(), LowRankConfig(rank=2))
    without = LowRankTrainer(ready, arguments(tmp_path), train_dataset=DATA)  # pyright: ignore
    assert efx_record(without.model)["methods"][0]["config"] == {"rank": 2}  # pyright: ignore


@pytest.mark.parametrize("warmup", [0, SWITCH])
def test_model_init_gives_a_factorised_run_too(warmup: int, tmp_path: Path) -> None:
    made = LowRankTrainer(
        args=arguments(tmp_path, dense_warmup_steps=warmup),
        model_init=lambda: build(),
        train_dataset=DATA,  # pyright: ignore
        low_rank_config=LowRankConfig(),
    )
    made.train()
    assert len(factorised_layers(made.model)) == 8  # pyright: ignore


# --- what is refused, before any work


def refused(words: str, make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=f"(?s){words}"):
        make()


def test_contradictions_are_refused_at_once(tmp_path: Path) -> None:
    def with_optimizer() -> LowRankTrainer:
        model = build()
        ready = (torch.optim.SGD(model.parameters()), None)
        options = arguments(tmp_path, dense_warmup_steps=5)
        return LowRankTrainer(model, options, optimizers=ready, low_rank_config=LowRankConfig())  # pyright: ignore

    plain = arguments(tmp_path, TrainingArguments)
    no_config = arguments(tmp_path, dense_warmup_steps=5)
    factorised = get_efx_model(build(), LowRankConfig())
    refused("args is a TrainingArguments: pass LowRankArguments", lambda: LowRankTrainer(build(), plain))
    refused("dense_warmup_steps=5 needs low_rank_config", lambda: LowRankTrainer(build(), no_config))
    refused("init='he' discards the pretrained", lambda: trainer(tmp_path, config=LowRankConfig(init="he")))
    refused("save_only_model=True is refused", lambda: trainer(tmp_path, save_only_model=True))
    refused("ready ones can't be passed in `optimizers`", with_optimizer)
    refused("dense_warmup_steps=5.*carries hf_efx methods already", lambda: trainer(tmp_path, model=factorised))


def test_switch_past_the_end_is_refused_before_a_step(tmp_path: Path) -> None:
    late = trainer(tmp_path, dense_warmup_steps=STEPS)
    before = {key: value.clone() for key, value in state(late).items()}
    refused(f"dense_warmup_steps={STEPS} leaves no factorised step of the run's {STEPS}", late.train)
    assert all(torch.equal(value, before[key]) for key, value in state(late).items())


def test_dense_checkpoint_past_the_switch_is_refused(whole: LowRankTrainer, tmp_path: Path) -> None:
    checkpoint = Path(str(whole.args.output_dir)) / "checkpoint-4"
    early = trainer(tmp_path, dense_warmup_steps=3)
    refused(r"checkpoint-4'.* is dense at step 4, past dense_warmup_steps=3", lambda: early.train(str(checkpoint)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dense_warmup_steps": -1}, "dense_warmup_steps=-1: expected 0 or more"),
        ({"switch_optimizer_state": "keep"}, "switch_optimizer_state='keep': expected one of project, reset"),
        ({"switch_learning_rate_scale": 0.0}, "switch_learning_rate_scale=0.0: expected a number above 0"),
        ({"factor_decay": -0.1}, "factor_decay=-0.1: expected a strength of 0 or more"),
        ({"factor_decay": float("nan")}, "factor_decay=nan: expected"),
        ({"factor_decay_kind": "nuclear"}, "factor_decay_kind='nuclear': expected one of frobenius, l2"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    refused(words, lambda: LowRankArgumentsMixin(**options))
    refused(words, lambda: LowRankArguments(str(tmp_path), **options))


def test_options_parse_from_the_command_line(tmp_path: Path) -> None:
    words = f"--output_dir {tmp_path} --dense_warmup_steps 7 --factor_decay 0.5 --factor_decay_decoupled false"
    (parsed,) = HfArgumentParser(LowRankArguments).parse_args_into_dataclasses(words.split())  # pyright: ignore
    assert (parsed.dense_warmup_steps, parsed.factor_decay, parsed.factor_decay_decoupled) == (7, 0.5, False)

"""Low rank in a Trainer: options, refusals, metrics. The switch: test_trainer_switch.py; decay: test_decay.py."""

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer
from transformers.trainer_utils import HPSearchBackend

from hf_efx import (
    FactorDecayCallback,
    LowRankArguments,
    LowRankConfig,
    LowRankTrainer,
    SliceOutConfig,
    TargetedDropoutConfig,
    get_efx_model,
    prune,
)
from hf_efx.core.model.adapter import efx_record
from hf_efx.low_rank.arguments import LowRankArgumentsMixin
from hf_efx.low_rank.decay import factorised_layers
from low_rank.switching import DATA, SWITCH, arguments, build, losses, run, state, trainer


def refused(words: str, make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=f"(?s){words}"):
        make()


# --- the structure


def test_it_factorises_at_the_start(tmp_path: Path) -> None:
    assert len(factorised_layers(trainer(tmp_path, dense_warmup_steps=0).model)) == 8  # pyright: ignore
    ready = get_efx_model(build(), LowRankConfig(rank=2))
    for config in (None, LowRankConfig(rank=2)):  # a config that says what is there already changes nothing
        made = LowRankTrainer(ready, arguments(tmp_path), train_dataset=DATA, low_rank_config=config)
        assert {layer.rank for layer in factorised_layers(made.model).values()} == {2}  # pyright: ignore


def test_trainers_arguments_are_the_base_class_own_and_have_defaults(tmp_path: Path, monkeypatch: Any) -> None:
    ours, base = (dict(inspect.signature(cls.__init__).parameters) for cls in (LowRankTrainer, Trainer))
    assert [*base, "low_rank_config"] == list(ours)
    assert all(ours[name].default == parameter.default for name, parameter in base.items())
    monkeypatch.chdir(tmp_path)
    made = LowRankTrainer(build(), train_dataset=DATA)
    assert type(made.args) is LowRankArguments and made.args.output_dir == "tmp_trainer"


def pruned(model: Any) -> Any:
    prune(model, 0.5, target_modules=["c_fc"])
    return model


OTHERS: dict[str, Callable[[Any], Any]] = {
    "slice_out": lambda model: get_efx_model(model, SliceOutConfig(targets=["mlp"])),
    "targeted_dropout": lambda model: get_efx_model(model, TargetedDropoutConfig(target_modules=["c_fc"])),
    "pruned": pruned,
}


@pytest.mark.parametrize("other", OTHERS)
def test_beside_another_method_it_factorises_or_says_why_not(other: str, tmp_path: Path) -> None:
    config = LowRankConfig(target_modules=["c_attn"])
    made = trainer(tmp_path, config, OTHERS[other](build()), dense_warmup_steps=0)
    assert len(factorised_layers(made.model)) == 2  # pyright: ignore
    taken = lambda: trainer(tmp_path, LowRankConfig(), OTHERS[other](build()), dense_warmup_steps=0)  # noqa: E731
    refused("LowRankConfig: .*(acts on module|is pruned)", taken)
    late = lambda: trainer(tmp_path, config, OTHERS[other](build()))  # noqa: E731
    refused(f"dense_warmup_steps={SWITCH} trains dense first, but the model carries hf_efx methods", late)


@pytest.mark.parametrize("copied", ["deepcopy", "model_init"])
def test_copies_of_a_factorised_model_train_as_it_does(copied: str, tmp_path: Path) -> None:
    ready = get_efx_model(build(), LowRankConfig())
    expected = run(tmp_path, None, copy.deepcopy(ready), dense_warmup_steps=0, max_steps=2)
    if copied == "deepcopy":
        plain = Trainer(copy.deepcopy(ready), arguments(tmp_path, max_steps=2), train_dataset=DATA)  # pyright: ignore
    else:
        plain = LowRankTrainer(
            args=arguments(tmp_path, max_steps=2), model_init=lambda: copy.deepcopy(ready), train_dataset=DATA
        )
    plain.train()
    assert losses(plain) == losses(expected)


# --- options


def test_what_is_set_on_args_counts_when_training_begins(tmp_path: Path) -> None:
    expected = run(tmp_path, dense_warmup_steps=0, max_steps=2, factor_decay=0.5)
    later = trainer(tmp_path, dense_warmup_steps=0, max_steps=2)
    later.args.factor_decay = 0.5  # pyright: ignore
    later.train()
    assert all(torch.equal(value, state(later)[key]) for key, value in state(expected).items())
    later.args.factor_decay = 0.1  # pyright: ignore
    later.train()  # instead of the first run's decay, not beside it
    decays = [c for c in later.callback_handler.callbacks if isinstance(c, FactorDecayCallback)]
    assert [decay.strength for decay in decays] == [0.1]
    back = trainer(tmp_path, max_steps=2, factor_decay=0.5)
    back.args.dense_warmup_steps = 0  # pyright: ignore
    back.train()
    assert all(torch.equal(value, state(back)[key]) for key, value in state(expected).items())
    back.args.factor_decay = -1.0  # pyright: ignore
    refused("factor_decay=-1.0: expected a strength of 0 or more", back.train)
    begun = trainer(tmp_path, dense_warmup_steps=0)
    begun.args.dense_warmup_steps = SWITCH  # pyright: ignore
    refused(f"dense_warmup_steps={SWITCH} trains dense first, but the model carries", begun.train)


def test_a_search_s_values_and_folders_hold_for_the_switch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `hyperparameter_search` does for two trials, without its backend."""
    monkeypatch.setattr("transformers.integrations.integration_utils.hp_params", lambda trial: trial.params)
    searching = LowRankTrainer(
        args=arguments(tmp_path / "search", dense_warmup_steps=0),
        model_init=lambda: build(),
        train_dataset=DATA,
        low_rank_config=LowRankConfig(),
    )
    searching.hp_search_backend, searching.hp_space = HPSearchBackend.OPTUNA, lambda trial: trial.params
    for number, params in enumerate(({"dense_warmup_steps": SWITCH, "factor_decay": 0.3}, {"dense_warmup_steps": 0})):
        searching.train(trial=type("Trial", (), {"number": number, "params": params})())
        alone = LowRankTrainer(
            args=arguments(tmp_path / str(number), **{"factor_decay": 0.3, **params}),
            model_init=lambda: build(),
            train_dataset=DATA,
            low_rank_config=LowRankConfig(),
        )
        alone.train()
        assert losses(searching) == losses(alone)
        assert (tmp_path / f"search/run-{number}/checkpoint-{SWITCH}").is_dir() == (number == 0)


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


@pytest.mark.parametrize("strategy", ["steps", "epoch", "no"])
def test_factor_metrics_are_in_every_training_log(strategy: str, tmp_path: Path) -> None:
    done = run(tmp_path, log_factor_metrics=True, logging_strategy=strategy)
    names = {"frobenius_norm", "effective_learning_rate", "effective_rank_share", "stable_rank"}
    logs = [entry for entry in done.state.log_history if "loss" in entry or "train_loss" in entry]
    assert len(logs) == {"steps": 7, "epoch": 3, "no": 1}[strategy]  # the last is the summary
    for entry in logs:
        shown = {key.removeprefix("low_rank/") for key in entry if key.startswith("low_rank/")}
        assert shown == (names if entry["step"] > SWITCH else set())
    assert 0 < logs[-1]["low_rank/effective_rank_share"] <= 1
    assert logs[-1]["low_rank/stable_rank"] >= 1


# --- what is refused: contradictions at once, the rest before the first step


def test_contradictions_are_refused_at_once(tmp_path: Path) -> None:
    def ready(which: int, warmup: int) -> Callable[[], LowRankTrainer]:
        model = build()
        optimizer = torch.optim.SGD(model.parameters())
        given: Any = [(optimizer, None), (None, torch.optim.lr_scheduler.StepLR(optimizer, 1))][which]
        options = arguments(tmp_path, dense_warmup_steps=warmup)
        return lambda: LowRankTrainer(model, options, optimizers=given, low_rank_config=LowRankConfig())

    plain: Any = arguments(tmp_path, TrainingArguments)
    no_config = arguments(tmp_path, dense_warmup_steps=5)
    factorised = get_efx_model(build(), LowRankConfig())
    bare: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    refused("args is a TrainingArguments: pass LowRankArguments", lambda: LowRankTrainer(build(), plain))
    refused("dense_warmup_steps=5 needs low_rank_config", lambda: LowRankTrainer(build(), no_config))
    refused("init='he' discards the pretrained", lambda: trainer(tmp_path, LowRankConfig(init="he")))
    refused("save_only_model=True is refused", lambda: trainer(tmp_path, save_only_model=True))
    refused("ready ones can't be passed in `optimizers`", ready(0, 5))
    refused("ready ones can't be passed in `optimizers`", ready(1, 5))
    refused("optimizers holds the dense weights.*make the optimizer then", ready(0, 0))
    refused("dense_warmup_steps=3.*carries hf_efx methods already", lambda: trainer(tmp_path, model=factorised))
    refused(
        "the model is factorised already, with rank=0.25, but low_rank_config has rank=2",
        lambda: trainer(tmp_path, LowRankConfig(rank=2), factorised, dense_warmup_steps=0),
    )
    refused("goes by config.json, which a Sequential doesn't save", lambda: trainer(tmp_path, model=bare))
    refused(
        "log_factor_metrics=True: the model has no factorised layer",
        lambda: LowRankTrainer(build(), arguments(tmp_path, log_factor_metrics=True), train_dataset=DATA),
    )


def test_weights_that_were_loaded_are_not_discarded(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path / "dense")
    loaded = type(build()).from_pretrained(tmp_path / "dense")
    config = LowRankConfig(init="he")
    refused("init='he' discards", lambda: trainer(tmp_path, config, loaded, dense_warmup_steps=0))
    assert factorised_layers(trainer(tmp_path, config, dense_warmup_steps=0).model)  # pyright: ignore


class Layerwise(LowRankTrainer):
    def create_optimizer(self, model: Any = None) -> Any:
        self.optimizer = LayerWiseDummyOptimizer()
        return self.optimizer


class ListLoader(LowRankTrainer):
    def get_train_dataloader(self) -> Any:
        return [self.data_collator(DATA[i : i + 2]) for i in range(0, len(DATA), 2)]


class OneCycle(LowRankTrainer):
    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        self.lr_scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 0.01, num_training_steps)  # pyright: ignore
        return self.lr_scheduler


LATE: list[tuple[str, Any, dict[str, Any], str]] = [
    ("length", LowRankTrainer, {"dense_warmup_steps": 6}, "dense_warmup_steps=6 leaves no factorised step .*run's 6"),
    ("optim", LowRankTrainer, {"optim": "adafactor"}, r"states of Adafactor \(optim='adafactor'\).*'reset'"),
    ("layerwise", Layerwise, {}, "LayerWiseDummyOptimizer .*layer by layer.*Choose another optim"),
    ("schedule", OneCycle, {"switch_learning_rate_scale": 0.5}, "scale=0.5: a OneCycleLR sets rates by a state"),
    ("loader", ListLoader, {}, "get_train_dataloader gives a list"),
    ("target", LowRankTrainer, {"config": {"target_modules": ["nothing"]}}, "matches no module"),
    ("rank", LowRankTrainer, {"config": {"rank": 99}}, r"rank=99 is above min\(in, out\)"),
    (
        "budget",
        LowRankTrainer,
        {"config": {"rank": "auto", "parameter_budget": 9}},
        "parameter_budget=9 is below 1152, what rank 1 everywhere takes",
    ),
    ("twice", LowRankTrainer, {"factor_decay": 0.1, "callbacks": [FactorDecayCallback(0.1)]}, "would both decay"),
]


@pytest.mark.parametrize(("cls", "options", "words"), [case[1:] for case in LATE], ids=[case[0] for case in LATE])
def test_what_the_switch_can_t_do_is_refused_before_a_step(
    cls: Any, options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    class Steps(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise AssertionError("a step began")

    options = dict(options)
    config, callbacks = LowRankConfig(**options.pop("config", {})), options.pop("callbacks", [])
    made = cls(
        build(),
        arguments(tmp_path, **{"dense_warmup_steps": SWITCH, **options}),
        train_dataset=DATA,
        low_rank_config=config,
        callbacks=[*callbacks, Steps()],
    )
    refused(words, made.train)
    assert efx_record(made.model) is None


@pytest.mark.parametrize("launcher", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_sharded_parameters_are_refused(launcher: str, tmp_path: Path) -> None:
    made = trainer(tmp_path)
    setattr(made, launcher, True)
    refused("FSDP and DeepSpeed shard. Use DDP", made.train)

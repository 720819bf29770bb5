"""Initialisations that would discard loaded weights: what tells that weights were loaded."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matrix import ARCHITECTURES
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_efx import LowRankConfig, get_efx_model
from hf_efx.core.model.pretrained import weights_were_loaded

GPT2 = next(architecture for architecture in ARCHITECTURES if architecture.name == "gpt2")
MLP = {"target_modules": ["c_fc"]}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    GPT2.build().save_pretrained(folder)
    return folder


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def another_method_first(model: Any) -> Any:
    return get_efx_model(model, LowRankConfig(rank=2, target_modules=["c_attn"]))


LOADED: dict[str, Callable[[Path], Any]] = {
    "loaded": load,
    "deepcopy": lambda folder: copy.deepcopy(load(folder)),
    "pickle": lambda folder: pickle.loads(pickle.dumps(load(folder))),
    "other dtype": lambda folder: load(folder).half(),
    "after another config": lambda folder: another_method_first(load(folder)),
}
RANDOM: dict[str, Callable[[Path], Any]] = {
    "scratch": lambda folder: GPT2.build(),
    "config of a checkpoint": lambda folder: AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)),
    "config of a loaded model": lambda folder: type(load(folder))(load(folder).config),
    "after another config": lambda folder: another_method_first(GPT2.build()),
}


@pytest.mark.parametrize("case", LOADED)
@pytest.mark.parametrize("fields", [{"init": "he"}, {"factor_activation": "silu"}], ids=["init", "activation"])
def test_loaded_weights_are_not_discarded(case: str, fields: dict[str, Any], dense: Path) -> None:
    model = LOADED[case](dense)
    with pytest.raises(ValueError, match=r"discards the pretrained weights.*pretrained=False"):
        get_efx_model(model, LowRankConfig(rank=2, **MLP, **fields))
    get_efx_model(model, LowRankConfig(rank=2, **MLP, **fields), pretrained=False)


@pytest.mark.parametrize("case", RANDOM)
def test_random_weights_may_start_anew_unless_they_are_said_to_be_trained(case: str, dense: Path) -> None:
    model = RANDOM[case](dense)
    with pytest.raises(ValueError, match=r"init='he' discards the pretrained weights"):
        get_efx_model(model, LowRankConfig(rank=2, init="he", **MLP), pretrained=True)
    get_efx_model(model, LowRankConfig(rank=2, init="he", **MLP))


def test_a_new_head_on_a_loaded_body_isn_t_loaded(dense: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(dense)
    assert not weights_were_loaded(model, {"score": model.score})
    assert weights_were_loaded(model, {"score": model.score, "c_fc": model.transformer.h[0].mlp.c_fc})

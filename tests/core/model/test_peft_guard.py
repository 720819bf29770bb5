"""Other adapters of peft on a factorised or pruned model: right, or refused at injection; foreign models as ever."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from matrix import ARCHITECTURES
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import AutoModelForCausalLM

from hf_efx import LowRankConfig, get_efx_model, merge_and_unload, prune
from hf_efx.core.model.peft_guard import _ON_FACTORS

LLAMA = next(architecture for architecture in ARCHITECTURES if architecture.name == "llama")
TARGETS = ["q_proj", "o_proj"]
# What some methods need at this size.
FIELDS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 4},
    "IA3": {"feedforward_modules": []},
    "MISS": {"r": 2},
    "OFT": {"oft_block_size": 4},
    "ROAD": {"group_size": 4},
    "VBLORA": {"vector_length": 8},
    "WAVEFT": {"n_frequency": 16},
}


def config(kind: str, **fields: Any) -> Any:
    given: dict[str, Any] = {"target_modules": TARGETS, **FIELDS.get(kind, {}), **fields}
    return PEFT_TYPE_TO_CONFIG_MAPPING[kind](**given)  # pyright: ignore


def factorised(names: list[str] = TARGETS) -> Any:
    return get_efx_model(LLAMA.build(), LowRankConfig(rank=4, target_modules=names))


def pruned() -> Any:
    model = LLAMA.build()
    prune(model, 0.5, target_modules=["q_proj", "k_proj"])
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(**LLAMA.batch()).logits


def adapted(model: Any, adapter: Any) -> Any:
    """The model with a trained adapter: its start and its training are seeded draws."""
    torch.manual_seed(0)
    model = peft.get_peft_model(model, adapter)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft's own on sizes that some methods would rather have
@pytest.mark.parametrize("kind", sorted(_ON_FACTORS))
def test_an_adapter_acts_on_factors_as_on_their_product(kind: str) -> None:
    model = factorised()
    dense = merge_and_unload(copy.deepcopy(model))
    before = logits(model)
    one, other = (logits(adapted(m, config(kind))) for m in (model, dense))
    assert (one - before).abs().max() > 1e-4
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


REFUSED: dict[str, tuple[Callable[[], Any], str, dict[str, Any], str]] = {
    "pissa on zeros": (
        pruned,
        "LORA",
        {"init_lora_weights": "pissa"},
        r"'pissa' rewrites .*q_proj' is pruned.*prune\(",
    ),
    "olora on zeros": (pruned, "LORA", {"init_lora_weights": "olora"}, r"'olora' rewrites .*is pruned"),
    "pissa on factors": (factorised, "LORA", {"init_lora_weights": "pissa_niter_2"}, r"rewrites .*is factorised"),
    "dora": (factorised, "LORA", {"use_dora": True}, r"use_dora needs the layer's dense weight.*is factorised"),
    "dora at full rank": (
        lambda: get_efx_model(LLAMA.build(), LowRankConfig(rank=1.0, only_if_smaller=False, target_modules=TARGETS)),
        "LORA",
        {"use_dora": True},
        r"use_dora needs",
    ),
    "the weight by itself": (
        factorised,
        "LORA",
        {"target_parameters": ["q_proj.weight"], "target_modules": []},
        r"target_parameters needs",
    ),
    "loha": (factorised, "LOHA", {}, r"LoHaConfig: LOHA needs the layer's dense weight.*merge_and_unload"),
    "hra": (factorised, "HRA", {}, r"HRA needs"),
    "all-linear": (factorised, "LOKR", {"target_modules": "all-linear"}, r"LOKR needs"),
    "peft's own default": (factorised, "OSF", {"target_modules": None}, r"OSF needs"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_go_wrong_is_refused_at_injection(case: str) -> None:
    make, kind, fields, words = REFUSED[case]
    model = make()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=words):
        peft.get_peft_model(model, config(kind, **fields))
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_layers_that_an_adapter_leaves_alone_stop_nothing() -> None:
    model = peft.get_peft_model(pruned(), config("LORA", init_lora_weights="pissa", target_modules=["up_proj"]))
    assert logits(model).isfinite().all()
    model = peft.get_peft_model(factorised(["up_proj"]), config("LOHA"))
    assert logits(model).isfinite().all()


def test_a_second_adapter_is_looked_at_too() -> None:
    model = peft.get_peft_model(factorised(), config("LORA"))
    with pytest.raises(ValueError, match="use_dora needs"):
        model.add_adapter("second", config("LORA", use_dora=True))


def test_the_flag_of_a_loaded_model_counts(tmp_path: Path) -> None:
    pruned().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is pruned"):
        peft.get_peft_model(loaded, config("LORA", init_lora_weights="pissa"))


def test_foreign_models_are_as_ever() -> None:
    for adapter in (config("LORA", init_lora_weights="pissa"), config("LOHA")):
        model = adapted(LLAMA.build(), adapter)
        expected = logits(model)
        torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-5)

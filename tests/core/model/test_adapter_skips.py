"""Layers that are left as they are: which, and how that is said."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from test_adapter import gpt2, linears, plan, pruned_by_torch
from torch import nn
from transformers import AutoModelForCausalLM

from hf_efx import (
    LowRankConfig,
    get_efx_model,
)
from hf_efx.core.model.adapter import efx_record


def test_layers_left_dense_are_named_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    model = linears(head=nn.Linear(8, 8))
    with torch.no_grad():
        model.second.weight.zero_()  # pyright: ignore
    with caplog.at_level(logging.WARNING, "hf_efx"):
        with pytest.raises(ValueError, match="nothing would be factorised"):
            get_efx_model(model, LowRankConfig(rank=4))
    assert "Left dense, since factors would hold no fewer parameters than the weight" in caplog.text
    assert "first (rank 4, break-even 4)" in caplog.text  # 8 * 8 / 16

    caplog.clear()
    with caplog.at_level(logging.WARNING, "hf_efx"):
        get_efx_model(model, LowRankConfig(rank=3))
    assert plan(model) == ["first"] and "factors of an all-zero weight would never train: second" in caplog.text


@pytest.mark.parametrize(
    "compute", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm, pruned_by_torch]
)
def test_layers_whose_weight_is_computed_are_named(compute: Any, caplog: pytest.LogCaptureFixture) -> None:
    layers = [compute(nn.Linear(16, 16)), nn.Linear(16, 16), nn.Linear(16, 2)]
    with pytest.raises(ValueError, match="module '0' can't be changed, since its weight is no parameter"):
        get_efx_model(nn.Sequential(*layers), LowRankConfig(target_modules=["0", "1"]))
    with caplog.at_level("WARNING", "hf_efx"):
        model = get_efx_model(nn.Sequential(*layers), LowRankConfig())
    assert list(efx_record(model)["methods"][0]["modules"]) == ["1"]  # pyright: ignore
    assert caplog.text.count("computes their weights: 0. Make them plain first") == 1


def test_transformers_itself_says_that_a_computed_weight_is_missing_from_a_checkpoint(tmp_path: Path) -> None:
    """That is why such a model may be saved: nothing goes missing without a word."""
    model = gpt2()
    pruned_by_torch(model.transformer.h[0].mlp.c_fc)
    get_efx_model(model, LowRankConfig(rank=2, init="he")).save_pretrained(tmp_path)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"transformer.h.0.mlp.c_fc.weight"}


def test_a_head_that_the_config_ties_is_not_factorised() -> None:
    model: Any = gpt2()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    config = LowRankConfig(target_modules=["lm_head"])
    with pytest.raises(ValueError, match="'lm_head' has a weight of its own, but the model's config ties it"):
        get_efx_model(model, config)
    model.config.tie_word_embeddings = False
    get_efx_model(model, config)
    factors = model.lm_head.weight
    model.tie_weights()
    assert model.lm_head.weight is factors and factors.dim() == 3

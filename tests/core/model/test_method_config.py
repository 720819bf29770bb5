"""What a config says to a user who writes it wrong, and what of it a record keeps."""

import json
from typing import Any

import pytest
from matrix import ARCHITECTURES

from hf_efx import EfxConfig, LowRankConfig, SliceOutConfig, TargetedDropoutConfig, get_efx_model
from hf_efx.core.model.adapter import efx_record
from hf_efx.core.model.method_config import fields_of

CONFIGS = (LowRankConfig, SliceOutConfig, TargetedDropoutConfig)
GPT2 = next(architecture for architecture in ARCHITECTURES if architecture.name == "gpt2")


@pytest.mark.parametrize(
    ("config", "value", "words"),
    [
        (LowRankConfig, 0.25, r"LowRankConfig takes keywords alone, such as LowRankConfig\(rank=0.25\)"),
        (SliceOutConfig, 0.5, r"such as SliceOutConfig\(rate=0.5\)"),
        (TargetedDropoutConfig, "unit", r"such as TargetedDropoutConfig\(granularity='unit'\)"),
    ],
)
def test_a_positional_value_is_named(config: Any, value: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        config(value)


@pytest.mark.parametrize(
    ("config", "fields", "words"),
    [
        (LowRankConfig, {"r": 8}, r"unknown key 'r' \(value 8\); write rank=8\. Known keys: .*upgrade hf_efx"),
        (LowRankConfig, {"init_lora_weights": "he"}, r"write init='he'"),
        (LowRankConfig, {"only_smaller": True}, r"write only_if_smaller=True"),
        (SliceOutConfig, {"ramp_step": 3}, r"write ramp_steps=3"),
        (TargetedDropoutConfig, {"p": 0.5}, r"write rate=0.5"),
        (LowRankConfig, {"p": 0.5}, r"unknown key 'p' \(value 0.5\)\. Known keys"),
    ],
)
def test_an_unknown_key_says_what_to_write(config: Any, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config(**fields)


@pytest.mark.parametrize(
    ("configs", "words"),
    [
        ("low_rank", r"'low_rank' is no config of an hf_efx method. Write LowRankConfig\(\)"),
        ("slice-out", r"Write SliceOutConfig\(\)"),
        (LowRankConfig, r"Write LowRankConfig\(\)"),
        ([TargetedDropoutConfig], r"Write TargetedDropoutConfig\(\)"),
        (0.25, r"0.25 is no config.*Pass for example LowRankConfig\(rank=0.25\)"),
        ({"rank": 2}, r"'rank' is no config.*Write LowRankConfig|Pass for example"),
        ([], r"was given an empty list"),
        (EfxConfig(), r"was given an empty list"),
    ],
)
def test_what_is_no_config_says_what_to_write(configs: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        get_efx_model(GPT2.build(), configs)


NAMES: dict[str, tuple[dict[str, Any], str]] = {
    "a string is a regular expression": (
        {"target_modules": "c_fc"},
        r"='c_fc' matches no .*write target_modules=\['c_fc",
    ),
    "exclusion by string": ({"exclude_modules": "c_fc"}, r"='c_fc' matches no .*write exclude_modules=\['c_fc'\]"),
    "one of two misspelt": ({"target_modules": ["c_fc", "c_atn"]}, r"'c_atn' matches no module.*one of c_attn"),
    "exclusion misspelt": ({"exclude_modules": ["mlp.c_fcc"]}, r"'mlp.c_fcc' matches no module"),
    "container": (
        {"target_modules": ["mlp", "c_attn"]},
        r"'mlp' holds layers and is none: name them \(c_fc, c_proj\)",
    ),
    "container excluded": ({"exclude_modules": ["h.0"]}, r"'h.0' holds layers and is none"),
    "parameter": (
        {"target_modules": ["c_fc.weight"]},
        r"'c_fc.weight' is a parameter of shape \(32, 128\), not a mod",
    ),
    "one of two layers": ({"layers_to_transform": [1, 7]}, r"layers_to_transform=\[1, 7\]: 7 matches no module"),
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("case", NAMES)
def test_a_name_that_matches_nothing_is_refused(case: str, config: Any) -> None:
    fields, words = NAMES[case]
    model = GPT2.build()
    with pytest.raises(ValueError, match=rf"{config.__name__}: .*{words}"):
        get_efx_model(model, config(**fields))
    assert efx_record(model) is None


@pytest.mark.parametrize("config", CONFIGS)
def test_every_field_is_kept_so_that_a_changed_default_changes_no_checkpoint(config: Any) -> None:
    model = get_efx_model(GPT2.build(), config())
    (entry,) = efx_record(model)["methods"]  # pyright: ignore
    kept = entry["config"]
    assert list(kept) == fields_of(config) and not {"peft_type", "task_type"} & kept.keys()
    assert json.loads(json.dumps(kept)) == kept and config(**kept).method_fields() == kept
    assert config().changed_fields() == {} and config(**kept, task_type="CAUSAL_LM").changed_fields() == {}

"""What a config says to a user who writes it wrong, and what of it a record keeps."""

import dataclasses
import json
from typing import Any

import peft
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


@pytest.mark.parametrize("config", CONFIGS)
def test_a_subclass_s_own_field_is_refused_since_it_could_not_be_read_back(config: Any) -> None:
    own = dataclasses.make_dataclass("Own", [("extra", int, 3)], bases=(config,))
    with pytest.raises(ValueError, match=rf"Own: the field 'extra' isn't one of {config.__name__}, as which"):
        get_efx_model(GPT2.build(), own())
    assert get_efx_model(GPT2.build(), type("Same", (config,), {})()) is not None


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
    "of another layer": (
        {"target_modules": ["h.0.attn.c_proj", "mlp.c_fc"], "layers_to_transform": [1]},
        r"no module called 'h.0.attn.c_proj' is in",
    ),
    "list of layers": (
        {"layers_to_transform": [1], "layers_pattern": "layer"},
        r"no list of layers .* called 'layer'",
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


@pytest.mark.parametrize(
    ("config", "fields", "words"),
    [
        (TargetedDropoutConfig, {"rate": 0.0}, r"rate=0 drops nothing: raise it, or set l1"),
        (TargetedDropoutConfig, {"rate": 0.0, "l1": 0.1, "targeting": 0.5}, r"targeting=0.5 has no effect at rate=0"),
        (TargetedDropoutConfig, {"rate": 0.0, "l1": 0.1, "ramp": "paper"}, r"ramp='paper' has no effect at rate=0"),
        (TargetedDropoutConfig, {"rate": 0.0, "l1": 0.1, "refresh_every": 1}, r"refresh_every=1 has no effect"),
        (TargetedDropoutConfig, {"rate": 0.0, "l1": 0.1, "selection": "random"}, r"selection='random' has no effect"),
        (TargetedDropoutConfig, {"ramp_steps": 5}, r"ramp_steps=5 has no effect at ramp='none': set ramp='linear'"),
        (
            TargetedDropoutConfig,
            {"selection": "random", "targeting": 0.5},
            r"targeting=0.5 .*set selection='targeted'",
        ),
        (TargetedDropoutConfig, {"selection": "random", "refresh_every": 1}, r"refresh_every=1 has no effect"),
        (LowRankConfig, {"spectral_ones_scale": "rms"}, r"spectral_ones_scale='rms' .*set init='spectral_ones'"),
        (LowRankConfig, {"rank": "auto", "parameter_budget": 0.5, "only_if_smaller": False}, r"only_if_smaller=False"),
        (LowRankConfig, {"modules_to_save": ["nope"]}, r"modules_to_save=\['nope'\]: 'nope' matches no module"),
        (LowRankConfig, {"layers_pattern": "h"}, r"layers_pattern='h' has no effect without layers_to_transform"),
        (LowRankConfig, {"layers_to_transform": []}, r"layers_to_transform=\[\] chooses no layer"),
        (SliceOutConfig, {"targets": ["mlp"], "attention": "head_dim"}, r"attention='head_dim' .*add 'attention'"),
        (SliceOutConfig, {"targets": ["mlp", "conv"]}, r"targets=\('mlp', 'conv'\) has no effect on GPT2LMHeadModel"),
        (SliceOutConfig, {"rate": {"mlp": 0.5, "conv": 0.5}}, r"'conv' has no effect on GPT2LMHeadModel"),
    ],
)
def test_a_setting_that_cannot_act_is_refused(config: Any, fields: dict[str, Any], words: str) -> None:
    model = GPT2.build()
    with pytest.raises(ValueError, match=words):
        get_efx_model(model, config(**fields))
    assert efx_record(model) is None


@pytest.mark.parametrize("config", CONFIGS)
def test_a_config_with_every_field_at_its_default_is_taken(config: Any) -> None:
    assert config(**config().method_fields()).method_fields() == config().method_fields()


def test_peft_is_told_where_a_list_of_configs_goes() -> None:
    with pytest.raises(ValueError, match=r"takes no EfxConfig: call hf_efx.get_efx_model"):
        peft.get_peft_model(GPT2.build(), EfxConfig([LowRankConfig()]))  # pyright: ignore

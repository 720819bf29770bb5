"""The record of a model's methods: its form, whose it is, and the configs that it stands in."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from matrix import ARCHITECTURES
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, TrainingArguments

from hf_efx import EfxConfig, EfxTrainer, LowRankConfig, get_efx_model, merge_and_unload, unload
from hf_efx.core.model.record import (
    FORMAT_VERSION,
    check_record,
    config_class,
    efx_record,
    entry_config,
    foreign_methods,
    mark_pruned,
    pruned_modules,
    recorded_methods,
)

GPT2 = next(architecture for architecture in ARCHITECTURES if architecture.name == "gpt2")
ENTRY = {"method": "low_rank", "config": {"rank": 4}, "modules": {"fc": {"rank": 4, "shape": [8, 8]}}}


def test_takes_one_config_a_list_or_an_iterator() -> None:
    first, second = LowRankConfig(rank=2), LowRankConfig(rank=3)
    assert EfxConfig(first).methods == [first]
    assert EfxConfig([first, second]).methods == [first, second]
    assert EfxConfig(iter([second, first])).methods == [second, first]
    assert EfxConfig().methods == []


@pytest.mark.parametrize("wrong", [[LoraConfig()], [{"rank": 2}], [None]])
def test_refuses_what_is_no_method_config(wrong: list) -> None:
    with pytest.raises(ValueError, match=r"is no config of an hf_efx method. Pass for example LowRankConfig"):
        EfxConfig(wrong)


def test_quantization_entry_names_the_method_alone() -> None:
    assert EfxConfig([LowRankConfig(rank=2)]).to_dict() == {"quant_method": "hf_efx"}
    assert EfxConfig.from_dict({"quant_method": "hf_efx"}).methods == []
    with pytest.raises(ValueError, match="unknown key 'bits'"):
        EfxConfig.from_dict({"quant_method": "hf_efx", "bits": 4})


def test_config_survives_json_with_every_field_set() -> None:
    config = LowRankConfig(
        rank=0.5,
        rank_pattern={"c_fc": 3, "c_proj": 0.25},
        target_modules={"c_proj", "c_fc"},  # pyright: ignore[reportArgumentType]
        exclude_modules=("attn.c_proj",),  # pyright: ignore[reportArgumentType]
        layers_to_transform=[0, 1],
        layers_pattern="h",
        init="spectral_ones",
        spectral_ones_scale="rms",
        factor_activation="silu",
        only_if_smaller=False,
    )
    fields = json.loads(json.dumps(config.method_fields()))
    assert fields["target_modules"] == ["c_fc", "c_proj"] and fields["exclude_modules"] == ["attn.c_proj"]
    again = entry_config({"method": "low_rank", "config": fields, "modules": {}})
    assert again.method_fields() == config.method_fields()
    assert type(again.rank) is float and type(again.rank_pattern["c_fc"]) is int  # pyright: ignore


def test_whole_record_passes() -> None:
    record = {"format_version": FORMAT_VERSION, "methods": [ENTRY]}
    assert check_record(record) is record


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (None, "config.efx is None; expected {'format_version'"),
        ([], "config.efx is []; expected"),
        ({"format_version": 1}, "expected {'format_version'"),
        ({"format_version": 1, "methods": {}}, "expected {'format_version'"),
        ({"methods": []}, "format_version=None; expected a whole number from 1"),
        ({"format_version": "1", "methods": []}, "format_version='1'"),
        ({"format_version": True, "methods": []}, "format_version=True"),
        ({"format_version": 0, "methods": []}, "format_version=0"),
        ({"format_version": 2, "methods": []}, "wrote the checkpoint. Upgrade"),
        ({"format_version": 1, "methods": ["low_rank"]}, "config.efx has the entry 'low_rank'; expected"),
        ({"format_version": 1, "methods": [{"method": "low_rank"}]}, "has the entry {'method': 'low_rank'}"),
        ({"format_version": 1, "methods": [{"method": "low_rank", "modules": []}]}, "config.efx has the entry"),
        ({"format_version": 1, "methods": [{"modules": {}}]}, "config.efx has the entry"),
        ({"format_version": 1, "methods": [ENTRY | {"later": 1}]}, "unknown key 'later' in its 'low_rank' entry"),
    ],
)
def test_broken_records_are_refused(record: object, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        check_record(record)


def test_entries_of_another_version_are_refused() -> None:
    with pytest.raises(ValueError, match=r"method 'low_rnk'.*\(it has: low_rank"):
        config_class("low_rnk")
    with pytest.raises(ValueError, match=r"unknown key 'colour' \(value 'red'\). Known keys: .*rank.*upgrade hf_efx"):
        entry_config({"method": "low_rank", "config": {"colour": "red"}})
    with pytest.raises(ValueError, match=r"rank=0"):
        entry_config({"method": "low_rank", "config": {"rank": 0}})


# --- whose record it is


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    get_efx_model(GPT2.build(), LowRankConfig(rank=2)).save_pretrained(folder)
    return folder


@pytest.fixture
def foreign(checkpoint: Path) -> Any:
    """A dense model that was built from a factorised one's config."""
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint))


def test_a_config_reused_for_a_new_model_is_noticed(foreign: Any, tmp_path: Path) -> None:
    assert efx_record(foreign) is not None and recorded_methods(foreign) == []
    trainer = EfxTrainer(foreign, TrainingArguments(str(tmp_path), report_to=[], use_cpu=True))
    with pytest.raises(ValueError, match=r"was made by low_rank, but its layers are dense.*hf_efx.unload\(model\)"):
        trainer.train()
    assert foreign_methods(get_efx_model(foreign)) == [] and recorded_methods(foreign)


@pytest.mark.parametrize(
    "clear",
    [unload, merge_and_unload, lambda model: get_efx_model(model, LowRankConfig(rank=3, target_modules=["c_fc"]))],
    ids=["unload", "merge_and_unload", "another config"],
)
def test_and_cleared(clear: Callable[[Any], Any], foreign: Any, tmp_path: Path) -> None:
    clear(foreign)
    assert foreign_methods(foreign) == []
    foreign.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert efx_record(again) == efx_record(foreign)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in foreign.state_dict().items())


def test_a_flag_of_zeros_reused_for_a_new_model_is_dropped() -> None:
    model = GPT2.build()
    model.transformer.h[0].mlp.c_fc.weight.data[0] = 0
    mark_pruned(model, {"transformer.h.0.mlp.c_fc": {}})
    fresh = type(model)(model.config)
    assert efx_record(fresh) and not pruned_modules(fresh) and pruned_modules(model)
    get_efx_model(fresh, LowRankConfig(rank=2, target_modules=["c_fc"]))  # of zeros it would be refused
    assert "pruned" not in efx_record(fresh)  # pyright: ignore


def test_a_record_without_some_fields_takes_today_s_defaults() -> None:
    model = get_efx_model(GPT2.build(), LowRankConfig(rank=2))
    fresh = GPT2.build()
    (entry,) = efx_record(model)["methods"]  # pyright: ignore
    fresh.config.efx = {"format_version": 1, "methods": [{**entry, "config": {"rank": 2}}]}
    assert efx_record(get_efx_model(fresh)) == efx_record(model)


# --- composite configs

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
TEXT, VISION = {**SIZES, "vocab_size": 40}, {**SIZES, "image_size": 8, "patch_size": 4}


def encoder_decoder() -> Any:
    halves = (transformers.BertConfig(**TEXT) for _ in range(2))
    return transformers.EncoderDecoderModel(transformers.EncoderDecoderConfig.from_encoder_decoder_configs(*halves))


def vision_encoder_decoder() -> Any:
    halves = transformers.ViTConfig(**VISION), transformers.BertConfig(**TEXT)
    return transformers.VisionEncoderDecoderModel(
        transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(*halves)
    )


def llava() -> Any:
    vision, text = transformers.CLIPVisionConfig(**VISION), transformers.LlamaConfig(**TEXT, num_key_value_heads=2)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=39, image_seq_length=4)
    return transformers.LlavaForConditionalGeneration(config)


def configs(model: Any) -> dict[str, int]:
    """Which attributes of its modules are one config object: a number for each object."""
    found: dict[str, PreTrainedConfig] = {}
    for name, module in model.named_modules():
        held = {key: value for key, value in vars(module).items() if isinstance(value, PreTrainedConfig)}
        found |= {f"{name}.{key}": value for key, value in held.items()}
    subs = {f"config.{key}": value for key, value in vars(model.config).items() if isinstance(value, PreTrainedConfig)}
    numbers: dict[int, int] = {}
    return {name: numbers.setdefault(id(config), len(numbers)) for name, config in (found | subs).items()}


@pytest.mark.parametrize("build", [encoder_decoder, vision_encoder_decoder, llava])
def test_parts_of_a_composite_model_go_on_reading_its_config(build: Callable[[], Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build()
    before, shared = model.config, configs(model)
    assert len(set(shared.values())) > 1
    get_efx_model(model, LowRankConfig(rank=2))
    assert model.config is not before and not hasattr(before, "efx") and configs(model) == shared
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


# --- vocabularies that grow


def test_a_factorised_model_resizes_its_embeddings() -> None:
    model = get_efx_model(GPT2.build(), LowRankConfig(rank=2))
    model.resize_token_embeddings(70)
    assert model.lm_head.weight.shape == model.transformer.wte.weight.shape == (70, 32)
    assert model(**GPT2.batch()).logits.shape[-1] == 70


def test_a_factorised_head_refuses_before_anything_changes() -> None:
    llama = next(architecture for architecture in ARCHITECTURES if architecture.name == "llama")
    model = get_efx_model(llama.build(), LowRankConfig(rank=2, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="output embeddings are factorised.*merge_and_unload"):
        model.resize_token_embeddings(70)
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == 64
    merge_and_unload(model).resize_token_embeddings(70)
    assert model.lm_head.weight.shape[0] == 70

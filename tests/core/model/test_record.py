import json
import re

import pytest
from peft import LoraConfig

from hf_efx import EfxConfig, LowRankConfig
from hf_efx.core.model.record import FORMAT_VERSION, check_record, config_class, entry_config

ENTRY = {"method": "low_rank", "config": {"rank": 4}, "modules": {"fc": {"rank": 4, "shape": [8, 8]}}}


def test_takes_one_config_a_list_or_an_iterator() -> None:
    first, second = LowRankConfig(rank=2), LowRankConfig(rank=3)
    assert EfxConfig(first).methods == [first]
    assert EfxConfig([first, second]).methods == [first, second]
    assert EfxConfig(iter([second, first])).methods == [second, first]
    assert EfxConfig().methods == []


@pytest.mark.parametrize("wrong", [[LoraConfig()], ["low_rank"], [{"rank": 2}], [None]])
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


def test_only_what_differs_from_the_defaults_is_written() -> None:
    assert LowRankConfig().method_fields() == {}
    assert LowRankConfig(rank=7, task_type="CAUSAL_LM").method_fields() == {"rank": 7}


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

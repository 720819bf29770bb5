import json
from pathlib import Path
from typing import Any

import pytest
from matrix import ARCHITECTURES
from peft import PeftConfig

from hf_efx import Block, SliceOutConfig, get_efx_model
from hf_efx.core.model.adapter import efx_record
from hf_efx.core.training.arguments import describe_options
from hf_efx.slice_out.apply import spans_of

BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}


def spans(name: str, **fields: Any) -> dict[str, tuple[int, float, int]]:
    """(units, rate, width) of each span of a sliced model of the matrix, by name."""
    model = get_efx_model(BY_NAME[name].build(), SliceOutConfig(**fields))
    return {span.name: (span.size, span.rate, span.width_at(0)) for span in spans_of(model)}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rate": 1.0}, r"rate=1.0: expected the share of units to leave out"),
        ({"rate": -0.1}, r"rate=-0.1"),
        ({"rate": True}, r"rate=True"),
        ({"rate": {"mlp": 1.5}}, r"rate\['mlp'\]=1.5"),
        ({"rate": {"ffn": 0.5}}, r"rate=.* names 'ffn', which isn't among targets=\('mlp', 'attention', 'conv'\)"),
        ({"rate": {"conv": 0.5}, "targets": ["mlp"]}, r"names 'conv', which isn't among"),
        ({"rate_pattern": {"c_fc": 2}}, r"rate_pattern\['c_fc'\]=2"),
        ({"targets": ["ffn"]}, r"targets=\['ffn'\]: expected some of mlp, attention, conv"),
        ({"targets": []}, r"targets=\[\]"),
        ({"starts": "random"}, r"starts='random': expected one of aligned, all, circular"),
        ({"normalization": "none"}, r"normalization='none': expected one of flow, probabilistic"),
        ({"attention": "features"}, r"attention='features': expected one of heads, head_dim"),
        ({"align": 0}, r"align=0: expected a whole number of 1 or more"),
        ({"align": 8.0}, r"align=8.0"),
        ({"ramp_steps": -1}, r"ramp_steps=-1"),
        ({"final_dense_steps": 0.5}, r"final_dense_steps=0.5"),
        ({"blocks": [{"kind": "mlp", "emit": ["a"]}]}, r"blocks has the entry .*expected a Block"),
        ({"blocks": ["fc1"]}, r"blocks has the entry 'fc1'"),
        ({"slices": 3}, r"unknown key 'slices'"),
        ({"target_modules": ".*mlp.*", "layers_to_transform": [0]}, r"layers_to_transform=\[0\] has no effect"),
    ],
)
def test_bad_values_are_named(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SliceOutConfig(**fields)


def test_defaults_and_what_is_recorded() -> None:
    config = SliceOutConfig()
    assert (config.rate, config.targets, config.starts, config.align) == (
        0.25,
        ("mlp", "attention", "conv"),
        "aligned",
        8,
    )
    assert (config.normalization, config.attention, config.final_dense_steps) == ("flow", "heads", 0)
    assert config.changed_fields() == {}
    assert SliceOutConfig(targets=["mlp"]) == SliceOutConfig(targets=("mlp",)) == SliceOutConfig(targets="mlp")
    fields = {"rate": {"mlp": 0.5}, "blocks": [{"kind": "mlp", "emits": ["a"], "reads": ["b"]}], "ramp_steps": 3}
    config = SliceOutConfig(**fields)
    recorded = config.method_fields()
    assert config.changed_fields() == fields and recorded["align"] == 8
    assert SliceOutConfig(**json.loads(json.dumps(recorded))).method_fields() == recorded


def test_every_option_says_what_it_trades() -> None:
    texts = {option.name: option.help for option in describe_options(SliceOutConfig)}
    for name in vars(SliceOutConfig)["__annotations__"].keys() - {"method", "changes_skeleton"}:
        assert len(texts[name]) > 40 and texts[name].endswith("."), name


def test_saves_and_loads_as_a_peft_config(tmp_path: Path) -> None:
    attention = Block("attention", ["q", "k", "v"], ["o"], head_dim="head_dim", follows={"width": "width"})
    config = SliceOutConfig(rate=0.5, targets=["mlp", "attention"], blocks=[attention, Block("mlp", ["a"], ["b"])])
    config.save_pretrained(tmp_path)
    for loaded in (SliceOutConfig.from_pretrained(tmp_path), PeftConfig.from_pretrained(tmp_path)):
        assert isinstance(loaded, SliceOutConfig)
        assert loaded.method_fields() == config.method_fields() and loaded.blocks == config.blocks


def test_units_and_widths() -> None:
    # 4 heads of 8 features, 128 hidden features
    assert spans("gpt2", rate=0.5)["transformer.h.0.attn.c_attn"] == (4, 0.5, 2)
    assert spans("gpt2", rate=0.3)["transformer.h.1.mlp.c_fc"] == (128, 0.3, 88)  # 89.6 to a multiple of 8
    # 4 query heads on 2 of keys and values are 2 groups; 48 features, .75 of them 36, halves up to 40
    llama = spans("llama", rate={"attention": 0.5, "mlp": 0.25})
    assert llama["model.layers.0.self_attn.q_proj"] == (2, 0.5, 1)
    assert llama["model.layers.0.mlp.gate_proj"] == (48, 0.25, 40)
    # align is in features: 16 of them are 2 heads of 8
    assert spans("bert", rate=0.25, align=16, targets=["attention"], starts="all", rate_pattern={".*query": 0.5}) == {
        f"bert.encoder.layer.{i}.attention.self.query": (4, 0.5, 2) for i in (0, 1)
    }
    # the features of each head, 8, of which 8 is no proper multiple
    assert spans("vit", attention="head_dim", align=2)["vit.layers.0.attention.q_proj"] == (8, 0.25, 6)
    # channels between the two convolutions of a layer
    assert list(spans("resnet", align=4, rate=0.5).values()) == [(8, 0.5, 4), (16, 0.5, 8), (16, 0.5, 8)]


def test_t5_has_one_slice_of_heads_for_all_layers_of_a_stack() -> None:
    names = [name for name in spans("t5", rate=0.5, targets=["attention"])]
    assert names == [
        "encoder.block.0.layer.0.SelfAttention.q",
        "decoder.block.0.layer.0.SelfAttention.q",
        "decoder.block.0.layer.1.EncDecAttention.q",
    ]
    model = get_efx_model(BY_NAME["t5"].build(), SliceOutConfig(rate=0.5))
    first, second = (block.layer[0].SelfAttention for block in model.encoder.block)
    assert first.q.emits is second.o.reads is first.relative_attention_bias.emits


def test_blocks_are_chosen_by_any_of_their_modules() -> None:
    both = [f"transformer.h.{i}.{part}" for i in (0, 1) for part in ("attn.c_attn", "mlp.c_fc")]
    assert list(spans("gpt2", rate=0.5)) == both
    assert list(spans("gpt2", rate=0.5, targets=["mlp"])) == both[1::2]
    assert list(spans("gpt2", rate=0.5, target_modules=["mlp.c_proj"])) == both[1::2]
    assert list(spans("gpt2", rate=0.5, target_modules=r".*h\.1\..*c_attn")) == both[2:3]
    assert list(spans("gpt2", rate=0.5, exclude_modules=["attn.c_proj", "h.0.mlp.c_fc"])) == both[3:]
    assert list(spans("gpt2", rate=0.5, layers_to_transform=1)) == both[2:]


def test_rates_by_kind_and_pattern_where_0_is_dense() -> None:
    found = spans("gpt2", rate={"mlp": 0.25}, rate_pattern={"h.0.mlp.c_fc": 0.5, "h.1.attn.c_attn": 0.75})
    assert found == {
        "transformer.h.0.mlp.c_fc": (128, 0.5, 64),
        "transformer.h.1.attn.c_attn": (4, 0.75, 1),
        "transformer.h.1.mlp.c_fc": (128, 0.25, 96),
    }
    assert list(spans("gpt2", rate=0.5, rate_pattern={r"h\.0\..*": 0}, targets=["mlp"])) == [
        "transformer.h.1.mlp.c_fc"
    ]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"targets": ["mlp"], "rate_pattern": {".*c_attn": 0.25}},
            r"rate_pattern\['\.\*c_attn'\] matches no block that",
        ),
        ({"exclude_modules": ["h.0.mlp.c_fc"], "rate_pattern": {"h.0.mlp.c_fc": 0.25}}, r"rate_pattern.* matches no"),
        ({"layers_to_transform": [1], "rate_pattern": {r"h\.0\..*": 0.25}}, r"rate_pattern.* matches no block that"),
        (
            {"targets": ["mlp"], "target_modules": ["c_fc", "c_attn"]},
            r"no module called 'c_attn' is in a block that is",
        ),
        (
            {"rate": {"mlp": 0.5}, "target_modules": ["c_fc", "c_attn"]},
            r"no module called 'c_attn' is in a block that",
        ),
        ({"target_modules": ["c_fc", "lm_head"]}, r"no module called 'lm_head' is in a block that is sliced"),
        (
            {"layers_to_transform": [0], "layers_pattern": ["h", "layers"]},
            r"no list of layers that is called 'layers'",
        ),
    ],
)
def test_settings_of_blocks_that_stay_dense_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        spans("gpt2", **{"rate": 0.5, **fields})


def test_rate_0_by_a_pattern_may_be_named_too() -> None:
    fields = {"target_modules": ["c_fc", "c_attn"], "rate_pattern": {".*c_attn": 0}}
    assert list(spans("gpt2", rate=0.5, **fields)) == [f"transformer.h.{i}.mlp.c_fc" for i in (0, 1)]


def test_record_is_as_documented() -> None:
    model = get_efx_model(
        BY_NAME["gpt2"].build_with(attn_pdrop=0.1), SliceOutConfig(rate=0.5, layers_to_transform=[0])
    )
    (entry,) = efx_record(model)["methods"]  # pyright: ignore
    assert entry["method"] == "slice_out"
    assert entry["modules"] == {
        "transformer.h.0.attn.c_attn": {
            "span": {"kind": "attention", "size": 4, "rate": 0.5, "align": 1},
            "emits": {"span": 0, "blocks": 3},
        },
        "transformer.h.0.attn.c_proj": {"reads": {"span": 0, "blocks": 1}},
        "transformer.h.0.attn": {"follows": {"split_size": {"span": 0, "times": 8}}},
        "transformer.h.0.attn.attn_dropout": {"dropouts": {"p": 0.1}},
        "transformer.h.0.mlp.c_fc": {
            "span": {"kind": "mlp", "size": 128, "rate": 0.5, "align": 8},
            "emits": {"span": 1, "blocks": 1},
        },
        "transformer.h.0.mlp.c_proj": {"reads": {"span": 1, "blocks": 1}},
    }

from typing import Any

import pytest
import torch
from matrix import ARCHITECTURES
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from hf_efx import LowRankConfig, get_efx_model
from hf_efx.core.model.adapter import efx_record
from hf_efx.core.model.block_map import BLOCK_MAPS, Block, BlockMap, block_map, find_blocks


def gpt2(**fields) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16, n_positions=8, bos_token_id=0, eos_token_id=0)
    config.update(fields)
    return GPT2LMHeadModel(config)


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("transformer.h.0.attn.c_attn", 3),
        ("h.0.attn.c_attn", 3),
        ("attn.c_attn", 3),
        ("transformer.h.0.crossattention.c_attn", 2),  # key and value; the query is q_attn
        ("transformer.h.0.crossattention.q_attn", 1),
        ("transformer.h.0.attn.c_proj", 1),
        ("transformer.h.0.my_attn.c_attn", 1),
    ],
)
def test_gpt2_stacks_its_projections(name: str, blocks: int) -> None:
    assert block_map(gpt2()).blocks_of(name) == blocks


def test_unknown_models_have_none() -> None:
    assert block_map(nn.Linear(2, 2)) == BlockMap()
    assert BlockMap().blocks_of("transformer.h.0.attn.c_attn") == 1


def test_plan_has_the_blocks_of_cross_attention_too() -> None:
    model = get_efx_model(gpt2(add_cross_attention=True), LowRankConfig(rank=2))
    (entry,) = efx_record(model)["methods"]  # pyright: ignore
    blocks = {name.split(".h.0.")[1]: spec.get("blocks", 1) for name, spec in entry["modules"].items()}
    assert blocks["attn.c_attn"] == 3 and blocks["crossattention.c_attn"] == 2 and blocks["crossattention.q_attn"] == 1


# What stands between emitters and readers, by the name of the first emitter.
FOUND = {
    "gpt2": ["h.0.attn.c_attn", "h.0.mlp.c_fc"],
    "llama": ["layers.0.self_attn.q_proj", "layers.0.mlp.gate_proj"],
    "bert": ["layer.0.attention.self.query", "layer.0.intermediate.dense"],
    "t5": ["encoder.block.0.layer.0.SelfAttention.q", "encoder.block.0.layer.1.DenseReluDense.wi"],
    "vit": ["layers.0.attention.q_proj", "layers.0.mlp.fc1"],
    "resnet": ["stages.0.layers.0.layer.0.convolution", "stages.1.layers.0.layer.0.convolution"],
}


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_blocks_hold_every_layer_once(architecture: Any) -> None:
    model = architecture.build()
    blocks = find_blocks(model, block_map(model).blocks)
    names = [block.name for block in blocks]
    assert {next(n for n in names if n.endswith(end)) for end in FOUND[architecture.name]} == set(names[:2])
    assert len(names) == {"t5": 2 * 2 + 2 * 3, "resnet": 3}.get(architecture.name, 4)
    emitters = [block.path(name) for block in blocks for name in block.block.emits]
    readers = [block.path(name) for block in blocks for name in block.block.reads]
    assert len(set(emitters)) == len(emitters) and len(set(readers)) == len(readers)


@pytest.mark.parametrize("model_type", BLOCK_MAPS)
def test_paths_of_a_row_name_attributes(model_type: str) -> None:
    """Whether attributes are there is seen on whole models (tests/slice_out); here, that the form is right."""
    for block in BLOCK_MAPS[model_type].blocks:
        assert (block.kind == "attention") == bool(block.head_dim)
        assert not block.biases or block.shared


def test_gpt2_s_cross_attention_is_a_block_of_its_own() -> None:
    model = gpt2(add_cross_attention=True)
    blocks = {block.name: block for block in find_blocks(model, block_map(model).blocks)}
    assert list(blocks) == [f"transformer.h.0.{n}" for n in ("attn.c_attn", "crossattention.q_attn", "mlp.c_fc")]
    cross = blocks["transformer.h.0.crossattention.q_attn"]
    assert cross.members == [f"transformer.h.0.crossattention.{name}" for name in ("q_attn", "c_attn", "c_proj")]


def test_bottleneck_s_middle_convolution_reads_one_block_and_emits_the_next() -> None:
    from transformers import ResNetConfig, ResNetModel

    model = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[16], depths=[1], layer_type="bottleneck"))
    first, second = find_blocks(model, BLOCK_MAPS["resnet"].blocks)
    assert first.path(first.block.reads[0]) == second.name == "encoder.stages.0.layers.0.layer.1.convolution"


def test_first_row_has_what_two_rows_claim() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 4), "b": nn.Linear(4, 2), "c": nn.Linear(4, 2)})
    rows = [Block("mlp", ["a"], ["b"]), Block("mlp", ["a"], ["c"])]
    assert [block.block for block in find_blocks(model, rows)] == rows[:1]
    assert [block.block for block in find_blocks(model, rows[::-1])] == rows[1:]
    nested = nn.ModuleList([model, nn.ModuleDict({"a": nn.Linear(2, 4), "b": nn.Linear(4, 2)})])
    assert [block.name for block in find_blocks(nested, rows[:1])] == ["0.a", "1.a"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kind": "ffn"}, r"kind='ffn': expected one of mlp, attention, conv"),
        ({"emits": "fc1"}, r"emits='fc1': expected a list of names"),
        ({"reads": []}, r"name at least one module in each"),
        ({"kind": "attention"}, r"kind='attention' with head_dim=None"),
        ({"head_dim": 4}, r"kind='mlp' with head_dim=4"),
        ({"follows": {"size": "columns"}}, r"follows has 'columns'"),
    ],
)
def test_bad_blocks_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Block(**{"kind": "mlp", "emits": ["fc1"], "reads": ["fc2"], **fields})

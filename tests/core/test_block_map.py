import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from hf_efx import LowRankConfig, get_efx_model
from hf_efx.core.adapter import efx_record
from hf_efx.core.block_map import BlockMap, block_map


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

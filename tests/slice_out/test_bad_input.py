"""What SliceOut refuses, before the first step and with the model unharmed."""

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from matrix import ARCHITECTURES
from torch import nn
from transformers import DynamicCache

from hf_efx import Block, EfxConfig, LowRankConfig, SliceOutConfig, get_efx_model, step_context, unload
from hf_efx.core.model.adapter import efx_record
from slice_out.architectures import MORE

BY_NAME = {architecture.name: architecture for architecture in (*ARCHITECTURES, *MORE)}
MLP = Block("mlp", emits=["first"], reads=["second"])
MLP2 = Block("mlp", emits=["first"], reads=["second"], dropouts=["p"])
HALF = {"rate": 0.5, "align": 2}


def net(**layers: nn.Module) -> nn.Sequential:
    """A plain network of named layers."""
    model = nn.Sequential()
    for name, layer in ({"first": nn.Linear(8, 16), "second": nn.Linear(16, 8)} | layers).items():
        model.add_module(name, layer)
    return model


class Doubled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class Own(nn.Identity):
    """A module that transformers doesn't have."""


def between(layer: nn.Module, first: nn.Module | None = None, second: nn.Module | None = None) -> nn.Sequential:
    """A network with a layer between the two of its block."""
    layers = [first or nn.Linear(8, 16), layer, second or nn.Linear(16, 8)]
    return nn.Sequential(OrderedDict(zip(("first", "between", "second"), layers, strict=True)))


def normalised_gpt2() -> nn.Module:
    model: Any = BY_NAME["gpt2"].build()
    model.transformer.h[0].mlp.act = nn.Sequential(nn.LayerNorm(128), Own())
    return model


def tied() -> nn.Module:
    model: Any = net(third=nn.Linear(16, 8))
    model.third.weight = model.second.weight
    return model


def int8() -> nn.Module:
    model: Any = net()
    model.second.weight = nn.Parameter(torch.zeros(8, 16, dtype=torch.int8), requires_grad=False)
    return model


def quantised() -> nn.Module:
    model: Any = BY_NAME["gpt2"].build()
    model.hf_quantizer = type("Q", (), {"quantization_config": type("C", (), {"quant_method": "bitsandbytes"})})
    return model


def factorised(**fields: Any) -> nn.Module:
    return get_efx_model(BY_NAME["gpt2"].build(), LowRankConfig(rank=2, **fields))


def attention(head_dim: Any = 4, query: int = 16, key: int = 16) -> tuple[Callable[[], nn.Module], dict[str, Any]]:
    layers = {"q": nn.Linear(8, query), "k": nn.Linear(8, key), "v": nn.Linear(8, key), "o": nn.Linear(query, 8)}
    return lambda: net(**layers), {"blocks": [Block("attention", ["q", "k", "v"], ["o"], head_dim=head_dim)], **HALF}


def loaded_dormant() -> nn.Module:
    model = get_efx_model(BY_NAME["gpt2"].build(), SliceOutConfig(**HALF))
    fresh = BY_NAME["gpt2"].build()
    fresh.config.efx = efx_record(model)
    return fresh


def norm(layer: nn.Module) -> Callable[[], nn.Module]:
    return lambda: net(first=nn.Conv2d(3, 8, 3), norm=layer, second=nn.Conv2d(8, 4, 3))


CONV = Block("conv", ["first"], ["second"], norms=["norm"])

CASES: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "a width that alignment can't reach": (
        BY_NAME["resnet"].build,
        {},
        r"'resnet.*stages.0.layers.0.layer.0.convolution' has 8 channels.*rounds to a width of 8 at align=8, which "
        r"drops nothing.*smaller align",
    ),
    "a rate that leaves nothing": (
        BY_NAME["gpt2"].build,
        {"rate": 0.99, "targets": ["mlp"]},
        r"'transformer.h.0.mlp.c_fc' has 128 features.*which leaves nothing",
    ),
    "one group of heads": (
        lambda: BY_NAME["llama"].build_with(num_key_value_heads=1),
        {"targets": ["attention"], "rate": 0.5},
        r"has 1 groups of heads.*drops nothing|has 1 groups of heads.*leaves nothing",
    ),
    "few heads": (BY_NAME["gpt2"].build, {"rate": 0.1, "targets": ["attention"]}, r"has 4 heads.*another rate"),
    "heads that don't divide": (
        *attention(head_dim=5),
        r"'q' has 16 features.*isn't a whole number of heads of width 5",
    ),
    "groups that don't divide": (*attention(query=12, key=8), r"'q' has 12 features.*or of groups of 2"),
    "heads wider than the layer": (*attention(head_dim=32), r"isn't a whole number of heads of width 32"),
    "features of heads under rotary embeddings": (
        BY_NAME["llama"].build,
        {"attention": "head_dim", **HALF},
        r"attention='head_dim' can't be: LlamaForCausalLM has rotary.*Use attention='heads'",
    ),
    "features of heads of unknown width": (
        attention()[0],
        {**attention()[1], "attention": "head_dim"},
        r"gives the heads' width as a number.*Name the attribute",
    ),
    "T5 heads in one layer": (
        BY_NAME["t5"].build,
        {"layers_to_transform": [0], **HALF},
        r"the heads of '.*block.0.*SelfAttention.q' and '.*block.1.*' need one shared slice.*attention='head_dim'",
    ),
    "T5 heads at two rates": (
        BY_NAME["t5"].build,
        {"rate_pattern": {r".*decoder\.block\.1.*EncDecAttention\.q": 0.25}, **HALF},
        r"'decoder.block.0.layer.1.EncDecAttention.q' and 'decoder.block.1.* need one shared slice",
    ),
    "a model without known blocks": (net, {}, r"hf_efx knows no blocks of Sequential. Name them.*blocks=\[Block"),
    "blocks that aren't there": (
        net,
        {"blocks": [Block("mlp", ["fc1"], ["fc2"])]},
        r"no module of Sequential is called .fc1.",
    ),
    "blocks of two sizes": (
        lambda: net(second=nn.Linear(12, 8)),
        {"blocks": [MLP], **HALF},
        r"Block 'first' emits 16 units, but 'second' has 12",
    ),
    "no block of this kind": (BY_NAME["gpt2"].build, {"targets": ["conv"]}, r"choose no block of GPT2LMHeadModel"),
    "no block of this name": (
        BY_NAME["gpt2"].build,
        {"target_modules": ["q_proj"]},
        r"target_modules=\['q_proj'\]: 'q_proj' matches no module of GPT2LMHeadModel",
    ),
    "everything at rate 0": (BY_NAME["gpt2"].build, {"rate": 0.0}, r"rate=0.0.*choose no block"),
    "a pattern that matches nothing": (
        BY_NAME["gpt2"].build,
        {"rate_pattern": {"fc9": 0.5}},
        r"rate_pattern\['fc9'\] matches no block",
    ),
    "tied": (tied, {"blocks": [MLP], **HALF}, r"'second' can't be sliced, since its weight is tied"),
    "int8": (int8, {"blocks": [MLP], **HALF}, r"'second' can't be sliced, since its weight is torch.int8"),
    "quantised": (quantised, {}, r"quantised \(bitsandbytes\).*Load it without"),
    "factorised": (factorised, HALF, r"'transformer.h.0.attn.c_attn' can't be sliced, since it is already factorised"),
    "half factorised": (
        lambda: factorised(target_modules=["mlp.c_proj"]),
        HALF,
        r"'transformer.h.0.mlp.c_proj' can't be sliced.*factorised. Leave its block out with exclude_modules",
    ),
    "sliced twice": (
        lambda: get_efx_model(BY_NAME["gpt2"].build(), SliceOutConfig(**HALF)),
        HALF,
        r"since slice_out acts on it already.*hf_efx.unload",
    ),
    "adapted": (
        lambda: peft.get_peft_model(BY_NAME["bert"].build(), peft.LoraConfig(target_modules=["query"])),
        HALF,
        r"already carries a peft adapter: put hf_efx on first",
    ),
    "loaded, and not put back": (loaded_dormant, HALF, r"belongs to the slice_out method.*get_efx_model\(model\)"),
    "a norm that isn't per channel": (
        norm(nn.GroupNorm(2, 8)),
        {"blocks": [CONV], **HALF},
        r"'norm' can't be sliced, since it is a GroupNorm, not a BatchNorm2d",
    ),
    "a grouped convolution": (
        lambda: net(first=nn.Conv2d(4, 8, 3, groups=2), norm=nn.BatchNorm2d(8), second=nn.Conv2d(8, 4, 3)),
        {"blocks": [CONV], **HALF},
        r"'first' can't be sliced.*grouped convolution",
    ),
    "a subclass with a forward of its own": (
        lambda: net(second=Doubled(16, 8)),
        {"blocks": [MLP], **HALF},
        r"'second' can't be sliced, since it is a Doubled",
    ),
    "a depthwise convolution between": (
        lambda: between(nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 3)),
        {"blocks": [Block("conv", ["first"], ["second"])], **HALF},
        r"the forward of module 'between', Conv2d\(16, 16, .*groups=16\), fails .*treats each alone",
    ),
    "a slope for each unit": (
        lambda: between(nn.PReLU(16)),
        {"blocks": [MLP], **HALF},
        r"the forward of module 'between', PReLU\(num_parameters=16\), fails",
    ),
    "units that are reshaped": (
        lambda: between(nn.Sequential(nn.Unflatten(1, (4, 4)), nn.Flatten())),
        {"blocks": [MLP], **HALF},
        r"the forward of module 'between.0', Unflatten\(.*fails",
    ),
    "a mapped model whose code was changed": (
        normalised_gpt2,
        {"targets": ["mlp"], **HALF},
        r"the forward of module 'transformer.h.0.mlp.act.0', LayerNorm\(\(128,\).*fails",
    ),
    "blocks that another row took": (
        net,
        {"blocks": [MLP, MLP2], **HALF},
        r"the rows before it name its modules in Sequential already",
    ),
    "the model's own layerdrop": (
        lambda: BY_NAME["marian"].build_with(encoder_layerdrop=0.1),
        HALF,
        r"skips layers itself \(encoder_layerdrop=0.1\).*encoder_layerdrop=0.0",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_and_the_model_unharmed(case: str) -> None:
    make, fields, words = CASES[case]
    torch.manual_seed(0)
    model = make()
    types, record = [type(m) for m in model.modules()], copy.deepcopy(efx_record(model))
    hooks = len(model._forward_pre_hooks)
    with pytest.raises(ValueError, match=f"(?s){words}"):
        get_efx_model(model, SliceOutConfig(**fields))
    assert [type(m) for m in model.modules()] == types and efx_record(model) == record
    assert len(model._forward_pre_hooks) == hooks


@pytest.mark.parametrize("order", [1, -1])
def test_one_list_with_low_rank_on_the_same_modules(order: int) -> None:
    configs = [LowRankConfig(rank=2), SliceOutConfig(**HALF)][::order]
    model = BY_NAME["gpt2"].build()
    with pytest.raises(
        ValueError, match=r"'transformer.h.0.attn.c_attn' is already taken by the (low_rank|slice_out)"
    ):
        get_efx_model(model, EfxConfig(configs))
    assert efx_record(model) is None


def test_low_rank_after_it() -> None:
    model = get_efx_model(BY_NAME["gpt2"].build(), SliceOutConfig(targets=["mlp"], **HALF))
    with pytest.raises(
        ValueError, match=r"LowRankConfig: slice_out acts on module 'transformer.h.0.mlp.c_fc' and others"
    ):
        get_efx_model(model, LowRankConfig(rank=2))
    with pytest.raises(ValueError, match=r"'transformer.h.0.mlp.c_fc' can't be changed, since slice_out acts on it"):
        get_efx_model(model, LowRankConfig(rank=2, target_modules=["c_fc"]))
    get_efx_model(model, LowRankConfig(rank=2, target_modules=["attn.c_attn"]))  # a block that isn't sliced


def test_door_3_names_door_1() -> None:
    for task in (None, "CAUSAL_LM"):
        with pytest.raises(
            ValueError, match=r"SliceOutConfig is no adapter.*hf_efx.get_efx_model\(model, SliceOutConfig"
        ):
            peft.get_peft_model(BY_NAME["gpt2"].build(), SliceOutConfig(task_type=task))


def in_a_step(name: str = "gpt2", **fields: Any) -> Any:
    model = get_efx_model(BY_NAME[name].build(), SliceOutConfig(**HALF | fields)).train()
    context: Any = step_context(model)
    context.begin_step(0)
    return model


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_a_cache_in_a_training_step(name: str) -> None:
    model, batch = in_a_step(name), BY_NAME[name].batch()
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    for asked in ({"use_cache": True}, {"past_key_values": cache}):
        with pytest.raises(ValueError, match="A KV cache in a training step.*use_cache=False.*model.eval"):
            model(**batch, **asked)
    model(**batch, use_cache=False).loss.backward()
    model.eval()
    model.generate(batch["input_ids"][:, :3], max_new_tokens=2, do_sample=False, eos_token_id=None, pad_token_id=0)


def test_adapters_that_could_not_train_on_slices() -> None:
    for adapter in (
        peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        peft.LoraConfig(target_modules=["q_proj"], use_dora=True),
    ):
        model = peft.get_peft_model(get_efx_model(BY_NAME["llama"].build(), SliceOutConfig(**HALF)), adapter)
        context: Any = step_context(model)
        with pytest.raises(ValueError, match=r"on '.*0.self_attn.q_proj', a layer that SliceOut slices: plain LoRA"):
            context.begin_step(0)


def test_gradients_in_place_past_a_hook() -> None:
    model = in_a_step(accumulate_in_place=True)
    model.transformer.h[0].mlp.c_fc.weight.register_hook(lambda gradient: gradient)
    with pytest.raises(ValueError, match=r"accumulate_in_place=True: a parameter has gradient hooks"):
        model(**BY_NAME["gpt2"].batch()).loss.backward()


def test_lengths_of_a_run() -> None:
    model = get_efx_model(BY_NAME["gpt2"].build(), SliceOutConfig(ramp_steps=8, final_dense_steps=2, **HALF))
    context: Any = step_context(model)
    with pytest.raises(ValueError, match="final_dense_steps=2: the length of the training isn't known.*max_steps"):
        context.begin_step(0)
    for length in (2, 4):  # all dense, and dense after the first two steps of a ramp that starts at 0
        context.max_steps = length
        with pytest.raises(ValueError, match=f"ramp_steps=8, final_dense_steps=2 leave no sliced.*max_steps={length}"):
            context.begin_step(0)
    context.max_steps = 5  # the third step of the ramp is its second stair
    context.begin_step(0)


def test_settings_that_are_changed_later() -> None:
    config = SliceOutConfig(rate={"mlp": 0.5}, align=2)
    model = get_efx_model(BY_NAME["gpt2"].build(), config)
    context, other = step_context(model), copy.deepcopy(model)
    assert context is not None
    context.begin_step(0)
    assert isinstance(config.rate, dict)
    config.rate["mlp"] = 0.25
    with pytest.raises(ValueError, match=r"SliceOutConfig.rate was changed.*from {'mlp': 0.5} to {'mlp': 0.25}"):
        context.begin_step(1)
    step_context(other).begin_step(1)  # pyright: ignore  (a copy has a config of its own)
    config.rate["mlp"] = 0.5
    context.begin_step(1)
    config.starts = "all"
    with pytest.raises(ValueError, match=r"SliceOutConfig.starts was changed after get_efx_model.*unload\(model\)"):
        context.begin_step(2)
    context = step_context(get_efx_model(unload(model), config))
    assert context is not None
    context.begin_step(2)


def test_a_record_that_was_edited() -> None:
    model = get_efx_model(BY_NAME["gpt2"].build(), SliceOutConfig(**HALF))
    record = copy.deepcopy(efx_record(model))
    assert record is not None
    record["methods"][0]["modules"]["transformer.h.0.mlp.c_fc"]["later"] = 1
    fresh = BY_NAME["gpt2"].build()
    fresh.config.efx = record
    with pytest.raises(ValueError, match=r"module 'transformer.h.0.mlp.c_fc', where 'later' is unknown.*upgrade"):
        get_efx_model(fresh)

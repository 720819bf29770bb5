"""In memory: matching, refusing, swapping. What holds on every architecture stands in tests/test_matrix.py."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from accelerate import cpu_offload
from matrix import ARCHITECTURES
from torch import nn
from torch.nn.utils import prune
from transformers import MixtralConfig, MixtralForCausalLM

from hf_efx import (
    EfxConfig,
    LowRankConfig,
    SliceOutConfig,
    TargetedDropoutConfig,
    default_targets,
    get_efx_model,
    merge_and_unload,
    unload,
)
from hf_efx.core.model.adapter import efx_record
from hf_efx.low_rank.layers import FactorisedConv2d, FactorisedLinear

BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}


def pruned_by_torch(layer: nn.Module) -> nn.Module:
    return prune.l1_unstructured(layer, "weight", 0.5)


def gpt2() -> Any:
    return BY_NAME["gpt2"].build()


class Net(nn.Module):
    """A plain module with what is left alone by default: a stem, a grouped convolution, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.conv = nn.Conv2d(8, 8, 3)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.fc = nn.Linear(8, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.depthwise(self.conv(self.stem(x)).relu()).mean((2, 3))
        return self.head(self.fc(x).relu())


def plan(model: nn.Module) -> list[str]:
    record = efx_record(model)
    assert record is not None
    return [name for entry in record["methods"] for name in entry["modules"]]


# --- targets


def test_default_targets_leave_embeddings_stem_and_heads() -> None:
    found = {name: default_targets(BY_NAME[name].build()) for name in BY_NAME}
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert found["gpt2"] == [f"transformer.h.{i}.{part}" for i in (0, 1) for part in parts]
    assert found["llama"] == [
        f"model.layers.{i}.{part}_proj"
        for i in (0, 1)
        for part in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
    ]
    assert len(found["bert"]) == 2 * 6 + 1 and found["bert"][-1] == "bert.pooler.dense"
    assert len(found["t5"]) == 2 * (4 + 2) + 2 * (8 + 2) and "lm_head" not in found["t5"]
    assert len(found["vit"]) == 2 * 6
    # every convolution of two stages but the stem: 2 of the first block, 1 shortcut and 4 of the second stage
    assert len(found["resnet"]) == 7 and not any("embedder" in name for name in found["resnet"])


def test_default_targets_of_a_plain_module() -> None:
    assert default_targets(Net()) == ["conv", "fc"]
    assert default_targets(nn.Linear(4, 4)) == []


def test_targets_by_list_pattern_exclusion_and_layer() -> None:
    def targets(**fields: Any) -> list[str]:
        names = plan(get_efx_model(gpt2(), LowRankConfig(rank=2, init="he", **fields)))
        return [name.removeprefix("transformer.h.") for name in names]

    assert targets(target_modules=["c_fc"]) == ["0.mlp.c_fc", "1.mlp.c_fc"]
    assert targets(target_modules=["attn.c_proj"]) == ["0.attn.c_proj", "1.attn.c_proj"]
    assert targets(target_modules=r".*\.1\.mlp\..*") == ["1.mlp.c_fc", "1.mlp.c_proj"]
    assert targets(target_modules=["c_fc"], layers_to_transform=[1]) == ["1.mlp.c_fc"]
    assert targets(target_modules=["c_fc"], layers_to_transform=0, layers_pattern="h") == ["0.mlp.c_fc"]
    assert targets(target_modules=["lm_head", "c_fc"], exclude_modules=["lm_head"]) == ["0.mlp.c_fc", "1.mlp.c_fc"]
    for default in ({}, {"target_modules": "all-linear"}):
        assert len(targets(**default)) == 8
        assert targets(**default, exclude_modules=["c_fc", "c_proj"]) == ["0.attn.c_attn", "1.attn.c_attn"]
        # peft itself takes a fully named module whatever layers_to_transform says
        assert targets(**default, layers_to_transform=[1], exclude_modules=["c_attn", "c_proj"]) == ["1.mlp.c_fc"]


def test_output_embeddings_are_taken_where_they_are_named_and_not_tied() -> None:
    model = BY_NAME["llama"].build()
    assert plan(get_efx_model(model, LowRankConfig(rank=2, target_modules=["lm_head"]))) == ["lm_head"]


def test_experts_that_no_method_reaches_are_named_with_their_share(caplog: pytest.LogCaptureFixture) -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    config = MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=8)
    for method in (LowRankConfig(rank=2), SliceOutConfig(targets="attention"), TargetedDropoutConfig()):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "hf_efx"):
            try:
                get_efx_model(MixtralForCausalLM(config), method)
            except ValueError as error:
                assert method.method == "slice_out", error  # it doesn't know the architecture
        # 8 * (2 * 64 * 32 + 32 * 64) of 56,736
        assert caplog.text.count("MixtralForCausalLM holds 87% of its weights in three-dimensional parameters") == 1
    caplog.clear()
    with caplog.at_level(logging.WARNING, "hf_efx"):
        get_efx_model(MixtralForCausalLM(config), LowRankConfig(rank=2, target_modules=["q_proj"]))
        get_efx_model(gpt2(), LowRankConfig(rank=2))
    assert not caplog.text
    with pytest.raises(ValueError, match=r"'gate_up_proj' is a parameter of shape \(8, 128, 32\), not a module"):
        get_efx_model(MixtralForCausalLM(config), LowRankConfig(target_modules=["gate_up_proj"]))


# --- what is refused, the model unharmed


def linears(**changed: nn.Module) -> nn.Module:
    model = nn.Sequential()
    for name, module in {"first": nn.Linear(8, 8), "second": nn.Linear(8, 8), **changed}.items():
        model.add_module(name, module)
    return model


def int8() -> nn.Module:
    model = linears()
    model.second.weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)  # pyright: ignore
    return model


def quantised() -> Any:
    model = gpt2()
    config = type("FakeQuantisation", (), {"quant_method": "bitsandbytes"})
    model.hf_quantizer = type("FakeQuantizer", (), {"quantization_config": config})()
    return model


def with_nan() -> nn.Module:
    model = linears()
    model.second.weight.data[0, 0] = float("nan")  # pyright: ignore
    return model


def patched() -> nn.Module:
    model = linears()
    second: Any = model.second
    second.forward = lambda x: nn.functional.linear(x, second.weight)
    return model


NAMED = {"target_modules": ["second"]}

REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "nothing matches": (gpt2, {"target_modules": ["q_proj"]}, r"=\['q_proj'\]: 'q_proj' matches no module.*c_proj"),
    "all excluded": (linears, {**NAMED, "exclude_modules": ["second"]}, r"exclude_modules=\['second'\].*matches no"),
    "layer out of range": (gpt2, {"layers_to_transform": [9]}, r"layers_to_transform=\[9\]: 9 matches no module"),
    "rank above both": (linears, {"rank": 9, **NAMED}, r"rank=9 is above min\(in, out\)=8.*'second'.*Lower"),
    "rank above a block": (gpt2, {"rank": 33}, r"rank=33 is above min\(in, out\)=32.*c_attn.*\[32, 32\]"),
    "rank_pattern above": (gpt2, {"rank": 2, "rank_pattern": {"c_fc": 40}}, r"rank=40 is above.*mlp.c_fc"),
    "rank_pattern unmatched": (gpt2, {"rank_pattern": {"q_proj": 2}}, r"rank_pattern\['q_proj'\] matches no targeted"),
    "nothing gets smaller": (gpt2, {"rank": 1.0}, r"rank=1.0.*nothing would be factorised.*only_if_smaller=False"),
    "tied": (gpt2, {"rank": 2, "target_modules": ["lm_head"]}, r"'lm_head'.*tied \(lm_head.weight, transformer.wte"),
    "shared module": (
        lambda: linears(third=nn.Sequential(shared := nn.Linear(8, 8)), fourth=shared),
        {"target_modules": ["third.0"]},
        r"'third.0'.*tied \(fourth.weight, third.0.weight\)",
    ),
    "int8": (int8, NAMED, r"'second'.*torch.int8: quantised layers can't be changed.*exclude_modules"),
    "quantised": (quantised, {}, r"quantised \(bitsandbytes\).*Load it without quantization_config"),
    "custom layer": (
        lambda: linears(second=nn.Bilinear(8, 8, 8)),
        NAMED,
        r"'second' can't be changed, since it is a Bilinear, not a plain Linear",
    ),
    "lora": (
        lambda: peft.get_peft_model(linears(), peft.LoraConfig(target_modules=["second"])),
        NAMED,
        r"already carries a peft adapter: put hf_efx on first",
    ),
    "lora inside": (
        lambda: peft.get_peft_model(linears(), peft.LoraConfig(target_modules=["second"])).base_model.model,
        NAMED,
        r"already carries a peft adapter",
    ),
    "factorised twice": (
        lambda: get_efx_model(linears(), LowRankConfig(rank=2, **NAMED)),
        NAMED,
        r"'second' can't be changed, since it is already factorised",
    ),
    "factorised everywhere": (lambda: get_efx_model(gpt2(), LowRankConfig(rank=2)), {}, r"matches no module"),
    "attention children": (
        lambda: linears(second=nn.MultiheadAttention(8, 2)),
        {"target_modules": ["second.out_proj"]},
        r"'second.out_proj' can't be changed",
    ),
    "fused encoder layer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16),
        {"target_modules": ["linear1"]},
        r"'linear1'.*parent TransformerEncoderLayer reads its weight in a fused kernel",
    ),
    "grouped convolution": (Net, {"target_modules": ["depthwise"]}, r"'depthwise'.*grouped convolution \(groups=8\)"),
    "spectral norm": (
        lambda: linears(second=nn.utils.spectral_norm(nn.Linear(8, 8))),
        NAMED,
        r"'second'.*its weight is no parameter",
    ),
    "replaced forward": (patched, NAMED, r"'second'.*its forward was replaced"),
    "NaN": (with_nan, {}, r"'second' holds NaN.*exclude_modules"),
    "random weights for auto": (
        gpt2,
        {"rank": "auto", "parameter_budget": 0.5},
        r"rank='auto' reads the spectrum of trained weights, but these look random",
    ),
}


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.spectral_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_and_the_model_unharmed(case: str) -> None:
    make, fields, words = REFUSED[case]
    torch.manual_seed(0)
    model = make()
    if case == "NaN":
        model.head = nn.Linear(8, 8)  # the last Linear is a head, which default targets leave
    state = {key: value.clone() for key, value in model.state_dict().items()}
    types, record = [type(m) for m in model.modules()], copy.deepcopy(efx_record(model))
    config = copy.deepcopy(getattr(model, "config", None))
    with pytest.raises(ValueError, match=f"(?s){words}"):
        get_efx_model(model, LowRankConfig(**{"rank": 2, **fields}))
    assert [type(m) for m in model.modules()] == types and efx_record(model) == record
    assert model.state_dict().keys() == state.keys()
    assert all(value.equal(state[key]) or value.isnan().any() for key, value in model.state_dict().items())
    if config is not None and hasattr(config, "to_dict"):
        assert model.config.to_dict() == config.to_dict()


def test_refused_at_the_second_config_the_first_is_not_applied() -> None:
    model = gpt2()
    good, bad = LowRankConfig(rank=2, target_modules=["c_fc"]), LowRankConfig(rank=99, target_modules=["c_attn"])
    with pytest.raises(ValueError, match="rank=99"):
        get_efx_model(model, [good, bad])
    assert efx_record(model) is None and not any(isinstance(m, FactorisedLinear) for m in model.modules())


def test_offloaded_weights_are_refused_before_anything_changes() -> None:
    model = gpt2()
    torch.manual_seed(0)
    x = torch.randint(0, 64, (1, 5))
    expected = model(x).logits
    cpu_offload(model.transformer.h[1].mlp.c_proj, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"offloads the weights of module '.*1.mlp.c_proj'.*before dispatch"):
        get_efx_model(model, LowRankConfig(rank=2))
    assert not any(isinstance(m, FactorisedLinear) for m in model.modules())
    assert torch.equal(model(x).logits, expected)


def test_restoring_without_a_record_is_refused() -> None:
    with pytest.raises(ValueError, match="restores what config.efx names, but there is none"):
        get_efx_model(gpt2())


# --- swapping


def test_takes_a_config_a_list_and_an_efx_config_alike() -> None:
    config = LowRankConfig(rank=2, init="he")
    models = [get_efx_model(gpt2(), configs) for configs in (config, [config], EfxConfig([config]))]
    assert efx_record(models[0]) == efx_record(models[1]) == efx_record(models[2])


def test_plain_module_keeps_its_record_itself_and_merges() -> None:
    torch.manual_seed(0)
    model = Net().double().eval()
    model.config = {"some": "dict"}  # pyright: ignore[reportAttributeAccessIssue]
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    expected, keys = model(x), set(model.state_dict())
    get_efx_model(model, LowRankConfig(rank=1.0, only_if_smaller=False))
    assert isinstance(model.conv, FactorisedConv2d) and isinstance(model.fc, FactorisedLinear)
    assert plan(model) == ["conv", "fc"] and model.config == {"some": "dict"}
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-10)
    merge_and_unload(model)
    assert efx_record(model) is None and set(model.state_dict()) == keys
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-10)


def test_references_hooks_bias_and_requires_grad_stay() -> None:
    model = Net()
    held, seen = model.fc, []
    model.fc.register_forward_hook(lambda *args: seen.append(1))
    model.fc.weight.requires_grad_(False)
    bias = model.fc.bias
    get_efx_model(model, LowRankConfig(rank=2))
    assert held is model.fc and isinstance(held, FactorisedLinear)
    assert model.fc.bias is bias and not held.weight.requires_grad and not held.factor_v.requires_grad
    assert model.conv.weight.requires_grad
    model(torch.zeros(1, 3, 9, 9))
    assert seen == [1]
    merge_and_unload(model)
    assert held is model.fc and type(held) is nn.Linear and not held.weight.requires_grad


def test_config_shared_with_a_dense_twin_is_not_written_to() -> None:
    config = BY_NAME["gpt2"].config()
    model, twin = (type(gpt2())(config) for _ in range(2))
    get_efx_model(model, LowRankConfig(rank=2))
    assert efx_record(twin) is None and model.config is not config
    assert model.transformer.config is model.config  # one config for all parts, as before
    assert model.transformer.h[0].attn.config is model.config


def test_record_restores_a_new_model_from_its_own_weights() -> None:
    model = get_efx_model(gpt2(), LowRankConfig(rank=2))
    fresh = gpt2()
    fresh.config = copy.deepcopy(model.config)
    assert get_efx_model(fresh) is fresh
    for key, value in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value), key


def test_restoring_what_is_there_changes_nothing() -> None:
    model = get_efx_model(gpt2(), LowRankConfig(rank=2))
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.add_(1.0)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert efx_record(get_efx_model(model)) == efx_record(model)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_record_of_another_architecture_is_refused() -> None:
    model = BY_NAME["llama"].build()
    model.config.efx = efx_record(get_efx_model(gpt2(), LowRankConfig(rank=2)))
    with pytest.raises(ValueError, match=r"names the module 'transformer.h.0.attn.c_attn', which LlamaForCausalLM"):
        get_efx_model(model)


def test_all_or_nothing_is_merged() -> None:
    mlp = LowRankConfig(rank=2, target_modules=["mlp.c_fc"], factor_activation="silu")
    model = get_efx_model(gpt2(), [mlp, LowRankConfig(rank=2, target_modules=["c_attn"])])
    record, types = copy.deepcopy(efx_record(model)), [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=r"factor_activation='silu' stands between the factors.*Keep"):
        merge_and_unload(model)
    assert efx_record(model) == record and [type(m) for m in model.modules()] == types


def test_merge_and_unload_without_methods_do_nothing() -> None:
    model = gpt2()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert merge_and_unload(unload(model)) is model
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_merge_under_a_peft_adapter_is_refused() -> None:
    model = get_efx_model(gpt2(), LowRankConfig(rank=2))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["c_fc"]))
    with pytest.raises(ValueError, match="already carries a peft adapter"):
        merge_and_unload(model)
    assert efx_record(merge_and_unload(adapted.unload())) is None

"""prune: which weights go, by hand and against torch's own pruning, what is refused, and zeros that stay."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from matrix import ARCHITECTURES, perturb
from torch import nn
from torch.nn.utils import prune as torch_prune
from transformers import MixtralConfig, MixtralForCausalLM

from hf_efx import Block, LowRankConfig, TargetedDropoutConfig, default_targets, get_efx_model, pruning_curve
from hf_efx.core.model.pruned import is_held
from hf_efx.core.model.record import efx_record
from hf_efx.targeted_dropout.pruning import prune

BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}
LORA = peft.LoraConfig(target_modules=["c_fc"], fan_in_fan_out=True)
BLOCKS = (Block("mlp", ("0",), ("2",)), Block("mlp", ("2",), ("4",)))


def gpt2() -> Any:
    return perturb(BY_NAME["gpt2"].build())


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))


def targeted(model: Any, *configs: dict[str, Any]) -> Any:
    return get_efx_model(model, [TargetedDropoutConfig(**fields) for fields in configs])


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


# --- which weights


def test_the_smallest_of_each_column_go_by_hand() -> None:
    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2))
    first: Any = model[0]
    first.weight.data = torch.tensor([[0.1, -0.4, 0.2, 0.3], [-4.0, 1.0, 1.0, -1.0]])
    report = prune(model, 0.5)
    assert first.weight.tolist() == [[0.0, pytest.approx(-0.4), 0.0, pytest.approx(0.3)], [-4.0, 0.0, 0.0, -1.0]]
    assert [(row.name, row.kept, row.total) for row in report.layers] == [("0", 4, 8)]
    assert report.sparsity == 0.5 and report.parameters == 16 and "50.0% of the weights pruned" in str(report)
    json.dumps(report.to_dict())


def test_a_column_is_an_output_unit_in_conv1d_too() -> None:
    model = gpt2()
    prune(model, 0.75)
    weight = model.transformer.h[0].mlp.c_fc.weight  # [in 32, out 128]
    assert (weight.count_nonzero(0) == 8).all() and not (weight.count_nonzero(1) == 32).all()


def test_layer_and_global_scope_give_torch_s_masks() -> None:
    for scope in ("layer", "global"):
        ours, theirs = mlp(), mlp()
        layers: Any = [theirs[0], theirs[2]]
        prune(ours, 0.3, scope=scope)
        if scope == "layer":
            for layer in layers:
                torch_prune.l1_unstructured(layer, "weight", int(0.3 * layer.weight.numel()))
        else:
            torch_prune.global_unstructured(
                [(layer, "weight") for layer in layers], torch_prune.L1Unstructured, amount=int(0.3 * 128)
            )
        for i in (0, 2):
            assert torch.equal(ours[i].weight, theirs[i].weight), (scope, i)  # pyright: ignore


def test_units_are_torch_s_structured_columns_and_what_hangs_on_them() -> None:
    model, theirs = mlp(), mlp()
    torch_prune.ln_structured(theirs[0], "weight", 4, n=2, dim=0)
    gone = theirs[0].weight.count_nonzero(1) == 0  # pyright: ignore
    prune(model, 0.5, "unit", blocks=BLOCKS[:1])
    fc1, fc2 = model[0], model[2]
    assert gone.sum() == 4 and torch.equal(fc1.weight, theirs[0].weight)  # pyright: ignore
    assert torch.equal(fc1.bias == 0, gone)  # pyright: ignore
    assert torch.equal((fc2.weight == 0).all(0), gone) and (fc2.bias != 0).all()  # pyright: ignore
    # Without blocks a plain module's units are its own output columns; what reads them isn't known.
    own = mlp()
    assert [row.name for row in prune(own, 0.5, "unit").layers] == ["0", "2"]
    assert torch.equal(own[0].weight, theirs[0].weight) and (own[2].weight == 0).all(1).sum() == 3  # pyright: ignore


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("granularity", ["weight", "unit"])
def test_every_architecture_to_the_count_and_only_once(name: str, granularity: Any) -> None:
    model = perturb(BY_NAME[name].build())
    before = weights(model)
    report = prune(model, 0.5, granularity)
    assert report.layers and abs(report.sparsity - 0.5) <= 1 / min(row.total for row in report.layers)
    if granularity == "weight":
        assert [row.name for row in report.layers] == default_targets(model)
    after = weights(model)
    zero = {key for key, value in after.items() if (value == 0).any() and value.is_floating_point()}
    assert zero and all(torch.equal(after[k], v) for k, v in before.items() if k not in zero)
    assert all(torch.equal(value[value != 0], before[key][value != 0]) for key, value in after.items())
    again = prune(model, 0.5, granularity)
    assert again == report and all(torch.equal(after[key], value) for key, value in model.state_dict().items())


def test_units_of_a_resnet_leave_no_trace_of_their_channels() -> None:
    model = perturb(BY_NAME["resnet"].build())
    prune(model, 0.5, "unit")
    x = BY_NAME["resnet"].batch()["pixel_values"]
    seen: list[torch.Tensor] = []
    layer = model.resnet.encoder.stages[1].layers[1].layer
    layer[1].convolution.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(x)
    gone = (layer[0].convolution.weight == 0).flatten(1).all(1)
    assert gone.sum() == 8 and (seen[0][:, gone] == 0).all() and (seen[0][:, ~gone] != 0).any()


def test_ties_are_cut_exactly() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)).bfloat16()
    nn.init.constant_(model[0].weight, 0.5)  # pyright: ignore
    prune(model, 0.4)
    assert (model[0].weight == 0).sum(1).tolist() == [3, 3, 3, 3]  # pyright: ignore


def test_targets_are_chosen_and_heads_left_alone() -> None:
    model = gpt2()
    report = prune(model, 0.5, target_modules=["c_fc"], exclude_modules=["h.0.mlp.c_fc"])
    assert [row.name for row in report.layers] == ["transformer.h.1.mlp.c_fc"]
    report = prune(model, 0.5, "unit", target_modules=["c_fc"])
    assert [row.name for row in report.layers] == [f"transformer.h.{i}.mlp.c_fc" for i in (0, 1)]
    assert (model.transformer.wte.weight != 0).all()


# --- as it was trained


def test_granularity_scope_and_modules_are_those_that_were_trained() -> None:
    cases: list[dict[str, Any]] = [
        {"granularity": "unit", "scope": "global"},
        {"scope": "layer", "layers_to_transform": [1]},
    ]
    for fields in cases:
        model, dense = targeted(gpt2(), fields), gpt2()
        report = prune(model, 0.5)
        assert (report.granularity, report.scope) == (fields.get("granularity", "weight"), fields["scope"])
        # A baseline is pruned alike by the config, to the same curve.
        config = TargetedDropoutConfig(**fields)
        assert prune(dense, 0.5, config=config) == report
        assert all(torch.equal(value, dense.state_dict()[name]) for name, value in model.state_dict().items())
        asked: list[tuple[Any, dict[str, Any]]] = [(model, {}), (dense, {"config": config})]
        for one, options in asked:
            settings = pruning_curve(one, lambda model: 1.0, [0.5], **options).settings
            assert settings == {"granularity": report.granularity, "scope": report.scope}
        layers = {row.name.split(".")[2] for row in report.layers}
        assert layers == ({"1"} if "layers_to_transform" in fields else {"0", "1"})


def test_each_of_several_configs_by_its_own_criterion() -> None:
    ffn = {"granularity": "unit", "target_modules": ["c_fc"], "targeting": 0.5}
    model = targeted(gpt2(), ffn, {"target_modules": ["c_attn"], "scope": "layer", "targeting": 0.25})
    report = prune(model, 0.5)
    assert [(row.name.partition(".h.")[2], row.granularity, row.kept / row.total) for row in report.layers] == [
        *((f"{i}.mlp.c_fc", "unit", 0.5) for i in (0, 1)),
        *((f"{i}.attn.c_attn", "weight", 0.5) for i in (0, 1)),
    ]
    assert (report.granularity, report.scope) == ("unit, weight", "column, layer")
    assert "units and weights" in str(report)
    state = model.state_dict()
    names = [f"transformer.h.{i}.{part}.weight" for i in (0, 1) for part in ("mlp.c_fc", "mlp.c_proj", "attn.c_attn")]
    assert {key for key, value in state.items() if key.endswith("weight") and (value == 0).any()} == set(names)
    assert (state[names[0]] == 0).all(0).sum() == 64  # whole units there, no whole column here
    assert not (state[names[2]] == 0).all(0).any()
    # One granularity for all, by the modules of each; and what can't be told.
    report = prune(targeted(gpt2(), ffn), 0.5, "weight")
    assert [row.name for row in report.layers] == [f"transformer.h.{i}.mlp.c_fc" for i in (0, 1)]
    with pytest.raises(ValueError, match="granularity=None: config.efx says that weights were trained, and units"):
        prune(model, 0.5, target_modules=["c_proj"])
    assert prune(model, 0.5, "weight", target_modules=["attn.c_proj"]).scope == "layer"


def test_a_trained_module_that_cannot_be_pruned_is_named(tmp_path: Path) -> None:
    model = targeted(gpt2(), {"target_modules": ["c_fc"]})
    torch_prune.identity(model.transformer.h[1].mlp.c_fc, "weight")
    with pytest.raises(ValueError, match=r"h.1.mlp.c_fc', on which it was trained, can't be pruned, since its weight"):
        prune(model, 0.5)


# --- wrappers and what can't be reached


class Classifier(nn.Module):
    """A module of one's own around a body, whose config it has."""

    def __init__(self) -> None:
        super().__init__()
        self.body = BY_NAME["bert"].build()
        self.config, self.head = self.body.config, nn.Linear(5, 3)


def test_what_wraps_a_model_leaves_no_trace_in_names(tmp_path: Path) -> None:
    plain = gpt2()
    prune(plain, 0.5)
    wrapped = {
        "compiled": (torch.compile(gpt2(), backend="eager"), lambda m: m._orig_mod),
        "parallel": (nn.DataParallel(gpt2()), lambda m: m.module),
    }
    for name, (model, inner) in wrapped.items():
        prune(model, 0.5)  # pyright: ignore[reportArgumentType]
        assert inner(model).config.efx == plain.config.efx, name
        assert all(torch.equal(v, plain.state_dict()[k]) for k, v in inner(model).state_dict().items()), name
    own = Classifier()
    prune(own, 0.5)
    own.body.save_pretrained(tmp_path)
    back = get_efx_model(BY_NAME["bert"].auto.from_pretrained(tmp_path))
    held = [name for name, module in back.named_modules() if is_held(module)]
    assert set(held) == set(back.config.efx["pruned"]) == set(default_targets(back)) and (own.head.weight != 0).all()
    curve = pruning_curve(own, lambda model: float((model.body.classifier.weight == 0).sum()), [0.5])
    assert curve.values == (0.0,)


def test_experts_that_pruning_cannot_reach_are_said(caplog: pytest.LogCaptureFixture) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    mixture = MixtralForCausalLM(MixtralConfig(vocab_size=32, num_hidden_layers=1, num_local_experts=4, **sizes))
    share = sum(p.numel() for n, p in mixture.named_parameters() if "experts" in n) / mixture.num_parameters()
    for act in (lambda: prune(mixture, 0.5), lambda: targeted(mixture, {})):
        with caplog.at_level("WARNING", "hf_efx"):
            caplog.clear()
            act()
        assert f"MixtralForCausalLM holds {share:.0%} of its weights in three-dimensional" in caplog.text


# --- what is refused, the model unharmed


def uneven() -> nn.Module:
    model = mlp()
    with torch.no_grad():
        model[2].weight.mul_(1e-3)  # pyright: ignore
    return model


def with_nan() -> nn.Module:
    model = mlp()
    model[2].weight.data[0, 0] = float("nan")  # pyright: ignore
    return model


def quantised() -> Any:
    model = gpt2()
    config = type("FakeQuantisation", (), {"quant_method": "bitsandbytes"})
    model.hf_quantizer = type("FakeQuantizer", (), {"quantization_config": config})()
    return model


REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "all": (mlp, {"fraction": 1.0}, r"fraction=1.0: expected a share from 0 to below 1"),
    "negative": (mlp, {"fraction": -0.1}, r"fraction=-0.1: expected"),
    "nothing": (mlp, {"fraction": 0.05}, r"fraction=0.05 with scope='column' prunes nothing.*Raise"),
    "granularity": (mlp, {"granularity": "row"}, r"granularity='row': expected one of weight, unit"),
    "scope": (mlp, {"scope": "model"}, r"scope='model': expected one of column, layer, global"),
    "scope of units": (mlp, {"scope": "model", "granularity": "unit"}, r"scope='model'"),
    "layer emptied": (uneven, {"scope": "global", "fraction": 0.6}, r"would empty '2'.*48 weights.*scope='layer'"),
    "NaN": (with_nan, {}, r"2.weight.*NaN"),
    "NaN units": (with_nan, {"granularity": "unit"}, r"2.*NaN"),
    "NaN globally": (with_nan, {"scope": "global"}, r"2.weight.*NaN"),
    "no module": (gpt2, {"target_modules": ["q_proj"]}, r"target_modules=\['q_proj'\].*matches no module"),
    "no unit": (
        gpt2,
        {"target_modules": ["q_proj"], "granularity": "unit"},
        r"target_modules=\['q_proj'\].*no units of GPT2LMHeadModel.*attn.c_attn",
    ),
    "tied": (gpt2, {"target_modules": ["lm_head"]}, r"'lm_head'.*tied \(lm_head.weight, transformer.wte"),
    "quantised": (quantised, {}, r"quantised \(bitsandbytes\).*quantise at the end"),
    "lora": (
        lambda: peft.get_peft_model(gpt2(), LORA),
        {},
        r"carries a peft adapter.*merge it first",
    ),
    "lora, compiled": (
        lambda: torch.compile(peft.get_peft_model(gpt2(), LORA), backend="eager"),
        {},
        r"carries a peft adapter",
    ),
    "factorised": (
        lambda: get_efx_model(gpt2(), LowRankConfig(rank=2, target_modules=["c_fc"])),
        {"target_modules": ["c_fc"]},
        r"c_fc' can't be changed, since it is already factorised",
    ),
    "factorised units": (
        lambda: get_efx_model(gpt2(), LowRankConfig(rank=2)),
        {"granularity": "unit"},
        r"isn't one plain matrix.*merge_and_unload",
    ),
    "blocks of weights": (mlp, {"blocks": BLOCKS}, r"blocks describe units: set granularity='unit'"),
    "block that isn't there": (
        mlp,
        {"blocks": [Block("mlp", ("up",), ("down",))], "granularity": "unit"},
        r"blocks has .*no module of Sequential",
    ),
    "config and more": (
        mlp,
        {"config": TargetedDropoutConfig(), "scope": "layer"},
        r"scope='layer' stands beside config, which says that itself",
    ),
    "meta": (lambda: mlp().to("meta"), {}, r"'0.weight' is sharded or on the meta device"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_and_the_model_unharmed(case: str) -> None:
    make, options, words = REFUSED[case]
    model = make()
    state, record = weights(model), copy.deepcopy(efx_record(model))
    with pytest.raises(ValueError, match=f"(?s){words}"):
        prune(model, **{"fraction": 0.5, **options})
    assert efx_record(model) == record and not any(map(is_held, model.modules()))
    for name, value in model.state_dict().items():
        assert value.is_meta or torch.equal(value.nan_to_num(7.0), state[name].nan_to_num(7.0)), name

"""SliceOut on whole models. What holds for every method stands in tests/test_matrix.py."""

import copy
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from matrix import ARCHITECTURES, Architecture, perturb
from torch import nn

from hf_efx import Block, SliceOutConfig, get_efx_model, merge_and_unload, step_context, unload
from hf_efx.core.model.adapter import efx_record
from hf_efx.slice_out.layers import SlicedMember
from slice_out.architectures import BY_NAME, MORE, masked, sliced_sides

ALL = (*ARCHITECTURES, *MORE)


def config(**fields: Any) -> SliceOutConfig:
    return SliceOutConfig(**{"rate": 0.5, "align": 2, **fields})


def pair(architecture: Architecture, **fields: Any) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """A sliced model and a dense one with the same weights, in float64 and training mode, and a batch."""
    sliced = get_efx_model(perturb(architecture.build()).double(), config(**fields)).train()
    dense = perturb(architecture.build()).double().train()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in architecture.batch().items()}
    return sliced, dense, batch


def assert_equals_masked(sliced: Any, dense: Any, batch: dict[str, torch.Tensor], tolerance: float) -> None:
    """The same logits, loss and gradients, and exact zeros outside the slices."""
    results, expected = sliced(**batch), dense(**batch)
    assert (results.logits - expected.logits).abs().max() < tolerance * expected.logits.abs().max()
    results.loss.backward()
    expected.loss.backward()
    for (name, p), (_, q) in zip(sliced.named_parameters(), dense.named_parameters(), strict=True):
        if q.grad is None:
            assert p.grad is None, name
            continue
        assert (p.grad - q.grad).abs().max() <= tolerance * q.grad.abs().max() + 1e-14, name
    zeros = 0
    for parameter, dim, inside in sliced_sides(sliced):
        if parameter.grad is not None:
            outside = parameter.grad.movedim(dim, 0)[~inside]
            assert not outside.any()
            zeros += outside.numel()
    assert zeros > 100


@pytest.mark.parametrize("architecture", ALL, ids=lambda a: a.name)
def test_sliced_model_equals_the_masked_dense_one(architecture: Architecture) -> None:
    sliced, dense, batch = pair(architecture)
    context: Any = step_context(sliced)
    for step in (3, 4):
        context.begin_step(step)
        sliced.zero_grad()
        dense.zero_grad()
        assert_equals_masked(sliced, masked(copy.deepcopy(dense), sliced), batch, 1e-10)
        context.end_step()


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "circular": ("gpt2", {"starts": "circular", "align": 2}),
    "all starts": ("gpt2", {"starts": "all"}),
    "probabilistic": ("gpt2", {"starts": "all", "normalization": "probabilistic"}),
    "circular convolutions": ("resnet", {"starts": "circular", "rate": 0.25}),
    "features of heads, fused": ("gpt2", {"attention": "head_dim"}),
    "features of heads": ("bert", {"attention": "head_dim"}),
    "features of heads, ViT": ("vit", {"attention": "head_dim", "starts": "circular"}),
    "features of heads, T5": ("t5", {"attention": "head_dim", "layers_to_transform": [0]}),
    "mlp alone": ("llama", {"targets": ["mlp"]}),
    "attention alone": ("llama", {"targets": ["attention"]}),
    "rates by kind and layer": ("gpt2", {"rate": {"mlp": 0.25, "attention": 0.5}, "rate_pattern": {"h.1.*": 0.75}}),
}


@pytest.mark.parametrize("case", VARIANTS)
def test_variants_equal_the_masked_dense_model(case: str) -> None:
    name, fields = VARIANTS[case]
    sliced, dense, batch = pair(BY_NAME[name], **fields)
    context: Any = step_context(sliced)
    context.begin_step(1)
    tolerance = 1e-6 if "normalization" in fields else 1e-10  # its scales are float32
    assert_equals_masked(sliced, masked(dense, sliced), batch, tolerance)


def test_cross_attention_of_gpt2() -> None:
    def build() -> Any:
        return BY_NAME["gpt2"].build_with(add_cross_attention=True)

    sliced, dense = (perturb(build()).double().train() for _ in range(2))
    get_efx_model(sliced, config())
    batch = BY_NAME["gpt2"].batch() | {"encoder_hidden_states": torch.randn(2, 5, 32, dtype=torch.float64)}
    context: Any = step_context(sliced)
    context.begin_step(1)
    assert_equals_masked(sliced, masked(dense, sliced), batch, 1e-10)
    modules = efx_record(sliced)["methods"][0]["modules"]  # pyright: ignore
    assert modules["transformer.h.0.crossattention.c_attn"]["emits"]["blocks"] == 2


@pytest.mark.parametrize("architecture", ALL, ids=lambda a: a.name)
def test_outside_training_steps_it_is_the_dense_model_bit_for_bit(architecture: Architecture) -> None:
    dense, model, batch = architecture.build(), architecture.build(), architecture.batch()
    keys, parameters = list(dense.state_dict()), [id(p) for p in model.parameters()]
    get_efx_model(model, config())
    assert list(model.state_dict()) == keys and [id(p) for p in model.parameters()] == parameters
    context: Any = step_context(model)
    context.begin_step(0)
    assert torch.equal(model(**batch).logits, dense(**batch).logits)  # evaluation inside a step
    model.train()
    sliced = model(**batch).logits
    context.end_step()
    dense.train()
    if "resnet" in architecture.name:  # the statistics of both batches moved
        dense = copy.deepcopy(model)
        unload(dense)
    else:
        assert not torch.equal(sliced, dense(**batch).logits)
    assert torch.equal(model(**batch).logits, dense(**batch).logits)  # training mode between steps


@pytest.mark.parametrize("architecture", ALL, ids=lambda a: a.name)
def test_unload_leaves_no_trace(architecture: Architecture) -> None:
    dense, model = architecture.build(), architecture.build()
    before = {name: dict(vars(module)) for name, module in dense.named_modules()}
    unload(get_efx_model(model, config()))
    assert efx_record(model) is None and step_context(model) is None
    for name, module in model.named_modules():
        assert type(module) is type(dense.get_submodule(name)), name
        assert vars(module).keys() == before[name].keys(), name
        assert not module._forward_pre_hooks and not module._forward_hooks


def test_copies_and_pickles_go_on_alike() -> None:
    for name in ("gpt2", "t5"):  # with attributes that follow
        model = get_efx_model(BY_NAME[name].build(), config()).train()
        batch = BY_NAME[name].batch()
        results = []
        for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            context: Any = step_context(each)
            context.begin_step(2)
            results.append(each(**batch).logits)
            context.end_step()
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
        assert step_context(model) is not step_context(copy.deepcopy(model))


def test_resized_embeddings_keep_the_slices() -> None:
    model: Any = get_efx_model(BY_NAME["gpt2"].build(), config()).train()  # its head is tied to the embeddings
    model.resize_token_embeddings(model.config.vocab_size + 8, mean_resizing=False)
    context: Any = step_context(model)
    context.begin_step(0)
    model(**BY_NAME["gpt2"].batch()).loss.backward()
    assert float((model.transformer.h[1].mlp.c_fc.bias.grad == 0).float().mean()) == 0.5
    assert model.lm_head.weight is model.transformer.wte.weight and model.lm_head.out_features % 2 == 0


# --- the model's own dropouts


def dropped_gpt2() -> Any:
    return BY_NAME["gpt2"].build_with(resid_pdrop=0.1, attn_pdrop=0.2, embd_pdrop=0.3)


def probabilities(model: nn.Module) -> list[float]:
    return [m.p for m in model.modules() if isinstance(m, nn.Dropout)]


def test_own_dropouts_are_off_while_it_is_on_and_saved_as_they_were(tmp_path: Path) -> None:
    model = dropped_gpt2()
    before = probabilities(model)
    assert sorted(set(before)) == [0.1, 0.2, 0.3]
    get_efx_model(model, config())
    assert sorted(set(probabilities(model))) == [0.0, 0.3]  # the embeddings' is on no block
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["resid_pdrop"], saved["attn_pdrop"], saved["embd_pdrop"]) == (0.1, 0.2, 0.3)
    loaded = type(model).from_pretrained(tmp_path)
    assert probabilities(loaded) == before
    assert probabilities(get_efx_model(loaded)) == probabilities(model)
    assert probabilities(unload(model)) == before
    assert probabilities(merge_and_unload(loaded)) == before


def test_functional_dropouts_are_off_too() -> None:
    marian = next(a for a in MORE if a.name == "marian")
    model = marian.build_with(dropout=0.1, attention_dropout=0.2, activation_dropout=0.3)
    layer = model.model.decoder.layers[0]
    get_efx_model(model, config())
    assert (layer.dropout, layer.activation_dropout, layer.self_attn.dropout) == (0.0, 0.0, 0.0)
    assert layer.encoder_attn.dropout == 0.0 and model.model.decoder.dropout == 0.1
    unload(model)
    assert (layer.dropout, layer.activation_dropout, layer.self_attn.dropout) == (0.1, 0.3, 0.2)


def test_dropout_that_a_dense_block_shares_stays(caplog: pytest.LogCaptureFixture) -> None:
    model = BY_NAME["vit"].build_with(hidden_dropout_prob=0.1)
    with caplog.at_level(logging.WARNING, "hf_efx"):
        get_efx_model(model, config(targets=["mlp"]))
    assert model.vit.layers[0].dropout.p == 0.1 and "vit.layers.0.dropout.p" in caplog.text
    get_efx_model(unload(model), config())
    assert model.vit.layers[0].dropout.p == 0.0


# --- loading


def test_loading_does_not_revive_it_and_get_efx_model_does(tmp_path: Path) -> None:
    architecture = BY_NAME["gpt2"]
    model = get_efx_model(architecture.build(), config())
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in saved
    assert saved["efx"]["methods"][0]["config"] == json.loads(json.dumps(config().method_fields()))
    loaded = architecture.auto.from_pretrained(tmp_path)
    assert step_context(loaded) is None and not any(isinstance(m, SlicedMember) for m in loaded.modules())
    get_efx_model(loaded)
    results = []
    for each in (model, loaded, get_efx_model(loaded)):  # twice is as once
        context: Any = step_context(each)
        context.begin_step(7)
        results.append(each.train()(**architecture.batch()).logits)
        context.end_step()
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_with_low_rank_each_on_its_modules(tmp_path: Path) -> None:
    import hf_efx

    architecture = BY_NAME["gpt2"]
    both = [hf_efx.LowRankConfig(rank=4, target_modules=["c_attn"]), config(targets=["mlp"])]
    model = get_efx_model(architecture.build(), both)
    model.save_pretrained(tmp_path)
    loaded = architecture.auto.from_pretrained(tmp_path)
    assert step_context(loaded) is None and loaded.transformer.h[0].attn.c_attn.rank == 4
    assert torch.equal(loaded(**architecture.batch()).logits, model(**architecture.batch()).logits)
    get_efx_model(loaded)
    context: Any = step_context(loaded)
    context.begin_step(0)
    loaded.train()(**architecture.batch()).loss.backward()
    assert (loaded.transformer.h[0].mlp.c_fc.bias.grad == 0).float().mean() == 0.5
    unload(loaded)
    assert [entry["method"] for entry in efx_record(loaded)["methods"]] == ["low_rank"]


@pytest.mark.parametrize("architecture", MORE, ids=lambda a: a.name)
def test_checkpoints_are_dense_ones(architecture: Architecture, tmp_path: Path) -> None:
    """What tests/test_matrix.py sees of the others in a process without hf_efx: nothing in the files asks for it."""
    model = get_efx_model(architecture.build(), config())
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in saved and saved["efx"]["methods"][0]["method"] == "slice_out"
    loaded, info = architecture.auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert not any(isinstance(m, SlicedMember) for m in loaded.modules())
    assert torch.equal(loaded(**architecture.batch()).logits, model.eval()(**architecture.batch()).logits)


# --- adapters and networks of one's own


def test_lora_on_sliced_layers_trains_like_the_masked_model() -> None:
    architecture = BY_NAME["llama"]
    targets = ["q_proj", "o_proj", "gate_proj", "down_proj"]
    lora = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    sliced, dense, batch = pair(architecture)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(sliced, lora)
    torch.manual_seed(0)
    plain = peft.get_peft_model(dense, lora)
    context: Any = step_context(adapted)
    context.begin_step(1)
    masked(plain, sliced, "base_model.model.")
    assert_equals_masked(adapted, plain, batch, 1e-6)  # peft computes its factors in float32
    context.end_step()
    merged: Any = adapted.merge_and_unload()
    unload(merged)
    assert not any(isinstance(m, SlicedMember) for m in merged.modules())


class Net(nn.Module):
    """A network that hf_efx doesn't know, with two named layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(8, 16), "gate": nn.Linear(8, 16), "down": nn.Linear(16, 8)})
            for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer["down"](layer["gate"](x).sigmoid() * layer["up"](x))  # pyright: ignore
        return x


def test_blocks_of_a_network_of_ones_own() -> None:
    torch.manual_seed(0)
    net = Net()
    dense = copy.deepcopy(net)
    get_efx_model(net, config(rate=0.75, blocks=[Block("mlp", emits=("up", "gate"), reads=("down",))])).train()
    record = efx_record(net)
    assert record is not None and record["methods"][0]["config"]["blocks"] == [
        {"kind": "mlp", "emits": ["up", "gate"], "reads": ["down"]}
    ]
    context: Any = step_context(net)
    context.begin_step(0)
    x = torch.randn(3, 8)
    y = net(x)
    torch.testing.assert_close(y, masked(dense, net)(x), rtol=1e-6, atol=1e-6)
    y.sum().backward()
    for layer in net.layers:
        assert int((layer["up"].bias.grad != 0).sum()) == 4  # pyright: ignore
    again = copy.deepcopy(unload(net))
    assert efx_record(again) is None

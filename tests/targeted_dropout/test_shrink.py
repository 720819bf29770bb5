"""shrink: the same outputs from smaller matrices under an ordinary config, and what is refused."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import ARCHITECTURES, perturb
from slice_out.architectures import MORE
from torch import nn
from transformers import GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from hf_efx import Block, TargetedDropoutConfig, default_targets, get_efx_model
from hf_efx.core.model.record import efx_record
from hf_efx.targeted_dropout.pruning import prune
from hf_efx.targeted_dropout.shrink import shrink

BY_NAME = {architecture.name: architecture for architecture in (*ARCHITECTURES, *MORE)}

# Blocks whose units go, the config's fields, and whether heads go too.
EXPRESSIBLE: dict[str, tuple[list[str], dict[str, int]]] = {
    "gpt2": (["c_fc"], {"n_inner": 64}),
    "bert": (["intermediate.dense"], {"intermediate_size": 24}),
    "vit": (["fc1"], {"intermediate_size": 24}),
    "llama": (["gate_proj"], {"intermediate_size": 24}),
    "qwen2": (["gate_proj"], {"intermediate_size": 24}),
    "t5": (["wi"], {"d_ff": 24}),
    "t5_gated": (["wi_0"], {"d_ff": 24}),
    "marian": (["fc1"], {"encoder_ffn_dim": 24, "decoder_ffn_dim": 20}),
}
HEADS = {
    "llama": (["q_proj"], {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}),
    "qwen2": (["q_proj"], {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}),
    "vit": (["q_proj"], {"num_attention_heads": 2, "head_dim": 8}),
}


def build(name: str) -> Any:
    if name == "t5_gated":
        gated = {"feed_forward_proj": "gated-gelu", "is_gated_act": True, "dense_act_fn": "gelu_new"}
        return perturb(BY_NAME["t5"].build_with(**gated))
    if name == "marian":  # computes its positions anew on loading
        return BY_NAME[name].build()
    return perturb(BY_NAME[name].build())


@torch.no_grad()
def logits(model: Any, name: str) -> torch.Tensor:
    return model.eval()(**BY_NAME[name].batch()).logits


def check(name: str, targets: list[str], fields: dict[str, int], folder: Path) -> None:
    model = build(name)
    prune(model, 0.5, "unit", target_modules=targets)
    expected, dense, keys = logits(model, name), model.num_parameters(), set(model.state_dict())
    nonzero = sum(int(p.count_nonzero()) for p in model.parameters())
    assert shrink(model) is model
    torch.testing.assert_close(logits(model, name), expected, rtol=0, atol=1e-5)
    assert {field: getattr(model.config, field) for field in fields} == fields
    # What is left has no zeros but those that were there before.
    assert model.num_parameters() < dense and sum(int(p.count_nonzero()) for p in model.parameters()) == nonzero
    assert efx_record(model) is None and set(model.state_dict()) == keys
    model.save_pretrained(folder)
    loaded, info = BY_NAME[name].auto.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded) is type(model) and loaded.num_parameters() == model.num_parameters()
    assert torch.equal(logits(loaded, name), logits(model, name))


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_half_of_the_ffn_goes(name: str, tmp_path: Path) -> None:
    check(name, *EXPRESSIBLE[name], tmp_path)


@pytest.mark.parametrize("name", HEADS)
def test_half_of_the_heads_go_where_the_config_can_say_so(name: str, tmp_path: Path) -> None:
    check(name, *HEADS[name], tmp_path)


def test_ffn_and_heads_together(tmp_path: Path) -> None:
    targets, fields = ["gate_proj", "q_proj"], {**EXPRESSIBLE["llama"][1], **HEADS["llama"][1]}
    check("llama", targets, fields, tmp_path)


def test_plain_transformers_loads_what_was_targeted_pruned_and_shrunk(
    tmp_path: Path, run_python: Callable[..., str]
) -> None:
    """One process without hf_efx for all three."""
    targeted = get_efx_model(build("gpt2"), TargetedDropoutConfig(granularity="unit", target_modules=["c_fc"]))
    pruned, small = build("gpt2"), build("gpt2")
    prune(pruned, 0.5)
    prune(small, 0.5, "unit", target_modules=["c_fc"])
    models = {"targeted": targeted, "pruned": pruned, "small": shrink(small)}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    tokens = BY_NAME["gpt2"].batch()["input_ids"]
    torch.save(tokens, tmp_path / "tokens.pt")
    code = """
        import sys, torch
        from transformers import AutoModelForCausalLM
        folder = sys.argv[1]
        for name in sys.argv[2:]:
            model = AutoModelForCausalLM.from_pretrained(f"{folder}/{name}").eval()
            torch.save(model(torch.load(f"{folder}/tokens.pt")).logits, f"{folder}/{name}.pt")
            layer = model.transformer.h[1].mlp.c_fc
            zeros = sum(int((p == 0).sum()) for p in model.parameters())
            print(type(layer).__name__, layer.weight.shape[1], zeros, sorted(getattr(model.config, "efx", {})))
        assert not any(name.split(".")[0] == "hf_efx" for name in sys.modules)
        """
    rows = run_python(code, args=[tmp_path, *models]).splitlines()
    zeros = int(0.5 * sum(pruned.get_submodule(name).weight.numel() for name in default_targets(pruned)))
    assert rows == [
        "Conv1D 128 0 ['format_version', 'methods']",
        f"Conv1D 128 {zeros} ['format_version', 'methods', 'pruned']",
        "Conv1D 64 0 []",
    ]
    for name, model in models.items():
        assert torch.equal(torch.load(tmp_path / f"{name}.pt"), model.eval()(tokens).logits), name


def test_it_generates_and_trains_on() -> None:
    model = build("llama")
    prune(model, 0.5, "unit")
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = model.generate(torch.tensor([[5, 6]]), **options)
    shrink(model)
    assert model.config.num_attention_heads > model.config.num_key_value_heads > 0
    for cache in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(torch.tensor([[5, 6]]), **options, **cache), expected)
    model.train()(**BY_NAME["llama"].batch()).loss.backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


def test_heads_that_the_config_can_t_say_stay_as_zeros(caplog: pytest.LogCaptureFixture) -> None:
    model = build("gpt2")
    prune(model, 0.5, "unit")
    expected = logits(model, "gpt2")
    with caplog.at_level(logging.WARNING):
        shrink(model)
    torch.testing.assert_close(logits(model, "gpt2"), expected, rtol=0, atol=1e-5)
    assert (
        model.config.n_inner == 64 and "c_attn stay, as zeros: GPT2Config has no field for fewer heads" in caplog.text
    )
    assert sorted(efx_record(model)["pruned"]) == [  # pyright: ignore
        f"transformer.h.{i}.attn.{part}" for i in (0, 1) for part in ("c_attn", "c_proj")
    ]


class Net(nn.Module):
    """A chain with two blocks and a batch norm, which may have other widths each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 5, 3)
        self.fc1, self.fc2, self.fc3 = nn.Linear(5, 12), nn.Linear(12, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv2(self.norm(self.conv1(x)).sigmoid()).mean((2, 3))
        return self.fc3(self.fc2(self.fc1(x).sigmoid()).sigmoid())


CHAIN = (
    Block("conv", ("conv1",), ("conv2",), norms=("norm",)),
    Block("mlp", ("fc1",), ("fc2",)),
    Block("mlp", ("fc2",), ("fc3",)),
)


def test_a_plain_chain_in_place_with_a_width_for_each_block() -> None:
    torch.manual_seed(0)
    model = Net().eval()
    held, x = model.fc1, torch.randn(2, 3, 8, 8)
    nn.init.uniform_(model.norm.running_mean), nn.init.uniform_(model.norm.weight)  # pyright: ignore
    prune(model, 0.5, "unit", "global", blocks=CHAIN)
    expected = model(x)
    widths = [int((m.weight != 0).flatten(1).any(1).sum()) for m in (model.conv1, model.fc1, model.fc2)]
    assert shrink(model, blocks=CHAIN) is model and model.fc1 is held
    # Sigmoid isn't 0 at 0: what was emitted is gone all the same, since nothing read it.
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)
    assert [model.conv1.out_channels, model.fc1.out_features, model.fc2.out_features] == widths and sum(widths) == 13
    assert [model.conv2.in_channels, model.fc2.in_features, model.fc3.in_features] == widths
    assert model.norm.num_features == widths[0] == len(model.norm.running_mean)  # pyright: ignore
    assert efx_record(model) is None


class Between(nn.Module):
    """Two blocks of a unit each layer, with something between emitter and reader."""

    def __init__(self, between: nn.Module, width: int = 12) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.between, self.fc2 = nn.Linear(6, width), between, nn.Linear(width, 6)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.fc2(self.between(self.fc1(x))))


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.expand, self.depthwise = nn.Conv2d(4, 12, 1), nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.project = nn.Conv2d(12, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.project(self.depthwise(self.expand(x)))


IMAGE, ROWS = torch.linspace(-1, 1, 4 * 25).view(1, 4, 5, 5), torch.linspace(-1, 1, 18).view(3, 6)
FC = [Block("mlp", ["fc1"], ["fc2"])]
BETWEEN: dict[str, tuple[Callable[[], nn.Module], list[Block], Any, str]] = {
    "depthwise": (Depthwise, [Block("conv", ["expand"], ["project"])], IMAGE, "doesn't run.*RuntimeError"),
    "slopes": (lambda: Between(nn.PReLU(12)), FC, ROWS, "doesn't run.*RuntimeError"),
    "norm": (lambda: Between(nn.LayerNorm(12)), FC, (ROWS,), "doesn't run"),
    "softmax": (lambda: Between(nn.Softmax(-1)), FC, {"x": ROWS}, "gives other outputs"),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_what_stands_between_is_found_before_the_model_is_touched(name: str) -> None:
    make, blocks, inputs, words = BETWEEN[name]
    model = nn.Sequential(make())
    prune(model, 0.5, "unit", blocks=blocks)
    before, record = copy.deepcopy(model.state_dict()), copy.deepcopy(efx_record(model))
    if name != "softmax":  # which nothing but a trial shows
        with pytest.raises(ValueError, match=r"shrink: 0.* holds 12 numbers, as many as there are units.*inputs="):
            shrink(model, blocks=blocks)
    with pytest.raises(ValueError, match=f"(?s)^shrink: without its pruned units.*{words}"):
        shrink(model, blocks=blocks, inputs=inputs if not isinstance(inputs, dict) else (inputs["x"],))
    assert efx_record(model) == record
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_trial_clears_what_only_looked_suspicious() -> None:
    model = Between(nn.ReLU(), width=6)  # as many units as features, which the norm goes by
    prune(model, 0.5, "unit", blocks=FC)
    expected = model(ROWS)
    with pytest.raises(ValueError, match=r"norm \(LayerNorm\) beside 'fc1' holds 6 numbers"):
        shrink(model, blocks=FC)
    state = torch.get_rng_state()
    shrink(model, blocks=FC, inputs={"x": ROWS})
    assert model.fc1.out_features == 3 and torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(model(ROWS), expected, rtol=0, atol=1e-5)


def test_what_wraps_a_model_is_left_around_it() -> None:
    compiled, parallel = torch.compile(build("gpt2"), backend="eager"), nn.DataParallel(build("gpt2"))
    for model, inner in ((compiled, "_orig_mod"), (parallel, "module")):
        prune(model, 0.5, "unit", target_modules=["c_fc"])  # pyright: ignore[reportArgumentType]
        assert shrink(model) is model  # pyright: ignore[reportArgumentType]
        assert getattr(model, inner).config.n_inner == 64 and efx_record(getattr(model, inner)) is None


def mistral(blocks: Any = None) -> Any:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    model = MistralForCausalLM(MistralConfig(vocab_size=64, num_hidden_layers=1, **sizes))
    prune(model, 0.5, "unit", blocks=blocks)
    return model


class Scaled(GPT2LMHeadModel):
    """A GPT-2 with a number for each unit that its config doesn't say."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for block in self.transformer.h:
            block.mlp.act = nn.PReLU(128)  # pyright: ignore


def unequal() -> Any:
    model = build("gpt2")
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.mul_(0.95)
    prune(model, 0.5, "unit", "global", target_modules=["c_fc"])
    return model


def pruned(model: Any, *arguments: Any, **options: Any) -> Any:
    prune(model, *arguments, **options)
    return model


def of(name: str, *arguments: Any, **options: Any) -> Callable[[], Any]:
    return lambda: pruned(build(name), *arguments, **options)


def odd_heads() -> Any:
    """Three of four heads, which don't divide the hidden size as Llama's config asks."""
    torch.manual_seed(0)
    model = BY_NAME["llama"].build_with(num_key_value_heads=4)
    prune(model, 0.25, "unit", target_modules=["q_proj"])
    return model


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "nothing pruned": (lambda: build("gpt2"), r"has no units that could go.*granularity='unit'"),
    "weights pruned": (of("gpt2", 0.5), r"has no units that could go"),
    "plain without blocks": (Net, r"Net has no units that could go.*blocks=\[Block"),
    "unequal counts": (
        unequal,
        r"h.0.mlp.c_fc' keeps \d+ units and .*h.1.mlp.c_fc' \d+.*'n_inner' once.*scope='layer'",
    ),
    "one layer alone": (
        of("bert", 0.5, "unit", target_modules=["layer.0.intermediate.dense"]),
        r"layer.0.* keeps 24 units and .*layer.1.*' 48.*'intermediate_size' once",
    ),
    "GPT-2's heads": (
        of("gpt2", 0.5, "unit", target_modules=["c_attn"]),
        r"c_attn' can't go, since GPT2Config has no field for fewer heads of the same width",
    ),
    "T5's heads": (
        of("t5", 0.5, "unit", target_modules=["SelfAttention.q"]),
        r"T5Config has no field for fewer heads",
    ),
    "a ResNet's channels": (of("resnet", 0.5, "unit"), r"ResNetConfig has no field for this width"),
    "a type that isn't known": (mistral, r"doesn't know which fields of MistralConfig.*gpt2, bert"),
    "known blocks of a type that isn't": (
        lambda: mistral([Block("mlp", ["gate_proj", "up_proj"], ["down_proj"])]),
        r"doesn't know which fields of MistralConfig",
    ),
    "a class with more than its config says": (
        lambda: pruned(Scaled(BY_NAME["gpt2"].config()), 0.5, "unit", target_modules=["c_fc"]),
        r"act \(PReLU\) beside 'transformer.h.0.mlp.c_fc' holds 128 numbers",
    ),
    "a count that the config refuses": (odd_heads, r"LlamaConfig refuses \{'num_attention_heads': 3"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_t_be_shrunk_is_refused_and_the_model_unharmed(case: str) -> None:
    make, words = REFUSED[case]
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config, targets = copy.deepcopy(getattr(model, "config", None)), default_targets(model)
    with pytest.raises(ValueError, match=f"(?s)^shrink: .*{words}"):
        shrink(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert default_targets(model) == targets
    assert config is None or model.config.to_dict() == config.to_dict()

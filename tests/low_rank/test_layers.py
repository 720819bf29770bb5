import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from hf_efx.core.model.weight_view import WeightView
from hf_efx.low_rank.initialisation import spectral_factors
from hf_efx.low_rank.layers import FactorisedConv2d, FactorisedLayer, FactorisedLinear, densify, factorise

IMAGE = (2, 4, 9, 8)

# module, blocks, input shape
CASES: dict[str, tuple[Callable[[], nn.Module], int, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 8), 1, (3, 5, 6)),
    "linear without bias": (lambda: nn.Linear(8, 6, bias=False), 1, (3, 8)),
    "linear on a vector": (lambda: nn.Linear(8, 6), 1, (8,)),
    "conv1d": (lambda: Conv1D(8, 6), 1, (3, 5, 6)),
    "fused qkv": (lambda: Conv1D(24, 8), 3, (2, 5, 8)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3), 1, IMAGE),
    "conv2d 1x1": (lambda: nn.Conv2d(4, 6, 1, bias=False), 1, IMAGE),
    "conv2d strided, padded, dilated": (lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 2), (1, 2)), 1, IMAGE),
    "conv2d same": (lambda: nn.Conv2d(4, 6, 3, padding="same"), 1, IMAGE),
    "conv2d reflected": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), 1, IMAGE),
    "conv2d without a batch": (lambda: nn.Conv2d(4, 6, 3), 1, IMAGE[1:]),
}


def make(case: str, dtype: torch.dtype = torch.float64) -> tuple[Any, int, torch.Tensor]:
    build, blocks, shape = CASES[case]
    torch.manual_seed(0)
    module = build().to(dtype)
    if module.bias is not None:
        nn.init.normal_(module.bias)  # pyright: ignore  (Conv1D starts it at zero)
    return module, blocks, torch.randn(shape, dtype=dtype)


def factorised(module: Any, blocks: int, rank: int, activation: str | None = None) -> Any:
    factors = [spectral_factors(matrix, rank) for matrix in WeightView(module, blocks).block_matrices()]
    factorise(module, rank, blocks, factors, activation)
    return module


def full_rank(module: Any, blocks: int) -> int:
    view = WeightView(module, blocks)
    return min(view.block_dim, view.in_dim)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_full_rank_equals_dense(case: str, dtype: torch.dtype, bar: float) -> None:
    module, blocks, x = make(case, dtype)
    expected = module(x)
    got = factorised(module, blocks, full_rank(module, blocks))(x)
    assert isinstance(module, FactorisedLayer)
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= bar * expected.abs().max()


@pytest.mark.parametrize("case", CASES)
def test_low_rank_equals_dense_with_the_product_for_its_weight(case: str) -> None:
    module, blocks, x = make(case)
    dense = copy.deepcopy(module)
    factorised(module, blocks, 2)
    cut = torch.cat([u @ v.mT for u, v in module.factor_pairs()]).detach()
    for block in cut.split(cut.shape[0] // blocks):
        assert torch.linalg.matrix_rank(block) == 2
    WeightView(dense).write(cut)
    torch.testing.assert_close(module(x), dense(x), rtol=0, atol=1e-10)
    torch.testing.assert_close(module.product(), cut, rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_gradients_follow_the_chain_rule(case: str) -> None:
    # With G = dL/dW: dL/dU = G V, dL/dVᵀ = Uᵀ G; the gradient of the input is that of the dense layer.
    module, blocks, x = make(case)
    dense = copy.deepcopy(module)
    factorised(module, blocks, 2)
    WeightView(dense).write(module.product())
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    target = torch.randn_like(dense(x))
    for layer, each in zip((module, dense), inputs, strict=True):
        (layer(each) * target).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=0, atol=1e-10)
    if dense.bias is not None:
        torch.testing.assert_close(module.bias.grad, dense.bias.grad, rtol=0, atol=1e-10)
    g = dense.weight.grad.mT if isinstance(dense, Conv1D) else dense.weight.grad.flatten(1)
    parts = zip(g.chunk(blocks), module.factor_pairs(), strict=True)
    expected_u, expected_v = zip(*[(g_b @ v, (g_b.mT @ u).mT) for g_b, (u, v) in parts], strict=True)
    expected = torch.cat(expected_u).view_as(module.weight)
    torch.testing.assert_close(module.weight.grad, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(module.factor_v.grad, torch.cat(expected_v), rtol=0, atol=1e-10)


def test_fused_blocks_have_subspaces_of_their_own() -> None:
    # One block 1000 times as large would take a shared rank for itself; with factors per block each keeps its best.
    module, blocks, x = make("fused qkv")
    with torch.no_grad():
        module.weight[:, :8] *= 1000
    before = [block.clone() for block in WeightView(module, 3).block_matrices()]
    factorised(module, blocks, 4)
    for block, (u, v) in zip(before, module.factor_pairs(), strict=True):
        sigma = torch.linalg.svdvals(block)
        error = (block - u @ v.mT).square().sum()
        torch.testing.assert_close(error, sigma[4:].square().sum(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_densify_is_the_reverse(case: str) -> None:
    module, blocks, x = make(case)
    dense_class, keys = type(module), set(module.state_dict())
    shape, attributes = module.weight.shape, set(vars(module))
    factorised(module, blocks, 2)
    expected = module(x)
    densify(module)
    assert type(module) is dense_class and module.weight.shape == shape
    assert set(module.state_dict()) == keys and set(vars(module)) == attributes
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", ["linear", "fused qkv", "conv2d"])
def test_the_product_is_never_formed(case: str) -> None:
    module, blocks, x = make(case)
    view = WeightView(module, blocks)
    rows = module(x)[:, 0].numel() if case == "conv2d" else x.shape[:-1].numel()
    factorised(module, blocks, 2)
    with FlopCounterMode(display=False) as counter:
        module(x)
    assert counter.get_total_flops() == 2 * rows * blocks * 2 * (view_dim(view) + module.factor_v.shape[1])


def view_dim(view: WeightView) -> int:
    """Rows of one block, from the bias, since the weight is factorised by now."""
    return view.module.bias.numel() // view.blocks  # pyright: ignore


def test_activation_stands_between_the_factors() -> None:
    module, blocks, x = make("fused qkv")
    factorised(module, blocks, 2, "silu")
    u, v = (torch.stack(each) for each in zip(*module.factor_pairs(), strict=True))
    hidden = torch.einsum("bsi,kir->kbsr", x, v)
    expected = torch.einsum("kbsr,kor->bsko", hidden * hidden.sigmoid(), u).flatten(2) + module.bias
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="factor_activation='silu' stands between the factors"):
        densify(module)
    assert isinstance(module, FactorisedLinear)


@pytest.mark.parametrize("case", CASES)
def test_no_factor_has_the_dense_shape(case: str) -> None:
    module, blocks, _ = make(case)
    dense = module.weight.shape
    factorised(module, blocks, full_rank(module, blocks))
    assert module.weight.shape[0] == 1 and module.weight.shape != dense
    assert dict(module.named_parameters()).keys() - {"bias"} == {"weight", "factor_v"}


def test_square_layer_at_full_rank_has_another_shape_too() -> None:
    module = factorised(nn.Linear(8, 8), 1, 8)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        nn.Linear(8, 8).load_state_dict(module.state_dict(), strict=False)


@pytest.mark.parametrize("case", ["linear", "fused qkv", "conv2d"])
def test_copies_and_files_keep_the_layer(case: str) -> None:
    module, blocks, x = make(case)
    factorised(module, blocks, 2)
    expected = module(x)
    assert torch.equal(copy.deepcopy(module)(x), expected)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), expected)


def test_what_peft_and_models_read_is_there() -> None:
    linear = factorised(make("fused qkv")[0], 3, 2)
    assert isinstance(linear, nn.Linear) and not isinstance(linear, Conv1D)
    assert (linear.in_features, linear.out_features) == (8, 24)
    assert linear.weight.dtype == torch.float64 and linear.weight.device.type == "cpu"
    convolution = factorised(make("conv2d")[0], 1, 2)
    assert isinstance(convolution, nn.Conv2d) and isinstance(convolution, FactorisedConv2d)
    assert (convolution.in_channels, convolution.out_channels) == (4, 6)
    assert repr(linear) == "FactorisedLinear(in=8, out=24, rank=2, bias=True, blocks=3)"
    assert "rank=2" in repr(convolution) and "in=36, out=6" in repr(convolution)
    assert "factor_activation=silu" in repr(factorised(nn.Linear(4, 4), 1, 2, "silu"))


def test_meta_layers_change_structure_alone() -> None:
    with torch.device("meta"):
        module: Any = Conv1D(24, 8)
    factorise(module, 2, 3, None)
    assert module.weight.is_meta and module.weight.shape == (1, 24, 2) and module.factor_v.shape == (6, 8)
    densify(module)
    assert type(module) is Conv1D and module.weight.is_meta and module.weight.shape == (8, 24)


def test_channels_last_changes_nothing() -> None:
    module, blocks, x = make("conv2d strided, padded, dilated")
    factorised(module, blocks, 2)
    expected = module(x)
    module.to(memory_format=torch.channels_last)
    torch.testing.assert_close(module(x.to(memory_format=torch.channels_last)), expected, rtol=0, atol=1e-10)
    densify(module)
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", ["linear", "fused qkv", "conv2d"])
def test_autocast_computes_in_half_precision(case: str) -> None:
    module, blocks, x = make(case, torch.float32)
    factorised(module, blocks, 4)
    expected = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = module(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected, rtol=0.1, atol=0.1)
    got.float().sum().backward()
    assert module.weight.grad.dtype == module.factor_v.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merging_half_precision_rounds_once(dtype: torch.dtype) -> None:
    module, blocks, _ = make("linear")
    factorised(module.to(dtype), blocks, 3)
    u, v = module.factor_pairs()[0]
    expected = (u.float() @ v.float().mT).to(dtype)
    densify(module)
    assert torch.equal(module.weight, expected)

"""Masks and products of targeted dropout: rates, gradients against the masked dense layer, ramps by hand."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_efx.targeted_dropout.functional import Drop, Penalty, Product, draw_kept, dropped_product
from hf_efx.targeted_dropout.schedule import ramp_factors


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- drawing


@pytest.mark.parametrize("rate", [0.0, 0.003, 0.1, 0.5, 0.66, 0.99, 1.0])
def test_candidates_are_dropped_at_the_rate_and_nothing_else(rate: float) -> None:
    spared = torch.rand(500, 40, generator=seeded()) < 0.25
    dropped, draws = 0, 40
    for seed in range(draws):
        kept = draw_kept(spared, rate, seeded(seed))
        assert kept[spared].all()
        dropped += int((~kept).sum())
    n = draws * int((~spared).sum())
    # All of a draw share a threshold, one of two neighbours in 256ths: its own spread comes on top of the binomial's.
    low = math.floor(256 * rate) / 256
    spread = math.sqrt(rate * (1 - rate) / n + max((rate - low) * (low + 1 / 256 - rate), 0) / draws)
    assert abs(dropped / n - rate) <= 4 * spread


def test_a_draw_repeats_and_others_differ() -> None:
    spared = torch.zeros(64, 32, dtype=torch.bool)
    first = draw_kept(spared, 0.5, seeded(1))
    assert torch.equal(first, draw_kept(spared, 0.5, seeded(1)))
    assert not torch.equal(first, draw_kept(spared, 0.5, seeded(2)))
    plain = draw_kept(None, 0.5, seeded(1), shape=spared.shape)
    assert torch.equal(first, plain)
    odd = draw_kept(None, 0.5, seeded(), shape=torch.Size([3]))  # not a multiple of eight
    assert odd.shape == (3,)


def test_all_bytes_of_a_number_are_even() -> None:
    """A signless draw would leave the top bit of each eighth byte 0."""
    kept = draw_kept(None, 0.5, seeded(), shape=torch.Size([8000, 8]))
    assert ((kept.float().mean(0) - 0.5).abs() < 0.03).all()


def test_a_channels_last_mask_stays_so() -> None:
    spared = torch.zeros(4, 3, 5, 5, dtype=torch.bool).to(memory_format=torch.channels_last)
    assert draw_kept(spared, 0.5, seeded()).is_contiguous(memory_format=torch.channels_last)


# --- products


def case(kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Product, Any]:
    generator = seeded(3)
    if kind == "conv2d":
        x = torch.randn(2, 3, 6, 6, generator=generator, dtype=torch.float64)
        weight = torch.randn(4, 3, 3, 3, generator=generator, dtype=torch.float64)
        product = Product("conv2d", (2, 1), (1, 1), (1, 2))
        return (
            x,
            weight,
            torch.randn(4, generator=generator).double(),
            product,
            lambda x, w, b: F.conv2d(x, w, b, (2, 1), (1, 1), (1, 2)),
        )
    x = torch.randn(2, 5, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    bias = torch.randn(4, generator=generator).double()
    if kind == "linear":
        return x, weight, bias, Product("linear"), F.linear
    return x, weight.t().contiguous(), bias, Product("conv1d"), lambda x, w, b: F.linear(x, w.t(), b)


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
def test_gradients_are_those_of_the_masked_dense_layer(kind: Any, scale: float) -> None:
    x, weight, bias, product, dense = case(kind)
    kept = torch.rand(weight.shape, generator=seeded(4)) < 0.5
    kept_bias = torch.tensor([True, False, True, True])
    for bias_mask in (None, kept_bias):
        leaves: Any = [t.clone().requires_grad_() for t in (x, weight, bias)]
        again = [t.clone().requires_grad_() for t in (x, weight, bias)]
        output = dropped_product(leaves[0], leaves[1], leaves[2], Drop(kept, bias_mask, scale), product)
        factor = 1.0 if bias_mask is None else bias_mask * scale
        expected = dense(again[0], again[1] * kept * scale, again[2] * factor)
        torch.testing.assert_close(output, expected)
        gradient = torch.randn(output.shape, generator=seeded(5), dtype=torch.float64)
        output.backward(gradient)
        expected.backward(gradient)
        for mine, theirs in zip(leaves, again, strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad)
        assert (leaves[1].grad[~kept] == 0).all() and (leaves[1].grad[kept] != 0).all()  # pyright: ignore


def test_nothing_is_written_into_the_weight_and_the_masked_one_is_not_kept() -> None:
    weight = nn.Parameter(torch.randn(64, 64, generator=seeded()))
    before, x = weight.detach().clone(), torch.randn(8, 64, generator=seeded(1))
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        output = dropped_product(
            x, weight, None, Drop(torch.rand(64, 64, generator=seeded(2)) < 0.5), Product("linear")
        )
    output.sum().backward()
    assert torch.equal(weight, before)
    assert [t.dtype for t in saved if t.shape == weight.shape and t is not weight] == [torch.bool]


def test_l1_adds_its_sign_and_frozen_parts_get_no_gradient() -> None:
    weight = nn.Parameter(torch.tensor([[2.0, -3.0]]))
    x = torch.tensor([[1.0, 1.0]])
    drop = Drop(None, penalty=Penalty(0.25))
    sum(dropped_product(x, weight, None, drop, Product("linear")).sum() for _ in range(2)).backward()  # pyright: ignore
    assert weight.grad is not None and weight.grad.tolist() == [[2.25, 1.75]]  # once, of two calls
    frozen = weight.detach()
    x.requires_grad_()
    dropped_product(x, frozen, None, Drop(torch.tensor([[True, False]])), Product("linear")).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [[2.0, 0.0]] and frozen.grad is None


def test_autocast_computes_in_its_dtype_and_gives_gradients_in_the_weight_s() -> None:
    weight, x = nn.Parameter(torch.randn(4, 6, generator=seeded())), torch.randn(3, 6, generator=seeded(1))
    bias, kept = nn.Parameter(torch.ones(4)), torch.rand(4, 6, generator=seeded(2)) < 0.5
    with torch.autocast("cpu", torch.bfloat16):
        output = dropped_product(x, weight, bias, Drop(kept), Product("linear"))
        expected = F.linear(x, weight * kept, bias)
    assert output.dtype == torch.bfloat16 and torch.equal(output, expected)
    output.float().sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32 and (weight.grad[~kept] == 0).all()
    assert bias.grad is not None and bias.grad.dtype == torch.float32


# --- ramps


@pytest.mark.parametrize(
    ("kind", "step", "expected"),
    [
        ("none", 0, (1.0, 1.0)),
        ("linear", 0, (0.0, 0.0)),
        ("linear", 25, (0.25, 0.25)),
        ("paper", 0, (0.0, 0.0)),
        ("paper", 25, (0.475, 0.25)),
        ("paper", 50, (0.95, 0.5)),
        ("paper", 75, (0.975, 0.75)),
        ("paper", 100, (1.0, 1.0)),
        ("paper", 130, (1.0, 1.0)),
    ],
)
def test_ramps_by_hand(kind: str, step: int, expected: tuple[float, float]) -> None:
    assert ramp_factors(kind, step, 100) == pytest.approx(expected)


def test_a_ramp_needs_a_length() -> None:
    assert ramp_factors("none", 5, None) == (1.0, 1.0)
    with pytest.raises(ValueError, match=r"ramp='paper' needs a length: set ramp_steps"):
        ramp_factors("paper", 5, None)
    with pytest.raises(ValueError, match="ramp='cosine': expected one of none, linear, paper"):
        ramp_factors("cosine", 5, 10)

"""Sliced products against the 0/1-masked dense ones: values, gradients, work, and what the backward pass keeps."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hf_efx.slice_out.functional import length, put, refuse_hooks, sliced_conv2d, sliced_linear, take
from hf_efx.slice_out.schedule import Ranges, Slice

IN, OUT = 24, 36
# read ranges, emitted ranges
LINEAR: dict[str, tuple[Ranges | None, Ranges | None]] = {
    "emits": (None, ((9, 21),)),
    "reads": (((6, 18),), None),
    "reads to the end": (((12, 24),), None),
    "both": (((0, 12),), ((30, 36),)),
    "fused qkv": (None, Slice(3, 6, 12).ranges(blocks=3)),
    "emits, wrapped": (None, ((0, 5), (30, 36))),
    "reads, wrapped": (((0, 4), (20, 24)), None),
    "fused, wrapped": (None, Slice(9, 6, 12).ranges(blocks=3)),
    "many pieces": (Slice(1, 2, 3).ranges(blocks=8), Slice(2, 2, 4).ranges(blocks=9)),
}


def make_linear(transposed: bool, bias: bool, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    torch.manual_seed(0)
    weight = torch.randn((IN, OUT) if transposed else (OUT, IN), dtype=dtype) / IN**0.5
    return weight.requires_grad_(), torch.randn(OUT, dtype=dtype).requires_grad_() if bias else None


def mask_of(ranges: Ranges | None, size: int, dtype: torch.dtype) -> torch.Tensor:
    mask = torch.zeros(size, dtype=dtype)
    for start, stop in ranges or ((0, size),):
        mask[start:stop] = 1
    return mask


def assert_equal(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal to 1e-12 in float64 and 1e-6 in float32, of the largest value where that is above 1."""
    assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
    mine, theirs = mine.detach(), theirs.detach()
    bar = 1e-12 if mine.dtype == torch.float64 else 1e-6
    assert (mine - theirs).abs().max() <= bar * max(1.0, float(theirs.abs().max()))


def assert_zero_outside(grad: torch.Tensor, inside: torch.Tensor) -> None:
    """Exactly 0 where the mask is, and nowhere else."""
    assert torch.equal(grad != 0, inside.bool().expand_as(grad))


def gradients(y: torch.Tensor, tensors: list[Any]) -> list[torch.Tensor]:
    torch.manual_seed(1)
    present = [t for t in tensors if t is not None]
    return list(torch.autograd.grad(y, present, torch.randn_like(y)))


OPTIONS = list(itertools.product((False, True), ("one", "number", "per unit"), (torch.float64, torch.float32)))


@pytest.mark.parametrize("case", LINEAR)
@pytest.mark.parametrize("transposed", [False, True])
def test_linear_equals_the_masked_dense_one(case: str, transposed: bool) -> None:
    rows, columns = LINEAR[case]
    for bias, scaling, dtype in OPTIONS:
        weight, b = make_linear(transposed, bias, dtype)
        scale: Any = {"one": 1.0, "number": 2.0, "per unit": torch.rand(IN, dtype=dtype) + 0.5}[scaling]
        dense_x = torch.randn(
            2, 5, IN, dtype=dtype, requires_grad=True
        )  # what isn't read is there, and must not count
        x = take(dense_x.detach(), -1, rows or ((0, IN),)).clone().requires_grad_()

        masked = dense_x * mask_of(rows, IN, dtype) * scale
        expected = take(F.linear(masked, weight.t() if transposed else weight, b), -1, columns or ((0, OUT),))
        got = sliced_linear(x, weight, b, in_ranges=rows, out_ranges=columns, transposed=transposed, scale=scale)
        assert got.shape == expected.shape and got.is_contiguous()
        assert_equal(got, expected)

        grad_x, *want = gradients(expected, [dense_x, weight, b])
        got_x, *have = gradients(got, [x, weight, b])
        assert_equal(got_x, take(grad_x, -1, rows or ((0, IN),)))
        for mine, theirs in zip(have, want, strict=True):
            assert_equal(mine, theirs)
        inside = torch.outer(mask_of(columns, OUT, dtype), mask_of(rows, IN, dtype))
        for grad, mask in zip(have, (inside.t() if transposed else inside, inside.any(1)), strict=False):
            assert_zero_outside(grad, mask)


CONVS: dict[str, Callable[[], nn.Conv2d]] = {
    "plain": lambda: nn.Conv2d(8, 12, 3, padding=1),
    "strided, dilated, without bias": lambda: nn.Conv2d(8, 12, (3, 2), (2, 1), (1, 2), (1, 2), bias=False),
    "1x1": lambda: nn.Conv2d(8, 12, 1),
    "same": lambda: nn.Conv2d(8, 12, 3, padding="same", dilation=2),
    "reflected": lambda: nn.Conv2d(8, 12, 3, padding=1, padding_mode="reflect"),
}


@pytest.mark.parametrize("case", CONVS)
def test_conv2d_equals_the_masked_dense_one(case: str) -> None:
    torch.manual_seed(0)
    conv = CONVS[case]().double()
    parts: list[tuple[Ranges | None, Ranges | None]] = [(None, ((4, 8),)), (((2, 6),), None)]
    parts.append((((0, 2), (6, 8)), ((0, 3), (9, 12))))
    for (rows, columns), per_unit in itertools.product(parts, (False, True)):
        scale: Any = torch.rand(8, dtype=torch.float64) + 0.5 if per_unit else 2.0
        dense_x = torch.randn(3, 8, 6, 7, dtype=torch.float64, requires_grad=True)
        x = take(dense_x.detach(), 1, rows or ((0, 8),)).clone().requires_grad_()
        factors = mask_of(rows, 8, torch.float64) * scale
        expected = take(conv(dense_x * factors[:, None, None]), 1, columns or ((0, 12),))
        got = sliced_conv2d(conv, x, in_ranges=rows, out_ranges=columns, scale=scale)
        assert_equal(got, expected)
        grad_x, *want = gradients(expected, [dense_x, conv.weight, conv.bias])
        got_x, *have = gradients(got, [x, conv.weight, conv.bias])
        assert_equal(got_x, take(grad_x, 1, rows or ((0, 8),)))
        for mine, theirs in zip(have, want, strict=True):
            assert_equal(mine, theirs)
        inside = torch.outer(mask_of(columns, 12, torch.float64), mask_of(rows, 8, torch.float64))
        for grad, mask in zip(have, (inside[:, :, None, None], inside.any(1)), strict=False):
            assert_zero_outside(grad, mask)
        one = sliced_conv2d(conv, x[0].detach(), in_ranges=rows, out_ranges=columns, scale=scale)  # without a batch
        assert_equal(one, got[0])


@pytest.mark.parametrize("case", ["emits", "reads", "fused, wrapped", "many pieces"])
def test_accumulating_in_place_equals_the_normal_form(case: str) -> None:
    rows, columns = LINEAR[case]
    other: Ranges = ((0, 6),)
    grads, pointers = {}, []
    for in_place in (False, True):
        weight, bias = make_linear(transposed=True, bias=True, dtype=torch.float64)
        for micro_step in range(3):  # the last one with another slice
            if micro_step == 2:
                rows, columns = (other, columns) if LINEAR[case][0] else (rows, other)
            x = torch.randn(4, IN if rows is None else length(rows), dtype=torch.float64)
            torch.manual_seed(micro_step)
            options: Any = {"in_ranges": rows, "out_ranges": columns, "transposed": True, "scale": 2.0}
            torch.nn.init.normal_(x)
            sliced_linear(x, weight, bias, in_place=in_place, **options).square().sum().backward()
            assert weight.grad is not None
            pointers.append(weight.grad.data_ptr())
        rows, columns = LINEAR[case]
        grads[in_place] = weight.grad, bias.grad  # pyright: ignore
    assert len(set(pointers[3:])) == 1
    for mine, theirs in zip(grads[True], grads[False], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_accumulating_in_place_is_refused_where_hooks_would_be_bypassed(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias = make_linear(False, True, torch.float32)
    x = torch.randn(2, IN)

    def run() -> torch.Tensor:
        return sliced_linear(x, weight, bias, out_ranges=((0, 6),), in_place=True)

    y = run()
    handle = weight.register_hook(lambda grad: grad)
    with pytest.raises(ValueError, match="accumulate_in_place=True: a parameter has gradient hooks"):
        run()
    with pytest.raises(ValueError, match="gradient hooks"):  # one that came between forward and backward
        y.sum().backward()
    handle.remove()
    handle = weight.register_post_accumulate_grad_hook(lambda parameter: None)
    with pytest.raises(ValueError, match="gradient hooks"):
        run()
    handle.remove()
    run().sum().backward()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(ValueError, match="DDP or FSDP would not see the gradient. Set accumulate_in_place=False"):
        run()
    with pytest.raises(ValueError, match="no leaf parameter"):
        monkeypatch.undo()
        refuse_hooks(weight * 1)


def test_a_second_backward_pass_through_the_gradient_says_so() -> None:
    weight, bias = make_linear(False, True, torch.float32)
    conv = nn.Conv2d(4, 4, 1)
    x, image = torch.randn(2, IN, requires_grad=True), torch.randn(1, 4, 2, 2, requires_grad=True)
    for y, source in (
        (sliced_linear(x, weight, bias, out_ranges=((0, 6),)), x),
        (sliced_conv2d(conv, image, out_ranges=((0, 2),)), image),
    ):
        (grad,) = torch.autograd.grad(y.square().sum(), source, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_as_the_dense_layers(dtype: torch.dtype) -> None:
    weight, bias = make_linear(False, True, torch.float32)
    conv = nn.Conv2d(8, 12, 3)
    x, image = torch.randn(4, IN, requires_grad=True), torch.randn(2, 8, 5, 5, requires_grad=True)
    linear_mask, conv_mask = mask_of(((6, 18),), OUT, dtype), mask_of(((4, 8),), 12, dtype)
    with torch.autocast("cpu", dtype):
        pairs = [
            (sliced_linear(x, weight, bias, out_ranges=((6, 18),)), F.linear(x, weight, bias) * linear_mask, x),
            (sliced_conv2d(conv, image, out_ranges=((4, 8),)), conv(image) * conv_mask[:, None, None], image),
        ]
    parameters = [(weight, bias), (conv.weight, conv.bias)]
    for (mine, theirs, source), (w, b) in zip(pairs, parameters, strict=True):
        assert mine.dtype == theirs.dtype == dtype
        got, expected = gradients(mine.float().sum(), [source, w, b]), gradients(theirs.float().sum(), [source, w, b])
        for a, e in zip(got, expected, strict=True):
            assert a.dtype == e.dtype == torch.float32
            torch.testing.assert_close(a, e, rtol=0.02, atol=0.02 * float(e.abs().max()))
        for grad, (start, stop) in zip(got[1:], [(6, 18)] * 2 if w is weight else [(4, 8)] * 2, strict=True):
            assert not grad[:start].any() and grad[start:stop].all() and not grad[stop:].any()


def test_frozen_weights_get_no_gradient_and_keep_nothing() -> None:
    weight, bias = make_linear(False, True, torch.float32)
    weight.requires_grad_(False)
    x, kept = torch.randn(2, IN, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = sliced_linear(x, weight, bias, out_ranges=((0, 6),))
    assert all(t.data_ptr() != x.data_ptr() for t in kept)
    y.sum().backward()
    assert weight.grad is None
    torch.testing.assert_close(x.grad, weight[:6].sum(0).expand(2, IN))


def test_work_and_kept_bytes_follow_the_width() -> None:
    weight, bias = make_linear(True, True, torch.float32)
    n, read, emitted = 10, 8, 12
    ranges: Any = {"in_ranges": ((4, 12),), "out_ranges": ((0, 6), (30, 36)), "transposed": True, "scale": 2.0}
    x, kept = torch.randn(n, read, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        with FlopCounterMode(display=False) as counter:
            sliced_linear(x, weight, bias, **ranges).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * n * read * emitted
    parameters = {weight.data_ptr(), bias.data_ptr()}  # pyright: ignore
    assert sum(t.numel() for t in kept if t.data_ptr() not in parameters) == n * read


def test_the_written_buffer_becomes_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias = make_linear(False, True, torch.float32)
    pointers, empty_like = [], torch.empty_like

    def noted(like: torch.Tensor) -> torch.Tensor:
        made = empty_like(like)
        pointers.append(made.data_ptr())
        return made

    monkeypatch.setattr(torch, "empty_like", noted)
    sliced_linear(torch.randn(3, IN), weight, bias, out_ranges=((0, 6),)).sum().backward()
    assert weight.grad is not None and weight.grad.data_ptr() in pointers


def test_take_and_put_are_each_others_reverse() -> None:
    ranges: Ranges = ((0, 2), (5, 6))
    source = torch.arange(12.0).view(2, 6)
    assert take(source, 1, ranges).tolist() == [[0, 1, 5], [6, 7, 11]]
    assert take(source, 1, ((2, 4),)).data_ptr() == source[:, 2:].data_ptr()  # a view
    target = torch.zeros(2, 6)
    put(target, 1, ranges, take(source, 1, ranges))
    assert target.tolist() == [[0, 1, 0, 0, 0, 5], [6, 7, 0, 0, 0, 11]]

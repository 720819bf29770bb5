"""The sliced layers under torch.compile: one graph for all starts of a width.

A start in the graph would be a constant, and each new one a recompilation. Here a start comes out of an opaque
operator of `span.py` as a tensor, and the products are opaque operators too, which read it. Which width holds is a
number on the span (`Span.width`), so a ramp compiles once per width.
"""

from typing import Any

import torch
from torch import nn

from hf_efx.slice_out.functional import autocast_input, linear_backward, linear_forward, padded, whole
from hf_efx.slice_out.schedule import Ranges, Slice
from hf_efx.slice_out.span import Span, slice_columns, slice_scale, slice_start

_ALL = (0, 0, 0, 0)  # the geometry of a side that isn't sliced


def _ranges(start: torch.Tensor | None, geometry: list[int], dim: int) -> Ranges:
    if start is None:
        return whole(dim)
    size, width, unit, blocks = geometry
    return Slice(int(start), width, size).ranges(unit, blocks)


@torch.library.custom_op("hf_efx::sliced_linear", mutates_args=())
def sliced_linear_op(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    in_start: torch.Tensor | None,
    out_start: torch.Tensor | None,
    geometry: list[int],
    transposed: bool,
    alpha: float,
) -> torch.Tensor:
    """`functional.linear_forward` with starts as tensors.

    Args:
        geometry: size, width, unit and blocks of the inputs' side, then of the outputs'.
    """
    dims = weight.shape if transposed else weight.shape[::-1]
    rows, columns = _ranges(in_start, geometry[:4], dims[0]), _ranges(out_start, geometry[4:], dims[1])
    return linear_forward(x, weight, bias, row_scale, rows, columns, transposed, alpha)


@sliced_linear_op.register_fake
def _(x, weight, bias, row_scale, in_start, out_start, geometry, transposed, alpha):  # noqa: ANN001, ANN202
    _, width, unit, blocks = geometry[4:]
    dim = weight.shape[1 if transposed else 0] if out_start is None else width * unit * blocks
    return x.new_empty(*x.shape[:-1], dim)


@torch.library.custom_op("hf_efx::sliced_linear_backward", mutates_args=())
def sliced_linear_backward_op(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    in_start: torch.Tensor | None,
    out_start: torch.Tensor | None,
    geometry: list[int],
    transposed: bool,
    alpha: float,
    needs: list[bool],
) -> list[torch.Tensor]:
    """Those of the gradients of x, weight and bias that are needed."""
    dims = weight.shape if transposed else weight.shape[::-1]
    rows, columns = _ranges(in_start, geometry[:4], dims[0]), _ranges(out_start, geometry[4:], dims[1])
    grads = linear_backward(grad, x, weight, bias, row_scale, rows, columns, transposed, alpha, tuple(needs))
    return [each for each in grads if each is not None]


@sliced_linear_backward_op.register_fake
def _(grad, x, weight, bias, row_scale, in_start, out_start, geometry, transposed, alpha, needs):  # noqa: ANN001, ANN202
    likes = (x, weight, bias)
    return [torch.empty_like(t) for t, needed in zip(likes, needs, strict=True) if needed and t is not None]


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, geometry, transposed, alpha = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = geometry, transposed, alpha


def _backward(ctx: Any, grad: torch.Tensor) -> Any:
    needs = [bool(need) for need in ctx.needs_input_grad[:3]]
    grads = list(sliced_linear_backward_op(grad, *ctx.saved_tensors, *ctx.options, needs))
    return *[grads.pop(0) if need else None for need in needs], *[None] * 6


sliced_linear_op.register_autograd(_backward, setup_context=_setup_context)


def _geometry(span: Span | None, sliced: bool, dim: int, blocks: int) -> tuple[int, int, int, int] | None:
    """Size, width, unit and blocks of one side of a layer, None where it isn't sliced."""
    if span is None or not sliced or not span.context.active or span.width == span.size:
        return None
    return span.size, span.width, dim // (blocks * span.size), blocks


def linear(member: Any, x: torch.Tensor, dims: tuple[int, int], transposed: bool) -> torch.Tensor | None:
    """The forward of a Linear or Conv1D under torch.compile; None where nothing is sliced."""
    rows = _geometry(member.reads, x.shape[-1] != dims[0], dims[0], member.blocks)
    columns = _geometry(member.emits, member.training, dims[1], member.blocks)
    if rows is None and columns is None:
        return None
    alpha, row_scale = (1.0, None) if rows is None else _read_scale(member.reads, rows, x.device)
    in_start = None if rows is None else slice_start(member.reads.number, rows[1])
    out_start = None if columns is None else slice_start(member.emits.number, columns[1])
    geometry = [*(rows or _ALL), *(columns or _ALL)]
    tensors = autocast_input(x, member.weight), member.weight, member.bias, row_scale, in_start, out_start
    return sliced_linear_op(*tensors, geometry, transposed, alpha)


def _read_scale(span: Any, geometry: tuple[int, int, int, int], device: torch.device) -> tuple[float, Any]:
    size, width, unit, blocks = geometry
    if span.normalization == "flow":
        return size / width, None
    return 1.0, slice_scale(span.number, width, unit, blocks, device)


def conv2d(member: Any, x: torch.Tensor) -> torch.Tensor | None:
    """The forward of a Conv2d under torch.compile: its slice is a copy, small beside what it makes."""
    rows = _geometry(member.reads, x.shape[-3] != member.in_channels, member.in_channels, member.blocks)
    columns = _geometry(member.emits, member.training, member.out_channels, member.blocks)
    if rows is None and columns is None:
        return None
    weight, bias = member.weight, member.bias
    if columns is not None:
        chosen = slice_columns(member.emits.number, *columns[1:], x.device)
        weight = weight.index_select(0, chosen)
        bias = None if bias is None else bias.index_select(0, chosen)
    if rows is not None:
        alpha, scale = _read_scale(member.reads, rows, x.device)
        weight = weight.index_select(1, slice_columns(member.reads.number, *rows[1:], x.device))
        weight = weight * (alpha if scale is None else scale.to(weight.dtype).view(1, -1, 1, 1))
    x, padding = padded(member, x)
    return nn.functional.conv2d(x, weight, bias, member.stride, padding, member.dilation)

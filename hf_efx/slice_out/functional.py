"""Products with a slice of a weight, forward and backward, on views of the whole weight.

Under plain autograd `weight[a:b]` gives the same values, but its backward fills a full-size tensor with zeros, copies
the slice's gradient into it, and `backward` adds where a first gradient could have been taken over. Here the products
write into the slice of the one buffer that becomes `weight.grad`; only what lies outside is filled with zeros.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from hf_efx.slice_out.schedule import Ranges

# A product for each pair of pieces needs no copy of the weight; with more pieces than this (slices of the head width
# have one per head) one copy and one product are faster.
MAX_VIEWS = 6


def whole(size: int) -> Ranges:
    """The ranges that hold all of a dimension."""
    return ((0, size),)


def length(ranges: Ranges) -> int:
    """How many columns the ranges hold."""
    return sum(stop - start for start, stop in ranges)


def take(tensor: torch.Tensor, dim: int, ranges: Ranges) -> torch.Tensor:
    """The ranges of a dimension side by side: a view where there is one, else a copy."""
    parts = [tensor.narrow(dim, start, stop - start) for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def put(tensor: torch.Tensor, dim: int, ranges: Ranges, values: torch.Tensor) -> None:
    """Writes `values`, as `take` returns them, back into their places."""
    for (start, stop), packed in _packed(ranges):
        tensor.narrow(dim, start, stop - start).copy_(values.narrow(dim, packed.start, stop - start))


def _packed(ranges: Ranges) -> Iterator[tuple[tuple[int, int], slice]]:
    """Each range with its place among the packed columns."""
    position = 0
    for start, stop in ranges:
        yield (start, stop), slice(position, position + stop - start)
        position += stop - start


def _gaps(ranges: Ranges, size: int) -> Iterator[slice]:
    """What of 0 to size the ranges leave out."""
    position = 0
    for start, stop in ranges:
        if position < start:
            yield slice(position, start)
        position = stop
    if position < size:
        yield slice(position, size)


def _zero_outside(matrix: torch.Tensor, rows: Ranges, columns: Ranges) -> None:
    for gap in _gaps(rows, matrix.shape[0]):
        matrix[gap].zero_()
    for start, stop in rows:
        for gap in _gaps(columns, matrix.shape[1]):
            matrix[start:stop, gap].zero_()


def _addmm(target: torch.Tensor, a: torch.Tensor, b: torch.Tensor, alpha: float, beta: float) -> None:
    """target = beta * target + alpha * a b, in the target's place; at beta 0 it may hold anything."""
    # Not `addmm_`, whose work torch's FlopCounterMode doesn't count.
    torch.addmm(target, a, b, beta=beta, alpha=alpha, out=target)


def _accumulate(target: torch.Tensor, a: torch.Tensor, b: torch.Tensor, alpha: float, beta: float) -> None:
    """target = beta * target + alpha * a b, in the target's place; the target may be wider in dtype."""
    if target.dtype == a.dtype:
        _addmm(target, a, b, alpha, beta)
    elif beta:
        target.add_(a @ b, alpha=alpha)
    else:
        target.copy_(a @ b).mul_(alpha)


def refuse_hooks(weight: torch.Tensor) -> None:
    """Raises where a gradient that is written in place would bypass who waits for it.

    Raises:
        ValueError: If the parameter has hooks, or processes train together (DDP and FSDP reduce gradients in hooks).
    """
    reason = None
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        reason = "torch.distributed is initialised, and DDP or FSDP would not see the gradient"
    elif weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None):
        reason = "a parameter has gradient hooks, which would not run"
    elif not weight.is_leaf:
        reason = "a weight is no leaf parameter (a parametrization computes it)"
    if reason:
        raise ValueError(f"accumulate_in_place=True: {reason}. Set accumulate_in_place=False.")


class _SlicedLinear(torch.autograd.Function):
    """y[:, out] = alpha * (x ⊙ c) W[in, out] + b[out] for the rows and columns `in` and `out` of W."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        row_scale: torch.Tensor | None,
        options: tuple[Ranges, Ranges, bool, float, bool],
    ) -> torch.Tensor:
        ctx.options = options
        needs_x = weight.requires_grad
        ctx.save_for_backward(x if needs_x else None, weight, bias, row_scale)
        return linear_forward(x, weight, bias, row_scale, *options[:4])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight, bias, row_scale = ctx.saved_tensors
        in_ranges, out_ranges, transposed, alpha, in_place = ctx.options
        needs = ctx.needs_input_grad[:3]
        into = None
        if in_place and needs[1]:
            refuse_hooks(weight)
            into = weight.grad
        grads = linear_backward(
            grad, x, weight, bias, row_scale, in_ranges, out_ranges, transposed, alpha, needs, into
        )
        return *grads, None, None


def linear_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    in_ranges: Ranges,
    out_ranges: Ranges,
    transposed: bool,
    alpha: float,
) -> torch.Tensor:
    """The forward of `sliced_linear`, without autograd."""
    matrix = weight if transposed else weight.t()  # [in, out]
    if len(in_ranges) * len(out_ranges) > MAX_VIEWS:
        matrix = take(take(matrix, 0, in_ranges), 1, out_ranges)
        rows, columns = whole(matrix.shape[0]), whole(matrix.shape[1])
    else:
        rows, columns = in_ranges, out_ranges
    small_bias = None if bias is None else take(bias, 0, out_ranges).to(x.dtype)
    flat = x.reshape(-1, x.shape[-1])
    y = x.new_empty(flat.shape[0], length(out_ranges))
    for (left, right), out in _packed(columns):
        for (top, bottom), inside in _packed(rows):
            part = matrix[top:bottom, left:right].to(x.dtype)
            if row_scale is not None:
                part = part * row_scale[inside, None].to(x.dtype)
            target = y[:, out]
            if inside.start:
                _addmm(target, flat[:, inside], part, alpha, beta=1)
            elif small_bias is None:
                _addmm(target, flat[:, inside], part, alpha, beta=0)
            else:
                torch.addmm(small_bias[out], flat[:, inside], part, alpha=alpha, out=target)
    return y.view(*x.shape[:-1], y.shape[1])


def linear_backward(
    grad: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    in_ranges: Ranges,
    out_ranges: Ranges,
    transposed: bool,
    alpha: float,
    needs: tuple[bool, ...] = (True, True, True),
    into: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of x, weight and bias, of their full sizes.

    Args:
        needs: Which of the three are asked for; the others are None.
        into: The weight's gradient so far, to be added to in place: None is returned in its stead then.
    """
    g = grad.reshape(-1, grad.shape[-1])
    grad_x = grad_weight = grad_bias = None
    if needs[0]:
        grad_x = _input_gradient(g, weight, row_scale, in_ranges, out_ranges, transposed, alpha)
        grad_x = grad_x.view(*grad.shape[:-1], grad_x.shape[1])
    if needs[1] and x is not None:
        buffer = torch.empty_like(weight) if into is None else into
        matrix = buffer if transposed else buffer.t()
        if into is None:
            _zero_outside(matrix, in_ranges, out_ranges)
        flat = x.reshape(-1, x.shape[-1])
        _weight_gradient(matrix, flat, g, row_scale, in_ranges, out_ranges, alpha, beta=0.0 if into is None else 1.0)
        grad_weight = buffer if into is None else None
    if needs[2] and bias is not None:
        grad_bias = torch.zeros_like(bias) if length(out_ranges) < len(bias) else torch.empty_like(bias)
        put(grad_bias, 0, out_ranges, g.sum(0))
    return grad_x, grad_weight, grad_bias


def _input_gradient(
    g: torch.Tensor,
    weight: torch.Tensor,
    row_scale: torch.Tensor | None,
    in_ranges: Ranges,
    out_ranges: Ranges,
    transposed: bool,
    alpha: float,
) -> torch.Tensor:
    matrix = weight if transposed else weight.t()
    if len(in_ranges) * len(out_ranges) > MAX_VIEWS:
        matrix = take(take(matrix, 0, in_ranges), 1, out_ranges)
        in_ranges, out_ranges = whole(matrix.shape[0]), whole(matrix.shape[1])
    grad_x = g.new_empty(g.shape[0], length(in_ranges))
    for (top, bottom), inside in _packed(in_ranges):
        for (left, right), out in _packed(out_ranges):
            part = matrix[top:bottom, left:right].to(g.dtype)
            _addmm(grad_x[:, inside], g[:, out], part.t(), alpha, beta=1 if out.start else 0)
    return grad_x if row_scale is None else grad_x.mul_(row_scale.to(g.dtype))


def _weight_gradient(
    matrix: torch.Tensor,
    flat: torch.Tensor,
    g: torch.Tensor,
    row_scale: torch.Tensor | None,
    in_ranges: Ranges,
    out_ranges: Ranges,
    alpha: float,
    beta: float,
) -> None:
    """matrix[in, out] = beta * itself + alpha * (x ⊙ c)ᵀ g."""
    if row_scale is not None:
        flat = flat * row_scale.to(flat.dtype)
    gathered = len(in_ranges) * len(out_ranges) > MAX_VIEWS
    product = alpha * (flat.t() @ g) if gathered else None
    for (top, bottom), inside in _packed(in_ranges):
        for (left, right), out in _packed(out_ranges):
            target = matrix[top:bottom, left:right]
            if product is None:
                _accumulate(target, flat[:, inside].t(), g[:, out], alpha, beta)
            elif beta:
                target.add_(product[inside, out])
            else:
                target.copy_(product[inside, out])


def sliced_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    in_ranges: Ranges | None = None,
    out_ranges: Ranges | None = None,
    transposed: bool = False,
    scale: float | torch.Tensor = 1.0,
    in_place: bool = False,
) -> torch.Tensor:
    """A linear layer of which only some inputs are read and only some outputs are emitted.

    Args:
        x: [..., read], the packed inputs.
        weight: The whole weight, [out, in], or [in, out] if transposed.
        bias: The whole bias, [out].
        in_ranges: Inputs that `x` holds, None for all.
        out_ranges: Outputs that are emitted, None for all.
        transposed: Whether the weight is stored [in, out], as in transformers' Conv1D.
        scale: What the inputs are multiplied by: a number, or [in] of which the slice is taken. It goes into the
            product; no scaled copy of `x` is made or kept.
        in_place: Add the weight's gradient to `weight.grad` directly. Saves the full-size buffer and the full-size
            addition of all micro-batches but the first; bypasses whatever else watches the gradient.

    Returns:
        [..., emitted]. Under autocast of its dtype, as `F.linear`.

    Raises:
        ValueError: If in_place is asked for where it would bypass hooks.
    """
    rows = whole(weight.shape[0 if transposed else 1]) if in_ranges is None else in_ranges
    columns = whole(weight.shape[1 if transposed else 0]) if out_ranges is None else out_ranges
    alpha, row_scale = (1.0, take(scale, 0, rows)) if isinstance(scale, torch.Tensor) else (scale, None)
    if in_place and torch.is_grad_enabled():
        refuse_hooks(weight)
    x = autocast_input(x, weight)
    return _SlicedLinear.apply(x, weight, bias, row_scale, (rows, columns, transposed, alpha, in_place))  # pyright: ignore


def autocast_input(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x in the dtype in which the product is to be taken."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and weight.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(kind))
    return x


class _SlicedConv2d(torch.autograd.Function):
    """A convolution by W[out, in] * scale, whose gradient goes into the slice of a full-size tensor."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        channel_scale: torch.Tensor | None,
        options: tuple[Ranges, Ranges, float, tuple[Any, ...]],
    ) -> torch.Tensor:
        in_ranges, out_ranges, alpha, geometry = ctx.options = options
        ctx.save_for_backward(x, weight, bias, channel_scale)
        small = _conv_weight(weight, in_ranges, out_ranges, alpha, channel_scale).to(x.dtype)
        small_bias = None if bias is None else take(bias, 0, out_ranges).to(x.dtype)
        return F.conv2d(x, small, small_bias, *geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight, bias, channel_scale = ctx.saved_tensors
        in_ranges, out_ranges, alpha, (stride, padding, dilation) = ctx.options
        small = _conv_weight(weight, in_ranges, out_ranges, alpha, channel_scale).to(x.dtype)
        sizes = None if bias is None else [small.shape[0]]
        mask = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], bias is not None and ctx.needs_input_grad[2]]
        grad_x, grad_small, grad_bias = torch.ops.aten.convolution_backward(
            grad, x, small, sizes, stride, padding, dilation, False, [0, 0], 1, mask
        )
        if mask[1]:
            grad_small = _scaled(grad_small.to(weight.dtype), alpha, channel_scale)
            grad_weight = torch.zeros_like(weight)
            for (start, stop), out in _packed(out_ranges):
                put(grad_weight[start:stop], 1, in_ranges, grad_small[out])
        else:
            grad_weight = None
        if mask[2] and bias is not None:
            small_grad_bias, grad_bias = grad_bias, torch.zeros_like(bias)
            put(grad_bias, 0, out_ranges, small_grad_bias)
        return grad_x if mask[0] else None, grad_weight, grad_bias if mask[2] else None, None, None


def _scaled(weight: torch.Tensor, alpha: float, channel_scale: torch.Tensor | None) -> torch.Tensor:
    """A convolution's weight [out, in, ...] times what its inputs are to be multiplied by."""
    if channel_scale is not None:
        return weight * channel_scale.to(weight.dtype).view(1, -1, 1, 1)
    return weight if alpha == 1 else weight * alpha


def _conv_weight(
    weight: torch.Tensor, in_ranges: Ranges, out_ranges: Ranges, alpha: float, channel_scale: torch.Tensor | None
) -> torch.Tensor:
    return _scaled(take(take(weight, 0, out_ranges), 1, in_ranges), alpha, channel_scale)


def sliced_conv2d(
    conv: torch.nn.Conv2d,
    x: torch.Tensor,
    *,
    in_ranges: Ranges | None = None,
    out_ranges: Ranges | None = None,
    scale: float | torch.Tensor = 1.0,
) -> torch.Tensor:
    """A convolution of which only some input channels are read and only some output channels are emitted.

    Args:
        conv: Its weight, bias, stride, padding and dilation are used; groups must be 1.
        x: [(B,) read, H, W], the packed input channels.
        in_ranges: Input channels that `x` holds, None for all.
        out_ranges: Output channels that are emitted, None for all.
        scale: What the inputs are multiplied by: a number, or [in] of which the slice is taken.

    Returns:
        [(B,) emitted, H', W'].
    """
    rows = whole(conv.in_channels) if in_ranges is None else in_ranges
    columns = whole(conv.out_channels) if out_ranges is None else out_ranges
    alpha, channel_scale = (1.0, take(scale, 0, rows)) if isinstance(scale, torch.Tensor) else (scale, None)
    x, padding = padded(conv, x)
    batched = x if x.ndim == 4 else x.unsqueeze(0)
    geometry = conv.stride, padding, conv.dilation
    options = (rows, columns, alpha, geometry)
    y: Any = _SlicedConv2d.apply(autocast_input(batched, conv.weight), conv.weight, conv.bias, channel_scale, options)
    return y if x.ndim == 4 else y.squeeze(0)


def padded(conv: torch.nn.Conv2d, x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """The input of a convolution and what is left to pad: "same" and modes other than zeros are padded at once."""
    if isinstance(conv.padding, str) or conv.padding_mode != "zeros":
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        return F.pad(x, conv._reversed_padding_repeated_twice, mode=mode), (0, 0)
    return x, conv.padding

"""The drawing of masks, and products with a masked weight of which autograd keeps the mask alone.

Gomez et al. 2019, arXiv 1905.13678: of the candidates, each is dropped with probability alpha; what is kept isn't
rescaled. Plain autograd would keep the masked weight of every layer for the backward pass. Here it keeps the boolean
mask, a byte a weight, and masks the weight once more.
"""

import math
import threading
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

_scratch = threading.local()


def draw_kept(
    spared: torch.Tensor | None,
    rate: float,
    generator: torch.Generator,
    *,
    shape: torch.Size | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Which entries are kept: all that are spared, of the others each with probability 1 - rate.

    A byte of random numbers an entry is compared with a threshold; where 256 * rate is no whole number, the draw takes
    the one above it with the right probability, so that each entry is dropped with probability `rate` exactly.

    Args:
        spared: Boolean, dense in memory: True for entries that are never dropped. None: there are none.
        rate: From 0 to 1.
        generator: On the device of the result.
        shape: Where `spared` is None.
        device: Where `spared` is None.

    Returns:
        Boolean, in the shape and memory order of `spared`.
    """
    if spared is not None:
        shape, device = spared.shape, spared.device
    assert shape is not None
    size = shape.numel()
    threshold = math.floor(256 * rate)
    # On the CPU: a number that is read back from another device would make the program wait for it, layer by layer.
    coin = generator if generator.device.type == "cpu" else torch.Generator().manual_seed(generator.initial_seed())
    threshold += int(torch.rand((), generator=coin) < 256 * rate - threshold)
    # Eight bytes a number, sign included: several times cheaper than a float for each entry.
    words = torch.empty(-(-size // 8), dtype=torch.int64, device=device).random_(-(2**63), None, generator=generator)
    numbers = words.view(torch.uint8)[:size]
    numbers = numbers.view(shape) if spared is None else numbers.as_strided(shape, spared.stride())
    kept = numbers >= threshold if threshold < 256 else torch.zeros_like(numbers, dtype=torch.bool)
    return kept if spared is None else kept.logical_or_(spared)


@dataclass(frozen=True)
class Product:
    """What a layer does with its weight.

    Attributes:
        kind: "linear" (weight [out, in]), "conv1d" (transformers' Conv1D: [in, out]) or "conv2d".
        stride: Of a convolution, like padding, dilation and groups.
        padding: In pixels.
        dilation: Between taps.
        groups: Number of groups.
    """

    kind: Literal["linear", "conv1d", "conv2d"]
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    def forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The layer's output."""
        if self.kind == "conv2d":
            return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return F.linear(x, weight if self.kind == "linear" else weight.t(), bias)

    def backward(
        self, grad: torch.Tensor, x: torch.Tensor | None, weight: torch.Tensor, needs: tuple[bool, bool, bool]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Gradients with respect to input, weight and bias, as far as they are needed.

        Args:
            grad: Of the output.
            x: The input; a convolution needs it always, the others where the weight needs a gradient.
            weight: The weight that the forward pass had.
            needs: Which are needed.
        """
        if self.kind == "conv2d":
            bias_sizes = [weight.shape[0]] if needs[2] else None
            options = self.stride, self.padding, self.dilation, False, [0, 0], self.groups, needs
            return torch.ops.aten.convolution_backward(grad, x, weight, bias_sizes, *options)
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = grad @ (weight if self.kind == "linear" else weight.t()) if needs[0] else None
        grad_weight = None
        if needs[1]:
            assert x is not None
            inputs = x.reshape(-1, x.shape[-1])
            grad_weight = rows.t() @ inputs if self.kind == "linear" else inputs.t() @ rows
        return grad_x, grad_weight, rows.sum(0) if needs[2] else None


@dataclass
class Penalty:
    """An L1 penalty on a weight that is added to the loss once, however often the layer is called until then.

    Attributes:
        strength: What the sum of |weights| is multiplied by; 0 once it was added.
    """

    strength: float

    def take(self) -> float:
        """The strength, at the first call."""
        strength, self.strength = self.strength, 0.0
        return strength


@dataclass(frozen=True)
class Drop:
    """What a layer drops in one pass.

    Attributes:
        kept: Boolean, over the weight's shape (it may be an expanded view); None: everything is kept.
        kept_bias: Boolean [out]: entries of the bias that are kept; None: all.
        scale: Factor of what is kept, biases included where they are dropped.
        penalty: Whose gradient, its strength times the sign of the weight, goes into the weight's.
    """

    kept: torch.Tensor | None
    kept_bias: torch.Tensor | None = None
    scale: float = 1.0
    penalty: Penalty | None = None


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, drop: Drop, product: Product
    ) -> torch.Tensor:
        ctx.drop, ctx.product, ctx.dtype, ctx.bias_dtype = drop, product, x.dtype, None if bias is None else bias.dtype
        # A convolution's backward pass reads its input's shape in any case.
        needs_x = ctx.needs_input_grad[1] or product.kind == "conv2d"
        ctx.save_for_backward(x if needs_x else None, weight, drop.kept, drop.kept_bias)
        if bias is not None:
            bias = bias.to(x.dtype)
            bias = bias if drop.kept_bias is None else bias * drop.kept_bias * drop.scale
        return product.forward(x, _masked(weight, drop.kept, drop.scale, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, kept, kept_bias = ctx.saved_tensors
        drop = ctx.drop
        masked = _masked(weight, kept, drop.scale, ctx.dtype)
        grad_x, grad_weight, grad_bias = ctx.product.backward(grad, x, masked, ctx.needs_input_grad[:3])
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
            if kept is not None:
                grad_weight.mul_(kept)
            if drop.scale != 1:
                grad_weight.mul_(drop.scale)
            if drop.penalty is not None and (strength := drop.penalty.take()):
                grad_weight.add_(weight.sign(), alpha=strength)
        if grad_bias is not None:
            grad_bias = grad_bias.to(ctx.bias_dtype)
            if kept_bias is not None:
                grad_bias = grad_bias * kept_bias * drop.scale
        return grad_x, grad_weight, grad_bias, None, None


def dropped_product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, drop: Drop, product: Product
) -> torch.Tensor:
    """A layer's output with dropped weights; the gradient of what is dropped is exactly zero.

    Args:
        x: The input, [..., in] or [n, in, height, width].
        weight: In the layer's own layout. It is read alone.
        bias: [out], or None.
        drop: What is dropped.
        product: The layer's product.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):  # as autocast does for a dense layer
        with torch.autocast(device, enabled=False):
            return _Dropped.apply(x.to(torch.get_autocast_dtype(device)), weight, bias, drop, product)  # pyright: ignore
    return _Dropped.apply(x, weight, bias, drop, product)  # pyright: ignore[reportReturnType]


def _masked(weight: torch.Tensor, kept: torch.Tensor | None, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """The masked weight, good until the next call on this thread: on a CPU in one buffer for all layers, since the
    pages of fresh memory cost several times what the product does."""
    if kept is None:
        return weight.to(dtype)
    if weight.device.type != "cpu":
        masked = torch.empty_like(weight, dtype=dtype)
    else:
        buffers: dict[torch.dtype, torch.Tensor] = _scratch.__dict__.setdefault("buffers", {})
        buffer = buffers.get(dtype)
        if buffer is None or buffer.numel() < weight.numel():
            buffer = buffers[dtype] = torch.empty(weight.numel(), dtype=dtype)
        masked = buffer[: weight.numel()].as_strided(weight.shape, weight.stride())
    torch.mul(weight, kept, out=masked)
    return masked if scale == 1 else masked.mul_(scale)

"""Factorised layers: y = (x V) Uᵀ + b, the product U Vᵀ never formed.

One factor is the parameter `weight`, shaped [1, out, r]: model code that touches `weight` finds it (GPT-2's
`_init_weights`, T5's `wo.weight.dtype`), and no dense checkpoint fits it, so that transformers without hf_efx stops
with its size-mismatch error instead of guessing. Modules are swapped by their class, in place.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from hf_efx.core.model.swap import hook_kept, swap_class
from hf_efx.core.model.weight_view import WeightView


class FactorisedLayer(nn.Module):
    """What FactorisedLinear and FactorisedConv2d share.

    Attributes:
        weight: U, [1, out, r], the rows of all blocks on top of each other; [1, out, r, 1] in a convolution, where
            peft asks for four dimensions.
        factor_v: Vᵀ, [blocks * r, in]; for a convolution `in` is channels * kernel height * kernel width.
        rank: r, of one block.
        blocks: Number of stacked projections, each with factors of its own.
        factor_activation: Name of a nonlinearity between the factors, or None.
        dense_class: Name of the class that the module had before, "Linear", "Conv1D" or "Conv2d".
    """

    weight: nn.Parameter
    factor_v: nn.Parameter
    rank: int
    blocks: int
    factor_activation: str | None
    dense_class: str

    def factor_pairs(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """U [out / blocks, r] and V [in, r] of each block, as views of the parameters."""
        us = self.weight[0].flatten(1).chunk(self.blocks)
        vs = self.factor_v.chunk(self.blocks)
        return [(u, v.mT) for u, v in zip(us, vs, strict=True)]

    def product(self) -> torch.Tensor:
        """The dense matrix U Vᵀ, [out, in], in at least float32."""
        wide = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        with torch.no_grad():
            return torch.cat([u.to(wide) @ v.to(wide).mT for u, v in self.factor_pairs()])

    def extra_repr(self) -> str:
        """Shape, rank and blocks, for printing the model."""
        out_dim, rank = self.weight.shape[1:3]
        text = f"in={self.factor_v.shape[1]}, out={out_dim}, rank={rank}, bias={self.bias is not None}"
        text += f", blocks={self.blocks}" if self.blocks > 1 else ""
        return text + (f", factor_activation={self.factor_activation}" if self.factor_activation else "")


def factorised_linear(
    x: torch.Tensor, u: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, blocks: int, activation: str | None
) -> torch.Tensor:
    """(x V) Uᵀ + b, block by block: x [..., in], u [out, r], v [blocks * r, in] (Vᵀ), bias [out] -> [..., out]."""
    hidden = F.linear(x, v)
    if activation:
        hidden = ACT2FN[activation](hidden)
    if blocks == 1:
        return F.linear(hidden, u, bias)
    biases = (None,) * blocks if bias is None else bias.chunk(blocks)
    parts = zip(hidden.chunk(blocks, -1), u.chunk(blocks), biases, strict=True)
    return torch.cat([F.linear(h, w, b) for h, w, b in parts], -1)


def factorised_conv2d(
    conv: nn.Conv2d, x: torch.Tensor, u: torch.Tensor, v: torch.Tensor, activation: str | None
) -> torch.Tensor:
    """`conv` with U Vᵀ for its weight: u [out, r], v [r, in * kernel height * kernel width] (Vᵀ)."""
    hidden = conv._conv_forward(x, v.view(-1, conv.in_channels, *conv.kernel_size), None)
    if activation:
        hidden = ACT2FN[activation](hidden)
    bias = None if conv.bias is None else conv.bias.to(u.dtype)  # an adapter may be wider than its frozen base
    return F.conv2d(hidden, u[:, :, None, None], bias)


class FactorisedLinear(FactorisedLayer, nn.Linear):
    """Factorised Linear or Conv1D: x [..., in] -> [..., out]."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Returns (x V) Uᵀ + b, block by block."""
        # view, not indexing: the backward of an index fills a zero tensor of the whole shape first
        u = self.weight.view(self.weight.shape[1:])
        return factorised_linear(input, u, self.factor_v, self.bias, self.blocks, self.factor_activation)


class FactorisedConv2d(FactorisedLayer, nn.Conv2d):
    """Factorised Conv2d: r filters of the full kernel size, then a 1x1 convolution to the output channels."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Makes a dense convolution where arguments are given: peft builds a LoRA's own as `type(base_layer)(...)`.

        Factorised ones come from `factorise`, copies of them (without arguments) too.
        """
        return nn.Conv2d(*args, **kwargs) if args or kwargs else super().__new__(cls)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Returns the convolution by V, then by U, plus b: [B, in, H, W] -> [B, out, H', W']."""
        u = self.weight.view(self.weight.shape[1:3])
        return factorised_conv2d(self, input, u, self.factor_v, self.factor_activation)


_DENSE_CLASSES: dict[str, type[nn.Module]] = {"Linear": nn.Linear, "Conv1D": Conv1D, "Conv2d": nn.Conv2d}


def factorise(
    module: nn.Module,
    rank: int,
    blocks: int,
    factors: list[tuple[torch.Tensor, torch.Tensor]] | None,
    factor_activation: str | None = None,
) -> None:
    """Swaps a dense module for its factorised form, in place, keeping bias, dtype, device and requires_grad.

    Args:
        module: Linear, Conv1D or Conv2d.
        rank: r of each block.
        blocks: Number of stacked projections.
        factors: U [out / blocks, r] and V [in, r] of each block, or None to leave values for a checkpoint to fill.
        factor_activation: Name of a nonlinearity between the factors (of `transformers.activations.ACT2FN`).
    """
    view = WeightView(module, blocks)
    dense, dense_class = view.weight, type(module).__name__
    out_dim, in_dim = view.out_dim, view.in_dim
    u = torch.empty(1, out_dim, rank, dtype=dense.dtype, device=dense.device)
    v = torch.empty(blocks * rank, in_dim, dtype=dense.dtype, device=dense.device)
    if factors is not None and not dense.is_meta:
        u[0].copy_(torch.cat([f[0] for f in factors]))
        v.copy_(torch.cat([f[1].mT for f in factors]))
    with hook_kept(module):
        del module.weight
        swap_class(module, FactorisedConv2d if isinstance(module, nn.Conv2d) else FactorisedLinear)
        u = u.unsqueeze(-1) if isinstance(module, nn.Conv2d) else u
        module.weight = nn.Parameter(u, requires_grad=dense.requires_grad)
        module.factor_v = nn.Parameter(v, requires_grad=dense.requires_grad)
        attributes: dict[str, Any] = {
            "rank": rank,
            "blocks": blocks,
            "factor_activation": factor_activation,
            "dense_class": dense_class,
        }
        if dense_class == "Conv1D":  # a Linear from here on, to peft too
            attributes |= {"in_features": in_dim, "out_features": out_dim}
        for name, value in attributes.items():
            setattr(module, name, value)
        _put_bias_last(module)


def densify(module: nn.Module) -> None:
    """The reverse of `factorise`: a dense module of the former class with weight U Vᵀ, in place.

    Raises:
        ValueError: Where a nonlinearity stands between the factors, since no single matrix does the same.
    """
    assert isinstance(module, FactorisedLayer)
    if module.factor_activation:
        raise ValueError(
            f"factor_activation={module.factor_activation!r} stands between the factors: no dense matrix has the same "
            f"outputs, so such a layer can't be merged. Keep the checkpoint factorised."
        )
    factor = module.weight
    if factor.is_meta:
        matrix = torch.empty(factor.shape[1], module.factor_v.shape[1], device="meta")
    else:
        matrix = module.product()
    matrix = matrix.to(factor.dtype)
    if isinstance(module, nn.Conv2d):
        matrix = matrix.view(-1, module.in_channels, *module.kernel_size)
    elif module.dense_class == "Conv1D":
        matrix = matrix.mT.contiguous()
    with hook_kept(module):
        dense_class = _DENSE_CLASSES[module.dense_class]
        del module.weight, module.factor_v, module.rank, module.blocks, module.factor_activation
        if dense_class is Conv1D:
            del module.in_features, module.out_features  # pyright: ignore[reportAttributeAccessIssue]
        del module.dense_class
        swap_class(module, dense_class)
        module.weight = nn.Parameter(matrix, requires_grad=factor.requires_grad)
        _put_bias_last(module)


def _put_bias_last(module: nn.Module) -> None:
    """Keeps the usual order of parameters, which optimiser states go by."""
    module._parameters["bias"] = module._parameters.pop("bias")

"""One view of the weight of Linear, Conv1D and Conv2d: a matrix [out_dim, in_dim], whatever the module's layout.

transformers' Conv1D (GPT-2) stores its weight transposed; a convolution is the matrix [out, in * kh * kw] that acts on
its unfolded input; GPT-2's fused `c_attn` is three matrices on top of each other (`blocks`).
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

DENSE_TYPES: tuple[type[nn.Module], ...] = (nn.Linear, Conv1D, nn.Conv2d)


def is_factorised(module: nn.Module) -> bool:
    """Whether a method that changes the skeleton has put factors in the place of the module's weight."""
    return hasattr(module, "dense_class")


@dataclass(frozen=True)
class WeightView:
    """A module's weight as matrices.

    Attributes:
        module: A Linear, Conv1D or Conv2d.
        blocks: How many matrices of equal height stand on top of each other in the weight.
    """

    module: nn.Module
    blocks: int = 1

    def __post_init__(self) -> None:
        # A class that a training-time method put in its place holds the whole weight all the same.
        if getattr(self.module, "whole_class", type(self.module)) not in DENSE_TYPES:
            raise TypeError(f"WeightView takes Linear, Conv1D or Conv2d, got {type(self.module).__name__}.")
        if isinstance(self.module, nn.Conv2d) and self.module.groups != 1:
            raise ValueError(
                f"A Conv2d with groups={self.module.groups} is not one matrix: leave it out with exclude_modules."
            )
        if self.out_dim % self.blocks:
            raise ValueError(f"blocks={self.blocks} doesn't divide out_dim={self.out_dim}.")

    @property
    def weight(self) -> nn.Parameter:
        """The parameter itself, in the module's layout."""
        return self.module.weight  # pyright: ignore[reportReturnType]

    @property
    def transposed(self) -> bool:
        """True where the module stores [in, out]."""
        return isinstance(self.module, Conv1D)

    @property
    def out_dim(self) -> int:
        """Rows of the matrix: output features or channels, all blocks together."""
        return self.weight.shape[1 if self.transposed else 0]

    @property
    def in_dim(self) -> int:
        """Columns of the matrix: input features, or input channels * kernel height * kernel width."""
        return self.weight.numel() // self.out_dim

    @property
    def block_dim(self) -> int:
        """Rows of one block."""
        return self.out_dim // self.blocks

    def matrix(self) -> torch.Tensor:
        """The weight as [out_dim, in_dim], detached, to be read: a view, except for a channels-last convolution."""
        weight = self.weight.detach()
        return weight.t() if self.transposed else weight.reshape(self.out_dim, -1)

    def block_matrices(self) -> list[torch.Tensor]:
        """The blocks, each [block_dim, in_dim], to be read."""
        return list(self.matrix().split(self.block_dim))

    @torch.no_grad()
    def write(self, matrix: torch.Tensor) -> None:
        """Writes a matrix [out_dim, in_dim] into the module's weight, in its layout, dtype and memory format."""
        self.weight.copy_(matrix.t() if self.transposed else matrix.view(self.weight.shape))

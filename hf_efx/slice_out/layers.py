"""Modules that emit, read or pass on a slice of units while training, and are the dense ones otherwise.

A module is swapped by its class, in place: parameters, state-dict keys and hooks stay. The modules of one group of
units (the two layers of an FFN, the projections of an attention) share a `Span`, which draws their slice.
"""

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_efx.core.model.swap import hook_kept, swap_class
from hf_efx.slice_out import compiled
from hf_efx.slice_out.functional import length, sliced_conv2d, sliced_linear
from hf_efx.slice_out.schedule import Ranges, Slice
from hf_efx.slice_out.span import Span


class SlicedMember(nn.Module):
    """What the swapped classes share.

    Attributes:
        emits: The span whose slice this module emits, or None.
        reads: The span whose slice this module reads, or None; a module between two spans has both.
        blocks: How many times the span's units stand side by side in what is emitted or read.
        whole_class: The class that the module had before.
        efx_method: For `core.adapter`, which lets no other method change the module.
    """

    efx_method: ClassVar[str] = "slice_out"

    emits: Span | None
    reads: Span | None
    blocks: int
    whole_class: type[nn.Module]

    def out_ranges(self) -> Ranges | None:
        """The columns or channels that the module emits here and now, None for all."""
        if self.emits is None or not self.training:
            return None
        drawn = self.emits.current()
        return None if drawn is None else _ranges(drawn, _dims(self)[1], self.blocks)

    def in_ranges(self, width: int) -> Ranges | None:
        """The columns or channels that an input of this width holds, None for all.

        Readers go by their input, so that they follow the module that emits it, whatever mode they are in themselves.
        """
        dim = _dims(self)[0]
        if self.reads is None or width == dim:
            return None
        drawn = self.reads.current()
        ranges = None if drawn is None else _ranges(drawn, dim, self.blocks)
        if ranges is None or length(ranges) != width:
            now = "nothing" if ranges is None else str(length(ranges))
            raise RuntimeError(
                f"{self.reads.name}: a layer that reads {dim} columns was given {width}, while the slice of this "
                f"moment holds {now}. Run the backward pass before the step ends, and leave the step context alone "
                f"between the forward and the backward pass."
            )
        return ranges

    def read_scale(self, ranges: Ranges | None, like: torch.Tensor) -> float | torch.Tensor:
        """What the inputs in these ranges are multiplied by."""
        if ranges is None or self.reads is None:
            return 1.0
        unit = _dims(self)[0] // (self.blocks * self.reads.size)
        return self.reads.scale_for(length(ranges) // (unit * self.blocks), unit, self.blocks, like.device)

    def in_place(self) -> bool:
        """Whether the weight's gradient is to be written in place."""
        return any(span is not None and span.accumulate_in_place for span in (self.emits, self.reads))


def _ranges(drawn: Slice, dim: int, blocks: int) -> Ranges:
    return drawn.ranges(dim // (blocks * drawn.size), blocks)


class SlicedLinear(SlicedMember, nn.Linear):
    """Linear that emits and / or reads a slice."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """x [..., in or read] -> [..., out or emitted]."""
        if torch.compiler.is_compiling():
            y = compiled.linear(self, input, (self.in_features, self.out_features), transposed=False)
            return nn.Linear.forward(self, input) if y is None else y
        rows, columns = self.in_ranges(input.shape[-1]), self.out_ranges()
        if rows is None and columns is None:
            return nn.Linear.forward(self, input)
        return sliced_linear(
            input,
            self.weight,
            self.bias,
            in_ranges=rows,
            out_ranges=columns,
            scale=self.read_scale(rows, input),
            in_place=self.in_place(),
        )


class SlicedConv1D(SlicedMember, Conv1D):
    """transformers' Conv1D (GPT-2) that emits and / or reads a slice."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in or read] -> [..., out or emitted]."""
        if torch.compiler.is_compiling():
            y = compiled.linear(self, x, (self.nx, self.nf), transposed=True)
            return Conv1D.forward(self, x) if y is None else y
        rows, columns = self.in_ranges(x.shape[-1]), self.out_ranges()
        if rows is None and columns is None:
            return Conv1D.forward(self, x)
        return sliced_linear(
            x,
            self.weight,
            self.bias,
            in_ranges=rows,
            out_ranges=columns,
            transposed=True,
            scale=self.read_scale(rows, x),
            in_place=self.in_place(),
        )


class SlicedConv2d(SlicedMember, nn.Conv2d):
    """Conv2d that emits and / or reads a slice of channels."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Makes a dense convolution where arguments are given: peft builds a LoRA's own as `type(base_layer)(...)`."""
        return nn.Conv2d(*args, **kwargs) if args or kwargs else super().__new__(cls)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """x [(B,) in or read, H, W] -> [(B,) out or emitted, H', W']."""
        if torch.compiler.is_compiling():
            y = compiled.conv2d(self, input)
            return nn.Conv2d.forward(self, input) if y is None else y
        rows, columns = self.in_ranges(input.shape[-3]), self.out_ranges()
        if rows is None and columns is None:
            return nn.Conv2d.forward(self, input)
        return sliced_conv2d(self, input, in_ranges=rows, out_ranges=columns, scale=self.read_scale(rows, input))


class SlicedBatchNorm2d(SlicedMember, nn.BatchNorm2d):
    """BatchNorm2d that normalises the slice of channels it is given; weights and running statistics of the rest stay.

    In training mode it updates the running statistics of that slice alone: those of channels that are seldom kept are
    older.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """x [B, all or emitted, H, W] -> the same shape."""
        chosen = None
        if input.shape[1] != self.num_features and self.reads is not None:
            if not torch.compiler.is_compiling():
                self.in_ranges(input.shape[1])  # raises where the slice is gone
            unit = self.num_features // (self.blocks * self.reads.size)
            chosen = self.reads.index(unit, self.blocks, input.device)
        if chosen is None:
            return nn.BatchNorm2d.forward(self, input)
        momentum = self.momentum
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if momentum is None:  # a cumulative average
                momentum = 1.0 / float(self.num_batches_tracked)
        tensors = (self.running_mean, self.running_var, self.weight, self.bias)
        mean, var, weight, bias = (None if t is None else t.index_select(0, chosen) for t in tensors)
        by_batch = self.training or mean is None
        y = F.batch_norm(input, mean, var, weight, bias, by_batch, momentum or 0.0, self.eps)
        if self.training and mean is not None:
            with torch.no_grad():
                self.running_mean.index_copy_(0, chosen, mean)  # pyright: ignore
                self.running_var.index_copy_(0, chosen, var)  # pyright: ignore
        return y


SLICED: dict[type[nn.Module], type[SlicedMember]] = {
    nn.Linear: SlicedLinear,
    Conv1D: SlicedConv1D,
    nn.Conv2d: SlicedConv2d,
    nn.BatchNorm2d: SlicedBatchNorm2d,
}


def attach(module: nn.Module, role: Literal["emits", "reads", "channels"], span: Span, blocks: int = 1) -> None:
    """Makes a module a member of a span, by swapping its class in place.

    Args:
        module: A Linear, Conv1D, Conv2d or BatchNorm2d, or one that is a member already and takes a second role.
        role: "emits" the span's slice (an FFN's first layer; query, key and value), "reads" and scales it (an FFN's
            second layer; the attention's output projection), or, of a BatchNorm2d alone, passes on its "channels".
        span: The span.
        blocks: How many times the span's units stand side by side in the module's columns: 3 where query, key and
            value are fused, the number of heads where a span is the head's width.

    Raises:
        ValueError: If the module can't take this role, or its columns aren't `blocks * size` times a whole number.
    """
    dense = module.whole_class if isinstance(module, SlicedMember) else type(module)
    if dense not in SLICED:
        able = ", ".join(c.__name__ for c in SLICED)
        raise ValueError(f"{dense.__name__} can't be sliced: plain {able} can. Leave it out of the block.")
    if (dense is nn.BatchNorm2d) != (role == "channels"):
        raise ValueError(f"{dense.__name__}: a norm takes the role 'channels', other layers 'emits', 'reads' or both.")
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        raise ValueError(f"Conv2d with groups={module.groups}: grouped convolutions can't be sliced. Leave it out.")
    dim = _dims(module)[1 if role == "emits" else 0]
    if dim % (blocks * span.size):
        raise ValueError(
            f"{span.name}: {dense.__name__} has {dim} columns, not a multiple of {blocks} blocks * {span.size} units."
        )
    side = "emits" if role == "emits" else "reads"
    if not isinstance(module, SlicedMember):
        with hook_kept(module):
            swap_class(module, SLICED[dense])
        vars(module).update(emits=None, reads=None, blocks=blocks, whole_class=dense)
    elif module.blocks != blocks or getattr(module, side) is not None:
        raise ValueError(f"{dense.__name__} has this role already, or another number of blocks. Detach it first.")
    setattr(module, side, span)


def _dims(module: Any) -> tuple[int, int]:
    """Inputs and outputs (columns or channels) of a dense module."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    if isinstance(module, nn.Conv2d):
        return module.in_channels, module.out_channels
    return module.num_features, module.num_features


def detach(module: nn.Module) -> None:
    """The reverse of `attach`: the module has its former class again."""
    if not isinstance(module, SlicedMember):
        return
    with hook_kept(module):
        dense = module.whole_class
        del module.emits, module.reads, module.blocks, module.whole_class
        swap_class(module, dense)

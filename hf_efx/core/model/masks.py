"""Which weights and units are weakest: the one criterion of targeted dropout, pruning and prunability.

A weight matrix is [in, out] here: a column is an output unit, whatever the module's layout (Conv1D transposed, a
convolution [in * kh * kw, out]). Masks are boolean, True where a weight or unit is weak. A count is exact: where
magnitudes tie, those in front go first, so that the same model gives the same mask everywhere.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from hf_efx.core.model.weight_view import WeightView

SCOPES = ("column", "layer", "global")

_DIGIT = 16  # bits of a magnitude that one histogram resolves


def candidate_count(fraction: float, n: int) -> int:
    """floor(fraction * n), a product that misses a whole number by rounding counted as that number (0.29 * 100).

    Raises:
        ValueError: If the fraction isn't from 0 to 1.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction={fraction!r}: expected a share from 0 to 1.")
    return min(n, math.floor(fraction * n * (1 + 2**-50)))


def smallest(magnitudes: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` smallest entries of each column, exactly, of equal ones those in front.

    Args:
        magnitudes: [N, columns], not negative.
        count: How many, from 0 to N.

    Returns:
        Boolean [N, columns].

    Raises:
        ValueError: If the count is out of range or a magnitude is NaN.
    """
    rows = magnitudes.t().contiguous()  # kthvalue along strides is several times slower
    n = rows.shape[1]
    if not 0 <= count <= n:
        raise ValueError(f"count={count!r}: expected a number from 0 to {n}, the entries of a column.")
    if rows.isnan().any():
        raise ValueError("There are NaN magnitudes, which have no order.")
    if count in (0, n):
        return torch.full_like(rows, bool(count), dtype=torch.bool).t()
    threshold = rows.kthvalue(count, dim=1, keepdim=True).values
    mask = rows <= threshold
    tied = mask.sum(1) > count
    if tied.any():
        rows, threshold = rows[tied], threshold[tied]
        below, equal = rows < threshold, rows == threshold
        first = equal.cumsum(1) <= count - below.sum(1, keepdim=True)
        mask[tied] = below | (equal & first)
    return mask.t()


def magnitude_matrix(module: nn.Module) -> torch.Tensor:
    """|weight| of a Linear, Conv1D or Conv2d as [in, out], detached; a copy."""
    return WeightView(module).matrix().abs().t()


def in_weight_shape(matrix: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """A matrix [in, out] in the shape and memory order of the module's own weight: undoes `magnitude_matrix`."""
    view = WeightView(module)
    own = matrix if view.transposed else matrix.t().reshape(view.weight.shape)
    channels_last = own.ndim == 4 and view.weight.is_contiguous(memory_format=torch.channels_last)
    return own.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def weak_weights(modules: Mapping[str, nn.Module], fraction: float, scope: str = "column") -> dict[str, torch.Tensor]:
    """The weights of least magnitude.

    Args:
        modules: Linear, Conv1D and Conv2d by name.
        fraction: Share of the weights, rounded down to a whole number in each group of the scope.
        scope: "column": of each output unit's incoming weights; "layer": of each module's; "global": of all together.

    Returns:
        A boolean tensor for each module, in the shape of its own weight.

    Raises:
        ValueError: For an unknown scope, a fraction out of range, or NaN weights (the module is named).
    """
    if scope not in SCOPES:
        raise ValueError(f"scope={scope!r}: expected one of {', '.join(SCOPES)}.")
    if scope == "global":
        return _weakest_together(modules, fraction)
    if scope == "layer":
        return {name: _weakest_together({name: module}, fraction)[name] for name, module in modules.items()}
    result = {}
    for name, module in modules.items():
        magnitudes = magnitude_matrix(module)
        try:
            mask = smallest(magnitudes, candidate_count(fraction, magnitudes.shape[0]))
        except ValueError as error:
            raise ValueError(f"{name}.weight: {error}") from None
        result[name] = in_weight_shape(mask, module)
    return result


def _weakest_together(modules: Mapping[str, nn.Module], fraction: float) -> dict[str, torch.Tensor]:
    """The weakest of all weights of these modules, without a copy of them all."""
    views = {name: WeightView(module) for name, module in modules.items()}
    for name, view in views.items():
        if view.weight.isnan().any():
            raise ValueError(f"{name}.weight: There are NaN magnitudes, which have no order.")
    count = candidate_count(fraction, sum(view.weight.numel() for view in views.values()))
    masks = smallest_together(lambda: (view.matrix().abs() for view in views.values()), count)
    return {n: in_weight_shape(mask.t(), view.module) for (n, view), mask in zip(views.items(), masks, strict=True)}


def smallest_together(scores: Callable[[], Iterable[torch.Tensor]], count: int) -> Iterator[torch.Tensor]:
    """The `count` smallest of all scores together, exactly, of equal ones those in front.

    Nothing is sorted or copied as a whole: the score of that rank is found digit by digit, 16 bits each from the top,
    by a histogram of the digit over the scores that agree so far.

    Args:
        scores: Gives all scores piece by piece, the same whenever it is called (three or five times): finite, not
            negative, pieces of any shape and floating-point types.
        count: How many, from 0 to all of them.

    Yields:
        A boolean tensor for each piece, in its shape.
    """
    wide = any(piece.dtype == torch.float64 for piece in scores())
    threshold, ties = _rank(scores, count, wide) if count else (-1, 0)
    for piece in scores():
        bits = _bits(piece, wide)
        mask = bits < threshold
        if ties:
            equal = (bits == threshold).reshape(-1).nonzero()[:ties, 0]
            mask = mask.contiguous()
            mask.view(-1)[equal] = True
            ties -= len(equal)
        yield mask


def _rank(scores: Callable[[], Iterable[torch.Tensor]], rank: int, wide: bool) -> tuple[int, int]:
    """The score of a rank (1 is the smallest) as `_bits`, and how many of those equal to it are among the smallest."""
    prefix = 0
    for shift in range((64 if wide else 32) - _DIGIT, -1, -_DIGIT):
        histogram = torch.zeros(2**_DIGIT, dtype=torch.int64)
        for piece in scores():
            bits = _bits(piece, wide).reshape(-1) >> shift
            bits = bits[bits >> _DIGIT == prefix]
            histogram += torch.bincount(bits & (2**_DIGIT - 1), minlength=2**_DIGIT).cpu()
        below = histogram.cumsum(0)
        digit = int(torch.searchsorted(below, rank))
        rank -= int(below[digit] - histogram[digit])
        prefix = prefix << _DIGIT | digit
    return prefix, rank


def _bits(scores: torch.Tensor, wide: bool) -> torch.Tensor:
    """Scores as integers of the same order: IEEE numbers without a sign sort as their bits."""
    return scores.to(torch.float64 if wide else torch.float32).contiguous().view(torch.int64 if wide else torch.int32)


@dataclass(frozen=True)
class UnitGroup:
    """Units of which each is dropped or removed as one: features, channels, heads (of shared keys, their groups).

    Module names are from the model's root. `core/model/block_units.py` finds the groups of a model.

    Attributes:
        name: What the group is called: the name of its first emitter.
        kind: "mlp", "attention", "conv", or "layer": the output columns of one module, readers unknown.
        size: Number of units.
        emits: Modules whose outputs hold the units, with how many times the units stand side by side there (3 in
            GPT-2's fused query, key and value).
        norms: Batch norms between emitters and readers.
        reads: Modules whose inputs hold the units once.
    """

    name: str
    kind: str
    size: int
    emits: Mapping[str, int]
    norms: tuple[str, ...] = ()
    reads: tuple[str, ...] = field(default=())

    @property
    def members(self) -> list[str]:
        """Names of all modules that hold something of the units."""
        return [*self.emits, *self.norms, *self.reads]


def unit_columns(mask: torch.Tensor, dim: int, stacked: int = 1) -> torch.Tensor:
    """A value for each unit spread over the columns that hold the units: [size] -> [dim].

    Args:
        mask: [size].
        dim: Columns: `stacked` times the units, each as wide as goes in.
        stacked: How many times the units stand side by side.
    """
    return mask.repeat_interleave(dim // (stacked * mask.shape[0])).repeat(stacked)


def unit_norms(modules: Mapping[str, nn.Module], group: UnitGroup) -> torch.Tensor:
    """The L2 norm of each unit's columns, over all its emitters, without biases: float32 (of float64: that) [size].

    Args:
        modules: At least the group's emitters, by name, such as `dict(model.named_modules())`.
        group: The units.

    Raises:
        ValueError: If one is NaN.
    """
    total = torch.zeros(())
    for name, stacked in group.emits.items():
        rows = WeightView(modules[name]).matrix()
        squares = rows.to(torch.promote_types(rows.dtype, torch.float32)).square().sum(1)
        total = total.to(squares.device) + squares.view(stacked, group.size, -1).sum((0, 2))
    if total.isnan().any():
        raise ValueError(f"{group.name}: There are NaN weights, whose units have no order.")
    return total.sqrt()


def weak_units(
    modules: Mapping[str, nn.Module], groups: Iterable[UnitGroup], fraction: float, scope: str = "layer"
) -> dict[str, torch.Tensor]:
    """The units of least norm (`unit_norms`).

    Args:
        modules: The groups' emitters by name, such as `dict(model.named_modules())`.
        groups: The groups of units (`core/model/block_units.py`).
        fraction: Share of the units, rounded down to a whole number in each group of the scope.
        scope: "layer": of each group's units; "column": the same, since a unit is a column; "global": of all units
            together. Then norms of layers with unequally many inputs compete.

    Returns:
        A boolean tensor [size] for each group by its name.

    Raises:
        ValueError: For an unknown scope, a fraction out of range, or NaN weights.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope={scope!r}: expected one of {', '.join(SCOPES)}.")
    norms = {group.name: unit_norms(modules, group) for group in groups}
    if scope != "global":
        return {name: _smallest_of(values, fraction) for name, values in norms.items()}
    device = next(iter(norms.values())).device if norms else None
    together = _smallest_of(torch.cat([values.double().to(device) for values in norms.values()]), fraction)
    parts = together.split([len(values) for values in norms.values()])
    return {name: part.to(norms[name].device) for name, part in zip(norms, parts, strict=True)}


def _smallest_of(values: torch.Tensor, fraction: float) -> torch.Tensor:
    return smallest(values[:, None], candidate_count(fraction, len(values)))[:, 0]

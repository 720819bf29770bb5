"""Which units a slice holds, how often, and how the rate moves over training. Pure functions and plain values.

Notin et al. 2020, arXiv 2007.10909: of n units w = (1 - p) n neighbours are kept, from a random start on. Units are
counted, not columns: a unit may be a hidden column, a channel, a head, or a group of heads.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

STARTS = ("aligned", "all", "circular")
NORMALIZATIONS = ("flow", "probabilistic")

# A compiled model has a graph for each width, and torch.compile gives a function up that has more than 8 by default.
RAMP_STAIRS = 4

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Slice:
    """`width` neighbouring units of `size`, from `start` on; past the end it goes on at 0.

    Attributes:
        start: First unit, from 0 to size - 1.
        width: Number of units that are kept.
        size: Number of units that there are.
    """

    start: int
    width: int
    size: int

    @property
    def pieces(self) -> Ranges:
        """The units as one (start, stop), or, wrapped, as two in ascending order."""
        stop = self.start + self.width
        if stop <= self.size:
            return ((self.start, stop),)
        return (0, stop - self.size), (self.start, self.size)

    def ranges(self, unit: int = 1, blocks: int = 1) -> Ranges:
        """The slice along a dimension of `blocks * size * unit` columns, the same units in each block.

        Args:
            unit: Columns of one unit.
            blocks: How many times the `size` units stand side by side (3 in GPT-2's fused query, key and value).

        Returns:
            (start, stop) pairs in ascending order, none touching the next: a wrapped slice's end in one block and its
            beginning in the next are one piece.
        """
        merged: list[tuple[int, int]] = []
        for block in range(blocks):
            for start, stop in self.pieces:
                start, stop = (block * self.size + start) * unit, (block * self.size + stop) * unit
                if merged and merged[-1][1] == start:
                    start = merged.pop()[0]
                merged.append((start, stop))
        return tuple(merged)


def slice_width(size: int, rate: float, align: int = 1) -> int:
    """w = (1 - rate) * size, rounded to the nearest multiple of `align` (halves up); size itself at rate 0.

    Raises:
        ValueError: If the rate is out of range, or rounding leaves nothing, or drops nothing.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate={rate!r}: expected a share of units to drop, from 0 to below 1.")
    if align < 1:
        raise ValueError(f"align={align!r}: expected a number of units of 1 or more.")
    if rate == 0:
        return size
    width = rounded_width(size, rate, align)
    if not 0 < width < size:
        reached = "drops nothing" if width else "leaves nothing"
        raise ValueError(
            f"rate={rate!r} of {size} units rounds to a width of {width} at align={align}, which {reached}. The "
            f"widths within reach are the multiples of {align} below {size}: use a smaller align or another rate."
        )
    return width


def rounded_width(size: int, rate: float, align: int) -> int:
    """As `slice_width`, without the checks: a ramp's small rates may round to no drop at all. At most size."""
    return min(size, align * math.floor((1 - rate) * size / align + 0.5))


def start_positions(size: int, width: int, starts: str = "aligned", align: int = 1) -> range | tuple[int, ...]:
    """The eligible starts, each drawn with the same probability.

    Args:
        size: Number of units.
        width: Units that are kept.
        starts: "aligned": the multiples of `align`, and the last start that fits, so that every unit has its turn;
            "all": every start that fits; "circular": every multiple of `align` (where that doesn't divide `size`, of
            their greatest common divisor), wrapping round, so that all units are kept equally often.
        align: Step of the starts, in units.

    Raises:
        ValueError: If `starts` is unknown, or the width isn't from 1 to size.
    """
    if not 1 <= width <= size:
        raise ValueError(f"width={width!r}: expected 1 to {size}, the number of units.")
    last = size - width
    if last == 0:
        return range(1)
    if starts == "all":
        return range(last + 1)
    if starts == "circular":
        return range(0, size, math.gcd(size, align))
    if starts == "aligned":
        positions = range(0, last + 1, align)
        return positions if positions[-1] == last else (*positions, last)
    raise ValueError(f"starts={starts!r}: expected one of {', '.join(STARTS)}.")


def inclusion_probability(size: int, width: int, starts: str = "aligned", align: int = 1) -> torch.Tensor:
    """π_j, how probable it is that unit j is kept: [size], float64.

    With all starts π_j = (min(j, n - w) - max(0, j - w + 1) + 1) / (n - w + 1): where more than half is kept, the
    units in the middle are never dropped. Circular starts give w / n everywhere.
    """
    positions = start_positions(size, width, starts, align)
    first = torch.zeros(2 * size + 1, dtype=torch.float64)
    begins = torch.tensor(list(positions))
    first[begins] += 1
    first[begins + width] -= 1  # starts are distinct, hence so are the ends
    kept = first.cumsum(0)[: 2 * size].view(2, size).sum(0)
    return kept / len(positions)


def scale(
    size: int, width: int, normalization: str = "flow", starts: str = "aligned", align: int = 1
) -> float | torch.Tensor:
    """What kept units are multiplied by: a number where it is the same for all, else [size], float64.

    "flow": n / w, as dropout's 1 / (1 - p). It keeps the sum's size, yet units that are seldom kept count for less in
    expectation. "probabilistic": 1 / π_j, so that each unit's expectation is what it is without slices.

    Raises:
        ValueError: If `normalization` is unknown.
    """
    if normalization == "flow":
        return size / width
    if normalization != "probabilistic":
        raise ValueError(f"normalization={normalization!r}: expected one of {', '.join(NORMALIZATIONS)}.")
    inverse = 1 / inclusion_probability(size, width, starts, align)
    return float(inverse[0]) if bool((inverse == inverse[0]).all()) else inverse


def draw_slice(size: int, width: int, starts: str = "aligned", align: int = 1, *, generator: torch.Generator) -> Slice:
    """A slice whose start is drawn uniformly over the eligible ones."""
    positions: Sequence[int] = start_positions(size, width, starts, align)
    drawn = torch.randint(len(positions), (), generator=generator, device=generator.device)
    return Slice(positions[int(drawn)], width, size)


@dataclass
class RateSchedule:
    """How the rate moves over training: up from 0 in a ramp, and 0 again in the last steps.

    Attributes:
        ramp_steps: Steps in which the rate rises from 0 to its value, in `RAMP_STAIRS` stairs.
        final_dense_steps: Last steps, trained without slices.
        max_steps: Length of the training; may be set when it is known.
    """

    ramp_steps: int = 0
    final_dense_steps: int = 0
    max_steps: int | None = None

    def check_length(self, max_steps: int | None = None) -> None:
        """Refuses a run without any sliced step.

        Args:
            max_steps: Length of the training, in the place of the attribute.

        Raises:
            ValueError: If the ramp, or the dense end, takes all steps of a training whose length is known.
        """
        length = self.max_steps if max_steps is None else max_steps
        if length is None:
            return
        last = length - self.final_dense_steps - 1
        if last < 0 or not self.factor(last, length):
            raise ValueError(
                f"ramp_steps={self.ramp_steps}, final_dense_steps={self.final_dense_steps} leave no sliced step of "
                f"max_steps={length}: lower them, or train longer."
            )

    def factor(self, step: int, max_steps: int | None = None) -> float:
        """What the rate is multiplied by at optimizer step `step` (from 0), from 0 to 1.

        Args:
            step: From 0.
            max_steps: Length of the training, in the place of the attribute.

        Raises:
            ValueError: If there are final dense steps and the length of the training isn't known.
        """
        if self.final_dense_steps:
            last = self.max_steps if max_steps is None else max_steps
            if last is None:
                raise ValueError(
                    f"final_dense_steps={self.final_dense_steps}: the length of the training isn't known. EfxTrainer "
                    f"and SliceOutCallback say it; in a loop of your own set max_steps of the step context."
                )
            if step >= last - self.final_dense_steps:
                return 0.0
        if step >= self.ramp_steps:
            return 1.0
        return (step * RAMP_STAIRS // self.ramp_steps) / RAMP_STAIRS

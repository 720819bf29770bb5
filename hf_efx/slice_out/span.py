"""Span: a group of units of which one slice is kept at a time, and its slice of the moment for compiled graphs."""

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch

from hf_efx.core.training.step_context import StepContext
from hf_efx.slice_out.schedule import (
    RateSchedule,
    Slice,
    draw_slice,
    rounded_width,
    scale,
    slice_width,
    start_positions,
)

# Operators of a compiled graph take numbers and tensors alone, so there spans go by number.
_SPANS: "WeakValueDictionary[int, Span]" = WeakValueDictionary()
_NUMBERS = itertools.count(1)


def _register(span: "Span") -> int:
    """A number for the span, under which operators find it while it lives."""
    number = next(_NUMBERS)
    _SPANS[number] = span
    return number


class Span:
    """A group of units of which one slice is kept at a time, shared by the modules that emit and read it.

    Args:
        name: Under which its starts are drawn: spans of one name and shape draw alike.
        size: Number of units: hidden columns, channels, heads, or groups of heads. Members find out themselves how
            many columns of theirs a unit has.
        rate: Share of the units that is dropped, from 0 to below 1.
        context: Where the run is, and its random numbers.
        kind: "mlp", "attention" or "conv", for reports.
        starts: "aligned", "all" or "circular", see `schedule.start_positions`.
        align: Multiple, in units, of width and aligned starts.
        normalization: "flow" or "probabilistic", see `schedule.scale`. The modules that read apply it.
        shared: True for one slice on all processes, False for one of each process' own.
        schedule: How the rate moves over training; one object serves all spans of a model.
        accumulate_in_place: Write gradients of linear members into `weight.grad` directly; refused where hooks or
            distributed training would be bypassed. Under torch.compile they take the normal way.

    Attributes:
        width: Units that are kept at the rate of the last `refresh`; what compiled graphs go by.

    Raises:
        ValueError: If no such slice exists.
    """

    def __init__(
        self,
        name: str,
        size: int,
        rate: float,
        context: StepContext,
        *,
        kind: str = "mlp",
        starts: str = "aligned",
        align: int = 1,
        normalization: str = "flow",
        shared: bool = False,
        schedule: RateSchedule | None = None,
        accumulate_in_place: bool = False,
    ) -> None:
        self.name, self.size, self.rate, self.context, self.kind = name, size, rate, context, kind
        self.starts, self.align, self.normalization, self.shared = starts, align, normalization, shared
        self.schedule = schedule or RateSchedule()
        self.accumulate_in_place = accumulate_in_place
        try:
            width = slice_width(size, rate, align)
            start_positions(size, width, starts, align)
            scale(size, width, normalization, starts, align)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        self.width = width
        self.number = _register(self)
        self._drawn: tuple[int, int, Slice] | None = None
        self._scales: dict[Any, float | torch.Tensor] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, or what was unpickled, is a span of its own."""
        self.__dict__.update(state)
        self.number = _register(self)

    def refresh(self) -> None:
        """Takes the step's width over for compiled models: to be called at the beginning of a step if a rate moves."""
        self.width = self.width_at(self.context.step)

    def width_at(self, step: int) -> int:
        """Units that are kept at optimizer step `step`; `size` where nothing is dropped."""
        rate = self.rate * self.schedule.factor(step, self.context.max_steps)
        # The ramp's first rates may round to no drop, but none to less than the final width.
        return max(rounded_width(self.size, rate, self.align), slice_width(self.size, self.rate, self.align))

    def current(self) -> Slice | None:
        """The slice of this micro-step, the same however often it is asked for; None where nothing is dropped."""
        seed = self.context.seed_for(self.name, shared=self.shared)
        if seed is None or self.rate == 0:
            return None
        step = self.context.step
        if self._drawn is None or self._drawn[:2] != (seed, step):
            width = self.width_at(step)
            generator = torch.Generator().manual_seed(seed)
            self._drawn = seed, step, draw_slice(self.size, width, self.starts, self.align, generator=generator)
        drawn = self._drawn[2]
        return drawn if drawn.width < self.size else None

    def kept(self) -> int | None:
        """How many units are kept here and now, None for all; under torch.compile too."""
        if torch.compiler.is_compiling():
            return self.width if self.context.active and self.width < self.size else None
        drawn = self.current()
        return None if drawn is None else drawn.width

    def index(self, unit: int, blocks: int, device: torch.device) -> torch.Tensor | None:
        """The columns that are kept here and now, int64 [blocks * kept * unit], None for all; compiled too."""
        kept = self.kept()
        return None if kept is None else slice_columns(self.number, kept, unit, blocks, device)

    def scale_for(self, width: int, unit: int, blocks: int, device: torch.device) -> float | torch.Tensor:
        """What the readers multiply their inputs by: a number, or a tensor of all `blocks * size * unit` columns."""
        key = width, unit, blocks, device
        if key not in self._scales:
            value = scale(self.size, width, self.normalization, self.starts, self.align)
            if isinstance(value, torch.Tensor):
                value = value.repeat_interleave(unit).repeat(blocks).to(device, torch.float32)
            self._scales[key] = value
        return self._scales[key]


def _drawn(number: int, width: int) -> Slice:
    span = _SPANS[number]
    drawn = span.current()
    now = span.size if drawn is None else drawn.width
    if drawn is None or now != width:
        raise RuntimeError(
            f"{span.name}: compiled for a width of {width}, while {now} of {span.size} units are due. A rate that "
            f"moves needs Span.refresh() at the beginning of each step, which SliceOutCallback and EfxTrainer call."
        )
    return drawn


# Tagged, so that no pass takes them for constants.
@torch.library.custom_op("hf_efx::slice_start", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def slice_start(span: int, width: int) -> torch.Tensor:
    """The start of a span's slice of this moment, int64 [], on the CPU."""
    return torch.tensor(_drawn(span, width).start)


@slice_start.register_fake
def _(span: int, width: int) -> torch.Tensor:
    return torch.empty((), dtype=torch.int64)


@torch.library.custom_op("hf_efx::slice_columns", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def slice_columns(span: int, width: int, unit: int, blocks: int, device: torch.device) -> torch.Tensor:
    """The columns that a span's slice of this moment holds, int64 [blocks * width * unit]."""
    ranges = _drawn(span, width).ranges(unit, blocks)
    return torch.cat([torch.arange(start, stop, device=device) for start, stop in ranges])


@slice_columns.register_fake
def _(span: int, width: int, unit: int, blocks: int, device: torch.device) -> torch.Tensor:
    return torch.empty(blocks * width * unit, dtype=torch.int64, device=device)


@torch.library.custom_op("hf_efx::slice_scale", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def slice_scale(span: int, width: int, unit: int, blocks: int, device: torch.device) -> torch.Tensor:
    """What these columns are multiplied by, float32 [blocks * width * unit]."""
    scale = _SPANS[span].scale_for(width, unit, blocks, device)
    if not isinstance(scale, torch.Tensor):
        return torch.full((blocks * width * unit,), scale, device=device)
    return torch.cat([scale[start:stop] for start, stop in _drawn(span, width).ranges(unit, blocks)])


@slice_scale.register_fake
def _(span: int, width: int, unit: int, blocks: int, device: torch.device) -> torch.Tensor:
    return torch.empty(blocks * width * unit, dtype=torch.float32, device=device)

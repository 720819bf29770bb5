"""SliceOutCallback: SliceOut under any Trainer, with the widths and the time saved in its logs."""

import time
from statistics import fmean
from typing import Any

from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_efx.core.training.step_context import StepContextCallback
from hf_efx.core.training.step_cost import TrainingClock
from hf_efx.slice_out.apply import spans_of
from hf_efx.slice_out.report import Passes, output_loss
from hf_efx.slice_out.span import Span


class SliceOutCallback(StepContextCallback):
    """Moves the slices of a model along with a Trainer and logs what they save (docs/metrics.md).

    An EfxTrainer moves them without it; there it adds the figures alone.

    Args:
        measure_time: Whether to time the first micro-batch after the run's first step, six forward and backward
            passes, dense and sliced in turn; the figures on time come from it. It changes nothing of the training.
        clock: A clock of the same Trainer that isn't to count this measurement.

    Raises:
        ValueError: When training begins, if the model has no slices, the run asks for a KV cache, or time can't be
            measured; at its first step, if it would have no sliced one.
    """

    def __init__(self, measure_time: bool = False, clock: TrainingClock | None = None) -> None:
        super().__init__()
        self.measure_time, self.clock = measure_time, clock
        self.spans: list[Span] = []
        self._batch: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._hook: Any = None
        self._times: tuple[float, float] | None = None
        self._saved = 0.0
        self._micro_steps = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Finds the slices, checks that the run suits them, and waits for the first batch."""
        super().on_train_begin(args, state, control, **kwargs)
        model = kwargs["model"]
        self.spans = spans_of(model)
        if not self.spans or self.context is None:
            raise ValueError(
                "SliceOutCallback: the model has no slices. Call get_efx_model(model, SliceOutConfig(...)) first, or "
                "get_efx_model(model) where config.efx names them."
            )
        if args.use_cache:
            raise ValueError(
                "use_cache=True: SliceOut keeps other heads at each step, so that a KV cache of one fits no other. "
                "Leave it at False; generation and evaluation use their own."
            )
        if self.measure_time and (args.fsdp or args.deepspeed or args.torch_compile):
            raise ValueError(
                "SliceOutCallback(measure_time=True): passes can't be timed where parameters are sharded (fsdp, "
                "deepspeed) or under torch_compile=True. Leave measure_time at False."
            )
        self._batch, self._times, self._saved, self._micro_steps = None, None, 0.0, 0
        if self._hook is not None:  # of a training that was cut off
            self._hook.remove()
        self._hook = model.register_forward_pre_hook(self._keep_batch, with_kwargs=True) if self.measure_time else None

    def _keep_batch(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keeps the first batch of a training step; a selecting Trainer scores outside of steps."""
        if self._batch is None and model.training and self.context is not None and self.context.active:
            self._batch = args, kwargs

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begins a step."""
        super().on_step_begin(args, state, control, **kwargs)
        self._micro_steps = 1

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Goes on to the next micro-batch."""
        super().on_substep_end(args, state, control, **kwargs)
        self._micro_steps += 1

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ends the step; after the first one, times its batch."""
        super().on_step_end(args, state, control, **kwargs)
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
            self._measure(kwargs["model"])
        if self._times is not None and self.context is not None:
            dense, sliced = self._times
            place = self.context.step, self.context.max_steps
            share = fmean(span.schedule.factor(*place) for span in self.spans)
            self._saved += (dense - sliced) * self._micro_steps * share

    def _measure(self, model: nn.Module) -> None:
        if self._batch is None:
            return
        (args, kwargs), self._batch = self._batch, None
        start = time.perf_counter()
        passes = Passes(model, lambda: output_loss(model(*args, **kwargs)))
        with passes.undisturbed():
            self._times = passes.seconds(rounds=2)
        if self.clock is not None:
            self.clock.leave_out(time.perf_counter() - start)

    def metrics(self) -> dict[str, float]:
        """The share of units that the last step kept, by kind of block, and the time saved."""
        if self.context is None or not self.spans:
            return {}
        shares: dict[str, list[float]] = {}
        for span in self.spans:
            shares.setdefault(span.kind, []).append(span.width_at(self.context.step) / span.size)
        result = {f"slice_out/{kind}_width": sum(values) / len(values) for kind, values in shares.items()}
        if self._times is not None:
            result["slice_out/time_ratio"] = self._times[1] / self._times[0]
            result["slice_out/seconds_saved"] = self._saved
        return result

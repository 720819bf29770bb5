"""What slices save on a batch: FLOPs, bytes of saved activations and time, as widths predict them and as measured.

The measurements leave parameters, gradients, buffers, random state and the step context as they were.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from hf_efx.core.training.step_context import step_context
from hf_efx.slice_out.apply import spans_of
from hf_efx.slice_out.layers import SlicedMember
from hf_efx.slice_out.schedule import RateSchedule
from hf_efx.slice_out.span import Span

# Matrix products, convolutions and attention kernels, forward and backward.
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_dot_product", "aten::convolution")
PRODUCTS += ("aten::mkldnn_convolution", "aten::cudnn_convolution", "aten::_slow_conv2d", "aten::thnn_conv2d")

Loss = Callable[[nn.Module, Any], torch.Tensor]


@dataclass(frozen=True)
class BlockReport:
    """One group of units.

    Attributes:
        name: Name of the first module that emits them.
        kind: "mlp", "attention" or "conv".
        size: Units.
        width: Units that a step keeps, at the full rate.
    """

    name: str
    kind: str
    size: int
    width: int


@dataclass(frozen=True)
class SliceOutReport:
    """What slices save in one forward and backward pass of one batch, at the full rate.

    Attributes:
        blocks: One row for each group of units.
        dense_flops: Of the dense model, by torch's FlopCounterMode, attention in its eager form.
        flops: With slices.
        product_share: Share of the dense pass' time inside matrix products, by torch's profiler.
        dense_seconds: Median time of the dense model, its dropouts on sliced blocks off.
        predicted_seconds: The time floor: the dense time outside products, plus that inside times the FLOP ratio.
        seconds: Median time with slices.
        dense_bytes: Storages that autograd keeps for the dense backward, without parameters and buffers.
        predicted_bytes: What is left of them where those between emitters and readers shrink by width / size.
        bytes: With slices.
    """

    blocks: list[BlockReport]
    dense_flops: int
    flops: int
    product_share: float
    dense_seconds: float
    predicted_seconds: float
    seconds: float
    dense_bytes: int
    predicted_bytes: int
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{'block':52} {'kind':>9} {'units':>6} {'kept':>6}"]
        lines += [f"{row.name:52} {row.kind:>9} {row.size:6d} {row.width:6d}" for row in self.blocks]
        lines.append(f"{'one forward and backward':32} {'dense':>12} {'predicted':>12} {'measured':>12} {'ratio':>6}")
        for name, dense, predicted, measured in (
            ("FLOPs", self.dense_flops, None, self.flops),
            ("seconds", self.dense_seconds, self.predicted_seconds, self.seconds),
            ("bytes of saved activations", self.dense_bytes, self.predicted_bytes, self.bytes),
        ):
            expected = "" if predicted is None else f"{predicted:,.4g}"
            lines.append(f"{name:32} {dense:12,.4g} {expected:>12} {measured:12,.4g} {measured / dense:6.2f}")
        return "\n".join(lines)


def slice_out_report(model: nn.Module, batch: Any, *, loss: Loss | None = None, rounds: int = 3) -> SliceOutReport:
    """Measures what slices save on a batch.

    Args:
        model: A model with SliceOut on. It is run in training mode, and left as it was.
        batch: What it trains on: keyword arguments (a mapping), positional ones (a tuple), or one.
        loss: From (model, batch) to a scalar; None for the output's own `loss`, or the mean of its squared values.
        rounds: Timed passes, dense and sliced in turn; medians are reported.

    Raises:
        ValueError: If the model has no slices.
    """
    spans = spans_of(model)
    if not spans:
        raise ValueError(
            "slice_out_report: the model has no slices. Call get_efx_model(model, SliceOutConfig(...)) first, or "
            "get_efx_model(model) after loading."
        )
    passes = Passes(model, lambda: loss(model, batch) if loss else output_loss(_call(model, batch)))
    with passes.undisturbed():
        dense, sliced = passes.seconds(rounds)
        dense_bytes, predicted_bytes = passes.saved_bytes(sliced=False)
        share = passes.product_share()
        flops = [passes.flops(sliced=sliced_too) for sliced_too in (False, True)]
        return SliceOutReport(
            blocks=[BlockReport(s.name, s.kind, s.size, s.width_at(0)) for s in spans],
            dense_flops=flops[0],
            flops=flops[1],
            product_share=share,
            dense_seconds=dense,
            predicted_seconds=dense * (1 - share + share * flops[1] / max(1, flops[0])),
            seconds=sliced,
            dense_bytes=dense_bytes,
            predicted_bytes=predicted_bytes,
            bytes=passes.saved_bytes(sliced=True)[0],
        )


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def output_loss(output: Any) -> torch.Tensor:
    """The loss in a model's output, or the mean of the squares of its first tensor."""
    own = output.get("loss") if isinstance(output, Mapping) else None
    if own is not None:
        return own
    while not isinstance(output, torch.Tensor):
        output = next(iter(output.values() if isinstance(output, Mapping) else output))
    return output.float().square().mean()


class Passes:
    """Forward and backward passes of a model, dense and sliced, that leave no trace inside `undisturbed()`.

    Args:
        model: A model with SliceOut on.
        loss: Runs it forward, to a scalar.
    """

    def __init__(self, model: nn.Module, loss: Callable[[], torch.Tensor]) -> None:
        context = step_context(model)
        assert context is not None
        self.model, self.loss, self.context = model, loss, context
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    def run(self, sliced: bool) -> None:
        """One pass. Gradients are computed and dropped, without touching `.grad` or any hook."""
        self.context.begin_step(self.context.step + 1)
        with nullcontext() if sliced else self.context.disabled():
            self._gradients()

    def _gradients(self) -> None:
        torch.autograd.grad(self.loss(), self.parameters, allow_unused=True)

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Puts everything back that the passes move, and slices at the full rate meanwhile."""
        spans = spans_of(self.model)
        modes = {module: module.training for module in self.model.modules()}
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        settings = [(span, span.schedule, span.accumulate_in_place, span.width) for span in spans]
        place = dict(vars(self.context))
        devices = {p.device for p in self.model.parameters() if p.device.type == "cuda"}
        with torch.random.fork_rng(devices=list(devices)):
            try:
                for span in spans:
                    span.schedule, span.accumulate_in_place = RateSchedule(), False
                self.model.train()
                yield
            finally:
                for span, schedule, in_place, width in settings:
                    span.schedule, span.accumulate_in_place, span.width = schedule, in_place, width
                for module, training in modes.items():
                    module.training = training
                with torch.no_grad():
                    for name, buffer in self.model.named_buffers():
                        buffer.copy_(buffers[name])
                vars(self.context).update(place)

    def seconds(self, rounds: int) -> tuple[float, float]:
        """Median seconds of a dense and of a sliced pass, after one of each to warm up."""
        times: dict[bool, list[float]] = {False: [], True: []}
        for i in range(rounds + 1):
            for sliced in times:
                _wait()
                start = time.perf_counter()
                self.run(sliced)
                _wait()
                if i:
                    times[sliced].append(time.perf_counter() - start)
        return statistics.median(times[False]), statistics.median(times[True])

    def flops(self, sliced: bool) -> int:
        """FLOPs of a pass."""
        with _eager_attention(self.model), FlopCounterMode(display=False) as counter:
            self.run(sliced)
        return counter.get_total_flops()

    def product_share(self) -> float:
        """Share of the dense pass' time inside matrix products."""
        cuda = torch.cuda.is_available() and any(p.is_cuda for p in self.parameters)
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
        with profile(activities=activities) as profiler:
            self.run(sliced=False)
            _wait()
        inside = total = 0.0
        for event in profiler.key_averages():
            spent = event.self_device_time_total if cuda else event.self_cpu_time_total
            total += spent
            inside += spent if event.key.startswith(PRODUCTS) else 0.0
        return inside / total

    def saved_bytes(self, sliced: bool) -> tuple[int, int]:
        """Bytes of the storages that autograd keeps for the backward pass, and those left at the spans' widths."""
        own = [*self.model.parameters(), *self.model.buffers()]
        seen = {tensor.untyped_storage().data_ptr() for tensor in own}
        total, left = 0, 0.0
        open_spans: list[Span] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal total, left
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                total += storage.nbytes()
                span = open_spans[-1] if open_spans else None
                left += storage.nbytes() * (span.width_at(0) / span.size if span else 1)
            return tensor

        with _between_members(self.model, open_spans), saved_tensors_hooks(pack, lambda tensor: tensor):
            self.run(sliced)
        return total, round(left)


@contextmanager
def _between_members(model: nn.Module, open_spans: list[Span]) -> Iterator[None]:
    """Keeps in a list, during a forward, the spans that have been emitted and not yet been read."""

    def after(module: nn.Module, *_: Any) -> None:
        if isinstance(module, SlicedMember) and not isinstance(module, nn.BatchNorm2d):
            if module.reads in open_spans:
                open_spans.remove(module.reads)
            if module.emits is not None and module.emits not in open_spans:
                open_spans.append(module.emits)

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, SlicedMember):
                stack.callback(module.register_forward_hook(after).remove)
        yield


@contextmanager
def _eager_attention(model: nn.Module) -> Iterator[None]:
    """Attention of its eager form, the one whose products torch counts on every device."""
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if not isinstance(model, PreTrainedModel) or implementation in (None, "eager"):
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(implementation)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()

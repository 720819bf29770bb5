"""Members of a span beside the masked dense model: blocks, recomputation, autocast, compilation, kept bytes."""

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from hf_efx.core.training.step_context import StepContext
from hf_efx.slice_out.layers import attach, detach
from hf_efx.slice_out.schedule import RateSchedule
from hf_efx.slice_out.span import Span

WIDTH, HEADS = 12, 4


class Block(nn.Module):
    """A block with one group of units, whose dense forward can mask that group."""

    def mask(self, h: torch.Tensor, factors: torch.Tensor | None, dim: int = -1) -> torch.Tensor:
        return h if factors is None else h * factors.view(-1, *[1] * (-1 - dim))


class Ffn(Block):
    units, shape = 16, (3, 5, WIDTH)

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.up: Any = Conv1D(32, WIDTH) if transposed else nn.Linear(WIDTH, 32)
        self.down: Any = Conv1D(WIDTH, 32) if transposed else nn.Linear(32, WIDTH)

    def attach(self, span: Span) -> None:
        attach(self.up, "emits", span)
        attach(self.down, "reads", span)

    def forward(self, x: torch.Tensor, factors: torch.Tensor | None = None) -> torch.Tensor:
        return self.down(self.mask(F.gelu(self.up(x)), factors))


class GatedFfn(Ffn):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 32, bias=False)

    def attach(self, span: Span) -> None:
        super().attach(span)
        attach(self.gate, "emits", span)

    def forward(self, x: torch.Tensor, factors: torch.Tensor | None = None) -> torch.Tensor:
        return self.down(self.mask(F.silu(self.gate(x)) * self.up(x), factors))


class Attention(Block):
    """Fused query, key and value, as GPT-2 has them; `by_width` slices the width of all heads alike."""

    units, shape = HEADS, (2, 5, WIDTH)

    def __init__(self, by_width: bool = False) -> None:
        super().__init__()
        self.by_width, self.units = by_width, 6 if by_width else HEADS
        self.qkv, self.out = Conv1D(3 * HEADS * 6, WIDTH), Conv1D(WIDTH, HEADS * 6)

    def attach(self, span: Span) -> None:
        attach(self.qkv, "emits", span, 3 * HEADS if self.by_width else 3)
        attach(self.out, "reads", span, HEADS if self.by_width else 1)

    def forward(self, x: torch.Tensor, factors: torch.Tensor | None = None) -> torch.Tensor:
        parts = list(self.qkv(x).chunk(3, -1))
        if factors is not None and self.by_width:  # products of masked queries and keys are those of the slices
            parts[:2] = [part * (factors != 0) for part in parts[:2]]
        heads = HEADS if self.by_width else parts[0].shape[-1] // 6
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.4).transpose(1, 2).flatten(2)
        return self.out(self.mask(y, factors))


class Convs(Block):
    """Two groups of channels, as in a bottleneck: the convolution in the middle reads one and emits the other."""

    units, shape = 8, (4, 3, 6, 6)

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, bias=bias), nn.Conv2d(16, 16, 3, padding=1, bias=bias)
        self.third, self.norms = nn.Conv2d(16, 5, 1, bias=bias), nn.ModuleList(nn.BatchNorm2d(16) for _ in range(2))

    def attach(self, span: Span) -> None:
        attach(self.first, "emits", span)
        attach(self.second, "reads", span)
        attach(self.second, "emits", span)
        attach(self.third, "reads", span)
        for norm in self.norms:
            attach(norm, "channels", span)

    def forward(self, x: torch.Tensor, factors: torch.Tensor | None = None) -> torch.Tensor:
        h = self.mask(F.relu(self.norms[0](self.first(x))), factors, -3)
        return self.third(self.mask(F.relu(self.norms[1](self.second(h))), factors, -3))


BLOCKS: dict[str, Callable[[], Any]] = {
    "ffn": Ffn,
    "ffn of conv1d": lambda: Ffn(transposed=True),
    "gated ffn": GatedFfn,
    "attention": Attention,
    "attention by head width": lambda: Attention(by_width=True),
    "convolutions": Convs,
    "convolutions with bias": lambda: Convs(bias=True),
}
STARTS = ("aligned", "all", "circular")


def make(case: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, Any, Span, torch.Tensor]:
    """The sliced block, its dense twin, the span (in its first step) and an input."""
    torch.manual_seed(0)
    block = BLOCKS[case]().to(dtype)
    for parameter in block.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 0.5)
    twin, context = copy.deepcopy(block), StepContext(seed=0)
    span = Span("block", block.units, 0.5, context, **options)
    block.attach(span)
    context.begin_step(0)
    return block, twin, span, torch.randn(block.shape, dtype=dtype, requires_grad=True)


def factors_of(span: Span, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """0 or the scale, for each of the columns that are read."""
    drawn = span.current()
    assert drawn is not None
    mask = torch.zeros(span.size, dtype=dtype)
    for start, stop in drawn.pieces:
        mask[start:stop] = 1
    scale = span.scale_for(drawn.width, 1, 1, torch.device("cpu"))
    factors = mask * (scale.to(dtype) if isinstance(scale, torch.Tensor) else scale)
    unit = 1 if columns % span.size else columns // span.size
    return factors.repeat(HEADS) if span.size == 6 else factors.repeat_interleave(unit)


def read_columns(block: Any) -> int:
    reader = next(getattr(block, name) for name in ("down", "out", "third") if hasattr(block, name))
    return reader.weight.shape[0 if isinstance(reader, Conv1D) else 1]


def gradients(y: torch.Tensor, block: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    block.zero_grad()
    x.grad = None
    y.backward(torch.randn_like(y))
    assert x.grad is not None
    return {"input": x.grad} | {name: p.grad for name, p in block.named_parameters() if p.grad is not None}


def assert_same(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], bar: float) -> None:
    """Equal, relative to the largest of all: of a bias before a norm only what rounding leaves of a sum is there."""
    assert mine.keys() == theirs.keys()
    scale = max([1.0, *(float(value.abs().max()) for value in theirs.values())])
    for name, value in mine.items():
        assert (value - theirs[name]).abs().max() <= bar * scale, name


@pytest.mark.parametrize("case", BLOCKS)
def test_block_equals_the_masked_dense_one(case: str) -> None:
    for starts, normalization in itertools.product(STARTS, ("flow", "probabilistic")):
        # The scales of probabilistic normalisation are float32.
        compare(case, torch.float64, 1e-12 if normalization == "flow" else 1e-6, starts, normalization)
    compare(case, torch.float32, 2e-6, "all", "probabilistic")


def compare(case: str, dtype: torch.dtype, bar: float, starts: str, normalization: str) -> None:
    """Outputs, gradients and running statistics over six steps."""
    block, twin, span, x = make(case, dtype, starts=starts, normalization=normalization)
    pieces = set()
    for step in range(6):
        span.context.begin_step(step)
        drawn = span.current()
        assert drawn is not None and drawn.width == span.size // 2
        pieces.add(drawn.pieces)
        stats = {k: v.clone() for k, v in block.named_buffers()}
        y, expected = block(x), twin(x, factors_of(span, read_columns(block), dtype))
        assert (y - expected).detach().abs().max() <= bar * max(1.0, float(expected.detach().abs().max()))
        mine, theirs = gradients(y, block, x), gradients(expected, twin, x)
        assert_same(mine, theirs, bar)
        outside = [bool((g == 0).any()) for name, g in mine.items() if name not in ("input", "down.bias", "out.bias")]
        assert all(outside) or case.startswith("convolutions")
        for name, buffer in block.named_buffers():
            dense = dict(twin.named_buffers())[name]
            if buffer.ndim:  # running statistics move inside the slice, to the dense ones' values, and nowhere else
                inside = torch.zeros(16, dtype=torch.bool)
                for start, stop in drawn.ranges(unit=2):
                    inside[start:stop] = True
                assert_same({name: buffer[inside]}, {name: dense[inside]}, bar)
                assert torch.equal(buffer[~inside], stats[name][~inside]) and not torch.equal(buffer, stats[name])
                dense.copy_(buffer)
            else:
                assert int(buffer) == step + 1
    assert len(pieces) > 1


def ends(block: Any) -> tuple[Any, Any]:
    """The module that emits and the one that reads."""
    names = ("up", "qkv", "first"), ("down", "out", "third")
    emitter, reader = (next(getattr(block, name) for name in side if hasattr(block, name)) for side in names)
    return emitter, reader


@pytest.mark.parametrize("case", ["ffn", "ffn of conv1d", "attention", "convolutions"])
def test_gradients_are_exactly_zero_outside(case: str) -> None:
    block, _, span, x = make(case, torch.float32)
    gradients(block(x), block, x)
    drawn = span.current()
    assert drawn is not None
    emitter, reader = ends(block)
    transposed = isinstance(reader, Conv1D)
    for layer, dim, blocks in ((emitter, int(transposed), emitter.blocks), (reader, int(not transposed), 1)):
        columns = layer.weight.shape[dim]
        inside = torch.zeros(columns, dtype=torch.bool)
        for start, stop in drawn.ranges(columns // (blocks * span.size), blocks):
            inside[start:stop] = True
        rows = layer.weight.grad.movedim(dim, 0)
        assert not rows[~inside].any() and rows[inside].any()


@pytest.mark.parametrize("case", BLOCKS)
def test_without_a_step_or_in_eval_mode_it_is_the_dense_block(case: str) -> None:
    block, twin, span, x = make(case)
    keys = list(block.state_dict())
    assert keys == list(twin.state_dict())
    assert not torch.equal(block(x), twin(x))
    block.load_state_dict(twin.state_dict())
    assert torch.equal(block.eval()(x), twin.eval()(x))
    block.train()
    twin.train()
    with span.context.disabled():
        assert torch.equal(block(x), twin(x))
        mine, theirs = gradients(block(x), block, x), gradients(twin(x), twin, x)
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    span.context.end_step()
    assert torch.equal(block(x), twin(x))
    span.context.begin_step(1)
    for module, dense in zip(block.modules(), twin.modules(), strict=True):
        detach(module)
        assert type(module) is type(dense) and vars(module).keys() == vars(dense).keys()
    assert torch.equal(block(x), twin(x))


def test_a_frozen_norm_follows_its_input() -> None:
    block, twin, span, x = make("convolutions")
    for model in (block, twin):
        for norm in model.norms:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    twin.load_state_dict(block.state_dict())
    block.norms.eval()
    twin.norms.eval()
    before = {name: buffer.clone() for name, buffer in block.named_buffers()}
    torch.testing.assert_close(block(x), twin(x, factors_of(span, 16, x.dtype)), rtol=0, atol=1e-10)
    assert all(torch.equal(buffer, before[name]) for name, buffer in block.named_buffers())


def test_a_norm_with_a_cumulative_average() -> None:
    block, twin, span, x = make("convolutions", starts="all")
    for model in (block, twin):
        model.norms[0].momentum = None
    block(x)
    twin(x, factors_of(span, 16, x.dtype))
    assert (span.kept(), block.norms[0].num_batches_tracked) == (4, 1)
    drawn = span.current()
    assert drawn is not None
    ((start, stop),) = drawn.ranges(unit=2)
    mine, dense = block.norms[0].running_var[start:stop], twin.norms[0].running_var[start:stop]
    torch.testing.assert_close(mine, dense, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", ["ffn", "attention", "convolutions"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_repeats_the_slice(case: str, use_reentrant: bool) -> None:
    grads = []
    for recompute in (False, True):
        block, _, span, x = make(case, torch.float32)
        drawn = set()
        for step in range(3):
            span.context.begin_step(step)
            for micro_step in range(2):
                if micro_step:
                    span.context.next_micro_step()
                drawn.add(span.current())
                options: Any = {"use_reentrant": use_reentrant, "preserve_rng_state": False}
                y = checkpoint(block, x, **options) if recompute else block(x)
                y.square().sum().backward()
        assert len(drawn) > 1
        grads.append({"input": x.grad} | {name: p.grad for name, p in block.named_parameters()})
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def test_a_slice_that_is_gone_says_so() -> None:
    block, _, span, x = make("ffn")
    h = F.gelu(block.up(x))
    span.context.end_step()
    with pytest.raises(RuntimeError, match="block: a layer that reads 32 columns was given 16.*holds nothing"):
        block.down(h)
    norm = nn.BatchNorm2d(16)
    attach(norm, "channels", span)
    with pytest.raises(RuntimeError, match="block: a layer that reads 16 columns was given 8.*holds nothing"):
        norm(torch.ones(2, 8, 3, 3))


@pytest.mark.parametrize("case", ["ffn", "attention", "convolutions"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(case: str, dtype: torch.dtype) -> None:
    block, twin, span, x = make(case, torch.float32)
    with torch.autocast("cpu", dtype):
        y, expected = block(x), twin(x, factors_of(span, read_columns(block), torch.float32))
    assert y.dtype == expected.dtype == dtype
    mine, theirs = gradients(y, block, x), gradients(expected, twin, x)
    for name, value in mine.items():
        assert value.dtype == torch.float32
        assert (value - theirs[name]).abs().max() <= 0.05 * theirs[name].abs().max(), name


def test_what_is_kept_for_the_backward_pass_follows_the_width() -> None:
    block, twin, span, x = make("ffn", torch.float32)
    parameters = {p.data_ptr() for model in (block, twin) for p in model.parameters()}

    def kept_bytes(function: Callable[[], Any]) -> int:
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.data_ptr() not in parameters:
                kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = function()
        return sum(kept.values()) if y.requires_grad else 0

    tokens = x.numel() // WIDTH  # kept: the input, the hidden columns before and after the activation
    assert kept_bytes(lambda: twin(x)) == 4 * tokens * (WIDTH + 2 * 32)
    assert kept_bytes(lambda: block(x)) == 4 * tokens * (WIDTH + 2 * 16)


def test_accumulation_in_place_through_the_layers() -> None:
    grads = []
    for in_place in (False, True):
        block, _, span, x = make("gated ffn", accumulate_in_place=in_place)
        for micro_step in range(3):
            if micro_step:
                span.context.next_micro_step()
            block(x).square().sum().backward()
        grads.append(list(p.grad for p in block.parameters()))
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)
    block.down.weight.register_hook(lambda grad: grad)  # pyright: ignore
    with pytest.raises(ValueError, match="accumulate_in_place=True: a parameter has gradient hooks"):
        block(x)  # pyright: ignore


def test_draws_are_shared_or_apart_and_follow_the_schedule() -> None:
    def starts(rank: int, shared: bool) -> list[Any]:
        context = StepContext(seed=3, rank=rank)
        span = Span("block", 64, 0.5, context, starts="all", shared=shared)
        drawn = []
        for step in range(8):
            context.begin_step(step)
            drawn += [span.current(), span.current()]
        assert drawn[::2] == drawn[1::2]
        return drawn[::2]

    assert starts(0, True) == starts(1, True) != starts(0, False) != starts(1, False)
    schedule = RateSchedule(ramp_steps=4, final_dense_steps=2, max_steps=8)
    span = Span("block", 16, 0.5, StepContext(seed=0), align=4, schedule=schedule)
    assert [span.width_at(step) for step in range(8)] == [16, 16, 12, 12, 8, 8, 16, 16]  # 14, 12, 10 rounded, 8
    span.context.begin_step(0)
    assert span.current() is None and span.kept() is None
    span.context.begin_step(4)
    assert span.kept() == 8
    span.context.max_steps = 6  # what the context knows of the run wins
    assert span.kept() == 8 and span.width_at(4) == 16


def test_a_copy_is_a_span_of_its_own() -> None:
    block, _, span, x = make("ffn")
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert other.up.emits is other.down.reads is not span
        assert other.up.emits.number != span.number
        assert torch.equal(other(x), block(x))
        other.up.emits.context.end_step()
        assert not torch.equal(other(x), block(x))

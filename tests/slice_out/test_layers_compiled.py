"""What layers can't be attached to, and layers under torch.compile."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from hf_efx.core.training.step_context import StepContext
from hf_efx.slice_out.layers import SlicedLinear, attach
from hf_efx.slice_out.schedule import RateSchedule
from hf_efx.slice_out.span import Span
from slice_out.test_layers import assert_same, gradients, make


def test_what_can_not_be_attached() -> None:
    context = StepContext(seed=0)
    span = Span("block", 16, 0.5, context)
    linear = nn.Linear(12, 32)
    attach(linear, "emits", span)
    assert type(linear) is SlicedLinear
    cases: list[tuple[nn.Module, Any, int, str]] = [
        (nn.LayerNorm(16), "emits", 1, "LayerNorm can't be sliced: plain Linear, Conv1D, Conv2d, BatchNorm2d"),
        (nn.Linear(12, 30), "emits", 1, r"has 30 columns, not a multiple of 1 blocks \* 16 units"),
        (nn.Linear(12, 32), "reads", 1, "has 12 columns"),
        (nn.Linear(12, 32), "emits", 3, "3 blocks"),
        (nn.Linear(12, 32), "channels", 1, "a norm takes the role 'channels'"),
        (nn.BatchNorm2d(32), "emits", 1, "a norm takes the role 'channels'"),
        (nn.Conv2d(32, 32, 3, groups=2), "emits", 1, "groups=2: grouped convolutions can't be sliced"),
        (linear, "emits", 1, "has this role already"),
    ]
    for module, role, blocks, message in cases:
        kind = type(module)
        with pytest.raises(ValueError, match=message):
            attach(module, role, span, blocks)
        assert type(module) is kind
    options: Any
    for options, message in (
        ({"rate": 0.97}, "block: rate=0.97 of 16 units rounds to a width of 0"),
        ({"rate": 0.25, "align": 8}, "block: .*which drops nothing"),
        ({"rate": 0.5, "starts": "random"}, "block: starts='random'"),
        ({"rate": 0.5, "normalization": "none"}, "block: normalization='none'"),
    ):
        with pytest.raises(ValueError, match=message):
            Span("block", 16, context=context, **options)


COMPILED: list[tuple[str, dict[str, Any]]] = [
    ("gated ffn", {"starts": "all", "normalization": "probabilistic"}),
    ("attention", {"starts": "circular"}),
    ("convolutions with bias", {"starts": "circular"}),
    ("ffn", {"starts": "circular"}),
    ("convolutions", {"starts": "all", "normalization": "probabilistic"}),
]


@pytest.mark.parametrize(
    ("case", "options", "backend"),
    [(*one, "aot_eager") for one in COMPILED[:3]]
    + [pytest.param(*one, "inductor", marks=pytest.mark.slow) for one in COMPILED],
)
# torch's own, on importing inductor.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_one_graph_serves_all_starts(case: str, options: dict[str, Any], backend: str) -> None:
    torch._dynamo.reset()
    block, _, span, x = make(case, **options)
    graphs = CompileCounterWithBackend(backend)
    compiled = torch.compile(block, backend=graphs, fullgraph=True)
    drawn = set()
    for step in range(8):
        span.context.begin_step(step)
        drawn.add(span.current())
        state = copy.deepcopy(block.state_dict())
        expected = gradients(block(x), block, x)
        buffers = {name: buffer.clone() for name, buffer in block.named_buffers()}
        block.load_state_dict(state)
        got = gradients(compiled(x), block, x)
        assert_same(got, expected, 1e-10)
        assert_same({n: b for n, b in block.named_buffers()}, buffers, 1e-10)
    assert len(drawn) > 2 and graphs.frame_count == 1
    span.context.end_step()
    expected = block(x)
    torch.testing.assert_close(compiled(x), expected, rtol=0, atol=1e-10)  # dense: a second graph
    assert graphs.frame_count == 2


def test_a_compiled_ramp_says_what_it_needs() -> None:
    torch._dynamo.reset()
    block, _, span, x = make("ffn", schedule=RateSchedule(ramp_steps=4))
    compiled = torch.compile(block, backend="aot_eager")
    span.context.begin_step(2)
    with pytest.raises(RuntimeError, match="block: compiled for a width of 8, while 12 of 16 units are due"):
        compiled(x)
    span.refresh()
    torch.testing.assert_close(compiled(x), block(x), rtol=0, atol=1e-10)

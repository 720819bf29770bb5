import json
from typing import Any

import pytest
import torch
from matrix import ARCHITECTURES
from torch import nn

from hf_efx import Block, SliceOutConfig, get_efx_model, slice_out_report, step_context
from hf_efx.slice_out.apply import spans_of

BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}
MLP = SliceOutConfig(rate=0.5, align=8, blocks=[Block("mlp", ["0"], ["2"])])


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64, bias=False), nn.Tanh(), nn.Linear(64, 4, bias=False))


def test_numbers_of_a_network_that_is_worked_by_hand() -> None:
    report = slice_out_report(get_efx_model(net(), MLP), torch.randn(10, 16))
    # Products: x U [10, 16] [16, 64] and h V [10, 64] [64, 4] forward; for the backward again those of both weights,
    # and that of h. The batch needs no gradient.
    first, second = 2 * 10 * 16 * 64, 2 * 10 * 64 * 4
    assert report.dense_flops == 2 * first + 3 * second
    assert report.flops == report.dense_flops / 2
    # Kept for the backward: the batch, tanh's output, and the output itself for its square, each float32.
    batch, hidden, output = 4 * 10 * 16, 4 * 10 * 64, 4 * 10 * 4
    assert report.dense_bytes == batch + hidden + output
    assert report.predicted_bytes == batch + hidden / 2 + output
    assert report.bytes == report.predicted_bytes
    (row,) = report.blocks
    assert (row.name, row.kind, row.size, row.width) == ("0", "mlp", 64, 32)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_saved_bytes_follow_the_widths(architecture: Any) -> None:
    config = SliceOutConfig(rate=0.5, align=2)
    report = slice_out_report(get_efx_model(architecture.build(), config), architecture.batch(8), rounds=1)
    assert report.predicted_bytes < report.dense_bytes and report.bytes <= 1.1 * report.predicted_bytes
    # At half the width products over units are halved; the rest (head, embeddings, residual convolutions) stays.
    assert 0.4 * report.dense_flops < report.flops < 0.8 * report.dense_flops
    assert 0 < report.product_share < 1
    ratio = 1 - report.product_share + report.product_share * report.flops / report.dense_flops
    assert report.predicted_seconds == pytest.approx(report.dense_seconds * ratio)
    assert len(report.blocks) == len(spans_of(get_efx_model(architecture.build(), config)))


def test_it_leaves_everything_as_it_was() -> None:
    for name in ("gpt2", "resnet"):
        model = get_efx_model(
            BY_NAME[name].build(),
            SliceOutConfig(rate=0.5, align=2, ramp_steps=8, final_dense_steps=1, accumulate_in_place=name == "gpt2"),
        )
        model.base_model.eval()
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        context: Any = step_context(model)
        context.max_steps = 10
        context.begin_step(4)
        context.next_micro_step()
        place, state = dict(vars(context)), {k: v.clone() for k, v in model.state_dict().items()}
        modes = [m.training for m in model.modules()]
        widths = [span.width for span in spans_of(model)]
        drawn = [span.current() for span in spans_of(model)]
        batch = BY_NAME[name].batch()
        random = torch.random.get_rng_state()
        report = slice_out_report(model, batch, rounds=1)
        assert all(row.width == row.size // 2 for row in report.blocks)  # at the full rate, in the ramp too
        assert vars(context) == place and [m.training for m in model.modules()] == modes
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert all(p.grad is not None and (p.grad == 1).all() for p in model.parameters())
        assert [span.width for span in spans_of(model)] == widths
        assert [span.current() for span in spans_of(model)] == drawn
        assert torch.equal(torch.random.get_rng_state(), random)
        assert all(span.schedule.ramp_steps == 8 for span in spans_of(model))


def test_loss_of_ones_own_and_batches_as_tuples() -> None:
    model = get_efx_model(net(), MLP)
    x = torch.randn(10, 16)
    own = slice_out_report(model, (x, x), loss=lambda m, batch: (m(batch[0]) - batch[1][:, :4]).abs().mean(), rounds=1)
    assert own.dense_flops == slice_out_report(model, (x,), rounds=1).dense_flops


def test_it_prints_and_goes_to_json() -> None:
    report = slice_out_report(get_efx_model(net(), MLP), torch.randn(10, 16), rounds=1)
    lines = str(report).splitlines()
    assert len(lines) == 1 + 1 + 1 + 3 and "0.50" in lines[3] and "predicted" in lines[2]
    assert json.loads(json.dumps(report.to_dict()))["blocks"][0]["width"] == 32


def test_dense_model_has_no_report() -> None:
    with pytest.raises(ValueError, match="the model has no slices. Call get_efx_model"):
        slice_out_report(BY_NAME["gpt2"].build(), {})

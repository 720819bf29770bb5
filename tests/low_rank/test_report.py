import json
from typing import Any

import pytest
import torch
from matrix import ARCHITECTURES
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hf_efx import LowRankConfig, get_efx_model, low_rank_report

GPT2 = next(architecture for architecture in ARCHITECTURES if architecture.name == "gpt2")


def rows(model: nn.Module) -> dict[str, Any]:
    return {row.name: row for row in low_rank_report(model).layers}


def test_report_equals_the_formula() -> None:
    dense = GPT2.build()
    model = get_efx_model(GPT2.build(), LowRankConfig(rank=4))
    report = low_rank_report(model)
    by_name = {row.name: row for row in report.layers}
    fc, qkv = by_name["transformer.h.0.mlp.c_fc"], by_name["transformer.h.0.attn.c_attn"]
    assert (fc.shape, fc.blocks, fc.rank) == ((128, 32), 1, 4)
    assert (fc.dense_parameters, fc.parameters) == (128 * 32, 4 * (128 + 32))
    assert (fc.dense_flops, fc.flops) == (2 * 128 * 32, 2 * 4 * (128 + 32))
    assert (qkv.shape, qkv.blocks, qkv.rank) == ((96, 32), 3, 4)
    assert (qkv.dense_parameters, qkv.parameters) == (96 * 32, 3 * 4 * (32 + 32))
    assert all(row.saves for row in report.layers)
    assert report.total_parameters == sum(p.numel() for p in model.parameters())
    assert report.total_dense_parameters == sum(p.numel() for p in dense.parameters())  # the tied table counted once
    assert report.dense_layers == ["lm_head"]


@pytest.mark.parametrize(("rank", "saves"), [(15, True), (16, False), (17, False)])
def test_no_saving_is_flagged_from_break_even_on(rank: int, saves: bool) -> None:
    # 32 x 32 breaks even at 32 * 32 / 64 = 16, 128 x 32 at 25.6
    model = get_efx_model(GPT2.build(), LowRankConfig(rank=rank, only_if_smaller=False))
    report = low_rank_report(model)
    flags = {row.name.rpartition("h.0.")[2]: row.saves for row in report.layers if "h.0." in row.name}
    assert flags == {"attn.c_attn": saves, "attn.c_proj": saves, "mlp.c_fc": True, "mlp.c_proj": True}
    assert str(report).count("no saving: at or above the break-even rank") == (0 if saves else 4)


def test_spectrum_of_the_product() -> None:
    model: Any = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2))
    p, _, qh = torch.linalg.svd(torch.randn(5, 6, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    model[0].weight.data = p @ torch.diag(torch.tensor([2.0, 1.0, 1.0, 0.5, 0.25])) @ qh
    get_efx_model(model, LowRankConfig(rank=3, target_modules=["0"], only_if_smaller=False))
    (row,) = low_rank_report(model).layers
    assert row.frobenius_norm == pytest.approx(6**0.5, rel=1e-5)
    assert row.stable_rank == pytest.approx(6 / 4, rel=1e-5)
    assert row.effective_rank == pytest.approx(2**1.5, rel=1e-5)  # shares 1/2, 1/4, 1/4


def test_flops_are_those_that_torch_counts() -> None:
    x = torch.randn(2, 3, 12, 12)
    for model in (nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3, stride=2)), nn.Sequential(nn.Linear(12, 16))):
        (name,) = [name for name, _ in model.named_children()][-1:]
        inputs = x[:, :, 0] if name == "0" else x
        with FlopCounterMode(display=False) as before:
            out = model(inputs)
        get_efx_model(model, LowRankConfig(rank=2, target_modules=[name]))
        with FlopCounterMode(display=False) as after:
            model(inputs)
        positions = out.numel() // 16
        (row,) = low_rank_report(model).layers
        saved = before.get_total_flops() - after.get_total_flops()
        assert saved == positions * (row.dense_flops - row.flops)


def test_report_prints_and_goes_to_json() -> None:
    report = low_rank_report(get_efx_model(GPT2.build(), LowRankConfig(rank=4)))
    lines = str(report).splitlines()
    assert len(lines) == 2 + 8
    assert "transformer.h.0.mlp.c_fc" in str(report) and "128x32" in str(report)
    ratio = report.total_parameters / report.total_dense_parameters
    assert f"{report.total_parameters:,} parameters, {ratio:.2f} of {report.total_dense_parameters:,}" in lines[-1]
    assert json.loads(json.dumps(report.to_dict()))["layers"][0]["rank"] == 4


def test_dense_model_has_no_report() -> None:
    with pytest.raises(ValueError, match="the model has no factorised layer"):
        low_rank_report(GPT2.build())

"""The one criterion of what is weakest: exact counts, ties, layouts and scopes, by hand."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_efx.core.model.masks import (
    UnitGroup,
    candidate_count,
    in_weight_shape,
    magnitude_matrix,
    smallest,
    unit_columns,
    unit_norms,
    weak_units,
    weak_weights,
)


def linear(rows: list[list[float]]) -> nn.Linear:
    module = nn.Linear(len(rows[0]), len(rows))
    module.weight.data = torch.tensor(rows)
    return module


def test_counts_are_floors_that_rounding_does_not_lower() -> None:
    assert [candidate_count(f, 100) for f in (0.0, 0.29, 0.296, 0.57, 1.0)] == [0, 29, 29, 57, 100]
    assert candidate_count(0.1, 9) == 0
    with pytest.raises(ValueError, match=r"fraction=1.5: expected a share from 0 to 1"):
        candidate_count(1.5, 3)


def test_of_equal_magnitudes_those_in_front_go_and_the_count_is_exact() -> None:
    values = torch.tensor([[2.0, 1.0], [1.0, 1.0], [1.0, 1.0], [0.5, 3.0]])
    assert smallest(values, 2).t().tolist() == [[False, True, False, True], [True, True, False, False]]
    for count in range(5):
        assert smallest(torch.ones(4, 3), count).sum(0).tolist() == [count] * 3
    with pytest.raises(ValueError, match="NaN"):
        smallest(torch.tensor([[float("nan")], [1.0]]), 1)


@pytest.mark.parametrize("count", [1, 7, 100, 255])
def test_smallest_is_what_a_sort_gives(count: int) -> None:
    values = torch.rand(256, 5, generator=torch.Generator().manual_seed(0))
    values[3] = values[4]
    mask = smallest(values, count)
    assert (mask.sum(0) == count).all()
    for column in range(5):
        assert values[:, column][mask[:, column]].max() <= values[:, column][~mask[:, column]].min()


def test_a_column_is_an_output_unit_in_every_layout() -> None:
    torch.manual_seed(0)
    dense, transposed = nn.Linear(6, 4), Conv1D(4, 6)
    transposed.weight.data = dense.weight.data.t().clone()
    conv = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
    masks = weak_weights({"a": dense, "b": transposed, "c": conv}, 0.5)
    assert torch.equal(masks["a"], masks["b"].t()) and (masks["a"].sum(1) == 3).all()
    assert masks["c"].shape == conv.weight.shape and (masks["c"].flatten(1).sum(1) == 9).all()
    assert masks["c"].stride() == conv.weight.stride()
    for module in (dense, transposed, conv):
        assert torch.equal(in_weight_shape(magnitude_matrix(module), module), module.weight.detach().abs())


def test_scopes_by_hand() -> None:
    modules = {"a": linear([[1.0, 2.0], [3.0, 4.0]]), "b": linear([[0.1, 5.0], [0.2, 0.3]])}
    column, layer, together = (weak_weights(modules, 0.5, scope) for scope in ("column", "layer", "global"))
    assert column["a"].tolist() == [[True, False], [True, False]]
    assert layer["a"].tolist() == [[True, True], [False, False]]
    assert layer["b"].tolist() == [[True, False], [True, False]]
    assert together["a"].tolist() == [[True, False], [False, False]]
    assert together["b"].tolist() == [[True, False], [True, True]]
    with pytest.raises(ValueError, match="scope='row': expected one of column, layer, global"):
        weak_weights(modules, 0.5, "row")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_histogram_finds_what_a_sort_does(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    modules = {name: nn.Linear(40, size).to(dtype) for name, size in (("a", 30), ("b", 7))}
    everything = torch.cat([module.weight.detach().abs().flatten() for module in modules.values()])
    for fraction in (0.001, 0.5, 0.97):
        masks = weak_weights(modules, fraction, "global")
        mask = torch.cat([masks[name].flatten() for name in modules])
        assert mask.sum() == candidate_count(fraction, len(everything))
        assert everything[mask].max() <= everything[~mask].min() if mask.any() else True


def test_nan_weights_are_named() -> None:
    module = linear([[float("nan"), 1.0]])
    for scope in ("column", "layer", "global"):
        with pytest.raises(ValueError, match=r"fc\.weight: There are NaN"):
            weak_weights({"fc": module}, 0.5, scope)


def test_units_of_a_fused_projection_by_hand() -> None:
    """Two heads of width 1, in queries, keys and values side by side: a head's norm is over all three."""
    fused = Conv1D(6, 1)
    fused.weight.data = torch.tensor([[3.0, 0.0, 0.0, 1.0, 4.0, 1.0]])
    group = UnitGroup("c_attn", "attention", 2, {"c_attn": 3})
    assert unit_norms({"c_attn": fused}, group).tolist() == pytest.approx([5.0, 2**0.5])
    assert weak_units({"c_attn": fused}, [group], 0.5)["c_attn"].tolist() == [False, True]
    assert unit_columns(torch.tensor([True, False]), 12, 3).tolist() == ([True] * 2 + [False] * 2) * 3


def test_units_compete_in_the_global_scope_alone() -> None:
    modules = {"a": linear([[1.0], [2.0]]), "b": linear([[3.0], [4.0]])}
    groups = [UnitGroup(name, "mlp", 2, {name: 1}) for name in modules]
    apart, together = (weak_units(modules, groups, 0.5, scope) for scope in ("layer", "global"))
    assert [apart[name].tolist() for name in modules] == [[True, False], [True, False]]
    assert [together[name].tolist() for name in modules] == [[True, True], [False, False]]

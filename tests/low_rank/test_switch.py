import copy
import logging
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_efx.core.model.weight_view import WeightView
from hf_efx.low_rank.initialisation import spectral_factors
from hf_efx.low_rank.layers import FactorisedLayer, factorise
from hf_efx.low_rank.switch import convert_optimizer_state, factor_states, project_moment

MOMENT = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
U, V = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]])


def by_hand() -> Any:
    """A layer with the factors above: W = UVᵀ = [[3, 4], [6, 8]]."""
    layer: Any = nn.Linear(2, 2, bias=False)
    factorise(layer, 1, 1, [(U, V)])
    return layer


def test_projected_moments_by_hand() -> None:
    # M V = [1·3 + 2·4, 3·3 + 4·4], Mᵀ U = [1·1 + 3·2, 2·1 + 4·2]
    u, v = project_moment(MOMENT, [(U, V)], squared=False)
    assert u.tolist() == [[[11], [25]]] and v.tolist() == [[7, 10]]
    # M V² = [1·9 + 2·16, 3·9 + 4·16], Mᵀ U² = [1·1 + 3·4, 2·1 + 4·4]
    u, v = project_moment(MOMENT, [(U, V)], squared=True)
    assert u.tolist() == [[[41], [91]]] and v.tolist() == [[13, 18]]


def test_blocks_are_projected_each_by_its_own_factors() -> None:
    u, v = project_moment(torch.cat([MOMENT, 10 * MOMENT]), [(U, V), (2 * U, -V)], squared=False)
    assert u.tolist() == [[[11], [25], [-110], [-250]]]
    assert v.tolist() == [[7, 10], [140, 200]]


def test_factor_states_by_hand() -> None:
    dense = {"step": torch.tensor(5.0), "exp_avg": MOMENT, "exp_avg_sq": MOMENT, "max_exp_avg_sq": MOMENT, "lr": 0.5}
    state_u, state_v = factor_states(dense, by_hand(), "project")
    assert state_u["step"] == state_v["step"] == 5 and state_u["step"] is not state_v["step"]
    assert state_u["lr"] == state_v["lr"] == 0.5
    assert state_u["exp_avg"].tolist() == [[[11], [25]]] and state_v["exp_avg"].tolist() == [[7, 10]]
    for key in ("exp_avg_sq", "max_exp_avg_sq"):
        assert state_u[key].tolist() == [[[41], [91]]] and state_v[key].tolist() == [[13, 18]]
    assert factor_states(dense, by_hand(), "reset") == ({}, {})
    assert factor_states({}, by_hand(), "project") == ({}, {})


def test_unknown_states_start_anew_with_a_log_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "hf_efx"):
        assert factor_states({"exp_avg": MOMENT, "row_average": torch.ones(2)}, by_hand(), "project") == ({}, {})
    assert "'row_average' has no projection onto factors" in caplog.text


@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 9), lambda: Conv1D(9, 6), lambda: nn.Conv2d(2, 9, (3, 1))])
@pytest.mark.parametrize("optimiser", ["AdamW", "SGD"])
def test_projected_first_moment_is_the_moment_of_projected_gradients(make: Any, optimiser: str) -> None:
    # While U and V stand still, an optimiser over the factors of the same W would have gathered the same moments.
    torch.manual_seed(0)
    dense: Any = make().double()
    blocks = 3 if isinstance(dense, Conv1D) else 1
    layer = copy.deepcopy(dense)
    view = WeightView(dense, blocks)
    rank = min(view.block_dim, view.in_dim)
    factorise(layer, rank, blocks, [spectral_factors(m, rank) for m in view.block_matrices()])

    def still(module: nn.Module) -> torch.optim.Optimizer:
        options = {"momentum": 0.9} if optimiser == "SGD" else {"weight_decay": 0.0}
        return getattr(torch.optim, optimiser)(module.parameters(), lr=0.0, **options)

    optimisers = {dense: still(dense), layer: still(layer)}
    shape = (4, 2, 5, 5) if isinstance(dense, nn.Conv2d) else (4, 6)
    for _ in range(4):
        x = torch.randn(shape, dtype=torch.float64)
        for module, each in optimisers.items():
            each.zero_grad()
            module(x).tanh().square().sum().backward()
            each.step()
    key = "momentum_buffer" if optimiser == "SGD" else "exp_avg"
    state_u, state_v = factor_states(dict(optimisers[dense].state[dense.weight]), layer, "project")
    for parameter, state in ((layer.weight, state_u), (layer.factor_v, state_v)):
        expected = optimisers[layer].state[parameter][key]
        assert state[key].shape == parameter.shape
        torch.testing.assert_close(state[key], expected, rtol=0, atol=1e-10)
        if optimiser == "AdamW":
            assert state["step"] == 4 and (state["exp_avg_sq"] >= 0).all()


def test_whole_state_dict_by_hand() -> None:
    # Two groups, as the Trainer makes them: fc.weight decayed, fc.bias and norm not. The factors land where the new
    # optimiser has them, with its weight decay; rates are scaled; what the switch didn't touch keeps its state.
    layer: Any = nn.Linear(2, 2)
    factorise(layer, 1, 1, [(U, V)])
    bias_state, norm_state = {"exp_avg": torch.tensor([1.0, 2.0])}, {"exp_avg": torch.tensor([9.0])}
    dense = {
        "state": {0: {"exp_avg": MOMENT, "step": torch.tensor(3.0)}, 1: bias_state, 2: norm_state},
        "param_groups": [
            {"lr": 0.1, "initial_lr": 0.4, "weight_decay": 0.3, "betas": (0.9, 0.99), "params": [0]},
            {"lr": 0.1, "initial_lr": 0.4, "weight_decay": 0.0, "betas": (0.9, 0.99), "params": [1, 2]},
        ],
    }
    fresh = {
        "state": {},
        "param_groups": [
            {"lr": 7.0, "weight_decay": 0.2, "betas": (0.5, 0.5), "params": []},
            {"lr": 7.0, "weight_decay": 0.0, "betas": (0.5, 0.5), "params": [0, 1, 2, 3]},
        ],
    }
    names = [["fc.weight"], ["fc.bias", "norm"]], [[], ["fc.bias", "fc.weight", "fc.factor_v", "norm"]]
    arguments = (dense, names[0], fresh, names[1])
    layers: dict[str, FactorisedLayer] = {"fc": layer}
    got = convert_optimizer_state(*arguments, layers, mode="project", learning_rate_scale=0.5)
    assert got["param_groups"] == [
        {"lr": 0.05, "initial_lr": 0.2, "weight_decay": 0.2, "betas": (0.9, 0.99), "params": []},
        {"lr": 0.05, "initial_lr": 0.2, "weight_decay": 0.0, "betas": (0.9, 0.99), "params": [0, 1, 2, 3]},
    ]
    assert got["state"][0] is bias_state and got["state"][3] is norm_state
    assert got["state"][1]["exp_avg"].tolist() == [[[11], [25]]] and got["state"][1]["step"] == 3
    assert got["state"][2]["exp_avg"].tolist() == [[7, 10]]
    reset = convert_optimizer_state(*arguments, layers, mode="reset", learning_rate_scale=1.0)
    assert reset["state"].keys() == {0, 3}

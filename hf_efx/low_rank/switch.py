"""The switch from dense to factorised inside a run: what becomes of the optimiser's state.

With W = U Vᵀ and G = dL/dW, the chain rule gives dL/dU = G V and dL/dV = Gᵀ U. First moments are linear in the
gradient and follow it exactly, as long as the factors stand still. Second moments E[G²] follow as E[(G V)²] ≈ E[G²]
V², which holds for uncorrelated entries of G.
"""

import logging
from typing import Any

import torch

from hf_efx.low_rank.layers import FactorisedLayer

logger = logging.getLogger(__name__)

LINEAR_MOMENTS = ("exp_avg", "momentum_buffer")
SQUARED_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq")

State = dict[str, Any]


def project_moment(
    moment: torch.Tensor, factors: list[tuple[torch.Tensor, torch.Tensor]], squared: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """A dense moment carried onto the factors.

    Args:
        moment: M [out, in], a moment of dL/dW.
        factors: U [out / blocks, r], V [in, r] of each block.
        squared: Whether M is a second moment.

    Returns:
        Moments for `weight` [1, out, r] and `factor_v` [blocks * r, in].
    """
    us, vs = [], []
    for block, (u, v) in zip(moment.chunk(len(factors)), factors, strict=True):
        u, v = (u.square(), v.square()) if squared else (u, v)
        us.append(block @ v.to(block.dtype))
        vs.append((block.mT @ u.to(block.dtype)).mT)
    return torch.cat(us).unsqueeze(0), torch.cat(vs)


def factor_states(dense: State, layer: FactorisedLayer, mode: str) -> tuple[State, State]:
    """Optimiser state of `layer.weight` and `layer.factor_v` from that of the dense weight.

    Args:
        dense: State of the dense weight, tensors in the dense layout.
        layer: The layer after factorising, its factors not trained yet.
        mode: "project" or "reset" (empty states: the optimiser starts them anew).

    Returns:
        Two states; empty where the dense one holds something that has no known projection.
    """
    if mode == "reset" or not dense:
        return {}, {}
    factors = [(u.detach(), v.detach()) for u, v in layer.factor_pairs()]
    state_u: State = {}
    state_v: State = {}
    for key, value in dense.items():
        if key in LINEAR_MOMENTS or key in SQUARED_MOMENTS:
            matrix = value.mT if layer.dense_class == "Conv1D" else value.reshape(value.shape[0], -1)
            moment_u, state_v[key] = project_moment(matrix, factors, key in SQUARED_MOMENTS)
            state_u[key] = moment_u.view_as(layer.weight)
        elif not torch.is_tensor(value) or value.numel() == 1:
            state_u[key], state_v[key] = (value.clone(), value.clone()) if torch.is_tensor(value) else (value, value)
        else:
            logger.warning("The optimiser's state %r has no projection onto factors: it starts anew.", key)
            return {}, {}
    return state_u, state_v


def convert_optimizer_state(
    dense: dict[str, Any],
    dense_names: list[list[str]],
    fresh: dict[str, Any],
    fresh_names: list[list[str]],
    layers: dict[str, FactorisedLayer],
    mode: str,
    learning_rate_scale: float,
) -> dict[str, Any]:
    """An optimiser's state dict for the factorised model from the one for the dense model.

    Args:
        dense: `state_dict()` before the switch.
        dense_names: Names of the parameters in each of its groups, in order.
        fresh: `state_dict()` of a new optimiser over the factorised model.
        fresh_names: Names of the parameters in each of its groups.
        layers: The factorised layers by name.
        mode: "project" or "reset".
        learning_rate_scale: Factor on each group's learning rate.

    Returns:
        A state dict that the new optimiser loads. Parameters that the switch didn't touch keep their state.
    """
    index = dict(_indexed(dense, dense_names))
    states = {name: dense["state"].get(i, {}) for name, i in index.items()}
    for name, layer in layers.items():
        states[f"{name}.weight"], states[f"{name}.factor_v"] = factor_states(
            states.get(f"{name}.weight", {}), layer, mode
        )
    groups = []
    for old, new in zip(dense["param_groups"], fresh["param_groups"], strict=True):
        rates = {key: old[key] * learning_rate_scale for key in ("lr", "initial_lr") if key in old}
        groups.append({**old, **rates, "weight_decay": new.get("weight_decay", 0.0), "params": new["params"]})
    return {
        "state": {i: states[name] for name, i in _indexed(fresh, fresh_names) if states.get(name)},
        "param_groups": groups,
    }


def _indexed(state_dict: dict[str, Any], names: list[list[str]]) -> list[tuple[str, int]]:
    groups = zip(state_dict["param_groups"], names, strict=True)
    return [pair for group, group_names in groups for pair in zip(group_names, group["params"], strict=True)]

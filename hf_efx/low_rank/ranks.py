"""Ranks: what they save, what a spectrum says, and how a parameter budget is spent on them.

Pure functions of shapes and singular values.
"""

import heapq
import math
from collections.abc import Mapping, Sequence

import torch

# A matrix of independent entries has its largest singular value at the Marchenko-Pastur edge, within a few percent
# at the sizes of network layers; training pushes singular values out of the bulk. 1.1 separates both with room on
# each side.
RANDOM_EDGE_MARGIN = 1.1


def factorised_parameters(m: int, n: int, rank: int) -> int:
    """Parameters of U [m, r] and V [n, r]."""
    return rank * (m + n)


def break_even_rank(m: int, n: int) -> float:
    """The rank mn / (m + n) at which factors cost as much as the dense matrix: n/2 for a square one."""
    return m * n / (m + n)


def resolve_rank(rank: float | int, m: int, n: int) -> int:
    """Whole rank from a share of min(m, n) (a float) or as it stands (an int).

    Raises:
        ValueError: If an int is above min(m, n).
    """
    limit = min(m, n)
    if isinstance(rank, float):
        return max(1, round(rank * limit))
    if rank > limit:
        raise ValueError(f"rank={rank} is above min(in, out)={limit}")
    return rank


def effective_rank(sigma: torch.Tensor) -> float:
    """exp(entropy) of singular values normalised to sum 1 (Roy & Vetterli 2007): k for k equal ones."""
    p = sigma.double() / sigma.double().sum()
    return math.exp(torch.special.entr(p).sum().item())


def stable_rank(sigma: torch.Tensor) -> float:
    """‖W‖²_F / σ₁²: at most the rank, and little moved by small singular values."""
    return (sigma.double().square().sum() / sigma.double().max().square()).item()


def product_singular_values(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Singular values of U Vᵀ, [r], from the factors U [m, r] and V [n, r], without the product: σ(R_u R_vᵀ)."""
    work = torch.float64 if u.dtype == torch.float64 else torch.float32
    r_u = torch.linalg.qr(u.detach().to(work), mode="r").R
    r_v = torch.linalg.qr(v.detach().to(work), mode="r").R
    return torch.linalg.svdvals(r_u @ r_v.mT)


def looks_random(sigma: torch.Tensor, m: int, n: int) -> bool:
    """Whether singular values are those of an [m, n] matrix with independent entries of one variance.

    The Marchenko-Pastur law puts the largest at s (√m + √n) for entries of standard deviation s = ‖W‖_F / √(mn).
    """
    s = sigma.double().square().sum().sqrt().item() / math.sqrt(m * n)
    return sigma.max().item() <= RANDOM_EDGE_MARGIN * s * (math.sqrt(m) + math.sqrt(n))


def allocate_ranks(
    spectra: Mapping[str, Sequence[torch.Tensor]], shapes: Mapping[str, tuple[int, int]], budget: int
) -> dict[str, int]:
    """Ranks per layer that keep the most spectral energy within a number of parameters.

    Each step of rank in a layer of `b` blocks [m, n] costs b (m + n) parameters and keeps Σ_b σ_i² / ‖W_b‖²_F.
    Singular values fall within a layer, so taking the best energy for its cost first is the optimum up to the last
    step. Energy is relative to each matrix, since layers of different scale matter alike to what follows them.

    Args:
        spectra: For each layer the singular values of its blocks, each [min(m, n)], descending.
        shapes: For each layer the shape (m, n) of one block.
        budget: Parameters for all of these layers together.

    Returns:
        A rank from 1 to min(m, n) for each layer. Ranks past the break-even rank are not reached: such a layer is
        better left dense, which `min(m, n)` stands for, at the dense cost.

    Raises:
        ValueError: If the budget doesn't reach rank 1 everywhere.
    """
    gains, costs = {}, {}
    for name, blocks in spectra.items():
        # A zero block has no energy to keep.
        energy = torch.stack([(s.double().square() / s.double().square().sum()).nan_to_num() for s in blocks]).sum(0)
        gains[name] = energy.tolist()
        costs[name] = len(blocks) * sum(shapes[name])
    ranks = dict.fromkeys(spectra, 1)
    spent = sum(costs.values())
    if spent > budget:
        raise ValueError(f"parameter_budget={budget} is below {spent}, what rank 1 everywhere takes")
    heap = [(-g[1] / costs[name], name) for name, g in gains.items() if len(g) > 1]
    heapq.heapify(heap)
    while heap:
        _, name = heapq.heappop(heap)
        m, n = shapes[name]
        blocks = len(spectra[name])
        step = costs[name]
        if ranks[name] + 1 >= break_even_rank(m, n):
            step = blocks * m * n - ranks[name] * costs[name]
            if spent + step <= budget:
                ranks[name], spent = min(m, n), spent + step
            continue
        if spent + step > budget:
            continue
        ranks[name] += 1
        spent += step
        if ranks[name] < len(gains[name]):
            heapq.heappush(heap, (-gains[name][ranks[name]] / costs[name], name))
    return ranks

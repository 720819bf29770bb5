import itertools
import math

import pytest
import torch
from torch import nn

from hf_efx.low_rank.ranks import (
    allocate_ranks,
    break_even_rank,
    effective_rank,
    factorised_parameters,
    looks_random,
    product_singular_values,
    resolve_rank,
    stable_rank,
)


def sigma_of(*energies: float, length: int = 10) -> torch.Tensor:
    """Singular values whose squares are these shares, padded with zeros."""
    return torch.tensor([*energies, *[0.0] * (length - len(energies))]).sqrt()


def test_parameters_and_break_even() -> None:
    assert factorised_parameters(8, 12, 3) == 3 * 20
    n = 64
    assert break_even_rank(n, n) == n / 2
    assert break_even_rank(n, 3 * n) == 0.75 * n
    assert break_even_rank(4 * n, n) == 0.8 * n
    assert factorised_parameters(n, n, n // 2) == n * n


@pytest.mark.parametrize(
    ("rank", "m", "n", "expected"),
    [(0.25, 32, 64, 8), (0.62, 768, 3072, 476), (1.0, 5, 9, 5), (0.001, 32, 32, 1), (7, 32, 32, 7), (32, 32, 64, 32)],
)
def test_resolve_rank(rank: float | int, m: int, n: int, expected: int) -> None:
    assert resolve_rank(rank, m, n) == expected


def test_whole_rank_above_both_sides_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rank=33 is above min\(in, out\)=32"):
        resolve_rank(33, 32, 64)


def test_effective_and_stable_rank_by_hand() -> None:
    assert effective_rank(torch.ones(4)) == pytest.approx(4)
    assert effective_rank(torch.tensor([3.0, 0.0, 0.0])) == pytest.approx(1)
    # shares 1/2, 1/4, 1/4: entropy ½ ln 2 + ½ ln 4 = 1.5 ln 2
    assert effective_rank(torch.tensor([2.0, 1.0, 1.0])) == pytest.approx(2**1.5)
    assert stable_rank(torch.tensor([2.0, 1.0, 1.0])) == pytest.approx(6 / 4)
    assert stable_rank(torch.ones(5)) == pytest.approx(5)


def test_singular_values_of_a_product() -> None:
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.randn(k, 3, generator=generator, dtype=torch.float64) for k in (8, 6))
    expected = torch.linalg.svdvals(u @ v.mT)
    torch.testing.assert_close(product_singular_values(u, v), expected[:3], rtol=0, atol=1e-10)
    assert expected[3:].max() < 1e-10
    assert product_singular_values(u.bfloat16(), v.bfloat16()).dtype == torch.float32


# --- random weights


@pytest.mark.parametrize("shape", [(32, 32), (64, 256), (256, 64), (768, 768)])
def test_gaussian_draws_look_random(shape: tuple[int, int]) -> None:
    for seed in range(5 if max(shape) < 768 else 2):
        sigma = torch.linalg.svdvals(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
        for std in (0.02, 1.0):
            assert looks_random(sigma * std, *shape), (shape, seed, std)


def test_other_initialisations_look_random() -> None:
    torch.manual_seed(0)
    for module in (nn.Linear(64, 128), nn.Conv2d(16, 64, 3)):
        w = module.weight.detach().flatten(1)
        assert looks_random(torch.linalg.svdvals(w), *w.shape)


@pytest.mark.parametrize("shape", [(32, 32), (64, 256), (256, 64)])
def test_low_rank_signal_in_noise_does_not_look_random(shape: tuple[int, int]) -> None:
    m, n = shape
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(shape, generator=generator)
        u, v = torch.randn(m, 2, generator=generator), torch.randn(n, 2, generator=generator)
        # σ₁ of the signal is about √(mn), that of the noise √m + √n
        assert not looks_random(torch.linalg.svdvals(noise + u @ v.mT), m, n), (shape, seed)


def test_low_rank_matrix_alone_does_not_look_random() -> None:
    assert not looks_random(sigma_of(0.6, 0.4), 10, 10)


# --- spending a budget


def test_allocation_by_hand() -> None:
    # Two 10 x 10 layers: 20 parameters a step of rank. 40 go to rank 1 each; the other 60 buy the three steps that
    # keep most: b's second (.3), then a's second and b's third (.2 each). What is left is a's .1 and b's .1.
    spectra = {"a": [sigma_of(0.7, 0.2, 0.1)], "b": [sigma_of(0.4, 0.3, 0.2, 0.1)]}
    shapes = {"a": (10, 10), "b": (10, 10)}
    assert allocate_ranks(spectra, shapes, 60) == {"a": 1, "b": 2}
    assert allocate_ranks(spectra, shapes, 100) == {"a": 2, "b": 3}
    assert allocate_ranks(spectra, shapes, 119) == {"a": 2, "b": 3}  # a rest that buys nothing


def test_allocation_counts_the_cost() -> None:
    # A step in the wide layer keeps .4 for 60 parameters, in the square one .3 for 20.
    spectra = {"square": [sigma_of(0.5, 0.3, 0.2)], "wide": [sigma_of(0.5, 0.4, 0.1)]}
    shapes = {"square": (10, 10), "wide": (10, 50)}
    assert allocate_ranks(spectra, shapes, 80 + 20) == {"square": 2, "wide": 1}
    assert allocate_ranks(spectra, shapes, 80 + 40) == {"square": 3, "wide": 1}  # .2 / 20 comes before .4 / 60
    assert allocate_ranks(spectra, shapes, 80 + 20 + 20 + 60) == {"square": 3, "wide": 2}


def test_allocation_counts_every_block() -> None:
    # Fused: three blocks, whose next step keeps .2 in each, .6 together, for 60 parameters: as good as .2 for 20.
    block = sigma_of(0.7, 0.2, 0.1)
    spectra = {"fused": [block, block, block], "plain": [sigma_of(0.6, 0.25, 0.15)]}
    shapes = {"fused": (10, 10), "plain": (10, 10)}
    assert allocate_ranks(spectra, shapes, 80) == {"fused": 1, "plain": 1}
    assert allocate_ranks(spectra, shapes, 80 + 40) == {"fused": 1, "plain": 3}  # a fused step is past 20
    assert allocate_ranks(spectra, shapes, 80 + 80) == {"fused": 2, "plain": 2}


def test_allocation_goes_dense_past_break_even() -> None:
    # 10 x 10 breaks even at rank 5: rank 4 costs 80, dense 100, and what lies between is never bought.
    spectra, shapes = {"a": [torch.ones(10)]}, {"a": (10, 10)}
    assert allocate_ranks(spectra, shapes, 99) == {"a": 4}
    assert allocate_ranks(spectra, shapes, 100) == {"a": 10}


def test_budget_below_rank_one_is_refused() -> None:
    with pytest.raises(ValueError, match="parameter_budget=39 is below 40, what rank 1 everywhere takes"):
        allocate_ranks({"a": [torch.ones(10)], "b": [torch.ones(10)]}, {"a": (10, 10), "b": (10, 10)}, 39)


def test_zero_weight_gets_no_more_than_rank_one() -> None:
    spectra = {"dead": [torch.zeros(10)], "live": [sigma_of(0.4, 0.3, 0.2, 0.1)]}
    assert allocate_ranks(spectra, {"dead": (10, 10), "live": (10, 10)}, 100) == {"dead": 1, "live": 4}


def kept(spectra: dict[str, list[torch.Tensor]], ranks: dict[str, int]) -> float:
    """Spectral energy that ranks keep, relative to each layer."""
    shares = (s[: ranks[name]].square().sum() / s.square().sum() for name, blocks in spectra.items() for s in blocks)
    return sum(map(float, shares))


def decaying_spectra(seed: int) -> dict[str, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    rates = torch.tensor([0.05, 0.2, 0.5, 1.0]) * (0.8 + 0.4 * torch.rand(4, generator=generator))
    return {f"layer{i}": [torch.exp(-rate * torch.arange(12.0))] for i, rate in enumerate(rates)}


@pytest.mark.parametrize("seed", range(5))
def test_allocation_is_the_best_of_all_and_beats_uniform_ranks(seed: int) -> None:
    spectra = decaying_spectra(seed)
    shapes = dict.fromkeys(spectra, (12, 12))  # 24 a step; break-even at 6
    uniform = dict.fromkeys(spectra, 3)
    budget = 4 * 24 * 3
    ranks = allocate_ranks(spectra, shapes, budget)
    cost = sum(144 if rank == 12 else 24 * rank for rank in ranks.values())
    assert cost <= budget
    assert kept(spectra, ranks) > kept(spectra, uniform) + 0.01
    every = (dict(zip(spectra, choice, strict=True)) for choice in itertools.product(range(1, 6), repeat=4))
    best = max(kept(spectra, choice) for choice in every if 24 * sum(choice.values()) <= budget)
    assert kept(spectra, ranks) == pytest.approx(best)


def test_allocation_stays_within_any_budget() -> None:
    shapes = {"a": (12, 30), "b": (12, 12), "c": (40, 12), "d": (12, 12)}
    for seed, budget in itertools.product(range(4), range(160, 1400, 77)):
        spectra = dict(zip(shapes, decaying_spectra(seed).values(), strict=True))
        ranks = allocate_ranks(spectra, shapes, budget)
        cost = 0
        for name, (m, n) in shapes.items():
            dense = ranks[name] == min(m, n)
            assert dense or 1 <= ranks[name] < break_even_rank(m, n)
            cost += m * n if dense else factorised_parameters(m, n, ranks[name])
        assert cost <= budget
        assert math.isfinite(kept(spectra, ranks))

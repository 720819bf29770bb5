import math

import pytest
import torch

from hf_efx.low_rank.initialisation import (
    he_factors,
    initial_factors,
    spectral_factors,
    spectral_ones_factors,
    svd,
)

# W = P diag(2√2, √2) Qᵀ with P the identity and Q a rotation by 45 degrees: easy to follow by hand.
W = torch.tensor([[2.0, 2.0], [-1.0, 1.0]], dtype=torch.float64)


def random_matrix(m: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_spectral_by_hand() -> None:
    u, v = spectral_factors(W, 1)
    same(u @ v.mT, torch.tensor([[2.0, 2.0], [0.0, 0.0]], dtype=torch.float64))
    same(u.abs(), torch.tensor([[8**0.25], [0.0]], dtype=torch.float64))  # (2√2)^½ P₁
    same(v.abs(), torch.full((2, 1), 8**0.25 / math.sqrt(2), dtype=torch.float64))


@pytest.mark.parametrize(("m", "n"), [(7, 5), (5, 7), (6, 6)])
def test_spectral_is_the_best_approximation_and_balanced(m: int, n: int) -> None:
    w = random_matrix(m, n)
    sigma = torch.linalg.svdvals(w)
    for rank in range(1, min(m, n) + 1):
        u, v = spectral_factors(w, rank)
        assert u.shape == (m, rank) and v.shape == (n, rank)
        # Eckart-Young: what is cut off is the sum of the squares of the singular values that are cut
        same((w - u @ v.mT).square().sum(), sigma[rank:].square().sum())
        same(u.mT @ u, torch.diag(sigma[:rank]))
        same(v.mT @ v, torch.diag(sigma[:rank]))
    same(u @ v.mT, w)


@pytest.mark.parametrize(("scale", "expected"), [(1.0, 1.0), (0.25, 0.25), ("rms", math.sqrt((8 + 2) / 2))])
def test_spectral_ones_by_hand(scale: float | str, expected: float) -> None:
    u, v = spectral_ones_factors(W, 2, scale)
    same(torch.linalg.svdvals(u @ v.mT), torch.full((2,), expected, dtype=torch.float64))
    p, _, q = svd(W)
    same(u @ v.mT, expected * p @ q.mT)


def test_spectral_ones_keeps_the_subspaces() -> None:
    w = random_matrix(7, 5)
    for rank in (1, 3, 5):
        u, v = spectral_factors(w, rank)
        ones_u, ones_v = spectral_ones_factors(w, rank)
        for factor, ones in ((u, ones_u), (v, ones_v)):
            same(ones.mT @ ones, torch.eye(rank, dtype=torch.float64))  # orthonormal,
            projector = factor @ torch.linalg.inv(factor.mT @ factor) @ factor.mT
            same(ones @ ones.mT, projector)  # and they span what the spectral factors span
        sigma = torch.linalg.svdvals(ones_u @ ones_v.mT)[:rank]
        same(sigma, torch.ones(rank, dtype=torch.float64))
        same((ones_u @ ones_v.mT).norm(), torch.tensor(math.sqrt(rank), dtype=torch.float64))


def test_spectral_ones_rms_has_the_norm_of_spectral() -> None:
    w = random_matrix(6, 9)
    for rank in (1, 4, 6):
        (u, v), (ones_u, ones_v) = spectral_factors(w, rank), spectral_ones_factors(w, rank, "rms")
        same((ones_u @ ones_v.mT).norm(), (u @ v.mT).norm())


def test_he_variances() -> None:
    generator = torch.Generator().manual_seed(0)
    u, v = he_factors(300, 400, 50, generator=generator, dtype=torch.float64)
    assert u.shape == (300, 50) and v.shape == (400, 50)
    # 15,000 and 20,000 draws: the variance's relative standard error is about (2 / N)^½ = 0.012
    assert u.var().item() == pytest.approx(2 / 50, rel=0.05)
    assert v.var().item() == pytest.approx(2 / 400, rel=0.05)
    # independent, so Var (UVᵀ)_ij = r (2 / r) (2 / n) = 4 / n
    assert (u @ v.mT).var().item() == pytest.approx(4 / 400, rel=0.1)
    again = he_factors(300, 400, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(u, again[0]) and torch.equal(v, again[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_decomposed_in_float32(dtype: torch.dtype) -> None:
    w = random_matrix(6, 4).to(dtype)
    p, sigma, q = svd(w)
    assert p.dtype == sigma.dtype == q.dtype == torch.float32
    torch.testing.assert_close(p @ torch.diag(sigma) @ q.mT, w.float(), rtol=0, atol=1e-5)


def test_initial_factors_goes_by_name() -> None:
    for name, function in (("spectral", spectral_factors), ("spectral_ones", spectral_ones_factors)):
        for got, expected in zip(initial_factors(W, 1, name), function(W, 1), strict=True):
            assert torch.equal(got, expected)
    torch.manual_seed(3)
    u, v = initial_factors(W, 1, "he")
    torch.manual_seed(3)
    assert all(torch.equal(a, b) for a, b in zip((u, v), he_factors(2, 2, 1), strict=True))
    with pytest.raises(ValueError, match="init='xavier': expected one of spectral, spectral_ones, he"):
        initial_factors(W, 1, "xavier")

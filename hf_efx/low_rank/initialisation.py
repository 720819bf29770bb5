"""How the factors of W ≈ U Vᵀ start, as pure functions of a matrix W [m, n] and a rank r.

Spectral initialisation: Khodak et al. 2021, "Initialization and Regularization of Factorized Neural Layers", arXiv
2105.01029. Spectral ones, the singular vectors alone: Kamalakara et al. 2022, arXiv 2209.13569.
"""

import math

import torch

INITIALISATIONS = ("spectral", "spectral_ones", "he")


def svd(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Thin singular value decomposition in at least float32: P [m, k], σ [k] descending, Q [n, k], k = min(m, n).

    Half precision has no SVD, and its rounding would be in every factor.
    """
    work = matrix if matrix.dtype == torch.float64 else matrix.float()
    p, sigma, qh = torch.linalg.svd(work, full_matrices=False)
    return p, sigma, qh.mT


def spectral_factors(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Balanced factors of the best rank-r approximation (Eckart-Young): U = P_r Σ_r^½, V = Q_r Σ_r^½.

    Args:
        matrix: W [m, n], drawn from the dense initialisation or trained.
        rank: r, from 1 to min(m, n).

    Returns:
        U [m, r] and V [n, r] in at least float32, with UᵀU = VᵀV = Σ_r.
    """
    p, sigma, q = svd(matrix)
    root = sigma[:rank].sqrt()
    return p[:, :rank] * root, q[:, :rank] * root


def spectral_ones_factors(
    matrix: torch.Tensor, rank: int, scale: float | str = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Singular vectors of W with all singular values set to one number: U = P_r c^½, V = Q_r c^½.

    Args:
        matrix: W [m, n].
        rank: r, from 1 to min(m, n).
        scale: c. 1.0 is the paper's form, in which ‖UVᵀ‖_F = √r whatever the dense initialisation's scale. "rms" takes
            the root mean square of the r largest singular values, so that ‖UVᵀ‖_F is that of the spectral
            initialisation.

    Returns:
        U [m, r] and V [n, r] in at least float32.
    """
    p, sigma, q = svd(matrix)
    value = sigma[:rank].square().mean().sqrt() if scale == "rms" else torch.as_tensor(float(scale), dtype=sigma.dtype)
    root = value.to(sigma.device).sqrt()
    return p[:, :rank] * root, q[:, :rank] * root


def he_factors(
    m: int, n: int, rank: int, *, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Independent normal factors with He variance 2 / fan_in: n is the fan-in of V, r that of U.

    Returns:
        U [m, r] and V [n, r].
    """
    v = torch.randn(n, rank, generator=generator, dtype=dtype) * math.sqrt(2 / n)
    u = torch.randn(m, rank, generator=generator, dtype=dtype) * math.sqrt(2 / rank)
    return u, v


def initial_factors(
    matrix: torch.Tensor, rank: int, init: str, spectral_ones_scale: float | str = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """U [m, r] and V [n, r] by the initialisation of that name (one of `INITIALISATIONS`)."""
    if init == "spectral":
        return spectral_factors(matrix, rank)
    if init == "spectral_ones":
        return spectral_ones_factors(matrix, rank, spectral_ones_scale)
    if init == "he":
        u, v = he_factors(matrix.shape[0], matrix.shape[1], rank)
        return u.to(matrix.device), v.to(matrix.device)
    raise ValueError(f"init={init!r}: expected one of {', '.join(INITIALISATIONS)}.")

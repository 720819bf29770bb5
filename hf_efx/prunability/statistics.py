"""How well a measure ranks networks by their generalization gap: Kendall's tau, granulated tau, mutual information.

Jiang et al. 2020, "Fantastic Generalization Measures and Where to Find Them", arXiv 1912.02178, section 2.2.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Values = Sequence[float] | np.ndarray


def kendall_tau(measure: Values, gap: Values) -> float:
    """Kendall's tau-b over all pairs of networks: 1 for the same order, -1 for the opposite, ties counted out.

    Args:
        measure: [n].
        gap: [n].

    Returns:
        NaN where either is the same for all.

    Raises:
        ValueError: For lengths that differ.
    """
    a, b = _signs(measure), _signs(gap)
    if len(a) != len(b):
        raise ValueError(f"kendall_tau compares network by network, but got {len(a)} and {len(b)} values")
    return float(_tau(a, b, np.ones((1, len(a))))[0])


def granulated_tau(measure: Values, gap: Values, settings: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Kendall's tau over the pairs of networks that differ in one hyperparameter alone, the mean over all groups.

    Args:
        measure: [n].
        gap: [n].
        settings: Hyperparameters of each network.

    Returns:
        For each hyperparameter the mean over groups of networks that share all others, and `"mean"` over those; NaN
        where there are no such groups.
    """
    names = list(settings[0])
    results: dict[str, float] = {}
    for name in names:
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i, one in enumerate(settings):
            groups.setdefault(tuple(one[n] for n in names if n != name), []).append(i)
        taus = []
        for places in groups.values():
            pairs = [(i, j) for i, j in itertools.combinations(places, 2) if settings[i][name] != settings[j][name]]
            signs = [np.sign(measure[i] - measure[j]) * np.sign(gap[i] - gap[j]) for i, j in pairs]
            if signs:
                taus.append(np.mean(signs))
        results[name] = float(np.mean(taus)) if taus else np.nan
    defined = [value for value in results.values() if not np.isnan(value)]
    return {**results, "mean": float(np.mean(defined)) if defined else np.nan}


def conditional_mutual_information(
    measure: Values, gap: Values, settings: Sequence[Mapping[str, Any]], most: int = 2
) -> float:
    """How much of the sign of the gap's difference the sign of the measure's tells, whatever else is known.

    Mutual information of both signs over pairs of networks given the hyperparameters in a set, over the entropy of the
    gap's sign given the same; the minimum over all sets of up to `most` hyperparameters. 0 is none, 1 all of it. Sets
    that leave nothing open about the gap's sign don't count; NaN if all do.

    Args:
        measure: [n].
        gap: [n].
        settings: Hyperparameters of each network.
        most: Largest set.
    """
    n = len(settings)
    left, right = np.array([pair for pair in itertools.permutations(range(n), 2)]).T
    a = (np.asarray(measure)[left] > np.asarray(measure)[right]).astype(int)
    b = (np.asarray(gap)[left] > np.asarray(gap)[right]).astype(int)
    codes = {name: np.unique([str(one[name]) for one in settings], return_inverse=True)[1] for name in settings[0]}
    lowest = np.inf
    for size in range(most + 1):
        for names in itertools.combinations(codes, size):
            group = np.zeros(len(left), np.int64)
            for name in names:
                values = codes[name]
                for side in (left, right):
                    group = group * (values.max() + 1) + values[side]
            lowest = min(lowest, _normalised_information(a, b, np.unique(group, return_inverse=True)[1]))
    return float(lowest) if math.isfinite(lowest) else math.nan


def _normalised_information(a: np.ndarray, b: np.ndarray, group: np.ndarray) -> float:
    """I(A; B | group) / H(B | group) of binary variables; infinite where nothing is open about B."""
    counts = np.zeros((group.max() + 1, 2, 2))
    np.add.at(counts, (group, a, b), 1)
    joint = counts / counts.sum()
    whole = joint.sum((1, 2))
    both, first, second = (_entropy(p) - _entropy(whole) for p in (joint, joint.sum(2), joint.sum(1)))
    return max((first + second - both) / second, 0.0) if second > 1e-12 else math.inf


def _entropy(p: np.ndarray) -> float:
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def bootstrap_taus(
    measures: Mapping[str, Values], gap: Values, draws: int = 2000, seed: int = 0
) -> dict[str, np.ndarray]:
    """Kendall's tau of each measure over networks drawn with replacement; the same draws for all, so that they pair.

    Two copies of one network make no pair.

    Returns:
        [draws] by name.
    """
    n = len(gap)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws).astype(float)
    signs = _signs(gap)
    return {name: _tau(_signs(values), signs, counts) for name, values in measures.items()}


def _signs(values: Values) -> np.ndarray:
    values = np.asarray(values, float)
    return np.sign(values[:, None] - values[None])


def _tau(a: np.ndarray, b: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """tau-b [draws] with each network as often as its count [draws, n] says."""
    agree, in_a, in_b = (((counts @ m) * counts).sum(1) for m in (a * b, np.abs(a), np.abs(b)))
    with np.errstate(invalid="ignore", divide="ignore"):
        return agree / np.sqrt(in_a * in_b)

"""Kendall's tau, granulated tau, conditional mutual information, bootstrap: hand-worked."""

import math

import numpy as np
import pytest

from hf_efx.core.results.statistics import percentile_interval
from hf_efx.prunability.statistics import bootstrap_taus, conditional_mutual_information, granulated_tau, kendall_tau

GRID = [{"width": w, "depth": d} for w in (1, 2) for d in (1, 2)]


def test_kendall_tau():
    assert kendall_tau([1, 2, 3], [10, 20, 30]) == 1
    assert kendall_tau([1, 2, 3], [3, 2, 1]) == -1
    assert kendall_tau([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(4 / 6)  # 5 pairs agree, 1 doesn't
    # One tie in the measure: 2 pairs agree, of 2 and of 3 untied ones.
    assert kendall_tau([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / math.sqrt(2 * 3))
    assert math.isnan(kendall_tau([1, 1], [1, 2]))
    with pytest.raises(ValueError, match="2 and 3"):
        kendall_tau([1, 2], [1, 2, 3])


def test_granulated_tau():
    # Networks (1,1), (1,2), (2,1), (2,2): the measure grows with the width alone, the gap with both.
    found = granulated_tau([1, 1, 2, 2], [1, 2, 3, 4], GRID)
    assert found == {"width": 1.0, "depth": 0.0, "mean": 0.5}
    found = granulated_tau([1, 2, 4, 3], [1, 2, 3, 4], GRID)  # depth: right at width 1, wrong at width 2
    assert found == {"width": 1.0, "depth": 0.0, "mean": 0.5}
    assert math.isnan(granulated_tau([1, 2], [1, 2], [{"a": 1, "b": 1}, {"a": 2, "b": 2}])["mean"])


def test_conditional_mutual_information():
    gap = [1.0, 2.0, 3.0, 4.0]
    assert conditional_mutual_information(gap, gap, GRID) == pytest.approx(1)
    assert conditional_mutual_information([-g for g in gap], gap, GRID) == pytest.approx(1)
    # Each pair stands in both directions: of three pairs two agree, I / log 2 = 1 - h(1/3) / log 2.
    one = [{"a": 0}] * 3
    h = -(math.log(1 / 3) / 3 + 2 * math.log(2 / 3) / 3)
    assert conditional_mutual_information([1, 3, 2], [1, 2, 3], one) == pytest.approx(1 - h / math.log(2))
    # The measure is the width alone: where both widths are known it tells nothing more.
    assert conditional_mutual_information([1, 1, 2, 2], gap, GRID) == pytest.approx(0)
    assert conditional_mutual_information([1, 1, 2, 2], gap, GRID, most=0) > 0.3
    assert math.isnan(conditional_mutual_information(gap, [1, 1, 1, 1], GRID))


def test_bootstrap_pairs_draws_and_leaves_a_networks_own_copies_out():
    generator = np.random.default_rng(0)
    gap = generator.normal(size=40)
    near, far = gap + 0.1 * generator.normal(size=40), gap + generator.normal(size=40)
    found = bootstrap_taus({"same": gap, "near": near, "far": far}, gap, draws=500)
    assert found["same"].shape == (500,) and np.allclose(found["same"], 1)  # copies would be ties in one of two
    low, high = percentile_interval(found["far"])
    assert low < kendall_tau(far, gap) < high
    assert percentile_interval(found["near"] - found["far"])[0] > 0
    assert percentile_interval(np.arange(1001.0)) == pytest.approx((25, 975))
    again = bootstrap_taus({"far": far}, gap, draws=500)
    assert np.array_equal(again["far"], found["far"])

"""Widths, starts, how often a unit is kept, and the rate over training, against hand-worked numbers."""

from typing import Any

import pytest
import torch

from hf_efx.slice_out.schedule import (
    RateSchedule,
    Slice,
    draw_slice,
    inclusion_probability,
    scale,
    slice_width,
    start_positions,
)


def test_pieces_wrap() -> None:
    assert Slice(3, 5, 10).pieces == ((3, 8),)
    assert Slice(5, 5, 10).pieces == ((5, 10),)
    assert Slice(8, 5, 10).pieces == ((0, 3), (8, 10))
    assert Slice(0, 10, 10).pieces == ((0, 10),)


def test_ranges_count_units_and_blocks() -> None:
    assert Slice(1, 2, 4).ranges(unit=8) == ((8, 24),)
    assert Slice(1, 2, 4).ranges(unit=2, blocks=3) == ((2, 6), (10, 14), (18, 22))
    # Wrapped, units 3, 0, 1 of 4: one block's last unit touches the next block's first.
    assert Slice(3, 3, 4).ranges(blocks=2) == ((0, 2), (3, 6), (7, 8))
    assert Slice(0, 4, 4).ranges(unit=2, blocks=3) == ((0, 24),)


@pytest.mark.parametrize(
    ("size", "rate", "align", "expected"),
    [
        (3072, 0.25, 8, 2304),
        (3072, 0.5, 8, 1536),
        (12, 0.25, 1, 9),
        (10, 0.25, 1, 8),  # 7.5, halves up
        (100, 0.5, 8, 48),  # 50 is nearer to 48 than to 56
        (16, 0.9, 1, 2),
        (7, 0.0, 8, 7),  # rate 0 is the dense layer, whatever the alignment
    ],
)
def test_width(size: int, rate: float, align: int, expected: int) -> None:
    assert slice_width(size, rate, align) == expected


@pytest.mark.parametrize(
    ("size", "rate", "align", "message"),
    [
        (16, 1.0, 1, r"rate=1.0: expected .* from 0 to below 1"),
        (16, -0.1, 1, "rate=-0.1"),
        (16, 0.5, 0, "align=0"),
        (16, 0.9, 8, "rate=0.9 of 16 units rounds to a width of 0 at align=8, which leaves nothing"),
        (16, 0.25, 8, "width of 16 at align=8, which drops nothing.*smaller align or another rate"),
        (4, 0.5, 8, "align=8"),
        (2, 0.25, 1, "drops nothing"),
    ],
)
def test_widths_out_of_reach(size: int, rate: float, align: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        slice_width(size, rate, align)


def test_start_positions() -> None:
    assert list(start_positions(10, 6, "all")) == [0, 1, 2, 3, 4]
    assert list(start_positions(32, 16, "aligned", 8)) == [0, 8, 16]
    assert list(start_positions(20, 8, "aligned", 8)) == [0, 8, 12]  # 12: the last units have their turn
    assert list(start_positions(32, 16, "circular", 8)) == [0, 8, 16, 24]
    assert list(start_positions(20, 8, "circular", 8)) == [0, 4, 8, 12, 16]
    for starts in ("all", "aligned", "circular"):
        assert list(start_positions(10, 10, starts)) == [0]
    with pytest.raises(ValueError, match="starts='random': expected one of aligned, all, circular"):
        start_positions(10, 6, "random")
    with pytest.raises(ValueError, match="width=11: expected 1 to 10"):
        start_positions(10, 11)


def test_inclusion_probability_by_hand() -> None:
    # n = 10, w = 6, starts 0 to 4: units 4 and 5 are in every slice, units 0 and 9 in one of five.
    expected = torch.tensor([0.2, 0.4, 0.6, 0.8, 1, 1, 0.8, 0.6, 0.4, 0.2], dtype=torch.float64)
    torch.testing.assert_close(inclusion_probability(10, 6, "all"), expected, rtol=0, atol=1e-15)
    # Starts 0, 4, 8, and 2 units that only the last, unaligned start reaches: 0 4 8 10 for n = 14, w = 4.
    expected = torch.tensor([1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 1, 1], dtype=torch.float64) / 4
    torch.testing.assert_close(inclusion_probability(14, 4, "aligned", 4), expected, rtol=0, atol=1e-15)
    for align in (1, 4, 8):
        flat = inclusion_probability(24, 16, "circular", align)
        torch.testing.assert_close(flat, torch.full_like(flat, 16 / 24), rtol=0, atol=1e-15)


@pytest.mark.parametrize(("size", "width"), [(10, 6), (10, 3), (7, 7), (9, 1)])
def test_inclusion_probability_follows_the_formula(size: int, width: int) -> None:
    last = size - width
    formula = [(min(j, last) - max(0, j - width + 1) + 1) / (last + 1) for j in range(size)]
    got = inclusion_probability(size, width, "all")
    torch.testing.assert_close(got, torch.tensor(formula, dtype=torch.float64), rtol=0, atol=1e-15)


# Against the formula; the bar is the χ² quantile of 1e-6 for its degrees of freedom.
@pytest.mark.parametrize(
    ("case", "draws", "bar"),
    [
        ((10, 6, "all", 1), 100_000, 35.0),  # 5 starts, 4 degrees of freedom: 33.4
        ((32, 16, "aligned", 8), 10_000, 28.0),  # 3 starts: 27.6
        ((20, 8, "circular", 4), 10_000, 35.0),
    ],
)
def test_draws_follow_the_formula(case: tuple[int, int, str, int], draws: int, bar: float) -> None:
    size, width, starts, align = case
    generator = torch.Generator().manual_seed(0)
    drawn = [draw_slice(size, width, starts, align, generator=generator) for _ in range(draws)]
    positions = start_positions(size, width, starts, align)
    counts = torch.zeros(size, dtype=torch.float64)
    kept = torch.zeros(size, dtype=torch.float64)
    for one in drawn:
        counts[one.start] += 1
    for start in range(size):
        for low, high in Slice(start, width, size).pieces:
            kept[low:high] += counts[start]
    assert {one.start for one in drawn} == set(positions)
    expected = draws / len(positions)
    chi_square = ((counts[list(positions)] - expected) ** 2 / expected).sum()
    assert chi_square < bar
    tolerance = 5 * 0.5 / draws**0.5  # standard deviations of a binomial share
    torch.testing.assert_close(kept / draws, inclusion_probability(*case), rtol=0, atol=tolerance)


def test_scales() -> None:
    assert scale(10, 6) == 10 / 6
    got: Any = scale(10, 6, "probabilistic", "all")
    expected = torch.tensor([5, 2.5, 5 / 3, 1.25, 1, 1, 1.25, 5 / 3, 2.5, 5], dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    assert scale(24, 16, "probabilistic", "circular", 8) == pytest.approx(1.5)  # uniform: a number, as cheap as flow
    with pytest.raises(ValueError, match="normalization='none': expected one of flow, probabilistic"):
        scale(10, 6, "none")


@pytest.mark.parametrize("case", [(10, 6, "all", 1), (20, 8, "aligned", 8), (20, 8, "circular", 8)])
def test_probabilistic_normalisation_is_unbiased(case: tuple[int, int, str, int]) -> None:
    # Over the equally probable slices the mean of c * mask is 1 for every unit; for flow only its mean over units is.
    size, width, starts, align = case
    inverse = torch.as_tensor(scale(size, width, "probabilistic", starts, align))
    total, positions = torch.zeros(size, dtype=torch.float64), start_positions(size, width, starts, align)
    for start in positions:
        mask = torch.zeros(size, dtype=torch.float64)
        for low, high in Slice(start, width, size).pieces:
            mask[low:high] = 1
        total += inverse * mask
    torch.testing.assert_close(total / len(positions), torch.ones(size, dtype=torch.float64), rtol=0, atol=1e-12)


def test_rate_over_training() -> None:
    assert [RateSchedule().factor(step) for step in (0, 5, 10**6)] == [1, 1, 1]
    ramp = RateSchedule(ramp_steps=4)
    assert [ramp.factor(step) for step in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]
    stairs = RateSchedule(ramp_steps=10)
    assert [stairs.factor(step) for step in range(11)] == [0, 0, 0, 0.25, 0.25, 0.5, 0.5, 0.5, 0.75, 0.75, 1]
    dense_end = RateSchedule(ramp_steps=2, final_dense_steps=3, max_steps=8)
    assert [dense_end.factor(step) for step in range(9)] == [0, 0.5, 1, 1, 1, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="final_dense_steps=3: the length of the training isn't known"):
        RateSchedule(final_dense_steps=3).factor(0)

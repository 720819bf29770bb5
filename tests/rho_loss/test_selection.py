"""Selection functions and the choice of rows, against hand-worked numbers."""

import doctest
import math

import pytest
import torch

from hf_efx.core.scoring.scorer import QUANTITIES
from hf_efx.rho_loss.selection import (
    SELECTION_FUNCTIONS,
    get_selection_function,
    register_selection_function,
    select_examples,
    select_tokens,
)

INF = math.inf
VALUES = {
    "loss": torch.tensor([1.0, 4.0, 2.0, 3.0]),
    "irreducible_loss": torch.tensor([0.5, 3.9, 0.1, 2.0]),
    "grad_norm": torch.tensor([0.4, 0.1, 0.3, 0.2]),
    "entropy": torch.tensor([0.1, 0.2, 0.4, 0.3]),
    "conditional_entropy": torch.tensor([0.9, 3.8, 0.4, 0.2]),
    "bald": torch.tensor([0.3, 0.1, 0.9, 0.4]),
    "mc_loss": torch.tensor([2.0, 3.7, 0.2, 0.5]),
}
# Rows from the highest score down, worked out by hand.
RANKINGS = {
    "loss": [1, 3, 2, 0],
    "grad_norm": [0, 2, 3, 1],
    "grad_norm_is": [0, 2, 3, 1],
    "negative_irreducible_loss": [2, 0, 3, 1],
    "rho_loss": [2, 3, 0, 1],  # 0.5, 0.1, 1.9, 1.0
    "entropy": [2, 3, 1, 0],
    "conditional_entropy": [1, 0, 2, 3],
    "mc_entropy": [1, 2, 0, 3],  # 1.2, 3.9, 1.3, 0.6
    "bald": [2, 3, 0, 1],
    "loss_minus_conditional_entropy": [3, 2, 1, 0],  # 0.1, 0.2, 1.6, 2.8
    "mc_loss_minus_conditional_entropy": [0, 3, 1, 2],  # 1.1, -0.1, -0.2, 0.3
}


def _ranking(name, values):
    scores = SELECTION_FUNCTIONS[name].score(values)
    assert scores is not None
    return scores.argsort(descending=True).tolist()


@pytest.mark.parametrize("name", RANKINGS)
def test_rankings_by_hand(name):
    function = SELECTION_FUNCTIONS[name]
    assert _ranking(name, {need: VALUES[need] for need in function.needs}) == RANKINGS[name]


def test_the_functions_say_what_they_need():
    assert set(SELECTION_FUNCTIONS) == {"uniform", *RANKINGS}
    for name, function in SELECTION_FUNCTIONS.items():
        assert function.name == name and function.help.endswith(".")
        assert set(function.quantities) <= set(QUANTITIES)
        assert function.needs_irreducible_loss == ("irreducible_loss" in function.needs)
        assert function.sampled == (name == "grad_norm_is")
    assert SELECTION_FUNCTIONS["uniform"].needs == () and SELECTION_FUNCTIONS["uniform"].score({}) is None


def test_limits_of_the_reducible_loss():
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.rand(50, generator=generator) for name in ("loss", "irreducible_loss")}
    zero = torch.zeros(50)
    assert _ranking("rho_loss", values | {"irreducible_loss": zero}) == _ranking("loss", values)
    # A model that is as sure of everything leaves the irreducible loss alone to decide.
    constant = values | {"loss": zero + 2.3}
    assert _ranking("rho_loss", constant) == _ranking("negative_irreducible_loss", values)


def test_the_highest_rows_come_in_the_batch_s_order():
    selection = select_examples(torch.tensor([0.1, 0.9, 0.5, 0.7]), 2, ids=torch.tensor([40, 30, 20, 10]))
    assert selection.rows.tolist() == [1, 3] and selection.weights is None
    assert select_examples(torch.rand(5), 5).rows.tolist() == [0, 1, 2, 3, 4]


def test_a_share_of_the_rows():
    scores = torch.arange(100.0)
    for count, rows in ((0.29, 29), (0.005, 1), (1.0, 100), (1, 1)):
        assert select_examples(scores, count).rows.tolist() == list(range(100 - rows, 100))


def test_ties_go_to_the_smaller_id():
    ids = torch.tensor([7, 3, 9, 1])
    assert select_examples(torch.ones(4), 2, ids=ids).rows.tolist() == [1, 3]
    assert select_examples(torch.tensor([1.0, 1.0, 2.0, 0.0]), 2, ids=ids).rows.tolist() == [1, 2]
    # 16 rows and more sort by another algorithm.
    ids = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    assert sorted(ids[select_examples(torch.zeros(1000), 100, ids=ids).rows].tolist()) == list(range(100))


def test_minus_infinity_is_chosen_last():
    scores = torch.tensor([-INF, -5.0, -INF, -7.0])
    assert select_examples(scores, 2, ids=torch.arange(4)).rows.tolist() == [1, 3]
    assert select_examples(scores, 3, ids=torch.arange(4)).rows.tolist() == [0, 1, 3]


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("bad", [math.nan, INF])
def test_nan_and_infinity_are_refused_by_id(bad, sampled):
    with pytest.raises(ValueError, match=r"1 scores can't be ranked.*\{77: (nan|inf)\}"):
        select_examples(
            torch.tensor([1.0, bad]), 1, ids=torch.tensor([5, 77]), sampled=sampled, generator=torch.Generator()
        )


@pytest.mark.parametrize(
    "scores, count, options, message",
    [
        (torch.ones(4), 5, {}, "count=5 rows can't be chosen from a draw of 4"),
        (torch.ones(4), 0, {}, "count=0"),
        (torch.ones(3), 1, {}, r"shape \[3\] don't belong to ids of shape \[4\]"),
        (torch.ones(4), 1, {"sampled": True}, "generator=None"),
        (None, 1, {}, "generator=None"),
        (None, 1, {"ids": None}, "scores=None and ids=None don't say how many"),
        (torch.ones(4), 0.0, {}, "count=0.0 as a share"),
        (torch.ones(4), 1.5, {}, "count=1.5 as a share"),
        (torch.ones(2, 2), 1, {"ids": None}, r"shape \[2, 2\] don't belong"),
        (-torch.ones(4), 1, {"sampled": True, "generator": torch.Generator()}, "0 or more.*0: -1.0"),
    ],
)
def test_wrong_input_is_refused(scores, count, options, message):
    with pytest.raises(ValueError, match=message):
        select_examples(scores, count, **{"ids": torch.arange(4), **options})


def test_uniform_draws_different_rows_with_the_generator():
    def draw(seed):
        return select_examples(
            None, 10, ids=torch.arange(50), generator=torch.Generator().manual_seed(seed)
        ).rows.tolist()

    before = torch.get_rng_state()
    assert draw(1) == draw(1) == sorted(set(draw(1))) != draw(2)
    assert torch.equal(before, torch.get_rng_state())
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(50)
    for _ in range(2000):
        counts[select_examples(None, 10, ids=torch.arange(50), generator=generator).rows] += 1
    assert (counts / 2000 - 0.2).abs().max() < 5 * math.sqrt(0.2 * 0.8 / 2000)


def test_sampling_weights_by_hand():
    scores = torch.tensor([3.0, 0.0, 1.0, -INF])  # p = 3/4, 0, 1/4 of three rows that count
    selection = select_examples(
        scores, 4, ids=torch.arange(4), sampled=True, generator=torch.Generator().manual_seed(0)
    )
    assert selection.weights is not None and len(selection.rows) == 4
    assert selection.rows.tolist() == sorted(selection.rows.tolist()) and set(selection.rows.tolist()) == {0, 2}
    weights = {0: 1 / (3 * 0.75), 2: 1 / (3 * 0.25)}
    torch.testing.assert_close(selection.weights, torch.tensor([weights[row] for row in selection.rows.tolist()]))


def test_sampling_is_unbiased_over_ten_thousand_draws():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 5, generator=generator, dtype=torch.float64) * 2
    labels = torch.randint(0, 5, (40,), generator=generator)
    gradients = torch.softmax(logits, -1) - torch.nn.functional.one_hot(labels, 5)
    scores, mean, draws = gradients.norm(dim=1), gradients.mean(0), 10_000
    estimates = torch.zeros(draws, 5, dtype=torch.float64)
    for draw in range(draws):
        rows, weights = select_examples(scores, 4, ids=torch.arange(40), sampled=True, generator=generator)
        assert weights is not None
        estimates[draw] = (weights[:, None] * gradients[rows]).mean(0)
    error = (estimates.mean(0) - mean) / (estimates.std(0) / math.sqrt(draws))
    assert error.abs().max() < 4  # standard errors
    # What it is for: less variance than as many rows drawn uniformly, with replacement.
    uniform = (gradients - mean).square().sum(1).mean() / 4
    assert estimates.var(0).sum() < 0.9 * uniform


@pytest.mark.parametrize("scores", [torch.zeros(3), torch.full((3,), -INF)], ids=["zero", "nothing to train on"])
def test_sampling_without_mass_is_uniform(scores):
    generator = torch.Generator().manual_seed(0)
    selections = [
        select_examples(scores, 1, ids=torch.arange(3), sampled=True, generator=generator) for _ in range(50)
    ]
    assert {selection.rows.item() for selection in selections} == {0, 1, 2}
    assert all(selection.weights is not None and selection.weights.item() == 1 for selection in selections)


def test_a_function_of_one_s_own():
    with pytest.raises(ValueError, match="selection='half_rho' is unknown; choose one of uniform, loss"):
        get_selection_function("half_rho")
    function = register_selection_function(
        "half_rho",
        lambda values: values["loss"] - 0.5 * values["irreducible_loss"],
        needs=("loss", "irreducible_loss"),
    )
    try:
        assert get_selection_function("half_rho") is function
        assert function.quantities == ("loss",) and function.needs_irreducible_loss
        assert _ranking("half_rho", VALUES) == [1, 3, 2, 0]  # 0.75, 2.05, 1.95, 2
        with pytest.raises(ValueError, match="name='half_rho' is a selection function already"):
            register_selection_function("half_rho", lambda values: values["loss"])
    finally:
        del SELECTION_FUNCTIONS["half_rho"]
    with pytest.raises(ValueError, match=r"unknown names \['lost'\]; choose from loss, count"):
        register_selection_function("typo", lambda values: values["lost"], needs=("lost",))
    assert "typo" not in SELECTION_FUNCTIONS


def test_the_docstrings_examples_run():
    finder = doctest.DocTestFinder()
    examples = [*finder.find(register_selection_function, globs={}), *finder.find(select_examples, globs={})]
    try:
        assert [doctest.DocTestRunner().run(test) for test in examples] == [(0, 2), (0, 3)]
        assert SELECTION_FUNCTIONS["half_rho"].quantities == ("loss",)
    finally:
        SELECTION_FUNCTIONS.pop("half_rho", None)


def test_tokens_are_chosen_over_the_whole_batch():
    scores = torch.tensor([[9.0, 1.0, 5.0], [4.0, 4.0, 8.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert select_tokens(scores, mask, 0.4).tolist() == [[True, False, False], [False, False, True]]
    # The tie goes to the first in reading order; a masked score, here the 5, is never chosen.
    assert select_tokens(scores, mask, 0.6).tolist() == [[True, False, False], [True, False, True]]
    assert select_tokens(scores, mask, 1.0).tolist() == mask.tolist()
    assert select_tokens(scores, mask, 1e-6).sum() == 1
    assert select_tokens(scores, torch.zeros_like(mask), 0.5).sum() == 0
    hundred = torch.arange(100.0)[None]
    assert select_tokens(hundred, torch.ones(1, 100, dtype=torch.bool), 0.29).sum() == 29


def test_token_scores_without_a_target_may_be_anything():
    scores = torch.tensor([[1.0, math.nan, INF, -INF]])
    chosen = select_tokens(scores, torch.tensor([[True, False, False, True]]), 0.5)
    assert chosen.tolist() == [[True, False, False, False]]
    with pytest.raises(ValueError, match=r"2 token scores are NaN or inf, at \(row, column\) \[\(0, 1\), \(0, 2\)\]"):
        select_tokens(scores, torch.ones(1, 4, dtype=torch.bool), 0.5)


@pytest.mark.parametrize("ratio", [0, -0.1, 1.1])
def test_a_token_ratio_out_of_range_is_refused(ratio):
    with pytest.raises(ValueError, match=f"ratio={ratio} must be"):
        select_tokens(torch.ones(1, 4), torch.ones(1, 4, dtype=torch.bool), ratio)

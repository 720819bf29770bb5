"""Selection functions: what each example of a large batch scores, and which rows the scores choose.

The rule and its baselines are those of "Prioritized Training on Points that are Learnable, Worth Learning, and Not Yet
Learnt", Mindermann et al. 2022, arXiv 2206.07137. The gradient norm and its importance sampling are from "Not All
Samples Are Created Equal: Deep Learning with Importance Sampling", Katharopoulos & Fleuret 2018, arXiv 1803.00942, and
BALD from "Bayesian Active Learning for Classification and Preference Learning", Houlsby et al. 2011, arXiv 1112.5745.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from hf_efx.core.scoring.scorer import QUANTITIES

IRREDUCIBLE_LOSS = "irreducible_loss"
Scores = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class SelectionFunction:
    """One way to score examples.

    Attributes:
        name: What `selection=` calls it.
        score: From the needed values by name, each [n], to scores [n], of which the highest are chosen; None for
            rows that are drawn without looking.
        needs: Names of `core.scoring.QUANTITIES`, and `"irreducible_loss"` where it reads the table.
        sampled: Whether rows are drawn with replacement, as often as their scores are large, and weighted so that the
            mean gradient stays what it is; False for the highest.
        help: What it prefers, in a line.
    """

    name: str
    score: Callable[[Scores], torch.Tensor | None]
    needs: tuple[str, ...] = ()
    sampled: bool = False
    help: str = ""

    @property
    def needs_irreducible_loss(self) -> bool:
        """Whether it reads an irreducible-loss table."""
        return IRREDUCIBLE_LOSS in self.needs

    @property
    def quantities(self) -> tuple[str, ...]:
        """What a `Scorer` has to compute for it."""
        return tuple(name for name in self.needs if name != IRREDUCIBLE_LOSS)


class Selection(NamedTuple):
    """Chosen rows of a batch.

    Attributes:
        rows: [k] int64 on the CPU, ascending: rows stay in the batch's order, so that choosing all changes nothing.
        weights: [k] float32 on the CPU for the rows' losses, None where each counts alike.
    """

    rows: torch.Tensor
    weights: torch.Tensor | None = None


def _one(name: str) -> Callable[[Scores], torch.Tensor]:
    return lambda values: values[name]


_FUNCTIONS = (
    SelectionFunction("uniform", lambda values: None, help="Rows at random: the baseline, which scores nothing."),
    SelectionFunction("loss", _one("loss"), ("loss",), help="The highest loss: hard rows, and mislabelled ones."),
    SelectionFunction(
        "grad_norm",
        _one("grad_norm"),
        ("grad_norm",),
        help="The largest gradient at the logits, an upper bound of the gradient's norm up to a constant.",
    ),
    SelectionFunction(
        "grad_norm_is",
        _one("grad_norm"),
        ("grad_norm",),
        sampled=True,
        help="Sampled in proportion to grad_norm and weighted back: the mean gradient stays, its variance falls.",
    ),
    SelectionFunction(
        "negative_irreducible_loss",
        lambda values: -values[IRREDUCIBLE_LOSS],
        (IRREDUCIBLE_LOSS,),
        help="The lowest irreducible loss: learnable rows, whether learnt or not. Scores nothing while training.",
    ),
    SelectionFunction(
        "rho_loss",
        lambda values: values["loss"] - values[IRREDUCIBLE_LOSS],  # L[y | x; D_t] - L[y | x; D_ho]
        ("loss", IRREDUCIBLE_LOSS),
        help="The highest reducible loss: learnable, worth learning, not yet learnt.",
    ),
    SelectionFunction(
        "entropy",
        _one("entropy"),
        ("entropy",),
        help="The least certain prediction of one pass without dropout, labels unseen.",
    ),
    SelectionFunction(
        "mc_entropy",
        lambda values: values["conditional_entropy"] + values["bald"],
        ("conditional_entropy", "bald"),
        help="The least certain mean prediction over dropout samples, labels unseen: 'entropy' in the paper's code.",
    ),
    SelectionFunction(
        "conditional_entropy",
        _one("conditional_entropy"),
        ("conditional_entropy",),
        help="The highest mean entropy over dropout samples: what stays unsure whatever the weights.",
    ),
    SelectionFunction(
        "bald",
        _one("bald"),
        ("bald",),
        help="The largest mutual information of prediction and weights, over dropout samples, labels unseen.",
    ),
    SelectionFunction(
        "loss_minus_conditional_entropy",
        lambda values: values["loss"] - values["conditional_entropy"],
        ("loss", "conditional_entropy"),
        help="The loss without dropout, less what stays unsure whatever the weights: no second model.",
    ),
    SelectionFunction(
        "mc_loss_minus_conditional_entropy",
        lambda values: values["mc_loss"] - values["conditional_entropy"],
        ("mc_loss", "conditional_entropy"),
        help="The same of the mean loss over dropout samples: 'loss_minus_conditional_entropy' in the paper's code.",
    ),
)

SELECTION_FUNCTIONS: dict[str, SelectionFunction] = {function.name: function for function in _FUNCTIONS}
"""Selection functions by name; `register_selection_function` adds to it."""


def register_selection_function(
    name: str,
    score: Callable[[Scores], torch.Tensor | None],
    needs: Sequence[str] = (),
    *,
    sampled: bool = False,
    help: str = "",
) -> SelectionFunction:
    """Makes a selection function of one's own available as `selection=name`.

    Args:
        name: A new name.
        score: From the values named in `needs`, each [n], to scores [n] of which the highest are chosen.
        needs: Names of `core.scoring.QUANTITIES` or `"irreducible_loss"`.
        sampled: Draw rows in proportion to their scores, which must not be negative, instead of taking the highest.
        help: What it prefers, in a line.

    Raises:
        ValueError: If the name is taken, or a need is nothing that can be computed.

    Example:
        >>> from hf_efx.rho_loss.selection import register_selection_function
        >>> function = register_selection_function(
        ...     "half_rho", lambda v: v["loss"] - 0.5 * v["irreducible_loss"], needs=("loss", "irreducible_loss")
        ... )
    """
    if name in SELECTION_FUNCTIONS:
        raise ValueError(f"name={name!r} is a selection function already; choose another name")
    known = (*QUANTITIES, IRREDUCIBLE_LOSS)
    if unknown := sorted(set(needs) - set(known)):
        raise ValueError(f"needs={list(needs)} has unknown names {unknown}; choose from {', '.join(known)}")
    SELECTION_FUNCTIONS[name] = SelectionFunction(name, score, tuple(needs), sampled, help)
    return SELECTION_FUNCTIONS[name]


def get_selection_function(name: str) -> SelectionFunction:
    """Looks a selection function up.

    Raises:
        ValueError: If there is none of the name.
    """
    if name not in SELECTION_FUNCTIONS:
        raise ValueError(
            f"selection={name!r} is unknown; choose one of {', '.join(SELECTION_FUNCTIONS)}, or add it with "
            f"register_selection_function"
        )
    return SELECTION_FUNCTIONS[name]


def select_examples(
    scores: torch.Tensor | None,
    count: int | float,
    *,
    ids: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    sampled: bool = False,
) -> Selection:
    """Chooses rows by their scores, as the Trainer does: for training loops of one's own.

    The highest scores are chosen, equal ones by the smaller id, on every machine alike. A score of -inf marks a row
    that can't be trained on: it is chosen only when nothing else is left.

    With `sampled`, rows are drawn with replacement, row i with probability p_i in proportion to its score, and
    weighted by 1 / (n p_i): mean(weights * gradients of the chosen) is then an unbiased estimate of the mean gradient
    of the n rows whose score isn't -inf, if a row of score 0 has no gradient (Katharopoulos & Fleuret 2018).

    Args:
        scores: [n] floats on any device, or None to draw different rows at random, of those that `ids` names.
        count: Rows to choose: an int from 1 to n, or a float above 0 up to 1 for their share of n, rounded down, but
            one at least.
        ids: [n] the rows' example ids; None for their places.
        generator: CPU generator for what is random, required there.
        sampled: Draw in proportion to the scores instead of taking the highest.

    Returns:
        The rows, ascending, and their weights where they are sampled.

    Raises:
        ValueError: For a NaN or +inf score, naming the ids, a negative one where they are sampled, shapes that don't
            belong together, a count out of range, or a missing generator.

    Example:
        >>> import torch
        >>> from hf_efx import select_examples
        >>> select_examples(torch.tensor([0.1, 0.9, 0.5, 0.7]), 0.5).rows
        tensor([1, 3])
    """
    if ids is None:
        if scores is None:
            raise ValueError("scores=None and ids=None don't say how many rows there are; pass ids")
        ids = torch.arange(scores.numel())
    ids = ids.detach().to("cpu", torch.int64)
    count = _rows_to_choose(count, len(ids))
    if generator is None and (sampled or scores is None):
        raise ValueError("generator=None, but rows are drawn at random; pass a torch.Generator")
    if scores is None:
        return Selection(torch.randperm(len(ids), generator=generator)[:count].sort().values)
    scores = scores.detach().to("cpu", torch.float64)
    if scores.shape != ids.shape:
        raise ValueError(f"scores of shape {list(scores.shape)} don't belong to ids of shape {list(ids.shape)}")
    wrong = scores.isnan() | (scores == math.inf)
    _refuse(wrong, scores, ids, "a model that diverged or overflowed in half precision")
    if sampled:
        _refuse((scores < 0) & (scores != -math.inf), scores, ids, "sampling needs scores of 0 or more")
        return _sample(scores, count, generator)
    by_id = ids.argsort(stable=True)
    best = by_id[scores[by_id].argsort(descending=True, stable=True)[:count]]
    return Selection(best.sort().values)


def select_tokens(scores: torch.Tensor, mask: torch.Tensor, ratio: float) -> torch.Tensor:
    """Chooses the highest-scoring share of a batch's tokens.

    Args:
        scores: [n, seq] floats.
        mask: [n, seq] bool, True for the tokens that have a target; the others are never chosen.
        ratio: Share of the masked tokens, over the whole batch, above 0 to 1; rounded down, but at least one.

    Returns:
        [n, seq] bool on the scores' device. Equal scores are chosen in reading order.

    Raises:
        ValueError: For a NaN or +inf score of a token with a target, a ratio out of range, or unequal shapes.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio={ratio} must be above 0 and at most 1")
    if scores.shape != mask.shape:
        raise ValueError(f"scores of shape {list(scores.shape)} don't belong to a mask of shape {list(mask.shape)}")
    valid = mask.flatten().nonzero()[:, 0]
    values = scores.detach().flatten()[valid]
    wrong = values.isnan() | (values == math.inf)
    if wrong.any():
        places = [divmod(place, mask.shape[1]) for place in valid[wrong][:5].tolist()]
        raise ValueError(
            f"{int(wrong.sum())} token scores are NaN or inf, at (row, column) {places}: a model that diverged or "
            f"overflowed in half precision"
        )
    chosen = torch.zeros_like(mask, dtype=torch.bool).flatten()
    if len(valid):
        count = max(1, _share(ratio, len(valid)))
        chosen[valid[values.argsort(descending=True, stable=True)[:count]]] = True
    return chosen.reshape(mask.shape)


def _rows_to_choose(count: int | float, rows: int) -> int:
    if isinstance(count, float):
        if not 0 < count <= 1:
            raise ValueError(f"count={count} as a share of the rows must be above 0 and at most 1")
        count = max(1, _share(count, rows))
    if not 1 <= count <= rows:
        raise ValueError(f"count={count} rows can't be chosen from a draw of {rows}; draw more or choose fewer")
    return count


def _share(ratio: float, rows: int) -> int:
    return math.floor(ratio * rows + 1e-9)  # .29 of 100 is 28.999999999999996


def _refuse(wrong: torch.Tensor, scores: torch.Tensor, ids: torch.Tensor, reason: str) -> None:
    if wrong.any():
        some = ", ".join(f"{i}: {s}" for i, s in zip(ids[wrong][:5].tolist(), scores[wrong][:5].tolist(), strict=True))
        raise ValueError(f"{int(wrong.sum())} scores can't be ranked ({reason}), by example_id {{{some}}}")


def _sample(scores: torch.Tensor, count: int, generator: torch.Generator | None) -> Selection:
    possible = scores != -math.inf
    mass = torch.where(possible, scores, 0.0)
    if not mass.any():  # nothing to prefer, or nothing but rows that can't be trained on
        mass = possible.double() if possible.any() else torch.ones_like(scores)
    p = mass / mass.sum()
    rows = torch.multinomial(p, count, replacement=True, generator=generator).sort().values
    n = int(possible.sum()) or len(scores)
    return Selection(rows, (1 / (n * p[rows])).float())

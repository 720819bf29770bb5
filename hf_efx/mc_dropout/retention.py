"""What is gained by keeping the surest translations alone: retention curves, and the prediction-rejection ratio."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hf_efx.core.results.curves import RetentionCurve
from hf_efx.core.results.statistics import Interval, percentile_interval
from hf_efx.mc_dropout.bleu import MAX_ORDER, bleu_from_counts, bleu_signature, ngram_ids, tokens
from hf_efx.mc_dropout.detection import Scores, finite_scores

FRACTIONS = tuple(step / 20 for step in range(1, 21))


@dataclass(frozen=True)
class PredictionRejection:
    """How much of what deferral can gain in mean quality a score gains.

    Attributes:
        ratio: (area - random_area) / (oracle_area - random_area): 1 for the order by quality itself, 0 for a random
            one; NaN where all sources have the same quality.
        interval: Of the ratio; None without draws.
        area: Mean over k of the mean quality of the k surest.
        oracle_area: That of the order by quality.
        random_area: That of a random order: the mean quality.
    """

    ratio: float
    interval: Interval | None
    area: float
    oracle_area: float
    random_area: float


def retention_curves(
    scores: Mapping[str, Scores],
    hypotheses: Sequence[str],
    references: Sequence[str],
    *,
    tie_break: str | None = None,
    fractions: Sequence[float] = FRACTIONS,
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, RetentionCurve]:
    """Corpus BLEU of what is kept, over the share that is kept, the surest first (Xiao, Gomez, Gal 2020, arXiv
    2006.08344).

    BLEU is sacrebleu's corpus BLEU (0 to 100; 13a, exponential smoothing), from counts that are taken once. Where
    sources are tied, each counts with the mean of their counts: the curve depends on no order of the rows.

    Args:
        scores: [n] by name, higher being less certain.
        hypotheses: [n] translations.
        references: [n] one for each.
        tie_break: Name of the score that orders the sources which another score ties.
        fractions: To keep, above 0 up to 1.
        draws: Bootstrap draws of sources with replacement, the same for all scores; 0 for no intervals.
        seed: Of the draws.
        level: Of the intervals.

    Returns:
        A curve for each score, with its area and intervals.

    Raises:
        ImportError: If sacrebleu isn't installed; it names the extra that installs it.
        ValueError: For a score that isn't finite, lengths that differ, an unknown `tie_break`, wrong fractions.
    """
    if not isinstance(scores, Mapping):
        raise ValueError("retention_curves: scores: expected the scores by name, such as {'bleuvar': scores}.")
    fractions = tuple(sorted({float(fraction) for fraction in fractions}))
    if not fractions or not (fractions[0] > 0 and fractions[-1] <= 1):
        raise ValueError(f"fractions={list(fractions)}: expected shares to keep, above 0 up to 1.")
    if tie_break is not None and tie_break not in scores:
        raise ValueError(f"tie_break={tie_break!r} isn't among the scores: {', '.join(scores)}.")
    counts = _bleu_counts(hypotheses, references)
    kept = np.array([math.ceil(fraction * len(counts) - 1e-9) for fraction in fractions]) - 1

    def bleu(ordered: np.ndarray) -> np.ndarray:
        return _corpus_bleu(ordered.cumsum(0)[kept])

    settings = {"sources": len(counts), "tie_break": tie_break, "draws": draws, "seed": seed, "level": level}
    settings["signature"] = bleu_signature(corpus=True)
    curves = {}
    for name, values in scores.items():
        rank = _ranks(len(counts), name, values, None if tie_break is None else scores[tie_break])
        points = tuple(zip(fractions, map(float, bleu(_in_order(rank, counts))), strict=True))
        drawn = [bleu(counts[rows]) for rows in _resampled(rank, draws, seed)]
        areas = [RetentionCurve(tuple(zip(fractions, one, strict=True)), "bleu", True).area for one in drawn]
        curves[name] = RetentionCurve(
            points,
            "bleu",
            True,
            settings,
            tuple(percentile_interval(column, level) for column in np.array(drawn).T),
            percentile_interval(np.array(areas), level) if areas else None,
        )
    return curves


def prediction_rejection_ratio(
    scores: Scores,
    quality: Scores,
    *,
    tie_break: Scores | None = None,
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> PredictionRejection:
    """How well a score orders sources by quality, between a random order and the order by quality itself (as in
    Malinin and Gales 2021, arXiv 2002.07650).

    It needs a quality of each source by itself, whose mean is what is kept: take `sentence_chrf(hypotheses,
    references)`. Corpus BLEU, which `retention_curves` show, is no such mean and has no oracle order.

    Args:
        scores: [n] higher being less certain.
        quality: [n] higher being better.
        tie_break: [n] a second score, which orders the sources that the first ties. Those that are tied still count
            with the mean of their qualities.
        draws: Bootstrap draws of sources with replacement; 0 for no interval.
        seed: Of the draws.
        level: Of the interval.

    Raises:
        ValueError: For what isn't finite, or lengths that differ.
    """
    values = finite_scores(quality, "quality")
    rank = _ranks(len(values), "scores", scores, tie_break)
    whole = _rejection(_in_order(rank, values), values)
    drawn = [_ratio(*_rejection(values[rows], values[rows])) for rows in _resampled(rank, draws, seed)]
    return PredictionRejection(_ratio(*whole), percentile_interval(np.array(drawn), level) if drawn else None, *whole)


def _rejection(ordered: np.ndarray, quality: np.ndarray) -> tuple[float, float, float]:
    """Areas of the qualities to expect in an order, of the qualities in the oracle's, and in a random one."""
    kept = np.arange(1, len(quality) + 1)
    areas = [float((values.cumsum() / kept).mean()) for values in (ordered, np.sort(quality)[::-1])]
    return areas[0], areas[1], float(quality.mean())


def _ratio(area: float, oracle: float, random: float) -> float:
    return (area - random) / (oracle - random) if oracle - random > 1e-12 * abs(oracle) else math.nan


def _ranks(count: int, name: str, scores: Scores, tie_break: Scores | None) -> np.ndarray:
    """[n] place of each source by score, then by the second one; equal for those that both tie."""
    keys = [finite_scores(scores, name)]
    if tie_break is not None:
        keys.append(finite_scores(tie_break, "tie_break"))
    if any(key.shape != (count,) for key in keys):
        raise ValueError(f"{name} and tie_break of shapes {[list(key.shape) for key in keys]} for {count} sources.")
    return np.unique(np.stack(keys, 1), axis=0, return_inverse=True)[1].reshape(-1)


def _in_order(rank: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The sources' values [n, ...] by rank, each the mean of those of the same rank."""
    order = np.argsort(rank, kind="stable")
    sizes = np.bincount(rank)
    sums = np.add.reduceat(values[order], np.cumsum(sizes) - sizes)
    means = sums / sizes.reshape(-1, *[1] * (values.ndim - 1))
    return np.repeat(means, sizes, axis=0)


def _resampled(rank: np.ndarray, draws: int, seed: int) -> Iterator[np.ndarray]:
    """Rows [n] with replacement, by rank; those of one rank in random order, as a stable sort leaves them."""
    generator = np.random.default_rng(seed)
    for _ in range(draws):
        rows = generator.integers(len(rank), size=len(rank))
        yield rows[np.argsort(rank[rows], kind="stable")]


def _bleu_counts(hypotheses: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """[n, 10] sufficient statistics: tokens of the hypothesis and of the reference, matches and n-grams by order."""
    count = len(hypotheses)
    if count != len(references) or not count:
        raise ValueError(f"{count} hypotheses and {len(references)} references: expected one for each.")
    if wrong := [text for text in (*hypotheses, *references) if not isinstance(text, str)]:
        raise ValueError(f"hypotheses and references hold {wrong[0]!r}: expected texts, one reference for each.")
    sequences = [tokens(text) for text in (*hypotheses, *references)]
    lengths = np.array([len(sequence) for sequence in sequences], np.float64).reshape(2, count)
    correct = np.zeros((count, MAX_ORDER))
    for order, (owner, ids) in enumerate(ngram_ids(sequences)):
        pairs, places = np.unique(np.stack([owner % count, ids], 1), axis=0, return_inverse=True)
        sides = [np.bincount(places.reshape(-1)[owner // count == side], minlength=len(pairs)) for side in (0, 1)]
        correct[:, order] = np.bincount(pairs[:, 0], np.minimum(*sides), count)
    total = np.maximum(lengths[0][:, None] - np.arange(MAX_ORDER), 0)
    return np.concatenate([lengths.T, correct, total], axis=1)


def _corpus_bleu(counts: np.ndarray) -> np.ndarray:
    """[..., 10] summed statistics to BLEU from 0 to 100."""
    correct, total = counts[..., 2 : 2 + MAX_ORDER], counts[..., 2 + MAX_ORDER :]
    return 100 * bleu_from_counts(correct, total, counts[..., 0], counts[..., 1], effective_order=False)

"""How uncertain a model is of its output, from samples of it: scores with one sign, higher being less certain.

Scores of texts compare the samples, those of the answer read its probability, and those of tokens compare what the
samples' masks predict while the answer is read (Malinin and Gales 2021, "Uncertainty Estimation in Autoregressive
Structured Prediction", arXiv 2002.07650).
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hf_efx.mc_dropout.bleu import SampledTexts, bleuvar, over_sources
from hf_efx.mc_dropout.similarity import pairwise_chrf, pairwise_rouge_l


@dataclass(frozen=True, eq=False)
class TokenStatistics:
    """What the samples' predictions of the answer's tokens say, the mean over its tokens, in nats; see
    `token_statistics`.

    Attributes:
        entropy: [n] of the mean prediction: the total uncertainty.
        expected_entropy: [n] mean of the predictions' own entropies: the data's share of it.
        mutual_information: [n] the first less the second: the model's share of it.
        reverse_mutual_information: [n] mean divergence KL(mean prediction || prediction).
        epkl: [n] mean divergence KL between two predictions.
    """

    entropy: np.ndarray
    expected_entropy: np.ndarray
    mutual_information: np.ndarray
    reverse_mutual_information: np.ndarray
    epkl: np.ndarray

    @classmethod
    def concatenate(cls, batches: Iterable["TokenStatistics"]) -> "TokenStatistics":
        """The statistics of all batches' sources, in order."""
        rows = list(batches)
        return cls(*(np.concatenate([getattr(row, f.name) for row in rows]) for f in dataclasses.fields(cls)))


@dataclass(frozen=True, eq=False)
class Evidence:
    """What scores of n sources are made from; None is what wasn't measured.

    Attributes:
        texts: [n][num_samples] the samples.
        sample_log_probs: [n][num_samples] total log-probabilities of the samples' tokens.
        sample_lengths: [n][num_samples] how many tokens those are.
        answers: [n] the texts that are given out.
        answer_log_probs: [n] total log-probabilities of the answers' tokens, with dropout off.
        answer_lengths: [n] how many tokens those are.
        length_penalty: The one that answers were searched with.
        token_statistics: Of the answers under the samples' masks.
    """

    texts: Sequence[Sequence[str]] | None = None
    sample_log_probs: Sequence[Sequence[float]] | np.ndarray | None = None
    sample_lengths: Sequence[Sequence[int]] | np.ndarray | None = None
    answers: Sequence[str] | None = None
    answer_log_probs: Sequence[float] | np.ndarray | None = None
    answer_lengths: Sequence[int] | np.ndarray | None = None
    length_penalty: float = 1.0
    token_statistics: TokenStatistics | None = None


Uncertainty = Callable[..., Any]
_EVIDENCE = tuple(field.name for field in dataclasses.fields(Evidence))


def token_statistics(logits: torch.Tensor, mask: torch.Tensor) -> TokenStatistics:
    """Total, data and knowledge uncertainty of each position of one batch, the mean over a source's positions.

    With p_s the prediction of sample s and p the mean of them: H[p]; E H[p_s]; MI = H[p] - E H[p_s];
    RMI = E KL(p || p_s); EPKL = E KL(p_s || p_t) = MI + RMI, over all ordered pairs s, t (Malinin and Gales 2021,
    arXiv 2002.07650). Computed in float64, a source at a time.

    Args:
        logits: [num_samples, n, T, V] such that those at position t predict the answer's token t, by teacher forcing
            of the same answer under the masks of each sample. -inf is a token that can't come.
        mask: [n, T] true for the answer's tokens, its end token among them.

    Raises:
        ValueError: For shapes that don't belong together, fewer than two samples, a source without tokens, or logits
            that are NaN.
    """
    if logits.dim() != 4 or mask.shape != logits.shape[1:3]:
        raise ValueError(
            f"logits of shape {list(logits.shape)} and mask of shape {list(mask.shape)}: expected "
            f"[num_samples, n, T, V] and [n, T]."
        )
    if len(logits) < 2:
        raise ValueError(f"logits have num_samples={len(logits)}: one sample has nothing to differ from, give two.")
    mask = mask.to(device=logits.device, dtype=torch.bool)
    if not bool(mask.any(-1).all()):
        raise ValueError(f"mask: source {int((~mask.any(-1)).nonzero()[0])} has no token: leave it out.")
    with torch.no_grad():
        rows = [_statistics(logits[:, i, mask[i]]) for i in range(mask.shape[0])]
    columns = np.array(rows, np.float64).reshape(len(rows), 5).T
    if np.isnan(columns).any():
        raise ValueError("logits are NaN: nothing can be said about them.")
    return TokenStatistics(*columns)


def _statistics(logits: torch.Tensor) -> list[float]:
    """The five statistics of one source from its logits [num_samples, tokens, V]."""
    log_p = torch.log_softmax(logits, dim=-1, dtype=torch.float64)
    log_mean = torch.logsumexp(log_p, 0) - math.log(len(log_p))
    mean = log_mean.exp()
    entropy = _entropy(mean, log_mean)
    expected = _entropy(log_p.exp(), log_p).mean(0)
    # E[-sum p log p_s]; a token that no sample gives any probability adds nothing.
    cross = -torch.where(mean == 0, 0.0, mean * log_p.mean(0)).sum(-1)
    # Each is 0 or more: below it is rounding, where the samples agree.
    values = (entropy, expected, entropy - expected, cross - entropy, cross - expected)
    return [float(value.clamp(min=0).mean()) for value in values]


def _entropy(p: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    return -torch.where(p == 0, 0.0, p * log_p).sum(-1)


def token_entropy(statistics: TokenStatistics) -> np.ndarray:
    """Total uncertainty: entropy of the mean prediction of a token (Malinin and Gales 2021, arXiv 2002.07650).

    Returns:
        [n].
    """
    return statistics.entropy


def mutual_information(statistics: TokenStatistics) -> np.ndarray:
    """Knowledge uncertainty: mutual information of a token and the weights (Malinin and Gales 2021, arXiv 2002.07650).

    Returns:
        [n].
    """
    return statistics.mutual_information


def reverse_mutual_information(statistics: TokenStatistics) -> np.ndarray:
    """Mean KL(mean prediction || prediction) of a token (Malinin and Gales 2021, arXiv 2002.07650).

    Returns:
        [n].
    """
    return statistics.reverse_mutual_information


def epkl(statistics: TokenStatistics) -> np.ndarray:
    """Expected pairwise KL divergence of a token's predictions (Malinin and Gales 2021, arXiv 2002.07650).

    Returns:
        [n].
    """
    return statistics.epkl


def sequence_probability(answer_log_probs: Sequence[float] | np.ndarray) -> np.ndarray:
    """Negated total log-probability of the answer: long answers have more of it. A baseline of the paper (Xiao, Gomez,
    Gal 2020, arXiv 2006.08344).

    Args:
        answer_log_probs: [n].

    Returns:
        [n] in nats.
    """
    return -np.asarray(answer_log_probs, np.float64)


def beam_score(
    answer_log_probs: Sequence[float] | np.ndarray,
    answer_lengths: Sequence[int] | np.ndarray,
    length_penalty: float = 1.0,
) -> np.ndarray:
    """Negated score by which beam search ranks its answers: log-probability / length^length_penalty (Wu et al. 2016,
    arXiv 1609.08144, in the form that `transformers.generate` has). A baseline of the paper (arXiv 2006.08344).

    Args:
        answer_log_probs: [n].
        answer_lengths: [n] 1 or more.
        length_penalty: `generate`'s own.

    Returns:
        [n].

    Raises:
        ValueError: For a length below 1, or shapes that differ.
    """
    log_probs, lengths = np.asarray(answer_log_probs, np.float64), np.asarray(answer_lengths, np.float64)
    if log_probs.shape != lengths.shape or (lengths < 1).any():
        raise ValueError(
            f"answer_lengths of shape {list(lengths.shape)}, the smallest {lengths.min(initial=np.inf):g}: expected "
            f"{list(log_probs.shape)} as the log-probabilities, each 1 or more."
        )
    return -log_probs / lengths**length_penalty


def lexical_similarity(texts: Sequence[str] | Sequence[Sequence[str]] | SampledTexts) -> float | np.ndarray:
    """1 - mean pairwise ROUGE-L of the samples: lexical similarity (Fomicheva et al. 2020, "Unsupervised Quality
    Estimation for Neural Machine Translation", arXiv 2005.10608, with METEOR; with ROUGE-L as in Kuhn et al. 2023,
    arXiv 2302.09664), turned so that higher is less certain.

    Args:
        texts: As `bleuvar`'s samples.

    Returns:
        A float for one source, [n] for several.

    Raises:
        ImportError: If sacrebleu isn't installed.
        ValueError: For fewer than two texts of a source, or what isn't texts.
    """
    return over_sources(texts, lambda one: 1 - _mean_of_pairs(pairwise_rouge_l(one)), "lexical_similarity")


def chrf(texts: Sequence[str] | Sequence[Sequence[str]] | SampledTexts) -> float | np.ndarray:
    """1 - mean pairwise chrF of the samples: `lexical_similarity` in characters (chrF: Popović 2015).

    Args:
        texts: As `bleuvar`'s samples.

    Returns:
        A float for one source, [n] for several.

    Raises:
        ImportError: If neither fastchrf nor sacrebleu is installed.
        ValueError: For fewer than two texts of a source, or what isn't texts.
    """
    return over_sources(texts, lambda one: 1 - _mean_of_pairs(pairwise_chrf(one)), "chrf")


def _mean_of_pairs(similarity: np.ndarray) -> float:
    """Over i != j; the diagonal is 1. Exactly 1 where all are."""
    n = len(similarity)
    return (math.fsum(similarity.flat) - n) / (n * (n - 1))


UNCERTAINTIES: dict[str, Uncertainty] = {
    "bleuvar": bleuvar,
    "lexical_similarity": lexical_similarity,
    "chrf": chrf,
    "beam_score": beam_score,
    "sequence_probability": sequence_probability,
    "token_entropy": token_entropy,
    "mutual_information": mutual_information,
    "reverse_mutual_information": reverse_mutual_information,
    "epkl": epkl,
}
"""Scores by name, all with one sign: higher is less certain. `register_uncertainty` adds to it."""

_NEEDS: dict[str, tuple[str, ...]] = {
    "bleuvar": ("texts",),
    "lexical_similarity": ("texts",),
    "chrf": ("texts",),
    "beam_score": ("answer_log_probs", "answer_lengths", "length_penalty"),
    "sequence_probability": ("answer_log_probs",),
    **dict.fromkeys(
        ("token_entropy", "mutual_information", "reverse_mutual_information", "epkl"), ("token_statistics",)
    ),
}


OWN_UNCERTAINTIES = frozenset(UNCERTAINTIES)


def register_uncertainty(name: str, function: Uncertainty, needs: Sequence[str] = ("texts",)) -> None:
    """Makes a score of one's own available by name.

    Args:
        name: Such as a column of a table may have; an earlier score of one's own gives way.
        function: From the fields of `Evidence` that `needs` names, in that order, to [n] numbers, higher being less
            certain.
        needs: Fields of `Evidence`: only what some score needs is measured.

    Raises:
        ValueError: If the name is taken or no identifier, or a need is no field of `Evidence`.

    Example:
        >>> import numpy as np
        >>> from hf_efx.mc_dropout import register_uncertainty
        >>> def spread(log_probs):  # of the samples' log-probabilities
        ...     return np.std(log_probs, axis=1)
        >>> register_uncertainty("log_prob_spread", spread, needs=["sample_log_probs"])
    """
    taken = {*OWN_UNCERTAINTIES, "example_id", "source", "target", "translation", "samples", "deferred", "note"}
    if name in taken or not name.isidentifier():
        raise ValueError(f"name={name!r} is {'taken' if name in taken else 'no identifier'}: choose another.")
    if isinstance(needs, str) or not needs or set(needs) - set(_EVIDENCE):
        raise ValueError(f"needs={needs!r}: expected a list of fields of Evidence, of {', '.join(_EVIDENCE)}.")
    UNCERTAINTIES[name] = function
    _NEEDS[name] = tuple(needs)


def uncertainty_needs(names: Iterable[str]) -> set[str]:
    """The fields of `Evidence` that these scores are made from.

    Raises:
        ValueError: For an unknown name.
    """
    names = list(names)
    if unknown := [name for name in names if name not in UNCERTAINTIES]:
        raise ValueError(
            f"uncertainty {unknown[0]!r} is unknown; choose from {', '.join(UNCERTAINTIES)}, or add it with "
            f"register_uncertainty."
        )
    return {need for name in names for need in _NEEDS[name]}


def compute_uncertainties(evidence: Evidence, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """Computes scores of n sources.

    Args:
        evidence: What they are made from.
        names: Which; None for all that the evidence suffices for.

    Returns:
        [n] float64 by name.

    Raises:
        ImportError: If an extra that a score needs isn't installed.
        ValueError: For an unknown name, a field of the evidence that is missing, or a function that gives no [n].
    """
    there = {name for name in _EVIDENCE if getattr(evidence, name) is not None}
    names = [name for name in UNCERTAINTIES if set(_NEEDS[name]) <= there] if names is None else list(names)
    if missing := sorted(uncertainty_needs(names) - there):
        raise ValueError(f"evidence lacks {', '.join(missing)}, which {', '.join(names)} are made from.")
    sources = _sources(evidence)
    scores = {}
    for name in names:
        inputs = (getattr(evidence, need) for need in _NEEDS[name])
        scores[name] = np.asarray(UNCERTAINTIES[name](*inputs), np.float64)
        if scores[name].shape != (sources,):
            raise ValueError(f"uncertainty {name!r} gave shape {list(scores[name].shape)} for {sources} source(s).")
    return scores


def _sources(evidence: Evidence) -> int:
    """How many sources the evidence is of."""
    counts = {
        name: len(value.entropy if isinstance(value, TokenStatistics) else value)
        for name in _EVIDENCE
        if (value := getattr(evidence, name)) is not None and not isinstance(value, float)
    }
    if len(set(counts.values())) > 1:
        raise ValueError(f"evidence is of different numbers of sources: {counts}.")
    return next(iter(counts.values()), 0)

"""How alike texts are, besides BLEU: ROUGE-L and chrF."""

import importlib
import importlib.util
from collections.abc import Sequence

import numpy as np

from hf_efx.mc_dropout.bleu import mt_metrics, tokens, unique_items


def pairwise_rouge_l(texts: Sequence[str]) -> np.ndarray:
    """ROUGE-L's F1 between all pairs of texts: 2 LCS / (length + length) over the tokens of `pairwise_bleu` (Lin 2004,
    "ROUGE: A Package for Automatic Evaluation of Summaries").

    Args:
        texts: [N].

    Returns:
        [N, N] float64, symmetric; exactly 1 for the same tokens, none included, and 0 where none is shared.

    Raises:
        ImportError: If sacrebleu isn't installed.
    """
    unique, places = unique_items([tokens(text) for text in texts])
    lengths = np.array([len(sequence) for sequence in unique], np.int64)
    numbers: dict[str, int] = {}
    padded = np.full((len(unique), int(lengths.max(initial=0))), -1, np.int64)
    for row, sequence in zip(padded, unique, strict=True):
        row[: len(sequence)] = [numbers.setdefault(token, len(numbers)) for token in sequence]
    left, right = np.triu_indices(len(unique), 1)
    common = np.zeros((len(left), padded.shape[1] + 1), np.int64)  # by the length of a prefix of the right text
    for token in padded.T:
        match = (token[left, None] == padded[right]) & (token[left, None] >= 0)
        common[:, 1:] = np.maximum(common[:, 1:], (common[:, :-1] + 1) * match)
        common = np.maximum.accumulate(common, axis=1)
    score = np.eye(len(unique))
    score[left, right] = score[right, left] = 2 * common[:, -1] / np.maximum(lengths[left] + lengths[right], 1)
    return score[np.ix_(places, places)]


def pairwise_chrf(texts: Sequence[str]) -> np.ndarray:
    """chrF between all ordered pairs of texts (Popović 2015, "chrF: character n-gram F-score for automatic MT
    evaluation"): characters up to 6 in a row, recall weighted twice, as sacrebleu has it.

    By fastchrf where it is installed, else by sacrebleu, which takes about 1.6 ms a pair; both agree to 1e-12.

    Args:
        texts: [N].

    Returns:
        [N, N] float64 from 0 to 1, row i being the hypothesis; exactly 1 for equal texts, empty ones included.

    Raises:
        ImportError: If neither is installed.
    """
    unique, places = unique_items(texts)
    score = _chrf([unique], [unique]).reshape(len(unique), len(unique))
    np.fill_diagonal(score, 1.0)
    return score[np.ix_(places, places)]


def sentence_chrf(hypotheses: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """sacrebleu's chrF of each hypothesis: a quality for `prediction_rejection_ratio`; by fastchrf where installed.

    Args:
        hypotheses: [n].
        references: [n].

    Returns:
        [n] float64 from 0 to 1.

    Raises:
        ImportError: If neither fastchrf nor sacrebleu is installed.
        ValueError: For lengths that differ.
    """
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses and {len(references)} references: expected one for each.")
    return _chrf([[text] for text in hypotheses], [[text] for text in references]).reshape(-1)


def _chrf(hypotheses: list[list[str]], references: list[list[str]]) -> np.ndarray:
    """[sources, hypotheses, references] from 0 to 1."""
    if importlib.util.find_spec("fastchrf"):
        found = importlib.import_module("fastchrf").pairwise_chrf(hypotheses, references)
    else:
        metric = mt_metrics().CHRF()
        found = [
            [[metric.sentence_score(text, [other]).score for other in others] for text in texts]
            for texts, others in zip(hypotheses, references, strict=True)
        ]
    return np.array(found, np.float64) / 100

"""BLEUVar: how much the translations that a model samples of one source disagree, by their pairwise BLEU.

"Wat zei je? Detecting Out-of-Distribution Translations with Variational Transformers", Xiao, Gomez, Gal 2020,
arXiv 2006.08344.
"""

import importlib
import math
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import chain
from typing import Any, Literal, Protocol, overload, runtime_checkable

import numpy as np

MAX_ORDER = 4  # of BLEU's n-grams
_BLOCK = 1 << 22  # counts that are compared at a time


@runtime_checkable
class SampledTexts(Protocol):
    """What holds the samples of several sources: the texts are [n][num_samples], such as those of a `Samples`."""

    @property
    def texts(self) -> Sequence[Sequence[str]] | None: ...


def mt_metrics() -> Any:
    """sacrebleu's module of metrics.

    Raises:
        ImportError: If sacrebleu isn't installed; it names the extra that installs it.
    """
    try:
        return importlib.import_module("sacrebleu.metrics")
    except ImportError as error:
        raise ImportError(
            "scores of translations need sacrebleu: install it with pip install 'hf_efx[mt]'."
        ) from error


@cache
def sentence_bleu_metric() -> Any:
    """sacrebleu's sentence BLEU, to which `pairwise_bleu` is equal: tokenizer 13a, exponential smoothing, effective
    order."""
    return mt_metrics().BLEU(tokenize="13a", smooth_method="exp", effective_order=True)


def bleu_signature(corpus: bool = False) -> str:
    """sacrebleu's signature of the BLEU in `pairwise_bleu` and `bleuvar`, for what is published.

    Args:
        corpus: That of the BLEU in `retention_curves` instead.

    Raises:
        ImportError: If sacrebleu isn't installed.
    """
    metric = mt_metrics().BLEU(tokenize="13a", smooth_method="exp", effective_order=not corpus)
    metric.corpus_score([""], [[""]])  # a signature says how many references there were
    return str(metric.get_signature())


def tokens(text: str) -> tuple[str, ...]:
    """The tokens that sacrebleu's sentence BLEU counts (13a).

    Raises:
        ImportError: If sacrebleu isn't installed.
    """
    return tuple(sentence_bleu_metric().tokenizer(text.rstrip()).split())


def ngram_ids(sequences: Sequence[Sequence[str]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Every n-gram of some sequences of tokens, as numbers.

    Returns:
        For each order from 1 to 4 the sequence [m] that an n-gram stands in, and its number [m], equal for equal
        n-grams of that order.
    """
    lengths = np.array([len(sequence) for sequence in sequences], np.int64)
    numbers: dict[str, int] = {}
    flat = [numbers.setdefault(token, len(numbers)) for token in chain.from_iterable(sequences)]
    words = np.array(flat, np.int64)
    owner = np.repeat(np.arange(len(sequences)), lengths)
    left = np.arange(len(words))  # where each n-gram begins
    ends = np.cumsum(lengths)[owner]
    ids, found = words, [(owner, words)]
    for order in range(2, MAX_ORDER + 1):
        # An n-gram is the n-gram shorter by one and the token behind it.
        inside = left + order <= ends[left]
        left, ids = left[inside], ids[inside]
        ids = np.unique(ids * len(numbers) + words[left + order - 1], return_inverse=True)[1]
        found.append((owner[left], ids))
    return found


def bleu_from_counts(
    correct: np.ndarray, total: np.ndarray, length: np.ndarray, reference_length: np.ndarray, *, effective_order: bool
) -> np.ndarray:
    """BLEU from its sufficient statistics, over arrays: sacrebleu's formula with exponential smoothing, from 0 to 1.

    Args:
        correct: [..., 4] n-grams of the hypothesis that are in the reference, no oftener than there.
        total: [..., 4] n-grams of the hypothesis.
        length: [...] its tokens.
        reference_length: [...] those of the reference.
        effective_order: Leave out the orders that a short hypothesis has no n-gram of, as for sentences. Without it
            they count as a precision of 0, as sacrebleu does for a corpus.
    """
    there = total > 0
    halvings = np.cumsum(there & (correct <= 0), axis=-1)  # the k-th order without a match counts as 1 / 2^k match
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.where(correct > 0, correct, 0.5**halvings) / total
        orders = there.sum(-1) if effective_order else MAX_ORDER
        mean = np.where(there, np.log(precision), 0.0).sum(-1) / orders
        if not effective_order:
            mean = np.where(there.all(-1), mean, -np.inf)
        brevity = np.where(length < reference_length, np.exp(1 - reference_length / length), 1.0)
        bleu = brevity * np.exp(mean)
    return np.where((correct > 0).any(-1), np.minimum(bleu, 1.0), 0.0)


def pairwise_bleu(texts: Sequence[str]) -> np.ndarray:
    """sacrebleu's sentence BLEU between all ordered pairs of texts, each of which is read once.

    Equal to `sacrebleu.sentence_bleu(..., use_effective_order=True)` over 100, apart from two cases: texts of the same
    tokens have exactly 1 (sacrebleu: 100.00000000000004), two empty ones too (sacrebleu: 0). Texts without a common
    token have exactly 0.

    Args:
        texts: [N].

    Returns:
        [N, N] float64 from 0 to 1; row i is hypothesis i against each text as the reference. It isn't symmetric.

    Raises:
        ImportError: If sacrebleu isn't installed.

    Example:
        >>> from hf_efx.mc_dropout import pairwise_bleu
        >>> pairwise_bleu(["Open the file", "Open the file", "Close it"]).round(2).tolist()
        [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    unique, places = unique_items([tokens(text) for text in texts])
    count = len(unique)
    lengths = np.array([len(sequence) for sequence in unique], np.int64)
    correct = np.zeros((count, count, MAX_ORDER), np.int64)
    for order, (owner, ids) in enumerate(ngram_ids(unique)):
        width = int(ids.max(initial=-1)) + 1
        counts = np.bincount(owner * width + ids, minlength=count * width).astype(np.int32).reshape(count, width)
        rows = max(1, _BLOCK // max(counts.size, 1))
        for start in range(0, count, rows):
            correct[start : start + rows, :, order] = np.minimum(counts[start : start + rows, None], counts).sum(-1)
    total = np.maximum(lengths[:, None] - np.arange(MAX_ORDER), 0)
    bleu = bleu_from_counts(correct, total[:, None], lengths[:, None], lengths, effective_order=True)
    np.fill_diagonal(bleu, 1.0)
    return bleu[np.ix_(places, places)]


def unique_items(items: Iterable[Any]) -> tuple[list[Any], np.ndarray]:
    """Each item once, in the order of their first places, and for every item the place of its like."""
    numbers: dict[Any, int] = {}
    places = np.array([numbers.setdefault(item, len(numbers)) for item in items], np.int64)
    return list(numbers), places


@overload
def bleuvar(samples: Sequence[str], reduction: Literal["mean", "sum"] = "mean") -> float: ...
@overload
def bleuvar(
    samples: Sequence[Sequence[str]] | SampledTexts, reduction: Literal["mean", "sum"] = "mean"
) -> np.ndarray: ...
def bleuvar(
    samples: Sequence[str] | Sequence[Sequence[str]] | SampledTexts, reduction: Literal["mean", "sum"] = "mean"
) -> float | np.ndarray:
    """BLEUVar, the disagreement of a source's samples: (1 - BLEU(y_i, y_j))^2 over ordered pairs i != j.

    Equal samples have exactly 0; the mean of samples that share no token is exactly 1.

    Args:
        samples: The N texts of one source; those of several, [n][N]; or what `sample_generate` returned with texts.
        reduction: "sum" is the paper's sum over ordered pairs (arXiv 2006.08344); "mean" divides it by N (N - 1), so
            that different N compare.

    Returns:
        A float for the texts of one source, [n] float64 for several.

    Raises:
        ImportError: If sacrebleu isn't installed.
        ValueError: For fewer than two texts of a source, what isn't texts, an unknown reduction.

    Example:
        >>> from hf_efx.mc_dropout import bleuvar
        >>> bleuvar(["Open the file", "Open the file", "Close it"])
        0.6666666666666666
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r} is unknown; choose 'mean' or 'sum'.")

    def one(texts: Sequence[str]) -> float:
        pairs = len(texts) * (len(texts) - 1)
        total = math.fsum(np.square(1 - pairwise_bleu(texts)).flat)  # exact: the samples' order changes nothing
        return total / pairs if reduction == "mean" else total

    return over_sources(samples, one, "bleuvar")


def over_sources(samples: Any, score: Any, name: str) -> float | np.ndarray:
    """Applies a score of one source's texts to one source, giving a float, or to several, giving [n] float64.

    Raises:
        ValueError: For fewer than two texts of a source, or what isn't texts, naming the place.
    """
    if isinstance(samples, SampledTexts):
        if samples.texts is None:
            raise ValueError(f"{name}: the samples have no texts: give sample_generate a tokenizer.")
        samples = samples.texts
    elif not isinstance(samples, str):
        samples = list(samples)
        if not samples or any(isinstance(text, str) for text in samples):
            return score(_checked(samples, f"{name}: samples"))
    if isinstance(samples, str):
        raise ValueError(f"{name}: samples={samples!r} is one text: give the list of a source's samples.")
    return np.array([score(_checked(texts, f"{name}: samples[{i}]")) for i, texts in enumerate(samples)], np.float64)


def _checked(texts: Any, name: str) -> list[str]:
    """The texts of a source, of which there must be two."""
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise ValueError(f"{name}={texts!r}: expected the list of a source's samples.")
    texts = list(texts)
    wrong = [text for text in texts if not isinstance(text, str)]
    if wrong:
        raise ValueError(f"{name} holds {wrong[0]!r}: expected texts.")
    if len(texts) < 2:
        raise ValueError(f"{name} holds {len(texts)} text(s): one has nothing to differ from, give two or more.")
    return texts


def mbr_choice(similarity: np.ndarray) -> int:
    """The sample that is most like the others: the minimum-Bayes-risk choice, with the similarity as the utility.

    Eikema and Aziz 2020, "Is MAP Decoding All You Need?", arXiv 2005.10283, draw the candidates and the references
    from the same samples.

    Args:
        similarity: [N, N], row i is candidate i against each sample as the reference, such as `pairwise_bleu(texts)`.

    Returns:
        Its place; the first of several that are equally good.

    Raises:
        ValueError: If it isn't a square matrix of two samples or more, or not finite.
    """
    matrix = np.asarray(similarity, np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) < 2 or not np.isfinite(matrix).all():
        raise ValueError(f"similarity of shape {list(matrix.shape)}: expected finite [N, N] of two samples or more.")
    # One exact sum per row, so that equal samples tie whatever the order of the others.
    totals = [math.fsum(np.delete(row, i)) for i, row in enumerate(matrix)]
    return int(np.argmax(totals))

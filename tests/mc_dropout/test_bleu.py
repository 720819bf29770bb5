"""Pairwise BLEU and BLEUVar: hand-worked samples, sacrebleu as the reference, what isn't samples."""

import math
import random
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import sacrebleu

from hf_efx.mc_dropout import bleuvar, mbr_choice, pairwise_bleu
from hf_efx.mc_dropout.bleu import bleu_signature, sentence_bleu_metric, tokens

SAMPLES = ["a b c", "a b d", "a b"]
# "a b c" against "a b d": 2 of 3 tokens, 1 of 2 pairs, none of the one triple, which counts as half of it.
ONE_OFF = (2 / 3 * 1 / 2 * 1 / 2) ** (1 / 3)
SHORT = math.exp(1 - 3 / 2)  # "a b" is wholly in the others, which have three tokens

WORDS = (
    "the a file Datei öffnen close , . ! ? 你好 don't 3.14 1,000 &amp; - x-y ( ) … 🙂 <skipped> as\u00a0is é".split(
        " "
    )
)


def random_text(draw: random.Random) -> str:
    return draw.choice([" ", "  ", "\n"]).join(draw.choices(WORDS, k=draw.choice([0, 1, 1, 2, 3, 4, 5, 8, 20])))


def test_hand_worked_samples() -> None:
    expected = [[1, ONE_OFF, ONE_OFF], [ONE_OFF, 1, ONE_OFF], [SHORT, SHORT, 1]]
    np.testing.assert_allclose(pairwise_bleu(SAMPLES), expected, rtol=1e-14)
    total = 4 * (1 - ONE_OFF) ** 2 + 2 * (1 - SHORT) ** 2
    assert bleuvar(SAMPLES, reduction="sum") == pytest.approx(total, rel=1e-14)
    assert bleuvar(SAMPLES) == pytest.approx(total / 6, rel=1e-14)
    assert mbr_choice(pairwise_bleu(SAMPLES)) == 2


def test_pairs_equal_sacrebleus_sentence_bleu() -> None:
    draw, compared = random.Random(0), 0
    for _ in range(60):
        texts = [random_text(draw) for _ in range(5)]
        ours = pairwise_bleu(texts)
        for i, hypothesis in enumerate(texts):
            for j, reference in enumerate(texts):
                if tokens(hypothesis) == tokens(reference):
                    assert ours[i, j] == 1.0
                    continue
                theirs = sacrebleu.sentence_bleu(hypothesis, [reference], use_effective_order=True).score / 100
                assert ours[i, j] == pytest.approx(theirs, abs=1e-12), (hypothesis, reference)
                compared += 1
    assert compared >= 1000
    assert bleu_signature() == f"nrefs:1|case:mixed|eff:yes|tok:13a|smooth:exp|version:{sacrebleu.__version__}"
    assert bleu_signature(corpus=True) == bleu_signature().replace("eff:yes", "eff:no")


def test_many_long_texts_are_compared_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(1)
    texts = [random_text(draw) for _ in range(12)]
    whole = pairwise_bleu(texts)
    monkeypatch.setattr(sys.modules["hf_efx.mc_dropout.bleu"], "_BLOCK", 1)
    np.testing.assert_array_equal(pairwise_bleu(texts), whole)


@pytest.mark.parametrize("text", ["", "  ", ".", "🙂", "one", "Open the file now, please."])
def test_equal_texts_agree_exactly(text: str) -> None:
    assert (pairwise_bleu([text, text, text]) == 1.0).all()
    assert bleuvar([text, text]) == 0.0 == bleuvar([text, text], reduction="sum")


def test_texts_without_a_common_token_disagree_exactly() -> None:
    assert bleuvar(["a b c d", "e f g", "h", ""]) == 1.0
    assert bleuvar(["a b c d", "e f g", "h", ""], reduction="sum") == 12.0
    assert bleuvar(["a b.", "c d."]) < 1.0  # a full stop is shared


def test_the_order_of_samples_changes_nothing() -> None:
    draw = random.Random(2)
    texts = [random_text(draw) for _ in range(8)]
    mixed = draw.sample(texts, 8)
    assert bleuvar(mixed) == bleuvar(texts)


def test_several_sources() -> None:
    @dataclass
    class Sampled:
        texts: list[list[str]] | None

    rows = [SAMPLES, ["x", "x"], ["x", "y"]]
    expected = [bleuvar(SAMPLES), 0.0, 1.0]
    for samples in (rows, tuple(map(tuple, rows)), Sampled(rows)):
        found = bleuvar(samples)
        assert isinstance(found, np.ndarray) and found.tolist() == expected
    assert bleuvar(Sampled([])).shape == (0,)
    with pytest.raises(ValueError, match="no texts: give sample_generate a tokenizer"):
        bleuvar(Sampled(None))


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], r"samples holds 0 text\(s\): one has nothing to differ from"),
        (["one"], r"samples holds 1 text\(s\)"),
        ([["a", "b"], ["one"]], r"samples\[1\] holds 1 text\(s\)"),
        ("one text", "samples='one text' is one text"),
        (["a", None], "samples holds None: expected texts"),
        ([None, None], r"samples\[0\]=None: expected the list"),
        ([["a", "b"], "c"], r"samples holds \['a', 'b'\]: expected texts"),
    ],
)
def test_what_is_no_samples_is_refused(samples: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bleuvar(samples)


def test_an_unknown_reduction_is_refused() -> None:
    with pytest.raises(ValueError, match="reduction='max' is unknown; choose 'mean' or 'sum'"):
        bleuvar(SAMPLES, reduction="max")  # type: ignore[call-overload]


def test_the_choice_is_the_first_of_equals_and_leaves_itself_out() -> None:
    assert mbr_choice(np.array([[1.0, 0.2, 0.3], [0.0, 9.0, 0.4], [0.5, 0.1, 0.0]])) == 2
    assert mbr_choice(pairwise_bleu(["q", "a b", "a b"])) == 1
    for wrong in (np.ones((2, 3)), np.ones((1, 1)), np.full((2, 2), np.nan)):
        with pytest.raises(ValueError, match="expected finite"):
            mbr_choice(wrong)


def test_without_sacrebleu_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    sentence_bleu_metric.cache_clear()
    with pytest.raises(ImportError, match=r"pip install 'hf_efx\[mt\]'"):
        bleuvar(SAMPLES)

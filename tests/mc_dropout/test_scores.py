"""The other uncertainties: hand-worked numbers, the references that they equal, the registry."""

import math
import random
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from sacrebleu.metrics import CHRF

from hf_efx.mc_dropout import (
    UNCERTAINTIES,
    Evidence,
    TokenStatistics,
    compute_uncertainties,
    pairwise_chrf,
    pairwise_rouge_l,
    register_uncertainty,
    sentence_chrf,
    token_statistics,
)
from hf_efx.mc_dropout.bleu import tokens
from hf_efx.mc_dropout.scores import beam_score, chrf, lexical_similarity, sequence_probability, uncertainty_needs

# Two samples that differ about the first token and agree about the second; a third position is padding.
LOGITS = torch.tensor([[[0.9, 0.1], [0.5, 0.5], [1.0, 9.0]], [[0.1, 0.9], [0.5, 0.5], [9.0, 1.0]]]).log()[:, None] + 7
MASK = torch.tensor([[True, True, False]])
ENTROPY = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
TEXTS = ["a b c d", "a c e d", ""]


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("hf_efx.mc_dropout.scores.UNCERTAINTIES", dict(UNCERTAINTIES))
    needs = sys.modules["hf_efx.mc_dropout.scores"]._NEEDS
    monkeypatch.setattr("hf_efx.mc_dropout.scores._NEEDS", dict(needs))
    yield


def test_two_samples_and_two_tokens_by_hand() -> None:
    found = token_statistics(LOGITS, MASK)
    information = math.log(2) - ENTROPY
    reverse = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    pairwise = 2 * 0.8 * math.log(9) / 4  # KL of each to the other, 0 to itself, over four ordered pairs
    assert found.entropy == pytest.approx([math.log(2)])
    assert found.expected_entropy == pytest.approx([(ENTROPY + math.log(2)) / 2], rel=1e-6)
    assert found.mutual_information == pytest.approx([information / 2], rel=1e-6)
    assert found.reverse_mutual_information == pytest.approx([reverse / 2], rel=1e-6)
    assert found.epkl == pytest.approx([pairwise / 2], rel=1e-6)
    assert all(getattr(found, name).dtype == np.float64 for name in ("entropy", "epkl"))


def test_statistics_of_random_predictions_hold_the_identities() -> None:
    torch.manual_seed(0)
    logits = 5 * torch.randn(4, 3, 6, 11, dtype=torch.float64)
    mask = torch.arange(6) < torch.tensor([[6], [1], [3]])
    found = token_statistics(logits, mask)
    assert found.entropy == pytest.approx(found.expected_entropy + found.mutual_information, rel=1e-12)
    assert found.epkl == pytest.approx(found.mutual_information + found.reverse_mutual_information, rel=1e-12)
    p = logits.softmax(-1)
    pairs = (p[:, None] * (p[:, None].log() - p[None].log())).sum(-1).mean((0, 1))  # [n, T], as it is defined
    assert found.epkl == pytest.approx(((pairs * mask).sum(-1) / mask.sum(-1)).numpy(), rel=1e-12)
    # A source's figures depend on no other, nor on what stands where it has no token.
    logits[:, 1, 1:] = 100.0
    halves = [token_statistics(logits[:, i], mask[i]) for i in (slice(0, 2), slice(2, 3))]
    assert TokenStatistics.concatenate(halves).epkl.tolist() == found.epkl.tolist()


def test_large_and_impossible_logits_are_stable() -> None:
    sure = torch.tensor([1e4, 0.0, -math.inf]).expand(3, 1, 2, 3)
    found = token_statistics(sure, torch.ones(1, 2, dtype=torch.bool))
    assert [getattr(found, name)[0] for name in TokenStatistics.__dataclass_fields__] == [0.0] * 5
    differ = torch.tensor([[0.0, -math.inf], [-math.inf, 0.0]])[:, None, None]
    found = token_statistics(differ, torch.ones(1, 1))
    assert found.mutual_information == pytest.approx([math.log(2)])
    assert found.epkl.tolist() == [math.inf]  # each calls what the other is sure of impossible


def test_agreement_is_exactly_zero() -> None:
    torch.manual_seed(1)
    found = token_statistics(torch.randn(1, 2, 5, 7).expand(4, 2, 5, 7), torch.ones(2, 5))
    assert found.mutual_information == pytest.approx([0, 0], abs=1e-14) and (found.mutual_information >= 0).all()
    assert found.epkl == pytest.approx([0, 0], abs=1e-14) and (found.entropy > 1).all()


def test_wrong_token_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"logits of shape \[2, 3, 2\].*expected \[num_samples, n, T, V\]"):
        token_statistics(LOGITS[:, 0], MASK)
    with pytest.raises(ValueError, match="num_samples=1"):
        token_statistics(LOGITS[:1], MASK)
    with pytest.raises(ValueError, match="mask: source 0 has no token"):
        token_statistics(LOGITS, MASK & False)
    with pytest.raises(ValueError, match="logits are NaN"):
        token_statistics(LOGITS * math.nan, MASK)


def test_rouge_l_is_the_longest_common_subsequence() -> None:
    assert pairwise_rouge_l(TEXTS).tolist() == [[1, 0.75, 0], [0.75, 1, 0], [0, 0, 1]]
    assert pairwise_rouge_l(["", ""]).tolist() == [[1, 1], [1, 1]]
    draw = random.Random(0)
    texts = [" ".join(draw.choices("abcd", k=draw.choice([1, 3, 7, 12]))) for _ in range(12)]
    found = pairwise_rouge_l(texts)
    for i, one in enumerate(map(tokens, texts)):
        for j, other in enumerate(map(tokens, texts)):
            table = np.zeros((len(one) + 1, len(other) + 1))
            for a, b in np.ndindex(len(one), len(other)):
                longer = max(table[a, b + 1], table[a + 1, b])
                table[a + 1, b + 1] = table[a, b] + 1 if one[a] == other[b] else longer
            assert found[i, j] == pytest.approx(2 * table[-1, -1] / (len(one) + len(other)), rel=1e-14)


def test_chrf_equals_sacrebleus_with_and_without_fastchrf(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["Hallo, Welt!", "Hallo Welt", "", "ä", "你好 Datei öffnen", "Die Datei öffnen"]
    expected = [[CHRF().sentence_score(one, [other]).score / 100 for other in texts] for one in texts]
    np.fill_diagonal(expected := np.array(expected), 1.0)
    np.testing.assert_allclose(pairwise_chrf(texts), expected, atol=1e-12)
    np.testing.assert_allclose(sentence_chrf(texts[1:], texts[:-1]), expected[range(1, 6), range(5)], atol=1e-12)
    monkeypatch.setitem(sys.modules, "fastchrf", None)
    np.testing.assert_allclose(pairwise_chrf(texts), expected, atol=1e-12)
    assert (pairwise_chrf(["", ""]) == 1).all()
    with pytest.raises(ValueError, match="1 hypotheses and 2 references"):
        sentence_chrf(["a"], ["b", "c"])


def test_text_scores_turn_similarity_round() -> None:
    assert lexical_similarity(TEXTS[:2]) == 0.25
    assert lexical_similarity([TEXTS, ["x", "x"]]).tolist() == [pytest.approx(1 - 1.5 / 6), 0.0]  # type: ignore
    assert chrf(["ab", "ab"]) == 0.0 and chrf(["ab", "cd"]) == 1.0
    with pytest.raises(ValueError, match=r"chrf: samples holds 1 text\(s\)"):
        chrf(["ab"])


def test_scores_of_the_answer() -> None:
    assert sequence_probability([-2.0, -8.0]).tolist() == [2.0, 8.0]
    assert beam_score([-2.0, -8.0], [1, 16]).tolist() == [2.0, 0.5]
    assert beam_score([-2.0, -8.0], [1, 16], length_penalty=0.5).tolist() == [2.0, 2.0]
    with pytest.raises(ValueError, match="the smallest 0: expected"):
        beam_score([-2.0], [0])
    with pytest.raises(ValueError, match=r"answer_lengths of shape \[2\]"):
        beam_score([-2.0], [1, 2])


def test_all_scores_rise_with_disagreement(registry: None) -> None:
    evidence = Evidence(
        texts=[["a b c", "a b c"], ["a b c", "d e f"]],
        answer_log_probs=[-1.0, -4.0],
        answer_lengths=[3, 3],
        token_statistics=token_statistics(torch.cat([LOGITS[:, :, 1:2], LOGITS[:, :, :1]], 1), torch.ones(2, 1)),
    )
    scores = compute_uncertainties(evidence)
    assert list(scores) == list(UNCERTAINTIES) and len(scores) == 9
    for name, (sure, unsure) in scores.items():
        assert sure < unsure or name == "token_entropy", name
    searched = Evidence(answer_log_probs=[-8.0], answer_lengths=[4], length_penalty=0.5)
    assert compute_uncertainties(searched, ["beam_score"])["beam_score"].tolist() == [4.0]
    part = compute_uncertainties(Evidence(texts=evidence.texts))
    assert list(part) == ["bleuvar", "lexical_similarity", "chrf"]


def test_a_score_of_ones_own(registry: None) -> None:
    register_uncertainty("spread", lambda log_probs: np.std(log_probs, axis=1), needs=["sample_log_probs"])
    answers = {"answer_log_probs", "answer_lengths", "length_penalty"}
    assert uncertainty_needs(["spread", "beam_score"]) == {"sample_log_probs", *answers}
    found = compute_uncertainties(Evidence(sample_log_probs=[[-1.0, -3.0], [-2.0, -2.0]]), ["spread"])
    assert found["spread"].tolist() == [1.0, 0.0]
    register_uncertainty("one", lambda texts: [1.0])
    register_uncertainty("one", lambda texts: 1.0)  # in its place
    with pytest.raises(ValueError, match=r"uncertainty 'one' gave shape \[\] for 1 source"):
        compute_uncertainties(Evidence(texts=[["a", "b"]]), ["one"])


def test_wrong_registrations_and_evidence_are_refused(registry: None) -> None:
    for name, match in (("bleuvar", "taken"), ("source", "taken"), ("two words", "no identifier")):
        with pytest.raises(ValueError, match=match):
            register_uncertainty(name, len)
    for needs in ("texts", [], ["text"]):
        with pytest.raises(ValueError, match="needs=.*expected a list of fields of Evidence, of texts, "):
            register_uncertainty("new", len, needs=needs)
    with pytest.raises(ValueError, match="'blue' is unknown; choose from bleuvar, .*register_uncertainty"):
        compute_uncertainties(Evidence(), ["blue"])
    with pytest.raises(ValueError, match="evidence lacks answer_lengths, which beam_score are made from"):
        compute_uncertainties(Evidence(answer_log_probs=[1.0]), ["beam_score"])
    with pytest.raises(ValueError, match="different numbers of sources: {'texts': 1, 'answer_log_probs': 2}"):
        compute_uncertainties(Evidence(texts=[["a", "b"]], answer_log_probs=[1.0, 2.0]))

"""Detection of shifted sources, retention curves, the rejection ratio: by hand, against scikit-learn and sacrebleu."""

import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from sacrebleu.metrics import BLEU
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from hf_efx.core.results.curves import plot_curves
from hf_efx.mc_dropout import (
    detection_difference,
    detection_report,
    plot_roc,
    prediction_rejection_ratio,
    retention_curves,
)

SCORES, SHIFTED = [0.1, 0.4, 0.3, 0.9], [False, False, True, True]


def shifted_scores(seed: int, sources: int = 200, by: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    shifted = np.arange(sources) % 2 == 0
    return (generator.normal(size=sources) + by * shifted).round(1), shifted  # rounded: many ties


def translations(sources: int) -> tuple[list[str], list[str], np.ndarray]:
    """Hypotheses of which more and more is wrong, their references, and scores that tie in fours."""
    draw = random.Random(0)
    references = [" ".join(draw.choices("abcdefghij", k=draw.choice([1, 2, 5, 9]))) for _ in range(sources)]
    hypotheses = [
        " ".join("x" if draw.random() < i / sources else token for token in text.split())
        for i, text in enumerate(references)
    ]
    return hypotheses, references, np.arange(sources) // 4


def test_four_sources_by_hand() -> None:
    report = detection_report(SCORES, SHIFTED, draws=0)
    assert (report.auroc, report.aupr, report.fpr95) == (0.75, pytest.approx((1 + 2 / 3) / 2), 0.5)
    assert (report.sources, report.shifted, report.intervals, report.reason) == (4, 2, {}, "")


def test_figures_equal_scikit_learns_with_ties() -> None:
    scores, shifted = shifted_scores(0)
    report = detection_report(scores, shifted, draws=50)
    assert report.auroc == pytest.approx(roc_auc_score(shifted, scores), rel=1e-12)
    assert report.aupr == pytest.approx(average_precision_score(shifted, scores), rel=1e-12)
    wrong, right, _ = roc_curve(shifted, scores, drop_intermediate=False)
    assert report.fpr95 == min(wrong[right >= 0.95])
    for name, (low, high) in report.intervals.items():
        assert low < getattr(report, name) < high, name
    assert report == detection_report(scores, shifted, draws=50) != detection_report(scores, shifted, draws=50, seed=1)


@pytest.mark.parametrize("shifted", [True, False])
def test_one_kind_alone_gives_nan_and_the_reason(shifted: bool) -> None:
    report = detection_report([0.1, 0.2], [shifted, shifted])
    assert all(map(math.isnan, (report.auroc, report.aupr, report.fpr95))) and report.intervals == {}
    assert (
        report.reason
        == f"all of the 2 sources are {'' if shifted else 'not '}shifted: there is nothing to tell apart."
    )


def test_differences_are_paired() -> None:
    (first, shifted), (second, _) = shifted_scores(1, by=3.0), shifted_scores(2, by=0.5)
    same = detection_difference(first, first, shifted, draws=20)
    assert set(same.values()) == {(0.0, (0.0, 0.0))} and list(same) == ["auroc", "aupr", "fpr95"]
    value, (low, high) = detection_difference(first, second, shifted, draws=50)["auroc"]
    assert value == pytest.approx(roc_auc_score(shifted, first) - roc_auc_score(shifted, second))
    assert 0 < low < value < high
    # Of several models: the mean of their differences.
    mean, _ = detection_difference([first, second], [second, second], shifted, draws=2)["auroc"]
    assert mean == pytest.approx(value / 2)


def test_wrong_detection_input_is_refused() -> None:
    with pytest.raises(ValueError, match="of which 1 aren't finite.*leave out the sources without a score"):
        detection_report([0.1, math.nan], [True, False])
    with pytest.raises(ValueError, match=r"scores of shape \[2\] and is_shifted of 3"):
        detection_report([0.1, 0.2], [True, False, True])
    with pytest.raises(ValueError, match=r"scores=\['bleuvar'\]: expected the numbers of one score"):
        detection_report({"bleuvar": SCORES}, SHIFTED)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected true or false"):
        detection_report([0.1, 0.2], [1, 2])
    with pytest.raises(ValueError, match="2 of 2 shifted: expected a draw, both kinds"):
        detection_difference([0.1, 0.2], [0.1, 0.2], [True, True])
    with pytest.raises(ValueError, match=r"shapes \[\[1, 2\], \[1, 3\]\]: expected the same"):
        detection_difference([0.1, 0.2], [0.1, 0.2, 0.3], [True, True])


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(ImportError, match=r"pip install 'hf_efx\[mt\]'"):
        detection_report(SCORES, SHIFTED)


def test_curves_are_sacrebleus_corpus_bleu_of_what_is_kept() -> None:
    hypotheses, references, _ = translations(40)
    sure = np.random.default_rng(0).permutation(40)
    curve = retention_curves({"one": sure}, hypotheses, references, draws=0)["one"]
    order = np.argsort(sure)
    for fraction, value in curve.points:
        kept = order[: math.ceil(fraction * 40 - 1e-9)]
        theirs = BLEU().corpus_score([hypotheses[i] for i in kept], [[references[i] for i in kept]])
        assert value == pytest.approx(theirs.score, abs=1e-9), fraction
    assert curve.fractions[0] == 0.05 and curve.fractions[-1] == 1.0 and curve.metric == "bleu"
    assert "eff:no|tok:13a|smooth:exp" in curve.settings["signature"] and curve.settings["sources"] == 40


def test_ties_depend_on_no_order_and_are_broken_by_a_second_score() -> None:
    hypotheses, references, ties = translations(40)
    flat = retention_curves({"all": np.zeros(40)}, hypotheses, references, draws=0)["all"]
    assert flat.values == pytest.approx([flat.values[-1]] * 20)  # whoever is kept, these are the counts to expect
    rows = np.random.default_rng(1).permutation(40)
    mixed = [hypotheses[i] for i in rows], [references[i] for i in rows]
    scores = {"ties": ties, "place": np.arange(40)}
    whole = retention_curves(scores, hypotheses, references, draws=0)
    again = retention_curves({name: score[rows] for name, score in scores.items()}, *mixed, draws=0)
    assert again["ties"].values == pytest.approx(whole["ties"].values, rel=1e-12)
    broken = retention_curves(scores, hypotheses, references, tie_break="place", draws=0)
    assert broken["ties"].values == whole["place"].values != whole["ties"].values


def test_curves_have_intervals_of_points_and_area(tmp_path: Path) -> None:
    hypotheses, references, ties = translations(60)
    scores = {"good": ties, "bad": -ties}
    curves = retention_curves(scores, hypotheses, references, fractions=[0.5, 1.0], draws=100)
    for curve in curves.values():
        assert curve.area_interval is not None and curve.area_interval[0] < curve.area < curve.area_interval[1]
        assert all(low < value < high for value, (low, high) in zip(curve.values, curve.intervals, strict=True))
    assert curves["good"].intervals[1] == pytest.approx(curves["bad"].intervals[1])  # the same draws of all of them
    assert curves["good"].intervals[0][0] > curves["bad"].intervals[0][1]
    assert plot_curves(curves, tmp_path / "retention.png").read_bytes()[:4] == b"\x89PNG"
    shifted = np.arange(60) > 30
    assert plot_roc(scores, shifted, tmp_path / "roc.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="plot_roc: all of the 60 sources are not shifted"):
        plot_roc(scores, shifted & False, tmp_path / "none.png")


def test_texts_without_a_match_or_a_token_have_bleu_zero() -> None:
    curve = retention_curves({"one": [0, 1]}, ["", "a"], ["a", "b"], fractions=[0.5, 1], draws=3)["one"]
    assert curve.values == (0.0, 0.0)


def test_wrong_retention_input_is_refused() -> None:
    texts = ["a", "b"]
    with pytest.raises(ValueError, match="expected the scores by name"):
        retention_curves([0, 1], texts, texts)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2 hypotheses and 1 references"):
        retention_curves({"one": [0, 1]}, texts, ["a"])
    with pytest.raises(ValueError, match=r"hold \['a'\]: expected texts, one reference for each"):
        retention_curves({"one": [0, 1]}, texts, [["a"], ["b"]])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="tie_break='beam' isn't among the scores: one"):
        retention_curves({"one": [0, 1]}, texts, texts, tie_break="beam")
    with pytest.raises(ValueError, match=r"fractions=\[0.0, 0.5\]: expected shares to keep"):
        retention_curves({"one": [0, 1]}, texts, texts, fractions=[0, 0.5])
    with pytest.raises(ValueError, match="one of shape.*aren't finite"):
        retention_curves({"one": [0, math.nan]}, texts, texts)
    with pytest.raises(ValueError, match=r"one and tie_break of shapes \[\[3\]\] for 2 sources"):
        retention_curves({"one": [0, 1, 2]}, texts, texts)


def test_rejection_ratio_by_hand() -> None:
    found = prediction_rejection_ratio([1, 0], [1.0, 0.0], draws=0)
    assert (found.area, found.oracle_area, found.random_area) == (0.25, 0.75, 0.5)
    assert found.ratio == -1.0 and found.interval is None
    quality = np.random.default_rng(0).random(30)
    assert prediction_rejection_ratio(-quality, quality, draws=20).ratio == pytest.approx(1)
    assert prediction_rejection_ratio(-quality, quality, draws=20).interval == pytest.approx((1, 1))
    tied = prediction_rejection_ratio(np.zeros(30), quality, draws=50)
    assert tied.ratio == pytest.approx(0, abs=1e-12) and tied.interval is not None
    assert tied.interval[0] < 0 < tied.interval[1]
    assert prediction_rejection_ratio(np.zeros(30), quality, tie_break=-quality, draws=0).ratio == pytest.approx(1)
    assert math.isnan(prediction_rejection_ratio([1, 2], [0.5, 0.5], draws=0).ratio)

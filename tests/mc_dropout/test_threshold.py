"""The threshold to defer above: its choice, its file, what it refuses."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_efx.mc_dropout import DeferralThreshold, choose_threshold

SCORES = [0.1, 0.5, 0.2, 0.0, 0.9, 0.3, 0.6, 0.7, 0.4, 0.8]


@pytest.mark.parametrize(("share", "above"), [(0.1, 0.8), (0.3, 0.6), (0.29, 0.7), (0.5, 0.4)])
def test_a_share_is_deferred(share: float, above: float) -> None:
    threshold = choose_threshold(SCORES, share)
    assert threshold.defer_above == above and threshold.deferred(SCORES).sum() == int(share * 10 + 1e-9)
    assert threshold.deferred([above, above + 0.01, math.nan]).tolist() == [False, True, False]


def test_ties_defer_less_never_more(caplog: pytest.LogCaptureFixture) -> None:
    assert choose_threshold([0, 0, 0, 1, 1], 0.4).deferred([0, 1]).tolist() == [False, True]
    with caplog.at_level(logging.WARNING):
        assert not choose_threshold([0, 0, 1, 1, 1], 0.4).deferred([0, 1]).any()
    assert "share=0.4: 0.0% of 5 sources score above 1" in caplog.text


def test_the_file_gives_the_threshold_back(tmp_path: Path) -> None:
    threshold = choose_threshold(SCORES, score="chrf", num_samples=5, masks="sequence", model="you/model")
    file = threshold.save(tmp_path / "model")
    assert file == tmp_path / "model" / "uncertainty.json" and [file] == list(file.parent.iterdir())
    assert DeferralThreshold.load(file) == threshold == DeferralThreshold.load(file.parent)
    assert threshold.sources == 10 and {"torch", "hf_efx", "sacrebleu"} <= threshold.versions.keys()


def test_another_setting_is_refused() -> None:
    setting: dict[str, Any] = {"score": "bleuvar", "num_samples": 10, "masks": "position", "model": "you/model"}
    threshold = choose_threshold(SCORES, model="you/model")
    threshold.check(**setting)
    threshold.check(**{**setting, "model": None})
    choose_threshold(SCORES).check(**setting)
    for name, other in (("score", "chrf"), ("num_samples", 5), ("masks", "sequence"), ("model", "me/model")):
        with pytest.raises(ValueError, match=f"{name}={setting[name]!r}, not {other!r}: choose one for this setting"):
            threshold.check(**{**setting, name: other})


def test_wrong_values_are_refused() -> None:
    with pytest.raises(ValueError, match="1 aren't finite"):
        choose_threshold([0.1, math.nan])
    with pytest.raises(ValueError, match="scores are empty"):
        choose_threshold([])
    for share in (0, 1, math.nan):
        with pytest.raises(ValueError, match=f"share={share}: expected the share to defer"):
            choose_threshold(SCORES, share)
    for num_samples in (1, -1):
        with pytest.raises(ValueError, match=f"num_samples={num_samples}: expected 2 or more, or 0"):
            choose_threshold(SCORES, num_samples=num_samples)
    with pytest.raises(ValueError, match="masks='token' is unknown; choose 'position' or 'sequence'"):
        choose_threshold(SCORES, masks="token")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"defer_above": NaN}', '{"defer_above": "high"}', '{"unknown": 1}', "\x00"]
)
def test_a_broken_file_is_refused(tmp_path: Path, text: str) -> None:
    file = choose_threshold(np.array(SCORES)).save(tmp_path)
    try:
        change = json.loads(text)
        text = json.dumps({**json.loads(file.read_text()), **change}) if change else text
    except ValueError:
        pass
    file.write_text(text)
    with pytest.raises(ValueError, match=r"uncertainty\.json holds no threshold"):
        DeferralThreshold.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        DeferralThreshold.load(tmp_path / "elsewhere")

"""generalization_study: rows, resuming, ranking, what it refuses."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from hf_efx.core.results.evidence import StudyRows
from hf_efx.prunability import generalization_study
from hf_efx.prunability.baselines import Network
from hf_efx.prunability.study import TrainedNetwork

GRID = [{"width": w, "scale": s} for w in (2, 3) for s in (1, 4)]
NAMES = ("parameter_count", "l2_norm", "distance_from_init")
CALLS = []


def train(settings, seed):
    """A diagonal network whose gap is its scale plus its seed / 10; parameters grow with the width alone."""
    CALLS.append((settings["width"], settings["scale"], seed))
    model = nn.Linear(settings["width"], settings["width"], bias=False)
    with torch.no_grad():
        model.weight.copy_(settings["scale"] * torch.eye(settings["width"]))
    inputs = torch.eye(settings["width"])

    def outcome(model):
        return (model(inputs) - 1.5 * settings["scale"] * inputs).square().sum(1), torch.ones(1)

    figures = {"loss_gap": settings["scale"] + seed / 10, "other_gap": -1.0 * settings["scale"], "reached": seed < 2}
    return TrainedNetwork(Network(model, outcome), figures)


def test_rows_ranking_and_resuming(tmp_path):
    CALLS.clear()
    rows = StudyRows(tmp_path / "study.json", {})
    options = {"measures": NAMES, "progress": False}
    study = generalization_study(GRID[:2], train, rows=rows, **options)
    assert len(study.rows) == 2 and len(CALLS) == 2
    rows = StudyRows(tmp_path / "study.json", {})
    study = generalization_study(GRID, train, seeds=(0, 1), rows=rows, **options)
    assert len(CALLS) == 8  # two were there
    row = study.rows[0]
    assert (row["configuration"], row["seed"], row["width"]) == ("width 2, scale 1", 0, 2)
    assert row["parameter_count"] == 4 and row["l2_norm"] == pytest.approx(math.sqrt(2))
    assert row["prunability"] == 0.5  # the diagonal of 2 x 2
    by = {line["measure"]: line for line in study.ranking(draws=200)}
    assert set(by) == {"prunability", "parameter_count", "l2_norm"}  # no initial weights: the same for all
    assert by["l2_norm"]["tau"] == pytest.approx(2 / 3, abs=0.15) and by["l2_norm"]["granulated"]["scale"] == 1
    low, high = by["l2_norm"]["tau_interval"]
    assert low <= by["l2_norm"]["tau"] <= high
    difference, (low, high) = study.difference("l2_norm", "parameter_count", draws=200)
    assert difference == pytest.approx(by["l2_norm"]["tau"] - by["parameter_count"]["tau"])
    assert low < difference < high
    assert (
        next(line for line in replace(study, gap="other_gap").ranking(50) if line["measure"] == "l2_norm")["tau"] < 0
    )


def test_networks_that_did_not_get_there_are_left_out():
    study = generalization_study(GRID[:1], train, seeds=(0, 2), measures=NAMES, progress=False)
    assert len(study.rows) == 2 and len(study.compared) == 1


@pytest.mark.parametrize(
    ("grid", "options", "message"),
    [
        ([], {}, "model_grid is empty"),
        ([{"a": 1}, {"b": 1}], {}, "all settings need the names"),
        (GRID, {"workers": 0}, "workers=0"),
        (GRID, {"gap": "accuracy_gap"}, "gap='accuracy_gap'"),
        (GRID, {"measures": ("size",)}, "'size'"),
    ],
)
def test_bad_input(grid, options, message):
    with pytest.raises(ValueError, match=message):
        generalization_study(grid, train, progress=False, **options)

"""The selection report: figures by hand, in the logs, on disk."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_efx.core.data.example_ids import IdIndex
from hf_efx.rho_loss.report import FIGURES, SelectionReport, means, save_report
from hf_efx.rho_loss.selecting import MicroBatch, Outcome
from rho_loss.runs import Plain, data, logs, trainer

REPOSITORY = Path(__file__).parents[2]


def outcome(ids: list[int], drawn: int = 4, **shares: tuple[list[float], list[float]]) -> Outcome:
    parts = [MicroBatch({}, torch.tensor(ids[i : i + 1]), torch.zeros(1)) for i in range(len(ids))]
    return Outcome(parts, drawn, {name: (np.array(a), np.array(b)) for name, (a, b) in shares.items()})


def report() -> SelectionReport:
    return SelectionReport(IdIndex(np.arange(100, 110)), {"selection": "loss"})


def test_shares_over_selections_of_unequal_size() -> None:
    counted = report()
    counted.add_selection(outcome([100, 101], right_share=([1, 0, 0, 0.5], [0, 0.5])), 0)
    counted.add_selection(outcome([102], drawn=2, right_share=([1, 1], [1])), 0)
    assert means(counted.end_window()) == {
        "right_share": 1.5 / 3, "drawn_right_share": 3.5 / 6,
        "repeated_1_share": 0, "repeated_5_share": 0, "repeated_20_share": 0,
    }  # fmt: skip
    assert counted.counts == {"steps": 0, "examples_drawn": 6, "examples_chosen": 3}
    assert means(counted.end_window()) == {}


def test_repeats_within_1_5_and_20_epochs() -> None:
    counted, seen = report(), []
    for epoch, ids in [(0, [100, 101]), (1, [100, 102]), (5, [101, 102]), (21, [101]), (50, [101])]:
        counted.add_selection(outcome(ids), epoch)
        figures = means(counted.end_window())
        seen.append([figures[f"repeated_{window}_share"] for window in (1, 5, 20)])
    # 100 after 1 epoch; 101 after 5 and 102 after 4; 101 after 16; 101 after 29
    assert seen == [[0, 0, 0], [0.5, 0.5, 0.5], [0, 1, 1], [0, 0, 1], [0, 0, 0]]


def test_what_other_processes_choose_is_overlap_now_and_repeated_later() -> None:
    counted = report()
    counted.add_selection(outcome([100, 101, 102, 103]), 0, others=[np.array([103, 104]), np.array([105, 106])])
    assert means(counted.end_window())["rank_overlap"] == 0.25
    counted.add_selection(outcome([106, 107]), 1, others=[np.array([108])])
    assert means(counted.end_window())["repeated_1_share"] == 0.5


def test_seconds() -> None:
    counted = report()
    counted.add_seconds(0.2, 0.6)
    for seconds in (1.0, 2.0):  # one selection that serves two steps
        counted.add_step(seconds)
    figures = means(counted.end_window())
    assert figures == pytest.approx({"loading_seconds": 0.1, "scoring_seconds": 0.3, "scoring_time_share": 0.2})


def test_it_goes_on_from_what_was_saved(tmp_path: Path) -> None:
    counted = report()
    counted.add_selection(outcome([100, 101], corrupted_share=([1, 1, 0, 0], [1, 0])), 0)
    counted.add_step(1.0)
    save_report(tmp_path, counted.settings, *counted.totals(torch.device("cpu")))
    saved = json.loads((tmp_path / "selection_report.json").read_text())
    assert saved["settings"] == {"selection": "loss"} and saved["corrupted_share"] == 0.5
    assert (saved["steps"], saved["examples_drawn"], saved["examples_chosen"]) == (1, 4, 2)
    again = report()
    again.load(tmp_path, first=True)
    again.add_selection(outcome([102], corrupted_share=([1], [1])), 0)
    sums, counts = again.totals(torch.device("cpu"))
    assert means(sums)["corrupted_share"] == 2 / 3 and counts["examples_chosen"] == 3
    other = report()
    other.load(tmp_path, first=False)  # what all had counted is the first one's to carry on
    assert not other.totals(torch.device("cpu"))[0].any() and other.counts["steps"] == 1


def test_a_run_logs_and_saves_it(tmp_path: Path) -> None:
    run = trainer(tmp_path, Plain(), corrupted_column="wrong", max_steps=20, save_strategy="steps", save_steps=10)
    run.train()
    wrong = dict(zip(data()["example_id"], data()["wrong"], strict=True))
    chosen = [[wrong[i] for i in run.ids[step]] for step in range(20)]
    assert logs(run, "rho_loss/corrupted_share") == [sum(each) / 4 for each in chosen]
    saved = json.loads((tmp_path / "selection_report.json").read_text())
    assert saved["corrupted_share"] == sum(map(sum, chosen)) / 80
    assert saved["drawn_corrupted_share"] == pytest.approx(sum(wrong.values()) / 160)  # two whole epochs
    first = {i for step in range(10) for i in run.ids[step]}
    again = [i for step in range(10, 20) for i in run.ids[step] if i in first]
    assert saved["repeated_1_share"] == len(again) / 80 > 0
    assert 0 < saved["scoring_time_share"] < 1 and saved["settings"]["selection_ratio"] == 0.25
    early = json.loads((tmp_path / "checkpoint-10" / "selection_report.json").read_text())
    assert (early["steps"], early["examples_drawn"], early["examples_chosen"]) == (10, 160, 40)
    page = (REPOSITORY / "docs/metrics.md").read_text()
    names = {name for entry in run.state.log_history for name in entry if name.startswith("rho_loss/")}
    assert len(names) == 10 and not [name for name in names if f"| `{name}` |" not in page]
    assert not [name for name in FIGURES if f"| `rho_loss/{name}` |" not in page]


def test_figures_without_step_logs_go_into_the_summary(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=3, logging_strategy="no")
    assert 0 <= run.train().metrics["rho_loss/right_share"] <= 1


def test_without_a_report_nothing_is_logged_and_the_choice_is_the_same(tmp_path: Path) -> None:
    with_report = trainer(tmp_path / "a")
    with_report.train()
    without = trainer(tmp_path / "b", report_selection=False)
    without.train()
    assert with_report.ids == without.ids
    assert not [name for entry in without.state.log_history for name in entry if "rho_loss" in name]
    assert not (tmp_path / "b" / "selection_report.json").exists()

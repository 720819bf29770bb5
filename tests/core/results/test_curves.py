"""Curves over fractions: order, area, JSON, figures, results for cards, plots."""

import json
import math
from pathlib import Path

import pytest

import hf_efx
from hf_efx.core.results.curves import (
    FractionCurve,
    PruningCurve,
    RetentionCurve,
    as_figure,
    check_fractions,
    plot_curves,
)
from hf_efx.core.results.plots import matplotlib_pyplot, save_figure

CURVE = PruningCurve(((0.5, 0.8), (0.0, 1.0), (1.0, 0.2)), "accuracy", True, {"granularity": "weight"})


def test_points_are_sorted_and_read() -> None:
    assert CURVE.points == ((0.0, 1.0), (0.5, 0.8), (1.0, 0.2))
    assert CURVE.fractions == (0.0, 0.5, 1.0) and CURVE.values == (1.0, 0.8, 0.2)
    assert CURVE.at(0.5) == 0.8 and CURVE.at(0.75) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="fraction=0.9 lies outside of the curve's, 0.0 to 0.5"):
        PruningCurve(((0.0, 1.0), (0.5, 0.8)), "accuracy", True).at(0.9)


def test_area_is_the_mean_over_the_fractions() -> None:
    assert CURVE.area == pytest.approx(0.5 * 0.9 + 0.5 * 0.5)
    # The width of the fractions is taken out: a constant has its own value as its area.
    assert PruningCurve(((0.2, 3.0), (0.3, 3.0), (0.9, 3.0)), "loss", False).area == pytest.approx(3.0)
    assert PruningCurve(((0.9, 2.0),), "loss", False).area == 2.0


@pytest.mark.parametrize("points", [(), ((0.5, 1.0), (0.5, 2.0)), ((1.5, 1.0),), ((-0.1, 1.0),), ((math.nan, 1.0),)])
def test_wrong_fractions_are_refused(points: tuple[tuple[float, float], ...]) -> None:
    with pytest.raises(ValueError, match="PruningCurve: fractions=.*different fractions from 0 to 1"):
        PruningCurve(points, "accuracy", True)


@pytest.mark.parametrize("kind", [PruningCurve, RetentionCurve])
def test_json_gives_the_curve_back(kind: type[FractionCurve]) -> None:
    curve = kind(((0.0, 1.5), (0.9, math.inf)), "perplexity", False, {"scope": "layer"})
    text = json.dumps(curve.to_dict(), allow_nan=False)
    back = kind.from_dict(json.loads(text))
    assert back == curve and type(back) is kind and math.isinf(back.area)
    with pytest.raises(ValueError, match=f"{kind.__name__}:.*'points'.*points, metric, higher_is_better"):
        kind.from_dict({"metric": "accuracy"})


def test_intervals_go_with_the_points(tmp_path: Path) -> None:
    curve = RetentionCurve(((0.5, 2.0), (1.0, 1.0)), "bleu", True, {}, ((1.5, math.inf), (0.5, 1.5)), (1.0, 2.0))
    assert RetentionCurve.from_dict(json.loads(json.dumps(curve.to_dict(), allow_nan=False))) == curve
    assert "intervals" not in CURVE.to_dict() and "area_interval" not in CURVE.to_dict()
    assert curve.plot(tmp_path / "band.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="RetentionCurve: 1 intervals for 2 points"):
        RetentionCurve(curve.points, "bleu", True, {}, ((0.0, 1.0),))


def test_figures_and_results() -> None:
    assert CURVE.figures("eval_") == {
        "eval_accuracy_pruned_0": 1.0,
        "eval_accuracy_pruned_50": 0.8,
        "eval_accuracy_pruned_100": 0.2,
        "eval_accuracy_pruned_area": pytest.approx(0.7),
    }
    assert "loss_retained_97.5" in RetentionCurve(((0.975, 1.0),), "loss", False).figures()
    results = CURVE.to_eval_results(task_type="other", dataset_type="d", dataset_name="D", dataset_split="test")
    assert [(r.metric_type, r.metric_value) for r in results[:2]] == [
        ("accuracy_pruned_0", 1.0),
        ("accuracy_pruned_50", 0.8),
    ]
    assert results[1].metric_name == "accuracy pruned 50" and results[1].dataset_split == "test"


def test_plots_are_whole_files(tmp_path: Path) -> None:
    assert CURVE.plot(tmp_path / "one.png").read_bytes()[:4] == b"\x89PNG"
    plot_curves({"weights": CURVE, "units": CURVE}, tmp_path / "two.png")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["one.png", "two.png"]
    loss = PruningCurve(((0.0, 1.0),), "loss", False)
    with pytest.raises(ValueError, match=r"curves=\['a', 'b'\].*one kind and one metric"):
        plot_curves({"a": CURVE, "b": loss}, tmp_path / "mixed.png")


def test_an_evaluation_gives_a_number_or_names_it() -> None:
    assert as_figure(2, "loss") == 2.0
    assert as_figure({"loss": 1.0, "eval_loss": 2.0}, "loss") == 1.0
    assert as_figure({"eval_accuracy": 0.5}, "accuracy") == 0.5
    with pytest.raises(ValueError, match="metric='bleu' isn't among what the evaluation gave: eval_loss"):
        as_figure({"eval_loss": 0.5}, "bleu")


def test_fractions_to_prune() -> None:
    assert check_fractions([0.9, 0, 0.5, 0.9]) == (0.0, 0.5, 0.9)
    for wrong in ([], [0.5, 1.0], [-0.1], [math.nan]):
        with pytest.raises(ValueError, match=r"fractions=\[.*expected fractions from 0 to below 1"):
            check_fractions(wrong)


def test_every_picture_is_written_by_the_one_function():
    """Which leaves a whole picture or none."""
    root = Path(hf_efx.__file__).parents[1]
    files = [*root.glob("hf_efx/**/*.py"), *root.glob("scripts/**/*.py")]
    assert [file.name for file in files if ".savefig(" in file.read_text()] == ["plots.py"]


def test_a_picture_that_fails_leaves_what_was_there(tmp_path):
    plt = matplotlib_pyplot()
    path = save_figure(plt.figure(), tmp_path / "new" / "one.png")
    before = path.read_bytes()
    figure = plt.figure()
    figure.savefig = lambda *args, **kwargs: Path(args[0]).write_bytes(b"half") and 1 / 0
    with pytest.raises(ZeroDivisionError):
        save_figure(figure, path)
    assert path.read_bytes() == before and [file.name for file in path.parent.iterdir()] == ["one.png"]
    assert not plt.get_fignums()

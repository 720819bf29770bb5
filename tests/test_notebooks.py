"""The notebooks are committed without outputs, and (slow) their code cells run, in order and without Jupyter."""

import json
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "scripts" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def _code(path: Path) -> list[Any]:
    """The code cells, compiled."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return [compile(source, f"{path.name}, code cell {i}", "exec") for i, source in enumerate(sources)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_can_be_read_and_holds_no_outputs(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4 and _code(path)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not [cell["id"] for cell in code if cell["outputs"] or cell["execution_count"]]


@pytest.mark.slow
def test_number_words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    names: dict[str, Any] = {"__name__": "__notebook__"}
    for cell in _code(FOLDER / "mc_dropout.ipynb"):
        exec(cell, names)
    deferred = names["scored"].groupby("language").deferred.mean()
    assert names["reports"]["bleuvar"].auroc > 0.95
    assert deferred["Dutch"] > 0.8 and deferred["German"] < 0.25  # German: a tenth of other texts, give or take
    assert names["curves"]["bleuvar"].at(0.5) > 1.3 * names["curves"]["bleuvar"].at(1.0)
    assert names["row"]["note"] == "empty source"

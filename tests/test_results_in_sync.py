"""Cards, tables and results agree; the program that generates them writes, checks and refuses as it says."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from hf_efx.core.results.evidence import claim, write_results
from hf_efx.registry import METHODS

ROOT = Path(__file__).parents[1]


def _program():
    spec = importlib.util.spec_from_file_location("render_results", ROOT / "scripts" / "render_results.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


render = _program()


@pytest.fixture
def repository(tmp_path):
    """A repository with one study, a method's page and a README, all marked sections empty."""
    (tmp_path / "hf_efx" / "low_rank").mkdir(parents=True)
    (tmp_path / "hf_efx" / "low_rank" / "README.md").write_text(
        "# Page\n<!-- begin generated: study -->\n<!-- end generated -->\nbetween\n"
        "<!-- begin generated: benchmark -->\nstale\n<!-- end generated -->\nafter\n"
    )
    (tmp_path / "README.md").write_text("# hf_efx\n<!-- begin generated: methods -->\n<!-- end generated -->\n")
    write_results(
        tmp_path / "scripts/reproduce/results/low_rank.json",
        title="Study",
        headline="Spectral wins.",
        command="python scripts/reproduce/low_rank.py",
        data={"name": "text", "fingerprint": "ab12"},
        seeds=[0],
        rows=[{"configuration": "dense", "seed": 0, "perplexity": 8.0}],
        claims=[
            claim(
                f"{METHODS['low_rank'].quality.claim} (not separated)",  # pyright: ignore[reportOptionalMemberAccess]
                source="ours",
                bar=0,
                measured=0.4567,
                direction="at_least",
            )
        ],
    )
    return tmp_path


def _run(root, *options):
    return render.main(["--root", str(root), *options])


def test_the_repository_is_in_sync(capsys):
    assert render.main(["--check"]) == 0, capsys.readouterr().out


def test_generated_sections(repository):
    assert _run(repository) == 0
    page = (repository / "hf_efx/low_rank/README.md").read_text()
    assert "`python scripts/reproduce/low_rank.py` on text; seeds 0; " in page
    assert "| configuration | perplexity |\n| --- | --- |\n| dense | 8 |\n\n| claim |" in page
    assert "\nbetween\n<!-- begin generated: benchmark -->\nNot measured yet.\n<!-- end generated -->\nafter\n" in page
    readme = (repository / "README.md").read_text()
    method = METHODS["low_rank"]
    paper = "[2209.13569](https://arxiv.org/abs/2209.13569)"
    measured = "[spectral start closes 46% of the gap from He to dense](model_cards/low_rank-study.md)"
    assert f"| [{method.title}](hf_efx/low_rank/) | {paper} | {measured} | \u2013 |" in readme
    assert readme.count("\n| ") == 2 + len(METHODS)  # titles, rule, a line for each method
    assert (repository / "model_cards/low_rank-study.md").read_text().count("| dense | 8 |") == 1
    assert _run(repository, "--check") == 0


def test_a_gpu_s_table_stands_below_the_cpu_s(repository):
    parts = {"command": "bash scripts/benchmarks/on_gpu.sh OUT", "data": {"name": "tokens", "fingerprint": "-"}}
    text = METHODS["low_rank"].cost.claim  # pyright: ignore[reportOptionalMemberAccess]
    cost = claim(text, source="ours", bar=1, measured=0.7, direction="at_most")
    parts |= {"seeds": [0], "claims": [cost], "title": "Steps on a GPU"}
    for folder, value in (("", 5.0), ("gpu/", 0.25)):
        rows = [{"configuration": "dense", "seed": 0, "milliseconds": value}]
        write_results(repository / f"scripts/benchmarks/results/{folder}low_rank.json", rows=rows, **parts)
    assert _run(repository) == 0
    page = (repository / "hf_efx/low_rank/README.md").read_text()
    assert page.index("| dense | 5 |") < page.index("low_rank-gpu.md") < page.index("| dense | 0.25 |")
    assert "# Steps on a GPU" in (repository / "model_cards/low_rank-gpu.md").read_text()
    assert _run(repository, "--check") == 0


def test_check_names_what_drifted_and_writes_nothing(repository, capsys):
    _run(repository)
    page, card = repository / "hf_efx/low_rank/README.md", repository / "model_cards/low_rank-study.md"
    page.write_text(page.read_text().replace("| dense | 8 |", "| dense | 7 |"))
    card.unlink()
    orphan = repository / "model_cards/low_rank-benchmark.md"
    orphan.write_text("of a benchmark that is gone")
    capsys.readouterr()
    assert _run(repository, "--check") == 1
    out = capsys.readouterr().out
    for name in ("hf_efx/low_rank/README.md", "model_cards/low_rank-study.md", "model_cards/low_rank-benchmark.md"):
        assert f"drifted: {name}\n" in out
    assert "drifted: README.md" not in out and not card.exists() and "| dense | 7 |" in page.read_text()
    assert _run(repository) == 0 and card.exists() and not orphan.exists()
    assert _run(repository, "--check") == 0


def test_no_cell_of_the_table_is_long():
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(METHODS)
    cells = [re.sub(r"\]\(.*?\)", "]", cell) for row in rows for cell in row.split(" | ")]
    assert not [cell for cell in cells if len(cell.split()) > 12]


def test_a_claim_that_is_gone_is_named(repository):
    results = repository / "scripts/reproduce/results/low_rank.json"
    results.write_text(json.dumps({**json.loads(results.read_text()), "claims": []}))
    with pytest.raises(ValueError, match="hf_efx.registry: low_rank names the claim 'short budget: share of"):
        _run(repository)


def test_text_outside_the_sections_is_free(repository):
    _run(repository)
    page = repository / "hf_efx/low_rank/README.md"
    page.write_text(page.read_text().replace("between", "by hand"))
    assert _run(repository, "--check") == 0


def test_nothing_measured_and_running_studies(tmp_path):
    assert _run(tmp_path, "--check") == 0
    partial = tmp_path / "scripts/benchmarks/results/low_rank.partial.json"
    partial.parent.mkdir(parents=True)
    partial.write_text("{}")
    assert _run(tmp_path, "--check") == 0


def test_what_cannot_be_rendered_is_named(repository):
    results = repository / "scripts/reproduce/results/low_rank.json"
    page = repository / "hf_efx/low_rank/README.md"
    good, good_page = results.read_text(), page.read_text()
    results.write_text(json.dumps({**json.loads(good), "plot": "low_rank.png"}))
    with pytest.raises(ValueError, match="names plot='low_rank.png', which isn't beside it"):
        _run(repository)
    results.write_text(good)
    page.write_text("<!-- begin generated: studies -->\n<!-- end generated -->\n")
    with pytest.raises(ValueError, match="unknown generated section 'studies'; there are study, benchmark"):
        _run(repository)
    page.write_text(good_page.replace("<!-- end generated -->\nbetween", "between"))
    with pytest.raises(ValueError, match="a generated section isn't closed"):
        _run(repository)
    results.rename(results.with_name("high_rank.json"))
    with pytest.raises(ValueError, match="high_rank.json is of no method in hf_efx.registry: low_rank"):
        _run(repository)

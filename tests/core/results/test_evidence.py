"""Intervals against published tables, claims against hand-worked figures, rows that survive a kill."""

import importlib.metadata
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hf_efx.core.files import write_atomically
from hf_efx.core.results.evidence import (
    StudyRows,
    claim,
    claims_table,
    cpu,
    figures,
    machine,
    print_results,
    public_command,
    read_results,
    summary_table,
    versions,
    write_results,
)
from hf_efx.core.results.statistics import paired_interval, t_interval, t_quantile

ROOT = Path(__file__).parents[2]
ROWS = [
    {"configuration": "dense", "seed": 0, "perplexity": 8.0, "parameters": 420000, "rank": "full"},
    {"configuration": "dense", "seed": 1, "perplexity": 10.0, "parameters": 420000, "rank": "full"},
    {"configuration": "he", "seed": 0, "perplexity": 13.0, "parameters": 160000, "rank": "0.25"},
    {"configuration": "he", "seed": 1, "perplexity": math.inf, "parameters": 160000, "rank": "0.25"},
]
COLUMNS = [
    {"key": "perplexity", "title": "perplexity", "format": ".2f"},
    {"key": "parameters", "title": "parameters", "format": ","},
    {"key": "rank", "title": "rank"},
]


def results(path, **changes):
    usual = {
        "title": "A study",
        "command": "python scripts/reproduce/low_rank.py",
        "data": {"name": "text", "fingerprint": "ab12"},
        "seeds": [0, 1],
        "rows": ROWS,
        "claims": [claim("he worse", source="ours", bar=1.0, measured=[3.0, 5.0], direction="at_least")],
        "columns": COLUMNS,
    }
    return write_results(path, **{**usual, **changes})


# Two-sided 95% (upper 2.5%) and upper 0.5% points, from the printed t tables.
@pytest.mark.parametrize(
    ("probability", "degrees", "published"),
    [
        (0.975, 1, 12.706),
        (0.975, 2, 4.303),
        (0.975, 3, 3.182),
        (0.975, 4, 2.776),
        (0.975, 5, 2.571),
        (0.975, 9, 2.262),
        (0.975, 10, 2.228),
        (0.975, 30, 2.042),
        (0.975, 120, 1.980),
        (0.995, 1, 63.657),
        (0.995, 7, 3.499),
        (0.95, 20, 1.725),
        (0.5, 4, 0.0),
    ],
)
def test_t_quantile_against_published_tables(probability, degrees, published):
    assert t_quantile(probability, degrees) == pytest.approx(published, abs=5e-4)


def test_t_quantile_in_closed_form():
    # One degree of freedom is Cauchy: tan(pi (p - 1/2)). Two: a sqrt(2 / (1 - a^2)) with a = 2p - 1.
    assert t_quantile(0.9, 1) == pytest.approx(math.tan(0.4 * math.pi), rel=1e-12)
    assert t_quantile(0.9, 2) == pytest.approx(0.8 * math.sqrt(2 / 0.36), rel=1e-12)
    with pytest.raises(ValueError, match=r"t_quantile\(0.1, 3\): give 0.5 <= probability < 1"):
        t_quantile(0.1, 3)


def test_t_interval_by_hand():
    # mean 2, s = 1, n = 3: 2 -+ 4.302653 / sqrt(3)
    assert t_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 2.484138, 2 + 2.484138), abs=1e-5)
    assert t_interval([7.0]) is None and t_interval([7.0, math.nan]) is None
    with pytest.raises(ValueError, match="at least one value"):
        t_interval([])


def test_paired_interval_is_of_the_differences():
    # The methods' spreads are large, the differences 1, 2, 3.
    assert paired_interval([101.0, 2.0, 53.0], [100.0, 0.0, 50.0]) == t_interval([1.0, 2.0, 3.0])
    assert paired_interval([1.0], [0.0]) is None
    with pytest.raises(ValueError, match="seed by seed, but got 2 and 1 values"):
        paired_interval([1.0, 2.0], [1.0])


def test_claim_has_the_form_of_the_architecture():
    made = claim("closes the gap", source="ours", bar=0.35, measured=[0.4, 0.3, 0.5], direction="at_least")
    assert list(made) == ["claim", "source", "bar", "direction", "measured", "interval", "holds"]
    assert made["measured"] == pytest.approx(0.4)
    # s = 0.1, n = 3
    assert made["interval"] == pytest.approx([0.4 - 0.2484138, 0.4 + 0.2484138], abs=1e-6)
    assert made["holds"] is True  # the point estimate counts, not the interval
    assert json.loads(json.dumps(made)) == made


@pytest.mark.parametrize(
    ("direction", "measured", "holds"),
    [("at_most", 1.08, True), ("at_most", 1.09, False), ("at_least", 1.08, True), ("at_least", 1.07, False)],
)
def test_claim_holds_on_the_right_side_of_the_bar(direction, measured, holds):
    made = claim("x", source="ours", bar=1.08, measured=measured, direction=direction, interval=(1.0, 1.2))
    assert (made["holds"], made["measured"], made["interval"]) == (holds, measured, [1.0, 1.2])


def test_claim_says_where_two_methods_are_not_separated():
    def text(a, b):
        return claim("a beats b", source="ours", bar=0, measured=1.0, direction="at_least", pair=(a, b))["claim"]

    assert text([5.0, 5.1, 5.2], [1.0, 1.2, 1.1]) == "a beats b"
    assert text([1.0, 1.2, 1.1], [5.0, 5.1, 5.2]) == "a beats b"
    assert text([1.0, 5.0, 2.0], [2.0, 1.0, 3.0]) == "a beats b (not separated)"
    assert text([5.0], [1.0]) == "a beats b (not separated)"  # one seed separates nothing
    assert text([5.0, math.nan], [1.0, 1.0]) == "a beats b (not separated)"


def test_claim_over_a_diverged_run_does_not_hold():
    made = claim("x", source="ours", bar=1.0, measured=[2.0, math.inf], direction="at_least")
    assert (made["measured"], made["interval"], made["holds"]) == (None, None, False)
    with pytest.raises(ValueError, match="direction='below': it is"):
        claim("x", source="ours", bar=1.0, measured=1.0, direction="below")  # type: ignore[arg-type]


def _without(package):
    found = importlib.metadata.distribution

    def distribution(name):
        if name == package:
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    return distribution


def test_results_round_trip(tmp_path, monkeypatch):
    path = tmp_path / "results" / "low_rank.json"
    rows = [
        {"configuration": "a", "seed": np.int64(0), "loss": np.float32(0.5), "trace": np.arange(2), "bad": math.nan}
    ]
    written = results(path, rows=rows, columns=[], seeds=range(1), settings={"steps": 800})
    assert read_results(path) == written == json.loads(path.read_text())
    assert written["rows"] == [{"configuration": "a", "seed": 0, "loss": 0.5, "trace": [0, 1], "bad": None}]
    assert set(written) >= {"command", "versions", "machine", "data", "seeds", "rows", "claims"}
    assert set(versions()) == {"python", "torch", "transformers", "accelerate", "peft", "datasets", "hf_efx"}
    with monkeypatch.context() as patch:  # a machine without datasets
        patch.setattr(importlib.metadata, "distribution", _without("datasets"))
        assert "datasets" not in versions() and "torch" in versions()
    assert written["machine"] == machine() and machine()["cores"] >= 1
    assert set(written["machine"]) == {"cores", "threads", "gpu", "cpu", "cpu units"} and written["machine"]["cpu"]
    assert [entry.name for entry in path.parent.iterdir()] == ["low_rank.json"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"name": "x"}}, "data lacks fingerprint"),
        ({"rows": [{"configuration": "a", "loss": 1.0}]}, "row 0 lacks seed"),
        ({"claims": [{"claim": "x", "bar": 1}]}, "claim 0 lacks source, direction, measured, interval, holds"),
        ({"columns": [{"key": "loss"}]}, "column 0 lacks title"),
    ],
)
def test_incomplete_results_are_not_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=f"low_rank.json: {message}"):
        results(tmp_path / "low_rank.json", **changes)
    assert not list(tmp_path.iterdir())


def test_unreadable_results_are_named(tmp_path):
    (tmp_path / "a.json").write_text('{"rows": [')
    with pytest.raises(ValueError, match="a.json is no JSON .*run its study again"):
        read_results(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match="results lacks command, versions, machine, data, seeds, claims"):
        read_results(tmp_path / "a.json")


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "card.md"
    write_atomically(path, "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["card.md"]


def test_study_rows_go_on(tmp_path):
    path, settings = tmp_path / "low_rank.json", {"steps": 800, "ranks": (0.25, 0.5)}
    first = StudyRows(path, settings)
    first.add(("dense", 0), {"loss": 2.0})
    first.add(("he", 0), {"loss": math.nan})
    again = StudyRows(path, settings)
    assert again.path.name == "low_rank.partial.json"
    assert again.has(("dense", 0)) and not again.has(("dense", 1))
    assert again.rows == [
        {"configuration": "dense", "seed": 0, "loss": 2.0},
        {"configuration": "he", "seed": 0, "loss": None},
    ]
    with pytest.raises(ValueError, match=r"has a row for \('he', 0\) already"):
        again.add(("he", 0), {"loss": 3.0})
    again.finish()
    assert StudyRows(path, settings).rows == []


def test_study_rows_refuse_other_settings(tmp_path):
    StudyRows(tmp_path / "a.json", {"steps": 800, "lr": 1e-3}).add(("dense", 0), {"loss": 2.0})
    with pytest.raises(ValueError, match=r"1 rows made with other settings \(steps: 800, now 100\): run with those"):
        StudyRows(tmp_path / "a.json", {"steps": 100, "lr": 1e-3})
    (tmp_path / "a.partial.json").write_text('{"settings": {}, "ro')
    with pytest.raises(ValueError, match="a.partial.json can't be read .*delete it"):
        StudyRows(tmp_path / "a.json", {})


def test_study_rows_survive_a_kill(tmp_path):
    code = (
        "import os, signal, sys; from hf_efx.core.results.evidence import StudyRows\n"
        "rows = StudyRows(sys.argv[1], {'steps': 1}); rows.add(('dense', 0), {'loss': 1.5})\n"
        "os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)\n"  # in the middle of the next write
        "rows.add(('dense', 1), {'loss': 2.5})\n"
    )
    path = tmp_path / "low_rank.json"
    killed = subprocess.run([sys.executable, "-c", code, str(path)], env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert killed.returncode == -signal.SIGKILL
    assert StudyRows(path, {"steps": 1}).rows == [{"configuration": "dense", "seed": 0, "loss": 1.5}]


def test_figures_pair_by_seed():
    rows = [
        {"configuration": "a", "seed": 1, "loss": 3.0},
        {"configuration": "b", "seed": 0, "loss": 9.0},
        {"configuration": "a", "seed": 0, "loss": None},
    ]
    first, second = figures(rows, "a", "loss")
    assert math.isnan(first) and second == 3.0
    with pytest.raises(ValueError, match="no rows of configuration='c'; there are a, b"):
        figures(rows, "c", "loss")


def test_summary_over_seeds(tmp_path):
    written = results(tmp_path / "a.json")
    # 8 and 10: mean 9, s = sqrt(2), half = 12.7062 * sqrt(2) / sqrt(2)
    assert summary_table(written) == (
        ["configuration", "perplexity", "parameters", "rank"],
        [["dense", "9.00 \u00b1 12.71", "420,000", "full"], ["he", "not finite in 1 of 2", "160,000", "0.25"]],
    )
    titles, lines = summary_table(
        {"rows": [{"configuration": "a", "seed": 0, "x": 1 / 3}, {"configuration": "b", "seed": 0}]}
    )
    assert (titles, lines) == (["configuration", "x"], [["a", "0.3333"], ["b", "\u2013"]])


def test_claims_table():
    claims = [
        claim("he worse", source="ours", bar=1.0, measured=[3.0, 5.0], direction="at_least"),
        claim("time", source="section 3", bar=1.08, measured=1.2, direction="at_most"),
    ]
    # 3 and 5: mean 4, half = 12.7062 * sqrt(2) / sqrt(2)
    assert claims_table(claims)[1] == [
        ["he worse", "ours", "\u2265 1", "4", "-8.706 to 16.71", "yes"],
        ["time", "section 3", "\u2264 1.08", "1.2", "\u2013", "**no**"],
    ]


def test_results_are_printed(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    print_results(results(tmp_path / "a.json"))
    shown = capsys.readouterr().out
    assert "A study" in shown and "9.00 \u00b1 12.71" in shown and "he worse" in shown


def test_public_command_names_no_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "scripts" / "reproduce" / "a.py"
    arguments = [str(script), "--data=/mnt/private/english text.tsv", "--out", "/mnt/private/x", "--seeds", "0", "1"]
    assert public_command(arguments) == "python scripts/reproduce/a.py '--data=english text.tsv' --out x --seeds 0 1"


def test_the_cpu_s_units_are_those_of_its_flags(monkeypatch):
    text = "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 avx512_bf16 amx_bf16 amx_tile\n\n"
    monkeypatch.setattr(Path, "read_text", lambda self, **_: text)
    assert cpu() == ("Some CPU", "avx2, avx512_bf16, amx_bf16")
    monkeypatch.setattr(Path, "read_text", lambda self, **_: (_ for _ in ()).throw(FileNotFoundError()))
    assert cpu()[0] and cpu()[1] == "none known"

"""The program `hf-efx mc-dropout`, and scripts/translate_with_uncertainty.py over it."""

import dataclasses
import io
import json
import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY
from datasets import Dataset, DatasetDict
from program_runs import refused, run, write_pairs

from hf_efx import cli
from hf_efx.mc_dropout import DeferralThreshold, TranslationOptions, Translator
from hf_efx.mc_dropout.program import ScoringOptions, translate_main
from hf_efx.mc_dropout.translation_table import ARROW, JSON_LINES
from mc_dropout.translators import POSITIONS, built

SHORT = ["--num_samples", 2, "--max_new_tokens", 4, "--device", "cpu"]
PAIRS = ["--source_column", "de", "--target_column", "en"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("marian")
    model, tokenizer = built("marian", folder / "tokenizer")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture
def no_calls(monkeypatch):
    """A model that is called fails."""
    monkeypatch.setattr(Translator, "_translate", None)


def translate(monkeypatch, text, *arguments):
    """Runs the script in this process, on this standard input."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert translate_main([str(word) for word in arguments]) == 0


def test_pairs_are_scored_deferred_and_reported(model, tmp_path, capsys):
    data = write_pairs(tmp_path / "pairs.tsv", pairs=8)
    out = tmp_path / "out"
    argv = ["mc-dropout", "--model", model, "--dataset", data, *PAIRS, *SHORT, "--output_dir", out]
    assert cli.main([str(word) for word in [*argv, "--defer_share", 0.25, "--max_examples", 6]]) == 0
    shown = capsys.readouterr().out
    assert "eins" in shown and "bleuvar" in shown and str(out / JSON_LINES) in shown
    table = Dataset.from_file(str(out / ARROW))
    assert len(table) == 6 and table["target"][0] == "one"
    results = json.loads((out / "results.json").read_text())
    (row,) = results["rows"]
    assert row["bleuvar"] == pytest.approx(sum(table["bleuvar"]) / 6)
    assert row["deferred"] == sum(table["deferred"]) / 6 and {"bleu", "bleu_kept_half", "beam_score"} <= row.keys()
    assert DeferralThreshold.load(out).share == 0.25 and results["settings"]["defer_share"] == 0.25
    assert (out / "retention.png").read_bytes()[:4] == b"\x89PNG"


def test_a_finished_folder_calls_no_model_and_another_setting_is_refused(model, tmp_path, capsys, monkeypatch):
    (tmp_path / "letters.txt").write_text("eins\n\nzwei drei\n?!\n", encoding="utf-8")
    argv = ["--model", model, "--dataset", tmp_path / "letters.txt", *SHORT, "--output_dir", tmp_path / "out"]
    run("mc_dropout", *argv)
    rows = [json.loads(line) for line in (tmp_path / "out" / JSON_LINES).read_text().splitlines()]
    assert [row["note"] for row in rows][1] == "empty source" and rows[1]["bleuvar"] is None
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "bleu" not in results["rows"][0] and not (tmp_path / "out" / "retention.png").exists()
    monkeypatch.setattr(Translator, "_translate", None)
    run("mc_dropout", *argv, "--defer_above", -1, "--batch_size", 1)
    rows = [json.loads(line) for line in (tmp_path / "out" / JSON_LINES).read_text().splitlines()]
    assert [row["deferred"] for row in rows] == [True, False, True, True]
    line = refused("mc_dropout", capsys, *argv, "--seed", 4)
    assert "seed=0, now 4" in line and "name another folder" in line


def test_standard_input_as_windows_writes_it(model, tmp_path, monkeypatch, capsys):
    translate(monkeypatch, "\ufeffeins\r\nzwei\r\n", "--model", model, *SHORT, "--json")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["source"] for row in rows] == ["eins", "zwei"]
    for text, words in (("", "has no lines"), ("eins\n\udce4\n", "isn't UTF-8 in line 2")):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        argv = ["--dataset", "-", "--model", model, *SHORT, "--output_dir", tmp_path / "out"]
        assert words in refused("mc_dropout", capsys, *argv)


def test_lines_of_standard_input(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    translate(monkeypatch, "eins zwei\n\nacht\n", "--model", model, *SHORT, "--json", "--defer_above", 0.5)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["source"] for row in rows] == ["eins zwei", "", "acht"]
    assert [row["deferred"] for row in rows] == [bool(row["bleuvar"] and row["bleuvar"] > 0.5) for row in rows]
    assert rows[1]["bleuvar"] is None and rows[1]["note"] == "empty source" and len(rows[0]["samples"]) == 2
    translate(monkeypatch, "eins zwei\n", "--model", model, *SHORT)
    shown = capsys.readouterr().out
    assert "eins zwei" in shown and "deferred" in shown
    assert list(tmp_path.iterdir()) == []  # nothing is written unless a folder is named
    translate(monkeypatch, "eins zwei\n", "--model", model, *SHORT, "--output_dir", "out", "--json")
    assert (tmp_path / "out" / JSON_LINES).exists()


def test_the_model_s_own_threshold_defers(model, tmp_path, monkeypatch, capsys):
    lines, argv = "eins\nacht\nzwei\n", ["--model", model, *SHORT]
    translate(monkeypatch, lines, *argv, "--output_dir", tmp_path, "--defer_share", 0.3)
    threshold = DeferralThreshold.load(tmp_path)
    threshold.save(model)
    try:
        capsys.readouterr()
        translate(monkeypatch, lines, *argv, "--json")
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [row["deferred"] for row in rows] == [row["bleuvar"] > threshold.defer_above for row in rows]
        other = ["--dataset", "-", "--model", model, "--num_samples", 3, "--output_dir", tmp_path / "other"]
        monkeypatch.setattr(sys, "stdin", io.StringIO("eins\n"))
        assert "made with num_samples=2, not 3" in refused("mc_dropout", capsys, *other)
    finally:
        (model / "uncertainty.json").unlink()


def test_number_words_need_no_file(model, tmp_path, monkeypatch, capsys):
    part = Dataset.from_dict({"source": ["eins", "zwei"] * 3, "target": ["one", "two"] * 3, "nl": ["een", "twee"] * 3})
    pairs = DatasetDict({"train": part.select([0]), "validation": part})
    monkeypatch.setattr("hf_efx.mc_dropout.program.load_pairs", lambda *given: pairs)  # 19,000 take seconds
    argv = ["--model", model, *SHORT, "--max_examples", 3, "--output_dir", tmp_path, "--no_plot", "--num_beams", 2]
    line = refused("mc_dropout", capsys, *argv, "--split", "tests")
    assert "split='tests': number words have train, validation" in line
    run("mc_dropout", *argv)
    assert Dataset.from_file(str(tmp_path / ARROW))["nl"][:] == ["een", "twee", "een"]
    assert json.loads((tmp_path / "results.json").read_text())["data"]["name"] == "number words"


REFUSED = {
    "no model": ([], "model_name_or_path is missing: name a model with --model"),
    "model": (["--model", "./not-there"], "./not-there"),
    "data": (["--dataset", "./not-there"], "there is no such file or folder"),
    "column": (["--dataset", "TSV", "--source_column", "fr"], "source_column='fr'"),
    "target": (["--dataset", "TSV", "--source_column", "de", "--target_column", "fr"], "target_column='fr'"),
    "split": (["--dataset", "TSV", "--source_column", "de", "--split", "test"], "no split 'test'"),
    "bytes": (["--dataset", "LATIN"], "isn't UTF-8 from byte 6 on (0xfc)"),
    "blank": (["--dataset", "BLANK"], "rows are empty"),
    "long": (["--dataset", "LONG"], f"the model takes {POSITIONS}: shorten it, or give truncation=True"),
    "one": (["--num_samples", 1], "num_samples=1: one sample has nothing to differ from"),
    "none": (["--num_samples", 0], "num_samples=0: one sample has nothing to differ from"),
    "negative": (["--num_samples", -1], "num_samples=-1"),
    "nan": (["--defer_above", "nan"], "defer_above=nan: expected a finite number"),
    "share": (["--defer_share", 1.5], "defer_share=1.5: expected a share above 0 and below 1"),
    "both": (["--defer_share", 0.5, "--defer_above", 0.5], "give one of them"),
    "batch": (["--batch_size", 0], "batch_size=0: expected 1 or more"),
    "examples": (["--max_examples", 0], "max_examples=0: expected 1 or more"),
    "score": (["--uncertainties", "bleu"], "uncertainty 'bleu' is unknown; choose from bleuvar"),
    "language": (["--tgt_lang", "en"], "tgt_lang='en': MarianTokenizer knows no languages"),
    "sites": (["--sites", "encode"], "'encode' matches no module"),
    "option": (["--num_sample", 3], "unknown option --num_sample; did you mean num_samples"),
    "device": (["--device", "quantum"], "device='quantum' can't be used"),
}


def test_what_cannot_work_is_refused_before_a_call_of_the_model(model, tmp_path, capsys, no_calls, monkeypatch):
    files = {name: tmp_path / f"{name.lower()}.txt" for name in ("LATIN", "BLANK", "LONG", "LINES")}
    files["LATIN"].write_bytes("eins\nfünf\n".encode("latin-1"))
    files["BLANK"].write_text("\n \n")
    files["LONG"].write_text("eins " * 40)
    files["LINES"].write_text("eins\nzwei\n")
    files["TSV"] = write_pairs(tmp_path / "pairs.tsv", pairs=3)
    for i, (name, (arguments, words)) in enumerate(REFUSED.items()):
        given = [str(files.get(str(word), word)) for word in arguments]
        argv = [] if name == "no model" else ["--model", model]
        argv += [] if "--dataset" in given else ["--dataset", files["LINES"]]
        line = refused("mc_dropout", capsys, *argv, *given, "--output_dir", tmp_path / f"out{i}")
        assert words in line, (name, line)
    assert not list(tmp_path.glob("out*/*"))  # nothing is written


def test_every_option_has_a_help_text():
    for options in (ScoringOptions, TranslationOptions):
        for field in dataclasses.fields(options):
            assert len(field.metadata["help"]) > 20, field.name


def test_the_script_reads_a_pipe(model):
    script = REPOSITORY / "scripts" / "translate_with_uncertainty.py"
    argv = [sys.executable, script, "--model", model, *SHORT, "--json"]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [str(word) for word in argv], input="acht\nfünf\n", capture_output=True, text=True, env=env, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["source"] for row in rows] == ["acht", "fünf"] and all(row["bleuvar"] is not None for row in rows)

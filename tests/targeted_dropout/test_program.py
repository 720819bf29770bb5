"""The program `hf-efx targeted-dropout`: options to checkpoint, card and curves, runs beside it, resuming."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from huggingface_hub import ModelCard
from rho_loss.programs import IMAGES, rows_of, write_images
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

from hf_efx import cli
from hf_efx.targeted_dropout import program

SHORT = ["--use_cpu", "--disable_tqdm", "true", "--per_device_train_batch_size", "4", "--no_plot"]
STEPS = ["--max_steps", "6", "--eval_steps", "3", "--save_steps", "3", "--logging_steps", "1"]
CURVE = ["--fractions", "0", "0.5", "--targeting", "0.5"]
GPT2 = "n_layer=2,n_embd=16,n_positions=32"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "quadrants")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n\n".join(f"line {i} of the text " + "has words " * (i % 4) for i in range(150)))
    return file


def run(folder: Path, *arguments: object) -> dict[str, dict[str, Any]]:
    """Runs the program: the figures by configuration."""
    words = ["targeted-dropout", *SHORT, *STEPS, *CURVE, "--output_dir", folder, *arguments]
    assert cli.main([str(word) for word in words]) == 0
    return rows_of(folder)


def language(text: Path, *arguments: object) -> list[object]:
    return ["--task", "causal_lm", "--dataset", text, "--block_size", 32, "--config_overrides", GPT2, *arguments]


def test_an_image_classifier_beside_all_that_it_compares_with(images, tmp_path):
    rows = run(tmp_path, *IMAGES, "--dataset", images, "--compare", "none", "l1", "dropout", "--plot", "true")
    assert list(rows) == ["targeted_dropout", "none", "l1", "dropout"]
    assert all(row["steps"] == 6 and row["pruned_0"] == row["eval_accuracy"] for row in rows.values())
    assert all(0 <= row["pruned_50"] <= 1 for row in rows.values())
    for name in ("curves.png", "pruning_curves.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    log = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    assert {entry["targeted_dropout/rate"] for entry in log if "loss" in entry} == {0.66}
    plain = json.loads((tmp_path / "_compared" / "dropout" / "checkpoint-6" / "trainer_state.json").read_text())
    assert {e["targeted_dropout/dropped"] for e in plain["log_history"] if "loss" in e} == {0.5}
    card = ModelCard.load(tmp_path / "README.md")
    assert "| targeted_dropout.targeting | `0.5` |" in card.text and "ordinary dense model" in card.text
    assert "| 50% pruned |" in card.text and card.data.eval_results[0].metric_type == "accuracy"  # pyright: ignore
    AutoModelForImageClassification.from_pretrained(tmp_path)


def test_units_of_a_language_model_and_a_run_resumed(text, tmp_path, monkeypatch):
    arguments = [*language(text), "--granularity", "unit", "--target_modules", "c_fc", "--compare", "none"]
    whole = run(tmp_path, *arguments)
    weights = load_file(tmp_path / "model.safetensors")
    shutil.rmtree(tmp_path / "checkpoint-6")
    (tmp_path / "run.json").unlink()
    trained: list[str] = []
    real = program.train_run
    monkeypatch.setattr(program, "train_run", lambda name, *a, **o: trained.append(name) or real(name, *a, **o))
    resumed = run(tmp_path, *arguments, "--resume_from_checkpoint", "true")
    assert trained == ["targeted_dropout"]  # the plain run was finished
    for name, row in resumed.items():
        assert row["eval_loss"] == whole[name]["eval_loss"] and row["pruned_50"] == whole[name]["pruned_50"]
    assert all(weights[name].equal(value) for name, value in load_file(tmp_path / "model.safetensors").items())
    assert run(tmp_path, *arguments, "--resume_from_checkpoint", "true") == resumed and trained == ["targeted_dropout"]
    (entry,) = AutoModelForCausalLM.from_pretrained(tmp_path).config.efx["methods"]  # pyright: ignore
    assert entry["config"]["granularity"] == "unit"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--rate", "1.5"], "rate=1.5: expected a share"),
        (["--targeting", "0.001"], "leaves no candidate"),
        (["--granularity", "head"], "granularity='head'"),
        (["--compare", "uniform"], "compare='uniform': expected some of none, l1, dropout"),
        (["--compare", "l1", "--granularity", "unit"], "l1=1e-05 acts on weights"),
        (["--fractions", "1.0"], "fractions"),
        (["--target_modules", "nowhere"], "matches no module"),
        (["--dataset", "./not-there"], "there is no such folder of idx files"),
    ],
)
def test_wrong_input_ends_with_status_2_before_training(images, tmp_path, capsys, arguments, words):
    with pytest.raises(SystemExit) as ended:
        run(tmp_path / "out", *IMAGES, "--dataset", images, *arguments)
    assert ended.value.code == 2 and words in capsys.readouterr().err
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_two_processes_run_the_script(images, tmp_path):
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    command = [sys.executable, *launch.split(), "--dynamo_backend", "no", "--main_process_port", "0"]
    argv = [*IMAGES, *SHORT, *STEPS, *CURVE, "--dataset", images, "--output_dir", tmp_path, "--compare", "none"]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    script = str(REPOSITORY / "scripts" / "train_targeted_dropout.py")
    done = subprocess.run([*command, script, *map(str, argv)], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert [row["steps"] for row in rows_of(tmp_path).values()] == [6, 6]
    assert done.stdout.count("checkpoint:") == 1

"""The program `hf-efx prunability`, and the measurement that `evaluate` loads."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from program_runs import MODEL, QUIET, write_images
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification

import hf_efx
from hf_efx import cli
from hf_efx.core.data.fingerprints import data_fingerprint
from hf_efx.core.data.text_data import byte_tokenizer
from hf_efx.programs.task_data import load_task
from hf_efx.programs.tasks import TaskOptions
from hf_efx.prunability import program
from hf_efx.targeted_dropout import program as targeted_dropout

IMAGES = ["--task", "image_classification", "--samples", "60", "--batch_size", "30", "--device", "cpu"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Two networks of digits: new, so that their losses are those of chance."""
    folders = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(
            "resnet", embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_channels=1
        )
        config.num_labels = 10
        folder = tmp_path_factory.mktemp("networks") / f"seed-{seed}"
        AutoModelForImageClassification.from_config(config).save_pretrained(folder)
        folders.append(str(folder))
    return folders


def test_checkpoints_are_measured_on_one_sample(checkpoints, tmp_path, capsys):
    out = str(tmp_path / "out")
    first, second = checkpoints
    argv = ["prunability", "--model", first, "--compare", second, *IMAGES, "--output_dir", out, "--baselines"]
    assert cli.main([*argv, "--tolerance_mode", "absolute"]) == 0
    results = json.loads(Path(out, "results.json").read_text())
    assert [row["configuration"] for row in results["rows"]] == checkpoints
    for row in results["rows"]:
        assert row["evaluations"] <= 12 and 0 < row["prunability"] <= 1
        assert row["low"] <= row["prunability"] <= row["high"] + 1e-12
        assert row["bound"] == pytest.approx(row["loss"] + 0.1)
        assert row["parameter_count"] > row["weights"] > 0
    assert results["settings"]["samples"] == 60
    assert Path(out, "prunability.png").read_bytes()[:4] == b"\x89PNG"
    assert "share kept of each tensor" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "model_name_or_path is missing"),
        (["--model", "./nowhere"], "nowhere"),
        (["--model", "FIRST", "--compare", "./nowhere"], "nowhere"),
        (["--model", "FIRST", "--tolerance", "-1"], "tolerance=-1"),
        (["--model", "FIRST", "--scope", "row"], "scope"),
        (["--model", "FIRST", "--device", "gpu"], "device='gpu' can't be used"),
        (["--model", "FIRST", "--samples", "1"], "samples=1: expected 2 or more"),
        (["--model", "FIRST", "--seed", "-1"], "seed=-1: expected 0 or more"),
        (["--model", "FIRST", "--output_dir", "/dev/null/out"], "output_dir='/dev/null/out' can't be written"),
        (["--model", "FIRST", "--toleranse", "1"], "tolerance"),
    ],
)
def test_wrong_input_ends_with_a_line(argv, message, checkpoints, capsys, tmp_path):
    argv = [checkpoints[0] if word == "FIRST" else word for word in argv]
    with pytest.raises(SystemExit) as error:
        program.main([*IMAGES, "--no_plot", "--output_dir", str(tmp_path), *argv])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_a_run_is_measured_on_its_own_data(tmp_path, capsys):
    """A part of it, with noise; what is given wins, and is said."""
    images, run, out = write_images(tmp_path / "images"), tmp_path / "run", tmp_path / "out"
    noisy = ["--max_train_examples", "60", "--label_noise", "0.5", "--label_noise_seed", "3"]
    training = ["--task", "image_classification", "--dataset", images, *noisy, *QUIET, "--no_plot", "--max_steps", "1"]
    model = ["--model_type", "resnet", "--config_overrides", MODEL, "--fractions", "0"]
    words = [*training, *model, "--eval_strategy", "no", "--output_dir", run]
    assert targeted_dropout.main([str(word) for word in words]) == 0
    capsys.readouterr()
    argv = ["--model", run, "--device", "cpu", "--no_plot", "--output_dir", out, "--samples", "60"]
    found = {}
    for given in ((), ("--label_noise", "0"), ("--label_noise", "0", "--max_train_examples", "30")):
        assert program.main([str(word) for word in (*argv, *given)]) == 0
        found[given] = json.loads((out / "results.json").read_text()), capsys.readouterr().out
    results, said = found[()]
    options = TaskOptions(task="image_classification", dataset=str(images), max_train_examples=60, label_noise=0.5)
    trained = load_task(dataclasses.replace(options, label_noise_seed=3, holdout_share=0.0))
    assert results["data"]["fingerprint"] == data_fingerprint(trained.train, trained.fingerprint_columns)
    assert results["settings"]["training examples"] == 60 and results["settings"]["label_noise"] == 0.5
    assert f"as in the run that made {run}: " in said and "max_train_examples=60" in said and "as given" not in said
    assert "other data" not in said
    results, said = found["--label_noise", "0"]
    assert results["settings"]["training examples"] == 60 and "label_noise" not in results["settings"]
    assert f"as given, other than in the run that made {run}: label_noise=0" in said
    assert f"{run} is measured on other data than it was trained on" in said
    assert found["--label_noise", "0", "--max_train_examples", "30"][0]["settings"]["training examples"] == 30
    trained_only = ["--model", str(run), "--optim", "adamw_8bit"]
    with pytest.raises(SystemExit):
        targeted_dropout.prune_main(trained_only)
    assert "--optim acts in training alone" in capsys.readouterr().err


def test_a_language_model_on_its_text(tmp_path, capsys):
    tokenizer = byte_tokenizer()
    config = AutoConfig.for_model(
        "gpt2",
        n_layer=1,
        n_embd=8,
        n_head=2,
        vocab_size=len(tokenizer),
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    lines = [f"the {word} of number {i}" for i, word in enumerate(["house", "tree", "cat", "sea"] * 10)]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    argv = ["--model", tmp_path / "model", "--task", "causal_lm", "--dataset", tmp_path / "lines.jsonl"]
    argv += ["--output_dir", tmp_path / "out", "--no_plot", "--device", "cpu", "--samples", "20"]
    assert program.main([str(word) for word in argv]) == 0
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert row["weights"] == 12 * 8 * 8 and list(row["kept"])[0] == "transformer.h.0.attn.c_attn.weight"


def test_evaluate_loads_the_measurement_offline(tmp_path, run_python):
    tokenizer = byte_tokenizer()
    config = AutoConfig.for_model(
        "gpt2",
        n_layer=1,
        n_embd=8,
        n_head=2,
        vocab_size=len(tokenizer),
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    folder = Path(hf_efx.__file__).parent / "prunability" / "prunability_measurement"
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    code = """
        import json, sys
        import evaluate

        measurement = evaluate.load(sys.argv[1])
        texts = [f"text of number {i}" for i in range(12)]
        found = measurement.compute(data=texts, model=sys.argv[2], scope="layer")
        print(json.dumps(found))
    """
    found = json.loads(run_python(code, env=env, args=[folder, tmp_path / "model"]).splitlines()[-1])
    assert 0 < found["prunability"] <= 1 and found["weights"] == 12 * 8 * 8 and found["evaluations"] <= 12

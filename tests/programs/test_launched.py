"""Programs as they are launched: scripts, two processes, to the Hub and back."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from program_runs import (
    IMAGES,
    MARIAN,
    MODEL,
    PAIRS,
    QUIET,
    program_of,
    rows_of,
    write_images,
    write_pairs,
    write_text,
)

from hf_efx.goldiprox import SelectionSequence

SCRIPTS = {
    "compute_irreducible_losses": "rho_loss.irreducible_main",
    "measure_prunability": "prunability",
    "prune": "targeted_dropout.prune_main",
    "replay_sequence": "goldiprox",
    "select_goldiprox": "goldiprox",
    "train_low_rank_gpt2": "low_rank",
    "train_marian": "train_marian",
    "train_rho_loss": "rho_loss",
    "train_slice_out": "slice_out",
    "train_targeted_dropout": "targeted_dropout",
    "translate_with_uncertainty": "mc_dropout.translate_main",
}
SHORT = [*QUIET, "--max_steps", "4", "--eval_strategy", "steps", "--eval_steps", "2", "--save_steps", "4", "--no_plot"]
SHORT += ["--per_device_train_batch_size", "4"]
CHOOSE = ["--selection_ratio", "0.25", "--irreducible_model", f"resnet:{MODEL}", "--irreducible_steps", "2"]
GPT2 = ["--block_size", "32", "--config_overrides", "n_layer=1,n_embd=16,n_head=2,n_positions=32"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_text(tmp_path_factory.mktemp("text") / "text.txt"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_images(tmp_path_factory.mktemp("images") / "quadrants"))


def test_every_script_is_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {path.stem for path in (REPOSITORY / "scripts").glob("*.py")} - {"quickstart", "render_results"}
    assert there == set(SCRIPTS)
    for script, name in SCRIPTS.items():
        seen: list[list[str]] = []
        program = program_of(name)
        with monkeypatch.context() as patched:
            path = f"{program.__module__}.{program.__name__}"
            patched.setattr(path, lambda argv=None, seen=seen: seen.append(argv or sys.argv[1:]) or 0)
            patched.setattr(sys, "argv", [script, "--seed", "1"])
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(str(REPOSITORY / "scripts" / f"{script}.py"), run_name="__main__")
        does = {"select_goldiprox": ["--do", "select"], "replay_sequence": ["--do", "replay"]}.get(script, [])
        assert ended.value.code == 0 and seen == [[*does, "--seed", "1"]]


def test_two_processes_run_every_program(images: str, text: str, tmp_path: Path) -> None:
    commands: dict[str, list[str]] = {
        "low_rank": [*GPT2, *SHORT, "--dataset", text],
        "slice_out": [*IMAGES, "--rate", "0.5", "--align", "2", "--compare", "none", *SHORT, "--dataset", images],
        "targeted_dropout": [
            *(*IMAGES, "--targeting", "0.5", "--fractions", "0", "0.5", "--compare", "none"),
            *(*SHORT, "--dataset", images),
        ],
        "rho_loss": [*IMAGES, *CHOOSE, "--selection_scope", "global", *SHORT, "--dataset", images],
        "train_marian": [*PAIRS, "--config_overrides", MARIAN, *SHORT],
    }
    commands["train_marian"] += ["--dataset", str(write_pairs(tmp_path / "pairs.tsv"))]
    for name, argv in commands.items():
        argv += ["--output_dir", str(tmp_path / name)]
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    command = [sys.executable, *launch.split(), "--dynamo_backend", "no", "--main_process_port", "0"]
    command += [str(Path(__file__).with_name("launched.py")), json.dumps(commands)]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("checkpoint:") == len(commands)
    for name in commands:
        assert {row["steps"] for row in rows_of(tmp_path / name).values()} == {4}
        assert json.loads((tmp_path / name / "results.json").read_text())["settings"]["processes"] == 2
    assert rows_of(tmp_path / "rho_loss")["rho_loss"]["rank_overlap"] == 0


PUSH_AND_LOAD = """
    import json, sys
    sys.path.insert(0, sys.argv[2])
    from program_runs import program_of
    for name, argv in json.loads(sys.argv[1]):
        assert program_of(name)(argv) == 0, name

    from huggingface_hub import HfApi, ModelCard
    from transformers import AutoModelForCausalLM, AutoModelForImageClassification
    seen = {}
    for name, kind in (("program", AutoModelForCausalLM), ("rho-model", AutoModelForImageClassification)):
        card = ModelCard.load(f"tester/{name}")
        seen[name] = {
            "parameters": kind.from_pretrained(f"tester/{name}").num_parameters(),
            "card": card.text,
            "value": card.data.eval_results[0].metric_value,
            "files": HfApi().list_repo_files(f"tester/{name}"),
        }
    print(json.dumps(seen))
"""


def test_to_the_hub_and_back(hub: Any, run_python: Any, images: str, text: str, tmp_path: Path) -> None:
    """What is pushed is the folder with our card; models, a table and a sequence load by name."""
    noisy = [*IMAGES, "--dataset", images, "--label_noise", "0.2"]
    select = [*CHOOSE, "--proxy_model", f"resnet:{MODEL}", "--num_steps", "4"]
    pushed: list[tuple[str, list[str]]] = [
        ("low_rank", [*GPT2, *SHORT, "--dataset", text, "--push_to_hub", "--hub_model_id", "tester/program"]),
        ("rho_loss.irreducible_main", [*noisy, *CHOOSE[2:], *QUIET, "--push_table_to", "tester/rho-table"]),
        ("rho_loss", [*noisy, *CHOOSE[:2], *SHORT, "--irreducible_losses", "tester/rho-table"]),
        ("goldiprox", [*noisy, *select, *SHORT, "--do", "select", "--push_sequence_to", "tester/gp"]),
        ("goldiprox", [*noisy, *CHOOSE, *SHORT, "--do", "replay", "--sequence", "tester/gp"]),
    ]
    pushed[2][1].extend(["--compare", "uniform", "--push_to_hub", "--hub_model_id", "tester/rho-model"])
    folders = [tmp_path / str(i) for i in range(len(pushed))]
    for (_, argv), folder in zip(pushed, folders, strict=True):
        argv += ["--output_dir", str(folder)]
    printed = run_python(PUSH_AND_LOAD, env=hub.env, args=[json.dumps(pushed), REPOSITORY / "tests"])
    seen = json.loads(printed.splitlines()[-1])
    for name, row, metric in (
        ("program", rows_of(folders[0])["low_rank"], "eval_perplexity"),
        ("rho-model", rows_of(folders[2])["rho_loss"], "eval_accuracy"),
    ):
        assert (seen[name]["parameters"], seen[name]["value"]) == (row["parameters"], row[metric])
        assert {"README.md", "results.json", "model.safetensors"} <= set(seen[name]["files"])
        assert not [file for file in seen[name]["files"] if "irreducible" in file or "uniform" in file]
    card = seen["program"]["card"]
    assert (
        "# program\n" in card and 'from_pretrained("tester/program")' in card and "| low_rank.rank | `0.25` |" in card
    )
    assert "tokenizer.json" in seen["program"]["files"]
    assert "preprocessor_config.json" in seen["rho-model"]["files"]
    assert rows_of(folders[2])["rho_loss"]["irreducible_seconds"] == 0
    sequence = SelectionSequence.load_from_disk(folders[3] / "sequence")
    assert json.loads((folders[4] / "results.json").read_text())["settings"]["sequence"] == sequence.digest
    assert rows_of(folders[4])["goldiprox"]["steps"] == 4

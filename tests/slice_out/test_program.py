"""The program `hf-efx slice-out`: options to checkpoint, card and figures, runs beside it, resuming."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from huggingface_hub import ModelCard
from rho_loss.programs import IMAGES, curve, rows_of, write_images
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, Trainer, TrainingArguments

from hf_efx import cli
from hf_efx.core.training.step_cost import TrainingClock
from hf_efx.programs.task_data import load_task
from hf_efx.programs.tasks import TaskModelOptions, TaskOptions
from hf_efx.slice_out import program

SHORT = ["--use_cpu", "--disable_tqdm", "true", "--per_device_train_batch_size", "4", "--no_plot", "--align", "2"]
STEPS = ["--max_steps", "6", "--eval_steps", "3", "--save_steps", "3", "--logging_steps", "1", "--rate", "0.5"]
GPT2 = "n_layer=2,n_embd=16,n_positions=32"
OFF = "resid_pdrop=0.0,embd_pdrop=0.0,attn_pdrop=0.0,n_head=4"


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
    assert cli.main([str(word) for word in ["slice-out", *SHORT, *STEPS, "--output_dir", folder, *arguments]]) == 0
    return rows_of(folder)


def language(text: Path, *arguments: object) -> list[object]:
    return ["--task", "causal_lm", "--dataset", text, "--block_size", 32, "--config_overrides", GPT2, *arguments]


def log(folder: Path) -> list[dict[str, float]]:
    return json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]


def test_an_image_classifier_beside_a_plain_run(images, tmp_path, capsys):
    rows = run(tmp_path, *IMAGES, "--dataset", images, "--compare", "none", "--plot", "true")
    assert list(rows) == ["slice_out", "none"] and {row["steps"] for row in rows.values()} == {6}
    assert rows["slice_out"]["time_ratio"] > 0 and "time_ratio" not in rows["none"]
    assert "a forward and backward pass takes" in capsys.readouterr().out
    # Blocks of 4 and 8 channels, of which half are kept: in the log of the run, not in that of the plain one.
    assert {entry["slice_out/conv_width"] for entry in log(tmp_path) if "loss" in entry} == {0.5}
    assert not [key for entry in log(tmp_path / "_compared" / "none") for key in entry if "slice_out" in key]
    # The saved model, read by plain transformers, has the accuracy that the results and the card tell.
    task = load_task(TaskOptions(task="image_classification", dataset=str(images), holdout_share=0.0))
    model: Any = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    batch = task.data_collator(task.validation.__getitems__(list(range(40))))
    with torch.no_grad():
        right = (model(pixel_values=batch["pixel_values"]).logits.argmax(-1) == batch["labels"]).float().mean().item()
    assert rows["slice_out"]["eval_accuracy"] == pytest.approx(right)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.eval_results[0].metric_value == rows["slice_out"]["eval_accuracy"]  # pyright: ignore
    assert (
        "| none |" in card.text and "| slice_out.rate | `0.5` |" in card.text and "ordinary dense model" in card.text
    )
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    settings = json.loads((tmp_path / "results.json").read_text())["settings"]
    assert settings["training examples"] == 120 and "blocks" not in settings  # nothing is held out


def test_a_language_model_beside_none_and_its_own_dropout(text, tmp_path, monkeypatch):
    trained: dict[str, list[float]] = {}
    real = program.train_run

    def spy(name: str, trainer: Any, *arguments: Any, **options: Any) -> Any:
        found = {n: m.p for n, m in trainer.model.named_modules() if isinstance(m, nn.Dropout)}
        trained[name] = [found["transformer.drop"], *(p for n, p in found.items() if ".h." in n)]
        return real(name, trainer, *arguments, **options)

    monkeypatch.setattr(program, "train_run", spy)
    rate = ["--rate", "{mlp: 0.25, attention: 0.5}"]
    rows = run(tmp_path / "out", *language(text), *rate, "--compare", "none", "dropout")
    assert list(rows) == ["slice_out", "none", "dropout"]
    # In each layer: attention's own two, then that of the MLP; the embeddings' isn't on a block.
    assert trained == {
        "slice_out": [0.0] * 7,
        "none": [0.0] * 7,
        "dropout": [0.0, *2 * [0.5, 0.5, 0.25]],
    }
    entry = next(entry for entry in log(tmp_path / "out") if "loss" in entry)
    assert (entry["slice_out/mlp_width"], entry["slice_out/attention_width"]) == (0.75, 0.5)
    # 'none' is what a plain Trainer makes of the same weights.
    task = load_task(TaskOptions(task="causal_lm", dataset=str(text), block_size=32, holdout_share=0.0))
    args = TrainingArguments(
        str(tmp_path / "plain"),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        weight_decay=0.01,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    model = task.model_init(args.seed, TaskModelOptions(model_type="gpt2", config_overrides=f"{GPT2},{OFF}"))
    Trainer(model, args, train_dataset=task.train, data_collator=task.data_collator).train()
    kept = load_file(tmp_path / "out" / "_compared" / "none" / "checkpoint-6" / "model.safetensors")
    state = model.state_dict()
    assert all(state[name].equal(value) for name, value in kept.items())
    saved: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert saved.config.n_head == 4 and saved.config.efx["methods"][0]["method"] == "slice_out"
    # Dropouts of the model's own come back with what is saved, and are off in every run beside it.
    run(tmp_path / "own", *language(text)[:-1], f"{GPT2},resid_pdrop=0.2", "--compare", "none")
    assert trained["slice_out"] == trained["none"] == [0.0] * 7
    assert json.loads((tmp_path / "own" / "config.json").read_text())["resid_pdrop"] == 0.2
    # A checkpoint that was trained with slices goes on with those of now.
    run(tmp_path / "on", *language(text)[:-2], "--model", tmp_path / "own", "--targets", "mlp", "--compare", "none")
    (entry,) = AutoModelForCausalLM.from_pretrained(tmp_path / "on").config.efx["methods"]  # pyright: ignore
    assert entry["config"]["targets"] == ["mlp"] and trained["slice_out"] == [0.0, *2 * [0.0, 0.2, 0.0]]


def test_text_classification_with_nothing_but_the_task(text, tmp_path):
    table = tmp_path / "text.jsonl"
    lines = [{"text": f"{word} and so on {i}", "label": word} for i in range(60) for word in ("left", "right")]
    table.write_text("\n".join(map(json.dumps, lines)))
    rows = run(tmp_path / "out", "--dataset", table, "--block_size", 16, "--vocab_size", 300)
    assert rows["slice_out"]["best_accuracy"] >= rows["slice_out"]["eval_accuracy"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_attention_heads"] == 4


def test_a_run_resumed_ends_where_the_whole_one_does(text, tmp_path, monkeypatch):
    arguments = [*language(text), "--compare", "none"]
    whole = run(tmp_path, *arguments)
    weights = load_file(tmp_path / "model.safetensors")
    shutil.rmtree(tmp_path / "checkpoint-6")
    (tmp_path / "run.json").unlink()
    trained: list[str] = []
    real = program.train_run
    monkeypatch.setattr(program, "train_run", lambda name, *a, **o: trained.append(name) or real(name, *a, **o))
    resumed = run(tmp_path, *arguments, "--resume_from_checkpoint", "true")
    assert trained == ["slice_out"]  # the plain run was finished
    for name, row in resumed.items():
        assert row["eval_loss"] == whole[name]["eval_loss"] and len(curve(tmp_path)) == 2
    assert all(weights[name].equal(value) for name, value in load_file(tmp_path / "model.safetensors").items())
    assert run(tmp_path, *arguments, "--resume_from_checkpoint", "true") == resumed and trained == ["slice_out"]
    # Other settings: the finished run isn't taken for this one.
    with pytest.raises(SystemExit):
        run(tmp_path, *arguments, "--resume_from_checkpoint", "true", "--rate", "0.25")


def test_a_measurement_is_left_out_of_the_clock(monkeypatch):
    now = iter([0.0, 10.0, 30.0])
    monkeypatch.setattr("hf_efx.core.training.step_cost.time.perf_counter", lambda: next(now))
    clock, nothing = TrainingClock(), type("S", (), {"log_history": [], "global_step": 0})
    clock.on_train_begin(None, nothing, None)  # pyright: ignore[reportArgumentType]
    clock.on_step_end(None, nothing, None)  # pyright: ignore[reportArgumentType]
    clock.leave_out(15.0)
    clock.on_step_end(None, nothing, None)  # pyright: ignore[reportArgumentType]
    assert clock.seconds == 15.0  # 10, and 20 less 15


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--rate", "1.5"], "rate=1.5"),
        (["--rate", "much"], "rate='much'"),
        (["--rate", "{mlp: 2}"], "rate['mlp']=2"),
        (["--rate_pattern", "0.5"], "rate_pattern=0.5: expected a dict"),
        (["--targets", "5"], "targets=5"),
        (["--starts", "anywhere"], "starts='anywhere'"),
        (["--blocks", "fc1"], "unknown option --blocks"),
        (["--compare", "uniform"], "compare='uniform': expected some of none, dropout"),
        (["--compare", "dropout"], "ResNetForImageClassification has no dropout of its own"),
        (["--align", "8"], "rounds to a width of"),
        (["--targets", "mlp"], "choose no block of ResNetForImageClassification"),
        (["--final_dense_steps", "6"], "final_dense_steps=6 leave no sliced step"),
        (["--dataset", "./not-there"], "there is no such folder of idx files"),
        (["--resume_from_checkpoint", "true"], "No valid checkpoint found"),
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
    argv = [*IMAGES, *SHORT, *STEPS, "--dataset", images, "--output_dir", tmp_path, "--compare", "none"]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    script = str(REPOSITORY / "scripts" / "train_slice_out.py")
    done = subprocess.run([*command, script, *map(str, argv)], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert [row["steps"] for row in rows_of(tmp_path).values()] == [6, 6]
    assert json.loads((tmp_path / "results.json").read_text())["settings"]["processes"] == 2
    assert done.stdout.count("checkpoint:") == 1

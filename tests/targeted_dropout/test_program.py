"""The program `hf-efx targeted-dropout`: options to checkpoint, card and curves, runs beside it, resuming."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from program_runs import GPT2, IMAGES, QUIET, rows_of, write_images, write_text
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

from hf_efx import cli
from hf_efx.core.results.curves import PruningCurve
from hf_efx.programs.task_data import load_task
from hf_efx.programs.tasks import LearningTask, TaskModelOptions, TaskOptions
from hf_efx.targeted_dropout import program
from hf_efx.targeted_dropout.pruning import PruningPlan

SHORT = [*QUIET, "--per_device_train_batch_size", "4", "--no_plot"]
STEPS = ["--max_steps", "6", "--eval_steps", "3", "--save_steps", "3", "--logging_steps", "1"]
CURVE = ["--fractions", "0", "0.5", "--targeting", "0.5"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "quadrants")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


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


def test_all_runs_are_pruned_in_the_same_modules(images, tmp_path, monkeypatch):
    """By layers_to_transform too, which the model of the run beside it doesn't record."""
    seen: list[set[str]] = []
    real = program.pruning_curve

    def spy(model: Any, *arguments: Any, **options: Any) -> Any:
        names = ("granularity", "scope", "target_modules", "blocks")
        plan = PruningPlan.of(model, **{name: options[name] for name in names})
        seen.append({name for part in plan.parts for name in part.modules})
        return real(model, *arguments, **options)

    monkeypatch.setattr(program, "pruning_curve", spy)
    run(tmp_path, *IMAGES, "--dataset", images, "--compare", "none", "dropout", "--layers_to_transform", 0)
    assert len(seen) == 3 and seen[0] and seen[0] == seen[1] == seen[2]
    assert {name.partition("stages.")[2][0] for name in seen[0]} == {"0"}


def test_units_of_a_language_model(text, tmp_path):
    arguments = [*language(text), "--granularity", "unit", "--target_modules", "c_fc", "--compare", "none"]
    rows = run(tmp_path, *arguments)
    assert all(row["pruned_0"] == row["eval_perplexity"] for row in rows.values())
    (entry,) = AutoModelForCausalLM.from_pretrained(tmp_path).config.efx["methods"]  # pyright: ignore
    assert entry["config"]["granularity"] == "unit"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--rate", "1.5"], "rate=1.5: expected a share"),
        (["--targeting", "0.001"], "leaves no candidate"),
        (["--granularity", "head"], "granularity='head'"),
        (["--compare", "uniform"], "compare='uniform': expected some of none, l1, dropout, each once"),
        (["--compare", "l1", "--granularity", "unit"], "l1=1e-05 acts on weights"),
        (["--fractions", "1.0"], "fractions"),
        (["--target_modules", "nowhere"], "matches no module"),
    ],
)
def test_wrong_input_ends_with_status_2_before_training(images, tmp_path, capsys, arguments, words):
    with pytest.raises(SystemExit) as ended:
        run(tmp_path / "out", *IMAGES, "--dataset", images, *arguments)
    assert ended.value.code == 2 and words in capsys.readouterr().err
    assert not (tmp_path / "out" / "model.safetensors").exists()


# --- scripts/prune.py

TEXT = ["the cat sat on the mat", "a dog ran in the park", "one two three four five", "so it goes on and on"]
OPTIONS = ["--block_size", "16", "--fractions", "0", "0.5", "0.9", "--timed_rounds", "1"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "text.jsonl"
    file.write_text("".join(json.dumps({"text": f"{text} {i}"}) + "\n" for i in range(10) for text in TEXT))
    return file


@pytest.fixture(scope="module")
def task(texts: Path) -> LearningTask:
    return load_task(TaskOptions(task="causal_lm", dataset=str(texts), block_size=16))


@pytest.fixture(scope="module")
def checkpoint(task: LearningTask, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = TaskModelOptions(model_type="gpt2", config_overrides="n_layer=2,n_embd=16,n_head=2,n_positions=16")
    model = task.model_init(0, options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    task.save_processor(folder)
    return folder


@pytest.fixture
def prune(texts: Path, checkpoint: Path, tmp_path: Path) -> Callable[..., tuple[Path, dict[str, dict[str, Any]]]]:
    """Runs the program: its folder and the figures by configuration."""

    def prune_(*arguments: object) -> tuple[Path, dict[str, dict[str, Any]]]:
        argv = [
            *OPTIONS,
            *QUIET,
            "--no_plot",
            "--dataset",
            texts,
            "--model",
            checkpoint,
            "--output_dir",
            tmp_path / "out",
        ]
        assert program.prune_main([str(word) for word in (*argv, *arguments)]) == 0
        rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
        return tmp_path / "out", {row["configuration"]: row for row in rows}

    return prune_


def test_the_curve_alone_writes_no_checkpoint(prune: Any) -> None:
    folder, rows = prune("--plot", "true")
    assert list(rows) == ["as it was", "curve: 0 pruned", "curve: 0.5 pruned", "curve: 0.9 pruned"]
    assert rows["as it was"]["perplexity"] == rows["curve: 0 pruned"]["perplexity"]
    curve = PruningCurve.from_dict(json.loads((folder / "pruning_curve.json").read_text()))
    assert curve.values == tuple(row["perplexity"] for name, row in rows.items() if name.startswith("curve"))
    assert not curve.higher_is_better and curve.metric == "perplexity"
    assert {file.name for file in folder.iterdir()} == {"pruning_curve.json", "pruning_curve.png", "results.json"}


def test_pruned_weights_are_zeros_in_a_file_of_the_same_size(prune: Any, task: LearningTask) -> None:
    folder, rows = prune("--fraction", 0.5)
    dense, pruned = rows["as it was"], rows["0.5 pruned"]
    assert pruned["perplexity"] == rows["curve: 0.5 pruned"]["perplexity"] != dense["perplexity"]
    assert pruned["parameters"] == dense["parameters"] and abs(pruned["file_bytes"] - dense["file_bytes"]) < 2000
    assert all(row["training_step_seconds"] > 0 < row["forward_seconds"] for row in (dense, pruned))
    weights = load_file(folder / "model.safetensors")
    assert (weights["transformer.h.0.mlp.c_fc.weight"] == 0).sum(0).eq(8).all()
    assert sum(int(w.count_nonzero()) for w in weights.values()) == pruned["nonzero_parameters"]
    card = ModelCard.load(folder / "README.md")
    assert [r.metric_type for r in card.data.eval_results][:2] == ["perplexity", "perplexity_pruned_0"]  # pyright: ignore
    assert card.data.eval_results[0].metric_value == pruned["perplexity"]  # pyright: ignore
    assert "as many bytes and as much time" in card.text and "nothing but transformers" in card.text
    assert "| pruning.granularity | `weight` |" in card.text and "pruned" in card.data.tags  # pyright: ignore


def test_shrunk_units_make_a_smaller_file_of_the_same_perplexity(prune: Any, task: LearningTask) -> None:
    folder, rows = prune(
        "--fraction", 0.5, "--granularity", "unit", "--scope", "layer", "--target_modules", "c_fc", "--shrink"
    )
    dense, small = rows["as it was"], rows["0.5 pruned, shrunk"]
    assert small["perplexity"] == pytest.approx(rows["curve: 0.5 pruned"]["perplexity"], rel=1e-5)
    # 32 units of each of two layers: 16 weights in, a bias, 16 weights out.
    assert small["parameters"] == dense["parameters"] - 2 * 32 * 33
    assert small["file_bytes"] == (folder / "model.safetensors").stat().st_size < dense["file_bytes"] - 4 * 2 * 32 * 32
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.n_inner == 32 and not hasattr(model.config, "efx")
    assert "taken out" in (folder / "README.md").read_text()


PRUNE_REFUSED = {
    "no model": (["--model", ""], "model_name_or_path is missing.*--model"),
    "no such folder": (["--model", "./nowhere"], "model_name_or_path='./nowhere': there is no such folder"),
    "fraction": (["--fraction", "1.5"], r"fraction=\[1.5\]: expected fractions from 0 to below 1"),
    "fractions": (["--fractions", "1.0"], r"fractions=\[1.0\]: expected fractions from 0 to below 1"),
    "shrunk weights": (["--fraction", "0.5", "--shrink"], "pass --granularity unit"),
    "no module": (["--target_modules", "q_proj"], r"target_modules=\['q_proj'\].*matches no module"),
    "optimizer": (["--optim", "adamw_8bit"], "--optim acts in training alone, and this program trains nothing"),
    "length": (["--max_steps", "3"], "--max_steps acts in training alone"),
    "rounds": (["--timed_rounds", "0"], "timed_rounds=0: expected 1 or more"),
}


@pytest.mark.parametrize("case", PRUNE_REFUSED)
def test_prune_ends_wrong_input_with_a_line(case: str, prune: Any, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, words = PRUNE_REFUSED[case]
    with pytest.raises(SystemExit) as ended:
        prune(*arguments)
    message = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and re.search(f"^prune.py: error: .*{words}", message), message


def test_ctrl_c_ends_with_130_and_no_checkpoint(prune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "prune", interrupt)
    with pytest.raises(AssertionError):
        prune("--fraction", 0.5)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["pruning_curve.json"]

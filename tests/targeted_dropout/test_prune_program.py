"""scripts/prune.py: from a checkpoint to curve, pruned or smaller checkpoint, results and card."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_efx.core.results.curves import PruningCurve
from hf_efx.programs.task_data import load_task
from hf_efx.programs.tasks import LearningTask, TaskModelOptions, TaskOptions
from hf_efx.targeted_dropout import prune_program

TEXT = ["the cat sat on the mat", "a dog ran in the park", "one two three four five", "so it goes on and on"]
OPTIONS = ["--block_size", "16", "--fractions", "0", "0.5", "0.9", "--timed_rounds", "1"]
QUIET = ["--use_cpu", "--disable_tqdm", "true", "--report_to", "none", "--no_plot"]


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
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    task.save_processor(folder)
    return folder


@pytest.fixture
def run(texts: Path, checkpoint: Path, tmp_path: Path) -> Callable[..., tuple[Path, dict[str, dict[str, Any]]]]:
    """Runs the program: its folder and the figures by configuration."""

    def run_(*arguments: object) -> tuple[Path, dict[str, dict[str, Any]]]:
        argv = [*OPTIONS, *QUIET, "--dataset", texts, "--model", checkpoint, "--output_dir", tmp_path / "out"]
        assert prune_program.main([str(word) for word in (*argv, *arguments)]) == 0
        rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
        return tmp_path / "out", {row["configuration"]: row for row in rows}

    return run_


def test_the_curve_alone_writes_no_checkpoint(run: Any) -> None:
    folder, rows = run("--plot", "true")
    assert list(rows) == ["as it was", "curve: 0 pruned", "curve: 0.5 pruned", "curve: 0.9 pruned"]
    assert rows["as it was"]["perplexity"] == rows["curve: 0 pruned"]["perplexity"]
    curve = PruningCurve.from_dict(json.loads((folder / "pruning_curve.json").read_text()))
    assert curve.values == tuple(row["perplexity"] for name, row in rows.items() if name.startswith("curve"))
    assert not curve.higher_is_better and curve.metric == "perplexity"
    assert {file.name for file in folder.iterdir()} == {"pruning_curve.json", "pruning_curve.png", "results.json"}


def test_pruned_weights_are_zeros_in_a_file_of_the_same_size(run: Any, task: LearningTask) -> None:
    folder, rows = run("--fraction", 0.5)
    dense, pruned = rows["as it was"], rows["0.5 pruned"]
    assert pruned["perplexity"] == rows["curve: 0.5 pruned"]["perplexity"] != dense["perplexity"]
    assert pruned["parameters"] == dense["parameters"] and abs(pruned["file_bytes"] - dense["file_bytes"]) < 2000
    assert all(row["training_step_seconds"] > row["forward_seconds"] > 0 for row in (dense, pruned))
    weights = load_file(folder / "model.safetensors")
    assert (weights["transformer.h.0.mlp.c_fc.weight"] == 0).sum(0).eq(8).all()
    assert sum(int(w.count_nonzero()) for w in weights.values()) == pruned["nonzero_parameters"]
    card = ModelCard.load(folder / "README.md")
    assert [r.metric_type for r in card.data.eval_results][:2] == ["perplexity", "perplexity_pruned_0"]  # pyright: ignore
    assert card.data.eval_results[0].metric_value == pruned["perplexity"]  # pyright: ignore
    assert "as many bytes and as much time" in card.text and "nothing but transformers" in card.text
    assert "| pruning.granularity | `weight` |" in card.text and "pruned" in card.data.tags  # pyright: ignore


def test_shrunk_units_make_a_smaller_file_of_the_same_perplexity(run: Any, task: LearningTask) -> None:
    folder, rows = run(
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


REFUSED = {
    "no model": (["--model", ""], "model_name_or_path is missing.*--model"),
    "no such folder": (["--model", "./nowhere"], "model_name_or_path='./nowhere': there is no such folder"),
    "fraction": (["--fraction", "1.5"], r"fraction=\[1.5\]: expected fractions from 0 to below 1"),
    "fractions": (["--fractions", "1.0"], r"fractions=\[1.0\]: expected fractions from 0 to below 1"),
    "shrunk weights": (["--fraction", "0.5", "--shrink"], "pass --granularity unit"),
    "no module": (["--target_modules", "q_proj"], r"target_modules=\['q_proj'\].*matches no module"),
    "rounds": (["--timed_rounds", "0"], "timed_rounds=0: expected 1 or more"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_input_ends_with_a_line(case: str, run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, words = REFUSED[case]
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    message = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and re.search(f"^prune.py: error: .*{words}", message), message


def test_ctrl_c_ends_with_130_and_no_checkpoint(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prune_program, "prune", interrupt)
    with pytest.raises(AssertionError):
        run("--fraction", 0.5)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["pruning_curve.json"]

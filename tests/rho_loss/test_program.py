"""The programs `hf-efx rho-loss` and compute_irreducible_losses: options to table, checkpoint, card, figures."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from huggingface_hub import ModelCard
from program_runs import IMAGES, MODEL, QUIET, curve, rows_of, write_images, write_text
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageClassification

from hf_efx.core.data.tables import settings_of
from hf_efx.programs.run_folder import Run
from hf_efx.programs.task_data import load_task
from hf_efx.programs.task_report import compare_runs
from hf_efx.programs.tasks import LearningTask, TaskModelOptions, TaskOptions
from hf_efx.rho_loss import program
from hf_efx.rho_loss.arguments import PRESETS
from hf_efx.rho_loss.irreducible_table import load_irreducible_losses
from hf_efx.rho_loss.program import with_holdout_share

SHORT = [*QUIET, "--per_device_train_batch_size", "4", "--selection_ratio", "0.25"]
TABLE = ["--irreducible_model", f"resnet:{MODEL}", "--irreducible_steps", "2"]
STEPS = ["--max_steps", "10", "--eval_steps", "5", "--save_steps", "5", "--label_noise", "0.2", "--no_plot"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "quadrants")


@pytest.fixture
def train(images, tmp_path):
    """Runs the program: its folder and the figures by configuration."""

    def train_(*arguments: object, out: str = "out") -> tuple[Path, dict[str, dict[str, Any]]]:
        argv = [*IMAGES, *SHORT, *STEPS, "--dataset", images, "--output_dir", tmp_path / out, *arguments]
        assert program.main([str(word) for word in argv]) == 0
        return tmp_path / out, rows_of(tmp_path / out)

    return train_


def test_a_run_beside_others_leaves_figures_card_plot_and_model(train, images):
    folder, rows = train(*TABLE, "--compare", "uniform", "loss", "--plot", "true")
    assert list(rows) == ["rho_loss", "uniform", "loss"]
    assert all(row["steps"] == 10 and row["train_seconds"] > 0 for row in rows.values())
    assert rows["rho_loss"]["irreducible_seconds"] > 0
    # The saved model, read by plain transformers, has the accuracy that the results and the card tell.
    task = load_task(TaskOptions(task="image_classification", dataset=str(images)))
    model: Any = AutoModelForImageClassification.from_pretrained(folder).eval()
    batch = task.data_collator(task.validation.__getitems__(range(40)))
    with torch.no_grad():
        right = (model(pixel_values=batch["pixel_values"]).logits.argmax(-1) == batch["labels"]).float().mean().item()
    assert rows["rho_loss"]["eval_accuracy"] == pytest.approx(right)
    card = ModelCard.load(folder / "README.md")
    assert card.data.eval_results[0].metric_value == rows["rho_loss"]["eval_accuracy"]  # pyright: ignore
    assert "| uniform |" in card.text and "![Training curves](curves.png)" in card.text
    assert "| rho_loss.selection_ratio | `0.25` |" in card.text and "nothing but transformers" in card.text
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((folder / "preprocessor_config.json").read_text())["size"] == {"height": 8, "width": 8}
    report = json.loads((folder / "selection_report.json").read_text())
    assert report["examples_drawn"] == 4 * report["examples_chosen"]
    assert rows["rho_loss"]["corrupted_share"] == report["corrupted_share"]
    assert [point[0] for point in curve(folder)] == [5, 10]


def test_the_plain_run_beside_it_is_what_a_plain_trainer_does(train, images, tmp_path):
    from transformers import Trainer, TrainingArguments

    folder, _ = train("--selection", "loss", "--compare", "uniform", "--save_strategy", "steps", "--save_steps", 10)
    task = load_task(TaskOptions(task="image_classification", dataset=str(images), label_noise=0.2, holdout_share=0.0))
    args = TrainingArguments(
        str(tmp_path / "plain"),
        max_steps=10,
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
    model = task.model_init(args.seed, TaskModelOptions(model_type="resnet", config_overrides=MODEL))
    Trainer(model, args, train_dataset=task.train, data_collator=task.data_collator).train()
    kept = load_file(folder / "_compared" / "uniform" / "checkpoint-10" / "model.safetensors")
    assert all(kept[name].equal(value) for name, value in model.state_dict().items())
    assert not (folder / "_irreducible_losses").exists()  # 'loss' needs none, so nothing is held out either
    assert json.loads((folder / "results.json").read_text())["settings"]["training examples"] == 120


def test_a_ready_table_gives_the_run_that_one_made_on_the_spot_gives(train, images, tmp_path, capsys):
    argv = [*IMAGES, "--dataset", images, "--output_dir", tmp_path / "losses", *TABLE, "--label_noise", 0.2]
    argv += ["--use_cpu", "--disable_tqdm", "true", "--per_device_train_batch_size", 4]
    assert program.irreducible_main([str(word) for word in argv]) == 0
    made, _ = train(*TABLE, out="made")
    ready, rows = train("--irreducible_losses", tmp_path / "losses" / "table", out="ready")
    assert curve(made) == curve(ready) and rows["rho_loss"]["irreducible_seconds"] == 0
    weights = [load_file(folder / "model.safetensors") for folder in (made, ready)]
    assert all(weights[0][name].equal(value) for name, value in weights[1].items())
    table = load_irreducible_losses(tmp_path / "losses" / "table")
    task = load_task(TaskOptions(task="image_classification", dataset=str(images), label_noise=0.2))
    assert (
        list(table["example_id"]) == sorted(task.train["example_id"])
        and "# " in (tmp_path / "losses" / "table" / "README.md").read_text()
    )
    for changed in (["--label_noise", "0.3"], ["--holdout_share", "0.3"]):  # it is of another data set than this
        with pytest.raises(SystemExit) as ended:
            train("--irreducible_losses", tmp_path / "losses" / "table", *changed, out="other")
        assert ended.value.code == 2 and "the table of irreducible losses was made" in capsys.readouterr().err


def test_cross_fit_holds_nothing_out(train, tmp_path):
    folder, _ = train(*TABLE, "--irreducible", "cross_fit", "--irreducible_folds", 3)
    table = load_from_disk(str(next((folder / "_irreducible_losses").glob("*/table"))))
    assert list(table["example_id"]) == list(range(120))
    assert np.bincount(table["fold"]).tolist() == [40, 40, 40]
    # The table alone tells that there is no holdout.
    assert with_holdout_share(TaskOptions(), settings_of(table)).holdout_share == 0
    assert with_holdout_share(TaskOptions(), "holdout").holdout_share == 0.5
    assert with_holdout_share(TaskOptions(holdout_share=0.1), "holdout").holdout_share == 0.1


def test_a_scoring_model_and_the_preset(train):
    folder, rows = train(*TABLE, "--scoring_model", "tiny", "--train_scoring_model", "--preset", "fast")
    settings = json.loads((folder / "results.json").read_text())["settings"]
    assert all(settings[name] == value for name, value in PRESETS["fast"].items() if name != "selection_ratio")
    assert settings["selection_ratio"] == 0.25  # given, and a preset sets what isn't
    assert rows["rho_loss"]["steps"] == 10


def test_tokens_of_a_causal_model(tmp_path):
    text = write_text(tmp_path / "text.txt")
    small = "n_layer=1,n_embd=8,n_head=2,n_positions=32"
    argv = ["--task", "causal_lm", "--dataset", text, "--block_size", 32, "--model_type", "gpt2", *SHORT]
    argv += ["--config_overrides", small, "--granularity", "token", "--irreducible_model", f"gpt2:{small}"]
    argv += ["--irreducible_steps", 4, "--max_steps", 4, "--eval_steps", 2, "--no_plot", "--label_noise", 0.2]
    argv += ["--output_dir", tmp_path / "out", "--compare", "uniform"]
    assert program.main([str(word) for word in argv]) == 0
    rows = rows_of(tmp_path / "out")
    assert rows["rho_loss"]["best_perplexity"] <= rows["rho_loss"]["eval_perplexity"] + 1e-9
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.n_embd == 8  # pyright: ignore
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert {r.metric_type for r in card.data.eval_results} == {"perplexity", "bits_per_byte"}  # pyright: ignore


def test_when_a_run_reached_the_baseline_by_hand():
    def run(name: str, *curve: tuple[int, float, float], best: float) -> Run:
        return Run(name, {"best_accuracy": best, "best_perplexity": best}, list(curve))

    class Accuracy(LearningTask):
        def __init__(self, higher: bool) -> None:
            object.__setattr__(self, "labels", ("a", "b") if higher else ())

    runs = [
        run("rho", (10, 1.0, 0.4), (20, 2.0, 0.7), (30, 3.0, 0.9), best=0.9),
        run("uniform", (10, 0.5, 0.3), (20, 1.0, 0.6), (30, 1.5, 0.5), best=0.6),
        run("loss", (10, 1.0, 0.2), (20, 2.0, 0.5), best=0.5),
    ]
    compare_runs(runs, "uniform", Accuracy(True))
    reached = [(r.figures.get("steps_to_baseline"), r.figures.get("seconds_to_baseline")) for r in runs]
    assert reached == [(20, 2.0), (20, 1.0), (None, None)]
    runs = [run("rho", (10, 1.0, 9.0), (20, 2.0, 7.0), best=7.0), run("uniform", (10, 1.0, 8.0), best=8.0)]
    compare_runs(runs, "uniform", Accuracy(False))
    assert [r.figures["steps_to_baseline"] for r in runs] == [20, 10]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--selection", "rho"], "selection='rho'"),
        (["--compare", "plain"], "selection='plain' is unknown"),
        (["--selection_ratio", "0"], "selection_ratio=0.0"),
        (["--irreducible_losses", "./not-there"], "'./not-there': there is no such folder"),
        (["--irreducible_model", "./not-there"], "there is no such folder"),
        (["--irreducible_model", "resnet:depth=1"], "'depth' is no setting of ResNetConfig"),
        (["--irreducible_folds", "1"], "irreducible_folds=1"),
        (["--holdout_share", "0"], "give a holdout_share above 0, or irreducible='cross_fit'"),
        (["--resume_from_checkpoint", "true"], "No valid checkpoint found"),
        (["--train_scoring_model"], "needs a scoring_model"),
        (["--granularity", "token"], "granularity='token'"),
        (["--task", "regression"], "invalid choice: 'regression'"),
    ],
)
def test_wrong_input_ends_with_status_2_before_training(images, tmp_path, capsys, arguments, words):
    table = [] if "--irreducible_losses" in arguments else TABLE
    argv = [*IMAGES, *SHORT, *STEPS, *table, "--dataset", str(images), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        program.main([*argv, *arguments])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_the_program_s_options_have_help_texts():
    from hf_efx.core.training.arguments import describe_options

    for options in (TaskOptions, TaskModelOptions, program.IrreducibleOptions, program.ProgramOptions):
        assert all(option.help for option in describe_options(options))
    assert describe_options(program.TableOptions)

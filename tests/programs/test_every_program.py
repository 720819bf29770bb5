"""What holds for every program that trains: finished runs, cut runs, refusals before the first step, failures."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from program_runs import (
    GPT2,
    IMAGES,
    MARIAN,
    MODEL,
    PAIRS,
    QUIET,
    program_of,
    refused,
    rows_of,
    run,
    unfinish,
    write_images,
    write_pairs,
    write_text,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

SHORT = [*QUIET, "--max_steps", 4, "--eval_strategy", "steps", "--eval_steps", 2, "--save_steps", 2, "--no_plot"]
SHORT += ["--per_device_train_batch_size", 4, "--learning_rate", "1e-2"]
CHOOSE = ["--selection_ratio", 0.25, "--irreducible_model", f"resnet:{MODEL}", "--irreducible_steps", 2]
PROGRAMS: dict[str, list[object]] = {
    "low_rank": ["--block_size", 32, "--config_overrides", f"{GPT2},n_head=2"],
    "slice_out": [*IMAGES, "--rate", 0.5, "--align", 2, "--compare", "none"],
    "targeted_dropout": [*IMAGES, "--targeting", 0.5, "--fractions", 0, 0.5, "--compare", "none", "l1", "dropout"],
    "rho_loss": [*IMAGES, *CHOOSE, "--label_noise", 0.2, "--compare", "uniform"],
    "goldiprox": [*IMAGES, *CHOOSE, "--num_steps", 4, "--proxy_model", f"resnet:{MODEL}", "--compare_uniform"],
    "train_marian": [*PAIRS, "--config_overrides", MARIAN],
}
every_program = pytest.mark.parametrize("name", PROGRAMS)
RESUME = ["--resume_from_checkpoint", "true"]


@pytest.fixture(scope="module")
def argv(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[object]]:
    """A program's arguments, on 60 images, a short text or 120 pairs."""
    folder = tmp_path_factory.mktemp("data")
    images = write_images(folder / "quadrants", train=60)
    texts = {"low_rank": write_text(folder / "text.txt"), "train_marian": write_pairs(folder / "pairs.tsv")}

    def argv_(name: str, out: Path, *more: object) -> list[object]:
        data = texts.get(name, images)
        return [*PROGRAMS[name], *SHORT, "--dataset", data, "--output_dir", out, *more]

    return argv_


@pytest.fixture(scope="module")
def whole(argv: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a program's finished run, which is made once."""
    made: dict[str, Path] = {}

    def whole_(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "whole"
            run(name, *argv(name, made[name]))
        return made[name]

    return whole_


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The output folder of each training step."""
    taken: list[str] = []
    real = Trainer.training_step

    def step(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        taken.append(Path(str(self.args.output_dir)).name)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", step)
    return taken


@every_program
def test_a_finished_run_resumed_trains_no_step_and_says_the_same(
    name: str, argv: Any, whole: Any, steps: list[str]
) -> None:
    folder = whole(name)
    rows, weights, card = rows_of(folder), load_file(folder / "model.safetensors"), (folder / "README.md").read_text()
    steps.clear()
    run(name, *argv(name, folder, *RESUME))
    assert steps == []
    assert rows_of(folder) | {next(iter(rows)): {}} == rows | {next(iter(rows)): {}}
    same, before = rows_of(folder)[next(iter(rows))], rows[next(iter(rows))]
    assert {k: v for k, v in same.items() if "seconds" not in k} == {
        k: v for k, v in before.items() if "seconds" not in k
    }
    assert all(weights[key].equal(value) for key, value in load_file(folder / "model.safetensors").items())
    assert ModelCard(card).data.to_dict() == ModelCard.load(folder / "README.md").data.to_dict()


@every_program
def test_a_cut_run_ends_where_the_whole_one_does(
    name: str, argv: Any, whole: Any, tmp_path: Path, steps: list[str]
) -> None:
    expected = rows_of(whole(name))
    shutil.copytree(whole(name), tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoint-4")
    unfinish(tmp_path / "cut")
    for folder in (tmp_path / "cut" / "_compared").glob("uniform"):  # cut before its first checkpoint
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        unfinish(folder)
    steps.clear()
    run(name, *argv(name, tmp_path / "cut", *RESUME))
    assert steps[:2] == ["cut"] * 2 and set(steps[2:]) <= {"uniform"}  # what was finished isn't trained again
    for configuration, row in rows_of(tmp_path / "cut").items():
        same = [key for key in row if key.startswith(("eval_", "pruned_")) and not key.endswith(("_time", "_second"))]
        figures = {key: row[key] for key in same if "runtime" not in key}
        assert figures == {key: expected[configuration][key] for key in figures}
    one, other = (load_file(folder / "model.safetensors") for folder in (whole(name), tmp_path / "cut"))
    assert all(one[key].equal(value) for key, value in other.items())


def other_weights(folder: Path, copy: Path) -> Path:
    """A copy of a checkpoint with a weight changed."""
    shutil.copytree(folder, copy)
    weights = load_file(copy / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@every_program
def test_another_run_s_folder_is_refused(
    name: str, argv: Any, whole: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: list[str]
) -> None:
    folder = whole(name)
    steps.clear()  # of that run, if this test is the first to ask for it
    before = (folder / "results.json").read_text()
    if name == "low_rank":
        changes = {"data": ["--block_size", 16], "validation": ["--max_eval_blocks", 2], "rank": ["--rank", 0.5]}
    elif name == "train_marian":
        changes = {"data": ["--max_train_examples", 50], "validation": ["--max_eval_examples", 1]}
    else:
        changes = {"data": ["--holdout_share", 0.3], "validation": ["--max_eval_blocks", 20]}
    changes |= {"args.adam_beta1": ["--adam_beta1", 0.8], "model.": ["--config_overrides", f"{MODEL},depths=[1,2]"]}
    if name == "low_rank":
        changes["model."] = ["--config_overrides", f"{GPT2},n_head=4"]
    if name == "train_marian":
        changes["model."] = ["--config_overrides", f"{MARIAN},dropout=0.2"]
    for word, arguments in changes.items():
        for resumed in ([], RESUME):  # begun anew it would leave checkpoints of two runs
            line = refused(name, capsys, *argv(name, folder, *arguments, *resumed))
            assert "holds a run with other settings" in line and word in line and "another --output_dir" in line
    (tmp_path / "checkpoint-2").mkdir()
    shutil.copytree(folder / "checkpoint-2", tmp_path / "checkpoint-2", dirs_exist_ok=True)
    assert "of an unknown run" in refused(name, capsys, *argv(name, tmp_path, *RESUME))
    assert steps == [] and (folder / "results.json").read_text() == before


def test_a_checkpoint_s_weights_are_what_a_run_starts_from(
    argv: Any, whole: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    AutoModelForCausalLM.from_pretrained(whole("low_rank"))
    first = other_weights(whole("low_rank"), tmp_path / "first")
    start = [
        word for word in argv("low_rank", tmp_path / "out") if word not in ("--config_overrides", f"{GPT2},n_head=2")
    ]
    run("low_rank", *start, "--model", first)
    other_weights(whole("low_rank"), tmp_path / "second")
    other_weights(tmp_path / "second", tmp_path / "third")
    shutil.rmtree(first)
    shutil.move(tmp_path / "third", first)
    assert "weights: " in refused("low_rank", capsys, *start, "--model", first, *RESUME)


REFUSED = {
    "unwritable": (["--output_dir", "FILE/out"], "can't be written (Not a directory): name another with --output_dir"),
    "push": (["--push_to_hub", "--hub_model_id", "no one/model"], "hub_model_id='no one/model' can't be pushed to"),
    "metric": (["--metric_for_best_model", "f1"], "metric_for_best_model='f1': an evaluation gives eval_loss, eval_"),
    "no metric": (["--prediction_loss_only"], "prediction_loss_only=True leaves an evaluation without its metric"),
    "empty": (["--dataloader_drop_last", "--per_device_eval_batch_size", 500], "drop_last=True leaves none"),
    "checkpoint": (["--resume_from_checkpoint", "./not-there"], "'./not-there' is no complete checkpoint"),
    "data": (["--dataset", "./not-there"], "there is no such"),
    "model": (["--model", "./not-there"], "model_name_or_path='./not-there': there is no such folder"),
    "precision": (["--tf32", "true"], "tf32"),
    "optimizer": (["--optim", "adamw_8bit"], "bitsandbytes"),
    "schedule": (["--lr_scheduler_type", "warmup_stable_decay"], "lr_scheduler_type='warmup_stable_decay' can't be"),
    "prediction": (["--do_predict"], "do_predict=True: programs train and evaluate, and predict nothing"),
    "tracker": (["--report_to", "wandb"], "report_to='wandb' isn't installed"),
}


@every_program
def test_what_cannot_work_is_refused_before_the_first_step(
    name: str, argv: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: list[str]
) -> None:
    (tmp_path / "file").write_text("")
    for i, (arguments, words) in enumerate(REFUSED.values()):
        arguments = [str(word).replace("FILE", str(tmp_path / "file")) for word in arguments]
        assert words in refused(name, capsys, *argv(name, tmp_path / f"out{i}", *arguments))
    assert not [folder for folder in steps if folder.startswith("out")]
    assert not list(tmp_path.glob("out*/*.safetensors"))


NOTHING_READS = [
    ("slice_out", ["--text_column", "body"], "text_column='body': nothing of task='image_classification' reads it"),
    ("slice_out", ["--task", "causal_lm", "--image_size", 8], "image_size=8: nothing of task='causal_lm' reads it"),
    ("slice_out", ["--compare", "none", "nothing"], "compare='nothing': expected some of none, dropout, each once"),
    ("targeted_dropout", ["--compare_rate", 0.2, "--compare", "none"], "compare_rate=0.2 goes with --compare dropout"),
    ("rho_loss", ["--compare", "rho_loss"], "compare='rho_loss' is the program's own selection"),
    ("rho_loss", ["--irreducible_folds", 3], "irreducible_folds=3 goes with --irreducible cross_fit"),
    ("rho_loss", ["--irreducible_losses", "x"], "names a ready table, but irreducible_model, irreducible_steps would"),
    (
        "rho_loss",
        ["--selection", "loss"],
        "irreducible_model, irreducible_steps: loss or uniform reads no irreducible",
    ),
]


@pytest.mark.parametrize(("name", "arguments", "words"), NOTHING_READS, ids=lambda value: str(value)[:30])
def test_what_nothing_would_read_is_refused(
    name: str, arguments: Any, words: str, argv: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refused(name, capsys, *argv(name, tmp_path / "out"), *arguments)


def test_columns_without_data_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused("slice_out", capsys, "--label_column", "kind", "--output_dir", tmp_path)
    assert "label_column='kind': without a dataset nothing reads it" in line


def test_another_program_s_folder_is_refused(
    argv: Any, whole: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole("slice_out"), tmp_path / "out", ignore=shutil.ignore_patterns("checkpoint-*"))
    line = refused("targeted_dropout", capsys, *argv("targeted_dropout", tmp_path / "out"))
    assert "holds a run of slice_out, whose model and results this one would write over: name another" in line


def test_a_launcher_that_is_not_installed_is_refused(
    argv: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "zero.json").write_text("{}")
    try:
        assert "deepspeed" in refused("slice_out", capsys, *argv("slice_out", tmp_path), "--deepspeed", "zero.json")
    finally:
        unset_hf_deepspeed_config()  # transformers keeps what it couldn't use


@every_program
def test_without_matplotlib_the_error_names_the_extra(
    name: str, argv: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    line = refused(name, capsys, *argv(name, tmp_path / "out", "--plot", "true"))
    assert "pip install 'hf_efx[plot]', or pass --plot false" in line


def test_a_push_without_a_token_is_refused_at_once(
    argv: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: None)
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: None)
    line = refused("goldiprox", capsys, *argv("goldiprox", tmp_path, "--push_sequence_to", "someone/sequence"))
    assert "push_sequence_to='someone/sequence' can't be pushed to" in line and "hf auth login" in line


def test_what_fails_inside_training_leaves_with_a_traceback(
    argv: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("in the middle")

    monkeypatch.setattr(Trainer, "evaluate", fail)
    with pytest.raises(RuntimeError, match="slice_out, at step 2, failed: in the middle") as caught:
        run("slice_out", *argv("slice_out", tmp_path))
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_failed_save_leaves_no_torn_model(argv: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Trainer._save

    def fail(self: Trainer, output_dir: str | None = None, *args: Any) -> None:
        real(self, output_dir, *args)
        if output_dir is None or Path(output_dir) == tmp_path:
            Path(tmp_path, "model.safetensors").write_bytes(b"torn")
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Trainer, "_save", fail)
    with pytest.raises(RuntimeError, match="saving slice_out failed: .*No space left"):
        run("slice_out", *argv("slice_out", tmp_path))
    assert not list(tmp_path.glob("*.safetensors")) and json.loads((tmp_path / "run.json").read_text())["run"] is None
    assert (tmp_path / "checkpoint-4").is_dir()  # to go on from


def test_ctrl_c_ends_with_status_130(argv: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "train", interrupt)
    assert program_of("slice_out")(list(map(str, argv("slice_out", tmp_path)))) == 130

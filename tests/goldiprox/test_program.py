"""The program `hf-efx goldiprox`: select, replay, both."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from rho_loss.programs import IMAGES, MODEL, SHORT, curve, rows_of, write_images
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from hf_efx.goldiprox import SelectionSequence, program

SELECT = ["--proxy_model", f"resnet:{MODEL}", "--irreducible_model", f"resnet:{MODEL}", "--irreducible_steps", "2"]
SELECT += ["--num_steps", "10", "--label_noise", "0.2"]
REPLAY = ["--eval_steps", "5", "--save_steps", "5", "--no_plot"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "quadrants")


@pytest.fixture
def run(images, tmp_path):
    """Runs the program: its folder."""

    def run_(*arguments: object, out: str = "out") -> Path:
        argv = [*IMAGES, *SHORT, *REPLAY, "--dataset", images, "--output_dir", tmp_path / out, *arguments]
        assert program.main([str(word) for word in argv]) == 0
        return tmp_path / out

    return run_


def weights(folder: Path) -> dict[str, Any]:
    return load_file(folder / "model.safetensors")


def test_select_then_replay_is_both_in_turn(run):
    both = run(*SELECT, "--compare_uniform", out="both")
    selected = run(*SELECT, "--do", "select", out="selected")
    assert not (selected / "model.safetensors").exists()
    sequences = [SelectionSequence.load_from_disk(folder / "sequence") for folder in (both, selected)]
    assert sequences[0].digest == sequences[1].digest and len(sequences[0]) == 10
    assert sequences[0].examples_per_step == 4
    # The label noise and, by the table, the holdout are the data's: they must be given again, the share needn't.
    replay = ["--do", "replay", "--sequence", selected / "sequence", "--label_noise", "0.2"]
    replayed = run(*replay, out="replayed")
    assert curve(both) == curve(replayed)
    assert all(weights(both)[name].equal(value) for name, value in weights(replayed).items())
    rows = rows_of(both)
    assert list(rows) == ["goldiprox", "uniform"] and rows["uniform"]["steps"] == 10
    assert rows["goldiprox"]["selecting_seconds"] > 0 and rows["goldiprox"]["irreducible_seconds"] > 0
    card = ModelCard.load(both / "README.md")
    assert card.data.eval_results[0].metric_value == rows["goldiprox"]["eval_accuracy"]  # pyright: ignore
    assert sequences[0].digest in card.text and "| uniform |" in card.text
    wide = MODEL.replace("[4,8]", "[4,16]")
    other = run(*replay, "--config_overrides", wide, out="other")  # another model on the same sequence
    assert AutoModelForImageClassification.from_pretrained(other).config.hidden_sizes == [4, 16]  # pyright: ignore


def test_another_data_set_is_refused(run, capsys):
    folder = run(*SELECT, "--do", "select")
    with pytest.raises(SystemExit) as ended:
        run("--do", "replay", "--sequence", folder / "sequence", "--label_noise", "0.3", out="replayed")
    assert ended.value.code == 2 and "another data set" in capsys.readouterr().err


def test_an_interrupted_replay_goes_on(run, monkeypatch, tmp_path, images):
    whole = run(*SELECT, out="whole")
    real, calls = program.train_run, []

    def interrupt(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments[0])
        if len(calls) == 1:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(program, "train_run", interrupt)
    argv = [*IMAGES, *SHORT, *REPLAY, *SELECT, "--dataset", images, "--output_dir", tmp_path / "cut"]
    argv = [str(word) for word in argv]
    assert program.main(argv) == 130
    assert program.main([*argv, "--resume_from_checkpoint", "true"]) == 0
    assert all(weights(whole)[name].equal(value) for name, value in weights(tmp_path / "cut").items())
    assert program.main([*argv, "--resume_from_checkpoint", "true"]) == 0 and len(calls) == 2  # all is finished


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--do", "replay"], "do='replay' needs a sequence"),
        (["--sequence", "x"], "makes a sequence itself"),
        (["--do", "replay", "--sequence", "./not-there"], "'./not-there': there is no such folder"),
        (["--num_steps", "0"], "num_steps=0"),
        (["--do", "other"], "invalid choice: 'other'"),
        (["--selection_ratio", "1"], "chooses nothing"),
        (["--selection", "grad_norm_is"], "keeps no weights"),
        (["--proxy_model", "./not-there"], "there is no such folder"),
    ],
)
def test_wrong_input_ends_with_status_2(images, tmp_path, capsys, arguments, words):
    argv = [*IMAGES, *SHORT, *SELECT, *REPLAY, "--dataset", str(images), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        program.main([*argv, *arguments])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_sequence_to_and_from_the_hub(hub, run_python, images, tmp_path):
    code = """
        import json, sys
        from hf_efx.goldiprox import program
        sys.exit(max(program.main(argv) for argv in json.loads(sys.argv[1])))
    """
    common = [*IMAGES, *SHORT, "--dataset", str(images), "--label_noise", "0.2"]
    select = [
        *common,
        *SELECT,
        "--do",
        "select",
        "--push_sequence_to",
        "tester/gp",
        "--output_dir",
        str(tmp_path / "s"),
    ]
    replay = [*common, *REPLAY, "--do", "replay", "--sequence", "tester/gp", "--output_dir", str(tmp_path / "r")]
    run_python(code, env=hub.env, args=[json.dumps([select, replay])])
    assert rows_of(tmp_path / "r")["goldiprox"]["steps"] == 10
    local = SelectionSequence.load_from_disk(tmp_path / "s" / "sequence")
    settings = json.loads((tmp_path / "r" / "results.json").read_text())["settings"]
    assert settings["sequence"] == local.digest


def test_the_scripts_choose_what_to_do(monkeypatch):
    import runpy

    from conftest import REPOSITORY

    seen: list[list[str]] = []
    monkeypatch.setattr(program, "main", lambda argv: seen.append(argv) or 0)
    for script, does in (("select_goldiprox", "select"), ("replay_sequence", "replay")):
        monkeypatch.setattr(sys, "argv", [script, "--seed", "1"])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(REPOSITORY / "scripts" / f"{script}.py"), run_name="__main__")
        assert ended.value.code == 0 and seen[-1] == ["--do", does, "--seed", "1"]

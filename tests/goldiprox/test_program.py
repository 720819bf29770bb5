"""The program `hf-efx goldiprox`: select, replay, both."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from program_runs import IMAGES, MODEL, QUIET, curve, rows_of, write_images
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from hf_efx.goldiprox import SelectionSequence, program

SHORT = [*QUIET, "--per_device_train_batch_size", "4", "--selection_ratio", "0.25"]
SELECT = ["--proxy_model", f"resnet:{MODEL}", "--irreducible_model", f"resnet:{MODEL}", "--irreducible_steps", "2"]
SELECT += ["--num_steps", "6", "--label_noise", "0.2"]
REPLAY = ["--eval_steps", "3", "--save_steps", "6", "--no_plot"]


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


def test_select_then_replay_is_both_in_turn(run, capsys):
    both = run(*SELECT, "--compare_uniform", out="both")
    selected = run(*SELECT, "--do", "select", out="selected")
    assert not (selected / "model.safetensors").exists()
    sequences = [SelectionSequence.load_from_disk(folder / "sequence") for folder in (both, selected)]
    assert sequences[0].digest == sequences[1].digest and len(sequences[0]) == 6
    assert sequences[0].examples_per_step == 4
    # The label noise and, by the table, the holdout are the data's: they must be given again, the share needn't.
    replay = ["--do", "replay", "--sequence", selected / "sequence", "--label_noise", "0.2"]
    replayed = run(*replay, out="replayed")
    assert curve(both) == curve(replayed)
    assert all(weights(both)[name].equal(value) for name, value in weights(replayed).items())
    rows = rows_of(both)
    assert list(rows) == ["goldiprox", "uniform"] and rows["uniform"]["steps"] == 6
    assert rows["goldiprox"]["selecting_seconds"] > 0 and rows["goldiprox"]["irreducible_seconds"] > 0
    card = ModelCard.load(both / "README.md")
    assert card.data.eval_results[0].metric_value == rows["goldiprox"]["eval_accuracy"]  # pyright: ignore
    assert sequences[0].digest in card.text and "| uniform |" in card.text
    with pytest.raises(SystemExit) as ended:
        run(*replay, "--label_noise", "0.3", out="refused")
    assert ended.value.code == 2 and "another data set" in capsys.readouterr().err
    wide = MODEL.replace("[4,8]", "[4,16]")
    other = run(*replay, "--config_overrides", wide, out="other")  # another model on the same sequence
    assert AutoModelForImageClassification.from_pretrained(other).config.hidden_sizes == [4, 16]  # pyright: ignore


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--do", "replay"], "do='replay' needs a sequence"),
        (["--sequence", "x"], "makes a sequence itself"),
        (["--do", "replay", "--sequence", "./not-there"], "'./not-there': there is no such folder"),
        (["--num_steps", "0"], "num_steps=0"),
        (["--do", "select", "--compare_uniform"], "do='select' trains no model"),
        (["--do", "replay", "--sequence", "x", "--push_sequence_to", "y"], "do='replay' makes no sequence"),
        (["--do", "other"], "invalid choice: 'other'"),
        (["--selection_ratio", "1"], "chooses nothing"),
        (["--selection", "grad_norm_is"], "keeps no weights"),
        (["--proxy_model", "./not-there"], "there is no such folder"),
    ],
)
def test_wrong_input_ends_with_status_2(images, tmp_path, capsys, arguments, words):
    select = SELECT[:2] if "grad_norm_is" in arguments else SELECT  # which reads no irreducible losses
    argv = [*IMAGES, *SHORT, *select, *REPLAY, "--dataset", str(images), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        program.main([*argv, *arguments])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out" / "model.safetensors").exists()

"""What scripts/train_marian.py does beside what every program does: models, generation, card, refusals."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
from huggingface_hub import ModelCard
from program_runs import MARIAN, PAIRS, QUIET, refused, rows_of, run, write_pairs
from transformers import MarianMTModel, MarianTokenizer

from hf_efx.programs.translation import MarianOptions, PairOptions, load_translation

SHORT = [*QUIET, "--max_steps", 2, "--per_device_train_batch_size", 8, "--logging_steps", 1, "--save_strategy", "no"]
MODEL = ["--config_overrides", MARIAN]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    file = tmp_path_factory.mktemp("pairs") / "pairs.tsv"
    return ["--data", write_pairs(file, 400), *PAIRS]


@pytest.fixture(scope="module")
def trained(pairs: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    run("train_marian", *pairs, *MODEL, *SHORT, "--output_dir", folder, "--max_steps", 120, "--learning_rate", 0.01)
    return folder


def test_the_folder_loads_and_generates(trained: Path, pairs: list[object]) -> None:
    model, tokenizer = MarianMTModel.from_pretrained(trained), MarianTokenizer.from_pretrained(trained)
    config, generation = model.config, model.generation_config
    assert (config.eos_token_id, config.pad_token_id, config.vocab_size) == (0, 31, 32) == (0, 31, len(tokenizer))
    assert config.decoder_start_token_id == 31 and config.init_std == 0.25
    assert (generation.max_length, generation.num_beams) == (12, 4) and generation.suppress_tokens == [31]
    task = load_translation(PairOptions(str(pairs[1]), "de", "en", 12, vocab_size=32), MarianOptions(), str(trained))
    sources, references = task.validation["source"][:], task.validation["target"][:]
    generated = model.generate(**tokenizer(sources, return_tensors="pt", padding=True))
    assert generated.shape[1] <= 12
    texts = tokenizer.batch_decode(generated, skip_special_tokens=True)
    row = rows_of(trained)["marian"]
    # The program's own figures, of other batches: equal, as is every translation.
    assert row["eval_bleu"] == pytest.approx(sacrebleu.corpus_bleu(texts, [references]).score)
    assert row["eval_chrf"] == pytest.approx(sacrebleu.corpus_chrf(texts, [references]).score)
    assert row["steps"] == 120 and row["eval_chrf"] > 20  # it learns


def test_what_lies_beside_the_model(trained: Path) -> None:
    card = ModelCard.load(trained / "README.md")
    assert card.data.pipeline_tag == "translation" and {"bleu", "chrf"} <= set(card.data.metrics or ())
    assert "MarianMTModel.from_pretrained(" in card.text and "nothing but transformers is needed" in card.text
    results = json.loads((trained / "results.json").read_text())
    assert results["title"] == "Marian on pairs.tsv" and results["data"]["name"] == "pairs.tsv"
    assert str(trained) not in json.dumps(results["settings"]) + card.text
    assert {"source.spm", "target.spm", "vocab.json", "generation_config.json"} <= {f.name for f in trained.iterdir()}
    assert b"trained" not in (trained / "source.spm").read_bytes()  # no path


def test_a_checkpoint_is_trained_on_with_its_own_vocabulary(
    trained: Path, pairs: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = [word for word in pairs if word not in ("--vocab_size", "32")]
    run("train_marian", *own, *SHORT, "--model", trained, "--output_dir", tmp_path, "--label_smoothing_factor", 0.1)
    assert (tmp_path / "vocab.json").read_bytes() == (trained / "vocab.json").read_bytes()
    assert not (tmp_path / "_vocabulary").exists()
    for more, name in ((["--vocab_size", 32], "vocab_size"), (MODEL, "config_overrides")):
        line = refused("train_marian", capsys, *own, *SHORT, "--model", trained, *more, "--output_dir", tmp_path / "b")
        assert f"{name} is for a model from scratch, but model_name_or_path=" in line


def test_accumulated_batches_make_a_mean_of_losses(pairs: list[object], tmp_path: Path) -> None:
    """Marian's forward takes the Trainer's `num_items_in_batch` and ignores it: the losses would add up."""
    split = ["--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2, "--max_steps", 1]
    for name, more in (("whole", ["--max_steps", 1]), ("split", split)):
        argv = [*pairs, *MODEL, *SHORT, "--train_sampling_strategy", "sequential", *more]
        run("train_marian", *argv, "--output_dir", tmp_path / name)
    whole, parts = (rows_of(tmp_path / name)["marian"]["train_loss"] for name in ("whole", "split"))
    assert parts == pytest.approx(whole, rel=0.1)  # dropout differs


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--predict_with_generate", "false"], "predict_with_generate=False leaves an evaluation without its BLEU"),
        (["--generation_max_length", 600], "generation_max_length=600 is above the model's 512 positions"),
        (["--max_length", 600], "max_length=600 is above the model's 512 positions"),
        (["--max_length", 2], "max_length=2 leaves none of"),
        (["--max_length", 1], "max_length=1: expected 2 or more"),
        (["--vocab_size", 9999], "vocab_size=9999 doesn't go with the text: Vocabulary size too high"),
        (["--source_column", "fr"], "no column source_column='fr'; it has de, en"),
        (["--config_overrides", "depth=3"], "config_overrides: 'depth' is no setting of MarianConfig"),
        (["--config_overrides", "d_model=30"], "divisible"),
        (["--generation_num_beams", 0], "generation_num_beams=0: expected 1 or more"),
    ],
)
def test_bad_options_are_refused(
    pairs: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[object], words: str
) -> None:
    argv = [*pairs, *MODEL, *SHORT, "--output_dir", tmp_path, *arguments]
    assert words in refused("train_marian", capsys, *argv)
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("package", ["sacrebleu", "sentencepiece", "sacremoses"])
def test_a_missing_package_names_the_extra(
    pairs: list[object], tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str], package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    line = refused("train_marian", capsys, *pairs, *SHORT, "--output_dir", tmp_path)
    assert f"translation needs {package}: pip install 'hf_efx[mt]'" in line

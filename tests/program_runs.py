"""What the tests of the programs share: small data, small models, and what a program leaves behind."""

import gzip
import importlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_efx.registry import METHODS

MODEL = "embedding_size=4,hidden_sizes=[4,8],depths=[1,1],layer_type=basic"
IMAGES = ["--task", "image_classification", "--model_type", "resnet", "--config_overrides", MODEL]
MARIAN = "d_model=16,encoder_layers=1,decoder_layers=1,encoder_ffn_dim=16,decoder_ffn_dim=16"
PAIRS = ["--source_column", "de", "--target_column", "en", "--vocab_size", "32", "--max_length", "12"]
GPT2 = "n_layer=2,n_embd=16,n_positions=32"
QUIET = ["--use_cpu", "--disable_tqdm", "true", "--report_to", "none"]


def write_images(folder: Path, train: int = 120, validation: int = 40) -> Path:
    """Images of 8 x 8 pixels of four classes, each with a bright quadrant and noise, as an idx folder."""
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for prefix, count in (("train", train), ("t10k", validation)):
        labels = np.arange(count) % 4
        pixels = generator.integers(0, 100, (count, 8, 8))
        for image, label in zip(pixels, labels, strict=True):
            image[4 * (label // 2) :, 4 * (label % 2) :][:4, :4] += 120
        for name, values in (("images-idx3", pixels), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
            file = folder / f"{prefix}-{name}-ubyte.gz"
            file.write_bytes(gzip.compress(head + values.astype(np.uint8).tobytes()))
    return folder


def write_text(file: Path, paragraphs: int = 150) -> Path:
    """Paragraphs of several lengths."""
    file.write_text("\n\n".join(f"line {i} of the text " + "has words " * (i % 4) for i in range(paragraphs)))
    return file


def write_pairs(file: Path, pairs: int = 120) -> Path:
    """Pairs of some words each, in two columns."""
    words = ("eins one", "zwei two", "drei three", "vier four", "f\u00fcnf five", "sechs six", "sieben seven")
    rows = [[words[i % 7], *(words[(i // 7 + k) % 7] for k in range(i % 4))] for i in range(pairs)]
    lines = ["\t".join(" ".join(word.split()[side] for word in row) for side in (0, 1)) for row in rows]
    file.write_text("\n".join(["de\ten", *lines]) + "\n", encoding="utf-8")
    return file


def program_of(name: str) -> Callable[[list[str]], int]:
    """The function behind a program: `low_rank`, `targeted_dropout.prune_main`, or `train_marian` of no method."""
    path = f"hf_efx.{name.replace('.', '.program.')}" if "." in name else f"hf_efx.programs.{name}.main"
    path = str(METHODS[name].program) if name in METHODS else path
    module, _, function = path.rpartition(".")
    return getattr(importlib.import_module(module), function)


def run(name: str, *arguments: object) -> None:
    """Runs a program in this process."""
    assert program_of(name)([str(word) for word in arguments]) == 0


def refused(name: str, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line with which a program refuses its input."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        program_of(name)([str(word) for word in arguments])
    lines = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    assert ended.value.code == 2 and len(lines) == 1, lines
    return lines[0]


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    """A run's figures by configuration."""
    rows = json.loads((folder / "results.json").read_text())["rows"]
    return {row["configuration"]: row for row in rows}


def curve(folder: Path) -> list[list[float]]:
    """Step and metric of each evaluation."""
    return [[step, value] for step, _, value in json.loads((folder / "run.json").read_text())["run"]["curve"]]


def unfinish(folder: Path) -> None:
    """Makes a finished run one that was cut: run.json without its figures."""
    content = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**content, "run": None}))

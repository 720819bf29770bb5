"""What the tests of the programs share: a small folder of images, and options that keep a run short."""

import gzip
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

MODEL = "embedding_size=4,hidden_sizes=[4,8],depths=[1,1],layer_type=basic"
IMAGES = ["--task", "image_classification", "--model_type", "resnet", "--config_overrides", MODEL]
SHORT = ["--use_cpu", "--disable_tqdm", "true", "--per_device_train_batch_size", "4", "--selection_ratio", "0.25"]


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


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    """A run's figures by configuration."""
    rows = json.loads((folder / "results.json").read_text())["rows"]
    return {row["configuration"]: row for row in rows}


def curve(folder: Path) -> list[list[float]]:
    """Step and metric of each evaluation."""
    return [[step, value] for step, _, value in json.loads((folder / "run.json").read_text())["curve"]]

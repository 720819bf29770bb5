"""Images of which a tenth has a wrong label, and the small models that the studies train on them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

NOISE = 0.1  # share of the labels that are redrawn
TESTED = 5000  # clean test images of an evaluation, at most


class Classifier(nn.Module):
    """A network of pixels under the signature that the Trainer expects.

    Args:
        shape: Channels, height, width of an image, which comes as one row.
        network: [n, channels, height, width] to logits.
    """

    def __init__(self, shape: Sequence[int], network: nn.Module) -> None:
        super().__init__()
        self.shape, self.network = tuple(shape), network

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Logits [n, classes], and the mean cross-entropy where there are labels."""
        logits = self.network(pixel_values.reshape(-1, *self.shape))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def mlp(shape: Sequence[int], classes: int, width: int) -> Classifier:
    """Two hidden layers."""
    inputs = int(np.prod(shape))
    layers = [nn.Flatten(), nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return Classifier(shape, nn.Sequential(*layers, nn.Linear(width, classes)))


def cnn(shape: Sequence[int], classes: int, width: int = 32) -> Classifier:
    """Two convolutions of stride 2 and a hidden layer."""
    channels, height, columns = shape
    flat = 2 * width * -(-height // 4) * -(-columns // 4)
    layers = [nn.Conv2d(channels, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU()]
    head = [nn.Flatten(), nn.Linear(flat, 128), nn.ReLU(), nn.Linear(128, classes)]
    return Classifier(shape, nn.Sequential(*layers, *head))


MODELS: dict[str, Callable[..., Classifier]] = {
    **{f"mlp-{width}": (lambda s, c, width=width: mlp(s, c, width)) for width in (64, 128, 512, 2048)},
    "cnn": cnn,
    "cnn-16": lambda shape, classes: cnn(shape, classes, 16),
}


@dataclass(frozen=True)
class Images:
    """One seed's images.

    Attributes:
        train: The half with even numbers, with `example_id` and `corrupted`.
        holdout: The other half, as noisy.
        test: Pixels [n, ...] and labels [n], clean.
        shape: Channels, height, width.
        classes: Their number.
        name: Of the data.
    """

    train: Any
    holdout: Any
    test: tuple[torch.Tensor, torch.Tensor]
    shape: tuple[int, int, int]
    classes: int
    name: str

    def model(self, name: str, seed: int) -> Classifier:
        """A new model of a seed."""
        torch.manual_seed(seed)
        return MODELS[name](self.shape, self.classes)


def noisy_images(source: str | None, seed: int) -> Images:
    """Redraws a share of the labels uniformly (some come out right again) and halves the training images."""
    import pyarrow as pa
    from datasets import Dataset

    from hf_efx.core.data.image_data import load_images

    data = load_images(source)
    pixels, labels = {}, {}
    for split, part in data.splits.items():
        table = part.data.table.combine_chunks()
        pixels[split] = table["pixel_values"].chunk(0).flatten().to_numpy().reshape(len(part), -1)
        labels[split] = table["label"].to_numpy()
    mean, std = pixels["train"].mean(), pixels["train"].std()
    scaled = {split: ((values - mean) / std).astype(np.float32) for split, values in pixels.items()}
    generator = np.random.default_rng(seed)
    classes = len(data.label_names)
    redrawn = generator.random(len(labels["train"])) < NOISE
    noisy = np.where(redrawn, generator.integers(0, classes, len(redrawn)), labels["train"])

    def half(first: int) -> Dataset:
        values = scaled["train"][first::2]
        columns = {
            "example_id": pa.array(np.arange(len(redrawn))[first::2]),
            "pixel_values": pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1]),
            "labels": pa.array(noisy[first::2].astype(np.int64)),
            "corrupted": pa.array((noisy != labels["train"])[first::2]),
        }
        return Dataset(pa.table(columns)).with_format("numpy")

    test = (torch.from_numpy(part[:TESTED]) for part in (scaled["validation"], labels["validation"].astype(np.int64)))
    return Images(half(0), half(1), tuple(test), data.shape, classes, data.name)  # pyright: ignore


def accuracy(model: nn.Module, pixels: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of images that a model classifies right; the model stays in its mode."""
    training = model.training
    model.eval()
    with torch.no_grad():
        predicted = torch.cat([model(part)["logits"].argmax(1) for part in pixels.split(500)])
    model.train(training)
    return float((predicted == labels).float().mean())

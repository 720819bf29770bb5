"""The small networks of the study of prunability, each trained to one training loss on one thread."""

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from noisy_images import Classifier
from torch import nn

LEARNING_RATE = 1e-3
TEST_IMAGES = 5000
SAMPLE = 500  # training images that all measures are taken on
_LOADED: dict[str | None, "Pixels"] = {}


@dataclass(frozen=True)
class Pixels:
    """Images and labels of one source, scaled, as tensors.

    Attributes:
        train: Pixels [n, channels * height * width] and labels [n].
        test: Likewise.
        shape: Channels, height, width.
        classes: Their number.
    """

    train: tuple[torch.Tensor, torch.Tensor]
    test: tuple[torch.Tensor, torch.Tensor]
    shape: tuple[int, int, int]
    classes: int


def load_pixels(source: str | None, test_images: int) -> tuple[Pixels, str, Any]:
    """Images of an idx folder or a Hub name (None: scikit-learn's digits), their name, and the training split."""
    from hf_efx.core.data.image_data import load_images

    data = load_images(source)
    parts = {}
    for split, part in data.splits.items():
        table = part.data.table.combine_chunks()
        pixels = table["pixel_values"].chunk(0).flatten().to_numpy().reshape(len(part), -1)
        parts[split] = pixels, torch.from_numpy(table["label"].to_numpy().astype(np.int64))
    mean, std = parts["train"][0].mean(), parts["train"][0].std()

    def scaled(split: str, most: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        pixels, labels = parts[split]
        return torch.from_numpy(((pixels[:most] - mean) / std).astype(np.float32)), labels[:most]

    shape, classes = data.shape, len(data.label_names)
    return Pixels(scaled("train"), scaled("validation", test_images), shape, classes), data.name, data.splits["train"]


def subset(pixels: Pixels, count: int, seed: int, noise: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Training images drawn without replacement, a share of their labels redrawn among all classes."""
    generator = np.random.default_rng(seed)
    order = torch.from_numpy(generator.permutation(len(pixels.train[1])))[:count]
    images, labels = (part[order] for part in pixels.train)
    redrawn = torch.from_numpy(generator.random(len(labels)) < noise)
    random = torch.from_numpy(generator.integers(0, pixels.classes, len(labels)))
    return images, torch.where(redrawn, random, labels)


def cnn(shape: Sequence[int], classes: int, width: int, depth: int, dropout: float) -> Classifier:
    """`depth` convolutions of `width` channels, the first two of stride 2, then a hidden layer with dropout."""
    channels, height, columns = shape
    layers: list[nn.Module] = []
    for i in range(depth):
        stride = 2 if i < 2 else 1
        layers += [nn.Conv2d(channels if i == 0 else width, width, 3, stride, 1), nn.ReLU()]
    flat = width * -(-height // 4) * -(-columns // 4)
    head = [nn.Flatten(), nn.Dropout(dropout), nn.Linear(flat, 4 * width), nn.ReLU(), nn.Dropout(dropout)]
    return Classifier(shape, nn.Sequential(*layers, *head, nn.Linear(4 * width, classes)))


def mlp(shape: Sequence[int], classes: int, width: int) -> Classifier:
    """One hidden layer."""
    inputs = math.prod(shape)
    return Classifier(
        shape, nn.Sequential(nn.Flatten(), nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, classes))
    )


def outcome(images: torch.Tensor, labels: torch.Tensor) -> Callable[[nn.Module], tuple[torch.Tensor, torch.Tensor]]:
    """A function of a model: its losses [n] and margins [n] on these images, with gradients where they are enabled."""

    def evaluate(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        logits = torch.cat([model(part)["logits"] for part in images.split(500)])
        others = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
        return F.cross_entropy(logits, labels, reduction="none"), logits.gather(1, labels[:, None])[:, 0] - others

    return evaluate


@torch.no_grad()
def loss_and_accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Mean cross-entropy in nats and share of right predictions, in eval mode; the model stays in its mode."""
    training = model.training
    model.eval()
    losses, margins = outcome(images, labels)(model)
    model.train(training)
    return float(losses.mean()), float((margins > 0).float().mean())


def fit(
    model: Classifier,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    batch_size: int,
    seed: int,
    target: float,
    epochs: int,
    weight_decay: float = 0.0,
    learning_rate: float = LEARNING_RATE,
    augment: bool = False,
) -> dict[str, float]:
    """Trains with AdamW at a constant rate until the loss on the clean training images is at most `target`.

    The loss is looked at every half epoch, and, once it is below twice the target, every eighth: so that all networks
    stop close to one loss.

    Returns:
        `epochs` and `seconds` (of this process' CPU) that it took.
    """
    start = time.process_time()
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=weight_decay)
    steps = math.ceil(len(labels) / batch_size)
    often, seldom = max(steps // 8, 1), max(steps // 2, 1)
    model.train()
    near, done = False, 0
    for epoch in range(epochs):
        order = torch.randperm(len(labels), generator=generator)
        for i in range(steps):
            rows = order[i * batch_size : (i + 1) * batch_size]
            batch = shifted(images[rows], model.shape, generator) if augment else images[rows]
            optimizer.zero_grad()
            model(batch, labels[rows])["loss"].backward()
            optimizer.step()
            done += 1
            if target and done % (often if near else seldom) == 0:
                loss, _ = loss_and_accuracy(model, images, labels)
                near = loss <= 2 * target
                if loss <= target:
                    return {"epochs": epoch + (i + 1) / steps, "seconds": time.process_time() - start}
    return {"epochs": float(epochs), "seconds": time.process_time() - start}


def shifted(images: torch.Tensor, shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """Each image moved by up to two pixels along both axes, zeros coming in."""
    batch = F.pad(images.reshape(-1, *shape), (2, 2, 2, 2))
    down, right = torch.randint(0, 5, (2, len(batch)), generator=generator)
    rows = down[:, None] + torch.arange(shape[1])
    columns = right[:, None] + torch.arange(shape[2])
    places = torch.arange(len(batch))[:, None, None]
    return batch.transpose(1, 2).transpose(2, 3)[places, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def pixels_of(source: str | None) -> Pixels:
    """The images, loaded once a process."""
    if source not in _LOADED:
        _LOADED[source] = load_pixels(source, TEST_IMAGES)[0]
    return _LOADED[source]


def train_network(settings: Mapping[str, Any], seed: int, *, source: str | None, target: float, most: int) -> Any:
    """Trains a point of the grid; the settings are those of `GRID`.

    Args:
        settings: Of the network.
        seed: Of the images drawn, the weights and the batches.
        source: Of the images.
        target: Training loss at which it stops.
        most: Images seen, at most.
    """
    pixels = pixels_of(source)
    images, labels = subset(pixels, settings["images"], seed)
    torch.manual_seed(seed)
    model = cnn(pixels.shape, pixels.classes, settings["width"], settings["depth"], settings["dropout"])
    batch = settings["batch"]
    options = {"batch_size": batch, "weight_decay": settings["weight_decay"]}
    # A batch four times as large takes steps twice as long, so that it gets there in as many epochs or so.
    rate = LEARNING_RATE * math.sqrt(batch / 32)
    return trained(
        model, images, labels, pixels.test, seed, target, most // len(labels), learning_rate=rate, **options
    )


def train_width(settings: Mapping[str, Any], seed: int, *, source: str | None, epochs: int) -> Any:
    """Trains a multilayer perceptron of a width on images of which a share has a redrawn label, for a fixed time."""
    pixels = pixels_of(source)
    images, labels = subset(pixels, settings["images"], seed, settings["label_noise"])
    torch.manual_seed(seed)
    model = mlp(pixels.shape, pixels.classes, settings["hidden"])
    return trained(model, images, labels, pixels.test, seed, 0.0, epochs, batch_size=50)


def train_control(settings: Mapping[str, Any], seed: int, *, source: str | None, target: float, most: int) -> Any:
    """Trains one architecture to the common loss on true labels or on labels that are dealt out anew."""
    pixels = pixels_of(source)
    images, labels = subset(pixels, settings["images"], seed)
    if settings["labels"] == "permuted":
        labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    torch.manual_seed(seed)
    model = cnn(pixels.shape, pixels.classes, 32, 2, 0.0)
    return trained(model, images, labels, pixels.test, seed, target, most // len(labels), batch_size=50)


def trained(
    model: Classifier,
    images: torch.Tensor,
    labels: torch.Tensor,
    test: tuple[torch.Tensor, torch.Tensor],
    seed: int,
    target: float,
    epochs: int,
    **options: Any,
) -> Any:
    """Trains a model; gives what `generalization_study` takes."""
    from hf_efx.prunability.baselines import Network
    from hf_efx.prunability.study import TrainedNetwork

    torch.set_num_threads(1)
    initial = copy.deepcopy(model.state_dict())
    cost = fit(model, images, labels, seed=seed, target=target, epochs=epochs, **options)
    model.eval()
    train_loss, train_accuracy = loss_and_accuracy(model, images, labels)
    test_loss, test_accuracy = loss_and_accuracy(model, *test)
    figures = {
        "train_loss": train_loss,
        "train_accuracy": train_accuracy,
        "test_loss": test_loss,
        "test_accuracy": test_accuracy,
        "loss_gap": test_loss - train_loss,
        "accuracy_gap": train_accuracy - test_accuracy,
        "reached": not target or train_loss <= target,
        **cost,
    }
    sample = outcome(images[:SAMPLE], labels[:SAMPLE])
    network = Network(model, sample, initial, {"pixel_values": images[:1]}, seed=seed, draws=5, steps=10)
    return TrainedNetwork(network, figures)

"""What the tests of prunability share: small networks, and losses by hand."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

Losses = Callable[[nn.Module], torch.Tensor]


def squared_errors(inputs: torch.Tensor, targets: torch.Tensor) -> Losses:
    """A function of a model: its squared error on each example, summed over outputs."""
    return lambda model: (model(inputs) - targets).square().flatten(1).sum(1)


def two_weights() -> tuple[nn.Linear, Losses]:
    """f(x) = 3 x1 + x2 on (1, 0) -> 3 and (0, 1) -> 1: losses 0 whole, (0, 1) of the large weight, (9, 1) of none."""
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 1.0]]))
    return model, squared_errors(torch.eye(2), torch.tensor([[3.0], [1.0]]))


class Odd(nn.Module):
    """All that must come back: BatchNorm, dropout, tied weights, another memory format, types and signs of zero."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 4).double()
        self.third = nn.Linear(4, 6).to(torch.bfloat16)
        self.again = nn.Linear(4, 6)
        self.again.weight = self.first.weight
        self.dropout = nn.Dropout(0.5)
        with torch.no_grad():
            self.first.weight[0, 0], self.first.weight[1, 1] = -0.0, 0.0
            self.third.weight[2, 2] = -0.0
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.dropout.eval()  # one module of a training model in eval mode

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.dropout(self.norm(self.conv(images))).mean((2, 3))
        hidden = self.second(self.first(hidden).double()).float()
        return self.third(self.again(hidden)[:, :4].bfloat16()).float() + torch.rand(())


def traces(model: nn.Module) -> dict[str, bytes]:
    """Every bit of a model's weights, gradients, buffers and modes, and of the random states."""
    found: dict[str, Any] = {f"weight {name}": p for name, p in model.named_parameters(remove_duplicate=False)}
    found |= {f"grad {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    found |= {f"buffer {name}": b for name, b in model.named_buffers()}
    result = {k: v.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for k, v in found.items()}
    result |= {f"mode {name}": bytes([module.training]) for name, module in model.named_modules()}
    result |= {f"version {name}": bytes([p._version]) for name, p in model.named_parameters()}
    numpy_state: Any = np.random.get_state()
    return result | {"torch": torch.get_rng_state().numpy().tobytes(), "numpy": numpy_state[1].tobytes()}


class Digits(nn.Module):
    """One hidden layer over 64 pixels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.layers(pixel_values)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def digits(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels [n, 64] and labels [n] of scikit-learn's digits."""
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    chosen = np.random.default_rng(seed).permutation(len(data["target"]))[:count]
    pixels, labels = data["data"][chosen] / 8 - 1, data["target"][chosen]
    return torch.tensor(pixels, dtype=torch.float32), torch.tensor(labels)


def trained(pixels: torch.Tensor, labels: torch.Tensor, width: int, seed: int, target: float = 0.05) -> Digits:
    """Trains by whole batches to a training loss."""
    torch.manual_seed(seed)
    model = Digits(width)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(2000):
        loss = model(pixels, labels)["loss"]
        if loss.item() <= target:
            return model
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    raise AssertionError(f"loss {loss.item()} after 2000 steps")


def cross_entropies(pixels: torch.Tensor, labels: torch.Tensor) -> Losses:
    """A function of a model: the loss of each example."""
    return lambda model: F.cross_entropy(model(pixels)["logits"], labels, reduction="none")

"""What a change would break, seen on a model's skeleton."""

from typing import Any

import torch
from matrix import ARCHITECTURES
from torch import nn

from hf_efx.core.model.probe import what_breaks


class Counting(nn.Module):
    """Counts its calls, as state of its own, and may look at values."""

    def __init__(self, first: nn.Module, looks: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.looks, self.calls = first, nn.Linear(8, 4), looks, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        hidden = self.first(x)
        if self.looks and float(hidden.sum()) > 0:
            return hidden
        return self.second(hidden.flatten(2).mean(2) if hidden.ndim == 4 else hidden)


def widen(model: Any) -> None:
    model.second = nn.Linear(9, 4, device="meta")


def test_it_names_the_innermost_module_and_leaves_the_model_alone() -> None:
    for first in (nn.Linear(3, 8), nn.Conv2d(1, 8, 25), nn.Embedding(5, 8), nn.Sequential(nn.Linear(3, 8), nn.ReLU())):
        model = Counting(first).eval()
        random, second = torch.random.get_rng_state(), model.second
        broken = what_breaks(model, widen)
        assert broken is not None
        assert broken.startswith("the forward of module 'second', Linear(in_features=9, out_features=4, bias=True), ")
        assert what_breaks(model, lambda copy: None) is None
        assert (model.calls, model.second, model.training) == (0, second, False)
        assert torch.equal(torch.random.get_rng_state(), random)
        assert all(p.device.type == "cpu" for p in model.parameters())


def test_a_model_that_it_cannot_run_is_left_to_its_training() -> None:
    assert what_breaks(Counting(nn.Linear(3, 8), looks=True), widen) is None  # a value of the meta device
    assert what_breaks(Counting(nn.Linear(3, 7)), widen) is None  # it fails by itself
    assert what_breaks(nn.ReLU(), lambda copy: None) is None


def test_inputs_of_transformers_models() -> None:
    def no_forward(copy: nn.Module) -> None:
        copy.register_module("broken", nn.Identity())
        copy.forward = lambda **_: 1 / 0  # reached only where the model itself ran

    for architecture in ARCHITECTURES:
        assert "division by zero" in str(what_breaks(architecture.build(), no_forward)), architecture.name

"""The other measures, on networks whose answers are known."""

import math

import pytest
import torch
from torch import nn

from hf_efx.prunability.baselines import BASELINE_MEASURES, Network, _flatness, baseline_measures
from hf_efx.prunability.sample import label_margins
from prunability.networks import Digits, digits, traces

INPUTS = {"pixel_values": torch.zeros(1, 2)}


class Two(nn.Module):
    """x -> B relu(A x), without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.a.weight.copy_(torch.diag(torch.tensor([3.0, 1.0])))
            self.b.weight.copy_(torch.tensor([[0.0, -2.0], [2.0, 0.0]]))

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.b(self.a(pixel_values).relu())}


def by_hand(**options) -> Network:
    """Losses: the sum of weights' squares; margins: 1 to 20, so that the 10th percentile is 2."""

    def outcome(model):
        return torch.cat([p.flatten() for p in model.parameters()]).square().sum()[None], torch.arange(1.0, 21.0)

    initial = {name: torch.zeros_like(value) for name, value in Two().state_dict().items()}
    return Network(Two(), outcome, initial, INPUTS, **options)


def test_norms_margins_and_counts_by_hand():
    names = [n for n in BASELINE_MEASURES if "bayes" not in n and n not in ("random_perturbation", "sharpness")]
    assert baseline_measures(by_hand(), names) == pytest.approx(
        {
            "parameter_count": 8,
            "l2_norm": math.sqrt(10 + 8),
            "distance_from_init": math.sqrt(18),
            "log_spectral_product": math.log(9 * 4),
            "log_spectral_over_margin": math.log(9),
            "log_frobenius_product": math.log(10 * 8),
            "log_frobenius_over_margin": math.log(20),
            "frobenius_over_spectral": 10 / 9 + 8 / 4,
            # squared: [9, 1] from an input of ones, then 4 * 1 + 4 * 9
            "path_norm": math.sqrt(40),
            "inverse_margin": 1 / 4,
        }
    )


def test_sharpness_by_hand():
    # The gradient of |w|^2 is 2 w: a step of 0.05 along w takes |w| from r to r + 0.05.
    r = math.sqrt(18)
    found = baseline_measures(by_hand(), ["sharpness"])["sharpness"]
    assert found == pytest.approx((r + 0.05) ** 2 - 18, rel=1e-5)


def test_flatness_by_hand():
    model = Two()
    whole = [p.detach().clone() for p in model.parameters()]

    def outcome(model):
        moved = [(p.detach() - w).square().sum() for p, w in zip(model.parameters(), whole, strict=True)]
        return 1 + torch.stack(moved).sum()[None], torch.ones(1)

    noises = [torch.Generator().manual_seed(draw) for draw in range(3)]
    noises = [[torch.randn(2, 2, generator=generator) for _ in whole] for generator in noises]
    # The loss is 1 + sigma^2 |u|^2, which is 10% higher where that is 0.1; 15 halvings leave 4e-4 of log(sigma).
    added = sum(float(u.square().sum()) for draw in noises for u in draw) / 3
    network = Network(model, outcome, draws=3)
    assert BASELINE_MEASURES["random_perturbation"](network) == pytest.approx(added / 0.1, rel=2e-3)

    def loss(losses, margins):
        return float(losses.mean())

    # In proportion to w the noise adds sigma^2 |u w|^2.
    added = sum(float((u * w).square().sum()) for draw in noises for u, w in zip(draw, whole, strict=True)) / 3
    assert _flatness(network, loss, lambda at: 1.1 * at, relative=True) == pytest.approx(added / 0.1, rel=2e-3)


def test_flatness_of_accuracy_is_where_a_tenth_is_lost():
    pixels, labels = digits(200)
    torch.manual_seed(0)
    model = Digits(16)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        model(pixels, labels)["loss"].backward()
        optimizer.step()

    def outcome(model):
        logits = model(pixels)["logits"]
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none"), label_margins(logits, labels)

    network = Network(model, outcome, inputs={"pixel_values": pixels[:1]}, draws=5)
    before = traces(model)
    measures = baseline_measures(network)
    assert {name for name, value in measures.items() if not math.isfinite(value)} == {"distance_from_init"}
    assert traces(model) | {k: b"" for k in before if k.startswith("version")} == before | {
        k: b"" for k in before if k.startswith("version")
    }
    sigma = measures["pac_bayes_flatness"] ** -0.5
    whole = float((outcome(model)[1] > 0).double().mean())
    shares = []
    for draw in range(5):
        generator, copy = torch.Generator().manual_seed(draw), Digits(16)
        copy.load_state_dict(model.state_dict())
        with torch.no_grad():
            for p in (copy.layers[0].weight, copy.layers[2].weight):
                p.add_(sigma * torch.randn(p.shape, generator=generator))  # pyright: ignore
        shares.append(float((outcome(copy)[1] > 0).double().mean()))
    assert whole - sum(shares) / 5 == pytest.approx(0.1, abs=0.011)


def test_batch_norm_is_folded_into_the_layer_before():
    model = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.BatchNorm2d(2, eps=0.0))
    with torch.no_grad():
        model[0].weight.copy_(torch.diag(torch.tensor([2.0, 6.0])).view(2, 2, 1, 1))  # pyright: ignore
        model[1].running_var.copy_(torch.tensor([4.0, 9.0]))  # pyright: ignore
        model[1].weight.copy_(torch.tensor([3.0, 2.0]))  # pyright: ignore
    network = Network(model, lambda m: (torch.ones(1), torch.ones(1)))
    # Rows of length 2 * 3 / 2 and 6 * 2 / 3.
    assert BASELINE_MEASURES["log_spectral_product"](network) == pytest.approx(math.log(16), rel=1e-5)
    assert BASELINE_MEASURES["log_frobenius_product"](network) == pytest.approx(math.log(9 + 16), rel=1e-5)
    assert math.isnan(BASELINE_MEASURES["path_norm"](network))


def test_an_error_half_way_leaves_the_weights():
    calls = []

    def outcome(model):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("half-way")
        return torch.ones(1), torch.ones(1)

    model = Two()
    before = traces(model)
    with pytest.raises(RuntimeError, match="half-way"):
        baseline_measures(Network(model, outcome), ["random_perturbation"])
    assert all(traces(model)[k] == before[k] for k in before if not k.startswith("version"))


def test_unknown_measures_are_refused():
    with pytest.raises(ValueError, match="'norm'.*parameter_count"):
        baseline_measures(by_hand(), ["norm"])

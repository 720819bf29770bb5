import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

from hf_efx import FactorDecayCallback, LowRankArguments, LowRankConfig, LowRankTrainer, get_efx_model
from hf_efx.core.model.weight_view import WeightView
from hf_efx.low_rank.decay import decay_gradients, frobenius_decay_gradients
from hf_efx.low_rank.initialisation import spectral_factors
from hf_efx.low_rank.layers import factorise

RATE, STRENGTH = 0.1, 0.5


def squared_frobenius_norm(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """What the decay is half of, from the factors alone: ⟨UᵀU, VᵀV⟩."""
    return ((u.mT @ u) * (v.mT @ v)).sum()


def factors(m: int, n: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(k, rank, generator=generator, dtype=torch.float64) for k in (m, n))  # pyright: ignore


def test_norm_and_gradients_by_hand() -> None:
    # UVᵀ = [[3, 4], [6, 8]]: norm² 125, UᵀU = 5, VᵀV = 25
    u, v = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]])
    assert squared_frobenius_norm(u, v).item() == 125
    grad_u, grad_v = frobenius_decay_gradients(u, v)
    assert grad_u.tolist() == [[25], [50]] and grad_v.tolist() == [[15], [20]]


def test_norm_is_that_of_the_product_and_gradients_are_autograd_s() -> None:
    u, v = factors(7, 5, 3)
    torch.testing.assert_close(squared_frobenius_norm(u, v), (u @ v.mT).square().sum(), rtol=1e-12, atol=0)
    u.requires_grad_(), v.requires_grad_()
    assert torch.autograd.gradcheck(squared_frobenius_norm, (u, v))
    expected = torch.autograd.grad(0.5 * (u @ v.mT).square().sum(), (u, v))
    for got, want in zip(frobenius_decay_gradients(u, v), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


class Net(nn.Module):
    """Loss zero whatever the factors are: only decay moves them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(12, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.head(self.fc(x))
        return {"loss": 0.0 * logits.sum(), "logits": logits}


def model(rank: int = 3) -> Any:
    return get_efx_model(Net(), LowRankConfig(rank=rank, target_modules=["fc"]))


def arguments(folder: Path, cls: type = LowRankArguments, **fields: Any) -> Any:
    defaults = {"max_steps": 1, "learning_rate": RATE, "lr_scheduler_type": "constant", "save_strategy": "no"}
    fixed = {"per_device_train_batch_size": 2, "use_cpu": True, "report_to": [], "disable_tqdm": True}
    return cls(str(folder), **{**defaults, **fixed, **fields})


DATA = [{"x": torch.ones(12), "labels": torch.tensor(0)} for _ in range(12)]


def train(net: Any, folder: Path, cls: type = LowRankTrainer, compute_loss: Any = None, **fields: Any) -> torch.Tensor:
    """Singular values of the product after training without any gradient."""
    cls(net, arguments(folder, **fields), train_dataset=DATA, compute_loss_func=compute_loss).train()
    return torch.linalg.svdvals(net.fc.product())[: net.fc.rank]


# Balanced factors have singular values σ^½, and decay scales them: a product's σ by that factor twice.
PREDICTED = {
    "none": ({}, lambda s: s),
    # AdamW takes ηλ of each factor
    "weight decay": ({"weight_decay": STRENGTH}, lambda s: s * (1 - RATE * STRENGTH) ** 2),
    "l2": (
        {"factor_decay": STRENGTH, "factor_decay_kind": "l2", "weight_decay": 0.3},
        lambda s: s * (1 - RATE * STRENGTH) ** 2,
    ),
    # U - ηλ U (VᵀV) has singular values σ^½ (1 - ηλσ)
    "frobenius": (
        {"factor_decay": STRENGTH, "weight_decay": 0.3},
        lambda s: s * (1 - RATE * STRENGTH * s) ** 2,
    ),
}


@pytest.mark.parametrize("kind", PREDICTED)
@pytest.mark.parametrize("steps", [1, 3])
def test_without_gradients_a_step_changes_the_norm_as_predicted(kind: str, steps: int, tmp_path: Path) -> None:
    fields, predict = PREDICTED[kind]
    net = model()
    expected = torch.linalg.svdvals(net.fc.product())[:3]
    for _ in range(steps):
        expected = predict(expected)
    got = train(net, tmp_path, max_steps=steps, **fields)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(net.fc.product().norm(), expected.norm(), rtol=1e-5, atol=0)


def test_decoupled_step_in_closed_form_uses_both_factors_from_before(tmp_path: Path) -> None:
    net = model()
    with torch.no_grad():
        net.fc.weight.mul_(2)  # unbalanced: an update of U that V's update already saw would show
    u, v = (f.detach().clone() for f in net.fc.factor_pairs()[0])
    train(net, tmp_path, factor_decay=STRENGTH)
    got_u, got_v = net.fc.factor_pairs()[0]
    torch.testing.assert_close(got_u.detach(), u - RATE * STRENGTH * u @ (v.mT @ v))
    torch.testing.assert_close(got_v.detach(), v - RATE * STRENGTH * v @ (u.mT @ u))


class OwnLoss(LowRankTrainer):
    loss_is_scaled_for_ga = True

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return 3.0 * super().compute_loss(model, inputs, False, num_items_in_batch)  # pyright: ignore


def test_decay_comes_once_an_optimiser_step(tmp_path: Path) -> None:
    """Whatever the micro-batches, the names of a layer and the loss are."""
    once = train(model(), tmp_path, factor_decay=STRENGTH)
    accumulated = {"factor_decay": STRENGTH, "gradient_accumulation_steps": 3}
    shared = model()
    shared.again = shared.fc  # a layer under two names
    assert torch.equal(train(shared, tmp_path, **accumulated), once)
    assert torch.equal(train(model(), tmp_path, OwnLoss, **accumulated), once)
    zero = lambda outputs, labels, num_items_in_batch: outputs["logits"].sum() * 0.0  # noqa: E731
    assert torch.equal(train(model(), tmp_path, compute_loss=zero, **accumulated), once)


def test_decay_follows_the_schedule(tmp_path: Path) -> None:
    net = model()
    expected = torch.linalg.svdvals(net.fc.product())[:3]
    for rate in (RATE, RATE / 2):  # linear to zero in two steps
        expected = expected * (1 - rate * STRENGTH * expected) ** 2
    got = train(net, tmp_path, factor_decay=STRENGTH, max_steps=2, lr_scheduler_type="linear")
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)


def test_coupled_decay_goes_through_the_optimiser(tmp_path: Path) -> None:
    decoupled = train(model(), tmp_path, factor_decay=STRENGTH, optim="sgd")
    coupled = train(model(), tmp_path, factor_decay=STRENGTH, factor_decay_decoupled=False, optim="sgd")
    torch.testing.assert_close(coupled, decoupled)  # plain SGD takes η times what is added to the gradient
    net = model()
    before = net.fc.weight.detach().clone()
    train(net, tmp_path, factor_decay=STRENGTH, factor_decay_decoupled=False)
    # Adam's first step is η in the gradient's direction, whatever its size
    steps = (before - net.fc.weight.detach()) / RATE
    torch.testing.assert_close(steps, decay_gradients(model().fc, "frobenius")[0].sign(), rtol=0, atol=1e-3)


def test_frozen_factors_stay(tmp_path: Path) -> None:
    net = model()
    net.fc.factor_v.requires_grad_(False)
    before = net.fc.factor_v.clone()
    u = net.fc.weight.detach().clone()
    train(net, tmp_path, factor_decay=STRENGTH)
    assert torch.equal(net.fc.factor_v, before) and not torch.equal(net.fc.weight, u)


def test_decay_gradients_of_fused_blocks_and_convolutions() -> None:
    for layer, blocks in ((nn.Linear(6, 8), 1), (Conv1D(9, 6), 3), (nn.Conv2d(2, 8, 3), 1)):
        layer: Any = layer.double()
        factors = [spectral_factors(matrix, 2) for matrix in WeightView(layer, blocks).block_matrices()]
        factorise(layer, 2, blocks, factors)
        (0.5 * sum((u @ v.mT).square().sum() for u, v in layer.factor_pairs())).backward()
        for parameter, got in zip((layer.weight, layer.factor_v), decay_gradients(layer, "frobenius"), strict=True):
            assert got.shape == parameter.shape
            torch.testing.assert_close(got, parameter.grad, rtol=0, atol=1e-10)


def test_l2_on_factors_bounds_the_nuclear_norm() -> None:
    u, v = factors(6, 5, 3)
    nuclear = torch.linalg.svdvals(u @ v.mT).sum()
    assert 0.5 * (u.square().sum() + v.square().sum()) > nuclear
    fc = model().fc  # balanced: equality
    half = 0.5 * (fc.weight.square().sum() + fc.factor_v.square().sum())
    torch.testing.assert_close(half.detach(), torch.linalg.svdvals(fc.product()).sum(), rtol=1e-5, atol=0)


def test_any_trainer_takes_the_callback(tmp_path: Path) -> None:
    net = model()
    expected = torch.linalg.svdvals(net.fc.product())[:3]
    expected = expected * (1 - RATE * STRENGTH * expected) ** 2
    options = arguments(tmp_path, TrainingArguments)
    Trainer(net, options, train_dataset=DATA, callbacks=[FactorDecayCallback(STRENGTH)]).train()  # pyright: ignore
    torch.testing.assert_close(torch.linalg.svdvals(net.fc.product())[:3], expected, rtol=1e-5, atol=0)


def test_weight_decay_beside_it_is_refused_before_a_step(tmp_path: Path) -> None:
    net = model()
    state = {key: value.clone() for key, value in net.state_dict().items()}
    options = arguments(tmp_path, TrainingArguments, weight_decay=0.1)
    trainer = Trainer(net, options, train_dataset=DATA, callbacks=[FactorDecayCallback(STRENGTH)])  # pyright: ignore
    with pytest.raises(ValueError, match=r"weight_decay=0.1 also acts on the factors.*LowRankTrainer.*weight_decay=0"):
        trainer.train()
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


def test_model_without_factors_and_foreign_optimisers_are_refused(tmp_path: Path) -> None:
    options = arguments(tmp_path, TrainingArguments)
    trainer = Trainer(Net(), options, train_dataset=DATA, callbacks=[FactorDecayCallback(STRENGTH)])  # pyright: ignore
    with pytest.raises(ValueError, match="the model has no factorised layer. Call get_efx_model first"):
        trainer.train()
    net = model()
    other = torch.optim.SGD([net.head.weight], lr=RATE)
    frozen = model()
    frozen.fc.requires_grad_(False)
    with pytest.raises(ValueError, match="all factors are frozen"):
        train(frozen, tmp_path, factor_decay=STRENGTH)
    callback: Any = FactorDecayCallback(STRENGTH)
    with pytest.raises(ValueError, match="the optimizer doesn't hold the factors"):
        callback.on_train_begin(options, None, None, model=net, optimizer=other)


@pytest.mark.parametrize("strength", [-0.1, math.nan])
def test_strength_out_of_range_is_refused(strength: float) -> None:
    with pytest.raises(ValueError, match=rf"strength={strength!r}: expected a number of 0 or more"):
        FactorDecayCallback(strength)


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="kind='nuclear': expected one of frobenius, l2"):
        FactorDecayCallback(0.1, kind="nuclear")

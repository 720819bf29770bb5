"""Other measures of a trained network that are said to predict how well it generalizes, to compare prunability with.

A larger value predicts a larger generalization gap, for all of them. Definitions follow Jiang et al. 2020 (arXiv
1912.02178) and Dziugaite et al. 2020 (arXiv 2010.11924), without the factors that depend on the size of the data.
Noise is put on the weights that prunability ranks, and the weights are put back from a copy.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from hf_efx.core.scoring.scoring_state import scoring_state
from hf_efx.prunability.weights import prunable_weights

Outcome = Callable[[nn.Module], tuple[torch.Tensor, torch.Tensor]]
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_NORMS = (*_BATCH_NORMS, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Network:
    """A trained network, as the measures see it.

    Attributes:
        model: Any model of classes.
        outcome: Losses [n] and margins [m] on a fixed sample of the training data, as `Sample.outcome` gives them.
        initial: The state dict before training; None where it isn't known.
        inputs: Inputs of one example, without labels, if they are numbers and not words.
        seed: Of noise.
        draws: Of noise that a figure is the mean of; more make it steadier and cost as much.
        steps: Of bisection for the size of noise; each costs `draws` evaluations.
        tolerance: By how much, relatively, noise may raise the loss, as in `measure_prunability`.
    """

    model: nn.Module
    outcome: Outcome
    initial: Mapping[str, torch.Tensor] | None = None
    inputs: Mapping[str, torch.Tensor] | None = None
    seed: int = 0
    draws: int = 10  # both as in the peer repository, nitarshan/robust-generalization-measures
    steps: int = 15
    tolerance: float = 0.1


def baseline_measures(network: Network, names: list[str] | None = None) -> dict[str, float]:
    """Computes measures of a network, which stays as it is.

    Args:
        network: The network.
        names: Out of `BASELINE_MEASURES`; None for all.

    Returns:
        By name; NaN where a measure isn't defined (no initial weights, a path norm of inputs that are words, ...).
    """
    names = list(BASELINE_MEASURES) if names is None else names
    if unknown := set(names) - set(BASELINE_MEASURES):
        raise ValueError(f"measures {sorted(unknown)} are unknown; there are {', '.join(BASELINE_MEASURES)}")
    with scoring_state(network.model, copy_buffers=True):
        return {name: float(BASELINE_MEASURES[name](network)) for name in names}


def parameter_count(network: Network) -> float:
    """Parameters, tied ones once."""
    return float(sum(p.numel() for p in network.model.parameters()))


def l2_norm(network: Network) -> float:
    """Square root of the sum of squared weights."""
    return math.sqrt(sum(float(w.detach().double().square().sum()) for w in _weights(network).values()))


def distance_from_init(network: Network) -> float:
    """L2 distance of the weights from those before training."""
    if network.initial is None:
        return math.nan
    total = 0.0
    for name, weight in _weights(network).items():
        total += float((weight.detach() - network.initial[name].to(weight.device)).double().square().sum())
    return math.sqrt(total)


def log_spectral_product(network: Network) -> float:
    """Sum of the logarithms of the squared spectral norms."""
    return sum(2 * math.log(_spectral(matrix)) for matrix in _matrices(network))


def log_spectral_over_margin(network: Network) -> float:
    """The same less the logarithm of the squared margin."""
    return log_spectral_product(network) - 2 * math.log(_margin(network))


def log_frobenius_product(network: Network) -> float:
    """Sum of the logarithms of the squared Frobenius norms."""
    return sum(2 * math.log(float(matrix.norm())) for matrix in _matrices(network))


def log_frobenius_over_margin(network: Network) -> float:
    """The same less the logarithm of the squared margin."""
    return log_frobenius_product(network) - 2 * math.log(_margin(network))


def frobenius_over_spectral(network: Network) -> float:
    """Sum of the squared Frobenius norms over the squared spectral norms: stable ranks."""
    return sum((float(matrix.norm()) / _spectral(matrix)) ** 2 for matrix in _matrices(network))


def path_norm(network: Network) -> float:
    """Square root of the summed outputs for an input of ones, all parameters squared (networks of ReLU, no norms)."""
    inputs = network.inputs
    if inputs is None or any(isinstance(module, _NORMS) for module in network.model.modules()):
        return math.nan
    if not all(value.is_floating_point() for value in inputs.values()):
        return math.nan
    with _kept(list(network.model.parameters())) as copies:
        for parameter in copies:
            parameter.data.square_()
        outputs = network.model(**{name: torch.ones_like(value[:1]) for name, value in inputs.items()})
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        return math.sqrt(float(logits.double().sum()))


def inverse_margin(network: Network) -> float:
    """1 / margin^2, the margin at the 10th percentile over the sample; infinite if that is none."""
    return 1 / _margin(network) ** 2


def sharpness(network: Network, radius: float = 0.05) -> float:
    """By how much one step of a given length up the gradient raises the loss (Foret et al. 2021, rho = 0.05)."""
    weights = list(_weights(network).values())
    tracked = [weight for weight in weights if weight.requires_grad]
    with torch.enable_grad():
        loss = network.outcome(network.model)[0].mean()
        gradients = torch.autograd.grad(loss, tracked, allow_unused=True)
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients if g is not None))
    with _kept(tracked):
        for weight, gradient in zip(tracked, gradients, strict=True):
            if gradient is not None and norm:
                weight.data.add_(gradient, alpha=radius / norm)
        return float(network.outcome(network.model)[0].mean()) - loss.item()


def pac_bayes_flatness(network: Network) -> float:
    """1 / sigma^2, the Gaussian noise on the weights that costs a tenth of accuracy in the mean over draws."""
    return _flatness(network, lambda _, margins: -float((margins > 0).double().mean()), lambda error: error + 0.1)


def pac_bayes_magnitude_flatness(network: Network) -> float:
    """The same with noise in proportion to each weight's magnitude."""
    return _flatness(
        network, lambda _, margins: -float((margins > 0).double().mean()), lambda error: error + 0.1, relative=True
    )


def random_perturbation(network: Network) -> float:
    """1 / sigma^2, the Gaussian noise on the weights that raises the loss by prunability's tolerance."""
    return _flatness(
        network, lambda losses, _: float(losses.double().mean()), lambda loss: loss * (1 + network.tolerance)
    )


BASELINE_MEASURES: dict[str, Callable[[Network], float]] = {
    "parameter_count": parameter_count,
    "l2_norm": l2_norm,
    "distance_from_init": distance_from_init,
    "log_spectral_product": log_spectral_product,
    "log_spectral_over_margin": log_spectral_over_margin,
    "log_frobenius_product": log_frobenius_product,
    "log_frobenius_over_margin": log_frobenius_over_margin,
    "frobenius_over_spectral": frobenius_over_spectral,
    "path_norm": path_norm,
    "inverse_margin": inverse_margin,
    "sharpness": sharpness,
    "pac_bayes_flatness": pac_bayes_flatness,
    "pac_bayes_magnitude_flatness": pac_bayes_magnitude_flatness,
    "random_perturbation": random_perturbation,
}


def _weights(network: Network) -> dict[str, nn.Parameter]:
    return prunable_weights(network.model)


def _matrices(network: Network) -> Iterator[torch.Tensor]:
    """The weights as matrices [out, rest], each with the BatchNorm folded in that comes next to it in the model.

    That is the BatchNorm which the model names right after the layer, with as many channels: what a BatchNorm divides
    by would otherwise leave the layer's scale without a meaning.
    """
    chosen = {id(weight) for weight in _weights(network).values()}
    modules = [module for module in network.model.modules() if not list(module.children())]
    seen = set()
    for i, module in enumerate(modules):
        for weight in module.parameters(recurse=False):
            if id(weight) not in chosen or id(weight) in seen:
                continue
            seen.add(id(weight))
            matrix = weight.detach().double().flatten(1)
            following = modules[i + 1] if i + 1 < len(modules) else None
            if isinstance(following, _BATCH_NORMS) and following.num_features == len(matrix):
                if following.running_var is not None:
                    scale = (following.running_var.double() + following.eps).rsqrt()
                    scale = scale * (1 if following.weight is None else following.weight.detach().double())
                    matrix = matrix * scale[:, None]
            yield matrix


def _spectral(matrix: torch.Tensor) -> float:
    """Largest singular value: from the smaller of the two products, which is cheaper than an SVD."""
    product = matrix @ matrix.T if len(matrix) <= matrix.shape[1] else matrix.T @ matrix
    return math.sqrt(float(torch.linalg.eigvalsh(product)[-1].clamp(min=1e-300)))


def _margin(network: Network) -> float:
    """The margin at the 10th percentile; the smallest number above 0 if a tenth of the labels is wrong."""
    margins = network.outcome(network.model)[1].double()
    place = max(round(0.1 * len(margins)), 1)
    return max(float(margins.kthvalue(place).values), 1e-12)


@contextmanager
def _kept(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Lets parameters be changed inside, and puts them back from copies: subtracting noise would round."""
    copies = [parameter.data.clone() for parameter in parameters]
    try:
        yield parameters
    finally:
        for parameter, copy in zip(parameters, copies, strict=True):
            parameter.data.copy_(copy)


def _flatness(
    network: Network,
    harm: Callable[[torch.Tensor, torch.Tensor], float],
    limit: Callable[[float], float],
    relative: bool = False,
) -> float:
    """1 / sigma^2 for the noise at which the mean harm over draws reaches its limit, by bisection of log(sigma).

    Draws are the same for all sigma, so that the harm is a smooth function of it.
    """
    weights = list(_weights(network).values())
    allowed = limit(harm(*network.outcome(network.model)))
    low, high = math.log(1e-5), math.log(10.0)
    with _kept(weights):
        originals = [weight.data.clone() for weight in weights]
        for _ in range(network.steps):
            sigma = math.exp((low + high) / 2)
            total = 0.0
            for draw in range(network.draws):
                generator = torch.Generator().manual_seed(network.seed * 1000 + draw)
                for weight, original in zip(weights, originals, strict=True):
                    noise = torch.randn(original.shape, generator=generator).to(original)
                    weight.data.copy_(original + sigma * (noise * original.abs() if relative else noise))
                total += harm(*network.outcome(network.model))
            within = total / network.draws <= allowed
            low, high = (math.log(sigma), high) if within else (low, math.log(sigma))
    return math.exp(-2 * low)

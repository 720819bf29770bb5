"""Which weights count for prunability, in which order they go, and how they are zeroed and put back.

Nothing here holds a second copy of the weights: a rank is found by counting, a piece of a tensor at a time, and only
what is zeroed is kept aside while it is zeroed, in the host's memory.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from hf_efx.core.model.masks import candidate_count, smallest_together
from hf_efx.core.model.pruned import Zeros, zeroed

Criterion = Literal["magnitude", "random"]
Scope = Literal["global", "layer"]

PIECE = 1 << 22  # numbers looked at in one go: bounds what is needed beside the weights


def prunable_weights(model: nn.Module, embeddings: bool = False) -> dict[str, nn.Parameter]:
    """The weights that count: matrices and convolution kernels as they are stored, tied ones once.

    Biases, norms and other vectors (also [1, 1, n]) never count. Of a low-rank layer the factors count, of a LoRA
    layer the base weight and the factors: merge first to measure the product.

    Args:
        model: An unwrapped model.
        embeddings: Whether tables of embeddings count: those of `nn.Embedding`, also where an output layer is tied to
            them, and parameters with "embed" in their own name.

    Returns:
        Parameters by their first name.

    Raises:
        ValueError: If nothing is left, or a weight is quantised, sharded or not loaded.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))}
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.numel() == 0 or (sum(size > 1 for size in parameter.shape) < 2 and parameter.dim() != 2):
            continue
        if not embeddings and (id(parameter) in tables or "embed" in name.rpartition(".")[2]):
            continue
        if not parameter.is_floating_point() or parameter.element_size() < 2:
            raise ValueError(
                f"the weight {name!r} is stored as {parameter.dtype}: prunability needs floating-point weights; load "
                f"the model without quantization"
            )
        if parameter.is_meta:
            raise ValueError(f"the weight {name!r} is on the meta device: load the model's weights first")
        if isinstance(parameter, DTensor):
            raise ValueError(
                f"the weight {name!r} is sharded, so that no process can rank it: measure the whole model, loaded "
                f"from its checkpoint"
            )
        found[name] = parameter
    for name, buffer in model.named_buffers():  # a quantised layer may hold its weight as one: weight, qweight
        if name.endswith("weight") and buffer.dim() >= 2 and not buffer.is_floating_point():
            raise ValueError(f"{name!r} is stored as {buffer.dtype}: load the model without quantization")
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no matrix to prune"
            + ("" if embeddings else "; embeddings=True counts embedding tables too")
        )
    return found


@dataclass
class WeightOrder:
    """The order in which weights are pruned, smallest score first; ties by place.

    Scores are magnitudes, or numbers drawn anew from the seed whenever they are needed. The weights pruned at a
    smaller fraction kept include those pruned at a larger one.

    Attributes:
        weights: By name.
        criterion: `"magnitude"` or `"random"`.
        scope: `"global"` ranks all weights together, `"layer"` each tensor by itself.
        seed: Of the random order.

    Raises:
        ValueError: For a weight that isn't finite.
    """

    weights: dict[str, nn.Parameter]
    criterion: Criterion = "magnitude"
    scope: Scope = "global"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, weight in self.weights.items():
            if not all(bool(torch.isfinite(piece).all()) for piece in _pieces(weight.data)):
                raise ValueError(f"the weight {name!r} holds numbers that aren't finite: their order has no meaning")

    @property
    def count(self) -> int:
        """How many weights there are."""
        return sum(weight.numel() for weight in self.weights.values())

    def kept(self, fraction: float) -> dict[str, int]:
        """How many weights of each tensor stay at a fraction kept; all of them in all tensors for 1."""
        counts = {name: weight.numel() for name, weight in self.weights.items()}
        for name, (_, mask) in self._zeros(fraction):
            counts[name] -= int(mask.sum())
        return counts

    def pruned(self, fraction: float) -> AbstractContextManager[None]:
        """Zeroes all but a fraction of the weights inside, and puts back what was there, bit for bit.

        floor(fraction * count) weights are kept, of each tensor where the scope is `"layer"`, without rescaling.
        After an exception or Ctrl-C the weights are put back too. Graphs made before stay valid. Don't change the
        weights inside.

        Args:
            fraction: From 0 to 1.
        """
        return zeroed(zeros for _, zeros in self._zeros(fraction))

    def _zeros(self, fraction: float) -> Iterator[tuple[str, Zeros]]:
        """Pieces of the tensors, by the tensor's name, each with the mask of what goes."""
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction={fraction}: expected a share from 0 to 1")
        groups = [list(self.weights)] if self.scope == "global" else [[name] for name in self.weights]
        for names in groups:
            count = sum(self.weights[name].numel() for name in names)
            pruned = count - candidate_count(fraction, count)
            masks = smallest_together(lambda names=names: self._scores(names), pruned)
            pieces = ((name, piece) for name in names for piece in _pieces(self.weights[name].data))
            for (name, piece), mask in zip(pieces, masks, strict=True):
                yield name, (piece, mask)

    def _scores(self, names: list[str]) -> Iterator[torch.Tensor]:
        """Of the tensors' pieces, in their order."""
        for name in names:
            pieces = _pieces(self.weights[name].data)
            if self.criterion == "magnitude":
                yield from (piece.abs() for piece in pieces)
                continue
            place = list(self.weights).index(name)
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + place) % 2**63)
            yield from (torch.rand(piece.shape, generator=generator).to(piece.device) for piece in pieces)


def _pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Views of some rows each, in any memory format."""
    rows = max(PIECE // max(tensor[0].numel(), 1), 1)
    return iter(tensor.split(rows))

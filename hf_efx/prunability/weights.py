"""Which weights count for prunability, in which order they go, and how they are zeroed and put back.

Nothing here holds a second copy of the weights: a rank is found by counting, a piece of a tensor at a time, and only
what is zeroed is kept aside while it is zeroed, in the host's memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import nn

from hf_efx.core.model.masks import candidate_count

Criterion = Literal["magnitude", "random"]
Scope = Literal["global", "layer"]

PIECE = 1 << 22  # numbers looked at in one go: bounds what is needed beside the weights
_DIGIT_BITS = 16  # of a rank's search: two rounds for float32, four for float64


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
        ValueError: If nothing is left, or a weight is quantised or not loaded.
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
        ValueError: For an unknown word, or a weight that isn't finite.
    """

    weights: dict[str, nn.Parameter]
    criterion: Criterion = "magnitude"
    scope: Scope = "global"
    seed: int = 0
    _first_digits: dict[tuple[str, ...], torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for name, allowed in (("criterion", get_args(Criterion)), ("scope", get_args(Scope))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose from {', '.join(allowed)}")
        for name, weight in self.weights.items():
            if not all(bool(torch.isfinite(piece).all()) for piece in _pieces(weight.data)):
                raise ValueError(f"the weight {name!r} holds numbers that aren't finite: their order has no meaning")

    @property
    def count(self) -> int:
        """How many weights there are."""
        return sum(weight.numel() for weight in self.weights.values())

    def kept(self, fraction: float) -> dict[str, int]:
        """How many weights of each tensor stay at a fraction kept; all of them in all tensors for 1."""
        shares = {}
        for names, threshold, ties in self._cuts(fraction):
            for name in names:
                pruned = 0
                for _, scores in self._scores(name):
                    equal = min(int((scores == threshold).sum()), ties)
                    pruned, ties = pruned + int((scores < threshold).sum()) + equal, ties - equal
                shares[name] = self.weights[name].numel() - pruned
        return shares

    @contextmanager
    def pruned(self, fraction: float) -> Iterator[None]:
        """Zeroes all but a fraction of the weights inside, and puts back what was there, bit for bit.

        floor(fraction * count) weights are kept, of each tensor where the scope is `"layer"`, without rescaling.
        After an exception or Ctrl-C the weights are put back too. Graphs made before stay valid. Don't change the
        weights inside.

        Args:
            fraction: From 0 to 1.
        """
        aside: list[tuple[torch.Tensor, torch.Tensor]] = []
        cuts = self._cuts(fraction)
        try:
            for names, threshold, ties in cuts:
                for name in names:
                    for piece, scores in self._scores(name):
                        mask = (scores < threshold).contiguous()
                        if ties:
                            equal = (scores == threshold).reshape(-1).nonzero()[:ties, 0]
                            mask.view(-1)[equal] = True
                            ties -= len(equal)
                        zeros = piece == 0  # restoring finds its places by the zeros, which these join
                        aside.append((piece, piece[mask | zeros].cpu()))
                        piece.masked_fill_(mask, 0)
            yield
        finally:
            _put_back(aside)

    def _cuts(self, fraction: float) -> list[tuple[tuple[str, ...], float, int]]:
        """For each group of tensors that is ranked together: what lies below the threshold goes, and so many ties."""
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction={fraction}: expected a share from 0 to 1")
        groups = [tuple(self.weights)] if self.scope == "global" else [(name,) for name in self.weights]
        cuts = []
        for names in groups:
            count = sum(self.weights[name].numel() for name in names)
            pruned = count - candidate_count(fraction, count)
            cuts.append((names, *(self._threshold(names, pruned) if pruned else (0.0, 0))))
        return cuts

    def _threshold(self, names: tuple[str, ...], rank: int) -> tuple[float, int]:
        """The score of a rank (1 is the smallest), and how many of those equal to it are among the `rank` smallest.

        Scores aren't negative, so that their bits as an integer are in their order: the rank is found digit by digit,
        16 bits each, by counting.
        """
        kind, digits = (torch.int64, 4) if self._dtype == torch.float64 else (torch.int32, 2)
        prefix = 0
        for digit in range(digits):
            shift = _DIGIT_BITS * (digits - 1 - digit)
            if digit or names not in self._first_digits:
                counts = torch.zeros(1 << _DIGIT_BITS, dtype=torch.int64)
                for name in names:
                    for _, scores in self._scores(name):
                        bits = scores.contiguous().view(kind).reshape(-1) >> shift
                        if digit:
                            bits = bits[(bits >> _DIGIT_BITS) == prefix]
                        bits = bits & ((1 << _DIGIT_BITS) - 1)
                        counts += torch.bincount(bits, minlength=len(counts)).cpu()
                if not digit:
                    self._first_digits[names] = counts
            else:
                counts = self._first_digits[names]
            below = counts.cumsum(0)
            found = int(torch.searchsorted(below, rank))
            rank -= int(below[found - 1]) if found else 0
            prefix = (prefix << _DIGIT_BITS) | found
        return float(torch.tensor(prefix, dtype=kind).view(self._dtype)), rank

    @property
    def _dtype(self) -> torch.dtype:
        """Of all scores, so that one threshold is exact for tensors of several types."""
        wide = any(weight.dtype == torch.float64 for weight in self.weights.values())
        return torch.float64 if wide else torch.float32

    def _scores(self, name: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Pieces of a tensor, to be written to, and their scores."""
        generator = None
        if self.criterion == "random":
            place = list(self.weights).index(name)
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + place) % 2**63)
        for piece in _pieces(self.weights[name].data):
            if generator is None:
                yield piece, piece.abs().to(self._dtype)
            else:
                yield piece, torch.rand(piece.shape, generator=generator, dtype=self._dtype).to(piece.device)


def _pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Views of some rows each, in any memory format."""
    rows = max(PIECE // max(tensor[0].numel(), 1), 1)
    return iter(tensor.split(rows))


def _put_back(aside: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Writes values into the places of zeros; an interrupt waits until all is done."""
    interrupt = None
    while aside:
        try:
            piece, values = aside[-1]
            zeros = piece == 0
            if int(zeros.sum()) == len(values):  # else it was interrupted before its zeros were written
                piece.masked_scatter_(zeros, values.to(piece.device))
            aside.pop()
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt

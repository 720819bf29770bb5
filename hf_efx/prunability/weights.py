"""Which weights count for prunability, in which order they go, and how they are zeroed and put back.

Nothing here holds a second copy of the weights: a rank is found by counting, a piece of a tensor at a time, and only
what is zeroed is kept aside while it is zeroed, in the host's memory.
"""

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hf_efx.core.model.masks import candidate_count, smallest_together
from hf_efx.core.model.pruned import Zeros, zeroed

Criterion = Literal["magnitude", "random"]
Scope = Literal["global", "layer"]

# Adapters, by the attributes that hold them, which stand in for a module or its weight: our low-rank factors are one.
_IN_ITS_PLACE = {"modules_to_save", "ln_tuning_layers", "osf_svd_params", "low_rank_u"}

PIECE = 1 << 22  # numbers looked at in one go: bounds what is needed beside the weights


def prunable_weights(model: nn.Module, embeddings: bool = False) -> dict[str, nn.Parameter]:
    """The weights that count: matrices and convolution kernels that act, as they are stored, tied ones once.

    Biases, norms and other vectors (also [1, 1, n]) never count. Of a low-rank layer the factors count, of a LoRA
    layer the base weight and the factors: merge first to measure the product. Weights that peft leaves idle don't
    count: those of adapters that aren't active or are merged, and what `modules_to_save` stands in for.

    Args:
        model: An unwrapped model.
        embeddings: Whether tables of embeddings count: those of `nn.Embedding`, also where an output layer is tied to
            them, and parameters with "embed" in their own name.

    Returns:
        Parameters by their first name.

    Raises:
        ValueError: If nothing is left, or a weight is quantised, sharded, not loaded, or not what acts: one that a
            mask or a parametrisation of torch.nn.utils makes another of.
    """
    _refuse_quantised(model)
    _refuse_computed(model)
    tables = {id(module.weight) for module in model.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))}
    idle = _idle_weights(model)
    found = {}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(f"the weight {name!r} has no shape yet: run the model once, so that it gets one")
        if parameter.is_meta:
            raise ValueError(f"the weight {name!r} is on the meta device: load the model's weights first")
        if parameter.numel() == 0 or (sum(size > 1 for size in parameter.shape) < 2 and parameter.dim() != 2):
            continue
        if id(parameter) in idle or (not embeddings and (id(parameter) in tables or "embed" in _own_name(name))):
            continue
        _check_stored(name, parameter)
        found[name] = parameter
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no matrix to prune"
            + ("" if embeddings else "; embeddings=True counts embedding tables too")
        )
    return found


def _own_name(name: str) -> str:
    return name.rpartition(".")[2]


def _check_stored(name: str, parameter: nn.Parameter) -> None:
    """Raises for a matrix whose entries can't be ranked and zeroed here."""
    if isinstance(parameter, DTensor):
        raise ValueError(
            f"the weight {name!r} is sharded, so that no process can rank it: measure the whole model, loaded "
            f"from its checkpoint"
        )
    if not parameter.is_floating_point() or parameter.layout != torch.strided:
        raise ValueError(
            f"the weight {name!r} is stored as {parameter.dtype}, {parameter.layout}: prunability ranks dense real "
            f"floating-point weights"
        )
    if parameter.is_inference():
        raise ValueError(f"the weight {name!r} was made in inference mode, where no one may zero it: load it outside")


def _refuse_quantised(model: nn.Module) -> None:
    """Raises for a model with quantised parts, however they are kept: what is left isn't the model."""
    found = {f"{name}: {tensor.dtype}" for name, tensor in _tensors(model) if _is_packed(name, tensor)}
    # torchao's and quanto's weights are subclasses that name the type they stand for; torch.ao's layers hold an object
    # of C++.
    found |= {
        f"{name}: {type(tensor).__name__}"
        for name, tensor in _tensors(model)
        if is_traceable_wrapper_subclass(tensor) and not isinstance(tensor, DTensor)
    }
    found |= {
        f"{name}: {type(module).__name__}"
        for name, module in model.named_modules()
        if isinstance(vars(module).get("_packed_params"), torch.ScriptObject)
    }
    if found:
        shown = ", ".join(sorted(found)[:5]) + ", ..." * (len(found) > 5)
        raise ValueError(
            f"{len(found)} parts of the model are quantised ({shown}), which can't be ranked with the rest: load the "
            f"model without quantization. What is no weight is better kept as int64 or bool"
        )


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _is_packed(name: str, tensor: torch.Tensor) -> bool:
    """Whether numbers of a byte or less, or integers under a weight's name, stand for weights; a mask doesn't."""
    lazy = isinstance(tensor, (UninitializedBuffer, UninitializedParameter))
    if lazy or tensor.numel() < 2 or tensor.dtype == torch.bool:
        return False
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.element_size() < 2
    if tensor.element_size() > 1:
        return name.endswith("weight") and tensor.dim() >= 2
    return tensor.is_meta or not bool(((tensor == 0) | (tensor == 1)).all())


def _refuse_computed(model: nn.Module) -> None:
    """Raises where what acts is computed from what is stored, by torch.nn.utils: the stored numbers say little."""
    for name, module in model.named_modules():
        if is_parametrized(module):
            parts: Any = module.parametrizations
            for part in parts:
                raise ValueError(
                    f"{name}.{part} is computed from {', '.join(dict(parts[part].named_parameters()))} by a "
                    f"parametrization, so that these aren't the weights that act: call "
                    f"torch.nn.utils.parametrize.remove_parametrizations(module, {part!r}) on it, in a copy of the "
                    f"model if you train on"
                )
        # The older functions keep the result as a plain attribute beside weight_orig, or weight_g and weight_v.
        plain = [part for part, value in vars(module).items() if isinstance(value, torch.Tensor)]
        for part in plain:
            stored = [other for other in module._parameters if other.startswith(f"{part}_")]
            if stored:
                raise ValueError(
                    f"{name}.{part} is computed from {', '.join(stored)}, so that these aren't the weights that act: "
                    f"call torch.nn.utils.prune.remove(module, {part!r}), remove_weight_norm or remove_spectral_norm, "
                    f"whichever made it, on a copy of the model if you train on"
                )


def _idle_weights(model: nn.Module) -> set[int]:
    """Ids of the parameters that peft leaves aside in the model's present state.

    Raises:
        ValueError: For adapters that are merged and switched off: peft would unmerge them in the forward pass.
    """
    if "peft" not in sys.modules:  # importing it takes seconds
        return set()
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    idle: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            continue
        merged = isinstance(module, BaseTunerLayer) and module.merged
        if merged and module.disable_adapters:
            raise ValueError(
                f"{name}: its adapters are merged and switched off, so that a forward pass changes the weights: call "
                f"unmerge_adapter() first, or measure merge_and_unload()"
            )
        active = [] if merged or module.disable_adapters else module.active_adapters
        for attribute in module.adapter_layer_names:
            adapters = attrgetter(attribute)(module)
            if not isinstance(adapters, (nn.ModuleDict, nn.ParameterDict)):
                continue
            aside: list[Any] = [one for adapter, one in adapters.items() if adapter not in active]
            if attribute in _IN_ITS_PLACE and {*active} & {*adapters}:
                behind = "base_layer" if isinstance(module, BaseTunerLayer) else "original_module"
                aside.append(getattr(module, behind))
            for one in aside:
                idle |= {id(p) for p in ([one] if isinstance(one, torch.Tensor) else one.parameters())}
    return idle


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

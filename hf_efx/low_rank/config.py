"""LowRankConfig: which layers are factorised, at which rank, and how the factors start."""

import logging
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft.utils.other import get_pattern_key
from torch import nn
from transformers.activations import ACT2FN

from hf_efx.core.model.block_map import block_map
from hf_efx.core.model.method_config import EfxMethodConfig
from hf_efx.core.model.peft_bridge import EfxType, register_adapter
from hf_efx.core.model.weight_view import WeightView
from hf_efx.low_rank.initialisation import INITIALISATIONS, initial_factors, svd
from hf_efx.low_rank.layers import densify, factorise
from hf_efx.low_rank.peft_tuner import LowRankTuner
from hf_efx.low_rank.ranks import (
    allocate_ranks,
    break_even_rank,
    factorised_parameters,
    looks_random,
    resolve_rank,
)

logger = logging.getLogger(__name__)

# peft adds these names to modules_to_save by the task, whether a model has them or not.
_PEFT_HEADS = ("classifier", "score", "qa_outputs")


@dataclass
class LowRankConfig(EfxMethodConfig):
    """Config of low-rank training, W = U Vᵀ (Kamalakara et al. 2022, arXiv 2209.13569).

    Raises:
        ValueError: For a value out of range; the field, the value and the way out are named.
    """

    method: ClassVar[str] = "low_rank"
    changes_skeleton: ClassVar[bool] = True

    # The share of this package's study; above 0.5 square layers would grow.
    rank: float | int | str = field(
        default=0.25,
        metadata={
            "help": "Rank of the factors: a share of min(in, out) (float), a whole rank (int), or 'auto' to choose "
            "it per layer from the spectrum of trained weights within parameter_budget. Lower is smaller and "
            "faster, and fits less well."
        },
    )
    parameter_budget: float | int | None = field(
        default=None,
        metadata={
            "help": "For rank='auto': parameters of the targeted layers together, as a share of their dense count "
            "(float) or a number (int)."
        },
    )
    rank_pattern: dict[str, float | int] = field(
        default_factory=dict,
        metadata={"help": "Ranks for modules whose name matches a pattern (regular expression), before `rank`."},
    )
    # The best start in this package's study among those that need no choice of scale.
    init: str = field(
        default="spectral",
        metadata={
            "help": "How factors start: 'spectral' (SVD of the weight that is there), 'spectral_ones' (its singular "
            "vectors, all singular values equal) or 'he' (independent normal factors). The last two discard trained "
            "weights."
        },
    )
    spectral_ones_scale: float | str = field(
        default=1.0,
        metadata={
            "help": "The singular value of 'spectral_ones': 1.0 as in the paper, or 'rms' for the norm that "
            "'spectral' gives, which follows the dense initialisation's scale."
        },
    )
    factor_activation: str | None = field(
        default=None,
        metadata={
            "help": "Nonlinearity between the factors, by its transformers name such as 'silu'. More expressive at "
            "equal rank; such layers can't be merged into a dense one."
        },
    )
    only_if_smaller: bool = field(
        default=True,
        metadata={"help": "Leave a layer dense where its factors would hold no fewer parameters than its weight."},
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={
            "help": "Through peft, which freezes the model: modules that are trained and saved whole beside the "
            "factors, such as a new head (peft adds a classifier's own). In memory and while loading all modules are; "
            "there these only stay dense."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # A file of peft's says the type: what is built from it gets its factors from the file beside it.
        self.from_file = self.peft_type is not None
        self.peft_type = EfxType.EFX_LOW_RANK  # pyright: ignore[reportAttributeAccessIssue]
        if self.rank != "auto":
            _check_rank("rank", self.rank)
        for pattern, rank in self.rank_pattern.items():
            _check_rank(f"rank_pattern[{pattern!r}]", rank)
        self._check_budget()
        if self.init not in INITIALISATIONS:
            raise ValueError(f"init={self.init!r}: expected one of {', '.join(INITIALISATIONS)}.")
        scale = self.spectral_ones_scale
        number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
        if scale != "rms" and not (number and 0 < float(scale) < math.inf):
            raise ValueError(f"spectral_ones_scale={scale!r}: expected a number above 0, or 'rms'.")
        if self.init != "spectral_ones":
            self.refuse_inert(("spectral_ones_scale",), f"at init={self.init!r}: set init='spectral_ones'")
        if self.rank == "auto":
            self.refuse_inert(("only_if_smaller",), "at rank='auto', which makes no layer larger: pass a rank")
        if self.factor_activation is not None and self.factor_activation not in ACT2FN:
            raise ValueError(
                f"factor_activation={self.factor_activation!r} is no activation of transformers; try 'silu' or 'gelu'."
            )

    def _check_budget(self) -> None:
        budget = self.parameter_budget
        if (self.rank == "auto") != (budget is not None):
            raise ValueError(
                f"parameter_budget={budget!r} goes with rank='auto' and with nothing else (rank={self.rank!r})."
            )
        if budget is None:
            return
        whole = isinstance(budget, int) and not isinstance(budget, bool) and budget >= 1
        if not whole and not (isinstance(budget, float) and 0 < budget <= 1):
            raise ValueError(
                f"parameter_budget={budget!r}: expected a share in (0, 1] as a float, or a number as an int."
            )
        if self.rank_pattern:
            raise ValueError("rank_pattern and rank='auto' exclude each other: pass the ranks, or have them chosen.")

    def check_pretrained(self) -> None:
        """Raises ValueError for initialisations that discard trained weights."""
        if self.init != "spectral" or self.factor_activation:
            field_name = "init" if self.init != "spectral" else "factor_activation"
            raise ValueError(
                f"{field_name}={getattr(self, field_name)!r} discards the pretrained weights: use init='spectral' "
                f"(their SVD) without factor_activation. To train from scratch build the model from its config, or "
                f"say get_efx_model(..., pretrained=False)."
            )

    def check_merge(self) -> None:
        """Raises ValueError with a factor activation: no single matrix does the same."""
        if self.factor_activation:
            raise ValueError(
                f"factor_activation={self.factor_activation!r} stands between the factors: no dense matrix has the "
                f"same outputs, so the model can't be merged. Keep the checkpoint factorised."
            )

    def plan(self, model: nn.Module, targets: dict[str, nn.Module], pretrained: bool) -> dict[str, dict[str, Any]]:
        """Rank and blocks of each layer that is factorised; see `EfxMethodConfig.plan`.

        Raises:
            ValueError: For an int rank above min(in, out), rank='auto' on random weights or with too small a budget,
                or a weight with NaN or infinite values, which has no SVD.
        """
        if pretrained:
            self.check_pretrained()
        names = [name for name, _ in model.named_modules()]
        for entry in self.modules_to_save or ():
            added = self.task_type is not None and entry in _PEFT_HEADS
            if not added and not any(f".{name}".endswith(f".{entry}") for name in names):
                raise ValueError(f"modules_to_save={self.modules_to_save!r}: {entry!r} matches no module.")
        views = _views(model, targets)
        if self.init != "he" or self.rank == "auto":
            _refuse_without_spectrum(views)
        ranks = self._automatic_ranks(views) if self.rank == "auto" else self._given_ranks(views)
        plan: dict[str, dict[str, Any]] = {}
        larger, zero = [], []
        for name, view in views.items():
            limit = break_even_rank(view.block_dim, view.in_dim)
            if (self.only_if_smaller or self.rank == "auto") and ranks[name] >= limit:
                larger.append(f"{name} (rank {ranks[name]}, break-even {limit:.0f})")
            elif self.init != "he" and not view.weight.is_meta and not view.weight.any():
                zero.append(name)
            else:
                plan[name] = self._spec(view, ranks[name])
        if larger:
            logger.warning(
                "Left dense, since factors would hold no fewer parameters than the weight (only_if_smaller=False "
                "factorises them all the same): %s",
                ", ".join(larger),
            )
        if zero:
            logger.warning("Left dense, since factors of an all-zero weight would never train: %s", ", ".join(zero))
        if not plan:
            raise ValueError(
                f"rank={self.rank!r}: no layer would get smaller, so nothing would be factorised. Lower the rank, "
                f"or pass only_if_smaller=False."
            )
        return plan

    def _spec(self, view: WeightView, rank: int) -> dict[str, Any]:
        spec: dict[str, Any] = {"rank": rank, "shape": [view.out_dim, view.in_dim]}
        if view.blocks > 1:
            spec["blocks"] = view.blocks
        if isinstance(view.module, nn.Conv2d):
            spec["convolution"] = True
        return spec

    def _given_ranks(self, views: dict[str, WeightView]) -> dict[str, int]:
        ranks, used = {}, set()
        for name, view in views.items():
            key = get_pattern_key(list(self.rank_pattern), name)
            used.add(key)
            try:
                ranks[name] = resolve_rank(self.rank_pattern.get(key, self.rank), view.block_dim, view.in_dim)  # pyright: ignore
            except ValueError as error:
                raise ValueError(
                    f"LowRankConfig: {error} of module {name!r} (one block is [{view.block_dim}, {view.in_dim}]). "
                    f"Lower `rank`, give it as a share, or name this module in rank_pattern."
                ) from None
        unused = [pattern for pattern in self.rank_pattern if pattern not in used]
        if unused:
            raise ValueError(
                f"rank_pattern[{unused[0]!r}] matches no targeted module, for example {next(iter(views))!r}."
            )
        return ranks

    def _automatic_ranks(self, views: dict[str, WeightView]) -> dict[str, int]:
        total = self._total_budget(views)
        if any(view.weight.is_meta for view in views.values()):
            raise ValueError("rank='auto' reads the spectrum of trained weights, but the model is on the meta device.")
        spectra = {name: [svd(b)[1].cpu() for b in view.block_matrices()] for name, view in views.items()}
        shapes = {name: (view.block_dim, view.in_dim) for name, view in views.items()}
        if all(looks_random(sigma, *shapes[name]) for name, sigmas in spectra.items() for sigma in sigmas):
            raise ValueError(
                "rank='auto' reads the spectrum of trained weights, but these look random (no singular value leaves "
                "the Marchenko-Pastur bulk): their spectrum says nothing. Pass a rank, or train dense first "
                "(LowRankTrainer with dense_warmup_steps)."
            )
        return allocate_ranks(spectra, shapes, total)

    def _total_budget(self, views: dict[str, WeightView]) -> int:
        """The parameters that rank='auto' may spend on the targets together."""
        budget = self.parameter_budget
        dense = sum(view.out_dim * view.in_dim for view in views.values())
        total = int(budget * dense) if isinstance(budget, float) else budget
        assert isinstance(total, int)
        least = sum(view.blocks * factorised_parameters(view.block_dim, view.in_dim, 1) for view in views.values())
        if total < least:
            raise ValueError(
                f"parameter_budget={total} is below {least}, what rank 1 everywhere takes (the layers hold {dense} "
                f"dense). Raise parameter_budget."
            )
        return total

    def check_switch(self, model: nn.Module) -> dict[str, dict[str, Any]]:
        """Refuses, for a model that trains dense first, what its factorisation would refuse then.

        Returns:
            The plan; with rank='auto' of all layers that may be factorised, at rank 1.

        Raises:
            ValueError: As `match` and `plan` do, but for what trained weights alone can tell (of rank='auto').
        """
        targets = self.match(model)
        if self.rank == "auto":
            views = _views(model, targets)
            self._total_budget(views)
            return {name: self._spec(view, 1) for name, view in views.items()}
        return self.plan(model, targets, pretrained=True)

    def apply(self, model: nn.Module, plan: dict[str, dict[str, Any]]) -> None:
        """Factorises the planned layers, with factors by `init`."""
        for name, spec in plan.items():
            module = model.get_submodule(name)
            view = WeightView(module, spec.get("blocks", 1))
            factors = None
            if not view.weight.is_meta:
                matrices = view.block_matrices()
                factors = [initial_factors(m, spec["rank"], self.init, self.spectral_ones_scale) for m in matrices]
            factorise(module, spec["rank"], view.blocks, factors, self.factor_activation)

    def restore(self, model: nn.Module, plan: dict[str, dict[str, Any]]) -> None:
        """Rebuilds the factorised layers with empty factors."""
        for name, spec in plan.items():
            _check_spec(name, spec)
            module = model.get_submodule(name)
            shape = [(view := WeightView(module, spec.get("blocks", 1))).out_dim, view.in_dim]
            if shape != spec["shape"]:
                raise ValueError(f"config.efx promises {name!r} with shape {spec['shape']}, the model has {shape}.")
            factorise(module, spec["rank"], view.blocks, None, self.factor_activation)

    def merge(self, model: nn.Module, plan: dict[str, dict[str, Any]]) -> None:
        """Multiplies the factors out."""
        for name in plan:
            densify(model.get_submodule(name))

    def expected_tensors(self, plan: dict[str, dict[str, Any]]) -> dict[str, list[int]]:
        """Names and shapes of the factors."""
        result = {}
        for name, spec in plan.items():
            _check_spec(name, spec)
            out_dim, in_dim = spec["shape"]
            result[f"{name}.weight"] = [1, out_dim, spec["rank"], *([1] if spec.get("convolution") else [])]
            result[f"{name}.factor_v"] = [spec.get("blocks", 1) * spec["rank"], in_dim]
        return result


def _views(model: nn.Module, targets: dict[str, nn.Module]) -> dict[str, WeightView]:
    blocks = block_map(model)
    return {name: WeightView(module, blocks.blocks_of(name)) for name, module in targets.items()}


def _check_rank(name: str, rank: Any) -> None:
    whole = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    share = isinstance(rank, float) and 0 < rank <= 1
    if not whole and not share:
        raise ValueError(
            f"{name}={rank!r}: expected a share of min(in, out) in (0, 1] as a float, a whole rank from 1 as an int"
            + (", or 'auto' with parameter_budget." if name == "rank" else ".")
        )


def _refuse_without_spectrum(views: dict[str, WeightView]) -> None:
    for name, view in views.items():
        if not view.weight.is_meta and not view.weight.isfinite().all():
            raise ValueError(
                f"LowRankConfig: the weight of module {name!r} holds NaN or infinities, so it has no SVD. Repair the "
                f"checkpoint, leave the module out with exclude_modules, or pass a rank and init='he'."
            )


def _check_spec(name: str, spec: Any) -> None:
    """Checks what a checkpoint says of one module's structure."""
    keys = set(spec) if isinstance(spec, dict) else set()
    unknown = sorted(keys - {"rank", "shape", "blocks", "convolution"})
    if unknown or not {"rank", "shape"} <= keys:
        raise ValueError(
            f"config.efx says {spec!r} of module {name!r}; expected rank, shape and, if fused, blocks"
            + (f", and {unknown[0]!r} is unknown. If a newer hf_efx wrote it, upgrade hf_efx." if unknown else ".")
        )


register_adapter(EfxType.EFX_LOW_RANK, LowRankConfig, LowRankTuner)

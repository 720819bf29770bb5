"""What factorising did, layer by layer: shapes, ranks, parameters, FLOPs, and the spectrum of the product."""

from dataclasses import asdict, dataclass

import torch
from torch import nn

from hf_efx.core.model.weight_view import DENSE_TYPES
from hf_efx.low_rank.decay import factorised_layers
from hf_efx.low_rank.layers import FactorisedLayer
from hf_efx.low_rank.ranks import (
    break_even_rank,
    effective_rank,
    factorised_parameters,
    product_singular_values,
    stable_rank,
)


@dataclass(frozen=True)
class LayerReport:
    """One factorised layer.

    Attributes:
        name: Module name.
        shape: (out, in) of the dense weight.
        blocks: Stacked projections, each with factors of its own.
        rank: Rank of each block.
        dense_parameters: Weights before.
        parameters: Weights in the factors.
        dense_flops: Forward FLOPs per token (for a convolution per output position) before, a multiply-add counted
            as 2.
        flops: The same now.
        saves: False where the rank is at or above break-even.
        frobenius_norm: ‖UVᵀ‖_F.
        effective_rank: exp(entropy) of the normalised singular values of a block, mean over blocks.
        stable_rank: ‖W‖²_F / σ₁² of a block, mean over blocks.
    """

    name: str
    shape: tuple[int, int]
    blocks: int
    rank: int
    dense_parameters: int
    parameters: int
    dense_flops: int
    flops: int
    saves: bool
    frobenius_norm: float
    effective_rank: float
    stable_rank: float


@dataclass(frozen=True)
class LowRankReport:
    """Per-layer rows and the totals over the whole model.

    Attributes:
        layers: One row for each factorised layer.
        dense_layers: Names of Linear, Conv1D and Conv2d that stayed dense.
        total_parameters: Of the model now, tied weights counted once.
        total_dense_parameters: Of the same model with dense layers.
    """

    layers: list[LayerReport]
    dense_layers: list[str]
    total_parameters: int
    total_dense_parameters: int

    def to_dict(self) -> dict:
        """JSON form."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{'layer':44} {'shape':>12} {'rank':>5} {'parameters':>11} {'of dense':>8} {'eff. rank':>9} {'stable':>7}"
        ]
        for row in self.layers:
            lines.append(
                f"{row.name:44} {f'{row.shape[0]}x{row.shape[1]}':>12} {row.rank:5d} {row.parameters:11,d} "
                f"{row.parameters / row.dense_parameters:8.2f} {row.effective_rank:9.1f} {row.stable_rank:7.1f}"
                + ("" if row.saves else "  (no saving: at or above the break-even rank)")
            )
        ratio = self.total_parameters / self.total_dense_parameters
        lines.append(
            f"whole model: {self.total_parameters:,} parameters, {ratio:.2f} of {self.total_dense_parameters:,}"
        )
        return "\n".join(lines)


def low_rank_report(model: nn.Module) -> LowRankReport:
    """Reports on every factorised layer of a model.

    Raises:
        ValueError: If the model has no factorised layer.
    """
    layers = factorised_layers(model)
    if not layers:
        raise ValueError(
            "low_rank_report: the model has no factorised layer. Call get_efx_model(model, LowRankConfig(...))."
        )
    rows = [_layer_report(name, layer) for name, layer in layers.items()]
    total = sum(p.numel() for p in model.parameters())
    return LowRankReport(
        layers=rows,
        dense_layers=[name for name, module in model.named_modules() if type(module) in DENSE_TYPES],
        total_parameters=total,
        total_dense_parameters=total + sum(row.dense_parameters - row.parameters for row in rows),
    )


def factor_metrics(model: nn.Module, learning_rate: float) -> dict[str, float]:
    """Means over the factorised layers for a training log, described in docs/metrics.md; none for a dense model."""
    if not factorised_layers(model):
        return {}
    rows = low_rank_report(model).layers
    columns = {
        "frobenius_norm": [row.frobenius_norm for row in rows],
        "effective_learning_rate": [learning_rate / max(row.frobenius_norm, 1e-12) ** 2 for row in rows],
        "effective_rank_share": [row.effective_rank / row.rank for row in rows],
        "stable_rank": [row.stable_rank for row in rows],
    }
    return {f"low_rank/{name}": sum(values) / len(values) for name, values in columns.items()}


@torch.no_grad()
def _layer_report(name: str, layer: FactorisedLayer) -> LayerReport:
    out_dim, in_dim = layer.weight.shape[1], layer.factor_v.shape[1]
    m = out_dim // layer.blocks
    parameters = layer.blocks * factorised_parameters(m, in_dim, layer.rank)
    spectra = [product_singular_values(u, v) for u, v in layer.factor_pairs()]
    return LayerReport(
        name=name,
        shape=(out_dim, in_dim),
        blocks=layer.blocks,
        rank=layer.rank,
        dense_parameters=out_dim * in_dim,
        parameters=parameters,
        dense_flops=2 * out_dim * in_dim,
        flops=2 * parameters,
        saves=layer.rank < break_even_rank(m, in_dim),
        frobenius_norm=sum(s.square().sum().item() for s in spectra) ** 0.5,
        effective_rank=sum(map(effective_rank, spectra)) / len(spectra),
        stable_rank=sum(map(stable_rank, spectra)) / len(spectra),
    )

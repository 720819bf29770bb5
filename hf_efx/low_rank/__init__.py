"""Low-rank (factorised) training: layers W = U Vᵀ from the start, or from some step on, instead of dense.

"Exploring Low Rank Training of Deep Neural Networks", Kamalakara et al. 2022, arXiv 2209.13569.
"""

from hf_efx.low_rank.arguments import LowRankArguments, LowRankArgumentsMixin
from hf_efx.low_rank.config import LowRankConfig
from hf_efx.low_rank.decay import FactorDecayCallback
from hf_efx.low_rank.layers import FactorisedConv2d, FactorisedLinear
from hf_efx.low_rank.report import LowRankReport, low_rank_report
from hf_efx.low_rank.trainer import LowRankTrainer, LowRankTrainerMixin

__all__ = [
    "FactorDecayCallback",
    "FactorisedConv2d",
    "FactorisedLinear",
    "LowRankArguments",
    "LowRankArgumentsMixin",
    "LowRankConfig",
    "LowRankReport",
    "LowRankTrainer",
    "LowRankTrainerMixin",
    "low_rank_report",
]

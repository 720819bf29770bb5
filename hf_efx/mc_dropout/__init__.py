"""MC dropout: how much the outputs that a model samples with dropout on disagree tells how unsure it is of them.

"Wat zei je? Detecting Out-of-Distribution Translations with Variational Transformers", Xiao, Gomez, Gal 2020,
arXiv 2006.08344.
"""

from hf_efx.mc_dropout.bleuvar import bleuvar, mbr_choice, pairwise_bleu
from hf_efx.mc_dropout.scores import (
    UNCERTAINTIES,
    Evidence,
    TokenStatistics,
    compute_uncertainties,
    register_uncertainty,
    token_statistics,
)

__all__ = [
    "UNCERTAINTIES",
    "Evidence",
    "TokenStatistics",
    "bleuvar",
    "compute_uncertainties",
    "mbr_choice",
    "pairwise_bleu",
    "register_uncertainty",
    "token_statistics",
]

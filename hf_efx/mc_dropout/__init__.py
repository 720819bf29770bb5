"""MC dropout: how much the outputs that a model samples with dropout on disagree tells how unsure it is of them.

"Wat zei je? Detecting Out-of-Distribution Translations with Variational Transformers", Xiao, Gomez, Gal 2020,
arXiv 2006.08344.
"""

from hf_efx.mc_dropout.bleuvar import bleuvar, mbr_choice, pairwise_bleu
from hf_efx.mc_dropout.detection import Detection, detection_difference, detection_report, plot_roc
from hf_efx.mc_dropout.options import TranslationOptions
from hf_efx.mc_dropout.retention import PredictionRejection, prediction_rejection_ratio, retention_curves
from hf_efx.mc_dropout.scores import (
    UNCERTAINTIES,
    Evidence,
    TokenStatistics,
    compute_uncertainties,
    register_uncertainty,
    token_statistics,
)
from hf_efx.mc_dropout.similarity import pairwise_chrf, pairwise_rouge_l, sentence_chrf
from hf_efx.mc_dropout.threshold import DeferralThreshold, choose_threshold
from hf_efx.mc_dropout.translate import Translation, Translator
from hf_efx.mc_dropout.translation_table import score_translations

__all__ = [
    "UNCERTAINTIES",
    "DeferralThreshold",
    "Detection",
    "Evidence",
    "PredictionRejection",
    "TokenStatistics",
    "Translation",
    "TranslationOptions",
    "Translator",
    "bleuvar",
    "choose_threshold",
    "compute_uncertainties",
    "detection_difference",
    "detection_report",
    "mbr_choice",
    "pairwise_bleu",
    "pairwise_chrf",
    "pairwise_rouge_l",
    "plot_roc",
    "prediction_rejection_ratio",
    "register_uncertainty",
    "retention_curves",
    "score_translations",
    "sentence_chrf",
    "token_statistics",
]

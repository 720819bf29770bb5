"""MC dropout: how much the outputs that a model samples with dropout on disagree tells how unsure it is of them.

"Wat zei je? Detecting Out-of-Distribution Translations with Variational Transformers", Xiao, Gomez, Gal 2020,
arXiv 2006.08344. Names are imported when they are first used: whatever imports `transformers.pipelines` imports this.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_efx.mc_dropout.bleu import bleuvar, mbr_choice, pairwise_bleu
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

_PUBLIC = {
    "bleu": ("bleuvar", "mbr_choice", "pairwise_bleu"),
    "detection": ("Detection", "detection_difference", "detection_report", "plot_roc"),
    "options": ("TranslationOptions",),
    "retention": ("PredictionRejection", "prediction_rejection_ratio", "retention_curves"),
    "scores": (
        "UNCERTAINTIES",
        "Evidence",
        "TokenStatistics",
        "compute_uncertainties",
        "register_uncertainty",
        "token_statistics",
    ),
    "similarity": ("pairwise_chrf", "pairwise_rouge_l", "sentence_chrf"),
    "threshold": ("DeferralThreshold", "choose_threshold"),
    "translate": ("Translation", "Translator"),
    "translation_table": ("score_translations",),
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = sorted(_MODULE_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

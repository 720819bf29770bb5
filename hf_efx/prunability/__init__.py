"""Prunability: how much of a network its training loss can do without, as a sign of how well it generalizes."""

from hf_efx.prunability.baselines import BASELINE_MEASURES
from hf_efx.prunability.callback import PrunabilityCallback
from hf_efx.prunability.measure import PrunabilityResult, measure_prunability
from hf_efx.prunability.study import generalization_study

__all__ = [
    "BASELINE_MEASURES",
    "PrunabilityCallback",
    "PrunabilityResult",
    "generalization_study",
    "measure_prunability",
]

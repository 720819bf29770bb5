"""Targeted dropout: training that leaves a network standing its pruning; pruning, shrinking, pruning curves.

"Learning Sparse Networks Using Targeted Dropout", Gomez, Zhang, Kamalakara, Madaan, Swersky, Gal, Hinton 2019,
arXiv 1905.13678.
"""

from hf_efx.core.model.block_map import Block
from hf_efx.core.results.curves import PruningCurve
from hf_efx.targeted_dropout.callback import TargetedDropoutCallback
from hf_efx.targeted_dropout.config import TargetedDropoutConfig
from hf_efx.targeted_dropout.curve import PruningCurveCallback, pruning_curve
from hf_efx.targeted_dropout.plan import PruningReport
from hf_efx.targeted_dropout.pruning import prune
from hf_efx.targeted_dropout.shrink import shrink

__all__ = [
    "Block",
    "PruningCurve",
    "PruningCurveCallback",
    "PruningReport",
    "TargetedDropoutCallback",
    "TargetedDropoutConfig",
    "prune",
    "pruning_curve",
    "shrink",
]

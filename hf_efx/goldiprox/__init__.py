"""GoldiProx: a small proxy chooses a sequence of training points, which any other model trains on; it can be shared.

"Prioritized training on points that are learnable, worth learning, and not yet learnt", Mindermann et al. 2021,
arXiv 2107.02565.
"""

from hf_efx.goldiprox.replay import ReplayMixin, ReplayTrainer
from hf_efx.goldiprox.sequence import SelectionSequence
from hf_efx.goldiprox.trainer import GoldiProxMixin, GoldiProxTrainer

__all__ = ["GoldiProxMixin", "GoldiProxTrainer", "ReplayMixin", "ReplayTrainer", "SelectionSequence"]

"""SliceOut: dropout that drops a contiguous slice of units, so that the matrices get smaller.

"SliceOut: Training Transformers and CNNs faster while using less memory", Notin, Gomez, Yoo, Gal 2020,
arXiv 2007.10909.
"""

from hf_efx.core.model.block_map import Block
from hf_efx.slice_out.callback import SliceOutCallback
from hf_efx.slice_out.config import SliceOutConfig
from hf_efx.slice_out.report import SliceOutReport, slice_out_report

__all__ = ["Block", "SliceOutCallback", "SliceOutConfig", "SliceOutReport", "slice_out_report"]

"""The parts of an architecture that the methods need to know: a dataclass for each model type.

Only names stand here, never a copy of a model's forward. A new model type is a new row in `BLOCK_MAPS`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True)
class BlockMap:
    """Names of an architecture's parts, as suffixes of module names.

    Attributes:
        fused: Modules whose output stacks several projections of equal size, with their number: each is a matrix of
            its own, and a shared decomposition would serve the one that dominates.
    """

    fused: Mapping[str, int] = field(default_factory=dict)

    def blocks_of(self, name: str) -> int:
        """Number of stacked projections in the module of that name, 1 for an ordinary one."""
        for suffix, blocks in self.fused.items():
            if name == suffix or name.endswith(f".{suffix}"):
                return blocks
        return 1


BLOCK_MAPS: dict[str, BlockMap] = {
    # GPT-2 stacks query, key, value in c_attn; in cross-attention key and value alone.
    "gpt2": BlockMap(fused={"crossattention.c_attn": 2, "attn.c_attn": 3}),
}


def block_map(model: nn.Module) -> BlockMap:
    """The block map of a model, by its config's `model_type`; an empty one for unknown types and plain modules."""
    return BLOCK_MAPS.get(getattr(getattr(model, "config", None), "model_type", ""), BlockMap())

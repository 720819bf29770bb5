"""Prunes a trained network by the criterion that it was trained with: weights or whole units become zero, in place.

"Learning Sparse Networks Using Targeted Dropout", Gomez et al. 2019, arXiv 1905.13678. The masks are those of
`core/model/masks.py`; torch.nn.utils.prune gives the same ones (its l1_unstructured is scope "layer", its
global_unstructured scope "global", its ln_structured with n=2 and dim=0 the unit columns of a Linear), but keeps a
mask and a second copy of each weight, under other state-dict keys.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from hf_efx.core.model.block_map import Block
from hf_efx.core.model.record import check_pruned, mark_pruned
from hf_efx.core.model.targets import warn_of_skipped
from hf_efx.targeted_dropout.config import TargetedDropoutConfig
from hf_efx.targeted_dropout.plan import PruningPlan, PruningReport

Granularity = Literal["weight", "unit"]
Scope = Literal["column", "layer", "global"]


def prune(
    model: nn.Module,
    fraction: float,
    granularity: Granularity | None = None,
    scope: Scope | None = None,
    *,
    target_modules: list[str] | str | None = None,
    exclude_modules: list[str] | str | None = None,
    blocks: Sequence[Block] | None = None,
    config: TargetedDropoutConfig | None = None,
) -> PruningReport:
    """Sets the weakest weights or units to zero, in place, and flags the model as pruned in `config.efx`.

    Of a model that targeted dropout was trained on, `prune(model, fraction)` takes what `config.efx` says was trained,
    by each config's own granularity and scope. The model stays a plain dense one with the same keys, whose zeros
    optimizers leave at zero; of a loaded model `get_efx_model(model)` or an EfxTrainer puts that back. Pruning again
    by the same fraction changes nothing.

    Args:
        model: Any `torch.nn.Module`; of a wrapped one the transformers model inside, under its own names.
        fraction: Share that becomes zero, from 0 to below 1, rounded down to a whole number in each group of the
            scope. 0 prunes nothing and takes the flag off: zeros may be trained again.
        granularity: "weight", by magnitude; or "unit", by the L2 norm of incoming weights: FFN features, attention
            heads (groups that share keys) and channels between two convolutions, with their biases, a batch norm's
            scale and shift, and what reads them; of a model that the block map doesn't know, output columns with
            their biases. None: as trained, else "weight".
        scope: Among which the weakest are found: each output unit's weights ("column"), each layer's ("layer"), or
            all of a config ("global"). Of units the first two are the same: the equal counts that `shrink` needs.
            None: as trained, else "column".
        target_modules: As in `TargetedDropoutConfig`. Without it, exclude_modules and blocks: the modules that
            `config.efx` says targeted dropout was trained on, else every Linear, Conv1D and Conv2d that is no
            embedding, stem or head.
        exclude_modules: Modules to leave alone.
        blocks: Rows that describe the blocks of units, in the place of the block map's.
        config: In the place of the five options before: prunes as `TargetedDropoutConfig` says, its layers too. So a
            baseline is pruned as the model that it is compared with.

    Returns:
        What is left of each layer.

    Raises:
        ValueError: For a fraction out of range or of nothing, one that empties a layer, NaN, a named module that can't
            be pruned (tied, quantised, factorised), a quantised, sharded or offloaded model, or one with a peft
            adapter: merge that first. The model is unchanged then.
    """
    plan = PruningPlan.of(model, granularity, scope, target_modules, exclude_modules, blocks, config)
    if fraction == 0:
        mark_pruned(plan.model, {})
        return plan.report(0.0)
    changes = plan.changes(fraction)
    if target_modules is None and (config is None or config.target_modules in (None, "all-linear")):
        warn_of_skipped(plan.model)
    flags = check_pruned(plan.model)
    with torch.no_grad():
        for change in changes:
            for tensor, mask in change.zeros:
                tensor.masked_fill_(mask, 0)
            flags[change.name] = {**flags.get(change.name, {}), **change.flag}
    mark_pruned(plan.model, flags)
    return plan.report(fraction)

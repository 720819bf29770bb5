"""Prunes a trained network by the criterion that it was trained with: weights or whole units become zero, in place.

"Learning Sparse Networks Using Targeted Dropout", Gomez et al. 2019, arXiv 1905.13678. The masks are those of
`core/model/masks.py`; torch.nn.utils.prune gives the same ones (its l1_unstructured is scope "layer", its
global_unstructured scope "global", its ln_structured with n=2 and dim=0 the unit columns of a Linear), but keeps a
mask and a second copy of each weight, under other state-dict keys.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from hf_efx.core.model.block_map import Block
from hf_efx.core.model.block_units import named, unit_groups
from hf_efx.core.model.masks import UnitGroup, unit_columns, unit_norms, weak_units, weak_weights
from hf_efx.core.model.method_config import EfxMethodConfig
from hf_efx.core.model.pruned import Zeros
from hf_efx.core.model.record import QUANT_METHOD, efx_record, entry_config, mark_pruned, pruned_modules
from hf_efx.core.model.swap import refuse_offloaded, swap_class
from hf_efx.core.model.targets import match_targets, unsuitable

GRANULARITIES = ("weight", "unit")


@dataclass(frozen=True)
class LayerPruning:
    """One layer, or one group of units, after pruning.

    Attributes:
        name: Of the module, or of the first module that emits the units.
        total: Its weights or units.
        kept: Those that aren't zero.
    """

    name: str
    total: int
    kept: int


@dataclass(frozen=True)
class PruningReport:
    """What pruning left, layer by layer.

    Attributes:
        fraction: As asked for.
        granularity: "weight" or "unit".
        scope: "column", "layer" or "global".
        layers: A row for each layer or group of units.
        parameters: Of the whole model, tied ones counted once.
        nonzero_parameters: Those of them that aren't zero.
    """

    fraction: float
    granularity: str
    scope: str
    layers: list[LayerPruning]
    parameters: int
    nonzero_parameters: int

    @property
    def sparsity(self) -> float:
        """Share of the layers' weights or units that is zero."""
        return 1 - sum(row.kept for row in self.layers) / sum(row.total for row in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {**asdict(self), "sparsity": self.sparsity}

    def __str__(self) -> str:
        lines = [f"{'layer':52} {self.granularity + 's':>12} {'kept':>12} {'share':>6}"]
        lines += [f"{r.name:52} {r.total:12,d} {r.kept:12,d} {r.kept / r.total:6.1%}" for r in self.layers]
        share = self.nonzero_parameters / self.parameters
        lines.append(
            f"{self.sparsity:.1%} of the {self.granularity}s pruned (asked: {self.fraction:.1%}, scope {self.scope}); "
            f"whole model: {self.nonzero_parameters:,} of {self.parameters:,} parameters aren't zero ({share:.1%})"
        )
        return "\n".join(lines)


def prune(
    model: nn.Module,
    fraction: float,
    granularity: Literal["weight", "unit"] = "weight",
    scope: Literal["column", "layer", "global"] = "column",
    *,
    target_modules: list[str] | str | None = None,
    exclude_modules: list[str] | str | None = None,
    blocks: Sequence[Block] | None = None,
) -> PruningReport:
    """Sets the weakest weights or units to zero, in place, and flags the model as pruned in `config.efx`.

    The model stays a plain dense one with the same keys. From now on optimizers leave its zeros at zero; of a saved
    and loaded model `get_efx_model(model)` or an EfxTrainer puts that back. Pruning again by the same fraction changes
    nothing.

    Args:
        model: Any `torch.nn.Module`.
        fraction: Share that becomes zero, from 0 to below 1, rounded down to a whole number in each group of the
            scope. 0 prunes nothing and takes the flag off: zeros may be trained again.
        granularity: "weight", by magnitude; or "unit", by the L2 norm of a unit's incoming weights: FFN features,
            attention heads (groups of them, where keys and values are shared) and the channels between two
            convolutions. With a unit go its biases, the scale and shift of a batch norm that follows, and what reads
            it. Of a model that the block map doesn't know units are the output columns of each layer, with its bias.
        scope: Among which the weakest are found: "column", of each output unit's weights alone; "layer", of each
            layer; "global", of all layers together. Of units "column" and "layer" are the same: the equal counts that
            `shrink` needs.
        target_modules: As in `TargetedDropoutConfig`. Without it the modules that `config.efx` says targeted dropout
            was trained on, else every Linear, Conv1D and Conv2d that is no embedding, stem or head.
        exclude_modules: Modules to leave alone.
        blocks: Rows that describe the blocks of units, in the place of the block map's.

    Returns:
        What is left of each layer.

    Raises:
        ValueError: For a fraction out of range or of nothing, one that empties a layer, NaN, a named module that can't
            be pruned (tied, quantised, factorised), a quantised, sharded or offloaded model, or one with a peft
            adapter: merge that first. The model is unchanged then.
    """
    plan = PruningPlan.of(model, granularity, scope, target_modules, exclude_modules, blocks)
    if fraction == 0:
        mark_pruned(model, {})
        return plan.report(0.0)
    changes = plan.changes(fraction)
    with torch.no_grad():
        for change in changes:
            for tensor, mask in change.zeros:
                tensor.masked_fill_(mask, 0)
    flags = pruned_modules(model)
    for change in changes:
        flags[change.name] = {**flags.get(change.name, {}), **change.flag}
    mark_pruned(model, flags)
    return plan.report(fraction)


@dataclass(frozen=True)
class Change:
    """What pruning does to one module.

    Attributes:
        name: Of the module.
        zeros: Its tensors, with where they become zero.
        flag: The module's entry in `config.efx`, see core/model/pruned.py.
    """

    name: str
    zeros: list[Zeros]
    flag: dict[str, Any]


@dataclass(frozen=True)
class PruningPlan:
    """What may be pruned in a model, and how its weakest parts are found.

    Attributes:
        model: The model.
        granularity: "weight" or "unit".
        scope: "column", "layer" or "global".
        modules: The layers, by name; of units their members.
        groups: The groups of units.
    """

    model: nn.Module
    granularity: str
    scope: str
    modules: dict[str, nn.Module]
    groups: list[UnitGroup]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        granularity: str = "weight",
        scope: str = "column",
        target_modules: list[str] | str | None = None,
        exclude_modules: list[str] | str | None = None,
        blocks: Sequence[Block] | None = None,
    ) -> "PruningPlan":
        """The plan for these options; see `prune` for them and for what is raised."""
        if granularity not in GRANULARITIES:
            raise ValueError(f"granularity={granularity!r}: expected one of {', '.join(GRANULARITIES)}.")
        if granularity == "weight" and blocks is not None:
            raise ValueError("blocks describe units: pass granularity='unit', or leave them out.")
        check_model(model)
        targets, rows = _targets(model, target_modules, exclude_modules, blocks)
        with whole(model):
            if granularity == "weight":
                groups, modules = [], match_targets(model, targets)
            else:
                groups = chosen_groups(model, targets, rows)
                modules = {name: model.get_submodule(name) for group in groups for name in group.members}
        for name, module in modules.items():
            refuse_offloaded(name, module)
        return cls(model, granularity, scope, modules, groups)

    def changes(self, fraction: float) -> list[Change]:
        """What pruning by a fraction above 0 does, module by module; nothing is written.

        Raises:
            ValueError: For a fraction out of range or of nothing, one that empties a layer, or NaN.
        """
        if not 0 <= fraction < 1:
            raise ValueError(f"fraction={fraction!r}: expected a share from 0 to below 1, such as 0.9.")
        if self.granularity == "weight":
            masks = weak_weights(self.modules, fraction, self.scope)
        else:
            masks = weak_units(self.modules, self.groups, fraction, self.scope)
        for name, mask in masks.items():
            if mask.all():
                raise ValueError(
                    f"fraction={fraction} with scope={self.scope!r} would empty {name!r}: all its {mask.numel():,} "
                    f"{self.granularity}s are among the weakest. Lower the fraction, leave the layer out with "
                    f"exclude_modules, or use scope='layer', which takes the same share of every layer."
                )
        if fraction and not any(bool(mask.any()) for mask in masks.values()):
            size = max(mask.numel() for mask in masks.values())
            raise ValueError(
                f"fraction={fraction} with scope={self.scope!r} prunes nothing: rounded down it is no whole "
                f"{self.granularity} (the largest layer has {size:,}). Raise the fraction, or widen the scope."
            )
        if self.granularity == "weight":
            weights: list[Any] = [self.modules[name].weight for name in masks]
            return [Change(n, [(w, m)], {}) for w, (n, m) in zip(weights, masks.items(), strict=True) if m.any()]
        return [c for group in self.groups if masks[group.name].any() for c in self._unit(group, masks[group.name])]

    def _unit(self, group: UnitGroup, mask: torch.Tensor) -> Iterator[Change]:
        """What goes with the masked units of a group."""
        for name, stacked in group.emits.items():
            module: Any = self.modules[name]
            columns = unit_columns(mask, out_features(module), stacked)
            bias = [] if module.bias is None else [(module.bias, columns)]
            yield Change(name, [(module.weight, along(columns, module, reads=False)), *bias], {"bias": True})
        for name in group.norms:
            norm: Any = self.modules[name]
            own = [(p, mask) for p in (norm.weight, norm.bias) if p is not None]
            yield Change(name, own, {"follows": next(iter(group.emits))})
        for name in group.reads:
            reader: Any = self.modules[name]
            columns = unit_columns(mask, in_features(reader))
            yield Change(name, [(reader.weight, along(columns, reader, reads=True))], {})

    @torch.no_grad()
    def report(self, fraction: float) -> PruningReport:
        """What is there now."""
        if self.granularity == "weight":
            weights: dict[str, Any] = {name: module.weight for name, module in self.modules.items()}
            rows = [LayerPruning(n, w.numel(), int(w.count_nonzero())) for n, w in weights.items()]
        else:
            rows = [
                LayerPruning(g.name, g.size, int(unit_norms(self.modules, g).count_nonzero())) for g in self.groups
            ]
        parameters = list(self.model.parameters())
        return PruningReport(
            fraction=fraction,
            granularity=self.granularity,
            scope=self.scope,
            layers=rows,
            parameters=sum(p.numel() for p in parameters),
            nonzero_parameters=sum(int(p.count_nonzero()) for p in parameters),
        )


def out_features(module: nn.Module) -> int:
    """Features or channels that a Linear, Conv1D or Conv2d gives."""
    weight: Any = module.weight
    return weight.shape[1 if isinstance(module, Conv1D) else 0]


def in_features(module: nn.Module) -> int:
    """Features or channels that a Linear, Conv1D or Conv2d takes."""
    weight: Any = module.weight
    return weight.shape[0 if isinstance(module, Conv1D) else 1]


def along(columns: torch.Tensor, module: nn.Module, reads: bool) -> torch.Tensor:
    """A value for each output (`reads`: input) of a module, spread over its weight's shape: a view."""
    weight: Any = module.weight
    dim = int(reads != isinstance(module, Conv1D))
    return columns.view([-1 if i == dim else 1 for i in range(weight.dim())]).expand_as(weight)


@dataclass
class PruningTargets(EfxMethodConfig):
    """Which modules are pruned, in the words of every method's config."""

    method: ClassVar[str] = "targeted_dropout"
    changes_skeleton: ClassVar[bool] = False


def _targets(
    model: nn.Module,
    target_modules: list[str] | str | None,
    exclude_modules: list[str] | str | None,
    blocks: Sequence[Block] | None,
) -> tuple[PruningTargets, Iterable[Block] | None]:
    """The options, or those that the model's targeted dropout was trained with where nothing else is said."""
    entries = [e for e in (efx_record(model) or {"methods": []})["methods"] if e["method"] == PruningTargets.method]
    if target_modules is None and exclude_modules is None and blocks is None and len(entries) == 1:
        trained: Any = entry_config(entries[0])
        names = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
        return PruningTargets(**{name: getattr(trained, name) for name in names}), getattr(trained, "blocks", None)
    return PruningTargets(target_modules=target_modules, exclude_modules=exclude_modules), blocks


def chosen_groups(model: nn.Module, targets: EfxMethodConfig, blocks: Iterable[Block] | None) -> list[UnitGroup]:
    """The groups of units that the options name; by default those all of whose modules can be changed."""
    found = find_groups(model, blocks)
    by_default = targets.target_modules in (None, "all-linear") and blocks is None
    reasons = {group.name: _unsuitable(model, group) for group in found}
    chosen = [g for g in found if not (by_default and reasons[g.name]) and named(g.members, targets)]
    for group in chosen:
        if reasons[group.name]:
            raise ValueError(
                f"{reasons[group.name]}. Leave its block out with exclude_modules=[{group.members[0]!r}]."
            )
    if not chosen:
        there = ", ".join(group.name for group in found[:6])
        raise ValueError(
            f"target_modules={targets.target_modules!r}, exclude_modules={targets.exclude_modules!r} leave no units "
            f"of {type(model).__name__} to prune. Its blocks are called by their first modules, among others: "
            f"{there or 'none (name them with blocks=[Block(...)])'}."
        )
    return chosen


def find_groups(model: nn.Module, blocks: Iterable[Block] | None) -> list[UnitGroup]:
    """All groups of units of a model, see `core.block_units.unit_groups`.

    Raises:
        ValueError: If a row fits nowhere, or one of its modules holds no plain matrix.
    """
    try:
        return unit_groups(model, blocks)
    except TypeError as error:
        raise ValueError(
            f"Units can't be found where a layer's weight isn't one plain matrix: {error} Call "
            f"hf_efx.merge_and_unload(model) on a factorised model, or unload(model) on one with SliceOut, first."
        ) from error


def _unsuitable(model: nn.Module, group: UnitGroup) -> str | None:
    for name in group.members:
        module = model.get_submodule(name)
        if name in group.norms:
            reason = None if isinstance(module, nn.BatchNorm2d) else f"it is a {type(module).__name__}"
        else:
            reason = unsuitable(model, name, module)
        if reason:
            return f"Units of {group.name!r} can't be pruned: module {name!r} can't be changed, since {reason}"
    return None


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Shows modules that targeted dropout acts on by their own class, whose weights are whole."""
    changed = [(m, type(m)) for m in model.modules() if hasattr(m, "whole_class")]
    try:
        for module, _ in changed:
            swap_class(module, module.whole_class)  # pyright: ignore[reportArgumentType]
        yield
    finally:
        for module, own in changed:
            swap_class(module, own)


def check_model(model: nn.Module) -> None:
    """Refuses models whose weights can't be set to zero, or wouldn't stay so."""
    if hasattr(model, "peft_config"):
        raise ValueError(
            f"{type(model).__name__} carries a peft adapter, which would fill the zeros when it is merged: merge it "
            f"first (model = model.merge_and_unload()), and prune the merged model."
        )
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and quantizer.quantization_config.quant_method != QUANT_METHOD:
        raise ValueError(
            f"The model is quantised ({quantizer.quantization_config.quant_method}): its weights are packed integers. "
            f"Load it without quantization_config, prune, then quantise."
        )
    sharded = [name for name, p in model.named_parameters() if isinstance(p, DTensor) or p.is_meta]
    if sharded:
        raise ValueError(
            f"The weight {sharded[0]!r} is sharded or on the meta device, so that its weakest entries can't be found: "
            f"prune a whole model, before it is wrapped."
        )

"""What pruning would do to a model: which parts it acts on, and what of them is weakest. Nothing is written here."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from hf_efx.core.model.block_map import Block
from hf_efx.core.model.masks import UnitGroup, unit_columns, unit_norms, weak_units, weak_weights
from hf_efx.core.model.method_config import EfxMethodConfig, fields_of
from hf_efx.core.model.pruned import Zeros
from hf_efx.core.model.record import efx_record, entry_config, plan_for, refuse_foreign
from hf_efx.core.model.swap import refuse_offloaded, swap_class
from hf_efx.core.model.targets import unsuitable, weight_owners
from hf_efx.core.model.wrappers import inner_model, unwrap_model
from hf_efx.targeted_dropout.config import TargetedDropoutConfig
from hf_efx.targeted_dropout.units import along, group_unsuitable, in_features, out_features, planned_groups


@dataclass(frozen=True)
class LayerPruning:
    """One layer, or one group of units, after pruning.

    Attributes:
        name: Of the module, or of the first module that emits the units.
        total: Its weights or units.
        kept: Those that aren't zero.
        granularity: Which of the two: "weight" or "unit".
    """

    name: str
    total: int
    kept: int
    granularity: str = "weight"


@dataclass(frozen=True)
class PruningReport:
    """What pruning left, layer by layer.

    Attributes:
        fraction: As asked for.
        granularity: "weight" or "unit"; "weight, unit" where a model was trained with a config for each.
        scope: "column", "layer" or "global", or several likewise.
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
        """Share of the layers' weights or units that is zero, each counted as one."""
        return 1 - sum(row.kept for row in self.layers) / sum(row.total for row in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {**asdict(self), "sparsity": self.sparsity}

    def __str__(self) -> str:
        what = self.granularity.replace(", ", "s and ") + "s"
        lines = [f"{'layer':52} {what:>12} {'kept':>12} {'share':>6}"]
        lines += [f"{r.name:52} {r.total:12,d} {r.kept:12,d} {r.kept / r.total:6.1%}" for r in self.layers]
        share = self.nonzero_parameters / self.parameters
        lines.append(
            f"{self.sparsity:.1%} of the {what} pruned (asked: {self.fraction:.1%}, scope {self.scope}); "
            f"whole model: {self.nonzero_parameters:,} of {self.parameters:,} parameters aren't zero ({share:.1%})"
        )
        return "\n".join(lines)


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
class Part:
    """What is pruned by one criterion.

    Attributes:
        granularity: "weight" or "unit".
        scope: "column", "layer" or "global".
        modules: The layers, by name; of units their members.
        groups: The groups of units.
    """

    granularity: str
    scope: str
    modules: dict[str, nn.Module]
    groups: list[UnitGroup]

    @classmethod
    def of(cls, model: nn.Module, config: TargetedDropoutConfig) -> "Part":
        """What a config chooses in a model."""
        with whole(model):
            groups = config.groups(model) if config.granularity == "unit" else []
            modules = config.match(model)
        return cls(config.granularity, config.scope, modules, groups)

    @classmethod
    def trained(cls, model: nn.Module, entry: dict[str, Any], granularity: str | None, scope: str | None) -> "Part":
        """What an entry of `config.efx` says was trained, by its own granularity and scope or those given."""
        config = cast(TargetedDropoutConfig, entry_config(entry))
        if granularity not in (None, config.granularity):
            where = {name: getattr(config, name) for name in fields_of(EfxMethodConfig)}
            return cls.of(model, TargetedDropoutConfig(granularity=granularity, scope=scope or "column", **where))
        plan = plan_for(model, entry["modules"])
        groups = planned_groups(plan) if config.granularity == "unit" else []
        modules = {name: model.get_submodule(name) for name in plan}
        with whole(model):
            owners = weight_owners(model)
            reasons = [group_unsuitable(model, group, owners) for group in groups]
            for name, module in modules.items() if not groups else ():
                reason = unsuitable(model, name, module, owners)
                reasons.append(reason and f"Module {name!r}, on which it was trained, can't be pruned, since {reason}")
        if any(reasons):
            raise ValueError(f"{next(filter(None, reasons))}. Name what is to be pruned in target_modules.")
        return cls(config.granularity, scope or config.scope, modules, groups)

    def masks(self, fraction: float) -> dict[str, torch.Tensor]:
        """Where the weakest weights of each module, or units of each group, are.

        Raises:
            ValueError: If a layer would be empty, or for NaN.
        """
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
        return masks

    def changes(self, masks: Mapping[str, torch.Tensor]) -> list[Change]:
        """What becomes zero, module by module."""
        if self.granularity == "weight":
            weights: dict[str, Any] = {name: self.modules[name].weight for name in masks}
            return [Change(name, [(weights[name], mask)], {}) for name, mask in masks.items() if mask.any()]
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

    def rows(self) -> list[LayerPruning]:
        """What is there now."""
        if self.granularity == "weight":
            weights: dict[str, Any] = {name: module.weight for name, module in self.modules.items()}
            return [LayerPruning(n, w.numel(), int(w.count_nonzero())) for n, w in weights.items()]
        kept = {group.name: int(unit_norms(self.modules, group).count_nonzero()) for group in self.groups}
        return [LayerPruning(group.name, group.size, kept[group.name], "unit") for group in self.groups]


@dataclass(frozen=True)
class PruningPlan:
    """What may be pruned in a model, and how its weakest parts are found.

    Attributes:
        model: The model inside wrappers.
        parts: What is pruned, each part by its own criterion: one, or one for each config that was trained.
    """

    model: nn.Module
    parts: list[Part]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        granularity: str | None = None,
        scope: str | None = None,
        target_modules: list[str] | str | None = None,
        exclude_modules: list[str] | str | None = None,
        blocks: Sequence[Block] | None = None,
        config: TargetedDropoutConfig | None = None,
    ) -> "PruningPlan":
        """The plan for these options; see `prune` for them and for what is raised."""
        check_model(unwrap_model(model))
        model = inner_model(model)
        check_model(model)
        where = {"target_modules": target_modules, "exclude_modules": exclude_modules, "blocks": blocks}
        given = {n: v for n, v in {"granularity": granularity, "scope": scope, **where}.items() if v is not None}
        if config is not None and given:
            name, value = next(iter(given.items()))
            raise ValueError(f"{name}={value!r} stands beside config, which says that itself: pass one of them.")
        record = efx_record(model) or {"methods": []}
        trained = [entry for entry in record["methods"] if entry["method"] == TargetedDropoutConfig.method]
        if config is not None:
            parts = [Part.of(model, config)]
        elif trained and not given.keys() & where.keys():
            TargetedDropoutConfig(**given)  # checks the words
            parts = [Part.trained(model, entry, granularity, scope) for entry in trained]
        else:
            parts = [Part.of(model, TargetedDropoutConfig(**{**_criterion(trained, granularity), **given}))]
        for name, module in (item for part in parts for item in part.modules.items()):
            refuse_offloaded(name, module)
        return cls(model, parts)

    def changes(self, fraction: float) -> list[Change]:
        """What pruning by a fraction above 0 does, module by module; nothing is written.

        Raises:
            ValueError: For a fraction out of range or of nothing, one that empties a layer, or NaN.
        """
        if not 0 <= fraction < 1:
            raise ValueError(f"fraction={fraction!r}: expected a share from 0 to below 1, such as 0.9.")
        masks = [part.masks(fraction) for part in self.parts]
        if fraction and not any(bool(mask.any()) for part in masks for mask in part.values()):
            part, found = self.parts[0], masks[0]
            size = max(mask.numel() for mask in found.values())
            raise ValueError(
                f"fraction={fraction} with scope={part.scope!r} prunes nothing: rounded down it is no whole "
                f"{part.granularity} (the largest layer has {size:,}). Raise the fraction, or widen the scope."
            )
        return [change for part, found in zip(self.parts, masks, strict=True) for change in part.changes(found)]

    @property
    def granularity(self) -> str:
        """Of its parts, each that there is."""
        return ", ".join(dict.fromkeys(part.granularity for part in self.parts))

    @property
    def scope(self) -> str:
        """Of its parts, each that there is."""
        return ", ".join(dict.fromkeys(part.scope for part in self.parts))

    @torch.no_grad()
    def report(self, fraction: float) -> PruningReport:
        """What is there now."""
        parameters = list(self.model.parameters())
        return PruningReport(
            fraction=fraction,
            granularity=self.granularity,
            scope=self.scope,
            layers=[row for part in self.parts for row in part.rows()],
            parameters=sum(p.numel() for p in parameters),
            nonzero_parameters=sum(int(p.count_nonzero()) for p in parameters),
        )


def _criterion(trained: Sequence[dict[str, Any]], granularity: str | None) -> dict[str, str]:
    """Granularity and scope of modules that are named: as config.efx says, where that is one answer."""
    configs: list[Any] = [entry_config(entry) for entry in trained]
    kinds = {config.granularity for config in configs}
    if granularity is None and len(kinds) > 1:
        raise ValueError(
            "granularity=None: config.efx says that weights were trained, and units. Say which of them the modules "
            "named are to lose: granularity='weight' or 'unit'."
        )
    kind = granularity or next(iter(kinds), "weight")
    scopes = {config.scope for config in configs if config.granularity == kind}
    return {"granularity": kind, "scope": next(iter(scopes)) if len(scopes) == 1 else "column"}


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
    refuse_foreign(
        model, adapter="merge it first (model = model.merge_and_unload()), for merging later would fill the zeros"
    )
    sharded = [name for name, p in model.named_parameters() if isinstance(p, DTensor) or p.is_meta]
    if sharded:
        raise ValueError(
            f"The weight {sharded[0]!r} is sharded or on the meta device, so that its weakest entries can't be found: "
            f"prune a whole model, before it is wrapped."
        )

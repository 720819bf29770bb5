"""Modules that drop weights or units in training steps, and are the dense ones otherwise.

A module is swapped by its class, in place: parameters, state-dict keys and hooks stay, and nothing is ever written
into a weight. All modules of a config share a `Dropping`, which finds the candidates and draws.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from hf_efx.core.model.masks import UnitGroup, unit_columns, weak_units, weak_weights
from hf_efx.core.model.swap import hook_kept, swap_class
from hf_efx.core.training.step_context import StepContext
from hf_efx.targeted_dropout.functional import Drop, Penalty, Product, draw_kept, dropped_product
from hf_efx.targeted_dropout.schedule import ramp_factors

logger = logging.getLogger(__name__)

_DROPPING = "_targeted_dropout"  # in the __dict__ of a swapped module


@dataclass(eq=False)
class Dropping:
    """What a config drops in a model: the candidates, and the draw of each pass.

    Attributes:
        config: The TargetedDropoutConfig.
        context: Where the run is, and its random numbers.
        model: The model that `members` are in.
        modules: Layers by name: those whose weights are dropped, or of units all that emit them.
        groups: The groups of units; empty where weights are dropped.
        members: The modules that drop, by name.
        spared: By module or group: True for weights or units that aren't candidates. Empty before the first step.
        penalties: Of this step, by module, where there is an L1 penalty.
    """

    config: Any
    context: StepContext
    model: nn.Module
    modules: dict[str, nn.Module]
    groups: list[UnitGroup]
    members: dict[str, nn.Module] = field(default_factory=dict)
    spared: dict[str, torch.Tensor] = field(default_factory=dict)
    penalties: dict[str, Penalty] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._put_on = self.config.method_fields()
        self._last_step: int | None = None

    def factors(self) -> tuple[float, float]:
        """Targeting and rate at this step."""
        config = self.config
        targeting, rate = ramp_factors(config.ramp, self.context.step, config.ramp_steps or self.context.max_steps)
        return config.targeting * targeting, config.rate * rate

    def at_step_begin(self) -> None:
        """Renews the candidates where it is time.

        Raises:
            ValueError: At a run's first step, for what can't be trained; for NaN weights (the module is named).
        """
        config, step = self.config, self.context.step
        if self._last_step is None or step != self._last_step + 1:  # a run begins: what an earlier one left is stale
            self._check()
            self.spared = {} if self._last_step is not None else self.spared
        self._last_step = step
        self.penalties = {name: Penalty(config.l1) for name in self.modules} if config.l1 else {}
        targeting, _ = self.factors()
        if config.selection != "random" and config.rate and (not self.spared or step % config.refresh_every == 0):
            self.refresh(targeting)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The candidates, for a checkpoint; none where the next step renews them."""
        return {} if (self.context.step + 1) % self.config.refresh_every == 0 else self.spared

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Takes a checkpoint's candidates."""
        self.spared, self._last_step = state, None

    @torch.no_grad()
    def refresh(self, targeting: float) -> None:
        """Finds the candidates among today's weights."""
        if self.groups:
            weak = weak_units(self.modules, self.groups, targeting, self.config.scope)
        else:
            weak = weak_weights(self.modules, targeting, self.config.scope)
        self.spared = {name: mask.logical_not_() for name, mask in weak.items()}

    def _check(self) -> None:
        now = self.config.method_fields()
        if now != self._put_on:
            raise ValueError(
                f"The config of targeted dropout was changed after it was put on: it says {now}, config.efx "
                f"{self._put_on}. Call hf_efx.unload(model), then get_efx_model with the new one."
            )
        if self.config.l1:
            frozen = [name for name, module in self.modules.items() if not module.weight.requires_grad]
            if frozen:
                raise ValueError(
                    f"l1={self.config.l1!r} can't act on {frozen[0]}.weight, which is frozen (by an adapter on top, "
                    f"for one): train it, leave it out with exclude_modules, or set l1=0."
                )
        there = dict(self.model.named_modules())
        for name, member in {**self.modules, **self.members}.items():
            weight: Any = member.weight
            if isinstance(weight, DTensor) or weight.numel() == 0:
                raise ValueError(
                    f"{name}.weight is sharded (FSDP, DeepSpeed ZeRO-3), so that its weakest entries can't be found: "
                    f"train targeted dropout with DDP."
                )
            found = there.get(name)
            if getattr(found, "base_layer", found) is not member:  # of an adapter on top
                raise ValueError(
                    f"Module {name!r} was replaced after targeted dropout was put on it (resize_token_embeddings does "
                    f"that to an output layer). Call hf_efx.unload(model), then get_efx_model with the config again."
                )

    def kept(self, name: str, shape: torch.Size, device: torch.device) -> torch.Tensor | None:
        """What of a module's weights, or of a group's units, is kept here and now; None for all."""
        _, rate = self.factors()
        generator = self.context.generator(f"targeted_dropout/{name}", device=device)
        if generator is None or rate == 0:
            return None
        spared = self.spared.get(name)
        if spared is not None and spared.device != device:
            spared = self.spared[name] = spared.to(device)
        return draw_kept(spared, rate, generator, shape=shape, device=device)

    def size(self) -> int:
        """Number of weights in the modules."""
        weights: list[Any] = [module.weight for module in self.modules.values()]
        return sum(weight.numel() for weight in weights)

    def dropped_share(self) -> float:
        """Share of all weights, or units, that a pass drops, in the mean."""
        targeting, rate = self.factors()
        if self.config.selection == "random":
            return rate
        if not self.spared:
            return rate * targeting
        total = sum(mask.numel() for mask in self.spared.values())
        return rate * sum(mask.numel() - int(mask.sum()) for mask in self.spared.values()) / total

    @property
    def scale(self) -> float:
        """What kept weights are multiplied by: 1 / (1 - rate) of plain dropout, 1 of the targeted one."""
        return 1 / (1 - self.factors()[1]) if self.config.selection == "random" else 1.0


@dataclass(frozen=True)
class Role:
    """What a swapped module drops of: its own weights, or units.

    Attributes:
        name: The module's, or that of the group of units.
        size: Number of units; 0 for weights.
        stacked: How many times the units stand side by side in the module's outputs; 0 for its inputs.
    """

    name: str
    size: int = 0
    stacked: int = 0


class TargetedMember(nn.Module):
    """What the swapped classes share: `forward` drops in training steps, and is the dense one otherwise.

    Attributes:
        whole_class: The dense class, whose forward sees the whole weight.
        efx_method: For `core.adapter`, which lets no other method change the module.
    """

    whole_class: ClassVar[type[nn.Module]]
    efx_method = "targeted_dropout"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the dense class."""
        if self.training:
            drop = self._drop()
            if drop is not None:
                return self._product(x, drop)
        return self.whole_class.forward(self, x)

    @torch.compiler.disable()
    def _product(self, x: torch.Tensor, drop: Drop) -> torch.Tensor:
        weight: Any = self.weight
        bias: Any = self.bias
        x, product = self._prepare(x)
        return dropped_product(x, weight, bias, drop, product)

    def _prepare(self, x: torch.Tensor) -> tuple[torch.Tensor, Product]:
        return x, Product("conv1d" if self.whole_class is Conv1D else "linear")

    @torch.compiler.disable()
    def _drop(self) -> Drop | None:
        """What this pass drops; None where it is a dense one."""
        dropping, role = self.__dict__[_DROPPING]
        if not dropping.context.active:
            if torch.is_grad_enabled() and not dropping.context.started:
                dropping.context.started = True
                logger.warning(
                    "Targeted dropout is on, but no training step has begun, so that the model trains dense: use "
                    "EfxTrainer, pass TargetedDropoutCallback() to another Trainer, or call begin_step and end_step "
                    "of hf_efx.step_context(model) in a loop of your own."
                )
            return None
        weight: Any = self.weight
        if not role.size:
            kept = dropping.kept(role.name, weight.shape, weight.device)
            penalty = dropping.penalties.get(role.name)
            if penalty is not None and torch.is_autocast_enabled(weight.device.type):
                _refuse_fp16(weight.device.type)
            return None if kept is None and penalty is None else Drop(kept, None, dropping.scale, penalty)
        units = dropping.kept(role.name, torch.Size([role.size]), weight.device)
        if units is None:
            return None
        transposed = self.whole_class is Conv1D
        dim = int((role.stacked == 0) != transposed)
        columns = unit_columns(units, weight.shape[dim], max(role.stacked, 1))
        kept = columns.view([-1 if i == dim else 1 for i in range(weight.dim())]).expand_as(weight)
        return Drop(kept, columns if role.stacked else None, dropping.scale)


def _refuse_fp16(device: str) -> None:
    if torch.get_autocast_dtype(device) == torch.float16:
        raise ValueError(
            "l1 under fp16: it is added to gradients that a gradient scaler has scaled, and would be as good as none. "
            "Train with bf16=True, or in float32."
        )


class TargetedLinear(TargetedMember, nn.Linear):
    """A Linear that drops."""

    whole_class = nn.Linear


class TargetedConv1D(TargetedMember, Conv1D):
    """transformers' Conv1D, weight [in, out], that drops."""

    whole_class = Conv1D


class TargetedConv2d(TargetedMember, nn.Conv2d):
    """A Conv2d that drops."""

    whole_class = nn.Conv2d

    def _prepare(self, x: torch.Tensor) -> tuple[torch.Tensor, Product]:
        padding: Any = self.padding
        if self.padding_mode != "zeros" or isinstance(padding, str):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode=mode), (0, 0)
        return x, Product("conv2d", self.stride, padding, self.dilation, self.groups)


_CLASSES: Mapping[type[nn.Module], type[TargetedMember]] = {
    cls.whole_class: cls for cls in (TargetedLinear, TargetedConv1D, TargetedConv2d)
}


def attach(name: str, dropping: Dropping, role: Role) -> None:
    """Makes a module of that name drop."""
    module = dropping.model.get_submodule(name)
    with hook_kept(module):
        swap_class(module, _CLASSES[type(module)])
    module.__dict__[_DROPPING] = dropping, role
    dropping.members[name] = module


def detach(module: nn.Module) -> Dropping | None:
    """Makes it the dense one again, and returns what it belonged to; does nothing to others."""
    if not isinstance(module, TargetedMember):
        return None
    dropping, _ = module.__dict__.pop(_DROPPING)
    with hook_kept(module):
        swap_class(module, module.whole_class)
    return dropping


def droppings_of(model: nn.Module) -> list[Dropping]:
    """What a model drops, config by config; empty without targeted dropout."""
    found = [m.__dict__[_DROPPING][0] for m in model.modules() if isinstance(m, TargetedMember)]
    return list(dict.fromkeys(found))

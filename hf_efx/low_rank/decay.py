"""Decay on factors: Frobenius decay on the product (Khodak et al. 2021, arXiv 2105.01029) and L2 on each factor.

Weight decay on both factors multiplies the product by (1 - ηλ)² a step and is a nuclear-norm penalty (λ/2 (‖U‖² +
‖V‖²) ≥ λ ‖UVᵀ‖_*), which lowers its effective rank. Frobenius decay λ/2 ‖UVᵀ‖²_F is what weight decay does to a
dense layer.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_efx.low_rank.arguments import FACTOR_DECAYS
from hf_efx.low_rank.layers import FactorisedLayer


def frobenius_decay_gradients(u: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of ½ ‖UVᵀ‖²_F: U (VᵀV) and V (UᵀU), of the shapes of U [m, r] and V [n, r]."""
    return u @ (v.mT @ v), v @ (u.mT @ u)


def decay_gradients(module: FactorisedLayer, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The decay's gradients for `module.weight` and `module.factor_v` at strength 1, in their shapes.

    Both are computed from the factors as they are now, before either changes.
    """
    weight, factor_v = module.weight.detach(), module.factor_v.detach()
    if kind == "l2":
        return weight.clone(), factor_v.clone()
    pairs = [frobenius_decay_gradients(u.detach(), v.detach()) for u, v in module.factor_pairs()]
    return torch.cat([g for g, _ in pairs]).view_as(weight), torch.cat([g.mT for _, g in pairs])


class FactorDecayCallback(TrainerCallback):
    """Decays the factors of a low-rank model, once per optimiser step, in any Trainer.

    Decoupled, the default, it takes η λ times the decay's gradient off the factors just before the optimiser's step,
    as AdamW does with weight decay; coupled, it adds λ times the gradient to `.grad` after clipping.

    Args:
        strength: λ, 0 or more.
        kind: "frobenius" or "l2".
        decoupled: See above.

    Raises:
        ValueError: For a value out of range, or, when training begins, if there is nothing to decay or the optimiser
            already applies weight decay to factors.
    """

    def __init__(self, strength: float, kind: str = "frobenius", decoupled: bool = True) -> None:
        if not strength >= 0:
            raise ValueError(f"strength={strength!r}: expected a number of 0 or more.")
        if kind not in FACTOR_DECAYS:
            raise ValueError(f"kind={kind!r}: expected one of {', '.join(FACTOR_DECAYS)}.")
        self.strength, self.kind, self.decoupled = strength, kind, decoupled

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Checks that the factors are there and that no other decay acts on them."""
        layers = factorised_layers(kwargs["model"])
        factors = {id(p) for layer in layers.values() for p in (layer.weight, layer.factor_v) if p.requires_grad}
        if not factors and not getattr(args, "dense_warmup_steps", 0):
            raise ValueError(
                "FactorDecayCallback: all factors are frozen (by an adapter on top, for one)."
                if layers
                else "FactorDecayCallback: the model has no factorised layer. Call get_efx_model first."
            )
        held = {id(p) for group in kwargs["optimizer"].param_groups for p in group["params"]}
        if not factors <= held:
            raise ValueError(
                "FactorDecayCallback: the optimizer doesn't hold the factors as they are (DeepSpeed flattens them, "
                "or a ready optimizer was built for other parameters). Use weight_decay, or let the Trainer make it."
            )
        for group in kwargs["optimizer"].param_groups:
            if group.get("weight_decay") and any(id(p) in factors for p in group["params"]):
                raise ValueError(
                    f"weight_decay={group['weight_decay']} also acts on the factors, twice on their product: use "
                    f"LowRankTrainer with factor_decay, which takes factors out of it, or set weight_decay=0."
                )

    @torch.no_grad()
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Applies the decay; under fp16 also at a step that the loss scaler then skips."""
        rates = {id(p): group["lr"] for group in kwargs["optimizer"].param_groups for p in group["params"]}
        for layer in factorised_layers(kwargs["model"]).values():
            gradients = decay_gradients(layer, self.kind)
            for parameter, gradient in zip((layer.weight, layer.factor_v), gradients, strict=True):
                if not parameter.requires_grad:
                    continue
                if isinstance(gradient, DTensor) and isinstance(parameter, DTensor):  # FSDP2: to each its shard
                    gradient = gradient.redistribute(placements=parameter.placements)
                if self.decoupled:
                    parameter.sub_(gradient, alpha=rates[id(parameter)] * self.strength)
                elif parameter.grad is not None:
                    parameter.grad.add_(gradient, alpha=self.strength)


def factorised_layers(model: nn.Module) -> dict[str, FactorisedLayer]:
    """The factorised layers of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FactorisedLayer)}

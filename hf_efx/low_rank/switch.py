"""The switch from dense to factorised inside a run: what becomes of the optimiser's state and the schedule.

With W = U Vᵀ and G = dL/dW, the chain rule gives dL/dU = G V and dL/dV = Gᵀ U. First moments are linear in the
gradient and follow it exactly, as long as the factors stand still. Second moments E[G²] follow as E[(G V)²] ≈ E[G²]
V², which holds for uncorrelated entries of G.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.training_args import OptimizerNames

from hf_efx.core.model.probe import skeleton
from hf_efx.low_rank.arguments import LowRankArgumentsMixin
from hf_efx.low_rank.config import LowRankConfig
from hf_efx.low_rank.layers import FactorisedLayer

logger = logging.getLogger(__name__)

LINEAR_MOMENTS = ("exp_avg", "momentum_buffer", "grad_avg")
SQUARED_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")
# Optimisers whose states are these moments.
PROJECTED_OPTIMIZERS = (
    torch.optim.Adam,  # AdamW too
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.SGD,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
)

State = dict[str, Any]


def project_moment(
    moment: torch.Tensor, factors: list[tuple[torch.Tensor, torch.Tensor]], squared: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """A dense moment carried onto the factors.

    Args:
        moment: M [out, in], a moment of dL/dW.
        factors: U [out / blocks, r], V [in, r] of each block.
        squared: Whether M is a second moment.

    Returns:
        Moments for `weight` [1, out, r] and `factor_v` [blocks * r, in].
    """
    us, vs = [], []
    for block, (u, v) in zip(moment.chunk(len(factors)), factors, strict=True):
        u, v = (u.square(), v.square()) if squared else (u, v)
        us.append(block @ v.to(block.dtype))
        vs.append((block.mT @ u.to(block.dtype)).mT)
    return torch.cat(us).unsqueeze(0), torch.cat(vs)


def factor_states(dense: State, layer: FactorisedLayer, mode: str) -> tuple[State, State]:
    """Optimiser state of `layer.weight` and `layer.factor_v` from that of the dense weight.

    Args:
        dense: State of the dense weight, tensors in the dense layout.
        layer: The layer after factorising, its factors not trained yet.
        mode: "project" or "reset" (empty states: the optimiser starts them anew).

    Returns:
        Two states; empty where the dense one holds something that has no known projection.
    """
    if mode == "reset" or not dense:
        return {}, {}
    factors = [(u.detach(), v.detach()) for u, v in layer.factor_pairs()]
    state_u: State = {}
    state_v: State = {}
    for key, value in dense.items():
        if key in LINEAR_MOMENTS or key in SQUARED_MOMENTS:
            matrix = value.mT if layer.dense_class == "Conv1D" else value.reshape(value.shape[0], -1)
            moment_u, state_v[key] = project_moment(matrix, factors, key in SQUARED_MOMENTS)
            state_u[key] = moment_u.view_as(layer.weight)
        elif not torch.is_tensor(value) or value.numel() == 1:
            state_u[key], state_v[key] = (value.clone(), value.clone()) if torch.is_tensor(value) else (value, value)
        else:
            logger.warning("The optimiser's state %r has no projection onto factors: it starts anew.", key)
            return {}, {}
    return state_u, state_v


def convert_optimizer_state(
    dense: dict[str, Any],
    dense_names: list[list[str]],
    fresh: dict[str, Any],
    fresh_names: list[list[str]],
    layers: dict[str, FactorisedLayer],
    mode: str,
    learning_rate_scale: float,
) -> dict[str, Any]:
    """An optimiser's state dict for the factorised model from the one for the dense model.

    Args:
        dense: `state_dict()` before the switch.
        dense_names: Names of the parameters in each of its groups, in order.
        fresh: `state_dict()` of a new optimiser over the factorised model.
        fresh_names: Names of the parameters in each of its groups.
        layers: The factorised layers by name.
        mode: "project" or "reset".
        learning_rate_scale: Factor on each group's learning rate.

    Returns:
        A state dict that the new optimiser loads. Parameters that the switch didn't touch keep their state.
    """
    states = {name: dense["state"].get(i, {}) for name, i in _indexed(dense, dense_names)}
    for name, layer in layers.items():
        states[f"{name}.weight"], states[f"{name}.factor_v"] = factor_states(
            states.get(f"{name}.weight", {}), layer, mode
        )
    groups = []
    for source, new in zip(group_sources(dense_names, fresh_names), fresh["param_groups"], strict=True):
        old = dense["param_groups"][source]
        rates = {key: old[key] * learning_rate_scale for key in ("lr", "initial_lr") if key in old}
        groups.append({**old, **rates, "weight_decay": new.get("weight_decay", 0.0), "params": new["params"]})
    # Some optimisers (Adagrad) make their states at the start: those that begin anew keep theirs.
    begun = [(i, states.get(name) or fresh["state"].get(i)) for name, i in _indexed(fresh, fresh_names)]
    return {"state": {i: state for i, state in begun if state}, "param_groups": groups}


def group_sources(dense_names: list[list[str]], fresh_names: list[list[str]]) -> list[int]:
    """For each of the new optimiser's groups the index of the former one whose settings it takes.

    Groups go by their position. Where there are more or fewer than before, as in a `create_optimizer` of one's own
    with a group a parameter, each goes by its first parameter; `factor_v` was part of `weight`.
    """
    if len(dense_names) == len(fresh_names):
        return list(range(len(fresh_names)))
    home = {name: i for i, names in enumerate(dense_names) for name in names}
    return [home[names[0].replace(".factor_v", ".weight")] if names else 0 for names in fresh_names]


def parameter_names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[list[str]]:
    """Names of the parameters in each of an optimiser's groups; "0", "1", ... for those that aren't the model's."""
    names = {id(p): name for name, p in model.named_parameters()}
    foreign = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in names]
    names.update({id(p): str(i) for i, p in enumerate(foreign)})
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def convert_checkpoint(
    folder: Path,
    dense_names: list[list[str]],
    fresh: dict[str, Any],
    fresh_names: list[list[str]],
    layers: dict[str, FactorisedLayer],
    options: LowRankArgumentsMixin,
) -> None:
    """Converts the optimiser's, the schedule's and the Trainer's state in a copy of a dense checkpoint, in place.

    Args:
        folder: The copy.
        dense_names: As in `convert_optimizer_state`, like the three that follow.
        fresh: See there.
        fresh_names: See there.
        layers: See there.
        options: How: `switch_optimizer_state` and `switch_learning_rate_scale`.
    """
    scale = options.switch_learning_rate_scale
    state = torch.load(folder / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
    converted = convert_optimizer_state(
        *(state, dense_names, fresh, fresh_names, layers),
        mode=options.switch_optimizer_state,
        learning_rate_scale=scale,
    )
    torch.save(converted, folder / OPTIMIZER_NAME)
    schedule = torch.load(folder / SCHEDULER_NAME, weights_only=True)
    sources = group_sources(dense_names, fresh_names)
    for key, value in schedule.items():
        if isinstance(value, list) and len(value) == len(dense_names):  # one for each group
            schedule[key] = [value[source] for source in sources]
            if key in ("base_lrs", "_last_lr"):
                schedule[key] = [rate * scale for rate in schedule[key]]
    torch.save(schedule, folder / SCHEDULER_NAME)
    trainer_state = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
    # A dense best checkpoint can't be loaded into the factorised model at the end.
    trainer_state.best_metric = trainer_state.best_model_checkpoint = trainer_state.best_global_step = None
    trainer_state.save_to_json(str(folder / TRAINER_STATE_NAME))


def step_of(checkpoint: str) -> int:
    """The optimiser step that a checkpoint was saved after."""
    return TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME))).global_step


def _indexed(state_dict: dict[str, Any], names: list[list[str]]) -> list[tuple[str, int]]:
    groups = zip(state_dict["param_groups"], names, strict=True)
    return [pair for group, group_names in groups for pair in zip(group_names, group["params"], strict=True)]


class StopAtSwitch(TrainerCallback):
    """Saves and stops a dense run at the switch, and refuses at its start what could not go on from there.

    Args:
        step: Optimiser step of the switch.
        options: How the optimiser and the schedule go on.
        config: How the model is factorised then.
        optimizer_of: What `create_optimizer` makes of a model.
    """

    def __init__(
        self,
        step: int,
        options: LowRankArgumentsMixin,
        config: LowRankConfig,
        optimizer_of: Callable[[nn.Module], torch.optim.Optimizer],
    ) -> None:
        self.step, self.options, self.config = step, options, config
        self.optimizer_of = optimizer_of

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raises ValueError for what the switch can't work with."""
        self._check_run(args, state, kwargs["train_dataloader"])
        self._check_optimizer(args, kwargs)
        self._rehearse(kwargs["model"], kwargs["optimizer"])

    def _check_run(self, args: TrainingArguments, state: TrainerState, train_dataloader: Any) -> None:
        where = f"dense_warmup_steps={self.step}"
        if state.max_steps <= self.step:
            raise ValueError(
                f"{where} leaves no factorised step of the run's {state.max_steps}: lower it, or train longer."
            )
        if not isinstance(train_dataloader, DataLoader) and not args.ignore_data_skip:
            raise ValueError(
                f"{where}: get_train_dataloader gives a {type(train_dataloader).__name__}, in which the Trainer can't "
                f"find its place again after the switch. Return a torch DataLoader, or factorise from the start."
            )

    def _check_optimizer(self, args: TrainingArguments, kwargs: dict[str, Any]) -> None:
        optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])  # inside accelerate's wrapper
        name = f"{type(optimizer).__name__} (optim={OptimizerNames(args.optim).value!r})"
        mode = self.options.switch_optimizer_state
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(p) in held for p in kwargs["model"].parameters() if p.requires_grad):
            raise ValueError(
                f"dense_warmup_steps={self.step}: {name} steps layer by layer, outside of the optimizer that a "
                f"checkpoint saves. Choose another optim, or factorise from the start."
            )
        if mode == "project" and not isinstance(optimizer, PROJECTED_OPTIMIZERS):
            raise ValueError(
                f"switch_optimizer_state={mode!r}: how the states of {name} project onto factors isn't known. Pass "
                f"switch_optimizer_state='reset', or choose AdamW, SGD or another of torch's with moments of the "
                f"gradient's shape."
            )
        scheduler, scale = kwargs["lr_scheduler"], self.options.switch_learning_rate_scale
        if scale != 1 and not isinstance(scheduler, LambdaLR):
            raise ValueError(
                f"switch_learning_rate_scale={scale}: a {type(scheduler).__name__} sets rates by a state of its own, "
                f"so that they can't be scaled. Leave it at 1, or choose a schedule that is a function of the step "
                f"(lr_scheduler_type='linear', 'cosine', ...)."
            )

    def _rehearse(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Makes the switch's optimizer of a copy of the model without values, and refuses what would go wrong then."""
        where, plan = f"dense_warmup_steps={self.step}", self.config.check_switch(model)
        copy = skeleton(model, "cpu")  # not meta: torch's fused optimizers refuse that
        names = parameter_names(self.optimizer_of(copy), copy)
        if names != parameter_names(optimizer, model):
            raise ValueError(
                f"{where}: the Trainer's optimizer isn't what its create_optimizer makes, which makes the new one at "
                f"the switch. Override create_optimizer, so that it makes one of self.model whenever it is called."
            )
        self.config.restore(copy, plan)
        future = self.optimizer_of(copy)
        groups = {id(p): group for group in future.param_groups for p in group["params"]}
        trained = {name for group in names for name in group}
        for layer in plan:
            for factor in ("weight", "factor_v") if f"{layer}.weight" in trained else ():
                group = groups.get(id(getattr(copy.get_submodule(layer), factor)))
                if group is None:
                    raise ValueError(
                        f"{where}: create_optimizer leaves out the factor '{layer}.{factor}' of the switched model, "
                        f"which would not be trained. Let it make a new optimizer of all of self.model's parameters "
                        f"whenever it is called (`weight` has three dimensions then), or factorise from the start."
                    )
                if self.options.factor_decay and group.get("weight_decay"):
                    raise ValueError(
                        f"factor_decay={self.options.factor_decay}: create_optimizer gives '{layer}.{factor}' the "
                        f"weight_decay={group['weight_decay']}, which would act on factors too. Set it to 0 for what "
                        f"get_decay_parameter_names leaves out, or set factor_decay=0."
                    )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Saves and stops at the step."""
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Keeps an epoch that the switch breaks off from being logged, evaluated and saved as a whole one."""
        if state.global_step == self.step and state.epoch is not None and not state.epoch.is_integer():
            control.should_log = control.should_evaluate = control.should_save = False
        return control


@dataclass
class DensePart:
    """The dense part of a run, whose summary waits for the factorised part's: one summary says what the run took.

    Attributes:
        first_step: The optimiser step that this call of `train` began at.
        switch: The step of the switch.
        began: When it began, in seconds.
        summary: What the Trainer would have logged at its end.
    """

    first_step: int
    switch: int
    began: float = field(default_factory=time.time)
    summary: dict[str, float] = field(default_factory=dict)

    def join(self, summary: dict[str, float], last_step: int) -> None:
        """Makes the factorised part's summary that of the whole run, in place."""
        dense, steps = self.switch - self.first_step, last_step - self.first_step
        losses = self.summary["train_loss"] * dense + summary["train_loss"] * (last_step - self.switch)
        runtime = time.time() - self.began
        for name in ("train_samples_per_second", "train_steps_per_second"):
            done = sum(part[name] * part["train_runtime"] for part in (self.summary, summary))
            summary[name] = round(done / runtime, 3)
        summary["train_loss"], summary["train_runtime"] = losses / steps, round(runtime, 4)

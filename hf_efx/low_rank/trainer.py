"""LowRankTrainer: trains factorised from the start, or dense first and factorised from some step on, in one run.

The switch stands on a checkpoint. The Trainer stops at the step and saves as always; the first process factorises the
model, converts the optimiser's state and the schedule, and writes them beside the checkpoint; all processes go on from
there as from any checkpoint. So model, optimiser, DDP and compiled graphs are built anew by the Trainer's own code,
every rank has the same factors, and a run that is killed before, at or after the switch resumes exactly.
"""

import gc
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from hf_efx.core.model.adapter import efx_record, get_efx_model
from hf_efx.core.training.trainer import EfxTrainerMixin
from hf_efx.low_rank.arguments import LowRankArgumentsMixin
from hf_efx.low_rank.config import LowRankConfig
from hf_efx.low_rank.decay import FactorDecayCallback, factorised_layers
from hf_efx.low_rank.report import low_rank_report
from hf_efx.low_rank.switch import convert_optimizer_state, factor_states

logger = logging.getLogger(__name__)

_Base = Trainer if TYPE_CHECKING else object


class LowRankTrainerMixin(EfxTrainerMixin, _Base):
    """Low-rank training over any Trainer class.

    Args:
        *args: As for the Trainer.
        low_rank_config: How to factorise the model, at the start or after `args.dense_warmup_steps`. None for a model
            that is factorised already.
        **kwargs: As for the Trainer.

    Raises:
        ValueError: Before any work, if the options contradict each other or the model.
    """

    def __init__(self, *args: Any, low_rank_config: LowRankConfig | None = None, **kwargs: Any) -> None:
        self.low_rank_config = low_rank_config  # before the Trainer's own, which calls model_init
        super().__init__(*args, **kwargs)
        options: Any = self.args
        if not isinstance(options, LowRankArgumentsMixin):
            raise ValueError(
                f"args is a {type(options).__name__}: pass LowRankArguments, or a dataclass of your own that puts "
                f"LowRankArgumentsMixin before its TrainingArguments."
            )
        self.warmup_steps_dense: int = options.dense_warmup_steps
        if self.warmup_steps_dense:
            self._check_switch()
        elif self.model_init is None:  # else call_model_init has done so
            self._factorise_new(self.model)  # pyright: ignore[reportArgumentType]
        if options.factor_decay:
            self.add_callback(
                FactorDecayCallback(options.factor_decay, options.factor_decay_kind, options.factor_decay_decoupled)
            )
        if options.log_factor_metrics:
            self.add_callback(_FactorMetrics(self))

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Makes the model (`model_init`), factorised unless the run begins dense."""
        model = super().call_model_init(trial)
        if not getattr(self.args, "dense_warmup_steps", 0):
            self._factorise_new(model)
        return model

    def _factorise_new(self, model: nn.Module) -> None:
        if self.low_rank_config is None:
            return
        if efx_record(model) is not None:
            logger.warning("The model is factorised already: low_rank_config has no effect.")
            return
        get_efx_model(model, self.low_rank_config)

    def _check_switch(self) -> None:
        where = f"dense_warmup_steps={self.warmup_steps_dense}"
        if self.low_rank_config is None:
            raise ValueError(f"{where} needs low_rank_config, which says how to factorise.")
        self.low_rank_config.check_pretrained()  # at the switch the weights are trained
        if efx_record(self.model) is not None:  # pyright: ignore[reportArgumentType]
            raise ValueError(
                f"{where} trains dense first, but the model carries hf_efx methods already. Pass it dense."
            )
        if self.args.save_only_model:
            raise ValueError(f"{where}: the switch stands on a whole checkpoint, so save_only_model=True is refused.")
        if self.optimizer is not None:
            raise ValueError(
                f"{where}: the switch makes a new optimizer, so a ready one can't be passed in `optimizers`. Choose "
                f"it by args.optim or optimizer_cls_and_kwargs."
            )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                f"{where}: the switch reads whole parameters and optimizer states, which FSDP and DeepSpeed shard. "
                f"Use DDP or one process, or factorise from the start (dense_warmup_steps=0)."
            )

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Parameters with ordinary weight decay: without the factors where factor decay is on."""
        names = super().get_decay_parameter_names(model)
        if not self.args.factor_decay:  # pyright: ignore[reportAttributeAccessIssue]
            return names
        factors = {f"{name}.{p}" for name in factorised_layers(model) for p in ("weight", "factor_v")}
        return [name for name in names if name not in factors]

    def train(
        self, resume_from_checkpoint: str | os.PathLike[str] | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """Trains, dense up to `dense_warmup_steps` and factorised from there on; see `EfxTrainerMixin.train`."""
        switch = self.warmup_steps_dense
        checkpoint = self._resume_point(resume_from_checkpoint)
        if not switch or (checkpoint is not None and _is_factorised(checkpoint)):
            return super().train(checkpoint, *args, **kwargs)
        step = 0 if checkpoint is None else _step(checkpoint)
        if step > switch:
            raise ValueError(
                f"resume_from_checkpoint={checkpoint!r} is dense at step {step}, past dense_warmup_steps={switch}: "
                f"name an earlier checkpoint, or raise dense_warmup_steps."
            )
        if step < switch:
            with self._until(switch):
                output = super().train(checkpoint, *args, **kwargs)
            if self.state.global_step < switch:  # another callback stopped it
                return output
            checkpoint = os.path.join(self.args.output_dir or "", f"{PREFIX_CHECKPOINT_DIR}-{switch}")
        assert checkpoint is not None
        staged = self._switch(checkpoint)
        try:
            return super().train(str(staged), *args, **kwargs)
        finally:
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                shutil.rmtree(staged, ignore_errors=True)

    @contextmanager
    def _until(self, step: int) -> Iterator[None]:
        """Makes the Trainer save and stop at a step, leaving alone what belongs to the end of a whole run."""
        stop = _StopAt(step)
        kept = {name: getattr(self.args, name) for name in ("load_best_model_at_end", "save_total_limit")}
        self.args.load_best_model_at_end, self.args.save_total_limit = False, None
        self.add_callback(stop)
        try:
            yield
        finally:
            self.remove_callback(stop)  # pyright: ignore[reportArgumentType]
            for name, value in kept.items():
                setattr(self.args, name, value)

    def _switch(self, checkpoint: str) -> Path:
        """Writes the factorised form of a dense checkpoint and readies the Trainer to go on from it."""
        staged = Path(checkpoint).with_name(f"factorised-{_step(checkpoint)}")
        model: Any = self.model
        self._match_structure(model, checkpoint)  # refuses a model that a run before has factorised already
        if self.args.should_save:
            self._load_from_checkpoint(checkpoint)  # on resume the model in memory is not trained yet
            dense_names = self._new_optimizer_names()
            get_efx_model(model, self.low_rank_config, pretrained=True)
            fresh_names = self._new_optimizer_names()
            temporary = staged.with_suffix(".tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(staged, ignore_errors=True)
            shutil.copytree(checkpoint, temporary, ignore=shutil.ignore_patterns("*.safetensors*", "*.bin.index.json"))
            self._save(str(temporary))
            self._convert_files(temporary, dense_names, fresh_names)
            temporary.rename(staged)
            logger.info("Factorised at step %d:\n%s", _step(checkpoint), low_rank_report(model))
        self.accelerator.wait_for_everyone()
        # The old optimizer, scheduler and wrapper hold parameters that are gone, and DDP's hooks on those that stay.
        self.optimizer = self.lr_scheduler = None  # pyright: ignore[reportAttributeAccessIssue]
        self.callback_handler.optimizer = self.callback_handler.lr_scheduler = None
        self.model_wrapped = self.callback_handler.model = model
        self.accelerator.free_memory()
        gc.collect()
        return staged

    def _new_optimizer_names(self) -> list[list[str]]:
        """Makes a new optimiser over the model as it is; the names of the parameters in each of its groups."""
        self.optimizer = None  # pyright: ignore[reportAttributeAccessIssue]
        names = {id(p): name for name, p in self.model.named_parameters()}  # pyright: ignore
        return [[names[id(p)] for p in group["params"]] for group in self.create_optimizer().param_groups]

    def _convert_files(self, folder: Path, dense_names: list[list[str]], fresh_names: list[list[str]]) -> None:
        options: Any = self.args
        scale = options.switch_learning_rate_scale
        state = torch.load(folder / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
        layers = factorised_layers(self.model)  # pyright: ignore[reportArgumentType]
        converted = convert_optimizer_state(
            *(state, dense_names, self.optimizer.state_dict(), fresh_names, layers),  # pyright: ignore
            mode=options.switch_optimizer_state,
            learning_rate_scale=scale,
        )
        torch.save(converted, folder / OPTIMIZER_NAME)
        schedule = torch.load(folder / SCHEDULER_NAME, weights_only=True)
        for key in ("base_lrs", "_last_lr"):
            schedule[key] = [rate * scale for rate in schedule[key]]
        torch.save(schedule, folder / SCHEDULER_NAME)
        trainer_state = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
        # A dense best checkpoint can't be loaded into the factorised model at the end.
        trainer_state.best_metric = trainer_state.best_model_checkpoint = trainer_state.best_global_step = None
        trainer_state.save_to_json(str(folder / TRAINER_STATE_NAME))


class LowRankTrainer(LowRankTrainerMixin, Trainer):
    """`transformers.Trainer` for low-rank training; see `LowRankTrainerMixin`."""


class DenseWarmupCallback(TrainerCallback):
    """Factorises the model inside a run, in any Trainer: one process, no resume past the switch.

    `LowRankTrainer` has neither limit.

    Args:
        config: How to factorise.
        steps: Optimiser steps to train dense.
        optimizer_state: "project" or "reset", as `switch_optimizer_state`.
        learning_rate_scale: Factor on the learning rate from the switch on.

    Raises:
        ValueError: For a value out of range; when training begins, under several processes, or after the switch.
    """

    def __init__(
        self, config: LowRankConfig, steps: int, optimizer_state: str = "project", learning_rate_scale: float = 1.0
    ) -> None:
        self.options = LowRankArgumentsMixin(
            dense_warmup_steps=steps,
            switch_optimizer_state=optimizer_state,
            switch_learning_rate_scale=learning_rate_scale,
        )
        config.check_pretrained()
        self.config, self.steps = config, steps

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuses what this callback can't do."""
        if args.world_size > 1 or state.global_step > self.steps:
            raise ValueError(
                f"DenseWarmupCallback serves one process and no resume past its step (world_size={args.world_size}, "
                f"global_step={state.global_step}, steps={self.steps}). Use LowRankTrainer with dense_warmup_steps."
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """At the step, factorises the model and puts its factors into the optimiser in place of the dense weights."""
        if state.global_step != self.steps:
            return
        model, optimizer, scheduler = kwargs["model"], kwargs["optimizer"], kwargs["lr_scheduler"]
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        dense = dict(model.named_parameters())
        get_efx_model(model, self.config, pretrained=True)
        scale = self.options.switch_learning_rate_scale
        for name, layer in factorised_layers(model).items():
            old = dense[f"{name}.weight"]
            new = [layer.weight, layer.factor_v]
            states = factor_states(optimizer.state.pop(old, {}), layer, self.options.switch_optimizer_state)
            optimizer.state.update({p: s for p, s in zip(new, states, strict=True) if s})
            for group in optimizer.param_groups:
                group["params"] = [q for p in group["params"] for q in (new if p is old else [p])]
        for group in optimizer.param_groups:
            group["lr"] *= scale
        scheduler = getattr(scheduler, "scheduler", scheduler)
        for key in ("base_lrs", "_last_lr"):  # the latter is what the Trainer logs
            setattr(scheduler, key, [rate * scale for rate in getattr(scheduler, key)])


class _StopAt(TrainerCallback):
    """Saves and stops at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.max_steps <= self.step:
            raise ValueError(
                f"dense_warmup_steps={self.step} leaves no factorised step of the run's {state.max_steps}: lower "
                f"it, or train longer."
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True
        return control


class _FactorMetrics(TrainerCallback):
    """Hands means over the factorised layers to the Trainer's next log."""

    def __init__(self, trainer: LowRankTrainerMixin) -> None:
        self.trainer = trainer

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not control.should_log or not factorised_layers(kwargs["model"]):
            return
        rows = low_rank_report(kwargs["model"]).layers
        rate = kwargs["optimizer"].param_groups[0]["lr"]
        columns = {
            "frobenius_norm": [row.frobenius_norm for row in rows],
            "effective_learning_rate": [rate / max(row.frobenius_norm, 1e-12) ** 2 for row in rows],
            "effective_rank_share": [row.effective_rank / row.rank for row in rows],
            "stable_rank": [row.stable_rank for row in rows],
        }
        self.trainer.add_metrics({f"low_rank/{name}": sum(v) / len(v) for name, v in columns.items()})


def _step(checkpoint: str) -> int:
    return json.loads(Path(checkpoint, TRAINER_STATE_NAME).read_text())["global_step"]


def _is_factorised(checkpoint: str) -> bool:
    record = json.loads(Path(checkpoint, "config.json").read_text()).get("efx")
    return any(entry["method"] == LowRankConfig.method for entry in (record or {}).get("methods", []))

"""LowRankTrainer: trains factorised from the start, or dense first and factorised from some step on, in one run.

The switch stands on a checkpoint. The Trainer stops at the step and saves as always; the first process factorises the
model, converts the optimiser's state and the schedule, and writes them beside the checkpoint; all processes go on from
there as from any checkpoint. So model, optimiser, DDP and compiled graphs are built anew by the Trainer's own code,
every rank has the same factors, and a run that is killed before, at or after the switch resumes exactly.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainerCallback
from transformers.data.data_collator import DataCollator
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput
from transformers.utils import CONFIG_NAME

from hf_efx.core.model.adapter import efx_record, get_efx_model
from hf_efx.core.model.record import entry_config
from hf_efx.core.training.trainer import EfxTrainerMixin
from hf_efx.low_rank.arguments import LowRankArguments, LowRankArgumentsMixin
from hf_efx.low_rank.config import LowRankConfig
from hf_efx.low_rank.decay import FactorDecayCallback, factorised_layers
from hf_efx.low_rank.report import factor_metrics, low_rank_report
from hf_efx.low_rank.switch import DensePart, StopAtSwitch, convert_checkpoint, parameter_names, step_of

logger = logging.getLogger(__name__)

_Base = Trainer if TYPE_CHECKING else object


class LowRankTrainerMixin(EfxTrainerMixin, _Base):
    """Low-rank training over any Trainer class. `args` takes `LowRankArgumentsMixin`, as `LowRankArguments` does.

    Options are read when training begins: values set on `args` until then, or by a search, count.

    Args:
        *args: As for the Trainer.
        low_rank_config: How to factorise the model, at the start or after `args.dense_warmup_steps`. None for a model
            that is factorised already, or stays dense.
        **kwargs: As for the Trainer.

    Raises:
        ValueError: If the options contradict each other or the model: here, or before the first step.
    """

    _given_optimizer = False
    _decay: FactorDecayCallback | None = None
    _dense: DensePart | None = None

    def __init__(self, *args: Any, low_rank_config: LowRankConfig | None = None, **kwargs: Any) -> None:
        self.low_rank_config = low_rank_config  # before the Trainer's own, which calls model_init
        super().__init__(*args, **kwargs)
        self._given_optimizer = self.optimizer is not None or self.lr_scheduler is not None
        self._options.check_low_rank()
        if self.model_init is None:  # else call_model_init has done so
            self._prepare_structure(self.model)  # pyright: ignore[reportArgumentType]

    @property
    def _options(self) -> LowRankArgumentsMixin:
        if not isinstance(self.args, LowRankArgumentsMixin):
            raise ValueError(
                f"args is a {type(self.args).__name__}: pass LowRankArguments, or a dataclass of your own that puts "
                f"LowRankArgumentsMixin before its TrainingArguments."
            )
        return self.args

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Makes the model (`model_init`), factorised unless the run begins dense."""
        model = super().call_model_init(trial)
        if self._resume_from is None:  # else it has the checkpoint's structure
            self._prepare_structure(model)
        return model

    def _prepare_structure(self, model: nn.Module) -> None:
        """Factorises a model for a run from the start, or makes sure that the switch will be able to."""
        if self._options.dense_warmup_steps:
            self._check_switch(model)
        elif self.low_rank_config is not None:
            entry = _low_rank_entry(efx_record(model))
            if entry is not None and factorised_layers(model):  # a reused config names layers that are dense
                self._check_same_config(entry, "the model")
            elif self._given_optimizer:
                raise ValueError(
                    "optimizers holds the dense weights, which low_rank_config replaces by factors. Call "
                    "get_efx_model(model, low_rank_config) first and make the optimizer then, or choose it by "
                    "args.optim or optimizer_cls_and_kwargs."
                )
            else:
                get_efx_model(model, self.low_rank_config)
                if model is self.model and self.optimizer is not None:  # of a run that began dense
                    self._release_dense()
        elif self._options.log_factor_metrics and not factorised_layers(model):
            raise ValueError("log_factor_metrics=True: the model has no factorised layer. Pass low_rank_config.")

    def _check_switch(self, model: nn.Module) -> None:
        config, where = self.low_rank_config, f"dense_warmup_steps={self._options.dense_warmup_steps}"
        if config is None:
            raise ValueError(f"{where} needs low_rank_config, which says how to factorise.")
        config.check_pretrained()  # at the switch the weights are trained
        if efx_record(model) is not None:
            raise ValueError(
                f"{where} trains dense first, but the model carries hf_efx methods already (config.efx). Pass it "
                f"without them, or factorise from the start (dense_warmup_steps=0)."
            )
        if not isinstance(model, PreTrainedModel):
            raise ValueError(
                f"{where}: the switch goes by config.json, which a {type(model).__name__} doesn't save. Pass the "
                f"transformers model itself (args.torch_compile compiles it), or factorise from the start."
            )
        if self.args.save_only_model:
            raise ValueError(f"{where}: the switch stands on a whole checkpoint, so save_only_model=True is refused.")
        if self._given_optimizer:
            raise ValueError(
                f"{where}: the switch makes a new optimizer and schedule, so ready ones can't be passed in "
                f"`optimizers`. Choose them by args.optim or optimizer_cls_and_kwargs, and args.lr_scheduler_type."
            )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                f"{where}: the switch reads whole parameters and optimizer states, which FSDP and DeepSpeed shard. "
                f"Use DDP or one process, or factorise from the start (dense_warmup_steps=0)."
            )

    def _check_same_config(self, entry: dict[str, Any], where: str) -> None:
        """Refuses a structure that another config than the Trainer's has led to."""
        if self.low_rank_config is None:
            return
        there, here = entry_config(entry), self.low_rank_config
        for name in {**here.method_fields(), **there.method_fields()}:
            one, other = (json.loads(json.dumps(getattr(config, name))) for config in (there, here))
            if one != other:
                raise ValueError(
                    f"{where} is factorised already, with {name}={one!r}, but low_rank_config has {name}={other!r}. "
                    f"Pass low_rank_config=None to go on with what is there, or a dense model."
                )

    def _check_resume(self, checkpoint: str, entry: dict[str, Any] | None) -> None:
        switch, step = self._options.dense_warmup_steps, step_of(checkpoint)
        where = f"resume_from_checkpoint={checkpoint!r}"
        if entry is not None:
            self._check_same_config(entry, where)
            if step <= switch:
                raise ValueError(
                    f"{where} is factorised at step {step}, but dense_warmup_steps={switch} trains dense up to there: "
                    f"lower dense_warmup_steps."
                )
        elif self.low_rank_config is not None and step > switch and Path(checkpoint, CONFIG_NAME).is_file():
            raise ValueError(
                f"{where} is dense at step {step}, past dense_warmup_steps={switch}: name an earlier checkpoint, or "
                f"raise dense_warmup_steps."
            )

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Parameters with ordinary weight decay: without the factors where factor decay is on."""
        names = super().get_decay_parameter_names(model)
        if not self._options.factor_decay:
            return names
        factors = {f"{name}.{p}" for name in factorised_layers(model) for p in ("weight", "factor_v")}
        return [name for name in names if name not in factors]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs figures as the base class does, in training logs with those of the factors where they are wanted."""
        training = "loss" in logs or "train_loss" in logs
        if training and self._options.log_factor_metrics and self.optimizer is not None:
            self.add_metrics(factor_metrics(self.model, self.optimizer.param_groups[0]["lr"]))  # pyright: ignore
        if "train_loss" in logs and self._dense is not None:
            if self.state.global_step == self._dense.switch:
                self._dense.summary = logs
                return
            if self._dense.summary:
                self._dense.join(logs, self.state.global_step)
        super().log(logs, start_time)

    def train(
        self,
        resume_from_checkpoint: str | os.PathLike[str] | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Trains, dense up to `dense_warmup_steps` and factorised from there on.

        The best model of `load_best_model_at_end` is the best one since the switch: a dense one doesn't fit.

        Args:
            resume_from_checkpoint: As in `EfxTrainerMixin.train`.
            trial: Of a hyperparameter search.
            ignore_keys_for_eval: As in `Trainer.train`.

        Raises:
            ValueError: Before any step, for options, a model, an optimizer or a checkpoint that can't work.
        """
        self._hp_search_setup(trial)  # sets a search's values on args, which the Trainer does after making the model
        self._options.check_low_rank()
        checkpoint = self._resume_point(resume_from_checkpoint)
        entry = None if checkpoint is None else _low_rank_entry(_saved_record(checkpoint))
        if checkpoint is not None:
            self._check_resume(checkpoint, entry)
        if entry is None and self.model_init is None:
            self._prepare_structure(self.model)  # pyright: ignore[reportArgumentType]
        self._set_factor_decay()
        self._dense = None
        if entry is not None or not self._options.dense_warmup_steps:
            return super().train(checkpoint, trial, ignore_keys_for_eval)
        return self._train_and_switch(checkpoint, trial, ignore_keys_for_eval)

    def _train_and_switch(self, checkpoint: str | None, trial: Any, ignore_keys: list[str] | None) -> TrainOutput:
        switch, step = self._options.dense_warmup_steps, 0 if checkpoint is None else step_of(checkpoint)
        self._dense = DensePart(step, switch) if step < switch else None
        if step < switch:
            with self._until(switch):
                output = super().train(checkpoint, trial, ignore_keys)
            if self.state.global_step < switch:  # another callback stopped it, or the data ended
                return self._ended_dense(output)
            checkpoint = os.path.join(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{switch}")
        elif self.model_init is not None:  # the one in memory may be a former run's
            self.model = self.call_model_init(trial)
        assert checkpoint is not None
        staged = self._switch(checkpoint)
        try:
            output = super().train(str(staged), trial, ignore_keys)
            return output._replace(training_loss=output.metrics["train_loss"])
        finally:
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                shutil.rmtree(staged, ignore_errors=True)

    def _ended_dense(self, output: TrainOutput) -> TrainOutput:
        logger.warning(
            "Training ended at step %d, before dense_warmup_steps=%d: the model is dense.",
            *(self.state.global_step, self._options.dense_warmup_steps),
        )
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        return output

    def _set_factor_decay(self) -> None:
        """Puts the decay that the options ask for in place of a former run's."""
        options = self._options
        if self._decay is not None:
            self.remove_callback(self._decay)  # pyright: ignore[reportArgumentType]
            self._decay = None
        if not options.factor_decay:
            return
        if any(isinstance(callback, FactorDecayCallback) for callback in self.callback_handler.callbacks):
            raise ValueError(
                f"factor_decay={options.factor_decay} and a FactorDecayCallback in `callbacks` would both decay the "
                f"factors: keep one of them."
            )
        self._decay = FactorDecayCallback(
            options.factor_decay, options.factor_decay_kind, options.factor_decay_decoupled
        )
        self.add_callback(self._decay)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """As the base class; the switch's checkpoint is saved by save_strategy="best" too, whatever its figures."""
        best = super()._determine_best_metric(metrics, trial)
        return best or (self._dense is not None and self.state.global_step == self._dense.switch)

    @contextmanager
    def _until(self, step: int) -> Iterator[None]:
        """Makes the Trainer save and stop at a step, leaving alone what belongs to the end of a whole run."""
        assert self.low_rank_config is not None
        stop = StopAtSwitch(step, self._options, self.low_rank_config, self._optimizer_of)
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
        staged = Path(checkpoint).with_name(f"factorised-{step_of(checkpoint)}")
        model: Any = self.model
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
            assert self.optimizer is not None
            fresh = self.optimizer.state_dict()
            convert_checkpoint(temporary, dense_names, fresh, fresh_names, factorised_layers(model), self._options)
            temporary.rename(staged)
            logger.info("Factorised at step %d:\n%s", step_of(checkpoint), low_rank_report(model))
        self.accelerator.wait_for_everyone()
        self._release_dense()
        return staged

    def _optimizer_of(self, model: nn.Module) -> torch.optim.Optimizer:
        """What create_optimizer makes of another model; the Trainer stays as it is, whatever that sets."""
        kept = dict(vars(self))
        self.model, self.model_wrapped, self.optimizer = model, model, None  # pyright: ignore
        try:
            self.create_optimizer()
            return self.optimizer  # pyright: ignore[reportReturnType]
        finally:
            vars(self).clear()
            vars(self).update(kept)

    def _new_optimizer_names(self) -> list[list[str]]:
        """Makes a new optimiser over the model as it is; the names of the parameters in each of its groups."""
        self.optimizer = None  # pyright: ignore[reportAttributeAccessIssue]
        self.create_optimizer()
        return parameter_names(self.optimizer, self.model)  # pyright: ignore[reportArgumentType]

    def _release_dense(self) -> None:
        """Lets go of what holds parameters that are gone: optimizer, scheduler, and DDP with its hooks on the rest."""
        self.optimizer = self.lr_scheduler = None  # pyright: ignore[reportAttributeAccessIssue]
        self.callback_handler.optimizer = self.callback_handler.lr_scheduler = None
        self.model_wrapped = self.callback_handler.model = self.model
        self.accelerator.free_memory()  # the Trainer collects the garbage when it goes on


class LowRankTrainer(LowRankTrainerMixin, Trainer):
    """`transformers.Trainer` for low-rank training: factorised from the start, or dense first and then factorised.

    Options are read when training begins: values set on `args` until then, or by a search, count.

    Args:
        model: The model, dense or factorised; factorised in place where `low_rank_config` is given.
        args: The options. None for `LowRankArguments("tmp_trainer")`.
        data_collator: As for `Trainer`, like all that follow but `low_rank_config`.
        train_dataset: Training examples.
        eval_dataset: Evaluation examples.
        processing_class: Tokenizer or processor, saved with the model.
        model_init: Makes the model, instead of `model`.
        compute_loss_func: A loss of one's own.
        compute_metrics: Figures of an evaluation.
        callbacks: Further callbacks.
        optimizers: Ready optimizer and schedule, for a model that is factorised already.
        optimizer_cls_and_kwargs: Class and arguments of the optimizer, instead of `args.optim`.
        preprocess_logits_for_metrics: What an evaluation keeps of the logits.
        low_rank_config: How to factorise the model, at the start or after `args.dense_warmup_steps`. None for a model
            that is factorised already, or stays dense.

    Raises:
        ValueError: If the options contradict each other or the model: here, or before the first step.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: LowRankArguments | LowRankArgumentsMixin | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        compute_loss_func: Callable[..., torch.Tensor] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, Any]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        *,
        low_rank_config: LowRankConfig | None = None,
    ) -> None:
        super().__init__(
            model=model,
            args=LowRankArguments("tmp_trainer") if args is None else args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            low_rank_config=low_rank_config,
        )


def _saved_record(checkpoint: str) -> dict[str, Any] | None:
    """What a checkpoint's config.json says of methods; None without one, as adapters and plain modules are saved."""
    config = Path(checkpoint, CONFIG_NAME)
    return json.loads(config.read_bytes()).get("efx") if config.is_file() else None


def _low_rank_entry(record: dict[str, Any] | None) -> dict[str, Any] | None:
    methods = (record or {"methods": []})["methods"]
    return next((entry for entry in methods if entry["method"] == LowRankConfig.method), None)

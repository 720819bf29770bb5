"""EfxTrainerMixin: what every Trainer of ours does beyond transformers' own.

It goes over `Trainer`, `Seq2SeqTrainer` or trl's `SFTTrainer`, and changes no training step:

    class MySFTTrainer(EfxTrainerMixin, SFTTrainer): ...
"""

import gc
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import EvalResult
from torch import nn
from transformers import PreTrainedModel, Trainer, set_seed
from transformers.modelcard import TrainingSummary
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput
from transformers.utils import CONFIG_NAME

from hf_efx.core.model.adapter import efx_record, hold_pruned, restore_efx_model
from hf_efx.core.model.record import check_pruned, config_class, entry_config, recorded_methods, refuse_foreign_methods
from hf_efx.core.results.card import write_model_card
from hf_efx.core.training.arguments import EfxArgumentsMixin
from hf_efx.core.training.checkpoints import explain_incomplete, explained_write_errors, last_complete_checkpoint
from hf_efx.core.training.step_context import StepContextCallback, step_context
from hf_efx.core.training.weights import load_weights
from hf_efx.registry import METHODS

logger = logging.getLogger(__name__)

# The type checker sees the Trainer that the mixin is put over; at run time the mixin has no base.
_Base = Trainer if TYPE_CHECKING else object


class EfxTrainerMixin(_Base):
    """Resumes from complete checkpoints alone, restores their structure, and carries extra columns and metrics.

    Where the model carries methods that draw while training, it moves their step context along with the run; the
    figures of a `StepContextCallback` that was passed reach the logs.

    Attributes:
        extra_columns: Columns that survive the removal of columns unknown to the model, such as `example_id`. They
            reach `get_batch_samples` (if the data collator hands them on) and are taken off before the model sees the
            batch.
    """

    extra_columns: tuple[str, ...] = ()

    _resume_from: str | None = None
    _pending_metrics: dict[str, list[float]] | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if Trainer in cls.__mro__ and cls.__mro__.index(Trainer) < cls.__mro__.index(EfxTrainerMixin):
            raise TypeError(
                f"{cls.__name__} puts the Trainer before the mixin, which then does nothing: write "
                f"class {cls.__name__}(EfxTrainerMixin, {cls.__mro__[1].__name__})."
            )

    def train(
        self, resume_from_checkpoint: str | os.PathLike[str] | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """Trains, as `Trainer.train` does.

        Args:
            resume_from_checkpoint: True goes on from the newest complete checkpoint in `args.output_dir`, past torn
                ones, which are logged. A path names one checkpoint. The model is given the structure that the
                checkpoint's `config.efx` describes.
            *args: Further arguments of `Trainer.train`.
            **kwargs: Further arguments of `Trainer.train`.

        Raises:
            ValueError: Before any work: no complete checkpoint, a named one that is torn, a model with another
                structure than the checkpoint's, or an optimizer of parameters that a method has replaced.
            CheckpointWriteError: If a checkpoint can't be written (an OSError).
            KeyboardInterrupt: Passed on, after a log line that says how to go on.
        """
        self._resume_from = self._resume_point(resume_from_checkpoint)
        self._pending_metrics = None  # of a run that ended with an exception
        # Both may have been set on `args` since the base class read them.
        if self.args.seed != self._seed_in_use:
            set_seed(self.args.seed)
        if not self.args.auto_find_batch_size:  # else a smaller one was found
            self._train_batch_size = self.args.train_batch_size
        try:
            if self._resume_from is not None and self.model is not None and self.model_init is None:
                self._match_structure(self.model, self._resume_from, fresh=self.optimizer is None)
            if self.model is not None:
                refuse_foreign_methods(self.model)
                self._hold_pruned(self.model)
                self._check_optimizer(self.model)
            self._move_step_context()
            return super().train(self._resume_from, *args, **kwargs)
        except KeyboardInterrupt:
            self._log_interruption()
            raise
        finally:
            self._resume_from = None
            for callback in self._step_context_callbacks():  # it may serve another Trainer next
                callback.checkpoint, callback.saves = None, True

    def create_accelerator_and_postprocess(self) -> None:
        """As the base class, which calls it once it has drawn its random numbers by the seed."""
        super().create_accelerator_and_postprocess()
        self._seed_in_use = self.args.seed

    def end(self) -> None:
        """Ends trackers and the process group, as the base class does; the model stays.

        Before that it lets go of `DistributedDataParallel`: destroyed after its group it waits for Gloo's threads,
        which may wait for the interpreter, and the process never ends (pytorch issues 56297 and 190489).
        """
        self.accelerator.free_memory()
        self.model_wrapped = self.model
        gc.collect()
        super().end()

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Makes the model (`model_init`), in the structure of the checkpoint that is resumed from, if any."""
        model = super().call_model_init(trial)
        if self._resume_from is not None:
            self._match_structure(model, self._resume_from)
        self._hold_pruned(model)
        return model

    def _hold_pruned(self, model: nn.Module) -> None:
        """Keeps a pruned model pruned, as `config.efx` says; a checkpoint's flag comes before its weights."""
        if self._resume_from is None:
            check_pruned(model)
        if "pruned" in (efx_record(model) or {}) and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                "The model is pruned (config.efx), but FSDP and DeepSpeed flatten or shard its weights, so that their "
                "zeros can't be held: train it with DDP, or give the zeros up with hf_efx.prune(model, 0)."
            )
        hold_pruned(model)

    def _check_optimizer(self, model: nn.Module) -> None:
        """Refuses an optimizer that was made before a method gave the model other parameters."""
        if self.optimizer is None or self.model_init is not None or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return
        optimizer: Any = self.optimizer
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        forgotten = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
        if forgotten and held - {id(p) for p in model.parameters()}:
            raise ValueError(
                f"The optimizer holds parameters that the model hasn't any more, and lacks {len(forgotten)} that it "
                f"has, such as {forgotten[0]}: they would not be trained. Make it (optimizers=...) after the methods "
                f"are on the model, or let a new Trainer make its own."
            )

    def _move_step_context(self) -> None:
        """Adds the callback that the model's training-time methods need, unless one was passed."""
        present = self.model is not None and step_context(self.model) is not None
        resting = [] if present or self.model is None else _training_methods(efx_record(self.model))
        if resting:
            logger.warning(
                "config.efx names %s, which loading doesn't put back: training goes on without. Call "
                "hf_efx.get_efx_model(model) first to go on with it, or hf_efx.unload(model) to silence this.",
                ", ".join(resting),
            )
        if (present or self.model_init is not None) and not self._step_context_callbacks():
            self.add_callback(StepContextCallback())
        for callback in self._step_context_callbacks():
            callback.checkpoint, callback.saves = self._resume_from, False

    def _step_context_callbacks(self) -> list[StepContextCallback]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, StepContextCallback)]

    def _resume_point(self, resume: str | os.PathLike[str] | bool | None) -> str | None:
        if resume is None or resume is False:
            return None
        output_dir = str(self.args.output_dir)
        if resume is True:
            checkpoint = last_complete_checkpoint(output_dir)
            if self.args.world_size > 1:
                # File systems may differ from node to node: all go on from the newest one that every process has.
                step = -1 if checkpoint is None else int(checkpoint.rpartition("-")[2])
                step = int(self.accelerator.gather(torch.tensor([step], device=self.args.device)).min())  # pyright: ignore
                checkpoint = None if step < 0 else os.path.join(output_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}")
            if checkpoint is None:  # in transformers' words
                raise ValueError(f"No valid checkpoint found in output directory ({output_dir})")
            resume = checkpoint
        reason = explain_incomplete(resume)
        if reason is not None:
            raise ValueError(
                f"resume_from_checkpoint={os.fspath(resume)!r} is no complete checkpoint: {reason}. Name another one, "
                f"or pass True for the newest complete one in output_dir={output_dir!r}."
            )
        if not any(Path(resume).glob("rng_state*.pth")):
            logger.warning(
                "%s has weights alone (save_only_model): the optimizer, its schedule and random numbers start "
                "anew, so that the run won't end as it would have without a break.",
                resume,
            )
        return os.fspath(resume)

    def _match_structure(self, model: nn.Module, checkpoint: str, fresh: bool = True) -> None:
        """Gives the model the checkpoint's structure, before its weights are loaded into it.

        Loading alone wouldn't stop: the Trainer only warns of keys that it misses, and trains on from random values.

        Raises:
            ValueError: If the model carries another structure, or an optimizer holds parameters that would go (not
                `fresh`).
        """
        config_file = Path(checkpoint, CONFIG_NAME)
        if not config_file.is_file():  # an adapter's checkpoint, or a module without a config
            return
        record = json.loads(config_file.read_bytes()).get("efx")
        present = {"methods": recorded_methods(model)}
        if _structure(record) == _structure(present):
            # A loaded model has training-time methods in its config alone, and zeros that nothing holds.
            if record is not None and (_training_methods(record) or "pruned" in record):
                restore_efx_model(model, record)
            return
        if _structure(present):
            raise ValueError(
                f"resume_from_checkpoint={checkpoint!r} was saved with {_methods(record)}, but the model has "
                f"{_methods(present)} in another structure or with other settings. Give the Trainer a model without "
                f"methods, which is then rebuilt to match, or start a new run from the loaded checkpoint."
            )
        if not fresh and len(_training_methods(record)) < len(record["methods"]):
            raise ValueError(
                f"resume_from_checkpoint={checkpoint!r} was saved with {_methods(record)}, and rebuilding the model "
                f"to match would leave the Trainer's optimizer with parameters that are gone. Resume with a new "
                f"Trainer that is given no optimizer."
            )
        restore_efx_model(model, record)
        logger.info("Rebuilt the model with %s, as %s has it.", _methods(record), checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Loads all of a checkpoint's weights, whatever layout they were saved under, or raises."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        target = self.model if model is None else model
        load_weights(self.accelerator.unwrap_model(target, keep_torch_compile=False), resume_from_checkpoint)

    def _load_best_model(self) -> None:
        """The same of the best checkpoint, at the end."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._load_best_model()
        logger.info("Loading the best model, %s: %s.", self.state.best_model_checkpoint, self.state.best_metric)
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """An epoch, unless the run is finished: resumed, transformers' own Trainer would train one step more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _log_interruption(self) -> None:
        if not self.is_world_process_zero():
            return
        checkpoint = last_complete_checkpoint(str(self.args.output_dir))
        if checkpoint is None:
            way_on = f"There is no complete checkpoint in output_dir={self.args.output_dir!r} yet: a run starts anew."
        else:
            way_on = f"The newest complete checkpoint is {checkpoint}: go on with train(resume_from_checkpoint=True)."
        logger.warning("Interrupted at step %s of %s. %s", self.state.global_step, self.state.max_steps, way_on)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        step = self.state.global_step
        with explained_write_errors("output_dir", str(self.args.output_dir), step):
            if self.args.should_save:
                # A folder of an earlier run that is written over would look whole while new and old files are mixed.
                folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{step}")
                (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
                context = step_context(self.model)  # pyright: ignore[reportArgumentType]
                if context is not None:
                    context.save(folder)
            super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = str(self.args.output_dir if output_dir is None else output_dir)
        with explained_write_errors("output_dir", folder, self.state.global_step):
            super()._save(output_dir, state_dict)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = self._signature_columns or []
        self._signature_columns = [*columns, *(c for c in self.extra_columns if c not in columns)]

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if self.extra_columns and isinstance(inputs, Mapping):
            inputs = {name: value for name, value in inputs.items() if name not in self.extra_columns}
        return super()._prepare_inputs(inputs)

    def add_metrics(self, metrics: Mapping[str, float]) -> None:
        """Hands figures to the next training log, which shows each name's mean since the one before.

        Only the first process' figures are logged: gather before, where processes differ. Where a log has a figure of
        the Trainer's own under the name, that one stays.

        Args:
            metrics: Figures by name, described in docs/metrics.md.
        """
        if self._pending_metrics is None:
            self._pending_metrics = {}
        for name, value in metrics.items():
            self._pending_metrics.setdefault(name, []).append(float(value))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs figures as `Trainer.log` does, and in a training log (not an evaluation's) those of `add_metrics`."""
        if "loss" in logs or "train_loss" in logs:
            for callback in self._step_context_callbacks():
                self.add_metrics(callback.metrics())
        if self._pending_metrics and ("loss" in logs or "train_loss" in logs):
            means = {name: sum(values) / len(values) for name, values in self._pending_metrics.items()}
            # In place, as the Trainer adds to its logs itself: the summary's dict goes on to the TrainOutput.
            logs.update({name: mean for name, mean in means.items() if name not in logs})
            self._pending_metrics = None
        super().log(logs, start_time)

    def create_model_card(self, model_name: str | None = None, **details: Any) -> None:  # pyright: ignore
        """Writes our model card into `args.output_dir`, unless `args.model_card` is False; a peft model gets peft's.

        Args:
            model_name: The model's name; None for the folder's.
            **details: What else the Trainer's own method takes: tags, license, language, dataset, dataset_tags, ...
        """
        wanted = not isinstance(self.args, EfxArgumentsMixin) or self.args.model_card
        if not wanted or not self.is_world_process_zero():
            return
        model: Any = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if not isinstance(model, PreTrainedModel):
            return super().create_model_card(model_name=model_name, **details)
        details["dataset"] = details.pop("dataset_name", details.get("dataset"))  # trl's name for it
        summary = TrainingSummary.from_trainer(self, model_name=model_name, **details)
        metadata = summary.create_metadata()
        given = {key: metadata[key] for key in ("license", "language", "base_model", "datasets") if key in metadata}
        methods = (efx_record(model) or {"methods": []})["methods"]
        write_model_card(
            str(self.args.output_dir),
            model_name=summary.model_name,
            methods=[entry["method"] for entry in methods],
            results=_last_evaluation(self.state.log_history, summary.tasks, metadata.get("datasets")),
            auto_class=type(model).__name__,
            repo_id=self.hub_model_id,
            needs_hf_efx=any(config_class(entry["method"]).changes_skeleton for entry in methods),
            configuration={entry["method"]: entry["config"] for entry in methods},
            training=summary.hyperparameters,
            citations=[METHODS[entry["method"]].citation for entry in methods],
            tags=metadata["tags"],
            **given,
        )


class EfxTrainer(EfxTrainerMixin, Trainer):
    """`transformers.Trainer` with everything of `EfxTrainerMixin`, and with its arguments.

    Args:
        model: A model, with methods of ours or without; or None, and `model_init`.
        args: `EfxArguments`, or any `TrainingArguments`. None for defaults.
        data_collator: Makes a batch of a list of examples.
        train_dataset: What `train` trains on: a Dataset or an IterableDataset, of datasets or of torch.
        eval_dataset: What `evaluate` takes: one, or several by name.
        processing_class: Tokenizer, image or feature processor, saved with the model.
        model_init: Makes the model at each `train`, methods included; what a hyperparameter search needs.
        compute_loss_func: The loss of (outputs, labels, num_items_in_batch), instead of the model's own.
        compute_metrics: Figures of an `EvalPrediction`, by name.
        callbacks: Besides the Trainer's own.
        optimizers: A ready optimizer and scheduler, made after methods were put on the model.
        optimizer_cls_and_kwargs: A class and its arguments instead.
        preprocess_logits_for_metrics: What `compute_metrics` gets of (logits, labels).
    """


def _structure(record: dict[str, Any] | None) -> list[Any]:
    """What of a record must be the same, as JSON has it: settings too, since they decide the forward."""
    methods = record["methods"] if record else []
    return json.loads(json.dumps([{**entry, "config": entry_config(entry).method_fields()} for entry in methods]))


def _last_evaluation(log_history: list[dict[str, float]], tasks: Any, datasets: list[str] | None) -> list[EvalResult]:
    """The newest evaluation's figures, without timings, as a card takes them."""
    logs = next((logs for logs in reversed(log_history) if "eval_loss" in logs), {})
    task = tasks[0] if isinstance(tasks, list) else tasks or "other"
    data = datasets[0] if datasets else "unknown"
    return [
        EvalResult(task, data, data, metric_type=name.removeprefix("eval_"), metric_value=value)
        for name, value in logs.items()
        if name.startswith("eval_") and not name.endswith(("_runtime", "_per_second", "_time"))
    ]


def _training_methods(record: dict[str, Any] | None) -> list[str]:
    """The methods of a record that act in training alone."""
    names = [entry["method"] for entry in record["methods"]] if record else []
    return [name for name in names if not config_class(name).changes_skeleton]


def _methods(record: dict[str, Any] | None) -> str:
    return ", ".join(entry["method"] for entry in record["methods"]) if record else "no method"

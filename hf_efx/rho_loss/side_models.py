"""The models beside the trained one: what gives irreducible losses, and what scores in the trained model's place.

"Prioritized Training on Points that are Learnable, Worth Learning, and Not Yet Learnt", Mindermann et al. 2022,
arXiv 2206.07137, section 3. A small one does for either.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import load_model, save_file, save_model
from torch import nn
from transformers import TrainingArguments, set_seed
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from hf_efx.core.data.example_ids import add_example_ids
from hf_efx.core.data.tables import ID_COLUMN, data_fingerprint, tokenizer_fingerprint, weights_fingerprint
from hf_efx.core.training.checkpoints import last_complete_checkpoint
from hf_efx.core.training.step_context import derive_seed
from hf_efx.core.training.trainer import EfxTrainer
from hf_efx.rho_loss.exchange import process_rank, wait_for_all
from hf_efx.rho_loss.irreducible_table import check_kept_settings

_WEIGHTS, _OPTIMIZER = "scoring_model.safetensors", "scoring_optimizer.safetensors"
# What of the training arguments a model depends on; the rest (logging, saving, places) may change on the way.
_TRAINING = (
    *("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("optim", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "lr_scheduler_type"),
    *("warmup_steps", "lr_scheduler_kwargs", "optim_args", "neftune_noise_alpha", "label_smoothing_factor", "bf16"),
    *("fp16", "seed", "data_seed", "eval_strategy", "eval_steps", "train_sampling_strategy", "dataloader_drop_last"),
)


def train_irreducible_model(
    model: nn.Module | Callable[[], nn.Module],
    args: TrainingArguments,
    holdout: Dataset,
    target: Dataset,
    *,
    data_collator: Callable[[list[Any]], Any] | None = None,
    processing_class: Any = None,
    **trainer_options: Any,
) -> nn.Module:
    """Trains a model on holdout data and keeps it as it was when its loss on the target's data was lowest.

    The lowest loss, not the best accuracy: that is the rule of the paper's code (github.com/OATML/RHO-Loss).
    Checkpoints go to `args.output_dir`, with the settings that they were made with; the same call goes on from the
    newest complete one there.

    Args:
        model: The model, or a function that makes it.
        args: How it is trained. It is evaluated and saved each epoch, or as often as `eval_strategy` says.
        holdout: What it is trained on.
        target: What it will score, and the run with RHO-LOSS will train on.
        data_collator: As the Trainer's.
        processing_class: As the Trainer's.
        **trainer_options: Further arguments of the Trainer.

    Returns:
        The model, for `compute_irreducible_losses`.

    Raises:
        ValueError: If `args.output_dir` holds checkpoints of other data, arguments or initial weights, or of a run
            whose settings aren't known.
    """
    parts = {"data_collator": data_collator, **trainer_options}
    _check_same_model(model, args, holdout, target, processing_class, parts)
    trainer = LowestLossTrainer(
        **_model_argument(model),
        args=best_by_loss(args),
        train_dataset=_without_ids(holdout),
        eval_dataset=_without_ids(target),
        data_collator=data_collator,
        processing_class=processing_class,
        **trainer_options,
    )
    return trainer.train_to_lowest_loss()


def _check_same_model(
    model: Any,
    args: TrainingArguments,
    holdout: Dataset,
    target: Dataset,
    processing_class: Any,
    parts: Mapping[str, Any],
) -> None:
    """Keeps what the model depends on in `args.output_dir`, or compares it with what is there; on every process."""
    folder, kept = Path(str(args.output_dir)), Path(str(args.output_dir), "settings.json")
    if last_complete_checkpoint(str(folder)) is not None and not kept.is_file():
        raise ValueError(
            f"output_dir={str(folder)!r} holds checkpoints of another run: name a folder of its own for this model, "
            f"or delete them."
        )
    set_seed(args.seed)
    initial = model if isinstance(model, nn.Module) else model()
    settings = {
        **{name: _fingerprint(data) for name, data in (("holdout", holdout), ("target", target))},
        "tokenizer": tokenizer_fingerprint(processing_class),
        **initial_settings(initial, args),
        "parts": {name: _named(value) for name, value in parts.items() if name != "callbacks" and value is not None},
    }
    if process_rank()[0] == 0 and last_complete_checkpoint(str(folder)) is None:
        kept.unlink(missing_ok=True)  # nothing was made with them
        check_kept_settings(folder, settings)
    wait_for_all()
    check_kept_settings(folder, settings)


def initial_settings(model: nn.Module, args: TrainingArguments) -> dict[str, Any]:
    """What a trained model depends on: its initial weights, and its training arguments."""
    training = args.to_dict()
    return {"initial_weights": weights_fingerprint(model), "training": {name: training[name] for name in _TRAINING}}


def _named(value: Any) -> Any:
    """A part of a Trainer as far as JSON tells one from another: names of functions and classes, plain values."""
    if isinstance(value, tuple | list):
        return [_named(one) for one in value]
    if isinstance(value, Mapping):
        return {str(key): _named(one) for key, one in value.items()}
    if isinstance(value, str | int | float | bool | None):
        return value
    return getattr(value, "__qualname__", type(value).__qualname__)


class LowestLossTrainer(EfxTrainer):
    """Trains to the lowest loss on the evaluation data."""

    def train_to_lowest_loss(self) -> nn.Module:
        begun = last_complete_checkpoint(str(self.args.output_dir)) is not None
        self.train(resume_from_checkpoint=begun)
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)


def _without_ids(dataset: Dataset) -> Dataset:
    return dataset.remove_columns(ID_COLUMN) if ID_COLUMN in dataset.column_names else dataset


def _fingerprint(dataset: Dataset) -> str:
    named = dataset if ID_COLUMN in dataset.column_names else add_example_ids(dataset)
    return data_fingerprint(named, dataset.column_names)


def _model_argument(model: Any) -> dict[str, Any]:
    return {"model": model} if isinstance(model, nn.Module) else {"model_init": model}


def best_by_loss(args: TrainingArguments, output_dir: str | None = None) -> TrainingArguments:
    """The arguments with an evaluation and a checkpoint at the same moments, the best one being kept."""
    when = IntervalStrategy(args.eval_strategy).value
    when = "epoch" if when == "no" else when
    return replace(
        args,
        output_dir=output_dir or args.output_dir,
        eval_strategy=when,
        save_strategy=SaveStrategy(when),
        save_steps=args.eval_steps if when == "steps" and args.eval_steps else args.save_steps,
        save_total_limit=max(args.save_total_limit or 2, 2),  # at 1 the Trainer ends by deleting the newest
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
    )


class ScoringModelTraining:
    """Trains a scoring model with AdamW, without touching the run's random state.

    Args:
        model: Computes its own loss from a batch with labels.
        args: The run's: betas, epsilon, weight decay, clipping and seed are taken from it.
    """

    def __init__(self, model: nn.Module, args: TrainingArguments) -> None:
        self.model, self.args = model, args
        self.optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad],
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
        )
        if args.world_size > 1:
            for value in model.state_dict().values():
                dist.broadcast(value, 0)

    def step(self, batches: Sequence[Mapping[str, Any]], learning_rate: float, step: int) -> None:
        """One optimizer step on a step's micro-batches.

        Args:
            batches: What the trained model trains on in this step, of columns that the scoring model takes.
            learning_rate: The run's at this step.
            step: Optimizer step, from which dropout's random numbers derive.
        """
        devices = [p.device for p in self.model.parameters() if p.device.type != "cpu"][:1]
        kind = devices[0].type if devices else "cpu"
        self.model.train()
        with torch.random.fork_rng(devices, device_type=kind), torch.enable_grad():
            torch.manual_seed(derive_seed(self.args.seed, step, 0, self.args.process_index, "scoring_model"))
            for batch in batches:
                outputs = self.model(**batch)
                loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs[0]
                (loss / len(batches)).backward()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self.args.world_size > 1:
            for p in parameters:
                dist.all_reduce(p.grad)
                p.grad /= self.args.world_size  # pyright: ignore
        if self.args.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(parameters, self.args.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.args.world_size > 1:
            for buffer in self.model.buffers():  # batch statistics, of the first process as under DDP
                dist.broadcast(buffer, 0)

    def save(self, folder: Path) -> None:
        """Writes weights and optimizer state as safetensors."""
        save_model(self.model, str(folder / _WEIGHTS))
        state = self.optimizer.state_dict()
        tensors = {
            f"{i}.{name}": value.contiguous() for i, values in state["state"].items() for name, value in values.items()
        }
        save_file(tensors, folder / _OPTIMIZER, metadata={"param_groups": json.dumps(state["param_groups"])})

    def load(self, folder: Path) -> None:
        """Takes weights and optimizer state from a checkpoint.

        Raises:
            ValueError: If there are none.
        """
        if not (folder / _WEIGHTS).is_file():
            raise ValueError(
                f"{folder} holds no scoring model, but train_scoring_model=True: resume with the options that the run "
                f"was begun with, or start a new one."
            )
        load_model(self.model, str(folder / _WEIGHTS), device=str(next(self.model.parameters()).device))
        with safe_open(folder / _OPTIMIZER, framework="pt") as file:
            groups = json.loads(file.metadata()["param_groups"])
            state: dict[int, dict[str, torch.Tensor]] = {}
            for key in file.keys():
                index, _, name = key.partition(".")
                state.setdefault(int(index), {})[name] = file.get_tensor(key)
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

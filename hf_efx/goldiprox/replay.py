"""ReplayTrainer: trains any model on a selection sequence, in its order, and scores nothing."""

import copy
import itertools
import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, seed_worker

from hf_efx.core.data.example_ids import ID_COLUMN, IdIndex, check_dataset
from hf_efx.core.files import write_atomically
from hf_efx.core.training.arguments import EfxArguments
from hf_efx.core.training.trainer import EfxTrainerMixin
from hf_efx.goldiprox.recording import iterate_steps
from hf_efx.goldiprox.sequence import SelectionSequence
from hf_efx.rho_loss.loader import ColumnRows, ExtraColumnsCollator, can_fetch_columns

REPLAY_NAME = "replay.json"  # in a checkpoint: which sequence it is a part of

_Base = Trainer if TYPE_CHECKING else object


class ReplayBatchSampler:
    """Where a sequence's examples lie in a data set, as the micro-batches of step after step.

    A step's ids are dealt out in their order: the first ones to the first micro-batch of the first process, the next
    ones to that of the second process, and so on; where they don't divide, the first micro-batches have one more.

    Args:
        sequence: The sequence.
        index: Finds the positions of ids.
        parts: Micro-batches of a step over all processes.
        steps: How many steps of the sequence to take.
    """

    def __init__(self, sequence: datasets.Dataset, index: IdIndex, parts: int, steps: int) -> None:
        self.sequence, self.index, self.parts, self.steps = sequence, index, parts, steps

    def __len__(self) -> int:
        return self.steps * self.parts

    def __iter__(self) -> Iterator[list[int]]:
        for steps in iterate_steps(self.sequence.select(range(self.steps))):
            positions, offsets = self.index.rows(steps.example_ids).tolist(), steps.offsets.tolist()
            for start, end in itertools.pairwise(offsets):
                size, larger = divmod(end - start, self.parts)
                for part in range(self.parts):
                    stop = start + size + (part < larger)
                    yield positions[start:stop]
                    start = stop


class ReplayMixin(EfxTrainerMixin, _Base):
    """Training on a selection sequence, over any Trainer class.

    Each step trains on exactly the examples that the sequence has for it, over however many processes and
    micro-batches: `per_device_train_batch_size` x `gradient_accumulation_steps` x processes must be the sequence's
    examples a step. The run is as long as the sequence, or `max_steps` if that is less; `num_train_epochs` isn't read,
    and the order is the sequence's, whatever the training data's. With the micro-batches of the run that selected,
    the same initial weights and no randomness in the model, the final weights are the same bits (but for steps that
    ended an epoch there with fewer micro-batches than `gradient_accumulation_steps`: these are split anew).

    Args:
        *args: As for the Trainer. `train_dataset` is the data set that was selected from, with its `example_id` column
            and in any order.
        sequence: The sequence.
        raw_dataset: What to compare with the sequence's fingerprint, if `train_dataset` has lost the raw columns that
            the fingerprint covers, for instance by another tokenizer's `map(..., remove_columns=...)`.
        **kwargs: As for the Trainer.

    Options are read when training begins: what is set on `args` later counts.

    Raises:
        ValueError: If data set or options don't fit the sequence; here, and again before the first step.
    """

    def __init__(
        self,
        *args: Any,
        sequence: SelectionSequence | None = None,
        raw_dataset: datasets.Dataset | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(sequence, SelectionSequence):
            raise ValueError(
                f"sequence={sequence!r}: pass a SelectionSequence, for instance SelectionSequence.from_hub(...)."
            )
        self.sequence = sequence
        self._check_options()
        self._replayed_steps(self.args)
        data = check_dataset(self.train_dataset, "train_dataset", ids=True)
        sequence.verify(data if raw_dataset is None else raw_dataset)
        self._index = IdIndex(data)
        for steps in iterate_steps(sequence.dataset):
            self._index.rows(steps.example_ids)  # raises for one that isn't there

    def _check_options(self) -> None:
        args, size = self.args, self.sequence.examples_per_step
        if args.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
            raise ValueError(
                f"train_sampling_strategy={args.train_sampling_strategy!r} would change the order, which is the "
                f"sequence's in a replay: leave it at its default."
            )
        own = type(self).__mro__[: type(self).__mro__.index(ReplayMixin)]
        if any("_get_train_sampler" in vars(cls) for cls in own):
            raise ValueError(
                f"_get_train_sampler of {type(self).__name__} isn't asked in a replay, whose order is the sequence's: "
                f"leave it out, or select a sequence in its order."
            )
        if getattr(args, "packing", False):  # trl's
            raise ValueError(
                "packing=True puts several examples into one row, which then has no id: set packing=False."
            )
        for name in ("auto_find_batch_size", "ignore_data_skip"):
            if getattr(args, name):
                raise ValueError(f"{name}=True would break the sequence's steps apart in a replay: leave it False.")
        config: Any = args.accelerator_config
        for name in ("split_batches", "dispatch_batches"):
            if getattr(config, name):
                raise ValueError(
                    f"accelerator_config: {name}=True would deal a step's examples out in another way than the "
                    f"sequence's: leave it unset in a replay."
                )
        rows = args.train_batch_size * self._parts
        if rows != size:
            raise ValueError(
                f"per_device_train_batch_size={args.per_device_train_batch_size} x gradient_accumulation_steps="
                f"{args.gradient_accumulation_steps} x {args.world_size} processes x {max(1, args.n_gpu)} devices "
                f"each is {rows} examples a step, but the sequence has {size}: make the product {size}."
            )
        if self.sequence.fewest_examples < self._parts:
            raise ValueError(
                f"gradient_accumulation_steps={args.gradient_accumulation_steps} x {args.world_size} processes is "
                f"{self._parts} micro-batches, but the sequence's shortest step has {self.sequence.fewest_examples} "
                f"examples, and each micro-batch needs one: lower gradient_accumulation_steps, or use fewer processes."
            )

    @property
    def _parts(self) -> int:
        """Micro-batches of a step over all processes."""
        return self.args.gradient_accumulation_steps * self.args.world_size

    def _replayed_steps(self, args: TrainingArguments) -> int:
        """The run's length: `max_steps`, or the whole sequence."""
        if args.max_steps > len(self.sequence):
            raise ValueError(
                f"max_steps={args.max_steps}, but the sequence has {len(self.sequence)} steps: lower it, leave it at "
                f"-1 for the whole sequence, or select a longer one."
            )
        return args.max_steps if args.max_steps > 0 else len(self.sequence)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._check_options()
        self._loads_sequence = False
        return super()._inner_training_loop(*args, **kwargs)

    def set_initial_training_values(self, args: TrainingArguments, dataloader: DataLoader) -> Any:
        """As the Trainer's, with the sequence as the one epoch."""
        if not self._loads_sequence:
            raise ValueError(
                f"get_train_dataloader of {type(self).__name__} doesn't call super().get_train_dataloader, which "
                f"loads the sequence's examples: call it, or train with another Trainer."
            )
        args = copy.copy(args)  # the user's own may serve another sequence
        args.max_steps = self._replayed_steps(args)
        return super().set_initial_training_values(args, dataloader)

    def get_train_dataloader(self) -> DataLoader:
        """The data loader that gives the sequence's steps; as the Trainer's in all else."""
        self._loads_sequence = True
        args: Any = self.args
        rows: Any = self._remove_unused_columns(self.train_dataset, description="training")  # pyright: ignore
        rows = rows.remove_columns(ID_COLUMN) if ID_COLUMN in rows.column_names else rows
        collator: Any = self.data_collator
        if can_fetch_columns(rows, collator):
            rows, collator = ColumnRows(rows), ExtraColumnsCollator(collator, ())
        sampler: Any = ReplayBatchSampler(
            self.sequence.dataset, self._index, self._parts, self._replayed_steps(self.args)
        )
        loader = DataLoader(
            rows,
            batch_sampler=sampler,
            collate_fn=collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            prefetch_factor=args.dataloader_prefetch_factor,
            in_order=args.dataloader_in_order,
            worker_init_fn=partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
        )
        # Over several processes accelerate gives batch i to process i modulo their number, as the sampler means it.
        return self.accelerator.prepare(loader)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            write_atomically(folder / REPLAY_NAME, json.dumps({"digest": self.sequence.digest}))
        super()._save_checkpoint(model, trial)

    def _resume_point(self, resume: str | os.PathLike[str] | bool | None) -> str | None:
        checkpoint = super()._resume_point(resume)
        if checkpoint is not None:
            file = Path(checkpoint, REPLAY_NAME)
            digest = json.loads(file.read_bytes())["digest"] if file.is_file() else None
            if digest != self.sequence.digest:
                raise ValueError(
                    f"resume_from_checkpoint={checkpoint!r} belongs to "
                    + (f"a replay of another sequence ({digest})" if digest else "no replay")
                    + f", but this one's is {self.sequence.digest}: resume with the sequence that the run began with."
                )
        return checkpoint


class ReplayTrainer(ReplayMixin, Trainer):
    """`transformers.Trainer` that trains on a selection sequence, in its order; see `ReplayMixin`.

    Args:
        model: What is trained, any model; or None, and `model_init`.
        args: Any `TrainingArguments`, with the sequence's examples a step; None for defaults of `EfxArguments`.
        data_collator: Makes a batch of a list of examples.
        train_dataset: The data set that was selected from, with its `example_id` column and in any order.
        eval_dataset: What `evaluate` takes: one, or several by name.
        processing_class: Tokenizer, image or feature processor, saved with the model.
        model_init: Makes the model at each `train`; what a hyperparameter search needs.
        compute_loss_func: The loss of (outputs, labels, num_items_in_batch), instead of the model's own.
        compute_metrics: Figures of an `EvalPrediction`, by name.
        callbacks: Besides the Trainer's own.
        optimizers: A ready optimizer and scheduler.
        optimizer_cls_and_kwargs: A class and its arguments instead.
        preprocess_logits_for_metrics: What `compute_metrics` gets of (logits, labels).
        sequence: The sequence.
        raw_dataset: What to compare with the sequence's fingerprint, if `train_dataset` has lost the raw columns that
            the fingerprint covers.

    Raises:
        ValueError: If data set or options don't fit the sequence; here, and again before the first step.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable[[list[Any]], Any] | None = None,
        train_dataset: datasets.Dataset | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[..., nn.Module] | None = None,
        compute_loss_func: Callable[..., Any] | None = None,
        compute_metrics: Callable[..., dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[..., Any] | None = None,
        *,
        sequence: SelectionSequence,
        raw_dataset: datasets.Dataset | None = None,
    ) -> None:
        super().__init__(
            model,
            EfxArguments() if args is None else args,
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
            sequence=sequence,
            raw_dataset=raw_dataset,
        )

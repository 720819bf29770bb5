"""What a selecting run refuses before any work: options, data sets and tables that don't belong together."""

import copy
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import Trainer

from hf_efx.core.data.example_ids import ID_COLUMN, IdIndex
from hf_efx.core.model.wrappers import unwrap_model
from hf_efx.core.scoring.batches import check_rows, take_rows
from hf_efx.core.scoring.forward import Forward, aligned
from hf_efx.core.scoring.losses import Task, per_example_loss
from hf_efx.core.scoring.scoring_state import random_state_kept, scoring_state
from hf_efx.rho_loss.arguments import RHOLossArgumentsMixin
from hf_efx.rho_loss.selection import SelectionFunction

logger = logging.getLogger(__name__)

# What trl's Trainers add up in compute_loss, to be logged.
_KEPT_FIGURES = ("_metrics", "_stored_metrics", "_total_train_tokens")


def check_arguments(args: Any) -> None:
    """Refuses arguments without the options of data selection."""
    if not isinstance(args, RHOLossArgumentsMixin):
        raise ValueError(
            f"args is a {type(args).__name__}: pass RHOLossArguments, or a dataclass of your own that puts "
            f"RHOLossArgumentsMixin before its TrainingArguments."
        )


def check_options(trainer: Any, function: SelectionFunction, has_table: bool) -> None:
    """Refuses options that this Trainer can't select with.

    Args:
        trainer: The Trainer, initialised.
        function: What chooses.
        has_table: Whether it was given irreducible losses.

    Raises:
        ValueError: Naming the option and the way out.
    """
    options: Any = trainer.args
    selects = options.selection_ratio < 1
    if function.needs_irreducible_loss and not has_table and selects:
        raise ValueError(
            f"selection={options.selection!r} needs irreducible_losses, the table of compute_irreducible_losses or "
            f"cross_fit_irreducible_losses."
        )
    if unwrap_model(trainer.model) is not trainer.model and (options.remove_unused_columns or not trainer.label_names):
        raise ValueError(
            f"model is a {type(trainer.model).__name__}, whose forward doesn't say which columns it takes: pass the "
            f"model itself and torch_compile=True, or set remove_unused_columns=False and label_names=['labels']."
        )
    if options.train_scoring_model and trainer.scoring_model is None:
        raise ValueError("train_scoring_model=True needs a scoring_model to train.")
    for name in ("packing", "padding_free"):  # trl's
        if getattr(options, name, False):
            raise ValueError(
                f"{name}=True puts several examples into one row, whose ids, scores and irreducible losses can't be "
                f"told apart any more. Set {name}=False; batches are trimmed to the longest example chosen."
            )
    if options.train_sampling_strategy == "batch_rebalance":
        raise ValueError(
            "train_sampling_strategy='batch_rebalance' makes batches of per_device_train_batch_size itself, which "
            "leaves nothing to choose from. Use 'random' or 'group_by_length'."
        )
    if (options.world_size > 1 or options.selection_scope == "global") and not trainer.accelerator.even_batches:
        raise ValueError(
            "even_batches=False in accelerator_config lets processes draw unequal numbers of rows, but they choose, "
            "and report what they chose, together: set even_batches=True."
        )
    if function.sampled and selects and (own_loss := _loss_of_its_own(trainer, below="RHOLossMixin")):
        raise ValueError(
            f"selection={options.selection!r} weighs the examples' losses, which {own_loss} doesn't know: choose a "
            f"selection that takes the highest scores, such as 'grad_norm'."
        )


def _loss_of_its_own(trainer: Any, below: str | None = None) -> str:
    """What computes another loss than transformers' Trainer, below a class of the Trainer's; empty if nothing does."""
    if trainer.compute_loss_func is not None:
        return "compute_loss_func"
    classes = type(trainer).__mro__
    start = 0 if below is None else [cls.__name__ for cls in classes].index(below)
    own = [cls for cls in classes[start:] if "compute_loss" in vars(cls) and not cls.__module__.startswith("hf_efx.")]
    return "" if own[0] is Trainer else f"compute_loss of {own[0].__name__}"


def rows_to_draw(options: Any, batch_size: int) -> int:
    """n_B of the paper's algorithm 1, shared out over the steps that one draw serves.

    Args:
        options: With those of `RHOLossArgumentsMixin`.
        batch_size: Rows trained on, n_b.

    Raises:
        ValueError: If nothing would be left to choose from.
    """
    if options.granularity == "token" or options.selection_ratio == 1:
        return batch_size
    drawn = round(batch_size / options.selection_ratio / options.rescore_every)
    if drawn <= batch_size:
        raise ValueError(
            f"selection_ratio={options.selection_ratio} and rescore_every={options.rescore_every} draw {drawn} rows "
            f"to choose per_device_train_batch_size={batch_size} from: lower one of the first two."
        )
    return drawn


def check_weighted_loss(trainer: Any, inputs: dict[str, Any], weight: str) -> None:
    """Refuses a Trainer whose compute_loss leaves the weights of a sampled selection where they are.

    Args:
        trainer: A Trainer, in a run.
        inputs: A batch, on the model's device, without the columns of selection.
        weight: The column of weights.
    """
    model = unwrap_model(trainer.model)
    inputs = {**inputs, weight: torch.ones(len(inputs["labels"]), device=inputs["labels"].device)}
    with scoring_state(model, "eval"):
        trainer.compute_loss(model, inputs)
    if weight in inputs:
        raise ValueError(
            f"selection={trainer.args.selection!r} weighs the examples' losses, which {_loss_of_its_own(trainer)} "
            f"doesn't: hand its inputs to super().compute_loss, or choose a selection that takes the highest scores."
        )


class LossCheck:
    """Compares what is scored with what is trained: at the first choice, and at the first from steps 10, 100, ... on.

    Args:
        trainer: A Trainer at the start of a run.
        weight: The column of a sampled selection's weights.
    """

    def __init__(self, trainer: Any, weight: str) -> None:
        self.trainer, self.weight = trainer, weight
        self.next_step = 0

    def __call__(self, batch: Any) -> None:
        """Looks at a batch with the columns of selection, where it is time.

        Raises:
            ValueError: If what is trained isn't what is scored.
        """
        trainer, step = self.trainer, self.trainer.state.global_step
        options, function = trainer.args, trainer.selection_function
        if step < self.next_step or "labels" not in batch:
            return
        inputs = {name: value for name, value in batch.items() if name not in trainer.extra_columns}
        check_rows(inputs, batch[ID_COLUMN].numel())
        if self.next_step == 0 and function.sampled:
            check_weighted_loss(trainer, inputs, self.weight)
        self.next_step = max(10, 10 * step)
        reads_loss = {"loss", "mc_loss", "grad_norm"} & {*function.quantities}
        if trainer.scoring_model is None and options.check_scored_loss and reads_loss:
            if options.scoring_batch_size is not None:  # no more rows than fit into one pass
                inputs = take_rows(inputs, slice(options.scoring_batch_size))
            check_scored_loss(trainer, inputs, trainer.scored_task(), options.label_smoothing_factor)


def check_scored_loss(trainer: Any, inputs: dict[str, Any], task: Task, label_smoothing: float) -> None:
    """Refuses a Trainer whose loss isn't the mean of the losses by which examples are scored.

    Both are computed in evaluation mode, of one batch: as the model is, and with its head moved so that losses differ
    by label; two forward passes each.

    Args:
        trainer: A Trainer, in a run.
        inputs: A batch, on the model's device, without the columns of selection.
        task: As what the labels are scored.
        label_smoothing: Of the scores.

    Raises:
        ValueError: If the two differ by more than a hundredth.
    """
    model = unwrap_model(trainer.model)
    rows, _ = aligned(model, inputs, task)
    figures = {name: copy.deepcopy(vars(trainer)[name]) for name in _KEPT_FIGURES if name in vars(trainer)}
    try:
        with scoring_state(model, "eval"):
            classes = _compare_losses(trainer, model, inputs, rows, task, label_smoothing)
            if task != "regression":
                with _uneven_head(model, classes):
                    _compare_losses(trainer, model, rows, rows, task, label_smoothing)
    finally:
        vars(trainer).update(figures)


def _compare_losses(
    trainer: Any, model: nn.Module, inputs: dict[str, Any], rows: dict[str, Any], task: Task, label_smoothing: float
) -> int:
    """Compares the loss that is trained of `inputs` with the one scored of `rows`; gives the width of the logits."""
    logits, labels = Forward(model, task)(rows)
    losses, counts = per_example_loss(logits, labels, task, label_smoothing=label_smoothing)
    mean = float((losses.double() * counts).sum() / counts.sum().clamp(min=1))  # an example without a label counts 0
    with trainer.compute_loss_context_manager():
        trained = float(_mean_loss(trainer, model, inputs, counts).detach().float().mean())
    if math.isfinite(trained) and abs(trained - mean) > 0.01 * max(abs(trained), abs(mean), 1e-3):
        source = _loss_of_its_own(trainer) or "the model"
        raise ValueError(
            f"{source} trains on a loss of {trained:.4g} where examples are scored by one of {mean:.4g} ({task}). Set "
            f"check_scored_loss=False if they are to be chosen by that all the same, another scoring_task, or a "
            f"selection that reads no loss, such as 'uniform'."
        )
    return logits.shape[-1]


@contextmanager
def _uneven_head(model: nn.Module, classes: int) -> Iterator[None]:
    """Moves the weights that make logits, so that losses differ by label, and puts them back bit for bit.

    A new head's logits are all but equal and its losses log(classes), weighted by class or not.
    """
    kept, tilt = [], torch.linspace(-2, 2, classes)
    try:
        for parameter in model.parameters():
            plain = type(parameter) is nn.Parameter and parameter.is_floating_point() and parameter.dim() in (1, 2)
            if not plain or classes not in parameter.shape:  # sharded and quantized ones stay
                continue
            view, change = parameter.detach().movedim(parameter.shape.index(classes), 0), tilt
            if view.dim() == 2:  # no more than 127 of a wide model's columns
                view = view[:, :: max(1, view.shape[1] // 64)]
                change = tilt[:, None] * torch.arange(1, view.shape[1] + 1).cos() / view.shape[1] ** 0.5
            kept.append((view, view.clone()))
            view += change.to(view)
        yield
    finally:
        for view, before in kept:
            view.copy_(before)


def _mean_loss(trainer: Any, model: Any, inputs: dict[str, Any], counts: torch.Tensor) -> torch.Tensor:
    """The Trainer's loss of a batch by itself, before it is multiplied for the average over processes."""
    if trainer.compute_loss_func is None:
        return trainer.compute_loss(model, dict(inputs))  # without a count of items the model takes the mean
    loss = trainer.compute_loss(model, dict(inputs), num_items_in_batch=counts.sum())
    others = max(trainer.accelerator.num_processes // trainer.get_tp_size(), trainer.args.n_gpu)
    return loss / (others if trainer.args.average_tokens_across_devices else 1)


def check_train_dataset(trainer: Any) -> IdIndex | None:
    """Refuses a training set without the columns that selection reads, or another one than the table's.

    Returns:
        The rows by id; None where the data set can't tell.
    """
    data, options, table = trainer.train_dataset, trainer.args, trainer.irreducible_losses
    index = check_columns(data, trainer.extra_columns)
    if table is None or not trainer.selection_function.needs_irreducible_loss:
        return index
    table.check(
        data,
        task=trainer.scored_task(),
        granularity=options.granularity,
        label_smoothing=options.label_smoothing_factor,
        tokenizer=trainer.processing_class,
    )
    return table.index


def check_columns(data: Any, columns: Sequence[str]) -> IdIndex | None:
    """Refuses a training set without the columns that selection reads.

    Args:
        data: A data set, a sequence of rows, or a stream.
        columns: `example_id`, and the report's.

    Returns:
        The rows by id of a `datasets.Dataset`, None for others.

    Raises:
        ValueError: If a column is missing, or an id is there twice or of another type.
    """
    names = getattr(data, "column_names", None)
    if names is None:
        rows = _first_rows(data, 1)
        if rows is None:  # the collator will miss the columns
            return None
        names = list(rows[0] if rows else {})
    for name in columns:
        if name not in names:
            way = "name another corrupted_column, or none"
            if name == ID_COLUMN:
                way = "call add_example_ids(dataset) before any map, filter or shuffle"
            raise ValueError(f"train_dataset has no column {name!r}, only {', '.join(names)}: {way}.")
    return IdIndex(data) if isinstance(data, Dataset) else None


def check_same_twice(collate: Callable[[], Mapping[str, Any]], collator: Any) -> None:
    """Refuses a data collator that makes other labels of the same rows each time, such as one that masks at random.

    Losses that were computed of one collation then say nothing about another. Other inputs under the same labels
    (augmented images) are logged. The random state is put back.

    Args:
        collate: Fetches and collates a few rows, the same in every call.
        collator: What collates, for the message.

    Raises:
        ValueError: If labels differ between two calls.
    """
    with random_state_kept(nn.Identity()):
        one, other = collate(), collate()
    changed = [
        name for name, value in one.items() if isinstance(value, torch.Tensor) and not _alike(value, other[name])
    ]
    what = (
        f"data_collator={getattr(collator, '__name__', type(collator).__name__)} (or the data set's transform) makes "
        f"other {', '.join(changed)} of the same rows each time, but the table of irreducible losses is of one time"
    )
    if any("label" in name for name in changed):
        raise ValueError(
            f"{what}: mask (or mix) once, with dataset.map, and collate with padding alone, or choose a selection "
            f"that reads no table, such as 'loss'"
        )
    if changed:
        logger.warning("%s: it stands for all of them.", what)


def _alike(one: torch.Tensor, other: Any) -> bool:
    """Whether two tensors hold the same, NaNs too."""
    return one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())


def check_collator(loader: Any, data: Any, collator: Any) -> None:
    """Refuses a collator that makes other labels each time, which a table's losses aren't of: `check_same_twice`.

    Args:
        loader: Of the training set.
        data: The training set.
        collator: The user's.
    """
    source = loader.dataset if isinstance(data, Dataset) else data  # without the columns that aren't used
    rows = _first_rows(source, 8)
    if rows is not None:  # a stream may shuffle itself: its rows are fetched once
        check_same_twice(lambda: loader.collate_fn(rows if _is_stream(source) else _first_rows(source, 8)), collator)


def _is_stream(data: Any) -> bool:
    # One of torch's has a __getitem__, which raises.
    return isinstance(data, torch.utils.data.IterableDataset) or not hasattr(data, "__getitem__")


def _first_rows(data: Any, count: int) -> list[Any] | None:
    """The first rows of a data set or a stream; None where what is looked at would be gone."""
    if _is_stream(data):
        return None if iter(data) is iter(data) else list(itertools.islice(data, count))
    return [data[i] for i in range(min(count, len(data)))]

"""What a selecting run refuses before any work: options, data sets and tables that don't belong together."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import Trainer

from hf_efx.core.data.example_ids import ID_COLUMN, IdIndex
from hf_efx.core.scoring.losses import Task
from hf_efx.core.scoring.scorer import Scorer
from hf_efx.core.scoring.scoring_state import scoring_state, unwrap_model
from hf_efx.rho_loss.arguments import RHOLossArgumentsMixin
from hf_efx.rho_loss.selection import SelectionFunction


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


def check_scored_loss(trainer: Any, inputs: dict[str, Any], task: Task, label_smoothing: float) -> None:
    """Refuses a Trainer whose loss isn't the mean of the losses by which examples are scored.

    Both are computed in evaluation mode, of one batch; two forward passes, once a run.

    Args:
        trainer: A Trainer, in a run.
        inputs: A batch, on the model's device, without the columns of selection.
        task: As what the labels are scored.
        label_smoothing: Of the scores.

    Raises:
        ValueError: If the two differ by more than a hundredth.
    """
    model = unwrap_model(trainer.model)
    with scoring_state(model, "eval"):
        scored = Scorer(("loss", "count"), task=task, label_smoothing=label_smoothing)(model, inputs)
        with trainer.compute_loss_context_manager():
            processes = _loss_scale(trainer)
            items = scored["count"].sum() * processes if processes else None  # were all batches as this one
            loss = trainer.compute_loss(model, dict(inputs), num_items_in_batch=items)
    trained = float(loss.detach().float().mean())
    counts = scored["count"] if task in ("causal", "seq2seq", "masked", "token_classification") else None
    counts = torch.ones_like(scored["loss"]) if counts is None else counts
    mean = float((scored["loss"].double() * counts).sum() / counts.sum().clamp(min=1))
    # The Trainer multiplies a loss that may divide by the items; one that doesn't, such as BERT's, stays multiplied.
    expected = {mean, mean * (processes or 1)}
    if math.isfinite(trained) and all(abs(trained - m) > 0.01 * max(abs(trained), abs(m), 1e-3) for m in expected):
        source = _loss_of_its_own(trainer) or "the model"
        raise ValueError(
            f"{source} trains on a loss of {trained:.4g} where examples are scored by one of {mean:.4g} ({task}). Set "
            f"scoring_task={task!r} if they are to be chosen by that all the same, register a selection function of "
            f"your own, or use one that reads no loss, such as 'uniform'."
        )


def _loss_scale(trainer: Any) -> int:
    """By what the Trainer multiplies a loss that it hands `num_items_in_batch`; 0 if it hands it none."""
    if not trainer.model_accepts_loss_kwargs and trainer.compute_loss_func is None:
        return 0
    if not trainer.args.average_tokens_across_devices:
        return 1
    processes = trainer.accelerator.num_processes // trainer.get_tp_size()
    return processes if trainer.args.n_gpu <= 1 else trainer.args.n_gpu


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
    if names is None:  # a stream may not know them; torch's has a __getitem__ that raises
        stream = isinstance(data, torch.utils.data.IterableDataset) or not hasattr(data, "__getitem__")
        names = list(next(iter(data), {}) if stream else data[0])
    for name in columns:
        if name not in names:
            way = "name another corrupted_column, or none"
            if name == ID_COLUMN:
                way = "call add_example_ids(dataset) before any map, filter or shuffle"
            raise ValueError(f"train_dataset has no column {name!r}, only {', '.join(names)}: {way}.")
    return IdIndex(data) if isinstance(data, Dataset) else None

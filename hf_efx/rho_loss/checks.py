"""What a selecting run refuses before any work: options, data sets and tables that don't belong together."""

import logging
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import Trainer

from hf_efx.core.data.example_ids import ID_COLUMN, IdIndex
from hf_efx.rho_loss.arguments import RHOLossArgumentsMixin
from hf_efx.rho_loss.selection import SelectionFunction

logger = logging.getLogger(__name__)


def check_arguments(args: Any) -> None:
    """Refuses arguments without the options of data selection."""
    if not isinstance(args, RHOLossArgumentsMixin):
        raise ValueError(
            f"args is a {type(args).__name__}: pass RHOLossArguments, or a dataclass of your own that puts "
            f"RHOLossArgumentsMixin before its TrainingArguments."
        )


def check_options(trainer: Trainer, function: SelectionFunction, has_table: bool, has_scoring_model: bool) -> None:
    """Refuses options that this Trainer can't select with.

    Args:
        trainer: The Trainer, initialised.
        function: What chooses.
        has_table: Whether it was given irreducible losses.
        has_scoring_model: Whether it was given a scoring model.

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
    if options.train_scoring_model and not has_scoring_model:
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
    if options.selection_scope == "global" and not trainer.accelerator.even_batches:
        raise ValueError(
            "selection_scope='global' needs draws of equal size on all processes: set even_batches=True in "
            "accelerator_config."
        )
    if trainer.compute_loss_func is not None and selects:
        logger.warning("compute_loss_func trains on another loss than the model's own, by which examples are scored.")


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
    if names is None:  # a stream may not know them
        names = list(data[0] if hasattr(data, "__getitem__") else next(iter(data), {}))
    for name in columns:
        if name not in names:
            way = "name another corrupted_column, or none"
            if name == ID_COLUMN:
                way = "call add_example_ids(dataset) before any map, filter or shuffle"
            raise ValueError(f"train_dataset has no column {name!r}, only {', '.join(names)}: {way}.")
    return IdIndex(data) if isinstance(data, Dataset) else None

"""One fixed sample of examples, and the loss of each of them: every measure of a model sees the same numbers."""

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from numbers import Integral
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset
from torch import nn
from torch.utils.data import IterableDataset

from hf_efx.core.scoring.batches import check_rows
from hf_efx.core.scoring.losses import IGNORE_INDEX, Task, aligned_labels, per_example_loss
from hf_efx.core.scoring.scorer import Scorer, infer_task
from hf_efx.core.scoring.scoring_state import base_model

Losses = torch.Tensor | tuple[torch.Tensor, torch.Tensor] | float
EvaluateLoss = Callable[[nn.Module], Losses]


def check_whole_number(name: str, value: Any, least: int) -> None:
    """Raises TypeError for an option that is no whole number, ValueError for one that is too small."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}={value!r}: expected a whole number, {least} or more")
    if value < least:
        raise ValueError(f"{name}={value}: expected {least} or more")


class Sample:
    """A fixed sample of a data set, collated once; called with a model it gives the loss of every example.

    Args:
        dataset: Rows with labels, by number: a `datasets.Dataset`, a torch one, a list.
        samples: Examples drawn without replacement, or all if there are fewer; None takes all.
        seed: Of the draw.
        data_collator: Makes batches of rows; None for transformers' default.
        task: As in `Scorer`; None reads it off the model, whose own loss it must be then.
        batch_size: Examples a forward pass.
        label_smoothing: As the model is trained with.

    Raises:
        TypeError: For a number that isn't whole.
        ValueError: If the sample is empty, has no labels, or no row for each example.
    """

    def __init__(
        self,
        dataset: Any,
        samples: int | None = 1000,
        seed: int = 0,
        data_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
        task: Task | None = None,
        batch_size: int = 64,
        label_smoothing: float = 0.0,
    ) -> None:
        by_number = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        if not by_number or isinstance(dataset, (Mapping, IterableDataset)):
            raise ValueError(
                f"dataset is a {type(dataset).__name__}, whose rows can't be drawn by number: pass one split of a "
                f"data set with a length, or a function of the model that returns its losses"
            )
        if samples is not None:
            check_whole_number("samples", samples, 1)
        check_whole_number("batch_size", batch_size, 1)
        check_whole_number("seed", seed, 0)
        if len(dataset) == 0:
            raise ValueError("dataset is empty: prunability needs examples to compute a loss on")
        self.count = min(len(dataset), samples or len(dataset))
        chosen = np.sort(np.random.default_rng(seed).choice(len(dataset), self.count, replace=False)).tolist()
        # One by one a datasets.Dataset is slow.
        rows = dataset.__getitems__(chosen) if isinstance(dataset, Dataset) else [dataset[i] for i in chosen]
        self.batches = [
            _collate(rows[start : start + batch_size], data_collator) for start in range(0, self.count, batch_size)
        ]
        self.scorer = Scorer(("loss", "count"), task=task, label_smoothing=label_smoothing)

    def smoothed(self, label_smoothing: float) -> "Sample":
        """The same sample with the losses of a model that is trained with label smoothing."""
        other = copy.copy(self)
        other.scorer = replace(self.scorer, label_smoothing=label_smoothing)
        return other

    def __call__(self, model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses [n] and the labels that each is a mean of [n], both float64; the model's loss is their mean."""
        parts = [self.scorer(model, _model_columns(model, batch)) for batch in self.batches]
        losses, counts = (torch.cat([part[name] for part in parts]).double() for name in ("loss", "count"))
        return losses, counts

    def outcome(self, model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses [n] and margins, one of each label: its logit less the largest other one. With gradients, if enabled.

        Raises:
            ValueError: If the task has no classes, or an encoder of its own.
        """
        task = self.scorer.task or infer_task(model)
        if task in ("regression", "seq2seq"):
            raise ValueError(f"task={task!r}: margins are those of classes that one forward pass of the inputs gives")
        device = next(model.parameters()).device
        losses, margins = [], []
        for batch in self.batches:
            inputs = {k: v.to(device) for k, v in _model_columns(model, batch).items() if isinstance(v, torch.Tensor)}
            labels = inputs.pop("labels")
            outputs: Any = model(**inputs)
            logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
            losses.append(per_example_loss(logits, labels, task)[0])
            margins.append(label_margins(logits, aligned_labels(labels, task)))
        return torch.cat(losses), torch.cat(margins)


def _collate(rows: list[Any], data_collator: Callable[[list[Any]], Any] | None) -> Mapping[str, Any]:
    """A batch by name, with labels and a row for each example."""
    if data_collator is None and not isinstance(rows[0], Mapping):
        raise ValueError(
            f"dataset has rows of type {type(rows[0]).__name__}, whose parts have no names: give a data_collator that "
            f"returns a dict with 'labels', or a function of the model that returns its losses"
        )
    try:
        batch = (data_collator or transformers.default_data_collator)(rows)
    except ValueError as error:
        if data_collator is not None:
            raise
        raise ValueError(
            f"rows of the dataset don't make a batch ({error}): give a data_collator that pads"
        ) from error
    if not isinstance(batch, Mapping) or "labels" not in batch:
        found = f"only {', '.join(batch)}" if isinstance(batch, Mapping) else f"but is a {type(batch).__name__}"
        raise ValueError(f"a batch of the sample has no 'labels', {found}: prunability needs them")
    check_rows(batch, len(rows))
    return batch


def label_margins(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The label's logit less the largest other one, [m], of logits [..., classes] at the m labels that aren't -100."""
    logits, labels = logits[labels != IGNORE_INDEX], labels[labels != IGNORE_INDEX]
    own = logits.gather(-1, labels[:, None])
    return (own - logits.scatter(-1, labels[:, None], -torch.inf).amax(-1, keepdim=True))[:, 0]


def _model_columns(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that the model's forward names, and the labels, as the Trainer keeps them; all if it names none."""
    parameters = inspect.signature(base_model(model).forward).parameters.values()
    named = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    return {name: value for name, value in batch.items() if not named or name in named or name == "labels"}

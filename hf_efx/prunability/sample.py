"""One fixed sample of examples, and the loss of each of them: every measure of a model sees the same numbers."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset
from torch import nn

from hf_efx.core.scoring.batches import batch_size as rows_of
from hf_efx.core.scoring.losses import IGNORE_INDEX, Task, aligned_labels, per_example_loss
from hf_efx.core.scoring.scorer import Scorer, infer_task
from hf_efx.core.scoring.scoring_state import base_model

Losses = torch.Tensor | tuple[torch.Tensor, torch.Tensor] | float
EvaluateLoss = Callable[[nn.Module], Losses]


class Sample:
    """A fixed sample of a data set, collated once; called with a model it gives the loss of every example.

    Args:
        dataset: Rows with labels, by number: a `datasets.Dataset`, a torch one, a list.
        samples: Examples drawn without replacement, or all if there are fewer; None takes all.
        seed: Of the draw.
        data_collator: Makes batches of rows; None for transformers' default.
        task: As in `Scorer`; None reads it off the model.
        batch_size: Examples a forward pass.

    Raises:
        ValueError: If the sample is empty or has no labels.
    """

    def __init__(
        self,
        dataset: Any,
        samples: int | None = 1000,
        seed: int = 0,
        data_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
        task: Task | None = None,
        batch_size: int = 64,
    ) -> None:
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise ValueError(
                f"dataset is a {type(dataset).__name__}, whose rows can't be drawn by number: pass a data set with a "
                f"length, or a function of the model that returns its losses"
            )
        if samples is not None and samples < 1:
            raise ValueError(f"samples={samples}: expected 1 or more examples, or None for all")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: expected 1 or more examples")
        if len(dataset) == 0:
            raise ValueError("dataset is empty: prunability needs examples to compute a loss on")
        count = min(len(dataset), samples or len(dataset))
        chosen = np.sort(np.random.default_rng(seed).choice(len(dataset), count, replace=False)).tolist()
        collate = data_collator or transformers.default_data_collator
        # One by one a datasets.Dataset is slow.
        rows = dataset.__getitems__(chosen) if isinstance(dataset, Dataset) else [dataset[i] for i in chosen]
        self.batches: list[Mapping[str, Any]] = [
            collate(rows[start : start + batch_size]) for start in range(0, count, batch_size)
        ]
        if any("labels" not in batch for batch in self.batches):
            raise ValueError(f"the sample has no 'labels', only {', '.join(self.batches[0])}: prunability needs them")
        self.count = sum(rows_of(batch) for batch in self.batches)
        self._scorer = Scorer(("loss", "count"), task=task)
        self._correct = Scorer(("correct", "count"), task=task)

    def __call__(self, model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses [n] and the labels that each is a mean of [n], both float64; the model's loss is their mean."""
        return self._scored(model, self._scorer, "loss")

    def accuracy(self, model: nn.Module) -> float:
        """Share of the labels that the model predicts."""
        correct, counts = self._scored(model, self._correct, "correct")
        return float((correct * counts).sum() / counts.sum())

    def outcome(self, model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses [n] and margins, one of each label: its logit less the largest other one. With gradients, if enabled.

        Raises:
            ValueError: If the task has no classes, or an encoder of its own.
        """
        task = self._scorer.task or infer_task(model)
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

    def _scored(self, model: nn.Module, scorer: Scorer, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        parts = [scorer(model, _model_columns(model, batch)) for batch in self.batches]
        counts = torch.cat([part["count"] for part in parts]).double()
        return torch.cat([part[name] for part in parts]).double(), counts


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

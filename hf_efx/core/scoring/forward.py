"""A model's logits for a batch, and whether they give the loss that the model computes itself."""

import inspect
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.models.auto import modeling_auto

from hf_efx.core.scoring.batches import align_left, take_rows, trim_padding
from hf_efx.core.scoring.losses import IGNORE_INDEX, Task, aligned_labels, per_example_loss
from hf_efx.core.scoring.scoring_state import base_model, scoring_state

logger = logging.getLogger(__name__)

_DECODER_INPUTS = {"decoder_input_ids", "decoder_inputs_embeds"}
# Given labels alone, these mask the decoder's padding, which they don't where they are given the decoder's inputs.
_MASK_LABELS = {"encoder-decoder", "speech-encoder-decoder", "vision-encoder-decoder"}
_NEED_LABELS: set[type] = set()  # classes that failed without, though theirs have a default
_CHECKED_ROWS = 8  # enough for means over tokens and over examples to differ


class Forward:
    """Gets logits out of a model, without its own loss being computed where that can be had.

    Args:
        model: The unwrapped model.
        task: Its task.
    """

    def __init__(self, model: nn.Module, task: Task) -> None:
        self.model, self.base = model, base_model(model)
        self.task: Task = task
        self.parameters = inspect.signature(type(self.base).forward).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in self.parameters.values())
        self.takes_labels = takes_any or "labels" in self.parameters
        parameter = next(model.parameters(), None)
        self.device = torch.device("cpu") if parameter is None else parameter.device

    def __call__(self, batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and labels of a batch, which is taken to the model's device."""
        inputs = self._inputs(batch)
        labels = inputs.pop("labels")
        with_labels = self._needs_labels()
        if self.task == "seq2seq" and not _DECODER_INPUTS & set(inputs):
            # The hook that transformers' own DataCollatorForSeq2Seq looks for; models without it shift the labels in
            # their forward alone.
            shift_right = getattr(self.base, "prepare_decoder_input_ids_from_labels", None)
            if shift_right is None or self.base.config.model_type in _MASK_LABELS:
                with_labels = True
            else:
                inputs["decoder_input_ids"] = shift_right(labels=labels)
        try:
            outputs = self.model(**inputs, **({"labels": labels} if with_labels else {}))
        except (TypeError, AttributeError):
            if with_labels or "labels" not in self.parameters:
                raise
            # A module of one's own, whose labels have a default, but which always computes its loss.
            outputs, with_labels = self.model(**inputs, labels=labels), True
            _NEED_LABELS.add(type(self.base))
        if isinstance(outputs, Mapping):
            outputs = outputs["logits"]
        elif isinstance(outputs, (tuple, list)):
            outputs = outputs[1 if with_labels else 0]
        return outputs, labels

    def _needs_labels(self) -> bool:
        """Whether the model's forward fails without labels, as far as that is known."""
        if "labels" not in self.parameters:
            return False
        return type(self.base) in _NEED_LABELS or self.parameters["labels"].default is inspect.Parameter.empty

    def own_loss(self, batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss that the model computes itself for a batch, and the logits beside it."""
        outputs = self.model(**self._inputs(batch))
        if isinstance(outputs, Mapping):
            outputs = (outputs.get("loss"), outputs["logits"])
        if not isinstance(outputs, (tuple, list)) or outputs[0] is None:
            raise ValueError(f"{type(self.base).__name__} returns no loss for labels")
        return torch.as_tensor(outputs[0]), outputs[1]

    def _inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        inputs = {k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        return {**inputs, "use_cache": False} if "use_cache" in self.parameters else inputs


def aligned(model: nn.Module, batch: Mapping[str, Any], task: Task) -> tuple[dict[str, Any], torch.Tensor | None]:
    """`align_left`, but for what must stay: the decoder's side, and the last column where it is pooled (XLNet)."""
    config = getattr(base_model(model), "config", None)
    if task in ("classification", "regression") and getattr(config, "summary_type", None) == "last":
        return dict(batch), None
    apart = {k: v for k, v in batch.items() if task == "seq2seq" and (k == "labels" or k.startswith("decoder_"))}
    moved, shift = align_left({k: v for k, v in batch.items() if k not in apart})
    return {**moved, **apart}, None if apart else shift


def compare_own_loss(
    call: Forward, batch: Mapping[str, Any], most: int | None = None, label_smoothing: float = 0.0, named: bool = False
) -> None:
    """`check_own_loss`, and the Trainer's way of smoothing; where the task was named, a difference is only logged.

    Args:
        call: The model with its task.
        batch: An `aligned` batch.
        most: Rows that fit into one pass.
        label_smoothing: As in `per_example_loss`.
        named: Whether the task was named, not inferred.

    Raises:
        ValueError: If the losses differ, and the task was inferred.
    """
    try:
        if label_smoothing:
            _check_smoothing(call, label_smoothing)
        check_own_loss(call, batch, most)
    except ValueError as error:
        if not named:
            raise
        level = logging.WARNING if call.takes_labels else logging.INFO
        logger.log(level, "task=%r was named, and the plain loss is scored: %s", call.task, error)


def _check_smoothing(call: Forward, label_smoothing: float) -> None:
    """Refuses classes of which transformers' Trainer moves the labels otherwise when it smooths them."""
    name = type(call.base).__name__
    moves = name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    if moves != (call.task == "causal"):
        raise ValueError(
            f"label_smoothing={label_smoothing}: transformers' Trainer then {'moves' if moves else 'leaves'} the "
            f"labels of a {name}, whose own loss {'leaves' if moves else 'moves'} them. Set label_smoothing_factor=0"
        )


def check_own_loss(call: Forward, batch: Mapping[str, Any], most: int | None = None) -> None:
    """Compares the mean of the examples' losses with the loss that the model computes itself, on a few rows.

    Two forward passes in eval mode, whatever the batch, so that the processes of a sharded model make as many.

    Args:
        call: The model with its task.
        batch: An `aligned` batch.
        most: Rows that fit into one pass.

    Raises:
        ValueError: If they differ.
    """
    name = type(call.base).__name__
    way_out = (
        f"name task={call.task!r} (scoring_task in RHOLossArguments) to score the plain loss all the same, or take a "
        f"function of your own where one is taken"
    )
    if not call.takes_labels:
        raise ValueError(f"{name} takes no 'labels', so that the loss it is trained by isn't known: {way_out}")
    labelled = aligned_labels(batch["labels"], call.task) != IGNORE_INDEX
    rows = labelled.reshape(len(labelled), -1).any(1).nonzero()[: min(most or _CHECKED_ROWS, _CHECKED_ROWS), 0]
    chunk = trim_padding(take_rows(batch, rows if len(rows) else slice(0, 1)))
    config = getattr(call.base, "config", None)
    problem = getattr(config, "problem_type", None)
    try:
        with scoring_state(call.model):
            logits, labels = call(chunk)
            mean = _mean_loss(logits, labels, call.task)
            own, own_logits = call.own_loss(chunk)
    finally:
        if config is not None and getattr(config, "problem_type", None) != problem:  # a classifier's own loss sets it
            config.problem_type = problem
    # From the same logits only the loss' own rounding stands between them, from another pass that of the logits.
    pairs = ((_mean_loss(own_logits, labels, call.task), own.dtype), (mean, logits.dtype))
    alike = (torch.isclose(own.double(), one, _rounding(dtype), 1e-6, equal_nan=True).all() for one, dtype in pairs)
    if not len(rows) or all(alike):
        return
    if call.task == "seq2seq" and not _DECODER_INPUTS & set(batch):
        way_out = f"collate with DataCollatorForSeq2Seq(model=model), which adds decoder_input_ids, or {way_out}"
    raise ValueError(
        f"{name} computes a loss of {own.float().mean():.6g} for a batch whose mean {call.task} loss is "
        f"{mean:.6g}: it adds other terms (a router's, say: set config.output_router_logits=False), weights or "
        f"moves its labels, so that its examples' losses aren't known. Else {way_out}"
    )


def _mean_loss(logits: torch.Tensor, labels: torch.Tensor, task: Task) -> torch.Tensor:
    losses, counts = per_example_loss(logits, labels, task)
    return (losses.double() * counts).sum() / counts.sum()


def _rounding(dtype: torch.dtype) -> float:
    return 1e-4 if dtype in (torch.float32, torch.float64) else 1e-2

"""The loss of every single example, or token, as a function of logits and labels.

A model's own loss is the mean over a batch; selecting examples (RHO-LOSS) and scoring them needs one number each.
Averaged with the counts that come with them, these are the model's own loss.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F

Task = Literal["causal", "seq2seq", "masked", "token_classification", "classification", "regression"]
IGNORE_INDEX = -100  # transformers' label for "no target here"


def per_example_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    task: Task,
    *,
    granularity: Literal["example", "token"] = "example",
    label_smoothing: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes one loss per example, or per token, with gradients if the logits have any.

    Cross-entropy in nats; the mean squared error for regression. Half-precision logits are upcast to float32. An
    example without a valid label has loss 0 and count 0, never NaN: what that should mean is the caller's decision.

    `(loss * count).sum() / count.sum()` is the loss that a transformers model computes itself for the batch.

    Args:
        logits: [batch, seq, vocab] for the sequence tasks, [batch, classes] for classification, [batch] or
            [batch, outputs] for regression.
        labels: [batch, seq] of ids, -100 where there is no target; [batch] of ids (or -100) for classification; shaped
            as the logits, [batch] and [batch, 1] being the same, for regression.
        task: `"causal"` compares position t with label t + 1, the other sequence tasks position t with label t.
        granularity: `"example"` averages over an example's own valid tokens, `"token"` gives each token's loss.
        label_smoothing: Share of the target's mass that is spread evenly over all classes, from 0 to below 1.

    Returns:
        Loss and count. By example: [batch] float and [batch] int64, the number of valid labels averaged over. By
        token: [batch, seq] float and [batch, seq] bool, True where there is a target; for `"causal"` the entry at t is
        about predicting token t + 1, so that the last column is never valid.

    Raises:
        ValueError: For an unknown task or granularity, shapes that don't belong together, or a label_smoothing that is
            out of range or has no meaning for the task.
    """
    check_inputs(logits, labels, task, granularity, label_smoothing)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    labels = labels.to(logits.device)
    if task == "regression":
        error = logits.to(dtype) - labels.reshape(logits.shape).to(dtype)
        loss = error.square().reshape(len(logits), -1).mean(-1)
        return loss, torch.ones_like(loss, dtype=torch.int64)
    labels = aligned_labels(labels, task)
    loss = _cross_entropy(logits, labels, dtype, label_smoothing)
    mask = labels != IGNORE_INDEX
    if granularity == "token":
        return loss, mask
    count = mask.reshape(len(labels), -1).sum(-1)
    return loss.reshape(len(labels), -1).sum(-1) / count.clamp(min=1), count


def aligned_labels(labels: torch.Tensor, task: Task) -> torch.Tensor:
    """Labels such that those at position t belong to the logits at t: a causal model's move one to the left.

    Args:
        labels: [batch, seq], or [batch] for classification.
        task: As in `per_example_loss`.
    """
    if task != "causal":
        return labels
    # Not the logits to the right: a slice of the logits would be copied.
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def _cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype, label_smoothing: float
) -> torch.Tensor:
    """F.cross_entropy(reduction="none") along the last dimension, 0 where ignored.

    Written as its two halves, since log_softmax takes a dtype: on CUDA the upcast then happens inside the kernel and
    no float32 copy of half-precision logits is made. The log-probabilities are the one large tensor.
    """
    log_probs = F.log_softmax(logits, dim=-1, dtype=dtype)
    flat = log_probs.reshape(-1, log_probs.shape[-1])  # a view: log_softmax returns contiguous memory
    loss = F.nll_loss(flat, labels.reshape(-1), ignore_index=IGNORE_INDEX, reduction="none").reshape(labels.shape)
    if label_smoothing:
        spread = -log_probs.mean(-1).masked_fill(labels == IGNORE_INDEX, 0.0)
        loss = (1 - label_smoothing) * loss + label_smoothing * spread
    return loss


def check_inputs(
    logits: torch.Tensor, labels: torch.Tensor, task: str, granularity: str = "example", label_smoothing: float = 0.0
) -> None:
    """Raises the ValueErrors of `per_example_loss`, whose arguments these are."""
    if task not in get_args(Task):
        raise ValueError(f"task={task!r} is unknown; choose one of {', '.join(get_args(Task))}.")
    if granularity not in ("example", "token"):
        raise ValueError(f"granularity={granularity!r} is unknown; choose 'example' or 'token'.")
    if granularity == "token" and task in ("classification", "regression"):
        raise ValueError(f"granularity='token' has no meaning for task={task!r}, which has no tokens; use 'example'.")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing={label_smoothing!r} must be from 0 to below 1.")
    if label_smoothing and task == "regression":
        raise ValueError(f"label_smoothing={label_smoothing!r} has no meaning for task='regression'; leave it at 0.")
    got = f"logits of shape {list(logits.shape)} and labels of shape {list(labels.shape)}"
    if task == "regression":
        # Without this, [batch, 1] against [batch] would broadcast to [batch, batch] silently.
        if logits.shape[0] != labels.shape[0] or logits.numel() != labels.numel():
            raise ValueError(f"task='regression' needs labels shaped as the logits, but got {got}.")
    elif logits.shape[:-1] != labels.shape or logits.dim() != (2 if task == "classification" else 3):
        need = "[batch, classes] and [batch]" if task == "classification" else "[batch, seq, vocab] and [batch, seq]"
        raise ValueError(f"task={task!r} needs logits and labels of shapes {need}, but got {got}.")
    elif labels.is_floating_point():
        raise ValueError(f"task={task!r} needs labels that are whole numbers, but they are {labels.dtype}.")

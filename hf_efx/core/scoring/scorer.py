"""Scoring: one number for every example of a batch, without a trace in the model or the random state.

    losses = Scorer()(model, batch)["loss"]  # [n], in nats

Scores are those of the examples one at a time: they depend neither on how a batch is padded, nor on what else is in it
(but for batch statistics in `mode="train"`).
"""

import math
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import KW_ONLY, dataclass, field
from functools import cache
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.auto import modeling_auto

from hf_efx.core.model.wrappers import unwrap_model
from hf_efx.core.scoring.batches import batch_size as rows_of
from hf_efx.core.scoring.batches import sequence_names, take_columns, take_rows, trim_padding
from hf_efx.core.scoring.forward import Forward, aligned, compare_own_loss
from hf_efx.core.scoring.losses import IGNORE_INDEX, Task, aligned_labels, check_inputs, per_example_loss
from hf_efx.core.scoring.scoring_state import base_model, scoring_state

Mode = Literal["eval", "train"]
Precision = Literal["bf16", "fp16"]

# Each is one number per example, or per token. The first group is read off one forward pass, the second off
# `mc_samples` passes with dropout.
_ONE_PASS = ("loss", "count", "correct", "grad_norm", "entropy")
_SAMPLED = ("conditional_entropy", "bald", "mc_loss")
QUANTITIES = (*_ONE_PASS, *_SAMPLED)

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}

# Which task a transformers class computes its own loss for, by the auto classes that hand it out.
_HEADS: tuple[tuple[Task, tuple[str, ...]], ...] = (
    ("causal", ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT")),
    ("seq2seq", ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT")),
    ("masked", ("MASKED_LM",)),
    ("token_classification", ("TOKEN_CLASSIFICATION",)),
    ("classification", ("SEQUENCE_CLASSIFICATION", "IMAGE_CLASSIFICATION", "AUDIO_CLASSIFICATION")),
)
_LANGUAGE_MODELS = {"causal", "seq2seq", "masked"}
# Decoders under transformers' causal heads whose labels are shifted already; test_own_loss.py looks at all classes.
_UNSHIFTED = {
    "BartForCausalLM",
    "BigBirdPegasusForCausalLM",
    "BlenderbotForCausalLM",
    "BlenderbotSmallForCausalLM",
    "CpmAntForCausalLM",
    "MBartForCausalLM",
    "MarianForCausalLM",
    "MvpForCausalLM",
    "PLBartForCausalLM",
    "PegasusForCausalLM",
    "TrOCRForCausalLM",
    "WhisperForCausalLM",
    "XLMWithLMHeadModel",
    "XLNetLMHeadModel",
}


@cache
def bf16_is_faster(device: torch.device) -> bool:
    """Whether a device multiplies matrices faster in bfloat16 than in float32.

    Timed on the CPU, once a process: neither torch's nor oneDNN's word on instruction sets tells (limited to AVX-512
    without bfloat16, or to AVX2, products there take three to five times as long, all the same).
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type != "cpu":
        return False
    generator = torch.Generator().manual_seed(0)
    operands = [torch.rand(512, 512, generator=generator) for _ in range(2)]
    best = {torch.float32: math.inf, torch.bfloat16: math.inf}
    for _ in range(6):  # in turn, so that whatever else the machine does meets both
        for dtype in best:
            a, b = (operand.to(dtype) for operand in operands)
            start = time.perf_counter()
            torch.mm(a, b)
            best[dtype] = min(best[dtype], time.perf_counter() - start)
    return best[torch.bfloat16] < 0.8 * best[torch.float32]


def infer_task(model: nn.Module) -> Task:
    """Which loss a transformers model computes itself, read off its class and config.

    A decoder whose labels are shifted before it gets them (BART's, XLNet's, ...) is `"masked"`: position t, label t.

    Raises:
        ValueError: If that isn't clear (a module of one's own, several labels an example, ...).
    """
    model = base_model(model)
    names = {cls.__name__ for cls in type(model).__mro__}
    config: Any = getattr(model, "config", None)
    found: set[Task] = {task for task, heads in _HEADS if any(names & class_names(head) for head in heads)}
    if found & _LANGUAGE_MODELS:  # BART's one class stands in several lists, an audio model's only under seq2seq
        if getattr(config, "is_encoder_decoder", False):
            found = {"seq2seq"}
        elif names & _UNSHIFTED:
            found = {"masked"}
        else:
            found = found - {"seq2seq"} or {"causal"}
    if len(found) == 1:
        task = found.pop()
        if task != "classification":
            return task
        problem = getattr(config, "problem_type", None)
        if problem == "regression" or (problem is None and config.num_labels == 1):
            return "regression"
        if problem in (None, "single_label_classification"):
            return task
    raise ValueError(
        f"task=None, but {type(model).__name__} doesn't say which loss it computes; name the task: "
        f"{', '.join(get_args(Task))} (several labels an example, spans and the like aren't scored)"
    )


@cache
def class_names(head: str) -> frozenset[str]:
    """The transformers classes with a head, by the name of its mapping such as `"CAUSAL_LM"`."""
    values = getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING_NAMES").values()
    return frozenset(name for value in values for name in ((value,) if isinstance(value, str) else value))


@dataclass(frozen=True)
class Scorer:
    """Computes quantities of every example, or token, of a batch.

    `loss` is the model's own (`per_example_loss`), `count` the number of labels it averages over, `correct` the share
    of them that the model predicts, `grad_norm` the norm of the loss' gradient at the logits, ||softmax(z) - onehot||
    without smoothing, and `entropy` the prediction's, in nats. `conditional_entropy` is the mean entropy of
    `mc_samples` predictions with dropout, `bald` the entropy of their mean less that: the mutual information of
    prediction and weights, and `mc_loss` the mean loss of those predictions. All but `count` are means over an
    example's valid labels, 0 where it has none.

    Attributes:
        quantities: Any of `QUANTITIES`.
        task: As in `per_example_loss`; None reads it off the model (`infer_task`). The mean of the first batch's
            losses is compared with the model's own: another one is refused, or logged where the task was named.
        granularity: `"example"`, or `"token"` for the sequence tasks.
        label_smoothing: As in `per_example_loss`.
        mode: `"eval"`, or `"train"` for dropout and batch statistics as in a training step.
        precision: `"bf16"` or `"fp16"` autocast, which speeds a device up that has units for it and blurs scores to
            two or three digits; None computes as the model itself does, mixed precision of the Trainer included.
        batch_size: Rows a forward pass. Rows of about one length go together, so that fewer save padding and memory,
            until passes are too small for the device; None takes all rows at once.
        mc_samples: Forward passes with dropout; the error of their mean falls with the square root.

    Raises:
        ValueError: For an option out of its range.
    """

    quantities: Sequence[str] = ("loss",)
    _: KW_ONLY
    task: Task | None = None
    granularity: Literal["example", "token"] = "example"
    label_smoothing: float = 0.0
    mode: Mode = "eval"
    precision: Precision | None = None
    batch_size: int | None = None
    mc_samples: int = 10  # as in the RHO-LOSS paper's code, src/curricula/selection_methods.py
    _checked: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.quantities, str) or not set(self.quantities) <= set(QUANTITIES):
            raise ValueError(f"quantities={self.quantities!r} must be a list out of {', '.join(QUANTITIES)}")
        choices = {
            "task": (None, *get_args(Task)),
            "granularity": ("example", "token"),
            "mode": get_args(Mode),
            "precision": (None, *_AUTOCAST),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose from {allowed}")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be 1 or more, or None for all rows at once")
        if self.mc_samples < 2:
            raise ValueError(f"mc_samples={self.mc_samples} must be 2 or more: one sample has nothing to differ from")

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Scores a batch.

        Args:
            model: A model, also inside DistributedDataParallel or torch.compile: see `scoring_state` for what is kept.
            batch: A collated batch with `labels`, on any device, of columns that the model takes.

        Returns:
            Each quantity, on the model's device: [n] float32 (`count`: int64). By token: [n, seq] float32, 0 where
            there is no target, and `"mask"` [n, seq] bool; for causal models the entry at t is about predicting
            token t + 1. `count` is [n] there too.

        Raises:
            ValueError: No labels; a task that can't be inferred, or has no such quantity; a model whose own loss is
                another one; rows that can't be told apart; dropout samples that are all alike.
        """
        model = unwrap_model(model)
        task = self.task or infer_task(model)
        if "labels" not in batch:
            raise ValueError(f"the batch has no 'labels' to score, only {', '.join(batch)}")
        if task == "regression" and (wrong := set(self.quantities) - {"loss", "count", "grad_norm"}):
            raise ValueError(f"quantities={sorted(wrong)} have no meaning for task='regression', which has no classes")
        rows_of(batch)
        rows, shift = aligned(model, batch, task)
        call = Forward(model, task)
        if model not in self._checked:
            compare_own_loss(call, rows, self.batch_size, self.label_smoothing, named=self.task is not None)
            self._checked.add(model)
        results: dict[str, torch.Tensor] = {}
        once = [name for name in self.quantities if name in _ONE_PASS]
        sampled = [name for name in self.quantities if name in _SAMPLED]
        if once:
            with scoring_state(model, self.mode), self._autocast(call.device):
                results |= self._over_chunks(rows, lambda chunk: self._measured(call, chunk, once))
        if sampled:
            with scoring_state(model, "dropout"), self._autocast(call.device):
                results |= self._over_chunks(rows, lambda chunk: self._sampled(call, chunk, sampled))
            self._check_spread(results.pop("spread"))
        if shift is not None and self.granularity == "token":
            for name, value in results.items():
                if value.dim() == 2:
                    columns = torch.arange(value.shape[1], device=value.device) - shift.to(value.device)[:, None]
                    results[name] = take_columns(value, columns % value.shape[1])
        return results

    def _autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        if self.precision is None:
            return nullcontext()
        return torch.autocast(device.type, _AUTOCAST[self.precision])

    def _measured(self, call: Forward, chunk: Mapping[str, Any], names: list[str]) -> dict[str, torch.Tensor]:
        logits, labels = call(chunk)
        return measure(logits, labels, call.task, names, self.granularity, self.label_smoothing)

    def _sampled(self, call: Forward, chunk: Mapping[str, Any], names: list[str]) -> dict[str, torch.Tensor]:
        """Mean entropy, mutual information and mean loss over samples, and how far [n] the samples are apart."""
        first, labels = call(chunk)
        check_inputs(first, labels, call.task, self.granularity, self.label_smoothing)
        labels, with_loss = labels.to(first.device), "mc_loss" in names
        options: Any = {"granularity": self.granularity, "label_smoothing": self.label_smoothing}
        mean = F.softmax(first, -1, dtype=torch.float32)
        conditional, spread = entropy(mean), torch.zeros(len(first), device=first.device)
        losses = [per_example_loss(first, labels, call.task, **options)[0]] if with_loss else []
        for _ in range(self.mc_samples - 1):
            logits, _ = call(chunk)
            probs = F.softmax(logits, -1, dtype=torch.float32)
            conditional += entropy(probs)
            mean += probs
            if with_loss:
                losses.append(per_example_loss(logits, labels, call.task, **options)[0])
            spread = torch.maximum(spread, (logits - first).abs().flatten(1).amax(1).float())
        conditional /= self.mc_samples
        bald = (entropy(mean / self.mc_samples) - conditional).clamp(min=0)  # rounding alone makes it negative
        values = {"conditional_entropy": conditional, "bald": bald}
        mask = aligned_labels(labels, call.task) != IGNORE_INDEX
        results = _summarised({name: values[name] for name in names if name in values}, mask, self.granularity)
        if with_loss:
            results["mc_loss"] = torch.stack(losses).float().mean(0)
        return {**results, "spread": spread}

    def _check_spread(self, spread: torch.Tensor) -> None:
        if not spread.any():
            raise ValueError(
                f"quantities={list(self.quantities)} need dropout, but {self.mc_samples} samples of the model are all "
                f"alike: raise its dropout probabilities above 0, or score something else"
            )

    def _over_chunks(
        self, batch: Mapping[str, Any], compute: Callable[[dict[str, Any]], dict[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """Computes chunk by chunk, rows of like length together, and puts the results into the batch's order."""
        n = rows_of(batch)
        if self.batch_size is None or self.batch_size >= n:
            order, chunks = None, [slice(None)]
        else:
            order = _by_length(batch)
            at = range(0, n, self.batch_size)
            chunks = [slice(i, i + self.batch_size) if order is None else order[i : i + self.batch_size] for i in at]
        parts = [compute(trim_padding(take_rows(batch, rows))) for rows in chunks]
        results = {}
        for name in parts[0]:
            values = [part[name] for part in parts]
            if values[0].dim() == 2:  # by token: back to the batch's width
                width = batch["labels"].shape[1]
                values = [F.pad(value, (0, width - value.shape[1])) for value in values]
            results[name] = torch.cat(values)
            if order is not None:
                results[name] = torch.empty_like(results[name]).index_copy_(
                    0, order.to(results[name].device), results[name]
                )
        return results


def measure(
    logits: torch.Tensor,
    labels: torch.Tensor,
    task: Task,
    quantities: Iterable[str],
    granularity: Literal["example", "token"] = "example",
    label_smoothing: float = 0.0,
) -> dict[str, torch.Tensor]:
    """Computes the quantities that one forward pass gives: see `Scorer`, and `per_example_loss` for the arguments.

    Returns:
        As `Scorer` does, on the logits' device.
    """
    check_inputs(logits, labels, task, granularity, label_smoothing)
    labels = labels.to(logits.device)
    results: dict[str, torch.Tensor] = {}
    if "loss" in quantities:
        loss, _ = per_example_loss(logits, labels, task, granularity=granularity, label_smoothing=label_smoothing)
        results["loss"] = loss.float()
    if task == "regression":
        if "count" in quantities:
            results["count"] = torch.ones(len(logits), dtype=torch.int64, device=logits.device)
        if "grad_norm" in quantities:  # of mean((z - y)^2)
            error = (logits - labels.reshape(logits.shape)).float().reshape(len(logits), -1)
            results["grad_norm"] = 2 * error.norm(dim=1) / error.shape[1]
        return results
    labels = aligned_labels(labels, task)
    mask = labels != IGNORE_INDEX
    values: dict[str, torch.Tensor] = {}
    if "correct" in quantities:
        values["correct"] = (logits.argmax(-1) == labels).float()
    if "grad_norm" in quantities:
        values["grad_norm"] = gradient_norm(logits, labels.masked_fill(~mask, 0), label_smoothing)
    if "entropy" in quantities:
        values["entropy"] = entropy(F.softmax(logits, -1, dtype=torch.float32))
    results |= _summarised(values, mask, granularity)
    if "count" in quantities:
        results["count"] = mask.reshape(len(mask), -1).sum(-1)
    return results


def entropy(probs: torch.Tensor) -> torch.Tensor:
    """-sum p log p in nats over the last dimension of probabilities [..., classes]."""
    return torch.special.entr(probs).sum(-1)


def gradient_norm(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """||softmax(z) - q||_2 for smoothed targets q, the norm of cross-entropy's gradient at the logits.

    Katharopoulos & Fleuret 2018, arXiv 1803.00942: it bounds the gradient's norm from above, up to a factor that is
    much the same for all examples.

    Args:
        logits: [..., classes].
        labels: [...] of ids, without -100.
        label_smoothing: As in `per_example_loss`.
    """
    error = F.softmax(logits, dim=-1, dtype=torch.float32).scatter_(-1, labels[..., None], 0.0)
    # p - 1 is minus the sum of the others, which keeps its digits where p is close to 1.
    error.scatter_(-1, labels[..., None], label_smoothing - error.sum(-1, keepdim=True))
    return (error - label_smoothing / logits.shape[-1]).norm(dim=-1)


def _summarised(values: dict[str, torch.Tensor], mask: torch.Tensor, granularity: str) -> dict[str, torch.Tensor]:
    """Values at the valid labels (a mask of the values' shape), or their mean over each example's."""
    values = {name: value.masked_fill(~mask, 0.0) for name, value in values.items()}
    if granularity == "token":
        return {**values, "mask": mask}
    count = mask.reshape(len(mask), -1).sum(-1).clamp(min=1)
    return {name: value.reshape(len(mask), -1).sum(-1) / count for name, value in values.items()}


def _by_length(batch: Mapping[str, Any]) -> torch.Tensor | None:
    """Rows [n], the longest first, so that too much for the memory shows at once; None where all are as long."""
    if not sequence_names(batch):
        return None
    mask = batch["attention_mask"] != 0
    lengths = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1)
    if bool((lengths == lengths[0]).all()):
        return None
    return lengths.argsort(descending=True, stable=True)

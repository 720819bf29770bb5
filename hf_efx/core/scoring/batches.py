"""Rows of collated batches: choosing them, trimming their padding, putting batches together.

A batch is what a data collator returns: a mapping of names to tensors [n, ...], one row an example. Which tensors run
along the sequence is read off `attention_mask` [n, seq]: those of its width, under a name that isn't the decoder's.
Where that is in doubt a batch stays untrimmed, which costs time and never a wrong row.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F

from hf_efx.core.scoring.losses import IGNORE_INDEX

Batch = Mapping[str, Any]
PADDING: dict[str, float] = {"labels": IGNORE_INDEX, "attention_mask": 0, "token_type_ids": 0}
_UNPACK = (
    "they can't be told apart. Collate each example into a row of its own (DataCollatorWithPadding, say, instead of "
    "DataCollatorWithFlattening or packing)"
)
_EMBEDDED = ("inputs_embeds", "bbox")  # sequence tensors [n, seq, features]


def batch_size(batch: Batch) -> int:
    """The number of rows that a batch's tensors share, one an example.

    Raises:
        ValueError: If there is no tensor with rows, their numbers differ (patches of several images, say, laid end to
            end), or a row holds several examples: they can't be told apart then.
    """
    rows = {name: len(value) for name, value in batch.items() if _has_rows(value)}
    if len(set(rows.values())) != 1:
        raise ValueError(
            f"the batch's rows can't be told apart: its tensors have {rows or 'no'} rows; collate it so that every "
            f"tensor's first dimension is the example's"
        )
    positions, mask = batch.get("position_ids"), batch.get("attention_mask")
    if isinstance(positions, torch.Tensor) and positions.dim() == 2:
        restarts = positions[:, 1:] < positions[:, :-1]
        if isinstance(mask, torch.Tensor) and mask.shape == positions.shape:  # padding has positions of any sort
            restarts = restarts & (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
        if restarts.any():
            raise ValueError(f"the batch's rows hold several examples each, as position_ids say: {_UNPACK}")
    return next(iter(rows.values()))


def check_rows(batch: Batch, examples: int) -> None:
    """Raises ValueError unless a batch that was collated of so many examples has a row for each."""
    if (rows := batch_size(batch)) != examples:
        raise ValueError(f"the data collator made {rows} rows of {examples} examples: {_UNPACK}")


def take_rows(batch: Batch, rows: torch.Tensor | slice) -> dict[str, Any]:
    """Chooses rows; numbers and other values that belong to the batch as a whole stay as they are.

    Args:
        batch: A collated batch of n rows.
        rows: [k] int64 indices, on any device, in any order and with repeats, or a slice, which copies nothing.
    """
    n = batch_size(batch)

    def take(value: Any) -> Any:
        if _has_rows(value):
            return value[rows.to(value.device) if isinstance(rows, torch.Tensor) else rows]
        if isinstance(value, list) and len(value) == n:
            return [value[row] for row in rows.tolist()] if isinstance(rows, torch.Tensor) else value[rows]
        return value

    return {name: take(value) for name, value in batch.items()}


def trim_padding(batch: Batch) -> dict[str, Any]:
    """Drops the first and last columns that are padding in every row, so that chosen short rows cost no long ones'.

    A column goes where `attention_mask` is 0 and `labels`, if they are as wide, are -100 throughout. Decoder tensors
    and labels of another width lose the last columns that hold no target. What is left is contiguous, as
    models that view their labels need it.

    Args:
        batch: A collated batch. Without a 2-D `attention_mask` only the decoder's side is trimmed.
    """
    trimmed = dict(batch)
    mask, encoder = batch.get("attention_mask"), sequence_names(batch)
    if isinstance(mask, torch.Tensor) and encoder:
        used = mask != 0
        if "labels" in encoder:
            used = used | (batch["labels"] != IGNORE_INDEX)
        _slice(trimmed, encoder, used.any(0), leading=True)
    decoder = _decoder_names(batch)
    if decoder:
        used = [batch[name] != (IGNORE_INDEX if name == "labels" else 0) for name in decoder if name in _DECODER_MASKS]
        if used:
            _slice(trimmed, decoder, torch.stack(used).any(0).any(0), leading=False)
    return trimmed


def align_left(batch: Batch) -> tuple[dict[str, Any], torch.Tensor | None]:
    """Turns padding on the left into padding on the right.

    Positions that a model counts by columns are then those of the example alone; what it computes for a token doesn't
    depend on how long the batch's other rows are, whether or not it takes `position_ids`.

    Args:
        batch: A collated batch.

    Returns:
        The batch, and by how many columns [n] each row went left: column t of the result was column
        (t + shift) % seq. None where nothing had to move.
    """
    mask, names = batch.get("attention_mask"), sequence_names(batch)
    if not names or mask is None or bool((mask[:, 0] != 0).all()):
        return dict(batch), None
    shift = (mask != 0).to(torch.uint8).argmax(1)  # the first 1; 0 for an empty row
    columns = (torch.arange(mask.shape[1], device=mask.device) + shift[:, None]) % mask.shape[1]
    return {**batch, **{name: take_columns(batch[name], columns) for name in names}}, shift


def take_columns(value: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Chooses each row's own columns [n, k] of a tensor [n, seq, ...]."""
    columns = columns.to(value.device)
    index = columns.reshape(*columns.shape, *(1,) * (value.dim() - 2)).expand(*columns.shape, *value.shape[2:])
    return value.gather(1, index)


def concatenate_rows(
    batches: Sequence[Batch],
    padding: Mapping[str, float] | None = None,
    side: Literal["left", "right"] = "right",
) -> dict[str, Any]:
    """Puts batches under each other, padding their sequence tensors to one width.

    Args:
        batches: Collated batches with the same names. `attention_mask` may be missing in some, where it is all ones;
            it is added where rows get padded.
        padding: What fills each name's new columns, beyond `PADDING`: {"input_ids": tokenizer.pad_token_id}.
        side: Where the padding goes, as the tokenizer has it.

    Raises:
        ValueError: Names differ, a value of the whole batch differs, or a tensor whose width differs has no padding.
    """
    if side not in ("left", "right"):
        raise ValueError(f"side={side!r} is unknown; choose 'left' or 'right'")
    if not batches:
        raise ValueError("batches=[] has no rows to put together")
    if len(batches) == 1:
        return dict(batches[0])
    padding = {**PADDING, **(padding or {})}
    batches = _with_masks(batches)
    names = list(batches[0])
    for batch in batches:
        if set(batch) != set(names):
            raise ValueError(f"batches have different names: {sorted(names)} and {sorted(batch)}; collate them alike")
    return {name: _concatenate(name, [batch[name] for batch in batches], padding, side) for name in names}


def sequence_names(batch: Batch) -> list[str]:
    """Names of the tensors that run along `attention_mask` [n, seq], itself among them.

    Empty without a 2-D mask, and where another tensor has the mask's width by accident or under a name that isn't
    known ([n, seq, k] or [n, seq] of floats): leaving such a batch alone is always right.
    """
    mask = batch.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        return []
    has_decoder = any(name.startswith("decoder_") for name in batch)
    names = []
    for name, value in batch.items():
        if not isinstance(value, torch.Tensor) or value.dim() < 2 or value.shape[1] != mask.shape[1]:
            continue
        if name.startswith("decoder_") or (name == "labels" and (has_decoder or value.is_floating_point())):
            continue
        if name not in _EMBEDDED and name != "attention_mask" and (value.dim() > 2 or value.is_floating_point()):
            return []
        names.append(name)
    return names


_DECODER_MASKS = ("labels", "decoder_attention_mask")


def _decoder_names(batch: Batch) -> list[str]:
    """Integer labels [n, target] of a width of their own, or the decoder's, and the decoder's tensors."""
    labels = batch.get("labels")
    if not isinstance(labels, torch.Tensor) or labels.dim() != 2 or labels.is_floating_point():
        return []
    widths = {name: v.shape[1] for name, v in batch.items() if isinstance(v, torch.Tensor) and v.dim() > 1}
    decoder = [name for name in widths if name.startswith("decoder_")]
    # Without any of the decoder's, labels as wide as another tensor may run along that one.
    if {widths[name] for name in decoder} - {labels.shape[1]} or (
        not decoder and list(widths.values()).count(labels.shape[1]) > 1
    ):
        return []
    return ["labels", *decoder]


def _slice(batch: dict[str, Any], names: list[str], used: torch.Tensor, leading: bool) -> None:
    """Keeps the columns from the first (if `leading`) to the last used one [seq] of the tensors."""
    columns = used.nonzero()[:, 0]
    if not len(columns):  # nothing but padding: a model needs a column
        return
    first, last = columns[[0, -1]].tolist()
    first = first if leading else 0
    if (first, last) != (0, len(used) - 1):
        batch.update({name: batch[name][:, first : last + 1].contiguous() for name in names})


def _with_masks(batches: Sequence[Batch]) -> list[dict[str, Any]]:
    """The batches with an attention mask of ones where there is none but will have to be."""
    ids = [batch.get("input_ids") for batch in batches]
    ragged = len({value.shape[1] for value in ids if isinstance(value, torch.Tensor) and value.dim() == 2}) > 1
    if not ragged and not any("attention_mask" in batch for batch in batches):
        return [dict(batch) for batch in batches]
    return [
        dict(batch)
        if "attention_mask" in batch or value is None
        else {**batch, "attention_mask": torch.ones_like(value)}
        for batch, value in zip(batches, ids, strict=True)
    ]


def _concatenate(name: str, values: list[Any], padding: Mapping[str, float], side: str) -> Any:
    if all(isinstance(value, list) for value in values):
        return [item for value in values for item in value]
    if not all(_has_rows(value) for value in values):
        if any(not _same(value, values[0]) for value in values):
            raise ValueError(f"{name} differs between the batches and has no rows to put together: {values}")
        return values[0]
    if values[0].dim() > 1 and len({value.shape[1] for value in values}) > 1:
        if name not in padding:
            raise ValueError(
                f"{name} has widths {[value.shape[1] for value in values]}; name what fills it: "
                f"padding={{{name!r}: ...}}"
            )
        width = max(value.shape[1] for value in values)
        values = [_pad(value, width, padding[name], side) for value in values]
    if len({value.shape[1:] for value in values}) > 1:
        raise ValueError(f"{name} has rows of different shapes, {[list(v.shape[1:]) for v in values]}; collate alike")
    return torch.cat(values)


def _pad(value: torch.Tensor, width: int, fill: float, side: str) -> torch.Tensor:
    missing = width - value.shape[1]
    edges = (missing, 0) if side == "left" else (0, missing)
    return F.pad(value, (0, 0) * (value.dim() - 2) + edges, value=fill)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and torch.equal(a, b)
    return type(a) is type(b) and a == b


def _has_rows(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0

"""Micro-batches: rows of several draws together, cut apart, and kept in a checkpoint until they are trained on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from hf_efx.core.scoring.batches import Batch, batch_size, concatenate_rows, take_rows, trim_padding


class MicroBatch(NamedTuple):
    """What is trained on at once.

    Attributes:
        batch: As a data collator makes it, `example_id` among its columns.
        ids: int64 [n] on the CPU.
        scores: float32 [n] on the CPU, NaN where nothing was scored.
    """

    batch: Any
    ids: torch.Tensor
    scores: torch.Tensor


def gather_rows(
    batches: Sequence[Batch], rows: torch.Tensor, padding: Mapping[str, float], side: Literal["left", "right"]
) -> dict[str, Any]:
    """Takes rows of batches that lie end to end.

    Args:
        batches: Collated alike.
        rows: [k] int64, ascending.
        padding: As for `concatenate_rows`.
        side: As for `concatenate_rows`.
    """
    if len(batches) == 1:
        return take_rows(batches[0], rows)
    ends = np.cumsum([batch_size(batch) for batch in batches])
    borders = [0, *np.searchsorted(rows.numpy(), ends).tolist()]
    starts = [0, *ends[:-1].tolist()]
    pieces = zip(batches, starts, borders[:-1], borders[1:], strict=True)
    parts = [take_rows(batch, rows[a:b] - start) for batch, start, a, b in pieces if a < b]
    return concatenate_rows(parts or [take_rows(batches[0], rows)], padding, side)


def cut_rows(batch: Batch, parts: Sequence[int]) -> list[dict[str, Any]]:
    """Cuts a batch into pieces of so many rows each, trimmed to their longest."""
    if len(parts) == 1:
        return [trim_padding(batch)]
    ends = np.cumsum(parts).tolist()
    pieces = [trim_padding(take_rows(batch, slice(end - part, end))) for end, part in zip(ends, parts, strict=True)]
    # Memory of their own, as batches from a checkpoint have: where a tensor begins decides a product's last bits.
    return [{name: _own_memory(value) for name, value in piece.items()} for piece in pieces]


def _own_memory(value: Any) -> Any:
    return value.clone(memory_format=torch.contiguous_format) if isinstance(value, torch.Tensor) else value


def split_evenly(count: int, parts: int) -> list[int]:
    """Sizes of equal parts, the first ones by one larger where they can't be."""
    return [count // parts + (i < count % parts) for i in range(parts)]


def save_pending(folder: Path, pending: Sequence[MicroBatch], rank: int) -> None:
    """Writes one process' micro-batches; nothing where there are none.

    Args:
        folder: Of the checkpoint.
        pending: In the order in which they will be trained on.
        rank: This process.

    Raises:
        ValueError: If a batch holds something else than tensors.
    """
    if not pending:
        return
    tensors = {}
    for i, part in enumerate(pending):
        for name, value in part.batch.items():
            if not isinstance(value, torch.Tensor):
                raise ValueError(
                    f"rescore_every is above 1, but the data collator's {name!r} is a {type(value).__name__}: only "
                    f"tensors are kept in a checkpoint. Set rescore_every=1, or let the collator make tensors alone."
                )
            tensors[f"{i:06d}.batch.{name}"] = value.detach().cpu().contiguous()
        tensors |= {f"{i:06d}.ids": part.ids.clone(), f"{i:06d}.scores": part.scores.clone()}
    save_file(tensors, folder / f"pending-{rank}.safetensors")


def load_pending(folder: Path, rank: int, processes: int, device: torch.device) -> list[MicroBatch]:
    """Reads what `save_pending` wrote, none where it wrote nothing.

    Args:
        folder: Of the checkpoint.
        rank: This process.
        processes: How many there are.
        device: Where the batches go.

    Raises:
        ValueError: If other processes than these have written, or some of theirs is missing.
    """
    files = sorted(folder.glob("pending-*.safetensors"))
    if not files:
        return []
    file = folder / f"pending-{rank}.safetensors"
    if len(files) != processes or file not in files:
        raise ValueError(
            f"{folder} holds the chosen batches of {len(files)} processes, but this run has {processes}: resume with "
            f"as many, or from a checkpoint of another step."
        )
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in load_file(file).items():
        place, _, name = key.partition(".")
        parts.setdefault(place, {})[name] = value
    results = []
    for _, part in sorted(parts.items()):
        ids, scores = part.pop("ids"), part.pop("scores")
        # Copied: where a tensor begins decides the last bits of a product, and a file doesn't align as torch does.
        batch = {name.removeprefix("batch."): value.clone().to(device) for name, value in part.items()}
        results.append(MicroBatch(batch, ids, scores))
    return results

"""Several processes: which one this is, sums over all, their draws in the order of one's, and the chosen rows' way."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from hf_efx.core.scoring.batches import concatenate_rows


def process_rank() -> tuple[int, int]:
    """This process' rank and the number of processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def wait_for_all() -> None:
    """Returns once every process got here."""
    if process_rank()[1] > 1:
        torch.distributed.barrier()


def gather_equal(values: torch.Tensor) -> torch.Tensor:
    """[processes, ...] of every process' tensor [...], shaped alike everywhere."""
    results = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(results, values.contiguous())
    return torch.stack(results)


def sum_over_processes(values: np.ndarray, device: torch.device) -> np.ndarray:
    """The sum of every process' floats [...], shaped alike everywhere; one process' own where there is no other."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return gather_equal(torch.from_numpy(values).to(device, dtype)).sum(0).double().cpu().numpy()


def union_order(sizes: Sequence[int], processes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each row of one process' draw lies among the processes' own.

    The loader hands batch after batch round the processes; one process with a batch that many times as large draws
    them together. So the order is draw by draw, and within a draw process by process.

    Args:
        sizes: Rows of each batch that a process has drawn, alike in all.
        processes: How many.

    Returns:
        Process and row in its draw, int64 [processes * sum(sizes)] each.

    Example:
        >>> union_order([2, 1], 2)
        (tensor([0, 0, 1, 1, 0, 1]), tensor([0, 1, 0, 1, 2, 2]))
    """
    ends = np.cumsum(sizes)
    rank = [np.repeat(np.arange(processes), size) for size in sizes]
    row = [np.tile(np.arange(end - size, end), processes) for end, size in zip(ends, sizes, strict=True)]
    return torch.from_numpy(np.concatenate(rank)), torch.from_numpy(np.concatenate(row))


def exchange_rows(
    take: Callable[[torch.Tensor], dict[str, Any]],
    rank_of: torch.Tensor,
    row_of: torch.Tensor,
    mine: torch.Tensor,
    rank: int,
    padding: Mapping[str, float],
    side: Literal["left", "right"],
) -> dict[str, Any]:
    """Brings the chosen rows to the processes that train on them.

    Args:
        take: From rows of this process' draw [k], ascending, to a batch of them.
        rank_of: [chosen] the process that drew each chosen row.
        row_of: [chosen] its place in that process' draw.
        mine: [k] which of the chosen rows this process trains on.
        rank: This process.
        padding: As for `concatenate_rows`.
        side: As for `concatenate_rows`.

    Returns:
        The rows `mine`, in that order.
    """
    counts = torch.bincount(rank_of, minlength=dist.get_world_size())
    # With replacement a row may stand twice; it is sent twice.
    slot = torch.zeros_like(row_of)
    for process, count in enumerate(counts.tolist()):
        slot[rank_of == process] = torch.arange(count)
    own = take(row_of[rank_of == rank])
    own = _padded(own, int(counts.max()), padding, side)
    places = (rank_of[mine], slot[mine])
    return {
        name: gather_equal(value)[places[0].to(value.device), places[1].to(value.device)]
        if isinstance(value, torch.Tensor) and value.dim()
        else value
        for name, value in own.items()
    }


def _padded(
    batch: dict[str, Any], rows: int, padding: Mapping[str, float], side: Literal["left", "right"]
) -> dict[str, Any]:
    """The batch at the processes' common number of rows and common widths."""
    names = sorted(name for name, value in batch.items() if isinstance(value, torch.Tensor) and value.dim())
    device = batch[names[0]].device
    widths = gather_equal(torch.tensor([batch[n].shape[1] if batch[n].dim() > 1 else 1 for n in names], device=device))
    widest = widths.amax(0).tolist()
    if "input_ids" in names and "attention_mask" not in names and (widths != widths[0]).any():
        # Whoever is padded gets a mask, so all need one.
        batch = {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}
        widest.append(widest[names.index("input_ids")])
        names.append("attention_mask")
    # Rows that nobody takes, of the common widths, make concatenate_rows pad the others.
    missing = rows - len(batch[names[0]])
    empty = {
        n: batch[n].new_zeros(missing, *([w] if batch[n].dim() > 1 else []), *batch[n].shape[2:])
        for n, w in zip(names, widest, strict=True)
    }
    return concatenate_rows([batch, {**batch, **empty}], padding, side)

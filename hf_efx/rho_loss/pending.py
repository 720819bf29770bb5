"""Micro-batches that are chosen but not yet trained on, in a checkpoint: a resumed run goes on with the same ones."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from hf_efx.rho_loss.selecting import MicroBatch


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

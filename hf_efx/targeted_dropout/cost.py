"""What a pruned or shrunk model costs: parameters, bytes on disk, seconds of a step."""

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn


def sizes(model: nn.Module) -> dict[str, int]:
    """Parameters, and those of them that aren't zero."""
    parameters = list(model.parameters())
    nonzero = sum(int(p.count_nonzero()) for p in parameters)
    return {"parameters": sum(p.numel() for p in parameters), "nonzero_parameters": nonzero}


def weight_bytes(folder: Path) -> int:
    """Bytes of the weight files in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def step_seconds(models: Sequence[nn.Module], batch: Mapping[str, Any], rounds: int) -> list[tuple[float, float]]:
    """Median seconds of each model's forward and backward pass, and of its forward pass in evaluation, on one batch.

    The models take turns, after one round to warm up, so that a machine that slows down slows all of them.
    """
    times: list[tuple[list[float], list[float]]] = [([], []) for _ in models]
    for i in range(rounds + 1):
        for model, (training, forward) in zip(models, times, strict=True):
            parameters = [p for p in model.parameters() if p.requires_grad]
            model.train()
            start = _now()
            torch.autograd.grad(model(**batch).loss, parameters, allow_unused=True)
            middle = _now()
            model.eval()
            with torch.no_grad():
                model(**batch)
            end = _now()
            if i:
                training.append(middle - start)
                forward.append(end - middle)
    return [(statistics.median(training), statistics.median(forward)) for training, forward in times]


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()

"""Timing of training steps side by side, the floor that arithmetic sets, and the rows kept, for the benchmarks here.

The time floor of a variant against a reference, both timed in one run: the share of the reference's time outside
matrix products, plus the share inside times the ratio of FLOPs.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from hf_efx.core.results.evidence import StudyRows, machine, versions

# Matrix products and the attention kernels, forward and backward; on CUDA the latter stand under names of their own.
PRODUCTS = (
    *("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_dot_product"),
    *("aten::_flash_attention", "aten::_efficient_attention", "aten::_cudnn_attention"),
)


def kept_rows(path: Path, options: argparse.Namespace) -> StudyRows:
    """What a benchmark with these options has timed already, beside its results file."""
    settings = {name: value for name, value in vars(options).items() if name not in ("seeds", "output")}
    return StudyRows(path, settings | {"versions": versions(), "machine": machine()})


def measured(
    kept: StudyRows, work: Sequence[tuple[str, int]], measure: Callable[[str, int], list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """The rows of all pieces of work, each kept on disk once it is timed, so that a benchmark that was ended goes on.

    Says in a line, with a terminal and without, which piece is at work.

    Args:
        kept: Where the rows are kept; call its `finish()` once the results are written.
        work: Name and seed of each piece.
        measure: Called with both; its rows name their `configuration`.

    Returns:
        The rows with their seeds, in the order of the work. Of a reference, which several pieces time, a seed's first.
    """
    for number, (name, seed) in enumerate(work, start=1):
        place = f"[{number}/{len(work)}] {name}, seed {seed}"
        if kept.has((name, seed)):
            print(f"{place}: timed before", flush=True)
            continue
        print(f"{place} ...", flush=True)
        start = time.perf_counter()
        kept.add((name, seed), {"rows": measure(name, seed)})
        print(f"{place}: {time.perf_counter() - start:.0f} s", flush=True)
    pieces = {(piece["configuration"], piece["seed"]): piece["rows"] for piece in kept.rows}
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for name, seed in work:
        for row in pieces[name, seed]:
            rows.setdefault((row["configuration"], seed), {"configuration": row["configuration"], "seed": seed, **row})
    return list(rows.values())


def process_memory(name: str) -> int:
    """Bytes that this process holds now (VmRSS) or held at its peak (VmHWM), on Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def synchronize(device: str) -> None:
    """Waits for the device, so that a clock that is read next counts its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed(function: Callable[[], Any], device: str) -> float:
    """Seconds that one call takes: on CUDA between two events of its stream."""
    synchronize(device)
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        synchronize(device)
        return begin.elapsed_time(end) / 1000
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def side_by_side(
    functions: Mapping[str, Callable[[], Any]], rounds: int, device: str, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of each function in each round; a round calls all of them in turn, so that drift meets all alike."""
    for _ in range(warm_up):
        for function in functions.values():
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(rounds):
        order = list(functions.items())
        for name, function in order[i % len(order) :] + order[: i % len(order)]:
            times[name].append(timed(function, device))
    return times


def ratio_of_medians(times: Mapping[str, list[float]], name: str, reference: str) -> float:
    """Median time of one over that of the other."""
    return statistics.median(times[name]) / statistics.median(times[reference])


def product_share(step: Callable[[], Any], device: str, rounds: int = 3) -> float:
    """Share of a step's time inside matrix products and attention kernels, by torch's profiler."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    step()
    with profile(activities=activities) as profiler:
        for _ in range(rounds):
            step()
        synchronize(device)
    inside = total = 0.0
    # An operation's own device time is that of the kernels it launched, which are listed once more by themselves.
    for event in (one for one in profiler.key_averages() if one.device_type.name == "CPU"):
        spent = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        total += spent
        inside += spent if event.key.startswith(PRODUCTS) else 0.0
    return inside / total


def training_flops(model: nn.Module, step: Callable[[], Any]) -> int:
    """FLOPs of a training step, by torch's FlopCounterMode, which counts attention in its eager form alone."""
    implementation = model.config._attn_implementation  # pyright: ignore
    model.set_attn_implementation("eager")  # pyright: ignore
    with FlopCounterMode(display=False) as counter:
        step()
    model.set_attn_implementation(implementation)  # pyright: ignore
    return counter.get_total_flops()


def saved_bytes(model: nn.Module, step: Callable[[], Any]) -> int:
    """Bytes of the storages that autograd keeps for a step's backward pass, without parameters and buffers."""
    seen = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    total = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return total


def time_floor(share: float, flop_ratio: float) -> float:
    """The reference's share of time outside products, plus the share inside times the FLOP ratio."""
    return (1 - share) + share * flop_ratio

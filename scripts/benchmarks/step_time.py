"""Timing of training steps side by side, and the floor that arithmetic sets, for the benchmarks beside this file.

The time floor of a variant against a reference, both timed in one run: the share of the reference's time outside
matrix products, plus the share inside times the ratio of FLOPs.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

# Matrix products and the attention kernels, forward and backward; on CUDA the latter stand under names of their own.
PRODUCTS = (
    *("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_dot_product"),
    *("aten::_flash_attention", "aten::_efficient_attention", "aten::_cudnn_attention"),
)


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

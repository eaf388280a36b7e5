"""Timing one layer or one kernel on a GPU: time on the wall, time that the device computes, memory."""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

_WARM_UP, _ROUNDS = 3, 5


@dataclass(frozen=True)
class Timing:
    """One piece of work.

    Attributes:
        ms: from call to call, when calls follow each other: what the slower of host and device takes.
        busy_ms: the sum of the device's kernels; equal to `ms` without a GPU.
        launches: kernels and copies of one call.
    """

    ms: float
    busy_ms: float
    launches: int


def timed(run: Callable[[int], object], repeats: int, device: torch.device) -> Timing:
    """Times ``run(i)`` for i = 0, 1, …: with several sets of inputs, `i` chooses one, so that they do not come out of the cache."""
    ms = wall_ms(run, repeats, device)
    return Timing(ms, *on_device(run, repeats, device)) if device.type == "cuda" else Timing(ms, ms, 0)


def wall_ms(run: Callable[[int], object], repeats: int, device: torch.device) -> float:
    """As `Timing.ms`, the median of five rounds. As in `timeit`, Python's garbage collector waits until they are over.

    A process that has profiled something launches more slowly from then on: what is compared is to be timed before.
    """
    for i in range(_WARM_UP):
        run(i)
    rounds = []
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(_ROUNDS):
            _wait(device)
            start = time.perf_counter()
            for i in range(repeats):
                run(i)
            _wait(device)
            rounds.append((time.perf_counter() - start) * 1000 / repeats)
    finally:
        if collects:
            gc.enable()
    return statistics.median(rounds)


def on_device(run: Callable[[int], object], repeats: int, device: torch.device) -> tuple[float, int]:
    """`Timing.busy_ms` and `Timing.launches`; 0 without a GPU."""
    if device.type != "cuda":
        return 0.0, 0
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for i in range(repeats):
            run(i)
        _wait(device)
    kernels = [event.time_range.elapsed_us() for event in profiler.events() if event.device_type == DeviceType.CUDA]
    return sum(kernels) / 1000 / repeats, round(len(kernels) / repeats)


def saved_mib(forward: Callable[[], object], device: torch.device) -> float | None:
    """What a forward keeps for its backward, results included, in MiB; None without a GPU."""
    if device.type != "cuda":
        return None
    _wait(device)
    before = torch.cuda.memory_allocated(device)
    outputs = forward()
    kept = torch.cuda.memory_allocated(device) - before
    del outputs
    return kept / 2**20


def peak_mib(step: Callable[[], object], device: torch.device) -> float | None:
    """The most memory that a step has beside what was there before it, in MiB; None without a GPU."""
    if device.type != "cuda":
        return None
    _wait(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    _wait(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


@dataclass(frozen=True)
class Ceilings:
    """What the machine reaches at best.

    Attributes:
        copy: bytes a millisecond of a large copy, read and written.
        flops: FLOPs a millisecond of a large bf16 GEMM.
    """

    copy: float
    flops: float


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measures them: a copy of 1 GiB and a product of 8192 × 8192 matrices (small ones without a GPU)."""
    large = device.type == "cuda"
    source = torch.randn(2**29 if large else 2**20, device=device).to(dtype)
    target = torch.empty_like(source)
    copied = timed(lambda i: target.copy_(source), 10, device)
    width = 8192 if large else 256
    a, b = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    multiplied = timed(lambda i: a @ b, 10, device)
    return Ceilings(2 * source.numel() * source.element_size() / copied.busy_ms, 2 * width**3 / multiplied.busy_ms)


@functools.cache
def copy_ms(size: int, device: torch.device) -> float:
    """Milliseconds in which the machine copies so many bytes, read and written together, with sets of data that exceed the cache."""
    count = max(1, size // 4)
    sets = max(2, min(16, 2**29 // (4 * count)))
    source, target = torch.randn(sets, count, device=device).to(torch.bfloat16), torch.empty(sets, count, device=device, dtype=torch.bfloat16)
    return timed(lambda i: target[i % sets].copy_(source[i % sets]), 2 * sets, device).busy_ms


def gradients(outputs: Sequence[Tensor], leaves: Sequence[Tensor], cotangents: Sequence[Tensor]) -> None:
    """One backward pass that keeps nothing."""
    torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

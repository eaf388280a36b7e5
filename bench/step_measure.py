"""Measures one model: forward with loss, backward and optimizer step, memory, and what the profiler says."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from step_profile import profiled
from step_progress import Progress
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

#: Dense bf16 TFLOP/s of one device, for MFU, by a part of its name.
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "B200": 2250.0, "A100": 312.0}


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        warmup, repeats: steps before, and steps that count.
        optimizer: time AdamW as well.
        profile: sort the time by category.
        flops: of one token, forward and backward.
        layers: of the model.
    """

    warmup: int
    repeats: int
    optimizer: bool
    profile: bool
    flops: float
    layers: int


def measure(model: nn.Module, ids: Tensor, plan: Plan, progress: Progress) -> dict:
    """The row of one stack.

    Times are medians in ms, of the slowest rank. Memory is in GiB, of the fullest rank: the peak, what a forward keeps for its backward, and what
    is held after a backward (weights, gradients).
    """
    device = ids.device
    with progress("warm-up"):
        _steps(model, ids, plan.warmup, [])
        wait(device)
    with progress("timing"):
        row, own_ms = _timed(model, ids, plan)
    progress.say(f"{row['forward_ms']} + {row['backward_ms']} ms, {row['tokens_per_s_per_gpu']:,.0f} tok/s/GPU, peak {row['peak_gib']} GiB, loss {row['loss']}")
    with progress("profile"):
        row |= _profiled(model, ids, plan, own_ms)
    if plan.optimizer:
        with progress("optimizer"):
            row |= _optimizer(model, ids, plan)
    return row


def _timed(model: nn.Module, ids: Tensor, plan: Plan) -> tuple[dict, float]:
    """Times, rates, loss and memory; and what a step took on this rank."""
    device = ids.device
    _reset_peak(device)
    marks: list[tuple] = []
    kept = _kept(model, ids)
    loss = _steps(model, ids, plan.repeats, marks)
    forward, backward = (statistics.median(_between(m[i], m[i + 1]) for m in marks) for i in (0, 1))
    peak, weights = _peak(device), _allocated(device)
    slowest = _over_ranks([forward, backward, peak, kept, weights], device)
    row = _rates(*slowest[:2], ids.numel(), plan.flops, device)
    row |= {"loss": round(_mean_over_ranks(loss), 5)}
    row |= {key: _gib(value) for key, value in zip(("peak_gib", "activations_gib", "held_gib"), slowest[2:], strict=True)}
    return row, forward + backward


def _profiled(model: nn.Module, ids: Tensor, plan: Plan, step_ms: float) -> dict:
    """What the profiler says; what it cannot say, or not in time, does not cost the times their row."""

    def step() -> None:
        _steps(model, ids, 1, [])

    try:
        return profiled(model, step, plan.layers, step_ms, ids.device, plan.profile)
    except (RuntimeError, AttributeError, ValueError, TimeoutError) as error:
        return {"profile_error": f"{type(error).__name__}: {error}"}


def held(device: torch.device) -> float | None:
    """GiB that are allocated now."""
    return _gib(_allocated(device))


def _rates(forward: float, backward: float, tokens: int, flops: float, device: torch.device) -> dict:
    seconds = (forward + backward) / 1e3
    tflops = tokens * flops / seconds / 1e12
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    ceiling = next((value for part, value in PEAK_TFLOPS.items() if part in name), None)
    return {
        "forward_ms": round(forward, 3),
        "backward_ms": round(backward, 3),
        "step_ms": round(forward + backward, 3),
        "tokens_per_s_per_gpu": round(tokens / seconds, 1),
        "tflops_per_gpu": round(tflops, 2),
        "mfu": round(tflops / ceiling, 4) if ceiling else None,
    }


def _steps(model: nn.Module, ids: Tensor, count: int, marks: list[tuple]) -> float:
    """Runs forward with loss and backward some times; adds the three points in time of each. Returns the last loss."""
    _meet(ids.device)
    loss = torch.zeros((), device=ids.device)
    for _ in range(count):
        model.zero_grad(set_to_none=True)
        begin = _mark(ids.device)
        loss = model(input_ids=ids, labels=ids).loss
        middle = _mark(ids.device)
        loss.backward()
        marks.append((begin, middle, _mark(ids.device)))
    return loss.detach()


def _kept(model: nn.Module, ids: Tensor) -> float:
    """Bytes that the forward keeps for the backward."""
    model.zero_grad(set_to_none=True)
    before = _allocated(ids.device)
    loss = model(input_ids=ids, labels=ids).loss
    kept = _allocated(ids.device) - before
    loss.backward()
    return kept


def _optimizer(model: nn.Module, ids: Tensor, plan: Plan) -> dict:
    """AdamW: its time, and the peak of a whole training step with its state. A model whose state does not fit says so."""
    device = ids.device
    optimizer = torch.optim.AdamW(_groups(model), lr=1e-5, fused=True)
    marks: list[tuple] = []
    try:
        for repeat in range(2 + plan.repeats):
            _steps(model, ids, 1, [])
            begin = _mark(device)
            optimizer.step()
            if repeat >= 2:
                marks.append((begin, _mark(device)))
            else:
                _reset_peak(device)
    except (torch.OutOfMemoryError, TimeoutError) as error:
        return {"optimizer_error": str(error).splitlines()[0]}
    finally:
        optimizer.state.clear()
    step, peak = _over_ranks([statistics.median(_between(*m) for m in marks), _peak(device)], device)
    return {"optimizer_ms": round(step, 3), "peak_with_optimizer_gib": _gib(peak)}


def _groups(model: nn.Module) -> list[dict]:
    """Parameters by mesh: one fused update cannot mix them."""
    groups: dict[object, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        groups.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(parameter)
    return [{"params": parameters} for parameters in groups.values()]


def _mark(device: torch.device):
    """A point in time, on the device where there is one."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(before, after) -> float:
    """Milliseconds."""
    if isinstance(before, float):
        return (after - before) * 1e3
    after.synchronize()
    return before.elapsed_time(after)


def _allocated(device: torch.device) -> float:
    return float(torch.cuda.memory_allocated(device)) if device.type == "cuda" else 0.0


def _peak(device: torch.device) -> float:
    return float(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else 0.0


def _gib(size: float) -> float | None:
    """None where memory is not counted: on a CPU."""
    return round(size / 2**30, 3) if size else None


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> None:
    wait(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _meet(device: torch.device) -> None:
    """Ranks begin together."""
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1, device=device))


def _over_ranks(values: list[float], device: torch.device) -> list[float]:
    """The largest of all ranks."""
    if not dist.is_initialized():
        return values
    found = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.tolist()


def _mean_over_ranks(loss: Tensor) -> float:
    loss = loss.float()
    if dist.is_initialized():
        dist.all_reduce(loss)
        loss = loss / dist.get_world_size()
    return loss.item()

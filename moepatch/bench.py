"""Times every kind of module of a model on this machine, without its weights: the family's own code and each backend that serves it.

A copy of one module of each pattern gets random weights and runs forward and backward on the size that backends are chosen by. What lies
inside another module (norms and the attention function inside attention) is timed by itself, too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .kinds import KINDS
from .measure import TOKENS, attempted, best_ms
from .piece import piece
from .planning import Pattern, Plan

#: Weights, their gradients, and as much again for what a call makes.
_COPIES = 3
#: How long a row takes on the CPU, in seconds, once it has been called.
_PATIENCE = 1.0


@dataclass(frozen=True)
class BenchRow:
    """One row.

    Attributes:
        pattern, spec: what was timed.
        modules: how many of them the model has.
        stack: ``transformers``, or the backend's name.
        planned: whether it is what the plan has.
        ms: forward and backward of one module.
        problem: why there is no time, or None.
    """

    pattern: str
    spec: str
    modules: int
    stack: str
    planned: bool
    ms: float | None
    problem: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def bench(model: nn.Module, plan: Plan, device: torch.device, tokens: int | None = None) -> Iterator[BenchRow]:
    """One row for each stack of each pattern that a backend serves here, as soon as it is measured.

    Args:
        model: on the meta device.
        plan: made for it.
        device: where modules are timed.
        tokens: of one sequence; None: as many as backends are chosen by on a GPU, 256 on the CPU.
    """
    tokens = tokens or (TOKENS if device.type == "cuda" else 256)
    attention = attention_function(plan)
    for pattern in plan.patterns:
        kind = KINDS[pattern.site.kind]
        if kind.bench is None or not pattern.available:
            continue
        # What stands in for a site has no family's code.
        for backend in [*([] if kind.stand_in else [None]), *pattern.available]:
            ms, problem = _timed(model, pattern, backend, attention, tokens, device)
            facts = pattern.name, pattern.site.spec.describe(), len(pattern.sites), backend or "transformers"
            yield BenchRow(*facts, backend is not None and backend == pattern.backend, ms, problem)


def attention_function(plan: Plan) -> str | None:
    """The backend that a plan has for what attention modules call in their middle."""
    return next((pattern.backend for pattern in plan.patterns if pattern.site.kind == "attention_function"), None)


def random_weights(device: torch.device) -> Callable[[Tensor, tuple[int, ...]], Tensor]:
    """Fills replicas on a device: matrices as transformers initialises them, vectors around 1."""
    generator = torch.Generator(device).manual_seed(0)

    def fill(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        if not tensor.is_floating_point():
            return torch.zeros(shape, dtype=tensor.dtype, device=device)
        noise = torch.randn(shape, generator=generator, device=device, dtype=tensor.dtype)
        return 1 + 0.1 * noise if len(shape) == 1 else 0.02 * noise

    return fill


def _timed(
    model: nn.Module, pattern: Pattern, backend: str | None, attention: str | None, tokens: int, device: torch.device
) -> tuple[float | None, str | None]:
    """Milliseconds, or why there are none."""
    need, free = _COPIES * _bytes(model, pattern), _free(device)
    if need > free:
        return None, f"needs about {need / 2**30:.1f} GiB, and {free / 2**30:.1f} are free"

    def measured() -> float:
        step = piece(model, pattern, backend, tokens, device, random_weights(device), attention=attention).step
        return best_ms(step, device) if device.type == "cuda" else _cpu_ms(step)

    found = attempted(measured)
    return (None, found) if isinstance(found, str) else (found, None)


def _cpu_ms(run: Callable[[], None]) -> float:
    """The fastest of some calls."""
    run()
    end, times = time.perf_counter() + _PATIENCE, []
    while not times or time.perf_counter() < end and len(times) < 50:
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1000)
    return min(times)


def _bytes(model: nn.Module, pattern: Pattern) -> int:
    if KINDS[pattern.site.kind].stand_in is not None:
        return 0
    return sum(p.numel() * p.element_size() for p in model.get_submodule(pattern.site.fqn).parameters())


def _free(device: torch.device) -> int:
    """Bytes; on Linux with what the system would give up for a program."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

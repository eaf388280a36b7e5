"""Choosing between backends by timing them: forward and backward of one module of each pattern, at a size that users run.

Only on a GPU, only where at least two backends can serve, once per shape and machine: results are kept in a file, so that the next process
starts at once. The time is that of calls one after another until the device has finished, so a backend that keeps the host busy for longer
than the device does not look faster than it is.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TextIO

import torch
import torch.distributed as dist
import transformers
from torch import nn

from . import registry, store
from .errors import in_words
from .kinds import KINDS
from .piece import piece
from .planning import Pattern, Plan
from .progress import counted
from .replica import slice_fill

TOKENS = 4096
#: Of what is timed and how: another number makes what a machine has measured before void.
METHOD = 2
#: How much faster than a backend of higher rank another one has to be: clocks are no better than that, and ranks know of host time beside the call.
MARGIN = 0.05
_WARM_UP, _ROUNDS, _CALLS = 3, 5, 4
_MEASURED = "measured: "
_FILE, _NO_ROOM = "choices.json", "does not fit into the memory that is left"


def fastest(model: nn.Module, plan: Plan, stream: TextIO | None = None) -> Plan:
    """The plan with the backend of every pattern that leaves a choice replaced by the fastest one.

    Args:
        model: the model, not patched.
        plan: made for it.
        stream: where the progress line goes; standard error if None.

    Returns:
        The plan; `Pattern.why` of a measured one has the milliseconds of every backend that was tried.
    """
    cache = store.read(_FILE)
    todo = [p for p in plan.patterns if _candidates(p)]
    fresh = [p for p in todo if _key(p) not in cache]
    _start_compilers(fresh)
    # Experts come last: their compilers take a while to start.
    with counted(fresh[::-1], "timing backends", lambda p: f"{p.name} ({', '.join(_candidates(p))})", stream) as turns:
        for pattern in turns:
            cache[_key(pattern)] = {name: _time(model, pattern, name) for name in _candidates(pattern)}
    if fresh:
        # Where there was no room, another process may find some.
        store.add(_FILE, {_key(p): cache[_key(p)] for p in fresh if _NO_ROOM not in cache[_key(p)].values()})
    chosen = {id(p): _decided(p, cache[_key(p)]) for p in todo}
    return replace(plan, patterns=tuple(chosen.get(id(p), p) for p in plan.patterns))


def agreed(plan: Plan) -> Plan:
    """The plan with the backends that rank 0 has chosen: clocks of ranks differ, and a model should compute alike on all of them. Communicates."""
    if not any(pattern.site.device.startswith("cuda") for pattern in plan.patterns):
        return plan  # nothing was timed, on any rank
    chosen = [[(pattern.backend, pattern.why) for pattern in plan.patterns]]
    dist.broadcast_object_list(chosen, src=0)
    return replace(plan, patterns=tuple(replace(p, backend=name, why=why) for p, (name, why) in zip(plan.patterns, chosen[0], strict=True)))


def by_time(pattern: Pattern) -> list[str]:
    """The backends of a pattern whose backend was measured, the fastest first; none where nothing was."""
    times = store.read(_FILE).get(_key(pattern), {}) if is_measured(pattern) and _candidates(pattern) else {}
    return sorted((name for name, ms in times.items() if isinstance(ms, float)), key=times.get)


def is_measured(pattern: Pattern) -> bool:
    """Whether its backend was chosen by time."""
    return pattern.why.startswith(_MEASURED)


def _start_compilers(patterns: list[Pattern]) -> None:
    """Starts the processes in which QuACK compiles, if it is among those to be timed: they get ready while others are."""
    if any("quack" in _candidates(pattern) for pattern in patterns):
        from .experts.quack_tiles import start_workers

        start_workers()


def _candidates(pattern: Pattern) -> list[str]:
    """The backends to choose from; none where there is no choice or it was made already."""
    kind = KINDS[pattern.site.kind]
    if kind.bench is None or pattern.backend is None or pattern.by_caller or not pattern.site.device.startswith("cuda"):
        return []
    ranks = {b.name: b.rank for b in registry.backends(kind.backends)}
    names = [name for name in pattern.available if ranks[name] >= 0]
    return names if len(names) > 1 else []


def _decided(pattern: Pattern, times: dict[str, float | str]) -> Pattern:
    timed = {name: ms for name, ms in times.items() if isinstance(ms, float)}
    if not timed:
        return pattern
    ranks = {b.name: b.rank for b in registry.backends(KINDS[pattern.site.kind].backends)}
    best = max((name for name in timed if timed[name] <= (1 + MARGIN) * min(timed.values())), key=ranks.get)
    listed = ", ".join(f"{name} {ms:.2f} ms" if isinstance(ms, float) else f"{name} {ms}" for name, ms in times.items())
    return replace(pattern, backend=best, why=f"{_MEASURED}{listed}")


def _time(model: nn.Module, pattern: Pattern, backend: str) -> float | str:
    """Milliseconds of one forward and backward, or why there are none."""
    device, dtype = torch.device(pattern.site.device), getattr(torch, pattern.site.dtype)
    return attempted(lambda: best_ms(piece(model, pattern, backend, TOKENS, device, slice_fill(dtype)).step, device))


def attempted(measured: Callable[[], float]) -> float | str:
    """The milliseconds that a measurement returns, or why there are none."""
    try:
        return round(measured(), 4)
    except torch.cuda.OutOfMemoryError:
        return _NO_ROOM
    except getattr(torch, "AcceleratorError", ()):
        raise  # the device itself has failed: nothing after this can be trusted
    except Exception as error:  # a library may fail in any way on a shape or a machine that it was not made for
        return f"failed ({in_words(error)})"


def best_ms(run: Callable[[], None], device: torch.device) -> float:
    """The mean time of calls that follow each other, in the best of several rounds: what else a host does at the time only adds to it."""
    for _ in range(_WARM_UP):
        run()
    rounds = []
    for _ in range(_ROUNDS):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(_CALLS):
            run()
        torch.cuda.synchronize(device)
        rounds.append((time.perf_counter() - start) * 1000 / _CALLS)
    return min(rounds)


def _key(pattern: Pattern) -> str:
    site = pattern.site
    device = torch.cuda.get_device_name(torch.device(site.device))
    versions = torch.__version__, transformers.__version__
    facts = (METHOD, site.kind, site.spec.describe(), site.spec.to_dict(), site.dtype, device, *versions, _candidates(pattern))
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:24]

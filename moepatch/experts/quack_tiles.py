"""Which tiles QuACK's grouped GEMMs use: a rough model of the GPU names a few, they are compiled side by side, and the clock decides.

QuACK itself knows 9 to 22 tilings for each GEMM and times them all, a third of a second each. What is found here is kept on disk: the
next process compiles one kernel for each GEMM, or loads it from QuACK's own cache of compiled kernels.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from .. import store

#: How many tilings are timed, beside the one that QuACK takes where it does not look.
TRIED = 4
_USUAL = "128x192 pingpong 2x1"
_FILE = "quack_tiles.json"
_CALLS, _ROUNDS = 8, 3
_COMPILE_SECONDS = 120  # kernels that the workers have not compiled by then are compiled here


class Problem(NamedTuple):
    """A grouped GEMM as far as the choice of tiles depends on it.

    Attributes:
        name: what people read.
        facts: what else tells it from others, for the file: dtype, memory order, epilogue.
        rows: of all groups together; the choice is made once for each order of magnitude.
        m, n, k: of one group, on average where they differ.
        ragged: which of ``m`` and ``k`` differs between groups.
        gather: rows are gathered as they are read.
        pairs: gate and up leave together.
        outputs: how many matrices of the size of the result are read or written when a tile is done.
        device: where.
    """

    name: str
    facts: str
    rows: int
    m: float
    n: int
    k: float
    ragged: str
    gather: bool
    pairs: bool
    outputs: int
    device: torch.device


class Gemm(NamedTuple):
    """A problem with its operands: `run` computes it in the tiles that it is given and returns QuACK's plan."""

    problem: Problem
    run: Callable[[Any], Any]


def label(tiles: Any) -> str:
    """``128x192 pingpong 2x1``: tile, schedule, cluster."""
    schedule = "pingpong" if tiles.pingpong else "cooperative"
    return f"{tiles.tile_m}x{tiles.tile_n} {schedule} {tiles.cluster_m}x{tiles.cluster_n}"


def possible(problem: Problem) -> list[Any]:
    """The tilings of QuACK that can compute this, the most promising first; those for gathered rows without clusters too, which QuACK does not list.

    A cluster of gathered rows lies along them, and half of it is empty where a group has no more rows than a tile.
    """
    from quack.gemm_config import config_supports, get_all_configs

    found = [
        c
        for c in get_all_configs(epilogue="gated" if problem.pairs else None)
        if c.device_capacity == 9 and not c.swap_ab and config_supports(c, gather_A=problem.gather, varlen_m=problem.ragged == "m")
    ]
    if problem.gather and problem.ragged == "m":
        found += [replace(c, cluster_m=1) for c in found]
    return sorted(found, key=lambda tiles: expected(tiles, problem))


def expected(tiles: Any, problem: Problem) -> float:
    """The time of a GEMM in some tiles, in no unit: what is multiplied, padding included, by how the operands arrive, with what leaves at the end.

    A cluster works on neighbouring tiles and reads what they share once. Two groups of warps take turns in `pingpong`, so that one
    multiplies while the other writes. Good enough to leave out what cannot win.
    """
    block_m, block_n = tiles.tile_m * tiles.cluster_m, tiles.tile_n * tiles.cluster_n
    # Groups of any size waste half a block each.
    m = problem.m + block_m / 2 if problem.ragged == "m" else math.ceil(problem.m / block_m) * block_m
    n = math.ceil(problem.n / block_n) * block_n
    bytes_per_clock = 4096 * (tiles.tile_m / tiles.cluster_n + tiles.tile_n / tiles.cluster_m) / (tiles.tile_m * tiles.tile_n)
    end_of_tile = 128 * problem.outputs * (0.3 if tiles.pingpong else 1)
    return m * n * (problem.k + end_of_tile) * (1 + (bytes_per_clock / 64) ** 2)


def chosen(gemm: Gemm, together_with: Callable[[], Sequence[Gemm]] = tuple) -> Any:
    """The tiles for a GEMM: those that are on file, else the fastest of the `promising` ones, which is put on file.

    Args:
        gemm: with real operands.
        together_with: makes further GEMMs (small operands will do) that are needed soon, whose kernels are compiled at the same time.
    """
    problem = gemm.problem
    known = store.read(_FILE).get(_key(problem))
    if (tiles := next((c for c in possible(problem) if label(c) == known), None)) is not None:
        return tiles
    options, start = promising(problem), time.perf_counter()
    _say(f"moepatch: QuACK's tiles for the {problem.name} with {problem.rows} rows ...", end="")
    compile_together([*((gemm.run, tiles) for tiles in options), *((g.run, t) for g in together_with() for t in unknown(g.problem))])
    times = timed(gemm, options)
    best = min(times, key=times.get)
    store.add(_FILE, {_key(problem): label(best)})
    _say(f" {label(best)}, the best of {len(times)} in {time.perf_counter() - start:.1f} s")
    return best


def promising(problem: Problem) -> list[Any]:
    """The tilings that are timed."""
    options = possible(problem)
    return [tiles for place, tiles in enumerate(options) if place < TRIED or label(tiles) == _USUAL]


def unknown(problem: Problem) -> list[Any]:
    """The tilings that `chosen` is going to time; none if the answer is on file."""
    return [] if _key(problem) in store.read(_FILE) else promising(problem)


def timed(gemm: Gemm, options: Sequence[Any]) -> dict[Any, float]:
    """Milliseconds of those that can be compiled and launched, in turns, since the clock of the GPU changes.

    Raises:
        RuntimeError: none can be; the last one's error.
    """
    times: dict[Any, float] = {}
    for tiles in options:
        try:
            gemm.run(tiles)
            times[tiles] = math.inf
        except getattr(torch, "AcceleratorError", ()):
            raise  # the device itself has failed: nothing after this can be trusted
        except Exception as error:
            failure = error  # too much shared memory, most often
    if not times:
        raise failure
    if len(times) == 1:
        return times
    for _ in range(_ROUNDS):
        for tiles in times:
            times[tiles] = min(times[tiles], _milliseconds(lambda tiles=tiles: gemm.run(tiles), gemm.problem.device))
    return times


def _milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Of one call among several on the GPU, which is kept waiting until all are launched."""
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(2_000_000)
        start.record()
        for _ in range(_CALLS):
            run()
        end.record()
        end.synchronize()
    return start.elapsed_time(end) / _CALLS


def start_workers() -> None:
    """Starts the processes in which QuACK compiles, which takes about ten seconds, without waiting for them. If they do not start, that only costs time."""
    with contextlib.suppress(Exception):
        from quack.cache.async_compile import CompilePool, get_shared_executor

        CompilePool(executor=get_shared_executor()).prewarm()


def compile_together(jobs: Sequence[tuple[Callable[[Any], Any], Any]]) -> None:
    """Compiles the kernels of several ``(run, tiles)``, in QuACK's worker processes and in this one. What fails, fails again when it is run."""
    from quack.cache.async_compile import CompilePending, pool_scope, suppress_pool

    with pool_scope() as pool:
        pending = []
        for run, tiles in jobs:
            try:
                run(tiles)
            except CompilePending as job:
                pending.append((job.sha, run, tiles))
            except Exception:  # not these tiles: `timed` meets the error again and decides
                continue
        deadline = time.monotonic() + _COMPILE_SECONDS
        # The workers take them from the front and need seconds to start; this process begins at the back.
        for sha, run, tiles in reversed(pending):
            if _started(pool, sha):
                continue
            try:
                with suppress_pool():
                    run(tiles)
            except Exception:  # as above
                continue
        while time.monotonic() < deadline and any(pool.poll(sha)[0] == "pending" for sha, _, _ in pending):
            time.sleep(0.02)


def _started(pool: Any, sha: str) -> bool:
    future = pool._futures.get(sha)
    return future is not None and not future.cancel()


def _key(problem: Problem) -> str:
    return ", ".join((_machine(problem.device), problem.name, problem.facts, f"rows below 2^{problem.rows.bit_length()}"))


@functools.cache
def _machine(device: torch.device) -> str:
    return f"quack {importlib.metadata.version('quack-kernels')}, {torch.cuda.get_device_name(device)}"


def _say(words: str, end: str = "\n") -> None:
    """A progress line, on one rank alone."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_rank() != 0) and os.environ.get("RANK", "0") == "0":
        print(words, end=end, file=sys.stderr, flush=True)

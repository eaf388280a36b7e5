"""Ranks that succeed or fail together: what one raises, all raise, so that nobody waits for somebody who has left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ..errors import MoePatchError

T = TypeVar("T")


class RankFailed(MoePatchError):
    """Another rank raised; the message says which and what."""


@contextmanager
def together(what: str, mesh: DeviceMesh | None) -> Iterator[None]:
    """Runs the block on every rank; if it fails on any, it fails on all: with its own exception there, with `RankFailed` elsewhere.

    The block must not communicate after a point where a single rank may fail. Without a mesh or a process group it is simply run.
    """
    if mesh is None or not dist.is_initialized():
        yield
        return
    failure: BaseException | None = None
    try:
        yield
    except BaseException as error:
        failure = error
    _gathered(what, failure, None)


def everywhere(what: str, mesh: DeviceMesh | None, compute: Callable[[], T]) -> list[T]:
    """What `compute` returns on each rank, in their order; what it raises on one rank is raised on all, as with `together`.

    It must not communicate. Its result is pickled. Without a mesh or a process group there is one rank.
    """
    if mesh is None or not dist.is_initialized():
        return [compute()]
    value, failure = None, None
    try:
        value = compute()
    except BaseException as error:
        failure = error
    return _gathered(what, failure, value)


def _gathered(what: str, failure: BaseException | None, value: T | None) -> list[T]:
    """Tells all ranks how this one fared."""
    answers: list[tuple[str, str | None, T]] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, (what, None if failure is None else f"{type(failure).__name__}: {failure}", value))
    if failure is not None:
        raise failure
    failed = [(rank, text) for rank, (_, text, _) in enumerate(answers) if text is not None]
    if failed:
        rank, text = failed[0]
        raise RankFailed(f"{what} failed on rank {rank} (and {len(failed) - 1} more): {text}")
    other = next((rank for rank, (place, _, _) in enumerate(answers) if place != what), None)
    if other is not None:
        raise RankFailed(f"This rank is at {what}, rank {other} at {answers[other][0]}: the ranks have different models or plans.")
    return [answer for _, _, answer in answers]

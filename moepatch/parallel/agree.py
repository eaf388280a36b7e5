"""Ranks that succeed or fail together: what one raises, all raise, so that nobody waits for somebody who has left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ..errors import MoePatchError


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
    words: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(words, None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    failed = [(rank, text) for rank, text in enumerate(words) if text is not None]
    if failed:
        rank, text = failed[0]
        raise RankFailed(f"{what} failed on rank {rank} (and {len(failed) - 1} more): {text}")

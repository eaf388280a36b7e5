"""Whether a sharded model fits one rank as a whole, asked before it is gathered."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def why_not_whole(model: nn.Module) -> str | None:
    """None if every rank of this host can hold the whole model beside its shards, else the numbers in words."""
    sharded = [p for p in model.parameters() if isinstance(p, DTensor)]
    whole = sum(p.numel() * p.element_size() for p in sharded)
    if not sharded:
        return None
    device = sharded[0].to_local().device
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return None if whole <= free else _words(whole, free, f"{device} of this rank")
    if device.type != "cpu":
        return None
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free = _available()
    return None if free is None or whole * ranks <= free else _words(whole * ranks, free, f"this host, where {ranks} rank(s) each want it,")


def _available() -> int | None:
    """Bytes of host memory that can be had without swapping; None where the system does not say."""
    info = Path("/proc/meminfo")
    if not info.exists():
        return None
    lines = dict(line.split(":", 1) for line in info.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def _words(wanted: int, free: int, where: str) -> str:
    return f"the whole model takes {wanted / 2**30:.1f} GiB and {where} has {free / 2**30:.1f} GiB free"

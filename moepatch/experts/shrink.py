"""Memory of rows that nobody has: saved tensors that are cut to what they hold once the host knows how much that is.

Experts that share their tokens with other ranks get as many slots as all ranks have tokens, and a slot whose expert lives elsewhere is a row
that no kernel writes or reads: with 8 ranks about 7 of 8. How many rows there are only the device knows, and waiting for it would cost every
layer its head start. So the number is copied to the host without waiting, and when a later layer finds that it has arrived, the storage is cut.
Nothing is guessed: a number that has not arrived cuts nothing.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

#: Storages with more than so many rows for each that is used are cut: the copy that this takes is worth it then.
WORTH = 3
#: Rows that stay behind the last one that is used: tiles of GEMMs are read whole.
SLACK = 512


class _Waiting(NamedTuple):
    """A storage whose number of rows is on its way."""

    storage: StorageWeakRef
    row_bytes: int
    rows: int
    count: Tensor
    arrived: torch.cuda.Event | None
    stream: int


_waiting: deque[_Waiting] = deque()


def cut_later(x_RN: Tensor, ends: Tensor, ranks: int) -> None:
    """Cuts the storage of `x_RN` to the rows below ``ends[-1]`` (and `SLACK`) when their number is known on the host; the shape stays.

    Call it for a tensor that is saved for the backward pass and has a storage of its own. Each call also looks after earlier ones.

    Args:
        x_RN: contiguous; rows from ``ends[-1]`` on are neither written nor read by anybody.
        ends: integers on the same device.
        ranks: among how many ranks rows are spread: below `WORTH` nothing is to be gained.
    """
    stream = torch._C._cuda_getCurrentRawStream(x_RN.device.index) if x_RN.is_cuda else 0
    _cut_known(stream)
    if ranks < WORTH or (x_RN.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    count = torch.empty(1, dtype=ends.dtype, device="cpu", pin_memory=x_RN.is_cuda).copy_(ends[-1:], non_blocking=True)
    arrived = None
    if x_RN.is_cuda:
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(x_RN.device))
    _waiting.append(_Waiting(StorageWeakRef(x_RN.untyped_storage()), x_RN.stride(0) * x_RN.element_size(), x_RN.shape[0], count, arrived, stream))


def _cut_known(stream: int) -> None:
    """Cuts what is known, oldest first; what another stream made is left as it is."""
    while _waiting and (_waiting[0].arrived is None or _waiting[0].arrived.query()):
        found = _waiting.popleft()
        rows = found.count.item() + SLACK
        if found.stream != stream or found.storage.expired() or rows * WORTH > found.rows:
            continue
        storage = torch.UntypedStorage._new_with_weak_ptr(found.storage.cdata)
        if storage is not None:  # else its backward is over
            storage.resize_(rows * found.row_bytes)

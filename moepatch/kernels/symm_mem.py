"""Rows between the buffers of ranks that read each other's memory: what the kernels of both directions share.

Row ``edges[s] + t`` of any rank belongs to token t of source rank s, so N is the tokens of all W ranks together. T tokens of this rank,
K experts per token, L experts on a rank, H hidden. A *buffer* is the bytes that one rank lets the others read.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Peers:
    """The buffers of all ranks as one of them sees them.

    Attributes:
        buffers: uint8, all of one size, by rank.
        address_W: int64, where they start, on the device.
        rank: whose view this is.
    """

    buffers: list[Tensor]
    address_W: Tensor
    rank: int

    @functools.cached_property
    def starts(self) -> tuple[int, ...]:
        """`address_W` on the host."""
        return tuple(buffer.data_ptr() for buffer in self.buffers)

    def view(self, rank: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor in the buffer of `rank`, `offset` bytes from its start."""
        size = torch.Size(shape).numel() * dtype.itemsize
        return self.buffers[rank].narrow(0, offset, size).view(dtype).view(shape)


@dataclass(frozen=True)
class Edges:
    """Whose rows are whose.

    Attributes:
        tokens: T of every rank.
        edge_W: int32 ``[W+1]`` on the device: rank s owns rows ``edge[s] … edge[s+1]-1``.
    """

    tokens: tuple[int, ...]
    edge_W: Tensor

    @functools.cached_property
    def starts(self) -> tuple[int, ...]:
        """The first row of each rank, and N."""
        return tuple(sum(self.tokens[:rank]) for rank in range(len(self.tokens) + 1))

    @functools.cached_property
    def most(self) -> int:
        """The most tokens that a rank has."""
        return max(self.tokens)

    @property
    def rows(self) -> int:
        """N."""
        return self.starts[-1]

    def own(self, rank: int) -> slice:
        """The rows of a rank's tokens."""
        return slice(self.starts[rank], self.starts[rank + 1])


def wire_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of weights between ranks: fp32, or wider if they are."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def block(hidden: int) -> int:
    """Columns per step: what leaves no tail if that can be, so that 4 warps move 16 or 32 bytes a thread."""
    return next((b for b in (2048, 1024) if hidden % b == 0), min(2048, 1 << (hidden - 1).bit_length()))

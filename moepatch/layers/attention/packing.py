"""Sequences laid end to end, so that no kernel computes on padding or across the border of two sequences.

B rows, S positions, T real tokens, H heads, D head dim. Everything a kernel has to know on the host is found with at most one copy from
the device, once for all layers of a forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Packing:
    """Where the sequences of a batch lie.

    Attributes:
        cu_seqlens: int32 ``[N+1]`` on the device; sequence n owns tokens ``cu_seqlens[n] … cu_seqlens[n+1]-1``.
        max_len: of the longest, or more.
        index_T: the positions of the tokens in the flattened batch ``[B*S]``; None if every position holds a token.
    """

    cu_seqlens: Tensor
    max_len: int
    index_T: Tensor | None = None

    @classmethod
    def of_lengths(cls, lengths: Sequence[int], device: torch.device, index_T: Tensor | None = None) -> Packing:
        """From lengths that the host knows: no waiting for the device.

        >>> Packing.of_lengths([2, 3], torch.device("cpu")).cu_seqlens.tolist()
        [0, 2, 5]
        """
        cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        torch.cumsum(torch.tensor(lengths, dtype=torch.int32), 0, dtype=torch.int32, out=cu_seqlens[1:])
        index_T = None if index_T is None else index_T.to(device, non_blocking=True)
        return cls(cu_seqlens.to(device, non_blocking=True), max(lengths), index_T)

    @classmethod
    def of_padding(cls, real_BS: Tensor, device: torch.device) -> Packing | None:
        """From a padding mask on the host; None where a row has no token at all or tokens on both sides of padding."""
        rows = real_BS.long()
        lengths = rows.sum(1)
        starts = rows.argmax(1)
        last = real_BS.shape[1] - rows.flip(1).argmax(1)
        if bool((lengths == 0).any()) or bool((last - starts != lengths).any()):
            return None
        return cls.of_lengths(lengths.tolist(), device, real_BS.flatten().nonzero().flatten())

    @classmethod
    def of_segments(cls, segments_BS: Tensor) -> Packing:
        """From the number of the sequence that every position belongs to; waits for the device once."""
        host_BS = segments_BS.cpu()
        first_BS = torch.ones_like(host_BS, dtype=torch.bool)
        first_BS[:, 1:] = host_BS[:, 1:] != host_BS[:, :-1]
        edges = [*first_BS.flatten().nonzero().flatten().tolist(), host_BS.numel()]
        return cls.of_lengths([end - start for start, end in zip(edges, edges[1:], strict=False)], segments_BS.device)

    def to(self, device: torch.device, non_blocking: bool = False) -> Packing:
        """On another device."""
        index_T = None if self.index_T is None else self.index_T.to(device, non_blocking=non_blocking)
        return Packing(self.cu_seqlens.to(device, non_blocking=non_blocking), self.max_len, index_T)

    def pack(self, x_BHSD: Tensor) -> Tensor:
        """The tokens of a batch, ``[T, H, D]``."""
        heads, dim = x_BHSD.shape[1], x_BHSD.shape[3]
        x_RHD = x_BHSD.transpose(1, 2).reshape(-1, heads, dim)
        return x_RHD if self.index_T is None else _Gather.apply(x_RHD, self.index_T)

    def unpack(self, y_THD: Tensor, batch: int, length: int) -> Tensor:
        """Back to ``[B, S, H, D]``, with zeros at padding."""
        if self.index_T is not None:
            y_THD = _Scatter.apply(y_THD, self.index_T, batch * length)
        return y_THD.view(batch, length, *y_THD.shape[1:])


def _scatter(y_T: Tensor, index_T: Tensor, rows: int) -> Tensor:
    return y_T.new_zeros(rows, *y_T.shape[1:]).index_copy_(0, index_T, y_T)


class _Gather(torch.autograd.Function):
    """Rows by index. Every row occurs at most once, so the gradient is a copy, not torch's sum by atomics."""

    @staticmethod
    def forward(ctx, x_R: Tensor, index_T: Tensor) -> Tensor:
        ctx.save_for_backward(index_T)
        ctx.rows = x_R.shape[0]
        return x_R.index_select(0, index_T)

    @staticmethod
    def backward(ctx, grad_T: Tensor):
        return _scatter(grad_T, ctx.saved_tensors[0], ctx.rows), None


class _Scatter(torch.autograd.Function):
    """The reverse of `_Gather`: zeros where no index points."""

    @staticmethod
    def forward(ctx, y_T: Tensor, index_T: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(index_T)
        return _scatter(y_T, index_T, rows)

    @staticmethod
    def backward(ctx, grad_R: Tensor):
        return grad_R.index_select(0, ctx.saved_tensors[0]), None, None

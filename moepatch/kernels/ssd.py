"""The Mamba-2 recurrence in chunks: Triton kernels for what `moepatch.layers.mixers.ssd_scan.reference_scan` computes.

Time is cut into chunks of Q tokens. Inside a chunk everything is matrix products, shared by the heads of a group where B and C are;
from chunk to chunk only the state ``[N, P]`` of each head is handed on. B sequences, T tokens, H heads of width P, G groups, N state,
c chunks. ``a`` is the running sum of ``dt · A`` inside a chunk.

    state after a chunk   = exp(a_Q) state + Σ_j exp(a_Q - a_j) dt_j B_j x_jᵀ
    y_i                   = Σ_{j≤i} (C_i·B_j) exp(a_i - a_j) dt_j x_j  +  exp(a_i) C_i state  +  D x_i

Four kernels: states forwards and outputs, gradients of states backwards and all other gradients. Softplus, clamp and running sum of dt
are computed again in each, as they are small.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

try:
    import triton
except ImportError:
    triton = None

from .launch import launch
from .ssd_jit import grad_states_kernel, grads_kernel, outputs_kernel, states_kernel

#: Programs that fill a large GPU twice; with fewer, the heads of a group are split between programs.
_ENOUGH = 264
#: Bytes of shared memory that `grads_kernel` needs with the next tiles under way, beside those for each number of a head's state: docs/gpus.md.
_AHEAD = (68 * 1024, 12)


@dataclass(frozen=True)
class Shape:
    """The sizes of one call: sequences, tokens, heads, head width, groups, state, the limits of dt, whether factors are fp32, and the bytes of shared
    memory that a block may have on the device."""

    batch: int
    tokens: int
    heads: int
    head_dim: int
    groups: int
    state: int
    limits: tuple[float, float]
    wide: bool
    shared: int

    @property
    def ahead(self) -> bool:
        """Whether the tiles of the next head fit beside those at work, in the kernel that holds the most. fp32 tiles are too large."""
        return not self.wide and _AHEAD[0] + _AHEAD[1] * _power(self.state) * _power(self.head_dim) <= self.shared

    @property
    def chunk(self) -> int:
        """Tokens in a chunk (Q): half as many where numbers are twice as wide."""
        return 32 if self.wide else 64

    @property
    def chunks(self) -> int:
        """How many chunks a sequence has."""
        return -(-self.tokens // self.chunk)

    @property
    def splits(self) -> int:
        """Over how many programs the heads of one group are spread: a power of 2 that divides them."""
        splits, per_group = 1, self.heads // self.groups
        while per_group % (2 * splits) == 0 and self.batch * self.chunks * self.groups * splits < _ENOUGH:
            splits *= 2
        return splits

    @property
    def constants(self) -> dict[str, int | float]:
        """The compile-time arguments and options that every kernel has."""
        return {
            "H": self.heads, "P": self.head_dim, "G": self.groups, "N": self.state, "Q": self.chunk,
            "LOW": float(self.limits[0]), "HIGH": float(self.limits[1]), **({} if self.ahead else {"num_stages": 1}),
        }  # fmt: skip

    @property
    def slots(self) -> tuple[int, int, int]:
        """The grid of the two kernels that walk along time, a program for each block of a head's state, and the block."""
        return (_power(self.state) // _slice(self.state)) * (_power(self.head_dim) // _slice(self.head_dim)), self.heads, self.batch


def _power(n: int) -> int:
    return max(16, triton.next_power_of_2(n))


def _slice(n: int) -> int:
    """The part of an axis of the state that one program of the sequential kernels holds."""
    return min(64, _power(n))


def scan_states(u_BTC: Tensor, dt_BTH: Tensor, a_log_H: Tensor, dt_bias_H: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """The state before every chunk ``[B, c, H, N, P]`` in the dtype of `u`, and after the last one ``[B, H, P, N]`` in fp32.

    Args:
        u_BTC: contiguous; x, B and C side by side.
        dt_BTH: before bias and softplus; rows may lie apart.
        a_log_H, dt_bias_H: the module's parameters.
        shape: the sizes.
    """
    states = u_BTC.new_empty((shape.batch, shape.chunks, shape.heads, shape.state, shape.head_dim))
    last = torch.empty((shape.batch, shape.heads, shape.head_dim, shape.state), dtype=torch.float32, device=u_BTC.device)
    launch(
        states_kernel, shape.slots, u_BTC, dt_BTH, a_log_H, dt_bias_H, states, last, shape.tokens, shape.chunks, dt_BTH.stride(0), dt_BTH.stride(1),
        BN=_slice(shape.state), BP=_slice(shape.head_dim), **shape.constants,
    )  # fmt: skip
    return states, last


def scan_outputs(u_BTC: Tensor, dt_BTH: Tensor, a_log_H: Tensor, dt_bias_H: Tensor, d_H: Tensor, states: Tensor, shape: Shape) -> Tensor:
    """y ``[B, T, H·P]`` in fp32 from the states before each chunk."""
    y = torch.empty((shape.batch, shape.tokens, shape.heads * shape.head_dim), dtype=torch.float32, device=u_BTC.device)
    launch(
        outputs_kernel, (shape.chunks, shape.groups * shape.splits, shape.batch),
        u_BTC, dt_BTH, a_log_H, dt_bias_H, d_H, states, y, shape.tokens, shape.chunks, dt_BTH.stride(0), dt_BTH.stride(1),
        SPLITS=shape.splits, BN=_power(shape.state), BP=_power(shape.head_dim), **shape.constants,
    )  # fmt: skip
    return y


def scan_backward(
    grad_y: Tensor, grad_last: Tensor | None, u_BTC: Tensor, dt_BTH: Tensor, a_log_H: Tensor, dt_bias_H: Tensor, d_H: Tensor,
    grad_dt_BTH: Tensor, shape: Shape,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """All gradients of the scan.

    Args:
        grad_y: contiguous ``[B, T, H·P]`` in fp32.
        grad_last: of the last state ``[B, H, P, N]``, or None.
        u_BTC, dt_BTH, a_log_H, dt_bias_H, d_H: as in the forward.
        grad_dt_BTH: receives the gradient of `dt_BTH`; rows may lie apart.
        shape: the sizes.

    Returns:
        The gradient of `u_BTC`, and those of A_log, dt_bias and D as fp32 ``[3, H]``.
    """
    states, _ = scan_states(u_BTC, dt_BTH, a_log_H, dt_bias_H, shape)
    grad_states = torch.empty_like(states)
    launch(
        grad_states_kernel, shape.slots,
        grad_y, grad_last, u_BTC, dt_BTH, a_log_H, dt_bias_H, grad_states, shape.tokens, shape.chunks, dt_BTH.stride(0), dt_BTH.stride(1),
        LAST=grad_last is not None, BN=_slice(shape.state), BP=_slice(shape.head_dim), **shape.constants,
    )  # fmt: skip
    grad_u = torch.empty_like(u_BTC)
    splits, width = shape.splits, 2 * shape.groups * shape.state
    # Programs that share a group add up their parts of its B and C afterwards; a program alone writes them where they belong.
    parts = None if splits == 1 else torch.empty((splits, shape.batch, shape.tokens, width), dtype=torch.float32, device=u_BTC.device)
    sums = torch.empty((shape.batch * shape.chunks, 3, shape.heads), dtype=torch.float32, device=u_BTC.device)
    launch(
        grads_kernel, (shape.chunks, shape.groups * splits, shape.batch),
        grad_y, u_BTC, dt_BTH, a_log_H, dt_bias_H, d_H, states, grad_states, grad_u, parts, grad_dt_BTH, sums, shape.tokens, shape.chunks,
        dt_BTH.stride(0), dt_BTH.stride(1), grad_dt_BTH.stride(0), grad_dt_BTH.stride(1),
        SPLITS=splits, BN=_power(shape.state), BP=_power(shape.head_dim), **shape.constants, num_warps=8,
    )  # fmt: skip
    if parts is not None:
        grad_u[..., -width:] = parts.sum(0)
    return grad_u, sums.sum(0)

"""The Mamba-1 recurrence: a state of N numbers per channel, each with a decay of its own. Triton kernels beside their torch reference.

``h ← exp(dt·A) h + dt·B·x`` and ``y = (C·h + D·x) · silu(gate)``. B sequences, T tokens, D channels, N state, tiles of Q tokens. A program
walks along time with a block of channels; inside a tile the recurrence is an associative scan in registers. The backward pass starts from
the states before each tile and computes the others again.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

from ..once import once_differentiable
from .jit import jit

_TILE, _CHANNELS = 16, 32


def reference_selective(
    x_BTD: Tensor, dt_BTD: Tensor, a_log_DN: Tensor, b_BTN: Tensor, c_BTN: Tensor, d_D: Tensor, dt_bias_D: Tensor | None, gate_BTD: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence in torch, in fp32 or wider: √T steps over all chunks at once, then √T steps from chunk to chunk.

    Args:
        x_BTD: the input.
        dt_BTD: step sizes before bias and softplus.
        a_log_DN: ``A = -exp(a_log)``.
        b_BTN, c_BTN: into and out of the state.
        d_D: the skip.
        dt_bias_D: added to `dt` in its precision, as the families do; or None.
        gate_BTD: before its SiLU.

    Returns:
        y ``[B, T, D]`` in fp32 or wider, the state after the last token ``[B, D, N]``.
    """
    tokens, wide = x_BTD.shape[1], torch.promote_types(x_BTD.dtype, torch.float32)
    dt_BTD = F.softplus(dt_BTD if dt_bias_D is None else dt_BTD + dt_bias_D.to(dt_BTD.dtype)).to(wide)
    a_DN = -torch.exp(a_log_DN.to(wide))
    chunk = max(1, int(tokens**0.5))
    chunks, rest = -(-tokens // chunk), -tokens % chunk

    def cut(rows: Tensor) -> Tensor:
        """``[B, T, …]`` to ``[Q, B, c, …]``; what is past the end is 0 and changes nothing."""
        return F.pad(rows.to(wide), (0, 0, 0, rest)).unflatten(1, (chunks, chunk)).movedim(2, 0)

    dt, x, b, c = cut(dt_BTD), cut(x_BTD), cut(b_BTN)[..., None, :], cut(c_BTN)[..., None, :]
    decays = [(step[..., None] * a_DN).exp() for step in dt]
    added = [(step * value)[..., None] * into for step, value, into in zip(dt, x, b, strict=True)]

    end = torch.zeros_like(added[0])
    for decay, more in zip(decays, added, strict=True):
        end = decay * end + more
    whole = (dt.sum(0)[..., None] * a_DN).exp()
    starts = [torch.zeros_like(end[:, 0])]
    for i in range(chunks):
        starts.append(whole[:, i] * starts[-1] + end[:, i])

    state, outputs = torch.stack(starts[:-1], 1), []
    for decay, more, out in zip(decays, added, c, strict=True):
        state = decay * state + more
        outputs.append((state * out).sum(-1))
    y_BTD = torch.stack(outputs, 2).flatten(1, 2)[:, :tokens]
    return (y_BTD + x_BTD.to(wide) * d_D.to(wide)) * F.silu(gate_BTD.to(wide)), starts[-1]


class _Selective(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, a_log, b, c, d, bias, gate):
        y, last, _ = _scan(x, dt, a_log, b, c, d, bias, gate, keep=False)
        ctx.save_for_backward(x, dt, a_log, b, c, d, bias, gate)
        ctx.set_materialize_grads(False)
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_last):
        x, dt, a_log, b, c, d, bias, gate = ctx.saved_tensors
        batch, tokens, channels = x.shape
        state = a_log.shape[1]
        grad_y = torch.zeros_like(x) if grad_y is None else grad_y.contiguous()
        grad_last = None if grad_last is None else grad_last.contiguous()
        _, _, starts = _scan(x, dt, a_log, b, c, d, bias, gate, keep=True)
        blocks = triton.cdiv(channels, _CHANNELS)
        grad_x, grad_dt, grad_gate = torch.empty_like(x), torch.empty_like(dt), torch.empty(x.shape, dtype=gate.dtype, device=x.device)
        # Every block of channels has its part of what B and C get, every sequence its part of what the parameters get.
        into = torch.empty((2, blocks, batch, tokens, state), dtype=torch.float32, device=x.device)
        grad_a = torch.empty((batch, channels, state), dtype=torch.float32, device=x.device)
        sums = torch.empty((2, batch, channels), dtype=torch.float32, device=x.device)
        _grads_kernel[blocks, batch](
            x, dt, gate, b, c, a_log, d, bias, starts, grad_y, grad_last, grad_x, grad_dt, grad_gate, into, grad_a, sums, tokens,
            gate.stride(0), gate.stride(1), D=channels, N=state, Q=_TILE, BD=_CHANNELS, BN=triton.next_power_of_2(state),
            BIAS=bias is not None, LAST=grad_last is not None, num_warps=8,
        )  # fmt: skip
        grad_b, grad_c = into.sum(1).unbind(0)
        grad_d, grad_bias = sums.sum(1).unbind(0)
        return (
            grad_x, grad_dt, grad_a.sum(0).to(a_log.dtype), grad_b.to(b.dtype), grad_c.to(c.dtype), grad_d.to(d.dtype),
            None if bias is None else grad_bias.to(bias.dtype), grad_gate,
        )  # fmt: skip


def _scan(x, dt, a_log, b, c, d, bias, gate, keep: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, the last state and, to `keep`, the states before each tile ``[B, tiles, D, N]``."""
    batch, tokens, channels = x.shape
    state = a_log.shape[1]
    y = torch.empty_like(x)
    last = torch.empty((batch, channels, state), dtype=torch.float32, device=x.device)
    starts = torch.empty((batch, triton.cdiv(tokens, _TILE), channels, state), dtype=torch.float32, device=x.device) if keep else None
    _scan_kernel[triton.cdiv(channels, _CHANNELS), batch](
        x, dt, gate, b, c, a_log, d, bias, y, last, starts, tokens, gate.stride(0), gate.stride(1),
        D=channels, N=state, Q=_TILE, BD=_CHANNELS, BN=triton.next_power_of_2(state), BIAS=bias is not None, KEEP=keep, num_warps=8,
    )  # fmt: skip
    return y, last, starts


def selective(
    x_BTD: Tensor, dt_BTD: Tensor, a_log_DN: Tensor, b_BTN: Tensor, c_BTN: Tensor, d_D: Tensor, dt_bias_D: Tensor | None, gate_BTD: Tensor
) -> tuple[Tensor, Tensor]:
    """`reference_selective` by Triton kernels, differentiable; y comes in the dtype of `x`. The gate's rows may lie apart."""
    return _Selective.apply(x_BTD.contiguous(), dt_BTD.contiguous(), a_log_DN, b_BTN.contiguous(), c_BTN.contiguous(), d_D, dt_bias_D, gate_BTD)


@jit()
def _step(dt, bias, ch, row, n_rows, live, BIAS: tl.constexpr):
    """dt of some rows with its bias, and after softplus (0 where a row is not one)."""
    real = ((row < n_rows)[:, None]) & live[None, :]
    raw = tl.load(dt, mask=real, other=0).to(tl.float32)
    if BIAS:
        raw += tl.load(bias + ch, mask=live, other=0).to(tl.float32)[None, :]
    e = tl.exp(tl.minimum(raw, 20.0))
    u = 1 + e
    # log(1 + e) to the last bit also where e is small: the rounding of 1 + e cancels out of the quotient.
    small = tl.where(u == 1, e, tl.log(u) * (e / tl.where(u == 1, 1.0, u - 1)))
    return raw, tl.where(real, tl.where(raw > 20, raw, small), 0.0)


@jit()
def _after(decay_first, added_first, decay, added):
    """Two steps of a linear recurrence as one."""
    return decay_first * decay, added_first * decay + added


@jit(do_not_specialize=["tokens"])
def _scan_kernel(
    x, dt, gate, b, c, a_log, d, bias, y, last, starts, tokens, stride_gate_b, stride_gate_t,
    D: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, BIAS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    seq = tl.program_id(1).to(tl.int64)
    ch = tl.program_id(0) * BD + tl.arange(0, BD)
    n = tl.arange(0, BN)
    q = tl.arange(0, Q)
    live = ch < D
    inside = live[:, None] & (n < N)[None, :]
    a = -tl.exp(tl.load(a_log + ch[:, None] * N + n[None, :], mask=inside, other=0).to(tl.float32))
    skip = tl.load(d + ch, mask=live, other=0).to(tl.float32)
    at = seq * tokens * D + q[:, None] * D + ch[None, :]
    at_n = seq * tokens * N + q[:, None] * N + n[None, :]
    at_gate = seq * stride_gate_b + q[:, None] * stride_gate_t + ch[None, :]
    tiles = (tokens + Q - 1) // Q
    state = tl.zeros((BD, BN), tl.float32)
    for tile in range(tiles):
        rest = tokens - tile * Q
        if KEEP:
            tl.store(starts + (seq * tiles + tile) * D * N + ch[:, None] * N + n[None, :], state, mask=inside)
        real = (q < rest)[:, None] & live[None, :]
        real_n = (q < rest)[:, None] & (n < N)[None, :]
        value = tl.load(x + at, mask=real, other=0).to(tl.float32)
        _, step = _step(dt + at, bias, ch, q, rest, live, BIAS)
        B = tl.load(b + at_n, mask=real_n, other=0).to(tl.float32)
        C = tl.load(c + at_n, mask=real_n, other=0).to(tl.float32)
        decay = tl.exp(step[:, :, None] * a[None, :, :])
        gone, added = tl.associative_scan((decay, (step * value)[:, :, None] * B[:, None, :]), 0, _after)
        states = added + gone * state[None, :, :]
        out = tl.sum(states * C[:, None, :], 2) + skip[None, :] * value
        z = tl.load(gate + at_gate, mask=real, other=0).to(tl.float32)
        tl.store(y + at, (out * z / (1 + tl.exp(-z))).to(y.dtype.element_ty), mask=real)
        state = tl.sum(tl.where((q == Q - 1)[:, None, None], states, 0.0), 0)
        at += Q * D
        at_n += Q * N
        at_gate += Q * stride_gate_t
    tl.store(last + seq * D * N + ch[:, None] * N + n[None, :], state, mask=inside)


@jit()
def _through_gate(gate, grad_y, grad_gate, out, real):
    """The gradient of what the gate multiplies; that of the gate is stored."""
    z = tl.load(gate, mask=real, other=0).to(tl.float32)
    up = tl.load(grad_y, mask=real, other=0).to(tl.float32)
    sigmoid = 1 / (1 + tl.exp(-z))
    tl.store(grad_gate, (up * out * sigmoid * (1 + z * (1 - sigmoid))).to(grad_gate.dtype.element_ty), mask=real)
    return up * (z * sigmoid)


@jit(do_not_specialize=["tokens"])
def _grads_kernel(
    x, dt, gate, b, c, a_log, d, bias, starts, grad_y, grad_last, grad_x, grad_dt, grad_gate, into, grad_a, sums, tokens,
    stride_gate_b, stride_gate_t,
    D: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, BIAS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    seq = tl.program_id(1).to(tl.int64)
    ch = tl.program_id(0) * BD + tl.arange(0, BD)
    n = tl.arange(0, BN)
    q = tl.arange(0, Q)
    live = ch < D
    inside = live[:, None] & (n < N)[None, :]
    at_state = ch[:, None] * N + n[None, :]
    a = -tl.exp(tl.load(a_log + at_state, mask=inside, other=0).to(tl.float32))
    skip = tl.load(d + ch, mask=live, other=0).to(tl.float32)
    tiles = (tokens + Q - 1) // Q
    # The gradient of the state after a tile, faded by the first token behind it.
    if LAST:
        carry = tl.load(grad_last + seq * D * N + at_state, mask=inside, other=0).to(tl.float32)
    else:
        carry = tl.zeros((BD, BN), tl.float32)
    sum_a = tl.zeros((BD, BN), tl.float32)
    sum_d = tl.zeros((BD,), tl.float32)
    sum_bias = tl.zeros((BD,), tl.float32)
    for back in range(tiles):
        tile = tiles - 1 - back
        start = seq * tokens + tile * Q
        rest = tokens - tile * Q
        at = start * D + q[:, None] * D + ch[None, :]
        at_n = start * N + q[:, None] * N + n[None, :]
        at_gate = seq * stride_gate_b + (tile * Q + q)[:, None].to(tl.int64) * stride_gate_t + ch[None, :]
        real = (q < rest)[:, None] & live[None, :]
        real_n = (q < rest)[:, None] & (n < N)[None, :]
        value = tl.load(x + at, mask=real, other=0).to(tl.float32)
        raw, step = _step(dt + at, bias, ch, q, rest, live, BIAS)
        _, next_step = _step(dt + at + D, bias, ch, tl.where(q == Q - 1, rest, q + 1), rest, live, BIAS)
        B = tl.load(b + at_n, mask=real_n, other=0).to(tl.float32)
        C = tl.load(c + at_n, mask=real_n, other=0).to(tl.float32)
        before = tl.load(starts + (seq * tiles + tile) * D * N + at_state, mask=inside, other=0)
        decay = tl.exp(step[:, :, None] * a[None, :, :])
        more = (step * value)[:, :, None] * B[:, None, :]
        gone, added = tl.associative_scan((decay, more), 0, _after)
        states = added + gone * before[None, :, :]

        out = tl.sum(states * C[:, None, :], 2) + skip[None, :] * value
        up = _through_gate(gate + at_gate, grad_y + at, grad_gate + at, out, real)

        # Gradients of states run backwards: that of a token, plus the next one's faded by the next one's decay.
        fade = tl.exp(next_step[:, :, None] * a[None, :, :])
        passed, own = tl.associative_scan((fade, up[:, :, None] * C[:, None, :]), 0, _after, reverse=True)
        grad = own + passed * carry[None, :, :]
        carry = tl.sum(tl.where((q == 0)[:, None, None], grad * decay, 0.0), 0)

        faded = states - more
        grad_step = tl.sum(grad * (a[None, :, :] * faded + value[:, :, None] * B[:, None, :]), 2)
        grad_value = tl.sum(grad * B[:, None, :], 2) * step + up * skip[None, :]
        grad_raw = tl.where(real, grad_step / (1 + tl.exp(-raw)), 0.0)
        tl.store(grad_x + at, grad_value.to(grad_x.dtype.element_ty), mask=real)
        tl.store(grad_dt + at, grad_raw.to(grad_dt.dtype.element_ty), mask=real)
        part = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) * tokens) * N + at_n
        tl.store(into + part, tl.sum(grad * (step * value)[:, :, None], 1), mask=real_n)
        other = tl.num_programs(0).to(tl.int64) * tl.num_programs(1) * tokens * N
        tl.store(into + other + part, tl.sum(states * up[:, :, None], 1), mask=real_n)
        sum_a += tl.sum(grad * faded * step[:, :, None], 0)
        sum_d += tl.sum(up * value, 0)
        sum_bias += tl.sum(grad_raw, 0)
    tl.store(grad_a + seq * D * N + at_state, sum_a * a, mask=inside)
    tl.store(sums + seq * D + ch, sum_d, mask=live)
    tl.store(sums + (tl.num_programs(1) + seq) * D + ch, sum_bias, mask=live)

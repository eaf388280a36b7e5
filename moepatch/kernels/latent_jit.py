"""The Triton side of `kernels.latent`. Importing this module needs Triton.

A row is one head of one token. Parts of a head are N dims without position (of N2 columns, a power of two), the first and the second numbers
of R2 pairs (of HALF columns), and V dims of a value (of V2 columns).
"""

import triton
import triton.language as tl

from .rope_parts import load_pairs, load_tables, store_pairs, turn, turn_back


@triton.jit
def _rows(tokens, sequence, first, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """Of the rows ``[ROWS, 1]`` of a tile: which there are, their number, head, batch and position in the sequence."""
    row = first * ROWS + tl.arange(0, ROWS)[:, None]
    token = row // HEADS
    batch = token // sequence
    return token < tokens, row.to(tl.int64), (row % HEADS).to(tl.int64), batch.to(tl.int64), (token - batch * sequence).to(tl.int64)


@triton.jit
def _copied(source, into, here, WIDTH: tl.constexpr, WIDTH2: tl.constexpr, SCALE: tl.constexpr):
    """Moves WIDTH columns; pointers are ``[ROWS, 1]``."""
    column = tl.arange(0, WIDTH2)[None, :]
    mask = here & (column < WIDTH)
    x = tl.load(source + column, mask=mask, other=0.0)
    if SCALE != 1.0:
        x = x.to(tl.float32) * SCALE
    tl.store(into + column, x.to(into.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "sequence"])
def forward_kernel(
    q, kv, shared, cos, sin, q_out, k_out, tokens, sequence, shared_row, cos_batch, cos_row, sin_batch, sin_row, HEADS: tl.constexpr,
    N: tl.constexpr, N2: tl.constexpr, V: tl.constexpr, R2: tl.constexpr, HALF: tl.constexpr, STEP: tl.constexpr, SECOND: tl.constexpr,
    ROPE: tl.constexpr, PAIRS_IN: tl.constexpr, PAIRS_OUT: tl.constexpr, SCALE: tl.constexpr, QUERIES: tl.constexpr, INPLACE: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """QUERIES: whether they are moved or changed at all; INPLACE: `q_out` is `q`."""
    D: tl.constexpr = N + 2 * R2
    here, row, head, batch, position = _rows(tokens, sequence, tl.program_id(0), HEADS, ROWS)
    cos_at, sin_at = batch * cos_batch + position * cos_row, batch * sin_batch + position * sin_row
    cos_1, sin_1, cos_2, sin_2 = load_tables(cos, sin, cos_at, sin_at, here, ROPE, R2, HALF, STEP, SECOND)
    if QUERIES:
        x_1, x_2 = load_pairs(q + row * D + N, here, R2, HALF, PAIRS_IN)
        y_1, y_2 = turn(x_1 * SCALE, x_2 * SCALE, cos_1, sin_1, cos_2, sin_2, ROPE)
        if INPLACE:
            tl.debug_barrier()  # numbers change places: all have to be read before the first is written
        store_pairs(q_out + row * D + N, here, y_1, y_2, R2, HALF, PAIRS_OUT)
        if (not INPLACE) or SCALE != 1.0:
            _copied(q + row * D, q_out + row * D, here, N, N2, SCALE)
    x_1, x_2 = load_pairs(shared + (batch * sequence + position) * shared_row, here, R2, HALF, PAIRS_IN)
    y_1, y_2 = turn(x_1, x_2, cos_1, sin_1, cos_2, sin_2, ROPE)
    store_pairs(k_out + row * D + N, here, y_1, y_2, R2, HALF, PAIRS_OUT)
    _copied(kv + row * (N + V), k_out + row * D, here, N, N2, 1.0)


@triton.jit
def _shared_gradient(
    dk, dshared, cos, sin, token, sequence, k_batch, k_head, k_row, cos_batch, cos_row, sin_batch, sin_row, HEADS: tl.constexpr,
    HEADS2: tl.constexpr, N: tl.constexpr, R2: tl.constexpr, HALF: tl.constexpr, STEP: tl.constexpr, SECOND: tl.constexpr,
    ROPE: tl.constexpr, PAIRS_IN: tl.constexpr, PAIRS_OUT: tl.constexpr,
):  # fmt: skip
    """Of one token: the sum over all heads, which is turned back once."""
    head = tl.arange(0, HEADS2)[:, None]
    batch, position = (token // sequence).to(tl.int64), (token % sequence).to(tl.int64)
    g_1, g_2 = load_pairs(dk + batch * k_batch + position * k_row + head.to(tl.int64) * k_head + N, head < HEADS, R2, HALF, PAIRS_OUT)
    g_1, g_2 = tl.sum(g_1, 0)[None, :], tl.sum(g_2, 0)[None, :]
    here = tl.full((1, 1), 1, tl.int1)
    at = tl.zeros((1, 1), tl.int64)
    cos_at, sin_at = at + batch * cos_batch + position * cos_row, at + batch * sin_batch + position * sin_row
    cos_1, sin_1, cos_2, sin_2 = load_tables(cos, sin, cos_at, sin_at, here, ROPE, R2, HALF, STEP, SECOND)
    x_1, x_2 = turn_back(g_1, g_2, cos_1, sin_1, cos_2, sin_2, ROPE)
    store_pairs(dshared + at + token.to(tl.int64) * (2 * R2), here, x_1, x_2, R2, HALF, PAIRS_IN)


@triton.jit(do_not_specialize=["tokens", "sequence"])
def backward_kernel(
    dq, dk, dv, cos, sin, dq_out, dkv, dshared, tokens, sequence, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    cos_batch, cos_row, sin_batch, sin_row, HEADS: tl.constexpr, HEADS2: tl.constexpr, N: tl.constexpr, N2: tl.constexpr, V: tl.constexpr,
    V2: tl.constexpr, R2: tl.constexpr, HALF: tl.constexpr, STEP: tl.constexpr, SECOND: tl.constexpr, ROPE: tl.constexpr,
    PAIRS_IN: tl.constexpr, PAIRS_OUT: tl.constexpr, SCALE: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The first programs sum the shared key's gradient, a token each; the others take rows. QUERIES: whether `dq_out` is not just `dq`."""
    D: tl.constexpr = N + 2 * R2
    program = tl.program_id(0)
    if program < tokens:
        _shared_gradient(
            dk, dshared, cos, sin, program, sequence, k_batch, k_head, k_row, cos_batch, cos_row, sin_batch, sin_row, HEADS, HEADS2, N, R2,
            HALF, STEP, SECOND, ROPE, PAIRS_IN, PAIRS_OUT,
        )  # fmt: skip
    else:
        here, row, head, batch, position = _rows(tokens, sequence, program - tokens, HEADS, ROWS)
        if QUERIES:
            cos_at, sin_at = batch * cos_batch + position * cos_row, batch * sin_batch + position * sin_row
            cos_1, sin_1, cos_2, sin_2 = load_tables(cos, sin, cos_at, sin_at, here, ROPE, R2, HALF, STEP, SECOND)
            source = dq + batch * q_batch + position * q_row + head * q_head
            g_1, g_2 = load_pairs(source + N, here, R2, HALF, PAIRS_OUT)
            x_1, x_2 = turn_back(g_1, g_2, cos_1, sin_1, cos_2, sin_2, ROPE)
            store_pairs(dq_out + row * D + N, here, x_1 * SCALE, x_2 * SCALE, R2, HALF, PAIRS_IN)
            _copied(source, dq_out + row * D, here, N, N2, SCALE)
        into = dkv + row * (N + V)
        _copied(dk + batch * k_batch + position * k_row + head * k_head, into, here, N, N2, 1.0)
        _copied(dv + batch * v_batch + position * v_row + head * v_head, into + N, here, V, V2, 1.0)

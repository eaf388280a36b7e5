"""What the kernels of `rope_jit`, `rope_rows_jit` and `latent_jit` are made of: parts of heads, tables, and one head each way. Needs Triton.

A head is taken apart into the first and the second numbers of its R/2 pairs (R2 of HALF columns, a power of two) and the REST dims that are
not rotated (of REST2 columns). NORM is 0 without one, 1 for each head before the rotation, 2 for all heads of a token, 3 for each head after
the rotation.
"""

import triton
import triton.language as tl


@triton.jit
def stored_pairs(at, here, R2: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The first and the second number of each pair, ``[BT, HALF]``, in the dtype of memory; `at` are pointers ``[BT, 1]``."""
    if INTERLEAVED:
        column = tl.arange(0, 2 * HALF)[None, :]
        x = tl.load(at + column, mask=here & (column < 2 * R2), other=0.0)
        first, second = tl.split(tl.reshape(x, (x.shape[0], HALF, 2)))
    else:
        column = tl.arange(0, HALF)[None, :]
        mask = here & (column < R2)
        first = tl.load(at + column, mask=mask, other=0.0)
        second = tl.load(at + R2 + column, mask=mask, other=0.0)
    return first, second


@triton.jit
def load_pairs(at, here, R2: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The same in fp32."""
    first, second = stored_pairs(at, here, R2, HALF, INTERLEAVED)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def store_pairs(at, here, first, second, R2: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The inverse of `load_pairs`."""
    if INTERLEAVED:
        column = tl.arange(0, 2 * HALF)[None, :]
        x = tl.reshape(tl.join(first, second), (first.shape[0], 2 * HALF))
        tl.store(at + column, x.to(at.dtype.element_ty), mask=here & (column < 2 * R2))
    else:
        column = tl.arange(0, HALF)[None, :]
        mask = here & (column < R2)
        tl.store(at + column, first.to(at.dtype.element_ty), mask=mask)
        tl.store(at + R2 + column, second.to(at.dtype.element_ty), mask=mask)


@triton.jit
def _stored_rest(at, here, REST: tl.constexpr, REST2: tl.constexpr):
    """The dims after the rotated ones, ``[BT, REST2]``, in the dtype of memory; one column of zeros where there are none."""
    if REST > 0:
        column = tl.arange(0, REST2)[None, :]
        rest = tl.load(at + column, mask=here & (column < REST), other=0.0)
    else:
        rest = tl.zeros((at.shape[0], 1), at.dtype.element_ty)
    return rest


@triton.jit
def _load_rest(at, here, REST: tl.constexpr, REST2: tl.constexpr):
    """The same in fp32."""
    return _stored_rest(at, here, REST, REST2).to(tl.float32)


@triton.jit
def stored_head(at, here, R2: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, REST2: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The three parts of a head in the dtype of memory."""
    first, second = stored_pairs(at, here, R2, HALF, INTERLEAVED)
    return first, second, _stored_rest(at + 2 * R2, here, REST, REST2)


@triton.jit
def _store_rest(at, here, rest, REST: tl.constexpr, REST2: tl.constexpr):
    if REST > 0:
        column = tl.arange(0, REST2)[None, :]
        tl.store(at + column, rest.to(at.dtype.element_ty), mask=here & (column < REST))


@triton.jit
def stored_tables(
    cos, sin, cos_at, sin_at, here, ROPE: tl.constexpr, R2: tl.constexpr, HALF: tl.constexpr, STEP: tl.constexpr, SECOND: tl.constexpr
):  # fmt: skip
    """cos and sin for the first and for the second numbers of the pairs, in the dtype of memory."""
    if ROPE:
        column = tl.arange(0, HALF)[None, :]
        mask = here & (column < R2)
        cos_1 = tl.load(cos + cos_at + column * STEP, mask=mask, other=0.0)
        sin_1 = tl.load(sin + sin_at + column * STEP, mask=mask, other=0.0)
        if SECOND > 0:
            cos_2 = tl.load(cos + cos_at + column * STEP + SECOND, mask=mask, other=0.0)
            sin_2 = tl.load(sin + sin_at + column * STEP + SECOND, mask=mask, other=0.0)
        else:
            cos_2, sin_2 = cos_1, sin_1
    else:
        one = tl.full((1, 1), 1.0, tl.float32)
        cos_1, sin_1, cos_2, sin_2 = one, one * 0.0, one, one * 0.0
    return cos_1, sin_1, cos_2, sin_2


@triton.jit
def load_tables(
    cos, sin, cos_at, sin_at, here, ROPE: tl.constexpr, R2: tl.constexpr, HALF: tl.constexpr, STEP: tl.constexpr, SECOND: tl.constexpr
):  # fmt: skip
    """The same in fp32."""
    cos_1, sin_1, cos_2, sin_2 = stored_tables(cos, sin, cos_at, sin_at, here, ROPE, R2, HALF, STEP, SECOND)
    return cos_1.to(tl.float32), sin_1.to(tl.float32), cos_2.to(tl.float32), sin_2.to(tl.float32)


@triton.jit
def turn(first, second, cos_1, sin_1, cos_2, sin_2, ROPE: tl.constexpr):
    if ROPE:
        turned_1, turned_2 = first * cos_1 - second * sin_1, second * cos_2 + first * sin_2
    else:
        turned_1, turned_2 = first, second
    return turned_1, turned_2


@triton.jit
def turn_back(first, second, cos_1, sin_1, cos_2, sin_2, ROPE: tl.constexpr):
    """The transpose of `turn`, for gradients."""
    if ROPE:
        turned_1, turned_2 = first * cos_1 + second * sin_2, second * cos_2 - first * sin_1
    else:
        turned_1, turned_2 = first, second
    return turned_1, turned_2


@triton.jit
def _square_sum(first, second, rest):
    return tl.sum(first * first + second * second, 1) + tl.sum(rest * rest, 1)


@triton.jit
def _dot(a_1, a_2, a_3, b_1, b_2, b_3):
    return tl.sum(a_1 * b_1 + a_2 * b_2, 1) + tl.sum(a_3 * b_3, 1)


@triton.jit
def _rounded(x, dtype: tl.constexpr, CAST_FIRST: tl.constexpr):
    return x.to(dtype).to(tl.float32) if CAST_FIRST else x


@triton.jit
def load_weight(
    q_weight, k_weight, at, is_q, OFFSET: tl.constexpr, R2: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, REST2: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """The norm's factors for queries or keys, in the three parts of a head, each ``[1, …]``."""
    row = tl.zeros((1, 1), tl.int32) + at
    q_here, k_here = (row >= 0) & is_q, (row >= 0) & (is_q == 0)
    q_1, q_2 = load_pairs(q_weight + row, q_here, R2, HALF, INTERLEAVED)
    k_1, k_2 = load_pairs(k_weight + row, k_here, R2, HALF, INTERLEAVED)
    q_3 = _load_rest(q_weight + row + 2 * R2, q_here, REST, REST2)
    k_3 = _load_rest(k_weight + row + 2 * R2, k_here, REST, REST2)
    return q_1 + k_1 + OFFSET, q_2 + k_2 + OFFSET, q_3 + k_3 + OFFSET


@triton.jit
def sum_all_heads(
    x, here, heads, step, D: tl.constexpr, R2: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, REST2: tl.constexpr,
    INTERLEAVED: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Square sums over all heads of a token."""
    total = tl.zeros((BT,), tl.float32)
    head = heads * 0
    while head < heads:
        first, second = load_pairs(x + head * step, here, R2, HALF, INTERLEAVED)
        total += _square_sum(first, second, _load_rest(x + head * step + 2 * R2, here, REST, REST2))
        head += 1
    return total


@triton.jit
def one_head(
    x, out, here, rstd, w_1, w_2, w_3, cos_1, sin_1, cos_2, sin_2, eps, D: tl.constexpr, R2: tl.constexpr, HALF: tl.constexpr,
    REST: tl.constexpr, REST2: tl.constexpr, ROPE: tl.constexpr, INTERLEAVED: tl.constexpr, NORM: tl.constexpr, CAST_FIRST: tl.constexpr,
    IN_PLACE: tl.constexpr,
):  # fmt: skip
    """Forward of one head of a block of tokens; `rstd` is used by a full norm only. With ``IN_PLACE`` `out` is `x`."""
    dtype: tl.constexpr = x.dtype.element_ty
    y_1, y_2 = load_pairs(x, here, R2, HALF, INTERLEAVED)
    y_3 = _load_rest(x + 2 * R2, here, REST, REST2)
    if NORM == 3:
        y_1, y_2 = turn(y_1, y_2, cos_1, sin_1, cos_2, sin_2, ROPE)
    if NORM != 0:
        if NORM != 2:
            rstd = tl.rsqrt(_square_sum(y_1, y_2, y_3) / D + eps)
        y_1 = _rounded(y_1 * rstd[:, None], dtype, CAST_FIRST) * w_1
        y_2 = _rounded(y_2 * rstd[:, None], dtype, CAST_FIRST) * w_2
        y_3 = _rounded(y_3 * rstd[:, None], dtype, CAST_FIRST) * w_3
    if NORM != 3:
        y_1, y_2 = turn(y_1, y_2, cos_1, sin_1, cos_2, sin_2, ROPE)
    if IN_PLACE:  # where a tile is small, several threads load the same numbers
        tl.debug_barrier()
    store_pairs(out, here, y_1, y_2, R2, HALF, INTERLEAVED)
    _store_rest(out + 2 * R2, here, y_3, REST, REST2)


@triton.jit
def one_head_backward(
    y_1, y_2, y_3, g_1, g_2, g_3, dx, here, rstd, mean, w_1, w_2, w_3, cos_1, sin_1, cos_2, sin_2, eps, D: tl.constexpr, R2: tl.constexpr,
    HALF: tl.constexpr, REST: tl.constexpr, REST2: tl.constexpr, ROPE: tl.constexpr, INTERLEAVED: tl.constexpr, NORM: tl.constexpr,
    CAST_FIRST: tl.constexpr,
):  # fmt: skip
    """Backward of one head y of a block of tokens, with the gradient g of its result; both as `stored_head` returns them.

    `rstd` and `mean` are used by a full norm only, y by a norm. Returns what the weight's gradient sums up.
    """
    dtype: tl.constexpr = dx.dtype.element_ty
    g_1, g_2, g_3 = g_1.to(tl.float32), g_2.to(tl.float32), g_3.to(tl.float32)
    s_1, s_2, s_3 = g_1, g_2, g_3
    if NORM != 3:
        g_1, g_2 = turn_back(g_1, g_2, cos_1, sin_1, cos_2, sin_2, ROPE)
    if NORM != 0:
        y_1, y_2, y_3 = y_1.to(tl.float32), y_2.to(tl.float32), y_3.to(tl.float32)
        if NORM == 3:
            y_1, y_2 = turn(y_1, y_2, cos_1, sin_1, cos_2, sin_2, ROPE)
        if NORM != 2:
            rstd = tl.rsqrt(_square_sum(y_1, y_2, y_3) / D + eps)
        y_1, y_2, y_3 = y_1 * rstd[:, None], y_2 * rstd[:, None], y_3 * rstd[:, None]
        s_1 = g_1 * _rounded(y_1, dtype, CAST_FIRST)
        s_2 = g_2 * _rounded(y_2, dtype, CAST_FIRST)
        s_3 = g_3 * _rounded(y_3, dtype, CAST_FIRST)
        g_1, g_2, g_3 = g_1 * w_1, g_2 * w_2, g_3 * w_3
        if NORM != 2:
            mean = _dot(g_1, g_2, g_3, y_1, y_2, y_3) / D
        g_1 = (g_1 - y_1 * mean[:, None]) * rstd[:, None]
        g_2 = (g_2 - y_2 * mean[:, None]) * rstd[:, None]
        g_3 = (g_3 - y_3 * mean[:, None]) * rstd[:, None]
        if NORM == 3:
            g_1, g_2 = turn_back(g_1, g_2, cos_1, sin_1, cos_2, sin_2, ROPE)
    store_pairs(dx, here, g_1, g_2, R2, HALF, INTERLEAVED)
    _store_rest(dx + 2 * R2, here, g_3, REST, REST2)
    return s_1, s_2, s_3


@triton.jit
def dot_all_heads(
    x, dy, here, heads, step, dy_step, q_weight, k_weight, is_q, cos_1, sin_1, cos_2, sin_2, OFFSET: tl.constexpr, D: tl.constexpr,
    R2: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, REST2: tl.constexpr, ROPE: tl.constexpr, INTERLEAVED: tl.constexpr,
    BT: tl.constexpr,
):  # fmt: skip
    """The dot products of x and the gradient of the normalised value, over all heads of a token."""
    total = tl.zeros((BT,), tl.float32)
    head = heads * 0
    while head < heads:
        w_1, w_2, w_3 = load_weight(q_weight, k_weight, head * D, is_q, OFFSET, R2, HALF, REST, REST2, INTERLEAVED)
        g_1, g_2 = load_pairs(dy + head * dy_step, here, R2, HALF, INTERLEAVED)
        g_3 = _load_rest(dy + head * dy_step + 2 * R2, here, REST, REST2)
        g_1, g_2 = turn_back(g_1, g_2, cos_1, sin_1, cos_2, sin_2, ROPE)
        x_1, x_2 = load_pairs(x + head * step, here, R2, HALF, INTERLEAVED)
        x_3 = _load_rest(x + head * step + 2 * R2, here, REST, REST2)
        total += _dot(g_1 * w_1, g_2 * w_2, g_3 * w_3, x_1, x_2, x_3)
        head += 1
    return total


@triton.jit
def store_sums(
    at, s_1, s_2, s_3, R2: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, REST2: tl.constexpr, INTERLEAVED: tl.constexpr
):  # fmt: skip
    """One row of the partial gradients of a weight, `at` a pointer."""
    to = at + tl.zeros((1, 1), tl.int32)
    here = tl.full((1, 1), 1, tl.int1)
    store_pairs(to, here, tl.sum(s_1, 0)[None, :], tl.sum(s_2, 0)[None, :], R2, HALF, INTERLEAVED)
    _store_rest(to + 2 * R2, here, tl.sum(s_3, 0)[None, :], REST, REST2)


@triton.jit
def copy_heads(
    source, into, here, head_step, into_step, WIDTH: tl.constexpr, WIDTH2: tl.constexpr, BH: tl.constexpr
):  # fmt: skip
    column = tl.arange(0, WIDTH2)[None, :]
    mask = here & (column < WIDTH)
    for head in tl.static_range(BH):
        tl.store(into + head * into_step + column, tl.load(source + head * head_step + column, mask=mask, other=0.0), mask=mask)

"""The Triton side of `kernels.rope`. Importing this module needs Triton.

Names are explained in `rope_parts`. BT tokens and BH heads a program; a full norm has all heads in one.
"""

import triton
import triton.language as tl

from .rope_parts import (
    copy_heads,
    dot_all_heads,
    load_tables,
    load_weight,
    one_head,
    one_head_backward,
    store_sums,
    stored_head,
    sum_all_heads,
)


@triton.jit(do_not_specialize=["tokens", "sequence"])
def forward_kernel(
    joint, q_weight, k_weight, cos, sin, out, tokens, sequence, joint_row, cos_batch, cos_row, sin_batch, sin_row, eps, HQ: tl.constexpr,
    HK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, Q_STEP: tl.constexpr, R2: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    REST2: tl.constexpr, ROPE: tl.constexpr, INTERLEAVED: tl.constexpr, STEP: tl.constexpr, SECOND: tl.constexpr, NORM: tl.constexpr,
    OFFSET: tl.constexpr, CAST_FIRST: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    """With ``IN_PLACE`` `out` is not used: the heads are written over those of the projection."""
    group = tl.program_id(1)
    token = (tl.program_id(0) * BT + tl.arange(0, BT))[:, None]
    here = token < tokens
    row = token.to(tl.int64)
    cos_at, sin_at = (token // sequence) * cos_batch + (token % sequence) * cos_row, (token // sequence) * sin_batch + (token % sequence) * sin_row
    cos_1, sin_1, cos_2, sin_2 = load_tables(cos, sin, cos_at, sin_at, here, ROPE, R2, HALF, STEP, SECOND)
    if NORM == 2:
        is_q, first_head, heads = group == 0, group * 0, tl.where(group == 0, HQ, HK)
    else:
        is_q = group < HQ // BH
        first_head, heads = tl.where(is_q, group, group - HQ // BH) * BH, group * 0 + BH
    ALIGN: tl.constexpr = 8 if D % 8 == 0 else 1
    step = tl.multiple_of(tl.where(is_q, Q_STEP, D), ALIGN)
    column = tl.multiple_of(tl.where(is_q, 0, HQ * Q_STEP), ALIGN)
    begin = tl.multiple_of(tl.where(is_q, 0, tokens.to(tl.int64) * (HQ * D)), ALIGN)
    out_row = tl.multiple_of(tl.where(is_q, HQ * D, HK * D), ALIGN)
    x = joint + row * joint_row + column + first_head * step
    into, into_step = out + begin + row * out_row + first_head * D, D
    if IN_PLACE:
        into, into_step = x, step
    if NORM == 2:
        total = sum_all_heads(x, here, heads, step, D, R2, HALF, REST, REST2, INTERLEAVED, BT)
        rstd = tl.rsqrt(total / (heads * D) + eps)
        head = first_head
        while head < heads:
            w_1, w_2, w_3 = load_weight(q_weight, k_weight, head * D, is_q, OFFSET, R2, HALF, REST, REST2, INTERLEAVED)
            one_head(
                x + head * step, into + head * into_step, here, rstd, w_1, w_2, w_3, cos_1, sin_1, cos_2, sin_2, eps, D, R2, HALF, REST,
                REST2, ROPE, INTERLEAVED, NORM, CAST_FIRST, IN_PLACE,
            )  # fmt: skip
            head += 1
    else:
        rstd = tl.zeros((BT,), tl.float32)
        w_1, w_2, w_3 = 1.0, 1.0, 1.0
        if NORM != 0:
            w_1, w_2, w_3 = load_weight(q_weight, k_weight, 0, is_q, OFFSET, R2, HALF, REST, REST2, INTERLEAVED)
        for head in tl.static_range(BH):
            one_head(
                x + head * step, into + head * into_step, here, rstd, w_1, w_2, w_3, cos_1, sin_1, cos_2, sin_2, eps, D, R2, HALF, REST,
                REST2, ROPE, INTERLEAVED, NORM, CAST_FIRST, IN_PLACE,
            )  # fmt: skip


@triton.jit
def _backward_all_heads(
    x, dy, dx, sums, here, heads, step, dy_step, q_weight, k_weight, is_q, cos_1, sin_1, cos_2, sin_2, eps, D: tl.constexpr,
    R2: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, REST2: tl.constexpr, ROPE: tl.constexpr, INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr, OFFSET: tl.constexpr, CAST_FIRST: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """A full norm: all heads of a block of tokens, twice; `sums` points at this block's row of the partial gradient of the weight."""
    rstd = tl.rsqrt(sum_all_heads(x, here, heads, step, D, R2, HALF, REST, REST2, INTERLEAVED, BT) / (heads * D) + eps)
    dot = dot_all_heads(
        x, dy, here, heads, step, dy_step, q_weight, k_weight, is_q, cos_1, sin_1, cos_2, sin_2, OFFSET, D, R2, HALF, REST, REST2,
        ROPE, INTERLEAVED, BT,
    )  # fmt: skip
    mean = dot * rstd / (heads * D)
    head = heads * 0
    while head < heads:
        w_1, w_2, w_3 = load_weight(q_weight, k_weight, head * D, is_q, OFFSET, R2, HALF, REST, REST2, INTERLEAVED)
        y_1, y_2, y_3 = stored_head(x + head * step, here, R2, HALF, REST, REST2, INTERLEAVED)
        g_1, g_2, g_3 = stored_head(dy + head * dy_step, here, R2, HALF, REST, REST2, INTERLEAVED)
        s_1, s_2, s_3 = one_head_backward(
            y_1, y_2, y_3, g_1, g_2, g_3, dx + head * step, here, rstd, mean, w_1, w_2, w_3, cos_1, sin_1, cos_2, sin_2, eps,
            D, R2, HALF, REST, REST2, ROPE, INTERLEAVED, NORM, CAST_FIRST,
        )  # fmt: skip
        store_sums(sums + head * D, s_1, s_2, s_3, R2, HALF, REST, REST2, INTERLEAVED)
        head += 1


@triton.jit
def _backward_some_heads(
    x, dy, dx, sums, here, step, dy_step, q_weight, k_weight, is_q, cos_1, sin_1, cos_2, sin_2, eps, D: tl.constexpr,
    R2: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, REST2: tl.constexpr, ROPE: tl.constexpr, INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr, OFFSET: tl.constexpr, CAST_FIRST: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """BH heads of a block of tokens, each on its own; `sums` as above."""
    w_1, w_2, w_3 = 1.0, 1.0, 1.0
    if NORM != 0:
        w_1, w_2, w_3 = load_weight(q_weight, k_weight, 0, is_q, OFFSET, R2, HALF, REST, REST2, INTERLEAVED)
    unused = tl.zeros((BT,), tl.float32)
    sum_1, sum_2 = tl.zeros((BT, HALF), tl.float32), tl.zeros((BT, HALF), tl.float32)
    sum_3 = tl.zeros((BT, REST2 if REST > 0 else 1), tl.float32)
    for head in tl.static_range(BH):
        g_1, g_2, g_3 = stored_head(dy + head * dy_step, here, R2, HALF, REST, REST2, INTERLEAVED)
        y_1, y_2, y_3 = g_1, g_2, g_3
        if NORM != 0:
            y_1, y_2, y_3 = stored_head(x + head * step, here, R2, HALF, REST, REST2, INTERLEAVED)
        s_1, s_2, s_3 = one_head_backward(
            y_1, y_2, y_3, g_1, g_2, g_3, dx + head * step, here, unused, unused, w_1, w_2, w_3, cos_1, sin_1, cos_2, sin_2, eps,
            D, R2, HALF, REST, REST2, ROPE, INTERLEAVED, NORM, CAST_FIRST,
        )  # fmt: skip
        sum_1, sum_2, sum_3 = sum_1 + s_1, sum_2 + s_2, sum_3 + s_3
    if NORM != 0:
        store_sums(sums, sum_1, sum_2, sum_3, R2, HALF, REST, REST2, INTERLEAVED)


@triton.jit
def _backward_heads(
    joint, q_weight, k_weight, cos, sin, dx_row, partial, dq, dk, group, batch, position, here, row, joint_row, cos_batch, cos_row, sin_batch,
    sin_row, q_batch, q_head, q_row, k_batch, k_head, k_row, eps, HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, Q_STEP: tl.constexpr,
    R2: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, REST2: tl.constexpr, ROPE: tl.constexpr, INTERLEAVED: tl.constexpr,
    STEP: tl.constexpr, SECOND: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr, CAST_FIRST: tl.constexpr, BT: tl.constexpr,
    BH: tl.constexpr, Q_GROUPS: tl.constexpr,
):  # fmt: skip
    """The heads of queries or keys that belong to a group."""
    ALIGN: tl.constexpr = 8 if D % 8 == 0 else 1
    cos_at, sin_at = batch * cos_batch + position * cos_row, batch * sin_batch + position * sin_row
    cos_1, sin_1, cos_2, sin_2 = load_tables(cos, sin, cos_at, sin_at, here, ROPE, R2, HALF, STEP, SECOND)
    is_q = group < Q_GROUPS
    first = tl.where(is_q, group, group - Q_GROUPS) * (1 if NORM == 2 else BH)
    step = tl.multiple_of(tl.where(is_q, Q_STEP, D), ALIGN)
    column = tl.multiple_of(tl.where(is_q, 0, HQ * Q_STEP), ALIGN) + first * step
    dx = dx_row + column
    x = dx  # without a norm nothing reads it
    if NORM != 0:
        x = joint + row * joint_row + column
    if is_q:
        dy, dy_step = dq + batch * q_batch + position * q_row + first * q_head, q_head
    else:
        dy, dy_step = dk + batch * k_batch + position * k_row + first * k_head, k_head
    if NORM == 2:
        _backward_all_heads(
            x, dy, dx, partial + (tl.program_id(0) * (HQ + HK) + tl.where(is_q, 0, HQ)) * D, here, tl.where(is_q, HQ, HK), step, dy_step,
            q_weight, k_weight, is_q, cos_1, sin_1, cos_2, sin_2, eps, D, R2, HALF, REST, REST2, ROPE, INTERLEAVED, NORM, OFFSET, CAST_FIRST, BT,
        )  # fmt: skip
    else:
        _backward_some_heads(
            x, dy, dx, partial + (group * tl.num_programs(0) + tl.program_id(0)) * D, here, step, dy_step, q_weight, k_weight, is_q, cos_1, sin_1,
            cos_2, sin_2, eps, D, R2, HALF, REST, REST2, ROPE, INTERLEAVED, NORM, OFFSET, CAST_FIRST, BT, BH,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "sequence"])
def backward_kernel(
    joint, q_weight, k_weight, cos, sin, djoint, partial, dq, dk, dv, dgate, tokens, sequence, joint_row, cos_batch, cos_row, sin_batch,
    sin_row, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, g_batch, g_head, g_row, eps, DV2: tl.constexpr,
    D2: tl.constexpr, HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, Q_STEP: tl.constexpr, R2: tl.constexpr,
    HALF: tl.constexpr, REST: tl.constexpr, REST2: tl.constexpr, ROPE: tl.constexpr, INTERLEAVED: tl.constexpr, STEP: tl.constexpr,
    SECOND: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr, CAST_FIRST: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    token = (tl.program_id(0) * BT + tl.arange(0, BT))[:, None]
    here = token < tokens
    batch, position = (token // sequence).to(tl.int64), (token % sequence).to(tl.int64)
    row = token.to(tl.int64)
    dx_row = djoint + row * (HQ * Q_STEP + HK * (D + DV))
    Q_GROUPS: tl.constexpr = 1 if NORM == 2 else HQ // BH
    K_GROUPS: tl.constexpr = 1 if NORM == 2 else HK // BH
    V_GROUPS: tl.constexpr = HK // BH
    if group >= Q_GROUPS + K_GROUPS + V_GROUPS:
        if Q_STEP > D:
            first = (group - Q_GROUPS - K_GROUPS - V_GROUPS) * BH
            source = dgate + batch * g_batch + position * g_row + first * g_head
            copy_heads(source, dx_row + first * Q_STEP + D, here, g_head, Q_STEP, D, D2, BH)
    elif group >= Q_GROUPS + K_GROUPS:
        first = (group - Q_GROUPS - K_GROUPS) * BH
        source = dv + batch * v_batch + position * v_row + first * v_head
        copy_heads(source, dx_row + HQ * Q_STEP + HK * D + first * DV, here, v_head, DV, DV, DV2, BH)
    else:
        _backward_heads(
            joint, q_weight, k_weight, cos, sin, dx_row, partial, dq, dk, group, batch, position, here, row, joint_row, cos_batch, cos_row,
            sin_batch, sin_row, q_batch, q_head, q_row, k_batch, k_head, k_row, eps, HQ, HK, D, Q_STEP, R2, HALF, REST, REST2, ROPE,
            INTERLEAVED, STEP, SECOND, NORM, OFFSET, CAST_FIRST, BT, BH, Q_GROUPS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["stride", "q_rows", "k_rows", "k_at", "k_column", "q_width", "k_width"])
def reduce_kernel(
    partial, both, stride, q_rows, k_rows, k_at, k_column, q_width, k_width, COLUMNS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Adds up the rows of the partial gradients: queries' in programs (i, 0), keys' in (i, 1)."""
    is_q = tl.program_id(1) == 0
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    rows, width = tl.where(is_q, q_rows, k_rows), tl.where(is_q, q_width, k_width)
    source = partial + tl.where(is_q, 0, k_column + k_at * stride) + column
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    row = rows * 0
    while row < rows:
        at = row + tl.arange(0, ROWS)[:, None]
        total += tl.load(source + at * stride, mask=(at < rows) & (column < width), other=0.0)
        row += ROWS
    into = both + tl.where(is_q, 0, q_width) + column
    tl.store(into, tl.sum(total, 0)[None, :].to(both.dtype.element_ty), mask=column < width)

"""The backward pass of `kernels.rope` for the usual heads: a norm of each head, then all its dims rotated as two halves. Needs Triton.

A row is one head of one token. A program goes over tiles of ROWS rows of one kind (queries, keys or values), so that one weight serves them
all and its gradient is summed up in registers; the loads of the next tiles are under way meanwhile. All kinds run side by side: the host
gives each as many programs as its share of the bytes. SINGLE says that there is one sequence, LONG that offsets need 64 bits.
"""

import triton
import triton.language as tl

from .rope_parts import one_head_backward, stored_head, stored_tables


@triton.jit
def _places(step, tokens, sequence, SINGLE: tl.constexpr, LONG: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """Of the rows ``[ROWS, 1]`` of a tile: which there are, token, head, batch and position in the sequence."""
    row = (step * ROWS + tl.arange(0, ROWS))[:, None]
    token = row // HEADS
    batch = token * 0 if SINGLE else token // sequence
    INDEX: tl.constexpr = tl.int64 if LONG else tl.int32
    return token < tokens, token.to(INDEX), (row % HEADS).to(INDEX), batch.to(INDEX), (token - batch * sequence).to(INDEX)


@triton.jit
def _row_tables(
    cos, sin, step, tokens, sequence, cos_batch, cos_row, sin_batch, sin_row, SINGLE: tl.constexpr, LONG: tl.constexpr,
    HEADS: tl.constexpr, HALF: tl.constexpr, SECOND: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The tables of each row of a tile, in the dtype of memory."""
    here, token, head, batch, position = _places(step, tokens, sequence, SINGLE, LONG, HEADS, ROWS)
    cos_at, sin_at = batch * cos_batch + position * cos_row, batch * sin_batch + position * sin_row
    return stored_tables(cos, sin, cos_at, sin_at, here, True, HALF, HALF, 1, SECOND)


@triton.jit
def _treated_rows(
    x, dy, dx, weight, cos, sin, sums, program, programs, tokens, sequence, x_row, dx_row, dy_batch, dy_head, dy_row, cos_batch, cos_row,
    sin_batch, sin_row, eps, SINGLE: tl.constexpr, LONG: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, SECOND: tl.constexpr,
    OFFSET: tl.constexpr, CAST_FIRST: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Queries or keys; `x` and `dx` point at their first column, `sums` at this program's row of the weight's gradient."""
    HALF: tl.constexpr = D // 2
    column = tl.arange(0, HALF)[None, :]
    w_1, w_2 = tl.load(weight + column).to(tl.float32) + OFFSET, tl.load(weight + HALF + column).to(tl.float32) + OFFSET
    sum_1, sum_2 = tl.zeros((ROWS, HALF), tl.float32), tl.zeros((ROWS, HALF), tl.float32)
    unused = tl.zeros((ROWS,), tl.float32)
    cos_1, sin_1, cos_2, sin_2 = _row_tables(
        cos, sin, program, tokens, sequence, cos_batch, cos_row, sin_batch, sin_row, SINGLE, LONG, HEADS, HALF, SECOND, ROWS
    )
    for step in tl.range(program, tl.cdiv(tokens * HEADS, ROWS), programs, num_stages=STAGES):
        here, token, head, batch, position = _places(step, tokens, sequence, SINGLE, LONG, HEADS, ROWS)
        y_1, y_2, y_3 = stored_head(x + token * x_row + head * D, here, HALF, HALF, 0, 0, False)
        g_1, g_2, g_3 = stored_head(dy + batch * dy_batch + position * dy_row + head * dy_head, here, HALF, HALF, 0, 0, False)
        # A row's tables are as many bytes as its operands. Carried from step to step in registers they come through the L1 cache, which knows
        # them from the other heads of the token; what is loaded several steps ahead passes it by.
        next_cos_1, next_sin_1, next_cos_2, next_sin_2 = _row_tables(
            cos, sin, step + programs, tokens, sequence, cos_batch, cos_row, sin_batch, sin_row, SINGLE, LONG, HEADS, HALF, SECOND, ROWS
        )
        s_1, s_2, s_3 = one_head_backward(
            y_1, y_2, y_3, g_1, g_2, g_3, dx + token * dx_row + head * D, here, unused, unused, w_1, w_2, 1.0, cos_1.to(tl.float32),
            sin_1.to(tl.float32), cos_2.to(tl.float32), sin_2.to(tl.float32), eps, D, HALF, HALF, 0, 0, True, False, 1, CAST_FIRST,
        )  # fmt: skip
        sum_1, sum_2 = sum_1 + s_1, sum_2 + s_2
        cos_1, sin_1, cos_2, sin_2 = next_cos_1, next_sin_1, next_cos_2, next_sin_2
    tl.store(sums + column, tl.sum(sum_1, 0)[None, :])
    tl.store(sums + HALF + column, tl.sum(sum_2, 0)[None, :])


@triton.jit
def _copied_rows(
    dy, dx, program, programs, tokens, sequence, dx_row, dy_batch, dy_head, dy_row, SINGLE: tl.constexpr, LONG: tl.constexpr,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, WIDTH2: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Values; `dx` points at their first column."""
    column = tl.arange(0, WIDTH2)[None, :]
    for step in tl.range(program, tl.cdiv(tokens * HEADS, ROWS), programs, num_stages=STAGES):
        here, token, head, batch, position = _places(step, tokens, sequence, SINGLE, LONG, HEADS, ROWS)
        here = here & (column < WIDTH)
        g = tl.load(dy + batch * dy_batch + position * dy_row + head * dy_head + column, mask=here, other=0.0)
        tl.store(dx + token * dx_row + head * WIDTH + column, g, mask=here)


@triton.jit(do_not_specialize=["tokens", "sequence", "q_programs", "k_programs"])
def backward_rows_kernel(
    joint, q_weight, k_weight, cos, sin, djoint, partial, dq, dk, dv, tokens, sequence, q_programs, k_programs, joint_row, cos_batch,
    cos_row, sin_batch, sin_row, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, eps,
    SINGLE: tl.constexpr, LONG: tl.constexpr, HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DV2: tl.constexpr,
    SECOND: tl.constexpr, OFFSET: tl.constexpr, CAST_FIRST: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The first programs take queries, the next ones keys, the others values; `partial` has a row ``[D]`` for each of queries and keys."""
    program = tl.program_id(0)
    WIDTH: tl.constexpr = (HQ + HK) * D + HK * DV
    if program < q_programs:
        _treated_rows(
            joint, dq, djoint, q_weight, cos, sin, partial + program * D, program, q_programs, tokens, sequence, joint_row, WIDTH, q_batch,
            q_head, q_row, cos_batch, cos_row, sin_batch, sin_row, eps, SINGLE, LONG, HQ, D, SECOND, OFFSET, CAST_FIRST, ROWS, STAGES,
        )  # fmt: skip
    elif program < q_programs + k_programs:
        _treated_rows(
            joint + HQ * D, dk, djoint + HQ * D, k_weight, cos, sin, partial + program * D, program - q_programs, k_programs, tokens,
            sequence, joint_row, WIDTH, k_batch, k_head, k_row, cos_batch, cos_row, sin_batch, sin_row, eps, SINGLE, LONG, HK, D, SECOND,
            OFFSET, CAST_FIRST, ROWS, STAGES,
        )  # fmt: skip
    else:
        first = q_programs + k_programs
        _copied_rows(
            dv, djoint + (HQ + HK) * D, program - first, tl.num_programs(0) - first, tokens, sequence, WIDTH, v_batch, v_head, v_row, SINGLE,
            LONG, HK, DV, DV2, ROWS, STAGES,
        )  # fmt: skip

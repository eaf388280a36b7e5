"""The Triton code of `moepatch.kernels.ssd`, which says what the kernels compute and calls them.

Every kernel has the sizes of `moepatch.kernels.ssd.Shape` as constants, and blocks that cover an axis of a head's state (BN, BP).
"""

from __future__ import annotations

try:
    import triton.language as tl
except ImportError:
    tl = None

from .jit import jit


@jit()
def _steps(dt, bias, h, live, stride_t, Q: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Of the chunk at `dt` and head `h`: dt before softplus, after it, and clamped (0 past the end)."""
    raw = tl.load(dt + tl.arange(0, Q) * stride_t + h, mask=live, other=0).to(tl.float32) + tl.load(bias + h).to(tl.float32)
    e = tl.exp(tl.minimum(raw, 20.0))
    u = 1 + e
    # log(1 + e) to the last bit also where e is small: the rounding of 1 + e cancels out of the quotient.
    small = tl.where(u == 1, e, tl.log(u) * (e / tl.where(u == 1, 1.0, u - 1)))
    soft = tl.where(raw > 20, raw, small)
    return raw, soft, tl.where(live, tl.minimum(tl.maximum(soft, LOW), HIGH), 0.0)


@jit()
def _pairs(value, run, Q: tl.constexpr, EXACT: tl.constexpr):
    """The decay from token j to token i of a chunk, ``[i, j]``, 0 where j is later."""
    later = tl.arange(0, Q)[:, None] > tl.arange(0, Q)[None, :]
    diagonal = tl.arange(0, Q)[:, None] == tl.arange(0, Q)[None, :]
    if EXACT:
        # Differences of running sums lose bits that fp32 callers want: each pair is summed up by itself.
        pair = _dot((later | diagonal).to(tl.float32), tl.where(later, value[:, None], 0.0))
    else:
        pair = run[:, None] - run[None, :]
    return tl.exp(tl.where(later, pair, tl.where(diagonal, 0.0, -float("inf"))))


@jit()
def _grad_pairs(grad, Q: tl.constexpr, EXACT: tl.constexpr):
    """From the gradients of the exponents of `_pairs` those of the values: of k, the sum over all pairs j < k <= i."""
    later = tl.arange(0, Q)[:, None] > tl.arange(0, Q)[None, :]
    if EXACT:
        upper = tl.arange(0, Q)[:, None] <= tl.arange(0, Q)[None, :]
        return tl.sum(tl.where(later, _dot(upper.to(tl.float32), grad), 0.0), 1)
    # A token's decay to itself has no exponent: what would only cancel is left out.
    grad = tl.where(later, grad, 0.0)
    return tl.cumsum(tl.sum(grad, 1) - tl.sum(grad, 0), 0, reverse=True)


@jit()
def _tile(base, stride, rows, row_end, columns, column_end):
    """``[rows, columns]`` of a matrix whose columns are adjacent, 0 outside it. Offsets of 32 bits: `base` is near."""
    inside = (rows < row_end)[:, None] & (columns < column_end)[None, :]
    return tl.load(base + rows[:, None] * stride + columns[None, :], mask=inside, other=0)


@jit()
def _put(base, stride, rows, row_end, columns, column_end, value):
    """The opposite of `_tile`."""
    inside = (rows < row_end)[:, None] & (columns < column_end)[None, :]
    tl.store(base + rows[:, None] * stride + columns[None, :], value.to(base.dtype.element_ty), mask=inside)


@jit()
def _dot(a, b):
    """A product of matrices with fp32 sums; fp32 factors keep their precision."""
    return tl.dot(a, b, input_precision="ieee")


@jit(do_not_specialize=["tokens", "chunks"])
def states_kernel(
    u, dt, a_log, bias, states, last, tokens, chunks, stride_b, stride_t,
    H: tl.constexpr, P: tl.constexpr, G: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    BN: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    width: tl.constexpr = H * P + 2 * G * N
    blocks: tl.constexpr = (P + BP - 1) // BP
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    q = tl.arange(0, Q)
    n = (tl.program_id(0) // blocks) * BN + tl.arange(0, BN)
    p = (tl.program_id(0) % blocks) * BP + tl.arange(0, BP)
    u += b * tokens * width
    dt += b * stride_b
    states += (b * chunks * H + h) * N * P
    a = -tl.exp(tl.load(a_log + h).to(tl.float32))
    state = tl.zeros((BN, BP), tl.float32)
    for c in range(chunks):
        rest = tokens - c * Q
        _put(states, P, n, N, p, P, state)
        _, _, step = _steps(dt, bias, h, q < rest, stride_t, Q, LOW, HIGH)
        value = step * a
        left = tl.exp(tl.cumsum(value, 0, reverse=True) - value)
        x = _tile(u + h * P, width, q, rest, p, P)
        B = _tile(u + H * P + (h // (H // G)) * N, width, q, rest, n, N)
        scaled = (x.to(tl.float32) * (left * step)[:, None]).to(x.dtype)
        state = state * tl.exp(tl.sum(value, 0)) + _dot(tl.trans(B), scaled)
        u += Q * width
        dt += Q * stride_t
        states += H * N * P
    inside = (n < N)[:, None] & (p < P)[None, :]
    tl.store(last + (b * H + h) * P * N + p[None, :] * N + n[:, None], state, mask=inside)


@jit(do_not_specialize=["tokens", "chunks"])
def outputs_kernel(
    u, dt, a_log, bias, d, states, y, tokens, chunks, stride_b, stride_t,
    H: tl.constexpr, P: tl.constexpr, G: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    SPLITS: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    width: tl.constexpr = H * P + 2 * G * N
    EXACT: tl.constexpr = u.dtype.element_ty == tl.float32
    mine: tl.constexpr = H // G // SPLITS
    c = tl.program_id(0).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    g = tl.program_id(1) // SPLITS
    rest = tokens - tl.program_id(0) * Q
    q, n, p = tl.arange(0, Q), tl.arange(0, BN), tl.arange(0, BP)
    u += (b * tokens + c * Q) * width
    y += (b * tokens + c * Q) * H * P
    dt += b * stride_b + c * Q * stride_t
    B = _tile(u + H * P + g * N, width, q, rest, n, N)
    C = _tile(u + H * P + (G + g) * N, width, q, rest, n, N)
    scores = _dot(C, tl.trans(B))
    for k in range(mine):
        h = g * (H // G) + (tl.program_id(1) % SPLITS) * mine + k
        _, _, step = _steps(dt, bias, h, q < rest, stride_t, Q, LOW, HIGH)
        value = step * -tl.exp(tl.load(a_log + h).to(tl.float32))
        run = tl.cumsum(value, 0)
        state = _tile(states + ((b * chunks + c) * H + h) * N * P, P, n, N, p, P)
        out = _dot(C, state) * tl.exp(run)[:, None]
        x = _tile(u + h * P, width, q, rest, p, P)
        mixed = scores * _pairs(value, run, Q, EXACT) * step[None, :]
        out += _dot(mixed.to(x.dtype), x)
        out += x.to(tl.float32) * tl.load(d + h).to(tl.float32)
        _put(y + h * P, H * P, q, rest, p, P, out)


@jit(do_not_specialize=["tokens", "chunks"])
def grad_states_kernel(
    grad_y, grad_last, u, dt, a_log, bias, grad_states, tokens, chunks, stride_b, stride_t,
    H: tl.constexpr, P: tl.constexpr, G: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    LAST: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    width: tl.constexpr = H * P + 2 * G * N
    blocks: tl.constexpr = (P + BP - 1) // BP
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    q = tl.arange(0, Q)
    n = (tl.program_id(0) // blocks) * BN + tl.arange(0, BN)
    p = (tl.program_id(0) % blocks) * BP + tl.arange(0, BP)
    start = (chunks - 1).to(tl.int64)
    u += (b * tokens + start * Q) * width + H * P + (G + h // (H // G)) * N
    grad_y += (b * tokens + start * Q) * H * P + h * P
    dt += b * stride_b + start * Q * stride_t
    grad_states += ((b * chunks + start) * H + h) * N * P
    a = -tl.exp(tl.load(a_log + h).to(tl.float32))
    if LAST:
        inside = (n < N)[:, None] & (p < P)[None, :]
        grad = tl.load(grad_last + (b * H + h) * P * N + p[None, :] * N + n[:, None], mask=inside, other=0).to(tl.float32)
    else:
        grad = tl.zeros((BN, BP), tl.float32)
    for back in range(chunks):
        rest = tokens - (chunks - 1 - back) * Q
        _put(grad_states, P, n, N, p, P, grad)
        _, _, step = _steps(dt, bias, h, q < rest, stride_t, Q, LOW, HIGH)
        value = step * a
        up = _tile(grad_y, H * P, q, rest, p, P)
        C = _tile(u, width, q, rest, n, N)
        scaled = (up * tl.exp(tl.cumsum(value, 0))[:, None]).to(C.dtype)
        grad = grad * tl.exp(tl.sum(value, 0)) + _dot(tl.trans(C), scaled)
        u -= Q * width
        grad_y -= Q * H * P
        dt -= Q * stride_t
        grad_states -= H * N * P


@jit(do_not_specialize=["tokens", "chunks"])
def grads_kernel(
    grad_y, u, dt, a_log, bias, d, states, grad_states, grad_u, parts, grad_dt, sums, tokens, chunks,
    stride_b, stride_t, stride_grad_b, stride_grad_t,
    H: tl.constexpr, P: tl.constexpr, G: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    SPLITS: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    width: tl.constexpr = H * P + 2 * G * N
    EXACT: tl.constexpr = u.dtype.element_ty == tl.float32
    mine: tl.constexpr = H // G // SPLITS
    c = tl.program_id(0).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    g = tl.program_id(1) // SPLITS
    rest = tokens - tl.program_id(0) * Q
    q, n, p = tl.arange(0, Q), tl.arange(0, BN), tl.arange(0, BP)
    u += (b * tokens + c * Q) * width
    grad_u += (b * tokens + c * Q) * width
    grad_y += (b * tokens + c * Q) * H * P
    dt += b * stride_b + c * Q * stride_t
    grad_dt += b * stride_grad_b + c * Q * stride_grad_t
    sums += (b * chunks + c) * 3 * H
    B = _tile(u + H * P + g * N, width, q, rest, n, N)
    C = _tile(u + H * P + (G + g) * N, width, q, rest, n, N)
    scores = _dot(C, tl.trans(B))
    grad_scores = tl.zeros((Q, Q), tl.float32)
    grad_B = tl.zeros((Q, BN), tl.float32)
    grad_C = tl.zeros((Q, BN), tl.float32)
    for k in range(mine):
        h = g * (H // G) + (tl.program_id(1) % SPLITS) * mine + k
        raw, soft, step = _steps(dt, bias, h, q < rest, stride_t, Q, LOW, HIGH)
        a = -tl.exp(tl.load(a_log + h).to(tl.float32))
        value = step * a
        run = tl.cumsum(value, 0)
        left = tl.exp(tl.cumsum(value, 0, reverse=True) - value)
        at = ((b * chunks + c) * H + h) * N * P
        state = _tile(states + at, P, n, N, p, P)
        grad_state = _tile(grad_states + at, P, n, N, p, P)
        grad_total = tl.exp(tl.sum(value, 0)) * tl.sum(state.to(tl.float32) * grad_state.to(tl.float32))

        # Out of the state before the chunk: y += exp(a) C state.
        up = _tile(grad_y + h * P, H * P, q, rest, p, P)
        scaled = up * tl.exp(run)[:, None]
        grad_run = tl.sum(scaled * _dot(C, state), 1)
        grad_C += _dot(scaled.to(C.dtype), tl.trans(state))

        # Into the state after it: state += Σ exp(what is left) dt B xᵀ.
        x = _tile(u + h * P, width, q, rest, p, P)
        into_state = _dot(B, grad_state) * left[:, None]
        grad_B += _dot((x.to(tl.float32) * (left * step)[:, None]).to(x.dtype), tl.trans(grad_state))
        grad_step = tl.sum(into_state * x.to(tl.float32), 1)
        grad_left = grad_step * step
        grad_x = into_state * step[:, None] + up * tl.load(d + h).to(tl.float32)

        # Inside the chunk: y = (scores ∘ decay ∘ dt) x.
        decay = _pairs(value, run, Q, EXACT)
        rounded = up.to(x.dtype)
        grad_x += _dot(tl.trans((scores * decay * step[None, :]).to(x.dtype)), rounded)
        by_decay = _dot(rounded, tl.trans(x))
        if not EXACT:
            # What rounding took from `up`: the sums over tokens that follow are small, and would be off by it.
            by_decay += _dot((up - rounded.to(tl.float32)).to(x.dtype), tl.trans(x))
        by_decay *= decay
        grad_scores += by_decay * step[None, :]
        by_pair = by_decay * scores
        grad_step += tl.sum(by_pair, 0)
        _put(grad_u + h * P, width, q, rest, p, P, grad_x)

        # dt · A of a token is in a_i of all tokens from it on, in what is left after all before it, and in the pairs around it.
        grad_value = tl.cumsum(grad_run, 0, reverse=True) + (tl.cumsum(grad_left, 0) - grad_left) + grad_total
        grad_value += _grad_pairs(by_pair * step[None, :], Q, EXACT)
        grad_step += a * grad_value
        grad_raw = tl.where((soft >= LOW) & (soft <= HIGH) & (q < rest), grad_step / (1 + tl.exp(-raw)), 0.0)
        tl.store(grad_dt + q * stride_grad_t + h, grad_raw.to(grad_dt.dtype.element_ty), mask=q < rest)
        tl.store(sums + h, tl.sum(step * grad_value, 0) * a)
        tl.store(sums + H + h, tl.sum(grad_raw, 0))
        tl.store(sums + 2 * H + h, tl.sum(up * x.to(tl.float32)))

    grad_C += _dot(grad_scores.to(B.dtype), B)
    grad_B += _dot(tl.trans(grad_scores.to(C.dtype)), C)
    if SPLITS == 1:
        _put(grad_u + H * P + g * N, width, q, rest, n, N, grad_B)
        _put(grad_u + H * P + (G + g) * N, width, q, rest, n, N, grad_C)
    else:
        part = (tl.program_id(1) % SPLITS) * tl.num_programs(2) + b
        parts += (part * tokens + c * Q) * (2 * G * N)
        _put(parts + g * N, 2 * G * N, q, rest, n, N, grad_B)
        _put(parts + (G + g) * N, 2 * G * N, q, rest, n, N, grad_C)

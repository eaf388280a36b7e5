"""The Triton kernels of `kernels.router`: T tokens, E experts, K of them chosen for each token.

``SCORE`` is 0 for a softmax over all experts, 1 for a sigmoid, 2 for a softmax over the chosen ones. A program has the scores of ``ROWS``
tokens in registers, padded to ``BLOCK`` experts.
"""

from __future__ import annotations

from .jit import jit

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


@jit()
def _keys_of(scores, place, SHORT: tl.constexpr):
    """Integers that are in the order of the scores, the lower place first among equal ones; NaN is above all, as in torch.topk.

    An integer has the score's bits above and the place, counted from the end, below.
    """
    wide = scores.to(tl.float32)
    if SHORT:
        bits = scores.to(tl.int16, bitcast=True).to(tl.int32)
        bits = tl.where(wide == 0, 0, tl.where(wide != wide, 0x7FFF, bits))
        return (tl.where(bits < 0, bits ^ 0x7FFF, bits) << 16) | place
    else:  # Triton types what follows a return, too
        bits = wide.to(tl.int32, bitcast=True)
        bits = tl.where(wide == 0, 0, tl.where(wide != wide, 0x7FFFFFFF, bits))
        return (tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) << 32) | place


@jit()
def _without(keys, taken, SHORT: tl.constexpr):
    """The keys with some replaced by one below all others."""
    if SHORT:
        return tl.where(taken, -0x7FFFFFFF, keys)
    else:
        return tl.where(taken, -0x7FFFFFFFFFFFFFFF, keys)


@jit()
def _within_groups(
    scores, E: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, CHOSEN_GROUPS: tl.constexpr, GROUP_SCORE: tl.constexpr, ZEROED: tl.constexpr
):
    """The scores with those of groups that are not among the best put out of reach."""
    SIZE: tl.constexpr = E // GROUPS
    grouped = tl.reshape(scores, (ROWS, GROUPS, SIZE))
    keys = _keys_of(grouped, SIZE - 1 - tl.arange(0, SIZE)[None, None, :], False)
    best = tl.max(grouped, 2)
    if GROUP_SCORE == 0:
        first = tl.max(keys, 2)
        best += tl.max(tl.where(keys == first[:, :, None], float("-inf"), grouped), 2)
    keys = _keys_of(best, GROUPS - 1 - tl.arange(0, GROUPS)[None, :], False)
    outside = keys == keys
    for _ in tl.static_range(CHOSEN_GROUPS):
        taken = keys == tl.max(keys, 1)[:, None]
        outside = outside & ~taken
        keys = _without(keys, taken, False)
    reached = tl.where(outside[:, :, None], 0.0 if ZEROED else float("-inf"), grouped)
    return tl.reshape(reached, (ROWS, E))


@jit(do_not_specialize=["tokens"])
def choice_kernel(
    logits, correction, weights, ids, tokens,
    E: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr, SCORE: tl.constexpr, SOFTMAX: tl.constexpr,
    NORMED: tl.constexpr, EPS: tl.constexpr, SCALE: tl.constexpr, CORRECTED: tl.constexpr, PLAIN: tl.constexpr, SHORT: tl.constexpr,
    GROUPS: tl.constexpr, CHOSEN_GROUPS: tl.constexpr, GROUP_SCORE: tl.constexpr, ZEROED: tl.constexpr,
):  # fmt: skip
    """Weights and ids. Scores rise with the logits: where nothing is added to them, the logits are compared (``PLAIN``)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    loaded = tl.load(logits + row * E + col, mask=(row < tokens) & (col < E), other=0)
    wide = loaded.to(tl.float32)
    if SOFTMAX:
        top = tl.max(tl.where(col < E, wide, float("-inf")), 1)[:, None]
        if SCORE == 0 or not PLAIN:
            total = tl.sum(tl.where(col < E, tl.exp(wide - top), 0), 1)[:, None]
    if PLAIN:
        scores = loaded
    elif SOFTMAX:
        scores = tl.exp(wide - top) / total
    else:
        scores = tl.sigmoid(wide)
    if CORRECTED:
        scores += tl.load(correction + col, mask=col < E, other=0).to(tl.float32)
    if GROUPS:
        scores = _within_groups(scores, E, ROWS, GROUPS, CHOSEN_GROUPS, GROUP_SCORE, ZEROED)
    keys = _without(_keys_of(scores, BLOCK - 1 - col, SHORT), col >= E, SHORT)
    slot = tl.arange(0, SLOTS)[None, :]
    chosen = tl.zeros((ROWS, SLOTS), tl.int32)
    for k in tl.static_range(K):
        best = tl.max(keys, 1)[:, None]
        chosen = tl.where(slot == k, BLOCK - 1 - (best & 0xFFFF).to(tl.int32), chosen)
        keys = _without(keys, keys == best, SHORT)
    inside = (row < tokens) & (slot < K)
    tl.store(ids + row * K + slot, chosen.to(tl.int64), mask=inside)
    picked = tl.load(logits + row * E + chosen, mask=inside, other=0).to(tl.float32)
    out = tl.exp(picked - top) if SOFTMAX else tl.sigmoid(picked)
    if SCORE == 0:
        out = out / total
    if NORMED:
        out = out / (tl.sum(tl.where(slot < K, out, 0), 1)[:, None] + EPS)
    tl.store(weights + row * K + slot, (out * SCALE).to(weights.dtype.element_ty), mask=inside)


@jit(do_not_specialize=["tokens"])
def gradient_kernel(
    logits, ids, dweights, dlogits, total, tokens,
    E: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, SCORE: tl.constexpr, NORMED: tl.constexpr, EPS: tl.constexpr,
    SCALE: tl.constexpr, ADD: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The whole gradient of the logits: through the weights, and with ``ADD`` what a loss says about the logits themselves.

    With ``PARTS`` a row is so many times as wide: the gradients rounded, and what the rounding took away. With 2 in this order; with 4 what the
    second rounding took away comes first, then what the first did, then the rounded ones twice.
    """
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    row = token[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    inside = (row < tokens) & (col < E)
    wide = tl.load(logits + row * E + col, mask=inside, other=0).to(tl.float32)
    if ADD:
        other = tl.load(dlogits + row * E + col, mask=inside, other=0)
    grad = tl.zeros((ROWS, BLOCK), tl.float32)
    chosen = col < tl.zeros((ROWS, 1), tl.int32)
    for k in tl.static_range(K):
        hit = col == tl.load(ids + token * K + k, mask=token < tokens, other=0).to(tl.int32)[:, None]
        grad = tl.where(hit, tl.load(dweights + token * K + k, mask=token < tokens, other=0).to(tl.float32)[:, None], grad)
        chosen = chosen | hit
    if SCORE == 1:
        score = tl.sigmoid(wide)
    else:
        score = tl.where(col < E, tl.exp(wide - tl.max(tl.where(col < E, wide, float("-inf")), 1)[:, None]), 0)
    if SCORE == 0:
        score = score / tl.sum(score, 1)[:, None]
    part = tl.where(chosen, score, 0)
    if NORMED:
        summed = tl.sum(part, 1)[:, None] + EPS
        grad = tl.where(chosen, (grad - tl.sum(grad * part, 1)[:, None] / summed) / summed, 0)
    grad = grad * SCALE
    if SCORE == 0:
        out = score * (grad - tl.sum(grad * score, 1)[:, None])
    elif SCORE == 1:
        out = grad * score * tl.sigmoid(-wide)  # 1 - score, without what is lost where the score is next to 1
    else:
        out = grad * part
    if ADD:
        out += other.to(tl.float32)
    if PARTS:
        high = out.to(total.dtype.element_ty)
        rest = out - high.to(tl.float32)
        middle = rest.to(total.dtype.element_ty)
        place = total + row * (PARTS * E) + col
        if PARTS == 2:
            tl.store(place, high, mask=inside)
            tl.store(place + E, middle, mask=inside)
        else:
            tl.store(place, (rest - middle.to(tl.float32)).to(total.dtype.element_ty), mask=inside)
            tl.store(place + E, middle, mask=inside)
            tl.store(place + 2 * E, high, mask=inside)
            tl.store(place + 3 * E, high, mask=inside)
    else:
        tl.store(total + row * E + col, out.to(total.dtype.element_ty), mask=inside)


@jit()
def parts_kernel(wide, parts, n, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Numbers in fp32 as sums of bf16 numbers, ``COUNT`` times n of them: rounded, and what each rounding took away, rounded."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rest = tl.load(wide + at, mask=at < n, other=0)
    place = parts + at
    for _ in tl.static_range(COUNT):
        rounded = rest.to(parts.dtype.element_ty)
        tl.store(place, rounded, mask=at < n)
        rest -= rounded.to(tl.float32)
        place += n  # not at + part · n, which may not fit into 32 bits

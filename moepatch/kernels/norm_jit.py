"""The Triton kernels of `kernels.norm`: M rows, each of G groups of N numbers.

Constants say where a norm rounds (``CAST``: 0 before the weight, 1 after it, 2 already the scale) and what multiplies it.
"""

from __future__ import annotations

from .jit import jit

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


@jit()
def _gate_of(gate, GATE: tl.constexpr):
    """A gate's factor and its derivative."""
    s = tl.sigmoid(gate)
    if GATE == 1:
        return gate * s, s * (1 + gate * (1 - s))
    return s, s * (1 - s)


@jit()
def _weight_tile(weight, col, N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, OFFSET: tl.constexpr, CAST: tl.constexpr):
    """The factors of a tile, in fp32; what is rounded before the product adds the offset in the weight's dtype.

    Where several rows of a tile lie side by side in the program's threads, they are loaded for each: as one row they would be spread over the
    threads in another way, and Triton would compute what they meet in both ways.
    """
    HEIGHT: tl.constexpr = ROWS if BLOCK < 2048 else 1
    col += tl.zeros((HEIGHT, 1), tl.int32)
    w = tl.load(weight + col, mask=col < N, other=0)
    if OFFSET == 0:
        return w.to(tl.float32)
    if CAST == 1:
        return w.to(tl.float32) + OFFSET
    return (w.to(tl.float32) + OFFSET).to(w.dtype).to(tl.float32)


@jit(do_not_specialize=["rows"])
def forward_kernel(
    x, residual, weight, gate, y, total, rstd, rows, outer_stride, inner_stride, eps,
    N: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr, GROUPS: tl.constexpr, WEIGHT: tl.constexpr,
    OFFSET: tl.constexpr, CAST: tl.constexpr, GATE: tl.constexpr, GATE_FIRST: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    group = tl.program_id(1)
    col = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows)[:, None] & (col < N)
    from_ = ((row // INNER) * outer_stride + (row % INNER) * inner_stride + group * N)[:, None] + col
    to = ((row * GROUPS + group) * N)[:, None] + col
    loaded = tl.load(x + from_, mask=inside, other=0)
    if ADD:
        loaded = (loaded.to(tl.float32) + tl.load(residual + to, mask=inside, other=0).to(tl.float32)).to(loaded.dtype)
        tl.store(total + to, loaded, mask=inside)
    wide = loaded.to(tl.float32)
    if GATE:
        factor, _ = _gate_of(tl.load(gate + to, mask=inside, other=0).to(tl.float32), GATE)
        if GATE_FIRST:
            wide = wide * factor
    r = tl.rsqrt(tl.sum(wide * wide, 1) / N + eps)
    tl.store(rstd + row * GROUPS + group, r, mask=row < rows)
    if CAST == 2:
        r = r.to(loaded.dtype).to(tl.float32)
    out = wide * r[:, None]
    if CAST != 1:
        out = out.to(loaded.dtype).to(tl.float32)
    if WEIGHT:
        out = out * _weight_tile(weight + group * N, col, N, ROWS, BLOCK, OFFSET, CAST)
        if GATE and not GATE_FIRST and CAST != 1 and weight.dtype.element_ty != tl.float32:
            out = out.to(loaded.dtype).to(tl.float32)
    if GATE and not GATE_FIRST:
        out = out * factor
    tl.store(y + to, out.to(y.dtype.element_ty), mask=inside)


@jit(do_not_specialize=["rows"])
def backward_kernel(
    dy, dstream, x, weight, gate, rstd, dx, dgate, partial, rows, outer_stride, inner_stride,
    N: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr, GROUPS: tl.constexpr, WEIGHT: tl.constexpr,
    OFFSET: tl.constexpr, CAST: tl.constexpr, GATE: tl.constexpr, GATE_FIRST: tl.constexpr, STREAM: tl.constexpr,
    DWEIGHT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program, programs, group = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    col = tl.arange(0, BLOCK)[None, :]
    if WEIGHT:
        w = _weight_tile(weight + group * N, col, N, ROWS, BLOCK, OFFSET, CAST)
    if DWEIGHT:
        dw = tl.zeros((ROWS, BLOCK), tl.float32)
    # With several stages the loads of the next steps are under way while this one is computed. All loads come first: none waits for sums.
    for step in tl.range(program, tl.cdiv(rows, ROWS), programs, num_stages=STAGES):
        row = step * ROWS + tl.arange(0, ROWS).to(tl.int64)
        inside = (row < rows)[:, None] & (col < N)
        from_ = ((row // INNER) * outer_stride + (row % INNER) * inner_stride + group * N)[:, None] + col
        to = ((row * GROUPS + group) * N)[:, None] + col
        loaded = tl.load(x + from_, mask=inside, other=0)
        g = tl.load(dy + to, mask=inside, other=0).to(tl.float32)
        if STREAM:
            stream = tl.load(dstream + to, mask=inside, other=0)
        r = tl.load(rstd + row * GROUPS + group, mask=row < rows, other=0)[:, None]
        wide = loaded.to(tl.float32)
        if GATE:
            factor, slope = _gate_of(tl.load(gate + to, mask=inside, other=0).to(tl.float32), GATE)
            if GATE_FIRST:
                wide = wide * factor
        normed = wide * r
        rounded = normed if CAST == 1 else normed.to(loaded.dtype).to(tl.float32)
        if GATE and not GATE_FIRST:
            weighted = rounded * w if WEIGHT else rounded
            tl.store(dgate + to, (g * weighted * slope).to(dgate.dtype.element_ty), mask=inside)
            g = g * factor
        if DWEIGHT:
            dw += g * rounded
        if WEIGHT:
            g = g * w
        out = (g - normed * (tl.sum(g * normed, 1) / N)[:, None]) * r
        if GATE and GATE_FIRST:
            tl.store(dgate + to, (out * loaded.to(tl.float32) * slope).to(dgate.dtype.element_ty), mask=inside)
            out = out * factor
        if STREAM:
            out += stream.to(tl.float32)
        tl.store(dx + to, out.to(dx.dtype.element_ty), mask=inside)
    if DWEIGHT:
        tl.store(partial + (group * programs + program) * N + col, tl.sum(dw, 0)[None, :], mask=col < N)


@jit(do_not_specialize=["programs"])
def sum_kernel(partial, dweight, programs, N: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Sums what the programs of `backward_kernel` found, in an order that is always the same."""
    group = tl.program_id(1)
    col = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, programs, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        total += tl.load(partial + (group * programs + row) * N + col, mask=(row < programs) & (col < N), other=0)
    col = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    tl.store(dweight + group * N + col, tl.sum(total, 0).to(dweight.dtype.element_ty), mask=col < N)

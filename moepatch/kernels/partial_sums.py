"""Sums of what the programs of a launch leave, made by the launch itself, in an order that is always the same.

Each program of a kernel stores a row of partial sums and takes a ticket. The last few to come share the columns: they wait until all rows are
there and add them up. That spares a second launch: its place in the queue, and the host's time for it.

Of W that sum up at most W - 1 wait while another program is still to come, so a launch ends wherever W of its programs can run at one time:
the caller keeps W, of all groups together, well below what a device has room for. With W = 1 nothing ever waits, as in Triton's interpreter,
which runs one program after the other.
"""

from __future__ import annotations

from .jit import jit

try:
    import triton.language as tl
except ImportError:
    tl = None


@jit()
def add_rows(partial, total, block, programs, N: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Block `block` of COLUMNS columns of ``total [N]`` is the sum of the rows of ``partial [programs, N]``."""
    col = block * COLUMNS + tl.arange(0, COLUMNS)
    found = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, programs, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        # Other multiprocessors have just written them: from the L2 cache.
        found += tl.sum(tl.load(partial + row * N + col[None, :], mask=(row < programs) & (col < N)[None, :], other=0, cache_modifier=".cg"), 0)
    tl.store(total + col, found.to(total.dtype.element_ty), mask=col < N)


@jit()
def add_rows_last(partial, total, counter, programs, summing, N: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Called by each of `programs` programs after it stored its row: the last `summing` of them fill ``total [N]``.

    `counter` holds a multiple of `programs` before a launch, and again after it: 0 at first, and more when the same backward pass runs again.
    """
    tl.debug_barrier()  # The row is stored by all threads, the ticket taken by one.
    ticket = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    full = ticket - ticket % programs + programs
    rank = full - 1 - ticket
    if rank < summing:
        while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < full:
            pass
        for block in range(rank, (N + COLUMNS - 1) // COLUMNS, summing):
            add_rows(partial, total, block, programs, N, COLUMNS, ROWS)

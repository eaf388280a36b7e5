"""The activation between two projections, forward and backward: Triton kernels, beside their torch references.

R rows, I intermediate. A pre-activation ``[R, 2I]`` (``[R, I]`` without a gate) is read once each way. The backward kernel computes the
activation anew, since it is cheaper to compute than to keep, and writes it out on request: the gradient of the down projection needs it.

A *gate form* says how gate and up lie in a row: ``concatenated`` (halves), ``interleaved`` (alternating) or ``none`` (up alone). The gate
comes first, unless `up_first`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..experts.activation import Activation
from .gated_formulas import formula
from .launch import Prepared
from .jit import jit

try:  # The references and everything that only asks need no Triton.
    import triton.language as tl
except ImportError:
    tl = None

#: Rows and columns of a tile: with bf16 a thread of 4 warps moves two times 16 bytes of each operand.
_TILE = (16, 128)
#: The same for the backward pass, by whether gate and up alternate and whether there are weights.
_BACKWARD_TILES = {(False, False): _TILE, (False, True): (4, 256), (True, False): (4, 256), (True, True): (1, 512)}


def gated_forward(
    pre_R2I: Tensor,
    activation: Activation,
    gate_form: str,
    *,
    up_first: bool = False,
    weights_R: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """``h [R, I] = weight * act(gate, up)`` in one launch; arithmetic in fp32, rounded once.

    Args:
        pre_R2I: contiguous; its dtype is that of the result.
        activation: any but ``own``.
        gate_form, up_first: see the module.
        weights_R: fp32 number per row, multiplied into its result.
        rows: integer on the device, one element: rows from there on are neither read nor written.
    """
    count, width = _shape(pre_R2I, gate_form)
    h_RI = pre_R2I.new_empty(count, width)
    if count:
        high, columns, kernel = _prepared_forward(activation, gate_form, up_first, width)
        kernel((-(-count // high), columns), pre_R2I, weights_R, rows, h_RI, count)
    return h_RI


def gated_backward(
    pre_R2I: Tensor,
    grad_h_RI: Tensor,
    activation: Activation,
    gate_form: str,
    *,
    want_h: bool,
    up_first: bool = False,
    weights_R: Tensor | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What `gated_forward` calls for, in one launch.

    Args:
        grad_h_RI: ``dL/dh``, contiguous.
        want_h: whether to return the activation too.
        rest: as `gated_forward`.

    Returns:
        ``dL/dpre`` in the form of `pre_R2I`; ``h [R, I]`` as the forward pass computed it, weight included, or None; ``dL/dweight [R]`` in
        fp32 if there are weights (0 from row `rows` on), or None.
    """
    count, width = _shape(pre_R2I, gate_form)
    grad_pre_R2I = torch.empty_like(pre_R2I)
    h_RI = torch.empty_like(grad_h_RI) if want_h else None
    grad_weights_R = None if weights_R is None else torch.empty_like(weights_R)
    if count:
        high, columns, kernel = _prepared_backward(activation, gate_form, up_first, width, weights_R is not None)
        kernel((-(-count // high), columns), pre_R2I, grad_h_RI, weights_R, rows, grad_pre_R2I, h_RI, grad_weights_R, count)
    return grad_pre_R2I, h_RI, grad_weights_R


def _shape(pre_R2I: Tensor, gate_form: str) -> tuple[int, int]:
    count, columns = pre_R2I.shape
    return count, columns if gate_form == "none" else columns // 2


@functools.lru_cache(maxsize=1024)
def _prepared_forward(activation: Activation, gate_form: str, up_first: bool, width: int) -> tuple[int, int, Prepared]:
    """Rows of a program, programs along a row, and the kernel."""
    high, wide = _TILE
    return high, -(-width // wide), Prepared(_forward_kernel, HIGH=high, WIDE=wide, **_constants(activation, gate_form, up_first, width))


@functools.lru_cache(maxsize=1024)
def _prepared_backward(activation: Activation, gate_form: str, up_first: bool, width: int, weighted: bool) -> tuple[int, int, Prepared]:
    """The same; with weights a program walks along whole rows. A tile is no wider than a row."""
    high, wide = _BACKWARD_TILES[gate_form == "interleaved", weighted]
    if width < wide:
        size, wide = high * wide, max(16, 1 << (width - 1).bit_length())
        high = size // wide
    tiles = -(-width // wide)
    columns, steps = (1, tiles) if weighted else (tiles, 1)
    kernel = Prepared(_backward_kernel, HIGH=high, WIDE=wide, STEPS=steps, **_constants(activation, gate_form, up_first, width))
    return high, columns, kernel


def _constants(activation: Activation, gate_form: str, up_first: bool, width: int) -> dict:
    """What both kernels are compiled for; a number that the formula does not take is 0."""
    p, q = (*activation.numbers, 0.0, 0.0)[:2]
    return {"WIDTH": width, "NAME": activation.name, "P": p, "Q": q, "FORM": gate_form, "UP_FIRST": up_first, "num_warps": 4}


# --- references ----------------------------------------------------------------------------------------------------------------------


def gated_forward_reference(
    pre_R2I: Tensor,
    activation: Activation,
    gate_form: str,
    *,
    up_first: bool = False,
    weights_R: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """See `gated_forward`. Computes in fp64 where the tensors are, and every row."""
    gate, up = _parts(pre_R2I, gate_form, up_first)
    h_RI = activation.forward(_wide(gate), None if up is None else _wide(up))
    return (h_RI if weights_R is None else h_RI * weights_R.unsqueeze(-1)).to(pre_R2I.dtype)


def gated_backward_reference(
    pre_R2I: Tensor,
    grad_h_RI: Tensor,
    activation: Activation,
    gate_form: str,
    *,
    want_h: bool,
    up_first: bool = False,
    weights_R: Tensor | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See `gated_backward`. Computes in fp64 where the tensors are, and every row."""
    gate, up = _parts(pre_R2I, gate_form, up_first)
    gate, up, grad_RI = _wide(gate), None if up is None else _wide(up), _wide(grad_h_RI)
    h_RI = activation.forward(gate, up) if want_h or weights_R is not None else None
    grad_weights_R = None
    if weights_R is not None:
        grad_weights_R = (grad_RI * h_RI).sum(-1)
        grad_RI, h_RI = grad_RI * weights_R.unsqueeze(-1), h_RI * weights_R.unsqueeze(-1)
    grad_pre_R2I = torch.empty_like(pre_R2I)
    for into, value in zip(_parts(grad_pre_R2I, gate_form, up_first), activation.backward(grad_RI, gate, up), strict=True):
        if into is not None:
            into.copy_(value)
    return grad_pre_R2I, h_RI.to(pre_R2I.dtype) if want_h else None, grad_weights_R


def _parts(pre_R2I: Tensor, gate_form: str, up_first: bool) -> tuple[Tensor, Tensor | None]:
    """Views of gate and up ``[R, I]``."""
    if gate_form == "none":
        return pre_R2I, None
    first, second = (pre_R2I[:, ::2], pre_R2I[:, 1::2]) if gate_form == "interleaved" else pre_R2I.chunk(2, -1)
    return (second, first) if up_first else (first, second)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


# --- kernels -------------------------------------------------------------------------------------------------------------------------


@jit()
def _load(pre, row, start, here, WIDTH: tl.constexpr, FORM: tl.constexpr, UP_FIRST: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr):
    """A tile of gate and one of up in fp32; without a gate twice the same."""
    if FORM == "interleaved":
        column = 2 * start + tl.arange(0, 2 * WIDE)
        both = tl.load(pre + row[:, None] * (2 * WIDTH) + column[None, :], mask=here[:, None] & (column < 2 * WIDTH)[None, :], other=0)
        first, second = tl.split(tl.reshape(both, [HIGH, WIDE, 2]))
    else:
        column = start + tl.arange(0, WIDE)
        mask = here[:, None] & (column < WIDTH)[None, :]
        at = pre + row[:, None] * (WIDTH if FORM == "none" else 2 * WIDTH) + column[None, :]
        first = tl.load(at, mask=mask, other=0)
        second = first
        if FORM == "concatenated":
            second = tl.load(at + WIDTH, mask=mask, other=0)
    if UP_FIRST:
        return second.to(tl.float32), first.to(tl.float32)
    return first.to(tl.float32), second.to(tl.float32)


@jit()
def _store(
    pre, row, start, here, gate, up, WIDTH: tl.constexpr, FORM: tl.constexpr, UP_FIRST: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """The way back of `_load`."""
    first, second = gate, up
    if UP_FIRST:
        first, second = up, gate
    first, second = first.to(pre.dtype.element_ty), second.to(pre.dtype.element_ty)
    if FORM == "interleaved":
        column = 2 * start + tl.arange(0, 2 * WIDE)
        both = tl.reshape(tl.join(first, second), [HIGH, 2 * WIDE])
        tl.store(pre + row[:, None] * (2 * WIDTH) + column[None, :], both, mask=here[:, None] & (column < 2 * WIDTH)[None, :])
    else:
        column = start + tl.arange(0, WIDE)
        mask = here[:, None] & (column < WIDTH)[None, :]
        at = pre + row[:, None] * (WIDTH if FORM == "none" else 2 * WIDTH) + column[None, :]
        tl.store(at, first, mask=mask)
        if FORM == "concatenated":
            tl.store(at + WIDTH, second, mask=mask)


@jit(do_not_specialize=["count"])
def _forward_kernel(
    pre, weights, rows, h, count,
    WIDTH: tl.constexpr, NAME: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, FORM: tl.constexpr, UP_FIRST: tl.constexpr,
    HIGH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * HIGH + tl.arange(0, HIGH)
    if rows is not None:
        count = tl.minimum(count, tl.load(rows).to(tl.int32))
        if tl.program_id(0) * HIGH >= count:
            return
    here, start, row_64 = row < count, tl.program_id(1) * WIDE, row.to(tl.int64)
    gate, up = _load(pre, row_64, start, here, WIDTH, FORM, UP_FIRST, HIGH, WIDE)
    value, _, _ = formula(gate, gate, up, P, Q, NAME)
    if weights is not None:
        value *= tl.load(weights + row, mask=here, other=0)[:, None]
    column = start + tl.arange(0, WIDE)
    tl.store(h + row_64[:, None] * WIDTH + column[None, :], value.to(h.dtype.element_ty), mask=here[:, None] & (column < WIDTH)[None, :])


@jit(do_not_specialize=["count"])
def _backward_kernel(
    pre, grad_h, weights, rows, grad_pre, h, grad_weights, count,
    WIDTH: tl.constexpr, NAME: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, FORM: tl.constexpr, UP_FIRST: tl.constexpr,
    HIGH: tl.constexpr, WIDE: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * HIGH + tl.arange(0, HIGH)
    allocated = row < count
    if rows is not None:
        count = tl.minimum(count, tl.load(rows).to(tl.int32))
        if tl.program_id(0) * HIGH >= count:
            if weights is not None:
                tl.store(grad_weights + row, tl.zeros([HIGH], tl.float32), mask=allocated)
            return
    here, row_64 = row < count, row.to(tl.int64)
    if weights is not None:
        weight = tl.load(weights + row, mask=here, other=0)[:, None]
        total = tl.zeros([HIGH, WIDE], tl.float32)
    for step in range(STEPS):
        start = (tl.program_id(1) * STEPS + step) * WIDE
        column = start + tl.arange(0, WIDE)
        if FORM == "interleaved":
            # A thread that loads 16 bytes of pairs has half as many columns. Claiming no more for the other operands keeps a column in one thread.
            column = tl.max_contiguous(column, 64 // pre.dtype.element_ty.primitive_bitwidth)
        at, mask = row_64[:, None] * WIDTH + column[None, :], here[:, None] & (column < WIDTH)[None, :]
        grad = tl.load(grad_h + at, mask=mask, other=0).to(tl.float32)
        gate, up = _load(pre, row_64, start, here, WIDTH, FORM, UP_FIRST, HIGH, WIDE)
        if weights is not None:
            value, grad_gate, grad_up = formula(grad * weight, gate, up, P, Q, NAME)
            total += value * grad
            value *= weight
        else:
            value, grad_gate, grad_up = formula(grad, gate, up, P, Q, NAME)
        _store(grad_pre, row_64, start, here, grad_gate, grad_up, WIDTH, FORM, UP_FIRST, HIGH, WIDE)
        if h is not None:
            tl.store(h + at, value.to(h.dtype.element_ty), mask=mask)
    if weights is not None:
        tl.store(grad_weights + row, tl.sum(total, 1), mask=allocated)

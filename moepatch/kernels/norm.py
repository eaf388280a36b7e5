"""RMS norms in Triton: one pass forward, one pass backward, also fused with a residual stream.

M rows, each of G groups of N numbers (G = 1 unless the norm is grouped). Each launch says with constants where the norm rounds, so every
family's forward is computed with the family's own rounding. Sums are in fp32. The truth is `moepatch.layers.norm.reference_norm`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..gpus import shared_memory
from ..layers.norm import CASTS, GATES, NormSpec, reference_norm
from ..once import once_differentiable
from .launch import Prepared
from .norm_jit import backward_kernel, forward_kernel, sum_kernel

try:
    import triton
except ImportError:
    triton = None

#: The widest row, or group, that a program holds in registers.
WIDEST = 16384
#: Bytes of a multiprocessor's shared memory that loads ahead must leave: an H200 has 200 KiB for them then.
_LEFT = 27 * 1024
#: Columns of weight gradients that one program adds up.
_SUMMED = 8
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_GATE_CODES = {None: 0, **{name: code for code, name in enumerate(GATES, 1)}}


def norm(x: Tensor, weight: Tensor | None, spec: NormSpec, gate: Tensor | None = None) -> Tensor:
    """The norm of `x`; arguments and result as for `reference_norm`, which takes what the kernels do not."""
    if not _serves(x, weight, spec):
        return reference_norm(x, weight, spec, gate)
    return _Norm.apply(x, None, weight, gate, spec, False)


def add_norm(x: Tensor, residual: Tensor, weight: Tensor | None, spec: NormSpec) -> tuple[Tensor, Tensor]:
    """``total = residual + x`` and the norm of it, in one pass; backward adds the gradient of the total inside the norm's.

    Args:
        x: what a branch returned, ``[..., N]``.
        residual: of the same shape.
        weight, spec: of the norm; it must not be gated.

    Returns:
        The total, rounded as torch rounds the sum, and its norm.
    """
    if x.dtype != residual.dtype or x.shape != residual.shape or not _serves(x, weight, spec):
        total = residual + x
        return total, norm(total, weight, spec)
    return _Norm.apply(x, residual, weight, None, spec, False)


def fork_norm(x: Tensor, weight: Tensor | None, spec: NormSpec) -> tuple[Tensor, Tensor]:
    """`x` and its norm; both gradients come together inside the norm's backward pass, which autograd would add in one of its own."""
    if not _serves(x, weight, spec):
        return x, reference_norm(x, weight, spec)
    return _Norm.apply(x, None, weight, None, spec, True)


def _serves(x: Tensor, weight: Tensor | None, spec: NormSpec) -> bool:
    """Whether the kernels can take this input; the device may have changed since the patch."""
    width = x.shape[-1]
    return (
        (x.is_cuda or _interpreted())
        and x.dtype in _DTYPES
        and (spec.group or width) <= WIDEST
        and (weight is None or weight.shape[0] == width and weight.dtype in (x.dtype, torch.float32))
        and x.numel() > 0
    )


@functools.cache
def _interpreted() -> bool:
    return triton is not None and triton.knobs.runtime.interpret


class _Norm(torch.autograd.Function):
    """All forms: with a residual or `fork` it returns ``(stream, normed)``, else the norm alone."""

    @staticmethod
    def forward(ctx, x, residual, weight, gate, spec, fork):
        rows = _Rows(x, spec, flat=gate is not None or residual is not None)
        x = rows.tensor
        y = torch.empty(x.shape, dtype=_result_dtype(x, weight, spec), device=x.device)
        total = None
        if residual is not None:
            residual = residual.contiguous()
            total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if gate is not None:
            gate = gate.contiguous()
        rstd = torch.empty(rows.count * rows.groups, dtype=torch.float32, device=x.device)
        _forward(rows, residual, weight, gate, y, total, rstd, spec)
        ctx.spec, ctx.form = spec, (residual is not None, fork)
        ctx.save_for_backward(x if total is None else total, weight, gate, rstd)
        if total is not None:
            return total, y
        return (x.view_as(x), y) if fork else y

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        x, weight, gate, rstd = ctx.saved_tensors
        added, fork = ctx.form
        dy = grads[-1].contiguous()
        dstream = grads[0].contiguous() if added or fork else None
        rows = _Rows(x, ctx.spec, flat=gate is not None)
        dx, dweight, dgate = _backward(rows, dy, dstream, weight, gate, rstd, ctx.spec, weight is not None and ctx.needs_input_grad[2])
        return dx, dx if added else None, dweight, dgate, None, None


def _result_dtype(x: Tensor, weight: Tensor | None, spec: NormSpec) -> torch.dtype:
    plain = weight is None or spec.cast == "after" or spec.gate is not None and not spec.gate_first
    return x.dtype if plain else torch.promote_types(x.dtype, weight.dtype)


class _Rows:
    """Where the rows of a tensor ``[..., G*N]`` are in memory: row r at ``r // inner * outer_stride + r % inner * inner_stride``.

    Two strides are enough for the heads of a fused projection's result; anything else, and everything where `flat` asks for one stride
    that a second tensor shares, is copied.

    Attributes:
        tensor: the tensor or its copy.
        count, groups, width: M, G and N.
    """

    def __init__(self, x: Tensor, spec: NormSpec, flat: bool = False):
        size = x.shape[-1]
        self.groups, self.width = (size // spec.group, spec.group) if spec.group else (1, size)
        self.count = x.numel() // size
        self.tensor, self.inner, self.outer_stride, self.inner_stride = x, 1, size, 0
        if x.is_contiguous():
            return
        levels = _levels(x)
        if levels is None or len(levels) > (1 if flat else 2):
            self.tensor = x.contiguous()
        elif len(levels) == 2:
            (self.inner, self.inner_stride), (_, self.outer_stride) = levels
        elif levels:
            self.outer_stride = levels[0][1]


def _levels(x: Tensor) -> list[tuple[int, int]] | None:
    """``(size, stride)`` of the leading axes, the innermost first, after merging what lies behind one another; None if rows are not dense."""
    if x.stride(-1) != 1:
        return None
    levels: list[tuple[int, int]] = []
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if levels and stride == levels[-1][0] * levels[-1][1]:
            levels[-1] = (levels[-1][0] * size, levels[-1][1])
        elif size > 1:
            levels.append((size, stride))
    return levels


# --- launches ------------------------------------------------------------------------------------------------------------------------


@functools.cache
def _tile(width: int) -> tuple[int, int, int]:
    """Columns and rows of a program's tile, and its warps: 16 bytes a thread and load, 16 numbers a thread where the row allows it."""
    block = triton.next_power_of_2(width)
    rows = max(1, 2048 // block)
    return block, rows, min(16, max(4, block * rows // 512))


@functools.cache
def _backward_tile(width: int, gated: bool) -> tuple[int, int, int, int, int]:
    """Columns, rows and warps of the backward pass, programs per multiprocessor, and steps whose loads are under way at a time.

    Few programs, which load ahead: each leaves a whole row of weight gradients to be summed. A gate's numbers take registers, so that a
    thread has half as many of each, and more steps are under way for it.
    """
    block = triton.next_power_of_2(width)
    numbers = 2048 if gated else 4096
    rows = max(1, numbers // block)
    warps = min(16, max(8, block * rows * 8 // numbers))
    return block, rows, warps, 16 // warps, 4 if gated else 3


@functools.cache
def multiprocessors(index: int | None) -> int:
    """How many a device has; two where there is none, so that the interpreter runs several programs."""
    return 2 if index is None else torch.cuda.get_device_properties(index).multi_processor_count


def _constants(spec: NormSpec, width: int, groups: int, inner: int, weighted: bool) -> dict:
    return {
        "N": width,
        "INNER": inner,
        "GROUPS": groups,
        "WEIGHT": weighted,
        "OFFSET": spec.offset,
        "CAST": CASTS.index(spec.cast),
        "GATE": _GATE_CODES[spec.gate],
        "GATE_FIRST": spec.gate_first,
    }


@functools.lru_cache(maxsize=1024)
def _prepared_forward(spec: NormSpec, width: int, groups: int, inner: int, weighted: bool, added: bool) -> tuple[int, Prepared]:
    """Rows of a program, and the kernel."""
    block, tile, warps = _tile(width)
    return tile, Prepared(forward_kernel, BLOCK=block, ROWS=tile, ADD=added, **_constants(spec, width, groups, inner, weighted), num_warps=warps)


def _forward(rows: _Rows, residual, weight, gate, y, total, rstd, spec: NormSpec) -> None:
    tile, kernel = _prepared_forward(spec, rows.width, rows.groups, rows.inner, weight is not None, residual is not None)
    grid = -(-rows.count // tile), rows.groups
    kernel(grid, rows.tensor, residual, weight, gate, y, total, rstd, rows.count, rows.outer_stride, rows.inner_stride, spec.eps)


@functools.lru_cache(maxsize=1024)
def _prepared_backward(
    spec: NormSpec, width: int, groups: int, inner: int, weighted: bool, streamed: bool, wants_weight: bool, read: tuple, tile: tuple, shared: int
) -> Prepared:
    """The kernel for a tile of `_backward_tile`; `read` are the dtypes of what it reads of each row, `shared` bytes of shared memory are there."""
    block, high, warps, crowd, stages = tile
    ahead = block * high * sum(dtype.itemsize for dtype in read)
    return Prepared(
        backward_kernel, BLOCK=block, ROWS=high, STREAM=streamed, DWEIGHT=wants_weight, STAGES=max(1, min(stages, (shared - _LEFT) // crowd // ahead)),
        **_constants(spec, width, groups, inner, weighted), num_warps=warps,
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _prepared_sum(width: int, programs: int) -> Prepared:
    """For a narrow row there are few programs, so each loads more at once."""
    rows, warps = (256, 4) if width > 512 else (1024, 8)
    return Prepared(sum_kernel, N=width, COLUMNS=_SUMMED, ROWS=min(rows, triton.next_power_of_2(programs)), num_warps=warps)


def _programs(rows: int, high: int, most: int) -> int:
    """As few programs as take no longer than `most` of them: all have the same number of steps, but for the last."""
    steps = -(-rows // high)
    return -(-steps // -(-steps // most))


def _backward(rows: _Rows, dy, dstream, weight, gate, rstd, spec: NormSpec, wants_weight: bool):
    """Gradients of input, weight and gate; None for what there is not."""
    x, width, groups = rows.tensor, rows.width, rows.groups
    tile = _backward_tile(width, gate is not None)
    read = (x.dtype, dy.dtype, *(t.dtype for t in (dstream, gate) if t is not None))
    shared = shared_memory(x.device.index)
    kernel = _prepared_backward(spec, width, groups, rows.inner, weight is not None, dstream is not None, wants_weight, read, tile, shared)
    programs = _programs(rows.count, tile[1], max(1, tile[3] * multiprocessors(x.device.index) // groups))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dgate = torch.empty(x.shape, dtype=gate.dtype, device=x.device) if gate is not None else None
    partial = torch.empty(groups * programs * width, dtype=torch.float32, device=x.device) if wants_weight else None
    kernel((programs, groups), dy, dstream, x, weight, gate, rstd, dx, dgate, partial, rows.count, rows.outer_stride, rows.inner_stride)
    if not wants_weight:
        return dx, None, dgate
    dweight = torch.empty_like(weight)
    _prepared_sum(width, programs)((-(-width // _SUMMED), groups), partial, dweight, programs)
    return dx, dweight, dgate

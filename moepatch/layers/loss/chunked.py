"""Cross-entropy of a linear layer's output without ever having the output: chunks of tokens, gradients in the forward pass.

A chunk's logits live in one buffer that all chunks share. One kernel replaces them by their gradient, two GEMMs turn that into the
gradients of the hidden states and of the weight, and the next chunk overwrites it. The backward pass multiplies by the gradient of the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...kernels.cross_entropy import ALIGNMENT, cross_entropy_rows, scale_in_place

#: Bytes of the buffer for a chunk's logits. With what a call needs besides, it stays below 1 GiB.
WORKSPACE = 976 * 2**20
#: So many chunks may add up the weight's gradient in a low precision. Each addition rounds: against an error of 1 that bf16 logits cause anyway,
#: 2 chunks make 1.1, 5 make 1.4, 8 make 1.7.
ROUNDED_CHUNKS = 5
#: Rows of a chunk are a multiple of it, as tiles of GEMMs are.
_TILE = 128


@dataclass(frozen=True)
class Formula:
    """From the output z of a head to a loss: ``y = scale·z``, or ``y = softcap·tanh(scale·z / softcap)``, then cross-entropy.

    Attributes:
        ignore_index: rows with this label do not count.
        scale, softcap: see above; None means no cap.
        mean: divide by the number of labels that count, else sum.
        items: of a sum, what the caller is likely to divide it by: gradients are prepared for that, so that the backward pass has nothing
            left to do. Whatever the caller does, the gradients are right.
    """

    ignore_index: int = -100
    scale: float = 1.0
    softcap: float | None = None
    mean: bool = True
    items: Tensor | None = field(default=None, compare=False)


def linear_cross_entropy(
    hidden_TH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, labels_T: Tensor, formula: Formula, *, workspace: int = WORKSPACE
) -> Tensor:
    """The loss, differentiable in `hidden_TH`, `weight_VH` and `bias_V`, which have one dtype. See `reference.linear_cross_entropy`.

    Args:
        workspace: bytes of the buffer of logits.

    Returns:
        A scalar in fp32, or in fp64 if the inputs are.
    """
    tensors = (hidden_TH, weight_VH, bias_V)
    wanted = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors)
    if any(wanted):
        return _Chunked.apply(*tensors, labels_T, formula, wanted, workspace)
    with torch.autocast(hidden_TH.device.type, enabled=False):
        return _in_chunks(*tensors, labels_T, formula, wanted, workspace)[0]


def with_gradients(
    hidden_TH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, labels_T: Tensor, formula: Formula, wanted: tuple[bool, ...], workspace: int = WORKSPACE
) -> tuple[Tensor, Callable[[Tensor], list[Tensor | None]]]:
    """The loss without a graph, and what makes the gradients of hidden states, weight and bias (None where not wanted) out of the loss's gradient.

    That may be called once: it writes into what the forward pass has made.
    """
    dtypes = [None if t is None else t.dtype for t in (hidden_TH, weight_VH, bias_V)]
    with torch.no_grad(), torch.autocast(hidden_TH.device.type, enabled=False):
        loss, divisor, *grads = _in_chunks(hidden_TH, weight_VH, bias_V, labels_T, formula, wanted, workspace)

    def finish(grad: Tensor) -> list[Tensor | None]:
        factor = grad
        if formula.mean and divisor is None:
            factor = grad / count_labels(labels_T, formula)
        elif not formula.mean and divisor is not None:
            factor = grad * divisor
        found = []
        for t, dtype in zip(grads, dtypes, strict=True):
            if t is not None:
                scale_in_place(t, factor)
                t = t.to(dtype)  # sums over tokens may only now fit into fp16
            found.append(t)
        grads.clear()
        return found

    return loss, finish


linear_cross_entropy.with_gradients = with_gradients


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TH, weight_VH, bias_V, labels_T, formula, wanted, workspace):
        loss, ctx.finish = with_gradients(hidden_TH, weight_VH, bias_V, labels_T, formula, wanted, workspace)
        ctx.save_for_backward(hidden_TH, weight_VH, bias_V, labels_T)
        ctx.formula, ctx.wanted = formula, wanted
        return loss

    @staticmethod
    def backward(ctx, grad):
        saved = ctx.saved_tensors  # raises torch's own error after a backward pass that did not retain the graph
        finish, ctx.finish = ctx.finish, None
        if finish is None or torch.is_grad_enabled():
            grads = _again(saved, ctx.formula, ctx.wanted, grad)
        else:
            grads = finish(grad)
        return *grads, None, None, None, None


def _again(saved, formula: Formula, wanted: tuple[bool, ...], grad: Tensor) -> list[Tensor | None]:
    """The gradients once more, from scratch and differentiable: for a graph that is used twice, and for second derivatives."""
    from .reference import linear_cross_entropy as plain

    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast(saved[0].device.type, enabled=False):
        inputs = [t for t, want in zip(saved, wanted, strict=False) if want]
        found = iter(torch.autograd.grad(plain(*saved, formula), inputs, grad, create_graph=create_graph))
    return [next(found) if want else None for want in wanted]


def _in_chunks(hidden_TH, weight_VH, bias_V, labels_T, formula: Formula, wanted: tuple[bool, ...], workspace: int):
    """The loss, what its gradients were divided by, and the gradients of hidden states, weight and bias; None where not wanted."""
    (tokens, _), vocab = hidden_TH.shape, weight_VH.shape[0]
    hidden_TH = hidden_TH.contiguous()
    rows = chunk_rows(tokens, vocab, hidden_TH.dtype.itemsize, workspace)
    buffer_CV = _buffer(hidden_TH, rows, vocab)
    loss_T = hidden_TH.new_empty(tokens, dtype=torch.promote_types(hidden_TH.dtype, torch.float32))
    count = count_labels(labels_T, formula) if formula.mean else None
    # In fp16, gradients would be too small: there the backward pass divides, where GradScaler's factor comes in.
    divisor = None if hidden_TH.dtype == torch.float16 else count if formula.mean else formula.items
    grad_TH = torch.empty_like(hidden_TH) if wanted[0] else None
    grad_VH = _Sum(weight_VH, -(-tokens // rows) if rows else 0) if wanted[1] else None
    grad_V = loss_T.new_zeros(vocab) if wanted[2] else None
    for start in range(0, tokens, rows or 1):
        x_CH, labels_C = hidden_TH[start : start + rows], labels_T[start : start + rows]
        z_CV = buffer_CV[: x_CH.shape[0]]
        if bias_V is None:
            torch.mm(x_CH, weight_VH.t(), out=z_CV)
        else:
            torch.addmm(bias_V, x_CH, weight_VH.t(), out=z_CV)
        cross_entropy_rows(z_CV, labels_C, loss_T[start : start + rows], divisor, formula, grads=any(wanted))
        if grad_TH is not None:
            torch.mm(z_CV, weight_VH, out=grad_TH[start : start + rows])
        if grad_VH is not None:
            grad_VH.add(z_CV.t(), x_CH)
        if grad_V is not None:
            grad_V += z_CV.sum(0, dtype=grad_V.dtype)
    loss = loss_T.sum() if count is None else loss_T.sum() / count
    half = hidden_TH.dtype == torch.float16  # not divided yet: a sum over tokens may exceed what fp16 can hold
    return loss, divisor, grad_TH, grad_VH and grad_VH.result(), grad_V if grad_V is None or half else grad_V.to(bias_V.dtype)


class _Sum:
    """The weight's gradient, a sum of products: in the weight's dtype if the terms are few, else in fp32. In fp16 the result is fp32 too."""

    def __init__(self, weight: Tensor, terms: int):
        self.dtype, self.terms = weight.dtype, terms
        # GEMMs from low precision to fp32 exist on CUDA; elsewhere the terms are widened.
        self.half = weight.dtype == torch.float16
        self.wide = self.half or (terms > ROUNDED_CHUNKS and weight.dtype == torch.bfloat16)
        self.value = torch.empty_like(weight, dtype=torch.float32 if self.wide else None, memory_format=torch.contiguous_format)
        self.empty = True

    def add(self, left: Tensor, right: Tensor) -> None:
        """Adds ``left @ right``."""
        if self.wide and not left.is_cuda:
            left, right = left.float(), right.float()
        kind = {"out_dtype": torch.float32} if self.wide and left.is_cuda else {}
        if self.empty:
            torch.mm(left, right, **kind, out=self.value)
        else:
            torch.addmm(self.value, left, right, **kind, out=self.value)
        self.empty = False

    def result(self) -> Tensor:
        """The sum."""
        return self.value.zero_() if self.empty else self.value if self.half else self.value.to(self.dtype)


def chunk_rows(tokens: int, vocab: int, itemsize: int, workspace: int) -> int:
    """Tokens per chunk: as many as the buffer can hold, spread evenly over the chunks."""
    most = max(1, workspace // (_padded(vocab) * itemsize))
    if tokens <= most:
        return tokens
    most = most // _TILE * _TILE or most
    chunks = -(-tokens // most)
    even = -(-tokens // chunks)
    return min(most, -(-even // _TILE) * _TILE) if most >= _TILE else even


def _buffer(like: Tensor, rows: int, vocab: int) -> Tensor:
    """``[C, V]``, its rows so far apart that GEMMs and vector loads find them aligned."""
    # On the CPU, torch's bf16 GEMM reads what lies between rows.
    return like.new_empty(rows, _padded(vocab) if like.is_cuda else vocab)[:, :vocab]


def _padded(vocab: int) -> int:
    return -(-vocab // ALIGNMENT) * ALIGNMENT


def count_labels(labels_T: Tensor, formula: Formula) -> Tensor:
    """How many labels count, on their device."""
    return (labels_T != formula.ignore_index).sum()


"""Routers in Triton: torch's linear, then one kernel that scores, chooses and weighs; backward one kernel before the linear's GEMMs.

Where a family computes the linear in fp32 from tokens in bf16, which takes fp32 GEMMs and fp32 copies of the tokens, the same products come
from bf16 GEMMs that add up in fp32: see `_WideRouter`. The weight may be in fp32: it is the sum of three bf16 matrices.

Scores are computed in fp32 from the logits as the linear rounded them, so with the same logits the choice is the family's. Among equal
scores the lowest expert comes first; torch.topk leaves that open. The truth is `moepatch.layers.router.reference_router`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..autocast import autocast_dtype
from ..layers.router import GROUP_SCORES, SCORES, Routing, RouterSpec, logits_of, reference_choice, result_dtype
from ..once import once_differentiable
from .launch import Prepared, launch
from .router_jit import choice_kernel, gradient_kernel, parts_kernel

try:
    import triton
except ImportError:
    triton = None

#: The most experts, and choices, that a program holds in registers.
MOST_EXPERTS, MOST_CHOICES = 1024, 32
#: Numbers of a program that splits them.
_PARTS_BLOCK = 1024
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def too_large(spec: RouterSpec) -> str | None:
    """Why the kernels cannot take a router, or None."""
    if spec.num_experts > MOST_EXPERTS or spec.top_k > MOST_CHOICES:
        return f"top-{spec.top_k} of {spec.num_experts} experts do not fit into registers (at most top-{MOST_CHOICES} of {MOST_EXPERTS})"
    if spec.groups and (spec.groups & (spec.groups - 1) or spec.num_experts & (spec.num_experts - 1)):
        return f"{spec.groups} groups of {spec.num_experts} experts are not both powers of two"
    return None


def router(x: Tensor, weight: Tensor, bias: Tensor | None, correction: Tensor | None, spec: RouterSpec) -> Routing:
    """Arguments and result as for `reference_router`, which does after the linear what the kernels cannot."""
    if bias is None and _is_wide(x, weight, spec) and _serves(x, correction):
        x = x.reshape(-1, x.shape[-1])
        return _WideRouter.apply(x, weight, correction, spec, x.dtype if spec.result == "input" else torch.float32)
    logits = logits_of(x, weight, bias, spec)
    dtype = result_dtype(x, logits, spec)
    if not (_serves(logits, correction) and dtype in _DTYPES):
        return logits, *reference_choice(logits, correction, spec, dtype)
    return _Router.apply(logits, correction, spec, dtype)


def _serves(x: Tensor, correction: Tensor | None) -> bool:
    """Whether the kernels can take these tokens or logits; the device may have changed since the patch."""
    return (
        not torch.compiler.is_compiling()
        and (x.is_cuda or _interpreted())
        and type(x) is Tensor
        and x.dtype in _DTYPES
        and x.numel() > 0
        and (correction is None or correction.device == x.device)
    )


def _is_wide(x: Tensor, weight: Tensor, spec: RouterSpec) -> bool:
    """Whether the linear is one in fp32 whose products bf16 GEMMs have: fp32 holds the product of two bf16 numbers as it is."""
    if x.dtype != torch.bfloat16 or weight.dtype not in (torch.bfloat16, torch.float32) or type(weight) not in (Tensor, nn.Parameter):
        return False
    # Autocast rounds the weight before such a linear.
    return spec.linear == "float" or (spec.linear == "weight" and weight.dtype == torch.float32 and autocast_dtype(x.device) is None)


@functools.cache
def _interpreted() -> bool:
    return triton is not None and triton.knobs.runtime.interpret


class _Router(torch.autograd.Function):
    """The logits pass through, so that what a loss says about them meets the gradient of the weights inside the kernel."""

    @staticmethod
    def forward(ctx, logits, correction, spec, dtype):
        logits = logits.contiguous()
        weights, ids = _choice(logits, correction, spec, dtype)
        ctx.spec = spec
        ctx.save_for_backward(logits, ids)
        ctx.mark_non_differentiable(ids)
        ctx.set_materialize_grads(False)
        return logits.view_as(logits), weights, ids

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogits, dweights, _):
        if dweights is None:
            return dlogits, None, None, None
        return _gradient(*ctx.saved_tensors, dweights, dlogits, ctx.spec), None, None, None


class _WideRouter(torch.autograd.Function):
    """The linear too: tokens ``[T, H]`` in bf16 and weight ``[E, H]`` in bf16 or fp32, logits as an fp32 linear computes them.

    A weight in fp32 is the sum of three bf16 numbers to the last bit, and so is a gradient of the logits. What is rounded to bf16 in the end
    takes the two larger ones of each, 16 of 24 bits: the gradient of the tokens, and that of a weight in bf16.
    """

    @staticmethod
    def forward(ctx, x, weight, correction, spec, dtype):
        parts = [weight] if weight.dtype == x.dtype else in_parts(weight, 3)
        logits = _product(x, parts[0].t()) if len(parts) == 1 else _sum_of(_product(x, parts.flatten(0, 1).t()).chunk(3, 1))
        weights, ids = _choice(logits, correction, spec, dtype)
        ctx.spec = spec
        ctx.save_for_backward(x, weight, logits, ids)
        ctx.mark_non_differentiable(ids)
        ctx.set_materialize_grads(False)
        return logits, weights, ids

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogits, dweights, _):
        x, weight, logits, ids = ctx.saved_tensors
        count = 2 if weight.dtype == x.dtype else 4
        if dweights is not None:
            parts = _gradient(logits, ids, dweights, dlogits, ctx.spec, parts=count)
        elif dlogits is not None:
            high, *lower = in_parts(dlogits, count // 2 + 1)
            parts = torch.cat([high, lower[0]] if count == 2 else [lower[1], lower[0], high, high], 1)
        else:
            return None, None, None, None, None
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            high, *lower = [weight] if count == 2 else in_parts(weight, 2)
            dx = parts @ torch.cat([high, high]) if count == 2 else parts[:, logits.shape[1] :] @ torch.cat([high, high, *lower])
        if ctx.needs_input_grad[1]:
            both = _product(parts[:, : (2 if count == 2 else 3) * logits.shape[1]].t(), x)
            dweight = torch.add(*both.chunk(2), out=torch.empty_like(weight)) if count == 2 else _sum_of(both.chunk(3)[::-1])
        return dx, dweight, None, None, None


def in_parts(wide: Tensor, count: int) -> Tensor:
    """``[count, *shape]`` in bf16, the largest first, whose sum is an fp32 tensor: to the last bit if there are three of them."""
    wide = wide.contiguous()
    parts = torch.empty((count, *wide.shape), dtype=torch.bfloat16, device=wide.device)
    launch(parts_kernel, (-(-wide.numel() // _PARTS_BLOCK),), wide, parts, wide.numel(), COUNT=count, BLOCK=_PARTS_BLOCK, num_warps=4)
    return parts


def _sum_of(parts: Sequence[Tensor]) -> Tensor:
    """The sum of three, the largest first: what is small is added up before."""
    return torch.add(parts[0], parts[1] + parts[2])


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of bf16 matrices, added up and returned in fp32."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


# --- launches ------------------------------------------------------------------------------------------------------------------------


def _choice(logits: Tensor, correction: Tensor | None, spec: RouterSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights ``[T, K]`` in `dtype` and ids ``[T, K]`` from logits ``[T, E]`` in one piece."""
    tokens = logits.shape[0]
    weights = torch.empty((tokens, spec.top_k), dtype=dtype, device=logits.device)
    ids = torch.empty((tokens, spec.top_k), dtype=torch.int64, device=logits.device)
    rows, kernel = _prepared_choice(spec, logits.dtype)
    kernel((-(-tokens // rows),), logits, correction, weights, ids, tokens)
    return weights, ids


def _gradient(logits: Tensor, ids: Tensor, dweights: Tensor, dlogits: Tensor | None, spec: RouterSpec, parts: int = 0) -> Tensor:
    """The gradient of the logits ``[T, E]``; in `parts`: so many bf16 numbers for each, ``[T, parts·E]``, in the order of `gradient_kernel`."""
    tokens, experts = logits.shape
    shape, dtype = ((tokens, parts * experts), torch.bfloat16) if parts else (logits.shape, logits.dtype)
    total = torch.empty(shape, dtype=dtype, device=logits.device)
    rows, kernel = _prepared_gradient(spec, dlogits is not None, parts)
    dlogits = None if dlogits is None else dlogits.contiguous()
    kernel((-(-tokens // rows),), logits, ids, dweights.contiguous(), dlogits, total, tokens)
    return total


def _constants(spec: RouterSpec, plain: bool) -> dict:
    """What both kernels know of a router. A softmax that is renormalised is one over the chosen logits: the sum over all cancels."""
    score = "chosen" if spec.score == "softmax" and spec.renormalise else spec.score
    block = max(2, triton.next_power_of_2(spec.num_experts))
    rows, warps = _tile(block, plain)
    return {
        "E": spec.num_experts,
        "K": spec.top_k,
        "BLOCK": block,
        "ROWS": rows,
        "SCORE": SCORES.index(score),
        "NORMED": spec.renormalise or score == "chosen",
        "EPS": spec.eps,
        "SCALE": spec.scale,
        "num_warps": warps,
    }


def _tile(block: int, plain: bool) -> tuple[int, int]:
    """Rows and warps of a program: a warp has a whole row, or several narrow ones, so that no reduction leaves the warp.

    Triton lays 512 scores on four warps so if nothing but the scores is read; wider rows and other operands it spreads over the warps.
    """
    return (512 // block, 4) if plain and block <= 128 else (max(1, 128 // block), 1)


@functools.lru_cache(maxsize=256)
def _prepared_choice(spec: RouterSpec, dtype: torch.dtype) -> tuple[int, Prepared]:
    """Tokens of a program, and the kernel."""
    plain = not spec.groups and spec.correction is None
    constants = _constants(spec, plain)
    return constants["ROWS"], Prepared(
        choice_kernel, **constants, SLOTS=triton.next_power_of_2(spec.top_k), CORRECTED=spec.correction is not None, PLAIN=plain,
        SHORT=plain and dtype.itemsize == 2, GROUPS=spec.groups, CHOSEN_GROUPS=spec.chosen_groups,
        GROUP_SCORE=GROUP_SCORES.index(spec.group_score), ZEROED=spec.zeroed, SOFTMAX=spec.score != "sigmoid",
    )  # fmt: skip


@functools.lru_cache(maxsize=256)
def _prepared_gradient(spec: RouterSpec, added: bool, parts: int) -> tuple[int, Prepared]:
    """Tokens of a program, and the kernel."""
    constants = _constants(spec, True)
    return constants["ROWS"], Prepared(gradient_kernel, **constants, ADD=added, PARTS=parts)

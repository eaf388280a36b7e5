"""Routers: what one computes, its truth in plain torch, and the patched module.

A router gives every token a score for every expert, from one linear, and chooses the K best. Families differ in the scores, in what is added
to them for the choice only, in whether the chosen ones are made to sum to 1, and in where they round on the way.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..autocast import autocast_dtype
from ..kind import Kind
from ..quantized import is_plain
from ..registry import compute
from ..surgery import Patched, original_class
from ..trial import Call

#: What experts are scored with: ``chosen`` is a softmax over the chosen logits only.
SCORES = ("softmax", "sigmoid", "chosen")
#: What the linear computes in: what it is given, the dtype of its weight, or fp32.
LINEARS = ("own", "weight", "float")
#: What the weights are returned in: fp32 as the scores, the dtype of the logits, or that of the input.
RESULTS = ("scores", "logits", "input")
#: What a group is scored with: the sum of its two best experts, or its best one.
GROUP_SCORES = ("sum", "max")
_TRIAL_TOKENS = 24

Routing = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class RouterSpec:
    """One router ``hidden [..., H] -> (logits [T, E], weights [T, K], ids [T, K])``.

    Attributes:
        num_experts, hidden, top_k: E, H and K.
        weight: name of the matrix ``[E, H]``.
        bias: name of the linear's bias, or None.
        correction: name of what is added to the scores for the choice, or None.
        linear: one of `LINEARS`.
        wide_logits: the logits are returned in fp32, whatever the linear computed in.
        score: one of `SCORES`.
        renormalise: the weights of a token sum to `scale`.
        eps: is added to the sum that they are divided by.
        scale: multiplies the weights.
        groups, chosen_groups: the experts are chosen from so many of so many groups of neighbours; 0: from all.
        group_score: one of `GROUP_SCORES`.
        zeroed: an expert of another group counts with a score of 0, not of -inf.
        result: one of `RESULTS`.
        sorted: the plain code asks for the best expert first. Kernels always return it first.
        flattens: it takes more than two axes.
    """

    num_experts: int
    hidden: int
    top_k: int
    weight: str
    bias: str | None = None
    correction: str | None = None
    linear: str = "own"
    wide_logits: bool = False
    score: str = "softmax"
    renormalise: bool = False
    eps: float = 0.0
    scale: float = 1.0
    groups: int = 0
    chosen_groups: int = 0
    group_score: str = "sum"
    zeroed: bool = False
    result: str = "scores"
    sorted: bool = True
    flattens: bool = True

    def resized(self, sizes: Mapping[int, int]) -> RouterSpec:
        """The same router for another width of tokens; matchers and trials keep the number of experts."""
        return replace(self, hidden=sizes.get(self.hidden, self.hidden), num_experts=sizes.get(self.num_experts, self.num_experts))

    def describe(self) -> str:
        """The sizes and what is not usual about the router, on one line."""
        parts = [f"{self.num_experts} experts H={self.hidden} top-{self.top_k} {self.score}"]
        parts += ["sum 1"] if self.renormalise and self.score != "chosen" else []
        parts += [f"scale {self.scale:g}"] if self.scale != 1 else []
        parts += [f"{self.chosen_groups} of {self.groups} groups"] if self.groups else []
        parts += ["corrected"] if self.correction else []
        parts += ["bias"] if self.bias else []
        parts += ["fp32 linear"] if self.linear == "float" else []
        return " ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"layout": self.score, **asdict(self)}


def logits_of(x: Tensor, weight: Tensor, bias: Tensor | None, spec: RouterSpec) -> Tensor:
    """The linear ``[..., H] -> [T, E]`` in the precision of the spec; autocast and sharded weights are nn.Linear's matter."""
    if spec.flattens and x.ndim != 2:
        x = x.reshape(-1, x.shape[-1])
    if spec.linear == "float":
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    logits = F.linear(x.to(weight.dtype) if spec.linear == "weight" else x, weight, bias)
    return logits.float() if spec.wide_logits else logits


def result_dtype(x: Tensor, logits: Tensor, spec: RouterSpec) -> torch.dtype:
    """What the weights are returned in."""
    return {"scores": torch.float32, "logits": logits.dtype, "input": x.dtype}[spec.result]


def reference_router(x: Tensor, weight: Tensor, bias: Tensor | None, correction: Tensor | None, spec: RouterSpec) -> Routing:
    """The router in plain torch, rounding where families do.

    Args:
        x: tokens ``[..., H]``.
        weight: ``[E, H]``.
        bias: of the linear, ``[E]``, or None as in the spec.
        correction: is added to the scores for the choice, ``[E]``, or None as in the spec.

    Returns:
        Logits ``[T, E]``, weights ``[T, K]`` and ids ``[T, K]``, int64. Among equal scores torch.topk decides.
    """
    logits = logits_of(x, weight, bias, spec)
    return logits, *reference_choice(logits, correction, spec, result_dtype(x, logits, spec))


def reference_choice(logits: Tensor, correction: Tensor | None, spec: RouterSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights ``[T, K]`` in `dtype` and ids ``[T, K]`` from logits ``[T, E]``, in plain torch."""
    if spec.score == "chosen":
        best, ids = torch.topk(logits, spec.top_k, dim=-1, sorted=spec.sorted)
        weights = best.softmax(-1, dtype=torch.float32)
    else:
        scores = logits.softmax(-1, dtype=torch.float32) if spec.score == "softmax" else logits.float().sigmoid()
        choice = scores if correction is None else scores + correction
        if spec.groups:
            choice = _within_groups(choice, spec)
        best, ids = torch.topk(choice, spec.top_k, dim=-1, sorted=spec.sorted)
        weights = best if choice is scores else scores.gather(-1, ids)
        if spec.renormalise:
            total = weights.sum(-1, keepdim=True)
            weights = weights / (total + spec.eps if spec.eps else total)
    return (weights * spec.scale if spec.scale != 1 else weights).to(dtype), ids


def _within_groups(choice: Tensor, spec: RouterSpec) -> Tensor:
    """The scores ``[T, E]`` with those of groups that are not among the best put out of reach."""
    grouped = choice.unflatten(-1, (spec.groups, -1))
    best = grouped.topk(2, dim=-1)[0].sum(-1) if spec.group_score == "sum" else grouped.amax(-1)
    chosen = torch.topk(best, spec.chosen_groups, dim=-1, sorted=False)[1]
    outside = torch.ones_like(best, dtype=torch.bool).scatter_(-1, chosen, False)
    return grouped.masked_fill(outside.unsqueeze(-1), 0.0 if spec.zeroed else float("-inf")).flatten(-2)


@dataclass(frozen=True)
class RouterState:
    """What a patched router needs to know."""

    spec: RouterSpec
    backend: str

    def __str__(self) -> str:
        return f"{self.spec.describe()}, backend={self.backend}"


class PatchedRouter(Patched):
    """``router(hidden [..., H])``, computed by a backend. See `reference_router` for the result."""

    _moepatch: RouterState

    def forward(self, *args, **kwargs):
        """See the class; keywords go by the family's own names."""
        if kwargs:
            args = inspect.signature(original_class(self).forward).bind(self, *args, **kwargs).args[1:]
        (x,) = args
        spec = self._moepatch.spec
        # Autocast takes the fp32 from a linear that asks for it, unless the family forbids that: its own code knows.
        weight = getattr(self, spec.weight)
        if x.ndim != 2 and not spec.flattens or spec.linear == "float" and autocast_dtype(x.device) is not None or not is_plain(weight):
            return super().forward(x)
        bias = None if spec.bias is None else getattr(self, spec.bias)
        correction = None if spec.correction is None else getattr(self, spec.correction)
        return compute("router", self._moepatch.backend)(x, weight, bias, correction, spec)


def _inject(spec, backend, implementation):
    return {"": (PatchedRouter, RouterState(spec, backend))}


def _trial(spec: RouterSpec, dtype, device, generator) -> Call:
    return _bench(spec, dtype, device, generator, _TRIAL_TOKENS)


def _bench(spec: RouterSpec, dtype, device, generator, tokens: int) -> Call:
    return Call((torch.randn(tokens, spec.hidden, generator=generator, dtype=torch.float32).to(device=device, dtype=dtype),))


def _call(router, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the weights at their experts' places: their order is free where a family does not sort.

    Where the last expert chosen and the first one left have equal logits, which is common in bf16, either may be chosen: such tokens count 0.
    """
    logits, weights, ids = router.forward(x)
    k = ids.shape[-1]
    dense = torch.zeros(logits.shape, dtype=weights.dtype, device=x.device).scatter(-1, ids, weights)
    if k == logits.shape[-1]:
        return logits, dense
    best = logits.detach().topk(k + 1).values
    return logits, dense * (best[:, k - 1 : k] > best[:, k:])


ROUTER = Kind(name="router", pattern="router", backends="router", injections=_inject, trial=_trial, call=_call, bench=_bench, dense=True)

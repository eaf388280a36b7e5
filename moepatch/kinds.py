"""The kinds of modules that moepatch patches: for each, what is injected where, and how a module of it is tried out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .experts.expert_list import inject_expert_list, stack_expert_list
from .experts.module import ExpertsState, PatchedExperts
from .experts.parallel_linear import ParallelLinearState, PatchedParallelLinear
from .experts.scored_block import BlockState, PatchedScoredBlock
from .surgery import Patched, Step


@dataclass(frozen=True)
class Kind:
    """How to patch and try one kind of module.

    Attributes:
        name: as in `Site.kind`.
        pattern: the prefix of its pattern's name in tables.
        backends: which table of backends serves it.
        injections: from (spec, backend, implementation) to mixin and state, for the module itself (key ``""``) and for submodules by
            relative name. `implementation` is what transformers' own switch said at the time of the patch.
        computes: from the spec to the part of it that the backend computes.
        widths: from the spec to H and I, or to the widths of one matrix.
        trial: random positional arguments for one call, from (spec, dtype, device, generator). Floating arguments get gradients.
        holder: from the spec to the relative name of the module that holds the experts' weights.
        relayout: from the patched module and its spec to steps that move its weights, done when the patch has been verified.
    """

    name: str
    pattern: str
    backends: str
    injections: Callable[[Any, str, str | None], Mapping[str, tuple[type[Patched], object]]]
    computes: Callable[[Any], Any]
    widths: Callable[[Any], tuple[int, int]]
    trial: Callable[[Any, torch.dtype, torch.device, torch.Generator], tuple]
    holder: Callable[[Any], str] = lambda spec: ""
    relayout: Callable[[nn.Module, Any], Sequence[Step]] = lambda module, spec: ()


_TRIAL_TOKENS = 24


def _random(shape, dtype, device, generator) -> Tensor:
    return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)


def _trial_experts(spec, dtype, device, generator):
    """Tokens, distinct experts for each of them and positive routing weights."""
    ids = spec.num_experts + spec.identity_experts
    top_k = min(2, ids)
    topk_ids_TK = torch.stack([torch.randperm(ids, generator=generator)[:top_k] for _ in range(_TRIAL_TOKENS)]).to(device)
    topk_weights_TK = torch.rand(_TRIAL_TOKENS, top_k, generator=generator).add_(0.1).to(device=device, dtype=dtype)
    return _random((_TRIAL_TOKENS, spec.hidden), dtype, device, generator), topk_ids_TK, topk_weights_TK


def _trial_block(spec, dtype, device, generator):
    return (_random((_TRIAL_TOKENS, spec.experts.hidden), dtype, device, generator),)


def trial_tokens(hidden, dtype, device, generator) -> Tensor:
    """Tokens in two sequences ``[B, S, H]``, for blocks that take sequences only."""
    return _random((2, _TRIAL_TOKENS // 2, hidden), dtype, device, generator)


def _trial_parallel_linear(spec, dtype, device, generator):
    """Rows sorted by expert and the count of each expert's rows, some of them 0."""
    counts = torch.randint(0, 3, (spec.num_experts,), generator=generator)
    counts[0] += 1
    rows = _random((int(counts.sum()), spec.in_features), dtype, device, generator)
    return rows, counts.tolist() if spec.counts == "list" else counts.to(device)


def _inject_experts(spec, backend, implementation):
    return {"": (PatchedExperts, ExpertsState(spec, backend, implementation))}


def _inject_block(spec, backend, implementation):
    return {
        "": (PatchedScoredBlock, BlockState(spec)),
        spec.experts_name: (PatchedExperts, ExpertsState(spec.experts, backend, implementation)),
    }


def _inject_parallel_linear(spec, backend, implementation):
    return {"": (PatchedParallelLinear, ParallelLinearState(spec, backend))}


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            name="experts",
            pattern="experts",
            backends="experts",
            injections=_inject_experts,
            computes=lambda spec: spec,
            widths=lambda spec: (spec.hidden, spec.intermediate),
            trial=_trial_experts,
        ),
        Kind(
            name="scored_block",
            pattern="experts.scored",
            backends="experts",
            injections=_inject_block,
            computes=lambda spec: spec.experts,
            widths=lambda spec: (spec.experts.hidden, spec.experts.intermediate),
            trial=_trial_block,
            holder=lambda spec: spec.experts_name,
        ),
        Kind(
            name="parallel_linear",
            pattern="experts.linear",
            backends="parallel_linear",
            injections=_inject_parallel_linear,
            computes=lambda spec: spec,
            widths=lambda spec: (spec.in_features, spec.out_features),
            trial=_trial_parallel_linear,
        ),
        Kind(
            name="expert_list",
            pattern="experts.list",
            backends="experts",
            injections=inject_expert_list,
            computes=lambda spec: spec.experts,
            widths=lambda spec: (spec.experts.hidden, spec.experts.intermediate),
            trial=lambda spec, dtype, device, generator: (trial_tokens(spec.experts.hidden, dtype, device, generator),),
            holder=lambda spec: spec.experts_name,
            relayout=stack_expert_list,
        ),
    )
}

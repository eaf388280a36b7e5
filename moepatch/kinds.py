"""Every kind of module that moepatch patches by itself; importing this module puts them into the table of `registry`."""

from __future__ import annotations

import torch
from torch import Tensor

from .experts.expert_list import inject_expert_list, join_expert_list, stack_expert_list, why_not_stacked
from .experts.module import ExpertsState, PatchedExperts
from .experts.parallel_linear import ParallelLinearState, PatchedParallelLinear
from .experts.scored_block import BlockState, PatchedScoredBlock
from .kind import Kind
from .layers.attention.kind import ATTENTION_FUNCTION
from .layers.attention_block import ATTENTION_BLOCK
from .layers.latent import LATENT
from .layers.linear import LINEAR
from .layers.loss.module import LOSS
from .layers.mixers.delta import DELTA_MIXER
from .layers.mixers.selective import SELECTIVE_MIXER
from .layers.mixers.ssd import SSD_MIXER
from .layers.mlp import MLP
from .layers.norm import NORM
from .layers.residual import RESIDUAL
from .layers.router import ROUTER
from .registry import KINDS as KINDS
from .registry import register_kind
from .trial import Call

_TRIAL_TOKENS = 24


def _random(shape, dtype, device, generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32).to(device=device, dtype=dtype)


def _trial_experts(spec, dtype, device, generator) -> Call:
    return _call_experts(spec, dtype, device, generator, _TRIAL_TOKENS, 2)


def _bench_experts(spec, dtype, device, generator, tokens) -> Call:
    """How many experts a token has is the router's matter: as many as models of this size have."""
    return _call_experts(spec, dtype, device, generator, tokens, 8 if spec.num_experts >= 64 else 4)


def _call_experts(spec, dtype, device, generator, tokens: int, top_k: int) -> Call:
    """Tokens, distinct experts for each of them and positive routing weights."""
    ids = spec.num_experts + spec.identity_experts
    top_k = min(top_k, ids)
    topk_ids_TK = torch.rand(tokens, ids, generator=generator, dtype=torch.float32).topk(top_k).indices.to(device)
    topk_weights_TK = torch.rand(tokens, top_k, generator=generator, dtype=torch.float32).add_(0.1).to(device=device, dtype=dtype)
    return Call((_random((tokens, spec.hidden), dtype, device, generator), topk_ids_TK, topk_weights_TK))


def _regimes_experts(spec, dtype, device, generator):
    """Every expert chosen, alone and with others; all tokens for one; weights of every size and sign; tokens that hold nothing."""
    ids = spec.num_experts + spec.identity_experts

    def call(topk_ids_TK: Tensor, scale: float = 1.0) -> Call:
        tokens, top_k = topk_ids_TK.shape
        weights_TK = torch.rand(tokens, top_k, generator=generator, dtype=torch.float32).add_(0.1).mul_(scale)
        return Call((_random((tokens, spec.hidden), dtype, device, generator), topk_ids_TK.to(device), weights_TK.to(device=device, dtype=dtype)))

    top_k = min(3, ids)
    in_turn_TK = (torch.arange(ids)[:, None] + torch.arange(top_k)) % ids
    yield "with every expert chosen, one for each token", call(in_turn_TK[:, :1])
    yield f"with every expert chosen, {top_k} for each token", call(in_turn_TK)
    for tokens, expert, words in ((300, 0, "the first"), (4200, ids - 1, "the last")):
        yield f"with {tokens} tokens for {words} expert", call(torch.full((tokens, 1), expert, dtype=torch.int64))
    for scale in (1e-4, -1.0):
        yield f"with weights × {scale:g}", call(in_turn_TK, scale)
    x_TH, *rest = call(in_turn_TK).args
    yield "with tokens of zeros", Call((x_TH * (torch.arange(len(x_TH)) % 2)[:, None].to(x_TH), *rest))


def _regimes_block(hidden):
    """Sequences of every length, and one token all the time, which goes to the same experts."""

    def calls(spec, dtype, device, generator):
        for shape in ((1, 1), (1, 2), (1, 3), (5, 5), (3, 16), (1, 600), (2, 2100)):
            count = shape[0] * shape[1]
            yield f"with {count} token{'s' if count > 1 else ''}", Call((_random((*shape, hidden(spec)), dtype, device, generator),))
        token = _random((1, 1, hidden(spec)), dtype, device, generator)
        yield "with 300 tokens for the same experts", Call((token + 1e-3 * _random((2, 150, hidden(spec)), dtype, device, generator),))

    return calls


def _regimes_parallel_linear(spec, dtype, device, generator):
    """All rows for one expert, one for each, one at all."""
    experts = spec.num_experts
    for words, counts in (
        ("one row for each expert", [1] * experts), ("one row", [1] + [0] * (experts - 1)), ("300 rows for the first expert", [300] + [0] * (experts - 1)),
        ("4200 rows for the last expert", [0] * (experts - 1) + [4200]),
    ):  # fmt: skip
        rows = _random((sum(counts), spec.in_features), dtype, device, generator)
        yield f"with {words}", Call((rows, counts if spec.counts == "list" else torch.tensor(counts, device=device, dtype=torch.int64)))


def _trial_block(spec, dtype, device, generator):
    return Call((_random((_TRIAL_TOKENS, spec.experts.hidden), dtype, device, generator),))


def trial_tokens(hidden, dtype, device, generator) -> Tensor:
    """Tokens in two sequences ``[B, S, H]``, for blocks that take sequences only."""
    return _random((2, _TRIAL_TOKENS // 2, hidden), dtype, device, generator)


def _trial_parallel_linear(spec, dtype, device, generator):
    """Rows sorted by expert and the count of each expert's rows, some of them 0."""
    counts = torch.randint(0, 3, (spec.num_experts,), generator=generator)
    counts[0] += 1
    rows = _random((int(counts.sum()), spec.in_features), dtype, device, generator)
    return Call((rows, counts.tolist() if spec.counts == "list" else counts.to(device)))


def _inject_experts(spec, backend, implementation):
    return {"": (PatchedExperts, ExpertsState(spec, backend, implementation))}


def _inject_block(spec, backend, implementation):
    return {
        "": (PatchedScoredBlock, BlockState(spec)),
        spec.experts_name: (PatchedExperts, ExpertsState(spec.experts, backend, implementation)),
    }


def _inject_parallel_linear(spec, backend, implementation):
    return {"": (PatchedParallelLinear, ParallelLinearState(spec, backend))}


_OWN: dict[str, Kind] = {
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
            bench=_bench_experts,
            regimes=_regimes_experts,
        ),
        Kind(
            name="scored_block",
            pattern="experts.scored",
            backends="experts",
            injections=_inject_block,
            computes=lambda spec: spec.experts,
            widths=lambda spec: (spec.experts.hidden, spec.experts.intermediate),
            trial=_trial_block,
            regimes=_regimes_block(lambda spec: spec.experts.hidden),
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
            regimes=_regimes_parallel_linear,
        ),
        Kind(
            name="expert_list",
            pattern="experts.list",
            backends="experts",
            injections=inject_expert_list,
            computes=lambda spec: spec.experts,
            widths=lambda spec: (spec.experts.hidden, spec.experts.intermediate),
            trial=lambda spec, dtype, device, generator: Call((trial_tokens(spec.experts.hidden, dtype, device, generator),)),
            holder=lambda spec: spec.experts_name,
            regimes=_regimes_block(lambda spec: spec.experts.hidden),
            relayout=join_expert_list,
            spread=stack_expert_list,
            why_not_spread=why_not_stacked,
        ),
        ATTENTION_FUNCTION,
        ATTENTION_BLOCK,
        LATENT,
        SSD_MIXER,
        DELTA_MIXER,
        SELECTIVE_MIXER,
        MLP,
        NORM,
        ROUTER,
        RESIDUAL,
        LOSS,
        LINEAR,
    )
}

for _kind in _OWN.values():
    register_kind(_kind)

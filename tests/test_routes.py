"""Permute and unpermute: for any routing, pure movement with exact gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moepatch.experts.routes import gather_rows, permute_weights, sort_routes, sum_rows, unpermute, zero_sentinels

# How long an example takes says how busy the machine is.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@st.composite
def routings(draw):
    """ids [T, K] and E: zero tokens to some or all experts, all to one, T = 0, T = 1, duplicates, sentinels on both sides, any E."""
    experts, tokens, top_k = draw(st.integers(1, 13)), draw(st.integers(0, 9)), draw(st.integers(1, 5))
    low, high = draw(st.sampled_from([(0, experts - 1), (0, 0), (experts - 1, experts - 1), (-2, experts + 2), (experts, experts + 3)]))
    ids = [draw(st.integers(low, high)) for _ in range(tokens * top_k)]
    return torch.tensor(ids, dtype=draw(st.sampled_from([torch.int64, torch.int32]))).view(tokens, top_k), experts


def rows_of(ids, experts):
    """The same by a plain loop: the slots of each expert in order, then the sentinels."""
    flat = ids.flatten().tolist()
    by_expert = [[r for r, e in enumerate(flat) if e == expert] for expert in range(experts)]
    return by_expert, [r for r, e in enumerate(flat) if not 0 <= e < experts]


@given(routings())
def test_rows_are_grouped_by_expert_in_the_order_of_tokens(case):
    ids, experts = case
    routes = sort_routes(ids, experts)
    by_expert, sentinels = rows_of(ids, experts)
    assert routes.order_R.tolist() == [r for rows in by_expert for r in rows] + sentinels
    assert routes.offs_E.tolist() == [sum(len(rows) for rows in by_expert[: e + 1]) for e in range(experts)]
    assert routes.offs_E.dtype == torch.int32
    assert routes.row_S[routes.order_R].tolist() == list(range(ids.numel()))


@given(routings(), st.sampled_from([1, 3, 8]))
def test_what_is_permuted_comes_back_once_per_expert(case, width):
    ids, experts = case
    x_TH = torch.randint(-8, 8, (ids.shape[0], width)).float()  # small integers: sums are exact
    routes = sort_routes(ids, experts)
    x_RH = gather_rows(x_TH, routes)
    assert torch.equal(x_RH, x_TH[routes.order_R // ids.shape[1]])
    routed = ((ids >= 0) & (ids < experts)).sum(1, keepdim=True)
    assert torch.equal(sum_rows(x_RH, routes), x_TH * routed)


@given(routings())
def test_undefined_sentinel_rows_never_reach_a_token(case):
    """Rows past the last offset hold whatever was in memory: here NaN, and 0 * NaN would be NaN."""
    ids, experts = case
    routes = sort_routes(ids, experts)
    x_RH = torch.ones(ids.numel(), 4)
    x_RH[int(routes.offs_E[-1]) :] = float("nan")
    assert torch.isfinite(sum_rows(x_RH, routes)).all()
    assert torch.isfinite(zero_sentinels(x_RH, routes)).all()


@given(routings())
def test_gradients_are_the_transposed_movement(case):
    ids, experts = case
    routes = sort_routes(ids, experts)
    x_RH = torch.randint(-8, 8, (ids.numel(), 3)).float().requires_grad_()
    grad_TH = torch.randint(-8, 8, (ids.shape[0], 3)).float()
    unpermute(x_RH, routes).backward(grad_TH)
    assert torch.equal(x_RH.grad, gather_rows(grad_TH, routes))
    weights_TK = torch.rand(ids.shape, requires_grad=True)
    grad_R = torch.randint(-8, 8, (ids.numel(),)).float()
    weights_R = permute_weights(weights_TK, routes)
    weights_R.backward(grad_R)
    valid = (ids >= 0) & (ids < experts)
    assert torch.equal(weights_TK.grad, torch.where(valid, grad_R[routes.row_S].view(ids.shape), 0))
    assert torch.equal(weights_R, torch.where(valid, weights_TK, 0).flatten()[routes.order_R])


def test_offsets_count_past_what_int16_holds():
    ids = torch.zeros(40_000, 2, dtype=torch.int64)
    routes = sort_routes(ids, 3)
    assert routes.offs_E.tolist() == [80_000] * 3


@pytest.mark.parametrize("experts", [1, 3, 128])
def test_no_tokens_at_all(experts):
    routes = sort_routes(torch.empty(0, 2, dtype=torch.int64), experts)
    assert routes.offs_E.tolist() == [0] * experts
    assert sum_rows(torch.empty(0, 5), routes).shape == (0, 5)

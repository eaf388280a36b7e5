"""Reversible weight operations: pure movement, so everything here is bit-exact."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moepatch import LayoutError
from moepatch.layout.experts import flat_layout, fused_layout
from moepatch.layout.ops import Concat, Deinterleave, Flatten, Interleave, Split, Stack, Transpose, Unflatten, Unstack, apply_chain, invert

# How long an example takes says how busy the machine is.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

SIZES = st.integers(1, 7)


def tensor(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def equal(a, b):
    return len(a) == len(b) and all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b, strict=True))


@st.composite
def op_and_tensors(draw):
    """An op with tensors that it takes, for any E, H, I, so also H == I and H == 2I."""
    experts, a, b = draw(SIZES), draw(SIZES), draw(SIZES)
    kind = draw(st.sampled_from(["transpose", "unflatten", "flatten", "stack", "unstack", "concat", "split", "deinterleave", "interleave"]))
    dim = draw(st.sampled_from([1, 2]))
    even = [experts, a, b]
    even[dim] *= 2
    cases = {
        "transpose": lambda: (Transpose(), (tensor(experts, a, b), tensor(experts, b, a))),
        "unflatten": lambda: (Unflatten(experts), (tensor(experts * a, b),)),
        "flatten": lambda: (Flatten(experts), (tensor(experts, a, b),)),
        "stack": lambda: (Stack(experts), tuple(tensor(a, b, seed=e) for e in range(experts))),
        "unstack": lambda: (Unstack(experts), (tensor(experts, a, b),)),
        "concat": lambda: (Concat(dim), (tensor(experts, a, b), tensor(experts, a, b, seed=1))),
        "split": lambda: (Split(dim), (tensor(*even),)),
        "deinterleave": lambda: (Deinterleave(dim), (tensor(*even),)),
        "interleave": lambda: (Interleave(dim), (tensor(*even),)),
    }
    return cases[kind]()


@given(op_and_tensors())
def test_every_op_is_undone_by_its_inverse(case):
    op, tensors = case
    assert equal(op.inverse(op(tensors)), tensors)
    assert op.inverse.inverse == op


@given(op_and_tensors())
def test_views_share_memory_and_copies_do_not(case):
    op, tensors = case
    shares = all(t.untyped_storage().data_ptr() in {s.untyped_storage().data_ptr() for s in tensors} for t in op(tensors))
    if op.is_view:
        assert shares


@given(SIZES, SIZES, SIZES, st.booleans(), st.booleans(), st.booleans())
def test_stored_and_canonical_weights_are_each_others_inverse(experts, hidden, intermediate, gated, transposed, interleaved):
    layout = fused_layout(up="up", down="down", gated=gated, transposed=transposed, interleaved=gated and interleaved, bias="{}_bias".format)
    rows = intermediate * (2 if gated else 1)
    canonical = {"up": tensor(experts, rows, hidden), "down": tensor(experts, hidden, intermediate), "up_bias": tensor(experts, rows)}
    module = torch.nn.Module()
    for slot, value in canonical.items():
        for name, stored in getattr(layout, slot).store(value).items():
            module.register_parameter(name, torch.nn.Parameter(stored))
    for slot, value in canonical.items():
        assert torch.equal(getattr(layout, slot).canonical(module), value)
    assert module.up.shape == ((experts, hidden, rows) if transposed else (experts, rows, hidden))


@given(SIZES, SIZES, SIZES)
def test_flat_layout_round_trip(experts, hidden, intermediate):
    layout = flat_layout(gate="gate", up="up", down="down", num_experts=experts)
    up, down = tensor(experts, 2 * intermediate, hidden), tensor(experts, hidden, intermediate)
    stored = {**layout.up.store(up), **layout.down.store(down)}
    assert {tuple(t.shape) for t in stored.values()} == {(experts * intermediate, hidden)}
    module = torch.nn.ParameterDict(stored)
    assert torch.equal(layout.up.canonical(module), up) and torch.equal(layout.down.canonical(module), down)


def test_deinterleave_sorts_gate_before_up():
    pairs = torch.tensor([[[1.0], [10.0], [2.0], [20.0]]])
    assert Deinterleave(1)((pairs,))[0].flatten().tolist() == [1, 2, 10, 20]


def test_a_chain_is_turned_round_op_by_op():
    chain = (Transpose(), Deinterleave(1))
    assert invert(chain) == (Interleave(1), Transpose())
    weight = tensor(3, 4, 6)
    assert torch.equal(apply_chain(invert(chain), apply_chain(chain, (weight,)))[0], weight)


@pytest.mark.parametrize(
    ("op", "tensors", "words"),
    [
        (Split(1), (tensor(2, 3, 4),), r"Split\(dim=1, parts=2\): wanted one tensor whose axis 1 is divisible by 2, got 1 tensor\(s\) of shape \(2, 3, 4\)"),
        (Unflatten(4), (tensor(6, 3),), r"divisible by 4 experts, got .* \(6, 3\)"),
        (Stack(3), (tensor(2, 2), tensor(2, 2)), r"wanted 3 tensors of one shape, got 2"),
        (Transpose(), (tensor(2, 3),), r"at least 3 axes"),
    ],
)
def test_an_op_that_does_not_fit_says_so_with_the_shapes(op, tensors, words):
    with pytest.raises(LayoutError, match=words):
        op(tensors)

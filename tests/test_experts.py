"""The compute backends against the reference loop, on every layout and every awkward routing."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from moepatch.experts.activation import FORMULAS, OWN, Activation
from moepatch.experts.gemm import outer_sums, rows_times
from moepatch.experts.grouped import grouped_experts
from moepatch.experts.reference import reference_experts
from moepatch.experts.spec import ExpertsSpec, ExpertWeights
from moepatch.layout.experts import flat_layout, fused_layout

E, H, I = 6, 16, 24
LAYOUTS = {
    "plain": dict(),
    "transposed": dict(transposed=True),
    "interleaved": dict(interleaved=True),
    "bias": dict(bias="{}_bias".format),
    "transposed interleaved bias": dict(transposed=True, interleaved=True, bias="{}_bias".format),
    "no gate": dict(gated=False),
    "flat": None,
}


def experts(layout_name="plain", activation=None, *, experts=E, hidden=H, intermediate=I, dtype=torch.float32, scale_input=False, norm=False):
    """A module with random weights in one layout, and what it computes."""
    arguments = LAYOUTS[layout_name]
    gated = arguments is None or arguments.get("gated", True)
    if arguments is None:
        layout = flat_layout(gate="gate", up="up", down="down", num_experts=experts)
    else:
        layout = fused_layout(**{"up": "up", "down": "down", "gated": True, **arguments})
    spec = ExpertsSpec(
        num_experts=experts,
        hidden=hidden,
        intermediate=intermediate,
        layout=layout,
        activation=activation or Activation("swiglu" if gated else "relu2"),
        scale_input=scale_input,
        post_norm="norm" if norm else None,
    )
    rows = intermediate * (2 if gated else 1)
    shapes = {"up": (experts, rows, hidden), "down": (experts, hidden, intermediate), "up_bias": (experts, rows), "down_bias": (experts, hidden)}
    module = nn.Module()
    generator = torch.Generator().manual_seed(1)
    for slot, shape in shapes.items():
        weight = getattr(layout, slot)
        if weight is not None:
            for name, stored in weight.store(torch.randn(shape, generator=generator) * 0.3).items():
                module.register_parameter(name, nn.Parameter(stored.to(dtype).contiguous().clone()))
    if norm:
        module.norm = nn.RMSNorm(hidden, dtype=dtype)
    return module, spec


def routing(kind, tokens=16, top_k=2, experts=E):
    generator = torch.Generator().manual_seed(2)
    ids = torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)]) if tokens else torch.empty(0, top_k).long()
    if kind == "without first and last":
        ids = ids % (experts - 2) + 1
    elif kind == "all to one":
        ids = torch.full_like(ids, experts - 1)
    elif kind == "to nobody":
        ids = torch.full_like(ids, experts)
    elif kind == "duplicates":
        ids = ids[:, :1].expand(-1, top_k).contiguous()
    elif kind == "sentinels":
        ids = torch.where(torch.rand(ids.shape, generator=generator) < 0.4, torch.tensor([-1, experts]), ids)
    return ids, torch.rand(ids.shape, generator=generator) + 0.1


def run(compute, module, spec, ids, weights, own_gate=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(ids.shape[0], spec.hidden, generator=generator).to(dtype).requires_grad_()
    weights = weights.clone().requires_grad_()
    module.zero_grad(set_to_none=True)
    y = compute(x, ids, weights, ExpertWeights(module, spec, own_gate, dtype))
    y.backward(torch.randn(y.shape, generator=generator).to(y))
    return {"y": y.detach(), "x": x.grad, "weights": weights.grad, **{name: p.grad for name, p in module.named_parameters()}}


def assert_same(ours, truth, limit=1e-5):
    for key, value in truth.items():
        assert ours[key] is not None, f"{key} has no gradient"
        assert ours[key].shape == value.shape and ours[key].dtype == value.dtype, key
        scale = value.double().norm().item() or 1.0
        assert (ours[key].double() - value.double()).norm().item() / scale <= limit, key


ROUTINGS = ["random", "without first and last", "all to one", "to nobody", "duplicates", "sentinels"]


@pytest.mark.parametrize(("layout", "kind"), list(itertools.product(LAYOUTS, ROUTINGS)))
def test_outputs_and_gradients_for_any_layout_and_routing(layout, kind):
    module, spec = experts(layout)
    ids, weights = routing(kind)
    assert_same(run(grouped_experts, module, spec, ids, weights), run(reference_experts, module, spec, ids, weights))


@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_token_or_one_token_keeps_the_graph_and_touches_every_weight(layout, tokens):
    module, spec = experts(layout)
    ids, weights = routing("random", tokens)
    ours = run(grouped_experts, module, spec, ids, weights)
    assert_same(ours, run(reference_experts, module, spec, ids, weights))
    assert all(ours[name] is not None for name, _ in module.named_parameters())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_experts_without_tokens_are_exactly_zero(layout):
    """A grouped GEMM may leave an empty group's result uninitialised."""
    module, spec = experts(layout)
    ids, weights = routing("without first and last")
    run(grouped_experts, module, spec, ids, weights)
    empty = [e for e in range(E) if not (ids == e).any()]
    assert 0 in empty and E - 1 in empty
    for weight in spec.layout.weights():
        grads = nn.ParameterDict({name.replace(".", "_"): module.get_parameter(name).grad for name in weight.names})
        (by_expert,) = (type(weight)(tuple(n.replace(".", "_") for n in weight.names), weight.ops).canonical(grads),)
        assert (by_expert[empty] == 0).all() and by_expert.abs().sum() > 0


def test_nan_in_a_token_or_a_routing_weight_stays_with_its_token():
    module, spec = experts("bias")
    ids, weights = routing("random")
    clean = run(grouped_experts, module, spec, ids, weights)["y"]
    weights[3] = float("nan")
    y = run(grouped_experts, module, spec, ids, weights)["y"]
    assert y[3].isnan().all()
    others = [t for t in range(len(y)) if t != 3]
    assert torch.equal(y[others], clean[others])


def test_a_nan_token_that_nobody_takes_poisons_nothing():
    """A padding token: every id is a sentinel, and its hidden state may be anything."""
    module, spec = experts("bias")
    ids, weights = routing("random")
    ids[5] = -1
    x = torch.randn(len(ids), H)
    x[5] = float("nan")
    x.requires_grad_()
    y = grouped_experts(x, ids, weights.requires_grad_(), ExpertWeights(module, spec, None, torch.float32))
    y.sum().backward()
    assert torch.isfinite(y).all() and (y[5] == 0).all()
    assert torch.isfinite(weights.grad).all() and torch.isfinite(x.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())


@pytest.mark.parametrize(("hidden", "intermediate"), [(16, 16), (16, 8), (8, 16), (7, 5), (12, 10), (64, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_width_also_square_and_unaligned_ones(hidden, intermediate, dtype):
    for layout in ("plain", "transposed interleaved bias", "no gate", "flat"):
        module, spec = experts(layout, hidden=hidden, intermediate=intermediate, dtype=dtype)
        ids, weights = routing("random")
        weights = weights.to(torch.promote_types(dtype, torch.float32))
        ours = run(grouped_experts, module, spec, ids, weights, dtype=dtype)
        assert_same(ours, run(reference_experts, module, spec, ids, weights, dtype=dtype), {torch.bfloat16: 2e-2}.get(dtype, 1e-5))


@pytest.mark.parametrize("count", [1, 3, 5, 24])
def test_any_number_of_experts(count):
    module, spec = experts(experts=count)
    ids, weights = routing("random", top_k=min(2, count), experts=count)
    assert_same(run(grouped_experts, module, spec, ids, weights), run(reference_experts, module, spec, ids, weights))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("kind", ROUTINGS)
def test_input_scaling_and_post_expert_norm(kind, norm):
    module, spec = experts(scale_input=not norm, norm=norm)
    ids, weights = routing(kind)
    assert_same(run(grouped_experts, module, spec, ids, weights), run(reference_experts, module, spec, ids, weights))


@pytest.mark.parametrize("name", FORMULAS)
def test_written_derivatives_are_those_of_autograd(name):
    formula = FORMULAS[name]
    activation = Activation(name, tuple(1.5 + i for i in range(len(formula.numbers))))
    gate, up = (torch.randn(200, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(s)).mul_(3).requires_grad_() for s in (0, 1))
    grad = torch.randn(200, 3, dtype=torch.float64)
    up = up if formula.gated else None
    leaves = [gate, up] if formula.gated else [gate]
    truth = torch.autograd.grad(activation.forward(gate, up), leaves, grad)
    ours = activation.backward(grad, gate, up)
    for a, b in zip(ours, truth, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layout", ["plain", "interleaved", "no gate"])
def test_a_gate_that_only_the_module_knows(layout):
    def own(pre):
        if layout == "no gate":
            return torch.sin(pre)
        gate, up = pre.chunk(2, -1) if layout == "plain" else (pre[..., ::2], pre[..., 1::2])
        return torch.sin(gate) * up

    module, spec = experts(layout, Activation(OWN))
    ids, weights = routing("random")
    ours, truth = (run(compute, module, spec, ids, weights, own) for compute in (grouped_experts, reference_experts))
    assert_same(ours, truth)


def test_only_what_the_backward_needs_is_kept():
    """x, the pre-activation, the routing weights and integers: nothing of the size R x H, and one thing of the size R x 2I."""
    module, spec = experts(hidden=64, intermediate=32)
    ids, weights = routing("random", tokens=50)
    x = torch.randn(50, 64, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        grouped_experts(x, ids, weights.requires_grad_(), ExpertWeights(module, spec, None, torch.float32))
    known = {p.untyped_storage().data_ptr() for p in module.parameters()} | {x.untyped_storage().data_ptr()}
    floats = {t.untyped_storage().data_ptr(): t for t in kept if t.is_floating_point() and t.untyped_storage().data_ptr() not in known}
    assert sorted(t.numel() for t in floats.values()) == [100, 100 * 64]


def test_frozen_weights_cost_no_gradient():
    module, spec = experts("bias")
    module.requires_grad_(False)
    module.down.requires_grad_(True)
    ids, weights = routing("random")
    run(grouped_experts, module, spec, ids, weights)
    assert module.down.grad is not None and module.up.grad is None and module.up_bias.grad is None


@pytest.mark.parametrize("layout", ["plain", "transposed"])
def test_gradients_have_the_memory_order_of_their_weights(layout):
    """Otherwise autograd copies every expert gradient on its way to .grad."""
    module, spec = experts(layout)
    ids, weights = routing("random")
    run(grouped_experts, module, spec, ids, weights)
    assert all(p.grad.is_contiguous() for p in module.parameters())


def test_expert_weights_may_be_views_and_not_contiguous():
    module, spec = experts("plain")
    ids, weights = routing("random")
    truth = run(reference_experts, module, spec, ids, weights)
    for name, p in list(module.named_parameters()):
        big = torch.randn(*p.shape[:-1], 2 * p.shape[-1])
        big[..., : p.shape[-1]] = p.detach()
        setattr(module, name, nn.Parameter(big[..., : p.shape[-1]]))
        assert not getattr(module, name).is_contiguous()
    assert_same(run(grouped_experts, module, spec, ids, weights), truth)


def test_empty_operands_of_the_grouped_products():
    offs = torch.zeros(3, dtype=torch.int32)
    assert rows_times(torch.empty(0, 8), torch.randn(3, 16, 8), offs).shape == (0, 16)
    assert (outer_sums(torch.empty(0, 16), torch.empty(0, 8), offs) == 0).all()


def test_nothing_waits_for_the_device():
    """No operation of forward or backward reads a value on the host."""
    module, spec = experts("transposed interleaved bias")
    ids, weights = routing("sentinels")

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "item", "masked_select"), func
            return func(*args, **(kwargs or {}))

    with Watch():
        run(grouped_experts, module, spec, ids, weights)

"""The `triton` and `quack` backends without a GPU: the references of their kernels, the kernels in Triton's interpreter, a stand-in for QuACK."""

from __future__ import annotations

import importlib.util
import itertools

import fake_quack
import pytest
import test_experts
import torch
from interpreter import needs_triton, passes_in_the_interpreter

from moepatch.errors import BackendUnavailable
from moepatch.experts import fused, quack, quack_calls
from moepatch.experts.activation import FORMULAS, OWN, Activation
from moepatch.experts.fused import fused_experts
from moepatch.experts.quack import quack_experts
from moepatch.experts.reference import reference_experts
from moepatch.experts.routes import sort_routes
from moepatch.experts.spec import ExpertWeights
from moepatch.kernels import biases, combine, routes
from moepatch.kernels.routes import Routing, route, route_reference

LAYOUTS, ROUTINGS, E = test_experts.LAYOUTS, test_experts.ROUTINGS, test_experts.E
FUSED_LAYOUTS = [name for name in LAYOUTS if name != "flat"]
QUACK_LAYOUTS = [name for name in FUSED_LAYOUTS if name != "transposed"]


@pytest.fixture(params=["triton", "quack"])
def backend(request, monkeypatch):
    fake_quack.install(monkeypatch)
    return fused_experts if request.param == "triton" else quack_experts


def assert_same_as_reference(compute, module, spec, ids, weights, limit=1e-5):
    test_experts.assert_same(test_experts.run(compute, module, spec, ids, weights), test_experts.run(reference_experts, module, spec, ids, weights), limit)


@pytest.mark.parametrize(("layout", "kind"), list(itertools.product(LAYOUTS, ROUTINGS)))
def test_outputs_and_gradients_for_any_layout_and_routing(layout, kind):
    module, spec = test_experts.experts(layout)
    assert_same_as_reference(fused_experts, module, spec, *test_experts.routing(kind))


@pytest.mark.parametrize("tuned_from", [0, 1 << 60], ids=["tuned", "as it comes"])
@pytest.mark.parametrize(("layout", "kind"), list(itertools.product(QUACK_LAYOUTS, ROUTINGS)))
def test_quack_for_any_layout_and_routing(layout, kind, tuned_from, monkeypatch):
    """Twice: the first call makes the plans, the second launches them."""
    fake_quack.install(monkeypatch, tuned_from)
    module, spec = test_experts.experts(layout)
    assert quack.why_not_spec(spec) is None
    for _ in range(2):
        assert_same_as_reference(quack_experts, module, spec, *test_experts.routing(kind))
    assert len(quack_calls._PLANS) == 6


@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("layout", QUACK_LAYOUTS)
def test_no_token_or_one_token_keeps_the_graph_and_touches_every_weight(layout, tokens, backend):
    module, spec = test_experts.experts(layout)
    assert_same_as_reference(backend, module, spec, *test_experts.routing("random", tokens))
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("name", FORMULAS)
def test_every_activation(name, backend):
    formula = FORMULAS[name]
    activation = Activation(name, tuple(1.5 + i for i in range(len(formula.numbers))))
    module, spec = test_experts.experts("plain" if formula.gated else "no gate", activation)
    if backend is quack_experts and quack.why_not_spec(spec) is not None:
        pytest.skip(quack.why_not_spec(spec))
    assert_same_as_reference(backend, module, spec, *test_experts.routing("sentinels"))


@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize("form", [{"scale_input": True}, {"norm": True}, {"layout_name": "bias", "scale_input": True}])
def test_input_scaling_and_post_expert_norm(kind, form):
    module, spec = test_experts.experts(**form)
    assert_same_as_reference(fused_experts, module, spec, *test_experts.routing(kind))


def test_rows_that_the_host_knows(backend):
    """Then sentinels have no rows at all."""
    module, spec = test_experts.experts("bias")
    ids, weights = test_experts.routing("sentinels")
    rows = int(((ids >= 0) & (ids < E)).sum())

    def known(x, ids, weights, tensors):
        return backend(x, ids, weights, tensors._replace(rows=rows))

    assert_same_as_reference(known, module, spec, ids, weights)
    nobody = torch.full_like(ids, -1)
    ours = test_experts.run(lambda x, i, w, t: backend(x, i, w, t._replace(rows=0)), module, spec, nobody, weights)
    assert all((value == 0).all() for value in ours.values())


def test_a_nan_token_that_nobody_takes_poisons_nothing(backend):
    module, spec = test_experts.experts("bias")
    ids, weights = test_experts.routing("random")
    ids[5] = -1
    x = torch.randn(len(ids), test_experts.H)
    x[5] = float("nan")
    x.requires_grad_()
    y = backend(x, ids, weights.requires_grad_(), ExpertWeights(module, spec, None, torch.float32))
    y.sum().backward()  # a gradient without strides
    assert (y[5] == 0).all() and all(torch.isfinite(t).all() for t in (y, weights.grad, x.grad, *(p.grad for p in module.parameters())))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    for layout in ("plain", "transposed interleaved bias", "no gate"):
        module, spec = test_experts.experts(layout, dtype=dtype)
        ids, weights = test_experts.routing("sentinels")
        weights = weights.to(torch.promote_types(dtype, torch.float32))
        ours, truth = (test_experts.run(c, module, spec, ids, weights, dtype=dtype) for c in (fused_experts, reference_experts))
        test_experts.assert_same(ours, truth, 2e-2 if dtype == torch.bfloat16 else 1e-10)


def test_bf16_routing_weights_get_bf16_gradients(backend):
    module, spec = test_experts.experts("plain", dtype=torch.bfloat16)
    ids, weights = test_experts.routing("random")
    grads = test_experts.run(backend, module, spec, ids, weights.bfloat16(), dtype=torch.bfloat16)
    assert grads["weights"].dtype == torch.bfloat16 and grads["x"].dtype == torch.bfloat16


@pytest.mark.parametrize("layout", QUACK_LAYOUTS)
def test_only_what_the_backward_needs_is_kept(layout, backend):
    """x, the pre-activation and the routing weights: nothing of the size R x H."""
    module, spec = test_experts.experts(layout, hidden=64, intermediate=32)
    ids, weights = test_experts.routing("random", tokens=50)
    x = torch.randn(50, 64, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        backend(x, ids, weights.requires_grad_(), ExpertWeights(module, spec, None, torch.float32))
    known = {p.untyped_storage().data_ptr() for p in module.parameters()} | {x.untyped_storage().data_ptr()}
    floats = {t.untyped_storage().data_ptr(): t for t in kept if t.is_floating_point() and t.untyped_storage().data_ptr() not in known}
    assert sorted(t.numel() for t in floats.values()) == [100, 100 * (32 if layout == "no gate" else 64)]


@pytest.mark.parametrize("layout", QUACK_LAYOUTS)
def test_autograd_keeps_weight_gradients_without_a_copy(layout, backend, monkeypatch):
    """The memory that the backward pass wrote is the memory of ``.grad``."""
    written = []

    def record(function, result):
        def call(*args, **kwargs):
            out = function(*args, **kwargs)
            written.append(result(args, out).untyped_storage().data_ptr())
            return out

        return call

    monkeypatch.setattr(fused, "weight_gradient", record(fused.weight_gradient, lambda args, out: out))
    monkeypatch.setattr(quack_calls, "outer_sums", record(quack_calls.outer_sums, lambda args, out: args[2]))
    module, spec = test_experts.experts(layout)
    test_experts.run(backend, module, spec, *test_experts.routing("random"))
    assert {module.up.grad.untyped_storage().data_ptr(), module.down.grad.untyped_storage().data_ptr()} == set(written)
    assert all(p.grad.stride() == p.stride() for p in module.parameters())


def test_frozen_weights_cost_no_gradient(backend, monkeypatch):
    module, spec = test_experts.experts("bias")
    module.requires_grad_(False)
    module.down.requires_grad_(True)
    ids, weights = test_experts.routing("random")
    truth = test_experts.run(reference_experts, module, spec, ids, weights)
    ours = test_experts.run(backend, module, spec, ids, weights)
    assert ours["up"] is None and ours["up_bias"] is None and ours["down_bias"] is None
    test_experts.assert_same(ours, {key: value for key, value in truth.items() if value is not None})


def test_weights_that_are_views(backend):
    module, spec = test_experts.experts("plain")
    ids, weights = test_experts.routing("random")
    truth = test_experts.run(reference_experts, module, spec, ids, weights)
    for name, p in list(module.named_parameters()):
        big = torch.randn(*p.shape[:-1], 2 * p.shape[-1])
        big[..., : p.shape[-1]] = p.detach()
        setattr(module, name, torch.nn.Parameter(big[..., : p.shape[-1]]))
    test_experts.assert_same(test_experts.run(backend, module, spec, ids, weights), truth)


def test_a_reason_where_a_backend_does_not_serve():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    _, spec = test_experts.experts("flat")
    assert "CUDA" in quack.why_not(spec, torch.bfloat16, cpu)
    if importlib.util.find_spec("triton") is None:
        assert fused.why_not(spec, torch.bfloat16, gpu) == "not installed (pip install triton)"
    else:
        assert "CUDA" in fused.why_not(spec, torch.bfloat16, cpu)
    assert "triton" in fused.why_not(spec, torch.bfloat16, gpu) or "two parameters" in fused.why_not(spec, torch.bfloat16, gpu)
    reasons = {
        "two parameters": spec,
        "the module's own": test_experts.experts("plain", Activation(OWN))[1],
        "a norm stands": test_experts.experts("plain", norm=True)[1],
        "and the experts have biases": test_experts.experts("bias", scale_input=True)[1],
    }
    assert all(words in fused._why_not_written_out(s) for words, s in reasons.items())
    reasons = {
        "two parameters": spec,
        "QuACK has no own": test_experts.experts("plain", Activation(OWN))[1],
        "QuACK has no geglu": test_experts.experts("plain", Activation("geglu"))[1],
        "scales the tokens": test_experts.experts("plain", scale_input=True)[1],
        "halves of the contiguous axis": test_experts.experts("transposed")[1],
        "divisible by 8, this has 12": test_experts.experts("plain", intermediate=12)[1],
    }
    assert all(words in quack.why_not_spec(s) for words, s in reasons.items())


def test_what_quack_says_is_in_the_error(monkeypatch):
    fake_quack.install(monkeypatch)

    def fails(*args, **kwargs):
        raise RuntimeError("no such tile")

    monkeypatch.setattr(fake_quack.Epilogue, "gemm", fails)
    module, spec = test_experts.experts("plain")
    with pytest.raises(BackendUnavailable, match="RuntimeError: no such tile.*experts='triton'"):
        test_experts.run(quack_experts, module, spec, *test_experts.routing("random"))


# --- kernels -------------------------------------------------------------------------------------------------------------------------

IDS = ["random", "sentinels", "none", "one"]


def slots(kind, tokens, top_k, experts):
    """ids ``[T, K]`` with weights."""
    generator = torch.Generator().manual_seed(tokens * 31 + top_k)
    ids = torch.randint(0, experts, (tokens, top_k), generator=generator)
    if kind == "sentinels":
        ids = torch.randint(-2, experts + 3, (tokens, top_k), generator=generator)
    elif kind != "random":
        ids.fill_(experts if kind == "none" else experts - 1)
    return ids, torch.rand(tokens, top_k, generator=generator) + 0.1


@pytest.mark.parametrize("kind", IDS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_reference_is_sort_routes(kind, dtype):
    ids, weights = slots(kind, 13, 3, 5)
    routing, sorted_ = route_reference(ids.to(dtype), weights, 5), sort_routes(ids, 5)
    for ours, theirs in zip(routing.routes, sorted_, strict=True):
        assert torch.equal(torch.as_tensor(ours).long(), torch.as_tensor(theirs).long())
    assert torch.equal(routing.token_R.long(), sorted_.token_R) and routing.ends[0] == 0


def check_routes():
    """In chunks of 32 slots, so that several parts and several chunks of a part occur."""
    routes._CHUNK, done = 32, 0
    for (tokens, top_k, experts), kind in [((1, 1, 1), "random"), ((7, 2, 1), "sentinels"), *(((30, 3, 3), kind) for kind in IDS)]:
        ids, weights = slots(kind, tokens, top_k, experts)
        for dtype, rows in [(torch.int64, None), (torch.int32, int(((ids >= 0) & (ids < experts)).sum()))]:
            for routes._PROGRAMS in (1, 8):
                got, want = (f(ids.to(dtype), weights, experts, rows) for f in (route, route_reference))
                for name, a, b in zip(Routing._fields[:6], got, want, strict=False):
                    assert a.dtype == b.dtype and torch.equal(a, b), (name, tokens, kind, rows)
                done += 1
    return done


def check_rows():
    """Nobody's rows are NaN, and none may reach a result."""
    done = 0
    for kind, width, experts in [("random", 33, 3), ("sentinels", 32, 5), ("none", 8, 2)]:
        ids, weights = slots(kind, 5, 3, experts)
        routing = route_reference(ids, weights, experts)
        rows, generator = int(routing.ends[-1]), torch.Generator().manual_seed(1)
        x, y, bias = (torch.randn(n, width, generator=generator) for n in (5, 15, experts))
        parts = torch.randn(15, 2, generator=generator)
        y[rows:], parts[rows:] = float("nan"), float("nan")

        def both(name, *args, upto=None, home=combine, **kwargs):
            got, want = (getattr(home, name + suffix)(*args, **kwargs) for suffix in ("", "_reference"))
            got, want = (t if isinstance(t, tuple) else (t,) for t in (got, want))
            for a, b in zip(got, want, strict=True):
                if b is not None:
                    torch.testing.assert_close(a[:upto], b[:upto], rtol=1e-6, atol=1e-6)

        for scaled in (False, True):
            both("gather_tokens", x, routing, scaled, upto=rows)
            both("combine_rows", y, routing, scaled=scaled, bias_EH=bias if scaled else None, numbers_R=parts, numbers_dtype=torch.float32)
            both("combine_rows", y, routing, scaled=scaled, bias_EH=None if scaled else bias)
            both("sum_groups", x, routing, home=biases, of_tokens=True, scaled=scaled, dtype=torch.float32)
            both("sum_groups", torch.nan_to_num(y), routing, home=biases, of_tokens=False, scaled=scaled, dtype=torch.float32)
        both("row_dots", x, routing.token_R, bias, routing.expert_R, routing, upto=rows)
        both("row_dots", y, None, x, routing.token_R, routing, upto=rows)
        biased = biases.add_bias_(y.clone(), bias, routing)
        torch.testing.assert_close(biased[:rows], y[:rows] + bias[routing.expert_R[:rows].long()])
        done += 1
    return done


def check_layers():
    done = 0
    for layout, kind in [("plain", "sentinels"), ("transposed interleaved bias", "random"), ("no gate", "all to one")]:
        module, spec = test_experts.experts(layout, experts=3, hidden=16, intermediate=16)
        assert_same_as_reference(fused_experts, module, spec, *test_experts.routing(kind, tokens=4, experts=3))
        done += 1
    return done


@needs_triton
def test_kernels_in_tritons_interpreter():
    passes_in_the_interpreter(__file__, "24 routes, 3 movements, 3 layers")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_compile_for_hopper():
    """What the interpreter does not see: types, layouts, registers."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.language import float32

    ints = dict.fromkeys(["order_R", "token_R", "row_S", "expert_R", "ends", "a_row_R", "b_row_R"], "*i32")
    pointers = ints | {"ids_S": "*i64"} | dict.fromkeys(["weights_S", "weights_R", "numbers_R", "numbers_TK", "dot_R"], "*fp32")
    sizes = {"SCALED": True, "BIAS": True, "PARTS": 6, "INDEXED": True, "WIDE": float32, "E": 128, "H": 2048, "B": 2880, "K": 8, "ROWS": 32}
    kernels = [(getattr(combine, f"_{name}_kernel"), {"BLOCK": 2048}) for name in ("gather", "combine", "dots")]
    kernels += [(biases._bias_kernel, {"BLOCK": 1024}), (biases._sums_kernel, {"BLOCK": 128}), (routes._route_kernel, {"CHUNK": 4096})]
    for kernel, own in kernels:
        constants = {name: (sizes | own)[name] for name in kernel.arg_names if name.isupper()}
        scalars = {"slots", "rows", "part", "tokens"}
        types = {n: "constexpr" if n in constants else "i32" if n in scalars else pointers.get(n, "*bf16") for n in kernel.arg_names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if types[n].startswith("*")}
        source, options = ASTSource(kernel, types, constants, aligned), {"num_warps": 16 if "CHUNK" in own else 4}
        done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        spilled = done.asm["ptx"].count(".local")
        assert len(done.asm["cubin"]) > 0 and spilled == 0, kernel


if __name__ == "__main__":
    print(f"{check_routes()} routes, {check_rows()} movements, {check_layers()} layers")

"""The `triton` and `quack` backends on a CUDA GPU: numbers three ways, exact sorting, no waiting, repeatable bits."""

from __future__ import annotations

import itertools
import time

import compare
import pytest
import test_experts
import test_experts_fused
import torch
from test_gpu import run

from moepatch import store
from moepatch.experts import fused, quack, quack_calls, quack_tiles
from moepatch.experts.activation import Activation
from moepatch.experts.fused import fused_experts
from moepatch.experts.quack import quack_experts
from moepatch.experts.reference import reference_experts
from moepatch.kernels.combine import combine_rows, gather_tokens
from moepatch.kernels.routes import Routing, route, route_reference

pytestmark = pytest.mark.gpu

SIZES = {"hidden": 256, "intermediate": 128}
OAI = Activation("swiglu_oai", (1.702, 7.0))
#: Three kinds of QuACK's kernels; each costs a compilation of six.
QUACK_CASES = [("plain", None), ("transposed interleaved bias", OAI), ("no gate", None)]


def usable(compute, spec):
    if compute is quack_experts and (reason := quack.why_not(spec, torch.bfloat16, torch.device("cuda", 0))) is not None:
        pytest.skip(reason)
    return compute


def three_ways(compute, layout, activation, kind):
    made = {dtype: test_experts.experts(layout, activation, dtype=dtype, **SIZES) for dtype in (torch.float32, torch.bfloat16)}
    ids, weights = (t.cuda() for t in test_experts.routing(kind, tokens=512))
    module, spec = made[torch.bfloat16]
    usable(compute, spec)
    exact = made[torch.float32][0].cuda()
    exact.load_state_dict(module.state_dict())
    truth = run(reference_experts, exact, spec, ids, weights, torch.float32)
    theirs = run(reference_experts, module.cuda(), spec, ids, weights, torch.bfloat16)
    for _ in range(2):  # the second time along the plans of the first
        ours = run(compute, module, spec, ids, weights, torch.bfloat16)
        errors = {key: (compare.error(ours[key], value), compare.error(theirs[key], value)) for key, value in truth.items()}
        assert all(mine <= max(1.5 * other, 1e-5) for mine, other in errors.values()), errors


@pytest.mark.parametrize(("layout", "kind"), list(itertools.product(test_experts_fused.FUSED_LAYOUTS, test_experts.ROUTINGS)))
def test_triton_three_ways(layout, kind):
    three_ways(fused_experts, layout, None, kind)


@pytest.mark.parametrize("form", [{"scale_input": True}, {"layout_name": "interleaved", "activation": OAI}, {"activation": Activation("geglu")}])
def test_triton_in_fp32_with_rarer_arithmetic(form):
    module, spec = test_experts.experts(**form, **SIZES)
    module.cuda()
    ids, weights = (t.cuda() for t in test_experts.routing("sentinels", tokens=512))
    ours, truth = (run(compute, module, spec, ids, weights, torch.float32) for compute in (fused_experts, reference_experts))
    for key, value in truth.items():
        assert compare.error(ours[key], value) < 2e-3, key  # TF32, if torch's grouped GEMM uses it


@pytest.mark.parametrize(("case", "kind"), list(itertools.product(QUACK_CASES, test_experts.ROUTINGS)))
def test_quack_three_ways(case, kind):
    three_ways(quack_experts, *case, kind)


def test_quack_chooses_tiles_once(monkeypatch, tmp_path, capsys):
    """The first call of a class times a few tilings; another process knows the answer and says nothing. Numbers do not depend on it."""
    monkeypatch.setenv("MOEPATCH_CACHE", str(tmp_path))
    monkeypatch.setattr(quack_tiles, "TRIED", 2)
    module, spec = test_experts.experts("plain", dtype=torch.bfloat16, **SIZES)
    compute = usable(quack_experts, spec)
    ids, weights = (t.cuda() for t in test_experts.routing("sentinels", tokens=4096))
    module.cuda()
    monkeypatch.setattr(quack_calls, "_PLANS", {})
    found = [run(compute, module, spec, ids, weights, torch.bfloat16)]
    said = capsys.readouterr().err
    assert said.count("moepatch: QuACK's tiles") == 6 and len(store.read("quack_tiles.json")) == 6
    for _ in range(2):  # as a new process does, and along the plans
        if len(found) == 1:
            quack_calls._PLANS.clear()
        found.append(run(compute, module, spec, ids, weights, torch.bfloat16))
    assert "moepatch" not in capsys.readouterr().err
    assert all(torch.equal(found[0][key], again[key]) for again in found[1:] for key in again)
    truth = run(fused_experts, module, spec, ids, weights, torch.bfloat16)
    assert all(compare.error(found[0][key], value) < 0.02 for key, value in truth.items())
    with capsys.disabled():
        print("\n" + said)


@pytest.fixture(params=[fused_experts, quack_experts], ids=["triton", "quack"])
def layer(request):
    """A backend with a layer whose plans exist."""
    module, spec = test_experts.experts("plain", dtype=torch.bfloat16, **SIZES)
    compute = usable(request.param, spec)
    ids, weights = (t.cuda() for t in test_experts.routing("sentinels", tokens=512))
    module.cuda()
    run(compute, module, spec, ids, weights, torch.bfloat16)
    return compute, module, spec


def test_nothing_waits_for_the_device(layer):
    compute, module, spec = layer
    ids, weights = (t.cuda() for t in test_experts.routing("sentinels", tokens=512))
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(compute, module, spec, ids, weights, torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_repeated_runs_are_bit_equal(layer):
    compute, module, spec = layer
    ids, weights = (t.cuda() for t in test_experts.routing("random", tokens=512))
    first, second = (run(compute, module, spec, ids, weights, torch.bfloat16) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_dirty_memory_reaches_nothing(layer):
    """Gradients of experts without tokens are exactly 0, and rows of nobody are not read."""
    compute, module, spec = layer
    for kind in ("without first and last", "to nobody", "sentinels"):
        ids, weights = (t.cuda() for t in test_experts.routing(kind, tokens=512))
        dirt = [torch.full((2**n,), float("nan"), device="cuda", dtype=torch.bfloat16) for n in range(8, 27)]
        del dirt
        grads = run(compute, module, spec, ids, weights, torch.bfloat16)
        assert all(torch.isfinite(g).all() for g in grads.values()), kind
        empty = [e for e in range(test_experts.E) if not (ids == e).any()]
        assert all((grads[name][empty] == 0).all() for name, _ in module.named_parameters()), kind
        nobodys = ((ids < 0) | (ids >= test_experts.E)).all(1)
        assert (grads["y"][nobodys] == 0).all() and (grads["x"][nobodys] == 0).all(), kind


def test_gradients_are_kept_without_a_copy(layer):
    """A layer's backward must not need twice the memory of its weights' gradients."""
    compute, _, _ = layer
    module, spec = test_experts.experts("plain", dtype=torch.bfloat16, hidden=2048, intermediate=1024)
    module.cuda()
    ids, weights = (t.cuda() for t in test_experts.routing("random", tokens=64))
    run(compute, module, spec, ids, weights, torch.bfloat16)
    module.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(compute, module, spec, ids, weights, torch.bfloat16)
    grads = sum(p.grad.nbytes for p in module.parameters())
    assert torch.cuda.max_memory_allocated() - before < 1.4 * grads


@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(1, 1, 1), (4096, 8, 128), (8192, 8, 64), (65536, 8, 16), (1000, 22, 512), (3, 4, 5)])
def test_sorting_is_exact(tokens, top_k, experts):
    for kind in test_experts_fused.IDS:
        ids, weights = (t.cuda() for t in test_experts_fused.slots(kind, tokens, top_k, experts))
        for a in (ids, ids.int()):
            got, want = (f(a, weights, experts) for f in (route, route_reference))
            for name, x, y in zip(Routing._fields[:6], got, want, strict=False):
                assert x.dtype == y.dtype and torch.equal(x, y), (name, kind)


def timed(function) -> tuple[float, float]:
    """Microseconds of one call: on the GPU, and on the host."""
    for _ in range(10):
        function()
    graph, (start, end) = torch.cuda.CUDAGraph(), (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.graph(graph):
        for _ in range(20):
            function()
    graph.replay()
    start.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(20):
        function()
    host = (time.perf_counter() - began) / 20
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 20 * 1e3, host * 1e6


@pytest.mark.parametrize(("tokens", "experts"), [(4096, 128), (8192, 64)])
def test_how_fast_rows_move(tokens, experts, capsys):
    """Printed for the record; more than ten times the time that memory needs would be a mistake."""
    ids, weights = (t.cuda() for t in test_experts_fused.slots("random", tokens, 8, experts))
    routing, x = route(ids, weights, experts), torch.randn(tokens, 2048, device="cuda").bfloat16()
    rows = gather_tokens(x, routing)
    lines = []
    for name, function, floor_us in [
        ("route", lambda: route(ids, weights, experts), 10),
        ("gather", lambda: gather_tokens(x, routing), (rows.nbytes + x.nbytes) / 4.0e6),
        ("combine", lambda: combine_rows(rows, routing, scaled=True), (rows.nbytes + x.nbytes) / 4.0e6),
    ]:
        gpu, host = timed(function)
        lines.append(f"  {name} T={tokens} E={experts}: {gpu:.1f} µs on the GPU (memory: {floor_us:.0f}), {host:.1f} µs on the host")
        assert gpu < 10 * floor_us, lines
    with capsys.disabled():
        print("\n" + "\n".join(lines))


def test_triton_serves_here():
    assert fused.why_not(None, torch.bfloat16, torch.device("cuda", 0)) is None

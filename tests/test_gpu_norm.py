"""Norms on a CUDA GPU: numbers and rounding of the kernels, alone and with the residual stream, no waiting, and the speed of memory."""

from __future__ import annotations

import copy
import itertools

import compare
import pytest
import test_norm
import torch
import zoo
from test_norm import FORMS, reference_add, results, tensors

import moepatch
from moepatch import registry
from moepatch.kernels import norm as kernels
from moepatch.layers.norm import NORM, PatchedNorm, reference_norm

pytestmark = pytest.mark.gpu

#: Every form at one width, and the widths of models, odd ones and heads; each pair costs seconds of compilation.
CASES = [(form, (513, 2880)) for form in FORMS] + [
    ("before", (3, 257, 2048)), ("before", (9, 16384)), ("after", (70, 7168)), ("before", (2, 65, 32, 128)), ("silu last", (2, 65, 4, 64)),
    ("silu first, groups", (31, 100)),
]  # fmt: skip


def forked(x, weight, spec):
    return x, reference_norm(x, weight, spec)


def forms(given):
    """Our function, the plain one, what is differentiated and the cotangents, for each way to compute one norm."""
    made, x, weight, gate, dy, dstream = given
    yield kernels.norm, reference_norm, {"x": x, "weight": weight, "gate": gate}, [dy]
    if gate is None:
        yield kernels.add_norm, reference_add, {"x": x, "residual": dstream.flip(0), "weight": weight}, [dstream, dy]
        yield kernels.fork_norm, forked, {"x": x, "weight": weight}, [dstream, dy]


def called(function, spec, leaves, cotangents):
    constant = {"spec": spec, **({"weight": None} if leaves["weight"] is None else {})}
    return results(lambda **given: function(**constant, **given), leaves, cotangents)


@pytest.mark.parametrize(("form", "shape"), CASES, ids=str)
def test_kernels_three_ways(form, shape):
    """fp32 plain torch is the truth; ours in bf16 may be at most 1.5 times as far from it as plain torch in bf16."""
    low = tensors(form, shape, torch.bfloat16, "cuda")
    spec = low[0]
    for ours, plain, leaves, cotangents in forms(low):
        wide = {key: None if t is None else t.float() for key, t in leaves.items()}
        truth = called(plain, spec, wide, [c.float() for c in cotangents])
        theirs = called(plain, spec, leaves, cotangents)
        got = called(ours, spec, leaves, cotangents)
        for key, value in truth.items():
            assert got[key].dtype == theirs[key].dtype and got[key].shape == value.shape
            limit = max(1.5 * compare.error(theirs[key].float(), value), 1e-5)
            assert compare.error(got[key].float(), value) <= limit, (ours.__name__, key)


@pytest.mark.parametrize("form", FORMS)
def test_rounding_is_that_of_plain_torch(form):
    """Sums in another order move a result by a rounding now and then; rounding in another place moves a quarter of them."""
    more = ((torch.float16, torch.float16), (torch.bfloat16, torch.float32)) if form in ("before", "silu last", "after") else ()
    for x_dtype, weight_dtype in ((torch.bfloat16, torch.bfloat16), *more):
        spec, x, weight, gate, *_ = tensors(form, (512, 2880), x_dtype, "cuda", weight_dtype=weight_dtype)
        ours, plain = kernels.norm(x, weight, spec, gate), reference_norm(x, weight, spec, gate)
        assert ours.dtype == plain.dtype and (ours != plain).float().mean() < (0.02 if plain.dtype != torch.float32 else 1.1)
        assert compare.error(ours.float(), plain.float()) < 1e-3


@pytest.mark.parametrize("form", ["zero-centred", "silu first, groups"])
def test_fp32_and_strided_rows(form):
    spec, x, weight, gate, dy, _ = tensors(form, (4, 33, 8, 128), torch.float32, "cuda")
    for cut in (x, torch.cat([x, x], -2)[..., 8:, :], x.transpose(1, 2).contiguous().transpose(1, 2), torch.cat([x, x], -1)[..., x.shape[-1] :]):
        leaves = {"x": cut, "weight": weight, "gate": gate}
        ours, plain = called(kernels.norm, spec, leaves, [dy]), called(reference_norm, spec, leaves, [dy])
        assert all(compare.error(ours[key], plain[key]) < 1e-5 for key in plain)


def test_nothing_waits_and_runs_repeat():
    given = tensors("before", (4099, 2048), torch.bfloat16, "cuda")
    for ours, _, leaves, cotangents in forms(given):
        first = called(ours, given[0], leaves, cotangents)
        torch.cuda.set_sync_debug_mode("error")
        try:
            second = called(ours, given[0], leaves, cotangents)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", ["liger", "te", "quack"])
def test_libraries(name):
    """Each where it is installed: three ways, and in style where it claims to be exact."""
    backend = registry.backend("norm", name)
    for form in ("before", "after", "zero-centred", "no weight"):
        given = tensors(form, (300, 2048), torch.bfloat16, "cuda")
        spec = given[0]
        if (reason := backend.why_not(spec, torch.bfloat16, torch.device("cuda"))) is not None:
            if "installed" in reason:
                pytest.skip(reason)
            continue
        _, plain, leaves, cotangents = next(forms(given))
        leaves.pop("gate")
        truth = called(plain, spec, {key: None if t is None else t.float() for key, t in leaves.items()}, [c.float() for c in cotangents])
        theirs = called(plain, spec, leaves, cotangents)
        got = called(registry.compute("norm", name), spec, leaves, cotangents)
        for key, value in truth.items():
            assert compare.error(got[key].float(), value) <= max(1.5 * compare.error(theirs[key].float(), value), 1e-5), (form, key)
        assert not backend.exact(spec) or (got["output 0"] != theirs["output 0"]).float().mean() < 0.02, form


@pytest.mark.parametrize("name", ["qwen3_moe", "nemotron_h", "qwen3_next", "gpt_oss", "deepseek_v3"])
def test_families_with_fused_layers(name):
    model = zoo.build(name).cuda()
    patched = moepatch.optimize(copy.deepcopy(model), norm="triton", residual="triton")
    assert any(isinstance(m, PatchedNorm) and m._moepatch.backend == "triton" for m in patched.modules())
    (a, da), (b, db) = compare.step(name, model), compare.step(name, patched)
    assert compare.error(b["logits"], a["logits"]) < 1e-4 and compare.together(db, da) < 1e-3


def test_compiles_in_one_piece():
    spec, x, weight, _, dy, _ = tensors("before", (64, 2048), torch.bfloat16, "cuda")

    def block(x, weight):
        total, normed = kernels.add_norm(kernels.norm(x, weight, spec), x, weight, spec)
        return total, kernels.fork_norm(normed, weight, spec)[1]

    leaves = {"x": x, "weight": weight}
    plain, compiled = results(block, leaves, [dy, dy]), results(torch.compile(block, fullgraph=True), leaves, [dy, dy])
    assert all(compare.error(compiled[key].float(), plain[key].float()) < 1e-2 for key in plain)


def microseconds(function, repeat: int = 20) -> float:
    """Of the device, from a graph of calls: the host's time is another question."""
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeat):
            function()
    graph.replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(3):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e3 / (3 * repeat)


def passes(shape):
    """Name, function and number of tensors read and written, of each kernel. Sets of buffers take turns, so that caches do not help."""
    spec = test_norm.spec(shape[-1])

    def random():
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    sets = [(random(), random(), random(), torch.empty(shape, device="cuda", dtype=torch.bfloat16)) for _ in range(max(1, 2**28 // random().nbytes // 4))]
    turns = itertools.cycle(sets)
    weight = torch.randn(shape[-1], device="cuda", dtype=torch.bfloat16)
    rstd = torch.rand(sets[0][0].numel() // shape[-1], device="cuda")

    def forward(add):
        x, other, y, total = next(turns)
        kernels._forward(kernels._Rows(x, spec), other if add else None, weight, None, y, total if add else None, rstd, spec)

    def backward(stream, wants_weight=True):
        x, dy, dstream, _ = next(turns)
        kernels._backward(kernels._Rows(x, spec), dy, dstream if stream else None, weight, None, rstd, spec, wants_weight)

    yield "norm forward", 2, lambda: forward(False)
    yield "add_norm forward", 4, lambda: forward(True)
    yield "norm backward", 3, lambda: backward(False)
    yield "add_norm backward", 4, lambda: backward(True)
    yield "backward, frozen weight", 3, lambda: backward(False, False)


@pytest.fixture(scope="module")
def copy_speed():
    """Bytes per microsecond of a large copy, read and written."""
    source, target = (torch.empty(2**28, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * source.nbytes / microseconds(lambda: target.copy_(source))


@pytest.mark.timing
@pytest.mark.parametrize("shape", [(4096, 2048), (16384, 2048), (8192, 4096), (4096, 7168), (131072, 128)], ids=str)
def test_speed_of_memory(shape, copy_speed, capsys):
    """At least 80 % of a copy's. The table is for people."""
    size, slow = 2 * torch.Size(shape).numel(), []
    lines = [f"{shape}, a copy moves {copy_speed / 1e6:.2f} TB/s"]
    for name, moved, function in passes(shape):
        took = microseconds(function)
        share = moved * size / took / copy_speed
        lines.append(f"    {name:24}{took:8.1f} us {moved * size / took / 1e6:6.2f} TB/s {100 * share:4.0f} %")
        slow += [name] if share < 0.8 else []
    with capsys.disabled():
        print("\n" + "\n".join(lines))
    assert not slow, "\n".join(lines)


@pytest.mark.timing
@pytest.mark.parametrize("shape", [(4096, 2048), (131072, 128)], ids=str)
def test_other_tiles_are_no_faster(shape, capsys, monkeypatch):
    """What `_backward_tile` chooses, against other numbers of rows, warps, programs and stages; a table for people, and a loose limit."""
    backward = next(function for name, _, function in passes(shape) if name == "add_norm backward")
    block = shape[-1]
    took = {"chosen": microseconds(backward)}
    for numbers, warps, crowd, stages in ((2048, 4, 4, 3), (2048, 8, 4, 1), (2048, 8, 4, 2), (4096, 8, 2, 3), (4096, 8, 3, 3), (8192, 16, 1, 3)):
        monkeypatch.setattr(kernels, "_backward_tile", lambda width, gated, tile=(block, numbers // block, warps, crowd, stages): tile)
        took[f"{numbers // block} rows, {warps} warps, {crowd} programs, {stages} stages"] = microseconds(backward)
    with capsys.disabled():
        print(f"\nadd_norm backward {shape}: " + "; ".join(f"{key} {us:.1f} us" for key, us in took.items()))
    assert took["chosen"] < 1.25 * min(took.values())


@pytest.mark.timing
def test_host_time(capsys):
    """What one norm costs the host, forward and backward."""
    import time

    spec, x, weight, *_ = tensors("before", (16, 2048), torch.bfloat16, "cuda")
    x.requires_grad_(), weight.requires_grad_()
    took = {}
    for what in ("forward", "forward and backward"):
        for count in (20, 300):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(count):
                y = kernels.norm(x, weight, spec)
                if what != "forward":
                    y.backward(y)
            took[what] = (time.perf_counter() - start) / count * 1e6
    with capsys.disabled():
        print("\n" + ", ".join(f"{what}: {us:.0f} us of host time" for what, us in took.items()))
    assert took["forward"] < 60


def test_benchmark_call_is_of_the_kind():
    """What `Kind.bench` makes can be run by every backend of the own ones."""
    spec = test_norm.spec(128)
    call = NORM.bench(spec, torch.bfloat16, torch.device("cuda"), torch.Generator().manual_seed(0), 64)
    assert kernels.norm(call.args[0], torch.ones(128, device="cuda", dtype=torch.bfloat16), spec).shape == call.args[0].shape

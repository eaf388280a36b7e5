"""On a CUDA GPU: the activation's kernels and whole MLPs in bf16, three ways; no waiting, one graph, and the speed of a copy."""

from __future__ import annotations

import copy

import compare
import pytest
import test_mlp
import torch

from moepatch.experts.activation import Activation
from moepatch.kernels import gated

pytestmark = pytest.mark.gpu

SWIGLU, RELU2 = Activation("swiglu"), Activation("relu2")


def kernel_inputs(rows, width, form, dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(0)
    pre = torch.randn(rows, width * (1 if form == "none" else 2), generator=generator, device="cuda").to(dtype)
    grad = torch.randn(rows, width, generator=generator, device="cuda").to(dtype)
    return pre, grad, torch.rand(rows, generator=generator, device="cuda")


def three_ways(activation, form, rows, width, up_first=False, weighted=False):
    """fp32 of the same numbers is the truth; the reference rounds once, as the kernel does."""
    pre, grad, weights_R = kernel_inputs(rows, width, form)
    given = {"up_first": up_first, "weights_R": weights_R if weighted else None}

    def both(forward, backward, pre, grad):
        return forward(pre, activation, form, **given), *backward(pre, grad, activation, form, want_h=True, **given)

    truth = both(gated.gated_forward_reference, gated.gated_backward_reference, pre.float(), grad.float())
    theirs = both(gated.gated_forward_reference, gated.gated_backward_reference, pre, grad)
    ours = both(gated.gated_forward, gated.gated_backward, pre, grad)
    for mine, other, exact in zip(ours, theirs, truth, strict=True):
        assert (mine is None) == (exact is None)
        if mine is not None:
            assert mine.dtype == other.dtype
            assert compare.error(mine, exact) <= max(1.5 * compare.error(other, exact), 1e-5)


@pytest.mark.parametrize(("activation", "form", "up_first"), list(test_mlp.arrangements()), ids=str)
def test_kernels_for_every_activation(activation, form, up_first):
    three_ways(activation, form, 333, 200, up_first)


@pytest.mark.parametrize("width", [1407, 1408, 1856])
@pytest.mark.parametrize(("activation", "form"), [(SWIGLU, "concatenated"), (SWIGLU, "interleaved"), (RELU2, "none")], ids=str)
def test_kernels_with_weights_for_any_width(activation, form, width):
    three_ways(activation, form, 1001, width, weighted=True)


def test_rows_that_are_not_there_are_not_touched():
    pre, grad, weights_R = kernel_inputs(1000, 768, "concatenated")
    pre[700:], grad[700:] = torch.nan, torch.nan
    given = {"weights_R": weights_R, "rows": torch.tensor([700], device="cuda")}
    h = gated.gated_forward(pre, SWIGLU, "concatenated", **given)
    dpre, again, dweights = gated.gated_backward(pre, grad, SWIGLU, "concatenated", want_h=True, **given)
    assert all(torch.isfinite(t[:700]).all() for t in (h, dpre, again)) and torch.equal(h[:700], again[:700])
    assert (dweights[700:] == 0).all() and torch.isfinite(dweights).all()


def run(module, x, dtype, grad):
    module = copy.deepcopy(module).to("cuda", dtype)
    x = x.detach().clone().to(dtype).requires_grad_()
    y = module(x)
    y.backward(grad.to(dtype))
    return {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in module.named_parameters()}}


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(("form", "bias"), [("separate", False), ("separate", True), ("interleaved", True), ("concatenated", False), ("none", False)])
def test_bf16_mlps(form, bias, apart):
    three_ways_of_an_mlp("triton", form, bias, apart)


@pytest.mark.parametrize(("form", "bias"), [("separate", False), ("separate", True), ("interleaved", True), ("concatenated", False)])
def test_liger(form, bias):
    pytest.importorskip("liger_kernel")
    three_ways_of_an_mlp("liger", form, bias, apart=False)


def three_ways_of_an_mlp(backend, form, bias, apart):
    module = test_mlp.Mlp(form, bias=bias, hidden=512, width=704).to("cuda", torch.bfloat16)
    generator = torch.Generator("cuda").manual_seed(0)
    x, grad = (torch.randn(4, 300, 512, generator=generator, device="cuda").bfloat16() for _ in range(2))
    truth, theirs = run(module, x, torch.float32, grad), run(module, x, torch.bfloat16, grad)
    test_mlp.patch(module, backend)
    if apart:  # as under FSDP2: each weight in memory of its own
        for p in module.parameters():
            p.data = p.data.clone()
    leaf = x.clone().requires_grad_()
    y = module(leaf)
    y.backward(grad)
    ours = {"y": y.detach(), "x": leaf.grad, **{name: p.grad for name, p in module.named_parameters()}}
    for key, value in truth.items():
        assert compare.error(ours[key], value) <= max(1.5 * compare.error(theirs[key], value), 1e-5), key


def patched(hidden=1024, width=768):
    module = test_mlp.Mlp(hidden=hidden, width=width).to("cuda", torch.bfloat16)
    test_mlp.patch(module, "triton")
    return module, torch.randn(2048, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)


def test_nothing_waits_for_the_device():
    module, x = patched()
    module(x).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        module(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_it_is_one_graph_for_compile(backend):
    module, x = patched()
    leaves = [x, *module.parameters()]
    wanted = module(x)
    grads = torch.autograd.grad(wanted.float().square().mean(), leaves)
    got = torch.compile(module, backend=backend, fullgraph=True)(x)
    assert compare.error(got, wanted) < 1e-2
    for ours, theirs in zip(torch.autograd.grad(got.float().square().mean(), leaves), grads, strict=True):
        assert compare.error(ours, theirs) < 1e-2


def seconds(function, repeats=20):
    """Median of single runs, each over memory that the last one has pushed out of the cache."""
    for _ in range(3):
        function()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    for mark in marks[:-1]:
        mark.record()
        function()
    marks[-1].record()
    torch.cuda.synchronize()
    return sorted(a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False))[repeats // 2] / 1e3


@pytest.mark.timing
@pytest.mark.parametrize(("activation", "form", "width", "weighted"), [
    (SWIGLU, "concatenated", 768, False),
    (SWIGLU, "concatenated", 768, True),
    (Activation("swiglu_oai", (1.702, 7.0)), "interleaved", 2880, True),
    (RELU2, "none", 1856, False),
], ids=str)  # fmt: skip
def test_speed_is_that_of_a_copy(activation, form, width, weighted):
    rows = 32768
    pre, grad, weights_R = kernel_inputs(rows, width, form)
    given = {"weights_R": weights_R if weighted else None}
    source = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy_rate = 2 * source.numel() / seconds(lambda: target.copy_(source))
    moved = 2 * rows * width * (1 if form == "none" else 2)
    forward = (moved + 2 * rows * width) / seconds(lambda: gated.gated_forward(pre, activation, form, **given))
    backward = (2 * moved + 4 * rows * width) / seconds(lambda: gated.gated_backward(pre, grad, activation, form, want_h=True, **given))
    shares = f"forward {forward / copy_rate:.0%}, backward {backward / copy_rate:.0%} of {copy_rate / 1e12:.2f} TB/s"
    print(f"{activation} {form} I={width} weights={weighted}: {shares}")
    assert forward >= 0.8 * copy_rate and backward >= 0.8 * copy_rate

"""The fused loss on a CUDA GPU: numbers by the three-way rule, memory, no waiting, and what it takes."""

from __future__ import annotations

import statistics
import time

import compare
import pytest
import test_loss
import torch
import zoo

from moepatch import registry
from moepatch.kernels import cross_entropy as kernels
from moepatch.layers.loss.chunked import WORKSPACE, Formula, chunk_rows, linear_cross_entropy
from moepatch.layers.loss.reference import linear_cross_entropy as reference

pytestmark = pytest.mark.gpu

GIB = 2**30
QWEN3 = (2048, 151936)


def problem(tokens, hidden, vocab, dtype=torch.bfloat16, bias=False):
    """Hidden states, a weight that makes logits of a few units, bias, labels; leaves on the GPU."""
    g = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(tokens, hidden, generator=g, device="cuda").to(dtype).requires_grad_()
    w = (torch.randn(vocab, hidden, generator=g, device="cuda") * 1.5 / hidden**0.5).to(dtype).requires_grad_()
    b = torch.randn(vocab, generator=g, device="cuda").to(dtype).requires_grad_() if bias else None
    labels = torch.randint(0, vocab, (tokens,), generator=g, device="cuda")
    labels[::7] = -100
    return x, w, b, labels


def gradients(loss, *leaves):
    return [loss.detach(), *torch.autograd.grad(loss, [t for t in leaves if t is not None])]


CASES = {
    "plain": (1024, 256, 32000, Formula(), False),
    "odd vocabulary, bias": (1000, 128, 50257, Formula(), True),
    "softcap, sum": (512, 128, 151936, Formula(softcap=5.0, mean=False), False),
    "scale": (777, 64, 1003, Formula(scale=0.25), False),
    "tiny": (5, 32, 40, Formula(), True),
}


@pytest.mark.parametrize("chunks", [1, 3, 8])
@pytest.mark.parametrize("case", CASES)
def test_three_ways_in_bf16(case, chunks):
    """Plain logits in fp64, plain logits in bf16, and chunks; the eight add up the weight's gradient in fp32."""
    tokens, hidden, vocab, formula, bias = CASES[case]
    x, w, b, labels = problem(tokens, hidden, vocab, bias=bias)
    exact = [t if t is None else t.detach().to(torch.float64 if vocab < 60000 else torch.float32).requires_grad_() for t in (x, w, b)]
    truth = gradients(reference(*exact, labels, formula), *exact)
    theirs = gradients(reference(x, w, b, labels, formula), x, w, b)
    rows = -(-tokens // chunks)
    ours = gradients(linear_cross_entropy(x, w, b, labels, formula, workspace=rows * (vocab + 16) * 2), x, w, b)
    for what, a, z, true in zip(("loss", "hidden", "weight", "bias"), ours, theirs, truth, strict=False):
        assert compare.error(a, true) <= max(1.5 * compare.error(z, true), 1e-5), what


@pytest.mark.parametrize("vocab", [40, 1003, 32000, 50257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_against_its_reference(vocab, dtype):
    g = torch.Generator("cuda").manual_seed(1)
    z = (torch.randn(300, -(-vocab // 16) * 16, generator=g, device="cuda") * 3).to(dtype)
    labels = torch.randint(0, vocab, (300,), generator=g, device="cuda")
    labels[::3] = -100
    for softcap in (None, 4.0):
        results = []
        for function in (kernels.cross_entropy_rows_reference, kernels.launch_rows):
            logits, loss = z.clone()[:, :vocab], torch.empty(300, device="cuda")
            function(logits, labels, loss, torch.tensor(200, device="cuda"), Formula(scale=0.7, softcap=softcap), grads=True)
            results.append((loss, logits.float()))
        for a, true in zip(results[1], results[0], strict=True):
            assert compare.error(a, true) <= (1e-6 if dtype == torch.float32 else 1e-3)


def test_nothing_waits_for_the_device():
    x, w, b, labels = problem(512, 128, 5003, bias=True)

    def step():
        for formula in (Formula(), Formula(mean=False), Formula(softcap=3.0)):
            (linear_cross_entropy(x, w, b, labels, formula, workspace=128 * 5008 * 2) / 3).backward()
        with torch.no_grad():
            linear_cross_entropy(x, w, b, labels, Formula())

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_models_on_the_gpu():
    for name in ("qwen3_moe", "granitemoe"):
        model = zoo.build(name).cuda()
        inputs = {key: value.cuda() for key, value in test_loss.labelled(name, model).items()}
        wanted = test_loss.train(model, **inputs)
        test_loss.patch(model)
        found = test_loss.train(model, **inputs)
        test_loss.check_same(found, wanted, limit=1e-4)
        assert torch.equal(found[0].logits.detach(), wanted[0].logits)


def test_memory_at_16384_tokens():
    """Beyond the inputs and the gradients that result, at the peak of forward and backward. The cuBLAS workspace is not this call's: it is there before."""
    x, w, _, labels = problem(16384, *QWEN3)
    linear_cross_entropy(x[:128], w, None, labels[:128], Formula()).backward()
    x.grad = w.grad = None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_cross_entropy(x, w, None, labels, Formula()).backward()
    peak = torch.cuda.max_memory_allocated() - before - sum(t.grad.nbytes for t in (x, w))
    print(f"\nloss, 16,384 × 151,936, H 2048: {peak / GIB:.3f} GiB at the peak beyond inputs and gradients")
    assert peak < GIB


def test_the_weights_gradient_at_16384_tokens():
    """Five chunks add up in bf16. The truth is in fp32, in slices of tokens."""
    x, w, _, labels = problem(16384, 512, QWEN3[1])
    exact = w.detach().float().requires_grad_()
    theirs = w.detach().clone().requires_grad_()
    count = (labels != -100).sum()
    for start in range(0, 16384, 4096):
        part = slice(start, start + 4096)
        (reference(x[part].detach().float(), exact, None, labels[part], Formula(mean=False)) / count).backward()
    logits = torch.nn.functional.linear(x.detach(), theirs)
    slices = []
    for start in range(0, 16384, 4096):  # the family's gradient of the logits, whole, and one product: what plain logits do with enough memory
        part = slice(start, start + 4096)
        z = logits[part].detach().requires_grad_()
        loss = torch.nn.functional.cross_entropy(z.float(), labels[part], reduction="sum") / count
        slices.append(torch.autograd.grad(loss, z)[0])
    own = torch.cat(slices).t() @ x.detach()
    ours = torch.autograd.grad(linear_cross_entropy(x, w, None, labels, Formula()), w)[0]
    a, z = compare.error(ours, exact.grad), compare.error(own, exact.grad)
    print(f"\nweight's gradient at 16,384 tokens: ours {a:.2e}, plain logits {z:.2e}, ratio {a / z:.2f}")
    assert a <= 1.5 * z


def milliseconds(run, calls=5, rounds=5):
    for _ in range(3):
        run()
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1000 / calls)
    return statistics.median(times)


def test_speed():
    """Forward and backward at Qwen3's shape: this backend, the others that are here, three GEMMs; then the kernel alone."""
    x, w, _, labels = problem(4096, *QWEN3)
    z, dw = torch.empty(4096, QWEN3[1], dtype=x.dtype, device="cuda"), torch.empty_like(w)

    def gemms():
        torch.mm(x, w.t(), out=z)
        torch.mm(z, w)
        torch.mm(z.t(), x, out=dw)

    with torch.no_grad():
        floor = milliseconds(gemms)
    del dw
    print(f"\nloss 4096 × 151,936, H 2048, forward + backward; three GEMMs alone {floor:.2f} ms")
    for name in ("chunked", "reference", "liger", "cce"):
        why_not = registry.backend("loss", name).why_not(None, torch.bfloat16, x.device)
        if why_not is not None:
            print(f"  {name:10} {why_not}")
            continue
        try:
            compute = registry.compute("loss", name)
            took = milliseconds(lambda: torch.autograd.grad(compute(x, w, None, labels, Formula()), (x, w)))  # noqa: B023
            torch.cuda.synchronize()
            base = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            torch.autograd.grad(compute(x, w, None, labels, Formula()), (x, w))
            peak = torch.cuda.max_memory_allocated() - base - x.nbytes - w.nbytes
            print(f"  {name:10} {took:7.2f} ms, {peak / GIB:.2f} GiB beyond inputs and gradients")
        except Exception as error:  # a library that fails here must not hide the others' numbers
            print(f"  {name:10} failed: {type(error).__name__}: {str(error)[:100]}")
            took = None
        if name == "chunked":
            ours = took
    rows = chunk_rows(4096, QWEN3[1], 2, WORKSPACE)
    part, loss = z[:rows], torch.empty(rows, device="cuda")
    part.normal_()
    moved = part.nbytes * 2
    before = kernels._SLICES, kernels._WARPS
    try:
        for slices, warps in ((4, 16), (2, 16), (4, 8), (2, 32), (1, 16)):
            kernels._SLICES, kernels._WARPS = slices, warps
            ms = milliseconds(lambda: kernels.launch_rows(part, labels, loss, None, Formula(scale=1e-3), grads=True))
            print(f"  kernel, {slices} slices, {warps} warps: {ms:.3f} ms for {rows} rows, {moved / ms / 1e9:.2f} TB/s of one read and one write")
    finally:
        kernels._SLICES, kernels._WARPS = before
    assert ours < 1.2 * floor

"""Routers on a CUDA GPU: numbers and choices of the kernels, no waiting, whole modules, and time against the family's code."""

from __future__ import annotations

import time
from types import SimpleNamespace

import compare
import pytest
import torch
import zoo
from test_router import FORMS, check_parts, check_wide_step, chosen, given, spec
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

import moepatch
from moepatch import trial
from moepatch.kernels import router as kernels
from moepatch.layers.router import ROUTER, PatchedRouter, reference_choice, reference_router
from moepatch.match.router import read_router

pytestmark = pytest.mark.gpu

#: Every form at one size, and the sizes of models with odd numbers of tokens; each case costs seconds of compilation.
CASES = [(form, 301, 64, 8) for form in FORMS] + [
    ("softmax, sum 1", 4096, 128, 8), ("softmax, sum 1", 4096, 512, 10), ("softmax", 4095, 8, 2), ("chosen", 1, 128, 4), ("softmax", 4096, 256, 1),
    ("sigmoid, corrected, groups", 4096, 256, 8), ("sigmoid, corrected", 333, 512, 22), ("softmax", 17, 60, 4), ("softmax, sum 1", 65, 1024, 32),
]  # fmt: skip


@pytest.mark.parametrize(("form", "tokens", "experts", "top_k"), CASES, ids=str)
def test_kernels_three_ways(form, tokens, experts, top_k):
    """fp32 plain torch on the same logits is the truth; ours in bf16 may be at most 1.5 times as far from it as plain torch in bf16.

    In fp32 corrected scores may be closer than rounding: there one token in a thousand may choose differently.
    """
    low = given(form, tokens, experts, top_k, torch.bfloat16, "cuda")
    made, logits, correction, dlogits, dweights = low
    wide = (made, logits.float(), correction, dlogits.float(), dweights.to(torch.bfloat16).float())
    for added in (True, False):
        parts = [(*arguments[:3], arguments[3] if added else None, arguments[4]) for arguments in (wide, low)]
        truth, theirs, ours, exact = (
            chosen(reference_choice, *parts[0]), chosen(reference_choice, *parts[1]), chosen(kernels._Router, *parts[1]), chosen(kernels._Router, *parts[0]),
        )  # fmt: skip
        same = [(a["ids"].sort(-1)[0] == truth["ids"].sort(-1)[0]).all(-1) for a in (theirs, ours, exact)]
        assert min(s.float().mean().item() for s in same) >= (1.0 if made.correction is None and not made.groups else 0.999)
        alike = same[0] & same[1] & same[2]
        for key in ("weights", "grad"):
            assert ours[key].dtype == theirs[key].dtype
            limit = max(1.5 * compare.error(theirs[key][alike].float(), truth[key][alike]), 1e-5)
            assert compare.error(ours[key][alike].float(), truth[key][alike].float()) <= limit, key
            assert compare.error(exact[key][alike], truth[key][alike]) <= 1e-5, key


@pytest.mark.parametrize("reads", [("weights", "logits"), ("weights",), ("logits",)], ids="+".join)
@pytest.mark.parametrize(("experts", "top_k", "hidden", "form"), [(256, 8, 7168, "sigmoid, corrected, groups"), (128, 6, 2688, "sigmoid, corrected")], ids=str)
def test_an_fp32_linear_in_bf16_gemms(experts, top_k, hidden, form, reads):
    for weight_dtype, linear in ((torch.bfloat16, "float"), (torch.float32, "float"), (torch.float32, "weight")):
        check_wide_step(257, experts, top_k, hidden, form, reads, device="cuda", weight_dtype=weight_dtype, linear=linear)


def test_an_fp32_number_is_three_in_bf16():
    check_parts("cuda")


@pytest.mark.timing
@pytest.mark.parametrize(("tokens", "experts", "top_k", "hidden"), [(4096, 128, 8, 2048), (16384, 256, 8, 7168), (16384, 512, 10, 2048), (4096, 64, 6, 2688)])
def test_an_fp32_weight_costs_less_than_fp32_gemms(tokens, experts, top_k, hidden, capsys):
    """The bar: half of the time of the family's linear in fp32, forward and backward."""
    made = spec(experts, top_k, hidden, **FORMS["sigmoid, corrected"], linear="float")
    x = torch.randn(tokens, hidden, device="cuda").bfloat16().requires_grad_()
    weight = torch.randn(experts, hidden, device="cuda").mul(0.02).requires_grad_()
    correction, dweights = torch.zeros(experts, device="cuda"), torch.randn(tokens, top_k, device="cuda")
    times = {}
    low = weight.detach().bfloat16().requires_grad_()
    for name, function, held in (("family", reference_router, weight), ("ours", kernels.router, weight), ("ours, bf16", kernels.router, low)):
        forward = lambda f=function, w=held: f(x, w, None, correction, made)
        both = lambda f=forward, w=held: torch.autograd.grad(f()[1], (x, w), dweights)
        times[name] = device_microseconds(forward), device_microseconds(both), host_microseconds(both)
    with capsys.disabled():
        for name, (forward, both, host) in times.items():
            print(f"\nT={tokens} E={experts} H={hidden} {name:10}  device: forward {forward:7.1f}, with backward {both:7.1f} us; host {host:6.1f} us", end="")
    assert times["ours"][1] < 0.5 * times["family"][1]


def test_no_fp32_copy_of_the_tokens_is_kept():
    made = spec(128, 8, 4096, **FORMS["sigmoid, corrected"], linear="float")
    x, weight = torch.randn(4096, 4096, device="cuda").bfloat16().requires_grad_(), torch.randn(128, 4096, device="cuda").bfloat16().requires_grad_()
    before = torch.cuda.memory_allocated()
    results = kernels.router(x, weight, None, torch.zeros(128, device="cuda"), made)
    assert results[0].dtype == torch.float32 and torch.cuda.memory_allocated() - before < 4 * 2**20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ties_go_to_the_lowest_expert(dtype):
    logits = torch.tensor([[1.0, 2, 2, 2, 0, 1], [0.0, -0.0, 0.0, -0.0, -1, -1], [-7.0] * 6, [1, float("inf"), 0, float("nan"), 2, float("-inf")]])
    ids = kernels._Router.apply(logits.to("cuda", dtype), None, spec(6, 4), torch.float32)[2]
    assert ids.tolist() == [[1, 2, 3, 0], [0, 1, 2, 3], [0, 1, 2, 3], [3, 1, 4, 0]]
    many = torch.randint(-3, 4, (4096, 128), generator=torch.Generator().manual_seed(0)).to("cuda", dtype)
    ids = kernels._Router.apply(many, None, spec(128, 8), torch.float32)[2]
    assert torch.equal(ids, many.sort(dim=-1, descending=True, stable=True)[1][:, :8])


def test_nothing_waits_and_runs_repeat():
    given_ = given("softmax, sum 1", 4099, 128, 8, torch.bfloat16, "cuda")
    first = chosen(kernels._Router, *given_)
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = chosen(kernels._Router, *given_)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(first[key], second[key]) for key in first)


def qwen3(experts=128, top_k=8, hidden=2048):
    """A family's router with random weights in bf16, and its patched twin with the same."""
    torch.manual_seed(0)
    module = Qwen3MoeTopKRouter(SimpleNamespace(num_experts_per_tok=top_k, num_experts=experts, hidden_size=hidden, norm_topk_prob=True))
    module.weight.data.normal_(std=0.02)
    twin = Qwen3MoeTopKRouter(SimpleNamespace(num_experts_per_tok=top_k, num_experts=experts, hidden_size=hidden, norm_topk_prob=True))
    twin.load_state_dict(module.state_dict())
    trial.inject(twin, ROUTER.injections(read_router(module, {}), "triton", None))
    return module.to("cuda", torch.bfloat16), twin.to("cuda", torch.bfloat16)


def stepped(module, x, aux=True):
    """A step with a gradient for the weights and one for the logits."""
    logits, weights, ids = module(x)
    loss = (weights * torch.arange(1, ids.shape[1] + 1, device=x.device)).sum() + (logits.float().logsumexp(-1).square().mean() if aux else 0)
    return logits, weights, ids, torch.autograd.grad(loss, (x, module.weight))


def test_the_patched_module_chooses_as_the_family_does():
    theirs, ours = qwen3()
    x = torch.randn(2, 2048, 2048, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    (la, wa, ia, (xa, pa)), (lb, wb, ib, (xb, pb)) = stepped(theirs, x), stepped(ours, x)
    assert torch.equal(la, lb)
    top = la.sort(-1, descending=True)[0]
    distinct = (top[:, :8] != top[:, 1:9]).all(-1)
    assert distinct.float().mean() > 0.3 and torch.equal(ia[distinct], ib[distinct])
    assert compare.error(wb.float(), wa.float()) < 1e-4 and wa.dtype == wb.dtype
    loss = lambda module: (module(x)[1].float() * torch.arange(8, 0, -1, device="cuda"))[distinct].sum()
    for a, b in zip(torch.autograd.grad(loss(theirs), (x, theirs.weight)), torch.autograd.grad(loss(ours), (x, ours.weight)), strict=True):
        assert compare.error(b.float(), a.float()) < 1e-2
    with torch.autocast("cuda", torch.bfloat16):
        assert ours.float()(x.float())[1].dtype == theirs.float()(x.float())[1].dtype == torch.bfloat16


def test_whole_models_take_it():
    for name in ("qwen3_moe", "deepseek_v3"):
        model = zoo.build(name, dtype=torch.bfloat16).cuda()
        moepatch.optimize(model)
        routers = [module for module in model.modules() if isinstance(module, PatchedRouter)]
        assert routers and all("triton" in repr(module) for module in routers)
        outputs, grads = compare.step(name, model)
        assert all(value.isfinite().all() for value in (*outputs.values(), *grads.values()))


def device_microseconds(function, repeat=20):
    """The sum of the device's kernels. Not from a captured graph: a backward pass meets the stream on which its leaves were made."""
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeat):
            function()
        torch.cuda.synchronize()
    return sum(e.time_range.elapsed_us() for e in profiler.events() if e.device_type == DeviceType.CUDA) / repeat


def host_microseconds(function, repeat=100):
    """Of the host, which runs ahead of the device."""
    took = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeat):
            function()
        took.append((time.perf_counter() - start) * 1e6 / repeat)
    return min(took)


@pytest.mark.timing
@pytest.mark.parametrize(("experts", "top_k"), [(128, 8), (512, 10)])
def test_times(experts, top_k, capsys):
    """The table is for people; the bars: less time than the family on the device, 0.6 of it on the host."""
    lines, times = [], {}
    x = torch.randn(4096, 2048, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    for name, module in zip(("family", "ours"), qwen3(experts, top_k), strict=True):
        logits, weights, _ = module(x)
        dweights = torch.randn_like(weights)

        def both(module=module, dweights=dweights):
            torch.autograd.grad(module(x)[1], (x, module.weight), dweights)

        forward, backward = (lambda m=module: m(x)), (lambda w=weights, d=dweights, m=module: torch.autograd.grad(w, (x, m.weight), d, retain_graph=True))
        times[name] = [device_microseconds(both), host_microseconds(both)]
        lines.append(
            f"E={experts} K={top_k} {name:6}  device: forward {device_microseconds(forward):6.1f}, with backward {times[name][0]:6.1f} us;"
            f"  host: forward {host_microseconds(forward):6.1f}, backward {host_microseconds(backward):6.1f} us"
        )
    made = read_router(qwen3(experts, top_k)[0].cpu(), {})
    logits = logits.detach().requires_grad_()
    choose = lambda: kernels._Router.apply(logits, None, made, torch.bfloat16)
    _, weights, ids = choose()
    slope = lambda: torch.autograd.grad(weights, logits, dweights, retain_graph=True)
    saved = SimpleNamespace(saved_tensors=(logits.detach(), ids), spec=made)
    gradient = lambda: kernels._Router.backward(saved, None, dweights, None)
    lines.append(f"E={experts} K={top_k} kernels alone: choice {device_microseconds(choose):.1f}, gradient {device_microseconds(gradient):.1f} us")
    lines.append(f"E={experts} K={top_k} autograd function on the host: forward {host_microseconds(choose):.1f}, backward {host_microseconds(slope):.1f} us")
    with capsys.disabled():
        print("\n" + "\n".join(lines))
    assert times["ours"][0] < times["family"][0] and times["ours"][1] < 0.6 * times["family"][1]

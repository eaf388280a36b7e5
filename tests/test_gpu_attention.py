"""Attention kernels on a CUDA GPU: bf16 against fp32 by the three-way rule, no waiting for the device, and the bars on an H200.

``python tests/test_gpu_attention.py`` prints milliseconds and TFLOP/s of every backend that is there.
"""

from __future__ import annotations

import itertools
import time

import compare
import pytest
import torch
from transformers import masking_utils

from moepatch.layers.attention import attention_function, attention_mask
from moepatch.layers.attention import sink_kernels as sinks_module
from moepatch.layers.attention.function import TRACEABLE, kernels
from moepatch.layers.attention.kernel import first_that_serves
from moepatch.layers.attention.spec import AttentionSpec
from moepatch.trial import LOW_PRECISION_FACTOR

pytestmark = pytest.mark.gpu

S, B = 320, 2
DIMS = {"64": (8, 2, 64, 64), "128": (8, 2, 128, 128), "192/128": (4, 4, 192, 128)}
FORMS = {
    "causal": {},
    "bidirectional": {"causal": False},
    "window": {"window": 100},
    "sinks": {"sinks": True},
    "window sinks": {"window": 100, "sinks": True},
    "softcap": {"softcap": 2.0},
    "packed": {"packed": True},
    "packed window sinks": {"packed": True, "window": 40, "sinks": True},
    "padded": {"padded": True},
    "padded sinks": {"padded": True, "sinks": True},
}
#: FlashAttention 4 compiles every form of every size for seconds: each feature once.
FEW = {("128", "causal"), ("64", "window sinks"), ("192/128", "causal"), ("128", "softcap"), ("64", "packed window sinks")}


def make_mask(form: dict, batch: int, length: int):
    """What transformers would hand to the layers."""
    window, causal = form.get("window"), form.get("causal", True)
    function = masking_utils.causal_mask_function if window is None else masking_utils.sliding_window_causal_mask_function(window)
    options = {"mask_function": function, "device": "cuda"}
    if not causal:
        options |= {"mask_function": masking_utils.bidirectional_mask_function, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": True}
    if form.get("packed"):
        segments = torch.bucketize(torch.arange(length, device="cuda"), torch.tensor([70, 71, 200], device="cuda"), right=True).expand(batch, -1)
        options["mask_function"] = masking_utils.and_masks(function, masking_utils.packed_sequence_mask_function(segments))
        options["allow_is_causal_skip"] = False
    if form.get("padded"):
        real = torch.ones(batch, length, dtype=torch.bool, device="cuda")
        real[0, :90], real[1, -33:] = False, False
        options["attention_mask"] = real
    return attention_mask(batch, length, length, **options)


def tensors(dims, dtype, batch=B, length=S, sinks=False):
    heads, kv_heads, dim, v_dim = dims
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = ((heads, dim), (kv_heads, dim), (kv_heads, v_dim))
    made = [torch.randn(batch, length, h, d, device="cuda", generator=generator).bfloat16().to(dtype).transpose(1, 2) for h, d in shapes]
    made += [torch.randn(heads, device="cuda", generator=generator).bfloat16().to(dtype)] if sinks else []
    return [t.detach().requires_grad_() for t in made]


def call(backend, form, leaves, mask):
    sinks = leaves[3] if len(leaves) > 3 else None
    module = torch.nn.Module()
    module.is_causal = form.get("causal", True)
    return attention_function(backend)(module, *leaves[:3], mask, scaling=leaves[0].shape[-1] ** -0.5, softcap=form.get("softcap"), s_aux=sinks)[0]


def run(backend, form, dims, dtype):
    """Output and gradients, at real tokens."""
    leaves = tensors(dims, dtype, sinks=form.get("sinks", False))
    out = call(backend, form, leaves, make_mask(form, B, S))
    cotangent = torch.randn(out.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    if form.get("padded"):
        cotangent[0, :90], cotangent[1, -33:] = 0, 0
        out = out.masked_fill(cotangent == 0, 0)
    grads = torch.autograd.grad((out.float() * cotangent).sum(), leaves)
    return {"out": out.detach(), **dict(zip(("q", "k", "v", "sinks"), grads, strict=False))}


def leader_or_skip(backend):
    reason = kernels(backend)[0].why_not(None, torch.bfloat16, torch.device("cuda")) if kernels(backend) else None
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("backend", ["cudnn", "te", "fa4", "torch"])
def test_bf16_by_the_three_way_rule(backend):
    leader_or_skip(backend)
    wrong, served, sinks = [], {}, ([], [], [])
    for (size, dims), (name, form) in itertools.product(DIMS.items(), FORMS.items()):
        if backend == "fa4" and (size, name) not in FEW:
            continue
        facts = {key: value for key, value in form.items() if key != "padded"} | {"packed": bool(form.get("packed") or form.get("padded"))}
        spec = AttentionSpec(heads=dims[0], kv_heads=dims[1], head_dim=dims[2], v_head_dim=dims[3], **facts)
        kernel = first_that_serves(kernels(backend), spec, torch.bfloat16, torch.device("cuda"))
        served[size, name] = kernel.name if kernel else "exact"
        try:
            truth, theirs, ours = (run(b, form, dims, t) for b, t in (("reference", torch.float32), ("reference", torch.bfloat16), (backend, torch.bfloat16)))
        except Exception as error:  # one report for all forms
            wrong.append(f"{size} {name} ({served[size, name]}): {type(error).__name__} {str(error).splitlines()[0][:160] if str(error) else ''}")
            continue
        for key, value in truth.items():
            if key == "sinks":  # a number for each head: off by luck, unless all forms are taken together
                for numbers, found in zip(sinks, (truth, theirs, ours), strict=True):
                    numbers.append(found["sinks"].float())
                continue
            limit = max(LOW_PRECISION_FACTOR * compare.error(theirs[key], value), 1e-5)
            error = compare.error(ours[key], value)
            if not error <= limit:
                wrong.append(f"{size} {name} {key} ({served[size, name]}): {error:.1e}, limit {limit:.1e}")
    if sinks[0]:
        exact, theirs, ours = map(torch.cat, sinks)
        if not compare.error(ours, exact) <= LOW_PRECISION_FACTOR * compare.error(theirs, exact):
            wrong.append(f"sinks of all forms: {compare.error(ours, exact):.1e}, the family {compare.error(theirs, exact):.1e}")
    print(backend, served)
    assert not wrong, "\n" + "\n".join(wrong)


def test_fused_kernels_serve_what_they_are_there_for():
    """Falling back would be right, and slow."""
    device, dtype = torch.device("cuda"), torch.bfloat16
    for dims, window in itertools.product(DIMS.values(), (None, 100)):
        spec = AttentionSpec(heads=dims[0], kv_heads=dims[1], head_dim=dims[2], v_head_dim=dims[3], window=window, sinks=True)
        kernel = first_that_serves(kernels("cudnn"), spec, dtype, device)
        print(spec.describe(), kernel.name if kernel else "exact", kernels("cudnn")[0].why_not(spec, dtype, device))
        assert kernel is not None, spec.describe()


def test_the_sinks_kernels_equal_their_references():
    for dim, order in ((64, (0, 1, 2, 3)), (128, (0, 2, 1, 3)), (80, (0, 2, 1, 3))):
        shape = torch.tensor((2, 6, 333, dim))[list(order)].tolist()
        out, grad = (torch.randn(shape, device="cuda").permute(order) for _ in range(2))
        lse, sinks = torch.randn(2, 6, 333, device="cuda"), torch.randn(6, device="cuda") * 3
        ours, ours_lse, wanted, wanted_lse = out.clone(), torch.empty_like(lse), out.clone(), torch.empty_like(lse)
        sinks_module.rescale_on_device(ours, lse, sinks, ours_lse)
        sinks_module._rescale_reference(wanted, lse, sinks, wanted_lse)
        assert compare.error(ours, wanted) < 1e-6 and compare.error(ours_lse, wanted_lse) < 1e-6
        found = sinks_module.gradient_on_device(grad, ours, ours_lse, sinks)
        assert compare.error(found, sinks_module._gradient_reference(grad, wanted, wanted_lse, sinks)) < 1e-5


def test_nothing_waits_for_the_device():
    leaves = tensors(DIMS["64"], torch.bfloat16, batch=1, sinks=True)
    cu = torch.tensor([0, 100, S], dtype=torch.int32, device="cuda")
    masks = [make_mask(FORMS[name], 1, S) for name in ("causal", "window", "packed")]
    masks[2].packing  # noqa: B018  (once a forward, and only where the caller does not say)

    def everything():
        for mask in masks:
            call("cudnn", {}, leaves, mask).sum().backward()
        make_mask(FORMS["causal"], 1, S)
        make_mask(FORMS["window"], 1, S)
        lengths = {"cu_seq_lens_q": cu, "max_length_q": 220}
        attention_function("cudnn")(torch.nn.Module(), *leaves[:3], None, s_aux=leaves[3], **lengths)[0].sum().backward()

    everything()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiled_layers_have_one_graph():
    leaves = tensors(DIMS["64"], torch.bfloat16, batch=1, sinks=True)
    for name in ("causal", "window sinks"):
        mask = make_mask(FORMS[name], 1, S)

        def attend(q, k, v, sinks, mask=mask):
            return call("cudnn", {}, (q, k, v, sinks), mask)

        ours, theirs = torch.compile(attend, fullgraph=TRACEABLE, backend="aot_eager")(*leaves), attend(*leaves)
        assert torch.equal(ours, theirs)
        for a, b in zip(torch.autograd.grad(ours.sum(), leaves), torch.autograd.grad(theirs.sum(), leaves), strict=True):
            assert compare.error(a, b) < 1e-2  # sums of dq in another order


# ------------------------------------------------------------------------------------------------------------------ speed

QWEN3 = (32, 4, 128, 128)
GPT_OSS = (64, 8, 64, 64)
DEEPSEEK = (128, 128, 192, 128)


def milliseconds(run, calls=20):
    for _ in range(5):
        run()
    torch.cuda.synchronize()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1000 / calls)
    return sorted(times)[1]


def timed(backend, dims, form, length=4096):
    """Milliseconds of a forward and backward."""
    leaves = tensors(dims, torch.bfloat16, 1, length, form.get("sinks", False))
    mask = make_mask(form, 1, length)
    grad = torch.randn(1, length, dims[0], dims[3], device="cuda", dtype=torch.bfloat16)
    return milliseconds(lambda: torch.autograd.grad(call(backend, form, leaves, mask), leaves, grad))


def host_microseconds(backend, dims, form):
    """What a forward keeps the host busy for."""
    leaves, mask = tensors(dims, torch.bfloat16, 1, 128, form.get("sinks", False)), make_mask(form, 1, 128)
    call(backend, form, leaves, mask)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(100):
        call(backend, form, leaves, mask)
    spent = (time.perf_counter() - start) * 1e4
    torch.cuda.synchronize()
    return spent


def tflops(ms, dims, length=4096):
    """Forward and backward of causal attention: 2 + 5 matrix products of half the square."""
    heads, _, dim, v_dim = dims
    return heads * length**2 * ((dim + v_dim) + (3 * dim + 2 * v_dim)) / ms / 1e9


def is_h200():
    return "H200" in torch.cuda.get_device_name()


@pytest.mark.timing
def test_bars_on_an_h200():
    if not is_h200():
        pytest.skip("the bars are for an H200")
    rate = tflops(timed("cudnn", QWEN3, {}), QWEN3)
    full, full_sinks = timed("cudnn", GPT_OSS, {}), timed("cudnn", GPT_OSS, {"sinks": True})
    near, near_sinks = timed("cudnn", GPT_OSS, {"window": 128}), timed("cudnn", GPT_OSS, {"window": 128, "sinks": True})
    print(f"GQA 32/4 D=128: {rate:.0f} TFLOP/s; gpt-oss full {full:.3f} -> {full_sinks:.3f} ms with sinks, window 128 {near:.3f} -> {near_sinks:.3f} ms")
    assert rate >= 430
    # A model has as many layers of the one kind as of the other.
    assert full_sinks + near_sinks <= 1.15 * (full + near)


def main():
    """Prints every backend at the shapes of three models."""
    rows = {"Qwen3-30B-A3B": (QWEN3, {}), "gpt-oss full": (GPT_OSS, {}), "gpt-oss full sinks": (GPT_OSS, {"sinks": True})}
    rows |= {"gpt-oss window": (GPT_OSS, {"window": 128}), "gpt-oss window sinks": (GPT_OSS, {"window": 128, "sinks": True}), "DeepSeek-V3": (DEEPSEEK, {})}
    rows |= {"Qwen3 packed": (QWEN3, {"packed": True})}
    for (name, (dims, form)), backend in itertools.product(rows.items(), ("cudnn", "te", "fa4", "torch")):
        reason = kernels(backend)[0].why_not(None, torch.bfloat16, torch.device("cuda")) if kernels(backend) else None
        try:
            if reason is None:
                ms = timed(backend, dims, form)
                host = host_microseconds(backend, dims, form)
                print(f"{name:22} {backend:6} {ms:8.3f} ms  {tflops(ms, dims):6.0f} TFLOP/s if causal  host {host:5.0f} us", flush=True)
            else:
                print(f"{name:22} {backend:6} {reason}", flush=True)
        except Exception as error:
            print(f"{name:22} {backend:6} {type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}", flush=True)


if __name__ == "__main__":
    main()

"""On a CUDA GPU: the same numbers as on the CPU, no waiting for the device, repeatable results."""

from __future__ import annotations

import itertools

import compare
import pytest
import test_experts
import torch
import zoo

import moepatch
from moepatch.errors import MoePatchError
from moepatch.experts.grouped import grouped_experts
from moepatch.experts.reference import reference_experts
from moepatch.experts.spec import ExpertWeights

pytestmark = pytest.mark.gpu

FAMILIES = ["qwen3_moe", "gpt_oss", "nemotron_h", "deepseek_v3", "mixtral", "glm4_moe", "llama4_text", "dbrx", "muse_spark", "longcat_flash", "inkling2_text"]


def run(compute, module, spec, ids, weights, dtype):
    generator = torch.Generator("cuda").manual_seed(3)
    x = torch.randn(ids.shape[0], spec.hidden, generator=generator, device="cuda").to(dtype).requires_grad_()
    weights = weights.clone().requires_grad_()
    module.zero_grad(set_to_none=True)
    y = compute(x, ids, weights, ExpertWeights(module, spec, None, dtype))
    y.backward(torch.randn(y.shape, generator=generator, device="cuda").to(y))
    return {"y": y.detach(), "x": x.grad, "weights": weights.grad, **{name: p.grad for name, p in module.named_parameters()}}


@pytest.mark.parametrize(("layout", "kind"), list(itertools.product(test_experts.LAYOUTS, test_experts.ROUTINGS)))
def test_bf16_experts_for_any_layout_and_routing(layout, kind):
    """Three ways: an fp32 loop, a bf16 loop, and the grouped GEMM."""
    made = {dtype: test_experts.experts(layout, hidden=256, intermediate=128, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    ids, weights = (t.cuda() for t in test_experts.routing(kind, tokens=512))
    module, spec = made[torch.bfloat16]
    exact = made[torch.float32][0].cuda()
    exact.load_state_dict(module.state_dict())
    truth = run(reference_experts, exact, spec, ids, weights, torch.float32)
    theirs = run(reference_experts, module.cuda(), spec, ids, weights, torch.bfloat16)
    ours = run(grouped_experts, module, spec, ids, weights, torch.bfloat16)
    for key, value in truth.items():
        assert compare.error(ours[key], value) <= max(1.5 * compare.error(theirs[key], value), 1e-5), key


@pytest.mark.parametrize("layout", test_experts.LAYOUTS)
def test_gradients_of_experts_without_tokens_are_exactly_zero(layout):
    module, spec = test_experts.experts(layout, hidden=256, intermediate=128, dtype=torch.bfloat16)
    # Dirty memory, so that an unwritten result cannot be 0 by luck.
    torch.full((64 * 2**20,), float("nan"), device="cuda", dtype=torch.bfloat16)
    ids, weights = (t.cuda() for t in test_experts.routing("without first and last", tokens=512))
    grads = run(grouped_experts, module.cuda(), spec, ids, weights, torch.bfloat16)
    rows = {name: grads[name].view(test_experts.E, -1) for name, _ in module.named_parameters()}
    assert all((g[[0, -1]] == 0).all() and torch.isfinite(g).all() for g in rows.values())


def test_nothing_waits_for_the_device():
    module, spec = test_experts.experts("transposed interleaved bias", hidden=256, intermediate=128, dtype=torch.bfloat16)
    module.cuda()
    ids, weights = (t.cuda() for t in test_experts.routing("sentinels", tokens=512))
    run(grouped_experts, module, spec, ids, weights, torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(grouped_experts, module, spec, ids, weights, torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_repeated_runs_are_bit_equal():
    module, spec = test_experts.experts("plain", hidden=256, intermediate=128, dtype=torch.bfloat16)
    module.cuda()
    ids, weights = (t.cuda() for t in test_experts.routing("random", tokens=4096))
    first, second = (run(grouped_experts, module, spec, ids, weights, torch.bfloat16) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_families_on_the_gpu(name, dtype):
    if zoo.available(name) is not None:
        pytest.skip(zoo.available(name))
    model = zoo.build(name, dtype=dtype).cuda()
    with compare.PinnedRouting(model) as pins:
        outputs, _ = compare.step(name, model)
    with compare.PinnedRouting(model, pins):
        moepatch.optimize(model)  # verified against the untouched module, on the GPU
        found, _ = compare.step(name, model)
    assert all(v.ok and v.differences for v in moepatch.report(model).verified), [v.fqn for v in moepatch.report(model).verified if not v.differences]
    limit = 1e-4 if dtype == torch.float32 else 0.1  # numbers are verify's matter
    assert compare.error(found["logits"], outputs["logits"]) < limit


STEPS = ["qwen3_moe", "gpt_oss", "mixtral", "deepseek_v3", "nemotron_h", "glm4_moe", "olmoe"]


def _patched(name):
    """A family's tiny model in bf16 with everything patched, its tokens, and a step that leaves gradients."""
    if zoo.available(name) is not None:
        pytest.skip(zoo.available(name))
    model = zoo.build(name, dtype=torch.bfloat16).cuda()
    model.config.use_cache = False
    moepatch.optimize(model, measure=False, numerics="relaxed")
    ids = torch.randint(3, zoo.VOCAB, (2, 64), generator=torch.Generator().manual_seed(0)).cuda()

    def step():
        model.zero_grad(set_to_none=True)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss

    for _ in range(2):
        step()
    return model, step


@pytest.mark.parametrize("name", STEPS)
def test_a_whole_step_waits_for_nothing(name):
    _, step = _patched(name)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _captured(step):
    """The CUDA graph of a step, after two on another stream, and what the step returned while it was captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    return graph, captured


@pytest.mark.parametrize("name", STEPS)
def test_a_whole_step_as_a_cuda_graph(name):
    """Forward, loss and backward captured once and replayed: nothing in them depends on the host."""
    model, step = _patched(name)
    loss = step().item()
    truth = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    graph, captured = _captured(step)
    for p in model.parameters():
        if p.grad is not None:
            p.grad.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert captured.item() == pytest.approx(loss, rel=1e-3)
    for key, p in model.named_parameters():
        if key in truth:
            assert compare.error(p.grad.float(), truth[key].float()) < 0.02, key


def test_logits_after_replays_are_those_of_the_last_replay():
    """Nobody looks at them while the step is captured, so no replay makes them."""
    model, _ = _patched("qwen3_moe")
    ids = torch.randint(3, zoo.VOCAB, (2, 64), device="cuda")

    def step():
        model.zero_grad(set_to_none=True)
        out = model(input_ids=ids, labels=ids)
        out.loss.backward()
        return out

    graph, captured = _captured(step)
    for seed in range(3):
        ids.copy_(torch.randint(3, zoo.VOCAB, ids.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        with torch.no_grad():
            wanted = model(input_ids=ids).logits
        assert compare.error(captured.logits.float() + 0, wanted.float()) < 0.02
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    with pytest.raises(MoePatchError, match="changed since"):
        captured.logits.sum()


def test_a_launch_refuses_tensors_of_the_host():
    """The second launch of a kind hands addresses to the driver; one of the host's must not be among them."""
    from moepatch.kernels.norm import norm
    from moepatch.layers.norm import NormSpec

    spec = NormSpec(width=256, eps=1e-6, weight="weight", cast="before")
    x, weight = torch.randn(64, 256, device="cuda"), torch.randn(256, device="cuda")
    first = norm(x, weight, spec)
    assert torch.equal(norm(x, weight, spec), first)
    with pytest.raises(ValueError, match="cannot be accessed"):
        norm(x, weight.cpu(), spec)


def test_experts_keep_what_the_report_says():
    """Beside tokens and weights, which others hold: the pre-activation, and the routing of each row."""
    from moepatch.experts.fused import fused_experts

    module, spec = test_experts.experts("plain", hidden=256, intermediate=128, dtype=torch.bfloat16)
    module.cuda()
    ids, weights = (t.cuda() for t in test_experts.routing("random", tokens=512))
    x, kept = torch.randn(512, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True), {}
    held = {t.untyped_storage().data_ptr() for t in (x, ids, weights, *module.parameters())}

    def pack(t):
        kept[t.data_ptr()] = 0 if t.untyped_storage().data_ptr() in held else t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        fused_experts(x, ids, weights.float().requires_grad_(), ExpertWeights(module, spec, None, torch.bfloat16))
    ends = 4 * (spec.num_experts + 1)
    assert sum(kept.values()) == 512 * spec.kept_per_token(ids.shape[1], 2) + ends


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h"])
def test_layers_compiled_with_inductor(name):
    """What `optimize` has patched goes through torch.compile, layer by layer. In fp32, as routing cannot be pinned under the compiler."""
    if zoo.available(name) is not None:
        pytest.skip(zoo.available(name))
    model = zoo.build(name).cuda()
    truth = compare.step(name, model)
    torch._dynamo.reset()
    moepatch.optimize(model, measure=False, numerics="relaxed", compile="regional")
    found = compare.step(name, model)
    assert moepatch.report(model).compiled
    errors = {what: compare.together(ours, own) for what, (ours, own) in compare.parts(model, found, truth).items()}
    assert max(errors.values()) < 1e-3, errors

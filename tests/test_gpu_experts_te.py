"""The `te` and `te_fp8` experts backends with Transformer Engine itself: numbers three ways, memory, a model by name."""

from __future__ import annotations

import itertools
import time

import compare
import pytest
import test_experts
import test_experts_te
import torch
from test_gpu import run

import moepatch
from moepatch.experts import te
from moepatch.experts.activation import Activation
from moepatch.experts.reference import reference_experts
from moepatch.experts.te import te_experts, te_fp8_experts

pytestmark = pytest.mark.gpu

SIZES = {"hidden": 256, "intermediate": 128}
CASES = [("plain", None), ("transposed interleaved bias", Activation("swiglu_oai", (1.702, 7.0))), ("no gate", None)]


@pytest.fixture(autouse=True)
def library():
    if (reason := te.why_not_fp8(None, torch.bfloat16, torch.device("cuda", 0))) is not None:
        pytest.skip(reason)


def rounded(x, ids, weights, tensors):
    return test_experts_te.rounded_reference(x, ids, weights, tensors)


@pytest.mark.parametrize(("compute", "theirs_as"), [(te_experts, reference_experts), (te_fp8_experts, rounded)], ids=["bf16", "fp8"])
@pytest.mark.parametrize(("case", "kind"), list(itertools.product(CASES, test_experts.ROUTINGS)))
def test_three_ways(case, kind, compute, theirs_as):
    layout, activation = case
    made = {dtype: test_experts.experts(layout, activation, dtype=dtype, **SIZES) for dtype in (torch.float32, torch.bfloat16)}
    ids, weights = (t.cuda() for t in test_experts.routing(kind, tokens=512))
    module, spec = made[torch.bfloat16]
    exact = made[torch.float32][0].cuda()
    exact.load_state_dict(module.state_dict())
    truth = run(reference_experts, exact, spec, ids, weights, torch.float32)
    theirs = run(theirs_as, module.cuda(), spec, ids, weights, torch.bfloat16)
    ours = run(compute, module, spec, ids, weights, torch.bfloat16)
    errors = {key: (compare.error(ours[key], value), compare.error(theirs[key], value)) for key, value in truth.items()}
    assert all(mine <= max(1.5 * other, 1e-5) for mine, other in errors.values()), errors
    empty = [e for e in range(test_experts.E) if not (ids == e).any()]
    assert all((ours[name][empty] == 0).all() for name, _ in module.named_parameters())


@pytest.mark.parametrize("compute", [te_experts, te_fp8_experts], ids=["bf16", "fp8"])
def test_dirty_memory_and_memory(compute):
    module, spec = test_experts.experts("plain", dtype=torch.bfloat16, hidden=2048, intermediate=1024)
    module.cuda()
    ids, weights = (t.cuda() for t in test_experts.routing("sentinels", tokens=64))
    dirt = [torch.full((2**n,), float("nan"), device="cuda", dtype=torch.bfloat16) for n in range(8, 27)]
    del dirt
    assert all(torch.isfinite(g).all() for g in run(compute, module, spec, ids, weights, torch.bfloat16).values())
    module.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(compute, module, spec, ids, weights, torch.bfloat16)
    assert torch.cuda.max_memory_allocated() - before < (1.5 if compute is te_experts else 3) * sum(p.grad.nbytes for p in module.parameters())


def test_the_host_waits_once(monkeypatch):
    module, spec = test_experts.experts("plain", dtype=torch.bfloat16, **SIZES)
    ids, weights = (t.cuda() for t in test_experts.routing("sentinels", tokens=512))
    module.cuda()
    run(te_fp8_experts, module, spec, ids, weights, torch.bfloat16)
    real = te.groups_of

    def allowed(*args, **kwargs):
        torch.cuda.set_sync_debug_mode("default")
        found = real(*args, **kwargs)
        torch.cuda.set_sync_debug_mode("error")
        return found

    monkeypatch.setattr(te, "groups_of", allowed)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(te_fp8_experts, module, spec, ids, weights, torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["te", "te_fp8"])
def test_a_model_by_name(name):
    model = test_experts_te.mixtral().to("cuda", torch.bfloat16)
    ids = torch.randint(0, 64, (2, 128), generator=torch.Generator().manual_seed(1)).cuda()
    before = model(ids).logits
    moepatch.optimize(model, experts=name, dense=False, numerics="relaxed", measure=False)
    (verified,) = moepatch.report(model).verified
    print([(d.what, round(d.ours, 4), round(d.limit, 4)) for d in verified.differences])
    assert verified.ok and verified.backend == name
    out = model(ids, labels=ids)
    assert compare.error(out.logits, before) < 0.2
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert torch.equal(moepatch.restore(model)(ids).logits, before)


def test_how_fast(capsys):
    """Printed for the record."""
    lines = []
    for tokens, experts in ((4096, 128), (8192, 16)):
        module, spec = test_experts.experts("plain", dtype=torch.bfloat16, experts=experts, hidden=2048, intermediate=768)
        module.cuda()
        ids = (torch.arange(tokens * 8, device="cuda").view(tokens, 8) * 5) % experts
        weights = torch.rand(tokens, 8, device="cuda")
        for name, compute in (("te", te_experts), ("te_fp8", te_fp8_experts)):
            for _ in range(3):
                run(compute, module, spec, ids, weights, torch.bfloat16)
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(5):
                run(compute, module, spec, ids, weights, torch.bfloat16)
            torch.cuda.synchronize()
            lines.append(f"  {name} T={tokens} E={experts}: {(time.perf_counter() - start) * 200:.2f} ms forward and backward, the caller's part included")
    with capsys.disabled():
        print("\n" + "\n".join(lines))

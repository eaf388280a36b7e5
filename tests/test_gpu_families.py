"""On a CUDA GPU: whole families with every backend that can run there, against the unpatched model, three ways, with pinned routing."""

from __future__ import annotations

import time

import compare
import pytest
import torch
import zoo
from test_families_backends import rounds

import moepatch
from moepatch.carrying_out import apply, relayout
from moepatch.kinds import KINDS
from moepatch.surgery import Journal

pytestmark = pytest.mark.gpu

FAMILIES = [
    "qwen3_moe", "gpt_oss", "nemotron_h", "deepseek_v3", "mixtral", "glm4_moe", "llama4_text", "qwen3_next", "gemma4_text", "olmoe",
    "granitemoehybrid", "jamba",
]  # fmt: skip
#: In fp32 the family's own kernels and ours sum in another order on a GPU, and nothing says which is closer to the truth.
FP32_LIMIT = 1e-4
#: Tiny models magnify single roundings, so errors in low precision are compared over several models.
SEEDS = 3


def plans(made):
    """The plan as it is made and the rounds."""
    yield made
    yield from rounds(made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_backend_on_the_gpu(name, dtype):
    if zoo.available(name) is not None:
        pytest.skip(zoo.available(name))
    if dtype == torch.float32:
        _fp32(name)
    else:
        _bf16(name)


def _fp32(name):
    model = zoo.build(name).cuda()
    with compare.PinnedRouting(model) as pins:
        truth = compare.step(name, model)
    for i, chosen in enumerate(plans(_plan(model))):
        with compare.PinnedRouting(model, pins):
            found = _patched_step(name, model, chosen, i)
        errors = {what: compare.together(ours, own) for what, (ours, own) in compare.parts(model, found, truth).items()}
        assert max(errors.values()) <= FP32_LIMIT, (_backends(chosen), errors)


def _bf16(name):
    """Ours against fp32, divided by the family's own against fp32, over all seeds."""
    models = [(zoo.build(name, seed=seed).cuda(), zoo.build(name, dtype=torch.bfloat16, seed=seed).cuda()) for seed in range(SEEDS)]
    known = []
    for exact, model in models:
        with compare.PinnedRouting(exact) as pins:
            truth = compare.step(name, exact)
        with compare.PinnedRouting(model, pins):
            known.append((model, pins, truth, compare.step(name, model)))
    failed = []
    for i, chosen in enumerate(plans(_plan(models[0][1]))):
        ours, theirs = [], []
        for model, pins, truth, own in known:
            with compare.PinnedRouting(model, pins):
                found = _patched_step(name, model, chosen, i)
            groups = compare.parts(model, found, own, truth)
            ours.append({what: compare.together(a, c) ** 2 for what, (a, _, c) in groups.items()})
            theirs.append({what: compare.together(b, c) ** 2 for what, (_, b, c) in groups.items()})
        ratios = {what: (sum(e[what] for e in ours) / max(sum(e[what] for e in theirs), 1e-10)) ** 0.5 for what in ours[0]}
        print(f"    {({what: round(ratio, 2) for what, ratio in ratios.items()})}")
        if not max(ratios.values()) <= 1.5:
            failed.append((_backends(chosen), ratios))
    assert not failed, failed


def _plan(model):
    return moepatch.plan(model, numerics="relaxed", measure=False)


def _patched_step(name, model, chosen, index):
    journal = Journal()
    start = time.perf_counter()
    try:
        apply(model, chosen, journal)
        relayout(model, chosen, journal)
        return compare.step(name, model)
    finally:
        journal.undo()
        torch.cuda.synchronize()
        print(f"  {name} round {index}, {time.perf_counter() - start:.1f} s: {_backends(chosen)}")


def _backends(chosen):
    used = dict.fromkeys((KINDS[p.site.kind].backends, p.backend) for p in chosen.patterns if p.backend)
    return ", ".join(f"{table}={backend}" for table, backend in used)

"""The `te` and `te_fp8` backends over a stand-in for Transformer Engine: plumbing, padding, gradients, verification."""

from __future__ import annotations

import itertools

import compare
import fake_te_grouped
import pytest
import test_experts
import test_experts_fused
import torch
from torch import nn
from torch.nn import functional as F
from transformers import MixtralConfig, MixtralForCausalLM

import moepatch
from moepatch.errors import BackendUnavailable
from moepatch.experts import te
from moepatch.experts.activation import FORMULAS, Activation
from moepatch.experts.reference import reference_experts
from moepatch.experts.spec import ExpertWeights
from moepatch.experts.te import te_experts, te_fp8_experts
from moepatch.experts.te_rounding import round_products
from moepatch.layers.fp8 import rounded_linear

E, FUSED_LAYOUTS = test_experts.E, test_experts_fused.FUSED_LAYOUTS
FP8 = {"hidden": 32, "intermediate": 48}


@pytest.fixture(autouse=True)
def library(monkeypatch):
    fake_te_grouped.install(monkeypatch)
    yield fake_te_grouped


def rounded_reference(x, ids, weights, tensors):
    """The reference loop with products rounded as FP8 GEMMs round them."""

    class Loop(nn.Module):
        def forward(self):
            return reference_experts(x, ids, weights, tensors)

    return round_products(Loop())()


@pytest.mark.parametrize(("layout", "kind"), list(itertools.product(FUSED_LAYOUTS, test_experts.ROUTINGS)))
def test_outputs_and_gradients_for_any_layout_and_routing(layout, kind, library):
    module, spec = test_experts.experts(layout)
    test_experts_fused.assert_same_as_reference(te_experts, module, spec, *test_experts.routing(kind))
    assert len(library.calls) == (0 if kind == "to nobody" else 6) and not any(fp8 for *_, fp8 in library.calls)


@pytest.mark.parametrize("kind", test_experts.ROUTINGS)
@pytest.mark.parametrize("layout", FUSED_LAYOUTS)
def test_fp8_rounds_each_operand_once_and_pads_each_group(layout, kind, library):
    """fp32 sums over rounded operands: the loop over rounded products computes the same, but for numbers on the edge of a rounding."""
    module, spec = test_experts.experts(layout, **FP8)
    ids, weights = test_experts.routing(kind, tokens=40)
    ours = test_experts.run(te_fp8_experts, module, spec, ids, weights)
    theirs, truth = (test_experts.run(c, module, spec, ids, weights) for c in (rounded_reference, reference_experts))
    for key, value in truth.items():
        mine, other = (compare.error(found[key], value) for found in (ours, theirs))
        assert mine <= max(1.5 * other, 1e-5), (key, mine, other)
    assert kind == "to nobody" or compare.error(ours["y"], truth["y"]) > 0.005
    assert all(fp8 and all(rows % 16 == 0 for rows in splits) for _, splits, fp8 in library.calls)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("compute", [te_experts, te_fp8_experts])
def test_every_activation(name, compute):
    formula = FORMULAS[name]
    module, spec = test_experts.experts("plain" if formula.gated else "no gate", Activation(name, tuple(1.5 + i for i in range(len(formula.numbers)))), **FP8)
    ids, weights = test_experts.routing("sentinels")
    if compute is te_experts:
        test_experts_fused.assert_same_as_reference(compute, module, spec, ids, weights)
    else:
        y = test_experts.run(compute, module, spec, ids, weights)["y"]
        assert 0 < compare.error(y, test_experts.run(reference_experts, module, spec, ids, weights)["y"]) < 0.2


@pytest.mark.parametrize("kind", ["random", "sentinels"])
def test_input_scaling_and_few_tokens(kind):
    module, spec = test_experts.experts(scale_input=True)
    test_experts_fused.assert_same_as_reference(te_experts, module, spec, *test_experts.routing(kind))
    for tokens in (0, 1):
        module, spec = test_experts.experts("bias")
        test_experts_fused.assert_same_as_reference(te_experts, module, spec, *test_experts.routing(kind, tokens))


def test_a_nan_token_that_nobody_takes_poisons_nothing():
    module, spec = test_experts.experts("bias", **FP8)
    ids, weights = test_experts.routing("random")
    ids[5] = -1
    x = torch.randn(len(ids), spec.hidden)
    x[5] = float("nan")
    x.requires_grad_()
    for compute in (te_experts, te_fp8_experts):
        y = compute(x, ids, weights.requires_grad_(), ExpertWeights(module, spec, None, torch.float32))
        y.sum().backward()
        assert (y[5] == 0).all() and all(torch.isfinite(t).all() for t in (y, weights.grad, x.grad, *(p.grad for p in module.parameters())))


def test_only_what_the_backward_needs_is_kept():
    module, spec = test_experts.experts("plain", hidden=64, intermediate=32)
    ids, weights = test_experts.routing("random", tokens=50)
    x, kept = torch.randn(50, 64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        te_fp8_experts(x, ids, weights.requires_grad_(), ExpertWeights(module, spec, None, torch.float32))
    known = {p.untyped_storage().data_ptr() for p in module.parameters()} | {x.untyped_storage().data_ptr()}
    floats = {t.untyped_storage().data_ptr(): t for t in kept if t.is_floating_point() and t.untyped_storage().data_ptr() not in known}
    assert sorted(t.numel() for t in floats.values()) == [100, 100 * 64]


def test_products_of_a_family_are_rounded_whatever_they_are_called():
    generator = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(shape, generator=generator) for shape in ((5, 8), (4, 8), (4,)))
    y = {
        "linear": lambda: F.linear(x, w, b) - b,
        "@": lambda: x @ w.T,
        "matmul": lambda: torch.matmul(x, w.T),
        "mm": lambda: x.mm(w.T),
        "bmm": lambda: torch.bmm(x[None], w.T[None])[0],
        "3 @": lambda: (x[None] @ w.T[None])[0],
    }
    for name, product in y.items():
        family = nn.Module()
        family.__class__ = type("Family", (nn.Module,), {"forward": lambda self, product=product: product()})
        torch.testing.assert_close(round_products(family)(), rounded_linear(x, w), msg=name)
    assert "rounded to FP8" in repr(round_products(type("Family", (nn.Module,), {})()))


def mixtral():
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, vocab_size=64
    )
    return MixtralForCausalLM(config)


@pytest.mark.parametrize("name", ["te", "te_fp8"])
def test_a_model_by_name(name, monkeypatch, library):
    library.install(monkeypatch, everywhere=True)
    model, ids = mixtral(), torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    before = model(ids).logits
    moepatch.optimize(model, experts=name, dense=False, numerics="relaxed")
    (verified,) = moepatch.report(model).verified
    assert verified.ok and verified.backend == name
    after = model(ids, labels=ids)
    assert compare.error(after.logits, before) < (0.1 if name == "te_fp8" else 1e-5)
    after.loss.backward()
    assert any(fp8 for *_, fp8 in library.calls) == (name == "te_fp8")
    assert torch.equal(moepatch.restore(model)(ids).logits, before)


def test_it_is_never_chosen_and_says_what_it_lacks(monkeypatch, library):
    assert "not installed" in te.why_not(None, torch.bfloat16, torch.device("cpu"))
    with pytest.raises(BackendUnavailable, match="moepatch\\[te\\]"):
        moepatch.optimize(mixtral(), experts="te", dense=False)
    library.install(monkeypatch, everywhere=True)
    model = moepatch.optimize(mixtral(), dense=False, numerics="relaxed")
    assert moepatch.report(model).plan.mixture[0].backend not in ("te", "te_fp8")
    _, spec = test_experts.experts("plain")
    assert "divisible by 16" in te.why_not_fp8(spec, torch.float32, torch.device("cpu"))

"""Undoing: optimize and restore are each other's inverse, at any time and after any failure."""

from __future__ import annotations

import copy

import compare
import pytest
import torch
import zoo
from facts import facts

import moepatch
from moepatch import api, surgery


def of_experts(model):
    """The verification of what is part of the mixture of experts."""
    return [v for v in moepatch.report(model).verified if v.pattern.startswith("experts")]


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "nemotron_h", "llama4_text", "jetmoe", "dbrx", "gemma4_text"])
def test_restore_gives_back_classes_parameters_hooks_and_flags(name):
    model = zoo.build(name)
    next(model.parameters()).requires_grad_(False)
    model.register_forward_hook(lambda *args: None)
    before = facts(model)
    assert moepatch.optimize(model) is model
    assert facts(model) != before
    assert moepatch.restore(model) is model
    assert facts(model) == before


def test_restore_after_training_keeps_the_trained_weights(qwen3):
    classes = [type(m) for m in qwen3.modules()]
    parameters = [id(p) for p in qwen3.parameters()]
    moepatch.optimize(qwen3)
    optimizer = torch.optim.SGD(qwen3.parameters(), lr=0.1)
    compare.step("qwen3_moe", qwen3)
    optimizer.step()
    trained = {key: value.clone() for key, value in qwen3.state_dict().items()}
    grads = [p.grad for p in qwen3.parameters()]
    moepatch.restore(qwen3)
    assert [type(m) for m in qwen3.modules()] == classes and [id(p) for p in qwen3.parameters()] == parameters
    assert all(torch.equal(value, trained[key]) for key, value in qwen3.state_dict().items())
    assert all(p.grad is g for p, g in zip(qwen3.parameters(), grads, strict=True))
    compare.step("qwen3_moe", qwen3)
    optimizer.step()


def test_optimize_restore_optimize(qwen3):
    moepatch.optimize(qwen3)
    first = facts(qwen3)["classes"]
    moepatch.restore(qwen3)
    moepatch.optimize(qwen3, experts="reference")
    assert facts(qwen3)["classes"] == first
    assert {p.backend for p in moepatch.report(qwen3).plan.mixture} == {"reference"}


def test_optimize_twice_is_a_no_op_with_a_note(qwen3):
    moepatch.optimize(qwen3)
    before = facts(qwen3)
    with pytest.warns(UserWarning, match="patched already, nothing was changed"):
        assert moepatch.optimize(qwen3) is qwen3
    assert facts(qwen3) == before
    assert any("patched already" in note for note in moepatch.report(qwen3).notes)


def test_restore_and_report_of_an_unpatched_model_say_so(qwen3):
    with pytest.warns(UserWarning, match="not patched; nothing to do"):
        assert moepatch.restore(qwen3) is qwen3
    with pytest.raises(moepatch.MoePatchError, match="not patched. Call moepatch.optimize"):
        moepatch.report(qwen3)
    wrapper = torch.nn.Sequential(moepatch.optimize(qwen3))
    with pytest.raises(moepatch.MoePatchError, match=r"'0' inside it is"):
        moepatch.report(wrapper)


@pytest.mark.parametrize("failing", [0, 1, 9, "Look", "Adjacent", "WatchModule", -1])
def test_an_exception_in_the_middle_of_apply_leaves_the_model_untouched(monkeypatch, failing):
    """Experts, the attention function, dense modules, the model itself, weights that move, then what is watched: any step may fail."""
    model = zoo.build("qwen3_moe")
    before, attention = facts(model), model.config._attn_implementation
    steps = api.patch_of(moepatch.optimize(copy.deepcopy(model), verify=False)).journal.steps
    kinds = [type(step).__name__ for step in steps]
    assert len(steps) > 16 and set(kinds) == {"InjectClass", "Look", "Adjacent", "WatchModule"}
    failing, done = kinds.index(failing) + 1 if failing in kinds else failing % len(steps), []
    do = surgery.Journal.do

    def breaks(journal, step):
        if len(done) == failing:
            raise KeyboardInterrupt("pulled the plug")
        done.append(step)
        do(journal, step)

    monkeypatch.setattr(surgery.Journal, "do", breaks)
    with pytest.raises(KeyboardInterrupt, match="pulled the plug"):
        moepatch.optimize(model, verify=False)
    assert len(done) == failing and facts(model) == before and model.config._attn_implementation == attention


def test_a_backend_that_computes_something_else_is_caught_and_rolled_back(qwen3):
    @moepatch.register_backend("experts", "wrong", rank=-1)
    def wrong():
        from moepatch.experts.reference import reference_experts

        return lambda *args: reference_experts(*args) * 1.001

    before = facts(qwen3)
    try:
        words = r"layers\.0\.mlp\.experts.*'wrong' does not compute.*output 1\.0e-03 \(limit 1\.0e-05\).*rolled back"
        with pytest.raises(moepatch.NumericMismatch, match=words):
            moepatch.optimize(qwen3, experts="wrong")
        assert facts(qwen3) == before
        moepatch.optimize(qwen3, experts="wrong", verify=False)
        assert "not verified" in moepatch.report(qwen3).notes[0]
    finally:
        moepatch.registry.unregister("wrong", "experts")


def test_verification_leaves_weights_gradients_and_random_state_alone(qwen3):
    compare.step("qwen3_moe", qwen3)
    grads = [p.grad.clone() for p in qwen3.parameters()]
    state, weights = torch.get_rng_state(), copy.deepcopy(qwen3.state_dict())
    moepatch.optimize(qwen3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p.grad, g) for p, g in zip(qwen3.parameters(), grads, strict=True))
    assert all(torch.equal(value, weights[key]) for key, value in qwen3.state_dict().items())
    (verified,) = of_experts(qwen3)
    assert verified.ok and {d.what for d in verified.differences} >= {"output", "grad input 0", "grad input 1", "grad gate_up_proj", "grad down_proj"}


def test_verification_of_many_experts_tries_some_of_them(monkeypatch, qwen3):
    monkeypatch.setattr(moepatch.verify, "_WEIGHTS_LIMIT", 1)
    moepatch.optimize(qwen3)
    (verified,) = of_experts(qwen3)
    assert verified.ok and verified.note == "tried on a part of it: E=2 H=64 I=48 swiglu"


@pytest.mark.parametrize("name", ["gpt_oss", "nemotron_h", "llama4_text", "dbrx", "jetmoe", "muse_spark"])
def test_verification_of_a_part_serves_every_layout(monkeypatch, name):
    if zoo.available(name) is not None:
        pytest.skip(zoo.available(name))
    monkeypatch.setattr(moepatch.verify, "_WEIGHTS_LIMIT", 1)
    model = moepatch.optimize(zoo.build(name))
    assert of_experts(model) and all(v.ok and v.differences and "E=2" in v.note for v in of_experts(model))


def test_as_many_experts_as_a_width_is_wide(monkeypatch):
    """Qwen3-Next has 512 experts of width 512: a size with two meanings is scaled in both."""
    monkeypatch.setattr(moepatch.verify, "_WEIGHTS_LIMIT", 1)
    model = zoo.build("qwen3_next", num_experts=160, moe_intermediate_size=160)
    moepatch.optimize(model)
    assert "E=128 H=64 I=128" in of_experts(model)[0].note


def test_a_model_on_the_meta_device_is_patched_without_verification():
    with torch.device("meta"):
        model = zoo._model_class(zoo.entry("qwen3_moe"))._from_config(zoo.config("qwen3_moe"))
    moepatch.optimize(model)
    report = moepatch.report(model)
    assert [len(p.sites) for p in report.plan.mixture] == [2] and report.patched > 2
    assert all(not v.differences and "no weights yet" in v.note for v in report.verified)
    assert len(report.verified) == len(report.plan.patterns) and "no weights yet" in report.notes[0]
    moepatch.restore(model)


def test_apply_and_restore_touch_nothing_global(qwen3):
    """No function of transformers or torch is replaced, and no class of a family is changed."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    experts = type(qwen3.model.layers[0].mlp.experts)
    compare.step("qwen3_moe", qwen3)  # transformers caches what it finds out about a class at first use
    cls = type(qwen3)
    before = dict(vars(experts)), dict(vars(cls)), dict(ALL_EXPERTS_FUNCTIONS._global_mapping)
    moepatch.optimize(qwen3)
    compare.step("qwen3_moe", qwen3)
    assert (dict(vars(experts)), dict(vars(cls)), dict(ALL_EXPERTS_FUNCTIONS._global_mapping)) == before
    assert api.patch_of(qwen3) is not None


def test_what_was_put_over_a_patched_class_stays(qwen3):
    """Parametrizations and FSDP2 make a subclass of the class that they find."""
    inputs = zoo.inputs("qwen3_moe", qwen3)
    moepatch.optimize(qwen3)
    for module, name in ((qwen3.lm_head, "weight"), (qwen3.model.norm, "weight"), (qwen3.model.layers[0].mlp.experts, "down_proj")):
        torch.nn.utils.parametrize.register_parametrization(module, name, torch.nn.Softsign())
    before = qwen3(**inputs).logits
    moepatch.restore(qwen3)
    assert type(qwen3.model.norm).__name__ == "ParametrizedQwen3MoeRMSNorm" and not any(isinstance(m, surgery.Patched) for m in qwen3.modules())
    assert compare.error(qwen3(**inputs).logits, before) <= 1e-5
    torch.nn.utils.parametrize.remove_parametrizations(qwen3.model.norm, "weight")
    assert type(qwen3.model.norm).__name__ == "Qwen3MoeRMSNorm"


def test_a_class_that_cannot_be_injected_leaves_no_trace(qwen3):
    norm = moepatch.optimize(qwen3).model.norm
    before, (mixin, _) = norm._moepatch, type(norm)._moepatch_parts
    with pytest.raises(TypeError, match="method resolution"):
        surgery.InjectClass(norm, mixin, "another").do()
    assert norm._moepatch is before

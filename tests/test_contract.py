"""What worked before the patch works after it: loss, generation, recorders, checkpointing, copies, adapters, the switch."""

from __future__ import annotations

import copy
import pickle

import compare
import pytest
import torch
import zoo
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import moepatch


def both(name, **overrides):
    """An unpatched model and its patched twin."""
    model = zoo.build(name, **overrides)
    return model, moepatch.optimize(copy.deepcopy(model))


def close(a, b):
    return compare.error(a.detach().float(), b.detach().float()) <= 1e-5


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss", "qwen2_moe", "deepseek_v3", "nemotron_h"])
def test_router_logits_aux_loss_and_hidden_states_are_recorded_as_before(name):
    """A replaced module would silently lose its recorder, and the aux loss with it."""
    plain, patched = both(name)
    inputs = zoo.inputs(name, plain)
    options = {"output_hidden_states": True}
    if name not in ("deepseek_v3", "nemotron_h"):
        options["output_router_logits"] = True
    a, b = plain(**inputs, **options), patched(**inputs, **options)
    assert len(a.hidden_states) == len(b.hidden_states)
    assert all(close(x, y) for x, y in zip(b.hidden_states, a.hidden_states, strict=True))
    if "output_router_logits" in options:
        assert len(a.router_logits) == len(b.router_logits) > 0
        assert all(close(x, y) for x, y in zip(b.router_logits, a.router_logits, strict=True))
        assert close(b.aux_loss, a.aux_loss)
    assert close(b.loss, a.loss)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "nemotron_h", "llama4_text"])
def test_generate_with_a_cache_and_left_padding(name):
    plain, patched = both(name)
    plain.eval(), patched.eval()
    ids = torch.randint(3, 128, (2, 7))
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = 0, 0
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": mask, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(plain.generate(ids, **options), patched.generate(ids, **options))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_recomputes_the_same_routes(qwen3, reentrant):
    plain, patched = qwen3, moepatch.optimize(copy.deepcopy(qwen3))
    outputs, grads = compare.step("qwen3_moe", plain)
    patched.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    found, found_grads = compare.step("qwen3_moe", patched)
    assert all(close(found[key], outputs[key]) for key in outputs)
    assert all(compare.error(found_grads[key], grads[key]) <= 1e-5 for key in grads)


def test_no_grad_eval_and_train(qwen3):
    plain, patched = qwen3, moepatch.optimize(copy.deepcopy(qwen3))
    inputs = zoo.inputs("qwen3_moe", plain)
    with torch.no_grad():
        out = patched.eval()(**inputs)
    assert not out.logits.requires_grad and close(out.logits, plain.eval()(**inputs).logits)
    with torch.inference_mode():
        assert close(patched(**inputs).logits.clone(), plain(**inputs).logits)
    assert patched.train()(**inputs).logits.requires_grad


@pytest.mark.parametrize("name", ["qwen3_moe", "llama4_text", "jetmoe", "dbrx"])
def test_a_deepcopy_and_a_pickle_are_patched_models_of_their_own(name):
    model = moepatch.optimize(zoo.build(name))
    _, grads = compare.step(name, model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        found, found_grads = compare.step(name, twin)
        assert all(torch.equal(found_grads[key], grads[key]) for key in grads)
        assert moepatch.report(twin).patched == moepatch.report(model).patched
        moepatch.restore(twin)
        assert not any("moepatch" in repr(m.extra_repr()) for m in twin.modules())
    assert moepatch.report(model).patched > 0 and "moepatch" in repr(model)


def test_switching_the_experts_implementation_makes_the_patch_stand_aside(qwen3):
    patched = moepatch.optimize(qwen3)
    inputs = zoo.inputs("qwen3_moe", patched)
    ours = patched(**inputs).logits
    calls = []
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

    ExpertsInterface.register("counting", lambda self, *args: calls.append(1) or ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, *args))
    try:
        before = patched.config._experts_implementation
        patched.set_experts_implementation("counting")
        assert close(patched(**inputs).logits, ours) and len(calls) == 2
        patched.set_experts_implementation(before)
        assert torch.equal(patched(**inputs).logits, ours) and len(calls) == 2
    finally:
        del ExpertsInterface._global_mapping["counting"]


LORA = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "experts": {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
}


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("target", LORA)
def test_a_lora_adapter_put_on_before_or_after_the_patch(qwen3, target, order):
    config = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **LORA[target])

    def adapted(model):
        torch.manual_seed(5)
        return get_peft_model(model, config)

    plain = adapted(copy.deepcopy(qwen3))
    patched = moepatch.optimize(adapted(qwen3)) if order == "before" else adapted(moepatch.optimize(qwen3))
    inputs = zoo.inputs("qwen3_moe", qwen3)
    for model in (plain, patched):
        model(**inputs).loss.backward()
    truths = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    found = {name: p.grad for name, p in patched.named_parameters() if p.requires_grad}
    assert truths.keys() == found.keys() and all("lora" in name for name in truths)
    assert all(compare.error(found[name], grad) <= 1e-5 for name, grad in truths.items())
    merged, merged_plain = patched.merge_and_unload(), plain.merge_and_unload()
    assert close(merged(**inputs).logits, merged_plain(**inputs).logits)


def test_shared_modules_and_tied_embeddings_stay_shared():
    model = zoo.build("qwen3_moe_tied")
    shared = model.model.layers[0].mlp.experts
    model.model.layers[1].mlp.experts = shared
    truth = compare.step("qwen3_moe_tied", model)
    moepatch.optimize(model)
    assert model.model.layers[1].mlp.experts is model.model.layers[0].mlp.experts is shared
    assert model.lm_head.weight is model.model.embed_tokens.weight
    (pattern,) = moepatch.report(model).plan.mixture
    (site,) = pattern.sites
    assert site.fqns == ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")
    found = compare.step("qwen3_moe_tied", model)
    assert all(compare.error(found[1][key], grad) <= 1e-5 for key, grad in truth[1].items())


def test_autocast_computes_in_low_precision_and_trains_fp32_weights(qwen3):
    plain, patched = qwen3, moepatch.optimize(copy.deepcopy(qwen3))
    inputs = zoo.inputs("qwen3_moe", plain)
    plain.set_experts_implementation("eager")
    for model in (plain, patched):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(**inputs).loss.backward()
    for (name, p), q in zip(plain.named_parameters(), patched.parameters(), strict=True):
        assert q.grad.dtype == torch.float32 and compare.error(q.grad, p.grad) < 0.1, name


def test_hooks_on_experts_go_on_firing(qwen3):
    experts = qwen3.model.layers[0].mlp.experts
    seen = []
    experts.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    moepatch.optimize(qwen3)
    qwen3(**zoo.inputs("qwen3_moe", qwen3))
    assert len(seen) == 1


def test_classes_stay_visible_to_isinstance_and_to_names(qwen3):
    cls, experts = type(qwen3), type(qwen3.model.layers[0].mlp.experts)
    moepatch.optimize(qwen3)
    assert isinstance(qwen3, cls) and type(qwen3).__name__ == cls.__name__
    patched = qwen3.model.layers[0].mlp.experts
    assert isinstance(patched, experts) and type(patched).__name__ == experts.__name__ and type(patched) is not experts
    assert "backend=torch" in repr(patched)


def test_compiled_models_break_no_more_than_before(qwen3):
    inputs = zoo.inputs("qwen3_moe", qwen3)
    block = qwen3.model.layers[0].mlp
    hidden = torch.randn(2, 12, 64)

    def breaks():
        torch._dynamo.reset()
        return torch._dynamo.explain(block)(hidden).graph_break_count

    before = breaks()
    moepatch.optimize(qwen3)
    assert breaks() <= before
    del inputs


def test_call_by_keyword():
    model = moepatch.optimize(zoo.build("gpt_oss"))
    experts = model.model.layers[0].mlp.experts
    x, ids, weights = torch.randn(5, 64), torch.zeros(5, 2, dtype=torch.long), torch.ones(5, 2)
    assert torch.equal(experts(x, router_indices=ids, routing_weights=weights), experts(x, ids, weights))


def test_two_models_in_one_process_are_patched_differently():
    a, b, c = zoo.build("qwen3_moe"), zoo.build("qwen3_moe"), zoo.build("qwen3_moe")
    moepatch.optimize(a)
    moepatch.optimize(b, experts="reference", dense=False)
    backends = [{p.backend for p in moepatch.report(m).plan.mixture} for m in (a, b)]
    assert backends == [{"torch"}, {"reference"}]
    assert type(c.model.layers[0].mlp.experts).__name__ == "Qwen3MoeExperts"
    assert [isinstance(m.model.norm, moepatch.Patched) for m in (a, b, c)] == [True, False, False]
    assert a.config._attn_implementation == b.config._attn_implementation == c.config._attn_implementation
    inputs = zoo.inputs("qwen3_moe", a)
    assert close(a(**inputs).logits, c(**inputs).logits) and close(b(**inputs).logits, c(**inputs).logits)


def test_parameters_stay_leaves_under_their_names(qwen3):
    before = {name: id(p) for name, p in qwen3.named_parameters()}
    moepatch.optimize(qwen3)
    assert {name: id(p) for name, p in qwen3.named_parameters()} == before
    assert all(p.is_leaf and isinstance(p, nn.Parameter) for p in qwen3.parameters())
    optimizer = torch.optim.AdamW(qwen3.parameters(), lr=1e-2)
    weight = qwen3.model.layers[0].mlp.experts.down_proj
    old = weight.detach().clone()
    compare.step("qwen3_moe", qwen3)
    optimizer.step()
    assert not torch.equal(weight, old)


@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.up_proj"])
def test_a_projection_that_is_replaced_later_keeps_its_bias(name):
    config = LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    models = LlamaForCausalLM(config), LlamaForCausalLM(config)
    models[1].load_state_dict(models[0].state_dict())
    moepatch.optimize(models[1])
    old = models[0].model.layers[0].get_submodule(name)
    new = nn.Linear(old.in_features, old.out_features, bias=True)
    ids = torch.arange(12).view(2, 6)
    logits, grads = [], []
    for model in models:
        model.model.layers[0].set_submodule(name, copy.deepcopy(new))
        logits.append(model(ids).logits)
        logits[-1].square().mean().backward()
        grads.append(model.model.layers[0].get_submodule(name).bias.grad)
    assert close(logits[1], logits[0]) and close(grads[1], grads[0])


def test_shapes_without_data():
    model = moepatch.optimize(LlamaForCausalLM(LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=80, num_hidden_layers=1, num_attention_heads=4)))
    ids = torch.zeros(2, 6, dtype=torch.long, device="meta")
    output = model.to("meta")(ids, labels=ids)
    output.loss.backward()
    assert output.logits.shape == (2, 6, 128) and model.lm_head.weight.grad.is_meta

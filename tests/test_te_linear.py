"""FP8 projections by name: plumbing and gradients over a stand-in for Transformer Engine that rounds as FP8 does."""

from __future__ import annotations

import copy

import compare
import fake_te
import pytest
import torch
import zoo
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import moepatch
from moepatch import registry
from moepatch.errors import BackendUnavailable, NumericMismatch, PlanMismatch
from moepatch.experts.activation import Activation
from moepatch.kernels.gated import gated_forward_reference
from moepatch.layers.fp8 import round_linear_layers, rounded, rounded_linear
from moepatch.layers.linear import PatchedLinear
from moepatch.layers.mlp import MlpSpec, MlpWeights
from moepatch.layers.te_linear import te_linear, te_mlp
from moepatch.layout.adjacent import joint_linear
from moepatch.match import linear
from moepatch.scan import Scan

BY_NAME = {"numerics": "relaxed", "linear": "te_fp8", "mlp": "te_fp8", "attention_block": "te_fp8"}


@pytest.fixture
def te(monkeypatch):
    fake_te.install(monkeypatch)
    return fake_te


def llama(seed=0, **overrides):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 256, "intermediate_size": 272, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes | overrides))
    zoo.randomize_(model)
    return model


def tokens(count=24):
    return torch.randint(0, 64, (2, count // 2), generator=torch.Generator().manual_seed(1))


def operands(rows, biased, width=32, count=24, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(count, width, generator=generator), *(torch.randn(n, width, generator=generator) for n in rows)]
    made += [torch.randn(n, generator=generator) for n in rows] if biased else []
    return [t.to(dtype).requires_grad_() for t in made]


def grads(y, leaves):
    return torch.autograd.grad(y, leaves, torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y))


# --- the functions -------------------------------------------------------------------------------------------------------------------


def test_rounding_has_three_bits_for_numbers_and_two_for_gradients():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    for fp8, bits in ((torch.float8_e4m3fn, 3), (torch.float8_e5m2, 2)):
        relative = ((rounded(x, fp8) - x) / x).abs()[x.abs() > 0.05]
        assert relative.max() <= 2.0 ** -(bits + 1) * 1.001 and relative.max() > 2.0 ** -(bits + 2)
    assert (rounded(torch.zeros(4), torch.float8_e4m3fn) == 0).all()


@pytest.mark.parametrize("count", [16, 24, 33])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [(48,), (32, 16), (16, 24, 8)])
def test_one_gemm_with_gradients_to_every_weight(te, rows, biased, count):
    x, *tensors = operands(rows, biased, count=count)
    weights, biases = tensors[: len(rows)], tensors[len(rows) :]
    y = te_linear(x.view(1, count, -1), weights, biases)
    assert te.calls == [(-(-count // 16) * 16, 32, 48)] and y.shape == (1, count, 48)
    whole = rounded_linear(x, torch.cat(weights), torch.cat(biases) if biased else None)
    assert compare.error(y[0], whole) < 1e-6
    for ours, theirs in zip(grads(y, [x, *tensors]), grads(whole[None], [x, *tensors]), strict=True):
        assert ours.shape == theirs.shape and compare.error(ours, theirs) < 1e-6


def test_few_tokens_are_not_rounded(te):
    x, *weights = operands((32, 16), False, count=15)
    assert torch.equal(te_linear(x, weights), joint_linear(x, weights)) and not te.calls


def test_frozen_weights_and_no_grad(te):
    x, *weights = operands((32, 16), False)
    frozen = [w.detach() for w in weights]
    (dx,) = grads(te_linear(x, frozen), [x])
    assert compare.error(dx, grads(te_linear(x, weights), [x])[0]) < 1e-6
    with torch.no_grad():
        assert torch.equal(te_linear(x, frozen), te_linear(x, weights))


@pytest.mark.parametrize("form", ["separate", "interleaved", "none"])
def test_mlps(te, form):
    activation = Activation("relu2" if form == "none" else "swiglu")
    names = ("gate", "up") if form == "separate" else ("up",)
    spec = MlpSpec(hidden=32, intermediate=48, activation=activation, gate_form=form, inputs=names, down="down", input_bias=True, down_bias=True)
    rows = {"separate": (48, 48), "interleaved": (96,), "none": (48,)}[form]
    x, *tensors = operands(rows, True)
    down, down_bias = operands((32,), True, width=48)[1:]
    leaves = [x, *tensors, down, down_bias]
    y = te_mlp(x, MlpWeights(tuple(tensors[: len(rows)]), tuple(tensors[len(rows) :]), down, down_bias), spec)
    pre = rounded_linear(x, torch.cat(tensors[: len(rows)]), torch.cat(tensors[len(rows) :]))
    gate, up = (pre, None) if form == "none" else (pre[:, ::2], pre[:, 1::2]) if form == "interleaved" else pre.chunk(2, 1)
    h = F.relu(gate).square() if form == "none" else F.silu(gate) * up
    assert compare.error(gated_forward_reference(pre, activation, spec.joint_form), h) < 1e-6
    theirs = rounded_linear(h, down, down_bias)
    assert compare.error(y, theirs) < 1e-2  # the last bit of h may fall to the other side in FP8
    for ours, other in zip(grads(y, leaves), grads(theirs, leaves), strict=True):
        assert compare.error(ours, other) < 2e-2


# --- models --------------------------------------------------------------------------------------------------------------------------


def test_it_is_never_chosen(te):
    plan = moepatch.plan(llama(), numerics="relaxed")
    assert all(p.backend != "te_fp8" and p.site.kind != "linear" for p in plan.patterns) and "linear" not in str(plan)


@pytest.mark.parametrize("table", ["linear", "mlp", "attention_block"])
def test_the_caller_has_to_relax_numerics(te, table):
    with pytest.raises(BackendUnavailable, match="numerics='relaxed'"):
        moepatch.plan(llama(), **{table: "te_fp8"})


def test_why_not():
    with pytest.raises(BackendUnavailable, match="not installed|CUDA"):
        moepatch.plan(llama(), numerics="relaxed", linear="te_fp8")


def test_odd_widths_are_refused(te):
    with pytest.raises(BackendUnavailable, match="divisible by 16, this has 264"):
        moepatch.plan(llama(intermediate_size=264), numerics="relaxed", mlp="te_fp8")


def test_a_plan_made_without_it_says_so(te):
    model = llama()
    with pytest.raises(PlanMismatch, match="made without linear="):
        moepatch.optimize(model, plan=moepatch.plan(model, numerics="relaxed"), numerics="relaxed", linear="te_fp8")
    plan = moepatch.plan(model, numerics="relaxed", linear="te_fp8")
    assert isinstance(moepatch.optimize(model, plan=plan, numerics="relaxed").model.layers[0].self_attn.o_proj, PatchedLinear)


def test_a_model(te):
    model = llama()
    before, classes = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    named = {name: id(p) for name, p in model.named_parameters()}
    with torch.no_grad():
        truth = model(tokens()).logits
    moepatch.optimize(model, **BY_NAME)
    patterns = {p.site.kind: p for p in moepatch.report(model).plan.patterns}
    assert [patterns[kind].backend for kind in ("linear", "mlp", "attention_block")] == ["te_fp8"] * 3
    assert patterns["linear"].fqns == tuple(f"model.layers.{i}.self_attn.o_proj" for i in range(2))
    assert not isinstance(model.lm_head, PatchedLinear) and "te_fp8" in repr(model.model.layers[0].self_attn.o_proj)
    te.calls.clear()
    with torch.no_grad():
        error = compare.error(model(tokens()).logits, truth)
    # q, k, v; o; gate and up; down
    assert te.calls == [(32, 256, 512), (32, 256, 256), (32, 256, 544), (32, 272, 256)] * 2 and 1e-3 < error < 0.3
    assert {name: id(p) for name, p in model.named_parameters()} == named
    moepatch.restore(model)
    assert [type(m) for m in model.modules()] == classes
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, truth)


def test_attention_alone_projects_out_in_fp8_too(te):
    model = moepatch.optimize(llama(), numerics="relaxed", attention_block="te_fp8")
    te.calls.clear()
    model(tokens())
    assert te.calls == [(32, 256, 512), (32, 256, 256)] * 2


def test_the_gradients_are_those_of_rounded_layers(te):
    """Gradients of the whole model, three ways: fp32, the family's code over rounded layers, ours."""
    models = [llama(), llama(), moepatch.optimize(llama(), **BY_NAME)]
    for layer in models[1].model.layers:
        round_linear_layers(layer)
    for model in models:
        model(tokens(), labels=tokens()).loss.backward()
    truth, theirs, ours = ({name: p.grad for name, p in model.named_parameters()} for model in models)
    assert all(compare.error(ours[name], truth[name]) <= 1.5 * compare.error(theirs[name], truth[name]) for name in truth)


def losses(model, steps=20):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids, seen = tokens(64), []
    for _ in range(steps):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    return seen


def test_training_and_saving(te, tmp_path):
    fp8 = moepatch.optimize(llama(), **BY_NAME)
    fp8.gradient_checkpointing_enable()
    ours, theirs = losses(fp8.train()), losses(llama().train())
    assert ours[-1] < 0.8 * ours[0] and abs(ours[-1] - theirs[-1]) < 0.1 * theirs[0]
    fp8.save_pretrained(tmp_path)
    saved, weights = load_file(tmp_path / "model.safetensors"), dict(fp8.named_parameters())
    assert saved.keys() <= weights.keys() and all(torch.equal(t, weights[name]) for name, t in saved.items())
    plain = LlamaForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        truth = plain(tokens()).logits
        assert torch.equal(moepatch.restore(fp8).eval()(tokens()).logits, truth)


def test_generate(te):
    model = moepatch.optimize(llama(), **BY_NAME).eval()
    assert model.generate(tokens(), max_new_tokens=4, do_sample=False).shape == (2, 16)


def test_autocast(te):
    model = moepatch.optimize(llama(), **BY_NAME)
    te.calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert model.model.layers[0].self_attn.o_proj(torch.randn(1, 16, 256)).dtype == torch.bfloat16
        loss = model(tokens(), labels=tokens()).loss
    loss.backward()
    assert len(te.calls) == 9
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in model.parameters())


def test_lora_put_on_later(te):
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "o_proj", "gate_proj"]
    models = [llama(), moepatch.optimize(llama(), **BY_NAME)]
    for i, model in enumerate(models):
        torch.manual_seed(3)
        models[i] = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, r=4, init_lora_weights=False))
    truth, ours = ([*grads(m(tokens()).logits, [p for p in m.parameters() if p.requires_grad])] for m in models)
    assert len(truth) == 12 and all(g.abs().sum() > 0 for g in ours)
    assert all(compare.error(a, b) < 0.5 for a, b in zip(ours, truth, strict=True))


def test_hooks_are_called(te):
    model, seen = moepatch.optimize(llama(), **BY_NAME), []
    layer = model.model.layers[0]
    for module in (layer.self_attn.k_proj, layer.self_attn.o_proj, layer.mlp.down_proj):
        module.register_forward_hook(lambda module, args, out: seen.append(module))
    model(tokens())
    assert [id(m) for m in seen] == [id(m) for m in (layer.self_attn.k_proj, layer.self_attn.o_proj, layer.mlp.down_proj)]


def test_copies_and_pickles(te):
    model = moepatch.optimize(llama(), **BY_NAME)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(tokens()).logits, model(tokens()).logits)


def test_verification_finds_what_is_not_a_rounding(te):
    def factory():
        return lambda x, weights, biases: te_linear(x, weights, biases) * 1.1

    registry.register_backend("linear", "off", rank=-10, exact=lambda spec: False, rounded=round_linear_layers)(factory)
    try:
        with pytest.raises(NumericMismatch, match="o_proj"):
            moepatch.optimize(llama(), numerics="relaxed", linear="off")
    finally:
        registry.unregister("off", "linear")


# --- what is taken -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v32", "mixtral", "qwen3_next", "nemotron_h", "gemma4", "dbrx", "nllb_moe", "zaya"])
def test_routers_heads_and_what_is_computed_with_others_are_left(family, monkeypatch):
    if family not in zoo.FAMILIES or zoo.available(family):
        pytest.skip(f"no {family} in this transformers")
    monkeypatch.setattr(linear, "NARROWEST", 1)
    scan, memo = Scan(zoo.build(family)), {}
    taken = [found for found in scan if linear.match_linear(found, scan, memo)]
    assert taken and all(type(found.module) is nn.Linear for found in taken)
    leaves = {found.fqn.rpartition(".")[2] for found in taken}
    assert not leaves & {"lm_head", "gate", "router", "proj", "classifier", "shared_expert_gate", "weights_proj", "router_gate"}
    assert not any(part in found.fqn for found in taken for part in ("router", "indexer", "experts"))
    if family in ("qwen3_moe", "gpt_oss", "mixtral"):
        assert leaves == {"o_proj"}


def test_a_router_beside_the_experts_is_left():
    """Some families hold router and experts in the decoder layer itself."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.router, self.proj = nn.Sequential(nn.Linear(256, 512)), nn.Sequential(nn.Linear(256, 256))
            self.experts = nn.Module()
            self.experts.up = nn.Parameter(torch.zeros(512, 4, 4))

    scan = Scan(nn.ModuleDict({"layers": nn.ModuleList([Layer(), Layer()])}))
    taken = [found.fqn for found in scan if linear.match_linear(found, scan, {})]
    assert taken == ["layers.0.proj.0", "layers.1.proj.0"]

"""Models with bitsandbytes' and torchao's weights: what is quantized keeps its own code, the rest is patched, verified and trained beside it."""

from __future__ import annotations

import copy

import pytest
import torch
import zoo
from compare import error
from torch import nn

import moepatch

bnb = pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training  # noqa: E402
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_  # noqa: E402
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig  # noqa: E402

FOUR_BITS = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
LOADED = {
    "4-bit (bitsandbytes)": lambda: FOUR_BITS,
    "8-bit (bitsandbytes)": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "int8 (torchao)": lambda: TorchAoConfig(Int8WeightOnlyConfig()),
    "float8 (torchao)": lambda: TorchAoConfig(Float8WeightOnlyConfig()),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Attention, a dense MLP in the first layer, two layers of experts."""
    folder = tmp_path_factory.mktemp("plain")
    zoo.build("qwen3_moe", num_hidden_layers=3, mlp_only_layers=[0], intermediate_size=128).save_pretrained(folder)
    return folder


def loaded(folder, form=None, **options):
    options = options or ({} if form is None else {"quantization_config": LOADED[form](), "device_map": {"": "cpu"}})
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).train()


def step(model):
    model.zero_grad()
    tokens = zoo.inputs("qwen3_moe", model)
    out = model(**{**tokens, "labels": tokens["input_ids"]})
    out.loss.backward()
    return out.loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_step(ours, plain):
    (loss, grads), (right, truth) = step(ours), step(plain)
    assert error(loss, right) <= 1e-5 and grads.keys() == truth.keys() and grads
    assert not {name: e for name in truth if (e := error(grads[name], truth[name])) > 1e-4}


def left(report):
    return {near.class_name: near.reason for near in report.plan.left}


@pytest.mark.parametrize("form", LOADED)
def test_the_rest_of_a_quantized_model_is_patched(folder, form):
    model = loaded(folder, form)
    moepatch.optimize(model)
    report = moepatch.report(model)
    reasons = left(report)
    assert reasons["Qwen3MoeAttention"] == reasons["Qwen3MoeMLP"] == f"its weights are {form}"
    assert f"3 × Qwen3MoeAttention keep their own forward: its weights are {form}" in " ".join(str(report).split())
    patched = {pattern.site.kind: len(pattern.sites) for pattern in report.plan.patterns if pattern.backend and pattern.site.kind != "norm"}
    assert patched == {"experts": 2, "attention_function": 1, "residual": 3, "router": 2, "loss": 1}
    assert sum(len(p.sites) for p in report.plan.patterns if p.site.kind == "norm") == 13 and not report.plan.refusals
    assert all(found.ok for found in report.verified) and not report.notes
    assert_equal_step(model, loaded(folder, form))
    assert_equal_step(moepatch.restore(model), loaded(folder, form))
    model, plain = moepatch.optimize(loaded(folder, form)), loaded(folder, form)
    tokens = zoo.inputs("qwen3_moe", model)["input_ids"][:, :5]
    assert torch.equal(*(m.eval().generate(tokens, max_new_tokens=5, do_sample=False) for m in (model, plain)))


@pytest.mark.parametrize("form", ["4-bit (bitsandbytes)", "8-bit (bitsandbytes)"])
@pytest.mark.parametrize("on", ["all-linear", "experts"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_qlora(folder, form, on, order):
    def adapted(model):
        model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
        where = {"target_modules": on} if on == "all-linear" else {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **where))
        generator = torch.Generator().manual_seed(0)
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.data = torch.randn(p.shape, generator=generator) * 0.05
        return model

    plain = adapted(loaded(folder, form))
    ours = moepatch.optimize(adapted(loaded(folder, form))) if order == "before" else adapted(moepatch.optimize(loaded(folder, form)))
    assert_equal_step(ours, plain)
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in (ours, plain)]
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    assert_equal_step(ours, plain)


def int8(model):
    quantize_(model, Int8WeightOnlyConfig())


def float8(model):
    quantize_(model, Float8WeightOnlyConfig())


def some(model):
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: "k_proj" in name or "down_proj" in name)


def four_bits(model):
    for name, layer in [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear]:
        made = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        made.weight = bnb.nn.Params4bit(layer.weight.data.clone(), requires_grad=False, quant_type="nf4")
        model.set_submodule(name, made.to("cpu"))


@pytest.mark.parametrize("quantize", [int8, float8, some, four_bits])
def test_quantized_after_the_patch(folder, quantize):
    plain, ours = loaded(folder), moepatch.optimize(loaded(folder))
    if quantize is four_bits:  # a patched head is no plain linear layer any more, and no library quantizes it by default
        plain.lm_head.__class__ = type("Head", (nn.Linear,), {})
    quantize(plain)
    quantize(ours)
    assert_equal_step(ours, plain)
    notes = [note for note in moepatch.report(ours).notes if "quantized since the patch" in note]
    assert any(note.startswith("model.layers.0.self_attn and 2 more (Qwen3MoeAttention)") for note in notes)
    assert any(note.startswith("model.layers.0.mlp (Qwen3MoeMLP)") for note in notes)
    assert_equal_step(copy.deepcopy(ours), copy.deepcopy(plain))
    assert_equal_step(moepatch.restore(ours), plain)


def test_dynamically_quantized_after_the_patch(folder):
    """The head is left to the patch: `quantize_dynamic` looks for the class itself."""
    plain, ours = loaded(folder).eval(), moepatch.optimize(loaded(folder)).eval()
    plain.lm_head.__class__ = type("Head", (nn.Linear,), {})
    plain, ours = (torch.ao.quantization.quantize_dynamic(m, {nn.Linear}, dtype=torch.qint8) for m in (plain, ours))
    tokens = zoo.inputs("qwen3_moe", plain)
    losses = [m(**{**tokens, "labels": tokens["input_ids"]}).loss for m in (ours, plain)]
    assert error(*losses) <= 1e-2  # activations are rounded to 8 bits, which a last bit decides
    assert any("packed (torch.ao)" in note for note in moepatch.report(ours).notes)


def test_bitsandbytes_before_loading(folder):
    config = copy.deepcopy(loaded(folder).config)
    config.quantization_config = FOUR_BITS
    inspection = moepatch.inspect(config)
    assert inspection.exit_code == 0 and "4-bit (bitsandbytes)" in " ".join(str(inspection).split())
    now = moepatch.inspect(loaded(folder, "4-bit (bitsandbytes)"))
    assert left(now) == left(inspection) and not now.plan.refusals

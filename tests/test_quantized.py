"""Weights that are tensors of their own kind, in a dtype that nobody trains in, or in transformers' own quantized modules: those keep their code.

The models here need no quantizing library; `frameworks/test_quantized.py` has bitsandbytes and torchao.
"""

from __future__ import annotations

import copy

import pytest
import torch
import zoo
from compare import error
from torch import nn
from torch.utils._pytree import tree_map
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear
from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

import moepatch


class Coded(torch.Tensor):
    """Numbers of 8 bits with one scale, without a storage that looks like them: every operator gets plain numbers."""

    @staticmethod
    def __new__(cls, codes, scale, dtype):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype, device=codes.device)

    def __init__(self, codes, scale, dtype):
        self.codes, self.scale = codes, scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::detach", "aten::clone", "aten::alias"):
            return cls(args[0].codes, args[0].scale, args[0].dtype)
        plain = lambda leaf: (leaf.codes.float() * leaf.scale).to(leaf.dtype) if isinstance(leaf, Coded) else leaf  # noqa: E731
        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))


def coded(p):
    scale = p.detach().abs().amax() / 127
    return nn.Parameter(Coded((p.detach() / scale).round().to(torch.int8), scale, p.dtype), requires_grad=False)


def _linear(module, key, p):
    return isinstance(module, nn.Linear) and key == "weight"


def _matrices(module, key, p):
    return p.ndim > 1 and not isinstance(module, (nn.Embedding, nn.modules.conv._ConvNd))


def _norms(module, key, p):
    return "Norm" in type(module).__name__


def _everything(module, key, p):
    return not isinstance(module, (nn.Embedding, nn.modules.conv._ConvNd))


def code(model, which):
    for module in model.modules():
        for key, p in module._parameters.items():
            if type(p) is nn.Parameter and which(module, key, p):
                module._parameters[key] = coded(p)
    return model


def step(name, model):
    model.zero_grad()
    loss = zoo.loss(model(**zoo.inputs(name, model)))
    loss.backward()
    return loss.detach(), {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


def assert_equal_step(name, ours, plain):
    (loss, grads), (right, truth) = step(name, ours), step(name, plain)
    assert error(loss, right) <= 1e-5 and grads.keys() == truth.keys() and grads
    assert not {key: e for key in truth if (e := error(grads[key], truth[key])) > 1e-4}


@pytest.mark.parametrize("which", [_linear, _matrices, _norms, _everything])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h"])
def test_coded_before_and_after_the_patch(name, which):
    base = zoo.build(name)
    base.set_experts_implementation("eager")  # a grouped GEMM takes no such weights
    plain = code(copy.deepcopy(base), which)
    after = code(moepatch.optimize(copy.deepcopy(base)), which)
    assert_equal_step(name, after, plain)
    if which is not _norms:
        assert any("quantized since the patch" in note and "Coded" in note for note in moepatch.report(after).notes)
    assert_equal_step(name, moepatch.restore(after), plain)
    before = moepatch.optimize(code(copy.deepcopy(base), which))
    assert all(found.ok for found in moepatch.report(before).verified)
    assert_equal_step(name, before, plain)


def test_one_coded_projection(qwen3):
    """Its attention keeps its own code, those of other layers do not."""
    layer = qwen3.model.layers[1].self_attn
    layer.k_proj.weight = coded(layer.k_proj.weight)
    plan = moepatch.plan(qwen3)
    (near,) = plan.left
    assert (near.fqn, near.kind) == ("model.layers.1.self_attn", "attention_block")
    assert near.reason == f"k_proj.weight is Coded ({__name__.partition('.')[0]})"
    (block,) = [p for p in plan.patterns if p.site.kind == "attention_block"]
    assert block.fqns == ("model.layers.0.self_attn",)


def mxfp4(packed):
    """gpt-oss with experts as transformers keeps them: the packed numbers are parameters until they are loaded, then something of Triton's."""
    model = zoo.build("gpt_oss", intermediate_size=96)
    for layer in model.model.layers:
        experts = layer.mlp.experts = Mxfp4GptOssExperts(model.config)
        for name in ("gate_up_proj", "down_proj") if packed else ():
            del experts._parameters[name]
            setattr(experts, name, object())
    return model


@pytest.mark.parametrize("packed", [False, True])
def test_mxfp4_experts_stay_and_the_rest_is_patched(packed):
    model = moepatch.optimize(mxfp4(packed))
    report = moepatch.report(model)
    assert [r.fqn for r in report.plan.refusals] == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    assert all(r.reason.startswith("its weights are MXFP4 (transformers)") and "Mxfp4Config(dequantize=True)" in r.hint for r in report.plan.refusals)
    assert {p.site.kind for p in report.plan.patterns if p.backend} == {"attention_function", "attention_block", "norm", "residual", "router", "loss"}
    assert all(found.ok for found in report.verified) and type(model.model.layers[0].mlp.experts) is Mxfp4GptOssExperts
    with pytest.raises(moepatch.MoePatchError, match="its weights are MXFP4.*fills plain weights only"):
        moepatch.load_checkpoint(moepatch.restore(model), ".")


def test_fp8_linears_and_experts_stay_and_the_rest_is_patched():
    model = zoo.build("deepseek_v3", dtype=torch.bfloat16)
    replace_with_fp8_linear(model, ["lm_head"], FineGrainedFP8Config(weight_block_size=(16, 16)), True)
    for module in model.modules():
        for key, p in module._parameters.items():
            if p is not None and p.is_meta:
                module._parameters[key] = nn.Parameter(torch.zeros(p.shape, dtype=p.dtype), requires_grad=False)
    report = moepatch.report(moepatch.optimize(model))
    assert {near.class_name: near.reason for near in report.plan.left} == dict.fromkeys(
        ["DeepseekV3Attention", "DeepseekV3MLP"], "its weights are FP8 (transformers)"
    )
    assert len(report.plan.refusals) == 2 and "FineGrainedFP8Config(dequantize=True)" in report.plan.refusals[0].hint
    assert {p.site.kind for p in report.plan.patterns if p.backend} == {"attention_function", "norm", "residual", "router", "loss"}


#: From a family and what its configuration says to the exit code, the words for what keeps its own code, and the option.
SAID = {
    "mxfp4": ("gpt_oss", {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, 3, "MXFP4 (transformers)", "Mxfp4Config"),
    "fp8": ("deepseek_v3", {"quant_method": "fp8", "weight_block_size": [128, 128]}, 3, "FP8 (transformers)", "FineGrainedFP8Config"),
    "bitsandbytes": ("qwen3_moe", {"quant_method": "bitsandbytes", "load_in_4bit": True}, 0, "4-bit (bitsandbytes)", None),
    "8 bit": ("qwen3_moe", {"quant_method": "bitsandbytes", "load_in_8bit": True}, 0, "8-bit (bitsandbytes)", None),
    "torchao": ("qwen3_moe", {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}, 0, "int8 (torchao)", None),
    "gptq": ("qwen3_moe", {"quant_method": "gptq", "bits": 4}, 3, "4-bit (gptq)", None),
}


@pytest.mark.parametrize("case", SAID)
def test_inspect_says_before_loading_what_stays(case):
    family, settings, code, words, option = SAID[case]
    config = zoo.config(family)
    config.quantization_config = settings
    inspection = moepatch.inspect(config)
    text = " ".join(str(inspection).split())  # it is as wide as the terminal
    assert inspection.exit_code == code and words in text
    assert ("every mixture of experts can be patched" in text) == (code == 0)
    (warning,) = inspection.warnings
    assert f"quantized ({settings['quant_method']})" in warning
    advice = f"quantization_config={option}(dequantize=True)"
    assert (advice in warning and advice in text and all(advice in r.hint for r in inspection.plan.refusals)) == (option is not None)
    assert bool(inspection.plan.refusals) == (code == 3) and all(words in r.reason for r in inspection.plan.refusals)
    lefts = {near.kind: near.reason for near in inspection.plan.left}
    assert lefts == ({} if case == "mxfp4" else {kind: f"its weights are {words}" for kind in lefts}) and config.quantization_config is settings
    config.quantization_config = {**settings, "dequantize": True}
    assert option is None or moepatch.inspect(config).exit_code == 0


def test_experts_that_the_configuration_leaves_alone():
    config = zoo.config("gpt_oss")
    config.quantization_config = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.0.mlp.experts"]}
    inspection = moepatch.inspect(config)
    assert [r.fqn for r in inspection.plan.refusals] == ["model.layers.1.mlp.experts"] and inspection.exit_code == 2


def test_a_quantized_model_on_a_mesh_is_refused(qwen3, tmp_path):
    qwen3.model.layers[0].self_attn.k_proj.weight = coded(qwen3.model.layers[0].self_attn.k_proj.weight)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(moepatch.CheckFailed, match="k_proj: its weights are Coded.*cannot be spread over ranks. Optimize without a mesh"):
            moepatch.optimize(qwen3, moepatch.make_mesh(ep=1))
    finally:
        torch.distributed.destroy_process_group()

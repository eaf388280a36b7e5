"""Near misses: what has the name or the weights of a kind and keeps its own forward is said, counted, and weighed."""

from __future__ import annotations

import json
import re

import pytest
import torch
import transformers
import zoo
from torch import nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig

import moepatch
from moepatch.match.near import near_misses
from moepatch.planning import make_plan
from moepatch.registry import register_matcher, unregister
from moepatch.render import words
from moepatch.scan import Scan
from moepatch.site import Left
from moepatch.work import SEQUENCE


@pytest.fixture(autouse=True)
def columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


class Linear4bit(nn.Linear):
    """What a quantizing library puts in the place of a linear layer."""


class ScaledHead(nn.Linear):
    def forward(self, x):
        return 0.5 * super().forward(x)


class Odd(nn.Module):
    """An activation that nobody knows."""

    def forward(self, x):
        return torch.sin(x) * x


def layers(model):
    return model.model.layers


def quantize(model):
    for layer in layers(model):
        for child in layer.self_attn.children():
            if type(child) is nn.Linear:
                child.__class__ = Linear4bit


def odd_activation(model):
    for layer in layers(model):
        (layer.mlp if hasattr(layer.mlp, "act_fn") else layer.mlp.shared_experts).act_fn = Odd()


def fp8(model):
    down = layers(model)[0].mlp.down_proj
    down.weight = nn.Parameter(down.weight.data.to(torch.float8_e4m3fn), requires_grad=False)


def router_child(model):
    for layer in layers(model):
        layer.mlp.gate.extra = nn.Linear(4, 4)


def norm_bias(model):
    for layer in layers(model):
        layer.input_layernorm.bias = nn.Parameter(torch.zeros(64))


def layer_norm(model):
    model.model.norm = nn.LayerNorm(64)


def head_of_another_class(model):
    model.lm_head.__class__ = ScaledHead


def attention_child(model):
    for layer in layers(model):
        layer.self_attn.gate_proj = Linear4bit(64, 64)


def drop_out(model):
    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.wi, self.wo, self.drop = nn.Linear(64, 80), nn.Linear(80, 64), nn.Dropout(0.1)

        def forward(self, x):
            return self.wo(self.drop(torch.relu(self.wi(x))))

    layers(model)[0].mlp = Mlp()


def layer_norms_of_two_dtypes(model):
    layers(model)[0].input_layernorm.bfloat16()


def mlp_weight(model):
    layers(model)[0].mlp.scale = nn.Parameter(torch.ones(64))


def more_norms(model):
    for layer in layers(model):
        layer.pre_norm, layer.post_norm = (type(model.model.norm)(64) for _ in range(2))


NEARLY = {
    "quantized projections": (
        "qwen3_moe", quantize, "attention_block", "2 × Qwen3MoeAttention keep their own forward: its projections are Linear4bit, not Linear"
    ),
    "an attention with one child more": (
        "qwen3_moe", attention_child, "attention_block", "2 × Qwen3MoeAttention keep their own forward: gate_proj is a Linear4bit"
    ),
    "an odd activation": ("deepseek_v3", odd_activation, "mlp", "3 × DeepseekV3MLP keep their own forward: its activation (Odd) is none that is known"),
    "fp8 weights": ("deepseek_v3", fp8, "mlp", "DeepseekV3MLP keeps its own forward: down_proj.weight is float8_e4m3fn"),
    "an MLP with one weight more": ("deepseek_v3", mlp_weight, "mlp", "DeepseekV3MLP keeps its own forward: beside its projections it has scale"),
    "a router with a child": ("qwen3_moe", router_child, "router", "2 × Qwen3MoeTopKRouter keep their own forward: it has children (extra)"),
    "a norm with a bias": ("qwen3_moe", norm_bias, "norm", "2 × Qwen3MoeRMSNorm keep their own forward: it has 2 parameters (weight, bias)"),
    "a layer around such norms": ("qwen3_moe", norm_bias, "residual", "2 × Qwen3MoeDecoderLayer keep their own forward: "),
    "an MLP with dropout": ("deepseek_v3", drop_out, "mlp", "Mlp keeps its own forward: it drops numbers out in training (drop, p=0.1)"),
    "a layer with norms of two dtypes": (
        "qwen3_moe", layer_norms_of_two_dtypes, "residual",
        "Qwen3MoeDecoderLayer keeps its own forward: its weights have mixed dtypes (input_layernorm.weight bfloat16"
    ),
    "a LayerNorm": ("qwen3_moe", layer_norm, "norm", "LayerNorm keeps its own forward: it is a LayerNorm, which subtracts the mean"),
    "a layer with four norms": ("qwen3_moe", more_norms, "residual", "2 × Qwen3MoeDecoderLayer keep their own forward: it has 4 norms"),
    "a head of its own class": ("qwen3_moe", head_of_another_class, "loss", "ScaledHead keeps its own forward: it is a ScaledHead, not a Linear"),
}


@pytest.mark.parametrize("case", NEARLY)
def test_what_is_nearly_of_a_kind_is_said_everywhere(case):
    family, change, kind, line = NEARLY[case]
    model = zoo.build(family)
    assert not make_plan(model).left
    change(model)
    plan = make_plan(model)
    near = [n for n in plan.left if n.kind == kind]
    assert near and any(text.startswith(line) for text, _ in words.near_misses(near)), words.near_misses(plan.left)
    covered = {fqn for p in plan.patterns for fqn in p.fqns if p.site.kind == kind}
    assert not covered & {fqn for n in near for fqn in n.fqns}
    for view in (plan, moepatch.inspect(model)):
        assert line in " ".join(str(view).split())
        assert words.html(line) in view._repr_html_()
        data = view.to_dict()
        assert [n for n in data["left"] if n["kind"] == kind] == [n.to_dict() for n in near]
        assert 0 < data["share"]["of_flops"] < 1 and data["share"]["patched_modules"] < data["share"]["modules"] or kind == "residual"
        json.dumps(data)


def test_the_report_says_it_too(qwen3):
    layer_norm(qwen3)
    report = moepatch.report(moepatch.optimize(qwen3))
    line = "LayerNorm keeps its own forward: it is a LayerNorm, which subtracts the mean"
    assert f"\nleft alone\n  {line}.\n    model.norm\n" in str(report)
    assert line in report._repr_html_() and report.to_dict()["left"][0]["fqns"] == ["model.norm"]
    assert str(report).startswith("Qwen3MoeForCausalLM: 99.9 % of a step's FLOPs and 21 of 22 modules with weights are patched\n")
    assert moepatch.inspect(qwen3).to_dict()["left"] == report.to_dict()["left"]


def test_names_of_classes_and_attributes_are_enough():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.query_key_value, self.dense = nn.Linear(8, 24), nn.Linear(8, 8)

    class Scan1D(nn.Module):
        def __init__(self):
            super().__init__()
            self.A_log, self.in_proj = nn.Parameter(torch.zeros(4)), nn.Linear(8, 8)

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.variance_eps = nn.Parameter(torch.ones(8)), 1e-6

    class MyRouter(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.narrow = nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, x, ids):
            return x

    model = nn.ModuleDict({"a": Attention(), "b": Scan1D(), "c": Scale(), "d": MyRouter(), "lm_head": nn.Linear(8, 16), "e": nn.Linear(8, 8)})
    left = {near.fqn: near for near in make_plan(model).left}
    assert set(left) == {"a", "b", "c", "d", "lm_head"}
    assert left["a"].kind == "attention_block" and left["a"].reason == "no matcher takes a module of this form (attention with query_key_value, dense)"
    assert left["b"].kind == "ssd_mixer" and left["c"].kind == "norm" and left["d"].kind == "router" and left["lm_head"].kind == "loss"


def test_what_is_inside_is_not_said_again():
    model = zoo.build("deepseek_v32")
    plan = make_plan(model)
    assert {near.class_name for near in plan.left} == {"DeepseekV32Attention"}
    assert {site.fqn.rpartition(".")[2] for p in plan.patterns if p.site.kind == "norm" for site in p.sites} >= {"q_a_layernorm"}


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "glm4_moe", "nemotron_h", "olmoe"])
def test_families_that_are_patched_whole_have_no_near_miss(family):
    plan = make_plan(zoo.build(family))
    assert plan.left == () and plan.share.share == 1 and plan.share.modules == plan.share.patched_modules


def test_a_matcher_from_outside_may_leave_something():
    @register_matcher("test_left", priority=1000)
    def leave(found, scan, memo):
        return Left(kind="attention_block", fqns=found.fqns, class_name="Mine", reason="the argument `x` is not known") if found.fqn == "proj" else None

    try:
        plan = make_plan(nn.ModuleDict({"proj": nn.Linear(4, 4)}))
    finally:
        unregister("test_left")
    assert [near.reason for near in plan.left] == ["the argument `x` is not known"]


def test_nothing_is_found_in_a_bare_tree():
    assert near_misses(Scan(nn.Sequential(nn.Linear(2, 2))), [], [], []) == []


# ---------------------------------------------------------------------------------------------------------------- share


def test_share_of_a_model_counted_by_hand(qwen3):
    """Two layers, H=64, 4/2 heads of 16, 8 experts of which 2, I=48, vocabulary 128; every token sees half of 4096 keys."""
    attention = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 2 * 16)
    scores = 2 * (SEQUENCE // 2) * 4 * (16 + 16)
    experts = 2 * 2 * 3 * 64 * 48
    per_layer = attention + scores + experts + 2 * 8 * 64 + 2 * 2 * 64
    head, last = 2 * 64 * 128, 2 * 64
    share = moepatch.plan(qwen3).share
    assert share.flops == share.patched_flops == 2 * per_layer + head + last
    # q, k, v, o, their two norms, two norms of the layer, router and experts; the last norm and the head
    assert share.modules == share.patched_modules == 2 * 10 + 2
    without_head = moepatch.plan(qwen3, loss=None).share
    assert without_head.patched_flops == share.flops - head and without_head.patched_modules == 21
    without_experts = moepatch.plan(qwen3, experts=None).share
    assert without_experts.patched_flops == share.flops - 2 * experts
    alone = moepatch.plan(qwen3, dense=False).share
    assert alone.patched_flops == 2 * experts and alone.patched_modules == 2
    # Without its block's patch an attention still has its function's, and its norms'.
    assert moepatch.plan(qwen3, attention_block=None).share.patched_flops == share.flops - 2 * (attention - 2 * 2 * 16)
    assert moepatch.plan(qwen3, attention=None).share.patched_flops == share.flops - 2 * scores
    one = moepatch.plan(qwen3).without("model.layers.0.mlp.experts").share
    assert one.patched_flops == share.flops - experts


def test_share_is_a_lower_bound_where_nothing_says_how_many_experts_a_token_has():
    share = make_plan(zoo.build("switch_transformers")).share
    assert not share.exact and "at least " in words.shared(share, "are patched")


@pytest.mark.parametrize("share", [0.0, 1e-9, 0.004, 0.5, 0.9949, 0.9951, 0.99999, 1.0])
def test_only_everything_is_100_percent(share):
    text = words.percent(share)
    assert (text == "100 %") == (share == 1) and (text == "0 %") == (share == 0)


# --------------------------------------------------------------------------------------------------------------- strict


def test_strict_raises_before_anything_is_changed(qwen3):
    layer_norm(qwen3)
    quantize(qwen3)
    before = {name: type(m) for name, m in qwen3.named_modules()}
    with pytest.raises(moepatch.LeftAlone) as error:
        moepatch.optimize(qwen3, strict=True)
    text = str(error.value)
    assert "2 × Qwen3MoeAttention keep their own forward: its projections are Linear4bit" in text and "(model.layers.0.self_attn)" in text
    assert "LayerNorm keeps its own forward" in text and "Without strict=True" in text
    assert {name: type(m) for name, m in qwen3.named_modules()} == before
    assert isinstance(error.value, moepatch.MoePatchError)
    moepatch.optimize(qwen3)


def test_strict_is_content_with_what_the_caller_leaves_alone(qwen3):
    layer_norm(qwen3)
    moepatch.restore(moepatch.optimize(qwen3, strict=True, norm=None))
    moepatch.restore(moepatch.optimize(qwen3, strict=True, dense=False))


def test_strict_on_a_model_that_is_served_whole(qwen3):
    assert moepatch.report(moepatch.optimize(qwen3, strict=True)).plan.share.share == 1


def test_strict_raises_for_refusals_and_for_patterns_without_a_backend():
    with pytest.raises(moepatch.LeftAlone, match="3 × DogeCDMoE .*no matcher takes a mixture"):
        moepatch.optimize(zoo.build("doge"), strict=True)


# ----------------------------------------------------------------------------------------------------- mixtures by name


def test_a_configuration_that_counts_experts_is_no_model_without_a_mixture():
    model = zoo.build("qwen3_moe", num_experts=8, mlp_only_layers=[0, 1])
    report = moepatch.report(moepatch.optimize(model))
    (note,) = [n for n in report.notes if "experts" in n]
    assert note == "none of its modules was recognised as experts, though its configuration counts experts (num_local_experts=8)"
    assert "no mixture" not in str(moepatch.inspect(model))


def test_experts_of_a_dtype_that_nothing_computes_with_are_refused(qwen3):
    for layer in layers(qwen3):
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(layer.mlp.experts, name).data.to(torch.float8_e4m3fn)
            setattr(layer.mlp.experts, name, nn.Parameter(weight, requires_grad=False))
    plan = make_plan(qwen3)
    assert {r.reason for r in plan.refusals} == {"its weights are float8_e4m3fn, which no backend computes with"} and len(plan.refusals) == 2


def test_experts_that_are_only_called_so_are_refused():
    model = nn.ModuleDict({"block": nn.ModuleDict({"experts": nn.ModuleDict({"proj": nn.Linear(4, 4)})})})
    (refusal,) = make_plan(model).refusals
    assert refusal.fqn == "block.experts"
    with pytest.raises(moepatch.NothingMatched, match="has a mixture of experts that moepatch cannot serve"):
        moepatch.optimize(model)


def test_stacked_weights_are_mentioned():
    class Bank(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1, self.w2 = nn.Parameter(torch.randn(4, 8, 6)), nn.Parameter(torch.randn(4, 6, 8))

        def forward(self, x, ids):
            return x

    model = nn.ModuleDict({"bank": Bank()})
    (near,) = make_plan(model).left
    assert near.kind == "experts" and moepatch.inspect(model).exit_code == 3
    with pytest.raises(moepatch.NothingMatched) as error:
        moepatch.optimize(model)
    assert "no mixture" not in str(error.value) and "Bank keeps its own forward" in str(error.value)


def test_a_list_of_experts_beside_more_children_says_which():
    block = nn.Module()
    block.gate = nn.Linear(8, 4, bias=False)
    block.extra = nn.Linear(8, 8)
    block.experts = nn.ModuleList(nn.ModuleDict({k: nn.Linear(8, 8, bias=False) for k in ("w1", "w2", "w3")}) for _ in range(4))
    (refusal,) = make_plan(nn.ModuleDict({"block": block})).refusals
    assert refusal.fqn == "block.experts" and "stand 1" not in refusal.reason
    assert refusal.reason == "beside its router gate and its list of experts experts it has extra"


SIZES = [k for k, v in zoo.config("qwen3_moe").to_dict().items() if type(v) is int and k.endswith(("size", "dim", "layers", "experts"))]


@pytest.mark.parametrize("key", SIZES)
def test_sizes_of_zero_are_said_in_words(key):
    settings = {k: v for k, v in zoo.config("qwen3_moe").to_dict().items() if k not in ("rope_parameters",)}
    try:
        inspection = moepatch.inspect(Qwen3MoeConfig(**{**settings, key: 0}))
    except moepatch.MoePatchError as error:
        assert "refuses it" in str(error)
    else:
        assert str(inspection) and inspection._repr_html_() and inspection.to_json()
        assert key != "hidden_size" or "holds no numbers" in " ".join(str(inspection).split())


def test_a_router_with_an_adapter_is_no_mixture_of_another_form():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(zoo.build("qwen3_moe"), peft.LoraConfig(target_modules=["q_proj"], target_parameters=["mlp.gate.weight"], r=2))
    plan = make_plan(model)
    assert not plan.refusals
    assert [text for text, _ in words.near_misses(plan.left)] == ["2 × Qwen3MoeAttention keep their own forward: a LoRA layer stands at q_proj"]
    model = peft.get_peft_model(zoo.build("qwen3_moe"), peft.LoraConfig(target_modules=["lm_head"], r=2))
    assert [text for text, _ in words.near_misses(make_plan(model).left)] == ["Linear keeps its own forward: a LoRA layer stands at its place"]


# ---------------------------------------------------------------------------------------------------------------- views


def test_models_without_experts():
    bert = make_plan(BertForMaskedLM(BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)).bfloat16())
    assert {near.kind for near in bert.left} == {"norm", "residual", "attention_block", "mlp"}
    assert "6 × LayerNorm keep their own forward" in str(bert) and 0 < bert.share.share < 0.05
    gpt2 = make_plan(GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2)))
    assert "2 × GPT2Attention keep their own forward: its projections are Conv1D, not Linear" in str(gpt2)
    llama = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    assert make_plan(LlamaForCausalLM(llama)).left == ()


@pytest.mark.parametrize("family", ["switch_transformers", "diffusion_gemma", "muse_spark", "nemotron_h", "deepseek_v3"])
def test_texts_stay_short_and_narrow(family, monkeypatch):
    if zoo.available(family) is not None:
        pytest.skip(zoo.available(family))
    inspection = moepatch.inspect(zoo.config(family))
    for width, most in ((120, 85), (80, 125)):
        monkeypatch.setenv("COLUMNS", str(width))
        for view in (inspection, inspection.plan):
            lines = str(view).splitlines()
            assert max(map(len, lines)) <= width and len(lines) <= most


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h"])
def test_the_text_of_a_usual_model_fits_a_screen(family, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    report = moepatch.report(moepatch.optimize(zoo.build(family)))
    assert max(len(str(view).splitlines()) for view in (report, moepatch.inspect(zoo.config(family)))) <= 60


def test_control_characters_go_nowhere(qwen3):
    evil = type("Layer\x1b[31mNorm\x9b", (nn.LayerNorm,), {})
    qwen3.model.norm = evil(64)
    qwen3.model.add_module("norm\x07\x1b]0;x", nn.LayerNorm(64))
    for view in (moepatch.plan(qwen3), moepatch.inspect(qwen3)):
        for text in (str(view), view._repr_html_()):
            assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)
    with pytest.raises(moepatch.LeftAlone) as error:
        moepatch.optimize(qwen3, strict=True)
    assert "\x1b" not in str(error.value)


def test_views_are_texts_in_notebooks_too(qwen3, monkeypatch, capsys):
    import rich.console

    monkeypatch.setattr(rich.console, "_is_jupyter", lambda: True)
    plan = moepatch.plan(qwen3)
    report = moepatch.report(moepatch.optimize(qwen3))
    for view in (plan, report, moepatch.inspect(qwen3)):
        assert "experts: fused 3-D" in str(view) and "<table" in view._repr_html_()
    assert capsys.readouterr().out == ""


#: Models of other families: the end of a module's name, and its reason.
REASONS = {
    "Phi3": ("layers.0", r"norm for the child after it \(input_layernorm, self_attn, resid_attn_dropout, post"),
    "Olmo2": ("layers.0", r"norm for the child after it \(self_attn, post_attention_layernorm, mlp, post"),
    "Starcoder2": ("layers.0.self_attn", r"^its result goes through a dropout of its own \(`residual_dropout`\)$"),
    "Phimoe": ("layers.0.mlp.router", "^it chooses and weighs by no formula that is known$"),
}


@pytest.mark.parametrize("family", REASONS)
def test_the_reason_is_what_is_in_the_way(family):
    name, reason = REASONS[family]
    config = getattr(transformers, f"{family}Config")(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    (found,) = [n.reason for n in make_plan(model).left if n.fqns[0].endswith(name)]
    assert re.search(reason, found), found

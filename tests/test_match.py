"""Matching: what is recognised by what it computes, what is refused, and plans as values."""

from __future__ import annotations

import json

import compare
import pytest
import torch
import zoo
from torch import nn
from torch.nn import functional as F

import moepatch
from moepatch import registry
from moepatch.match.probe import recognise
from moepatch.layout.experts import fused_layout
from moepatch.scan import Scan


class RemoteExperts(nn.Module):
    """Experts as remote code writes them: no flags, names of its own, gate and up stacked."""

    def __init__(self, experts=8, hidden=64, width=48, transposed=False, interleaved=False, act=F.silu, order=(0, 1)):
        super().__init__()
        self.count, self.transposed, self.interleaved, self.act, self.order = experts, transposed, interleaved, act, order
        one, two = (experts, 2 * width, hidden), (experts, hidden, width)
        turn = (lambda s: (s[0], s[2], s[1])) if transposed else (lambda s: s)
        self.w_in = nn.Parameter(torch.randn(turn(one)) * 0.1)
        self.w_out = nn.Parameter(torch.randn(turn(two)) * 0.1)

    def forward(self, x, ids, weights):
        y = torch.zeros_like(x)
        for e in range(self.count):
            token, slot = torch.where(ids == e)
            w_in, w_out = (w[e].T if self.transposed else w[e] for w in (self.w_in, self.w_out))
            pre = x[token] @ w_in.T
            parts = (pre[..., ::2], pre[..., 1::2]) if self.interleaved else pre.chunk(2, -1)
            gate, up = parts[self.order[0]], parts[self.order[1]]
            y = y.index_add(0, token, (self.act(gate) * up @ w_out.T) * weights[token, slot, None])
        return y


class Block(nn.Module):
    """A router and experts; not a transformers model."""

    def __init__(self, experts):
        super().__init__()
        self.router = nn.Linear(64, 8)
        self.experts = experts

    def forward(self, x):
        weights, ids = self.router(x).softmax(-1).topk(2)
        return self.experts(x, ids, weights)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("act", "name"), [(F.silu, "swiglu"), (F.gelu, "geglu"), (F.relu, "reglu")])
def test_remote_code_is_taken_by_what_it_computes(transposed, interleaved, act, name):
    model = Block(RemoteExperts(transposed=transposed, interleaved=interleaved, act=act))
    x = torch.randn(20, 64)
    truth = model(x)
    moepatch.optimize(model)
    spec = moepatch.report(model).plan.patterns[0].site.spec
    assert spec.activation.name == name
    assert spec.layout.gate_form == ("interleaved" if interleaved else "concatenated")
    assert ("transposed" in spec.layout.label) == transposed
    assert compare.error(model(x), truth) < 1e-6


@pytest.mark.parametrize(("hidden", "width"), [(48, 48), (96, 48), (48, 96), (8, 16)])
def test_narrow_and_square_experts_are_not_taken_the_wrong_way_round(hidden, width):
    """H == I and H == 2I: a shape says nothing about which axis is which."""
    for transposed in (False, True):
        model = nn.ModuleList([RemoteExperts(hidden=hidden, width=width, transposed=transposed)])
        moepatch.optimize(model)
        assert ("transposed" in moepatch.report(model).plan.patterns[0].site.spec.layout.label) == transposed


def test_up_before_gate_is_refused_not_guessed():
    model = Block(RemoteExperts(order=(1, 0)))
    with pytest.raises(moepatch.NothingMatched, match="does not compute what its parameters suggest"):
        moepatch.optimize(model)


def test_experts_that_use_more_than_their_weights_are_refused():
    class Noisy(RemoteExperts):
        def forward(self, x, ids, weights):
            return super().forward(x, ids, weights) + 1e-3 * x

    with pytest.raises(moepatch.NothingMatched, match=r"differs by \d"):
        moepatch.optimize(Block(Noisy()))


def test_flags_that_contradict_the_forward_are_refused():
    """gpt-oss says interleaved; a fork that forgot to change the flag would be patched wrongly if flags were believed. The rest is patched."""
    model = zoo.build("gpt_oss")
    for layer in model.model.layers:
        layer.mlp.experts.is_concatenated = True
        layer.mlp.experts.is_transposed = False
    with pytest.raises(moepatch.NothingMatched, match=r"layers\.0\.mlp\.experts \(GptOssExperts\)"):
        moepatch.optimize(model, dense=False)
    report = moepatch.report(moepatch.optimize(model))
    assert not report.plan.mixture and report.patched > 0
    assert [r.class_name for r in report.plan.refusals] == ["GptOssExperts"] * len(model.model.layers)
    assert {type(layer.mlp.experts).__name__ for layer in model.model.layers} == {"GptOssExperts"}
    assert "its mixture of experts is left alone: see the reasons" in report.notes


def test_a_list_of_experts_is_refused_in_words():
    model = nn.Module()
    model.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    model.proj = nn.Linear(4, 4)
    with pytest.raises(moepatch.NothingMatched, match=r"experts \(ModuleList\): its experts are separate modules"):
        moepatch.optimize(model)


def test_convolutions_and_lists_of_layers_are_not_suspects():
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Conv1d(4, 4, 3), nn.Conv1d(4, 4, 3)])
    with pytest.raises(moepatch.NothingMatched, match="no mixture of experts"):
        moepatch.optimize(model)


@pytest.mark.parametrize("numbers", [[], [7.0], [1.702, 7.0], [10.0, 0.02]])
def test_activations_are_recognised_by_value_with_any_other_numbers_around(numbers):
    layout = fused_layout(up="u", down="d", gated=True)
    assert recognise(lambda pre: F.silu(pre.chunk(2, -1)[0]) * pre.chunk(2, -1)[1], layout, numbers).name == "swiglu"
    nearly = recognise(lambda pre: F.silu(pre.chunk(2, -1)[0] * 1.001) * pre.chunk(2, -1)[1], layout, numbers)
    assert nearly is None


def test_no_family_is_known_by_name():
    """No class name of transformers' experts or routers occurs in the package."""
    from pathlib import Path

    names = set()
    for name in zoo.FAMILIES:
        if zoo.available(name) is None:
            names |= {type(m).__name__ for m in zoo.build(name).modules() if type(m).__module__.startswith("transformers.models")}
    package = Path(moepatch.__file__).parent
    text = "\n".join(path.read_text() for path in package.rglob("*.py"))
    assert len(names) > 500 and not [name for name in names if name in text]


def test_a_plan_prints_becomes_json_and_is_edited(qwen3):
    plan = moepatch.plan(qwen3)
    data = json.loads(plan.to_json())
    assert data["patterns"][0]["fqns"] == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    choices = data["patterns"][0]["choices"]
    assert list(choices) == ["quack", "triton", "torch", "reference", "te", "te_fp8"] and choices["torch"] == choices["reference"] == "available"
    data["patterns"][0]["planned"] = "reference"
    data["patterns"][0]["fqns"] = data["patterns"][0]["fqns"][1:]
    edited = plan.edited(json.dumps(data))
    moepatch.optimize(qwen3, plan=edited)
    patched = moepatch.report(qwen3).plan
    assert [(p.backend, p.fqns) for p in patched.mixture] == [("reference", ("model.layers.1.mlp.experts",))]
    assert patched.patterns[1:] == plan.patterns[1:]
    assert type(qwen3.model.layers[0].mlp.experts).__name__ == "Qwen3MoeExperts"


def test_a_plan_without_a_module(qwen3):
    plan = moepatch.plan(qwen3)
    moepatch.optimize(qwen3, plan=plan.without("model.layers.0.mlp.experts", "model.norm"))
    assert [p.fqns for p in moepatch.report(qwen3).plan.mixture] == [("model.layers.1.mlp.experts",)]
    assert moepatch.report(qwen3).patched == sum(len(p.sites) for p in plan.patterns) - 2
    assert type(qwen3.model.norm).__name__ == "Qwen3MoeRMSNorm"
    with pytest.raises(moepatch.PlanMismatch, match=r"no module named 'model\.layers\.0\.mlp\.expert'\. Did you mean"):
        plan.without("model.layers.0.mlp.expert")


def test_planning_changes_nothing(qwen3):
    from facts import facts

    before = facts(qwen3)
    state = torch.get_rng_state()
    moepatch.plan(qwen3)
    assert facts(qwen3) == before and torch.equal(torch.get_rng_state(), state)


def test_third_parties_register_a_matcher(qwen3):
    seen = []

    @moepatch.register_matcher("test.first", priority=1000)
    def refuse_the_first(found, scan: Scan, memo):
        seen.append(found.fqn)
        if found.fqn == "model.layers.0.mlp.experts":
            return moepatch.site.Refusal(fqns=found.fqns, class_name="x", reason="because the test says so")
        return None

    try:
        with pytest.raises(moepatch.MoePatchError, match="a matcher named 'test.first' already"):
            moepatch.register_matcher("test.first")(refuse_the_first)
        moepatch.optimize(qwen3)
        assert moepatch.report(qwen3).plan.refusals[0].reason == "because the test says so"
        assert [p.fqns for p in moepatch.report(qwen3).plan.mixture] == [("model.layers.1.mlp.experts",)] and "" in seen
    finally:
        registry.unregister("test.first")


def test_scan_names_shared_modules_once_with_all_their_names():
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleDict({"c": shared})})
    scan = Scan(model)
    assert scan.of(shared).fqns == ("a", "b.c")
    assert [attribute for _, attribute in scan.of(shared).parents] == ["a", "c"]
    assert len(list(scan)) == 3


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4_text", "jetmoe", "dbrx", "longcat_flash", "nemotron_h"])
def test_the_reference_backend_serves_every_contract(name):
    model = zoo.build(name)
    truth = compare.step(name, model)
    overrides = {"parallel_linear": "reference"} if name == "jetmoe" else {"experts": "reference"}
    moepatch.optimize(model, **overrides)
    found = compare.step(name, model)
    assert all(compare.error(found[1][key], grad) <= 1e-5 for key, grad in truth[1].items())


class ScaledMlp(nn.Module):
    """An MLP whose result is multiplied by what it holds in some form."""

    def __init__(self, form):
        super().__init__()
        self.up, self.down, self.form = nn.Linear(16, 24), nn.Linear(24, 16), form

    def forward(self, x):
        factor = self.form["factor"] if isinstance(self.form, dict) else self.form[0]
        return self.down(F.gelu(self.up(x))) * factor


@pytest.mark.parametrize("make", [lambda x: (x,), lambda x: [x], lambda x: {"factor": x}, lambda x: torch.tensor([x])])
def test_modules_that_hold_other_numbers_are_tried_each(make):
    model = nn.Sequential(ScaledMlp(make(1.0)), ScaledMlp(make(0.5)), ScaledMlp(make(1.0)))
    assert {fqn for pattern in moepatch.plan(model).patterns for fqn in pattern.fqns} == {"0", "2"}

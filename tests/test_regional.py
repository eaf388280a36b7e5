"""Regional compilation: the same numbers from compiled layers, graphs and breaks counted, and nothing left when it is undone."""

from __future__ import annotations

import copy
import functools
import pickle
import shutil

import compare
import pytest
import torch
import zoo
from facts import facts
from ranks import on_ranks
from test_parallel import mesh_of, whole
from torch import nn

import moepatch
from moepatch.registry import compute
from moepatch.regional import CompileLayer, compile_layers, layer_graphs
from moepatch.surgery import Journal


class Layer(nn.Module):
    """A layer that breaks its graph on request."""

    def __init__(self, breaks=False):
        super().__init__()
        self.linear, self.breaks = nn.Linear(4, 4), breaks

    def forward(self, x):
        x = self.linear(x)
        if self.breaks:
            torch._dynamo.graph_break()
        return torch.relu(x) + 1


class Stack(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def compiled(model, backend="aot_eager", **options):
    journal = Journal()
    for step in compile_layers(model, backend, **options):
        journal.do(step)
    return journal


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("table", ["norm", "residual", "mlp", "attention_block", "latent"])
def test_a_compiler_sees_plain_torch(table, monkeypatch):
    """Libraries' kernels stop it (Liger's norm does), and it fuses these by itself."""
    plain = compute(table, "reference")
    assert compute(table, "reference") is plain
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert compute(table, "triton") is plain
    assert compute("experts", "torch") is not compute("experts", "reference")


def test_layers_of_a_class_share_one_graph():
    model, x = Stack(*(Layer() for _ in range(4))), torch.randn(2, 4, requires_grad=True)
    wanted = model(x)
    journal = compiled(model)
    (record,) = layer_graphs(journal.steps)
    assert str(record) == "4 x Layer: not called yet"
    assert compare.error(model(x).detach(), wanted.detach()) < 1e-6
    assert record.to_dict() == {"class": "Layer", "layers": 4, "graphs": 1, "breaks": {}}
    journal.undo()
    assert all(layer._compiled_call_impl is None for layer in model.layers)


def test_breaks_are_counted_with_their_reason():
    model, x = Stack(Layer(breaks=True)), torch.randn(2, 4)
    wanted = model(x)
    (record,) = layer_graphs(compiled(model).steps)
    assert compare.error(model(x).detach(), wanted.detach()) < 1e-6
    assert record.graphs == 2 and sum(record.breaks.values()) == 1
    assert "graph_break" in str(record) and "2 graphs, 1 breaks" in str(record)


def test_copies_and_pickles_are_not_compiled():
    model = Stack(Layer(), Layer())
    journal = compiled(model)
    model(torch.randn(2, 4, requires_grad=True))
    twin, twin_journal = pickle.loads(pickle.dumps((model, journal)))
    other = copy.deepcopy(model)
    assert all(layer._compiled_call_impl is None for layer in (*twin.layers, *other.layers))
    twin_journal.undo()
    assert layer_graphs(journal.steps)[0].graphs == 1


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_with_its_options():
    model, x = Stack(Layer()), torch.randn(2, 4)
    wanted = model(x).detach()
    compiled(model, "inductor", mode="default", dynamic=False)
    assert compare.error(model(x).detach(), wanted) < 1e-5


def quiet(name):
    """Without a cache layers are alike; with one each has its number."""
    model = zoo.build(name)
    model.config.use_cache = False
    return model


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "mixtral"])
def test_patched_families(name):
    """Experts included: one graph for all layers; with activation checkpointing too."""
    model = quiet(name)
    outputs, grads = compare.step(name, model)
    moepatch.optimize(model)
    journal = compiled(model, "aot_eager")
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        found, found_grads = compare.step(name, model)
        assert all(compare.error(found[key], value) < 1e-5 for key, value in outputs.items())
        assert compare.together(found_grads, grads) < 1e-5
    (record,) = layer_graphs(journal.steps)
    assert record.layers == 2 and not record.breaks
    journal.undo()
    moepatch.restore(model)
    assert not any(isinstance(step, CompileLayer) for step in journal.steps)
    assert compare.error(compare.step(name, model)[0]["logits"], outputs["logits"]) == 0


@pytest.mark.parametrize("dense", [True, False])
def test_optimize_compiles_and_restore_undoes_it(dense, monkeypatch):
    monkeypatch.setattr(moepatch.carrying_out, "compile_layers", functools.partial(compile_layers, backend="eager"))
    model = quiet("qwen3_moe")
    outputs, grads = compare.step("qwen3_moe", model)
    moepatch.optimize(model, compile="regional", dense=dense)
    (record,) = moepatch.report(model).compiled
    assert record.layers == 2 and record.graphs == 0
    found, found_grads = compare.step("qwen3_moe", model)
    assert compare.error(found["logits"], outputs["logits"]) < 1e-5 and compare.together(found_grads, grads) < 1e-5
    assert record.graphs > 0 and str(record) in str(moepatch.report(model))
    moepatch.restore(model)
    assert all(layer._compiled_call_impl is None for layer in model.model.layers)
    assert compare.error(compare.step("qwen3_moe", model)[0]["logits"], outputs["logits"]) == 0


def test_optimize_refuses_other_ways_to_compile(qwen3):
    before = facts(qwen3)
    with pytest.raises(moepatch.MoePatchError, match="'whole'; it can be 'regional'"):
        moepatch.optimize(qwen3, compile="whole")
    assert facts(qwen3) == before


def compiled_under_fsdp():
    """A sharded model before and after its layers are compiled."""
    torch._dynamo.reset()
    model = zoo.build("qwen3_moe", num_hidden_layers=1)
    model.config.use_cache = False
    moepatch.optimize(model, mesh_of({"ep": 2}), verify=False, dense=False)
    outputs, grads = compare.step("qwen3_moe", model)
    journal = compiled(model, "eager")
    found, found_grads = compare.step("qwen3_moe", model)
    assert compare.error(found["logits"], outputs["logits"]) < 1e-6
    assert all(compare.error(whole(found_grads[key]), whole(grad)) < 1e-5 for key, grad in grads.items())
    return layer_graphs(journal.steps)[0].to_dict()


def test_compiled_layers_under_fsdp2():
    """Hooks and dispatch break graphs; the numbers stay those of the sharded model."""
    for found in on_ranks(2, compiled_under_fsdp):
        assert found["layers"] == 1 and found["graphs"] > 0

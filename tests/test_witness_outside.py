"""Modules that differ from a kind in what they keep outside of themselves, by a modulus, by a soft limit or under some masks: none is taken."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from test_witness import SUBJECTS, answer, built, flawed, tokens

from moepatch.site import Left, Refusal, Site

COUNT = 0
SEEN = []
STATISTICS = {"calls": 0}


def counts_globally(module, x, y):
    global COUNT
    COUNT += 1
    return y


def appends_globally(module, x, y):
    SEEN.append(tokens(x))
    return y


def counts_in_a_dict(module, x, y):
    STATISTICS["calls"] += 1
    return y


def counts_in_a_default(module, x, y, seen=[]):  # noqa: B006
    seen.append(1)
    return y


def counts_on_its_class(module, x, y):
    cls = next(cls for cls in type(module).__mro__ if "forward" in vars(cls) and cls.__module__.startswith("transformers"))
    cls.calls = vars(cls).get("calls", 0) + 1
    return y


def counter():
    calls = 0

    def count(module, x, y):
        nonlocal calls
        calls += 1
        return y

    return count


def total():
    sums = torch.zeros(1)

    def add(module, x, y):
        sums.add_(1)
        return y

    return add


def every(modulus):
    def hit(count):
        return count % modulus == 0

    return lambda module, x, y: y * 1.01 if hit(tokens(x)) else y


#: What is done to the result of a module, and a word of the reason.
FLAWS = {
    "a global counter": (counts_globally, "COUNT"),
    "a global list": (appends_globally, "SEEN"),
    "a global dict": (counts_in_a_dict, "STATISTICS"),
    "a default": (counts_in_a_default, "a default of counts_in_a_default"),
    "its class": (counts_on_its_class, "calls"),
    "a closure's counter": (counter(), "calls"),
    "a closure's tensor": (total(), "sums"),
    "a modulus in a closure": (every(11), "of 11|11 tokens"),
    "a large modulus in a closure": (every(131), "of 131|131 tokens"),
    "a soft limit of 1e3": (lambda m, x, y: 1e3 * torch.tanh(y / 1e3), ""),
    "a soft limit of 1e4": (lambda m, x, y: 1e4 * torch.atan(y / 1e4), ""),
    "a soft limit by a sigmoid": (lambda m, x, y: 4e3 * (torch.sigmoid(y / 1e3) - 0.5), ""),
}
CHOSEN = ("experts", "expert list", "norm", "mlp", "residual", "router")


@pytest.mark.parametrize("flaw", FLAWS)
@pytest.mark.parametrize("subject", CHOSEN)
def test_what_is_kept_or_bent_is_not_taken(subject, flaw):
    maker, name, matcher = SUBJECTS[subject]
    change, word = FLAWS[flaw]
    model = built(maker)
    module = model.get_submodule(name)
    if flaw == "its class" and not type(module).__module__.startswith("transformers"):
        pytest.skip("its class is of no transformers file")
    cls = type(module)
    flawed(module, change)
    try:
        found = answer(model, name, matcher)
    finally:
        for base in cls.__mro__:
            if "calls" in vars(base):
                del base.calls
    assert not isinstance(found, Site)
    if isinstance(found, (Left, Refusal)) and subject in ("experts", "norm"):
        assert re.search(word, found.reason), found.reason


def test_experts_that_a_scale_model_does_not_have_are_tried():
    model = built("llama4_text")
    block = model.get_submodule("model.layers.0.feed_forward")

    def seventh(module, x, y):
        experts = module.gate_up_proj.shape[0]
        scale = torch.where(torch.arange(experts) % 7 == torch.arange(experts), 1.0, 1.5)
        return (y.view(experts, -1) * scale[:, None]).view(y.shape)

    assert block.experts.gate_up_proj.shape[0] > 7
    assert isinstance(answer(model, "model.layers.0.feed_forward", "scored_block"), Site)
    flawed(block.experts, seventh)
    found = answer(model, "model.layers.0.feed_forward", "scored_block")
    assert isinstance(found, Refusal) and "of 8 in" in found.reason, found


def test_rows_of_experts_that_a_scale_model_does_not_have_are_tried():
    model, name = built("jetmoe"), "model.layers.0.mlp.input_linear"
    layer = model.get_submodule(name)
    forward = inspect.unwrap(type(layer).forward)

    class Mine(type(layer)):
        def forward(self, inputs, expert_size):
            y = forward(self, inputs, expert_size)
            return torch.cat([part * (1.0 if e % 7 == e else 1.5) for e, part in enumerate(y.split(list(expert_size)))])

    count = layer.weight.shape[0]
    assert isinstance(answer(model, name, "parallel_linear"), Site)
    layer.__class__ = Mine
    assert count <= 7 or not isinstance(answer(model, name, "parallel_linear"), Site)


#: What a mixer does with a mask, beside what it does.
MASKS = {
    "padding behind": lambda y, mask: y * 1.01 if mask is not None and not bool(mask[:, -1].all()) else y,
    "padding before both": lambda y, mask: y * 1.01 if mask is not None and not bool(mask[:, 0].any()) else y,
    "padding between": lambda y, mask: y * 1.01 if mask is not None and bool((mask[:, 1:-1] == 0).any()) and bool(mask[:, 0].any()) else y,
    "nothing but padding": lambda y, mask: y.nan_to_num() + 1 if mask is not None and not bool(mask.any(1).all()) else y,
    "nothing hidden": lambda y, mask: y * 1.01 if mask is not None and bool(mask.all()) else y,
    "whole numbers": lambda y, mask: y * 1.01 if mask is not None and not mask.is_floating_point() else y,
}


@pytest.mark.parametrize("flaw", MASKS)
@pytest.mark.parametrize("subject", ["ssd", "delta", "selective"])
def test_every_kind_of_mask_is_tried(subject, flaw):
    maker, name, matcher = SUBJECTS[subject]
    model = built(maker)
    module = model.get_submodule(name)
    cls, forward = type(module), inspect.unwrap(type(module).forward)
    parameters = list(inspect.signature(forward).parameters.values())
    (mask,) = [p.name for p in parameters if "mask" in p.name]
    change = MASKS[flaw]

    def changed(mask, out):
        return (change(out[0], mask), *out[1:]) if isinstance(out, tuple) else change(out, mask)

    taken = ", ".join(f"**{p.name}" if p.kind is p.VAR_KEYWORD else p.name + ("" if p.default is p.empty else f"={p.default!r}") for p in parameters)
    handed = ", ".join(f"**{p.name}" if p.kind is p.VAR_KEYWORD else p.name for p in parameters)
    scope = {**forward.__globals__, "changed": changed, "own": forward}
    exec(f"def forward({taken}):\n    self.layer_idx\n    return changed({mask}, own({handed}))", scope, found := {})
    module.__class__ = type(f"Masked{cls.__name__}", (cls,), {"forward": found["forward"]})
    assert not isinstance(answer(model, name, matcher), Site)

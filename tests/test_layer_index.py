"""Equal layers are read once, and no reading stands for a layer that asks which one it is."""

from __future__ import annotations

import inspect

import pytest
import zoo
from torch import nn

from moepatch import registry
from moepatch.match import attention_block, latent, mixers
from moepatch.scan import Scan
from moepatch.site import Site

#: A zoo model, how the names of its modules end, the matcher, and where it reads.
SUBJECTS = {
    "attention": ("qwen3_moe", "self_attn", "attention_block", attention_block),
    "latent": ("deepseek_v3", "self_attn", "latent", latent),
    "ssd": ("nemotron_h", "mixer", "ssd_mixer", mixers),
}


def is_even(module):
    return module.layer_idx % 2 == 0


def swallowed(module, x):
    try:
        return x * 1.01 if module.layer_idx > 0 else x
    except Exception:
        return x


#: Ways to be different in the layers with another index than 0.
ASKS = {
    "compares": lambda m, x: x if m.layer_idx == 0 else x * 1.01,
    "in a helper": lambda m, x: x if is_even(m) else x * 1.01,
    "a list": lambda m, x: x * [1.0, 1.01, 1.01, 1.01][m.layer_idx],
    "a dict": lambda m, x: x * {0: 1.0}.get(m.layer_idx, 1.01),
    "words": lambda m, x: x * (1.0 if f"{m.layer_idx}" == "0" else 1.01),
    "its type": lambda m, x: x if not isinstance(m.layer_idx, int) or m.layer_idx == 0 else x * 1.01,
    "of true": lambda m, x: x * 1.01 if m.layer_idx else x,
    "computes": lambda m, x: x * (1 + 0.01 * m.layer_idx),
    "in evaluation": lambda m, x: x if m.training or m.layer_idx == 0 else x * 1.01,
    "swallowed": swallowed,
}  # fmt: skip


def twice(maker, child, change=None):
    """Two equal modules of the model with the indices 0 and 3, whose results are changed."""
    model = zoo.build(maker)
    name = next(name for name, module in model.named_modules() if name.endswith(child) and hasattr(module, "layer_idx"))
    first, second = model.get_submodule(name), zoo.build(maker).get_submodule(name)
    if change is not None:
        change_class(first, change)
    first.layer_idx, second.layer_idx = 0, 3
    second.__class__ = first.__class__
    if "config" in vars(first):
        second.config = first.config
    return first, second


def change_class(module, change):
    """With the arguments of the family's own, as matchers ask for them."""
    cls = type(module)
    forward = inspect.unwrap(cls.forward)

    def result(self, out):
        return (change(self, out[0]), *out[1:]) if isinstance(out, tuple) else change(self, out)

    parameters = [*inspect.signature(forward).parameters.values()]
    taken = ", ".join({p.VAR_KEYWORD: f"**{p.name}"}.get(p.kind, p.name) + ("" if p.default is p.empty else f"=_{p.name}") for p in parameters)
    handed = ", ".join({p.VAR_KEYWORD: f"**{p.name}"}.get(p.kind, p.name) for p in parameters)
    scope = {**forward.__globals__, "inner": forward, "result": result, **{f"_{p.name}": p.default for p in parameters}}
    exec(f"def forward({taken}):\n    return result(self, inner({handed}))", scope)
    module.__class__ = type(f"Asking{cls.__name__}", (cls,), {"forward": scope["forward"]})


def answers(modules, matcher):
    scan, memo = Scan(nn.ModuleList(modules)), {}
    match = next(m for m in registry.matchers() if m.name == matcher).match
    return [match(scan.of(module), scan, memo) for module in modules]


@pytest.mark.parametrize("subject", SUBJECTS)
def test_equal_layers_are_read_once(subject, monkeypatch):
    maker, child, matcher, where = SUBJECTS[subject]
    reads, read = [], where._read
    monkeypatch.setattr(where, "_read", lambda *args: reads.append(args) or read(*args))
    found = answers(twice(maker, child), matcher)
    assert all(isinstance(site, Site) for site in found) and len(reads) == 1


@pytest.mark.parametrize("ask", ASKS)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_layer_that_asks_which_one_it_is_is_read_by_itself(subject, ask):
    maker, child, matcher, _ = SUBJECTS[subject]
    _, second = answers(twice(maker, child, ASKS[ask]), matcher)
    assert not isinstance(second, Site)

"""Modules that are almost of a kind: equal to it on ordinary numbers, and different somewhere. None is taken."""

from __future__ import annotations

import copy
import inspect

import listed
import pytest
import torch
import zoo
from torch import nn
from torch.nn import functional as F
from transformers import BambaConfig, BambaForCausalLM

import moepatch
from moepatch import registry
from moepatch.scan import Scan
from moepatch.site import Left, Refusal, Site


class AddAuxiliaryLoss(torch.autograd.Function):
    """DeepSeek's: a loss that only the backward pass knows."""

    @staticmethod
    def forward(ctx, x, loss):
        ctx.needed = loss.requires_grad
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, torch.ones(()) if ctx.needed else None


def tokens(x):
    return x.numel() // x.shape[-1]


def counted(module, x, y):
    module.register_buffer("steps", module.steps + 1 if "steps" in module._buffers else torch.ones(()))
    return y


def kept(module, x, y):
    module.l_aux = y.mean()
    return y


def hidden_loss(module, x, y):
    parameter = next(module.parameters(), None)
    return y if parameter is None else AddAuxiliaryLoss.apply(y, 1e-3 * parameter.square().mean())


def written(module, x, y):
    if not torch.is_grad_enabled():
        x.add_(1e-3)
    return y


#: What is done to the floating result `y` of tokens `x`, and a word of the reason.
FLAWS = {
    "clamped at 10": (lambda m, x, y: y.clamp(-10, 10), "aten.clamp"),
    "clamped at 1e3": (lambda m, x, y: y.clamp(max=1e3), "aten.clamp"),
    "NaN becomes 0": (lambda m, x, y: torch.nan_to_num(y), "aten.nan_to_num"),
    "rounded": (lambda m, x, y: (y * 2**24).round() / 2**24, "aten.round"),
    "small is 0": (lambda m, x, y: torch.where(y.abs() < 1e-4, 0.0, y), ""),
    "one token": (lambda m, x, y: y * 2 if tokens(x) == 1 else y, "1 token"),
    "many tokens": (lambda m, x, y: y * 1.01 if tokens(x) > 512 else y, ""),
    "evaluation": (lambda m, x, y: y if m.training else y * 1.001, "in evaluation"),
    "dropout": (lambda m, x, y: F.dropout(y, 0.1, m.training), ""),
    "mean": (lambda m, x, y: y + 1e-3 * x.mean(), "differs"),
    "upcast": (lambda m, x, y: y.double(), "dtype|float64"),
    "detached": (lambda m, x, y: y.detach(), "without gradient"),
    "random": (lambda m, x, y: y + 0 * torch.rand(()), "random numbers"),
    "counts": (counted, "steps"),
    "l_aux": (kept, "l_aux"),
    "hidden loss": (hidden_loss, "adds a loss of its own"),
    "in place": (written, "in place"),
    "branch": (lambda m, x, y: y * 0.5 if y.abs().max() > 1e4 else y, ""),
    "branch on a number": (lambda m, x, y: y * 0.5 if y.abs().max().item() > 1e30 else y, "_local_scalar_dense"),
}  # fmt: skip
#: A zoo model (or a function that makes one), a module of it, its matcher, and which of its results is flawed.
SUBJECTS = {
    "experts": ("qwen3_moe", "model.layers.0.mlp.experts", "experts"),
    "fused transposed": ("gpt_oss", "model.layers.0.mlp.experts", "experts"),
    "expert list": (listed.listed, "layers.0.mlp", "expert_list"),
    "scored block": ("llama4_text", "model.layers.0.feed_forward", "scored_block"),
    "parallel linear": ("jetmoe", "model.layers.0.mlp.input_linear", "parallel_linear"),
    "router": ("qwen3_moe", "model.layers.0.mlp.gate", "router"),
    "norm": ("qwen3_moe", "model.norm", "norm"),
    "mlp": ("deepseek_v3", "model.layers.0.mlp", "mlp"),
    "attention": ("qwen3_moe", "model.layers.0.self_attn", "attention_block"),
    "latent": ("deepseek_v3", "model.layers.0.self_attn", "latent"),
    "ssd": ("nemotron_h", "model.layers.0.mixer", "ssd_mixer"),
    "delta": ("qwen3_next", "model.layers.0.linear_attn", "delta_mixer"),
    "selective": ("jamba", "model.layers.0.mamba", "selective_mixer"),
    "residual": ("qwen3_moe", "model.layers.0", "residual"),
    "residual with one branch": ("nemotron_h", "model.layers.1", "residual"),
}


def flawed(module, flaw):
    """The module with another forward, in place."""
    cls = type(module)
    forward = inspect.unwrap(cls.forward)

    def changed(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        x = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        if isinstance(out, tuple):
            return (flaw(self, x, out[0]), *out[1:])
        return flaw(self, x, out)

    changed.__signature__ = inspect.signature(forward)
    scope = {**forward.__globals__, "changed": changed}
    # With the arguments of the family's own and the names that matchers look for in its module.
    parameters = list(inspect.signature(forward).parameters.values())
    handed = ", ".join({p.VAR_KEYWORD: f"**{p.name}", p.VAR_POSITIONAL: f"*{p.name}", p.KEYWORD_ONLY: f"{p.name}={p.name}"}.get(p.kind, p.name) for p in parameters)
    defaults = {f"_default_{p.name}": p.default for p in parameters if p.default is not p.empty}
    taken = ", ".join(
        {p.VAR_KEYWORD: f"**{p.name}", p.VAR_POSITIONAL: f"*{p.name}"}.get(p.kind, p.name) + (f"=_default_{p.name}" if p.default is not p.empty else "")
        for p in parameters
    )
    exec(f"def forward({taken}):\n    {'self.layer_idx' if 'layer_idx' in vars(module) else 'pass'}\n    return changed({handed})", scope | defaults, found := {})
    module.__class__ = type(f"Flawed{cls.__name__}", (cls,), {"forward": found["forward"]})


def built(maker):
    if not isinstance(maker, str):
        return maker()
    if zoo.available(maker) is not None:
        pytest.skip(zoo.available(maker))
    return zoo.build(maker)


def answer(model, name, matcher):
    scan = Scan(model)
    found = scan.of(model.get_submodule(name))
    return next(m for m in registry.matchers() if m.name == matcher).match(found, scan, {})


@pytest.mark.parametrize("subject", SUBJECTS)
def test_the_module_itself_is_taken(subject):
    maker, name, matcher = SUBJECTS[subject]
    model = built(maker)
    assert isinstance(answer(model, name, matcher), Site)
    flawed(model.get_submodule(name), lambda m, x, y: y)
    assert isinstance(answer(model, name, matcher), Site)


@pytest.mark.parametrize("flaw", FLAWS)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_what_differs_somewhere_is_not_taken(subject, flaw):
    maker, name, matcher = SUBJECTS[subject]
    change, word = FLAWS[flaw]
    model = built(maker)
    flawed(model.get_submodule(name), change)
    found = answer(model, name, matcher)
    assert not isinstance(found, Site)
    if isinstance(found, (Left, Refusal)):
        print(subject, flaw, found.reason)

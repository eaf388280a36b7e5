"""Modules that are almost of a kind: equal to it on ordinary numbers, and different somewhere. None is taken."""

from __future__ import annotations

import copy
import inspect
import random
import re

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
    "rounded": (lambda m, x, y: (y * 2**24).round() / 2**24, ""),
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


def clamped(y):
    return y.clamp(-1e4, 1e4)


class ClampedGradient(torch.autograd.Function):
    """The gradient is cut off at 100."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.clamp(-100, 100)


def counts_what_is_trained(module, x, y):
    if torch.is_grad_enabled() and module.training:
        module.seen = getattr(module, "seen", 0) + 1
    return y


def writes_in_training(module, x, y):
    if torch.is_grad_enabled():
        x.data.mul_(1.001)
    return y


def asks_for_frozen_weights(module, x, y):
    parameter = next(module.parameters(), None)
    return y * 1.01 if parameter is not None and not parameter.requires_grad else y


#: What shows under other circumstances only: other dtypes, gradients or none, other shapes.
ELSEWHERE = {
    "5 sequences": lambda m, x, y: y * 1.01 if x.ndim == 3 and x.shape[0] > 4 else y,
    "3 tokens": lambda m, x, y: y * 1.01 if tokens(x) == 3 else y,
    "bfloat16": lambda m, x, y: y * 1.1 if x.dtype is torch.bfloat16 else y,
    "clamped in float16": lambda m, x, y: y.clamp(-6e4, 6e4) if x.dtype is torch.float16 else y,
    "autocast": lambda m, x, y: y * 1.1 if torch.is_autocast_enabled("cpu") else y,
    "inference mode": lambda m, x, y: y * 1.1 if torch.is_inference_mode_enabled() else y,
    "inputs without gradient": lambda m, x, y: y * 1.01 if torch.is_grad_enabled() and not x.requires_grad else y,
    "frozen weights": asks_for_frozen_weights,
    "evaluation with gradients": lambda m, x, y: y * 1.01 if torch.is_grad_enabled() and not m.training else y,
    "detached in evaluation": lambda m, x, y: y if m.training else y.detach(),
    "hidden loss in evaluation": lambda m, x, y: y if m.training else hidden_loss(m, x, y),
    "clamped gradient": lambda m, x, y: ClampedGradient.apply(y),
    "counts what is trained": counts_what_is_trained,
    "writes into its input in training": writes_in_training,
    "Python's random numbers": lambda m, x, y: y * 1.01 if m.training and random.random() < 0.01 else y,
    "in a helper": lambda m, x, y: clamped(y),
    "tolist": lambda m, x, y: y * 0.5 if y.detach().abs().max().tolist() > 1e30 else y,
    "laid out otherwise": lambda m, x, y: y if x.is_contiguous() else y * 1.01,
}
#: Those have tokens without sequences; this one's own code takes no other layout.
NOT_FOR = {
    "experts": {"5 sequences", "3 tokens"}, "fused transposed": {"5 sequences", "3 tokens"}, "parallel linear": {"5 sequences", "3 tokens"},
    "router": {"5 sequences"}, "expert list": {"laid out otherwise"},
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
        assert found.reason and "\n" not in found.reason


@pytest.mark.parametrize("subject", SUBJECTS)
def test_what_differs_under_other_circumstances_is_not_taken(subject):
    maker, name, matcher = SUBJECTS[subject]
    taken = []
    for flaw in ELSEWHERE.keys() - NOT_FOR.get(subject, set()):
        model = built(maker)
        flawed(model.get_submodule(name), ELSEWHERE[flaw])
        if isinstance(answer(model, name, matcher), Site):
            taken.append(flaw)
    assert taken == []


@pytest.mark.parametrize("flaw", [name for name, (_, word) in FLAWS.items() if word])
def test_the_reason_names_it(flaw):
    change, word = FLAWS[flaw]
    model = zoo.build("qwen3_moe")
    for name, matcher in (("model.layers.0.mlp.experts", "experts"), ("model.layers.0", "residual")):
        flawed(model.get_submodule(name), change)
        found = answer(model, name, matcher)
        assert isinstance(found, (Left, Refusal)) and re.search(word, found.reason), (name, found)


class Experts(nn.Module):
    """Remote code; `which` says what becomes of the tokens of an expert, `weigh` of the routing weights."""

    def __init__(self, count=64, which=lambda e, token, ids: token, weigh=lambda w: w, expert=lambda e: e):
        super().__init__()
        self.count, self.which, self.weigh, self.expert = count, which, weigh, expert
        self.w_in, self.w_out = nn.Parameter(torch.randn(count, 48, 32) * 0.1), nn.Parameter(torch.randn(count, 32, 24) * 0.1)

    def forward(self, x, ids, weights):
        y, weights = torch.zeros_like(x), self.weigh(weights)
        for e in range(self.count):
            token, slot = torch.where(ids == e)
            slot, token = slot[: len(kept := self.which(e, token, ids))], kept
            gate, up = (x[token] @ self.w_in[self.expert(e)].T).chunk(2, -1)
            y = y.index_add(0, token, F.silu(gate) * up @ self.w_out[self.expert(e)].T * weights[token, slot, None])
        return y


EXPERTS = {
    "the last of 64 is skipped": {"which": lambda e, token, ids: token[:0] if e == 63 else token},
    "the last of 64 is skipped, one for each token": {"which": lambda e, token, ids: token[:0] if e == 63 and ids.shape[1] == 1 else token},
    "a capacity of 32": {"which": lambda e, token, ids: token[:32]},
    "a capacity of 2000": {"which": lambda e, token, ids: token[:2000]},
    "dropped when there are more than 100": {"which": lambda e, token, ids: token[:0] if len(token) > 100 else token},
    "the last two change places": {"expert": lambda e: {62: 63, 63: 62}.get(e, e)},
    "weights below 1e-3 are 0": {"weigh": lambda w: torch.where(w < 1e-3, 0.0, w)},
    "weights below 1e-12 are 0": {"weigh": lambda w: w.masked_fill(w < 1e-12, 0.0)},
    "weights are positive": {"weigh": lambda w: w.clamp(min=0)},
    "weights are at most 1e6": {"weigh": lambda w: w.clamp(max=1e6)},
}


@pytest.mark.parametrize("flaw", EXPERTS)
def test_experts_that_lose_tokens_are_refused(flaw):
    assert isinstance(answer(nn.ModuleList([Experts()]), "0", "experts"), Site)
    assert isinstance(answer(nn.ModuleList([Experts(**EXPERTS[flaw])]), "0", "experts"), Refusal)


def bamba():
    torch.manual_seed(0)
    config = BambaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, attn_layer_indices=[1],
        mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16, mamba_n_groups=2, mamba_chunk_size=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = BambaForCausalLM(config).train()
    zoo.randomize_(model)
    return model


def test_a_layer_that_returns_a_tuple_is_patched_and_returns_it():
    plain, ids = bamba(), torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    patched = moepatch.optimize(copy.deepcopy(plain))
    assert isinstance(patched.model.layers[0], moepatch.Patched)
    grads = []
    for model in (plain, patched):
        model(ids, labels=ids).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert all((grads[1][name] - grad).norm() <= 1e-5 * grad.norm() for name, grad in grads[0].items())
    x = torch.randn(2, 5, 64)
    tables = plain.model.rotary_emb(x, torch.arange(5)[None])
    for i in range(3):
        a, b = (model.model.layers[i](x, position_embeddings=tables) for model in (plain, patched))
        assert type(a) is type(b) is tuple and len(a) == len(b) == 2 and torch.allclose(a[0], b[0], atol=1e-5)
    plain.eval(), patched.eval()
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(plain.generate(ids, **options), patched.generate(ids, **options))


class Made(nn.Module):
    """A child whose result a test gives a form."""

    def __init__(self, form):
        super().__init__()
        self.linear, self.form = nn.Linear(16, 16), form

    def forward(self, x):
        return self.form(self.linear(x))


class Layer(nn.Module):
    """Takes apart what its child returns as `take` says."""

    def __init__(self, take, form):
        super().__init__()
        self.norm, self.child, self.take = nn.RMSNorm(16, eps=1e-6), Made(form), take

    def forward(self, x):
        return x + self.take(self.child(self.norm(x)), x)


TAKES = {
    "as it is": (lambda y, x: y, lambda y: y), "first": (lambda y, x: y[0], lambda y: (y,)), "first of a list": (lambda y, x: y[0], lambda y: [y, None]),
    "first of two": (lambda y, x: y[0], lambda y: (y, None)), "tuple or not": (lambda y, x: y[0] if isinstance(y, tuple) else y, lambda y: y),
    "of its shape": (lambda y, x: y.view(x.shape), lambda y: y.flatten(0, 1)), "by name": (lambda y, x: y["y"], lambda y: {"y": y}),
    "first of a batch": (lambda y, x: y[0], lambda y: y),
}  # fmt: skip


@pytest.mark.parametrize("take", TAKES)
def test_what_a_child_returns_is_taken_apart_as_the_layer_does(take):
    how, form = TAKES[take]
    plain = nn.ModuleList([Layer(how, form)])
    patched = moepatch.optimize(copy.deepcopy(plain))
    x = torch.randn(3, 4, 16)
    assert torch.allclose(plain[0](x), patched[0](x), atol=1e-6)


def test_planning_leaves_what_a_forward_changes_alone():
    model = zoo.build("qwen3_moe")
    experts = model.model.layers[0].mlp.experts
    experts.seen, experts.count = [], torch.zeros(())

    def change(module, x, y):
        module.seen.append(1)
        module.count += 1
        return y

    flawed(experts, change)
    assert not isinstance(answer(model, "model.layers.0.mlp.experts", "experts"), Site)
    assert experts.seen == [] and experts.count == 0

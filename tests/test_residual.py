"""Pre-norm layers: found by how they call their children, the same numbers after the patch, everything passed on, hooks heard."""

from __future__ import annotations

import copy
import pickle

import compare
import pytest
import torch
import zoo
from torch import nn

import moepatch
from moepatch.layers import residual
from moepatch.layers.norm import PatchedNorm, reference_norm
from moepatch.layers.residual import PatchedResidual, ResidualState, StreamOps
from moepatch.match.residual import match_residual
from moepatch.scan import Scan
from moepatch.site import Site
from moepatch.surgery import InjectClass

FAMILIES = ["qwen3_moe", "mixtral", "glm4_moe", "deepseek_v3", "nemotron_h"]


def found_layers(model):
    scan, memo = Scan(model), {}
    sites = [match_residual(found, scan, memo) for found in scan]
    return [site for site in sites if isinstance(site, Site)]


def both(name, **overrides):
    plain = zoo.build(name, **overrides)
    patched = moepatch.optimize(copy.deepcopy(plain))
    assert any(isinstance(m, PatchedResidual) for m in patched.modules())
    return plain, patched


def close(a, b):
    return compare.error(a.detach().float(), b.detach().float()) <= 1e-5


@pytest.fixture
def fused(monkeypatch):
    """The fused path on the CPU: every bare norm is computed outside of its module, in plain torch; the norms that were."""
    seen = []

    def bare(norm):
        # Verification brings norms of its own.
        return isinstance(norm, PatchedNorm) and not norm._forward_hooks and not isinstance(norm, residual._GivenWeight)

    def fork(norm, stream):
        if not bare(norm):
            return residual._fork(norm, stream)
        seen.append(norm)
        return stream, reference_norm(stream, norm.weight, norm._moepatch.spec)

    def add(norm, branch, stream):
        if not bare(norm):
            return residual._add(norm, branch, stream)
        seen.append(norm)
        total = stream + branch
        return total, reference_norm(total, norm.weight, norm._moepatch.spec)

    before = residual.compute
    monkeypatch.setattr(residual, "compute", lambda table, name: StreamOps(fork, add) if table == "residual" else before(table, name))
    return seen


@pytest.mark.parametrize(
    ("name", "count", "branches"),
    [
        ("qwen3_moe", 2, 2), ("mixtral", 2, 2), ("glm4_moe", 3, 2), ("deepseek_v3", 3, 2), ("nemotron_h", 4, 1), ("gpt_oss", 2, 2),
        ("llama4_text", 3, 2), ("qwen3_next", 3, 2), ("kimi_linear", 3, 2), ("jamba", 4, 2), ("olmoe", 2, 2), ("laguna", 3, 2),
    ],
)  # fmt: skip
def test_layers_are_found(name, count, branches):
    if zoo.available(name) is not None:
        pytest.skip(zoo.available(name))
    sites = found_layers(zoo.build(name))
    assert len(sites) == count and all(len(site.spec.branches) == branches for site in sites)


@pytest.mark.parametrize("name", ["gemma4_text", "afmoe", "deepseek_v4", "phimoe", "minimax", "dbrx", "cohere2_moe", "flex_olmo"])
def test_other_layers_are_left_alone(name):
    """Norms after a branch, several streams, other norms, scaled branches, one norm for two branches."""
    if zoo.available(name) is not None:
        pytest.skip(zoo.available(name))
    assert found_layers(zoo.build(name)) == []


def test_a_residual_multiplier_is_no_plain_sum():
    assert found_layers(zoo.build("granitemoe", residual_multiplier=0.5)) == []
    assert len(found_layers(zoo.build("granitemoe", residual_multiplier=1.0))) == 2


class Norm(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), 1e-5

    def forward(self, x):
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Layer(nn.Module):
    """Remote code; `step` is what a test varies."""

    def __init__(self, step):
        super().__init__()
        self.norm1, self.norm2, self.attn, self.mlp = Norm(), Norm(), nn.Linear(16, 16), nn.Linear(16, 16)
        self.step = step

    def forward(self, x, mask=None, *, flag=False, **kwargs):
        return self.step(self, x, mask, flag, kwargs)


def usual(layer, x, mask, flag, kwargs):
    x = x + layer.attn(layer.norm1(x), mask, scale=2.0, flag=flag, **kwargs)
    return x + layer.mlp(layer.norm2(x))


def test_remote_code_and_what_it_passes_on():
    (site,) = found_layers(nn.Sequential(Layer(usual)))
    attn, mlp = site.spec.branches
    assert attn.args == (("normed", None), ("argument", "mask")) and attn.rest and not mlp.rest
    assert dict(attn.kwargs) == {"scale": ("constant", 2.0), "flag": ("argument", "flag")}


ODD = {
    "parallel branches": lambda l, x, mask, flag, kw: x + l.attn(l.norm1(x), mask) + l.mlp(l.norm2(x)),
    "a scaled branch": lambda l, x, mask, flag, kw: usual(l, x, mask, flag, kw) * 1.5,
    "dropout": lambda l, x, mask, flag, kw: nn.functional.dropout(usual(l, x, mask, flag, kw), 0.1, l.training),
    "norm after": lambda l, x, mask, flag, kw: l.norm2(x + l.attn(l.norm1(x), mask)) + l.mlp(x),
    "a mask that is changed": lambda l, x, mask, flag, kw: usual(l, x, None if mask is None else (mask, 1), flag, kw),
    "a mask that decides": lambda l, x, mask, flag, kw: usual(l, x, mask, flag, kw) * (1 if mask is None else 2),
    "a flag that decides": lambda l, x, mask, flag, kw: usual(l, x, mask, flag, kw) * (2 if flag else 1),
    "a keyword that decides": lambda l, x, mask, flag, kw: usual(l, x, mask, flag, kw) * (2 if "moepatch_extra" in kw else 1),
    "two results": lambda l, x, mask, flag, kw: (usual(l, x, mask, flag, kw), x),
    "a detached stream": lambda l, x, mask, flag, kw: usual(l, x, mask, flag, kw) - x + x.detach(),
    "a branch used twice": lambda l, x, mask, flag, kw: usual(l, x, mask, flag, kw) + l.mlp(x),
}


@pytest.mark.parametrize("odd", ODD)
def test_what_is_almost_such_a_layer_is_left_alone(odd):
    assert found_layers(nn.Sequential(Layer(ODD[odd]))) == []


@pytest.mark.parametrize("name", FAMILIES)
def test_fused_layers_change_no_number(name, fused):
    plain, patched = both(name)
    (a, da), (b, db) = compare.step(name, plain), compare.step(name, patched)
    layers = [m for m in patched.modules() if isinstance(m, PatchedResidual)]
    assert len(fused) == sum(len(m._moepatch.spec.branches) for m in layers)
    assert all(close(b[key], a[key]) for key in a) and compare.together(db, da) <= 1e-5
    moepatch.restore(patched)
    assert not any(isinstance(m, PatchedResidual) for m in patched.modules())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["qwen3_moe", "nemotron_h"])
def test_gradient_checkpointing(name, reentrant, fused):
    plain, patched = both(name)
    _, truth = compare.step(name, plain)
    patched.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        patched.enable_input_require_grads()
    _, grads = compare.step(name, patched)
    layers = [m for m in patched.modules() if isinstance(m, PatchedResidual)]
    assert len(fused) == 2 * sum(len(m._moepatch.spec.branches) for m in layers)  # forward and again in backward
    assert compare.together(grads, truth) <= 1e-5


@pytest.mark.parametrize("name", ["qwen3_moe", "nemotron_h", "llama4_text"])
def test_hidden_states_and_generation(name, fused):
    plain, patched = both(name)
    inputs = zoo.inputs(name, plain)
    a, b = plain(**inputs, output_hidden_states=True), patched(**inputs, output_hidden_states=True)
    assert len(a.hidden_states) == len(b.hidden_states) and all(map(close, b.hidden_states, a.hidden_states))
    plain.eval(), patched.eval()
    ids = torch.randint(3, 128, (2, 7))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(plain.generate(ids, **options), patched.generate(ids, **options))


def test_packed_sequences_reach_attention(qwen3, fused):
    patched = moepatch.optimize(qwen3)
    seen = []
    patched.model.layers[0].self_attn.register_forward_pre_hook(lambda m, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    edges = torch.tensor([0, 5, 12], dtype=torch.int32)
    packed = {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": 7, "max_length_k": 7}
    patched(input_ids=torch.randint(3, 128, (1, 12)), **packed)
    assert set(packed) <= seen[0]


def test_hooks_on_norms_are_heard(qwen3, fused):
    patched = moepatch.optimize(qwen3)
    norm, seen = patched.model.layers[0].post_attention_layernorm, []
    norm.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    compare.step("qwen3_moe", patched)
    assert len(seen) == 1 and norm not in fused and len(fused) == 3


def test_when_a_norm_may_leave_its_module(qwen3):
    norm = moepatch.optimize(qwen3).model.norm
    assert not residual._runs_own_kernel(norm)  # computed by another backend
    norm._moepatch = type(norm._moepatch)(norm._moepatch.spec, "triton")
    assert residual._runs_own_kernel(norm)
    handle = norm.register_forward_pre_hook(lambda module, args: None)
    assert not residual._runs_own_kernel(norm)
    handle.remove()
    assert residual._runs_own_kernel(norm)
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
    assert not residual._runs_own_kernel(norm)
    handle.remove()
    norm.forward = norm.forward  # what accelerate leaves behind
    assert residual._runs_own_kernel(norm)
    norm.forward = lambda x: x
    assert not residual._runs_own_kernel(norm)


def test_a_stream_of_another_dtype_goes_the_familys_way(fused):
    plain, patched = both("nemotron_h", dtype=torch.bfloat16)
    layer = next(i for i, m in enumerate(patched.model.layers) if isinstance(m, PatchedResidual) and m.block_type == "moe")
    x = torch.randn(2, 5, 64)
    a, b = plain.model.layers[layer](x), patched.model.layers[layer](x)
    assert not fused and a.dtype == b.dtype == torch.float32 and compare.error(b, a) < 1e-2


def test_an_unknown_keyword_is_an_error_where_it_was_one():
    class Strict(Layer):
        def forward(self, x, mask=None):
            return usual(self, x, mask, False, {})

    class Linear(nn.Linear):
        def forward(self, x, mask=None, scale=None, flag=None):
            return super().forward(x)

    model = nn.Sequential(Strict(usual))
    model[0].attn = Linear(16, 16)
    (site,) = found_layers(model)
    truth = model(torch.ones(2, 3, 16))
    InjectClass(model[0], PatchedResidual, ResidualState(site.spec, "reference")).do()
    assert close(model(torch.ones(2, 3, 16)), truth)
    with pytest.raises(TypeError, match="unexpected keyword"):
        model[0](torch.ones(2, 3, 16), unknown=1)
    with pytest.raises(TypeError, match="positional"):
        model[0](torch.ones(2, 3, 16), None, None)
    with pytest.raises(TypeError, match="missing"):
        model[0](mask=None)


def test_copies_and_pickles(qwen3, fused):
    layer = moepatch.optimize(qwen3).model.layers[0]
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert isinstance(other, PatchedResidual) and other._moepatch == layer._moepatch
    assert "h + mlp(post_attention_layernorm(h))" in repr(layer)


def test_layers_under_gradient_checkpointing_are_taken():
    model = zoo.build("qwen3_moe").train()
    model.gradient_checkpointing_enable()
    assert [p.site.kind for p in moepatch.plan(model).patterns].count("residual") > 0

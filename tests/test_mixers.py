"""State-space and linear-attention mixers: patched families against unpatched ones; the kernels in Triton's interpreter."""

from __future__ import annotations

import copy
import importlib.machinery
import importlib.metadata
import importlib.util
import pickle
import sys
import types
from dataclasses import replace

import compare
import pytest
import torch
import zoo
from interpreter import let_tensors_bound_loops, needs_triton, passes_in_the_interpreter
from torch import nn

from moepatch import registry
from moepatch.gpus import GPUS
from moepatch.kernels import conv, selective, ssd
from moepatch.kinds import KINDS
from moepatch.layers.mixers import backends as mixer_backends  # importing it fills the tables
from moepatch.layers.mixers.delta import DELTA_MIXER
from moepatch.layers.mixers.delta_scan import reference_delta_scan
from moepatch.layers.mixers.selective import SELECTIVE_MIXER
from moepatch.layers.mixers.ssd import SSD_MIXER, SSDSpec, SSDWeights, reference_ssd
from moepatch.layers.mixers.ssd_scan import reference_scan
from moepatch.match import mixers
from moepatch.scan import Scan
from moepatch.site import Site
from moepatch.surgery import InjectClass

for kind in (SSD_MIXER, DELTA_MIXER, SELECTIVE_MIXER):
    KINDS.setdefault(kind.name, kind)
MATCHERS = (mixers.match_ssd, mixers.match_delta, mixers.match_selective)
#: Family, kind of its mixers, how many the tiny model has.
FAMILIES = {
    "nemotron_h": ("ssd_mixer", 1),
    "granitemoehybrid": ("ssd_mixer", 1),
    "qwen3_next": ("delta_mixer", 2),
    "qwen3_5_moe": ("delta_mixer", 2),
    "jamba": ("selective_mixer", 2),
}
BACKENDS = {"ssd_mixer": ("reference", "torch"), "delta_mixer": ("reference",), "selective_mixer": ("reference",)}
CASES = [(name, backend) for name, (kind, _) in FAMILIES.items() for backend in BACKENDS[kind]]


def sites(model):
    tree, memo = Scan(model), {}
    return [site for found in tree for match in MATCHERS if isinstance(site := match(found, tree, memo), Site)]


def patched(model, backend="reference"):
    """The model with its mixers, and nothing else, patched in place."""
    for site in sites(model):
        for name, (mixin, state) in KINDS[site.kind].injections(site.spec, backend, None).items():
            InjectClass(model.get_submodule(site.fqn).get_submodule(name), mixin, state).do()
    return model


def pair(name, backend="reference"):
    model = zoo.build(name)
    return model, patched(copy.deepcopy(model), backend)


def weigh(out):
    """A loss without a minimum nearby: the square of a normed output hardly has a gradient."""
    return (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))).mean()


def text_model(model):
    """The language model alone, whose inputs are tokens."""
    return model.model.language_model if hasattr(model.model, "language_model") else model


@pytest.mark.parametrize("name", FAMILIES)
def test_every_mixer_is_found(name):
    kind, count = FAMILIES[name]
    found = sites(zoo.build(name))
    assert [site.kind for site in found] == [kind] * count
    assert found[0].spec.resized({}) == found[0].spec and found[0].spec.to_dict()["layout"]
    assert len({site.spec for site in found}) == 1


@pytest.mark.parametrize("name", ["kimi_linear", "lfm2_moe", "minimax", "mixtral"])
def test_other_mixers_are_left_alone(name):
    assert sites(zoo.build(name)) == []


def test_a_variant_that_computes_something_else_is_left_alone():
    model = zoo.build("nemotron_h")
    mixer = model.get_submodule(sites(model)[0].fqn)

    class Scaled(type(mixer)):
        def forward(self, hidden_states, cache_params=None, attention_mask=None, **kwargs):
            return super().forward(hidden_states * 0.5, cache_params=cache_params, attention_mask=attention_mask, **kwargs)

    mixer.__class__ = Scaled
    assert sites(model) == []


@pytest.mark.parametrize("name, backend", CASES)
def test_outputs_and_gradients_in_fp32(name, backend):
    model, twin = pair(name, backend)
    (outputs, grads), (ours, our_grads) = compare.step(name, model), compare.step(name, twin)
    for key, truth in outputs.items():
        assert compare.error(ours[key], truth) <= 1e-5, key
    assert {key: e for key, truth in grads.items() if (e := compare.error(our_grads[key], truth)) > 1e-5} == {}


@pytest.mark.parametrize("name", FAMILIES)
def test_any_length_with_padding_and_checkpointing(name):
    model, twin = (text_model(m).train() for m in pair(name))
    for tokens in (1, 2, 3, 17, 67):
        ids = torch.randint(3, zoo.VOCAB, (2, tokens), generator=torch.Generator().manual_seed(tokens))
        mask = torch.ones_like(ids)
        mask[1, : tokens // 3] = 0
        for extra in ({}, {"attention_mask": mask}):
            grads = []
            for one in (model, twin):
                one.zero_grad()
                out = one(input_ids=ids, use_cache=False, **extra)[0]
                weigh(out).backward()
                grads.append((out.detach(), {k: p.grad for k, p in one.named_parameters() if p.grad is not None}))
            assert compare.error(grads[1][0], grads[0][0]) <= 1e-5
            mixed = [k for k in grads[0][1] if "conv1d" in k or "out_proj" in k]
            assert mixed and all(compare.error(grads[1][1][k], grads[0][1][k]) <= 1e-5 for k in mixed)
    plain = {k: p.grad.clone() for k, p in twin.named_parameters() if p.grad is not None}
    twin.zero_grad()
    twin.gradient_checkpointing_enable()
    weigh(twin(input_ids=ids, use_cache=False, attention_mask=mask)[0]).backward()
    moved = {k: compare.error(p.grad, plain[k]) for k, p in twin.named_parameters() if p.grad is not None}
    assert {k: e for k, e in moved.items() if e > 1e-6} == {}


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "qwen3_5_moe"])
def test_prefill_fills_the_cache_as_before(name, backend="reference"):
    model, twin = (m.eval() for m in pair(name, backend))
    for tokens in (2, 3, 9):
        ids = torch.randint(3, zoo.VOCAB, (2, tokens), generator=torch.Generator().manual_seed(tokens))
        with torch.no_grad():
            caches = [m(input_ids=ids, use_cache=True).past_key_values for m in (model, twin)]
        for theirs, ours in zip(*(cache.layers for cache in caches), strict=True):
            for states in ("conv_states", "recurrent_states"):
                if hasattr(theirs, states) and getattr(theirs, states)[0] is not None:
                    a, b = getattr(ours, states)[0], getattr(theirs, states)[0]
                    assert a.dtype == b.dtype and compare.error(a, b) <= 1e-5
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
        assert torch.equal(model.generate(ids, **options), twin.generate(ids, **options))


def chunk_gated_delta_rule(
    q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
    use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, state_v_first=False, cu_seqlens=None, cu_seqlens_cpu=None, chunk_indices=None,
    cp_context=None, **kwargs,
):  # fmt: skip
    """flash-linear-attention's function as release 0.6.0 declares it: ``[B, T, heads, …]``, states ``[B, HV, K, V]``, scale 1/√K."""
    assert use_qk_l2norm_in_kernel and not kwargs
    assert scale is initial_state is cu_seqlens is cu_seqlens_cpu is chunk_indices is cp_context is None
    assert not (use_beta_sigmoid_in_kernel or allow_neg_eigval or state_v_first)
    # Releases before 0.4 want as many keys as values.
    assert q.shape == k.shape and q.shape[:3] == v.shape[:3] == g.shape == beta.shape and g.dtype == torch.float32
    o, state = reference_delta_scan(q, k, v, g, beta)
    return o, state if output_final_state else None


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5_moe"])
def test_flash_linear_attention_is_called_as_it_wants(name, monkeypatch):
    zoo.build(name)  # transformers would import and call the package itself, if it saw it
    packages = {path: types.ModuleType(path) for path in ("fla", "fla.ops", "fla.ops.gated_delta_rule")}
    packages["fla.ops.gated_delta_rule"].chunk_gated_delta_rule = chunk_gated_delta_rule
    for path, package in packages.items():
        package.__spec__ = importlib.machinery.ModuleSpec(path, None)
        monkeypatch.setitem(sys.modules, path, package)
    monkeypatch.setattr(conv, "causal_conv", conv.reference_conv)
    monkeypatch.delitem(registry._LOADED, ("delta", "fla"), raising=False)
    try:
        test_outputs_and_gradients_in_fp32(name, "fla")
        if name == "qwen3_next":
            test_prefill_fills_the_cache_as_before(name, "fla")
    finally:
        registry._LOADED.pop(("delta", "fla"), None)


def test_flash_linear_attention_is_for_low_precision():
    spec = sites(zoo.build("qwen3_next"))[0].spec
    why = registry.backend("delta", "fla").why_not
    assert "fla" in why(spec, torch.bfloat16, torch.device("cuda")) or importlib.util.find_spec("fla")
    assert why(spec, torch.float32, torch.device("cuda")) and "256" in why(replace(spec, key_dim=320), torch.bfloat16, torch.device("cuda"))


@pytest.mark.parametrize(("capability", "triton", "tilelang", "refused"), [
    ((9, 0), "3.6.0", False, True), ((9, 0), "3.6.0", True, False), ((9, 0), "3.7.1", False, False), ((9, 0), "3.3.1", False, False),
    ((10, 0), "3.6.0", False, False),
])  # fmt: skip
def test_flash_linear_attention_is_not_chosen_where_it_refuses_its_backward(capability, triton, tilelang, refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: capability)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: triton)
    monkeypatch.setattr(mixer_backends, "installed", lambda name: tilelang)
    monkeypatch.setattr(mixer_backends, "missing", lambda *args, **kwargs: None)
    why = registry.backend("delta", "fla").why_not(None, torch.bfloat16, torch.device("cuda"))
    assert (why is not None) == refused and (why is None or f"Triton {triton}" in why)


def test_copies_pickles_and_lora_like_children():
    _, twin = pair("nemotron_h")
    site = sites(zoo.build("nemotron_h"))[0]
    mixer = twin.get_submodule(site.fqn).eval()
    x = torch.randn(2, 7, site.spec.hidden)
    assert "[moepatch: Mamba-2" in repr(mixer)
    assert torch.equal(copy.deepcopy(mixer)(x), mixer(x)) and torch.equal(pickle.loads(pickle.dumps(mixer))(x), mixer(x))

    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return 2 * self.base(x)

    before = mixer(x)
    mixer.out_proj = Adapted(mixer.out_proj)
    assert torch.allclose(mixer(x), 2 * before)


def close(a, b, limit=3e-5):
    assert a.shape == b.shape and compare.error(a, b) <= limit, compare.error(a, b)


def check_conv():
    for batch, tokens, channels, bias, mask in ((2, 37, 70, True, True), (1, 2, 130, False, False)):
        x = torch.randn(batch, tokens, channels + 9)[..., 5 : 5 + channels].requires_grad_()
        weight = torch.randn(channels, 4, requires_grad=True)
        rows = torch.randn(channels, requires_grad=True) if bias else None
        real = (torch.rand(batch, tokens) > 0.3).float() if mask else None
        y, ours = conv.reference_conv(x, weight, rows, real), conv.causal_conv(x, weight, rows, real)
        up, leaves = torch.randn(y.shape), [t for t in (x, weight, rows) if t is not None]
        close(ours, y)
        for a, b in zip(torch.autograd.grad(ours, leaves, up), torch.autograd.grad(y, leaves, up), strict=True):
            close(a, b)


def check_ssd(batch, tokens, heads, width, groups, state, enough):
    ssd._ENOUGH = enough
    limits = (0.5, 2.0)
    inner = heads * width
    u, dt = torch.randn(batch, tokens, inner + 2 * groups * state), torch.randn(batch, tokens, heads + 3)[..., 1 : 1 + heads]
    a_log, bias, d = torch.rand(heads) * 2 - 1, torch.randn(heads), torch.randn(heads)
    leaves = [t.detach().requires_grad_() for t in (u, dt, a_log, bias, d)]
    u, dt, a_log, bias, d = leaves
    x, b, c = u.split([inner, groups * state, groups * state], -1)
    b, c = (part.unflatten(-1, (groups, state)) for part in (b, c))
    y, last = reference_scan(x.unflatten(-1, (heads, width)), dt, a_log, b, c, d, bias, limits)
    up, up_last = torch.randn(batch, tokens, inner), torch.randn(last.shape)
    wanted = torch.autograd.grad([y.flatten(2), last], leaves, [up, up_last])
    shape = ssd.Shape(batch, tokens, heads, width, groups, state, limits, True, GPUS["h200"].shared)
    with torch.no_grad():
        states, ours_last = ssd.scan_states(u, dt, a_log, bias, shape)
        close(ssd.scan_outputs(u, dt, a_log, bias, d, states, shape), y.flatten(2))
        close(ours_last, last)
        grad_dt = torch.empty_like(dt)
        grad_u, sums = ssd.scan_backward(up, up_last, u, dt, a_log, bias, d, grad_dt, shape)
    for a, b in zip((grad_u, grad_dt, *sums), wanted, strict=True):
        close(a, b)


def check_selective(batch, tokens, channels, state, bias):
    gate = torch.randn(batch, tokens, channels + 8)[..., 3 : 3 + channels]
    shapes = [(batch, tokens, channels)] * 2 + [(channels, state)] + [(batch, tokens, state)] * 2 + [(channels,)] * 2
    values = [torch.randn(shape) for shape in shapes]
    leaves = [t.detach().requires_grad_() for t in (*values, gate)]
    call = [*leaves[:6], leaves[6] if bias else None, leaves[7]]
    used = [t for t in call if t is not None]
    (y, last), ours = selective.reference_selective(*call), selective.selective(*call)
    up = [torch.randn(y.shape), torch.randn(last.shape)]
    close(ours[0], y)
    close(ours[1], last)
    for a, b in zip(torch.autograd.grad(ours, used, up), torch.autograd.grad([y, last], used, up), strict=True):
        close(a, b)


def check_whole_ssd():
    from moepatch.layers.mixers.ssd_triton import triton_ssd

    spec = SSDSpec(hidden=24, heads=4, head_dim=16, groups=2, state=16, taps=4, limits=(0.1, float("inf")))
    mask = torch.ones(2, 70)
    mask[1, :9] = 0
    shapes = [(2, 70, spec.projected), (spec.channels, 4), (spec.channels,), (4,), (4,), (4,)]
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    results = [f(leaves[0], SSDWeights(*leaves[1:]), spec, mask, True) for f in (reference_ssd, triton_ssd)]
    up = [torch.randn(t.shape) for t in results[0]]
    grads = [torch.autograd.grad(result, leaves, up) for result in results]
    for truth, ours in (results, grads):
        for a, b in zip(ours, truth, strict=True):
            close(a, b)


def check_kernels():
    torch.manual_seed(0)
    check_conv()
    for case in ((2, 70, 4, 16, 2, 16, 1), (1, 130, 6, 24, 1, 20, 1), (1, 5, 8, 16, 2, 8, 264), (1, 1, 4, 16, 4, 16, 1)):
        check_ssd(*case)
    check_whole_ssd()
    check_selective(2, 37, 40, 8, True)
    check_selective(1, 5, 32, 5, False)
    print("kernels equal")


@needs_triton
def test_kernels_in_tritons_interpreter():
    passes_in_the_interpreter(__file__, "kernels equal")


if __name__ == "__main__":
    let_tensors_bound_loops()
    check_kernels()

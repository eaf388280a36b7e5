"""Norms: found by what they compute, the patched module against the family's, the kernels in Triton's interpreter."""

from __future__ import annotations

import copy
import pickle
from collections import Counter

import compare
import pytest
import torch
import transformers
import zoo
from interpreter import let_tensors_bound_loops, needs_triton, passes_in_the_interpreter
from torch import nn

import moepatch
from moepatch.kernels import norm as kernels
from moepatch.layers.norm import NormSpec, PatchedNorm, reference_norm
from moepatch.match.norm import match_norm
from moepatch.scan import Scan
from moepatch.site import Site


def spec(width, weight="weight", **options):
    return NormSpec(**{"width": width if weight else 0, "eps": 1e-6, "weight": weight, "cast": "before", **options})


#: By name: from a width to the spec.
FORMS = {
    "before": lambda n: spec(n),
    "after": lambda n: spec(n, cast="after"),
    "zero-centred": lambda n: spec(n, cast="after", offset=1),
    "zero-centred before": lambda n: spec(n, offset=1),
    "no weight": lambda n: spec(n, None, cast="after"),
    "scale": lambda n: spec(n, None, cast="scale"),
    "silu first, groups": lambda n: spec(n, gate="silu", gate_first=True, group=n // 4),
    "silu last": lambda n: spec(n, gate="silu"),
    "sigmoid last": lambda n: spec(n, cast="after", gate="sigmoid"),
    "groups": lambda n: spec(n, cast="after", group=n // 2, offset=1),
}


def tensors(form, shape, dtype, device="cpu", weight_dtype=None):
    """The spec, and ``x, weight, gate, dy, dstream``, random; None for what the form does not have."""
    generator = torch.Generator().manual_seed(0)
    made = FORMS[form](shape[-1])

    def random(*size, dtype=dtype):
        return torch.randn(*size, generator=generator).to(device=device, dtype=dtype)

    weight = random(shape[-1], dtype=weight_dtype or dtype) if made.weight else None
    return made, random(*shape), weight, random(*shape) if made.gate else None, random(*shape), random(*shape)


def results(function, leaves, cotangents):
    """Outputs and gradients of a call by name. A leaf keeps its strides."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items() if leaf is not None}
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = torch.autograd.grad(outputs, list(leaves.values()), [c.to(o.dtype) for c, o in zip(cotangents, outputs, strict=True)])
    return {f"output {i}": o.detach() for i, o in enumerate(outputs)} | dict(zip(leaves, grads, strict=True))


def reference_add(x, residual, weight, spec):
    total = residual + x
    return total, reference_norm(total, weight, spec)


# --- matching ------------------------------------------------------------------------------------------------------------------------

#: Norms by what is not usual about them: (width or 0, cast, offset, gate, gate first, group) and how often.
FOUND = {
    "qwen3_moe": {(16, "before"): 4, (64, "before"): 5},
    "gpt_oss": {(64, "after"): 5},
    "nemotron_h": {(64, "after"): 5, (128, "before", "silu first", 64): 1},
    "qwen3_next": {(64, "after", 1): 7, (16, "after", 1): 2, (16, "before", "silu last"): 2},
    "gemma4_text": {(64, "after"): 22, (16, "after"): 6, (0, "after"): 6},
    "deepseek_v4": {(16, "after"): 9, (64, "after"): 7, (0, "scale"): 10},
    "granitemoehybrid": {(64, "before"): 5, (128, "before", "silu first"): 1},
    "olmoe": {(64, "before"): 7, (32, "before"): 2},
    "kimi_linear": {(64, "before"): 7, (16, "before"): 2, (16, "after", "sigmoid last"): 2},
    "llama4_text": {(64, "before"): 7, (0, "after"): 3},
    "qwen4_exp": {(256, "after", 1, 64): 7, (16, "after", 1): 4, (16, "before", "silu last"): 2},
    "mixtral": {(64, "before"): 5},
    "dbrx": {},
    "phimoe": {},
}


#: Families that transformers 5.17 rounded before the weight.
MOVED = {"nemotron_h", "deepseek_v4"}


def found_norms(model):
    """Modules and specs."""
    scan, memo = Scan(model), {}
    sites = [(found.module, match_norm(found, scan, memo)) for found in scan]
    return [(module, site.spec) for module, site in sites if isinstance(site, Site)]


def short(spec):
    gate = [f"{spec.gate} {'first' if spec.gate_first else 'last'}"] if spec.gate else []
    return (spec.width, spec.cast, *([1] if spec.offset else []), *gate, *([spec.group] if spec.group else []))


@pytest.mark.parametrize("name", FOUND)
def test_norms_of_families_are_found_by_what_they_compute(name):
    if zoo.available(name) is not None:
        pytest.skip(zoo.available(name))
    norms = found_norms(zoo.build(name))
    wanted = FOUND[name]
    if name in MOVED and transformers.__version__.startswith("5.17."):
        wanted = {tuple("before" if part == "after" else part for part in key): count for key, count in wanted.items()}
    assert Counter(short(spec) for _, spec in norms) == wanted
    assert all((spec.weight is None) == (not list(module.parameters())) for module, spec in norms)


def test_every_family_with_rms_norms_has_all_of_them_found():
    """Names serve as a second opinion here: what is called an RMS norm and is not taken is one of the known others."""
    others = {"AXK2GatedRMSNorm", "HYV4UnweightedRMSNorm", "MuseSparkTextCenteredRMSNorm", "MuseSparkTextInputScaledRMSNorm"}
    missed = set()
    for name in zoo.FAMILIES:
        if zoo.available(name) is None:
            with torch.device("meta"):
                model = zoo._model_class(zoo.entry(name))._from_config(zoo.config(name))
            taken = {id(module) for module, _ in found_norms(model)}
            missed |= {type(m).__name__ for m in model.modules() if "RMSNorm" in type(m).__name__ and id(m) not in taken}
    assert missed <= others


class Remote(nn.Module):
    """A norm as remote code may write it."""

    def __init__(self, compute, width=48, small=1e-5):
        super().__init__()
        self.scale, self.small, self.compute = nn.Parameter(torch.ones(width)), small, compute

    def forward(self, inputs):
        return self.compute(inputs, self.scale, self.small)


def test_what_is_almost_a_norm_is_left_alone():
    almost = {
        "mean removed": lambda x, w, eps: nn.functional.layer_norm(x, x.shape[-1:], w, None, eps),
        "eps outside of the root": lambda x, w, eps: w * x / (x.square().mean(-1, keepdim=True).sqrt() + eps),
        "sum, not mean": lambda x, w, eps: w * x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps),
        "weight squared": lambda x, w, eps: w * w * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps),
        "no gradient through the scale": lambda x, w, eps: w * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps).detach(),
        "another axis": lambda x, w, eps: w * x * torch.rsqrt(x.square().mean(-2, keepdim=True) + eps),
    }
    model = nn.ModuleList(Remote(function) for function in almost.values())
    assert found_norms(model) == []
    exact = Remote(lambda x, w, eps: w * (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)).to(x.dtype))
    ((_, spec),) = found_norms(nn.Sequential(exact))
    assert (spec.weight, spec.eps, spec.cast) == ("scale", 1e-5, "before")


def test_dropout_activations_and_the_like_are_no_norms():
    assert found_norms(nn.Sequential(nn.Dropout(1e-3), nn.SiLU(), nn.LeakyReLU(1e-3), nn.LayerNorm(8), nn.Threshold(1e-3, 1e-3))) == []


# --- the patched module --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "nemotron_h", "qwen3_next", "deepseek_v4", "gemma4_text", "llama4_text", "kimi_linear"])
def test_patched_norms_change_no_number(name):
    if zoo.available(name) is not None:
        pytest.skip(zoo.available(name))
    plain = zoo.build(name)
    patched = moepatch.optimize(copy.deepcopy(plain))
    assert any(isinstance(module, PatchedNorm) for module in patched.modules())
    (a, da), (b, db) = compare.step(name, plain), compare.step(name, patched)
    assert all(compare.error(b[key], a[key]) <= 1e-5 for key in a) and compare.together(db, da) <= 1e-5
    moepatch.restore(patched)
    assert not any(isinstance(module, PatchedNorm) for module in patched.modules())


@pytest.mark.parametrize(("dtype", "autocast"), [(torch.bfloat16, False), (torch.float16, False), (torch.float32, True), (torch.float32, False)])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "nemotron_h", "qwen3_next", "deepseek_v4"])
def test_rounding_is_that_of_the_family(name, dtype, autocast):
    """Bit by bit, also with activations in another dtype than the weights."""
    plain = zoo.build(name, dtype=dtype)
    patched = moepatch.optimize(copy.deepcopy(plain), norm="reference")
    for (key, ours), theirs in zip(patched.named_modules(), plain.modules(), strict=True):
        if isinstance(ours, PatchedNorm):
            spec = ours._moepatch.spec
            for x_dtype in (torch.float32, torch.bfloat16):
                x, gate = (torch.randn(3, 5, spec.width or 32).to(x_dtype) for _ in range(2))
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    a, b = (m(x) if spec.gate is None else m(x, gate) for m in (theirs, ours))
                assert a.dtype == b.dtype and torch.equal(a, b), key


def test_a_gated_norm_without_gate_and_calls_by_keyword():
    plain = zoo.build("nemotron_h")
    patched = moepatch.optimize(copy.deepcopy(plain))
    for ours, theirs in zip(patched.modules(), plain.modules(), strict=True):
        if isinstance(ours, PatchedNorm):
            x = torch.randn(2, 3, ours._moepatch.spec.width)
            assert torch.equal(ours(hidden_states=x), theirs(hidden_states=x))


def test_copies_pickles_and_prints(qwen3):
    model = moepatch.optimize(qwen3)
    norm = model.model.norm
    x = torch.randn(2, 64)
    for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert isinstance(other, PatchedNorm) and torch.equal(other(x), norm(x))
    assert "RMS 64 eps=1e-06 cast before" in repr(norm)


def test_compiles_in_one_piece(qwen3):
    norm = moepatch.optimize(qwen3, norm="reference").model.norm
    x = torch.randn(2, 64)
    assert compare.error(torch.compile(norm, backend="eager", fullgraph=True)(x), norm(x)) < 1e-6


def test_kernels_fall_back_where_they_cannot_run():
    """On the CPU: a patched model that was moved there."""
    for form in FORMS:
        made, x, weight, gate, dy, dstream = tensors(form, (5, 32), torch.float32)
        assert torch.equal(kernels.norm(x, weight, made, gate), reference_norm(x, weight, made, gate))
        if gate is None:
            assert all(map(torch.equal, kernels.add_norm(x, dy, weight, made), reference_add(x, dy, weight, made)))
            assert all(map(torch.equal, kernels.fork_norm(x, weight, made), (x, reference_norm(x, weight, made))))


@pytest.mark.parametrize("cut", ["whole", "slice of a row", "heads of a slice", "transposed", "expanded", "one row", "strided columns"])
def test_rows_are_found_in_memory(cut):
    buffer = torch.randn(3, 5, 48)
    x = {
        "whole": buffer,
        "slice of a row": buffer[..., 8:24],
        "heads of a slice": buffer[..., 8:40].view(3, 5, 4, 8),
        "transposed": buffer.view(3, 5, 6, 8).transpose(1, 2),
        "expanded": buffer[:, :1].expand(3, 5, 48),
        "one row": buffer[:1, :1, 8:24],
        "strided columns": buffer[..., ::2],
    }[cut]
    rows = kernels._Rows(x, spec(x.shape[-1]))
    flat = rows.tensor.as_strided((rows.tensor.untyped_storage().size() // 4 - rows.tensor.storage_offset(),), (1,))
    index = torch.arange(rows.count)
    start = index // rows.inner * rows.outer_stride + index % rows.inner * rows.inner_stride
    assert torch.equal(flat[start[:, None] + torch.arange(rows.width)], x.reshape(-1, x.shape[-1]))
    assert (rows.tensor is x) == (cut not in ("transposed", "strided columns"))


# --- the kernels, in Triton's interpreter --------------------------------------------------------------------------------------------

SHAPES = {"wide": (5, 80), "heads": (2, 3, 4, 16), "one": (1, 32), "many": (70, 12)}


def check(form, shape, dtype, weight_dtype=None, cut=None):
    """Ours against plain torch: outputs to a rounding, gradients closely."""
    made, x, weight, gate, dy, dstream = tensors(form, shape, dtype, weight_dtype=weight_dtype)
    if cut is not None:
        x = cut(x)
    pairs = [((kernels.norm, reference_norm), {"x": x, "weight": weight, "gate": gate}, [dy])]
    if gate is None:
        pairs.append(((kernels.add_norm, reference_add), {"x": x, "residual": dstream, "weight": weight}, [dstream, dy]))
        fork = lambda x, weight, spec: (x, reference_norm(x, weight, spec))
        pairs.append(((kernels.fork_norm, fork), {"x": x, "weight": weight}, [dstream, dy]))
    for (ours, theirs), leaves, cotangents in pairs:
        constant = {"spec": made, **({"weight": None} if weight is None else {})}
        a = results(lambda **given: ours(**constant, **given), leaves, cotangents)
        b = results(lambda **given: theirs(**constant, **given), leaves, cotangents)
        for key, truth in b.items():
            assert a[key].dtype == truth.dtype and a[key].shape == truth.shape, (form, shape, key)
            limit = 3e-6 if dtype == torch.float32 else 1e-4 if key.startswith("output") else 2e-3
            assert compare.error(a[key].float(), truth.float()) < limit, (form, shape, dtype, key, compare.error(a[key].float(), truth.float()))


def check_kernels():
    """Every form, in shapes that leave tails of rows and columns; fp16, since Triton's interpreter truncates to bf16 where GPUs round."""
    done = 0
    for form in FORMS:
        for name, dtype in (("wide", torch.float32), ("wide", torch.float16), ("heads", torch.float32), ("one", torch.float16), ("many", torch.float32)):
            check(form, SHAPES[name], dtype)
            done += 1
    wide = lambda x: torch.cat([x, x, x], -1)[..., x.shape[-1] : 2 * x.shape[-1]]
    heads = lambda x: torch.cat([x, x], -2)[..., x.shape[-2] :, :]
    for form in ("before", "zero-centred", "no weight", "silu last", "groups"):
        check(form, SHAPES["wide"], torch.float32, cut=wide)
        check(form, SHAPES["heads"], torch.float32, cut=heads)
        check(form, SHAPES["heads"], torch.float32, cut=lambda x: x.transpose(1, 2).contiguous().transpose(1, 2))
        check(form, SHAPES["wide"], torch.float16, weight_dtype=torch.float32)
        done += 4
    print(f"{done} cases agree")


@needs_triton
def test_kernels_in_tritons_interpreter():
    passes_in_the_interpreter(__file__, "70 cases agree")


if __name__ == "__main__":
    let_tensors_bound_loops()
    check_kernels()

"""FlashAttention 4 without autograd, on a fake of it: numbers and whole attention modules."""

from __future__ import annotations

import ast
import dataclasses
import importlib.metadata
import os
from types import SimpleNamespace

import compare
import fake_fa4
import pytest
import test_attention_block
import torch
from attention_twin import visible
from test_attention_span import at_once, heads_backward, heads_forward, patched, turn_heads
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from moepatch.gpus import GPUS
from moepatch.kernels import rope as kernels
from moepatch.layers import attention_block
from moepatch.layers.attention import attention_function, attention_mask, fa4, fa4_cache
from moepatch.layers.attention.exact import plain_attention
from moepatch.layers.attention.kernel import How
from moepatch.layers.attention.sinks import attend, attend_backward
from moepatch.layers.attention.spec import AttentionSpec

NAME = "moepatch_fake_fa4"
FORMS = {
    "causal": ((-1, 0), False),
    "window": ((5, 0), False),
    "sinks": ((-1, 0), True),
    "window sinks": ((5, 0), True),
    "bidirectional": ((-1, -1), False),
    "two-sided window": ((3, 3), True),
}


@pytest.fixture
def library(monkeypatch):
    """A fake in the place of the library."""
    made = fake_fa4.library()
    monkeypatch.setattr(fa4, "_library", lambda: made)
    fa4._raw.cache_clear()
    yield made
    fa4._raw.cache_clear()


def operands(heads, kv_heads, sinks, length=16, dim=8):
    q, k = torch.randn(2, length, heads, dim), torch.randn(2, length, kv_heads, dim)
    v = torch.randn(2, length, 3, kv_heads * dim)[:, :, 1].unflatten(-1, (kv_heads, dim))
    return q, k, v, torch.randn(heads).requires_grad_() if sinks else None, torch.randn(2, length, heads, dim)


def ours(raw, q, k, v, sinks, grad, window, wants_sinks=True):
    how = How(0.3, window, sinks)
    with torch.no_grad():
        out, lse, rest = attend(raw, q, k, v, how)
        return out, *attend_backward(raw, grad, q, k, v, out, lse, rest, how, wants_sinks and sinks is not None)


def written(q, k, v, sinks, grad, window):
    leaves = [t.detach().transpose(1, 2).requires_grad_() for t in (q, k, v)] + ([sinks] if sinks is not None else [])
    out = plain_attention(*leaves[:3], visible(q.shape[1], window)[None, None], scale=0.3, sinks_H=sinks)[0]
    grads = torch.autograd.grad(out, leaves, grad)
    return out.detach(), *(g.transpose(1, 2) for g in grads[:3]), grads[3] if sinks is not None else None


@pytest.mark.parametrize("heads", [(4, 2), (2, 2)])
@pytest.mark.parametrize("form", FORMS)
def test_numbers_and_gradients(form, heads, library):
    window, sinks = FORMS[form]
    given = operands(*heads, sinks)
    for found, wanted in zip(ours(fa4._raw(), *given, window), written(*given, window), strict=True):
        assert (found is None and wanted is None) or compare.error(found, wanted) < 1e-5
    assert library.calls == ["forward", "backward"]


def test_frozen_sinks_are_not_differentiated(library):
    given = operands(4, 2, True)
    *found, none = ours(fa4._raw(), *given, (-1, 0), wants_sinks=False)
    assert none is None and all(compare.error(a, b) < 1e-5 for a, b in zip(found, written(*given, (-1, 0)), strict=False))


@pytest.mark.parametrize("name", ["_flash_attn_fwd", "_flash_attn_bwd"])
def test_releases_with_other_functions_are_used_with_their_own_autograd(name, library):
    other = fake_fa4.with_signature(lambda *args: None, "q, k, v")
    setattr(library, name, other)
    assert fa4._raw() is None
    fa4._raw.cache_clear()
    delattr(library, name)
    assert fa4._raw() is None


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_attention_modules_go_at_once(name, library, monkeypatch):
    """gpt-oss has sinks and windows."""
    kernel = dataclasses.replace(fa4.FA4, why_not=lambda *args: None, raw=fa4._raw)
    AttentionInterface.register(NAME, attention_function("fa4", lambda: (kernel,)))
    AttentionMaskInterface.register(NAME, attention_mask)
    span, done = attention_block.attention_span, []
    monkeypatch.setattr(attention_block, "attention_span", lambda *args: done.append(1) or span(*args))
    monkeypatch.setattr(kernels, "heads_forward", heads_forward)
    monkeypatch.setattr(kernels, "turn_heads", turn_heads)
    monkeypatch.setattr(kernels, "heads_backward", heads_backward)
    try:
        model, blocks = patched(name)
        before = test_attention_block.step(name, model)
        model.config._attn_implementation = NAME
        at_once(blocks)
        for _ in range(3):
            after = test_attention_block.step(name, model)
            assert before.keys() == after.keys()
            assert not {key: e for key in before if (e := compare.error(after[key], before[key])) > 1e-5}
    finally:
        del AttentionInterface._global_mapping[NAME], AttentionMaskInterface._global_mapping[NAME]
    assert len(done) == 3 * len(blocks) and library.calls


def test_compiles_are_kept_unless_the_user_says_otherwise(monkeypatch, tmp_path):
    names = fa4_cache.ENABLED, fa4_cache.DIRECTORY
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MOEPATCH_CACHE", str(tmp_path / "new"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.6.4")
    with fa4_cache.kept_compiles():
        assert os.environ[names[0]] == "1" and os.environ[names[1]] == str(tmp_path / "new" / "fa4" / "sm90-quack-0.6.4")
    assert not any(name in os.environ for name in names)
    monkeypatch.setenv("MOEPATCH_CACHE", "/dev/null/no")  # a place that cannot be written
    with fa4_cache.kept_compiles():
        assert not any(name in os.environ for name in names)
    monkeypatch.setenv(names[0], "0")
    with fa4_cache.kept_compiles():
        assert os.environ[names[0]] == "0" and names[1] not in os.environ


class JITCache:
    """As the library's."""

    def __init__(self, folder=None):
        self.folder, self.cache = folder, {}


class JITPersistentCache(JITCache):
    """As the library's."""


def test_compiles_are_kept_if_somebody_else_imported_the_library_first(monkeypatch, tmp_path):
    """peft does, through Transformer Engine: the settings come too late for it."""
    for name in (fa4_cache.ENABLED, fa4_cache.DIRECTORY):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MOEPATCH_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.6.4")
    utils = SimpleNamespace(JITCache=JITCache, JITPersistentCache=JITPersistentCache, _compute_source_fingerprint=lambda: "print")

    def compiling(cache):
        function = SimpleNamespace(compile_cache=cache)
        function.compile_cache.cache["form"] = "compiled"
        return function

    interface = SimpleNamespace(_flash_attn_fwd=compiling(JITCache()), _flash_attn_bwd=compiling(JITPersistentCache("elsewhere")), other=compiling(JITCache()))
    fa4_cache.keep(interface, utils)
    forward = interface._flash_attn_fwd.compile_cache
    assert type(forward) is JITPersistentCache and forward.cache == {"form": "compiled"}
    assert forward.folder == tmp_path / "fa4" / "sm90-quack-0.6.4" / "print" / "fwd"
    assert interface._flash_attn_bwd.compile_cache.folder == "elsewhere" and type(interface.other.compile_cache) is JITCache
    monkeypatch.setenv(fa4_cache.ENABLED, "0")
    interface._flash_attn_fwd = compiling(JITCache())
    fa4_cache.keep(interface, utils)
    assert type(interface._flash_attn_fwd.compile_cache) is JITCache


def test_only_head_dims_that_were_tried_are_taken(monkeypatch):
    """16, 48, 72, 80 and 112 are computed without a word, and wrongly."""
    monkeypatch.setattr(fa4, "_why_not_installed", lambda: None)

    def why_not(dim, v_dim=None, gpu="h200", kv_heads=2):
        spec = AttentionSpec(heads=8, kv_heads=kv_heads, head_dim=dim, v_head_dim=v_dim or dim)
        return fa4.why_not_fa4(spec, torch.bfloat16, GPUS[gpu])

    assert [dim for dim in range(8, 264, 8) if why_not(dim) is None] == [32, 64, 96, 128, 160, 192, 256]
    assert "this has 80" in why_not(80) and "9.x alone, this is 10.0" in why_not(128, gpu="b200")
    assert why_not(192, 128, kv_heads=8) is None and "grouped heads" in why_not(192, 128)


def test_the_fake_has_the_signatures_of_the_real_one():
    try:
        source = importlib.metadata.distribution("flash-attn-4").locate_file("flash_attn/cute/interface.py").read_text()
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("flash-attn-4 is not installed")
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            for argument in node.args.args:
                argument.annotation = None
            found[node.name] = ast.unparse(node.args)
    assert found["_flash_attn_fwd"] == fake_fa4.FORWARD and found["_flash_attn_bwd"] == fake_fa4.BACKWARD

"""FlashAttention 4 without autograd, on a fake of it: numbers and whole attention modules."""

from __future__ import annotations

import ast
import dataclasses
import importlib.metadata
import os
import sys
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


def test_only_head_dims_that_were_tried_are_taken():
    """16, 48, 72, 80 and 112 are computed without a word, and wrongly."""

    def form(dim, v_dim=None, heads=8, kv_heads=2, **more):
        return AttentionSpec(heads=heads, kv_heads=kv_heads, head_dim=dim, v_head_dim=v_dim or dim, **more)

    assert [dim for dim in range(8, 264, 8) if fa4.untried(form(dim), 9) is None] == list(fa4.TRIED)
    assert "32, 64, 96, 128, 160, 192, 256 alone, this has 80" in fa4.untried(form(80), 9)
    assert "this has 256" in fa4.untried(form(256), 10) and fa4.untried(form(128), 10) is None
    assert fa4.untried(form(192, 128, kv_heads=8), 9) is None and "grouped heads" in fa4.untried(form(192, 128), 9)
    assert "sinks" in fa4.untried(form(64, sinks=True), 12)


def test_kernels_are_kept_where_another_library_has_imported_it_before(monkeypatch, tmp_path):
    """Transformer Engine does, and transformers imports Transformer Engine."""

    class JITCache:
        def __init__(self):
            self.cache = {}

    class JITPersistentCache(JITCache):
        def __init__(self, path):
            super().__init__()
            self.path = path

    utils = SimpleNamespace(CUTE_DSL_CACHE_ENABLED=False, JITCache=JITCache, JITPersistentCache=JITPersistentCache, _compute_source_fingerprint=lambda: "abc")
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(cute=SimpleNamespace(cache_utils=utils)))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", sys.modules["flash_attn"].cute)
    monkeypatch.setattr(fa4_cache, "_settings", lambda: {fa4_cache.ENABLED: "1", fa4_cache.DIRECTORY: str(tmp_path)})
    monkeypatch.delenv(fa4_cache.ENABLED, raising=False)

    def compiled():
        """A function of the library with kernels of its own."""

    compiled.compile_cache = JITCache()
    compiled.compile_cache.cache["form"] = "kernel"
    interface = SimpleNamespace(_flash_attn_fwd=compiled, other=len)
    fa4_cache.keep_compiles(interface)
    kept = compiled.compile_cache
    assert kept.path == tmp_path / "abc" / "_flash_attn_fwd" and kept.cache == {"form": "kernel"}
    fa4_cache.keep_compiles(interface)
    assert compiled.compile_cache is kept
    compiled.compile_cache = plain = JITCache()
    monkeypatch.setenv(fa4_cache.ENABLED, "0")  # the user has said so
    fa4_cache.keep_compiles(interface)
    assert compiled.compile_cache is plain


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

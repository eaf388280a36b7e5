"""Transformer Engine's norm behind a stand-in that reads memory as the library does: rows of an input that is taken to be dense."""

from __future__ import annotations

import importlib
import sys
import types

import compare
import pytest
import torch

from moepatch.layers.norm import NormSpec, reference_norm


def dense(x):
    """What a kernel without strides finds where `x` begins."""
    flat = torch.as_strided(x, (min(x.numel(), x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()),), (1,))
    return torch.nn.functional.pad(flat, (0, x.numel() - flat.numel())).view(x.shape)


def rmsnorm_fwd(rows, weight, eps, out, quantizer, dtype, margin, zero_centered):
    rows = dense(rows)
    rstd = rows.square().mean(-1).add(eps).rsqrt()
    return rows * rstd[:, None] * (weight + zero_centered), None, rstd


def rmsnorm_bwd(dy, rows, rstd, weight, margin, zero_centered):
    unit, dy = dense(rows) * rstd[:, None], dense(dy)
    grad = dy * (weight + zero_centered)
    return rstd[:, None] * (grad - unit * (grad * unit).mean(-1, keepdim=True)), (dy * unit).sum(0)


@pytest.fixture
def te_norm(monkeypatch):
    members = {
        "transformer_engine": {},
        "transformer_engine.pytorch": {},
        "transformer_engine.pytorch.constants": {"TE_DType": {torch.float32: 0}},
        "transformer_engine_torch": {"rmsnorm_fwd": rmsnorm_fwd, "rmsnorm_bwd": rmsnorm_bwd},
    }
    for name, content in members.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "moepatch.layers.norm_te", raising=False)
    yield importlib.import_module("moepatch.layers.norm_te").te_norm
    sys.modules.pop("moepatch.layers.norm_te")


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("cut", [
    lambda x: x,
    lambda x: x.split([16, 8], -1)[0],
    lambda x: x.split([16, 8], -1)[1],
    lambda x: x.transpose(0, 1),
], ids=["whole", "first part", "second part", "transposed"])  # fmt: skip
def test_rows_lie_anywhere(te_norm, cut, offset):
    """Norms over the parts of a projection get slices of it."""
    x = torch.randn(2, 5, 24)
    spec = NormSpec(width=cut(x).shape[-1], eps=1e-5, weight="weight", offset=offset, cast="after")
    weight, up = torch.randn(spec.width), cut(torch.randn_like(x))
    found = []
    for norm in (reference_norm, te_norm):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        y = norm(cut(leaves[0]), leaves[1], spec)
        found.append((y.detach(), *torch.autograd.grad(y, leaves, up)))
    for ours, truth in zip(found[1], found[0], strict=True):
        assert compare.error(ours, truth) < 1e-5

"""A stand-in for Transformer Engine on the CPU: `Linear` and `autocast` with the library's rules and the rounding of FP8."""

from __future__ import annotations

import contextlib
import importlib.machinery
import sys
import types

import torch
from torch import nn

from moepatch.layers import te_backends, te_linear
from moepatch.layers.fp8 import rounded_linear

#: The shapes ``(T, K, N)`` of every FP8 product so far.
calls: list[tuple[int, int, int]] = []
_recipes: list[object] = []


class Linear(nn.Module):
    """Weights on the device that is asked for; in FP8 inside `autocast` only."""

    def __init__(self, in_features, out_features, bias=True, params_dtype=None, device="cuda"):
        super().__init__()
        assert device == "meta"
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features, dtype=params_dtype, device=device)) if bias else None)

    def forward(self, inp):
        assert _recipes and isinstance(_recipes[-1], Float8CurrentScaling)
        assert inp.ndim == 2 and inp.shape[0] % 16 == 0 and all(n % 16 == 0 for n in self.weight.shape)
        assert all(p.device == inp.device and p.dtype == inp.dtype for p in self._parameters.values() if p is not None)
        calls.append((*inp.shape, self.weight.shape[0]))
        return rounded_linear(inp, self.weight, self.bias)


class Float8CurrentScaling:
    """The recipe."""


@contextlib.contextmanager
def autocast(enabled=True, recipe=None):
    """As the library's: FP8 inside."""
    assert enabled
    _recipes.append(recipe)
    try:
        yield
    finally:
        _recipes.pop()


def install(monkeypatch) -> None:
    """Makes ``import transformer_engine`` find this, and the rows `te_fp8` available."""
    members = {
        "transformer_engine": {},
        "transformer_engine.pytorch": {"Linear": Linear, "autocast": autocast},
        "transformer_engine.common": {},
        "transformer_engine.common.recipe": {"Float8CurrentScaling": Float8CurrentScaling},
    }
    for name, content in members.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(te_backends, "missing", lambda *args, **kwargs: None)
    te_linear._stand_in.cache_clear()
    te_linear._recipe.cache_clear()
    calls.clear()

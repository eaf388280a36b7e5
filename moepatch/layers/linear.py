"""Linear layers that no other kind computes: output projections, latent projections, those of attention that nobody fuses.

A layer as it is needs no patch. The kind exists for backends that a user asks for by name, such as FP8.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..autocast import autocast_dtype
from ..kind import Kind
from ..layout.adjacent import joint_linear
from ..quantized import is_plain
from ..registry import compute
from ..surgery import Patched
from ..trial import Call

#: Backends of this table that backends of other tables with their name project with.
PROJECTIONS = ("te_fp8",)


@dataclass(frozen=True, kw_only=True)
class LinearSpec:
    """A linear layer.

    Attributes:
        in_features, out_features: its widths.
        bias: whether it has one.
    """

    in_features: int
    out_features: int
    bias: bool

    def resized(self, sizes: Mapping[int, int]) -> LinearSpec:
        """The same layer at other widths."""
        widths = (sizes.get(n, n) for n in (self.in_features, self.out_features))
        return replace(self, **dict(zip(("in_features", "out_features"), widths, strict=True)))

    def describe(self) -> str:
        """The widths on one line."""
        return f"{self.in_features}→{self.out_features}" + (" bias" if self.bias else "")

    def to_dict(self) -> dict[str, Any]:
        """For people and programs that read JSON."""
        return {**asdict(self), "layout": "bias" if self.bias else "no bias"}


@dataclass(frozen=True)
class LinearState:
    """What a patched linear layer needs to know."""

    spec: LinearSpec
    backend: str

    def __str__(self) -> str:
        return f"backend={self.backend}"


class PatchedLinear(Patched):
    """Computes ``linear(x [..., K]) -> [..., N]`` with a backend, in autocast's dtype where autocast is on; what was quantized since, as torch does."""

    reads_shapes = False
    _moepatch: LinearState

    def forward(self, input):
        """See the class; the argument is called as in ``nn.Linear``."""
        if not is_plain(self.weight, self.bias):
            return super().forward(input)
        return _cast_and_run(compute("linear", self._moepatch.backend), input, (self,))


def project(backend: str, x: Tensor, *layers: nn.Linear) -> Tensor:
    """``[..., ΣN]``: what linear layers over one input compute, for a backend of another table: in FP8 if its name says so."""
    return _cast_and_run(compute("linear", backend) if backend in PROJECTIONS else joint_linear, x, layers)


def _cast_and_run(function: Callable[..., Tensor], x: Tensor, layers: Sequence[nn.Linear]) -> Tensor:
    weights, biases = tuple(layer.weight for layer in layers), tuple(layer.bias for layer in layers)
    biases = () if biases[0] is None else biases
    dtype = autocast_dtype(x.device)
    if dtype is not None:
        x, weights, biases = x.to(dtype), tuple(w.to(dtype) for w in weights), tuple(b.to(dtype) for b in biases)
    return function(x, weights, biases)


def _call(spec: LinearSpec, dtype: torch.dtype, device: torch.device, generator: torch.Generator, tokens: int = 24) -> Call:
    """Tokens in two sequences ``[2, T/2, K]``."""
    return Call((torch.randn(2, tokens // 2, spec.in_features, generator=generator, dtype=torch.float32).to(device=device, dtype=dtype),))


LINEAR = Kind(
    name="linear",
    pattern="linear",
    backends="linear",
    injections=lambda spec, backend, implementation: {"": (PatchedLinear, LinearState(spec, backend))},
    trial=_call,
    bench=_call,
    dense=True,
    on_request=True,
)

"""Gated delta-rule mixers: projections, short convolution of queries, keys and values, the delta rule, gated norm, projection.

The projections and the norm stay the family's modules and are called; convolution and recurrence are one call of a backend of the table
``delta``: ``(mixed, weights, g, beta, spec, with_state) -> (o, last state or None)``, see `reference_delta`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ...kernels.conv import reference_conv
from ...kind import Kind
from ...registry import compute
from ..roles import ByRole, Given, Roles, followed
from .calls import bench_call, masked, short_trial_call, whole_sequences
from .delta_scan import reference_delta_scan

#: The input projections by layout. ``grouped``: queries, keys, values and gate of one key head side by side, then those of the next, and
#: likewise the two step projections. ``split``: each for all heads in a matrix of its own, queries, keys and values in one.
PROJECTIONS = {
    "grouped": ("in_proj_qkvz", "in_proj_ba"),
    "split": ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
}


@dataclass(frozen=True, kw_only=True)
class DeltaSpec:
    """One gated delta-rule mixer.

    Attributes:
        hidden: width of what comes in and goes out.
        key_heads, value_heads: G and H; each key head serves H/G value heads.
        key_dim, value_dim: of one head, K and V.
        taps: of the convolution.
        layout: one of `PROJECTIONS`.
        roles: what the arguments of its forward are; None until they are found.
    """

    hidden: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int
    layout: str
    roles: Roles | None = None

    @property
    def keys(self) -> int:
        """The width of all keys."""
        return self.key_heads * self.key_dim

    @property
    def values(self) -> int:
        """The width of all values."""
        return self.value_heads * self.value_dim

    @property
    def channels(self) -> int:
        """The channels of the convolution: queries, keys and values."""
        return 2 * self.keys + self.values

    def resized(self, sizes: Mapping[int, int]) -> DeltaSpec:
        """The same mixer at other sizes."""
        new = {name: sizes.get(value, value) for name, value in vars(self).items() if type(value) is int}
        return replace(self, **new)

    def describe(self) -> str:
        """One line."""
        return f"gated delta rule {self.key_heads}×{self.key_dim} → {self.value_heads}×{self.value_dim} conv {self.taps} {self.layout}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        known = {name: value for name, value in vars(self).items() if name != "roles"}
        return known

    def projections(self) -> dict[str, int]:
        """The input projections and how wide each is."""
        if self.layout == "grouped":
            wide = (self.channels + self.values, 2 * self.value_heads)
        else:
            wide = (self.channels, self.values, self.value_heads, self.value_heads)
        return dict(zip(PROJECTIONS[self.layout], wide, strict=True))


class DeltaWeights(NamedTuple):
    """The convolution's taps ``[channels, K]`` and their bias or None."""

    conv: Tensor
    conv_bias: Tensor | None


@dataclass(frozen=True)
class DeltaState:
    """What the patched mixer needs to know."""

    spec: DeltaSpec
    backend: str

    def __str__(self) -> str:
        return f"{self.spec.describe()}, backend={self.backend}"


class PatchedDelta(ByRole):
    """Takes and returns what the family's mixer does; training and prefill are computed by a backend, the rest by the family."""

    takes_children = True
    _moepatch: DeltaState

    def computed(self, given: Given):
        """See the class."""
        if not whole_sequences(self, self.conv1d, given):
            return self.as_the_family(given)
        hidden_states, cache, attention_mask = given.tokens, given.cache, given.mask
        spec = self._moepatch.spec
        mixed_BTC, gate, b_BTH, a_BTH = _project(self, spec, masked(hidden_states, attention_mask))
        if cache is not None:
            spec.roles.updated(self, given, mixed_BTC.transpose(1, 2))
        g_BTH = -self.A_log.float().exp() * F.softplus(a_BTH.float() + self.dt_bias)
        weights = DeltaWeights(self.conv1d.weight.squeeze(1), self.conv1d.bias)
        o, last = compute("delta", self._moepatch.backend)(mixed_BTC, weights, g_BTH, b_BTH.sigmoid(), spec, cache is not None)
        if cache is not None:
            spec.roles.updated(self, given, last, place=1)
        # The norm is called with rows of one head, as the family does.
        normed = self.norm(o.reshape(-1, spec.value_dim), gate.reshape(-1, spec.value_dim))
        return self.out_proj(normed.view(*hidden_states.shape[:-1], spec.values))


def _project(mixer, spec: DeltaSpec, x_BTH: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the convolution gets ``[B, T, channels]``, the gate ``[B, T, H·V]``, and the two step projections ``[B, T, H]``."""
    if spec.layout == "split":
        return mixer.in_proj_qkv(x_BTH), mixer.in_proj_z(x_BTH), mixer.in_proj_b(x_BTH), mixer.in_proj_a(x_BTH)
    per_key = spec.value_heads // spec.key_heads
    parts = mixer.in_proj_qkvz(x_BTH).unflatten(-1, (spec.key_heads, -1))
    wide = per_key * spec.value_dim
    q, k, v, gate = (part.flatten(2) for part in parts.split([spec.key_dim, spec.key_dim, wide, wide], -1))
    b, a = (part.flatten(2) for part in mixer.in_proj_ba(x_BTH).unflatten(-1, (spec.key_heads, -1)).split(per_key, -1))
    return torch.cat([q, k, v], -1), gate, b, a


def delta_with(conv: Callable[..., Tensor], scan: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """A backend made of a convolution and a recurrence, which have the arguments of `reference_conv` and `reference_delta_scan`."""

    def delta(mixed_BTC, weights, g_BTH, beta_BTH, spec, with_state):
        q, k, v = conv(mixed_BTC, weights.conv, weights.conv_bias).split([spec.keys, spec.keys, spec.values], -1)
        q, k = (part.unflatten(-1, (spec.key_heads, spec.key_dim)) for part in (q, k))
        o, last = scan(q, k, v.unflatten(-1, (spec.value_heads, spec.value_dim)), g_BTH, beta_BTH)
        return o, last if with_state else None

    return delta


def reference_delta(
    mixed_BTC: Tensor, weights: DeltaWeights, g_BTH: Tensor, beta_BTH: Tensor, spec: DeltaSpec, with_state: bool
) -> tuple[Tensor, Tensor | None]:
    """Convolution and recurrence in plain torch.

    Args:
        mixed_BTC: queries, keys and values before the convolution.
        weights: the convolution's.
        g_BTH, beta_BTH: log decay and strength of each head.
        spec: what it computes.
        with_state: whether the last state is wanted.

    Returns:
        o ``[B, T, H, V]`` and the last state ``[B, H, K, V]`` or None.
    """
    return delta_with(reference_conv, reference_delta_scan)(mixed_BTC, weights, g_BTH, beta_BTH, spec, with_state)


def _inject(spec, backend, implementation):
    return {"": (PatchedDelta, DeltaState(spec, backend))}


DELTA_MIXER = Kind(
    name="delta_mixer", pattern="delta", backends="delta", injections=_inject, trial=short_trial_call, bench=bench_call, most_tokens=1000,
    follows=followed, dense=True,
)  # fmt: skip

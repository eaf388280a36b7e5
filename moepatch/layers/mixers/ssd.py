"""Mamba-2 mixers: projection, short convolution, state-space recurrence with one decay per head, gated norm, projection.

The projections and the norm stay the family's modules and are called; everything between them is one call of a backend of the table
``ssd``: ``(zxbcdt, weights, spec, mask, with_state) -> (gate, y, last state or None)``, see `reference_ssd`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels.conv import reference_conv
from ...kind import Kind
from ...registry import compute
from ..roles import ByRole, Given, Roles, followed
from .calls import bench_call, masked, trial_call, whole_sequences
from .ssd_scan import reference_scan


@dataclass(frozen=True, kw_only=True)
class SSDSpec:
    """One Mamba-2 mixer.

    Attributes:
        hidden: width of what comes in and goes out.
        heads, head_dim: H heads of width P.
        groups: of heads that share B and C.
        state: N, of the state ``[P, N]`` of a head.
        taps: of the convolution.
        limits: what the step size is clamped to.
        roles: what the arguments of its forward are; None until they are found.
    """

    hidden: int
    heads: int
    head_dim: int
    groups: int
    state: int
    taps: int
    limits: tuple[float, float]
    roles: Roles | None = None

    @property
    def inner(self) -> int:
        """The width of all heads."""
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        """The channels of the convolution: x, B and C side by side."""
        return self.inner + 2 * self.groups * self.state

    @property
    def projected(self) -> int:
        """The width of the input projection: gate, the convolution's channels, step sizes."""
        return self.inner + self.channels + self.heads

    def resized(self, sizes: Mapping[int, int]) -> SSDSpec:
        """The same mixer at other sizes."""
        new = {name: sizes.get(value, value) for name, value in vars(self).items() if type(value) is int}
        return replace(self, **new)

    def describe(self) -> str:
        """One line."""
        return f"Mamba-2 {self.heads}×{self.head_dim} state {self.state} groups {self.groups} conv {self.taps}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        known = {name: value for name, value in vars(self).items() if name != "roles"}
        return {"layout": "mamba2", **known, "limits": [str(limit) for limit in self.limits]}


class SSDWeights(NamedTuple):
    """The parameters between the two projections: taps ``[channels, K]``, their bias or None, and three vectors over heads."""

    conv: Tensor
    conv_bias: Tensor | None
    a_log: Tensor
    dt_bias: Tensor
    skip: Tensor


@dataclass(frozen=True)
class SSDState:
    """What the patched mixer needs to know."""

    spec: SSDSpec
    backend: str

    def __str__(self) -> str:
        return f"{self.spec.describe()}, backend={self.backend}"


class PatchedSSD(ByRole):
    """Takes and returns what the family's mixer does; training and prefill are computed by a backend, the rest by the family."""

    takes_children = True
    _moepatch: SSDState

    def computed(self, given: Given):
        """See the class."""
        if not whole_sequences(self, self.conv1d, given):
            return self.as_the_family(given)
        hidden_states, cache, attention_mask = given.tokens, given.cache, given.mask
        spec = self._moepatch.spec
        zxbcdt = self.in_proj(masked(hidden_states, attention_mask))
        if cache is not None:
            before_conv = zxbcdt[..., spec.inner : spec.inner + spec.channels].transpose(1, 2)
            spec.roles.updated(self, given, before_conv)
        weights = SSDWeights(self.conv1d.weight.squeeze(1), self.conv1d.bias, self.A_log, self.dt_bias, self.D)
        gate, y, last = compute("ssd", self._moepatch.backend)(zxbcdt, weights, spec, attention_mask, cache is not None)
        if cache is not None:
            spec.roles.updated(self, given, last, place=1)
        return self.out_proj(self.norm(y, gate).to(hidden_states.dtype))


def reference_ssd(
    zxbcdt: Tensor, weights: SSDWeights, spec: SSDSpec, mask_BT: Tensor | None, with_state: bool, *, factors: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Convolution and recurrence in plain torch.

    Args:
        zxbcdt: ``[B, T, …]``: gate, x, B, C, step sizes side by side.
        weights: the mixer's.
        spec: what it computes.
        mask_BT: 0 for padding, or None.
        with_state: whether the last state is wanted.
        factors: see `reference_scan`.

    Returns:
        The gate and y, both ``[B, T, H·P]``, and the last state ``[B, H, P, N]`` or None.
    """
    gate, u_BTC, dt_BTH = zxbcdt.split([spec.inner, spec.channels, spec.heads], -1)
    u_BTC = masked(reference_conv(u_BTC, weights.conv, weights.conv_bias), mask_BT)
    x, b, c = u_BTC.split([spec.inner, spec.groups * spec.state, spec.groups * spec.state], -1)
    b, c = (part.unflatten(-1, (spec.groups, spec.state)) for part in (b, c))
    y, last = reference_scan(
        x.unflatten(-1, (spec.heads, spec.head_dim)), dt_BTH, weights.a_log, b, c, weights.skip, weights.dt_bias, spec.limits, factors=factors
    )
    return gate, y.flatten(2), last if with_state else None


def torch_ssd(zxbcdt: Tensor, weights: SSDWeights, spec: SSDSpec, mask_BT: Tensor | None, with_state: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """`reference_ssd` with matrix products in the precision of the input."""
    return reference_ssd(zxbcdt, weights, spec, mask_BT, with_state, factors=zxbcdt.dtype)


def _inject(spec, backend, implementation):
    return {"": (PatchedSSD, SSDState(spec, backend))}


SSD_MIXER = Kind(name="ssd_mixer", pattern="ssd", backends="ssd", injections=_inject, trial=trial_call, bench=bench_call, follows=followed, dense=True)

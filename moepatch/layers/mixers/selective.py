"""Mamba-1 mixers: projection, short convolution, step sizes and B and C from what it gives, selective scan, gate, projection.

Projections and norms stay the family's modules and are called. A backend of the table ``selective`` is a `SelectiveBackend`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from ...kind import Kind
from ...quantized import is_plain_linear
from ...registry import compute
from ..roles import ByRole, Given, Roles, followed
from .calls import bench_call, masked, trial_call, whole_sequences


class SelectiveBackend(NamedTuple):
    """A convolution and a recurrence, with the arguments and results of `reference_conv` and `reference_selective`."""

    conv: Callable[..., Tensor]
    scan: Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class SelectiveSpec:
    """One Mamba-1 mixer.

    Attributes:
        hidden: width of what comes in and goes out.
        inner: D, the channels.
        state: N, of each channel.
        rank: of the step sizes before their projection.
        taps: of the convolution.
        norms: names of the children that normalise step sizes, B and C; None without.
        roles: what the arguments of its forward are; None until they are found.
    """

    hidden: int
    inner: int
    state: int
    rank: int
    taps: int
    norms: tuple[str, str, str] | None
    roles: Roles | None = None

    def resized(self, sizes: Mapping[int, int]) -> SelectiveSpec:
        """The same mixer at other sizes."""
        new = {name: sizes.get(value, value) for name, value in vars(self).items() if type(value) is int}
        return replace(self, **new)

    def describe(self) -> str:
        """One line."""
        return f"Mamba-1 {self.inner} channels state {self.state} rank {self.rank} conv {self.taps}{' normed' if self.norms else ''}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        known = {name: value for name, value in vars(self).items() if name != "roles"}
        return {"layout": "mamba1", **known}


@dataclass(frozen=True)
class SelectiveState:
    """What the patched mixer needs to know."""

    spec: SelectiveSpec
    backend: str

    def __str__(self) -> str:
        return f"{self.spec.describe()}, backend={self.backend}"


class PatchedSelective(ByRole):
    """Takes and returns what the family's mixer does; training and prefill are computed by a backend, the rest by the family."""

    takes_children = True
    _moepatch: SelectiveState

    def computed(self, given: Given):
        """See the class."""
        # A projection that is more than a linear layer (quantized, adapted, hooked) may only be called, and this one's weight is needed.
        if not whole_sequences(self, self.conv1d, given) or not is_plain_linear(self.dt_proj):
            return self.as_the_family(given)
        hidden_states, cache, attention_mask = given.tokens, given.cache, given.mask
        spec, backend = self._moepatch.spec, compute("selective", self._moepatch.backend)
        x_BTD, gate_BTD = self.in_proj(masked(hidden_states, attention_mask)).chunk(2, dim=-1)
        if cache is not None:
            spec.roles.updated(self, given, x_BTD.transpose(1, 2))
        x_BTD = masked(backend.conv(x_BTD, self.conv1d.weight.squeeze(1), self.conv1d.bias), attention_mask)
        parts = self.x_proj(x_BTD).split([spec.rank, spec.state, spec.state], dim=-1)
        if spec.norms is not None:
            parts = [self.get_submodule(name)(part) for name, part in zip(spec.norms, parts, strict=True)]
        dt_BTD = F.linear(parts[0], self.dt_proj.weight)
        y_BTD, last = backend.scan(x_BTD, dt_BTD, self.A_log, parts[1], parts[2], self.D, self.dt_proj.bias, gate_BTD)
        if cache is not None:
            spec.roles.updated(self, given, last, place=1)
        return self.out_proj(y_BTD.to(hidden_states.dtype))


def _inject(spec, backend, implementation):
    return {"": (PatchedSelective, SelectiveState(spec, backend))}


SELECTIVE_MIXER = Kind(
    name="selective_mixer", pattern="selective", backends="selective", injections=_inject, trial=trial_call, bench=bench_call, most_tokens=1000,
    follows=followed, dense=True,
)  # fmt: skip

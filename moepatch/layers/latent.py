"""Attention modules with multi-head latent attention: low-rank projections, rotary embedding of a part, cache of latents, output projection.

One kernel each way stands between the up-projections and the attention function, which is the one that transformers' registry names, called
as the family calls it. B sequences of S tokens, H hidden; the parts of heads are those of `latent_heads`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..kind import Kind
from ..quantized import is_plain_linear
from ..registry import compute
from ..surgery import original_class
from ..trial import Call
from .attention_block import attention_functions, is_fresh
from .latent_heads import TURNS, LatentHeads, tables_of
from .roles import Argument, ByRole, Given, Roles, followed


@dataclass(frozen=True, kw_only=True)
class LatentSpec:
    """What an attention module with latents computes, and the names of its parts.

    Attributes:
        hidden: H.
        heads: what lies between the up-projections and the attention function.
        kv_rank: of the latent that keys and values come from.
        queries: names of what queries go through: one projection, or down-projection, norm and up-projection.
        down, norm, up, output: names of the projection to the latent and the shared key, the latent's norm, its up-projection and that of the result.
        kv_scale: multiplies the normed latent.
        gate: the name of a layer of tokens whose sigmoid multiplies the result, per number or per head; None without one.
        arguments: what the attention function is given.
        roles: what the arguments of the forward are.
    """

    hidden: int
    heads: LatentHeads
    kv_rank: int
    queries: tuple[str, ...]
    down: str
    norm: str
    up: str
    output: str
    kv_scale: float = 1.0
    gate: str | None = None
    arguments: tuple[Argument, ...] = ()
    roles: Roles

    def parameter_names(self) -> tuple[str, ...]:
        """The weights of the projections, relative to the module."""
        projections = {self.queries[0], self.queries[-1], self.down, self.up, self.output}
        return tuple(f"{name}.weight" for name in sorted(projections))

    def resized(self, sizes: Mapping[int, int]) -> LatentSpec:
        """The same module at other sizes, the number of heads included."""
        h = self.heads
        dims = {name: sizes.get(value, value) for name, value in vars(h).items() if type(value) is int}
        return replace(self, hidden=sizes.get(self.hidden, self.hidden), kv_rank=sizes.get(self.kv_rank, self.kv_rank), heads=replace(h, **dims))

    def describe(self) -> str:
        """Sizes and what is between the projections and attention, on one line."""
        h = self.heads
        parts = [f"H={self.hidden} heads={h.heads}×({h.nope}+{h.rope_dim}) values {h.value_dim} latent {self.kv_rank}"]
        parts += ["no rope" if h.rope == "none" else f"rope {h.rope}"]
        parts += ["scaled"] if h.q_scale != 1.0 or self.kv_scale != 1.0 else []
        parts += ["gated"] if self.gate else []
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """For people and programs that read JSON."""
        h = self.heads
        return {
            "hidden": self.hidden,
            "layout": "latent" + (", low-rank q" if len(self.queries) > 1 else ""),
            "heads": h.heads,
            "nope": h.nope,
            "rope_dim": h.rope_dim,
            "value_dim": h.value_dim,
            "kv_rank": self.kv_rank,
            "rope": h.rope,
            "scales": [h.q_scale, self.kv_scale],
            "gate": self.gate,
            "arguments": {a.name: a.value if a.source == "constant" else f"{a.source} {a.value}" for a in self.arguments},
        }


@dataclass(frozen=True)
class LatentState:
    """What a patched module needs to know."""

    spec: LatentSpec
    backend: str

    def __str__(self) -> str:
        return f"{self.spec.describe()}, backend={self.backend}"


class PatchedLatent(ByRole):
    """Computes what the family's forward does, with its arguments, and returns what it returns: the result and the attention weights.

    All projections and norms are called as they are. With a cache that holds something already, the family's own forward computes.
    """

    _moepatch: LatentState

    def computed(self, given: Given):
        """See the class."""
        spec, backend = self._moepatch.spec, self._moepatch.backend
        x, cache = given.tokens, given.cache
        if (cache is not None and not is_fresh(cache, spec.roles.layer(self, given))) or (spec.heads.rope != "none" and given.tables is None):
            return self.as_the_family(given)
        modules, heads = self._modules, spec.heads
        q = x
        for name in spec.queries:
            q = modules[name](q)
        latent, shared = modules[spec.down](x).split([spec.kv_rank, heads.rope_dim], -1)
        latent = modules[spec.norm](latent)
        latent = latent * spec.kv_scale if spec.kv_scale != 1.0 else latent
        # What such a projection returns is seen by nobody else, and not kept for its backward pass.
        owned = not torch.compiler.is_compiling() and is_plain_linear(modules[spec.queries[-1]])
        q, k, v = compute("latent", backend)(q, modules[spec.up](latent), shared, heads, *tables_of(given.tables), owned)
        if cache is not None:
            # The shared key, rotated, lies in the keys of every head. A fresh cache hands back what it is given.
            spec.roles.updated(self, given, latent.unsqueeze(1), k[:, :1, :, heads.nope :])
        registry, eager = attention_functions(original_class(self))
        attend = registry.get_interface(self.config._attn_implementation, eager)
        arguments = {**{argument.name: argument.of(self) for argument in spec.arguments}, **given.handed}
        y, attention_weights = attend(self, q, k, v, given.mask, **arguments, **(given.extra if spec.roles.extra else {}))
        if spec.gate is not None:
            y = y * torch.sigmoid(modules[spec.gate](x)).unflatten(-1, (heads.heads, -1))
        return modules[spec.output](y.reshape(*x.shape[:-1], -1)), attention_weights


def _inject(spec: LatentSpec, backend: str, implementation: str | None):
    return {"": (PatchedLatent, LatentState(spec, backend))}


def _call(spec: LatentSpec, dtype, device, generator, batch: int, sequence: int) -> Call:
    def made(*shape) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32)

    kwargs = {**spec.roles.absent(), spec.roles.tokens: made(batch, sequence, spec.hidden)}
    if spec.roles.tables is not None:
        kwargs[spec.roles.tables] = random_tables(spec.heads, 1, sequence, generator, device)
    return Call(kwargs=kwargs).mapped(lambda t: t.to(device=device, dtype=dtype))


def random_tables(heads: LatentHeads, batch: int, sequence: int, generator: torch.Generator, device: torch.device | str = "cpu"):
    """Tables as the family makes them, of random angles: two of R columns, on the CPU, or a complex one of R/2, on `device`."""
    turn = TURNS.get(heads.rope)
    columns = heads.rope_dim // (2 if turn is not None and turn.complex else 1)
    angles = torch.randn(batch, sequence, columns, generator=generator, dtype=torch.float32) * 3
    return torch.polar(torch.ones_like(angles), angles).to(device) if turn is not None and turn.complex else (angles.cos(), angles.sin())


def _trial(spec: LatentSpec, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Call:
    return _call(spec, dtype, device, generator, batch=2, sequence=12)


def _bench(spec: LatentSpec, dtype: torch.dtype, device: torch.device, generator: torch.Generator, tokens: int) -> Call:
    return replace(_call(spec, dtype, device, generator, batch=1, sequence=tokens), constants=frozenset({spec.roles.tables}))


LATENT = Kind(
    name="latent",
    pattern="attention",
    backends="latent",
    injections=_inject,
    trial=_trial,
    bench=_bench,
    follows=followed,
    dense=True,
)
"""How moepatch patches attention with latents."""

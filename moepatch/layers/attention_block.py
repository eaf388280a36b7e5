"""The attention module around the attention function: projections, head norms, rotary embedding, cache, output gate, output projection.

Queries, keys and values come from one GEMM, and one kernel each way stands between it and the attention function, which is the one that
transformers' registry names, called as the family calls it. B sequences of S tokens, H hidden, D head dim.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..autocast import autocast_dtype
from ..kind import Kind
from ..layout.adjacent import Adjacent
from ..registry import compute
from ..surgery import Step, is_bare, original_class
from ..trial import Call
from .attention.function import direct
from .attention_span import Span, attention_span
from .linear import PROJECTIONS, project
from .roles import Argument, ByRole, Given, Roles, followed
from .rope import ROPES, HeadsSpec, dense_rows, reference_heads

#: Where families keep the attention function that they have written out.
EAGER = "eager_attention_forward"


@dataclass(frozen=True, kw_only=True)
class AttentionBlockSpec:
    """What an attention module computes, and the names of its parts.

    Attributes:
        hidden: H.
        heads: what lies between the projections and the attention function.
        bias: whether the projections of queries, keys and values have biases.
        inputs: their names, in this order.
        output: the name of the output projection.
        norms: names of the norms of queries and keys, or empty.
        norm_class: the class of the norms as they were found.
        gate: the name of a layer of tokens whose sigmoid multiplies the result, per number or per head; None without one.
        partial: whether it rotates some of the dims of a head (the tables say how many).
        arguments: what the attention function is given.
        roles: what the arguments of the forward are.
    """

    hidden: int
    heads: HeadsSpec
    bias: bool
    inputs: tuple[str, str, str]
    output: str
    norms: tuple[str, ...] = ()
    norm_class: type | None = None
    gate: str | None = None
    partial: bool = False
    arguments: tuple[Argument, ...] = ()
    roles: Roles

    @property
    def table_width(self) -> int:
        """The width of tables of cos and sin for a trial: as many dims are rotated as can be, or half of them."""
        return self.heads.head_dim // (2 if self.partial else 1) // (ROPES[self.heads.rope].width if self.heads.rope != "none" else 1)

    def parameter_names(self) -> tuple[str, ...]:
        """The parameters of the projections, relative to the module."""
        biases = tuple(f"{name}.bias" for name in self.inputs) if self.bias else ()
        return (*(f"{name}.weight" for name in self.inputs), *biases, f"{self.output}.weight")

    def resized(self, sizes: Mapping[int, int]) -> AttentionBlockSpec:
        """The same module at another hidden size, with other heads."""
        heads = replace(
            self.heads,
            heads=sizes.get(self.heads.heads, self.heads.heads),
            kv_heads=sizes.get(self.heads.kv_heads, self.heads.kv_heads),
            head_dim=sizes.get(self.heads.head_dim, self.heads.head_dim),
            value_dim=sizes.get(self.heads.value_dim, self.heads.value_dim),
        )
        return replace(self, hidden=sizes.get(self.hidden, self.hidden), heads=heads)

    def describe(self) -> str:
        """Sizes and what is between the projections and attention, on one line."""
        h = self.heads
        parts = [f"H={self.hidden} heads={h.heads}/{h.kv_heads}×{h.head_dim}"]
        parts += [f"values {h.value_dim}"] if h.value_dim != h.head_dim else []
        parts += [f"norm {h.norm.place}"] if h.norm else []
        parts += ["no rope" if h.rope == "none" else f"rope {h.rope}" + (", partial" if self.partial else "")]
        parts += ["gated"] if h.gated or self.gate else []
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """For people and programs that read JSON."""
        h = self.heads
        return {
            "hidden": self.hidden,
            "layout": "q, k, v apart" + (", bias" if self.bias else "") + (", gate in q" if h.gated else ""),
            "heads": h.heads,
            "kv_heads": h.kv_heads,
            "head_dim": h.head_dim,
            "value_dim": h.value_dim,
            "norm": h.norm.place if h.norm else None,
            "rope": h.rope,
            "partial": self.partial,
            "gate": self.gate,
            "arguments": {a.name: a.value if a.source == "constant" else f"{a.source} {a.value}" for a in self.arguments},
        }


@dataclass(frozen=True)
class AttentionBlockState:
    """What a patched attention module needs to know."""

    spec: AttentionBlockSpec
    backend: str

    def __str__(self) -> str:
        return f"{self.spec.describe()}, backend={self.backend}"


class PatchedAttentionBlock(ByRole):
    """Computes what the family's forward does, with its arguments, and returns what it returns: the result and the attention weights.

    A projection or a norm that is more than it was (a LoRA layer, hooks) is called as it is.
    """

    _moepatch: AttentionBlockState

    def computed(self, given: Given):
        """See the class."""
        spec, backend = self._moepatch.spec, self._moepatch.backend
        hidden_states, cache = given.tokens, given.cache
        registry, eager = attention_functions(original_class(self))
        attend = registry.get_interface(self.config._attn_implementation, eager)
        arguments = {**{argument.name: argument.of(self) for argument in spec.arguments}, **given.handed}
        if backend == "triton" and not torch.compiler.is_compiling() and (cache is None or is_fresh(cache, spec.roles.layer(self, given))):
            extra = given.extra if spec.roles.extra else {}
            found = self._at_once(spec, attend, hidden_states, given.tables, given.mask, {**arguments, **extra}, cache is not None)
            if found is not None:
                y, *kept = found if isinstance(found, tuple) else (found,)
                if kept:
                    spec.roles.updated(self, given, *kept)
                return y, None
        q, k, v, gate = self._heads(spec, backend, hidden_states, given.tables)
        if cache is not None:
            k, v = spec.roles.updated(self, given, k, v)
        # A cache may have changed the other keywords.
        y, attention_weights = attend(self, q, k, v, given.mask, **arguments, **(given.extra if spec.roles.extra else {}))
        y = self._gated(spec, y, gate, hidden_states).reshape(*hidden_states.shape[:-1], -1)
        output = self._modules[spec.output]
        plain = backend in PROJECTIONS and type(output) is nn.Linear and is_bare(output)
        return project(backend, y, output) if plain else output(y), attention_weights

    def _at_once(self, spec: AttentionBlockSpec, attend, x: Tensor, tables, mask, arguments: Mapping[str, Any], cached: bool):
        """The result as one function (see `attention_span`); None where a part of it is more than it was, or needs more than kernels without autograd."""
        modules, heads = self._modules, spec.heads if tables is not None else spec.heads.unrotated
        linears = [modules[name] for name in spec.inputs] + [modules[spec.output]]
        if spec.gate is not None or heads.gated or autocast_dtype(x.device) is not None or torch_module._has_any_global_hook():
            return None
        if not all(type(linear) is nn.Linear and is_bare(linear) for linear in linears) or not _as_matched(linears[:-1], spec):
            return None
        norms = [modules[name] for name in spec.norms]
        if not all(is_bare(norm) and original_class(norm) is spec.norm_class for norm in norms):
            return None
        weights = [linear._parameters["weight"] for linear in linears]
        if any(weight.dtype is not x.dtype for weight in weights):
            return None
        cos, sin = (None, None) if heads.rope == "none" else map(dense_rows, tables)
        if cos is not None and (cos.ndim != 3 or cos.requires_grad or sin.requires_grad):
            return None
        form = x.shape[1], heads.heads, heads.kv_heads, heads.head_dim, heads.value_dim, x.dtype, x.device
        found = direct(attend, self, form, mask, **arguments)
        if found is None:
            return None
        biases = [linear._parameters["bias"] for linear in linears]
        factors = [norm._parameters["weight"] for norm in norms] or (None, None)
        projections = (*weights[:3], *biases[:3]) if spec.bias else tuple(weights[:3])
        return attention_span(x, (cos, sin), tuple(factors), (weights[3], biases[3]), projections, Span(heads, *found, spec.bias, cached))

    def _heads(self, spec: AttentionBlockSpec, backend: str, x: Tensor, tables: tuple[Tensor, Tensor] | None):
        """Queries, keys and values ``[B, heads, S, D]`` and the gate ``[B, S, heads, D]`` or None."""
        joint, heads = self._projected(spec, backend, x), spec.heads
        if tables is None:  # some models have layers, or a setting, without rotation
            heads = heads.unrotated
        cos, sin = (None, None) if heads.rope == "none" else tables
        if not spec.norms:
            return compute("attention_block", backend)(joint, heads, None, None, cos, sin)
        norms = [self._modules[name] for name in spec.norms]
        if all(is_bare(norm) and original_class(norm) is spec.norm_class for norm in norms):
            return compute("attention_block", backend)(joint, heads, norms[0].weight, norms[1].weight, cos, sin)
        return reference_heads(joint, heads, *norms, cos, sin)

    def _projected(self, spec: AttentionBlockSpec, backend: str, x: Tensor) -> Tensor:
        """``[B, S, N]``: queries, keys, values."""
        layers = [self._modules[name] for name in spec.inputs]
        if not all(type(layer) is nn.Linear and is_bare(layer) for layer in layers) or not _as_matched(layers, spec):
            return torch.cat([layer(x) for layer in layers], -1)
        return project(backend, x, *layers)

    def _gated(self, spec: AttentionBlockSpec, y: Tensor, gate: Tensor | None, x: Tensor) -> Tensor:
        """``[B, S, heads, D]`` times the sigmoid of the gate, if there is one."""
        if spec.gate is not None:
            gate = self._modules[spec.gate](x).unflatten(-1, (spec.heads.heads, -1))
        return y if gate is None else y * torch.sigmoid(gate)


def _as_matched(inputs: Sequence[nn.Linear], spec: AttentionBlockSpec) -> bool:
    """Whether projections have a bias where they had one, all or none; a layer that was put there since may differ."""
    return all((layer.bias is not None) == spec.bias for layer in inputs)


@functools.cache
def attention_functions(cls: type) -> tuple[Any, Any] | None:
    """transformers' registry of attention functions and the family's eager one, as the forward of a class sees them; None without."""
    names = inspect.unwrap(cls.forward).__globals__
    if "ALL_ATTENTION_FUNCTIONS" not in names or EAGER not in names:
        return None
    return names["ALL_ATTENTION_FUNCTIONS"], names[EAGER]


def is_fresh(cache: Any, layer: Any) -> bool:
    """Whether a cache would hand back what it is given: it grows, and holds nothing of this layer yet, as those that a training step makes."""
    if type(cache) is not DynamicCache or type(layer) is not int:
        return False
    known = layer < len(cache.layers)
    grows = (type(cache.layers[layer]) if known else cache.layer_class_to_replicate) in (DynamicLayer, DynamicSlidingWindowLayer)
    return grows and not (known and cache.layers[layer].is_initialized)


def _inject(spec: AttentionBlockSpec, backend: str, implementation: str | None):
    return {"": (PatchedAttentionBlock, AttentionBlockState(spec, backend))}


def _call(spec: AttentionBlockSpec, dtype, device, generator, batch: int, sequence: int) -> Call:
    def made(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float32)

    kwargs = {**spec.roles.absent(), spec.roles.tokens: made(batch, sequence, spec.hidden)}
    if spec.roles.tables is not None:
        angles = made(1, sequence, spec.table_width) * 3
        kwargs[spec.roles.tables] = (angles.cos(), angles.sin())
    return Call(kwargs=kwargs).mapped(lambda t: t.to(device=device, dtype=dtype))


def _trial(spec: AttentionBlockSpec, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Call:
    return _call(spec, dtype, device, generator, batch=2, sequence=12)


def _bench(spec: AttentionBlockSpec, dtype: torch.dtype, device: torch.device, generator: torch.Generator, tokens: int) -> Call:
    return replace(_call(spec, dtype, device, generator, batch=1, sequence=tokens), constants=frozenset({spec.roles.tables}))


def _beside_each_other(module: nn.Module, spec: AttentionBlockSpec) -> Sequence[Step]:
    """Weights and biases of the three projections beside each other, so that they are one operand."""
    leaves = ("weight", "bias") if spec.bias else ("weight",)
    return tuple(Adjacent(module, tuple(f"{name}.{leaf}" for name in spec.inputs)) for leaf in leaves)


ATTENTION_BLOCK = Kind(
    name="attention_block",
    pattern="attention",
    backends="attention_block",
    injections=_inject,
    trial=_trial,
    relayout=_beside_each_other,
    bench=_bench,
    follows=followed,
    dense=True,
)

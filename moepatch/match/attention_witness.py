"""The second witness for attention modules: what they do around the attention function, at every length and scale.

The attention function is not their own, and its cost grows with the square of the length: here it is one that treats every token by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import AttentionInterface

from .. import trial
from ..trial import Call
from .settled import settled
from .witness import Objection, Witness, counts_of_tokens, moved, repeated, scaled, strided

_POINTWISE = "moepatch_pointwise"
#: Longer sequences have no mask, which would be as large as the square of the length.
_LONGEST_MASK = 600


@functools.cache
def _register() -> None:
    AttentionInterface.register(_POINTWISE, _pointwise)


def _pointwise(module, query, key, value, attention_mask, *args, **kwargs):
    """Values ``[B, S, heads, D]``, scaled by what their token's query and key have to do with each other."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1)[:, :, -query.shape[2] :] for t in (key, value))
    scale = torch.sigmoid((query * key).mean(-1, keepdim=True))
    return (value * scale).transpose(1, 2).contiguous(), None


def attention_objection(module: nn.Module, twin: nn.Module, spec: Any, call: Call, sequence: int) -> Objection | None:
    """What is different between a scale model of an attention module and its patched twin, in words; None if nothing is.

    Args:
        module, twin: both with a config of their own, which is put back as it was.
        spec: of the twin.
        call: an ordinary one.
        sequence: the length of its sequences; no other axis of its tensors has it.
    """
    _register()
    configs = {id(m.config): m.config for m in (module, twin)}.values()
    before = [config._attn_implementation_internal for config in configs]
    for config in configs:
        config._attn_implementation_internal = _POINTWISE
    try:
        witness = Witness(module, twin, trial.eager_forward(module))
        return settled(witness, ("attention", spec), call, lambda: _calls(module, call, sequence))
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name


def _calls(module: nn.Module, call: Call, sequence: int) -> Iterator[tuple[str, Call, bool]]:
    yield "", call, True
    for factor in (30.0, 1e-3):
        yield f"with inputs × {factor:g}", scaled(call, factor), False
    yield "with inputs that have a mean", moved(call), False
    yield "with an input that is laid out otherwise", strided(call), False
    counts = counts_of_tokens(module, 4200)
    for length in counts:
        yield f"with sequences of {length} token{'s' if length > 1 else ''}", _of_length(call, sequence, length), length in (1, counts[-1])
    yield "with 1 token", repeated(_of_length(call, sequence, 1), 1), True
    yield "with 1 sequence of 3 tokens", repeated(_of_length(call, sequence, 3), 1), False
    yield "with 5 sequences", repeated(call, 5), True


def _of_length(call: Call, sequence: int, length: int) -> Call:
    """The call with the tokens repeated or cut, every repetition a little different."""

    def resized(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or sequence not in leaf.shape:
            return leaf
        if list(leaf.shape).count(sequence) > 1 and length > _LONGEST_MASK:
            return None
        for axis in [axis for axis, n in enumerate(leaf.shape) if n == sequence]:
            leaf = leaf.index_select(axis, torch.arange(length) % sequence)
        if not leaf.is_floating_point():
            return leaf
        return leaf * (1 + 0.1 * torch.randn(leaf.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32))

    args, kwargs = tree_map(resized, (call.args, dict(call.kwargs)))
    return Call(args, kwargs, call.constants)

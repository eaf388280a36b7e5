"""How moepatch patches the attention function of a model: by the name that its modules see in its configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...kind import Kind
from ...registry import compute
from ...trial import Call
from . import register_names
from .function import CHAINS
from .masks import Mask
from .positions import CountedPositions
from .sight import Choice, Look, Sight
from .spec import CAUSAL, AttentionSpec, AttentionUse

# An unpickled model finds its functions without `optimize`.
register_names()

_TRIAL_TOKENS = 160


class AttentionCalls(nn.Module):
    """The attentions of a model without the model: one call for each form, to compare and to time backends.

    Args:
        use: the forms.
        backend: what computes them; ``reference`` is what the others are compared with.

    Args of the call:
        inputs: for each form q ``[B, H, S, D]``, k and v ``[B, G, S, D]`` and, with sinks, ``[H]``.

    Returns:
        For each form ``[B, S, H, Dv]``.
    """

    def __init__(self, use: AttentionUse, backend: str):
        super().__init__()
        self.forms = tuple(form for form, _ in use.forms)
        self.callers = nn.ModuleList(_Caller(form) for form in self.forms)
        self.attend, self.own = compute("attention", backend), backend in CHAINS

    def forward(self, inputs: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
        """See the class."""
        return tuple(self._one(*asked, *tensors) for *asked, tensors in zip(self.callers, self.forms, inputs, strict=True))

    def _one(self, caller: nn.Module, form: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        batch, _, length, _ = q.shape
        window = form.reach if form.window is None or form.window < length else replace(form, window=None).reach
        mask = None if window == CAUSAL else Mask(window, _arguments(window, batch, length, q.device))
        mask = mask if mask is None or self.own else mask.dense()
        return self.attend(caller, q, k, v, mask, is_causal=form.causal, softcap=form.softcap, s_aux=sinks, output_attentions=False)[0]


class _Caller(nn.Module):
    """The module that calls for one form of attention: what transformers' own functions read of it."""

    def __init__(self, form: AttentionSpec):
        super().__init__()
        self.num_key_value_groups, self.is_causal, self.layer_idx = form.heads // form.kv_heads, form.causal, 0


def _arguments(window, batch: int, length: int, device: torch.device) -> dict[str, Any]:
    """What transformers would have asked for a mask with this window."""
    from transformers import masking_utils as hf

    left, right = window
    if left < 0:
        function = hf.bidirectional_mask_function
    elif right == 0:
        function = hf.sliding_window_causal_mask_function(left + 1)
    else:
        function = hf.sliding_window_bidirectional_mask_function(left)
    return {"batch_size": batch, "q_length": length, "kv_length": length, "mask_function": function, "device": device}


def _call(use: AttentionUse, dtype: torch.dtype, device: torch.device, generator: torch.Generator, batch: int, length: int) -> Call:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(device=device, dtype=dtype)

    inputs = []
    for form, _ in use.forms:
        shapes = ((form.heads, form.head_dim), (form.kv_heads, form.head_dim), (form.kv_heads, form.v_head_dim))
        # Tokens first in memory, as projections leave them.
        tensors = [random(batch, length, heads, dim).transpose(1, 2) for heads, dim in shapes]
        inputs.append((*tensors, random(form.heads)) if form.sinks else tuple(tensors))
    return Call((tuple(inputs),))


def trial(use: AttentionUse, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Call:
    """A small call of `AttentionCalls`. Queries lie heads first, as a rotary embedding may leave them, the others tokens first."""
    call = _call(use, dtype, device, generator, 2, _TRIAL_TOKENS)
    return Call((tuple((q.contiguous(), *rest) for q, *rest in call.args[0]),))


def bench(use: AttentionUse, dtype: torch.dtype, device: torch.device, generator: torch.Generator, tokens: int) -> Call:
    """A call of `AttentionCalls` with one sequence of `tokens`."""
    return _call(use, dtype, device, generator, 1, tokens)


def _steps(module: nn.Module, spec: AttentionUse, backend: str) -> tuple[Look, ...]:
    """The model asks for other masks; its attention modules, and models around it, follow when all patterns are patched (`looks`)."""
    return (Look(module, CountedPositions, Sight(module.config, Choice(module.config, module.config._attn_implementation, backend))),)


ATTENTION_FUNCTION = Kind(
    name="attention_function",
    pattern="attention function",
    backends="attention",
    steps=_steps,
    stand_in=AttentionCalls,
    trial=trial,
    bench=bench,
    dense=True,
    only_itself=True,
)

"""What all mixers ask of a call before they serve it, and the random calls they are tried with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...surgery import is_bare
from ...trial import Call
from ..roles import Given

#: Arguments that keep packed sequences apart. What a family does with them depends on the libraries that are installed: left to it.
_PACKED = ("seq_idx", "cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k")
_TRIAL_TOKENS, _FEW_TOKENS = 12, 7


def whole_sequences(mixer: nn.Module, conv: nn.Module, given: Given) -> bool:
    """True for training and prefill. Decoding, continued sequences, packed sequences and offloaded weights are left to the family.

    Args:
        mixer: whose cache knows it under an index.
        conv: the child whose weights are used without calling it.
        given: the arguments of the call. One that plays no part in it may do so where a library computes.
    """
    roles = given.roles
    if given.cache is not None and given.cache.has_previous_state(roles.layer(mixer, given)):
        return False
    if not isinstance(conv, nn.Conv1d) or not is_bare(conv) or torch.compiler.is_exporting():
        return False
    known = (roles.tokens, roles.mask, roles.cache)
    if any(value is not None and value is not roles.default(name) for name, value in given.named.items() if name not in known):
        return False
    return all(given.extra.get(name) is None for name in _PACKED)


def masked(x_BTH: Tensor, mask_BT: Tensor | None) -> Tensor:
    """Padding set to 0, in the dtype of `x`."""
    return x_BTH if mask_BT is None else (x_BTH * mask_BT[:, :, None]).to(x_BTH.dtype)


def trial_call(spec, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Call:
    """Two short sequences of hidden states, as `Kind.trial` wants them."""
    return bench_call(spec, dtype, device, generator, 2 * _TRIAL_TOKENS, sequences=2)


def short_trial_call(spec, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Call:
    """The same with fewer tokens, for a recurrence whose gradients the families compute from differences of running sums: those lose bits
    with every token, and of twelve the last ones no longer agree to 1e-5."""
    return bench_call(spec, dtype, device, generator, 2 * _FEW_TOKENS, sequences=2)


def bench_call(spec, dtype: torch.dtype, device: torch.device, generator: torch.Generator, tokens: int, sequences: int = 1) -> Call:
    """Hidden states ``[B, T, H]`` with B·T = `tokens`, as `Kind.bench` wants them."""
    x_BTH = torch.randn(sequences, tokens // sequences, spec.hidden, generator=generator, dtype=torch.float32)
    return Call((x_BTH.to(device=device, dtype=dtype),))

"""FlashAttention 4 on the CPU: the signatures of its two inner functions, what they compute written out."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import torch
from attention_twin import visible

#: The parameters of flash-attn-4 4.0.0b36 (flash_attn/cute/interface.py), without annotations.
FORWARD = (
    "q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None, "
    "page_table=None, softmax_scale=None, causal=False, softcap=None, window_size_left=None, window_size_right=None, learnable_sink=None, tile_mn=None, "
    "mma_pv_is_rs=None, intra_wg_overlap=None, num_threads=384, num_splits=1, pack_gqa=None, _arch=None, score_mod=None, mask_mod=None, "
    "block_sparse_tensors=None, return_lse=False, out=None, lse=None, aux_tensors=None, aux_scalars=None, q_descale=None, k_descale=None, v_descale=None, "
    "gather_kv_indices=None, scheduler_metadata=None, seqlen_k_per_split=None, disable_scheduler_metadata=False, gather_bwd_recompute_p=False"
)
BACKWARD = (
    "q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None, window_size_right=None, m_block_size=64, "
    "n_block_size=128, num_threads=256, pack_gqa=False, num_stages_Q=2, num_stages_dO=2, SdP_swapAB=False, dKV_swapAB=False, dQ_swapAB=False, "
    "AtomLayoutMSdP=2, AtomLayoutNdKV=2, AtomLayoutMdQ=2, V_in_regs=False, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, "
    "max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None, score_mod=None, score_mod_bwd=None, mask_mod=None, "
    "aux_tensors=None, aux_scalars=None, block_sparse_tensors=None, dlse=None, learnable_sink=None"
)


def arguments(text, args, kwargs):
    signature = inspect.signature(eval(f"lambda {text}: None"))
    used = {"q", "k", "v", "out", "dout", "lse", "softmax_scale", "causal", "softcap", "window_size_left", "window_size_right", "learnable_sink", "return_lse"}
    bound = signature.bind(*args, **kwargs).arguments
    assert bound.keys() <= used and not bound["softcap"], bound.keys()
    left, right = bound["window_size_left"], 0 if bound["causal"] else bound["window_size_right"]
    return SimpleNamespace(**{name: bound.get(name) for name in used}, window=(-1 if left is None else left, -1 if right is None else right))


def heads_first(*tensors):
    """``[B, H, S, D]`` of ``[B, S, H, D]`` in fp32, key heads repeated for the first one's heads."""
    heads = tensors[0].shape[2]
    return [t.transpose(1, 2).repeat_interleave(heads // t.shape[2], 1).float() for t in tensors]


def scores_and_shares(q, k, v, lse, a):
    wide_q, wide_k, wide_v = heads_first(q, k, v)
    scores = (wide_q @ wide_k.mT * a.softmax_scale).masked_fill(~visible(q.shape[1], a.window), -torch.inf)
    if lse is None:
        columns = scores
        if a.learnable_sink is not None:
            columns = torch.cat([scores, a.learnable_sink.detach().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
        lse = columns.logsumexp(-1)
    return (wide_q, wide_k, wide_v), (scores - lse.unsqueeze(-1)).exp(), lse


def library():
    """What stands for `flash_attn.cute.interface`; ``calls`` counts its uses."""
    calls: list[str] = []

    def forward(*args, **kwargs):
        calls.append("forward")
        a = arguments(FORWARD, args, kwargs)
        (_, _, v), shares, lse = scores_and_shares(a.q, a.k, a.v, None, a)
        return (shares @ v).transpose(1, 2).to(a.q.dtype), lse if a.return_lse else None, None, None, None

    def backward(*args, **kwargs):
        calls.append("backward")
        a = arguments(BACKWARD, args, kwargs)
        (q, k, v), shares, _ = scores_and_shares(a.q, a.k, a.v, a.lse, a)
        grad, delta = a.dout.transpose(1, 2).float(), (a.out * a.dout).float().sum(-1).transpose(1, 2)
        dscores = shares * (grad @ v.mT - delta.unsqueeze(-1)) * a.softmax_scale
        dk, dv = ((full.unflatten(1, (a.k.shape[2], -1)).sum(2)).transpose(1, 2) for full in (dscores.mT @ q, shares.mT @ grad))
        grads = (dscores @ k).transpose(1, 2), dk, dv
        if a.learnable_sink is None:
            return grads
        return *grads, -((a.learnable_sink.detach().view(1, -1, 1) - a.lse).exp() * delta).sum((0, 2))

    return SimpleNamespace(calls=calls, _flash_attn_fwd=with_signature(forward, FORWARD), _flash_attn_bwd=with_signature(backward, BACKWARD))


def with_signature(function, text):
    function.__signature__ = inspect.signature(eval(f"lambda {text}: None"))
    return function

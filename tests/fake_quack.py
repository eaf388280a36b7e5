"""The functions of QuACK that moepatch calls, in torch and with QuACK's checks of shapes: for machines without a GPU.

Operands arrive as they do there: at a first call in torch's orientation, at a launch in the kernel's, ``a [M, K]`` and ``b [E, N, K]``.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import torch

from moepatch.experts import quack, quack_calls, quack_gemms, quack_tiles
from moepatch.experts.quack_epilogues import Epilogues

TILE = 16


class Dot:
    """The sink of dot products."""

    def sink_alloc_shape(self, lead, n, tile_m, tile_n):
        return (*lead, -(-n // tile_n))


class Epilogue:
    """One of the three epilogues of an activation."""

    def __init__(self, activation, gated, kind):
        self.activation, self.gated, self.kind = activation, gated, kind
        self.sinks = {"dot": Dot()} if kind == "backward" else {}

    def gemm(self, a, b, d, c, *, epi_args, cu_seqlens_m, A_idx, b_kn=False, concat_layout=None, **tiles):
        plan = SimpleNamespace(epilogue=self, b_kn=b_kn, concat=concat_layout, tile_n=tiles["tile_N"])
        run_gemm_epi_plan(plan, a, b, d, c, epi_args, cu_seqlens_m=cu_seqlens_m, A_idx=A_idx)
        return plan

    def finish(self, acc, pre, d, values, rows, experts, tile_n):
        activation, wide = self.activation, torch.float32
        split = (lambda t: (t[:, ::2], t[:, 1::2])) if self.gated else (lambda t: (t, None))
        if self.kind != "backward":
            bias = values["bias"][experts].to(wide) if self.kind == "forward_with_bias" else 0
            acc = acc + bias
            d[rows] = acc.to(d.dtype)
            values["h"][rows] = activation.forward(*split(acc)).to(d.dtype)
            return
        weight = values["weight"][rows].unsqueeze(1)
        gate, up = split(pre[rows].to(wide))
        h = activation.forward(gate, up)
        grads = activation.backward(acc * weight, gate, up)
        d[rows] = (torch.stack(grads, -1).flatten(1) if self.gated else grads[0]).to(d.dtype)
        values["h"][rows] = (h * weight).to(d.dtype)
        tiles = (h * acc).split(tile_n, 1)
        assert values["dot"].shape[1] == len(tiles)
        values["dot"][rows] = torch.stack([t.sum(1) for t in tiles], 1)


def concatenated(matrices, axis):
    """Halves along an axis taken alternately."""
    return matrices.unflatten(axis, (2, -1)).transpose(axis, axis + 1).flatten(axis, axis + 1)


def interleaved(b, concat):
    """``b [E, N, K]`` as the kernel reads it: halves of the axis that is not contiguous alternate."""
    return b if concat is None else concatenated(b, 2 if b.stride(1) == 1 else 1)


def groups(ends):
    ends = ends.tolist()
    return [(e, range(start, end)) for e, (start, end) in enumerate(zip(ends, ends[1:], strict=False)) if end > start]


def check(*tensors):
    """Aligned, and one axis contiguous."""
    for t in tensors:
        assert t.data_ptr() % 16 == 0 and 1 in t.stride()[-2:], (t.shape, t.stride())


def run_gemm_epi_plan(plan, a, b, d, c, values, *, cu_seqlens_m, A_idx):
    check(a, b, d)
    b = interleaved(b.mT if plan.b_kn else b, plan.concat)
    n = b.shape[1]
    paired = plan.epilogue.gated and plan.epilogue.kind == "backward"
    assert d.shape == (A_idx.numel(), 2 * n if paired else n) and d.stride(-1) == 1 and cu_seqlens_m.dtype == A_idx.dtype == torch.int32
    assert set(values) == {"forward": {"h"}, "forward_with_bias": {"h", "bias"}, "backward": {"h", "weight", "dot"}}[plan.epilogue.kind]
    for expert, rows in groups(cu_seqlens_m):
        acc = a[A_idx[rows]].float() @ b[expert].float().T
        plan.epilogue.finish(acc, c, d, values, list(rows), expert, plan.tile_n)


def gemm_tuned(a, b, out, *, cu_seqlens_m=None, cu_seqlens_k=None, A_idx=None, concat_layout=None, config=None):
    plan = SimpleNamespace(concat=concat_layout)
    run_gemm_plan(plan, a, b.mT, out, None, cu_seqlens_m=cu_seqlens_m, cu_seqlens_k=cu_seqlens_k, A_idx=A_idx)
    return None, 1, False, plan


gemm_tuned.fn = gemm_tuned


def run_gemm_plan(plan, a, b, out, c, *, cu_seqlens_m=None, cu_seqlens_k=None, A_idx=None):
    check(a, b, out)
    if cu_seqlens_m is not None:
        assert A_idx is None and a.stride(-1) == 1 and out.stride(-1) == 1 and out.shape == (a.shape[0], b.shape[1])
        b = interleaved(b, plan.concat)
        for expert, rows in groups(cu_seqlens_m):
            out[list(rows)] = (a[list(rows)].float() @ b[expert].float().T).to(out.dtype)
        return
    assert a.stride(-2) == 1 and b.stride(-2) == 1 and out.shape == (cu_seqlens_k.numel() - 1, a.shape[0], b.shape[0])
    result = torch.zeros(out.shape)
    for expert, rows in groups(cu_seqlens_k):
        result[expert] = a[:, A_idx[rows]].float() @ b[:, list(rows)].float().T
    if plan.concat is not None:  # columns alternate in the result and have halves in memory
        assert plan.concat == ("out",) and out.stride(1) == 1
        result = result.unflatten(2, (-1, 2)).transpose(2, 3).flatten(2, 3)
    out.copy_(result)


def fake_epilogues(activation):
    gated = activation.name not in ("silu", "gelu", "gelu_tanh", "relu", "relu2")
    return Epilogues(activation, gated, *(Epilogue(activation, gated, kind) for kind in ("forward", "forward_with_bias", "backward")))


class Tiling(NamedTuple):
    """What of QuACK's configurations is read."""

    tile_m: int = TILE
    tile_n: int = TILE
    pingpong: bool = False
    cluster_m: int = 1
    cluster_n: int = 1
    tile_k: int | None = None
    max_swizzle_size: int = 8


def install(monkeypatch, tuned_from=1 << 60):
    """Lets `moepatch.experts.quack` compute with these functions. Returns what is on file about tiles."""
    functions = quack_gemms.Library(lambda device: Tiling(), gemm_tuned, run_gemm_plan, run_gemm_epi_plan)
    on_file = {}
    for module in (quack_gemms, quack_calls):
        monkeypatch.setattr(module, "library", lambda: functions)
    monkeypatch.setattr(quack_calls, "TUNED_FROM", tuned_from)
    monkeypatch.setattr(quack_calls, "_PLANS", {})
    monkeypatch.setattr(quack, "epilogues", fake_epilogues)
    monkeypatch.setattr(quack_tiles, "store", SimpleNamespace(read=lambda name: dict(on_file), add=lambda name, entries: on_file.update(entries)))
    monkeypatch.setattr(quack_tiles, "possible", lambda problem: [Tiling(), Tiling(tile_n=2 * TILE, pingpong=True), Tiling(tile_m=2 * TILE)])
    monkeypatch.setattr(quack_tiles, "compile_together", lambda jobs: [run(tiles) for run, tiles in jobs])
    monkeypatch.setattr(quack_tiles, "_machine", lambda device: "a machine")
    monkeypatch.setattr(quack_tiles, "_milliseconds", lambda run, device: run() is not None and 1.0)
    return on_file

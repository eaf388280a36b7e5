"""A stand-in for the grouped GEMM of Transformer Engine on the CPU, with the library's rules and the rounding of FP8."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import torch

from moepatch.experts import te, te_gemm
from moepatch.layers.fp8 import rounded

DTYPES = SimpleNamespace(kFloat8E4M3=torch.float8_e4m3fn)
#: ``(layout, rows of the groups, FP8)`` of every grouped GEMM so far.
calls: list[tuple[str, list[int], bool]] = []


class Quantizer:
    """How one operand is rounded."""

    def __init__(self, dtype, device, *, rowwise, columnwise):
        assert rowwise
        self.dtype, self.columnwise = dtype, columnwise


@dataclass
class Rounded:
    """An operand in FP8, with its copy for columns or without."""

    numbers: torch.Tensor
    columnwise: bool


def split_quantize(tensor, sizes, quantizers):
    assert tensor.ndim == 2 and tensor.is_contiguous() and len(sizes) == len(quantizers) and sum(sizes) == tensor.shape[0]
    return [Rounded(rounded(t, q.dtype), q.columnwise) for t, q in zip(tensor.split(sizes), quantizers, strict=True)]


def gemm(a, b, out, quantization, dtype, *, layout, m_splits, single_output=False, use_split_accumulator=False):
    fp8 = isinstance(a[0], Rounded)
    assert len(a) == len(b) == len(quantization) == len(m_splits) and all(m_splits)
    calls.append((layout, m_splits, fp8))
    if fp8:
        assert all(t.columnwise or layout[0] == "T" for t in a) and all(t.columnwise or layout[1] == "N" for t in b)
        a, b = ([t.numbers for t in side] for side in (a, b))
        assert all(n % 16 == 0 for t in (*a, *b) for n in t.shape)
    assert all(t.is_contiguous() for t in (*a, *b, *out)) and out[0].dtype == dtype
    of = {"TN": lambda a, b: b.float() @ a.float().T, "NN": lambda a, b: b.float() @ a.float(), "NT": lambda a, b: b.float().T @ a.float()}[layout]
    results = [of(x, y) for x, y in zip(a, b, strict=True)]
    if single_output:
        assert [t.shape[0] for t in b] == m_splits
        out[0].copy_(torch.cat(results))
    else:
        for into, result in zip(out, results, strict=True):
            into.copy_(result)


def install(monkeypatch, everywhere=False):
    """Lets `moepatch.experts.te` compute with these functions; `everywhere`: and be available."""
    monkeypatch.setattr(te_gemm, "_library", lambda: te_gemm._Library(gemm, split_quantize, Quantizer, DTYPES))
    te_gemm._quantizers.cache_clear()
    calls.clear()
    if everywhere:
        monkeypatch.setattr(te, "missing", lambda *args, **kwargs: None)
        monkeypatch.setattr(te.fused, "why_not_triton", lambda *args, **kwargs: None)

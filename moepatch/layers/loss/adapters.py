"""Thin adapters over other libraries' fused losses, with the arguments of `reference.linear_cross_entropy`.

None of them can do everything: what they lack (a bias, a scale, a cap) is left to the chunked backend.
"""

from __future__ import annotations

from dataclasses import replace

from .chunked import Formula, count_labels, linear_cross_entropy

#: Tokens that QuACK takes at a time, its own choice first, and what it fills the last of them up to a multiple of.
_QUACK_CHUNKS, _QUACK_ROWS = (4096, 3072, 2048, 1024, 512), 128


def liger():
    """Liger's fused linear cross-entropy. It asks the device how many labels count, and waits for the answer."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    def compute(hidden_TH, weight_VH, bias_V, labels_T, formula):
        if formula.scale != 1:
            return linear_cross_entropy(hidden_TH, weight_VH, bias_V, labels_T, formula)
        reduction = "mean" if formula.mean else "sum"
        found = LigerFusedLinearCrossEntropyFunction.apply(
            hidden_TH, weight_VH, labels_T, bias_V, None, formula.ignore_index, 0.0, 0.0, reduction, formula.softcap
        )
        return (found[0] if isinstance(found, tuple) else found).float()

    return compute


def cce():
    """Apple's Cut Cross-Entropy without its filter, which leaves small gradients out. It looks for the labels that count, and waits."""
    from cut_cross_entropy import linear_cross_entropy as cut

    def compute(hidden_TH, weight_VH, bias_V, labels_T, formula):
        if formula.scale != 1 or bias_V is not None:
            return linear_cross_entropy(hidden_TH, weight_VH, bias_V, labels_T, formula)
        total = cut(hidden_TH, weight_VH, labels_T, formula.ignore_index, formula.softcap, "sum", filter_eps=None).float()
        return total / count_labels(labels_T, formula) if formula.mean else total

    return compute


def quack():
    """QuACK's chunked linear cross-entropy, with an fp32 sum for the weight's gradient. Rows come in eights."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def compute(hidden_TH, weight_VH, bias_V, labels_T, formula):
        chunk = quack_chunk(*hidden_TH.shape)
        if chunk is None or replace(formula, mean=True) != Formula(formula.ignore_index) or bias_V is not None or hidden_TH.shape[0] % 8:
            return linear_cross_entropy(hidden_TH, weight_VH, bias_V, labels_T, formula)
        reduction = "mean" if formula.mean else "sum"
        return chunked_linear_cross_entropy(hidden_TH, weight_VH, labels_T, chunk, formula.ignore_index, reduction).float()

    return compute


def quack_chunk(tokens: int, hidden: int) -> int | None:
    """The largest chunk, in tokens, whose pieces are not as long as they are wide; None if there is none.

    QuACK multiplies the rows of a piece by factors, and refuses a square piece, whose rows and columns it cannot tell apart.

    >>> quack_chunk(8192, 2048), quack_chunk(8192, 4096), quack_chunk(2048, 2048)
    (4096, 3072, 1024)
    """
    for chunk in _QUACK_CHUNKS:
        last = tokens % chunk or min(tokens, chunk)
        pieces = {-(-last // _QUACK_ROWS) * _QUACK_ROWS, *([chunk] if tokens > chunk else [])}
        if hidden not in pieces:
            return chunk
    return None

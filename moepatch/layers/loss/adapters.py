"""Thin adapters over other libraries' fused losses, with the arguments of `reference.linear_cross_entropy`.

None of them can do everything: what they lack (a bias, a scale, a cap) is left to the chunked backend.
"""

from __future__ import annotations

from .chunked import Formula, count_labels, linear_cross_entropy


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

"""What all backends of the loss compute, in plain torch. It has the logits in memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .chunked import Formula


def linear_cross_entropy(hidden_TH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, labels_T: Tensor, formula: Formula) -> Tensor:
    """Cross-entropy between ``hidden @ weight.T + bias`` and labels.

    Args:
        hidden_TH: hidden states, in the dtype of the weight.
        weight_VH: the head's weight.
        bias_V: the head's bias, or None.
        labels_T: int64; rows with `formula.ignore_index` do not count.
        formula: what lies between the head's output and the loss.

    Returns:
        A scalar in fp32 (fp64 for fp64). As in torch, a mean over no rows is nan.
    """
    logits_TV = F.linear(hidden_TH, weight_VH, bias_V)
    logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    logits_TV = logits_TV * formula.scale if formula.scale != 1 else logits_TV
    if formula.softcap is not None:
        logits_TV = torch.tanh(logits_TV / formula.softcap) * formula.softcap
    return F.cross_entropy(logits_TV, labels_T, ignore_index=formula.ignore_index, reduction="mean" if formula.mean else "sum")

"""Dispatch where one rank holds all experts: nothing moves."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import BackendUnavailable
from .base import Received


class Local:
    """The contract of `base.Dispatcher` for ``ep=1``; takes the arguments of the others."""

    name = "local"
    averages = False

    def __init__(self, group: dist.ProcessGroup | None, num_experts: int):
        if group is not None and group.size() > 1:
            raise BackendUnavailable(f"local: it moves nothing, and the experts are spread over {group.size()} ranks. Use dispatch='all_to_all'")
        self.num_experts = num_experts

    def dispatch(self, x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Received:
        """Every token stays where it is."""
        valid_TK = (topk_ids_TK >= 0) & (topk_ids_TK < self.num_experts)
        weights_TK = topk_weights_TK.to(torch.promote_types(topk_weights_TK.dtype, torch.float32))
        return Received(x_NH=x_TH, ids_NK=torch.where(valid_TK, topk_ids_TK, -1), weights_NK=weights_TK, rows=None, handle=None)

    def combine(self, y_NH: Tensor, handle: None) -> Tensor:
        """Nothing to bring back."""
        return y_NH

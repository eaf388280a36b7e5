"""One module of a pattern, set up to be timed: a copy with other weights, and a call of the size that users run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from .kinds import KINDS
from .layers.attention import name_of
from .planning import Pattern
from .replica import replica


@dataclass(frozen=True)
class Piece:
    """Something to time.

    Attributes:
        forward: one call; returns the results that have gradients.
        leaves: what gets gradients.
    """

    forward: Callable[[], list[Tensor]]
    leaves: list[Tensor]

    def step(self) -> None:
        """Forward and backward."""
        outputs = self.forward()
        torch.autograd.grad(outputs, self.leaves, [torch.ones_like(o) for o in outputs], allow_unused=True)


def piece(
    model: nn.Module,
    pattern: Pattern,
    backend: str | None,
    tokens: int,
    device: torch.device,
    fill: Callable[[Tensor, tuple[int, ...]], Tensor],
    *,
    attention: str | None = None,
    forward: Callable[[nn.Module], Callable[..., Any]] | None = None,
) -> Piece:
    """A module of a pattern, and a call of it.

    Args:
        model: has the pattern's modules.
        backend: None for the family's own code.
        tokens: of the call.
        device: where it runs.
        fill: makes the weights, as for `replica`.
        attention: the backend that a patched attention module calls; None, and for the family's: what the model is configured for.
        forward: gives the function to call for a module, as ``(module, ...)``; None: its kind's, or its own.
    """
    kind, spec, dtype = KINDS[pattern.site.kind], pattern.site.spec, getattr(torch, pattern.site.dtype)
    module = kind.at_work(model.get_submodule(pattern.site.fqn), spec, backend, lambda original: replica(original, {}, fill))
    if backend is not None and attention is not None and kind.name in ("attention_block", "latent"):
        module.config = copy.copy(module.config)
        module.config._attn_implementation_internal = name_of(attention)
    call = kind.bench(spec, dtype, device, torch.Generator().manual_seed(0), tokens).trainable()
    function = kind.call or (forward(module) if forward is not None else type(module).forward)

    def run() -> list[Tensor]:
        made = function(module, *call.args, **call.kwargs)
        return [o for o in tree_flatten(made)[0] if isinstance(o, Tensor) and o.requires_grad]

    return Piece(run, [*call.leaves(), *(p for p in module.parameters() if p.requires_grad)])

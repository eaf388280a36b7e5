"""The kind "loss": a head whose logits wait until somebody wants them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.modules.module as torch_module
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributed.fsdp import FSDPModule

from ...autocast import autocast_dtype
from ...kind import Injections, Kind
from ...parallel.fsdp2 import Unit
from ...quantized import is_plain
from ...registry import compute
from ...surgery import Patched
from ...trial import Call
from .deferred import defer
from .head import deferring, is_deferring, stays
from .spec import LossSpec


@dataclass(frozen=True)
class LossState:
    """What a patched head keeps of its patch."""

    spec: LossSpec
    backend: str

    def __str__(self) -> str:
        return f"loss={self.backend}"


class PatchedHead(Patched):
    """A head whose logits wait until somebody wants them, while a loss is being computed. Else the head that it was."""

    reads_shapes = False
    _moepatch: LossState

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits ``[..., V]`` of hidden states ``[..., H]``."""
        if not is_deferring() or not _is_plain(self, hidden) or _watches_gradients(self):
            return super().forward(hidden)
        return defer(self, hidden, compute("loss", self._moepatch.backend))


def _is_plain(head: nn.Linear, hidden: Tensor) -> bool:
    """Whether the fused loss can take the place of the head: dense tensors that are whole here and stay so until the loss.

    A unit of FSDP frees its weights when its forward returns, unless it stays. Function transforms (`torch.func`), forward-mode derivatives and
    tracers want to see the head's own operators.
    """
    weight = head.weight
    if type(hidden) is not Tensor or not is_plain(weight) or hidden.ndim < 2 or weight.device != hidden.device or hidden.is_meta:
        return False
    if torch._C._are_functorch_transforms_active() or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None:
        return False
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in (hidden, weight, head.bias)):
        return False
    if not stays(head):
        return False
    same = hidden.dtype == weight.dtype or autocast_dtype(hidden.device) is not None
    return same and hidden.is_floating_point() and not (isinstance(head, FSDPModule) and not Unit.of(head).stays)


def _watches_gradients(head: nn.Linear) -> bool:
    """Whether hooks of the old kind wait for the gradients of the head's last operator, which is not the one that it was."""
    own = head._backward_hooks and not head._is_full_backward_hook
    return bool(own or (torch_module._global_backward_hooks and not torch_module._global_is_full_backward_hook))


def with_loss(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    """The loss of a head, patched or not, as a causal language model computes it.

    Args:
        hidden: ``[T, H]``.
        labels: ``[T]``, shifted already.
    """
    with deferring():  # the loss as well: as in a model's forward, nobody has to look whether the weight is still what it was
        return nn.functional.cross_entropy(head(hidden).float(), labels)


def _call(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    """The loss as a matrix of one number: trials compare rows."""
    return with_loss(head, hidden, labels).view(1, 1)


def _inject(spec: LossSpec, backend: str, implementation: str | None) -> Injections:
    return {"": (PatchedHead, LossState(spec, backend))}


def _bench(spec: LossSpec, dtype: torch.dtype, device: torch.device, generator: torch.Generator, tokens: int) -> Call:
    """Hidden states of a scale that gives logits of a few units, and labels of which some do not count."""
    hidden = torch.randn(tokens, spec.hidden, generator=generator, dtype=torch.float32).to(device=device, dtype=dtype)
    labels = torch.randint(0, spec.vocab, (tokens,), generator=generator)
    labels[::7] = -100
    return Call((hidden, labels.to(device)))


def _trial(spec: LossSpec, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Call:
    return _bench(spec, dtype, device, generator, 48)


LOSS = Kind(name="loss", pattern="loss", backends="loss", injections=_inject, trial=_trial, call=_call, bench=_bench, dense=True)

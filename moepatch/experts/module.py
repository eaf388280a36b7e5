"""The patched experts module: HF's call, moepatch's computation."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..autocast import autocast_dtype
from ..errors import MoePatchError
from ..registry import compute
from ..surgery import Patched, is_traced, original_class
from .spec import ExpertsSpec, ExpertWeights


@dataclass(frozen=True)
class ExpertsState:
    """What a patched experts module needs to know: a value, so that pickle and deepcopy carry it.

    Attributes:
        spec: what the module computes.
        backend: the name of the compute backend.
        implementation: ``config._experts_implementation`` at the time of the patch; None for families that do not have it. Whoever sets another
            one, or this one anew, wants it: the family's code computes from then on (see `watch`).
    """

    spec: ExpertsSpec
    backend: str
    implementation: str | None

    def __str__(self) -> str:
        return f"{self.spec.describe()}, backend={self.backend}"


class SeesRoutes:
    """Base of moepatch's own hooks on experts, by which calls are told that are made for them."""


class PatchedExperts(Patched):
    """Computes ``experts(hidden_states, top_k_index, top_k_weights)`` with a backend.

    Args of the call:
        hidden_states: tokens ``[..., H]``.
        top_k_index: their experts ``[T, K]``; an id outside ``0 … E+Z-1`` means none.
        top_k_weights: routing weights ``[T, K]``, of any floating dtype.

    Returns:
        Tokens of the shape (see also `ExpertsSpec.by_sequence`) and dtype of `hidden_states`.
    """

    _moepatch: ExpertsState

    def leave_to_family(self) -> None:
        """Raises for a list, which has no code of its own: its experts are one weight now.

        Raises:
            MoePatchError: always for a list.
        """
        if _is_stacked(self):
            raise MoePatchError(cannot_follow(self, "the experts of the list are stacked into one weight, which only the patched block can compute with"))

    def forward(self, *args, **kwargs):
        """See the class; keywords go by the family's own names."""
        if len(args) + len(kwargs) == 1:  # a scored block that leaves its work to the family calls its experts as the family does
            self.leave_to_family()
            return super().forward(*args, **kwargs)
        if kwargs:
            args = inspect.signature(original_class(self).forward).bind(self, *args, **kwargs).args[1:]
        hidden_states, topk_ids, topk_weights = args
        spec = self._moepatch.spec
        x_TH, topk_ids_TK, topk_weights_TK = hidden_states.flatten(0, -2), topk_ids.flatten(0, -2), topk_weights.flatten(0, -2)
        dtype = _compute_dtype(self, spec, x_TH.device)
        y_TH = self._through_experts(x_TH.to(dtype), topk_ids_TK, topk_weights_TK).to(hidden_states.dtype)
        if spec.identity_experts:
            y_TH = y_TH + _identity(x_TH, topk_ids_TK, topk_weights_TK, spec)
        if spec.by_sequence:
            return y_TH.view(hidden_states.shape[0], -1, spec.hidden)
        # No view that changes nothing: FSDP2 hangs its hook on what is returned, and on a view it is lost if the family adds to it in place.
        return y_TH if y_TH.shape == hidden_states.shape else y_TH.view(hidden_states.shape)

    def traced(self, family, own, args, kwargs):
        """As `Patched.traced`; stacked lists have no code of the family's any more, and compute with the reference."""
        return (own if _is_stacked(self) else family)(*args, **kwargs)

    def _through_experts(self, x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor, rows: int | None = None, ranks: int = 1) -> Tensor:
        """The experts' weighted sum, in the dtype of `x_TH`; `rows` and `ranks` as in `ExpertWeights`."""
        spec = self._moepatch.spec
        weights = ExpertWeights(self, spec, own_gate(self, spec), x_TH.dtype, rows, ranks)
        run = compute("experts", "reference" if is_traced() else self._moepatch.backend)
        return run(x_TH, topk_ids_TK, topk_weights_TK, weights)


def _is_stacked(module: nn.Module) -> bool:
    """Whether the experts were a list, which can only be called because they are patched."""
    return issubclass(original_class(module), (nn.ModuleList, nn.ModuleDict))


def cannot_follow(module: Patched, why: str) -> str:
    """The words for a change that neither moepatch nor the family's code can compute with."""
    what = "; ".join(map(str, module.changes())) or "the block around it runs the family's code, because something in it has changed"
    return (
        f"{type(module).__name__}: {what}. This cannot be followed: {why}. "
        "Change it back, or call moepatch.restore(model), change it there, and patch the model again."
    )


def own_gate(module: nn.Module, spec: ExpertsSpec):
    """The family's own activation as a function of the pre-activation; None where moepatch writes it out."""
    if not spec.activation.is_own:
        return None
    return module.act_fn if spec.layout.gate_form == "none" else module._apply_gate


def _compute_dtype(module: nn.Module, spec: ExpertsSpec, device: torch.device) -> torch.dtype:
    """The dtype of the GEMMs: autocast's where it is on, as for ``nn.Linear``, else that of the weights."""
    return autocast_dtype(device) or spec.layout.down.dtype(module)


def _identity(x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor, spec: ExpertsSpec) -> Tensor:
    """What the identity experts add: each token times the sum of their weights."""
    total = spec.num_experts + spec.identity_experts
    chosen_TK = (topk_ids_TK >= spec.num_experts) & (topk_ids_TK < total)
    weight_T1 = (topk_weights_TK * chosen_TK).sum(-1, keepdim=True)
    return (x_TH * weight_T1).to(x_TH.dtype)

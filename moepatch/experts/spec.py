"""What an experts module computes: the value on which matchers, backends, plans and verification agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..layout.experts import ExpertsLayout
from .activation import Activation


@dataclass(frozen=True, kw_only=True)
class ExpertsSpec:
    """One experts module: sizes, layout and arithmetic, without any tensor.

    For token t: ``y_t = sum_k weight_tk * norm(down_e @ act(gate_up_e @ x_t))`` with ``e = id_tk``.

    Attributes:
        num_experts: experts that have weights (E).
        hidden: width of the tokens that arrive (H; the latent width where tokens are projected down first).
        intermediate: width between the projections (I).
        layout: where the weights lie.
        activation: what stands between the projections.
        identity_experts: ids E … E+Z-1 return the token unchanged (Z).
        scale_input: the routing weight multiplies the token before the experts, not the result after them.
        post_norm: name of the submodule that normalises an expert's output before the routing weight, or None.
        by_sequence: what comes in as ``[B, …]`` is returned as ``[B, T/B, H]``, also where it had two axes.
    """

    num_experts: int
    hidden: int
    intermediate: int
    layout: ExpertsLayout
    activation: Activation
    identity_experts: int = 0
    scale_input: bool = False
    post_norm: str | None = None
    by_sequence: bool = False

    def resized(self, sizes: Mapping[int, int]) -> ExpertsSpec:
        """The same computation at other sizes (see `match.replica`)."""
        return replace(
            self,
            num_experts=sizes.get(self.num_experts, self.num_experts),
            hidden=sizes.get(self.hidden, self.hidden),
            intermediate=sizes.get(self.intermediate, self.intermediate),
            layout=self.layout.resized(sizes),
        )

    def with_experts(self, count: int) -> ExpertsSpec:
        """The same computation with `count` of the experts: a rank's share."""
        return replace(self, num_experts=count, layout=self.layout.resized({self.num_experts: count}))

    @property
    def params_per_expert(self) -> int:
        """Weights of one expert, biases included."""
        up_rows = self.intermediate * (1 if self.layout.gate_form == "none" else 2)
        bias = (up_rows if self.layout.up_bias else 0) + (self.hidden if self.layout.down_bias else 0)
        return up_rows * self.hidden + self.hidden * self.intermediate + bias

    def kept_per_token(self, top_k: int, itemsize: int) -> int:
        """Bytes that a layer has to keep of a token for its backward pass, beside the token itself, which its caller holds.

        For each of its `top_k` experts the pre-activation, in elements of `itemsize` bytes, and three integers and the routing weight. With less
        a GEMM would have to be computed again; with a norm after the experts it takes more.
        """
        return top_k * (self.intermediate * (1 if self.layout.gate_form == "none" else 2) * itemsize + 16)

    def describe(self) -> str:
        """The sizes and the activation on one line."""
        extra = [f"+{self.identity_experts} identity"] if self.identity_experts else []
        extra += ["input-scaled"] if self.scale_input else []
        extra += ["post-norm"] if self.post_norm else []
        return " ".join([f"E={self.num_experts} H={self.hidden} I={self.intermediate} {self.activation}", *extra])

    def to_dict(self) -> dict[str, Any]:
        """For people and programs that read JSON; a plan is matched to a model by scanning again, not by this."""
        return {
            "num_experts": self.num_experts,
            "hidden": self.hidden,
            "intermediate": self.intermediate,
            "layout": self.layout.label,
            "activation": str(self.activation),
            "identity_experts": self.identity_experts,
            "scale_input": self.scale_input,
            "post_norm": self.post_norm is not None,
        }


class ExpertWeights(NamedTuple):
    """The tensors and functions of one experts module at the moment of a call.

    Attributes:
        module: the module; backends read its parameters through `spec.layout`.
        spec: what it computes.
        own_gate: the family's gate ``[R, 2I] -> [R, I]`` in the family's own form; used when the activation is ``own``.
        dtype: of the GEMMs; operands are cast to it (autocast), which is free where they have it.
        rows: how many ids of the call name an expert, if the host knows; a backend may use it to make its buffers smaller.
        ranks: among how many ranks the ids' experts are spread where the host does not know `rows`: about one id in so many names one here.
    """

    module: nn.Module
    spec: ExpertsSpec
    own_gate: Callable[[Tensor], Tensor] | None
    dtype: torch.dtype
    rows: int | None = None
    ranks: int = 1

    @property
    def post_norm(self) -> Callable[[Tensor], Tensor] | None:
        """The submodule that normalises an expert's output, if there is one."""
        return None if self.spec.post_norm is None else self.module.get_submodule(self.spec.post_norm)

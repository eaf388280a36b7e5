"""A block whose experts all see every token, scaled by a score that is 0 for experts the router did not choose.

Such a family multiplies E times the tokens and lets zeros do the routing. The patched block gives each expert only its own tokens: the
same sum, with K/E of the work. The score scales the expert's *input*, so the experts are called with ``scale_input``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..surgery import Patched, is_as_patched
from .spec import ExpertsSpec


@dataclass(frozen=True, kw_only=True)
class ScoredBlockSpec:
    """The block: a router that returns ``(scores [T, E], logits)``, experts, and perhaps a shared expert.

    Attributes:
        experts: what the experts compute, with `scale_input`.
        top_k: how many scores of a token are not 0 (K).
        router_name, experts_name, shared_name: the children's names; no shared expert if None.
    """

    experts: ExpertsSpec
    top_k: int
    router_name: str
    experts_name: str
    shared_name: str | None

    def resized(self, sizes: Mapping[int, int]) -> ScoredBlockSpec:
        """The same block at other sizes."""
        return replace(self, experts=self.experts.resized(sizes))

    def describe(self) -> str:
        """One line."""
        return f"{self.experts.describe()} top-{self.top_k} scored block"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**self.experts.to_dict(), "top_k": self.top_k, "contract": "scored block"}


@dataclass(frozen=True)
class BlockState:
    """What the patched block needs to know."""

    spec: ScoredBlockSpec

    def __str__(self) -> str:
        return self.spec.describe()


class PatchedScoredBlock(Patched):
    """Takes ``hidden_states [..., H]`` and returns ``(tokens [T, H], router logits)``, as the family does."""

    _moepatch: BlockState

    def forward(self, hidden_states):
        """See the class."""
        spec = self._moepatch.spec
        experts = self.get_submodule(spec.experts_name)
        if not is_as_patched(experts):  # the family's block calls them otherwise
            return super().forward(hidden_states)
        x_TH = hidden_states.flatten(0, -2)
        scores_TE, logits = self.get_submodule(spec.router_name)(x_TH)
        # Scores are above 0 exactly where the router chose, so the largest are the chosen ones.
        scores_TK, ids_TK = scores_TE.topk(spec.top_k, dim=-1)
        routed_TH = experts(x_TH, ids_TK, scores_TK)
        if spec.shared_name is not None:
            routed_TH = routed_TH + self.get_submodule(spec.shared_name)(x_TH)
        return routed_TH, logits


def children_by_role(block: nn.Module, num_experts: int) -> tuple[str, str, str | None] | None:
    """The names of router, experts and shared expert among a block's children, told apart by their parameters; None if unclear."""
    experts, routers, others = [], [], []
    for name, child in block.named_children():
        shapes = [tuple(p.shape) for p in child.parameters(recurse=False)]
        if any(len(shape) == 3 and shape[0] == num_experts for shape in shapes):
            experts.append(name)
        elif any(len(shape) == 2 and shape[0] == num_experts for shape in shapes):
            routers.append(name)
        else:
            others.append(name)
    if len(experts) != 1 or len(routers) != 1 or len(others) > 1:
        return None
    return routers[0], experts[0], others[0] if others else None

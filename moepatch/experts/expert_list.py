"""A block that loops over a list of expert MLPs: one linear router, softmax, top-k, ``index_add`` — the form of transformers before v5.

The loop depends on the data, so under FSDP ranks that route differently gather different experts and wait for each other for ever. The
patched block sends tokens to stacked experts instead: the list, which stays the module it was, gets two 3-D parameters in place of its
children. State dicts go on having the children's names, and undoing it gives the very children back, with the trained weights.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from ..errors import MoePatchError
from ..layout.adjacent import own_storage
from ..layout.experts import Weight
from ..layout.ops import Flatten, Stack, Unflatten
from ..surgery import Patched, ReplaceState, Step
from .module import ExpertsState, PatchedExperts, cannot_follow
from .spec import ExpertsSpec


@dataclass(frozen=True, kw_only=True)
class ExpertListSpec:
    """The block: a linear router, and a list of gated MLPs that consist of three linear layers without bias.

    Attributes:
        experts: what the experts compute, stacked.
        top_k: experts per token (K).
        normalised: whether the chosen weights are divided by their sum.
        returns_logits: whether the block returns ``(tokens, router logits)`` or tokens alone.
        linear: what the router computes in, one of `layers.router.LINEARS`.
        router_name, experts_name: the block's children.
        gate_name, up_name, down_name: an expert's.
    """

    experts: ExpertsSpec
    top_k: int
    normalised: bool
    returns_logits: bool
    router_name: str
    experts_name: str
    gate_name: str
    up_name: str
    down_name: str
    linear: str = "own"

    def weights(self) -> dict[str, Weight]:
        """For each stacked parameter, the children's that hold it: gate and up of an expert follow each other."""
        count = self.experts.num_experts
        ups = tuple(f"{e}.{name}.weight" for e in range(count) for name in (self.gate_name, self.up_name))
        downs = tuple(f"{e}.{self.down_name}.weight" for e in range(count))
        gate_up = Weight(ups, (Stack(2 * count), Flatten(2 * count), Unflatten(count)))
        return {"gate_up_proj": gate_up, "down_proj": Weight(downs, (Stack(count),))}

    def resized(self, sizes: Mapping[int, int]) -> ExpertListSpec:
        """The same block at other sizes."""
        return replace(self, experts=self.experts.resized(sizes))

    def describe(self) -> str:
        """One line."""
        return f"{self.experts.describe()} top-{self.top_k} list"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**self.experts.to_dict(), "layout": "list of MLPs", "top_k": self.top_k, "contract": "block with a list of experts"}


@dataclass(frozen=True)
class ExpertListState:
    """What the patched block needs to know."""

    spec: ExpertListSpec

    def __str__(self) -> str:
        return self.spec.describe()


class PatchedExpertListBlock(Patched):
    """Takes ``hidden_states [..., H]``."""

    _moepatch: ExpertListState

    def traced(self, family, own, args, kwargs):
        """As `Patched.traced`: the family's loop over a list would find it empty."""
        return own(*args, **kwargs)

    def leave_to_family(self) -> None:
        """Raises: the family's code calls experts that are stacked now.

        Raises:
            MoePatchError: always.
        """
        raise MoePatchError(cannot_follow(self, "its own code calls experts one by one, and they are stacked into one weight"))

    def forward(self, hidden_states):
        """See the class."""
        spec = self._moepatch.spec
        x_TH = hidden_states.flatten(0, -2)
        logits_TE = _logits(self.get_submodule(spec.router_name), x_TH, spec.linear)
        weights_TK, ids_TK = torch.softmax(logits_TE, dim=-1, dtype=torch.float32).topk(spec.top_k, dim=-1)
        if spec.normalised:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        y_TH = self.get_submodule(spec.experts_name)(x_TH, ids_TK, weights_TK.to(x_TH.dtype))
        y = y_TH.view(hidden_states.shape)
        return (y, logits_TE) if spec.returns_logits else y


def _logits(router: nn.Linear, x_TH: Tensor, linear: str) -> Tensor:
    if linear == "float":  # the family has only the matrix of it, too
        return F.linear(x_TH.float(), router.weight.float())
    return router(x_TH.to(router.weight.dtype) if linear == "weight" else x_TH)


@dataclass(frozen=True)
class ListedState(ExpertsState):
    """The state of a list whose children are still there: also how to stack them."""

    weights: Mapping[str, Weight] = field(default_factory=dict, hash=False)


class PatchedExpertList(PatchedExperts):
    """The list before its layout is changed: it computes with weights that are stacked in each call. For trials."""

    _moepatch: ListedState

    @property
    def gate_up_proj(self) -> Tensor:
        return self._moepatch.weights["gate_up_proj"].canonical(self)

    @property
    def down_proj(self) -> Tensor:
        return self._moepatch.weights["down_proj"].canonical(self)


def inject_expert_list(spec: ExpertListSpec, backend: str, implementation: str | None):
    """The injections of the kind."""
    listed = ListedState(spec.experts, backend, None, spec.weights())
    return {"": (PatchedExpertListBlock, ExpertListState(spec)), spec.experts_name: (PatchedExpertList, listed)}


def stack_expert_list(block: nn.Module, spec: ExpertListSpec) -> tuple[Step, ...]:
    """The change of layout of the kind, after the injections."""
    experts = block.get_submodule(spec.experts_name)
    stacked = ExpertsState(spec.experts, experts._moepatch.backend, None)
    return ReplaceState(experts, PatchedExperts, stacked), StackExperts(experts, spec.weights())


@dataclass
class StackExperts:
    """Moves the weights of a list's children into stacked parameters of the list; the children wait in this step.

    Attributes:
        module: the list.
        weights: for each new parameter, the children's.
    """

    module: nn.Module
    weights: Mapping[str, Weight]
    children: dict[str, nn.Module] = field(default_factory=dict)
    parts: dict[str, list[nn.Parameter]] = field(default_factory=dict)
    hooks: list = field(default_factory=list)

    def do(self) -> None:
        """Stacks."""
        parts = {name: [self.module.get_parameter(path) for path in weight.names] for name, weight in self.weights.items()}
        for name, group in parts.items():
            if len({p.requires_grad for p in group}) > 1:
                raise MoePatchError(f"Some of the experts are frozen and some are not ({name}); stacked they can only be both or neither.")
        self.parts = parts
        for name, weight in self.weights.items():
            stacked = nn.Parameter(weight.canonical(self.module).detach(), requires_grad=parts[name][0].requires_grad)
            # The children see the stacked memory, so there is one copy only.
            self._fill(name, weight.store(stacked.detach()))
            self.module._parameters[name] = stacked
        self.children = dict(self.module._modules)
        self.module._modules.clear()
        self.hooks.append(self.module.register_state_dict_post_hook(functools.partial(_children_names, self.weights)))
        self.hooks.append(self.module.register_load_state_dict_pre_hook(functools.partial(_stacked_names, self.weights)))

    def commit(self) -> None:
        """Children of a list that has been sharded must not keep the whole weights alive."""
        for name, parts in self.parts.items():
            if isinstance(self.module._parameters[name], DTensor):
                for part in parts:
                    part.data = part.data.new_empty(0)

    def undo(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.module._modules.update(self.children)
        for name, weight in self.weights.items():
            stacked = self.module._parameters.get(name)
            if stacked is None or name not in self.parts:
                continue
            self._fill(name, {path: part.clone() for path, part in weight.store(stacked.detach()).items()})
            for part in self.parts[name]:
                part.requires_grad_(stacked.requires_grad)
            del self.module._parameters[name]

    def _fill(self, name: str, values: Mapping[str, Tensor]) -> None:
        for part, value in zip(self.parts[name], values.values(), strict=True):
            part.grad = None
            part.data = value


def _owned(stacked: Tensor, experts: int) -> tuple[Tensor, range]:
    """What this rank has of a stacked parameter, and which experts that are: both ``ep`` and FSDP cut along the axis of experts."""
    if not isinstance(stacked, DTensor):
        return stacked, range(experts)
    mesh, first, count = stacked.device_mesh, 0, experts
    for dim in ("ep", "dp_shard"):
        if dim in mesh.mesh_dim_names:
            share = -(-count // mesh[dim].size())
            first, count = first + share * mesh[dim].get_local_rank(), share
    local = stacked.to_local()
    return local, range(first, first + local.shape[0])


def _children_names(weights: Mapping[str, Weight], module: nn.Module, state_dict: dict, prefix: str, metadata: Any) -> None:
    """Replaces stacked parameters in a state dict by the children's; on a rank of several, by those that it has."""
    for name, weight in weights.items():
        if (stacked := state_dict.pop(prefix + name, None)) is not None:
            experts = weight.ops[-1].num_experts
            local, owned = _owned(stacked, experts)
            each = len(weight.names) // experts
            paths = [path for e in owned for path in weight.names[e * each : (e + 1) * each]]
            for path, part in zip(paths, local.flatten(0, 1).chunk(len(paths)) if paths else (), strict=True):
                looks = part.requires_grad or part.is_meta  # of ``keep_vars=True``, or without memory
                state_dict[prefix + path] = part if looks else own_storage(part)


def _stacked_names(weights: Mapping[str, Weight], module: nn.Module, state_dict: dict, prefix: str, *unused) -> None:
    """The opposite, before a state dict is loaded; a rank needs its own experts only, and drops the others."""
    for name, weight in weights.items():
        experts = weight.ops[-1].num_experts
        stacked = module._parameters[name]
        each = len(weight.names) // experts
        owned = _owned(stacked, experts)[1]
        wanted = [prefix + path for e in owned for path in weight.names[e * each : (e + 1) * each]]
        if all(key in state_dict for key in wanted):
            local = torch.stack([state_dict[key] for key in wanted]).unflatten(0, (len(owned), each)).flatten(1, 2)
            if isinstance(stacked, DTensor):
                local = DTensor.from_local(local, stacked.device_mesh, stacked.placements, shape=stacked.shape, stride=stacked.stride())
            for path in weight.names:
                state_dict.pop(prefix + path, None)
            state_dict[prefix + name] = local

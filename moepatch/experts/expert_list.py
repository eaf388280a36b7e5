"""A block that loops over a list of expert MLPs: one linear router, softmax, top-k, ``index_add`` — the form of transformers before v5.

The loop depends on the data, so under FSDP ranks that route differently gather different experts and wait for each other for ever. The
patched block sends tokens to stacked experts instead: the list, which stays the module it was, gets two 3-D parameters in place of its
children. State dicts go on having the children's names, and undoing it gives the very children back, with the trained weights.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from ..autocast import autocast_dtype
from ..errors import MoePatchError
from ..layout.adjacent import own_storage
from ..layout.experts import Weight
from ..layout.ops import Flatten, Stack, Unflatten
from ..registry import compute
from ..surgery import Patched, ReplaceState, Step, gradient_hook_on, is_bare
from ..watch import Change
from .listed import HELD, JoinExperts, Listed, Whole, stacked
from .module import ExpertsState, PatchedExperts, SeesRoutes, cannot_follow
from .spec import ExpertsSpec, ExpertWeights


@dataclass(frozen=True, kw_only=True)
class ExpertListSpec:
    """The block: a linear router, and a list of gated MLPs that consist of three linear layers without bias.

    Attributes:
        experts: what the experts compute, stacked.
        top_k: experts per token (K).
        normalised: whether the chosen weights are divided by their sum.
        returns_logits: whether the block returns ``(tokens, router logits)`` or tokens alone.
        linear: what the router computes in, one of `layers.router.LINEARS`.
        idle_zero: whether the weights of an expert without tokens get gradients of zeros, for it is called all the same, or none at all.
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
    idle_zero: bool = False

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
    """Takes ``hidden_states [..., H]``.

    It keeps to the family's own forward as long as an expert is more or something else than it was at the patch (a hook, an adapter, another
    activation): only what is called can have its effect.
    """

    _moepatch: ExpertListState

    def traced(self, family, own, args, kwargs):
        """As `Patched.traced`: the family's loop over a stacked list would find it empty."""
        return (own if self._is_stacked() else family)(*args, **kwargs)

    def leave_to_family(self) -> None:
        """Raises if the family's code calls experts that are stacked now.

        Raises:
            MoePatchError: they are.
        """
        if self._is_stacked():
            raise MoePatchError(cannot_follow(self, "its own code calls experts one by one, and they are stacked into one weight"))

    def _is_stacked(self) -> bool:
        return isinstance(self._modules[self._moepatch.spec.experts_name], EmptiedList)

    def forward(self, *args, **kwargs):
        """See the class; keywords go by the family's own name."""
        spec = self._moepatch.spec
        experts = self._modules[spec.experts_name]
        (hidden_states,) = (*args, *kwargs.values())
        is_list = isinstance(experts, PatchedExpertList)
        wholes = experts.wholes(hidden_states) if is_list else None
        if is_list and wholes is None or not isinstance(experts, PatchedExperts):
            return super().forward(*args, **kwargs)
        x_TH = hidden_states.flatten(0, -2)
        logits_TE = _logits(self._modules[spec.router_name], x_TH, spec.linear)
        weights_TK, ids_TK = torch.softmax(logits_TE, dim=-1, dtype=torch.float32).topk(spec.top_k, dim=-1)
        if spec.normalised:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        call = experts if _is_called(experts) else experts.forward
        y_TH = call(x_TH, ids_TK, weights_TK.to(x_TH.dtype), *([wholes] if is_list else []))
        y = y_TH.view(hidden_states.shape)
        return (y, logits_TE) if spec.returns_logits else y


def _is_called(experts: nn.Module) -> bool:
    """Whether the list is to be called as modules are: by what moepatch looks at routing with, and where weights are gathered around a call.

    The family never calls it, so nobody else's hooks on it are meant for this call.
    """
    if not isinstance(experts, PatchedExpertList) or isinstance(experts, FSDPModule):
        return True
    return any(isinstance(hook, SeesRoutes) for hooks in (experts._forward_hooks, experts._forward_pre_hooks) for hook in hooks.values())


def _logits(router: nn.Linear, x_TH: Tensor, linear: str) -> Tensor:
    if linear == "float":  # the family has only the matrix of it, too
        return F.linear(x_TH.float(), router.weight.float())
    return router(x_TH.to(router.weight.dtype) if linear == "weight" else x_TH)


@dataclass(frozen=True)
class ListedState(ExpertsState):
    """The state of a list whose children are still there: also how to stack their weights.

    Attributes:
        weights: for each stacked tensor, the children's.
        idle_zero: whether weights of experts without tokens get gradients of zeros, or none at all.
    """

    weights: Mapping[str, Weight] = field(default_factory=dict, hash=False)
    idle_zero: bool = False


class PatchedExpertList(PatchedExperts):
    """The list with its children: they keep their parameters, and a call computes with those stacked (see `listed`).

    The block asks `wholes` before each call of it, so that a call itself has nothing to stand aside for.
    """

    stands_aside = False
    _moepatch: ListedState

    def wholes(self, hidden_states: Tensor) -> Mapping[str, Whole] | None:
        """What a call computes with, for `forward`; empty where nothing is kept. None: only calling the experts themselves will do."""
        if torch.compiler.is_compiling():
            changed = self._moepatch_watch is not None and self._moepatch_watch.changed_in_graph(self)
            return None if changed or not _are_linear(self, self._moepatch.weights) else {}
        held = vars(self).get(HELD)
        if held is None:  # a trial
            return {}
        if not held.is_unchanged() or self._moepatch_watch is not None and self._moepatch_watch.changed(self):
            held.let_go()
            self.changes()
            return None
        wholes = held.wholes()
        if wholes is None:
            held.changes(self)
        mixed = wholes and wholes["down_proj"].numbers.dtype is not hidden_states.dtype and autocast_dtype(hidden_states.device) is None
        return None if mixed else wholes

    def changes(self) -> tuple[Change, ...]:
        """As `Patched.changes`, of everything inside the experts, too; what both tell is told once."""
        held = vars(self).get(HELD)
        return (held.changes(self) if held is not None else ()) or super().changes()

    def met(self) -> tuple[Change, ...]:
        """As `Patched.met`."""
        held = vars(self).get(HELD)
        return (*super().met(), *(held.said if held is not None else ()))

    def leave_to_family(self) -> None:
        """Nothing: the block asks the list first, and the family calls its elements."""

    def forward(self, hidden_states, topk_ids, topk_weights, wholes):
        """As `PatchedExperts`, of tokens ``[T, H]``, with what `wholes` returns."""
        state = self._moepatch
        if wholes:
            weights = stacked(wholes, topk_ids, state.spec.num_experts, state.idle_zero)
        else:
            weights = {name: weight.canonical(self) for name, weight in state.weights.items()}
        dtype = autocast_dtype(hidden_states.device) or weights["down_proj"].dtype
        operands = ExpertWeights(SimpleNamespace(**weights), state.spec, None, dtype)
        return compute("experts", state.backend)(hidden_states.to(dtype), topk_ids, topk_weights, operands).to(hidden_states.dtype)

    def _apply(self, fn, recurse=True):
        """Weights that are moved to another device or dtype are moved beside each other again."""
        held = vars(self).get(HELD)
        moved = super()._apply(fn, recurse)
        if held is not None:
            held.join()
        return moved

    def _replicate_for_data_parallel(self):
        replica = super()._replicate_for_data_parallel()
        vars(replica).pop(HELD, None)
        return replica

    def __getstate__(self):
        # A copy has parameters of its own, and so needs buffers of its own.
        return {key: value for key, value in vars(self).items() if key != HELD}

    def made_again(self) -> None:
        """Puts the weights of a copy beside each other."""
        held = vars(self)[HELD] = Listed(self, self._moepatch.weights)
        held.join()


def _are_linear(experts: nn.Module, weights: Mapping[str, Weight]) -> bool:
    """The same question as `Listed.is_unchanged`, in a form that torch.compile can follow and guard."""
    layers = [experts.get_submodule(path.rpartition(".")[0]) for weight in weights.values() for path in weight.names]
    return all(type(layer) is nn.Linear and layer.bias is None for layer in layers) and all(is_bare(m) for m in experts.modules() if m is not experts)


def inject_expert_list(spec: ExpertListSpec, backend: str, implementation: str | None):
    """The injections of the kind."""
    listed = ListedState(spec.experts, backend, None, spec.weights(), spec.idle_zero)
    return {"": (PatchedExpertListBlock, ExpertListState(spec)), spec.experts_name: (PatchedExpertList, listed)}


def join_expert_list(block: nn.Module, spec: ExpertListSpec) -> tuple[Step, ...]:
    """The change of layout of the kind on one device, after the injections. Two blocks may share a list."""
    experts = block.get_submodule(spec.experts_name)
    return () if HELD in vars(experts) else (JoinExperts(experts, spec.weights()),)


def stack_expert_list(block: nn.Module, spec: ExpertListSpec) -> tuple[Step, ...]:
    """The change of layout of the kind on a mesh, after the injections: only whole parameters can be spread over ranks."""
    experts = block.get_submodule(spec.experts_name)
    stacked = ExpertsState(spec.experts, experts._moepatch.backend, None)
    return ReplaceState(experts, PatchedExperts, stacked, under=EmptiedList), StackExperts(experts, spec.weights())


class EmptiedList(Patched):
    """A list whose elements' weights have become its own parameters: whoever asks for an element is told so."""

    def __getitem__(self, index):
        raise MoePatchError(
            f"Expert {index} is no module of its own now: on a mesh the weights of all experts are stacked ({', '.join(self._parameters)}) and spread over "
            f"ranks. state_dict() has them under their names, and moepatch.restore(model) brings the modules back."
        )

    def __iter__(self):
        return iter(self[:])

    def __len__(self):
        return vars(self._moepatch).get("num_experts", self._moepatch.spec.num_experts)  # of all ranks

    def __bool__(self):
        return True

    def __repr__(self):
        return nn.Module.__repr__(self)


def why_not_stacked(block: nn.Module, spec: ExpertListSpec, model: nn.Module) -> str | None:
    """What would be lost if the experts of a list became two parameters, in words; None if nothing."""
    experts = block.get_submodule(spec.experts_name)
    names = {path: experts.get_parameter(path) for weight in spec.weights().values() for path in weight.names}
    for weight in spec.weights().values():
        frozen = [path for path in weight.names if not names[path].requires_grad]
        if 0 < len(frozen) < len(weight.names):
            which = f"{spec.experts_name}.{frozen[0]} is"
            return f"some of its experts are frozen and some are not ({which}), and spread over ranks they can only be both or neither"
    for path, parameter in names.items():
        hook = gradient_hook_on(parameter)
        if hook is not None:
            return f"{spec.experts_name}.{path} has a hook on its gradient ({hook}), and spread over ranks it is a part of another parameter"
    buffer = next((path for path, _ in experts.named_buffers()), None)
    if buffer is not None:
        return f"its experts have buffers ({spec.experts_name}.{buffer}), and spread over ranks they are two parameters"
    if sum(child is experts for module in model.modules() for child in module._modules.values()) > 1:
        return f"its list of experts {spec.experts_name} is part of another module, too"
    own, held = {id(p) for p in names.values()}, {id(m) for m in experts.modules()}
    tied = next((f"{path}.{name}" for path, m in model.named_modules() for name, p in m._parameters.items() if id(p) in own and id(m) not in held), None)
    return None if tied is None else f"one of its experts' weights is that of {tied}, too"


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
        """Puts the children back, with what the stacked weights have become."""
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

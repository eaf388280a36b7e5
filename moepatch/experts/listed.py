"""The weights of a list of experts as two stacked tensors, while the experts, their parameters and their names stay what they are.

The data of the parameters become consecutive slices of one buffer for each stacked tensor. Whatever is hung on a parameter (an optimizer, a
hook, a tie to another module, ``requires_grad``) goes on meaning that parameter: autograd hands each its own slice of the gradient. A call
looks whether the data still lie there, and stacks a copy where they do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from operator import attrgetter, contains, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..layout.adjacent import adjacent, side_by_side
from ..layout.experts import Weight
from ..surgery import what_is_hung_on
from ..watch import Change

#: Under this name a list keeps what `Listed` knows of it: in its ``__dict__``, out of sight of nn.Module, of pickles and of copies.
HELD = "_moepatch_held"
_bias, _shape, _dtype = itemgetter("bias"), attrgetter("shape"), attrgetter("dtype")
_PLAIN = (bool, int, float, str, type(None))


class Listed:
    """What a list of experts was when it was patched, and where its weights lie.

    Every question that a call asks is one comparison of two lists, which takes equal objects for equal without asking them.

    Attributes:
        groups: for each stacked tensor, where its parameters are: the ``_parameters`` of a linear layer.
        joined: for each stacked tensor, the buffer that they are slices of, and where each lies.
        said: what was met that was not as at the patch.
    """

    def __init__(self, module: nn.ModuleList, weights: Mapping[str, Weight]):
        modules = [m for m in module.modules() if m is not module]
        self.groups = {name: [module.get_submodule(path.rpartition(".")[0])._parameters for path in weight.names] for name, weight in weights.items()}
        self._shapes = {name: tables[0]["weight"].shape for name, tables in self.groups.items()}
        self.joined: dict[str, tuple[Tensor, list[list] | None]] = {}
        self.said: list[Change] = []
        self._names = [name for name, m in module.named_modules() if m is not module]
        self._modules, self._classes = modules, [type(m) for m in modules]
        self._hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)]
        self._scopes = [vars(m) for m in modules]
        self._tables = [m._modules for m in (module, *modules)]
        self._children = list(_of_all(self._tables))
        own = {id(m): [key for key, value in vars(m).items() if _is_read(key, value)] for m in modules if not isinstance(m, nn.Linear)}
        self._attributes = [(vars(m), keys, itemgetter(*keys)) for m in modules if (keys := own.get(id(m)))]
        self._values = [take(scope) for scope, _, take in self._attributes]
        self._biases = [m._parameters for m in modules if type(m) is nn.Linear]

    def is_unchanged(self) -> bool:
        """Whether computing what the experts compute, instead of calling them, leaves nothing out: no hook, no other child, no other attribute."""
        try:
            return (
                not any(self._hooks)
                and list(map(type, self._modules)) == self._classes
                and list(_of_all(self._tables)) == self._children
                and [take(scope) for scope, _, take in self._attributes] == self._values
                and not any(map(contains, self._scopes, repeat("forward")))
                and all(bias is None for bias in map(_bias, self._biases))
            )
        except KeyError:  # something is gone
            return False

    def changes(self, module: nn.ModuleList) -> tuple[Change, ...]:
        """The first thing that is not what it was, in words; it is among `said` from now on."""
        if self.is_unchanged():
            return () if self.wholes() is not None else (self.say("the experts' weights", "all of one size and dtype", "of several, or of others"),)
        hung = next((words for place, expert in module._modules.items() if expert is not None and (words := what_is_hung_on(expert, place))), None)
        now = list(_of_all(self._tables))
        other = next((pair for pair in zip(self._children, now, strict=False) if pair[0] is not pair[1]), None)
        if hung is not None:
            change = Change("an expert", "called without that", f"called with more than its weights ({hung})")
        elif other is not None:
            change = Change(self._names[self._modules.index(other[0])], f"another {type(other[0]).__name__}", type(other[1]).__name__)
        elif len(now) != len(self._children):
            change = Change("the number of modules in the list", str(len(self._children)), str(len(now)))
        else:
            change = self._changed_attribute() or Change("a linear layer of an expert", "without bias, as its class had it", "something else")
        return (self.say(*change),)

    def _changed_attribute(self) -> Change | None:
        for (scope, keys, _), before in zip(self._attributes, self._values, strict=True):
            for key, was in zip(keys, before if len(keys) > 1 else (before,), strict=True):
                if key not in scope or scope[key] != was:
                    return Change(f"{key} of an expert", repr(was), repr(scope[key]) if key in scope else "gone")
        return None

    def say(self, what: str, was: str, now: str) -> Change:
        """Remembers a change."""
        change = Change(what, was, now)
        if change not in self.said:
            self.said.append(change)
        return change

    def join(self) -> None:
        """Moves the weights into one buffer for each stacked tensor, one at a time twice in memory. On the meta device, or where they would
        not stay what they are to others (shared between processes, views of something larger), they stay where they are."""
        self.joined = {}
        for name in self.groups:
            parameters = self._parameters(name)
            if any(type(p) is not nn.Parameter or p.is_meta for p in parameters) or len({(p.device, p.dtype, p.shape) for p in parameters}) > 1:
                continue
            if not all(map(_may_move, parameters)):
                continue
            # Each gets a storage of its own: tensors of one storage look like one weight under several names to those who write checkpoints.
            slices = side_by_side(parameters)
            buffer = adjacent(*slices).view(len(parameters), *parameters[0].shape)
            self.joined[name] = buffer, []
            for parameter, piece in zip(parameters, slices, strict=True):
                parameter.data = piece
            self.joined[name] = buffer, _places_of(parameters)

    def let_go(self) -> None:
        """Forgets the buffers that the weights do not lie in any more: whoever shards or frees them means that memory."""
        for name in [name for name, (_, places) in self.joined.items() if _places_of(self._parameters(name)) != places]:
            del self.joined[name]

    def part(self) -> None:
        """Gives each parameter that is still a slice its own storage again."""
        for name, (buffer, _) in self.joined.items():
            first, end = buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes
            for parameter in self._parameters(name):
                if type(parameter) is nn.Parameter and not parameter.is_meta and first <= parameter.data_ptr() < end:
                    parameter.data = parameter.data.clone()
        self.joined = {}

    def wholes(self) -> dict[str, Whole] | None:
        """Every stacked tensor as it is now; None where the weights are not as many, as large and of one dtype any more."""
        found, alike = {}, set()
        for name in self.groups:
            parameters = self._parameters(name)
            buffer, places = self.joined.get(name, (None, None))
            if buffer is not None and _places_of(parameters) == places:
                found[name] = Whole(buffer, parameters)
                alike.add((buffer.dtype, buffer.device))
                continue
            # Nobody may need that memory any more, unless something stands in the place of the parameters for one call (`functional_call`).
            if not all(type(p) is Tensor for p in parameters):
                self.joined.pop(name, None)
            if any(p is None or p.shape != self._shapes[name] for p in parameters):
                return None
            alike |= {(p.dtype, p.device) for p in parameters}
            if len(alike) > 1:
                return None
            with torch.no_grad():
                found[name] = Whole(torch.stack(parameters), parameters)
        return found if len(alike) == 1 else None

    def are_apart(self) -> bool:
        """Whether each call copies weights together, because they do not lie where `join` puts them."""
        return any(not all(p is not None and p.is_meta for p in self._parameters(name)) for name in self.groups if name not in self.joined)

    def _parameters(self, name: str) -> list[Any]:
        return [table.get("weight") for table in self.groups[name]]


class Whole(NamedTuple):
    """A stacked tensor ``[N, A, B]`` without a gradient, and the parameters that are its slices."""

    numbers: Tensor
    parameters: list[nn.Parameter]


def stacked(wholes: Mapping[str, Whole], topk_ids: Tensor, experts: int, idle_zero: bool) -> dict[str, Tensor]:
    """The stacked tensors ``[E, N/E·A, B]`` of a call, whose gradients go to the parameters.

    Args:
        wholes: of `Listed.wholes`.
        topk_ids: the experts of the call.
        experts: E.
        idle_zero: whether experts without tokens get gradients of zeros; else they get none, as they get none where nobody calls them.
    """
    parameters = [p for whole in wholes.values() for p in whole.parameters]
    if not torch.is_grad_enabled() or not any(p.requires_grad for p in parameters):
        return {name: whole.numbers.view(experts, -1, whole.numbers.shape[-1]) for name, whole in wholes.items()}
    used, idle = range(experts), None
    # What is captured is played again with other tokens.
    if not idle_zero and not (topk_ids.is_cuda and torch.cuda.is_current_stream_capturing()):
        counts = HostCounts(topk_ids, experts)
        # Hooks are called for whatever is part of the graph, so here the host waits.
        used, idle = (counts.used(), None) if not topk_ids.is_cuda or has_hooks(parameters) else (used, counts.idle)
    found = {}
    for name, whole in wholes.items():
        each = len(whole.parameters) // experts
        places = [expert * each + i for expert in used for i in range(each)]
        found[name] = Stacked.apply(whole.numbers, experts, places, idle, *(whole.parameters[place] for place in places))
    return found


def _of_all(tables: Iterable[dict[str, Any]]) -> Iterable[Any]:
    return chain.from_iterable(map(dict.values, tables))


def _places_of(parameters: Sequence[Tensor]) -> list[list] | None:
    """Where tensors lie in memory; None where one is no plain parameter, such as a tracer's, which may lie nowhere."""
    if set(map(type, parameters)) != {nn.Parameter}:
        return None
    return [list(map(look, parameters)) for look in (Tensor.data_ptr, _shape, Tensor.stride, _dtype)]


def _may_move(parameter: Tensor) -> bool:
    if parameter.is_shared() and not parameter.is_cuda:
        return False
    return parameter.layout is torch.strided and parameter.untyped_storage().nbytes() == parameter.nbytes


def _is_read(key: str, value: Any) -> bool:
    """Whether an attribute is one that a forward may read and somebody may set: numbers, words and functions, but for what nn.Module keeps."""
    return not key.startswith("_") and key != "training" and (isinstance(value, _PLAIN) or callable(value) and not isinstance(value, nn.Module))


class Stacked(torch.autograd.Function):
    """A stacked tensor whose gradient goes to the parameters that are its slices.

    Args of ``apply``:
        numbers: ``[N, A, B]``.
        experts: E, so that the result is ``[E, N/E·A, B]``.
        places: which of the N slices the parameters are. The others get no gradient at all.
        idle: None, or a function that tells on the way back which experts get none, for nothing was computed with them.
        parameters: at `places`.
    """

    @staticmethod
    def forward(ctx, numbers, experts, places, idle, *parameters):
        ctx.places, ctx.idle, ctx.count, ctx.each = places, idle, len(numbers), len(numbers) // experts
        ctx.save_for_backward(*parameters)
        return numbers.view(experts, -1, numbers.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        ctx.saved_tensors  # raises if one was changed since, as a linear layer does
        slices = grad.reshape(ctx.count, -1, grad.shape[-1]).unbind()
        idle = ctx.idle() if ctx.idle is not None else ()
        wanted = zip(ctx.places, ctx.needs_input_grad[4:], strict=True)
        return None, None, None, None, *(slices[place] if needed and place // ctx.each not in idle else None for place, needed in wanted)


def has_hooks(parameters: Iterable[Tensor]) -> bool:
    """Whether somebody is told of the gradient of one of them."""
    return any(p._backward_hooks or p._post_accumulate_grad_hooks for p in parameters)


class HostCounts:
    """How many tokens each expert had, on the host, without waiting for it before it is asked.

    Args:
        ids: of experts, on the device.
        experts: E; other ids are nobody's.
    """

    def __init__(self, ids: Tensor, experts: int):
        ids = ids.reshape(-1)
        counts = torch.zeros(experts + 1, dtype=torch.int32, device=ids.device)
        counts.index_add_(0, ids.clamp(-1, experts) % (experts + 1), counts.new_ones(1).expand(len(ids)))
        self._event = None
        if counts.is_cuda:
            # The device of the ids need not be the current one, and the caller's default device is none that can be pinned.
            self._counts = torch.empty(experts + 1, dtype=torch.int32, device="cpu", pin_memory=True)
            self._counts.copy_(counts, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(ids.device))
        else:
            self._counts = counts.cpu()

    def used(self) -> list[int]:
        """The experts that had any."""
        if self._event is not None:
            self._event.synchronize()
        return self._counts[:-1].nonzero().flatten().tolist()

    def idle(self) -> set[int]:
        """The others."""
        return set(range(len(self._counts) - 1)).difference(self.used())


@dataclass
class JoinExperts:
    """The step that has a list of experts keep its weights beside each other.

    Attributes:
        module: the list, patched.
        weights: for each stacked tensor, which parameters are its slices.
    """

    module: nn.ModuleList
    weights: Mapping[str, Weight]

    def do(self) -> None:
        """Moves them."""
        held = vars(self.module)[HELD] = Listed(self.module, self.weights)
        held.join()

    def undo(self) -> None:
        """Gives each its own storage again."""
        held = vars(self.module).get(HELD)
        if held is not None:
            held.part()
            del vars(self.module)[HELD]

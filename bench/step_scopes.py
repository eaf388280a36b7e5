"""What stands around the work that a profiler saw: tags of the modules and operators that a kernel was launched from.

Everything is found in sorted sweeps over the events, each looked at once. Operators are numbered in the order in which they began, and a number points
to smaller ones only: to the operator that is open around it, and for a node of the backward graph to the operator of the forward that made it.
So there are no circles, whatever ids the profiler gives (correlation ids of operators, of the runtime and of its own overhead can be equal).
"""

from __future__ import annotations

import functools
import re
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.autograd import DeviceType
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.profiler import record_function

#: Kinds of modules by the names of their classes; the first that fits is the name of a scope.
_MODULES = {
    "norm": r"Norm",
    "rope": r"Rotary",
    "router": r"Router|Gate$",
    "experts": r"Experts",
    "attention": r"Attention",
    "mixer": r"Mamba|DeltaNet|Mixer",
}
#: Tags by what the name of a scope, an operator or a node of the backward graph contains.
_TAGS = {
    "experts": r"experts|Experts",
    "loss": r"cross_entropy|CrossEntropy|nll_loss|log_softmax|LogSoftmax|NllLoss|_Chunked",
    "norm": r"norm|rope|Norm|Rope|Rotary|_Heads",
    "router": r"router",
    "mixer": r"mixer|Mamba|DeltaNet",
    "attention": r"attention|Attention",
}
#: What the profiler gives a thread that is none of torch's is far above this.
_THREADS = 2**32
#: What calls of CUDA's runtime and driver begin with.
_RUNTIME = "cu"

NOTHING: frozenset[str] = frozenset()


@functools.cache
def tags_of(name: str) -> frozenset[str]:
    """The tags of one name."""
    return frozenset(tag for tag, pattern in _TAGS.items() if re.search(pattern, name))


class Scopes:
    """The operators that ran on the CPU, in the order in which they began, and the tags of each.

    Attributes:
        events: of the profiler, one per operator.
        names: of the operators.
        parents: for each operator the number of the one that called it, or -1.
        tags: for each operator those of its own name, of all that it was called from, and of the forward that it belongs to.
    """

    def __init__(self, events: list):
        # Of two operators that begin at once, the longer one called the other.
        of_cpu = [e for e in events if e.device_type() == DeviceType.CPU]
        spans = sorted((e.start_ns(), -e.duration_ns(), i) for i, e in enumerate(of_cpu) if _is_operator(e))
        self.events = [of_cpu[i] for *_, i in spans]
        self.names = [e.name() for e in self.events]
        self._starts = [start for start, *_ in spans]
        self._ends = [start - negative for start, negative, _ in spans]
        self.parents = self._nest()
        self.tags = self._resolve(self._makers())
        self._numbers: dict[int, int] = {}
        for number, e in enumerate(self.events):
            self._numbers.setdefault(e.correlation_id(), number)
        self._launches = {e.correlation_id(): e.start_ns() for e in of_cpu if e.name().startswith(_RUNTIME)}

    def of(self, kernel) -> frozenset[str]:
        """The tags of the operator that a kernel was launched by: the one that the profiler links to it, else the one that was open at its launch."""
        number = self._numbers.get(kernel.linked_correlation_id())
        if number is None:
            number = self._open_at(self._launches.get(kernel.correlation_id(), -1))
        return self.tags[number] if number >= 0 else NOTHING

    def _open_at(self, moment: int) -> int:
        """The innermost operator at a point in time, on whatever thread: the host runs a forward or a backward, not both. -1 if there is none."""
        number = bisect_right(self._starts, moment) - 1
        while number >= 0 and self._ends[number] < moment:
            number = self.parents[number]
        return number

    def _nest(self) -> list[int]:
        """Who calls whom: on one thread, the operator that is open when another begins."""
        threads: dict[int, list[tuple[int, int]]] = {}
        parents = []
        for number, (end, event) in enumerate(zip(self._ends, self.events, strict=True)):
            open_ones = threads.setdefault(event.start_thread_id(), [])
            while open_ones and open_ones[-1][0] < end:
                open_ones.pop()
            parents.append(open_ones[-1][1] if open_ones else -1)
            open_ones.append((end, number))
        return parents

    def _makers(self) -> list[int]:
        """For a node of the backward graph, the last operator before it that had its number on the thread of its forward; -1 for others."""
        forward: dict[tuple[int, int], list[int]] = {}
        makers = []
        for number, event in enumerate(self.events):
            sequence, thread = event.sequence_nr(), event.fwd_thread_id()
            maker = -1
            if sequence >= 0 and thread:
                made = forward.get((thread, sequence), ())
                position = bisect_right(made, number) - 1
                maker = made[position] if position >= 0 else -1
            elif sequence >= 0:
                forward.setdefault((event.start_thread_id(), sequence), []).append(number)
            makers.append(maker)
        return makers

    def _resolve(self, makers: list[int]) -> list[frozenset[str]]:
        tags: list[frozenset[str]] = []
        for name, parent, maker in zip(self.names, self.parents, makers, strict=True):
            found = tags_of(name)
            for other in (parent, maker):
                if other >= 0 and not tags[other] <= found:
                    found = _both(found, tags[other])
            tags.append(found)
        return tags


def _is_operator(event) -> bool:
    """Not a call of the runtime or the driver, and not the profiler's own work."""
    return event.correlation_id() > 0 and event.start_thread_id() < _THREADS and not event.name().startswith(_RUNTIME)


@functools.cache
def _both(one: frozenset[str], other: frozenset[str]) -> frozenset[str]:
    """The union; one object for each pair, for there are few pairs and many operators."""
    return one | other


@contextmanager
def scoped(model: nn.Module) -> Iterator[None]:
    """Marks the forward of every module of a known kind.

    The hooks are torch's global ones: patched modules go around a submodule only if it has none of its own, and what is profiled has to be what was timed.
    """
    kinds = {id(module): kind for module in model.modules() if (kind := _kind(type(module).__name__)) is not None}
    open_ones: list[tuple[int, record_function]] = []

    def enter(module: nn.Module, args: tuple) -> None:
        kind = kinds.get(id(module))
        if kind is not None:
            scope = record_function(kind)
            scope.__enter__()
            open_ones.append((id(module), scope))

    def leave(module: nn.Module, args: tuple, output: object) -> None:
        if open_ones and open_ones[-1][0] == id(module):
            open_ones.pop()[1].__exit__(None, None, None)

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _kind(class_name: str) -> str | None:
    return next((kind for kind, pattern in _MODULES.items() if re.search(pattern, class_name)), None)

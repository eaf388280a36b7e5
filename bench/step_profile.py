"""Where the time of a step goes, from torch's profiler: how busy the device is, how many kernels it runs, and what they are for.

A kernel is put into a category by its own name and by its scopes: the kind of module in whose forward it was launched, or whose forward the
node of the graph came from that launched it in the backward.
"""

from __future__ import annotations

import re
import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

#: Kinds of modules by the names of their classes; the innermost that fits is a scope.
_SCOPES = {
    "norm": r"Norm",
    "rope": r"Rotary",
    "router": r"Router|Gate$",
    "experts": r"Experts",
    "attention": r"Attention",
    "mixer": r"Mamba|DeltaNet|Mixer",
}
_GEMM = r"gemm|nvjet|cutlass|xmma|cublas|aten::(mm|bmm|addmm|linear|matmul)|splitk"
#: Category, what the kernel's name has to contain, what the scopes have to contain. The first row that fits counts.
_RULES = (
    ("FSDP gathers", r"AllGather|ReduceScatter|allgather|reduce_scatter|chunk_cat|split_with_sizes_copy", None),
    ("dispatch", r"nccl|SendRecv|AllToAll|alltoall|symm|_stage_kernel|_fetch_kernel|_bring_back|deep_ep|intranode|internode|notify_|barrier", None),
    ("expert GEMM", r"GroupProblem|grouped|ptr_array|PtrArray|varlen", None),
    ("expert GEMM", _GEMM, r"experts|Experts"),
    ("attention", r"fmha|flash|sdpa|attention|attn", None),
    ("loss", r"cross_entropy|nll_loss|log_?softmax|logsumexp|_rows_kernel", None),
    ("loss", r"", r"cross_entropy|CrossEntropy|nll_loss|log_softmax|LogSoftmax|NllLoss"),
    ("mixer", r"_ssd|ssd_|chunk_scan|chunk_state|conv1d|_states_kernel", None),
    ("norms, rope", r"rms_?norm|layer_?norm|rope|rotary", None),
    ("dense GEMM", _GEMM, None),
    ("activation", r"silu|swiglu|glu|relu|gelu|gated", r"experts|Experts"),
    ("combine", r"combine|_sums_kernel|_dots_kernel|index_add|reduce_kernel|aten::sum", r"experts|Experts"),
    ("permute", r"", r"experts|Experts"),
    ("norms, rope", r"norm", None),
    ("norms, rope", r"", r"norm|rope|Norm|Rope|Rotary"),
    ("router", r"", r"router"),
    ("mixer", r"", r"mixer|Mamba|DeltaNet"),
    ("attention", r"", r"attention"),
    ("activation", r"silu|swiglu|glu|relu|gelu|gated", None),
    ("elementwise, copies", r"", None),
)
#: Order of the waterfall.
CATEGORIES = tuple(dict.fromkeys(name for name, _, _ in _RULES))
#: Communication counts only where no kernel computes at the same time.
_HIDEABLE = ("FSDP gathers", "dispatch")
_STEPS = 3


@dataclass(frozen=True)
class Work:
    """One kernel, or one operator on the CPU: start and end in ns, its name, its scopes."""

    start: int
    end: int
    name: str
    scopes: str = ""


def activity(step: Callable[[], None], layers: int, device: torch.device) -> dict:
    """How busy the device is, and launches and host syncs per layer. Empty without a GPU.

    Kernels and copies are counted over whole steps and divided by the number of layers, so what a step does once (embedding, loss) is in it.
    """
    if device.type != "cuda":
        return {}
    work, window = _record(step, [ProfilerActivity.CUDA])
    busy = sum(category_ms(work).values()) * 1e6 * _STEPS
    return {
        "gpu_busy": round(busy / window, 4),
        "idle_ms": round((window - busy) / _STEPS / 1e6, 3),
        "launches_per_layer": round(len(work) / _STEPS / layers, 1),
        "syncs_per_layer": round(_host_syncs(step) / layers, 2),
    }


def waterfall(model: nn.Module, step: Callable[[], None], device: torch.device) -> dict[str, float]:
    """Milliseconds of a step by category; on a CPU those of its operators. Categories do not overlap: they add up to the busy time."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with _scoped(model):
        work, _ = _record(step, activities)
    times = category_ms(work)
    return {name: round(times[name], 3) for name in CATEGORIES if name in times}


def category_ms(work: list[Work]) -> dict[str, float]:
    """Milliseconds per step and category; where two kernels run at once, one of them counts."""
    kinds = {(w.name, w.scopes): categorise(w.name, w.scopes) for w in work}
    marks = sorted([(w.start, 1, i) for i, w in enumerate(work)] + [(w.end, 0, i) for i, w in enumerate(work)])
    total: Counter[str] = Counter()
    running: dict[int, str] = {}
    before = 0
    for now, starts, index in marks:
        if running and now > before:
            visible = [kind for kind in running.values() if kind not in _HIDEABLE] or list(running.values())
            total[visible[0]] += now - before
        before = now
        if starts:
            running[index] = kinds[work[index].name, work[index].scopes]
        else:
            running.pop(index, None)
    return {kind: time / _STEPS / 1e6 for kind, time in total.items()}


def categorise(name: str, scopes: str) -> str:
    """The category of a kernel."""
    return next(kind for kind, kernel, scope in _RULES if re.search(kernel, name) and (scope is None or re.search(scope, scopes)))


def _host_syncs(step: Callable[[], None]) -> int:
    """How often torch makes the host wait for the device in a step. Waits inside other libraries are not seen."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return sum("synchronizing CUDA operation" in str(w.message) for w in caught)


def _record(step: Callable[[], None], activities: list[ProfilerActivity]) -> tuple[list[Work], int]:
    """The work of some steps, and how many ns passed between its beginning and its end."""
    on_gpu = ProfilerActivity.CUDA in activities
    step()
    if on_gpu:
        torch.cuda.synchronize()
    with profile(activities=activities) as recorded:
        for _ in range(_STEPS):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    events = list(recorded.profiler.kineto_results.events())
    work = _kernels(events) if on_gpu else _operators(events)
    return work, max(w.end for w in work) - min(w.start for w in work)


def _kernels(events: list) -> list[Work]:
    scopes = _Scopes(events)
    device = [e for e in events if e.device_type() == DeviceType.CUDA and not e.is_user_annotation()]
    return [Work(e.start_ns(), e.start_ns() + e.duration_ns(), e.name(), scopes.of(e.linked_correlation_id())) for e in device]


def _operators(events: list) -> list[Work]:
    """The operators that no other operator calls, in place of kernels."""
    scopes = _Scopes(events)
    caller = {key: scopes.names[parent] for key, parent in scopes.parents.items()}
    outer = [e for e in scopes.events if e.name().startswith("aten::") and not caller.get(e.correlation_id(), "").startswith("aten::")]
    return [Work(e.start_ns(), e.start_ns() + e.duration_ns(), e.name(), scopes.of(e.correlation_id())) for e in outer]


class _Scopes:
    """What stands around each operator: the operators that call it, and for a node of the backward graph, those that it was made by."""

    def __init__(self, events: list):
        self.events = [e for e in events if e.device_type() == DeviceType.CPU and not e.name().startswith("cu") and e.duration_ns() > 0]
        self.names = {e.correlation_id(): e.name() for e in self.events}
        self.parents: dict[int, int] = {}
        self.made_by: dict[int, int] = {}
        self._nest()
        self._link()
        self._known: dict[int, str] = {0: ""}

    def of(self, key: int) -> str:
        """The names from the operator outwards, and those of the forward that it belongs to."""
        if key not in self._known:
            names, at, origin = [], key, None
            while at in self.names:
                names.append(self.names[at])
                origin = origin or self.made_by.get(at)
                at = self.parents.get(at, 0)
            self._known[key] = " ".join(names) + (f" {self.of(origin)}" if origin is not None and origin != key else "")
        return self._known[key]

    def _nest(self) -> None:
        """Who calls whom: on one thread, the operators that are open."""
        threads: dict[int, list] = {}
        for e in sorted(self.events, key=lambda e: (e.start_ns(), -e.duration_ns())):
            open_ones = threads.setdefault(e.start_thread_id(), [])
            while open_ones and open_ones[-1].start_ns() + open_ones[-1].duration_ns() < e.start_ns() + e.duration_ns():
                open_ones.pop()
            if open_ones:
                self.parents[e.correlation_id()] = open_ones[-1].correlation_id()
            open_ones.append(e)

    def _link(self) -> None:
        """Nodes of the backward graph carry the number that the sequence of operators had when they were made; steps reuse no number."""
        forward: dict[int, list[tuple[int, int]]] = {}
        for e in self.events:
            if e.sequence_nr() >= 0 and e.fwd_thread_id() == 0:
                forward.setdefault(e.sequence_nr(), []).append((e.start_ns(), e.correlation_id()))
        for made in forward.values():
            made.sort()
        for e in self.events:
            if e.fwd_thread_id() and e.sequence_nr() in forward:
                made = forward[e.sequence_nr()]
                position = bisect_right(made, (e.start_ns(), 0)) - 1
                if position >= 0:
                    self.made_by[e.correlation_id()] = made[position][1]


@contextmanager
def _scoped(model: nn.Module) -> Iterator[None]:
    """Marks the forward of every module of a known kind."""
    handles = []
    for module in model.modules():
        kind = next((kind for kind, pattern in _SCOPES.items() if re.search(pattern, type(module).__name__)), None)
        if kind is not None:
            scope = _Scope(kind)
            handles += [module.register_forward_pre_hook(scope.enter, prepend=True), module.register_forward_hook(scope.leave, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Scope:
    def __init__(self, kind: str):
        self.kind, self.open = kind, []

    def enter(self, module: nn.Module, args: tuple) -> None:
        self.open.append(record_function(self.kind))
        self.open[-1].__enter__()

    def leave(self, module: nn.Module, args: tuple, output: object) -> None:
        if self.open:
            self.open.pop().__exit__(None, None, None)

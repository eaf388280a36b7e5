"""Where the time of a step goes, from torch's profiler: how busy the device is, how many kernels it runs, and what they are for.

A kernel is put into a category by its own name and by the tags of its scopes (`step_scopes`): the kind of module in whose forward it was launched, or
whose forward the node of the graph came from that launched it in the backward. One step is profiled, once.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from step_scopes import NOTHING, Scopes, scoped
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

_GEMM = r"gemm|nvjet|cutlass|xmma|cublas|aten::(mm|bmm|addmm|linear|matmul)|splitk"
#: The last two are what moepatch's own kernels of gated activations are called.
_GATED = r"silu|swiglu|glu|relu|gelu|gated|^_(forward|backward)_kernel"
#: Category, what the kernel's name has to contain, which tag its scopes have to have. The first row that fits counts.
_RULES = (
    ("FSDP gathers", r"AllGather|ReduceScatter|allgather|reduce_scatter|chunk_cat|split_with_sizes_copy", None),
    ("dispatch", r"nccl|SendRecv|AllToAll|alltoall|symm|_stage_kernel|_fetch_kernel|_bring_back|deep_ep|intranode|internode|notify_|barrier", None),
    ("expert GEMM", r"GroupProblem|grouped|ptr_array|PtrArray|varlen", None),
    ("expert GEMM", _GEMM, "experts"),
    ("attention", r"fmha|flash|sdpa|attention|attn", None),
    ("loss", r"cross_entropy|nll_loss|log_?softmax|logsumexp|_rows_kernel", None),
    ("dense GEMM", _GEMM, "loss"),
    ("loss", r"", "loss"),
    ("mixer", r"_ssd|ssd_|chunk_scan|chunk_state|conv1d|_states_kernel", None),
    ("norms, rope", r"rms_?norm|layer_?norm|rope|rotary", None),
    ("dense GEMM", _GEMM, None),
    ("activation", _GATED, "experts"),
    ("combine", r"combine|_sums_kernel|_dots_kernel|index_add|reduce_kernel|aten::sum", "experts"),
    ("permute", r"", "experts"),
    ("norms, rope", r"norm", None),
    ("norms, rope", r"", "norm"),
    ("router", r"", "router"),
    ("mixer", r"", "mixer"),
    ("attention", r"", "attention"),
    ("activation", _GATED, None),
    ("elementwise, copies", r"", None),
)
#: Order of the waterfall.
CATEGORIES = tuple(dict.fromkeys(name for name, _, _ in _RULES))
#: Communication counts only where no kernel computes at the same time.
_HIDEABLE = ("FSDP gathers", "dispatch")
#: On the device's timeline, but waiting.
_WAITS = re.compile(r"^(Context|Stream|Event) Sync|^Stream Wait Event")


@dataclass(frozen=True)
class Work:
    """One kernel, or one operator on the CPU: start and end in ns, its name, the tags of its scopes."""

    start: int
    end: int
    name: str
    tags: frozenset[str] = NOTHING


def profiled(model: nn.Module, step: Callable[[], None], layers: int, step_ms: float, device: torch.device, by_category: bool) -> dict:
    """What the profiler says of one step. On a CPU that is the time of its operators, if it is asked for by category.

    The busy share is the time of the kernels under the profiler over the time of a step without it: the profiler slows the host down, not the kernels.
    Kernels and copies are counted over the whole step and divided by the number of layers, so what a step does once (embedding, loss) is in it.
    Categories do not overlap: they add up to the busy time.

    Args:
        model: that `step` runs.
        step: forward with loss, and backward; the same on all ranks.
        layers: of the model.
        step_ms: what a step took.
        device: that it runs on.
        by_category: add ``waterfall_ms``.
    """
    found: dict = {}
    if device.type != "cuda" and not by_category:
        return found
    times = Counter(category_ms(work := _record(model, step, device, by_category)))
    if device.type == "cuda":
        busy = times.total()
        found |= {"gpu_busy": round(min(1.0, busy / step_ms), 4), "idle_ms": round(max(0.0, step_ms - busy), 3)}
        found |= {"launches_per_layer": round(len(work) / layers, 1), "syncs_per_layer": round(_host_syncs(step) / layers, 2)}
    if by_category:
        found["waterfall_ms"] = {name: round(times[name], 3) for name in CATEGORIES if name in times}
    return found


def category_ms(work: list[Work]) -> dict[str, float]:
    """Milliseconds by category; where two kernels run at once, one of them counts."""
    marks = sorted([(w.start, 1, i) for i, w in enumerate(work)] + [(w.end, 0, i) for i, w in enumerate(work)])
    total: Counter[str] = Counter()
    running: dict[int, str] = {}
    before = 0
    for now, starts, index in marks:
        if running and now > before:
            total[next((kind for kind in running.values() if kind not in _HIDEABLE), next(iter(running.values())))] += now - before
        before = now
        if starts:
            running[index] = categorise(work[index].name, work[index].tags)
        else:
            running.pop(index, None)
    return {kind: time / 1e6 for kind, time in total.items()}


@functools.cache
def categorise(name: str, tags: frozenset[str]) -> str:
    """The category of a kernel."""
    return next(kind for kind, kernel, tag in _RULES if (tag is None or tag in tags) and re.search(kernel, name))


def _host_syncs(step: Callable[[], None]) -> int:
    """How often torch makes the host wait for the device in a step. Waits inside other libraries are not seen."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    return sum("synchronizing CUDA operation" in str(w.message) for w in caught)


def _record(model: nn.Module, step: Callable[[], None], device: torch.device, by_category: bool) -> list[Work]:
    """The work of one step. Operators are recorded only where somebody asks for what a kernel is for: that takes the most time."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CUDA] if on_gpu else []
    if by_category:
        activities.append(ProfilerActivity.CPU)
    if on_gpu:
        torch.cuda.synchronize(device)
    with scoped(model) if by_category else nullcontext(), profile(activities=activities) as recorded:
        step()
        if on_gpu:
            torch.cuda.synchronize(device)
    events = list(recorded.profiler.kineto_results.events())
    return kernels(events) if on_gpu else operators(events)


def kernels(events: list) -> list[Work]:
    """What ran on the device."""
    scopes = Scopes(events)
    device = (e for e in events if e.device_type() == DeviceType.CUDA and not e.is_user_annotation())
    return [Work(e.start_ns(), e.start_ns() + e.duration_ns(), e.name(), scopes.of(e)) for e in device if not _WAITS.search(e.name())]


def operators(events: list) -> list[Work]:
    """The operators that no other operator calls, in place of kernels."""
    scopes = Scopes(events)
    outer = []
    for event, name, parent, tags in zip(scopes.events, scopes.names, scopes.parents, scopes.tags, strict=True):
        if name.startswith("aten::") and not (parent >= 0 and scopes.names[parent].startswith("aten::")):
            outer.append(Work(event.start_ns(), event.start_ns() + event.duration_ns(), name, tags))
    return outer

"""The forms of moepatch's own Triton kernels: what a training step makes it launch, recorded without a GPU.

A model is made on the meta device, its modules are matched and given the backends that launch own kernels, and each is run once, forward and
backward. What reaches Triton is written down instead of compiled: the kernel, what Triton specialises on, the constants, the options. So the
list of forms is the product's own choice of tiles, warps and constants, and cannot go stale.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import pkgutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import jit

import moepatch.kernels
from moepatch import planning, registry
from moepatch.gpus import Gpu
from moepatch.kernels import cross_entropy, launch, norm, requirements, rope, ssd, symm_mem, symm_mem_back, symm_mem_out
from moepatch.layers.attention import sink_kernels
from moepatch.layers.loss.chunked import Formula
from moepatch.layers.mixers import ssd_triton
from moepatch.kinds import KINDS
from moepatch.piece import piece
from moepatch.replica import replica, slice_fill
from moepatch.trial import Call

META = torch.device("meta")


@dataclass(frozen=True)
class Form:
    """One specialisation of one kernel.

    Attributes:
        kernel: module and name, without the package.
        table: of the backend that launched it.
        signature: of each parameter its Triton type, or ``constexpr``.
        constants, attributes: by the parameter's position, as Triton's compiler takes them.
        options: as given at the launch.
        function: the kernel.
    """

    kernel: str
    table: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[Any, Any], ...]
    attributes: tuple[tuple[Any, Any], ...]
    options: tuple[tuple[str, Any], ...]
    function: jit.JITFunction

    def source(self) -> ASTSource:
        """What ``triton.compile`` takes."""
        return ASTSource(self.function, dict(self.signature), dict(self.constants), {key: [list(p) for p in pairs] for key, pairs in self.attributes})

    def describe(self) -> str:
        """Its constants by name."""
        names = [p.name for p in self.function.params]
        return ", ".join(f"{names[at[0]]}={value}" for at, value in self.constants if value is not None)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """What its pointers point to."""
        return tuple(sorted({t[1:] for _, t in self.signature if t.startswith("*")}))


class Recorder:
    """Stands in the place of ``JITFunction.run``."""

    def __init__(self, gpu: Gpu):
        self.gpu = gpu
        self.forms: dict[tuple, Form] = {}
        self.table = ""
        self._backend = make_backend(GPUTarget("cuda", 90, 32))
        self._binders: dict[Any, Any] = {}

    def run(self, function: jit.JITFunction, *args, grid, warmup, **given) -> None:
        """Writes a launch down."""
        if function not in self._binders:
            self._binders[function] = jit.create_function_from_signature(function.signature, function.params, self._backend)
        settings = {**given, "debug": False, "instrumentation_mode": ""}
        bound, specialization, _ = self._binders[function](*args, **settings)
        _, signature, constants, attributes = function._pack_args(self._backend, settings, bound, specialization, None)
        names = {p.name for p in function.params}
        parts = (
            f"{function.fn.__module__.removeprefix('moepatch.')}.{function.fn.__name__}",
            self.table,
            tuple(signature.items()),
            tuple(constants.items()),
            tuple((at, tuple(map(tuple, pairs))) for at, pairs in attributes.items()),
            tuple((name, value) for name, value in given.items() if name not in names),
        )
        key = (*parts[:2], *map(str, parts[2:]))
        self.forms.setdefault(key, Form(*parts, function))


@contextlib.contextmanager
def recording(gpu: Gpu) -> Iterator[Recorder]:
    """While this is entered, own kernels run on tensors of the meta device as they would on a GPU, and are written down."""
    for module in pkgutil.iter_modules(moepatch.kernels.__path__):  # while the variable below is set, Triton would make them interpreted functions
        importlib.import_module(f"moepatch.kernels.{module.name}")
    recorder = Recorder(gpu)
    patches = (
        mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}),  # what lets kernels take tensors that are on no GPU
        mock.patch.object(torch.nn.functional, "grouped_mm", _grouped_mm),
        mock.patch.object(requirements, "requirements", lambda: {"tables": {}}),  # which are what is being found out
        mock.patch.object(launch, "_is_direct", lambda kernel: False),
        mock.patch.object(jit.JITFunction, "run", lambda function, *args, **given: recorder.run(function, *args, **given)),
        *(mock.patch.object(module, "multiprocessors", lambda index: gpu.processors) for module in (norm, rope)),
        *(mock.patch.object(module, "shared_memory", lambda index: gpu.shared) for module in (norm, ssd_triton)),
        warnings.catch_warnings(),
    )
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        warnings.simplefilter("ignore")
        yield recorder


def _grouped_mm(a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """Stands for torch's, which has fewer dtypes on the meta device than on a GPU."""
    return a.new_empty(a.shape[0], b.shape[2]) if b.ndim == 3 else a.new_empty(offs.numel(), a.shape[0], b.shape[1])


def record_others(recorder: Recorder, dtype: torch.dtype, hidden: int, vocab: int, top_k: int, head_dim: int) -> None:
    """What no pattern with a backend of its own launches: the loss, sinks after another library's attention, dispatch between ranks."""
    rows, wide = 256, torch.float32
    recorder.table = "loss"
    logits, labels, loss = torch.empty(rows, vocab, dtype=dtype, device=META), torch.empty(rows, dtype=torch.int64, device=META), torch.empty(rows, device=META)
    for formula, grads in itertools.product((Formula(), Formula(softcap=30.0)), (True, False)):
        cross_entropy.launch_rows(logits, labels, loss, torch.empty((), device=META) if grads else None, formula, grads=grads)
    cross_entropy.launch_scale(logits, torch.empty((), device=META))
    recorder.table = "attention"
    out, lse, sinks = torch.empty(1, 8, 640, head_dim, dtype=dtype, device=META), torch.empty(1, 8, 640, device=META), torch.empty(8, dtype=dtype, device=META)
    sink_kernels.rescale_on_device(out, lse, sinks, torch.empty_like(lse))
    sink_kernels.gradient_on_device(torch.empty_like(out), out, lse, sinks)
    recorder.table = "dispatch"
    x_TH, weights_TK = torch.empty(rows, hidden, dtype=dtype, device=META), torch.empty(rows, top_k, dtype=wide, device=META)
    ids_TK = torch.empty(rows, top_k, dtype=torch.int32, device=META)
    world = 8
    peers = symm_mem.Peers([torch.empty(2**30, dtype=torch.uint8, device=META)] * world, torch.empty(world, dtype=torch.int64, device=META), 0)
    peers.__dict__["starts"] = (2**40,) * world  # addresses, which Triton takes as wide integers
    edges = symm_mem.Edges((rows,) * world, torch.empty(world + 1, dtype=torch.int32, device=META))
    y_NH, ids_NK = torch.empty(rows * world, hidden, dtype=dtype, device=META), torch.empty(rows * world, top_k, dtype=torch.int32, device=META)
    symm_mem_out.publish_tokens(peers, (0, 2**24, 2**25), x_TH, ids_TK, weights_TK, wide, 1.0, 2112)
    symm_mem_out.publish_tokens(peers, (0, 0, 0), x_TH, None, None, dtype, 1 / world, 2112)
    symm_mem_out.fetch_tokens(peers, (0, 2**24, 2**25), x_TH, weights_TK, edges, 16, 2112)
    symm_mem_out.fetch_rows(peers, 0, x_TH, ids_NK, edges, 2112)
    for numbers in (None, torch.empty(rows * world, top_k, dtype=wide, device=META)):
        symm_mem_back.stage_rows(peers, (0, 2**25), y_NH, ids_NK, numbers, edges, 2112)
        symm_mem_back.bring_back(peers, (0, 2**25), y_NH, ids_TK, edges, 16, None if numbers is None else (wide, dtype), 1.0, 2112)


def record_ssd(recorder: Recorder, dtype: torch.dtype, state: int, head_dim: int) -> None:
    """Mamba-2's kernels for heads of one size."""
    recorder.table, heads = "ssd", 16
    shape = ssd.Shape(1, 4096, heads, head_dim, 1, state, (0.0, float("inf")), dtype == torch.float32, recorder.gpu.shared)
    u, dt = torch.empty(1, 4096, heads * head_dim + 2 * state, dtype=dtype, device=META), torch.empty(1, 4096, heads, dtype=dtype, device=META)
    of_heads = torch.empty(heads, device=META)
    states, last = ssd.scan_states(u, dt, of_heads, of_heads, shape)
    y = ssd.scan_outputs(u, dt, of_heads, of_heads, of_heads, states, shape)
    for grad_last in (None, last):
        ssd.scan_backward(y, grad_last, u, dt, of_heads, of_heads, of_heads, torch.empty_like(dt), shape)


def record_model(recorder: Recorder, model: nn.Module, plan: planning.Plan, tokens: tuple[int, ...]) -> dict[str, str]:
    """Runs one module of every pattern of a model on the meta device with each backend that launches own kernels.

    Args:
        model: on the meta device.
        plan: made for it, anywhere.
        tokens: of the calls.

    Returns:
        What could not be run, and why, by pattern and backend.
    """
    failed = {}
    for pattern in plan.patterns:
        kind = KINDS[pattern.site.kind]
        for backend in registry.backends(kind.backends):
            dtype = getattr(torch, pattern.site.dtype)
            if backend.name != "triton" or backend.why_not(kind.computes(pattern.site.spec), dtype, recorder.gpu) is not None:
                continue
            recorder.table = kind.backends
            for count in tokens:
                try:
                    _run(model, pattern, kind, backend.name, count)
                except Exception as error:
                    failed[f"{pattern.name} {backend.name} {pattern.site.spec.describe()}"] = f"{type(error).__name__}: {str(error)[:300]}"
    return failed


def _run(model, pattern, kind, backend: str, tokens: int) -> None:
    spec, dtype = pattern.site.spec, getattr(torch, pattern.site.dtype)
    if kind.bench is not None:
        piece(model, pattern, backend, tokens, META, slice_fill(dtype)).step()
        return
    if kind.trial is None:
        return
    module = kind.at_work(model.get_submodule(pattern.site.fqn), spec, backend, lambda original: replica(original, {}, slice_fill(dtype)))
    call: Call = kind.trial(spec, dtype, META, torch.Generator().manual_seed(0)).trainable()
    made = (kind.call or type(module).forward)(module, *call.args, **call.kwargs)
    outputs = [o for o in torch.utils._pytree.tree_leaves(made) if isinstance(o, torch.Tensor) and o.requires_grad]
    leaves = [*call.leaves(), *(p for p in module.parameters() if p.requires_grad)]
    torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs], allow_unused=True)

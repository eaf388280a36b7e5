"""The forms of moepatch's own Triton kernels: what a training step makes it launch, recorded without a GPU.

A model is made on the meta device, its modules are matched and given the backends that launch own kernels, and each is run once, forward and
backward. What reaches Triton is written down instead of compiled: the kernel, what Triton specialises on, the constants, the options. So the
list of forms is the product's own choice of tiles, warps and constants, and cannot go stale.
"""

from __future__ import annotations

import contextlib
import importlib
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
from moepatch.kernels import launch, norm, rope, routes
from moepatch.layers.attention import sink_kernels
from moepatch.kinds import KINDS
from moepatch.piece import piece
from moepatch.replica import replica, slice_fill
from moepatch.trial import Call

META = torch.device("meta")
#: Multiprocessors that tiles are chosen for: an H200's.
_PROCESSORS = 132


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

    def __init__(self):
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
        key = (parts[0], *map(str, parts[2:]))
        self.forms.setdefault(key, Form(*parts, function))


@contextlib.contextmanager
def recording() -> Iterator[Recorder]:
    """While this is entered, own kernels run on tensors of the meta device, and are written down."""
    for module in pkgutil.iter_modules(moepatch.kernels.__path__):  # while the variable below is set, Triton would make them interpreted functions
        importlib.import_module(f"moepatch.kernels.{module.name}")
    recorder = Recorder()
    processors = mock.Mock(side_effect=lambda index: _PROCESSORS)
    with (
        mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}),  # what lets kernels take tensors that are on no GPU
        mock.patch.object(launch, "_is_direct", lambda kernel: False),
        mock.patch.object(jit.JITFunction, "run", lambda function, *args, **given: recorder.run(function, *args, **given)),
        mock.patch.object(norm, "multiprocessors", processors),
        mock.patch.object(rope, "multiprocessors", processors),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield recorder


def record_model(recorder: Recorder, model: nn.Module, tokens: tuple[int, ...]) -> dict[str, str]:
    """Runs one module of every pattern of a model on the meta device with each backend that launches own kernels.

    Args:
        model: on the meta device.
        tokens: of the calls.

    Returns:
        What could not be run, and why, by pattern and backend.
    """
    failed = {}
    for pattern in planning.make_plan(model).patterns:
        kind = KINDS[pattern.site.kind]
        for backend in registry.backends(kind.backends):
            if backend.name != "triton":
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
    torch.autograd.grad(outputs, [*call.leaves(), *(p for p in module.parameters() if p.requires_grad)], [torch.ones_like(o) for o in outputs], allow_unused=True)

"""Launching Triton kernels with little Python: what a launch depends on is looked up once for each kind of arguments.

Triton's own ``kernel[grid](...)`` binds and specialises all arguments, constants included, in every call; a training step has a thousand
of them. Here the compiled kernel is found by the constants and by what Triton specialises on: dtypes, alignment to 16 bytes, integers that
are 1 or divisible by 16. The first launch of a kind goes through Triton itself, and so do launches under a tracer, under the interpreter or
with a profiler's hooks.

`launch` looks the constants up too, in every call; whoever keeps a `Prepared` spares that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:  # Everything that only asks needs no Triton.
    from triton import JITFunction, knobs
except ImportError:
    JITFunction = knobs = None

_PREPARED: dict[tuple, Prepared] = {}


class Prepared:
    """A kernel and its constants, for many launches.

    Args:
        kernel: a ``triton.jit`` function whose parameters without ``tl.constexpr`` come first.
        constants: ``tl.constexpr`` parameters and launch options (``num_warps``, …).
    """

    __slots__ = ("_found", "constants", "kernel")

    def __init__(self, kernel: Any, **constants: Any):
        self.kernel, self.constants = kernel, constants
        self._found: dict[tuple, tuple] = {}

    def __call__(self, grid: tuple[int, ...], *args: Tensor | int | float | None) -> None:
        """``kernel[grid](*args, **constants)`` on the current stream of the first tensor's device.

        Args:
            grid: up to three sizes.
            args: the parameters that are no constants; at least one is a tensor.
        """
        if torch.compiler.is_compiling() or not _is_direct(self.kernel):
            self.kernel[grid](*args, **self.constants)
            return
        device = (args[0] if args[0] is not None else next(a for a in args if isinstance(a, Tensor))).device.index
        if torch._C._cuda_getDevice() != device:
            with torch.cuda.device(device):
                self(grid, *args)
            return
        kinds, values = _kinds(args)
        key = (device, *kinds)
        found = self._found.get(key)
        if found is None:
            self._found[key] = self._launched_by_triton(grid, args)
            return
        run, function, metadata, rest = found
        sizes = (*grid, 1, 1)
        stream = torch._C._cuda_getCurrentRawStream(device)
        run(sizes[0], sizes[1], sizes[2], stream, function, metadata, None, None, None, *values, *rest)

    def _launched_by_triton(self, grid: tuple[int, ...], args: tuple) -> tuple:
        """Launches, and returns what the next launch of this kind needs."""
        compiled = self.kernel[grid](*args, **self.constants)
        rest = tuple(self.constants[p.name] if p.name in self.constants else p.default for p in self.kernel.params[len(args) :])
        return compiled.run, compiled.function, compiled.packed_metadata, rest


def launch(kernel: Any, grid: tuple[int, ...], *args: Tensor | int | float | None, **constants: Any) -> None:
    """One launch of ``Prepared(kernel, **constants)``, which is kept; the constants must be hashable."""
    if torch.compiler.is_compiling():
        kernel[grid](*args, **constants)
        return
    key = (kernel, *constants.items())
    prepared = _PREPARED.get(key)
    if prepared is None:
        prepared = _PREPARED[key] = Prepared(kernel, **constants)
    prepared(grid, *args)


def _is_direct(kernel: Any) -> bool:
    """Whether nothing watches or replaces the launch."""
    return isinstance(kernel, JITFunction) and not (knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls or kernel.pre_run_hooks)


def _kinds(args: tuple) -> tuple[list, list]:
    """What Triton specialises on, and the arguments with addresses in the place of tensors, which spares Triton asking the driver about each.

    One loop without calls of our own: it runs for every argument of every launch. A tensor that is not on a GPU makes a kind of its own, so
    that it reaches Triton, which refuses it.
    """
    kinds: list = []
    values = list(args)
    for at, arg in enumerate(args):
        if arg is None:
            kinds.append(None)
        elif type(arg) is int:
            # Two bits tell what 1, multiples of 16 and wide integers are; 0 is a multiple, too.
            kinds.append(1 if arg == 1 else (2 if arg % 16 else 4) + (-0x80000000 <= arg <= 0x7FFFFFFF))
        elif type(arg) is float:
            kinds.append(float)
        else:
            values[at] = address = arg.data_ptr()
            kinds.append(arg.dtype)
            kinds.append(address % 16 if arg.is_cuda else "not on a GPU")
    return kinds, values

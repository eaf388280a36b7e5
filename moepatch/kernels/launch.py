"""Launching Triton kernels with little Python: what a launch depends on is looked up once for each kind of arguments.

Triton's own ``kernel[grid](...)`` binds and specialises all arguments, constants included, in every call; a training step has a thousand
of them. Here the compiled kernel is found by the constants and by what Triton specialises on: dtypes, alignment to 16 bytes, integers that
are 1 or divisible by 16. The first launch of a kind goes through Triton itself, and so do launches under a tracer, under the interpreter or
with a profiler's hooks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:  # Everything that only asks needs no Triton.
    from triton import JITFunction, knobs
except ImportError:
    JITFunction = knobs = None

_FOUND: dict[tuple, tuple] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Tensor | int | float | None, **constants: Any) -> None:
    """``kernel[grid](*args, **constants)`` on the current stream of the first tensor's device.

    Args:
        kernel: a ``triton.jit`` function whose parameters without ``tl.constexpr`` come first.
        grid: up to three sizes.
        args: those parameters; at least one is a tensor.
        constants: ``tl.constexpr`` parameters and launch options (``num_warps``, …), hashable.
    """
    if torch.compiler.is_compiling() or not _is_direct(kernel):
        kernel[grid](*args, **constants)
        return
    device = (args[0] if args[0] is not None else next(a for a in args if isinstance(a, Tensor))).device.index
    if torch._C._cuda_getDevice() != device:
        with torch.cuda.device(device):
            launch(kernel, grid, *args, **constants)
        return
    key = (kernel, device, *constants.items(), *map(_kind_of, args))
    found = _FOUND.get(key)
    if found is None:
        compiled = kernel[grid](*args, **constants)
        rest = tuple(constants[p.name] if p.name in constants else p.default for p in kernel.params[len(args) :])
        _FOUND[key] = compiled.run, compiled.function, compiled.packed_metadata, rest
        return
    run, function, metadata, rest = found
    sizes = (*grid, 1, 1)
    stream = torch._C._cuda_getCurrentRawStream(device)
    run(sizes[0], sizes[1], sizes[2], stream, function, metadata, None, None, None, *args, *rest)


def _is_direct(kernel: Any) -> bool:
    """Whether nothing watches or replaces the launch."""
    return isinstance(kernel, JITFunction) and not (knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls or kernel.pre_run_hooks)


def _kind_of(arg: Tensor | int | float | None) -> object:
    """What Triton specialises on."""
    if type(arg) is int:
        return 1 if arg == 1 else (arg % 16 == 0, -(2**31) <= arg < 2**31)
    if arg is None or isinstance(arg, float):
        return arg.__class__
    return arg.dtype, arg.data_ptr() % 16 == 0

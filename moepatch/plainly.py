"""Where moepatch works: outside of whatever the caller has switched on around the call.

Trials and probes compare numbers, in fp32 and with gradients. Autocast, inference mode, a default device of the caller's and modes that see
every operator or function would change what is compared; none of them is meant for what happens inside `optimize`. All of these are settings
of a thread. The default dtype is one for all threads, so it is left as it is, and whoever makes a tensor here says of which dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import overrides
from torch.utils import _python_dispatch as dispatch

from .errors import MoePatchError

F = TypeVar("F", bound=Callable[..., Any])

#: Kinds of devices that have autocast.
_AUTOCAST = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia")


@contextmanager
def plainly() -> Iterator[None]:
    """While this is entered, torch computes as in a fresh process, in this thread: no autocast, gradients, tensors on the CPU, no modes.

    Everything is as it was afterwards.

    Raises:
        MoePatchError: in the middle of a ``torch.func`` transform or ``torch.jit.trace``, which cannot be left.
    """
    _check_outside()
    with ExitStack() as stack:
        stack.enter_context(dispatch._disable_current_modes())  # FakeTensorMode, make_fx, counters of operators
        stack.enter_context(_no_function_modes())
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in _AUTOCAST:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device() != torch.device("cpu"):
            stack.enter_context(torch.device("cpu"))
        yield


@contextmanager
def _no_function_modes() -> Iterator[None]:
    """While this is entered, no mode sees the functions of torch that are called; a default device is one of them."""
    modes = [overrides._pop_mode() for _ in range(torch._C._len_torch_function_stack())]
    try:
        yield
    finally:
        for mode in reversed(modes):
            overrides._push_mode(mode)


def runs_plainly(function: F) -> F:
    """Decorates a function that runs so, also where torch.compile meets a call of it: it is called between the graphs, not traced."""
    return torch.compiler.disable(plainly()(function))


def _check_outside() -> None:
    inside = (
        "a torch.func transform (grad, vmap, …)" if torch._C._are_functorch_transforms_active()
        else "torch.jit.trace" if torch.jit.is_tracing()
        else None
    )  # fmt: skip
    if inside is not None:
        raise MoePatchError(f"moepatch was called inside {inside}. Nothing was changed. Call it before, on the plain model.")

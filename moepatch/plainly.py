"""Where moepatch works: outside of whatever the caller has switched on around the call.

Trials and probes compare numbers, in fp32 and with gradients. Autocast, inference mode, a default device or dtype of the caller's and modes
that see every operator would change what is compared; none of them is meant for what happens inside `optimize`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch.utils import _python_dispatch as dispatch

from .errors import MoePatchError

F = TypeVar("F", bound=Callable[..., Any])

#: Kinds of devices that have autocast.
_AUTOCAST = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia")


@contextmanager
def plainly() -> Iterator[None]:
    """While this is entered, torch computes as in a fresh process: no autocast, gradients, tensors in fp32 on the CPU, no modes.

    Everything is as it was afterwards.

    Raises:
        MoePatchError: in the middle of a ``torch.func`` transform or ``torch.jit.trace``, which cannot be left.
    """
    _check_outside()
    with ExitStack() as stack:
        stack.enter_context(dispatch._disable_current_modes())  # FakeTensorMode, make_fx, counters of operators
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in _AUTOCAST:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device() != torch.device("cpu"):
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(_DEFAULT_DTYPE)
        yield


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


class _DefaultDtype:
    """fp32 as torch's default dtype. That is one for all threads: the first that enters sets it, the last that leaves puts it back."""

    def __init__(self):
        self.lock, self.inside, self.before = threading.Lock(), 0, torch.float32

    def __enter__(self):
        with self.lock:
            if not self.inside:
                self.before = torch.get_default_dtype()
            self.inside += 1
            if torch.get_default_dtype() != torch.float32:
                torch.set_default_dtype(torch.float32)

    def __exit__(self, *exc):
        with self.lock:
            self.inside -= 1
            if not self.inside and self.before != torch.float32:
                torch.set_default_dtype(self.before)


_DEFAULT_DTYPE = _DefaultDtype()

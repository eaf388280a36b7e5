"""What a forward decides: every operator with a threshold that it runs, and on which sides of the threshold its numbers were.

Numbers show a clamp at 10 only if they pass 10. The operators show it always, in loops and in branches alike, as long as they are run.
"""

from __future__ import annotations

import functools
import math
import threading
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

#: Operators that bend at numbers: from the names of the arguments that say where, or the numbers themselves.
_BOUNDS: dict[str, tuple[str | float, ...]] = {
    "clamp": ("min", "max"), "clip": ("min", "max"), "clamp_min": ("min",), "clamp_max": ("max",), "hardtanh": ("min_val", "max_val"),
    "threshold": ("threshold",), "relu": (0.0,), "relu6": (0.0, 6.0), "leaky_relu": (0.0,), "elu": (0.0,), "selu": (0.0,), "celu": (0.0,),
    "prelu": (0.0,), "_prelu_kernel": (0.0,), "hardsigmoid": (-3.0, 3.0), "hardswish": (-3.0, 3.0), "hardshrink": ("lambd",), "softshrink": ("lambd",),
}  # fmt: skip
#: Operators whose result says which side it was.
_ORDER = frozenset(("gt", "lt", "ge", "le"))
_TESTS = frozenset(("eq", "ne", "isnan", "isinf", "isposinf", "isneginf", "isfinite", "logical_not", "signbit"))
#: Operators that take the one or the other of two tensors.
_EITHER = frozenset(("maximum", "minimum", "fmax", "fmin"))
#: Operators with steps everywhere, and those that hand a number to Python: no input shows all that they may do.
_STEPS = frozenset(
    "round floor ceil trunc fix frac fmod remainder sign sgn heaviside nan_to_num bucketize searchsorted equal floor_divide histc "
    "fake_quantize_per_tensor_affine fake_quantize_per_channel_affine quantize_per_tensor".split()
)
_ITEM = "_local_scalar_dense"
#: The same for many numbers at once, which torch does without dispatching an operator.
_READS = {Tensor.tolist: "tolist", Tensor.numpy: "numpy", Tensor.__array__: "numpy"}
#: torch notes once for all threads whether one of them is in such a mode; threads that overlap would leave the note wrong for ever.
_ONE_AT_A_TIME = threading.RLock()
#: Of many small numbers, one that is 0 instead changes no result by more than rounding does.
_SHARE = 0.1


class Key(NamedTuple):
    """An operator and its threshold.

    Attributes:
        op: its name, without the underscore of operators that work in place.
        at: the constant, or None where it is a tensor's number or there is none.
    """

    op: str
    at: float | str | None

    def __str__(self) -> str:
        at = "" if self.at is None else f" at {self.at:g}" if isinstance(self.at, float) else f" {self.at}"
        return f"{'Tensor' if self.op in _READS.values() else 'aten'}.{self.op}{at}"


@dataclass
class Sides:
    """What was seen of the numbers at one operator.

    Attributes:
        below, above: whether so many were on this side of the threshold in one call that it counts; of a test, whether it was false and true.
        low, high: the smallest and the largest number.
    """

    below: bool = False
    above: bool = False
    low: float = float("inf")
    high: float = float("-inf")

    @property
    def both(self) -> bool:
        """Whether both sides were seen."""
        return self.below and self.above

    def add(self, other: Sides) -> None:
        """Also what was seen elsewhere."""
        self.below, self.above = self.below or other.below, self.above or other.above
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)


class Recorder(TorchDispatchMode):
    """While it is entered, writes down the thresholds that are met.

    Attributes:
        sites: by operator and constant.
        trace: every operator in order, with its plain arguments, if it is `traced`.
    """

    def __init__(self, traced: bool = False):
        super().__init__()
        self.sites: dict[Key, Sides] = {}
        self.trace: list[tuple] = []
        self._traced = traced
        self._reads = _Reads(self.sites)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: at every operator torch would see to it that its compiler stays away, which is not at work here."""
        return False

    def __enter__(self):
        _ONE_AT_A_TIME.acquire()
        self._reads.__enter__()
        return super().__enter__()

    def __exit__(self, *raised):
        try:
            super().__exit__(*raised)
            self._reads.__exit__(*raised)
        finally:
            _ONE_AT_A_TIME.release()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._traced:
            self.trace.append((func, *(a for a in (*args, *kwargs.values()) if isinstance(a, (bool, int, float, str, torch.dtype)))))
        op, in_place = _named(func)
        watched = op in _WATCHED or op == "div" and kwargs.get("rounding_mode") is not None
        if not watched or not (isinstance(args[0], Tensor) and args[0].numel()):
            return func(*args, **kwargs)
        # An operator in place leaves nothing of what it was given.
        given = args[0].detach().clone() if in_place else args[0]
        result = func(*args, **kwargs)
        for key, sides in _seen(op, func, given, args, kwargs, result):
            self.sites.setdefault(key, Sides()).add(sides)
        return result


class _Reads(TorchFunctionMode):
    """Sees numbers that are handed to Python without an operator."""

    def __init__(self, sites: dict[Key, Sides]):
        super().__init__()
        self.sites = sites

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _READS and args[0].is_floating_point():
            self.sites.setdefault(Key(_READS[func], None), Sides()).add(Sides(*(False, False), *_range(args[0].detach())))
        return func(*args, **(kwargs or {}))


_WATCHED = frozenset(_BOUNDS) | _ORDER | _TESTS | _EITHER | _STEPS | {_ITEM}


@functools.cache
def _named(func: Any) -> tuple[str, bool]:
    """The name of an operator, and whether it works in place."""
    name = func._schema.name.removeprefix("aten::")
    op = name if name.startswith("_") else name.rstrip("_")
    return op, op != name


def _seen(op: str, func: Any, x: Tensor, args: tuple, kwargs: dict[str, Any], result: Any):
    """The keys of one call, with what it shows."""
    if op in _BOUNDS:
        values = _arguments(func, args, kwargs)
        for bound in _BOUNDS[op]:
            at = values.get(bound) if isinstance(bound, str) else bound
            for limit in (at, -at) if bound == "lambd" else (at,):
                if limit is not None and not (isinstance(limit, float) and math.isinf(limit)):
                    yield _bounded(op, bound, x, limit)
    elif op in _EITHER:
        # One tensor with one number is a clamp.
        yield Key(op, _number(args[1])), Sides(_counts(x < args[1], x), _counts(x > args[1], x), *_range(x))
    elif op in _ORDER or op in _TESTS:
        # Whether a whole number is equal to another one is how experts are told apart.
        if op in _ORDER or x.is_floating_point() and op != "logical_not":
            yield Key(op, _number(args[1]) if len(args) > 1 else None), Sides(_counts(~result, x, op), _counts(result, x, op), *_range(x))
    elif x.is_floating_point():
        yield Key(op, None), Sides(*(False, False), *_range(x))


def _bounded(op: str, bound: str | float, x: Tensor, limit: float | Tensor) -> tuple[Key, Sides]:
    words = bound if isinstance(bound, str) and isinstance(limit, Tensor) and limit.numel() > 1 else _number(limit)
    return Key(op, words), Sides(_counts(x < limit, x), _counts(x > limit, x), *_range(x))


def _counts(which: Tensor, x: Tensor, op: str = "") -> bool:
    """Whether enough of the numbers of x are meant that a result shows what is done with them: what makes 0 of 0 shows nothing."""
    shows = which & (x != 0) if x.is_floating_point() and op not in _TESTS else which
    return bool(shows.float().mean() >= _SHARE)


def _arguments(func: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, with their defaults."""
    schema = func._schema.arguments
    return {a.name: args[i] if i < len(args) else kwargs.get(a.name, a.default_value) for i, a in enumerate(schema)}


def _number(value: Any) -> float | None:
    if isinstance(value, Tensor):
        return float(value) if value.numel() == 1 and not value.is_complex() else None
    return float(value) if isinstance(value, (int, float)) else None


def _range(x: Tensor) -> tuple[float, float]:
    if x.is_complex() or x.dtype is torch.bool:
        return float("inf"), float("-inf")
    low, high = torch.aminmax(x)
    return float(low), float(high)


def is_step(key: Key) -> bool:
    """Whether no two numbers are enough to see what an operator does."""
    return key.op in _STEPS or key.op in (_ITEM, "div", *_READS.values())

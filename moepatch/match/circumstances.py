"""The same call under other circumstances, for the second witness: with gradients, of inputs or weights that need none, in other dtypes.

With gradients everything is compared: results, gradients, what the backward pass adds and what the call changes. In other dtypes numbers
round, so what is compared there are the operators of the family's own code: an operator that it has in one dtype only is a branch on it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedConfig

from .. import trial
from ..trial import Call
from .recorder import Recorder
from .state import changes, state_of, unlike

#: In words: whether the module trains, whether inputs and whether weights need gradients, and what the cotangent is multiplied with.
_GRADED = {
    "in training with gradients": (True, True, True, 1.0),
    "in evaluation with gradients": (False, True, True, 1.0),
    "with inputs that need no gradient": (True, False, True, 1.0),
    "with weights that need no gradient": (True, True, False, 1.0),
    "with gradients × 1e6": (True, True, True, 1e6),
    "with gradients × 1e-6": (True, True, True, 1e-6),
}
#: Other than the usual one.
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
#: Operators that lay numbers out or round them, and compute nothing.
_NO_MATTER = frozenset(
    "_to_copy alias as_strided clone contiguous copy detach empty empty_like expand lift_fresh permute reshape squeeze t transpose _unsafe_view "
    "unsqueeze view".split()
)


def graded_objection(theirs: tuple, ours: tuple, call: Call, describe: Callable[[list[trial.Difference]], str | None]) -> str | None:
    """What is different where gradients are recorded, in words; None if nothing is.

    Args:
        theirs, ours: module and forward, of the family and of its patched twin.
        call: an ordinary one.
        describe: says what is off in rows of a comparison.
    """
    for words, how in _GRADED.items():
        try:
            reference, changed = _graded(*theirs, call, *how)
        except Exception:  # not every family takes every call
            continue
        try:
            result, changed_too = _graded(*ours, call, *how)
        except Exception as error:  # a wrong reading may fail in any way
            return f"{words} it cannot be run when it is patched ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
        reason = unlike(changed, changed_too) or describe(trial.differences(reference, result))
        if reason is not None:
            return f"{words} {reason}"
    return None


def _graded(module: nn.Module, forward: Any, call: Call, training: bool, inputs: bool, weights: bool, loud: float) -> tuple[Mapping, dict[str, Any]]:
    """Results and changes of one call with gradients."""
    needing = [p for p in module.parameters() if p.requires_grad]
    for p in needing:
        p.requires_grad_(weights)
    try:
        before = state_of(module.train(training))
        results = trial.run(module, call, forward=forward, hidden=loud == 1.0, inputs=inputs, loud=loud)
        return results, changes(before, state_of(module))
    finally:
        for p in needing:
            p.requires_grad_()


def branch_objection(module: nn.Module, forward: Any, call: Call) -> str | None:
    """The operators that a family's code has in some dtype or under autocast only, in words; None if there are none."""
    usual = _operators(module, forward, call, contextlib.nullcontext())
    for words, other, changed, context in _circumstances(module, call):
        found = None if usual is None else _operators(other, forward, changed, context)
        odd = [] if found is None else sorted(found - usual, key=str) + sorted(usual - found, key=str)
        if odd:
            operator, *numbers = odd[0]
            least = f"{words} its forward does something else (aten.{operator}{' with ' if numbers else ''}{', '.join(map(str, numbers))}"
            return f"{least}{f' and {len(odd) - 1} more operators' if len(odd) > 1 else ''})"
    return None


def _circumstances(module: nn.Module, call: Call) -> Iterator[tuple[str, nn.Module, Call, contextlib.AbstractContextManager]]:
    for words, dtype in _DTYPES.items():
        yield f"in {words}", in_dtype(module, dtype), call.mapped(lambda t, dtype=dtype: t.to(dtype)), contextlib.nullcontext()
    yield "under autocast", module, call, torch.autocast("cpu", torch.bfloat16)


def in_dtype(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in a dtype. What trials have written down of the module is not copied, nor are configs."""
    kept = (value for part in module.modules() for name, value in vars(part).items() if name.startswith("_moepatch_") or isinstance(value, PreTrainedConfig))
    return copy.deepcopy(module, {id(value): value for value in kept}).to(dtype)


def _operators(module: nn.Module, forward: Any, call: Call, context: contextlib.AbstractContextManager) -> set[tuple] | None:
    """The operators of a call with their constants, without those that do not compute; None if it cannot be run."""
    recorder, found = Recorder(traced=True), set()
    args, kwargs = tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, (call.args, dict(call.kwargs)))
    try:
        with torch.no_grad(), context, trial.torch_formulas(module, forward) as run, recorder:
            for training in (False, True):
                run(module.train(training), *args, **kwargs)
    except Exception:  # not every family takes every dtype
        return None
    for func, *constants in recorder.trace:
        op = func._schema.name.removeprefix("aten::").rstrip("_")
        if op not in _NO_MATTER:
            found.add((op, *(_in_fp32(c) for c in constants if isinstance(c, float) and not _is_of_dtype(c))))
    return found


@functools.cache
def _in_fp32(number: float) -> float:
    """A constant as torch's own functions round it where they compute in fp32, such as the epsilon of its norms."""
    rounded = torch.tensor(number, dtype=torch.float32).item()
    return rounded if rounded and math.isfinite(rounded) else number


@functools.cache
def _is_of_dtype(number: float) -> bool:
    """Whether a number is one that a dtype has: its largest, its smallest."""
    known = [n for dtype in (torch.float32, *_DTYPES.values()) for n in (torch.finfo(dtype).max, torch.finfo(dtype).tiny, torch.finfo(dtype).eps)]
    return not math.isfinite(number) or abs(number) in known

"""Trying a module and its patched twin on the same random input, forward and backward, and measuring how far they are apart."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map
from transformers.integrations import hub_kernels

from .errors import in_words
from .stand_in import StandIns
from .surgery import InjectClass, Patched, original_class

#: The largest relative error in fp32, of outputs and of every gradient.
FP32_LIMIT = 1e-5
#: In low precision: how much worse than the family's own code we may be, both against fp32.
LOW_PRECISION_FACTOR = 1.5
#: What transformers' wrapper of a library's function asks: first whether to go round it, then whether to say, once in a process, that it is missing.
_IN_TORCH = StandIns({(hub_kernels, "is_torchdynamo_exporting"): lambda: True, (hub_kernels, "is_torchdynamo_compiling"): lambda: True})
#: Where a replica keeps the copies of its functions.
_COPIES = "_moepatch_copies"
#: How the names of results begin that say the structure of what was returned, and a tensor's dtype; and how those of gradients end that
#: there are without a loss.
FORM, DTYPE, UNASKED = "returns ", "dtype of ", " where nobody asks for one"
#: How the name begins of an input that the module has written into.
WRITTEN = "written input "
_DTYPES = list(dict.fromkeys(value for value in vars(torch).values() if isinstance(value, torch.dtype)))


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a module. Floating tensors anywhere inside them get gradients.

    Attributes:
        args, kwargs: the arguments.
        constants: keyword arguments whose tensors get none, such as the tables of a rotary embedding in a training step.
    """

    args: tuple = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    constants: frozenset[str] = frozenset()

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Call:
        """The call with every floating tensor replaced by a function of it."""
        args, kwargs = tree_map(lambda leaf: function(leaf) if _is_floating(leaf) else leaf, (self.args, dict(self.kwargs)))
        return Call(args, kwargs, self.constants)

    def leaves(self) -> list[Tensor]:
        """The floating tensors that get gradients, in order."""
        varying = {name: value for name, value in self.kwargs.items() if name not in self.constants}
        return [leaf for leaf in tree_flatten((self.args, varying))[0] if _is_floating(leaf)]

    def trainable(self, needed: bool = True) -> Call:
        """The call with copies of the tensors; those of `leaves` record what is computed from them, if that is `needed`."""
        fresh = self.mapped(lambda tensor: tensor.detach().clone())
        for leaf in fresh.leaves() if needed else ():
            leaf.requires_grad_()
        return fresh


@dataclass(frozen=True)
class Difference:
    """How one tensor of a trial compares.

    Attributes:
        what: ``output``, ``grad input 0``, ``grad gate_up_proj``, …; what is returned, if it has another structure or dtype.
        ours: relative error of the patched module, ``|ours - reference| / |reference|`` in the Frobenius norm.
        theirs: the same for the family's own code in the same precision; None in fp32, where it is the reference.
        limit: what `ours` must not exceed.
    """

    what: str
    ours: float
    theirs: float | None
    limit: float

    @property
    def ok(self) -> bool:
        """False also if the error is not a number."""
        return self.ours <= self.limit


class Results(dict):
    """What a trial gave, by name. A name that it does not have stands for something that is equal to nothing."""

    def __missing__(self, what: str) -> Tensor:
        return torch.tensor(math.nan, dtype=torch.float32)


def run(
    module: nn.Module,
    call: Call,
    *,
    forward: Callable[..., Any] | None = None,
    seed: int = 0,
    hidden: bool = False,
    inputs: bool = True,
    loud: float = 1.0,
) -> dict[str, Tensor]:
    """One call and its backward pass, without the libraries that a family may find installed (see `torch_formulas`).

    Args:
        module: called with `call`; its parameters' gradients are read.
        call: its floating tensors get gradients.
        forward: called as ``forward(module, ...)`` instead of the module's own forward.
        seed: of the random cotangent; that of a single number, a loss, is 1, as in a training step.
        hidden: also take the gradients that there are with a cotangent of 0: those of a loss that the module adds in its backward pass.
        inputs: False: those of the call need no gradient, as in the first layer above a frozen embedding.
        loud: what the cotangent is multiplied with.

    Returns:
        Every tensor that is returned and every gradient by name, on the CPU in fp32 or wider. A gradient that autograd leaves out is 0. The
        structure of what is returned is one of the names, the dtype of each tensor a number of its own; `differences` knows both.
    """
    before, call = call.leaves(), call.trainable(inputs)
    leaves = {f"grad input {i}": leaf for i, leaf in enumerate(call.leaves()) if inputs}
    leaves |= {f"grad {name}": p for name, p in module.named_parameters() if p.requires_grad}
    with torch.enable_grad(), torch_formulas(module, forward) as forward:
        # As in a model, what comes in was computed; hooks on all modules may ask autograd for the node that did.
        given = call.mapped(lambda tensor: tensor.view_as(tensor) if tensor.requires_grad else tensor)
        returned = forward(module, *given.args, **given.kwargs)
        result = returned_tensors(returned)
        written = {f"{WRITTEN}{i}": now for i, (was, now) in enumerate(zip(before, call.leaves(), strict=True)) if not torch.equal(was, now)}
        outputs = [o for o in result.values() if o.requires_grad]
        generator = torch.Generator().manual_seed(seed)
        cotangents = [_cotangent(o, generator) * loud for o in outputs]
        if hidden:
            grads = _gradients(outputs, [torch.zeros_like(o) for o in outputs], leaves, retain=True)
            result |= {name + UNASKED: g for name, g in grads.items()}
        result |= _gradients(outputs, cotangents, leaves) | written
    dtypes = {DTYPE + name: torch.tensor([_DTYPES.index(o.dtype)], dtype=torch.int64) for name, o in result.items() if name.startswith("output")}
    wide = {name: t.detach().to("cpu", _wide(t.dtype)) for name, t in {**result, **dtypes}.items()}
    return Results({FORM + form_of(returned): torch.ones(1, dtype=torch.float32), **wide})


def _gradients(outputs: list[Tensor], cotangents: list[Tensor], leaves: Mapping[str, Tensor], retain: bool = False) -> dict[str, Tensor]:
    loss = sum((o * c).sum() for o, c in zip(outputs, cotangents, strict=True))
    tensors = list(leaves.values())
    grads = torch.autograd.grad(loss, tensors, allow_unused=True, retain_graph=retain) if outputs and leaves else [None] * len(leaves)
    return {name: torch.zeros_like(leaf) if g is None else g for (name, leaf), g in zip(leaves.items(), grads, strict=True)}


def returned_tensors(returned: Any) -> dict[str, Tensor]:
    """Every tensor in what a module returned, by name: ``output``, or ``output 0``, ``output 1``, … in order."""
    tensors = [leaf for leaf in _leaves(returned) if isinstance(leaf, Tensor)]
    return {f"output {i}" if len(tensors) > 1 else "output": t for i, t in enumerate(tensors)}


def form_of(returned: Any) -> str:
    """The structure of what a module returned, with the shapes of tensors and all values that are plain: ``(tensor [3, 4], None)``."""
    if isinstance(returned, Tensor):
        detached = returned.is_floating_point() and torch.is_grad_enabled() and not returned.requires_grad
        return f"tensor {list(returned.shape)}{' without gradient' if detached else ''}"
    if isinstance(returned, (type(None), bool, int, float, str)):
        return repr(returned)
    parts = _parts(returned)
    if parts is None:
        return type(returned).__name__
    inside = ", ".join(form_of(part) if name is None else f"{name}={form_of(part)}" for name, part in parts)
    if type(returned) in (tuple, list):
        left, right = "()" if type(returned) is tuple else "[]"
        return f"{left}{inside}{',' if len(parts) == 1 and left == '(' else ''}{right}"
    return f"{type(returned).__name__}({inside})"


def _parts(value: Any) -> list[tuple[str | None, Any]] | None:
    """What a structure holds, with names where it has them; None for what is no structure."""
    if isinstance(value, Mapping):
        return [(str(key), part) for key, part in value.items()]
    if isinstance(value, (tuple, list)):
        return [(None, part) for part in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    return None


def _leaves(value: Any) -> Iterator[Any]:
    parts = None if isinstance(value, Tensor) else _parts(value)
    if parts is None:
        yield value
    for _, part in parts or ():
        yield from _leaves(part)


@contextmanager
def torch_formulas(module: nn.Module, forward: Callable[..., Any] | None = None) -> Iterator[Callable[..., Any]]:
    """While this is entered, a module computes in torch what its family leaves to mamba_ssm, causal_conv1d or flash-linear-attention otherwise.

    Those run on a GPU only, and it is the torch formula that defines the family. transformers binds the library's function when a
    family's module is imported, and goes round it for ``torch.export``: all functions that it wraps so ask one function whether they are
    exported, under a name of their module. So this module's methods are exchanged for copies that are told so; nobody else's are.

    Args:
        module: a replica, which nobody else runs meanwhile.
        forward: called as ``forward(module, ...)``; None: the module's own.

    Returns:
        What to call, as ``forward(module, ...)``.
    """
    memory = vars(module).setdefault(_COPIES, {})  # a trial calls its modules many times
    with _IN_TORCH.within(module, *([] if forward is None else [forward]), memory=memory) as copied:
        yield copied[0] if copied else lambda module, *args, **kwargs: module.forward(*args, **kwargs)


def eager_forward(module: nn.Module) -> Callable[..., Any]:
    """The innermost forward of a module's class, underneath decorators that dispatch elsewhere: what defines the family."""
    return inspect.unwrap(original_class(module).forward)


def differences(reference: Mapping[str, Tensor], ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor] | None = None) -> list[Difference]:
    """Compares results of `run`: in fp32 with the fixed limit, in low precision (`theirs` given) with the family's own error.

    What is returned in another structure, or in another dtype than the family's own code returns it, is one row with an infinite error.
    """
    rows = [_unlike(f"{name}, not {_form(ours).removeprefix(FORM)}", None) for name in reference if name.startswith(FORM) and name not in ours]
    of_another_form = bool(rows)
    for what, truth in reference.items():
        if what.startswith(DTYPE):
            own, other = (theirs or reference)[what], ours[what]
            if not torch.equal(own, other):
                rows.append(_unlike(what + f" ({_dtype(other)}, not {_dtype(own)})", None if theirs is None else 0.0))
            continue
        if what.startswith(FORM) or of_another_form and what not in ours:
            continue
        error = _relative(ours[what], truth)
        if theirs is None:
            rows.append(Difference(what, error, None, FP32_LIMIT))
        else:
            own = _relative(theirs[what], truth)
            rows.append(Difference(what, error, own, max(LOW_PRECISION_FACTOR * own, FP32_LIMIT)))
    return rows


def arbitrated(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor], in_double: Callable[[], Mapping[str, Tensor]]) -> tuple[list[Difference], str]:
    """Compares results in fp32; where they are too far apart, a run of the family's code in float64 says whose error it is.

    A sum of many numbers that cancel is off in fp32, whoever computes it. So where the fixed limit is missed, the three-way rule holds as in
    low precision, with float64 as the truth.

    Args:
        theirs: of `run`, the family's own code in fp32.
        ours: the same of what is tried.
        in_double: makes the results of the family's own code in float64, see `run_in_double`; called only if something missed.

    Returns:
        One row for each result, and in words for which of them float64 has shown that the family's own fp32 is to blame; empty if for none.
    """
    rows = differences(theirs, ours)
    missed = [row.what for row in rows if not row.ok]
    if not missed:
        return rows, ""
    try:
        exact = {row.what: row for row in differences(in_double(), ours, theirs)}
    except Exception as error:  # a family's code may fail in any way in a precision that it was not made for
        return rows, f"its own code cannot run in float64, which would say whose error it is ({in_words(error)})"
    rows = [row if row.ok else exact.get(row.what, row) for row in rows]
    settled = [f"{row.what} {row.theirs:.1e} and {row.ours:.1e}" for row in rows if row.ok and row.what in missed]
    return rows, f"compared with float64, where the family's own fp32 and this are off by: {'; '.join(settled)}" if settled else ""


def run_in_double(module: nn.Module, call: Call, *, forward: Callable[..., Any] | None = None) -> dict[str, Tensor]:
    """`run` of a module whose weights are float64, with its inputs in float64, and without the casts to fp32 in its code."""
    with _InDouble():
        return run(module, call.mapped(Tensor.double), forward=forward)


class _InDouble(TorchFunctionMode):
    """Where code asks for fp32 it gets float64. Of this thread, while it is entered."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        wide = [torch.float64 if arg is torch.float32 else arg for arg in args]
        named = {key: torch.float64 if arg is torch.float32 else arg for key, arg in (kwargs or {}).items()}
        return (Tensor.double if func is Tensor.float else func)(*wide, **named)


def _unlike(what: str, theirs: float | None) -> Difference:
    return Difference(what, math.inf, theirs, FP32_LIMIT)


def _form(results: Mapping[str, Tensor]) -> str:
    return next((name for name in results if name.startswith(FORM)), "nothing")


def _dtype(code: Tensor) -> str:
    number = code.flatten()[0].item()
    return "none" if math.isnan(number) else str(_DTYPES[int(number)]).removeprefix("torch.")


def inject(module: nn.Module, injections: Mapping[str, tuple[type[Patched], object]]) -> nn.Module:
    """Patches a replica in place (there is nothing to undo on a replica). `injections` are those of a `Kind`."""
    for name, (mixin, state) in injections.items():
        InjectClass(module.get_submodule(name), mixin, state).do()
    return module


def _cotangent(output: Tensor, generator: torch.Generator) -> Tensor:
    # Backends that have a loss's gradients before its cotangent would round them twice for any other number.
    return torch.ones_like(output) if output.numel() == 1 else torch.randn(output.shape, generator=generator, dtype=torch.float32).to(output)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """fp32 or wider; numbers of experts and the like stay whole in fp64."""
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point or dtype.is_complex else torch.float64


def _is_floating(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _relative(value: Tensor, truth: Tensor) -> float:
    if value.shape != truth.shape:
        return float("inf")
    # In fp32 the squares of large numbers overflow, and everything would be near enough.
    scale = torch.linalg.vector_norm(truth, dtype=torch.float64).item()
    error = torch.linalg.vector_norm(value - truth, dtype=torch.float64).item()
    return error / scale if scale else error

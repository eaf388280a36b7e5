"""The second witness: whether a module and its patched twin, equal on ordinary numbers, are equal wherever the module may be different.

Calls of other kinds come first: one token, many, all for one expert, large numbers and tiny ones, in training and not. Each is compared as
a whole, with what it changes on the module. Meanwhile every operator with a threshold is written down (see `recorder`). Where some number
was on each side of it, the comparison has settled it. Where not, inputs and weights are scaled until one is; if none gets there, the module
is not taken, and the operator is the reason.

torch.fx would show the same operators, but stops at loops over the experts that were hit, which most families have; what is dispatched shows
them there, too.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from .. import trial
from ..kind import Kind
from ..trial import Call
from .circumstances import branch_objection, graded_objection, in_dtype
from .functions import numbers_in, reached_from
from .recorder import Key, Recorder, Sides, is_step
from .state import changes, state_of, unlike

#: How many tokens are tried. Limits of capacity and branches on the length lie between two of them, or the code names them.
_TOKENS = (1, 2, 3, 4, 5, 6, 7, 48, 600, 4200)
_FACTORS = (30.0, 1e-3)
#: Numbers in the code above this one may be counts of tokens.
_LEAST = 7
#: The largest input, in numbers.
_MOST_NUMBERS = 2**20
#: The most that a call may cost, in multiplications by weights: few modules cannot be tried at a smaller size.
_MOST_WORK = 2**32
#: By which inputs and weights are multiplied, one at a time, in search of the other side of a threshold.
_REACH = (10.0, -1.0, 1e-2, 1e3, 1e-5, 1e5, 0.0, 1e-9, -1e3)
#: The same in search of what a smooth function cuts off.
_LARGE = (1e3, 1e5)
_BENDS = frozenset("atan erf erfc log_sigmoid_forward mish sigmoid softplus tanh".split())
#: Two runs in fp64 that differ by more than this compute different things.
_FP64_LIMIT = 1e-9


class Objection(str):
    """Why a module is not taken though it computes the same of ordinary numbers."""


@dataclass
class Witness:
    """A scale model and its patched twin.

    Attributes:
        original, twin: of the same size and with the same weights.
        forward: the family's, called as ``forward(original, ...)``.
        theirs, ours: thresholds that each has met; None: nobody asks for them.
    """

    original: nn.Module
    twin: nn.Module
    forward: Callable[..., Any]
    theirs: dict[Key, Sides] | None = field(default_factory=dict)
    ours: dict[Key, Sides] | None = field(default_factory=dict)

    def objection(self, calls: Iterator[tuple[str, Call, bool]]) -> Objection | None:
        """What is different between the two, in words; None if nothing is.

        Args:
            calls: with what is special about each, and whether it is tried in evaluation, too; the first is an ordinary one.
        """
        ordinary = None
        for what, call, evaluation in calls:
            ordinary = ordinary or call
            for training in (False, True) if evaluation else (True,):
                reason = self.unlike(call, training)
                if reason is not None:
                    return Objection(f"{what}{' ' if what else ''}in {'training' if training else 'evaluation'} {reason}{self._likely()}")
        return self._thresholds(ordinary) or self._otherwise(ordinary)

    def _otherwise(self, call: Call) -> Objection | None:
        """What is different under other circumstances."""
        pair = (self.original, self.forward), (self.twin, type(self.twin).forward)
        with torch.inference_mode():
            reason = self.unlike(call, False)
        if reason is not None:
            return Objection(f"in inference mode {reason}")
        reason = self._saturated(call) or graded_objection(*pair, call, words_of) or branch_objection(*pair[0], call)
        return None if reason is None else Objection(reason)

    def _saturated(self, call: Call) -> str | None:
        """What is different with large weights and inputs, if the family's code alone has a function that bends them only then."""
        bends = [_bends(module, forward, call) for module, forward in ((self.original, self.forward), (self.twin, type(self.twin).forward))]
        more = sorted(op for op, count in bends[0].items() if count > bends[1][op])
        for what, changed in self._reaches(call, _LARGE) if more else ():
            with changed as scaled:
                reason = self.unlike(scaled, True)
            if reason is not None:
                return f"{what} {reason} (its forward alone has aten.{more[0]})"
        return None

    def _likely(self) -> str:
        """The thresholds that only the family's code has, in words."""
        named = [str(key) for key in self.theirs if key not in self.ours]
        return f" (its forward alone has {', '.join(named[:3])})" if named else ""

    def trace(self, call: Call) -> tuple | None:
        """What the family's code runs in an ordinary call, in training and not; None if that cannot be had."""
        found = []
        for training in (False, True):
            recorder = Recorder(traced=True)
            args, kwargs = tree_map(_copied, (call.args, dict(call.kwargs)))
            try:
                with torch.no_grad(), trial.torch_formulas(self.original, self.forward) as forward, recorder:
                    forward(self.original.train(training), *args, **kwargs)
            except Exception:  # then there is nothing to tell modules apart by
                return None
            found += recorder.trace
        return tuple(found)

    def unlike(self, call: Call, training: bool, must_run: bool = False) -> str | None:
        """How the results of one call differ, in words. What the family's code does not take is no difference unless it `must_run`."""
        pair = (self.original.train(training), self.forward), (self.twin.train(training), type(self.twin).forward)
        try:
            theirs = _called(*pair[0], call, self.theirs)
        except Exception as error:  # not every family takes every call
            return f"its own code cannot be run ({type(error).__name__})" if must_run else None
        try:
            ours = _called(*pair[1], call, self.ours)
        except Exception as error:  # a wrong reading may fail in any way
            return f"it cannot be run when it is patched ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
        reason, error = _difference(theirs, ours)
        return None if reason is None or error < math.inf and _is_rounding(*pair, call, error) else reason

    def _thresholds(self, call: Call) -> Objection | None:
        """The first threshold of the family's that no trial passes."""
        for what, changed in itertools.chain([("", None)], self._reaches(call)):
            if not self._open():
                return None
            if changed is None:
                continue
            with changed as scaled:
                for training in (False, True):
                    reason = self._if_it_shows(scaled, training)
                    if reason is not None:
                        return Objection(f"{what} in {'training' if training else 'evaluation'} {reason}")
        found = self._open()
        return Objection(_words(*found[0])) if found else None

    def _if_it_shows(self, call: Call, training: bool) -> str | None:
        """As `unlike`, but only where the call passes a threshold that none has passed."""
        seen: dict[Key, Sides] = {}
        try:
            _called(self.original.train(training), self.forward, call, seen)
        except Exception:  # not every family takes every number
            return None
        for key, sides in self._open():
            together = Sides(sides.below, sides.above)
            together.add(seen.get(key, Sides()))
            if together.both:
                return self.unlike(call, training)
        return None

    def _open(self) -> list[tuple[Key, Sides]]:
        """The family's thresholds that were seen from one side only, and that the twin does not have at the same place."""
        return [(key, sides) for key, sides in self.theirs.items() if (is_step(key) or not sides.both) and not _is_same(sides, self.ours.get(key))]

    def _reaches(self, call: Call, factors: tuple[float, ...] = _REACH) -> Iterator[tuple[str, Any]]:
        """Calls with one input or one weight multiplied, and words for it."""
        parameters = [name for name, p in self.original.named_parameters() if p.is_floating_point()]
        for factor in factors:
            for i in range(len(call.leaves())):
                yield f"with input {i} × {factor:g}", _Scaled(self, call, i, None, factor)
            for name in parameters:
                yield f"with {name} × {factor:g}", _Scaled(self, call, None, name, factor)


@dataclass
class _Scaled:
    """While it is entered, a parameter of both modules, or an input of the call that it gives, is multiplied."""

    witness: Witness
    call: Call
    leaf: int | None
    parameter: str | None
    factor: float
    kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __enter__(self) -> Call:
        if self.parameter is None:
            return scaled(self.call, self.factor, self.leaf)
        for module in (self.witness.original, self.witness.twin):
            tensor = module.get_parameter(self.parameter).data
            self.kept.append((tensor, tensor.clone()))
            tensor.mul_(self.factor)
        return self.call

    def __exit__(self, *error) -> None:
        for tensor, before in self.kept:
            tensor.copy_(before)


def scaled(call: Call, factor: float, leaf: int | None = None) -> Call:
    """The call with one of its floating inputs multiplied, or with the first."""
    target = call.leaves()[leaf or 0]
    return call.mapped(lambda t: t * factor if t is target else t)


def moved(call: Call) -> Call:
    """The call with 3 added to the first floating input."""
    target = call.leaves()[0]
    return call.mapped(lambda t: t + 3 if t is target else t)


def repeated(call: Call, sequences: int) -> Call:
    """The call with another number of sequences, every one a little different. Tokens tell how many there are; tables may be the same for all."""
    batch, generator = call.leaves()[0].shape[0], torch.Generator().manual_seed(0)

    def more(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.ndim < 2 or leaf.shape[0] != batch:
            return leaf
        leaf = leaf.index_select(0, torch.arange(sequences) % batch)
        return leaf * (1 + 0.1 * torch.randn(leaf.shape, generator=generator, dtype=torch.float32)) if leaf.is_floating_point() else leaf

    args, kwargs = tree_map(more, (call.args, dict(call.kwargs)))
    return Call(args, kwargs, call.constants)


def one_sequence(call: Call, tokens: int) -> Call:
    """The call with one sequence of another length, every token a little different."""
    (batch, length), generator = call.leaves()[0].shape[:2], torch.Generator().manual_seed(0)

    def other(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.shape[:2] != (batch, length):
            return leaf
        leaf = leaf[:1].index_select(1, torch.arange(tokens) % length)
        return leaf * (1 + 0.1 * torch.randn(leaf.shape, generator=generator, dtype=torch.float32)) if leaf.is_floating_point() else leaf

    args, kwargs = tree_map(other, (call.args, dict(call.kwargs)))
    return Call(args, kwargs, call.constants)


def strided(call: Call) -> Call:
    """The call with the numbers of the first floating input in another order in memory."""
    target = call.leaves()[0]
    return call.mapped(lambda t: t.transpose(0, -1).contiguous().transpose(0, -1) if t is target else t)


def regimes(kind: Kind, spec: Any, call: Call, module: nn.Module, generator: torch.Generator) -> Iterator[tuple[str, Call, bool]]:
    """Calls of every kind for `Witness.objection`, the ordinary one first."""
    device = torch.device("cpu")
    yield "", call, True
    for what, other in kind.regimes(spec, torch.float32, device, generator):
        yield what, other, True
    for factor in _FACTORS if call.leaves() else ():
        yield f"with inputs × {factor:g}", scaled(call, factor), False
    if call.leaves():
        yield "with inputs that have a mean", moved(call), False
        yield "with an input that is laid out otherwise", strided(call), False
    if call.leaves() and call.leaves()[0].ndim > 2:
        yield "with 5 sequences", repeated(call, 5), True
    if call.leaves() and call.leaves()[0].ndim > 2:
        per_token = max(1, max(leaf.numel() for leaf in call.leaves()) // math.prod(call.leaves()[0].shape[:-1]))
        for tokens in lengths_named(module, min(kind.most_tokens, _MOST_NUMBERS // per_token)):
            yield f"with one sequence of {tokens} tokens", one_sequence(call, tokens), False
    if kind.bench is not None:
        per_token = max(leaf.numel() for leaf in kind.bench(spec, torch.float32, device, generator, 2).leaves()) // 2
        counts = counts_of_tokens(module, min(kind.most_tokens, _MOST_NUMBERS // per_token))
        for tokens in counts:
            call = kind.bench(spec, torch.float32, device, generator, tokens)
            yield f"with {tokens} token{'s' if tokens > 1 else ''}", call, tokens in (1, counts[-1])


def counts_of_tokens(module: nn.Module, most: int) -> list[int]:
    """Few and many, and those that the code or the attributes of a module may mean, and one more of each; none above `most` or too costly."""
    most = min(most, _MOST_WORK // max(1, sum(p.numel() for p in module.parameters())))
    found: set[int] = set()
    for part in module.modules():
        # Smaller attributes are widths, as a rule, and the usual counts of tokens lie around them.
        found |= {value for value in vars(part).values() if type(value) is int and value > _TOKENS[-2]}
        found |= {number for function in reached_from(part) for number in numbers_in(function) if number > _LEAST}
    large = sorted(number for number in found if number < most)
    return sorted({tokens for tokens in _TOKENS if tokens <= most} | {n for number in large[:8] for n in (number, number + 1)})


def lengths_named(module: nn.Module, most: int) -> list[int]:
    """The counts of tokens that the code or the attributes of a module may mean, and one more of each."""
    return [count for count in counts_of_tokens(module, most) if count not in _TOKENS]


@dataclass
class _Outcome:
    """What one call gave and did: the structure of what was returned, its tensors and the inputs as they are now, what changed on the module."""

    form: str
    tensors: dict[str, Tensor]
    changes: dict[str, Any]


def _called(module: nn.Module, forward: Callable[..., Any], call: Call, sites: dict[Key, Sides] | None) -> _Outcome:
    """One call without gradients. Its thresholds are added to `sites` if it succeeds and there are such."""
    args, kwargs = tree_map(_copied, (call.args, dict(call.kwargs)))
    before, recorder = state_of(module), None if sites is None else Recorder()
    with torch.no_grad(), trial.torch_formulas(module, forward) as run, recorder or contextlib.nullcontext():
        returned = run(module, *args, **kwargs)
    for key, sides in recorder.sites.items() if recorder is not None else ():
        sites.setdefault(key, Sides()).add(sides)
    inputs = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    given = [leaf for leaf in tree_flatten((call.args, dict(call.kwargs)))[0] if isinstance(leaf, Tensor)]
    written = {f"input {i}": now for i, (was, now) in enumerate(zip(given, inputs, strict=True)) if not torch.equal(was, now)}
    return _Outcome(trial.form_of(returned), {**trial.returned_tensors(returned), **written}, changes(before, state_of(module)))


def _bends(module: nn.Module, forward: Callable[..., Any], call: Call) -> Counter[str]:
    """How often a call has each of the functions that go flat somewhere; none if it cannot be run."""
    recorder = Recorder(traced=True)
    args, kwargs = tree_map(_copied, (call.args, dict(call.kwargs)))
    try:
        with torch.no_grad(), trial.torch_formulas(module, forward) as run, recorder:
            run(module.train(), *args, **kwargs)
    except Exception:  # not every family takes every call
        return Counter()
    names = (func._schema.name.removeprefix("aten::").rstrip("_") for func, *_ in recorder.trace)
    return Counter(name for name in names if name in _BENDS)


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _difference(theirs: _Outcome, ours: _Outcome) -> tuple[str | None, float]:
    """How two outcomes differ, in words, and by how much; infinite where it is no matter of rounding."""
    if theirs.form != ours.form:
        return f"it returns {theirs.form}, not {ours.form}", math.inf
    changed = unlike(theirs.changes, ours.changes)
    if changed is not None:
        return changed, math.inf
    if theirs.tensors.keys() != ours.tensors.keys():
        (name,) = list(theirs.tensors.keys() ^ ours.tensors.keys())[:1]
        return f"it changes its {name} in place" + ("" if name in theirs.tensors else " when it is patched"), math.inf
    for name, truth in theirs.tensors.items():
        value = ours.tensors[name]
        if value.dtype != truth.dtype:
            return f"{name} is {truth.dtype}, not {value.dtype}".replace("torch.", ""), math.inf
        error = relative(value, truth)
        if not error <= trial.FP32_LIMIT:
            return f"{name} differs by {error:.1e} relative", error
    return None, 0.0


def relative(value: Tensor, truth: Tensor) -> float:
    """As for trials, but what is infinite or not a number in both is equal, and where the truth is all 0 nothing else is small."""
    if torch.equal(value, truth):
        return 0.0
    value, truth = (t if t.is_floating_point() or t.is_complex() else t.double() for t in (value, truth))
    scale, error = (torch.linalg.vector_norm(t).item() for t in (truth, value - truth))
    if math.isfinite(scale) and math.isfinite(error):
        return error / (scale or error)
    same = (value == truth) | (value.isnan() & truth.isnan())
    if not bool((same | value.isfinite() & truth.isfinite()).all()):
        return math.inf
    apart = ~same
    scale, error = (torch.linalg.vector_norm(t.double()).item() for t in (truth[truth.isfinite()], value[apart] - truth[apart]))
    return error / scale if scale else error


def _is_rounding(theirs: tuple, ours: tuple, call: Call, error: float) -> bool:
    """Whether fp64 brings together what fp32 has apart. Parts that every module computes in fp32 go on rounding, but less counts."""
    wide = call.mapped(lambda t: t.double())
    try:
        outcomes = [_called(in_dtype(module, torch.float64), forward, wide, None) for module, forward in (theirs, ours)]
    except Exception:  # then there is nothing that speaks for it
        return False
    if _difference(*outcomes)[0] is not None:
        return False
    return max(relative(outcomes[1].tensors[name], truth) for name, truth in outcomes[0].tensors.items()) <= max(_FP64_LIMIT, error / 30)


def _is_same(theirs: Sides, ours: Sides | None) -> bool:
    """Whether the twin has met the same threshold with the same numbers."""
    if ours is None:
        return False
    return all(a == b or abs(a - b) <= 1e-3 * max(abs(a), abs(b)) for a, b in ((theirs.low, ours.low), (theirs.high, ours.high)))


def words_of(rows: list[trial.Difference]) -> str | None:
    """The worst of the rows that are not within their limits, as the end of a sentence; None if all are."""
    worst = max(rows, key=lambda d: (d.what.endswith(trial.UNASKED) and not d.ok, math.inf if math.isnan(d.ours) else d.ours))
    if worst.ok:
        return None
    if worst.what.endswith(trial.UNASKED):
        name = worst.what.removesuffix(trial.UNASKED).removeprefix("grad ")
        return f"its backward adds a loss of its own (the gradient of {name} is not 0{trial.UNASKED})"
    if worst.what.startswith(trial.FORM):
        return f"it {worst.what}"
    if worst.what.startswith(trial.WRITTEN):
        return f"it changes its {worst.what.removeprefix('written ')} in place"
    return worst.what if math.isinf(worst.ours) and worst.what.startswith(trial.DTYPE) else f"{worst.what} differs by {worst.ours:.1e} relative"


def _words(key: Key, sides: Sides) -> str:
    """Why a threshold stands in the way."""
    if is_step(key):
        return f"its forward does something that no trial settles ({key})"
    return f"its forward has a threshold that no trial passes ({key}: all of its numbers lie from {sides.low:.3g} to {sides.high:.3g})"

"""What the modules that moepatch patches read when their family's forward runs, and whether a patched model notices that it has changed.

    python tests/read_values.py [family ...]

What is read is seen while a plain model runs, and not asked of moepatch: attributes and children of modules, values of configurations,
functions of the family's file. Each is then changed in a plain model and in a patched one: numbers are scaled, flags flipped, functions and
activations are others. The patched model has to do what plain does: the same result, or an error where plain has one. An error in
moepatch's own words will do where the family's code cannot take over.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import compare
import torch
import zoo
from torch import nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedConfig

import moepatch
from moepatch.surgery import Patched, original_class

_OWN = frozenset(vars(nn.Module())) | {"forward", "config"}
#: What decides how a call is made, and not what it computes.
_NOT_VALUES = frozenset("gradient_checkpointing _can_checkpoint_with_cache layer_idx".split())


@dataclass(frozen=True)
class Read:
    """One thing that was read.

    Attributes:
        kind: ``attribute``, ``child``, ``config``, ``function`` or ``forward``.
        owner: the name of the class or of the file.
        name: of the thing.
    """

    kind: str
    owner: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.owner}.{self.name}"


class Spy:
    """Writes down what is read while modules of the given names run.

    Args:
        model: a plain one, whose classes are exchanged meanwhile.
        inside: names of modules.
    """

    def __init__(self, model: nn.Module, inside: set[str]):
        self.model, self.inside = model, inside
        self.found: dict[Read, list[Any]] = {}
        self.depth = 0

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """While this is entered, reads are written down."""
        parts = dict(self.model.named_modules())
        inner = {id(m): m for fqn in self.inside for m in parts[fqn].modules()}
        configs = {id(c): c for m in parts.values() for c in vars(m).values() if isinstance(c, PreTrainedConfig)}
        handles = [h for fqn in self.inside for h in self._around(parts[fqn])]
        before = [(thing, thing.__class__) for thing in (*inner.values(), *configs.values())]
        for thing, cls in before:
            object.__setattr__(thing, "__class__", self._spying(cls))
        sys.setprofile(self._profile)
        try:
            yield
        finally:
            sys.setprofile(None)
            for thing, cls in before:
                object.__setattr__(thing, "__class__", cls)
            for handle in handles:
                handle.remove()

    def _around(self, module: nn.Module) -> list:
        def enter(*_):
            self.depth += 1

        def leave(*_):
            self.depth -= 1

        return [module.register_forward_pre_hook(enter, prepend=True), module.register_forward_hook(leave, always_call=True)]

    def _spying(self, cls: type) -> type:
        def read(thing, name):
            if self.depth and not name.startswith("__") and name not in _OWN | _NOT_VALUES:
                self._note(thing, cls, name)
            return super(made, thing).__getattribute__(name)

        made = type(cls.__name__, (cls,), {"__getattribute__": read, "__module__": cls.__module__})
        return made

    def _note(self, thing: Any, cls: type, name: str) -> None:
        plain = object.__getattribute__(thing, "__dict__")
        if isinstance(thing, PreTrainedConfig):
            name = cls.attribute_map.get(name, name)
            if name in plain and not name.startswith("_"):
                self.found.setdefault(Read("config", cls.__name__, name), [])
        elif name in plain:
            self.found.setdefault(Read("attribute", cls.__name__, name), [])
        elif name in plain["_modules"]:
            self.found.setdefault(Read("child", cls.__name__, name), [])

    def _profile(self, frame, event, _):
        if event == "call" and self.depth and frame.f_globals.get("__name__", "").startswith("transformers.models."):
            name = frame.f_code.co_name
            if isinstance(frame.f_globals.get(name), FunctionType):
                self.found.setdefault(Read("function", frame.f_globals["__name__"], name), [])


def patched_names(model: nn.Module) -> set[str]:
    """Names of the modules in a patched model whose forward is moepatch's."""
    return {name for name, m in model.named_modules() if isinstance(m, Patched) and m._moepatch_watch is not None}


def reads(name: str, plain: nn.Module, patched: nn.Module) -> list[Read]:
    """What the modules that are patched in the one model read in the other when it runs."""
    inside = patched_names(patched)
    spy = Spy(plain, inside)
    with spy.watching():
        run(name, plain)
    classes = {type(plain.get_submodule(fqn)).__name__ for fqn in inside}
    return [*spy.found, *(Read("forward", cls, "forward") for cls in sorted(classes))]


def run(name: str, model: nn.Module) -> torch.Tensor:
    """The first result of a forward pass, without loss."""
    torch.manual_seed(0)  # some families draw noise in their forward
    inputs = {key: value for key, value in zoo.inputs(name, model).items() if key != "labels"}
    with torch.no_grad():
        return zoo.first_float(model(**inputs)).float()


def other(value: Any) -> Any:
    """Something else of the same sort; the value itself where nothing is known."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value * 1.5 + 0.01
    if isinstance(value, nn.Module):
        return nn.Tanh() if next(value.parameters(), None) is None else nn.Identity() if "Norm" in type(value).__name__ else Wrapped(value)
    if isinstance(value, FunctionType) or callable(value) and not isinstance(value, type):
        return scaled(value)
    if isinstance(value, (tuple, list)) and len(value) > 1:
        return type(value)(reversed(value))
    return value


class Wrapped(nn.Module):
    """A module around another one, as adapters are, whose result is a little larger."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        """See the class."""
        return scaled(self.inner)(*args, **kwargs)


def scaled(function: Callable) -> Callable:
    """A function whose floating results are a little larger."""

    def made(*args, **kwargs):
        return tree_map(lambda t: t * 1.25 if isinstance(t, torch.Tensor) and t.is_floating_point() else t, function(*args, **kwargs))

    return made


@contextlib.contextmanager
def changed(read: Read, models: list[nn.Module]) -> Iterator[bool]:
    """While this is entered, what was read is something else in all models. False if there is nothing else."""
    holders = [holder for model in models for holder in _holders(read, model)]
    if read.kind in ("function", "forward"):
        holders = list({id(h): h for h in holders}.values())
    before = [getattr(holder, read.name) for holder in holders]
    with contextlib.ExitStack() as stack:
        for holder, value in zip(holders, before, strict=True):
            stack.callback(setattr, holder, read.name, value)
            setattr(holder, read.name, other(value))
        yield any(getattr(holder, read.name) is not value for holder, value in zip(holders, before, strict=True))


def _holders(read: Read, model: nn.Module) -> list[Any]:
    if read.kind == "function":
        return [sys.modules[read.owner]]
    parts = [(m, original_class(m)) for m in model.modules()]
    if read.kind == "config":
        configs = {id(c): c for m, _ in parts for c in vars(m).values() if isinstance(c, PreTrainedConfig) and type(c).__name__ == read.owner}
        return list(configs.values())
    found = [(m, next((c for c in cls.__mro__ if c.__name__ == read.owner), None)) for m, cls in parts]
    if read.kind == "forward":
        return [cls for _, cls in found if cls is not None]
    return [m for m, cls in found if cls is not None and (read.name in vars(m) or read.name in m._modules)]


@dataclass(frozen=True)
class Outcome:
    """What a change did to a patched model: ``as plain``, ``no effect``, ``as plain: error``, ``in words``; or ``IGNORED`` or ``WRONG``. ``no error``:
    plain raises, and the patched model gives what it gave before, because it takes from its tensors what plain takes from the attribute."""

    read: Read
    what: str
    detail: str = ""

    @property
    def ok(self) -> bool:
        """Whether it was noticed."""
        return not self.what.isupper()


def tried(name: str, read: Read, plain: nn.Module, patched: nn.Module, usual: torch.Tensor) -> Outcome | None:
    """What becomes of one change; None if there is nothing to change."""
    with changed(read, [plain, patched]) as any_change:
        if not any_change:
            return None
        results = []
        for model in (plain, patched):
            try:
                results.append(run(name, model))
            except Exception as error:
                results.append(error)
    theirs, ours = results
    if isinstance(ours, moepatch.MoePatchError):
        return Outcome(read, "in words", str(ours))
    if isinstance(theirs, Exception):
        as_before = isinstance(ours, torch.Tensor) and ours.shape == usual.shape and compare.error(ours, usual) < 1e-5
        what = "as plain: error" if isinstance(ours, Exception) else "no error" if as_before else "WRONG"
        return Outcome(read, what, f"plain raises {theirs!r:.80}")
    if isinstance(ours, Exception):
        return Outcome(read, "WRONG", f"{ours!r:.200}")
    if theirs.shape != ours.shape:
        return Outcome(read, "WRONG", f"{list(ours.shape)}, not {list(theirs.shape)}")
    if torch.equal(theirs.isfinite(), ours.isfinite()):
        theirs, ours = (torch.nan_to_num(t, 0.0, 0.0, 0.0) for t in (theirs, ours))
    moved = compare.error(theirs, usual) if theirs.shape == usual.shape else 1.0
    error = compare.error(ours, theirs)
    if error <= max(2e-4, 0.01 * moved):
        return Outcome(read, "as plain" if moved > 1e-4 else "no effect", f"moved {moved:.1e}, off {error:.1e}")
    return Outcome(read, "IGNORED" if moved > 1e-4 else "WRONG", f"moved {moved:.1e}, off {error:.1e}")


def outcomes(name: str) -> Iterator[Outcome]:
    """Every change of one family."""
    plain = zoo.build(name).eval()
    try:
        patched = moepatch.optimize(copy.deepcopy(plain), verify=False, measure=False)
    except moepatch.MoePatchError:
        return
    usual = run(name, plain)
    for read in reads(name, plain, patched):
        outcome = tried(name, read, plain, patched, usual)
        if outcome is not None:
            yield outcome
    assert compare.error(run(name, patched), usual) < 1e-4, f"{name}: something has stayed changed"


def main(names: list[str]) -> int:
    """Prints a row a family, and what was not noticed; returns how much that was."""
    missed = 0
    for name in names or zoo.FAMILIES:
        if zoo.available(name) is not None:
            print(f"{name:28} not here: {zoo.available(name)}", flush=True)
            continue
        start = time.perf_counter()
        found = list(outcomes(name))
        counts = Counter(outcome.what for outcome in found)
        bad = [outcome for outcome in found if not outcome.ok]
        missed += len(bad)
        print(f"{name:28} {len(found):3} changes: {', '.join(f'{n} {what}' for what, n in counts.items())} ({time.perf_counter() - start:.0f} s)", flush=True)
        for outcome in bad:
            print(f"    {outcome.what}: {outcome.read}: {outcome.detail}", flush=True)
        for outcome in found:
            if outcome.what in ("in words", "no error"):
                print(f"    {outcome.what}: {outcome.read}: {outcome.detail[:160]}", flush=True)
    print(f"{missed} changes were not noticed.")
    return min(missed, 100)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))

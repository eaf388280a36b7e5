"""Verdicts of the second witness, kept for modules that are the same in all that a verdict can depend on.

A model has many layers, and a process may see a model many times: in other dtypes, from other folders, for another task. So of a config only
what was asked of it counts, which copies in its place write down. The layers of a mixer differ in their number, which only a cache asks for;
whether that is so, the operators of an ordinary call tell.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..trial import Call
from .around import around, numbers_of
from .witness import Objection, Witness

_KEPT = 512
#: By what is equal, what was asked of the configs, with the answers, and the verdict.
_VERDICTS: OrderedDict[tuple, list[tuple[dict[tuple[int, str], Any], Objection | None]]] = OrderedDict()
_LOCK = threading.Lock()
_PLAIN = (bool, int, float, str, type(None), torch.dtype)
#: Tells a cache which layer asks.
_INDEX = "layer_idx"
_ABSENT = ("absent",)


def settled(witness: Witness, kind: tuple, call: Call, calls: Callable[[], Iterable[tuple[str, Call, bool]]]) -> Objection | None:
    """The verdict on a module: the one on an equal module, or a new one.

    Args:
        witness: has seen nothing yet.
        kind: what the calls and the twin depend on beside the module.
        call: an ordinary one.
        calls: makes those of `Witness.objection`.
    """
    configs: list[PreTrainedConfig] = []
    key = _key(witness, kind, call, configs)
    with _LOCK:
        kept = list(_VERDICTS.get(key, ()))
        if kept:
            _VERDICTS.move_to_end(key)
    for answers, verdict in kept:
        if all(_answer(configs, *question) == answer for question, answer in answers.items()):
            return verdict
    with _watched((witness.original, witness.twin), configs) as questions:
        verdict = witness.objection(calls())
    answers = {question: _answer(configs, *question) for question in questions}
    if key is not None and None not in answers.values():
        with _LOCK:
            _VERDICTS.setdefault(key, []).append((answers, verdict))
            while len(_VERDICTS) > _KEPT:
                _VERDICTS.popitem(last=False)
    return verdict


def forget_verdicts() -> None:
    """Begins anew."""
    with _LOCK:
        _VERDICTS.clear()


class _Watched:
    """A config's own class comes after this one, which writes down what is asked of it."""

    __slots__ = ()
    moepatch_asked: Callable[[str], None]

    def __init_subclass__(cls, **kwargs):
        """Nothing of what a config does with its subclasses."""

    def __getattribute__(self, name: str) -> Any:
        if name not in ("__class__", "moepatch_asked"):
            type(self).moepatch_asked(name)
        return super().__getattribute__(name)


@contextlib.contextmanager
def _watched(roots: tuple[nn.Module, ...], configs: list[PreTrainedConfig]) -> Iterator[set[tuple[int, str]]]:
    """While this is entered, copies stand in the place of the configs of modules, which must be nobody else's.

    Returns:
        The number of a config and the name of an attribute, for everything that was asked.
    """
    questions: set[tuple[int, str]] = set()
    copies: dict[int, Any] = {}
    for number, config in enumerate(configs):
        cls = type(config)
        described = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
        asked = staticmethod(lambda name, number=number: questions.add((number, name)))
        copies[id(config)] = object.__new__(type(cls)(cls.__name__, (_Watched, cls), {**described, "moepatch_asked": asked}))
    for config in configs:
        own = object.__getattribute__(copies[id(config)], "__dict__")
        own.update({name: copies.get(id(value), value) for name, value in vars(config).items()})
    before = [(part, name, value) for root in roots for part in root.modules() for name, value in vars(part).items() if id(value) in copies]
    try:
        for part, name, value in before:
            part.__dict__[name] = copies[id(value)]
        yield questions
    finally:
        for part, name, value in before:
            part.__dict__[name] = value


def _answer(configs: list[PreTrainedConfig], number: int, name: str) -> tuple | None:
    """What a config says when it is asked for an attribute; None for what cannot be told apart."""
    try:
        value = getattr(configs[number], name)
    except AttributeError:
        return _ABSENT
    if isinstance(value, MethodType) and value.__self__ is configs[number]:
        return (value.__func__,)  # what it asks is written down, too
    number = next((i for i, config in enumerate(configs) if config is value), None)
    return value_of(value, 3) if number is None else (type(value), number)


def _key(witness: Witness, kind: tuple, call: Call, configs: list[PreTrainedConfig]) -> tuple | None:
    """Equal for modules that are, but for what their configs say; None for one that holds what cannot be compared.

    Args:
        configs: gets those that are found.
    """
    trace, original = witness.trace(call), identity(witness.original, configs)
    key = None if trace is None or original is None else (kind, original, trace, around(witness.original))
    try:
        hash(key)
    except TypeError:
        return None
    return key


def identity(module: nn.Module, configs: list[PreTrainedConfig], indexed: bool = False) -> tuple | None:
    """Classes, attributes, shapes, and the same of children; None for what cannot be compared. What is outside of the module, `around` tells.

    Args:
        configs: gets those that are found; each stands for its number among them.
        indexed: with the number of the layer.
    """
    attributes = []
    for name, value in sorted(vars(module).items()):
        if name in ("_parameters", "_buffers", "_modules", "training") or name == _INDEX and not indexed or name.startswith("_moepatch") or "_hooks" in name:
            continue
        found = (type(value), _number(value, configs)) if isinstance(value, PreTrainedConfig) else value_of(value, 3)
        if found is None:
            return None
        attributes.append((name, found))
    children = tuple((name, None if child is None else identity(child, configs, indexed)) for name, child in module._modules.items())
    if any(child is None for name, child in children if module._modules[name] is not None):
        return None
    shapes = tuple(
        (name, None if t is None else (type(t), type(t.data), t.layout, tuple(t.shape), t.dtype))
        for tensors in (module._parameters, module._buffers)
        for name, t in tensors.items()
    )
    return type(module), tuple(attributes), shapes, children


def _number(config: PreTrainedConfig, configs: list[PreTrainedConfig]) -> int:
    """The place of a config in a list, to which it is added, with the configs in it, if it is new."""
    number = next((i for i, known in enumerate(configs) if known is config), len(configs))
    if number == len(configs):
        configs.append(config)
        for _, value in sorted(vars(config).items()):
            if isinstance(value, PreTrainedConfig):
                _number(value, configs)
    return number


def value_of(value: Any, depth: int) -> tuple | None:
    """What is equal for equal values; None for what cannot be told apart."""
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, Tensor):
        return numbers_of(value, 64)
    if isinstance(value, BuiltinFunctionType) or isinstance(value, FunctionType) and value.__closure__ is None or isinstance(value, type):
        return (value,)
    if isinstance(value, (list, tuple)):
        items = [value_of(item, depth) for item in value]
    elif isinstance(value, (set, frozenset)):
        items = [value_of(item, depth) for item in sorted(value, key=repr)]
    elif isinstance(value, dict):
        items = [value_of((str(key), item), depth) for key, item in value.items()]
    elif depth and hasattr(value, "__dict__") and not isinstance(value, nn.Module) and not callable(value):
        items = [value_of((key, item), depth - 1) for key, item in sorted(vars(value).items())]
    else:
        return None
    return None if any(item is None for item in items) else (type(value), *items)

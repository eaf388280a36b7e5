"""Scale models of attention modules that write down how they call the attention function and the cache.

The attention function that writes is registered with transformers under a name of moepatch's own; a scale model gets a copy of its config
that asks for it.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from .. import trial
from ..kind import Kind
from ..layers.attention_block import AttentionBlockSpec, attention_functions
from ..replica import random_fill, replica
from ..surgery import original_class
from ..trial import Call
from .attention_witness import attention_objection

_RECORDER = "moepatch_recorder"
#: Makes a limit that clamps projections show.
_LOUD = 100.0
_SEQUENCE = 6


@functools.cache
def _register_recorder() -> None:
    AttentionInterface.register(_RECORDER, _record)


def _record(module, query, key, value, attention_mask, **kwargs):
    """The family's eager attention without dropout; what it is given is kept on the module."""
    module._moepatch_given.append({"query": query, "key": key, "value": value, "attention_mask": attention_mask, **kwargs})
    _, eager = attention_functions(original_class(module))
    return eager(module, query, key, value, attention_mask, **{**kwargs, "dropout": 0.0})


class _Cache:
    """Writes down how it is updated and doubles what it is given."""

    def __init__(self):
        self.given = []

    def update(self, key, value, *args, **kwargs):
        self.given.append((args, kwargs))
        return torch.cat([key, key], 2), torch.cat([value, value], 2)


@dataclass
class Subject:
    """A scale model in the family's own code, and what it did.

    Attributes:
        module: the scale model.
        kind: how its twins are patched.
        call: an ordinary call, of a module in training.
        results: outputs and gradients of that call.
        given: what its attention function was given: in that call, in a loud one, and in evaluation with a cache.
        objection: what a second witness found in the twin that was equal last, if anything.
    """

    module: nn.Module
    kind: Kind
    call: Call
    results: dict[str, Tensor]
    given: list[dict[str, Any]]
    objection: str | None = None

    @classmethod
    def made(cls, module: nn.Module, sizes: dict[int, int], called: Callable[[torch.Generator], Call], kind: Kind) -> Subject | None:
        """None if the family's code cannot be run at these sizes with what `called` makes."""
        _register_recorder()
        generator = torch.Generator().manual_seed(0)
        model = replica(module, sizes, random_fill(generator))
        for name in [name for name, value in vars(model).items() if type(value) is float and "dropout" in name]:
            setattr(model, name, 0.25)
        model.config = copy.copy(module.config)
        model.config._attn_implementation_internal = _RECORDER
        if "attention_dropout" in vars(model.config):
            model.config.attention_dropout = 0.125
        call = called(generator)
        try:
            return cls(model, kind, call, *_run(model, call, trial.eager_forward(model)))
        except Exception:  # a family's code may fail in any way on tables that are not its own
            return None

    def equals(self, spec: Any) -> bool:
        """Whether a patched twin does the same."""
        twin = self.twin(spec)
        try:
            results, given = _run(twin, self.call, None)
        except Exception:  # a reading may be wrong in any way
            return False
        if not all(d.ok for d in trial.differences(self.results, results)) or not all(map(_same, self.given, given)):
            return False
        self.objection = attention_objection(self.module, twin, spec, self.call, _SEQUENCE)
        return self.objection is None

    def twin(self, spec: Any) -> nn.Module:
        """A patched copy, of the same size and with the same weights."""
        copied = replica(self.module, {}, lambda tensor, shape: tensor.detach().clone())
        return trial.inject(copied, self.kind.injections(spec, "reference", None))


def heads_call(spec: AttentionBlockSpec, table: int, generator: torch.Generator) -> Call:
    """A call of a module with two tables of `table` columns, whose numbers have nothing to do with each other."""

    def made(*shape):
        return torch.randn(shape, generator=generator)

    batch, sequence = 2, _SEQUENCE
    kwargs = {"hidden_states": made(batch, sequence, spec.hidden), "attention_mask": made(batch, 1, sequence, sequence), "position_ids": torch.arange(6)[None]}
    if "position_embeddings" in spec.parameters:
        kwargs["position_embeddings"] = (made(batch, sequence, table), made(batch, sequence, table))
    return Call(kwargs=kwargs)


def _run(module: nn.Module, call: Call, forward) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Results and records of the calls that `Subject` describes."""
    module._moepatch_given = []
    results = trial.run(module.train(), call, forward=forward, hidden=True)
    forward = type(module).forward if forward is None else forward
    with torch.no_grad():
        loud = {**call.kwargs, "hidden_states": call.kwargs["hidden_states"] * _LOUD}
        forward(module, **loud)
        if "past_key_values" in inspect.signature(trial.eager_forward(module)).parameters:
            cache, mask = _Cache(), call.kwargs["attention_mask"].repeat(1, 1, 1, 2)
            forward(module.eval(), **{**call.kwargs, "past_key_values": cache, "attention_mask": mask})
            module._moepatch_given[-1]["cache"] = cache.given
        else:
            forward(module.eval(), **call.kwargs)
    return results, module._moepatch_given


def _same(theirs: dict[str, Any], ours: dict[str, Any]) -> bool:
    return theirs.keys() == ours.keys() and all(_equal(theirs[name], ours[name]) for name in theirs)


def _equal(a: Any, b: Any) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return type(a) is type(b) and not isinstance(a, Tensor) and a == b
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bool(torch.linalg.vector_norm(a.double() - b.double()) <= trial.FP32_LIMIT * torch.linalg.vector_norm(a.double()))

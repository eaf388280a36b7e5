"""The gradient of deferred logits: it travels through autograd's graph, and nobody has to make it.

The fused loss has the gradients of hidden states and head before anybody asks for that of the logits. It hands back a tensor that knows them.
Whatever hook, function or collective meets it sees a tensor like any other; if nobody has looked at it when it reaches the head, the gradients
that are there already go on. It may be a sum: of several losses, and of gradients that are ordinary numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .lazy import Lazy, Numbers
from .steps import Steps, follow

aten = torch.ops.aten
_COPIES = (aten.detach.default, aten.alias.default, aten.clone.default)


class Prepared:
    """The gradients of one fused loss, by the head's inputs. They may be taken once: what is taken is written into.

    Args:
        finish: makes the gradients of hidden states, weight and bias, None where not wanted, from that of the loss.
    """

    def __init__(self, finish: Callable[[Tensor], list[Tensor | None]] | None):
        self._finish = finish

    def take(self, grad: Tensor) -> list[Tensor | None] | None:
        """The gradients, or None if they are not there (any more)."""
        finish, self._finish = self._finish, None
        return None if finish is None else finish(grad)


@dataclass(frozen=True)
class Part:
    """What one loss adds to a gradient.

    Attributes:
        prepared: its gradients beyond the logits.
        grad: the gradient of that loss.
        make: makes the numbers of this gradient.
    """

    prepared: Prepared
    grad: Tensor
    make: Callable[[], Tensor]


class DeferredGradient(Lazy):
    """See the module's docstring.

    Attributes:
        _steps: whose gradient it is.
        _parts, _rest: what it is the sum of; the rest is an ordinary tensor or None.
    """

    _steps: Steps
    _parts: tuple[Part, ...]
    _rest: Tensor | None

    @classmethod
    def of(cls, steps: Steps, parts: tuple[Part, ...], rest: Tensor | None = None) -> DeferredGradient:
        """The gradient of the values that these steps lead to."""

        def make():
            found = rest
            for part in parts:
                found = part.make() if found is None else found + part.make()
            return found.clone() if found is rest else found

        strides = torch.empty(steps.shape, dtype=steps.dtype, device="meta").stride()
        made = cls._wrap(steps.shape, strides, 0, steps.dtype, steps.head.hidden.device, Numbers(make))
        made._steps, made._parts, made._rest = steps, parts, rest
        return made

    def take(self) -> tuple[list[list[Tensor | None]], Tensor | None] | None:
        """What each loss has prepared, and the rest; None if somebody has looked at it, or not all is there (any more)."""
        if self._numbers.made:
            return None
        taken = [part.prepared.take(part.grad) for part in self._parts]
        return None if any(grads is None for grads in taken) else (taken, self._rest)

    def _follow(self, func, args, kwargs):
        steps = self._steps
        if func is aten.add.Tensor and not kwargs:
            return self._plus(*args)
        if args[0] is not self:
            return NotImplemented
        if func in _COPIES:
            return self._alias() if func is not aten.clone.default else self.of(steps, self._parts, self._rest)
        if steps.before is None or not steps.undoes(func, args, kwargs):
            return self._alias() if follow(steps, func, args, kwargs) is steps else NotImplemented

        def moved(numbers):
            return func(numbers, *args[1:], **kwargs)

        parts = tuple(replace(part, make=lambda make=part.make: moved(make())) for part in self._parts)
        return self.of(steps.before, parts, None if self._rest is None else moved(self._rest))

    def _alias(self) -> DeferredGradient:
        made = self.of(self._steps, self._parts, self._rest)
        made._numbers = self._numbers
        return made

    def _plus(self, one, other):
        """A sum: with what is the gradient of the same values, or with an ordinary tensor."""
        mine, theirs = (one, other) if one is self else (other, one)
        if isinstance(theirs, DeferredGradient):
            if theirs._steps is not self._steps or theirs._numbers.made:
                return NotImplemented
            rests = [rest for rest in (mine._rest, theirs._rest) if rest is not None]
            return self.of(self._steps, (*mine._parts, *theirs._parts), sum(rests[1:], rests[0]) if rests else None)
        if type(theirs) is not Tensor or theirs.shape != self.shape or theirs.dtype != self.dtype or theirs.device != self.device:
            return NotImplemented
        return self.of(self._steps, self._parts, theirs if self._rest is None else self._rest + theirs)

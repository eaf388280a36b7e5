"""What moepatch has to know of one kind of module: what is injected where, how a module of it is tried, and how it is timed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .replica import unseen
from .surgery import Patched, Step
from .trial import Call, inject

Injections = Mapping[str, tuple[type[Patched], object]]


@dataclass(frozen=True)
class Kind:
    """How to patch, try and time one kind of module.

    Attributes:
        name: as in `Site.kind`.
        pattern: the prefix of its pattern's name in tables.
        backends: which table of backends serves it.
        injections: from (spec, backend, implementation) to mixin and state, for the module itself (key ``""``) and for submodules by
            relative name. `implementation` is what transformers' own switch said at the time of the patch.
        trial: a small random call, from (spec, dtype, device, generator). None: a site cannot be tried on its own.
        computes: from the spec to the part of it that the backend computes.
        widths: from the spec to H and I, or to the widths of one matrix; for kinds that hold experts. None: its experts are not counted, and not
            spread over the ranks of a mesh.
        holder: from the spec to the relative name of the module that holds the experts' weights.
        steps: from (module, spec, backend) to what else is done to the model when a site is patched.
        relayout: from the patched module and its spec to steps that move its weights, done when the patch has been verified.
        spread: the same for a model whose experts are spread over the ranks of a mesh; None: as `relayout`.
        why_not_spread: from (module, spec, model) to why the experts of a module cannot be spread over ranks, in words, or None.
        call: how a module, patched or not, is called when it is tried, ``(module, *args)``; None: by its forward.
        stand_in: from (spec, backend) to a module that is tried in the site's place, where the patch is not an injection.
        bench: the same as `trial` at a size that users run, with the number of tokens as last argument; None: backends are not timed
            against each other.
        regimes: calls, with words for what is special about them, that only this kind has, from (spec, dtype, device, generator). Calls with
            other counts of tokens (if there is `bench`) and with inputs of another scale are tried anyway.
        most_tokens: of a call that a matcher tries.
        dense: whether it belongs to the dense half of a model, not to its mixture of experts.
        on_request: plans have it only if a backend of its table was asked for by name.
        follows: from the spec to names of attributes and config values that a patched module reads at each call, as its family does.
        only_itself: a site patches what the module itself does, and none of the modules in it.
    """

    name: str
    pattern: str
    backends: str
    injections: Callable[[Any, str, str | None], Injections] = lambda spec, backend, implementation: {}
    trial: Callable[[Any, torch.dtype, torch.device, torch.Generator], Call] | None = None
    computes: Callable[[Any], Any] = lambda spec: spec
    widths: Callable[[Any], tuple[int, int]] | None = None
    holder: Callable[[Any], str] = lambda spec: ""
    steps: Callable[[nn.Module, Any, str], Sequence[Step]] = lambda module, spec, backend: ()
    relayout: Callable[[nn.Module, Any], Sequence[Step]] = lambda module, spec: ()
    spread: Callable[[nn.Module, Any], Sequence[Step]] | None = None
    why_not_spread: Callable[[nn.Module, Any, nn.Module], str | None] = lambda module, spec, model: None
    call: Callable[..., Any] | None = None
    stand_in: Callable[[Any, str], nn.Module] | None = None
    bench: Callable[[Any, torch.dtype, torch.device, torch.Generator, int], Call] | None = None
    regimes: Callable[[Any, torch.dtype, torch.device, torch.Generator], Iterable[tuple[str, Call]]] = lambda spec, dtype, device, generator: ()
    most_tokens: int = 2**16
    dense: bool = False
    on_request: bool = False
    follows: Callable[[Any], Collection[str]] = lambda spec: ()
    only_itself: bool = False

    def subject(self, module: nn.Module, spec: Any, backend: str | None, copied: Callable[[nn.Module], nn.Module]) -> nn.Module:
        """What is tried: a copy of a module, patched with a backend (None: as the family wrote it), or what stands in for it.

        Args:
            module: the site's, patched or not; not changed.
            spec: of the copy.
            backend: a name of this kind's table, or None.
            copied: makes the copy.
        """
        if self.stand_in is not None:
            made = self.stand_in(spec, backend or "reference")
            for part in made.modules():
                unseen(part)
            return made
        copy = copied(module)
        return copy if backend is None else inject(copy, self.injections(spec, backend, None))

    def at_work(self, module: nn.Module, spec: Any, backend: str | None, copied: Callable[[nn.Module], nn.Module]) -> nn.Module:
        """As `subject`, with the weights where `relayout` has them after a patch: what is timed."""
        subject = self.subject(module, spec, backend, copied)
        if backend is not None and self.stand_in is None:
            for step in self.relayout(subject, spec):
                step.do()
        return subject

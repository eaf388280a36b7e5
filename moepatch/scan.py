"""Walks the module tree once: every module with all of its names and parents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel


def outermost_pretrained(module: nn.Module, name: str = "") -> dict[str, nn.Module]:
    """The transformers models in a tree that are not inside another one, by name: what ``save_pretrained`` is called on."""
    if isinstance(module, PreTrainedModel):
        return {name: module}
    found: dict[int, tuple[str, nn.Module]] = {}
    for key, child in module.named_children():
        for inner, model in outermost_pretrained(child, f"{name}.{key}" if name else key).items():
            found.setdefault(id(model), (inner, model))
    return dict(found.values())


@dataclass(frozen=True)
class Found:
    """One module of a model.

    Attributes:
        module: the object.
        fqns: every name under which the tree holds it; more than one if it is shared. The first is the one that reports use.
        parents: every module that holds it directly, with the attribute's name.
    """

    module: nn.Module
    fqns: tuple[str, ...]
    parents: tuple[tuple[nn.Module, str], ...]

    @property
    def fqn(self) -> str:
        """The first name."""
        return self.fqns[0]


class Scan:
    """All modules of a model in tree order; each object once, however often it is shared.

    >>> tree = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> [found.fqn for found in Scan(tree)]
    ['', '0', '1']
    """

    def __init__(self, model: nn.Module):
        self.model = model
        names: dict[int, list[str]] = {}
        parents: dict[int, list[tuple[nn.Module, str]]] = {}
        modules: dict[int, nn.Module] = {}
        for fqn, parent, attribute, module in _walk(model):
            modules.setdefault(id(module), module)
            names.setdefault(id(module), []).append(fqn)
            if parent is not None:
                parents.setdefault(id(module), []).append((parent, attribute))
        self.found = tuple(Found(m, tuple(names[key]), tuple(parents.get(key, ()))) for key, m in modules.items())
        self._by_id = {id(f.module): f for f in self.found}

    def __iter__(self) -> Iterator[Found]:
        return iter(self.found)

    def above(self, found: Found) -> set[int]:
        """The ids of all modules that hold a module, directly or not."""
        ids: set[int] = set()
        pending = [parent for parent, _ in found.parents]
        while pending:
            module = pending.pop()
            if id(module) not in ids:
                ids.add(id(module))
                pending += [parent for parent, _ in self.of(module).parents]
        return ids

    def of(self, module: nn.Module) -> Found:
        """The entry of a module that is part of the tree."""
        return self._by_id[id(module)]


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module | None, str, nn.Module]]:
    """Depth first, through shared modules every time they occur; a module inside itself is not followed again."""
    pending: list[tuple[str, nn.Module | None, str, nn.Module, tuple[int, ...]]] = [("", None, "", model, ())]
    while pending:
        fqn, parent, attribute, module, above = pending.pop()
        yield fqn, parent, attribute, module
        if id(module) in above:
            continue
        for name, child in reversed(module._modules.items()):
            if child is not None:
                pending.append((f"{fqn}.{name}" if fqn else name, module, name, child, (*above, id(module))))

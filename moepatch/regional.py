"""Regional compilation: ``torch.compile`` of every decoder layer by itself, in place, and how many graphs each class of layers became.

A layer keeps its object, class, hooks and parameters; only what its ``__call__`` runs is compiled, at the first call. Layers of one class
share their graphs. Activation checkpointing (outside the compiled call) and FSDP2 (hooks and all) go on working.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .parallel.apply import units


@dataclass(eq=False)
class LayerGraphs:
    """What compiling has made of one class of layers so far. It is also the backend that they are compiled with, which is how it knows.

    Attributes:
        class_name: of the layers.
        backend: the backend that compiles: a name that ``torch.compile`` knows, or a function.
        layers: how many there are.
        graphs: how many graphs were compiled, those of recompilations included.
        breaks: how often a graph ended early, by reason.
    """

    class_name: str
    backend: str | Callable[..., Any]
    layers: int = 0
    graphs: int = 0
    breaks: Counter[str] = field(default_factory=Counter)

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any], mode: str | None = None, options: dict[str, Any] | None = None) -> Any:
        """Compiles one graph; called by Dynamo."""
        self.graphs += 1
        why = graph.compile_subgraph_reason
        if why is not None and why.graph_break:
            self.breaks[_first_line(why.reason)] += 1
        return _compiler(self.backend, mode, options)(graph, inputs)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"class": self.class_name, "layers": self.layers, "graphs": self.graphs, "breaks": dict(self.breaks)}

    def __str__(self) -> str:
        count = sum(self.breaks.values())
        why = f" ({'; '.join(self.breaks)})" if count else ""
        graphs = f"{self.graphs} graphs, {count} breaks{why}" if self.graphs else "not called yet"
        return f"{self.layers} x {self.class_name}: {graphs}"


@dataclass
class CompileLayer:
    """The step that compiles one layer in place.

    Attributes:
        layer: the module.
        graphs: the record of its class.
        options: for ``torch.compile``.
    """

    layer: nn.Module
    graphs: LayerGraphs
    options: dict[str, Any]

    def do(self) -> None:
        """Compiles at the layer's next call."""
        self.layer.compile(backend=self.graphs, **self.options)

    def undo(self) -> None:
        """The layer runs as it is written."""
        vars(self.layer).pop("_compiled_call_impl", None)


def compile_layers(model: nn.Module, backend: str | Callable[..., Any] = "inductor", **options: Any) -> list[CompileLayer]:
    """Steps that compile each decoder layer: the elements of the outermost lists of modules. Nothing is done yet.

    Args:
        model: patched or not, sharded or not.
        backend: as ``torch.compile`` takes it.
        options: its other arguments, such as ``dynamic`` or ``mode``.
    """
    records: dict[type, LayerGraphs] = {}
    steps = []
    for layer in units(model):
        record = records.setdefault(type(layer), LayerGraphs(type(layer).__name__, backend))
        record.layers += 1
        steps.append(CompileLayer(layer, record, options))
    return steps


def layer_graphs(steps: Iterable[Any]) -> list[LayerGraphs]:
    """The records of the `CompileLayer` steps among `steps`, each class once. They fill while the model runs."""
    return list({id(step.graphs): step.graphs for step in steps if isinstance(step, CompileLayer)}.values())


def _compiler(backend: str | Callable[..., Any], mode: str | None, options: dict[str, Any] | None) -> Callable[..., Any]:
    """The function behind a backend's name, with ``torch.compile``'s mode and options built in."""
    given = {key: value for key, value in (("mode", mode), ("options", options)) if value}
    if backend != "inductor":
        compiler = torch._dynamo.lookup_backend(backend) if isinstance(backend, str) else backend
        return lambda graph, inputs: compiler(graph, inputs, **given)
    from torch._inductor.compile_fx import compile_fx

    patches = {**(torch._inductor.list_mode_options(mode) if mode else {}), **(options or {})}
    return lambda graph, inputs: compile_fx(graph, inputs, config_patches=patches or None)


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else "no reason given"

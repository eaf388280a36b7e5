"""Pre-norm layers, whose sums and norms become one pass: ``h = h + child(norm(h))``, once or twice.

Between two branches stands ``residual + x`` and then a norm of the sum: two passes over the tokens that one kernel can make, forward and
backward. The children, the norms among them, stay modules of their own and sites of their own; a norm that is patched with the own kernels
and carries no hook is computed together with the sum before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..kind import Kind
from ..registry import backends, compute
from ..surgery import Patched, is_bare
from ..trial import Call, inject
from .norm import NormSpec, NormState, PatchedNorm, own_weight


class Source(NamedTuple):
    """Where an argument of a branch comes from.

    Attributes:
        kind: ``normed``, what the branch's norm returned; ``argument``, what the layer got under a name; ``constant``. In what a layer
            returns: ``stream``; ``output``, what a child returned beside its tokens; ``constant``.
        value: the name, or the constant; of an ``output``, the number of the branch and the place in what its child returned.
    """

    kind: str
    value: Any = None


@dataclass(frozen=True, kw_only=True)
class Branch:
    """One ``child(norm(h), …)``.

    Attributes:
        norm, child: names of submodules.
        args, kwargs: where the child's arguments come from.
        rest: the child also gets the keywords that the layer has no name for.
        returns: forms of what the child may return that the layer takes (see `form_of_branch`).
    """

    norm: str
    child: str
    args: tuple[Source, ...]
    kwargs: tuple[tuple[str, Source], ...]
    rest: bool
    returns: tuple[str, ...] = ("tensor",)


@dataclass(frozen=True, kw_only=True)
class ResidualSpec:
    """One layer.

    Attributes:
        width: of the stream.
        parameters: names of the layer's parameters; the first is the stream.
        defaults: of those that have one.
        takes_rest: whether the layer takes other keywords.
        branches: in order, one or two.
        norms: what the norm of each branch computes.
        result: what the tuple that the layer returns holds; None: it returns the stream alone.
    """

    width: int
    parameters: tuple[str, ...]
    defaults: tuple[tuple[str, Any], ...]
    takes_rest: bool
    branches: tuple[Branch, ...]
    norms: tuple[NormSpec, ...]
    result: tuple[Source, ...] | None = None

    def resized(self, sizes: Mapping[int, int]) -> ResidualSpec:
        """The same layer at another width."""
        return replace(self, width=sizes.get(self.width, self.width), norms=tuple(norm.resized(sizes) for norm in self.norms))

    def describe(self) -> str:
        """One line."""
        return f"H={self.width} " + ", ".join(f"h + {b.child}({b.norm}(h))" for b in self.branches)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"width": self.width, "layout": "pre-norm", "branches": [[b.norm, b.child] for b in self.branches]}


@dataclass(frozen=True)
class ResidualState:
    """What a patched layer needs to know."""

    spec: ResidualSpec
    backend: str

    def __str__(self) -> str:
        return f"{self.spec.describe()}, backend={self.backend}"


class StreamOps(NamedTuple):
    """A backend of the table ``residual``.

    Attributes:
        fork: ``(norm module, stream) -> (stream, normed)``.
        add: ``(norm module, branch, stream) -> (stream + branch, its norm)``.
    """

    fork: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]
    add: Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]


class PatchedResidual(Patched):
    """A layer ``(stream [B, S, H], …) -> stream``, or a tuple with it, called as the family's.

    Where a child returns something of a form that the trials of the layer did not have, the family's forward runs from the start.
    """

    takes_children = True
    _moepatch: ResidualState

    def forward(self, *args, **kwargs):
        """See the class."""
        spec = self._moepatch.spec
        given = {**dict(spec.defaults), **dict(zip(spec.parameters, args, strict=False)), **kwargs}
        stream = given.get(spec.parameters[0])
        rest = {key: value for key, value in given.items() if key not in spec.parameters}
        if _unusual(self, stream) or rest and not spec.takes_rest or len(args) > len(spec.parameters):
            return super().forward(*args, **kwargs)
        ops: StreamOps = compute("residual", self._moepatch.backend)
        out, returned = None, []
        for branch in spec.branches:
            norm = self._modules[branch.norm]
            stream, normed = ops.fork(norm, stream) if out is None else ops.add(norm, out, stream)
            made = self._modules[branch.child](*_args(branch, given, normed), **_kwargs(branch, given, normed, rest))
            if form_of_branch(made, stream) not in branch.returns:
                return super().forward(*args, **kwargs)
            returned.append(made)
            out = made if isinstance(made, Tensor) else made[0]
            if out.shape != stream.shape:  # some blocks return tokens [T, H]
                out = out.view(stream.shape)
        stream = stream + out
        if spec.result is None:
            return stream
        return tuple(_result(source, stream, returned) for source in spec.result)


def form_of_branch(made: Any, stream: Tensor) -> str:
    """The form of what a child returned: ``tensor``, ``tuple2`` or ``list1`` with the tensor in front, ``flat`` before it where that is ``[T, H]``."""
    if isinstance(made, Tensor):
        form, tokens = "tensor", made
    elif isinstance(made, (tuple, list)) and made and isinstance(made[0], Tensor):
        form, tokens = f"{'tuple' if isinstance(made, tuple) else 'list'}{len(made)}", made[0]
    else:
        return type(made).__name__
    if tokens.shape == stream.shape:
        return form
    flat = tokens.ndim == 2 and tokens.shape[-1] == stream.shape[-1] and tokens.numel() == stream.numel()
    return f"flat {form}" if flat else f"{form} of another shape"


def _result(source: Source, stream: Tensor, returned: list) -> Any:
    if source.kind == "output":
        branch, place = source.value
        return returned[branch][place]
    return stream if source.kind == "stream" else source.value


def _unusual(layer: nn.Module, stream: Any) -> bool:
    """Whether the family's own code is needed, which may cast the stream to the norm's dtype on the way."""
    if not isinstance(stream, Tensor):
        return True
    norm = layer._modules[layer._moepatch.spec.branches[0].norm]
    return any(weight is not None and weight.dtype != stream.dtype for weight in norm._parameters.values())


def _args(branch: Branch, given: Mapping, normed: Tensor) -> list:
    return [_value(source, given, normed) for source in branch.args]


def _kwargs(branch: Branch, given: Mapping, normed: Tensor, rest: Mapping) -> dict:
    made = {key: _value(source, given, normed) for key, source in branch.kwargs}
    return {**made, **rest} if branch.rest else made


def _value(source: Source, given: Mapping, normed: Tensor) -> Any:
    if source.kind == "normed":
        return normed
    return given[source.value] if source.kind == "argument" else source.value


# --- backends ------------------------------------------------------------------------------------------------------------------------


def reference_ops() -> StreamOps:
    """Sums and norms apart, each norm by whatever computes it."""
    return StreamOps(_fork, _add)


def triton_ops() -> StreamOps:
    """Sums and norms in one kernel where the norm may be taken out of its module."""
    from ..kernels.norm import add_norm, fork_norm

    def fork(norm, stream):
        return fork_norm(stream, own_weight(norm), norm._moepatch.spec) if _runs_own_kernel(norm) else _fork(norm, stream)

    def add(norm, branch, stream):
        return add_norm(branch, stream, own_weight(norm), norm._moepatch.spec) if _runs_own_kernel(norm) else _add(norm, branch, stream)

    return StreamOps(fork, add)


def _fork(norm: nn.Module, stream: Tensor) -> tuple[Tensor, Tensor]:
    return stream, norm(stream)


def _add(norm: nn.Module, branch: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
    total = stream + branch
    return total, norm(total)


def _runs_own_kernel(norm: nn.Module) -> bool:
    """Whether calling the norm would do nothing but run the own kernel."""
    return isinstance(norm, PatchedNorm) and norm._moepatch.backend == "triton" and is_bare(norm)


def _inject(spec, backend, implementation):
    return {"": (PatchedResidual, ResidualState(spec, backend))}


# --- trial ---------------------------------------------------------------------------------------------------------------------------


class _GivenWeight(nn.Module):
    """A norm or another child that has no parameters but a tensor that it is given before each call: it scales by it."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class ResidualSums(nn.Module):
    """The sums and norms of a layer without its children, which only scale: what backends are compared on.

    Args:
        spec: of the layer.
        backend: what computes the sums, and the norms if there is one of that name for them; else the reference does.

    Args of the call:
        stream ``[B, S, H]``; for each branch the weight of its norm ``[H]`` and the scale ``[H]`` that stands for its child.
    """

    def __init__(self, spec: ResidualSpec, backend: str):
        super().__init__()
        self.norms = spec.norms
        self.layer = nn.Module()
        both = any(backend == other.name for other in backends("norm"))
        for branch, norm in zip(spec.branches, spec.norms, strict=True):
            self.layer.add_module(branch.norm, inject(_GivenWeight(), {"": (PatchedNorm, NormState(norm, backend if both else "reference"))}))
            self.layer.add_module(branch.child, _GivenWeight())
        plain = tuple(replace(branch, args=(Source("normed"),), kwargs=(), rest=False, returns=("tensor",)) for branch in spec.branches)
        inject(self.layer, _inject(replace(spec, parameters=spec.parameters[:1], defaults=(), branches=plain, result=None), backend, None))

    def forward(self, stream: Tensor, *weights: Tensor) -> Tensor:
        """See the class."""
        for i, (branch, norm) in enumerate(zip(self.layer._moepatch.spec.branches, self.norms, strict=True)):
            setattr(self.layer._modules[branch.norm], norm.weight, weights[2 * i])
            self.layer._modules[branch.child].weight = weights[2 * i + 1]
        return self.layer(stream)


def _call(spec: ResidualSpec, dtype, device, generator, tokens: int) -> Call:
    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, spec.width, generator=generator, dtype=torch.float32).to(device=device, dtype=dtype)

    return Call((random(1, tokens), *(random() for _ in range(2 * len(spec.branches)))))


RESIDUAL = Kind(
    name="residual",
    pattern="residual",
    backends="residual",
    injections=_inject,
    stand_in=ResidualSums,
    trial=lambda spec, dtype, device, generator: _call(spec, dtype, device, generator, 24),
    dense=True,
    only_itself=True,
)

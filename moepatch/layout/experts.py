"""Where an experts module keeps its weights, told as reversible ops to one canonical form.

Canonical: ``gate_up [E, 2I, H]`` with all gate rows before all up rows (or ``up [E, I, H]`` without a gate), ``down [E, H, I]``,
biases ``[E, 2I]`` (or ``[E, I]``) and ``[E, H]``. So ``y = down @ act(gate_up @ x + bias) + bias`` for every layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from ..quantized import is_kept
from .ops import Concat, Deinterleave, Interleave, Op, Transpose, Unflatten, apply_chain, invert

GateForm = Literal["none", "concatenated", "interleaved", "separate"]


@dataclass(frozen=True)
class Weight:
    """One canonical weight: the parameters that hold it and the ops that lead to the canonical tensor.

    Attributes:
        names: parameter paths relative to the module, for example ``("gate_up_proj",)`` or ``("mlp.w1", "mlp.v1")``.
        ops: the chain from those parameters to the one canonical tensor.
    """

    names: tuple[str, ...]
    ops: tuple[Op, ...] = ()

    def parameters(self, module: nn.Module) -> tuple[Tensor, ...]:
        """The tensors as the module has them now (a parametrization, such as LoRA's, is applied)."""
        return tuple(resolve(module, name) for name in self.names)

    def dtype(self, module: nn.Module) -> torch.dtype:
        """Of the parameters."""
        return _held(module, self.names[0]).dtype

    def is_quantized(self, module: nn.Module) -> bool:
        """Whether one of the parameters is, so that only the family's code can compute with them. A parametrization is not asked for its own."""
        for name in self.names:
            *path, leaf = name.split(".")
            holder = module if not path else module.get_submodule(".".join(path))
            if is_kept(holder._parameters.get(leaf)):
                return True
        return False

    def canonical(self, module: nn.Module) -> Tensor:
        """The canonical tensor; differentiable, and a copy where the layout has to move data."""
        (tensor,) = apply_chain(self.ops, self.parameters(module))
        return tensor

    def operands(self, module: nn.Module) -> tuple[Tensor, ...]:
        """Views in canonical axis order without moving data: what remains to be done is the gate's form."""
        views = []
        for op in self.ops:
            if not op.is_view:
                break
            views.append(op)
        return apply_chain(views, self.parameters(module))

    def store(self, canonical: Tensor) -> dict[str, Tensor]:
        """The inverse of `canonical`: the tensor for each parameter name."""
        return dict(zip(self.names, apply_chain(invert(self.ops), (canonical,)), strict=True))


@dataclass(frozen=True)
class ExpertsLayout:
    """The weights of one experts module.

    Attributes:
        label: words for people, such as ``fused 3-D, transposed, interleaved, bias``.
        up: gate and up projection together, or the up projection of experts that have no gate.
        down: the down projection.
        up_bias, down_bias: None where there is no bias.
        gate_form: how gate and up lie in the pre-activation that `Weight.operands` of `up` produces.
    """

    label: str
    up: Weight
    down: Weight
    up_bias: Weight | None = None
    down_bias: Weight | None = None
    gate_form: GateForm = "concatenated"

    def weights(self) -> tuple[Weight, ...]:
        """Every weight that exists, in a fixed order."""
        return tuple(w for w in (self.up, self.down, self.up_bias, self.down_bias) if w is not None)

    def resized(self, sizes: Mapping[int, int]) -> ExpertsLayout:
        """The same layout in a module of other sizes."""
        turned = {
            field: None if weight is None else replace(weight, ops=tuple(op.resized(sizes) for op in weight.ops))
            for field, weight in (("up", self.up), ("down", self.down), ("up_bias", self.up_bias), ("down_bias", self.down_bias))
        }
        return replace(self, **turned)

    def parameter_names(self) -> tuple[str, ...]:
        """The paths of all parameters, relative to the module."""
        return tuple(name for weight in self.weights() for name in weight.names)

    def to_family(self, pre_activation: Tensor) -> Tensor:
        """A canonical pre-activation ``[R, 2I]`` in the form that the family's own gate reads."""
        if self.gate_form != "interleaved":
            return pre_activation
        (interleaved,) = Interleave(1)((pre_activation,))
        return interleaved


def fused_layout(
    *, up: str, down: str, gated: bool, transposed: bool = False, interleaved: bool = False, bias: Callable[[str], str] | None = None
) -> ExpertsLayout:
    """The layout of two fused 3-D parameters.

    Args:
        up, down: names of the parameters.
        gated: whether `up` holds gate and up projection.
        transposed: parameters are ``[E, in, out]`` instead of ``[E, out, in]``.
        interleaved: gate and up rows alternate.
        bias: from a parameter's name to its bias's name; None where there is none.
    """
    turn: tuple[Op, ...] = (Transpose(),) if transposed else ()
    sort: tuple[Op, ...] = (Deinterleave(1),) if interleaved else ()
    words = ["fused 3-D"] + [w for w, on in (("transposed", transposed), ("interleaved", interleaved), ("bias", bias), ("no gate", not gated)) if on]
    return ExpertsLayout(
        label=", ".join(words),
        up=Weight((up,), turn + sort),
        down=Weight((down,), turn),
        up_bias=Weight((bias(up),), sort) if bias else None,
        down_bias=Weight((bias(down),)) if bias else None,
        gate_form="none" if not gated else "interleaved" if interleaved else "concatenated",
    )


def flat_layout(*, gate: str, up: str, down: str, num_experts: int) -> ExpertsLayout:
    """The layout of three matrices ``[E*I, H]`` that hold all experts one below the other."""
    experts = Unflatten(num_experts)
    return ExpertsLayout(
        label="flat 2-D, gate and up apart",
        up=Weight((gate, up), (experts, Concat(1))),
        down=Weight((down,), (experts, Transpose())),
        gate_form="separate",
    )


def resolve(module: nn.Module, path: str) -> Tensor:
    """The tensor at a dotted path below `module`, through properties (so that parametrizations are seen); this rank's part of a DTensor."""
    tensor = _held(module, path)
    if not isinstance(tensor, DTensor):
        return tensor
    if torch.compiler.is_compiling() or not all(type(placement) is Shard for placement in tensor.placements):
        return tensor.to_local()
    return _Local.apply(tensor)


def _held(module: nn.Module, path: str) -> Tensor:
    *parents, name = path.split(".")
    for parent in parents:
        module = getattr(module, parent)
    return getattr(module, name)


class _Local(torch.autograd.Function):
    """``DTensor.to_local()`` for shards, by less Python: it runs for every expert weight of every step, in both directions."""

    @staticmethod
    def forward(ctx, whole):
        local = whole._local_tensor
        ctx.spec, ctx.stride = whole._spec, local.stride()
        return local.view_as(local)

    @staticmethod
    def backward(ctx, grad):
        spec = ctx.spec
        if torch.is_grad_enabled() or grad.stride() != ctx.stride:
            return DTensor.from_local(grad, spec.mesh, spec.placements, run_check=False)
        return DTensor(grad, spec, requires_grad=False)

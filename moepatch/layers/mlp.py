"""Dense MLPs and shared experts: ``down(act(gate(x)) * up(x))`` or ``down(act(up(x)))`` over linear layers.

What a forward pass keeps for the backward pass is x and the pre-activation. T tokens, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..autocast import autocast_dtype
from ..experts.activation import Activation, split_gate
from ..kernels.gated import gated_backward, gated_backward_reference, gated_forward, gated_forward_reference
from ..kind import Kind
from ..layout.adjacent import Adjacent, adjacent, joined
from ..once import once_differentiable
from ..registry import compute
from ..surgery import Patched, is_bare
from ..trial import Call


@dataclass(frozen=True, kw_only=True)
class MlpSpec:
    """What an MLP computes and which of its children hold the weights.

    Attributes:
        hidden: H, the width of what comes in and goes out.
        intermediate: I, the width in between.
        activation: what stands between the projections.
        gate_form: how the pre-activation lies: ``separate`` (gate and up are two layers), ``concatenated`` or ``interleaved`` (one layer
            of width 2I), ``none``.
        up_first: in one layer of width 2I, up comes before gate.
        inputs: names of the layers that read x: (gate, up), or the only one.
        down: name of the layer that writes the result.
        input_bias, down_bias: whether they have biases.
    """

    hidden: int
    intermediate: int
    activation: Activation
    gate_form: str
    inputs: tuple[str, ...]
    down: str
    up_first: bool = False
    input_bias: bool = False
    down_bias: bool = False

    @property
    def joint_form(self) -> str:
        """The gate form of the joint pre-activation, as `kernels.gated` names it."""
        return "concatenated" if self.gate_form == "separate" else self.gate_form

    def parameter_names(self) -> tuple[str, ...]:
        """The paths of all parameters, relative to the module."""
        biased = [(name, self.input_bias) for name in self.inputs] + [(self.down, self.down_bias)]
        return tuple(f"{name}.{leaf}" for name, bias in biased for leaf in (("weight", "bias") if bias else ("weight",)))

    def resized(self, sizes: Mapping[int, int]) -> MlpSpec:
        """The same MLP at other sizes."""
        return replace(self, hidden=sizes.get(self.hidden, self.hidden), intermediate=sizes.get(self.intermediate, self.intermediate))

    def describe(self) -> str:
        """The sizes and the activation on one line."""
        return f"H={self.hidden} I={self.intermediate} {self.activation}"

    def to_dict(self) -> dict[str, Any]:
        """For people and programs that read JSON."""
        words = {"separate": "gate and up apart", "concatenated": "gate and up in one", "interleaved": "gate and up interleaved", "none": "no gate"}
        bias = self.input_bias or self.down_bias
        return {
            "hidden": self.hidden,
            "intermediate": self.intermediate,
            "layout": words[self.gate_form] + (", up first" if self.up_first else "") + (", bias" if bias else ""),
            "activation": str(self.activation),
        }


@dataclass(frozen=True)
class MlpState:
    """What a patched MLP needs to know."""

    spec: MlpSpec
    backend: str

    def __str__(self) -> str:
        return f"{self.spec.describe()}, backend={self.backend}"


class MlpWeights(NamedTuple):
    """The tensors of an MLP at the moment of a call, all of one dtype.

    Attributes:
        inputs: weights of the layers that read x, ``[I, H]`` each or one ``[2I, H]``.
        biases: theirs, or empty.
        down: ``[H, I]``.
        down_bias: ``[H]`` or None.
    """

    inputs: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    down: Tensor
    down_bias: Tensor | None


class PatchedMlp(Patched):
    """Computes ``mlp(x [..., H]) -> [..., H]`` with a backend, in autocast's dtype where autocast is on, as ``nn.Linear`` does.

    It keeps to the family's own forward as long as a child is more than it was (a LoRA layer, a parametrized or hooked one, a bias that is new):
    only what is called can have its effect.
    """

    _moepatch: MlpState

    def forward(self, *args, **kwargs):
        """See the class; keywords go by the family's own name."""
        spec, backend = self._moepatch.spec, self._moepatch.backend
        children = self._modules
        inputs, down = tuple(children[name] for name in spec.inputs), children[spec.down]
        plain = all(map(is_bare, children.values())) and all(type(layer) is nn.Linear for layer in (*inputs, down))
        if not plain or any((layer.bias is not None) != spec.input_bias for layer in inputs):
            return super().forward(*args, **kwargs)
        (x,) = (*args, *kwargs.values())
        weights = MlpWeights(
            tuple(layer.weight for layer in inputs),
            tuple(layer.bias for layer in inputs) if spec.input_bias else (),
            down.weight,
            down.bias,
        )
        dtype = autocast_dtype(x.device)
        if dtype is not None:
            x, weights = _cast(x, weights, dtype)
        y_TH = compute("mlp", backend)(x.reshape(-1, spec.hidden), weights, spec)
        return y_TH.view(x.shape)


def _cast(x: Tensor, weights: MlpWeights, dtype: torch.dtype) -> tuple[Tensor, MlpWeights]:
    inputs, biases = (tuple(t.to(dtype) for t in tensors) for tensors in weights[:2])
    return x.to(dtype), MlpWeights(inputs, biases, *(None if t is None else t.to(dtype) for t in weights[2:]))


# --- what computes -------------------------------------------------------------------------------------------------------------------


def reference_mlp(x_TH: Tensor, weights: MlpWeights, spec: MlpSpec) -> Tensor:
    """``y [T, H]`` by plain differentiable torch: the truth for the others."""
    gate, up = _gate_and_up(x_TH, weights, spec)
    wide = torch.promote_types(x_TH.dtype, torch.float32)
    h_TI = spec.activation.forward(gate.to(wide), None if up is None else up.to(wide)).to(x_TH.dtype)
    return F.linear(h_TI, weights.down, weights.down_bias)


def torch_mlp(x_TH: Tensor, weights: MlpWeights, spec: MlpSpec) -> Tensor:
    """`reference_mlp` with one GEMM for gate and up, and the activation computed anew in the backward pass."""
    return _fused(x_TH, weights, spec, _TORCH)


def triton_mlp(x_TH: Tensor, weights: MlpWeights, spec: MlpSpec) -> Tensor:
    """`torch_mlp` with the activation in one kernel each way."""
    return _fused(x_TH, weights, spec, _TRITON)


def liger_mlp(x_TH: Tensor, weights: MlpWeights, spec: MlpSpec) -> Tensor:
    """`reference_mlp` with Liger's kernel between the projections; ``swiglu`` only, and one backward pass for each forward pass, for it
    writes the gradients over what was kept."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    gate, up = _gate_and_up(x_TH, weights, spec)
    return F.linear(LigerSiLUMulFunction.apply(gate.contiguous(), up.contiguous()), weights.down, weights.down_bias)


def _gate_and_up(x_TH: Tensor, weights: MlpWeights, spec: MlpSpec) -> tuple[Tensor, Tensor | None]:
    """The pre-activation ``[T, I]`` of each, layer by layer."""
    biases = weights.biases or (None,) * len(weights.inputs)
    pre = tuple(F.linear(x_TH, w, b) for w, b in zip(weights.inputs, biases, strict=True))
    first, second = split_gate(pre, spec.gate_form)
    return (second, first) if spec.up_first else (first, second)


@dataclass(frozen=True)
class _Between:
    """The activation and its gradient, with the arguments of `kernels.gated`."""

    forward: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]


_TORCH = _Between(gated_forward_reference, gated_backward_reference)
_TRITON = _Between(gated_forward, gated_backward)


def _fused(x_TH: Tensor, weights: MlpWeights, spec: MlpSpec, between: _Between) -> Tensor:
    two = len(weights.inputs) == 2
    first, second = weights.inputs if two else (weights.inputs[0], None)
    first_bias, second_bias = (None, None) if not weights.biases else weights.biases if two else (weights.biases[0], None)
    return _Mlp.apply(x_TH, between, spec, weights.down, weights.down_bias, first, second, first_bias, second_bias)


class _Mlp(torch.autograd.Function):
    """The whole MLP: three launches forward; backward, five. Gradients of the layers that read x are slices of one buffer."""

    # No *args in forward: torch.compile mistakes its own count of them.
    @staticmethod
    def forward(ctx, x_TH, between: _Between, spec: MlpSpec, down, down_bias, first, second, first_bias, second_bias):
        """`first` and `second` are the layers that read x; `second` is None where there is only one."""
        pre = _project(x_TH, _present(first, second), _present(first_bias, second_bias))
        h_TI = between.forward(pre, spec.activation, spec.joint_form, up_first=spec.up_first)
        ctx.between, ctx.spec = between, spec
        # Frozen weights do not need what they were multiplied with.
        needs_x = ctx.needs_input_grad[5] or ctx.needs_input_grad[6]
        ctx.save_for_backward(x_TH if needs_x else None, pre, down, first, second)
        return F.linear(h_TI, down, down_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TH):
        between, spec = ctx.between, ctx.spec
        x_TH, pre, down, *inputs = ctx.saved_tensors
        inputs = _present(*inputs)
        form = {"activation": spec.activation, "gate_form": spec.joint_form, "up_first": spec.up_first}
        needs_x, _, _, needs_down, needs_down_bias, *needs = ctx.needs_input_grad
        needs_inputs, needs_biases = needs[0] or needs[1], needs[2] or needs[3]
        dpre = h_TI = dx_TH = d_down_bias = None
        if needs_x or needs_inputs or needs_biases:
            dpre, h_TI, _ = between.backward(pre, dy_TH @ down, want_h=needs_down, **form)
        elif needs_down:
            h_TI = between.forward(pre, **form)
        d_down = dy_TH.t() @ h_TI if needs_down else None
        del h_TI
        if needs_down_bias:
            d_down_bias = dy_TH.sum(0)
        if needs_x:
            dx_TH = _project_back(dpre, inputs)
        d_inputs = _slices(dpre.t() @ x_TH, inputs) if needs_inputs else (None, None)
        d_biases = _slices(dpre.sum(0), inputs) if needs_biases else (None, None)
        return dx_TH, None, None, d_down, d_down_bias, *d_inputs, *d_biases


def _present(first: Tensor | None, second: Tensor | None) -> tuple[Tensor, ...]:
    if second is not None:
        return first, second
    return () if first is None else (first,)


def _slices(joint: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """The parts of a gradient that belong to each weight, always two."""
    return joint.split([w.shape[0] for w in weights]) if len(weights) == 2 else (joint, None)


def _joint(weights: Sequence[Tensor]) -> Tensor | None:
    """Weights as one operand where that costs nothing, or where a tracer could not follow the alternative."""
    if len(weights) == 1 or torch.compiler.is_compiling():
        return joined(weights)
    return adjacent(*weights)


def _project(x_TH: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """The joint pre-activation ``[T, ΣN]``. Weights that lie apart (FSDP2 gathers each by itself) write side by side instead of being copied."""
    whole = _joint(weights)
    if whole is not None:
        return F.linear(x_TH, whole, joined(biases) if biases else None)
    rows = [w.shape[0] for w in weights]
    pre = x_TH.new_empty(x_TH.shape[0], sum(rows))
    for part, w, b in zip(pre.split(rows, 1), weights, biases or (None,) * len(rows), strict=True):
        if b is None:
            torch.mm(x_TH, w.t(), out=part)
        else:
            torch.addmm(b, x_TH, w.t(), out=part)
    return pre


def _project_back(dpre: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """``dx [T, H]`` from the gradient of the joint pre-activation."""
    whole = _joint(weights)
    if whole is not None:
        return dpre @ whole
    first, *others = zip(dpre.split([w.shape[0] for w in weights], 1), weights, strict=True)
    dx_TH = first[0] @ first[1]
    for part, w in others:
        dx_TH.addmm_(part, w)
    return dx_TH


# --- how it is patched and tried -----------------------------------------------------------------------------------------------------


def _beside(module: nn.Module, spec: MlpSpec) -> list[Adjacent]:
    """Gate and up move beside each other, weights and biases."""
    if spec.gate_form != "separate":
        return []
    leaves = ("weight", "bias") if spec.input_bias else ("weight",)
    return [Adjacent(module, [f"{name}.{leaf}" for name in spec.inputs]) for leaf in leaves]


def _call(spec: MlpSpec, dtype: torch.dtype, device: torch.device, generator: torch.Generator, tokens: int = 24) -> Call:
    """Tokens in two sequences ``[2, T/2, H]``."""
    return Call((torch.randn(2, tokens // 2, spec.hidden, generator=generator, dtype=torch.float32).to(device=device, dtype=dtype),))


def _regimes(spec: MlpSpec, dtype: torch.dtype, device: torch.device, generator: torch.Generator):
    """One token, in a sequence and without, and tokens along other axes."""
    shapes = {"1 token": (1, 1), "1 token in a row of its own": (1,), "rows of tokens": (5,), "3 tokens": (1, 3), "5 sequences": (5, 3), "4 axes": (2, 3, 4)}
    for words, shape in shapes.items():
        yield f"with {words}", Call((torch.randn(*shape, spec.hidden, generator=generator, dtype=torch.float32).to(device=device, dtype=dtype),))


MLP = Kind(
    name="mlp",
    pattern="mlp",
    backends="mlp",
    injections=lambda spec, backend, implementation: {"": (PatchedMlp, MlpState(spec, backend))},
    trial=_call,
    bench=_call,
    regimes=_regimes,
    relayout=_beside,
    dense=True,
)

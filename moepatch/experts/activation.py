"""The activations between an expert's two projections, with their derivatives.

All arithmetic is in fp32 and rounded once by the caller. `gate` and `up` are ``[R, I]``; an activation without a gate takes the
up projection alone. The derivatives are written out, because the backward pass recomputes the activation from the saved
pre-activation instead of saving what autograd would.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

#: The name of an activation that only the module itself can compute (see `Activation.is_own`).
OWN = "own"


@dataclass(frozen=True)
class Activation:
    """An activation by name, with its numbers: a value that compares, hashes, prints and becomes JSON.

    Attributes:
        name: a key of `FORMULAS`, or ``own`` for a gate that only the family's module knows.
        numbers: the parameters of the formula in its order, for example ``(1.702, 7.0)``.
    """

    name: str
    numbers: tuple[float, ...] = ()

    @property
    def is_own(self) -> bool:
        """True if the module's own function has to be called: correct for any gate, but out of reach of fused kernels."""
        return self.name == OWN

    def forward(self, gate: Tensor, up: Tensor | None) -> Tensor:
        """``h [R, I]`` in fp32."""
        return FORMULAS[self.name].forward(gate, up, *self.numbers)

    def backward(self, grad: Tensor, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Gradients of gate and up from ``grad = dL/dh``, all ``[R, I]`` fp32."""
        return FORMULAS[self.name].backward(grad, gate, up, *self.numbers)

    def __str__(self) -> str:
        if not self.numbers:
            return self.name
        named = zip(FORMULAS[self.name].numbers, self.numbers, strict=True)
        return f"{self.name}({', '.join(f'{n}={v:g}' for n, v in named)})"


@dataclass(frozen=True)
class Formula:
    """How an activation is computed; `numbers` names its parameters."""

    gated: bool
    forward: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor, Tensor | None]]
    numbers: tuple[str, ...] = ()


# Scalar activations: value and derivative at once, since they share work.


def _silu(x: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(x)
    value = x * s
    return value, s + value * (1 - s)


def _gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    cdf = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
    return x * cdf, cdf + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _gelu_tanh(x: Tensor) -> tuple[Tensor, Tensor]:
    c = math.sqrt(2 / math.pi)
    t = torch.tanh(c * (x + 0.044715 * x**3))
    return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x)


def _relu(x: Tensor) -> tuple[Tensor, Tensor]:
    return F.relu(x), (x > 0).to(x.dtype)


def _relu2(x: Tensor) -> tuple[Tensor, Tensor]:
    r = F.relu(x)
    return r * r, 2 * r


def _swish(x: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(alpha * x)
    return x * s, s + alpha * x * s * (1 - s)


def _plain(scalar) -> Formula:
    """An activation without a gate: ``h = scalar(up)``; the pre-activation arrives as `gate`."""
    return Formula(False, lambda x, _: scalar(x)[0], lambda grad, x, _: (grad * scalar(x)[1], None))


def _product(scalar) -> Formula:
    """``h = scalar(gate) * up``."""

    def backward(grad, gate, up):
        value, slope = scalar(gate)
        return grad * up * slope, grad * value

    return Formula(True, lambda gate, up: scalar(gate)[0] * up, backward)


def _clamped_swiglu(gate, up, limit):
    return _silu(gate.clamp(max=limit))[0] * up.clamp(-limit, limit)


def _clamped_swiglu_backward(grad, gate, up, limit):
    value, slope = _silu(gate.clamp(max=limit))
    return grad * up.clamp(-limit, limit) * slope * (gate <= limit), grad * value * (up.abs() <= limit)


def _swiglu_clamped(gate, up, limit):
    return _silu(gate)[0].clamp(max=limit) * up.clamp(-limit, limit)


def _swiglu_clamped_backward(grad, gate, up, limit):
    value, slope = _silu(gate)
    return grad * up.clamp(-limit, limit) * slope * (value <= limit), grad * value.clamp(max=limit) * (up.abs() <= limit)


def _swiglu_oai(gate, up, alpha, limit):
    return _swish(gate.clamp(max=limit), alpha)[0] * (up.clamp(-limit, limit) + 1)


def _swiglu_oai_backward(grad, gate, up, alpha, limit):
    value, slope = _swish(gate.clamp(max=limit), alpha)
    return grad * (up.clamp(-limit, limit) + 1) * slope * (gate <= limit), grad * value * (up.abs() <= limit)


#: Every activation that moepatch can write out. A matcher recognises them by their values, never by a class name.
FORMULAS: dict[str, Formula] = {
    "swiglu": _product(_silu),
    "geglu": _product(_gelu),
    "geglu_tanh": _product(_gelu_tanh),
    "reglu": _product(_relu),
    "clamped_swiglu": Formula(True, _clamped_swiglu, _clamped_swiglu_backward, ("limit",)),
    "swiglu_clamped": Formula(True, _swiglu_clamped, _swiglu_clamped_backward, ("limit",)),
    "swiglu_oai": Formula(True, _swiglu_oai, _swiglu_oai_backward, ("alpha", "limit")),
    "relu2": _plain(_relu2),
    "silu": _plain(_silu),
    "gelu": _plain(_gelu),
    "gelu_tanh": _plain(_gelu_tanh),
    "relu": _plain(_relu),
}


def split_gate(pre_activation: tuple[Tensor, ...], gate_form: str) -> tuple[Tensor, Tensor | None]:
    """Views of gate and up ``[R, I]`` in a pre-activation of the given form (see `layout.experts.GateForm`)."""
    if gate_form == "separate":
        gate, up = pre_activation
        return gate, up
    (pre,) = pre_activation
    if gate_form == "none":
        return pre, None
    if gate_form == "interleaved":
        return pre[:, ::2], pre[:, 1::2]
    return pre.chunk(2, dim=-1)

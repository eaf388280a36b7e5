"""What QuACK's GEMMs do with a tile before it leaves: the activation and its derivatives, written with QuACK's decorator.

An epilogue gets the accumulator ``acc``; ``D`` is what the GEMM itself stores, ``h`` the activation. Where there is a gate, ``acc`` or the
pre-activation ``c`` holds pairs, which `unpack` takes apart.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

from .activation import Activation

_GATED = {"swiglu": "swiglu", "geglu_tanh": "geglu", "reglu": "reglu", "swiglu_oai": "swiglu_oai"}
_PLAIN = {"silu": "silu", "gelu": "gelu_erf", "gelu_tanh": "gelu_tanh_approx", "relu": "relu", "relu2": "relu_sq"}


def has(activation: Activation) -> bool:
    """True if QuACK computes this activation."""
    return activation.name in _GATED or activation.name in _PLAIN


@dataclass(frozen=True)
class Epilogues:
    """The epilogues of one activation, compared by its name.

    Attributes:
        forward: stores the pre-activation and ``h``.
        forward_with_bias: the same after adding ``bias [E, N]``.
        backward: from the pre-activation ``c`` and ``weight [R]``, with ``acc = dL/d(weight*h)``: stores ``dL/dpre`` and ``weight*h``, and
            adds up ``dot [R] = <h, acc>``.
    """

    activation: Activation
    gated: bool
    forward: Any = field(compare=False)
    forward_with_bias: Any = field(compare=False)
    backward: Any = field(compare=False)


@functools.cache
def epilogues(activation: Activation) -> Epilogues:
    """Those of an activation that QuACK `has`."""
    from quack import activation as functions

    if activation.name in _PLAIN:
        name = _PLAIN[activation.name]
        return Epilogues(activation, False, *_plain(functions.act_fn_map[name], functions.dact_fn_map[name]))
    name = _GATED[activation.name]
    forward, backward = functions.gate_fn_map[name], functions.dgate_fn_map[name]
    if activation.numbers:
        alpha, limit = activation.numbers
        return Epilogues(activation, True, *_gated(*_with_limits(forward, backward, alpha, limit)))
    return Epilogues(activation, True, *_gated(forward, backward))


def _with_limits(forward, backward, alpha, limit):
    def limited(gate, up):
        return forward(gate, up, alpha, limit)

    def limited_backward(gate, up, grad):
        return backward(gate, up, grad, alpha, limit)

    return limited, limited_backward


def _gated(act, dact):
    from quack.epilogue.frontend import gemm_epilogue
    from quack.epilogue.math import pack, unpack
    from quack.epilogue.ops import ColVecLoad, ColVecReduce, RowVecLoad

    @gemm_epilogue(outputs=("h",), mode="acc_pair")
    def forward(acc):
        gate, up = unpack(acc)
        return {"D": pack(gate, up), "h": act(gate, up)}

    @gemm_epilogue(outputs=("h",), ops={"bias": RowVecLoad("bias")}, mode="acc_pair")
    def forward_with_bias(acc, bias):
        gate, up = unpack(acc + bias)
        return {"D": pack(gate, up), "h": act(gate, up)}

    @gemm_epilogue(
        outputs=("h",),
        ops={"weight": ColVecLoad("weight")},
        reduces={"dot": ColVecReduce("dot", scaled=True)},
        mode="packed_cd_b16x2",
    )
    def backward(acc, c, weight):
        gate, up = unpack(c)
        grad_gate, grad_up, h = dact(gate, up, acc * weight)
        return {"D": pack(grad_gate, grad_up), "h": h * weight, "dot": (h, acc)}

    return forward, forward_with_bias, backward


def _plain(act, dact):
    from quack.epilogue.frontend import gemm_epilogue
    from quack.epilogue.ops import ColVecLoad, ColVecReduce, RowVecLoad

    @gemm_epilogue(outputs=("h",))
    def forward(acc):
        return {"D": acc, "h": act(acc)}

    @gemm_epilogue(outputs=("h",), ops={"bias": RowVecLoad("bias")})
    def forward_with_bias(acc, bias):
        pre = acc + bias
        return {"D": pre, "h": act(pre)}

    @gemm_epilogue(outputs=("h",), ops={"weight": ColVecLoad("weight")}, reduces={"dot": ColVecReduce("dot", scaled=True)})
    def backward(acc, c, weight):
        grad_pre, h = dact(c, acc * weight)
        return {"D": grad_pre, "h": h * weight, "dot": (h, acc)}

    return forward, forward_with_bias, backward

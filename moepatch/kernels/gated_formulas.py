"""The formulas of `experts.activation.FORMULAS` inside kernels: `formula` computes value and gradients of an element by its name, in fp32.

All are Triton functions for tiles of any shape; `kernels.gated` loads the tiles and stores the results.
"""

from __future__ import annotations

from .jit import jit

try:
    import triton.language as tl
except ImportError:
    tl = None


# Scalar activations: value and derivative at once, since they share work. `where` lets NaN through, which minimum and maximum do not.


@jit()
def _silu(x):
    s = tl.sigmoid(x)
    value = x * s
    return value, s + value * (1 - s)


@jit()
def _gelu(x):
    cdf = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
    return x * cdf, cdf + x * tl.exp(-0.5 * x * x) * 0.3989422804014327


@jit()
def _gelu_tanh(x):
    # (1 + tanh(u)) / 2 is sigmoid(2u).
    s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    value = x * s
    return value, s + value * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * x * x)


@jit()
def _relu(x):
    return tl.where(x <= 0, 0.0, x), tl.where(x > 0, 1.0, 0.0)


@jit()
def _relu2(x):
    r = tl.where(x <= 0, 0.0, x)
    return r * r, 2 * r


@jit()
def _swish(x, alpha):
    s = tl.sigmoid(alpha * x)
    value = x * s
    return value, s + alpha * value * (1 - s)


@jit()
def _at_most(x, limit):
    return tl.where(x > limit, limit, x)


@jit()
def _within(x, limit):
    return tl.where(x > limit, limit, tl.where(x < -limit, -limit, x))


@jit()
def formula(grad, gate, up, p, q, NAME: tl.constexpr):
    """The activation named so in `experts.activation.FORMULAS`, with the numbers p and q: h, and the gradients of gate and up.

    A kernel that uses only one of the three pays only for that one. Without a gate the pre-activation arrives as `gate`.
    """
    if NAME == "swiglu":
        value, slope = _silu(gate)
        return value * up, grad * up * slope, grad * value
    elif NAME == "geglu":
        value, slope = _gelu(gate)
        return value * up, grad * up * slope, grad * value
    elif NAME == "geglu_tanh":
        value, slope = _gelu_tanh(gate)
        return value * up, grad * up * slope, grad * value
    elif NAME == "reglu":
        value, slope = _relu(gate)
        return value * up, grad * up * slope, grad * value
    elif NAME == "clamped_swiglu":
        value, slope = _silu(_at_most(gate, p))
        held = _within(up, p)
        return value * held, tl.where(gate <= p, grad * held * slope, 0.0), tl.where(tl.abs(up) <= p, grad * value, 0.0)
    elif NAME == "swiglu_clamped":
        value, slope = _silu(gate)
        capped, held = _at_most(value, p), _within(up, p)
        return capped * held, tl.where(value <= p, grad * held * slope, 0.0), tl.where(tl.abs(up) <= p, grad * capped, 0.0)
    elif NAME == "swiglu_oai":
        value, slope = _swish(_at_most(gate, q), p)
        lifted = _within(up, q) + 1
        return value * lifted, tl.where(gate <= q, grad * lifted * slope, 0.0), tl.where(tl.abs(up) <= q, grad * value, 0.0)
    elif NAME == "relu2":
        value, slope = _relu2(gate)
    elif NAME == "silu":
        value, slope = _silu(gate)
    elif NAME == "gelu":
        value, slope = _gelu(gate)
    elif NAME == "gelu_tanh":
        value, slope = _gelu_tanh(gate)
    else:
        tl.static_assert(NAME == "relu", "an activation that has no kernel")
        value, slope = _relu(gate)
    return value, grad * slope, grad

"""The least time a layer can take on a machine: the FLOPs that it cannot avoid, or the bytes that have to pass through memory once."""

from __future__ import annotations

from layer_timing import Ceilings

from moepatch.layers.attention.spec import AttentionSpec

#: Backward of a matrix product costs two of them; of attention, which computes its scores anew, two and a half.
_LINEAR, _ATTENTION = 3, 3.5


def floor_ms(kind: str, spec, params: int, tokens: int, element: int, machine: Ceilings) -> float:
    """Milliseconds of forward and backward of one site of a kind.

    Args:
        kind: as in `moepatch.site.Site.kind`.
        spec: the site's.
        params: of its matrices.
        tokens: of one sequence.
        element: bytes of a number.
        machine: its ceilings.
    """
    linear = _LINEAR * 2 * tokens * params / machine.flops
    if kind == "norm":
        width = spec.width if spec.width > 512 else 32 * spec.width
        passes = 5 if spec.gate is None else 8  # x, y; x, dy, dx; and the gate and its gradient
        return passes * tokens * (width or 2048) * element / machine.copy
    if kind == "attention_function":
        return sum(attention_flops(form, tokens) for form, _ in spec.forms) * _ATTENTION / machine.flops
    if kind in ("attention_block", "latent"):
        heads = spec.heads
        causal = AttentionSpec(heads=heads.heads, kv_heads=heads.heads, head_dim=heads.head_dim, v_head_dim=heads.value_dim)
        return linear + attention_flops(causal, tokens) * _ATTENTION / machine.flops
    return linear


def attention_flops(form: AttentionSpec, tokens: int) -> float:
    """FLOPs of one forward."""
    seen = tokens / 2 if form.causal else tokens
    if form.window is not None and form.window < tokens:
        seen = form.window * (1 - form.window / (2 * tokens)) * (1 if form.causal else 2)
    return 2 * tokens * seen * form.heads * (form.head_dim + form.v_head_dim)

"""``triton.jit`` for modules that are imported without Triton, too."""

from __future__ import annotations

try:
    import triton
except ImportError:
    triton = None


def jit(**options):
    """``triton.jit(**options)``, or nothing without Triton."""
    return triton.jit(**options) if triton else lambda function: function

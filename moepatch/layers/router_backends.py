"""What can compute a router: plain torch and own Triton kernels. Importing this module registers them."""

from __future__ import annotations

from ..kernels.requirements import why_not_triton
from ..registry import register_backend


def _why_not_triton(spec, dtype, device):
    from ..kernels.router import too_large

    return why_not_triton("router", dtype, device) or (None if spec is None else too_large(spec))


@register_backend("router", "reference", rank=0, serves="plain torch: every router")
def _reference():
    from .router import reference_router

    return reference_router


@register_backend("router", "triton", rank=50, serves="torch's linear, one Triton kernel for the rest: up to 1024 experts", why_not=_why_not_triton)
def _triton():
    from ..kernels.router import router

    return router

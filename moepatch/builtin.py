"""moepatch's own entries in the tables of `registry`: importing this module registers them."""

from __future__ import annotations

import torch.distributed as dist

from .experts.gemm import why_not_grouped
from .experts.parallel_linear import ParallelLinearSpec
from .layers import attention_block_backends, latent_backends, mlp_backends  # noqa: F401  (each registers backends)
from .layers import norm_backends, router_backends, te_backends  # noqa: F401  (the same)
from .layers.attention import backends as attention_backends  # noqa: F401
from .layers.loss import backends as loss_backends  # noqa: F401
from .layers.mixers import backends as mixer_backends  # noqa: F401
from .match import (  # noqa: F401  (each registers matchers)
    attention_block,
    attention_function,
    expert_list,
    experts,
    latent,
    linear,
    loss,
    mixers,
    mlp,
    norm,
    parallel_linear,
    residual,
    router,
    scored_block,
)
from .registry import register_backend


def _grouped_gemm(spec, dtype, device):
    if spec is None:
        return why_not_grouped(dtype, (), device)
    widths = (spec.in_features, spec.out_features) if isinstance(spec, ParallelLinearSpec) else _widths(spec)
    return why_not_grouped(dtype, widths, device)


def _widths(spec) -> tuple[int, ...]:
    """Every width that becomes a stride of a GEMM operand."""
    fused = spec.layout.gate_form in ("concatenated", "interleaved")
    return (spec.hidden, spec.intermediate, spec.intermediate * 2 if fused else spec.intermediate)


@register_backend("experts", "reference", rank=0, serves="a loop over the experts: any layout, any activation, slow")
def _reference():
    from .experts.reference import reference_experts

    return reference_experts


@register_backend("experts", "torch", rank=50, serves="torch grouped GEMM, one sort, no host sync: any layout, any activation", why_not=_grouped_gemm)
def _torch():
    from .experts.grouped import grouped_experts

    return grouped_experts


def _triton_serves(spec, dtype, device):
    from .experts.fused import why_not

    return why_not(spec, dtype, device)


@register_backend("experts", "triton", rank=60, serves="torch grouped GEMM, Triton for the rest, no host sync", why_not=_triton_serves)
def _triton():
    from .experts.fused import fused_experts

    return fused_experts


def _quack_serves(spec, dtype, device):
    from .experts.quack import why_not

    return why_not(spec, dtype, device)


@register_backend("experts", "quack", rank=70, serves="QuACK's GEMMs with gather and activation inside: bf16 and fp16 on Hopper", why_not=_quack_serves)
def _quack():
    from .experts.quack import quack_experts

    return quack_experts


def _te_serves(spec, dtype, device):
    from .experts.te import why_not

    return why_not(spec, dtype, device)


@register_backend("experts", "te", rank=-10, serves="Transformer Engine, a GEMM an expert; one host sync; by name only", why_not=_te_serves)
def _te():
    from .experts.te import te_experts

    return te_experts


def _te_fp8_serves(spec, dtype, device):
    from .experts.te import why_not_fp8

    return why_not_fp8(spec, dtype, device)


def _fp8_rounded(module):
    from .experts.te_rounding import round_products

    return round_products(module)


@register_backend(
    "experts", "te_fp8", rank=-10, serves="Transformer Engine, FP8 with current scaling; one host sync; by name only",
    why_not=_te_fp8_serves, exact=lambda spec: False, rounded=_fp8_rounded,
)  # fmt: skip
def _te_fp8():
    from .experts.te import te_fp8_experts

    return te_fp8_experts


@register_backend("parallel_linear", "reference", rank=0, serves="a loop over the experts")
def _reference_linear():
    from .experts.parallel_linear import reference_linear

    return reference_linear


@register_backend("parallel_linear", "torch", rank=50, serves="torch grouped GEMM", why_not=_grouped_gemm)
def _torch_linear():
    from .experts.parallel_linear import grouped_linear

    return grouped_linear


def _needs_process_group(spec, dtype, device):
    return None if dist.is_available() else "torch was built without distributed"


@register_backend("dispatch", "all_to_all", rank=10, serves="all-to-all over any c10d backend; one host sync", why_not=_needs_process_group)
def _all_to_all():
    from .dispatch.all_to_all import AllToAll

    return AllToAll


def _deep_ep_serves(spec, dtype, device):
    from .dispatch.deep_ep import why_not

    return _needs_process_group(spec, dtype, device) or why_not(spec, dtype, device)


@register_backend("dispatch", "deep_ep", rank=50, serves="DeepEP's kernels over NVLink and RDMA: bf16 on Hopper and newer", why_not=_deep_ep_serves)
def _deep_ep():
    from .dispatch.deep_ep import DeepEP

    return DeepEP


def _symm_mem_serves(spec, dtype, device):
    from .dispatch.symm_mem import why_not

    return _needs_process_group(spec, dtype, device) or why_not(spec, dtype, device)


@register_backend("dispatch", "symm_mem", rank=60, serves="Triton over torch symmetric memory: one host, no host sync", why_not=_symm_mem_serves)
def _symm_mem():
    from .dispatch.symm_mem import SymmMem

    return SymmMem


@register_backend("dispatch", "local", rank=0, serves="one rank with all experts (ep=1)")
def _local():
    from .dispatch.local import Local

    return Local

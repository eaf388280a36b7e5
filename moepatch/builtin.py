"""moepatch's own entries in the tables of `registry`: importing this module registers them."""

from __future__ import annotations

import importlib.util

import torch.distributed as dist

from .experts.gemm import why_not_grouped
from .experts.parallel_linear import ParallelLinearSpec
from .match import expert_list, experts, parallel_linear, scored_block  # noqa: F401  (each registers its matcher)
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


#: Libraries that later versions will use, with the module that each provides and how it is installed.
OPTIONAL_LIBRARIES = {
    "quack": ("quack", "pip install moepatch[quack]"),
    "te": ("transformer_engine", "pip install moepatch[te]"),
    "liger": ("liger_kernel", "pip install moepatch[liger]"),
}


def why_not_optional(name: str) -> str:
    """Why an optional library is not in use."""
    module, how = OPTIONAL_LIBRARIES[name]
    if importlib.util.find_spec(module) is None:
        return f"not installed ({how})"
    return "installed, but this version of moepatch has no backend for it yet"

"""The tables ``ssd``, ``delta`` and ``selective``: what computes state-space and linear-attention mixers. Importing this registers them."""

from __future__ import annotations

import importlib.metadata

import torch
from packaging.version import Version

from ...gpus import capability_of
from ...kernels.requirements import why_not_triton
from ...needs import BF16_FP16, installed, missing
from ...registry import register_backend


def _why_not_triton_delta(spec, dtype, device):
    return why_not_triton("delta", dtype, device)


def _why_not_triton_ssd(spec, dtype, device):
    # A head's state and a chunk of it are held by one program.
    if spec is not None and (spec.state > 256 or spec.head_dim > 128):
        return f"holds states up to 256×128, this is {spec.state}×{spec.head_dim}"
    # In fp32 its programs do not fit into registers.
    return why_not_triton("ssd", dtype, device, "" if spec is None else ssd_size(spec.state, spec.head_dim), BF16_FP16)


def ssd_size(state: int, head_dim: int) -> str:
    """The size in `requirements` that covers a head's: what is smaller needs less."""
    return f"{max(64, 1 << (state - 1).bit_length())}x{max(64, 1 << (head_dim - 1).bit_length())}"


@register_backend("ssd", "reference", rank=0, serves="chunks of matrix products in fp32, plain torch")
def _reference_ssd():
    from .ssd import reference_ssd

    return reference_ssd


@register_backend("ssd", "torch", rank=40, serves="chunks of matrix products in the model's precision, plain torch")
def _torch_ssd():
    from .ssd import torch_ssd

    return torch_ssd


@register_backend("ssd", "triton", rank=60, serves="convolution and recurrence in six kernels, states recomputed", why_not=_why_not_triton_ssd)
def _triton_ssd():
    from .ssd_triton import triton_ssd

    return triton_ssd


@register_backend("delta", "reference", rank=0, serves="chunks of matrix products in fp32, plain torch")
def _reference_delta():
    from .delta import reference_delta

    return reference_delta


@register_backend("delta", "triton", rank=50, serves="convolution in one kernel each way, the recurrence in torch", why_not=_why_not_triton_delta)
def _triton_delta():
    from ...kernels.conv import causal_conv
    from .delta import delta_with
    from .delta_scan import reference_delta_scan

    return delta_with(causal_conv, reference_delta_scan)


def _why_not_fla(spec, dtype, device):
    if spec is not None and max(spec.key_dim, spec.value_dim) > 256:
        return f"heads of at most 256, these are {spec.key_dim} and {spec.value_dim}"
    # Its products of fp32 are in TF32.
    return missing(dtype, device, "fla", "triton", dtypes=BF16_FP16) or _why_fla_refuses(device)


def _why_fla_refuses(device):
    # It looks for itself, in its backward pass.
    if capability_of(device)[0] != 9 or installed("tilelang"):
        return None
    triton = importlib.metadata.version("triton")
    if Version("3.4") <= Version(triton) < Version("3.7.1"):
        return f"refuses Hopper GPUs with Triton {triton}, which computes its backward pass wrongly (needs Triton ≥ 3.7.1, or tilelang)"
    return None


@register_backend(
    "delta", "fla", rank=70, why_not=_why_not_fla,
    serves="convolution in one kernel each way, the recurrence of flash-linear-attention, where torch.compile breaks its graph",
)  # fmt: skip
def _fla_delta():
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    from ...kernels.conv import causal_conv
    from .delta import delta_with

    def scan(q_BTGK, k_BTGK, v_BTHV, g_BTH, beta_BTH):
        # Which releases repeat keys for their value heads themselves differs.
        per_key = v_BTHV.shape[2] // q_BTGK.shape[2]
        q, k = (rows.repeat_interleave(per_key, dim=2) if per_key > 1 else rows for rows in (q_BTGK, k_BTGK))
        return chunk_gated_delta_rule(q, k, v_BTHV, g_BTH, beta_BTH, output_final_state=True, use_qk_l2norm_in_kernel=True)

    return delta_with(causal_conv, scan)


@register_backend("selective", "reference", rank=0, serves="√T steps over chunks of √T tokens, plain torch")
def _reference_selective():
    from ...kernels.conv import reference_conv
    from ...kernels.selective import reference_selective
    from .selective import SelectiveBackend

    return SelectiveBackend(reference_conv, reference_selective)


def _why_not_triton_selective(spec, dtype, device):
    # A tile of the states of a block of channels is held in registers.
    if spec is not None and spec.state > 32:
        return f"holds states up to 32, this is {spec.state}"
    return why_not_triton("selective", dtype, device)


@register_backend("selective", "triton", rank=60, serves="convolution and scan in one kernel each, states recomputed", why_not=_why_not_triton_selective)
def _triton_selective():
    from ...kernels.conv import causal_conv
    from ...kernels.selective import selective
    from .selective import SelectiveBackend

    return SelectiveBackend(causal_conv, selective)

"""What a backend needs of a machine, and one way of saying what is missing."""

from __future__ import annotations

import importlib.util

import torch

from .gpus import Gpu, capability_of

BF16_FP16 = (torch.bfloat16, torch.float16)
UP_TO_FP32 = (*BF16_FP16, torch.float32)

#: The least compute capability of a library's kernels, where there is one for all of them. Triton compiles ours from here on; older GPUs have no bf16.
_LEAST = {"triton": (8, 0)}

#: How libraries are installed, by the module that is imported.
_INSTALL = {
    "cut_cross_entropy": "pip install moepatch[cce]",
    "fla": "pip install moepatch[fla]",
    "liger_kernel": "pip install moepatch[liger]",
    "quack": "pip install moepatch[quack]",
    "transformer_engine": "pip install moepatch[te]",
    "triton": "pip install triton",
}


def best_device() -> torch.device:
    """Where models of this machine run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def missing(
    dtype: torch.dtype,
    device: torch.device | Gpu,
    *libraries: str,
    dtypes: tuple[torch.dtype, ...] = UP_TO_FP32,
    capability: tuple[int, int] | None = None,
) -> str | None:
    """What stands in the way of a backend on a GPU, or None.

    Args:
        dtype, device: of the weights; the device may be a `Gpu` that is not here.
        libraries: modules that it imports.
        dtypes: what it computes in.
        capability: the least compute capability.
    """
    for library in libraries:
        if not installed(library):
            return f"not installed ({_INSTALL[library]})"
    if device.type != "cuda" or torch.version.hip is not None:
        return f"needs a CUDA GPU, this is {device.type}"
    if dtype not in dtypes:
        return f"computes in {', '.join(_name(d) for d in dtypes)}, this is {_name(dtype)}"
    asked = [_LEAST[library] for library in libraries if library in _LEAST] + ([capability] if capability is not None else [])
    if asked and (here := capability_of(device)) < max(asked):
        least = max(asked)
        why = " (older GPUs have no bf16)" if least == (8, 0) and dtype == torch.bfloat16 else ""
        return f"needs compute capability ≥ {least[0]}.{least[1]}, this is {here[0]}.{here[1]}{why}"
    return None


def installed(module: str) -> bool:
    """Whether a module can be found, without importing it (a submodule: without importing more than its parents)."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

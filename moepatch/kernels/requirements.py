"""What the own kernels need of a GPU, as data: `requirements.json` beside this file, written by bench/kernel_requirements.py.

Every kernel was compiled for every known compute capability, in the forms that models make it launch there. What is compared is what would stop a
launch: shared memory, and whether Triton's compiler takes the kernel at all; and what would make it pointless: registers that do not suffice are
spilled to the stack, and a kernel that keeps most of its numbers there waits for memory.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
from pathlib import Path

import torch

from ..gpus import Gpu, described
from ..needs import UP_TO_FP32, missing

_FILE = Path(__file__).with_name("requirements.json")
#: Bytes of stack a thread that a kernel may have. The own kernels have up to 3,200 on the H200, and are the fastest there is on it; where they are
#: compiled to 4 to 23 thousand, most of what a thread holds lies in memory.
_STACK = 4096


@functools.cache
def requirements() -> dict:
    """The file: the version of Triton, and by table, size, dtype and capability the bytes of shared memory of a block and of stack of a thread, or words."""
    return json.loads(_FILE.read_text())


def why_not_triton(
    table: str, dtype: torch.dtype, device: torch.device | Gpu, size: str = "", dtypes: tuple[torch.dtype, ...] = UP_TO_FP32
) -> str | None:
    """What stands in the way of the own kernels of a table, in all: `needs.missing`, then `why_not`."""
    return missing(dtype, device, "triton", dtypes=dtypes) or why_not(table, dtype, device, size)


def why_not(table: str, dtype: torch.dtype, device: torch.device | Gpu, size: str = "") -> str | None:
    """Why the own kernels of a table do not run on a GPU, or None.

    Args:
        table: of backends.
        dtype: of the weights.
        device: a CUDA device, or a `Gpu` that is not here.
        size: of what the kernels hold, where the table's needs depend on it, such as ``128x64``.
    """
    by_dtype = requirements()["tables"].get(table, {}).get(size, {})
    # Kernels do with one 16-bit type what they do with the other.
    name = "bfloat16" if dtype == torch.float16 and "float16" not in by_dtype else str(dtype).removeprefix("torch.")
    by_capability = by_dtype.get(name, {})
    gpu = described(device)
    # A capability that was not compiled for: as the nearest older one.
    capability = max((int(known) for known in by_capability if int(known) <= gpu.capability[0] * 10 + gpu.capability[1]), default=None)
    if capability is None:
        return None
    need = by_capability[str(capability)]
    if isinstance(need, str):
        triton = requirements()["triton"]
        return f"Triton {triton} cannot compile its kernels for {gpu}: {need}" if _triton() in (triton, None) else None
    shared, stack = need
    if shared > gpu.shared:
        return f"needs {shared / 1024:.0f} KiB of shared memory a block, {gpu} has {gpu.shared / 1024:.0f} KiB"
    if stack > _STACK:
        return f"its kernels spill {stack} bytes of registers a thread on {gpu}, more than {_STACK}: too slow"
    return None


def _triton() -> str | None:
    """The version that is here."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None

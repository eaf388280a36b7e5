"""GPUs as values: what a kernel or a plan has to know of one, whether it is here or not.

Wherever a device is asked about (`registry.Backend.why_not`, `needs.missing`), one of these may stand in its place: the same question for a GPU
that somebody thinks of renting.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

_KIB = 1024

#: Bytes of shared memory that a block may have, by compute capability: CUDA's programming guide, table of technical specifications.
_SHARED = {
    (7, 5): 64 * _KIB, (8, 0): 163 * _KIB, (8, 6): 99 * _KIB, (8, 7): 163 * _KIB, (8, 9): 99 * _KIB, (9, 0): 227 * _KIB,
    (10, 0): 227 * _KIB, (10, 3): 227 * _KIB, (12, 0): 99 * _KIB, (12, 1): 99 * _KIB,
}  # fmt: skip


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    Attributes:
        name: for people.
        capability: its compute capability.
        shared: bytes of shared memory that a block may have.
        processors: how many multiprocessors it has.
        memory: bytes.
        bandwidth: of its memory, in bytes a second; None if not known.
        bf16_flops: a second, of dense products with fp32 sums; None if not known.
    """

    name: str
    capability: tuple[int, int]
    shared: int
    processors: int
    memory: int
    bandwidth: float | None = None
    bf16_flops: float | None = None

    @property
    def type(self) -> str:
        """As of a `torch.device`."""
        return "cuda"

    @property
    def sm(self) -> str:
        """The capability in the compiler's words."""
        return f"sm_{self.capability[0]}{self.capability[1]}"

    def __str__(self) -> str:
        return f"{self.name} ({self.sm})"


def _gpu(name: str, capability: tuple[int, int], processors: int, gigabytes: int, bandwidth: float, bf16: float) -> Gpu:
    return Gpu(name, capability, _SHARED[capability], processors, gigabytes * 10**9, bandwidth * 1e9, bf16 * 1e12)


#: By the name that people use. Sizes, GB/s and dense bf16 TFLOP/s as the vendor gives them.
GPUS: dict[str, Gpu] = {
    "h200": _gpu("H200", (9, 0), 132, 141, 4800, 989),
    "h100": _gpu("H100", (9, 0), 132, 80, 3350, 989),
    "b200": _gpu("B200", (10, 0), 148, 180, 8000, 2250),
    "a100": _gpu("A100", (8, 0), 108, 80, 2039, 312),
    "a100-40gb": _gpu("A100 40 GB", (8, 0), 108, 40, 1555, 312),
    "l40s": _gpu("L40S", (8, 9), 142, 48, 864, 362),
    "rtx4090": _gpu("RTX 4090", (8, 9), 128, 24, 1008, 165),
    "a10": _gpu("A10", (8, 6), 72, 24, 600, 125),
    "rtx3090": _gpu("RTX 3090", (8, 6), 82, 24, 936, 71),
    "rtx5090": _gpu("RTX 5090", (12, 0), 170, 32, 1792, 209),
    "rtxpro6000": _gpu("RTX PRO 6000", (12, 0), 188, 96, 1792, 504),
}


def capability_of(device: torch.device | Gpu) -> tuple[int, int]:
    """The compute capability of a CUDA device that is here, or of one that is not."""
    return device.capability if isinstance(device, Gpu) else torch.cuda.get_device_capability(device)


@torch.compiler.assume_constant_result
def shared_memory(index: int | None) -> int:
    """Bytes of shared memory that a block may have on the GPU of this number; an H200's where there is none, as under an interpreter."""
    return GPUS["h200"].shared if index is None else _of_driver(index).shared


def described(device: torch.device | Gpu) -> Gpu:
    """The GPU behind a CUDA device: what the driver says of it, with the bandwidth and FLOP/s of the known one of that name."""
    if isinstance(device, Gpu):
        return device
    return _of_driver(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _of_driver(index: int) -> Gpu:
    found = torch.cuda.get_device_properties(index)
    capability, words = (found.major, found.minor), "".join(found.name.lower().split())
    # A build of torch that does not say it: what the nearest older GPU has.
    told = hasattr(found, "shared_memory_per_block_optin")
    shared = found.shared_memory_per_block_optin if told else _SHARED[max((known for known in _SHARED if known <= capability), default=min(_SHARED))]
    # The longest name decides: an A100 is no A10.
    known = max((gpu for key, gpu in GPUS.items() if key in words), key=lambda gpu: len(gpu.name), default=None)
    bandwidth, flops = (None, None) if known is None else (known.bandwidth, known.bf16_flops)
    return Gpu(found.name, capability, shared, found.multi_processor_count, found.total_memory, bandwidth, flops)

"""Launching Triton kernels: what is looked up again, and what a launch is given. The kernels here are fakes; real ones run on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from moepatch.kernels import launch as module
from moepatch.kernels.launch import Prepared


@dataclass(frozen=True)
class OnGpu:
    """What a launch asks of a tensor."""

    address: int
    dtype: torch.dtype = torch.float32
    is_cuda: bool = True
    device = torch.device("cuda", 0)

    def data_ptr(self):
        return self.address


X, Y = OnGpu(1024), OnGpu(2048)


class FakeKernel:
    """Compiles when it is called like Triton's, and writes down how its compiled form is run."""

    params = [SimpleNamespace(name=name, default=None) for name in ("x", "n", "scale", "y", "BLOCK")]

    def __init__(self):
        self.compiled, self.runs = 0, []

    def __getitem__(self, grid):
        def call(*args, **constants):
            self.compiled += 1
            return SimpleNamespace(run=lambda *given: self.runs.append(given), function="function", packed_metadata="metadata")

        return call


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(module, "_is_direct", lambda kernel: True)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: "stream", raising=False)
    return FakeKernel()


def test_the_second_launch_of_a_kind_gets_addresses(kernel):
    prepared = Prepared(kernel, BLOCK=128, num_warps=4)
    prepared((3,), X, 32, 0.5, Y)
    assert kernel.compiled == 1 and not kernel.runs
    prepared((3,), Y, 48, 0.25, X)
    assert kernel.compiled == 1
    assert kernel.runs == [(3, 1, 1, "stream", "function", "metadata", None, None, None, 2048, 48, 0.25, 1024, 128)]


OTHERS = {
    "dtype": (OnGpu(1024, torch.bfloat16), 32, 0.5, Y),
    "alignment": (OnGpu(1028), 32, 0.5, Y),
    "one": (X, 1, 0.5, Y),
    "not divisible": (X, 33, 0.5, Y),
    "wide": (X, 2**40, 0.5, Y),
    "none": (X, 32, 0.5, None),
    "integer": (X, 32, 2, Y),
    "on the host": (X, 32, 0.5, OnGpu(2048, is_cuda=False)),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_kind_goes_through_triton(kernel, other):
    prepared = Prepared(kernel, BLOCK=128)
    prepared((1,), X, 32, 0.5, Y)
    prepared((1,), *OTHERS[other])
    assert kernel.compiled == 2 and not kernel.runs

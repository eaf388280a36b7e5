"""The dispatcher for one host, on the CPU: the references of its kernels between gloo ranks, the kernels in Triton's interpreter.

What only GPUs can show (peers' memory, barriers on the device, no waiting) is not tested here.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
import test_parallel
import torch
import torch.distributed as dist
from interpreter import needs_triton, passes_in_the_interpreter
from ranks import RankError, on_ranks

import moepatch
from moepatch import registry
from moepatch.dispatch.all_to_all import AllToAll
from moepatch.dispatch.one_host import HostNumbers
from moepatch.dispatch.symm_mem import SymmMem, why_not
from moepatch.kernels import symm_mem_back, symm_mem_out
from moepatch.kernels.symm_mem import Edges, Peers

E, K, H = 8, 4, 24
TOKENS = {"even": (9, 9, 9, 9), "uneven": (9, 1, 17, 4), "some empty": (0, 5, 0, 3), "all empty": (0, 0, 0, 0)}
ROUTINGS = ["random", "hot", "sentinels", "none", "duplicates"]


class FileMemory:
    """Buffers that gloo ranks share through files, in the place of `CudaMemory`."""

    def __init__(self, group, size, device, hosts):
        folder = [tempfile.mkdtemp() if group.rank() == 0 else None]
        dist.broadcast_object_list(folder, group=group, group_src=0)
        Path(folder[0], str(group.rank())).write_bytes(b"\xff" * size)  # NaN in every dtype: what nobody wrote must not be used
        self.group = group
        self.barrier()
        buffers = [torch.from_file(f"{folder[0]}/{r}", shared=True, size=size, dtype=torch.uint8) for r in range(group.size())]
        self.peers = Peers(buffers, torch.tensor([b.data_ptr() for b in buffers]), group.rank())
        self.barrier()
        if group.rank() == 0:
            shutil.rmtree(folder[0])  # the memory lives on with its mappings

    def barrier(self):
        dist.barrier(self.group)


def routing(kind, tokens, seed, top_k=K):
    """Global ids ``[T, K]`` and weights."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, E, generator=generator).argsort(1)[:, :top_k]
    if kind == "hot":
        ids = torch.full_like(ids, E - 1)
    elif kind == "sentinels":
        ids = torch.where(torch.rand(ids.shape, generator=generator) < 0.5, torch.tensor([-1, E, E + 3])[ids % 3], ids)
    elif kind == "none":
        ids = torch.full_like(ids, -1)
    elif kind == "duplicates":
        ids[:, 1:] = ids[:, :1]
    return ids.contiguous(), torch.rand(tokens, top_k, generator=generator) + 0.1


def some_experts(received, factor):
    """A stand-in whose results, gradients included, need every id and weight: each row times the sum of weight times (id + 1)."""
    scale_N = torch.where(received.ids_NK >= 0, received.weights_NK * (received.ids_NK + 1), 0).sum(1, keepdim=True)
    return (received.x_NH * scale_N * factor).to(received.x_NH.dtype)


def layer(dispatcher, x, ids, weights, grad, factor=1.0):
    """What arrives, what comes back, and the gradients."""
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    received = dispatcher.dispatch(x, ids, weights)
    y = dispatcher.combine(some_experts(received, factor), received.handle)
    y.backward(grad)
    arrived = (received.ids_NK >= 0).any(1)
    rows = (t.detach()[arrived] for t in (received.x_NH, received.ids_NK, received.weights_NK))
    return [*rows, y.detach(), x.grad, weights.grad], received


def batch(kind, counts, seed, dtype):
    rank = dist.get_rank()
    tokens = counts[rank]
    ids, weights = routing(kind, tokens, seed * 10 + rank)
    generator = torch.Generator().manual_seed(seed * 10 + rank)
    x, grad = (torch.randn(tokens, H, generator=generator).to(dtype) for _ in range(2))
    return x, ids, weights.to(dtype), grad


def compare_with_all_to_all():
    group = dist.group.WORLD
    theirs, ours = AllToAll(group, E), SymmMem(group, E, memory=FileMemory)
    assert ours.mover is SymmMem(group, E, memory=FileMemory).mover
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for counts in TOKENS.values():
            for seed, kind in enumerate(ROUTINGS):
                arguments = batch(kind, counts, seed, dtype)
                want, (got, received) = layer(theirs, *arguments)[0], layer(ours, *arguments)
                assert received.rows is None and received.x_NH.shape[0] == sum(counts[: group.size()])
                assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, want, strict=True)), (dtype, counts, kind)
                assert all(torch.isfinite(t).all() for t in (received.x_NH, received.weights_NK))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_bit_equal_to_all_to_all(world):
    """Also with no tokens, uneven tokens, sentinels and duplicates; buffers grow on the way."""
    on_ranks(world, compare_with_all_to_all)


def overlapping_layers():
    group, rank = dist.group.WORLD, dist.get_rank()
    first, second = SymmMem(group, E, memory=FileMemory), SymmMem(group, E, memory=FileMemory, capacity=64)
    batches = [batch("random", (9, 30), seed, torch.float32) for seed in (1, 2)]
    want = [layer(AllToAll(group, E), *b)[0][3:] for b in batches]
    inputs = [[t.clone().requires_grad_() for t in (b[0], b[2])] for b in batches]
    one = first.dispatch(inputs[0][0], batches[0][1], inputs[0][1])
    two = second.dispatch(inputs[1][0], batches[1][1], inputs[1][1])  # grows while the first is under way
    ys = [first.combine(some_experts(one, 1.0), one.handle), second.combine(some_experts(two, 1.0), two.handle)]
    torch.autograd.backward(ys, [b[3] for b in batches])
    for y, (x, weights), truth in zip(ys, inputs, want, strict=True):
        assert all(torch.equal(a, b) for a, b in zip((y, x.grad, weights.grad), truth, strict=True)), rank


def test_layers_may_overlap_and_buffers_grow_between():
    on_ranks(2, overlapping_layers)


def train_step(dims):
    registry.register_backend("dispatch", "symm_mem_in_files", rank=-1)(lambda: lambda *arguments: SymmMem(*arguments, memory=FileMemory))
    optimize = moepatch.optimize
    test_parallel.moepatch.optimize = lambda model, mesh: optimize(model, mesh, dispatch="symm_mem_in_files")
    test_parallel.train_step(["qwen3_moe", "gpt_oss"], dims)


def test_a_model_has_the_gradients_of_one_process():
    on_ranks(2, train_step, {"ep": 2})


def hosts_exchange():
    numbers, rank = HostNumbers(dist.group.WORLD), dist.get_rank()
    for call in range(2000):
        assert numbers.exchange(call * 10 + rank) == tuple(call * 10 + r for r in range(numbers.world))
    return rank


def test_hosts_tell_each_other_numbers():
    assert on_ranks(4, hosts_exchange) == [0, 1, 2, 3]


def one_stays_away():
    numbers = HostNumbers(dist.group.WORLD, patience=0.5)
    if dist.get_rank() == 0:
        numbers.exchange(1)


def test_a_rank_that_stays_away_is_named():
    with pytest.raises(RankError, match="rank 1 has not come to dispatch 1"):
        on_ranks(2, one_stays_away)


def test_why_not():
    assert why_not(None, torch.bfloat16, torch.device("cpu")) == "needs CUDA GPUs, this is cpu"


def in_turns(world, kind, counts, dtype, functions, programs):
    """Every kernel of one dispatch and combine between simulated ranks: buffers in a list, one rank after the other."""
    publish, fetch_tokens, fetch_rows, stage_rows, bring_back = functions
    edges = Edges(counts, torch.tensor([sum(counts[:r]) for r in range(world + 1)], dtype=torch.int32))
    routes = [routing(kind, tokens, rank, top_k=3) for rank, tokens in enumerate(counts)]
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(tokens, 40, generator=generator).to(dtype) for tokens in counts]
    buffers = [torch.full((1 << 16,), 0xFF, dtype=torch.uint8) for _ in range(world)]
    address_W = torch.tensor([b.data_ptr() for b in buffers])
    peers = [Peers(buffers, address_W, rank) for rank in range(world)]
    at, results = (128, 1 << 14, (1 << 14) + 4096), []
    for r in range(world):
        publish(peers[r], at, xs[r], routes[r][0], routes[r][1].to(dtype), torch.float32, 1.0, programs)
    received = [fetch_tokens(peers[r], at, xs[r], routes[r][1].to(dtype), edges, E // world, programs) for r in range(world)]
    results += [t for rank in received for t in rank]
    for r in range(world):
        publish(peers[r], at, xs[r], None, None, torch.float32, 1 / 3, programs)
    results += [fetch_rows(peers[r], at[0], xs[r], received[r][1], edges, programs) for r in range(world)]
    ys = [received[r][0] * (r + 2) for r in range(world)]
    rows_at = (1 << 15, (1 << 15) + (1 << 14))
    for numbers, factor in ((True, 3.0), (False, 1.0)):
        for r in range(world):
            stage_rows(peers[r], rows_at, ys[r], received[r][1], received[r][2] * 3 if numbers else None, edges, programs)
        dtypes = (torch.float32, dtype) if numbers else None
        for r in range(world):
            results += bring_back(peers[r], rows_at, ys[r], routes[r][0], edges, E // world, dtypes, factor, programs)
    return [t for t in results if t is not None], buffers


def check_kernels():
    """Each Triton kernel against its reference, bit by bit, buffers included."""
    names = [(symm_mem_out, n) for n in ("publish_tokens", "fetch_tokens", "fetch_rows")] + [(symm_mem_back, n) for n in ("stage_rows", "bring_back")]
    done = 0
    for world, counts in ((1, (5,)), (2, (6, 3)), (2, (0, 4)), (4, (2, 0, 5, 1))):
        for kind in ROUTINGS:
            for dtype in (torch.float32, torch.float16):  # Triton's interpreter truncates to bf16 where GPUs round
                want = in_turns(world, kind, counts, dtype, [getattr(module, f"{n}_reference") for module, n in names], 1)
                got = in_turns(world, kind, counts, dtype, [getattr(module, n) for module, n in names], 3)
                for a, b in zip(got[0] + got[1], want[0] + want[1], strict=True):
                    assert a.dtype == b.dtype and torch.equal(a, b), (world, counts, kind, dtype)
                done += 1
    print(f"{done} cases equal")


@needs_triton
def test_kernels_in_tritons_interpreter():
    passes_in_the_interpreter(__file__, "40 cases equal", timeout=110)


if __name__ == "__main__":
    check_kernels()

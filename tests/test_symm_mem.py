"""The dispatcher for one host, on the CPU: the references of its kernels between gloo ranks, the kernels in Triton's interpreter.

What only GPUs can show (peers' memory, barriers on the device, no waiting) is not tested here.
"""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_parallel
import torch
import torch.distributed as dist
import zoo
from interpreter import needs_triton, passes_in_the_interpreter
from ranks import RankError, on_ranks
from torch import nn

import moepatch
from moepatch import registry
from moepatch.dispatch.all_to_all import AllToAll
from moepatch.dispatch.chain import ALONE, Chain, Turn
from moepatch.dispatch.one_host import HostNumbers
from moepatch.dispatch.symm_mem import SymmMem, why_not
from moepatch.kernels import symm_mem_back, symm_mem_out
from moepatch.kernels.symm_mem import Edges, Peers
from moepatch.parallel.apply import _join_chains
from moepatch.parallel.experts import PatchedShardedExperts

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


def hosts_exchange_for_chains():
    """Ranks announce their numbers when they have had them for a whole pass; how many rounds were needed."""
    numbers, rank = HostNumbers(dist.group.WORLD), dist.get_rank()
    pause, chains = random.Random(rank), [Chain(7), Chain(3)]
    for step in range(300):
        for which, chain in enumerate(chains):
            for place in range(chain.length):
                if pause.random() < 0.02:
                    time.sleep(2e-3)
                if step % 10 == 5 and place == 4:  # another list of layers inside this one
                    assert numbers.exchange(1000 + rank, chains[1].turn(0, 1000 + rank)) == tuple(1000 + r for r in range(numbers.world))
                # The second list's numbers differ from layer to layer on one rank.
                value = step * 100 + which * 10 + rank + (place if which and rank == 1 else 0)
                want = tuple(step * 100 + which * 10 + r + (place if which and r == 1 else 0) for r in range(numbers.world))
                assert numbers.exchange(value, chain.turn(place, value)) == want
        if step % 50 == 20:  # a pass that breaks off
            for place in range(3):
                assert numbers.exchange(5, chains[0].turn(place, 5)) == (5,) * numbers.world
        assert numbers.exchange(step + rank) == tuple(step + r for r in range(numbers.world))
    return numbers.calls, numbers.rounds


def test_hosts_tell_each_other_numbers_once_for_a_chain():
    ((calls, rounds),) = set(on_ranks(3, hosts_exchange_for_chains))
    assert rounds < 0.7 * calls  # 7 + 3 + 1 calls a step, of which the chain of 7 needs one


def a_number_that_was_announced_otherwise():
    numbers, chain = HostNumbers(dist.group.WORLD), Chain(2)
    for value in (4, 4, 4, 5):
        numbers.exchange(value, chain.turn(numbers.calls % 2, value))


def test_an_announcement_that_is_not_kept_is_an_error():
    with pytest.raises(RankError, match="5 tokens in a layer where 4 were announced"):
        on_ranks(2, a_number_that_was_announced_otherwise)


def test_a_chain_announces_what_the_pass_before_had():
    chain = Chain(3)

    def run(tokens, places=range(3)):
        return [chain.turn(place, n) for place, n in zip(places, tokens, strict=False)]

    assert [turn.follow for turn in run([4, 4, 4])] == [0, 0, 0]  # nothing is known yet
    first, *others = run([9, 9, 9])
    assert first == Turn(chain, True, 2) and others == [Turn(chain, False)] * 2
    assert run([1, 1, 1])[0].follow == 2
    assert run([1, 1])[0].follow == 2 and run([1, 1, 1])[0].follow == 0  # the pass before had broken off
    assert run([1, 1], (0, 2)) == [Turn(chain, True, 2), ALONE] and run([1, 1, 1])[0].follow == 0  # it had left a layer out
    x = torch.ones(1, requires_grad=True)
    seen = []
    y = x * 1
    y.register_hook(lambda grad: seen.append(chain.turn(0, 1)))
    y.sum().backward()
    assert seen == [ALONE] and run([1, 1, 1])[0].follow == 2  # a recompute changes nothing
    assert run([9, 9, 8])[0].follow == 2 and [run([9, 9, 9])[0].follow for _ in range(3)] == [0, 0, 0]  # what varied once may vary again


def test_experts_of_another_name_have_a_chain_of_their_own():
    """Text and images have tokens of their own, which may be equally many by chance."""

    def experts():
        module = nn.Linear(1, 1)
        module._moepatch = SimpleNamespace(dispatcher=SimpleNamespace(joined=[], join=lambda *found: module._moepatch.dispatcher.joined.append(found)))
        return module

    model = nn.Module()
    model.layers = nn.ModuleList(nn.ModuleDict({"text": experts(), "vision": experts()}) for _ in range(3))
    _join_chains(model, [layer[name] for layer in model.layers for name in ("text", "vision")])
    ((text, vision),) = {tuple(layer[name]._moepatch.dispatcher.joined[0][0] for name in ("text", "vision")) for layer in model.layers}
    assert text is not vision and (text.length, vision.length) == (3, 3)
    assert [layer["vision"]._moepatch.dispatcher.joined[0][1] for layer in model.layers] == [0, 1, 2]


def steady_steps():
    """Several passes of a model with checkpointing, with other numbers of tokens, are those of all_to_all; hosts meet once a pass."""
    registry.register_backend("dispatch", "symm_mem_in_files", rank=-1)(lambda: lambda *arguments: SymmMem(*arguments, memory=FileMemory))
    losses, rank = {}, dist.get_rank()
    for name in ("all_to_all", "symm_mem_in_files"):
        model = moepatch.optimize(zoo.build("qwen3_moe", num_hidden_layers=4), moepatch.make_mesh(ep=2), dispatch=name, verify=False).train()
        losses[name] = []
        for step in range(4):
            generator = torch.Generator().manual_seed(step * 2 + rank)
            ids = torch.randint(3, 60, (1, 6 + step % 2 * 5 + rank), generator=generator)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            losses[name].append(loss.item())
    assert losses["all_to_all"] == losses["symm_mem_in_files"]
    hosts = next(m for m in model.modules() if isinstance(m, PatchedShardedExperts))._moepatch.dispatcher.mover.hosts
    return hosts.calls, hosts.rounds


def test_hosts_meet_once_in_a_pass():
    ((calls, rounds),) = set(on_ranks(2, steady_steps))
    assert calls - rounds == 3 * 3  # all passes but the first, all layers but the first


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
    passes_in_the_interpreter(__file__, "40 cases equal")


if __name__ == "__main__":
    check_kernels()

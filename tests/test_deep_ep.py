"""The DeepEP dispatcher against the all-to-all one, bit by bit, on gloo ranks; DeepEP itself is played by what its documentation says."""

from __future__ import annotations

import importlib.machinery
import sys
import types

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from test_experts import routing

from moepatch.dispatch import deep_ep
from moepatch.dispatch.all_to_all import AllToAll
from moepatch.errors import BackendUnavailable

E, H = 6, 256


class Config:
    """Of 1.x: tuning for a number of SMs, half of which are channels."""

    def __init__(self, num_sms):
        self.channels = num_sms // 2

    def get_nvl_buffer_size_hint(self, hidden_bytes, num_ranks):
        return self.channels * num_ranks * hidden_bytes

    def get_rdma_buffer_size_hint(self, hidden_bytes, num_ranks):
        raise AssertionError("asked for RDMA inside a host")


class Exchange:
    """The movement that both interfaces share. `log` holds what was made and destroyed on this rank."""

    log: list[str] = []

    def __init__(self, group, size):
        self.group, self.size, self.alive = group, size, True
        self.log.append(f"made {size}")

    def destroy(self):
        assert self.explicitly_destroy and self.alive
        dist.barrier(self.group)
        self.alive = False
        self.log.append(f"destroyed {self.size}")

    def to_ranks(self, parts):
        """One part for each rank; returns what each rank had for this one."""
        assert self.alive
        everything = [None] * self.group.size()
        dist.all_gather_object(everything, parts, group=self.group)
        return [parts[self.group.rank()] for parts in everything]

    def send(self, x, goes):
        assert x.dtype == torch.bfloat16 and x.is_contiguous() and x.shape[1] % 256 == 0 and goes.shape == (x.shape[0], self.group.size())
        return torch.cat(self.to_ranks([x[goes[:, rank]] for rank in range(self.group.size())]))

    def send_choice(self, ids, weights, goes, experts):
        assert ids.dtype == torch.int64 and ids.is_contiguous() and weights.dtype == torch.float32 and weights.is_contiguous()
        here = experts // self.group.size()
        parts = []
        for rank in range(self.group.size()):
            mine = (ids >= rank * here) & (ids < (rank + 1) * here)
            parts.append((torch.where(mine, ids - rank * here, -1)[goes[:, rank]], torch.where(mine, weights, 0)[goes[:, rank]]))
        ids, weights = map(torch.cat, zip(*self.to_ranks(parts), strict=True))
        return ids, weights, torch.bincount(ids[ids >= 0], minlength=here).tolist()

    def goes(self, ids, experts):
        here = experts // self.group.size()
        return torch.stack([((ids >= r * here) & (ids < (r + 1) * here)).any(1) for r in range(self.group.size())], 1)

    def add_up(self, rows, goes):
        """fp32 sums in the order of ranks. Who sent how much is asked again, as kernels do."""
        assert rows.is_contiguous()
        counts = [int(c) for c in self.to_ranks(list(goes.sum(0)))]
        assert sum(counts) == rows.shape[0]
        total = torch.zeros(goes.shape[0], rows.shape[1])
        for rank, part in enumerate(self.to_ranks(list(rows.split(counts)))):
            total[goes[:, rank]] += part.float()
        return total.to(rows.dtype)


class Buffer(Exchange):
    """1.x."""

    num_sms = 20

    def __init__(self, group, num_nvl_bytes=0, num_rdma_bytes=0, explicitly_destroy=False):
        super().__init__(group, num_nvl_bytes)
        self.explicitly_destroy = explicitly_destroy
        assert num_rdma_bytes == 0

    @staticmethod
    def set_num_sms(new_num_sms):
        assert new_num_sms % 2 == 0, "The SM count must be even"
        Buffer.num_sms = new_num_sms

    @staticmethod
    def get_dispatch_config(num_ranks):
        return Config(Buffer.num_sms)

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(self, topk_idx, num_experts):
        assert topk_idx.dtype == torch.int64 and topk_idx.is_contiguous()
        goes = self.goes(topk_idx, num_experts)
        valid = topk_idx[(topk_idx >= 0) & (topk_idx < num_experts)]
        return goes.sum(0).int(), None, torch.bincount(valid, minlength=num_experts).int(), goes, None

    def dispatch(self, x, handle=None, num_tokens_per_rank=None, num_tokens_per_rdma_rank=None, is_token_in_rank=None,
                 num_tokens_per_expert=None, topk_idx=None, topk_weights=None, config=None):  # fmt: skip
        assert self.size >= config.get_nvl_buffer_size_hint(x.shape[1] * 2, self.group.size())
        if handle is not None:
            assert topk_idx is None and topk_weights is None and handle[1] == config.channels
            return self.send(x, handle[0]), None, None, None, None, None
        ids, weights, counts = self.send_choice(topk_idx, topk_weights, is_token_in_rank, num_tokens_per_expert.numel())
        return self.send(x, is_token_in_rank), ids, weights, counts, (is_token_in_rank, config.channels), None

    def combine(self, x, handle, topk_weights=None, config=None):
        assert handle[1] == config.channels and x.dtype == torch.bfloat16
        assert self.size >= config.get_nvl_buffer_size_hint(x.shape[1] * 2, self.group.size())
        assert topk_weights is None or topk_weights.dtype == torch.float32
        return self.add_up(x, handle[0]), None if topk_weights is None else self.add_up(topk_weights, handle[0]), None


class ElasticBuffer(Exchange):
    """2.x."""

    def __init__(self, group, num_max_tokens_per_rank, hidden, num_topk, deterministic, allow_multiple_reduction, explicitly_destroy):
        super().__init__(group, (num_max_tokens_per_rank, hidden, num_topk))
        self.explicitly_destroy = explicitly_destroy
        assert not allow_multiple_reduction

    def dispatch(self, x, topk_idx=None, topk_weights=None, num_experts=None, num_max_tokens_per_rank=None, num_sms=0, handle=None):
        if handle is not None:
            assert topk_idx is None and num_experts == handle.num_experts and num_sms == handle.num_sms > 0
            return self.send(x, handle.goes), handle.topk_idx, None, handle, None
        assert x.shape[0] <= num_max_tokens_per_rank <= self.size[0] and x.shape[1] <= self.size[1] and topk_idx.shape[1] <= self.size[2]
        assert len(set(self.to_ranks([num_max_tokens_per_rank] * self.group.size()))) == 1
        assert (topk_idx < num_experts).all()
        goes = self.goes(topk_idx, num_experts)
        ids, weights, counts = self.send_choice(topk_idx, topk_weights, goes, num_experts)
        handle = types.SimpleNamespace(
            goes=goes, topk_idx=topk_idx.clone(), num_experts=num_experts, num_sms=num_sms or 6,
            num_max_tokens_per_rank=num_max_tokens_per_rank, num_recv_tokens_per_expert_list=counts,
        )  # fmt: skip
        return self.send(x, goes), ids, weights, handle, None

    def combine(self, x, handle, topk_weights=None):
        return self.add_up(x, handle.goes), None if topk_weights is None else self.add_up(topk_weights, handle.goes), None


def fake(version):
    module = types.ModuleType("deep_ep")
    module.__spec__ = importlib.machinery.ModuleSpec("deep_ep", None)
    module.Buffer = Buffer
    if version == "2.x":
        module.ElasticBuffer, module.topk_idx_t = ElasticBuffer, torch.int64
    return module


def choice(kind, rank):
    """This rank's ids and routing weights ``[T, K]``: other tokens on every rank, and other numbers of them."""
    tokens = {"uneven": 3 + 40 * rank, "none on one rank": 7 * rank, "none": 0}.get(kind, 16)
    ids, weights = routing(kind, tokens, experts=E)
    return (ids + rank) % E if kind == "random" else ids, weights + rank


def step(dispatcher, kind, dtype, hidden=H):
    """One layer forward and backward, with an expert that is elementwise, so that every bit depends on movement and sums alone."""
    ids, weights = choice(kind, dist.get_rank())
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(ids.shape[0], hidden, generator=generator).bfloat16().requires_grad_()
    weights = weights.to(dtype).requires_grad_()
    received = dispatcher.dispatch(x, ids, weights)
    mine = received.ids_NK >= 0
    assert received.rows == mine.sum()
    # What an experts backend leaves as the gradient of a weight that is not this rank's reaches nobody.
    received.weights_NK.register_hook(lambda grad: torch.where(mine, grad, torch.nan))
    scale_N1 = torch.where(mine, received.weights_NK * (received.ids_NK + 1), 0).sum(1, keepdim=True)
    y = dispatcher.combine((received.x_NH * scale_N1).bfloat16(), received.handle)
    y.backward(torch.randn(y.shape, generator=generator).bfloat16())
    return {
        "x_NH": received.x_NH.detach(),
        "ids": received.ids_NK,
        "weights_NK": torch.where(mine, received.weights_NK.detach(), 0),
        "y": y.detach(),
        "x": x.grad,
        "weights": weights.grad,
    }


def same_bits(version):
    """A token of 2.x must not name an expert twice, so the last two are not for it."""
    sys.modules["deep_ep"] = fake(version)
    group = dist.group.WORLD
    kinds = ["random", "uneven", "none on one rank", "none", "to nobody", "sentinels", "all to one", "duplicates"]
    for kind in kinds[: 8 if version == "1.x" else 6]:
        for dtype in (torch.float32, torch.bfloat16):
            truth = step(AllToAll(group, E), kind, dtype)
            ours = step(deep_ep.DeepEP(group, E), kind, dtype)
            for key, value in truth.items():
                assert ours[key].dtype == value.dtype and torch.equal(ours[key], value), (kind, dtype, key)
    return Exchange.log


@pytest.mark.parametrize("version", ["1.x", "2.x"])
def test_the_same_bits_as_all_to_all(version):
    for log in on_ranks(2, same_bits, version):
        assert len(log) == 1, "layers of one width share one buffer"


def overlap(version):
    """Two layers in flight at once, the second one wider."""
    sys.modules["deep_ep"] = fake(version)
    group = dist.group.WORLD
    first, second = deep_ep.DeepEP(group, E, num_sms=8), deep_ep.DeepEP(group, E)
    alone = [step(first, "random", torch.float32), step(second, "sentinels", torch.float32, 2 * H)]
    deep_ep.release(group)
    made = list(Exchange.log)
    calls = []
    for layer, kind, hidden in ((first, "random", H), (second, "sentinels", 2 * H)):
        ids, weights = choice(kind, dist.get_rank())
        x = torch.randn(ids.shape[0], hidden, generator=torch.Generator().manual_seed(dist.get_rank())).bfloat16().requires_grad_()
        calls.append((layer, x, layer.dispatch(x, ids, weights)))
    for (layer, x, received), truth in zip(calls, alone, strict=True):
        assert torch.equal(received.x_NH, truth["x_NH"])
        y = layer.combine(received.x_NH, received.handle)
        y.sum().backward()
        ranks = (y.detach() / x.detach()).round()  # each rank that a token went to sends it back once
        assert torch.equal(x.grad, ranks)
    assert sys.modules["deep_ep"].Buffer.num_sms == 20
    deep_ep.release(group)
    deep_ep.release(group)
    assert not deep_ep._MEMORY
    return made, Exchange.log[len(made) :]


@pytest.mark.parametrize("version", ["1.x", "2.x"])
def test_layers_in_flight_do_not_disturb_each_other_and_their_memory_grows_and_goes(version):
    sizes = {"1.x": [4 * 2 * H * 2, 10 * 2 * 2 * H * 2], "2.x": [(128, H, 2), (128, 2 * H, 2)]}[version]
    expected = [f"made {sizes[0]}", f"destroyed {sizes[0]}", f"made {sizes[1]}", f"destroyed {sizes[1]}"]
    for made, again in on_ranks(2, overlap, version):
        assert made == expected and again == expected


def compiled():
    sys.modules["deep_ep"] = fake("2.x")
    dispatcher = deep_ep.DeepEP(dist.group.WORLD, E)

    def layer(x, ids, weights):
        received = dispatcher.dispatch(x * 2, ids, weights)
        return dispatcher.combine((received.x_NH * received.weights_NK.sum(1, keepdim=True)).bfloat16(), received.handle) * 3

    results = []
    for run in (layer, torch.compile(layer, backend="aot_eager")):
        ids, weights = choice("random", 0)
        x, weights = torch.ones(ids.shape[0], H).bfloat16().requires_grad_(), weights.requires_grad_()
        y = run(x, ids, weights)
        y.sum().backward()
        results.append((y, x.grad, weights.grad))
    assert all(map(torch.equal, *results))


def test_torch_compile_goes_around_it():
    on_ranks(1, compiled)


@pytest.fixture
def hopper(monkeypatch):
    """A machine with DeepEP 1.x and a Hopper GPU, as far as `why_not` looks."""
    monkeypatch.setitem(sys.modules, "deep_ep", fake("1.x"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    return torch.device("cuda")


def spec_of(hidden):
    return types.SimpleNamespace(hidden=hidden)


def test_why_not_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "deep_ep", None)
    monkeypatch.setattr(deep_ep.importlib.util, "find_spec", lambda name: None)
    words = deep_ep.why_not(None, torch.bfloat16, torch.device("cpu"))
    assert words == "not installed (built from its own repository, deepseek-ai/DeepEP)"


def test_why_not_in_words(hopper, monkeypatch):
    assert deep_ep.why_not(None, torch.bfloat16, hopper) is None
    assert deep_ep.why_not(spec_of(2048), torch.bfloat16, hopper) is None
    assert deep_ep.why_not(None, torch.bfloat16, torch.device("cpu")) == "needs CUDA, this is cpu"
    assert deep_ep.why_not(None, torch.float32, hopper) == "moves bfloat16, this is float32"
    assert deep_ep.why_not(spec_of(2880), torch.bfloat16, hopper) == "needs a hidden size divisible by 256, this has 2880"
    assert deep_ep.why_not(spec_of(8192), torch.bfloat16, hopper) == "1.x takes hidden sizes below 8192, this has 8192"
    monkeypatch.setitem(sys.modules, "deep_ep", fake("2.x"))
    assert deep_ep.why_not(spec_of(8192), torch.bfloat16, hopper) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert deep_ep.why_not(None, torch.bfloat16, hopper) == "needs compute capability 9.0, this is 8.0"


def test_why_not_when_its_import_fails(hopper, monkeypatch, tmp_path):
    (tmp_path / "deep_ep.py").write_text("assert False, 'Invalid NCCL versions'\n")
    monkeypatch.delitem(sys.modules, "deep_ep")
    monkeypatch.syspath_prepend(tmp_path)
    assert deep_ep.why_not(None, torch.bfloat16, hopper) == "installed, but its import fails: AssertionError: Invalid NCCL versions"


@pytest.mark.parametrize(
    ("ranks", "experts", "per_host", "words"),
    [
        (8, 128, 8, None),
        (4, 128, 8, None),
        (16, 128, 8, None),
        (1, 128, 8, "1.x has no kernels for 1 ranks, only for 2, 4, 8, 16, 24, 32, 64, 128, 144, 160"),
        (2, 512, 8, "1.x takes up to 128 experts on a rank, this has 256"),
        (8, 128, 4, "1.x wants 8 ranks that follow each other on one host, hosts here have 4"),
    ],
)
def test_why_not_a_group(hopper, monkeypatch, ranks, experts, per_host, words):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(per_host))
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: list(range(ranks)))
    group = types.SimpleNamespace(size=lambda: ranks)
    assert deep_ep.why_not_group(group, experts) == words
    if words is not None:
        with pytest.raises(BackendUnavailable, match="Use dispatch='all_to_all'"):
            deep_ep.DeepEP(group, experts)


def test_tokens_that_the_kernels_would_get_wrong_are_refused(hopper, monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    dispatcher = deep_ep.DeepEP(types.SimpleNamespace(size=lambda: 2), E)
    ids = torch.zeros(3, 2, dtype=torch.long)
    for x, ids_TK, words in [
        (torch.zeros(3, H), ids, "these tokens are float32"),
        (torch.zeros(3, 100).bfloat16(), ids, "divisible by 256, this has 100"),
        (torch.zeros(3, H).bfloat16(), ids[:, :1].expand(3, 33), "up to 32 experts per token, this has 33"),
    ]:
        with pytest.raises(BackendUnavailable, match=words):
            dispatcher.dispatch(x, ids_TK, torch.ones(ids_TK.shape))

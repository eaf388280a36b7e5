"""The choice of tiles for QuACK's GEMMs, without QuACK: what is likely, what is timed, what is kept, what is said."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import fake_quack
import pytest
import test_experts
import torch

from moepatch import store
from moepatch.experts import quack_tiles
from moepatch.experts.quack import quack_experts
from moepatch.experts.quack_tiles import Gemm, Problem

CPU = torch.device("cpu")
UP = Problem("up projection (128, 1536, 2048)", "bfloat16", 32768, 256, 1536, 2048, "m", True, True, 2, CPU)
SQUARE = UP._replace(m=4096, pairs=False, gather=False, outputs=1, n=2048)


def tiles(m, n, pingpong, cluster_m=2, cluster_n=1):
    return fake_quack.Tiling(m, n, pingpong, cluster_m, cluster_n)


def test_what_the_model_of_the_gpu_expects():
    """Small groups want small blocks, large groups large ones, and a width its divisors."""
    small, large = tiles(128, 192, True), tiles(256, 192, False)
    assert quack_tiles.expected(small, UP) < quack_tiles.expected(large, UP)
    assert quack_tiles.expected(large, SQUARE) < quack_tiles.expected(small, SQUARE) * 1.1
    odd = UP._replace(n=2880)
    assert quack_tiles.expected(tiles(128, 192, True), odd) < quack_tiles.expected(tiles(128, 256, False), odd)
    assert quack_tiles.expected(tiles(128, 192, False), UP) > quack_tiles.expected(tiles(128, 192, True), UP)


def test_quacks_tilings_are_sorted_and_those_that_cannot_be_are_left_out(monkeypatch):
    fields = [*fake_quack.Tiling._fields, "device_capacity", "swap_ab"]
    config = dataclasses.make_dataclass("GemmConfig", fields, frozen=True)
    every = [
        config(*tiles(*tile, *cluster), capacity, swap)
        for tile in ((128, 192, True), (128, 256, False), (256, 128, False))
        for cluster in ((1, 2), (2, 1))
        for capacity in (9, 10)
        for swap in (False, True)
    ]
    asked = []
    module = SimpleNamespace(
        get_all_configs=lambda epilogue: asked.append(epilogue) or every,
        config_supports=lambda c, gather_A, varlen_m: not gather_A or c.cluster_n == 1,
    )
    monkeypatch.setitem(sys.modules, "quack", SimpleNamespace(gemm_config=module))
    monkeypatch.setitem(sys.modules, "quack.gemm_config", module)
    found = quack_tiles.possible(UP)
    assert sorted(c.cluster_m for c in found) == [1, 1, 1, 2, 2, 2] and all(c.cluster_n == 1 and c.device_capacity == 9 and not c.swap_ab for c in found)
    assert len(quack_tiles.possible(SQUARE)) == 6 and asked == ["gated", None]
    costs = [quack_tiles.expected(c, UP) for c in found]
    assert costs == sorted(costs) and found[0].cluster_m == 2
    assert quack_tiles.possible(UP._replace(m=100))[0].cluster_m == 1  # half of a cluster would be empty


@pytest.fixture
def options(monkeypatch, tmp_path):
    """Four tilings, the second of which is the fastest and the third cannot be launched; files in a directory of the test."""
    monkeypatch.setenv("MOEPATCH_CACHE", str(tmp_path / "not there yet"))
    found = [tiles(128, n, True) for n in (128, 160, 192, 208)] + [tiles(256, 128, False)]
    found[2] = tiles(128, 192, True, 1, 2)
    monkeypatch.setattr(quack_tiles, "possible", lambda problem: found)
    monkeypatch.setattr(quack_tiles, "_machine", lambda device: "quack 0, a GPU")
    monkeypatch.setattr(quack_tiles, "_milliseconds", lambda run, device: run())
    compiled = []
    monkeypatch.setattr(quack_tiles, "compile_together", lambda jobs: compiled.append([t for _, t in jobs]))
    return found, compiled


def run(tiling):
    if tiling.tile_n == 192:
        raise RuntimeError("too much shared memory")
    return {128: 2.0, 160: 1.0, 208: 3.0}[tiling.tile_n]


def test_the_fastest_is_kept_on_file_and_said_once(options, capsys):
    found, compiled = options
    gemm, other = Gemm(UP, run), Gemm(SQUARE, run)
    assert quack_tiles.chosen(gemm, lambda: [other]) == found[1]
    assert compiled == [found[:4] * 2], "those of both GEMMs in one go"
    assert capsys.readouterr().err.startswith("moepatch: QuACK's tiles for the up projection (128, 1536, 2048) with 32768 rows ... 128x160 pingpong 2x1, ")
    (entry,) = json.loads((store.cache_directory() / "quack_tiles.json").read_text()).items()
    assert entry == ("quack 0, a GPU, up projection (128, 1536, 2048), bfloat16, rows below 2^16", "128x160 pingpong 2x1")

    assert quack_tiles.chosen(Gemm(UP._replace(rows=40000), run), pytest.fail) == found[1]
    assert len(compiled) == 1 and capsys.readouterr().err == "" and quack_tiles.unknown(UP) == []
    quack_tiles.chosen(Gemm(UP._replace(rows=70000), run))
    assert len(store.read("quack_tiles.json")) == 2, "entries are added to those of others"


def test_the_usual_tiles_are_timed_wherever_the_model_puts_them(options):
    found, _ = options
    assert quack_tiles.promising(UP) == found[:4]
    found.append(tiles(128, 192, True))
    assert quack_tiles.promising(UP) == [*found[:4], found[-1]]


def test_tiles_that_quack_no_longer_has_are_looked_for_again(options):
    store.add("quack_tiles.json", {quack_tiles._key(UP): "64x64 pingpong 4x4"})
    assert quack_tiles.chosen(Gemm(UP, run)) == options[0][1]


def test_an_error_of_all_tiles_is_the_callers(options):
    def fails(tiling):
        raise RuntimeError("no such kernel")

    with pytest.raises(RuntimeError, match="no such kernel"):
        quack_tiles.chosen(Gemm(UP, fails))


def test_other_ranks_say_nothing(options, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    quack_tiles.chosen(Gemm(UP, run))
    assert capsys.readouterr().err == ""


def test_a_layer_compiles_its_six_gemms_at_its_first_call(monkeypatch, capsys):
    on_file = fake_quack.install(monkeypatch, tuned_from=0)
    jobs = []
    monkeypatch.setattr(quack_tiles, "compile_together", lambda found: jobs.append(len(found)) or [run(tiles) for run, tiles in found])
    module, spec = test_experts.experts("bias")
    ids, weights = test_experts.routing("random")
    test_experts.run(quack_experts, module, spec, ids, weights)
    assert jobs == [18, 3, 3, 3, 3, 3] and len(on_file) == 6
    assert capsys.readouterr().err.count("moepatch: QuACK's tiles") == 6
    fake_quack.quack_calls._PLANS.clear()  # another process
    test_experts.run(quack_experts, module, spec, ids, weights)
    assert len(jobs) == 6 and capsys.readouterr().err == ""


class Pool:
    """QuACK's workers: each job is pending twice and then done; one of them fails."""

    def __init__(self):
        self.asked = {}
        self._futures = {}

    def poll(self, sha):
        self.asked[sha] = self.asked.get(sha, 0) + 1
        return ("pending" if self.asked[sha] < 3 else "failed" if sha == "b" else "done"), None


def test_kernels_are_compiled_by_workers_and_here(monkeypatch):
    import contextlib

    class Pending(BaseException):
        def __init__(self, sha):
            self.sha = sha

    pool, here, depth = Pool(), [], []

    @contextlib.contextmanager
    def suppressed():
        depth.append(1)
        yield
        depth.pop()

    module = SimpleNamespace(CompilePending=Pending, pool_scope=lambda: contextlib.nullcontext(pool), suppress_pool=suppressed)
    for name in ("quack", "quack.cache"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setitem(sys.modules, "quack.cache.async_compile", module)

    def job(sha):
        if depth:
            here.append(sha)
            return
        # the first is with a worker already, the others wait in line
        pool._futures[sha] = SimpleNamespace(cancel=lambda: sha != "a")
        raise Pending(sha)

    def broken(tiling):
        raise ValueError("not for this shape")

    quack_tiles.compile_together([(job, "a"), (job, "b"), (broken, None), (job, "c")])
    assert here == ["c", "b"] and pool.asked["a"] >= 3


def test_turns(monkeypatch):
    """The best of several rounds counts, and nothing is timed where there is one choice."""
    order = []
    monkeypatch.setattr(quack_tiles, "_milliseconds", lambda run, device: order.append(run()) or len(order))
    two = [tiles(128, 128, True), tiles(128, 160, True)]
    times = quack_tiles.timed(Gemm(UP, lambda t: t.tile_n), two)
    assert order == [128, 160] * 3 and list(times.values()) == [1, 2]
    assert quack_tiles.timed(Gemm(UP, lambda t: t), two[:1]) == {two[0]: math.inf}


def test_a_file_that_cannot_be_read_or_written(monkeypatch, tmp_path):
    monkeypatch.setenv("MOEPATCH_CACHE", str(tmp_path))
    (tmp_path / "x.json").write_text("{ not json")
    assert store.read("x.json") == {}
    store.add("x.json", {"a": 1})
    assert store.read("x.json") == {"a": 1}
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOEPATCH_CACHE", str(tmp_path / "file"))
    store.add("x.json", {"a": 2})
    assert store.read("x.json") == {}


def test_nothing_that_is_added_is_lost(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEPATCH_CACHE", str(tmp_path))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: store.add("x.json", {str(i): i}), range(80)))
    assert store.read("x.json") == {str(i): i for i in range(80)}

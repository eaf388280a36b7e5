"""Saving and loading sharded models: the files of one process, memory of one file, and crashes that leave the old checkpoint whole."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import zoo
from ranks import RankError, on_ranks
from safetensors.torch import load_file
from test_parallel import mesh_of, whole
from transformers import AutoModelForCausalLM

import moepatch
import moepatch.parallel.agree
from moepatch.parallel import pieces, save

MESHES = {"ep2": {"ep": 2}, "shard2 x ep2": {"dp_shard": 2, "ep": 2}, "replicate2 x ep2": {"dp_replicate": 2, "ep": 2}}
FAMILIES = ["qwen3_moe", "qwen3_moe_tied", "gpt_oss", "nemotron_h", "mixtral", "deepseek_v3"]
SMALL = "60KB"


def files_of(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def assert_same_files(a, b):
    a, b = files_of(a), files_of(b)
    assert a.keys() == b.keys()
    assert [name for name in a if a[name] != b[name]] == []


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Checkpoints of the families as one process writes them, several files each; and a fused one."""
    folder = tmp_path_factory.mktemp("hub")
    for name in FAMILIES:
        zoo.build(name).save_pretrained(folder / name, max_shard_size=SMALL)
    zoo.build("qwen3_moe").save_pretrained(folder / "qwen3_moe_fused", save_original_format=False, max_shard_size=SMALL)
    return folder


def quiet(name, hub, **options):
    return AutoModelForCausalLM.from_pretrained(hub / name, **options)


def sharded(hub, name, dims):
    return moepatch.optimize(quiet(name, hub), mesh_of(dims), verify=False)


def save_all(hub, out, dims, names):
    for name in names:
        sharded(hub, name, dims).save_pretrained(out / name, max_shard_size=SMALL)


@pytest.mark.parametrize("mesh", MESHES)
def test_files_are_those_of_one_process(hub, tmp_path, mesh):
    dims = MESHES[mesh]
    names = [*FAMILIES, "qwen3_moe_fused"]
    on_ranks(torch.Size(dims.values()).numel(), save_all, hub, tmp_path / "out", dims, names)
    for name in names:
        quiet(name, hub).save_pretrained(tmp_path / "one" / name, max_shard_size=SMALL)
        assert len(files_of(tmp_path / "out" / name)) > 8
        assert_same_files(tmp_path / "out" / name, tmp_path / "one" / name)
        assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(names)


def save_variations(hub, out):
    rank, dims = dist.get_rank(), {"dp_shard": 2, "ep": 2}
    model = sharded(hub, "qwen3_moe", dims)
    model.save_pretrained(out / "fused", save_original_format=False, max_shard_size=SMALL)
    model.save_pretrained(out / "dtensors", state_dict=model.state_dict(), is_main_process=rank == 0)
    full = {key: whole(value) * 2 for key, value in model.state_dict().items()}
    model.save_pretrained(out / "full", state_dict=full if rank == 0 else {}, is_main_process=rank == 0)
    model.save_pretrained(out / "fp16", variant="fp16", max_shard_size=SMALL)
    model.save_pretrained(out / "nothing", is_main_process=False)
    some = {key: value for key, value in model.state_dict().items() if rank == 0 or "lm_head" not in key}
    hold = r"lm_head.weight: ranks \[0\] hold 2048 of the 8192 elements"
    refused = {hold: {"state_dict": some}, "pushed": {"push_to_hub": True}, "for models that": {"distributed_checkpoint": True}}
    for words, options in refused.items():
        with pytest.raises(moepatch.MoePatchError, match=words):
            model.save_pretrained(out / "refused", **options)
    # Not from a checkpoint, so that the conversion is looked up by class; and experts that do not divide evenly.
    moepatch.optimize(zoo.build("qwen3_moe", num_experts=6), mesh_of(dims), verify=False).save_pretrained(out / "uneven")


def test_formats_state_dicts_and_models_without_a_checkpoint(hub, tmp_path):
    on_ranks(4, save_variations, hub, tmp_path / "out")
    model, out, one = quiet("qwen3_moe", hub), tmp_path / "out", tmp_path / "one"
    model.save_pretrained(one / "fused", save_original_format=False, max_shard_size=SMALL)
    model.save_pretrained(one / "dtensors")
    model.save_pretrained(one / "full", state_dict={key: value * 2 for key, value in model.state_dict().items()})
    model.save_pretrained(one / "fp16", variant="fp16", max_shard_size=SMALL)
    zoo.build("qwen3_moe", num_experts=6).save_pretrained(one / "uneven")
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in one.iterdir())
    for path in one.iterdir():
        assert_same_files(out / path.name, path)


def save_measured(hub, out):
    model, writers, peaks = sharded(hub, "qwen3_moe", {"ep": 2}), [], []
    store, exchange = save.Writer.store, save.exchange

    def live(*more):
        groups = [*more, *(file for writer in writers for file in writer.pending.values())]
        tensors = [t for group in groups for t in group.values()]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    def watched_store(self, index, tensors):
        writers[:] = [self]
        peaks.append(live(tensors))
        store(self, index, tensors)

    def watched_exchange(route, leaving, arriving, *rest):
        exchange(route, leaving, arriving, *rest)
        peaks.append(live(arriving) + sum(t.nbytes for t in leaving.values()) * (dist.get_rank() != 0))

    save.Writer.store, save.exchange = watched_store, watched_exchange
    try:
        model.save_pretrained(out, max_shard_size=SMALL)
    finally:
        save.Writer.store, save.exchange = store, exchange
    return max(peaks)


def test_no_rank_holds_more_than_a_file_and_a_group(hub, tmp_path):
    peaks = on_ranks(2, save_measured, hub, tmp_path / "out")
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")}
    group = 8 * 96 * 64 * 4  # the largest conversion: gate and up of all experts of a layer
    assert peaks[0] <= max(sizes.values()) + group < sum(sizes.values()) / 2
    assert peaks[1] <= group / 2


def fail(hub, out):
    rank, model = dist.get_rank(), sharded(hub, "qwen3_moe", {"ep": 2})
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    calls, real = [0], (pieces.Held.local_bytes, save.save_file)

    def broken(function, error):
        def call(*args, **kwargs):
            calls[0] += 1
            if calls[0] > 2:
                raise error
            return function(*args, **kwargs)

        return call

    if rank == 1:
        pieces.Held.local_bytes = broken(real[0], MemoryError("no memory left"))
    with pytest.raises(MemoryError if rank == 1 else moepatch.parallel.agree.RankFailed, match="no memory left"):
        model.save_pretrained(out, max_shard_size=SMALL)
    calls[0], pieces.Held.local_bytes = 0, real[0]
    if rank == 0:
        save.save_file = broken(real[1], OSError(28, "No space left on device"))
    with pytest.raises(OSError if rank == 0 else moepatch.parallel.agree.RankFailed, match="No space left"):
        model.save_pretrained(out, max_shard_size=SMALL)
    save.save_file = real[1]
    dist.barrier()  # rank 0 has cleaned up
    left = files_of(out), [path.name for path in out.parent.iterdir()]
    dist.barrier()
    model.save_pretrained(out, max_shard_size=SMALL)
    return left


def test_what_fails_on_one_rank_fails_on_all_and_leaves_the_old_checkpoint(hub, tmp_path):
    out = tmp_path / "out"
    quiet("qwen3_moe", hub).save_pretrained(out)
    before = files_of(out)
    for after, names in on_ranks(2, fail, hub, out):
        assert after == before and names == ["out"]
    key = "model.layers.1.mlp.experts.7.down_proj.weight"
    new = {k: v for path in out.glob("*.safetensors") for k, v in load_file(path).items()}
    assert torch.equal(new[key], load_file_of(hub / "qwen3_moe")[key] * 3)


def load_file_of(directory):
    return {key: value for path in Path(directory).glob("*.safetensors") for key, value in load_file(path).items()}


def die(hub, out, victim, moment):
    model = sharded(hub, "qwen3_moe", {"ep": 2})
    if dist.get_rank() == victim:
        module, name = moment
        target = {"save": save, "pieces.Held": pieces.Held}[module]
        real, calls = getattr(target, name), []

        def last(*args, **kwargs):
            calls.append(name)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(target, name, last)
    model.save_pretrained(out, max_shard_size=SMALL)


@pytest.mark.parametrize("victim, moment", [(1, ("save", "exchange")), (0, ("save", "save_file")), (0, ("save", "together"))])
def test_a_rank_killed_while_saving_leaves_the_old_checkpoint_and_nobody_waiting(hub, tmp_path, victim, moment):
    out = tmp_path / "out"
    zoo.build("qwen3_moe", seed=5).save_pretrained(out)
    before = files_of(out)
    with pytest.raises(RankError, match=r"ranks \[\] hung, ranks \[0, 1\] failed") as caught:
        on_ranks(2, die, hub, out, victim, moment)
    assert f"rank {victim} (-9)" in str(caught.value)
    assert files_of(out) == before
    AutoModelForCausalLM.from_pretrained(out)

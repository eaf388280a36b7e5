"""Saving: every expert is there, under the names of the checkpoint it came from, and a crash leaves the old checkpoint whole."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import compare
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import moepatch
from moepatch import checkpoint


def keys_of(directory: Path) -> dict[str, tuple]:
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            found |= {key: (tuple(shard.get_slice(key).get_shape()), shard.get_slice(key).get_dtype()) for key in shard.keys()}
    return found


def trained(model):
    """One optimizer step, so that every weight differs from what was loaded."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compare.step("qwen3_moe", model)
    optimizer.step()
    return model


def test_every_expert_is_saved_under_its_own_key_in_shards(qwen3, tmp_path):
    qwen3.save_pretrained(tmp_path / "hub")
    model = moepatch.optimize(AutoModelForCausalLM.from_pretrained(tmp_path / "hub"))
    trained(model)
    model.save_pretrained(tmp_path / "out", max_shard_size="60KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert keys_of(tmp_path / "out") == keys_of(tmp_path / "hub")
    experts = [key for key in keys_of(tmp_path / "out") if ".experts." in key]
    assert len(experts) == 2 * 8 * 3 and "model.layers.0.mlp.experts.7.gate_proj.weight" in experts
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(keys_of(tmp_path / "hub"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))


def test_a_checkpoint_of_fused_experts_stays_fused(qwen3, tmp_path):
    qwen3.save_pretrained(tmp_path / "fused", save_original_format=False)
    model = moepatch.optimize(AutoModelForCausalLM.from_pretrained(tmp_path / "fused"))
    model.save_pretrained(tmp_path / "out")
    assert keys_of(tmp_path / "out") == keys_of(tmp_path / "fused")
    assert "model.layers.0.mlp.experts.gate_up_proj" in keys_of(tmp_path / "out")


def test_architectures_in_the_config_name_the_original_class(qwen3, tmp_path):
    moepatch.optimize(qwen3).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["Qwen3MoeForCausalLM"]


def test_a_state_dict_that_is_passed_in_is_what_is_saved(qwen3, tmp_path):
    moepatch.optimize(qwen3)
    state = {key: torch.zeros_like(value) for key, value in qwen3.state_dict().items()}
    qwen3.save_pretrained(tmp_path, state_dict=state)
    assert all((value == 0).all() for value in load_file(tmp_path / "model.safetensors").values())


def test_what_else_lies_in_the_directory_stays(qwen3, tmp_path):
    out = tmp_path / "out"
    (out / "checkpoint-1").mkdir(parents=True)
    (out / "checkpoint-1" / "optimizer.pt").write_bytes(b"state")
    (out / "tokenizer.json").write_text("{}")
    (out / "model-00001-of-00002.safetensors").write_bytes(b"a stale shard")
    moepatch.optimize(qwen3).save_pretrained(out)
    assert (out / "checkpoint-1" / "optimizer.pt").read_bytes() == b"state" and (out / "tokenizer.json").read_text() == "{}"
    assert not (out / "model-00001-of-00002.safetensors").exists() and (out / "model.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_variant_is_saved_beside_the_plain_weights(qwen3, tmp_path):
    model = moepatch.optimize(qwen3)
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, variant="fp16", max_shard_size="60KB")
    model.save_pretrained(tmp_path, variant="fp16")
    assert sorted(p.name for p in tmp_path.glob("*.safetensors*")) == ["model.fp16.safetensors", "model.safetensors"]


def test_directories_of_a_save_that_was_killed_after_the_exchange_are_rescued(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    left = checkpoint._stage_path(tmp_path, "out").with_name(checkpoint._stage_path(tmp_path, "out").name.rsplit("-", 1)[0] + "-999999999")
    (left / "checkpoint-7").mkdir(parents=True)
    (left / "model.safetensors").touch()
    with checkpoint.staged(out) as stage:
        (stage / "model.safetensors").touch()
    assert sorted(p.name for p in out.iterdir()) == ["checkpoint-7", "model.safetensors"] and not left.exists()


def test_where_the_directory_cannot_be_replaced_its_files_are(qwen3, tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    out = tmp_path / "out"
    out.mkdir()
    (out / "model-00001-of-00002.safetensors").write_bytes(b"a stale shard")
    inode = out.stat().st_ino
    moepatch.optimize(qwen3).save_pretrained(out)
    assert out.stat().st_ino == inode and sorted(p.name for p in out.iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]
    AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize("atomic", [True, False])
def test_directories_are_exchanged_with_and_without_help_of_the_kernel(tmp_path, monkeypatch, atomic):
    if not atomic:
        monkeypatch.setattr(checkpoint, "_renameat2_exchange", lambda a, b: False)
    a, b = tmp_path / "a", tmp_path / "b"
    a.mkdir(), b.mkdir()
    (a / "new").touch(), (b / "old").touch()
    checkpoint._exchange(a, b)
    assert (b / "new").exists() and (a / "old").exists() and len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_leaves_the_old_checkpoint_whole(qwen3, tmp_path, monkeypatch):
    moepatch.optimize(qwen3).save_pretrained(tmp_path / "out")
    old = load_file(tmp_path / "out" / "model.safetensors")
    trained(qwen3)
    import transformers.modeling_utils as modeling

    written = []

    def full(tensors, path, *args, **kwargs):
        Path(path).write_bytes(b"half a shard")
        written.append(path)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(modeling, "safe_save_file", full)
    with pytest.raises(OSError, match="No space left"):
        qwen3.save_pretrained(tmp_path / "out", max_shard_size="60KB")
    assert written
    assert all(torch.equal(value, old[key]) for key, value in load_file(tmp_path / "out" / "model.safetensors").items())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def _save_and_hang_after_the_first_shard(source, out, ready):
    import transformers.modeling_utils as modeling

    torch.set_num_threads(1)
    model = moepatch.optimize(AutoModelForCausalLM.from_pretrained(source))
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    save = modeling.safe_save_file

    def slow(*args, **kwargs):
        save(*args, **kwargs)
        ready.set()
        time.sleep(3600)

    modeling.safe_save_file = slow
    model.save_pretrained(out, max_shard_size="60KB")


def test_a_process_killed_between_two_shards_leaves_the_old_checkpoint_whole(qwen3, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    qwen3.save_pretrained(source)
    qwen3.save_pretrained(out, max_shard_size="60KB")
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_save_and_hang_after_the_first_shard, args=(source, out, ready))
    process.start()
    while not ready.wait(1):
        assert process.is_alive(), "the child ended before it wrote a shard"
    os.kill(process.pid, signal.SIGKILL)
    process.join(1500)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == files
    AutoModelForCausalLM.from_pretrained(out)
    left = [path for path in tmp_path.iterdir() if "moepatch" in path.name]
    assert len(left) == 1
    moepatch.optimize(qwen3).save_pretrained(out)  # the next save sweeps up
    assert not left[0].exists()

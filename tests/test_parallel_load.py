"""Loading into sharded models from the meta device, each rank reading only its own; and torch's distributed checkpoints for resuming."""

from __future__ import annotations

import json
import math
from pathlib import Path

import compare
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import zoo
from listed_pretrained import ListedConfig, ListedForLM
from ranks import on_ranks
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_parallel import batch, mesh_of, whole
from test_parallel_save import FAMILIES, MESHES, SMALL, assert_same_files, hub, quiet  # noqa: F401
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from transformers import AutoConfig, AutoModelForCausalLM

import moepatch
from moepatch.errors import CheckpointError
from moepatch.parallel import recipes
from moepatch.parallel.load import load_checkpoint
from moepatch.parallel.pieces import local_part


class Counted:
    """A safetensors file that counts the bytes that are read."""

    read = 0

    def __init__(self, *args):
        self.file = safe_open(*args)

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *exc):
        return self.file.__exit__(*exc)

    def keys(self):
        return self.file.keys()

    def get_tensor(self, key):
        tensor = self.file.get_tensor(key)
        Counted.read += tensor.nbytes
        return tensor

    def get_slice(self, key):
        return CountedSlice(self.file.get_slice(key))


class CountedSlice:
    def __init__(self, part):
        self.part = part

    def get_shape(self):
        return self.part.get_shape()

    def __getitem__(self, index):
        tensor = self.part[index]
        Counted.read += tensor.nbytes
        return tensor


@pytest.fixture
def counted(monkeypatch):
    Counted.read = 0
    monkeypatch.setattr(recipes, "safe_open", Counted)


def from_meta(directory, mesh=None, **options):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    return moepatch.optimize(model, mesh, **options)


def load_on_ranks(hub, out, dims, names):
    recipes.safe_open = Counted
    for name in names:
        model = from_meta(hub / name, mesh_of(dims))
        assert all(p.device.type == "meta" for p in model.parameters())
        Counted.read = 0
        assert load_checkpoint(model, hub / name) is model
        stored = {id(value): value for value in [*model.parameters(), *(b for n, b in model.named_buffers() if n in model.state_dict())]}
        assert Counted.read == sum(local_part(value).nbytes for value in stored.values()), name
        truth = quiet(name, hub)
        for (key, value), (_, right) in zip(model.named_parameters(), truth.named_parameters(), strict=True):
            assert torch.equal(whole(value), right), f"{name}: {key}"
        for (key, value), (_, right) in zip(model.named_buffers(), truth.named_buffers(), strict=True):
            assert torch.equal(value, right) and value.device == right.device, f"{name}: {key}"
        inputs = batch(name.removesuffix("_fused"), truth, dist.get_rank())
        output = model(**inputs)
        assert compare.error(output.logits, truth(**inputs).logits) <= 1e-6, name
        zoo.loss(output).backward()
        if model.config.tie_word_embeddings:
            assert model.lm_head.weight is model.get_input_embeddings().weight
        model.save_pretrained(out / name, max_shard_size=SMALL)
    # A model with weights is filled in place, also after a forward has left the outermost parameters whole.
    with torch.no_grad():
        for p in model.parameters():
            local_part(p).zero_()
    model(**inputs)
    load_checkpoint(model, hub / name)
    assert all(torch.equal(whole(a), b) for a, b in zip(model.parameters(), truth.parameters(), strict=True))


@pytest.mark.parametrize("mesh", MESHES)
def test_every_rank_reads_its_own_parts_only(hub, tmp_path, mesh):  # noqa: F811
    names = [*FAMILIES, "qwen3_moe_fused"] if mesh == "ep2" else ["qwen3_moe_tied", "gpt_oss", "nemotron_h", "qwen3_moe_fused"]
    on_ranks(math.prod(MESHES[mesh].values()), load_on_ranks, hub, tmp_path, MESHES[mesh], names)
    for name in names:
        quiet(name, hub).save_pretrained(tmp_path / "one" / name, max_shard_size=SMALL)
        assert_same_files(tmp_path / name, tmp_path / "one" / name)


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_moe_fused", "gpt_oss"])
def test_without_a_mesh(hub, name, counted):  # noqa: F811
    model = load_checkpoint(from_meta(hub / name), hub / name, progress=True)
    truth = quiet(name, hub)
    assert Counted.read == sum(p.nbytes for p in truth.parameters())
    inputs = zoo.inputs(name.removesuffix("_fused"), truth)
    assert compare.error(model(**inputs).logits, truth(**inputs).logits) <= 1e-5
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), truth.state_dict().values(), strict=True))


def test_into_another_dtype_and_into_a_model_that_is_not_patched(hub):  # noqa: F811
    model = load_checkpoint(zoo.build("qwen3_moe", dtype=torch.bfloat16, seed=3), hub / "qwen3_moe")
    truth = quiet("qwen3_moe", hub, dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), truth.state_dict().values(), strict=True))


def damaged(hub, out, change):  # noqa: F811
    """The checkpoint with changes, in one file."""
    tensors = {k: v for path in (hub / "qwen3_moe").glob("*.safetensors") for k, v in load_file(path).items()}
    change(tensors)
    out.mkdir()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


DAMAGE = {
    "missing": (lambda t: t.pop("model.norm.weight"), r"missing \(1\): model.norm.weight"),
    "additional": (lambda t: t.update({"model.norm.scale": torch.ones(2)}), r"additional \(1\): model.norm.scale"),
    "shape": (lambda t: t.update({"model.norm.weight": torch.ones(3)}), r"norm.weight: the checkpoint has \(3,\), the model \(64,\)"),
    "expert": (lambda t: [t.pop(k) for k in list(t) if "0.mlp.experts.5." in k], r"checkpoint has \(7, 64, 48\), the model \(8, 64, 48\)"),
    "half an expert": (lambda t: t.pop("model.layers.0.mlp.experts.5.up_proj.weight"), "gate_up_proj cannot be made of"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_checkpoint_of_another_model_is_refused_before_anything_is_read(hub, tmp_path, counted, damage):  # noqa: F811
    change, words = DAMAGE[damage]
    model = from_meta(hub / "qwen3_moe")
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(model, damaged(hub, tmp_path / "bad", change))
    assert Counted.read == 0 and all(p.device.type == "meta" for p in model.parameters())


def test_what_is_not_a_checkpoint(hub, tmp_path):  # noqa: F811
    model = from_meta(hub / "qwen3_moe")
    with pytest.raises(CheckpointError, match="has neither model.safetensors.index.json nor"):
        load_checkpoint(model, tmp_path)
    index = {"metadata": {}, "weight_map": {"a": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="lacks 1 files that its index names: model-1.safetensors"):
        load_checkpoint(model, tmp_path)
    (tmp_path / "model-1.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(model, tmp_path)
    save_file({"b": torch.ones(1)}, tmp_path / "model-1.safetensors")
    with pytest.raises(CheckpointError, match="1 tensors are not in the files that the index names for them: a"):
        load_checkpoint(model, tmp_path)
    with pytest.raises(moepatch.MoePatchError, match="fills a transformers model; this is a Linear"):
        load_checkpoint(torch.nn.Linear(2, 2), tmp_path)


def break_while_reading(hub):  # noqa: F811
    model = from_meta(hub / "qwen3_moe", mesh_of({"ep": 2}))

    class Broken(Counted):
        def get_tensor(self, key):
            if dist.get_rank() == 1 and "layers.1" in key:
                raise OSError(5, "Input/output error")
            return super().get_tensor(key)

    recipes.safe_open = Broken
    with pytest.raises(OSError if dist.get_rank() == 1 else moepatch.MoePatchError, match="Input/output error"):
        load_checkpoint(model, hub / "qwen3_moe")
    recipes.safe_open = safe_open
    devices = {p.device.type for p in model.parameters()}
    load_checkpoint(model, hub / "qwen3_moe")
    assert torch.equal(whole(model.lm_head.weight), quiet("qwen3_moe", hub).lm_head.weight)
    return devices


def test_a_failure_on_one_rank_while_reading_is_raised_on_all_and_leaves_nothing_half_filled(hub):  # noqa: F811
    for devices in on_ranks(2, break_while_reading, hub):
        assert devices == {"meta"}


# -------------------------------------------------------------------------------------------------- distributed checkpoints


def trained(hub, dims, steps):  # noqa: F811
    model = moepatch.optimize(zoo.build("qwen3_moe", seed=dist.get_world_size()), mesh_of(dims), verify=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        zoo.loss(model(**batch("qwen3_moe", model, dist.get_rank()))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def everything(model, optimizer):
    """Weights, Adam's states, and the weights after one more step with gradients that do not depend on the mesh."""
    states = {f"{key} {name}": whole(value).clone() for key, p in model.named_parameters() for name, value in optimizer.state[p].items()}
    weights = {key: whole(p.detach()).clone() for key, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = p.detach().sin()
    optimizer.step()
    return states | weights | {f"{key} next": whole(p.detach()).clone() for key, p in model.named_parameters()}


def save_distributed(hub, out, dims):  # noqa: F811
    model, optimizer = trained(hub, dims, steps=2)
    dcp.save({"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=out)
    return everything(model, optimizer)


def resume_distributed(hub, out, dims):  # noqa: F811
    model, optimizer = trained(hub, dims, steps=0)
    with torch.no_grad():
        model(**batch("qwen3_moe", model, 0))  # leaves parameters gathered; asking for the model's state brings them back
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=out)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    return everything(model, optimizer)


@pytest.mark.parametrize("dims", [{"ep": 4}, {"dp_shard": 2, "ep": 2}], ids=str)
def test_training_resumes_on_another_mesh(hub, tmp_path, dims):  # noqa: F811
    before, *_ = on_ranks(2, save_distributed, hub, tmp_path, {"ep": 2})
    after, *_ = on_ranks(4, resume_distributed, hub, tmp_path, dims)
    assert before.keys() == after.keys() and any("experts.gate_up_proj exp_avg_sq" in key for key in before)
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    assert len(list(Path(tmp_path).glob("*.distcp"))) == 2


# ------------------------------------------------------------------------------------------- experts that were a list of modules


def save_and_load_a_list(source, out, dims):
    mesh = mesh_of(dims)
    model = moepatch.optimize(ListedForLM.from_pretrained(source), mesh, verify=False)
    model.save_pretrained(out, max_shard_size="8KB")
    with torch.device("meta"):
        empty = ListedForLM(ListedConfig())
    recipes.safe_open = Counted
    empty = load_checkpoint(moepatch.optimize(empty, mesh), out)
    read = Counted.read
    assert [key for key, p in empty.named_parameters() if not torch.equal(whole(p), whole(model.get_parameter(key)))] == []
    assert read == sum(local_part(p).nbytes for p in empty.parameters())


@pytest.mark.parametrize("dims", [{"ep": 2}, {"dp_shard": 2, "ep": 2}], ids=str)
def test_experts_of_a_list_go_by_the_names_of_its_elements(tmp_path, dims):
    torch.manual_seed(0)
    ListedForLM(ListedConfig()).save_pretrained(tmp_path / "source", max_shard_size="8KB")
    on_ranks(math.prod(dims.values()), save_and_load_a_list, tmp_path / "source", tmp_path / "out", dims)
    ListedForLM.from_pretrained(tmp_path / "source").save_pretrained(tmp_path / "one", max_shard_size="8KB")
    assert_same_files(tmp_path / "out", tmp_path / "one")

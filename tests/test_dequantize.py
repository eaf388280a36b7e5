"""load_checkpoint of quantized checkpoints: the weights of ``from_pretrained(..., dequantize=True)``, each rank reading its own part."""

from __future__ import annotations

import json

import pytest
import quantized_checkpoints
import torch
import torch.distributed as dist
from ranks import on_ranks
from safetensors.torch import load_file
from test_parallel import mesh_of, whole
from test_parallel_load import Counted, from_meta
from transformers import AutoConfig, AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

import moepatch
from moepatch.errors import CheckpointError
from moepatch.parallel import recipes
from moepatch.parallel.dequantize import per_number

CONFIGS = {"gpt_oss": Mxfp4Config, "deepseek_v3": FineGrainedFP8Config}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized")
    for name in CONFIGS:
        getattr(quantized_checkpoints, name)(folder / name)
    return folder


def plain(hub, name, dtype=torch.bfloat16):
    return AutoModelForCausalLM.from_pretrained(hub / name, dtype=dtype, quantization_config=CONFIGS[name](dequantize=True))


def assert_same(model, truth):
    state, right = model.state_dict(), truth.state_dict()
    assert state.keys() == right.keys() and all(torch.equal(whole(state[key]), right[key]) for key in right)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_weights_are_those_of_from_pretrained(hub, tmp_path, name, dtype):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(hub / name), dtype=dtype)
    model = moepatch.load_checkpoint(moepatch.optimize(model), hub / name)
    assert_same(model, plain(hub, name, dtype))
    assert all(p.dtype == dtype for key, p in model.named_parameters() if "experts." in key or "_proj." in key)
    # What it saves are plain weights under the hub's names, and its configuration says nothing else.
    model.save_pretrained(tmp_path)
    stored, saved = load_file(hub / name / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert saved.keys() == {key.removesuffix("_blocks") for key in stored if not key.endswith(("_scales", "_scale_inv"))}
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype), model)


def load_on_ranks(hub, dims):
    recipes.safe_open = Counted
    for name in CONFIGS:
        model = from_meta(hub / name, mesh_of(dims))
        Counted.read = 0
        moepatch.load_checkpoint(model, hub / name)
        stored = load_file(hub / name / "model.safetensors")
        scales = sum(t.nbytes for key, t in stored.items() if key.endswith("_scale_inv"))
        assert Counted.read <= sum(t.nbytes for t in stored.values()) / dist.get_world_size() + scales + 2048, name
        assert_same(model, plain(hub, name, model.dtype))


def test_every_rank_reads_its_own_part(hub):
    on_ranks(2, load_on_ranks, hub, {"ep": 2})


def test_blocks_that_are_not_full(tmp_path):
    """576 rows in blocks of 128, as DeepSeek-V3 has: transformers 5.23 cannot load that, or takes 24 rows in blocks of 16 for two of 12."""
    block = (16, 24)
    directory = quantized_checkpoints.deepseek_v3(tmp_path, block, qk_rope_head_dim=8)
    model = moepatch.load_checkpoint(from_meta(directory), directory)
    stored = load_file(directory / "model.safetensors")
    partial = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    assert stored[partial].shape[0] % block[0] and stored[partial].shape[1] % block[1]
    right = quantized_checkpoints.unpacked(stored[partial], stored[f"{partial}_scale_inv"], block)
    assert torch.equal(model.get_parameter(partial), right.to(model.dtype))
    gate = model.model.layers[1].mlp.experts.gate_up_proj[3, : model.config.moe_intermediate_size]
    key = "model.layers.1.mlp.experts.3.gate_proj.weight"
    assert torch.equal(gate, quantized_checkpoints.unpacked(stored[key], stored[f"{key}_scale_inv"], block).to(model.dtype))


@pytest.mark.parametrize("shape", [(24, 40), (32, 48), (7, 5), (16, 96)])
@pytest.mark.parametrize("rows", [None, slice(3, 7), slice(0, 5)])
def test_scales_for_some_rows(shape, rows):
    block = (16, 24)
    scales = torch.rand(-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    given = per_number(scales, shape, block, rows)
    weight = torch.ones(shape)[rows if rows is not None else slice(None)]
    each = [size // count for size, count in zip(weight.shape, given.shape, strict=True)]
    assert all(size % count == 0 for size, count in zip(weight.shape, given.shape, strict=True))
    made = given.repeat_interleave(each[0], 0).repeat_interleave(each[1], 1)
    right = quantized_checkpoints.unpacked(torch.ones(shape), scales, block)
    assert torch.equal(made, right if rows is None else right[rows])


@pytest.mark.parametrize("block", [None, (64, 64)])
def test_scales_that_nobody_can_tell_apart(block):
    with pytest.raises(ValueError, match="5 scales along an axis of 576 numbers"):
        per_number(torch.rand(5, 1), (576, 64), block)
    assert per_number(torch.rand(4, 1), (576, 64), block).shape == (4, 1)


def test_what_cannot_be_read_says_so(hub, tmp_path):
    stored = hub / "gpt_oss" / "model.safetensors"
    (tmp_path / "model.safetensors").symlink_to(stored)
    config = json.loads((hub / "gpt_oss" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}))
    model = from_meta(hub / "gpt_oss")
    with pytest.raises(CheckpointError, match=r"is quantized \(bitsandbytes\), and transformers has no conversion"):
        moepatch.load_checkpoint(model, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key != "quantization_config"}))
    with pytest.raises(CheckpointError, match=r"look quantized \(torch.uint8\), and no config.json beside them says how"):
        moepatch.load_checkpoint(model, tmp_path)
    assert all(p.device.type == "meta" for p in model.parameters())

"""Past one host by simulation: models of hundreds of billions on the meta device, hundreds of ranks of torch's fake process group.

What is checked is arithmetic: which part of which parameter a rank would hold, in how many bytes, and under which names it would be saved.
"""

from __future__ import annotations

import math

import pytest
from ranks import apart

DEEPSEEK_V3 = {
    "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "n_shared_experts": 1, "n_routed_experts": 256,
    "routed_scaling_factor": 2.5, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "qk_nope_head_dim": 128, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "norm_topk_prob": True,
    "hidden_act": "silu", "max_position_embeddings": 163840, "rms_norm_eps": 1e-06, "tie_word_embeddings": False, "attention_bias": False,
}  # fmt: skip
#: A larger sibling of Nemotron 3 Super, whose facts are public: twice its widths, 48 layers of 512 latent experts. Not a released config.
NEMOTRON_550B = {
    "model_type": "nemotron_h", "vocab_size": 131072, "hidden_size": 8192, "hybrid_override_pattern": "MEMEMEME*" * 12,
    "num_hidden_layers": 108, "num_attention_heads": 64, "num_key_value_heads": 2, "head_dim": 128, "intermediate_size": 5120,
    "moe_intermediate_size": 5120, "moe_latent_size": 2048, "moe_shared_expert_intermediate_size": 10240, "n_routed_experts": 512,
    "n_shared_experts": 1, "num_experts_per_tok": 22, "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 5.0,
    "mamba_num_heads": 256, "mamba_head_dim": 64, "n_groups": 8, "ssm_state_size": 128, "conv_kernel": 4, "chunk_size": 128,
    "mlp_hidden_act": "relu2", "mamba_hidden_act": "silu", "tie_word_embeddings": False, "max_position_embeddings": 262144,
}  # fmt: skip
#: config, ranks, ep, total parameters, layers with experts, experts, their projections in the checkpoint, ranks to look at
CASES = {
    "DeepSeek-V3 on 256": (DEEPSEEK_V3, 256, 64, 671_026_404_352, 58, 256, ("gate_proj", "up_proj", "down_proj"), (0, 65, 255)),
    "Nemotron 550B on 128": (NEMOTRON_550B, 128, 64, None, 48, 512, ("up_proj", "down_proj"), (0, 65, 127)),
}


def look(case: str) -> dict:
    """In a process of its own: `optimize` as each of some ranks."""
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from transformers import AutoConfig, AutoModelForCausalLM

    import moepatch
    from moepatch.parallel.revert import conversion_groups

    settings, world, ep, *_, ranks = CASES[case]
    found = {"ranks": {}}
    for rank in ranks:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.bfloat16)
        whole = {key: tuple(p.shape) for key, p in model.named_parameters()}
        # measure=False: ranks that have measured agree by a broadcast, of which the fake group would deliver nothing.
        moepatch.optimize(model, moepatch.make_mesh(ep=ep, device="cpu"), measure=False)
        local = {key: tuple(p.to_local().shape) for key, p in model.named_parameters()}
        meshes = {key: list(p.device_mesh.mesh_dim_names) for key, p in model.named_parameters()}
        assert whole == {key: tuple(p.shape) for key, p in model.named_parameters()}
        size = sum(2 * math.prod(shape) for shape in local.values())
        found["ranks"][rank] = {"local": local, "meshes": meshes, "bytes": size}
        if rank == ranks[0]:
            found["whole"] = whole
            shapes = {key: torch.empty(t.shape, dtype=t.dtype, device="meta") for key, t in model.state_dict().items()}
            groups, outputs = conversion_groups(model, shapes, True)
            found |= {"targets": [t for group in groups for t in group.targets]}
            found |= {"sources": [s for group in groups for s in group.sources], "state": list(shapes)}
            found["saved"] = sum(math.prod(t.shape) for t in outputs.values())
        dist.destroy_process_group()
    return found


def share(length: int, parts: int, index: int) -> int:
    """How much of an axis the `index`-th of `parts` gets, as ``torch.chunk`` cuts it."""
    size = -(-length // parts)
    return max(0, min(size, length - size * index))


@pytest.mark.parametrize("case", CASES)
def test_every_rank_holds_its_part_and_nothing_else(case):
    settings, world, ep, total, layers, experts, projections, ranks = CASES[case]
    found = apart(look, case)
    whole = found["whole"]
    counted = sum(math.prod(shape) for shape in whole.values())
    assert counted == total if total else 540e9 < counted < 560e9

    owners: dict[int, list[int]] = {}
    for rank in range(world):  # make_mesh: ranks that follow each other share a set of experts
        first = rank % ep * (experts // ep) + rank // ep * (experts // world)
        for expert in range(first, first + experts // world):
            owners.setdefault(expert, []).append(rank)
    assert sorted(owners) == list(range(experts)) and all(len(held) == 1 for held in owners.values())

    stacks = {key for key in whole if ".experts." in key}
    assert len(stacks) == 2 * layers and all(whole[key][0] == experts for key in stacks)
    for rank in ranks:
        seen = found["ranks"][rank]
        for key, (rows, *rest) in whole.items():
            if key in stacks:
                expected, mesh = experts // ep // (world // ep), ["dp_shard", "ep"]
            else:
                expected, mesh = share(rows, world, rank), ["dp_shard_ep"]
            assert seen["local"][key][0] == expected and (expected == 0 or [*seen["local"][key][1:]] == rest), key
            assert seen["meshes"][key] == mesh
        dense = sum(share(shape[0], world, rank) * math.prod(shape[1:]) for key, shape in whole.items() if key not in stacks)
        assert seen["bytes"] == 2 * (dense + sum(math.prod(whole[key]) for key in stacks) // world)

    # What would be saved: every key of the checkpoint once, made of every tensor of the state dict once.
    assert len(found["targets"]) == len(set(found["targets"])) and sorted(found["sources"]) == sorted(found["state"])
    named = {name.partition(".experts.")[2] for name in found["targets"] if ".experts." in name}
    assert named == {f"{expert}.{projection}.weight" for expert in range(experts) for projection in projections}
    assert sum(".experts." in name for name in found["targets"]) == layers * experts * len(projections)
    buffers = len(found["state"]) - len(whole)
    assert len(found["targets"]) == len(whole) - len(stacks) + buffers + layers * experts * len(projections)

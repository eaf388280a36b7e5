"""The models that are measured: exact configurations of published models, slices of them, tiny ones, and the FLOPs of a token."""

from __future__ import annotations

import copy

from torch import nn
from transformers import AutoConfig, PreTrainedConfig

#: Sizes as published; every one gives the published number of parameters (`PARAMETERS`).
CONFIGS: dict[str, dict] = {
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
        "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "hidden_act": "silu", "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "attention_bias": False, "tie_word_embeddings": False, "router_aux_loss_coef": 0.001,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss", "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4, "sliding_window": 128,
        "max_position_embeddings": 131072, "initial_context_length": 4096, "rope_theta": 150000,
        "rope_scaling": {
            "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0,
            "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 4096, "rope_theta": 150000,
        },
        "rms_norm_eps": 1e-05, "attention_bias": True, "hidden_act": "silu", "swiglu_limit": 7.0, "router_aux_loss_coef": 0.9,
        "tie_word_embeddings": False, "layer_types": ["sliding_attention", "full_attention"] * 12,
    },
    "Nemotron-3-Nano-30B-A3B": {
        "model_type": "nemotron_h", "attention_bias": False, "attention_dropout": 0.0, "chunk_size": 128, "conv_kernel": 4, "expand": 2,
        "head_dim": 128, "hidden_dropout": 0.0, "hidden_size": 2688,
        "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME", "intermediate_size": 1856, "layer_norm_epsilon": 1e-05,
        "mamba_head_dim": 64, "mamba_hidden_act": "silu", "mamba_num_heads": 64, "mamba_proj_bias": False, "max_position_embeddings": 262144,
        "mlp_bias": False, "mlp_hidden_act": "relu2", "moe_intermediate_size": 1856, "moe_shared_expert_intermediate_size": 3712, "n_group": 1,
        "n_groups": 8, "n_routed_experts": 128, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts_per_tok": 6,
        "num_hidden_layers": 52, "num_key_value_heads": 2, "rescale_prenorm_residual": True, "residual_in_fp32": False, "routed_scaling_factor": 2.5,
        "ssm_state_size": 128, "tie_word_embeddings": False, "time_step_floor": 0.0001, "time_step_max": 0.1, "time_step_min": 0.001, "topk_group": 1,
        "use_bias": False, "use_conv_bias": True, "use_mamba_kernels": True, "vocab_size": 131072,
    },
    "GLM-4.5-Air": {
        "model_type": "glm4_moe", "vocab_size": 151552, "hidden_size": 4096, "intermediate_size": 10944, "moe_intermediate_size": 1408,
        "num_hidden_layers": 46, "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128, "partial_rotary_factor": 0.5,
        "n_routed_experts": 128, "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 1, "routed_scaling_factor": 1.0,
        "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "use_qk_norm": False, "attention_bias": True, "hidden_act": "silu",
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-05, "rope_theta": 1000000, "tie_word_embeddings": False,
    },
    "DeepSeek-V3": {
        "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
        "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "n_shared_experts": 1, "n_routed_experts": 256,
        "routed_scaling_factor": 2.5, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128,
        "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "norm_topk_prob": True, "hidden_act": "silu",
        "max_position_embeddings": 163840, "rms_norm_eps": 1e-06, "rope_theta": 10000,
        "rope_scaling": {
            "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1,
            "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096, "rope_theta": 10000, "rope_type": "yarn",
        },
        "tie_word_embeddings": False, "attention_bias": False,
    },
    "Mixtral-8x7B": {
        "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None, "router_aux_loss_coef": 0.02, "hidden_act": "silu",
        "tie_word_embeddings": False,
    },
}
PARAMETERS = {
    "Qwen3-30B-A3B": 30_532_122_624,
    "gpt-oss-20b": 20_914_757_184,
    "Nemotron-3-Nano-30B-A3B": 31_577_937_344,
    "GLM-4.5-Air": 106_852_245_504,
    "DeepSeek-V3": 671_026_404_352,
    "Mixtral-8x7B": 46_702_792_704,
}

#: What makes any of them run on a CPU in a moment; for what a configuration has of it.
_TINY = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "moe_shared_expert_intermediate_size": 48, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "n_group": 1, "topk_group": 1, "sliding_window": 8, "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 16, "chunk_size": 16,
    "max_position_embeddings": 4096,
}
#: Names under which configurations have one entry a layer.
_PER_LAYER = ("hybrid_override_pattern", "layer_types")


def make_config(name: str, layers: int | None = None, tiny: bool = False) -> PreTrainedConfig:
    """The configuration of a model.

    Args:
        name: of `CONFIGS`.
        layers: only the first so many. Patterns of layers are cut to their beginning; dense layers that a model begins with are left out,
            for a slice is about the mixture of experts.
        tiny: narrow layers and few of them, for a try on a CPU.
    """
    sizes = copy.deepcopy(CONFIGS[name])
    if tiny:
        heads = {"num_key_value_heads": 4} if "kv_lora_rank" in sizes else {}
        sizes |= {key: value for key, value in (_TINY | heads).items() if sizes.get(key) is not None}
        layers = layers or (8 if "hybrid_override_pattern" in sizes else 2)
    if layers is not None and layers != CONFIGS[name]["num_hidden_layers"]:
        sizes["num_hidden_layers"] = layers
        sizes |= {key: sizes[key][:layers] for key in _PER_LAYER if key in sizes}
        sizes |= {"first_k_dense_replace": 0} if "first_k_dense_replace" in sizes else {}
    # A padding id may lie outside a tiny vocabulary, and nothing is padded here.
    config = AutoConfig.for_model(sizes.pop("model_type"), pad_token_id=None, **sizes)
    # Caches are for generating: a training step does not keep one.
    config.use_cache = False
    return config


def flops_per_token(model: nn.Module, config: PreTrainedConfig, active: int, sequence: int) -> float:
    """FLOPs of forward and backward for one token: 6 for each weight that works on it, and the attention's two products.

    Args:
        model: for the size of its embedding, which is looked up, not multiplied.
        config: of the model.
        active: parameters that work on one token.
        sequence: tokens of a sequence, which are attended to causally. What recurrent mixers do besides their projections is not counted.
    """
    multiplied = active if config.tie_word_embeddings else active - model.get_input_embeddings().weight.numel()
    sizes = config.to_dict()
    head = sizes.get("head_dim") or sizes["hidden_size"] // sizes["num_attention_heads"]
    query, value = head, head
    if sizes.get("kv_lora_rank") is not None:
        query, value = sizes["qk_nope_head_dim"] + sizes["qk_rope_head_dim"], sizes["v_head_dim"]
    seen = sum(_seen(kind, sequence, sizes.get("sliding_window")) for kind in _attention_layers(config))
    return 6.0 * multiplied + 3 * 2 * sizes["num_attention_heads"] * (query + value) * seen


def _attention_layers(config: PreTrainedConfig) -> list[str]:
    """The kind of each layer that attends."""
    kinds = config.layer_types if "layer_types" in dir(config) and config.layer_types else ["full_attention"] * config.num_hidden_layers
    return [kind for kind in kinds if kind in ("full_attention", "sliding_attention")]


def _seen(kind: str, sequence: int, window: int | None) -> float:
    """How many tokens a token attends to, on average."""
    if kind == "full_attention" or window is None or window >= sequence:
        return sequence / 2
    return window - window * window / (2 * sequence)

"""A zoo of tiny mixture-of-experts models: every MoE family of transformers, with random weights, on the CPU.

    import zoo

    for name in zoo.FAMILIES:
        if zoo.available(name) is None:
            model = zoo.build(name)
            zoo.loss(model(**zoo.inputs(name, model))).backward()

``python tests/zoo.py [name ...]`` runs forward and backward of every model and prints a table.

The tables come first and hold data only: what makes the default configuration of a family small. ``COMMON`` goes to
every configuration, nested ones included, that declares the field; the row of a family adds to it and wins. No two axes
of an experts parameter have the same length (except where an entry of ``EXTRA`` wants just that), so a transposition
shows: H = 64, E = 8, and I = 80 where the experts use ``intermediate_size``, 48 where they have a size of their own.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import re
import sys
import time
import zlib
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


@dataclass(frozen=True)
class Family:
    """One tiny model."""

    name: str
    model_class: str
    model_type: str  # of the configuration that model_class takes
    layout: str = "fused3d"  # how the experts' weights lie
    overrides: dict[str, Any] = field(default_factory=dict)  # for the configuration, on top of COMMON
    inputs: str = "text"  # a key of INPUTS
    since: str = "5.17"  # the oldest of 5.17, 5.23 and 5.24, the versions looked at, that runs it
    broken: dict[str, str] = field(default_factory=dict)  # by version that has it and cannot run it forward and backward: why


def _row(
    name: str,
    model_class: str,
    layout: str = "fused3d",
    *,
    config: str | None = None,
    inputs: str = "text",
    since: str = "5.17",
    broken: dict[str, str] | None = None,
    **overrides: Any,
) -> Family:
    """A row of the tables. ``config`` is the model type, where that is not the name."""
    return Family(name, model_class, config or name, layout, overrides, inputs, since, broken or {})


# fmt: off
# ------------------------------------------------------------------------------------------------------------ the data

VOCAB = 128

COMMON: dict[str, Any] = {
    # widths
    "vocab_size": VOCAB, "hidden_size": 64, "d_model": 64, "intermediate_size": 80, "dense_intermediate_size": 80,
    "intermediate_size_mlp": 80, "ffn_hidden_size": 80, "moe_intermediate_size": 48, "expert_ffn_hidden_size": 48,
    "shared_expert_intermediate_size": 40, "shared_experts_intermediate_size": 40, "shared_intermediate_size": 40,
    "moe_shared_expert_intermediate_size": 40, "share_expert_dim": 40, "moe_hidden_size": 32, "router_hidden_size": 32,
    # depth and length
    "num_hidden_layers": 3, "num_layers": 2, "n_layers": 2, "max_position_embeddings": 128,
    # experts
    "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "moe_num_experts": 8, "num_experts_per_tok": 2,
    "moe_topk": 2, "moe_k": 2, "moe_top_k": 2, "top_k_experts": 2, "n_shared_experts": 1, "num_shared_experts": 1,
    "moe_num_shared_experts": 1, "zero_expert_num": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    # attention
    "num_attention_heads": 4, "n_heads": 4, "num_heads": 4, "num_key_value_heads": 2, "kv_n_heads": 2, "head_dim": 16,
    "sliding_window": 8, "sliding_window_size": 8, "swa_head_dim": 16, "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 16, "qk_head_dim": 16, "o_groups": 2, "o_lora_rank": 8, "index_n_heads": 2, "index_head_dim": 16,
    "index_topk": 8,
    # linear attention and state spaces
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_num_heads": 4, "linear_head_dim": 16, "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2,
    "ssm_state_size": 16, "chunk_size": 16, "block_size": 16,
    # vision and audio towers
    "depth": 1, "out_hidden_size": 64, "output_dim": 64, "text_hidden_size": 64, "vision_output_dim": 64,
    "projector_hidden_size": 64, "projector_input_dim": 64, "projector_output_dim": 64, "projection_hidden_dim": 64,
    "projection_intermediate_size": 80, "position_embedding_size": 16, "num_position_embeddings": 16,
    "pos_emb_height": 4, "pos_emb_width": 4, "posemb_grid_size": 4, "deepstack_visual_indexes": [0],
    "adapter_in_dim": 64, "adapter_out_dim": 64, "adapter_input_size": 64,
    "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 80, "decoder_ffn_dim": 80, "downsample_hidden_size": 16, "max_source_positions": 64,
    # special tokens
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}

# Standard deviations by parameter name, where the usual one would send most tokens to the same experts: routing biases
# as wide as the scores that they are added to, embeddings wider than the biases after them, and wide enough weights for
# a router that is a deep MLP.
SPREAD = {
    r"(score_correction_bias|expert_bias|balancing_biases)$": 0.03,
    r"\bembed_tokens\.weight$": 0.3,
    r"\brouter_mlp\.(fc1|fc2|out_proj)\.weight$": 0.25,
}

TWO = {"num_hidden_layers": 2}  # enough where every layer has experts and all layers are alike
MLA = {"num_key_value_heads": 4}  # multi-head latent attention has as many key heads as query heads, as many towers have
DENSE_FIRST = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
SLIDING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
LINEAR = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
GEMMA = {**SLIDING, "global_head_dim": 16}
GEMMA4 = {**GEMMA, "enable_moe_block": True, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": VOCAB}
QWEN4 = {**LINEAR, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
         "indexer_compress_ratio": 4, "hc_lowrank": 8}
# An embedding padded to more rows than the head has.
NEMOTRON = {"model_type": "nemotron_h", "layers_block_type": ["mamba", "moe", "attention", "moe"]}
PADDED = {"vocab_size": VOCAB + 8, "unpadded_vocab_size": VOCAB}
# The layer in the middle runs twice.
LOOP = {"n_layers_per_attn_res_block": 1, "loop_layer_index_start": 1, "loop_layer_index_end": 2, "loop_num_passes": 2,
        "layer_types": ["hybrid_sliding", "hybrid_sliding", "hybrid"]}
SAM = {"image_size": 64, "output_channels": 16, "window_size": 2, "global_attn_indexes": [2], "mlp_dim": 80}


def _rope(**settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **settings}}


_ROWS = [
    _row("afmoe", "AfmoeForCausalLM", **SLIDING),
    # 5.17: a grouped linear of its own, experts.fc1.weight and experts.fc2.weight, called with the router's logits
    _row("aria", "AriaForConditionalGeneration", "fused3d transposed", text_config={"model_type": "aria_text"},
         vision_config={"model_type": "idefics3_vision"}),
    _row("axk1", "AXK1ForCausalLM", **DENSE_FIRST, **MLA),
    _row("axk2", "AXK2ForCausalLM", **DENSE_FIRST, **MLA),
    _row("bailing_hybrid", "BailingHybridForCausalLM", since="5.23", **LINEAR, **MLA),
    _row("beam", "BeamForCausalLM", since="5.23", **DENSE_FIRST, **SLIDING),
    _row("cohere2_moe", "Cohere2MoeForCausalLM", **SLIDING),
    _row("dbrx", "DbrxForCausalLM", "flat 2-D", attn_config={"clip_qkv": 8, "rope_theta": 10000.0},
         ffn_config={"ffn_hidden_size": 48}),
    _row("deepseek_ocr2", "DeepseekOcr2ForConditionalGeneration", text_config=DENSE_FIRST,
         vision_config={"sam_config": {**SAM, "downsample_channels": [16, 64]}}),
    _row("deepseek_v2", "DeepseekV2ForCausalLM", **MLA),
    _row("deepseek_v3", "DeepseekV3ForCausalLM", **MLA),
    _row("deepseek_v32", "DeepseekV32ForCausalLM", **MLA),
    _row("deepseek_v4", "DeepseekV4ForCausalLM", mlp_layer_types=["hash_moe", "moe", "moe"]),
    _row("diffusion_gemma", "DiffusionGemmaForBlockDiffusion", inputs="canvas", text_config=GEMMA,
         canvas_length=12, vision_config={"model_type": "gemma4_vision"}),
    # 5.17: its MoE returns a tuple that its decoder layer does not take apart
    _row("doge", "DogeForCausalLM", "product keys", since="5.23", is_moe=True, num_experts=16),
    _row("dots1", "Dots1ForCausalLM"),
    # the language model alone: text does not reach the experts of the vision tower
    _row("dots3_note", "Dots3NoteForCausalLM", config="dots3_note_text", since="5.23", swa_num_key_value_heads=4,
         swa_num_attention_heads=4, swa_q_lora_rank=16, swa_kv_lora_rank=16, swa_head_dim=16, swa_qk_nope_head_dim=8,
         swa_v_head_dim=16, layer_types=["indexed_attention", "sliding_attention", "indexed_attention"], **MLA),
    _row("ernie4_5_moe", "Ernie4_5_MoeForCausalLM"),
    _row("ernie4_5_vl_moe", "Ernie4_5_VLMoeForConditionalGeneration", inputs="text and vision",
         text_config={"moe_intermediate_size": [48, 40], **_rope(mrope_section=[3, 3, 2])}),
    _row("exaone_moe", "ExaoneMoeForCausalLM", **SLIDING),
    _row("flex_olmo", "FlexOlmoForCausalLM", **TWO),
    _row("flint", "FlintForCausalLM", since="5.23", mlp_only_layers=[0], **SLIDING),
    _row("gemma4", "Gemma4ForConditionalGeneration", text_config=GEMMA4, audio_config=None),
    _row("glm4_moe", "Glm4MoeForCausalLM"),
    _row("glm4_moe_lite", "Glm4MoeLiteForCausalLM", **DENSE_FIRST, **MLA),
    _row("glm4v_moe", "Glm4vMoeForConditionalGeneration",
         text_config=_rope(partial_rotary_factor=0.5, mrope_section=[2, 1, 1])),
    _row("glm5_next", "Glm5NextForConditionalGeneration",
         text_config={**DENSE_FIRST, **LINEAR, **MLA, "qk_rope_head_dim": 0, "qk_nope_head_dim": 16, "index_kpool": 4}),
    _row("glm_moe_dsa", "GlmMoeDsaForCausalLM", **MLA),
    _row("gpt_oss", "GptOssForCausalLM", "fused3d transposed interleaved bias", **TWO),
    _row("granitemoe", "GraniteMoeForCausalLM", **TWO),
    _row("granitemoe_swa", "GraniteMoeSWAForCausalLM", layer_types=["sliding_attention", "full_attention"], **TWO),
    _row("granitemoehybrid", "GraniteMoeHybridForCausalLM", layer_types=["mamba", "attention"], mamba_n_heads=8,
         mamba_d_head=16, mamba_d_state=16, **TWO),
    _row("granitemoeshared", "GraniteMoeSharedForCausalLM", **TWO),
    _row("hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM", **TWO),
    _row("hy_v3", "HYV3ForCausalLM"),
    _row("hy_v4", "HYV4ForCausalLM", **MLA),
    _row("hy_v4_vl", "HYV4VLForConditionalGeneration", since="5.24", text_config=_rope(mrope_section=[2, 1, 1])),
    # the language model alone: the vision tower imports scipy
    _row("inkling", "InklingForCausalLM", config="inkling_text", **TWO),
    _row("inkling2", "Inkling2ForConditionalGeneration", since="5.23", text_config=PADDED),
    _row("inkling2_loop", "Inkling2LoopForConditionalGeneration", since="5.24", text_config={**PADDED, **LOOP},
         vision_config={"model_type": "inkling2_vision"}),
    _row("jamba", "JambaForCausalLM", num_hidden_layers=4, attn_layer_offset=1, attn_layer_period=2,
         mamba_d_state=8, mamba_dt_rank=8),
    _row("jetmoe", "JetMoeForCausalLM", "grouped linear", kv_channels=16, **TWO),
    # kimi_k25, nemo_speechlm and nemotron_h_omni have the language model of another family inside
    _row("kimi_k25", "Kimi_K25ForConditionalGeneration", text_config={"model_type": "deepseek_v3", **MLA},
         projection_hidden_size=64),
    _row("kimi_linear", "KimiLinearForCausalLM", **LINEAR, **MLA),
    _row("kolibri1", "Kolibri1ForCausalLM", since="5.23"),
    _row("laguna", "LagunaForCausalLM"),
    _row("lara_mini", "LaraMiniForCausalLM", since="5.24",
         layer_types=["linear_attention", "sliding_attention", "full_attention"]),
    _row("lfm2_moe", "Lfm2MoeForCausalLM", layer_types=["conv", "full_attention", "conv"]),
    _row("llama4", "Llama4ForConditionalGeneration", "all-experts batched", vision_config={"image_size": 28},
         broken={"5.24": "transformers 5.24 asks its language model for image_outputs, which that has not: no forward comes to an end"}),
    _row("longcat_flash", "LongcatFlashForCausalLM", "fused3d undecorated", head_dim=8, **MLA),
    _row("mellum", "MellumForCausalLM", **SLIDING),
    _row("mimo_v2_flash", "MiMoV2FlashForCausalLM"),
    _row("minimax", "MiniMaxForCausalLM", layer_types=["linear_attention", "full_attention"], **TWO),
    _row("minimax_m2", "MiniMaxM2ForCausalLM", **TWO),
    _row("minimax_m3_vl", "MiniMaxM3SparseForConditionalGeneration", text_config={"model_type": "minimax_m3_vl_text"},
         vision_config={"model_type": "minimax_m3_vl_vision"}),
    _row("mistral4", "Mistral4ForCausalLM", **MLA),
    _row("mistral_large4", "MistralLarge4ForConditionalGeneration", since="5.23", text_config=MLA,
         vision_config={"model_type": "pixtral"}),
    _row("mixtral", "MixtralForCausalLM", **TWO),
    _row("muse_spark", "MuseSparkForConditionalGeneration", "fused3d post-norm", since="5.23",
         audio_config={"num_hidden_layers": 4, "hidden_sizes": [8, 8, 16, 16]}),
    _row("nemotron_h", "NemotronHForCausalLM", "fused3d no gate",
         layers_block_type=["mamba", "moe", "attention", "moe"]),
    _row("nemo_speechlm", "Nemotron3_5TranscribeForConditionalGeneration", "fused3d no gate", since="5.23", text_config=NEMOTRON,
         word_timestamp_config={"blank_token_id": 0, **MLA}, audio_config={"asr_config": MLA, "diarization_config": {
             "model_type": "nemotron3_diarization", "audio_config": MLA, "head_config": {"audio_hidden_size": 64}}}),
    _row("nemotron_h_omni", "NemotronH_Omni_Reasoning_V3", "fused3d no gate", since="5.23", text_config=NEMOTRON, audio_config=None,
         vision_config={"model_type": "radio", "video_temporal_patch_size": 2}),
    # transformers never runs more than the first two experts of a layer
    _row("nllb_moe", "NllbMoeForConditionalGeneration", "ModuleDict", config="nllb-moe", inputs="seq2seq",
         num_experts=2, encoder_sparse_step=2, decoder_sparse_step=2),
    _row("olmoe", "OlmoeForCausalLM", **TWO),
    _row("openai_privacy_filter", "OpenAIPrivacyFilterForTokenClassification", "fused3d transposed bias",
         inputs="classify", **TWO),
    _row("phimoe", "PhimoeForCausalLM", **TWO),
    _row("qwen2_moe", "Qwen2MoeForCausalLM", **TWO),
    _row("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration", text_config=LINEAR),
    _row("qwen3_moe", "Qwen3MoeForCausalLM", **TWO),
    _row("qwen3_next", "Qwen3NextForCausalLM", **LINEAR),
    _row("qwen3_omni_moe", "Qwen3OmniMoeThinkerForConditionalGeneration", config="qwen3_omni_moe_thinker",
         vision_start_token_id=151652),
    _row("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", text_config=_rope(mrope_section=[4, 2, 2])),
    _row("qwen4_exp", "Qwen4ExpForConditionalGeneration", text_config={**QWEN4, **_rope(partial_rotary_factor=0.5)}),
    # the modeling code of glm4_moe and of deepseek_v3, under configurations of their own
    _row("sarvam_mla", "DeepseekV3ForCausalLM", since="5.24", **MLA),
    _row("sarvam_moe", "Glm4MoeForCausalLM", since="5.24"),
    _row("solar_open", "SolarOpenForCausalLM", **TWO),
    _row("step3p7", "Step3p7ForConditionalGeneration", "fused3d undecorated", text_config={**DENSE_FIRST, **SLIDING},
         vision_config={"image_size": 28}),
    _row("switch_transformers", "SwitchTransformersForConditionalGeneration", "ModuleDict", inputs="seq2seq", d_kv=16,
         d_ff=80, num_experts=2, num_sparse_encoder_layers=1, num_decoder_layers=2, num_sparse_decoder_layers=1,
         decoder_start_token_id=0),
    _row("unlimited_ocr", "UnlimitedOcrForConditionalGeneration", since="5.23", text_config=DENSE_FIRST,
         vision_config={"sam_config": {**SAM, "downsample_channels": [16, 64]}}),
    _row("vitpose_backbone", "VitPoseBackbone", "ModuleList", inputs="image", image_size=[32, 32], patch_size=[8, 8],
         mlp_ratio=2, num_experts=2, part_features=16, **TWO),
    _row("zaya", "ZayaForCausalLM", num_experts_per_tok=1, **TWO),
]

_EXTRA_ROWS = [
    # one path of a family that its entry above does not take
    _row("deepseek_v3_groups", "DeepseekV3ForCausalLM", config="deepseek_v3", n_group=4, topk_group=2, **MLA),
    _row("nemotron_h_latent", "NemotronHForCausalLM", "fused3d no gate", config="nemotron_h", moe_latent_size=32,
         layers_block_type=["mamba", "moe", "attention", "moe"]),
    _row("qwen3_moe_tied", "Qwen3MoeForCausalLM", config="qwen3_moe", tie_word_embeddings=True, **TWO),
    # shapes from which no transposition can be told
    _row("gpt_oss_square", "GptOssForCausalLM", "fused3d transposed interleaved bias", config="gpt_oss",
         intermediate_size=64, **TWO),
    _row("qwen3_moe_square", "Qwen3MoeForCausalLM", config="qwen3_moe", moe_intermediate_size=32, **TWO),
    # the language model of a multimodal family, on its own
    _row("aria_text", "AriaTextForCausalLM", "fused3d transposed"),
    _row("gemma4_text", "Gemma4ForCausalLM", **GEMMA4),
    _row("inkling2_text", "Inkling2ForCausalLM", since="5.23", **PADDED),
    _row("inkling2_loop_text", "Inkling2LoopForCausalLM", since="5.24", **PADDED, **LOOP),
    _row("llama4_text", "Llama4ForCausalLM", "all-experts batched"),
    _row("minimax_m3_vl_text", "MiniMaxM3VLForCausalLM"),
    _row("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", **LINEAR),
    _row("qwen3_omni_moe_talker_text", "Qwen3OmniMoeTalkerModel", inputs="embeddings",
         shared_expert_intermediate_size=40, **_rope(mrope_section=[4, 2, 2])),
    _row("qwen3_vl_moe_text", "Qwen3VLMoeTextModel", **_rope(mrope_section=[4, 2, 2])),
    _row("qwen4_exp_text", "Qwen4ExpForCausalLM", **QWEN4, **_rope(partial_rotary_factor=0.5)),
]
# fmt: on

FAMILIES: dict[str, Family] = {row.name: row for row in _ROWS}
EXTRA: dict[str, Family] = {row.name: row for row in _EXTRA_ROWS}


# ------------------------------------------------------------------------------------------------------ configurations


def entry(name: str) -> Family:
    """The row of FAMILIES or EXTRA with this name."""
    return FAMILIES[name] if name in FAMILIES else EXTRA[name]


def available(name: str) -> str | None:
    """None when the installed transformers can run this entry, otherwise the reason why not."""
    return absent(name) or entry(name).broken.get(RELEASE)


def absent(name: str) -> str | None:
    """None when the installed transformers can build this entry, otherwise the reason why not."""
    family = entry(name)
    if _version(transformers.__version__) < _version(family.since):
        return f"needs transformers {family.since}, this is {transformers.__version__}"
    if family.model_type not in CONFIG_MAPPING or _model_class(family) is None:
        return f"transformers {transformers.__version__} does not have it"
    return None


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(".")[:2])


#: The installed transformers, without its patch level.
RELEASE = ".".join(map(str, _version(transformers.__version__)))


def config(name: str, **overrides: Any) -> PreTrainedConfig:
    """The configuration of one entry. ``overrides`` are merged into those of the table, nested ones too."""
    family = entry(name)
    config_class = CONFIG_MAPPING[family.model_type]
    return config_class(**_settings(config_class, _merge(family.overrides, overrides)))


def _settings(config_class: type[PreTrainedConfig], overrides: dict[str, Any]) -> dict[str, Any]:
    """What ``config_class`` declares of COMMON, no dropout, the overrides, and the same for every nested configuration.

    Overrides are not filtered: several configurations take keywords that they do not declare.
    """
    declared = {f.name: f.default for f in fields(config_class)}
    settings = {key: value for key, value in COMMON.items() if key in declared}
    for key, default in declared.items():
        if ("drop" in key or "jitter" in key) and type(default) in (int, float):
            settings[key] = 0.0
    settings |= overrides
    for key, nested_class in config_class.sub_configs.items():
        nested = overrides.get(key, {})
        if nested is not None:
            nested_class = CONFIG_MAPPING[nested["model_type"]] if "model_type" in nested else nested_class
            settings[key] = _settings(nested_class, nested)
    return settings


def _merge(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """A deep copy of ``base`` (configurations change the lists that they are given) with ``extra`` merged into it."""
    merged = copy.deepcopy(base)
    for key, value in copy.deepcopy(extra).items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


# -------------------------------------------------------------------------------------------------------------- models


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> nn.Module:
    """The Hugging Face model with random weights, in train mode, without dropout.

    The weights depend on the seed and on the parameter's name and shape alone: a bfloat16 model has the rounded weights
    of the float32 model, and versions of transformers that name the parameters alike have the same model.
    """
    family = entry(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _model_class(family)._from_config(config(name, **overrides), dtype=dtype)
    if dtype != torch.float32:
        _keep_in_fp32(model)
    randomize_(model, seed)
    return model.train()


def _model_class(family: Family) -> type[nn.Module] | None:
    """The class, from transformers or, where that does not export it, from the modeling file of the family."""
    if hasattr(transformers, family.model_class):
        return getattr(transformers, family.model_class)
    package = CONFIG_MAPPING[family.model_type].__module__.rpartition(".")[0]
    modeling = importlib.import_module(f"{package}.modeling_{package.rpartition('.')[2]}")
    return getattr(modeling, family.model_class, None)


def _keep_in_fp32(model: nn.Module) -> None:
    """Leave in float32 what from_pretrained leaves in float32."""
    keep = model._keep_in_fp32_modules_strict or ()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and any(f".{part}." in f".{name}." for part in keep):
            tensor.data = tensor.data.float()


@torch.no_grad()
def randomize_(model: nn.Module, seed: int = 0) -> None:
    """Give every parameter a random value, those too that transformers starts at zero, at one or not at all.

    What starts at one (norm weights, gains) is spread around one, everything else around zero. Of the buffers only the
    routing biases, the layer gains and the token-to-expert tables are touched; rotary frequencies and the like stay.
    """
    for name, parameter in model.named_parameters():
        _randomize_(name, parameter, seed)
    for name, buffer in model.named_buffers():
        leaf = name.rpartition(".")[2]
        if leaf == "tid2eid":  # all zero as built, which would send a token to the same expert K times
            num_experts = model.config.num_local_experts
            chosen = torch.rand(len(buffer), num_experts, generator=_generator(name, seed)).argsort(-1)
            buffer.copy_(chosen[:, : buffer.shape[-1]])
        elif "bias" in leaf or leaf == "layer_scalar":
            _randomize_(name, buffer, seed)


def _randomize_(name: str, tensor: torch.Tensor, seed: int) -> None:
    usual = 0.05 if tensor.dim() < 2 else min(0.2, 0.8 / math.sqrt(tensor.shape[-1]))
    std = next((spread for pattern, spread in SPREAD.items() if re.search(pattern, name)), usual)
    center = 1.0 if bool((tensor == 1).all()) else 0.0
    tensor.copy_(center + std * torch.randn(tensor.shape, generator=_generator(name, seed)))


def _generator(name: str, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))


# ---------------------------------------------------------------------------------------------------- inputs and loss


def inputs(name: str, model: nn.Module, batch: int = 2, seq: int = 12, seed: int = 0) -> dict[str, torch.Tensor]:
    """Keyword arguments for ``model.forward``, with labels where the model takes them, on the model's device."""
    made = INPUTS[entry(name).inputs](model, batch, seq, torch.Generator().manual_seed(seed))
    return {key: value.to(model.device) for key, value in made.items()}


def _tokens(batch: int, seq: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, seq), generator=generator)  # 0 to 2 are the special tokens


def _text(model: nn.Module, batch: int, seq: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    ids = _tokens(batch, seq, generator)
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "labels" in inspect.signature(model.forward).parameters:
        made["labels"] = ids.clone()
    return made


def _text_and_vision(model: nn.Module, batch: int, seq: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    made = _text(model, batch, seq, generator)
    return made | {"moe_mm_token_type_ids": (torch.arange(seq) % 2).expand(batch, seq).int()}


def _classify(model: nn.Module, batch: int, seq: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    made = _text(model, batch, seq, generator)
    return made | {"labels": made["input_ids"] % model.config.num_labels}


def _embeddings(model: nn.Module, batch: int, seq: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    embeddings = torch.randn(batch, seq, model.config.hidden_size, generator=generator)
    return {"inputs_embeds": embeddings.to(model.dtype), "attention_mask": torch.ones(batch, seq, dtype=torch.long)}


def _canvas(model: nn.Module, batch: int, seq: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    made = _text(model, batch, seq, generator)  # without a canvas the model draws one
    return made | {"decoder_input_ids": _tokens(batch, model.config.canvas_length, generator)}


def _seq2seq(model: nn.Module, batch: int, seq: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    made = _text(model, batch, seq, generator)
    return made | {"decoder_input_ids": _tokens(batch, seq, generator), "labels": _tokens(batch, seq, generator)}


def _image(model: nn.Module, batch: int, seq: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    pixels = torch.randn(batch, model.config.num_channels, *model.config.image_size, generator=generator)
    return {"pixel_values": pixels.to(model.dtype), "dataset_index": torch.arange(batch) % model.config.num_experts}


INPUTS = {
    "text": _text,
    "text and vision": _text_and_vision,
    "classify": _classify,
    "canvas": _canvas,
    "embeddings": _embeddings,
    "seq2seq": _seq2seq,
    "image": _image,
}


def loss(output: Any) -> torch.Tensor:
    """A scalar to run backward from: the model's own loss, or else the mean square of its first output."""
    if getattr(output, "loss", None) is not None:
        return output.loss
    return first_float(output).float().square().mean()


def first_float(output: Any) -> torch.Tensor | None:
    if torch.is_tensor(output):
        return output if output.is_floating_point() else None
    values = output.values() if isinstance(output, dict) else output
    return next((found for value in values if (found := first_float(value)) is not None), None)


# ---------------------------------------------------------------------------------------------------------------- main


_EXPERTS = re.compile(r"\bexperts\b|\bmlp\.(input|output)_linear\b|\bmlp\.(up|down)_embed\b")


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the routed experts, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if _EXPERTS.search(name)}


def check(name: str) -> tuple[nn.Module, float]:
    """Run one entry forward and backward; the model and the seconds that took. Raises where the result is no good."""
    model = build(name)
    given = inputs(name, model)
    start = time.perf_counter()
    value = loss(model(**given))
    value.backward()
    seconds = time.perf_counter() - start
    if not math.isfinite(value.item()):
        raise ArithmeticError(f"the loss is {value.item()}")
    for parameter_name, parameter in model.named_parameters():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            raise ArithmeticError(f"the gradient of {parameter_name} is not finite")
    for parameter_name, parameter in expert_parameters(model).items():
        if parameter.grad is None:
            raise ArithmeticError(f"{parameter_name} has no gradient")
    return model, seconds


def main(names: list[str]) -> int:
    """Run the named entries (all of them by default) and print a table; the number of entries that failed."""
    counts = {"ok": 0, "not available": 0, "failed": 0}
    began = time.perf_counter()
    for name in names or [*FAMILIES, *EXTRA]:
        row = f"{name:27}{entry(name).layout:37}"
        if (reason := available(name)) is not None:
            counts["not available"] += 1
            print(f"{row}-       {reason}")
            continue
        try:
            model, seconds = check(name)
        except Exception as error:
            counts["failed"] += 1
            print(f"{row}FAILED  {type(error).__name__}: {error}")
        else:
            counts["ok"] += 1
            size = sum(parameter.numel() for parameter in model.parameters())
            print(f"{row}ok      {seconds:5.2f} s  {size:>9,} parameters")
    print(f"{counts}, {time.perf_counter() - began:.0f} s, transformers {transformers.__version__}")
    return counts["failed"]


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)  # threads cost more than they bring at these sizes
    sys.exit(main(sys.argv[1:]))

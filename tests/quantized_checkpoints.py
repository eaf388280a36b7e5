"""Tiny quantized checkpoints as the hub has them: gpt-oss in MXFP4, DeepSeek-V3 in FP8 with the scales of blocks."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import zoo
from safetensors.torch import load_file, save_file
from torch import Tensor

#: What DeepSeek-V3's checkpoint leaves in bf16.
_PLAIN = ("mlp.gate.", "lm_head", "embed", "norm")


def gpt_oss(directory: Path) -> Path:
    """Experts in blocks of 32 numbers of 4 bits, with one exponent each; everything else in bf16."""
    zoo.build("gpt_oss", dtype=torch.bfloat16, intermediate_size=96).save_pretrained(directory)
    tensors, generator = load_file(directory / "model.safetensors"), torch.Generator().manual_seed(0)
    for key in [key for key in tensors if key.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, wide, rows = tensors.pop(key).shape
        tensors[f"{key}_blocks"] = torch.randint(0, 256, (experts, rows, wide // 32, 16), dtype=torch.uint8, generator=generator)
        tensors[f"{key}_scales"] = torch.randint(118, 124, (experts, rows, wide // 32), dtype=torch.uint8, generator=generator)
    return _write(directory, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]})


def deepseek_v3(directory: Path, block: tuple[int, int] = (16, 16), **settings) -> Path:
    """Every matrix but embeddings, routers and head in float8, with one scale for each block, the last of which may not be full."""
    zoo.build("deepseek_v3", dtype=torch.bfloat16, **{"qk_rope_head_dim": 16, **settings}).save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    for key in [key for key, t in tensors.items() if key.endswith(".weight") and t.ndim == 2 and not any(part in key for part in _PLAIN)]:
        tensors[key], tensors[f"{key}_scale_inv"] = _float8(tensors[key], block)
    return _write(directory, tensors, {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": list(block)})


def _float8(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    counts = [-(-n // b) for n, b in zip(weight.shape, block, strict=True)]
    whole = torch.zeros(counts[0] * block[0], counts[1] * block[1])
    whole[: weight.shape[0], : weight.shape[1]] = weight.float()
    blocks = whole.view(counts[0], block[0], counts[1], block[1])
    scales = blocks.abs().amax((1, 3)).clamp(min=1e-6) / 448
    packed = (blocks / scales[:, None, :, None]).view(whole.shape)[: weight.shape[0], : weight.shape[1]]
    return packed.to(torch.float8_e4m3fn).contiguous(), scales


def unpacked(weight: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """What `_float8` packed, number by number."""
    rows, columns = (torch.arange(n) // b for n, b in zip(weight.shape, block, strict=True))
    return weight.float() * scales[rows][:, columns]


def _write(directory: Path, tensors: dict[str, Tensor], settings: dict) -> Path:
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return directory

"""Quantized checkpoints into models of plain weights, by transformers' own conversions: which there are, and how little of a file they need.

A checkpoint says in its ``config.json`` how it is quantized. transformers' quantizer for that has an operation that makes plain weights of
packed numbers and scales, for those methods whose configuration has ``dequantize``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.core_model_loading import WeightConverter
from transformers.quantizers import AutoHfQuantizer, HfQuantizer

from ..errors import CheckpointError
from ..stored import Quantization

#: What the name of a block's scales adds to that of the weight.
_SCALE = "_scale_inv"


def dequantizer(directory: Path, config: PreTrainedConfig) -> HfQuantizer | None:
    """transformers' quantizer for a checkpoint, set to make plain weights of it; None for one that is not quantized.

    Args:
        directory: of the checkpoint; what its ``config.json`` says counts.
        config: the model's, for a directory without one.

    Raises:
        CheckpointError: transformers cannot make plain weights of it.
    """
    file = directory / "config.json"
    try:
        found = Quantization.of(json.loads(file.read_text(encoding="utf-8")) if file.is_file() else config, always=True)
    except ValueError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if found is None:
        return None
    if found.option is None:
        raise CheckpointError(
            f"{directory} is quantized ({found.method}), and transformers has no conversion of that to plain weights. Load the model with "
            "from_pretrained: what is quantized keeps its own code, and moepatch.optimize patches the rest."
        )
    try:
        quantizer = AutoHfQuantizer.from_config(dict(found.settings), pre_quantized=True)
    except Exception as error:  # a library of its own may be missing, or the settings may be none that it knows
        raise CheckpointError(f"{directory} is quantized ({found.method}), and transformers cannot read that here: {error}") from error
    quantizer.quantization_config.dequantize = True
    return quantizer


def block_of(quantizer: HfQuantizer | None) -> tuple[int, int] | None:
    """How many rows and columns of a matrix have one scale, if the checkpoint says so."""
    size = None if quantizer is None else getattr(quantizer.quantization_config, "weight_block_size", None)
    return tuple(size) if size else None


def forget_quantization(config: PreTrainedConfig) -> None:
    """Takes out of a model's configuration that its weights are quantized, as ``from_pretrained`` does when it has made plain weights of them.

    Else a checkpoint that the model saves would say so of its plain weights.
    """
    for part in (config, getattr(config, "text_config", None)):
        if isinstance(part, PreTrainedConfig) and vars(part).get("quantization_config") is not None:
            del part.quantization_config


def only_unpacks(converter: WeightConverter) -> bool:
    """Whether a conversion makes plain weights of packed numbers, and does nothing else."""
    return all(map(unpacks, converter.operations))


def unpacks(operation: object) -> bool:
    """Whether an operation is that of a quantizer. Each matrix by itself: it is also done before the matrices of experts are merged."""
    return isinstance(getattr(operation, "hf_quantizer", None), HfQuantizer)


def scaled(sources: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """The keys of weights, each with that of the scales of its blocks.

    Args:
        sources: of a recipe, keys with the patterns that they match.
    """
    of_pattern: dict[str, list[str]] = {}
    for key, pattern in sources:
        of_pattern.setdefault(pattern.removesuffix("$"), []).append(key)
    for pattern, keys in of_pattern.items():
        yield from zip(keys, of_pattern.get(pattern + _SCALE, ()))


def per_number(scales: Tensor, shape: tuple[int, int], block: tuple[int, int] | None, rows: slice | None = None) -> Tensor:
    """The scales of blocks ``[n, k]`` for a matrix ``[N, K]``, or for some of its rows, each axis as it is where blocks fill it.

    transformers' conversion wants as many numbers in each block. Some checkpoints end in a block that is not full (576 rows in blocks of 128):
    then, and where only some rows are read, the scales are repeated for each of them.

    Raises:
        ValueError: which number has which scale cannot be told.

    >>> per_number(torch.tensor([[1.0], [2.0]]), (3, 4), (2, 4)).tolist()
    [[1.0], [1.0], [2.0]]
    """
    if scales.ndim != 2:
        return scales
    numbers = scales.view(torch.uint8) if scales.element_size() == 1 else scales
    for axis, (size, count) in enumerate(zip(shape, scales.shape, strict=True)):
        fits = block is not None and -(-size // block[axis]) == count
        if not fits and size % count:
            said = "no block size is given" if block is None else f"the blocks are said to have {block[axis]}"
            raise ValueError(f"{count} scales along an axis of {size} numbers do not tell which is whose ({said})")
        each = block[axis] if fits else size // count
        if count == 1 or (size == each * count and (axis == 1 or rows is None)):
            continue
        numbers = numbers.repeat_interleave(each, axis).narrow(axis, 0, size)
        numbers = numbers[rows] if axis == 0 and rows is not None else numbers
    return numbers.view(scales.dtype)

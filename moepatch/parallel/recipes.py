"""How the tensors of a model come out of the files of a checkpoint: transformers' conversion mapping, checked before anything is read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..errors import CheckpointError
from ..quantized import FLOATS
from .dequantize import only_unpacks, per_number, scaled, unpacks
from .pieces import Box


@dataclass
class Files:
    """The tensors of a checkpoint directory.

    Attributes:
        open_file: from a path to an open safetensors file.
        file_of: the path for each key.
    """

    open_file: Callable
    file_of: dict[str, Path]

    def meta(self, key: str) -> Tensor:
        """The shape, as a tensor on the meta device."""
        return torch.empty(self.open_file(self.file_of[key]).get_slice(key).get_shape(), device="meta", dtype=torch.float32)

    def typed(self, key: str) -> Tensor:
        """The shape and the dtype, as a tensor on the meta device."""
        shape = self.meta(key).shape
        nothing = self.read(key, _rows(shape, 0, 0) if shape else None, torch.device("cpu"))
        return torch.empty(shape, device="meta", dtype=nothing.dtype)

    def read(self, key: str, box: Box | None, device: torch.device) -> Tensor:
        """A tensor, or a part of it, of which no more is read."""
        file = self.open_file(self.file_of[key])
        if box is None or not box.size:
            return file.get_tensor(key).to(device)
        return file.get_slice(key)[box.index].to(device)


@contextmanager
def opened() -> Iterator[Callable]:
    """Opens each safetensors file once, for the time of the block."""
    with ExitStack() as stack:
        files: dict[Path, object] = {}

        def open_file(path: Path):
            if path not in files:
                files[path] = stack.enter_context(safe_open(path, "pt"))
            return files[path]

        yield open_file


def find_files(directory: Path, open_file: Callable) -> dict[str, Path]:
    """The file of every tensor.

    Raises:
        CheckpointError: there is no checkpoint, or files that the index names are missing or lack a tensor.
    """
    index = directory / SAFE_WEIGHTS_INDEX_NAME
    single = directory / SAFE_WEIGHTS_NAME
    if not index.is_file() and not single.is_file():
        raise CheckpointError(f"{directory} has neither {SAFE_WEIGHTS_INDEX_NAME} nor {SAFE_WEIGHTS_NAME}.")
    try:
        if not index.is_file():
            return dict.fromkeys(open_file(single).keys(), single)
        file_of = {key: directory / name for key, name in json.loads(index.read_text())["weight_map"].items()}
        absent = sorted({path.name for path in file_of.values() if not path.is_file()})
        if absent:
            raise CheckpointError(f"{directory} lacks {len(absent)} files that its index names: {', '.join(absent[:5])}.")
        keys = {path: set(open_file(path).keys()) for path in set(file_of.values())}
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"The checkpoint in {directory} cannot be read: {error}") from error
    lacking = [key for key, path in file_of.items() if key not in keys[path]]
    if lacking:
        raise CheckpointError(f"{directory}: {len(lacking)} tensors are not in the files that the index names for them: {_some(lacking)}.")
    return file_of


@dataclass
class Recipe:
    """How some tensors of the model come out of tensors of the checkpoint.

    Attributes:
        name: key of the (first) tensor of the model.
        converter: transformers' conversion; None where only the name differs.
        sources: key and the converter's pattern for it, in the order of experts.
        block: of a quantized checkpoint, how many rows and columns have one scale, if it says so.
    """

    name: str
    converter: WeightConverter | None
    sources: list[tuple[str, str]] = field(default_factory=list)
    block: tuple[int, int] | None = None

    def convert(self, twin: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The model's tensors from (some of) the checkpoint's."""
        if self.converter is None:
            return {self.name: tensors[self.sources[0][0]]}
        converter = deepcopy(self.converter)
        for weight, scales in scaled(self.sources):
            if weight in tensors and tensors[weight].ndim == 2:
                tensors = {**tensors, scales: per_number(tensors[scales], _unpacked(tensors[weight]), self.block)}
        for key, pattern in self.sources:
            if key in tensors:
                converter.add_tensor(self.name, key, pattern, tensors[key])
        made = converter.convert(self.name, model=twin, config=twin.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def is_packed(self) -> bool:
        """Whether it makes plain weights of packed numbers."""
        return self.converter is not None and any(map(unpacks, self.converter.operations))

    def by_expert(self) -> bool:
        """Whether row e of the result is made of the e-th tensor of every pattern, so that some rows need only some tensors."""
        first, *rest = [op for op in self.converter.operations if not unpacks(op)] or [None]
        return isinstance(first, MergeModulelist) and first.dim == 0 and all(_keeps_rows(op) for op in rest)

    def keys_of_rows(self, start: int, stop: int) -> list[str]:
        """The keys that rows ``start:stop`` are made of; only if `by_expert`."""
        of_pattern: dict[str, list[str]] = {}
        for key, pattern in self.sources:
            of_pattern.setdefault(pattern, []).append(key)
        return [key for keys in of_pattern.values() for key in keys[start:stop]]

    def rows(self, files: Files, start: int, stop: int, shape: tuple[int, ...], device: torch.device) -> dict[str, Tensor] | None:
        """The tensors that rows ``start:stop`` of a result of a shape are made of, with no more read than that; None if that takes all of them."""
        if self.by_expert():
            return {key: files.read(key, None, device) for key in self.keys_of_rows(start, stop)}
        if not only_unpacks(self.converter):
            return None
        shapes = {key: files.meta(key).shape for key, _ in self.sources}
        if len(shape) > 2 and all(len(own) > 1 and own[0] == shape[0] for own in shapes.values()):
            return {key: files.read(key, _rows(own, start, stop), device) for key, own in shapes.items()}
        pairs = dict(scaled(self.sources))
        if len(shape) != 2 or len(pairs) != 1 or {*pairs, *pairs.values()} != set(shapes):
            return None
        ((weight, scales),) = pairs.items()
        part = files.read(weight, _rows(shapes[weight], start, stop), device)
        whole = (shape[0], _unpacked(part)[1])
        return {weight: part, scales: per_number(files.read(scales, None, device), whole, self.block, slice(start, stop))}


def _rows(shape: tuple[int, ...], start: int, stop: int) -> Box:
    return Box((start, *[0] * (len(shape) - 1)), (stop - start, *shape[1:]))


def _unpacked(weight: Tensor) -> tuple[int, int]:
    """The shape of a matrix once its numbers are unpacked: bytes hold two of four bits."""
    packed = weight.dtype in (torch.int8, getattr(torch, "float4_e2m1fn_x2", None))
    return weight.shape[0], weight.shape[1] * (2 if packed else 1)


def _keeps_rows(op: object) -> bool:
    """Whether an operation on ``[E, …]`` treats every expert alone."""
    if isinstance(op, Transpose):
        return min(op.dim0, op.dim1) >= 1 and not op.check_dims
    return isinstance(op, (Concatenate, Chunk)) and op.dim >= 1


def checked_recipes(
    twin: PreTrainedModel, mapping: list, tensors: dict[str, Tensor], files: Files, block: tuple[int, int] | None = None
) -> list[Recipe]:
    """How to make every tensor of the model, by transformers' conversion mapping.

    Args:
        twin: see `twin`.
        mapping: transformers' conversions.
        tensors: the model's by name, with the whole's shapes.
        files: the checkpoint.
        block: see `Recipe`.

    Raises:
        CheckpointError: tensors are missing, additional, or of other shapes.
    """
    recipes, extra = assigned_recipes(twin, mapping, tensors, files, block)
    made: dict[str, tuple] = {}
    wrong = []
    for recipe in recipes:
        try:
            about = files.typed if recipe.is_packed() else files.meta
            given = {key: about(key) for key, _ in recipe.sources}
            shapes = {name: value.shape for name, value in recipe.convert(twin, given).items()}
        except Exception as error:
            raise CheckpointError(f"{recipe.name} cannot be made of {_some([key for key, _ in recipe.sources])}: {error}") from error
        made |= shapes
        wanted = {name: tensors[name].shape for name in shapes if name in tensors}
        differ = [(name, tuple(shapes[name]), tuple(shape)) for name, shape in wanted.items() if shape != shapes[name]]
        wrong += [f"{name}: the checkpoint has {there}, the model {here}" for name, there, here in differ]
    loaded = {id(tensors[name]) for name in made if name in tensors}
    missing = [name for name, tensor in tensors.items() if id(tensor) not in loaded]
    extra += [name for name in made if name not in tensors]
    lines = [f"missing ({len(missing)}): {_some(missing)}"] if missing else []
    lines += [f"additional ({len(extra)}): {_some(extra)}"] if extra else []
    lines += [f"other shapes ({len(wrong)}): {'; '.join(wrong[:5])}"] if wrong else []
    packed = {files.typed(key).dtype for key in extra if key in files.file_of} - set(FLOATS)
    lines += [f"the additional ones look quantized ({', '.join(map(str, packed))}), and no config.json beside them says how"] if packed else []
    if lines:
        text = "\n".join(f"  - {line}" for line in lines)
        raise CheckpointError(f"The checkpoint is not one of this {type(twin).__name__}; nothing was loaded:\n{text}")
    return recipes


def assigned_recipes(
    twin: PreTrainedModel, mapping: list, tensors: dict[str, Tensor], files: Files, block: tuple[int, int] | None = None
) -> tuple[list[Recipe], list[str]]:
    """One recipe for each conversion, and the checkpoint's keys that belong to none; names as transformers' own loading finds them."""
    renamings = [t for t in mapping if isinstance(t, WeightRenaming)]
    converters = [t for t in mapping if isinstance(t, WeightConverter)]
    of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = twin.base_model_prefix
    ignored = [*(twin._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"]
    recipes: dict[str, Recipe] = {}
    extra = []
    for key in sorted(files.file_of, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, tensors)
        if name not in tensors and key in tensors:
            name, pattern = rename_source_key(key, [], [], prefix, tensors)
        if name in tensors:
            recipe = recipes.setdefault(name, Recipe(name, of_pattern[pattern] if pattern is not None else None, block=block))
            recipe.sources.append((key, pattern or key))
        elif not any(re.search(p, name) for p in ignored):
            extra.append(key)
    for recipe in recipes.values():
        if recipe.converter is not None and len(recipe.sources) == 1 and only_unpacks(recipe.converter):
            recipe.converter = None  # of a quantized checkpoint, a tensor that is not: it has no scales
    return list(recipes.values()), extra


def plain_mapping(twin: PreTrainedModel, recipes: list[Recipe], tensors: dict[str, Tensor]) -> list:
    """transformers' conversions of a checkpoint of plain weights with the names of one that was quantized, which know whether they were used."""
    mapping = get_model_conversion_mapping(twin)
    renamings = [t for t in mapping if isinstance(t, WeightRenaming)]
    converters = [t for t in mapping if isinstance(t, WeightConverter)]
    for recipe in recipes:
        scales = set(dict(scaled(recipe.sources)).values())
        for key in (key for key, _ in recipe.sources if key not in scales):
            rename_source_key(key, renamings, converters, twin.base_model_prefix, tensors)
    return mapping


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")

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
    """

    name: str
    converter: WeightConverter | None
    sources: list[tuple[str, str]] = field(default_factory=list)

    def convert(self, twin: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The model's tensors from (some of) the checkpoint's."""
        if self.converter is None:
            return {self.name: tensors[self.sources[0][0]]}
        converter = deepcopy(self.converter)
        for key, pattern in self.sources:
            if key in tensors:
                converter.add_tensor(self.name, key, pattern, tensors[key])
        made = converter.convert(self.name, model=twin, config=twin.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def by_expert(self) -> bool:
        """Whether row e of the result is made of the e-th tensor of every pattern, so that some rows need only some tensors."""
        first, *rest = self.converter.operations
        return isinstance(first, MergeModulelist) and first.dim == 0 and all(_keeps_rows(op) for op in rest)

    def keys_of_rows(self, start: int, stop: int) -> list[str]:
        """The keys that rows ``start:stop`` are made of; only if `by_expert`."""
        of_pattern: dict[str, list[str]] = {}
        for key, pattern in self.sources:
            of_pattern.setdefault(pattern, []).append(key)
        return [key for keys in of_pattern.values() for key in keys[start:stop]]


def _keeps_rows(op: object) -> bool:
    """Whether an operation on ``[E, …]`` treats every expert alone."""
    if isinstance(op, Transpose):
        return min(op.dim0, op.dim1) >= 1 and not op.check_dims
    return isinstance(op, (Concatenate, Chunk)) and op.dim >= 1


def checked_recipes(twin: PreTrainedModel, mapping: list, tensors: dict[str, Tensor], files: Files) -> list[Recipe]:
    """How to make every tensor of the model, by transformers' conversion mapping.

    Raises:
        CheckpointError: tensors are missing, additional, or of other shapes.
    """
    recipes, extra = assigned_recipes(twin, mapping, tensors, files)
    made: dict[str, tuple] = {}
    wrong = []
    for recipe in recipes:
        try:
            given = {key: files.meta(key) for key, _ in recipe.sources}
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
    if lines:
        text = "\n".join(f"  - {line}" for line in lines)
        raise CheckpointError(f"The checkpoint is not one of this {type(twin).__name__}; nothing was loaded:\n{text}")
    return recipes


def assigned_recipes(twin: PreTrainedModel, mapping: list, tensors: dict[str, Tensor], files: Files) -> tuple[list[Recipe], list[str]]:
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
            recipe = recipes.setdefault(name, Recipe(name, of_pattern[pattern] if pattern is not None else None))
            recipe.sources.append((key, pattern or key))
        elif not any(re.search(p, name) for p in ignored):
            extra.append(key)
    return list(recipes.values()), extra


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")

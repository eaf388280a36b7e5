"""What transformers' conversion makes of a state dict when it is saved, worked out from shapes, and then done group by group.

A group is what has to be converted together: all sources of one conversion. Groups are not read from the conversions but observed: tensors
on the meta device go through transformers' own function, and each result remembers which tensors it was made of.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict


@dataclass(frozen=True)
class Group:
    """Tensors that are converted together.

    Attributes:
        sources: keys of the model's state dict.
        targets: what they become in the checkpoint. Of one source and one target, nothing but the name changes.
        operates: whether the values are changed.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    operates: bool = False

    def convert(self, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The group's targets from its sources."""
        if self.operates:
            return revert_weight_conversion(model, tensors)
        return {self.targets[0]: tensors[self.sources[0]]}


@dataclass(frozen=True)
class Split:
    """How tensors fall into files.

    Attributes:
        file_of: a file for each tensor.
        names_in: the tensors of each file.
        total_size: bytes of all tensors.
        limit: bytes of the largest file.
    """

    file_of: dict[str, str]
    names_in: dict[str, list[str]]
    total_size: int
    limit: int


def without_tied(model: nn.Module, state: Mapping[str, Tensor], aliases: Mapping[str, object]) -> dict[str, Tensor]:
    """A state dict without those names of tied weights that transformers leaves out.

    Args:
        aliases: equal for names of the same memory; names that are not in it stand alone.
    """
    # transformers decides by memory, so it gets one element of memory for each tensor there is.
    memory: dict[object, Tensor] = {}
    stand_ins = {key: memory.setdefault(aliases.get(key, key), torch.empty(1, dtype=torch.float32)) for key in state}
    kept = remove_tied_weights_from_state_dict(stand_ins, model)
    return {key: value for key, value in state.items() if key in kept}


def conversion_groups(model: nn.Module, state: Mapping[str, Tensor], original_format: bool) -> tuple[list[Group], dict[str, Tensor]]:
    """The groups in the order in which transformers writes, and all results on the meta device.

    Args:
        state: meta tensors by key.
        original_format: whether names and layout become those of the checkpoint that the model came from.
    """
    if not original_format:
        return [Group((key,), (key,)) for key in state], dict(state)
    with _Traced() as traced:
        for key, tensor in state.items():
            traced.mark(tensor, {key})
        outputs = revert_weight_conversion(model, dict(state))
        sources = {name: traced.sources(tensor) for name, tensor in outputs.items()}
    groups = _grouped(state, outputs, sources)
    if any(not found for found in sources.values()) or not all(_is_same_alone(model, group, state, outputs) for group in groups):
        groups = [Group(tuple(state), tuple(outputs), operates=True)]
    return groups, outputs


def _grouped(state: Mapping[str, Tensor], outputs: Mapping[str, Tensor], sources: Mapping[str, frozenset[str]]) -> list[Group]:
    """Results that share a source belong together."""
    members: list[tuple[set[str], list[str]]] = []
    of_source: dict[str, int] = {}
    for name in outputs:
        touched = sorted({of_source[key] for key in sources[name] if key in of_source})
        if not touched:
            members.append((set(), []))
        into = touched[0] if touched else len(members) - 1
        for other in touched[1:]:
            members[into][0].update(members[other][0])
            members[into][1].extend(members[other][1])
            members[other] = (set(), [])
        members[into][0].update(sources[name])
        members[into][1].append(name)
        of_source.update(dict.fromkeys(members[into][0], into))
    order = {key: position for position, key in enumerate(state)}
    groups = []
    for keys, names in members:
        if names:
            ordered = tuple(sorted(keys, key=order.__getitem__))
            renamed = len(keys) == len(names) == 1 and outputs[names[0]] is state[ordered[0]]
            groups.append(Group(ordered, tuple(names), operates=not renamed))
    return groups


def _is_same_alone(model: nn.Module, group: Group, state: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> bool:
    """Whether the conversion of a group does not depend on what else is in the state dict."""
    if not group.operates:
        return True
    alone = revert_weight_conversion(model, {key: state[key] for key in group.sources})
    expected = {name: outputs[name] for name in group.targets}
    return {name: (t.shape, t.dtype) for name, t in alone.items()} == {name: (t.shape, t.dtype) for name, t in expected.items()}


def split_into_files(outputs: Mapping[str, Tensor], pattern: str, max_shard_size: int | str) -> Split:
    """As transformers splits: tensors that share memory count once, with the whole of it, and stay in one file.

    Args:
        outputs: meta tensors, sharing storage where the converted tensors do.
        pattern: a file name with ``{suffix}``.
        max_shard_size: bytes, or words such as ``5GB``.
    """
    split = split_state_dict_into_shards_factory(
        dict(outputs),
        get_storage_size=lambda tensor: tensor.untyped_storage().nbytes(),
        get_storage_id=lambda tensor: tensor.untyped_storage()._cdata,
        filename_pattern=pattern,
        max_shard_size=max_shard_size,
    )
    largest = max((sum(outputs[name].nbytes for name in names) for names in split.filename_to_tensors.values()), default=0)
    return Split(split.tensor_to_filename, split.filename_to_tensors, split.metadata["total_size"], largest)


class _Traced(TorchFunctionMode):
    """Remembers for each tensor which marked tensors it was made of."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if made:
            found = frozenset().union(*(self.sources(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)))
            for tensor in made:
                self.mark(tensor, found | self.sources(tensor))
        return out

    def mark(self, tensor: Tensor, sources: set[str] | frozenset[str]) -> None:
        vars(tensor)["_moepatch_sources"] = frozenset(sources)

    def sources(self, tensor: Tensor) -> frozenset[str]:
        return vars(tensor).get("_moepatch_sources", frozenset())

"""Saving a sharded model as the standard checkpoint, without ever holding the whole of it.

Three passes. Every rank says which parts of which tensors it holds; rank 0 works out from shapes alone (on the meta device) what
transformers' conversion makes of them and how they fall into files; then bundle by bundle the parts travel to rank 0, which converts and
writes them. Rank 0 holds one file and one bundle at a time, the other ranks nothing but their own parts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..errors import MoePatchError
from .agree import together
from .pieces import Entry, Held, Piece, buffer, cover, exchange, holding
from .revert import Group, Split, conversion_groups, split_into_files, without_tied
from .twin import knows_conversions, meta_twin

WRITER = 0
#: What travels to the writer between two looks at whether every rank is well; less where files are smaller. One group may be larger.
BUNDLE_BYTES = 256 * 2**20
_WHAT = "save_pretrained()"


def sharding_mesh(model: nn.Module) -> DeviceMesh | None:
    """The mesh of a parameter of a sharded model; None if no parameter is sharded."""
    return next((p.device_mesh for p in model.parameters() if isinstance(p, DTensor)), None)


@dataclass(frozen=True)
class Route:
    """What every rank has to know: which tensors travel together, and from where.

    Attributes:
        bundles: keys of the state dict, in the order of travel.
        pieces: for each key, the parts that make up the whole tensor, each from one rank.
    """

    bundles: list[list[str]]
    pieces: dict[str, list[Piece]]


@dataclass
class Writer:
    """What only rank 0 has: the conversion, and the file that is being filled.

    Attributes:
        model: the model.
        converts: the model as transformers' conversion wants it.
        directory: the staged directory.
        groups: the groups of each bundle.
        split: which tensor belongs into which file; None for adapters, which are handed to transformers whole.
        entries: shape and dtype of every tensor that travels.
        pending: tensors of files that are not complete yet.
    """

    model: nn.Module
    converts: nn.Module
    directory: Path
    groups: list[list[Group]]
    split: Split | None
    entries: dict[str, Entry]
    pending: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def store(self, index: int, tensors: dict[str, Tensor]) -> None:
        """Converts the tensors of a bundle and writes every file that they complete."""
        if self.split is None:
            self.pending.setdefault("", {}).update(tensors)
            return
        for group in self.groups[index]:
            converted = group.convert(self.converts, {key: tensors.pop(key) for key in group.sources})
            for name in group.targets:
                file = self.split.file_of[name]
                self.pending.setdefault(file, {})[name] = converted.pop(name).contiguous()
                if len(self.pending[file]) == len(self.split.names_in[file]):
                    save_file(self.pending.pop(file), self.directory / file, metadata={"format": "pt"})

    def begin(self, directory: Path, write_rest: Callable[..., None]) -> None:
        """Everything but weights, as transformers writes it; it comes first, because transformers clears weights that it does not know."""
        self.directory = directory
        if self.split is not None:
            with _unsharded_config(self.model):
                write_rest(directory, state_dict={})

    def finish(self, write_rest: Callable[..., None], options: Mapping[str, Any]) -> None:
        """The index; or adapters, by transformers."""
        if self.split is None:
            with _unsharded_config(self.model):
                write_rest(self.directory, state_dict=self.pending.pop("", {}), save_peft_format=options["save_peft_format"])
        elif len(self.split.names_in) > 1:
            metadata = {"total_parameters": self.model.num_parameters(), "total_size": self.split.total_size}
            index = {"metadata": metadata, "weight_map": self.split.file_of}
            path = self.directory / _with_variant(SAFE_WEIGHTS_INDEX_NAME, options["variant"])
            path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save_sharded(model: nn.Module, mesh: DeviceMesh, options: Mapping[str, Any], write_rest: Callable[..., None], staged) -> None:
    """``save_pretrained`` of a sharded model. Every rank has to call it; rank 0 writes.

    Args:
        model: a ``PreTrainedModel`` with DTensor parameters.
        mesh: of any of them; says on which device tensors travel.
        options: the arguments of ``save_pretrained`` by name.
        write_rest: transformers' own ``save_pretrained``, for all that is not weights.
        staged: makes the directory to write into (`checkpoint.staged`).

    Raises:
        MoePatchError: an option that a sharded model cannot serve, or parts of a tensor that no rank has passed.
        RankFailed: another rank failed. Whatever is raised, it is raised on all ranks, and the old checkpoint is whole.
    """
    target = Path(options["save_directory"])
    with together(_WHAT, mesh):
        _check(options, target)
        held = holding(_state_of(model, options["state_dict"]))
    # transformers, too, lets only rank 0 write, if it is called the main process.
    table: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(table, (bool(options["is_main_process"]), {key: h.entry for key, h in held.items()}))
    if not table[WRITER][0]:
        return
    with ExitStack() as stack:
        writer, route = None, [None]
        with together(_WHAT, mesh):
            if dist.get_rank() == WRITER:
                writer, route[0] = _plan(model, held, [entries for _, entries in table], options)
                writer.begin(stack.enter_context(staged(target)), write_rest)
        dist.broadcast_object_list(route, src=WRITER)
        _stream(mesh, writer, route[0], held)
        with together(_WHAT, mesh):
            if writer is not None:
                writer.finish(write_rest, options)
                stack.pop_all().close()


def _check(options: Mapping[str, Any], target: Path) -> None:
    if options["push_to_hub"]:
        raise MoePatchError("A sharded model is not pushed to a hub while it is saved. Save it to a directory and upload that.")
    if options["distributed_checkpoint"]:
        raise MoePatchError("distributed_checkpoint=True is for models that transformers has sharded. Use torch.distributed.checkpoint.")
    if os.path.isfile(target):
        raise MoePatchError(f"{target} is a file; save_pretrained() needs a directory.")


def _state_of(model: nn.Module, given: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """What is to be saved, as this rank has it."""
    state = dict(model.state_dict() if given is None else given)
    for key in model._keys_to_ignore_on_save or ():
        state.pop(key, None)
    wrong = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if wrong:
        raise MoePatchError(f"The state dict holds something that is not a tensor: {wrong[:3]}.")
    return state


def _plan(model: nn.Module, held: dict[str, Held], entries: list[dict], options: Mapping[str, Any]) -> tuple[Writer, Route]:
    """Everything that follows from names and shapes alone; on rank 0."""
    pieces = cover(entries, WRITER)
    merged, converts = _merged(model, entries), model
    shapes = {key: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for key, entry in merged.items()}
    most = BUNDLE_BYTES
    if getattr(model, "_hf_peft_config_loaded", False):
        kept = {id(value) for value in model.get_adapter_state_dict(state_dict=dict(shapes)).values()}
        groups, split = [Group((key,), (key,)) for key, value in shapes.items() if id(value) in kept], None
    else:
        shapes = without_tied(model, shapes, {key: h.alias for key, h in held.items()})
        converts = knows_conversions(model)
        groups, outputs = conversion_groups(converts, shapes, options["save_original_format"])
        stem, _, suffix = _with_variant(SAFE_WEIGHTS_NAME, options["variant"]).rpartition(".")
        split = split_into_files(outputs, stem + "{suffix}." + suffix, options["max_shard_size"])
        most = min(most, split.limit)
    bundles: list[list[Group]] = []
    size = 0
    for group in groups:
        added = sum(shapes[key].nbytes for key in group.sources)
        if not bundles or size + added > most:
            bundles.append([])
            size = 0
        bundles[-1].append(group)
        size += added
    route = Route([[key for group in bundle for key in group.sources] for bundle in bundles], pieces)
    return Writer(model, converts, Path(), bundles, split, merged), route


def _merged(model: nn.Module, entries: list[dict[str, Entry]]) -> dict[str, Entry]:
    """One entry for each key, in the order of the unsharded model's state dict."""
    merged: dict[str, Entry] = {}
    for of_rank in (entries[WRITER], *entries):
        for key, entry in of_rank.items():
            merged.setdefault(key, entry)
    if len(merged) == len(entries[WRITER]):
        return merged
    # Some keys are on other ranks only, such as those of experts that were a list of modules.
    order = {key: position for position, key in enumerate(meta_twin(model).state_dict())}
    return dict(sorted(merged.items(), key=lambda item: order.get(item[0], len(order))))


@contextmanager
def _unsharded_config(model: nn.Module) -> Iterator[None]:
    """Hides the config's ``distributed_config``, by which transformers would gather again, and wait for ranks that are not there."""
    config = vars(model.config)
    hidden = {key: config.pop(key) for key in ("distributed_config",) if key in config}
    try:
        yield
    finally:
        config.update(hidden)


def _stream(mesh: DeviceMesh, writer: Writer | None, route: Route, held: dict[str, Held]) -> None:
    """Bundle after bundle to the writer. All that can fail on one rank alone happens between two exchanges, where ranks agree to go on."""
    rank = dist.get_rank()
    arrived: dict[str, Tensor] | None = None
    for index, keys in enumerate(route.bundles):
        with together(_WHAT, mesh):
            if writer is not None and arrived is not None:
                writer.store(index - 1, arrived)
            arrived = {}
            if writer is not None:
                arrived = {key: buffer(writer.entries[key], held.get(key), route.pieces[key], rank) for key in keys}
            leaving = {key: held[key].local_bytes(mesh.device_type) for key in keys if any(p.rank == rank for p in route.pieces[key])}
        exchange([(key, piece) for key in keys for piece in route.pieces[key]], leaving, arrived, WRITER, mesh.device_type)
    with together(_WHAT, mesh):
        if writer is not None and arrived is not None:
            writer.store(len(route.bundles) - 1, arrived)


def _with_variant(name: str, variant: str | None) -> str:
    """``model.safetensors`` → ``model.fp16.safetensors``, as transformers names variants."""
    stem, _, suffix = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{suffix}"

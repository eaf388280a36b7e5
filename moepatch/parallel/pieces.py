"""Which rank holds which part of a tensor, and how the parts come to one rank.

A part is a box: an offset and a size in the whole tensor. Parts travel as bytes, so that every dtype travels over every backend.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..errors import MoePatchError


@dataclass(frozen=True)
class Box:
    """A part of a tensor.

    Attributes:
        offset, size: one number for each axis of the whole tensor.
    """

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.size)

    @property
    def index(self) -> tuple[slice, ...]:
        """What selects the part from the whole."""
        return tuple(slice(start, start + length) for start, length in zip(self.offset, self.size, strict=True))


@dataclass(frozen=True)
class Entry:
    """What a rank says of one of its tensors: the whole's shape and dtype, and the box that it holds."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    box: Box


@dataclass(frozen=True)
class Piece:
    """A box and the rank that sends it."""

    rank: int
    box: Box


@dataclass(frozen=True)
class Held:
    """A tensor of this rank's state dict.

    Attributes:
        tensor: a DTensor or a plain tensor.
        entry: as other ranks see it.
    """

    tensor: Tensor
    entry: Entry

    @property
    def alias(self) -> object:
        """Equal for tensors that are the same memory, such as tied weights."""
        local = local_part(self.tensor)
        return (local.device, local.data_ptr(), self.entry.shape) if local.numel() else id(self)

    def local_bytes(self, device: str) -> Tensor:
        """This rank's part, as bytes on the device that the backend can send from."""
        return _bytes(local_part(self.tensor).to(device).contiguous())


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; a plain tensor itself. Detached."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def box_of(tensor: Tensor) -> Box:
    """Where this rank's part of a tensor lies in the whole.

    Raises:
        MoePatchError: the part is not one box, or a pending sum.
    """
    if not isinstance(tensor, DTensor):
        return Box((0,) * tensor.ndim, tuple(tensor.shape))
    if any(placement.is_partial() for placement in tensor.placements):
        raise MoePatchError(f"A DTensor of shape {tuple(tensor.shape)}, placed {tensor.placements}, is a sum still to be taken.")
    # What torch's own distributed checkpoints ask a DTensor.
    chunks = tensor.__create_chunk_list__()
    local = local_part(tensor)
    if len(chunks) == 1 and tuple(chunks[0].sizes) == tuple(local.shape):
        return Box(tuple(chunks[0].offsets), tuple(chunks[0].sizes))
    if local.numel() == 0:
        return Box((0,) * tensor.ndim, tuple(local.shape))
    placed = f"{tensor.placements} on {tensor.device_mesh}"
    raise MoePatchError(f"A DTensor of shape {tuple(tensor.shape)}, placed {placed}, is not one box on this rank.")


def holding(state: Mapping[str, Tensor]) -> dict[str, Held]:
    """What this rank holds of a state dict."""
    return {key: Held(tensor, Entry(tuple(tensor.shape), tensor.dtype, box_of(tensor))) for key, tensor in state.items()}


def cover(entries: list[dict[str, Entry]], preferred: int) -> dict[str, list[Piece]]:
    """For each key the fewest pieces that make up the whole tensor: replicas send once, and `preferred` rather than others.

    Args:
        entries: what each rank holds.
        preferred: the rank that takes from itself what it has.

    Raises:
        MoePatchError: ranks disagree on a shape or dtype, or parts are missing.
    """
    order = [preferred, *(rank for rank in range(len(entries)) if rank != preferred)]
    found: dict[str, dict[Box, int]] = {}
    kinds: dict[str, tuple] = {}
    for rank in order:
        for key, entry in entries[rank].items():
            kind = kinds.setdefault(key, (entry.shape, entry.dtype))
            if kind != (entry.shape, entry.dtype):
                raise MoePatchError(f"{key}: rank {rank} has {entry.dtype} {entry.shape}, another rank {kind[1]} {kind[0]}.")
            boxes = found.setdefault(key, {})
            if entry.box.numel:
                boxes.setdefault(entry.box, rank)
    for key, boxes in found.items():
        shape = kinds[key][0]
        whole = Box((0,) * len(shape), shape)
        if whole in boxes:  # makes all other parts needless
            found[key] = boxes = {whole: boxes[whole]}
        present = sum(box.numel for box in boxes)
        if present != math.prod(shape):
            found_on = f"ranks {sorted(boxes.values())} hold {present} of the {math.prod(shape)} elements of {shape}"
            raise MoePatchError(f"{key}: {found_on}. Pass the state dict on every rank.")
    return {key: [Piece(rank, box) for box, rank in sorted(boxes.items(), key=lambda item: item[0].offset)] for key, boxes in found.items()}


def buffer(entry: Entry, held: Held | None, pieces: list[Piece], rank: int) -> Tensor:
    """The whole tensor on the CPU, with what this rank has of it filled in; a plain tensor on the CPU is used as it is."""
    mine = held is not None and any(piece.rank == rank for piece in pieces)
    if mine and held.entry.box.numel == math.prod(entry.shape):
        return local_part(held.tensor).cpu()
    whole = torch.empty(entry.shape, dtype=entry.dtype)
    if mine:
        whole[held.entry.box.index].copy_(local_part(held.tensor))
    return whole


def exchange(pieces: list[tuple[str, Piece]], leaving: Mapping[str, Tensor], arriving: Mapping[str, Tensor], to: int, device: str) -> None:
    """Sends pieces to rank `to`, which puts them into `arriving`; nothing here fails on one rank alone, short of its death.

    Args:
        pieces: the same list on every rank; those of rank `to` itself are skipped.
        leaving: this rank's parts as bytes, by key.
        arriving: on rank `to`, the whole tensors, by key.
        device: the type of device that the backend can send from.
    """
    rank = dist.get_rank()
    for key, piece in pieces:
        if piece.rank == to:
            continue
        if rank == piece.rank:
            dist.send(leaving[key], to)
        elif rank == to:
            part = torch.empty(piece.box.size, dtype=arriving[key].dtype, device=device)
            dist.recv(_bytes(part), piece.rank)
            arriving[key][piece.box.index].copy_(part)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)

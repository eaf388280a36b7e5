"""The device mesh: which ranks hold which experts, and over which ranks everything else is sharded.

Dims are a subset of ``dp_replicate``, ``dp_shard`` and ``ep``, in any order, `ep` among them. Dense parameters are sharded over ``dp_shard × ep``
together; experts are split over ``ep`` and, where there is more than one, sharded over ``dp_shard``. Every rank has its own tokens.
"""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..errors import MoePatchError

#: Filters of warnings are one list for all threads: two that put them back in turn would leave one of their own.
_SLICING = threading.Lock()
DIMS = ("dp_replicate", "dp_shard", "ep")


@dataclass(frozen=True)
class Meshes:
    """The parts of a user's mesh that sharding needs; all are slices of that mesh.

    Attributes:
        ep: 1-D, the ranks that share one set of experts.
        dense: for everything else: 1-D (shard) or 2-D (replicate, shard).
        experts: over which experts are sharded or replicated besides `ep`, or None where every expert has one owner.
    """

    ep: DeviceMesh
    dense: DeviceMesh
    experts: DeviceMesh | None


def make_mesh(ep: int, dp_replicate: int = 1, device: str | torch.device | None = None) -> DeviceMesh:
    """The usual mesh of the running process group: ``(dp_replicate, dp_shard, ep)``, with dp_shard what is left.

    Args:
        ep: over how many ranks the experts of a layer are spread; ranks that follow each other share a set, so keep it inside a host.
        dp_replicate: how many copies of the sharded model there are.
        device: ``cuda`` or ``cpu``; by default cuda if the process group runs on it.

    Raises:
        MoePatchError: no process group, or the world size is not divisible.
    """
    if not dist.is_initialized():
        raise MoePatchError("make_mesh() needs a process group. Start with torchrun and call torch.distributed.init_process_group() first.")
    world = dist.get_world_size()
    if not (isinstance(ep, int) and isinstance(dp_replicate, int)):
        raise MoePatchError(f"ep={ep!r} and dp_replicate={dp_replicate!r} have to be integers, numbers of ranks.")
    if ep < 1 or dp_replicate < 1 or world % (ep * dp_replicate):
        raise MoePatchError(
            f"{world} ranks cannot be divided into dp_replicate={dp_replicate} × dp_shard × ep={ep}. Choose numbers whose product divides {world}."
        )
    kind = torch.device(device).type if device is not None else "cuda" if torch.cuda.is_available() and "nccl" in dist.get_backend() else "cpu"
    return init_device_mesh(kind, (dp_replicate, world // (ep * dp_replicate), ep), mesh_dim_names=DIMS)


def why_not_mesh(mesh: object) -> str | None:
    """What is wrong with a mesh in itself, or None."""
    if not isinstance(mesh, DeviceMesh):
        return f"the mesh is a {type(mesh).__name__}, not a torch DeviceMesh."
    names = mesh.mesh_dim_names or ()
    if "ep" not in names:
        return f"the mesh has the dims {list(names)} and no 'ep'. Name the dim over which experts are spread 'ep'."
    unknown = [name for name in names if name not in DIMS]
    if unknown:
        return f"the mesh has dims that moepatch does not know: {unknown}. It knows {list(DIMS)}."
    if mesh.get_coordinate() is None:
        return "this rank is not part of the mesh."
    return None


def in_order(mesh: DeviceMesh) -> DeviceMesh:
    """A valid mesh with its dims in the order of `DIMS`, which slices of it need: itself, or a new one where each rank has its place of before.

    All ranks of the process group have to call it: a new mesh has groups of its own.
    """
    names = tuple(name for name in DIMS if name in mesh.mesh_dim_names)
    if names == tuple(mesh.mesh_dim_names):
        return mesh
    places = mesh.mesh.permute([mesh.mesh_dim_names.index(name) for name in names])
    return DeviceMesh(mesh.device_type, places.contiguous(), mesh_dim_names=names)


def resolve(mesh: DeviceMesh) -> Meshes:
    """The parts of a valid mesh whose dims are in order."""
    sizes = dict(zip(mesh.mesh_dim_names, mesh.mesh.shape, strict=True))
    shard = [name for name in ("dp_shard", "ep") if name in sizes]
    replicate = ["dp_replicate"] if sizes.get("dp_replicate", 1) > 1 else []
    dense_shard = shard[0]
    if len(shard) == 2:
        dense_shard = "dp_shard_ep"
        mesh["dp_shard", "ep"]._flatten(dense_shard)
    # FSDP shards over the last dim it is given. Without dp_shard that is the replicas: the same numbers, less memory, one gather more.
    experts = [*replicate, *(["dp_shard"] if "dp_shard" in sizes and (sizes["dp_shard"] > 1 or replicate) else [])]
    with _SLICING, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch announces a change of how flattened dims are named
        dense = mesh[(*replicate, dense_shard)] if replicate else mesh[dense_shard]
        part = mesh[tuple(experts)] if len(experts) > 1 else mesh[experts[0]] if experts else None
    return Meshes(ep=mesh["ep"], dense=dense, experts=part)

"""What FSDP1 (``FullyShardedDataParallel``) does around a module, as far as it can be seen from inside of it."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

#: Strategies with which a unit frees its weights as soon as its module has returned; a root keeps them until the model has.
_FREEING = (ShardingStrategy.FULL_SHARD, ShardingStrategy.HYBRID_SHARD)


def frees_inside(model: nn.Module, module: nn.Module) -> bool:
    """Whether a unit below a model, around a module of it, frees the module's weights while the model's forward still runs."""
    if "_is_fsdp_managed_module" not in vars(module):  # FSDP marks what it has
        return False
    return any(isinstance(unit, FullyShardedDataParallel) and unit.sharding_strategy in _FREEING for unit in _path(model, module))


def _path(model: nn.Module, module: nn.Module) -> list[nn.Module]:
    """The modules on the way from a model to a module in it, both left out where they are one; heads come last, so the search begins there."""
    for child in reversed(model._modules.values()):
        if child is module:
            return [child]
        found = _path(child, module) if child is not None else []
        if found:
            return [child, *found]
    return []

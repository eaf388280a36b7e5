"""What others put around a patched model, as functions: each wraps a model and says how its whole weights are read afterwards."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import BackwardPrefetch, FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy, size_based_auto_wrap_policy
from torch.nn.parallel import DistributedDataParallel


class Wrapped(NamedTuple):
    """A model in its wrapper.

    Attributes:
        call: the model to call.
        optimizer: over what it has as parameters.
        gathered: a context manager within which the inner model's `named_parameters` are whole.
        backward: of a loss.
    """

    call: nn.Module
    optimizer: torch.optim.Optimizer
    gathered: Callable = contextlib.nullcontext
    backward: Callable = torch.Tensor.backward


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.5)


#: Which modules are units of their own.
UNITS = {
    "whole": lambda model, module: False,
    "layers": lambda model, module: any(module is layer for layer in model.model.layers),
    "linears": lambda model, module: isinstance(module, nn.Linear),
    "leaves": lambda model, module: next(module.children(), None) is None and next(module.parameters(), None) is not None,
    "head": lambda model, module: module is model.lm_head,
    "experts": lambda model, module: any(p.ndim == 3 for p in module.parameters(recurse=False)),
}


def ddp(hook=None, **options):
    """DistributedDataParallel, perhaps with a communication hook."""

    def wrap(model: nn.Module) -> Wrapped:
        made = DistributedDataParallel(model, **options)
        if hook == "powersgd":
            made.register_comm_hook(powerSGD_hook.PowerSGDState(None, start_powerSGD_iter=10), powerSGD_hook.powerSGD_hook)
        elif hook is not None:
            made.register_comm_hook(None, getattr(default_hooks, hook))
        return Wrapped(made, _sgd(made))

    return wrap


def fsdp1(units: str | int, **options):
    """FullyShardedDataParallel around the model and some of its modules: of a kind, or of so many numbers."""

    def wrap(model: nn.Module) -> Wrapped:
        if isinstance(units, int):
            policy = functools.partial(size_based_auto_wrap_policy, min_num_params=units)
        else:
            policy = functools.partial(lambda_auto_wrap_policy, lambda_fn=lambda module: UNITS[units](model, module))
        made = FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"), **options)
        return Wrapped(made, _sgd(made), lambda: FullyShardedDataParallel.summon_full_params(made, writeback=False))

    return wrap


def fsdp2(*units: str, **options):
    """fully_shard of the model and some of its modules."""

    def wrap(model: nn.Module) -> Wrapped:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for module in reversed(list(model.modules())):
            if any(UNITS[unit](model, module) for unit in units):
                fully_shard(module, mesh=mesh, **options)
        fully_shard(model, mesh=mesh, **options)
        return Wrapped(model, _sgd(model))

    return wrap


def accelerated(**options):
    """accelerate's FSDP2 plugin."""

    def wrap(model: nn.Module) -> Wrapped:
        from accelerate import Accelerator, FullyShardedDataParallelPlugin
        from accelerate.state import AcceleratorState, GradientState

        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29512")  # looked at, not used: there is a group already
        for state in (AcceleratorState, GradientState):
            state._reset_state()
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False, **options)
        accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
        made, optimizer = accelerator.prepare(model, _sgd(model))
        return Wrapped(made, optimizer, backward=accelerator.backward)

    return wrap


def steps(wrapped: Wrapped, model: nn.Module, given: dict, accumulated: bool = False) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of two steps, and every parameter after them by its name in the model.

    Args:
        accumulated: each step has a first half whose gradients are not exchanged.
    """
    losses = []
    for _ in range(2):
        if accumulated:
            with wrapped.call.no_sync():
                wrapped.backward(wrapped.call(**given).loss)
        loss = wrapped.call(**given).loss
        wrapped.backward(loss)
        wrapped.optimizer.step()
        wrapped.optimizer.zero_grad()
        losses.append(loss.item())
    with wrapped.gathered():
        return losses, {_plain(name): _whole(p).detach().clone() for name, p in model.named_parameters()}


def _plain(name: str) -> str:
    for part in ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
        name = name.replace(part, "")
    return name


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def emptied(model: nn.Module, storage: bool) -> Callable[[], None]:
    """Has the weights of every module there for its forward and its backward alone, as offloading and ZeRO-3 have it; and what brings all back.

    Args:
        storage: their memory is freed and they keep their shapes; else they are empty.
    """
    modules = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    kept = {id(p): p.data.clone() for p in model.parameters()}
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # not beside others: each is freed by itself

    def fill(module, *unused):
        for p in module.parameters(recurse=False):
            if not storage:
                p.data = kept[id(p)]
            elif p.untyped_storage().size() == 0:
                p.untyped_storage().resize_(p.nbytes)
                p.data.copy_(kept[id(p)])

    def empty(module, *unused):
        for p in module.parameters(recurse=False):
            p.untyped_storage().resize_(0) if storage else setattr(p, "data", torch.empty(0))

    for module in modules:
        module.register_forward_pre_hook(fill)
        module.register_forward_hook(empty)
        module.register_full_backward_pre_hook(fill)
        empty(module)
    return lambda: [fill(module) for module in modules] and None


PREFETCH = {"forward_prefetch": True, "backward_prefetch": BackwardPrefetch.BACKWARD_POST}
SHARD_GRAD = {"sharding_strategy": ShardingStrategy.SHARD_GRAD_OP}

"""The stacks that are compared. Each takes the model that transformers builds and makes it what its users would train."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import stack_automodel
import stack_deepspeed
import stack_v4
import torch.distributed as dist
import transformers
from stack_base import NotServed, Setting, Stack, shard_by_layer
from torch import nn
from transformers import PreTrainedModel

import moepatch


def available(name: str, setting: Setting) -> str | None:
    """Why a stack cannot run here, or None."""
    return STACKS[name].why_not(setting)


@contextmanager
def undone(model: PreTrainedModel) -> Iterator[None]:
    """Puts back what a stack replaces in the module that defines the model's class, for the stacks that come after it."""
    namespace = vars(sys.modules[type(model).__module__])
    before = dict(namespace)
    try:
        yield
    finally:
        namespace.clear()
        namespace.update(before)


def _transformers(model: PreTrainedModel, setting: Setting) -> nn.Module:
    """As installed: its choice of attention and experts, and FSDP2 layer by layer where there are several ranks."""
    shard_by_layer(model, setting)
    return model


def _liger(model: PreTrainedModel, setting: Setting) -> nn.Module:
    """Liger's norms and rope. Its experts compute something slower here, and its fused loss costs more time than it saves."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN, _apply_liger_kernel_to_instance

    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise NotServed(f"Liger has no patch for {model.config.model_type}")
    _apply_liger_kernel_to_instance(model=model, rope=True, rms_norm=True, swiglu=False, cross_entropy=False, fused_linear_cross_entropy=False)
    return _transformers(model, setting)


def _transformers_ep(model: PreTrainedModel, setting: Setting) -> nn.Module:
    """transformers' own expert parallelism (its all-to-all) with its own FSDP2 plan, put on after the model is built."""
    from transformers.distributed import DistributedConfig
    from transformers.distributed.expert_parallel import apply_expert_parallelism
    from transformers.distributed.fsdp import apply_fully_sharded_data_parallelism
    from transformers.distributed.utils import initialize_distributed_mesh

    config = DistributedConfig(ep_size=setting.ep, fsdp_size=setting.world)
    _, meshes = initialize_distributed_mesh(config)
    _, ep_plan, fsdp_plan = model._resolve_parallel_plans(config)
    model.config.distributed_config, model._mesh_manager = config, meshes
    model._device_mesh = meshes.get_mesh(("pp", "fsdp", "tp"))
    model._tp_size, model._fsdp_size = 1, setting.world
    apply_expert_parallelism(model, meshes.get_mesh("ep"), meshes.get_mesh("tp"), ep_plan, ep_implementation=config.ep_implementation)
    apply_fully_sharded_data_parallelism(model, meshes, fsdp_plan, ep_plan)
    return model


def _moepatch(model: PreTrainedModel, setting: Setting) -> nn.Module:
    """``moepatch.optimize`` with its own choices, but for what the command line says."""
    return _optimized(model, setting, **setting.of("moepatch"))


def _moepatch_experts(model: PreTrainedModel, setting: Setting) -> nn.Module:
    """Only the mixture of experts patched: what each half buys."""
    return _optimized(model, setting, dense=False)


def _optimized(model: PreTrainedModel, setting: Setting, **options) -> nn.Module:
    mesh = moepatch.make_mesh(ep=setting.ep) if setting.world > 1 else None
    return moepatch.optimize(model, mesh, **options)


def _needs(package: str) -> Callable[[Setting], str | None]:
    return lambda setting: None if importlib.util.find_spec(package) else f"{package} is not installed"


def _needs_own_ep(setting: Setting) -> str | None:
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version < (5, 23):
        return f"needs transformers 5.23, this is {transformers.__version__}"
    return None if setting.world > 1 and dist.is_initialized() else "needs several ranks"


STACKS: dict[str, Stack] = {
    stack.name: stack
    for stack in (
        Stack("transformers", _transformers),
        Stack("transformers-liger", _liger, _needs("liger_kernel")),
        Stack("transformers-ep", _transformers_ep, _needs_own_ep),
        Stack("transformers-v4", stack_v4.prepare),
        Stack("moepatch-experts", _moepatch_experts),
        Stack("moepatch", _moepatch),
        Stack("automodel", stack_automodel.prepare, _needs("nemo_automodel"), weights_first=False),
        Stack("deepspeed", stack_deepspeed.prepare, stack_deepspeed.why_not, weights_first=True),
    )
}

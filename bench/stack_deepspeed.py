"""DeepSpeed AutoEP: transformers' model, whose blocks of experts it replaces by its own, with an all-to-all of its own.

Without an optimizer there is nothing for ZeRO to shard but gradients, and its stages 1 and 2 keep fp32 weights for a step that is not measured here. So the
engine runs without ZeRO: every rank has all of the dense half, and its gradients are averaged when the backward is done.
``--options deepspeed.gate_up_impl=fused`` and so on set fields of its section ``expert_parallel``. Its transport over DeepEP needs DeepEP 2 and NCCL 2.30.4.
"""

from __future__ import annotations

import importlib.util

import torch
import torch.distributed as dist
from stack_base import NotServed, Output, OwnModel, Router, Setting
from torch import Tensor
from transformers import PreTrainedModel


def why_not(setting: Setting) -> str | None:
    """Its engine does not start without a process group."""
    if importlib.util.find_spec("deepspeed") is None:
        return "deepspeed is not installed"
    return None if setting.world > 1 and dist.is_initialized() else "needs several ranks"


def prepare(model: PreTrainedModel, setting: Setting) -> OwnModel:
    """The model with its experts spread over the ranks.

    Args:
        model: with all its weights: what a rank does not keep is given up layer by layer.
        setting: of the run.

    Raises:
        NotServed: AutoEP has no preset for it.
    """
    import deepspeed
    from deepspeed.module_inject.auto_ep_presets.registry import preset_name_for_hf_model_type

    preset = preset_name_for_hf_model_type(model.config.model_type)
    if preset is None:
        raise NotServed(f"DeepSpeed AutoEP has no preset for {model.config.model_type}")
    experts = {"enabled": True, "autoep_size": setting.ep, "preset_model": preset, **setting.of("deepspeed")}
    settings = {"train_micro_batch_size_per_gpu": 1, "expert_parallel": experts, "zero_optimization": {"stage": 0}}
    with setting.device:
        engine, *_ = deepspeed.initialize(model=model, config=settings)
    own = DeepSpeed(model, engine, [f"attention: {model.config._attn_implementation}", "ZeRO: 0", *(f"{key}: {value}" for key, value in experts.items())])
    if not own.routers():
        raise NotServed(f"DeepSpeed AutoEP found no experts in {model.config.model_type}")
    return own


class DeepSpeed(OwnModel):
    """A model of transformers in DeepSpeed's hands."""

    def __init__(self, model: PreTrainedModel, engine: torch.nn.Module, uses: list[str]):
        super().__init__(model.config, uses)
        self.model = model
        # Not a submodule: it holds the model itself.
        self._engine = (engine,)

    def fill(self, device: torch.device, seed: int) -> None:
        """It had its weights before."""

    def routers(self) -> list[Router]:
        from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

        blocks = [m for m in self.model.modules() if isinstance(m, AutoEPMoELayer)]
        return [Router(block.router, 1, block.num_experts, counts=2) for block in blocks]

    def forward(self, input_ids: Tensor, labels: Tensor) -> Output:
        loss = self.model(input_ids=input_ids, labels=labels).loss
        if loss.requires_grad:
            loss.register_hook(self._reduce_afterwards)
        return Output(loss)

    def close(self) -> None:
        self._engine[0].destroy()

    def _reduce_afterwards(self, gradient: Tensor) -> None:
        """The engine's own backward does this, but it wants an optimizer."""
        torch.autograd.Variable._execution_engine.queue_callback(self._engine[0].allreduce_gradients)

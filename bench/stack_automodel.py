"""NVIDIA NeMo AutoModel: its own model classes, its expert parallelism with FSDP2, its choice of kernels.

Built from the parts that its `from_config` is made of, for that one needs the very transformers that it was released with and a GPU: the class of
its registry on the meta device, its parallelizer, its initialisation. The parameters are then drawn as all stacks' are: those that are called
and laid out as transformers' get the same values, the experts, which are laid out otherwise, others of the same scale.

Without options the backend is its own choice, which with Transformer Engine and DeepEP installed is the one of its published numbers: attention and linear
layers of TE, compiled fp32 norms, `torch._grouped_mm`, DeepEP. ``--options automodel.attn=sdpa automodel.dispatcher=torch`` and so on set fields of its
`BackendConfig`. The gate is the model's; its fake one, which sends every token of a rank to neighbouring experts, is left to such an option.
The loss is that of its benchmark, cross entropy of bf16 logits; ``automodel.loss=float32`` has transformers' instead.

With several ranks the gradients of its experts are sums over the ranks: its recipes divide them before the optimizer's step, which is not measured here.
"""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from stack_base import NotServed, Output, OwnModel, Router, Setting, next_token_loss
from step_weights import draw
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel


def prepare(model: PreTrainedModel, setting: Setting) -> OwnModel:
    """AutoModel's model of the same configuration, sharded.

    Args:
        model: transformers', on the meta device; only its class, configuration and dtype are looked at.
        setting: of the run.

    Raises:
        NotServed: AutoModel has no class of its own for it.
    """
    from nemo_automodel._transformers.registry import ModelRegistry
    from nemo_automodel.components.models.common import BackendConfig

    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], model.dtype
    cls = ModelRegistry.resolve_custom_model_cls(config.architectures[0], config)
    if cls is None:
        raise NotServed(f"AutoModel has no class of its own for {config.model_type}")
    options = setting.of("automodel")
    loss_dtype = getattr(torch, options.pop("loss", "bfloat16"))
    backend = BackendConfig(**{"enable_hf_state_dict_adapter": False, **options})
    if setting.world <= torch.cuda.device_count():
        _without_nvshmem()
    own = _sharded(_on_meta(cls, config, backend), setting)
    fields = ("attn", "linear", "rms_norm", "experts", "dispatcher", "fake_balanced_gate")
    uses = [f"{name}: {getattr(backend, name)}" for name in fields] + [f"loss: of {loss_dtype} logits"]
    return AutoModel(own.train(), config, uses, loss_dtype)


class AutoModel(OwnModel):
    """A model of AutoModel's, which returns logits, with the loss of its benchmark."""

    def __init__(self, model: nn.Module, config: PreTrainedConfig, uses: list[str], loss_dtype: torch.dtype):
        super().__init__(config, uses)
        self.model, self.loss_dtype = model, loss_dtype

    def fill(self, device: torch.device, seed: int) -> None:
        from nemo_automodel.components.checkpoint.checkpointing import Checkpointer

        Checkpointer.initialize_model_weights(self.model, device)
        draw(self.model, seed)

    def routers(self) -> list[Router]:
        from nemo_automodel.components.moe.layers import Gate, MoE

        blocks = [m for m in self.model.modules() if isinstance(m, MoE) and isinstance(m.gate, Gate)]
        return [Router(block.gate, 1, block.gate.n_experts) for block in blocks]

    def close(self) -> None:
        """DeepEP's buffer is the process's, and a process group that it still uses cannot be left."""
        from nemo_automodel.components.moe.megatron.fused_a2a import free_buffer

        free_buffer()

    def forward(self, input_ids: Tensor, labels: Tensor) -> Output:
        output = self.model(input_ids)
        logits = output if isinstance(output, Tensor) else output.logits
        return Output(next_token_loss(logits.to(self.loss_dtype), labels))


def _without_nvshmem() -> None:
    """On one host DeepEP needs no NVSHMEM. AutoModel takes every DeepEP with Hopper's kernels for one that was built with it, and asks for its sizes."""
    from nemo_automodel.components.moe.megatron import fused_a2a

    fused_a2a._nvshmem_available = False


def _on_meta(cls: type[nn.Module], config: PreTrainedConfig, backend: object) -> nn.Module:
    """The model without memory, under the same contexts as AutoModel builds it."""
    from nemo_automodel.components.utils.model_utils import init_empty_weights
    from transformers.initialization import no_init_weights

    before = torch.get_default_dtype()
    torch.set_default_dtype(config.dtype)
    try:
        with no_init_weights(), init_empty_weights():
            # transformers adds no balancing loss unless it is asked for, and neither does any other stack.
            return cls(config, backend=backend, moe_overrides={"aux_loss_coeff": 0.0})
    finally:
        torch.set_default_dtype(before)


def _sharded(model: nn.Module, setting: Setting) -> nn.Module:
    """Experts over the ranks of `ep`, the rest with FSDP2, with AutoModel's defaults for both."""
    if not dist.is_initialized():
        return model
    from nemo_automodel.components.distributed.config import DistributedSetup
    from nemo_automodel.components.distributed.mesh import ParallelismSizes
    from nemo_automodel.components.distributed.model_parallelizer import parallelize_model

    setup = DistributedSetup.build("fsdp2", ParallelismSizes(ep_size=setting.ep), world_size=setting.world)
    return parallelize_model(model, setup.mesh_context)

"""Parameters that come into a model after it was sharded, such as LoRA's: FSDP2 does not have them, so they are kept equal on all ranks here.

They start from the first rank's values, and when a backward pass has ended their gradients are averaged over the ranks, as FSDP2 averages
all others. They are not sharded; adapters are small.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ..errors import MoePatchError
from ..surgery import InjectClass, Step
from .expert_adapters import GatherAround, ShardedParamWrapper, adapts_a_parameter
from .experts import PatchedShardedExperts
from .fsdp2 import gathered


@dataclass
class Late:
    """The step that looks after them.

    Attributes:
        model: the root.
        mesh: over which its dense parameters are sharded.
        parameters: those that were found, in the order of the model.
        steps: what was done to wrappers of experts' parameters that came late.
    """

    model: nn.Module
    mesh: DeviceMesh
    parameters: list[nn.Parameter] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    handles: list = field(default_factory=list)
    queued: bool = False

    def do(self) -> None:
        """Nothing yet."""

    def undo(self) -> None:
        """Lets go of them."""
        while self.handles:
            self.handles.pop().remove()
        while self.steps:
            self.steps.pop().undo()
        for parameter in self.parameters:
            vars(parameter).pop(_OF_TRAINER, None)
        self.parameters.clear()

    def look(self) -> None:
        """Takes in what has come. Communicates if there is something, so every rank has to have it.

        Raises:
            MoePatchError: peft has sized an adapter by this rank's part of a weight.
        """
        self._check_sizes()
        for module in self.model.modules():
            if adapts_a_parameter(module) and not isinstance(module, ShardedParamWrapper) and isinstance(module.get_base_layer(), PatchedShardedExperts):
                self._take_wrapper(module)
        known, whole = set(map(id, self.parameters)), gathered(self.model)
        own = [p for _, p in nn.Module.named_parameters(self.model)]
        new = [p for p in own if p.requires_grad and not isinstance(p, DTensor) and id(p) not in known and id(p) not in whole]
        for parameter in new:
            with torch.no_grad():
                for dim in reversed(range(self.mesh.ndim)):
                    group = self.mesh.get_group(dim)
                    dist.broadcast(parameter.data, dist.get_global_rank(group, 0), group)
            self.handles.append(parameter.register_post_accumulate_grad_hook(self._see))
            setattr(parameter, _OF_TRAINER, True)
        here = set(map(id, own))
        self.parameters = [p for p in self.parameters if id(p) in here] + new  # an adapter may have been deleted

    def begin(self) -> None:
        """To be called outside of a backward pass: one that broke off never comes to its end, and the next one has to."""
        self.queued = False

    def _check_sizes(self) -> None:
        for name, module in self.model.named_modules():
            base = module.get_base_layer() if hasattr(module, "get_base_layer") else None
            wanted = base.out_features if isinstance(base, nn.Linear) else None
            if wanted is not None and hasattr(module, "out_features") and module.out_features != wanted:
                raise MoePatchError(
                    f"{name}: the adapter has {module.out_features} outputs and the layer {wanted}. It came after optimize(model, mesh), and peft sizes "
                    f"an adapter by what a rank has of the layer's weight. Put adapters on first: moepatch.optimize(get_peft_model(model, config), mesh)."
                )

    def _take_wrapper(self, wrapper: nn.Module) -> None:
        """A wrapper of the experts' parameters. The outermost comes first, and FSDP2 does its part around that."""
        experts = wrapper.get_base_layer()
        around = any(isinstance(step, GatherAround) and step.experts is experts for step in self.steps)
        steps: list[Step] = [InjectClass(wrapper, ShardedParamWrapper, "experts of this rank")]
        if isinstance(experts, FSDPModule) and not around:
            steps.append(GatherAround(experts, wrapper))
        for step in steps:
            self.steps.append(step)
            step.do()

    def _see(self, parameter: nn.Parameter) -> None:
        if not self.queued:
            self.queued = True
            Variable._execution_engine.queue_callback(self._average)

    @torch.no_grad()
    def _average(self) -> None:
        """At the end of a backward pass. What ranks have added up before is equal on all, and stays what it is."""
        self.queued = False
        trained = [p for p in self.parameters if p.requires_grad]
        for dtype in dict.fromkeys(p.dtype for p in trained):
            parameters = [p for p in trained if p.dtype == dtype]
            flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
            for dim in range(self.mesh.ndim):
                dist.all_reduce(flat, group=self.mesh.get_group(dim))
            flat /= self.mesh.size()
            for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                _set(parameter, part.view_as(parameter))


def _set(parameter: nn.Parameter, gradient: Tensor) -> None:
    """A gradient where there is one; one that no rank has stays None."""
    if parameter.grad is not None:
        parameter.grad.copy_(gradient)
    elif gradient.any():
        parameter.grad = gradient.clone()


#: By this attribute Trainer knows that a replicated parameter's gradient is averaged already.
_OF_TRAINER = "_replicated_grad_hook_registered"

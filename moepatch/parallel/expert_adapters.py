"""LoRA of peft on the parameters of experts that are spread over ranks.

peft adds the product of an adapter's factors for all experts to the experts' weights, in each forward. A rank has some of the experts, so it
takes the rows of their factors. The factors themselves are dense: FSDP2 has them, and averages their gradients over all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.utils.hooks import RemovableHandle

from ..surgery import Patched
from .experts import _ScaleGradient
from .fsdp2 import Unit
from .whole import part_of


class ShardedParamWrapper(Patched):
    """peft's wrapper of one parameter ``[E, …]`` of an experts module."""

    keeps_name = True

    def get_delta_factors(self, adapter_name: str) -> tuple[Tensor, Tensor, float]:
        """As peft's, of this rank's experts."""
        left_EOr, right_ErI, scaling = super().get_delta_factors(adapter_name)
        return self._share(left_EOr), self._share(right_ErI), scaling

    def get_delta_weight(self, adapter_name: str, *args, **kwargs) -> Tensor:
        """As peft's, of this rank's experts."""
        return self._share(super().get_delta_weight(adapter_name, *args, **kwargs))

    def _share(self, whole_E: Tensor) -> Tensor:
        """This rank's rows of a tensor of all experts, placed as the parameter is.

        Other ranks' rows get their gradients there, and each rank's are of the tokens of all ranks that share the experts. FSDP2 divides by
        these ranks, so what is not of this rank counts as zero and what is counts once for each of them.
        """
        like = self.get_param()
        if not isinstance(like, DTensor):
            return whole_E
        mesh = like.device_mesh
        if tuple(like.placements) != (Shard(0),):
            return part_of(whole_E, like)  # between passes, where FSDP2 has parted it, as for a merge
        ranks, rank, share = mesh.size(), mesh.get_local_rank(), whole_E.shape[0] // mesh.size()
        mine_L = _ScaleGradient.apply(whole_E, float(ranks))[rank * share : (rank + 1) * share]
        return DTensor.from_local(mine_L.contiguous(), mesh, [Shard(0)], run_check=False)


@dataclass
class GatherAround:
    """The step that has FSDP2 gather and part experts before and after their wrapper runs, which puts other tensors in the place of parameters.

    Attributes:
        experts: an FSDP2 unit.
        wrapper: the outermost wrapper of its parameters.
    """

    experts: nn.Module
    wrapper: nn.Module
    handles: list[RemovableHandle] = field(default_factory=list)

    def do(self) -> None:
        """Replaces FSDP2's forward hooks. Its own do not come back: the step that shards is undone with this one."""
        unit = Unit.of(self.experts)
        unit.take_over()
        self.handles.append(self.wrapper.register_forward_pre_hook(unit.pre_forward, prepend=True, with_kwargs=True))
        self.handles.append(self.wrapper.register_forward_hook(unit.post_forward))

    def undo(self) -> None:
        """Removes them."""
        while self.handles:
            self.handles.pop().remove()


def adapts_a_parameter(module: nn.Module) -> bool:
    """Whether a module is a wrapper as `ShardedParamWrapper` can take over."""
    return hasattr(module, "parameter_name") and hasattr(module, "get_delta_weight")


def wrappers(model: nn.Module, experts: nn.Module) -> list[nn.Module]:
    """peft's wrappers of an experts module's parameters, the outermost first."""
    return [module for module in model.modules() if adapts_a_parameter(module) and module.get_base_layer() is experts]

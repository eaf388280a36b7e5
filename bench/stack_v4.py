"""transformers v4's way with experts: a list of MLPs, and a loop over those that some token has chosen.

Where the list is sharded with FSDP2, each expert is a unit of its own, as in the v4 column of the article that is answered here: then a rank gathers only
the experts that its own tokens have chosen. Ranks that choose differently do not gather the same, and in the end wait for each other for ever
(``--isolate --timeout``). With `balanced` routing all ranks choose all experts, and it runs.

Everything else is transformers' installed version. Experts have names of their own here, and so on several ranks other random weights of the same scale.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from stack_base import NotServed, Output, OwnModel, Router, Setting, shard_by_layer
from step_weights import materialise
from torch import Tensor, nn
from transformers import PreTrainedModel


def prepare(model: PreTrainedModel, setting: Setting) -> OwnModel:
    """The model with lists of experts, sharded where there are several ranks.

    Args:
        model: transformers', with its weights or on the meta device.
        setting: of the run.

    Raises:
        NotServed: its experts were no such list in transformers v4.
    """
    for name, fused in [(name, module) for name, module in model.named_modules() if _is_gated(module)]:
        model.set_submodule(name, ListedExperts(fused))
    own = ListedModel(model)
    if not own.routers():
        raise NotServed(f"the experts of {model.config.model_type} are no list of gated MLPs in transformers v4")
    shard_by_layer(model, setting, [expert for module in model.modules() if isinstance(module, ListedExperts) for expert in module.experts])
    return own


class Expert(nn.Module):
    """One gated MLP, with weights that are copies of a stack's."""

    def __init__(self, gate_up: Tensor, down: Tensor, activation: nn.Module):
        super().__init__()
        gate, up = gate_up.chunk(2)
        self.gate_proj, self.up_proj, self.down_proj = (_linear(weight) for weight in (gate, up, down))
        self.act_fn = activation

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))


class ListedExperts(nn.Module):
    """Takes the place of a module of fused experts, whose call it has."""

    def __init__(self, fused: nn.Module):
        super().__init__()
        self.choice = Choice()
        self.experts = nn.ModuleList(Expert(*weights, fused.act_fn) for weights in zip(fused.gate_up_proj, fused.down_proj, strict=True))

    def forward(self, hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        (ids_TK,) = self.choice(ids_TK)
        out_TH = torch.zeros_like(hidden_TH)
        # Which experts are run depends on the data, and is asked of the device.
        for index in F.one_hot(ids_TK, len(self.experts)).sum((0, 1)).nonzero().flatten().tolist():
            token, slot = torch.where(ids_TK == index)
            expert_out = self.experts[index](hidden_TH[token]) * weights_TK[token, slot, None]
            out_TH.index_add_(0, token, expert_out.to(out_TH.dtype))
        return out_TH


class Choice(nn.Module):
    """Where the routing is forced: what it returns are the ids that count."""

    def forward(self, ids_TK: Tensor) -> tuple[Tensor]:
        return (ids_TK,)


class ListedModel(OwnModel):
    """A model of transformers with lists of experts."""

    def __init__(self, model: PreTrainedModel):
        super().__init__(model.config, [f"attention: {model.config._attn_implementation}", "experts: a loop over a list"])
        self.model = model

    def fill(self, device: torch.device, seed: int) -> None:
        materialise(self.model, device, seed)

    def routers(self) -> list[Router]:
        return [Router(m.choice, 0, len(m.experts)) for m in self.model.modules() if isinstance(m, ListedExperts)]

    def forward(self, input_ids: Tensor, labels: Tensor) -> Output:
        return Output(self.model(input_ids=input_ids, labels=labels).loss)


def _is_gated(module: nn.Module) -> bool:
    """Whether it has stacks ``gate_up_proj [E, 2I, H]`` and ``down_proj [E, H, I]``, and nothing else."""
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    if set(shapes) != {"gate_up_proj", "down_proj"} or not hasattr(module, "act_fn"):
        return False
    gate_up, down = shapes["gate_up_proj"], shapes["down_proj"]
    return len(gate_up) == len(down) == 3 and gate_up == (down[0], 2 * down[2], down[1])


def _linear(weight: Tensor) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(*reversed(weight.shape), bias=False)
    linear.weight = nn.Parameter(weight.detach().clone())
    return linear

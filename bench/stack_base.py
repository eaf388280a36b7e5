"""What a stack is, and what is asked of one whose model is a class of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedConfig, PreTrainedModel

from moepatch.routing import Deal, Drawn


class NotServed(Exception):
    """This stack has nothing for this model."""


@dataclass(frozen=True)
class Setting:
    """What a stack has to know of the run.

    Attributes:
        world: how many ranks there are.
        ep: over how many of them the experts of a layer are spread, for stacks that can.
        device: of this rank.
        options: besides what a stack itself says; see `of`.
    """

    world: int
    ep: int
    device: torch.device
    options: Mapping[str, object] = field(default_factory=dict)

    def of(self, stack: str) -> dict[str, object]:
        """The options of one stack: those that begin with its name and a dot, without them. Those without a dot are `moepatch`'s."""
        named = ((name.rpartition("."), value) for name, value in self.options.items())
        return {name: value for (owner, _, name), value in named if (owner or "moepatch") == stack}


@dataclass(frozen=True)
class Stack:
    """One way to train a model.

    Attributes:
        name: on the command line.
        prepare: from a model and the setting to the model that is trained. Unless `weights_first` says otherwise, the model has its weights if
            there is one rank, else it is on the meta device and is filled afterwards.
        why_not: why it cannot run here, or None.
        weights_first: it gets the model with its weights (True) or on the meta device (False), however many ranks there are.
    """

    name: str
    prepare: Callable[[PreTrainedModel, Setting], nn.Module]
    why_not: Callable[[Setting], str | None] = lambda setting: None
    weights_first: bool | None = None


def shard_by_layer(model: PreTrainedModel, setting: Setting, inner: Sequence[nn.Module] = ()) -> None:
    """FSDP2 layer by layer where there are several ranks, with modules inside the layers as units of their own."""
    if setting.world == 1:
        return
    mesh = init_device_mesh(setting.device.type, (setting.world,))
    for unit in (*inner, *_layers(model)):
        fully_shard(unit, mesh=mesh)
    # Embeddings, final norm and head stay gathered between forward and backward: they are used at both ends of it.
    fully_shard(model, mesh=mesh, reshard_after_forward=False)


def _layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers: the outermost list with as many entries as the configuration says."""
    lists = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == model.config.num_hidden_layers)
    return next(lists)


@dataclass
class Output:
    """What a model returns: the one thing that is asked for."""

    loss: Tensor


@dataclass(frozen=True)
class Router:
    """A module that returns a tuple of which one entry is ``ids [T, K]``.

    Attributes:
        module: is called once a layer and step.
        entry: where the ids are in what it returns.
        num_experts: that it can choose from.
        counts: the entry with the tokens of each expert ``[E]``, if there is one.
    """

    module: nn.Module
    entry: int
    num_experts: int
    counts: int | None = None


class OwnModel(nn.Module, ABC):
    """A model of a class that a stack brings along, called as transformers' are.

    Attributes:
        config: transformers' configuration, from which it was built.
        uses: what computes, for the record.
    """

    def __init__(self, config: PreTrainedConfig, uses: Sequence[str]):
        super().__init__()
        self.config, self.uses = config, list(uses)

    @abstractmethod
    def fill(self, device: torch.device, seed: int) -> None:
        """Gives it memory for what this rank holds, and weights."""

    @abstractmethod
    def routers(self) -> list[Router]:
        """In the order of the layers."""

    @abstractmethod
    def forward(self, input_ids: Tensor, labels: Tensor) -> Output:
        """The mean cross entropy of the next tokens, of this rank's."""

    def close(self) -> None:
        """Gives back what would outlive it."""


@contextmanager
def forced(model: OwnModel, deal: Deal) -> Iterator[None]:
    """Other ids, the same weights: what `moepatch.balanced_routing` does to models that it knows.

    Raises:
        NotServed: nothing in it can be forced.
    """
    forces = [_Force(router, Drawn((index, router.num_experts), deal)) for index, router in enumerate(model.routers())]
    if not forces:
        raise NotServed("the routing of this model cannot be forced")
    handles = [force.router.module.register_forward_hook(force) for force in forces]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class _Force:
    """Hook of a router: other ids, counted once."""

    router: Router
    drawn: Drawn
    counted: dict[int, Tensor] = field(default_factory=dict)

    def __call__(self, module: nn.Module, args: tuple, output: tuple) -> tuple:
        changed = list(output)
        ids_TK = output[self.router.entry]
        forced_TK = changed[self.router.entry] = self.drawn.like(ids_TK.shape, ids_TK.dtype, ids_TK.device)
        if self.router.counts is not None:
            if len(forced_TK) not in self.counted:
                counts_E = forced_TK.flatten().bincount(minlength=self.router.num_experts)
                self.counted[len(forced_TK)] = counts_E.to(output[self.router.counts].dtype)
            changed[self.router.counts] = self.counted[len(forced_TK)]
        return tuple(changed)


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of ``logits [B, T, V]`` with the next of ``labels [B, T]``, in the dtype of the logits.

    The labels are moved, not the logits, which are large.
    """
    following = F.pad(labels, (0, 1), value=-100)[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), following.flatten())

"""The optimizer of transformers' Trainer on a mesh, saved and resumed by all ranks.

Trainer has rank 0 save ``optimizer.state_dict()``, which is rank 0's shards, and has every rank load them: wrong numbers without a word. It
offers a model no say in that, so a sharded model that a Trainer is made for gives that Trainer object, and no other, its own way: a
`torch.distributed.checkpoint` in the directory where Trainer expects accelerate's, which other meshes can read as well.
"""

from __future__ import annotations

import functools
import sys
import weakref
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import torch

from ..errors import CheckpointError
from .whole import part_of

if TYPE_CHECKING:
    from transformers import Trainer

#: Trainer resumes an optimizer where it finds a directory whose name has "optimizer" in it.
DIRECTORY = "optimizer_0"
_SAVE, _LOAD = "_save_optimizer_and_scheduler", "_load_optimizer_and_scheduler"


class Placed:
    """What a sharded model answers a Trainer that asks whether the model looks after placement and reduction itself: yes.

    Only where Trainer, at the end of its ``__init__``, is about to refuse such a model because it could not save the optimizer, it is no.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = weakref.ref(trainer)

    def __bool__(self) -> bool:
        made = vars(self.trainer()) if self.trainer() is not None else {}
        return not ("is_in_train" in made and "is_fsdp_xla_v2_enabled" not in made)


def serve_trainer() -> bool | Placed:
    """To be called where somebody asks a sharded model whether it looks after itself. If a Trainer is being made, all ranks will save and load
    its optimizer.

    Returns:
        The answer.
    """
    trainer = _asking(sys._getframe(1))
    if trainer is None or not all(vars(trainer).get(name) is False for name in ("is_deepspeed_enabled", "is_fsdp_enabled")):
        return True
    own = sys.modules["transformers.trainer"].Trainer
    if any(getattr(type(trainer), name) is not getattr(own, name) for name in (_SAVE, _LOAD)):
        return True  # who has one's own knows better
    for name, function in ((_SAVE, save_optimizer), (_LOAD, load_optimizer)):
        setattr(trainer, name, functools.partial(function, trainer))
    return Placed(trainer)


def _asking(frame: FrameType | None) -> Trainer | None:
    """The Trainer whose ``__init__`` is among the callers."""
    module = sys.modules.get("transformers.trainer")
    while module is not None and frame is not None:
        if frame.f_code.co_name == "__init__" and isinstance(found := frame.f_locals.get("self"), module.Trainer):
            return found
        frame = frame.f_back
    return None


def save_optimizer(trainer: Trainer, output_dir: str) -> None:
    """In place of Trainer's own, on all ranks: each rank writes its parts of the optimizer's state, rank 0 the scheduler's."""
    import torch.distributed.checkpoint as dcp  # takes its time, and few need it
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    state = get_optimizer_state_dict(trainer.model, _inner(trainer.optimizer))
    dcp.save({"optimizer": state}, checkpoint_id=str(Path(output_dir, DIRECTORY)))
    if trainer.args.should_save:
        torch.save(trainer.lr_scheduler.state_dict(), Path(output_dir, "scheduler.pt"))


def load_optimizer(trainer: Trainer, checkpoint: str | None) -> None:
    """In place of Trainer's own: what `save_optimizer` has saved, on any mesh, or ``optimizer.pt`` of a run in one process.

    Raises:
        CheckpointError: the optimizer's state in the checkpoint is not of these parameters.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    if checkpoint is None or not Path(checkpoint, "scheduler.pt").is_file():
        return
    optimizer = _inner(trainer.optimizer)
    if Path(checkpoint, DIRECTORY).is_dir():
        state = get_optimizer_state_dict(trainer.model, optimizer)
        try:
            dcp.load({"optimizer": state}, checkpoint_id=str(Path(checkpoint, DIRECTORY)))
        except Exception as error:
            raise CheckpointError(f"The optimizer's state in {Path(checkpoint, DIRECTORY)} cannot be loaded into this one: {error}") from error
        set_optimizer_state_dict(trainer.model, optimizer, state)
    elif Path(checkpoint, "optimizer.pt").is_file():
        _load_whole(optimizer, torch.load(Path(checkpoint, "optimizer.pt"), map_location="cpu", weights_only=True), checkpoint)
    else:
        return
    trainer.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, "scheduler.pt"), weights_only=True))


def _load_whole(optimizer: torch.optim.Optimizer, state: dict, checkpoint: str) -> None:
    """What one process has saved, each rank its parts of it."""
    order = [p for group in optimizer.param_groups for p in group["params"]]
    places = dict(zip((key for group in state["param_groups"] for key in group["params"]), order, strict=False))
    for key, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and value.ndim and (key not in places or value.shape != places[key].shape):
                there, here = tuple(value.shape), tuple(places[key].shape) if key in places else None
                raise CheckpointError(f"{checkpoint}/optimizer.pt: {name} of parameter {key} has the shape {there}, and the parameter {here}.")
            values[name] = part_of(value, places.get(key))
    optimizer.load_state_dict(state)


def _inner(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """torch's optimizer in accelerate's."""
    return getattr(optimizer, "optimizer", optimizer)

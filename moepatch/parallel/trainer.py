"""What accelerate and transformers' Trainer ask a model before they wrap it: a sharded one answers that it is ready.

Both look for attributes on the model, so the model needs no arguments and no plugin:

- ``_is_accelerate_prepared``: `Accelerator.prepare` returns such a model as it is, in every version;
- ``is_distributed_loading_by_transformers``: Trainer from 5.23 on leaves placement and reduction to the model, and saves on all ranks
  (the optimizer in a way that `resume` gives it);
- ``no_sync``: gradient accumulation without a reduction after each micro-batch, as on DistributedDataParallel.

Trainer 5.17 saves on rank 0 only, and so cannot save a sharded model by itself: `SaveOnAllRanks` does, in every version, but not the
optimizer's state.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedConfig, TrainerCallback
from transformers.distributed import DistributedConfig

from ..checkpoint import PatchedModel
from ..surgery import Patched
from .fsdp2 import drop_unreduced, gathered
from .reads import passes_of
from .resume import Placed, serve_trainer
from .whole import in_parts


class Sharded(Patched):
    """A module whose parameters are spread over ranks: a model, or what is around it, such as peft's."""

    def named_parameters(self, *args, **kwargs):
        """As any module's, and always what the optimizer steps: a forward pass leaves parameters gathered, which are others."""
        stepped = gathered(self)
        for name, parameter in super().named_parameters(*args, **kwargs):
            yield name, stepped.get(id(parameter), parameter)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As any module's, of what `named_parameters` gives; and for gradients of `no_sync`."""
        super().zero_grad(set_to_none)
        drop_unreduced(self)

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """As any module's; of whole tensors, which every rank has to pass, each takes its parts."""
        return super().load_state_dict(in_parts(self, state_dict), strict, assign)

    @contextmanager
    def no_sync(self):
        """Gradients of the block stay on this rank until the first backward pass after it.

        An optimizer's ``zero_grad()`` does not see what is kept: to give it up, call the model's.
        """
        if not isinstance(self, FSDPModule):
            yield
            return
        self.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.set_requires_gradient_sync(True)


class ShardedModel(Sharded, PatchedModel):
    """A whole ``PreTrainedModel`` whose parameters are spread over ranks."""

    @property
    def is_distributed_loading_by_transformers(self) -> bool | Placed:
        """Read by Trainer from 5.23 on, when it is made, where transformers itself has a property of this name."""
        if (passes := passes_of(self)) is not None:
            passes.late.look()  # before the optimizer is made, and before Trainer looks after what FSDP2 does not have
        return serve_trainer()

    @property
    def _is_accelerate_prepared(self) -> bool:
        # Under autocast accelerate has to wrap the forward first; what it cannot do to a sharded model it then refuses in its own words.
        return self.__dict__.get("_accelerate_was_here", False) or not _autocasts()

    @_is_accelerate_prepared.setter
    def _is_accelerate_prepared(self, value: bool) -> None:
        self.__dict__["_accelerate_was_here"] = value


@dataclass
class AnswerTrainer:
    """The step that gives a model's config the ``distributed_config`` which Trainer (from 5.23 on) reads when it accumulates gradients.

    It is the default one, which says that transformers has not sharded anything, and is never saved.
    """

    config: PreTrainedConfig
    added: bool = False

    def do(self) -> None:
        self.added = "distributed_config" not in vars(self.config)
        if self.added:
            self.config.distributed_config = DistributedConfig()

    def undo(self) -> None:
        if self.added:
            vars(self.config).pop("distributed_config", None)


def _autocasts() -> bool:
    """Whether accelerate is set up, and to run models under autocast."""
    try:
        from accelerate.state import AcceleratorState
    except ImportError:
        return False
    return AcceleratorState._shared_state != {} and AcceleratorState().mixed_precision != "no"


class SaveOnAllRanks(TrainerCallback):
    """Saves a sharded model whenever Trainer is about to, on every rank, into the directory that Trainer would have used.

    >>> Trainer(model, args, callbacks=[SaveOnAllRanks()], …)             # doctest: +SKIP
    """

    def on_step_end(self, args, state, control, model=None, **kwargs):
        return self._save(args, state, control, model)

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        return self._save(args, state, control, model)

    def _save(self, args, state, control, model):
        if control.should_save:
            model.save_pretrained(Path(args.output_dir, f"checkpoint-{state.global_step}"))
            control.should_save = False
        return control

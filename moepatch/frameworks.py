"""What other frameworks have done to a model since it was loaded: told by the marks that they leave on parameters and modules.

Nothing here imports them. What they do after the patch is theirs: a module that they hook or wrap is called, not computed around.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from .errors import Problem
from .layers.loss.module import PatchedHead
from .parallel.fsdp1 import frees_inside
from .parallel.fsdp2 import Unit
from .surgery import Patched, is_bare, is_shadowed, original_class

#: By attribute of a parameter: what has happened to it, and what to do instead.
_MARKS = {
    "ds_tensor": (
        "DeepSpeed's ZeRO-3 (or zero.Init) keeps it in parts, and it is {shape} here",
        "Load the model without zero.Init and optimize it before deepspeed.initialize.",
    ),
    "_hp_mapping": (
        "it lies in the flat memory that DeepSpeed's ZeRO updates, and must not be moved out of it",
        "Optimize the model before deepspeed.initialize.",
    ),
    "_fsdp_flattened": ("FSDP has taken it into a flat parameter", "Optimize the model before FullyShardedDataParallel is put around it."),
}


def taken(model: nn.Module) -> Iterator[Problem]:
    """The first of a model's weights that is not the model's to change any more, or not there."""
    for name, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "deepspeed":
            yield Problem("wrapped", name or "model", f"it is a {type(module).__name__} of DeepSpeed.", "Optimize the model before deepspeed.initialize.")
            return
        for leaf, tensor in module._parameters.items():
            found = None if tensor is None else _why(module, tensor)
            if found is not None:
                yield Problem("wrapped", ".".join(filter(None, (name, leaf))), f"{found[0]}.", found[1])
                return


def _why(module: nn.Module, tensor: Tensor) -> tuple[str, str] | None:
    for mark, (words, hint) in _MARKS.items():
        if hasattr(tensor, mark):
            return words.format(shape=list(tensor.shape)), hint
    known = isinstance(module, (nn.Linear, nn.Embedding))
    freed = tensor.untyped_storage().size() == 0 if type(tensor) is nn.Parameter and not tensor.is_meta else False
    if freed and (tensor.numel() or (known and module.weight is tensor)):
        return "its memory was freed, by something that brings it back for each call of its module", "Optimize the model before that is put on it."
    return None


def own_forwards(model: nn.Module) -> dict[str, Any]:
    """The forwards that instances have of their own, by the module's name."""
    return {name: vars(m)["forward"] for name, m in model.named_modules() if is_shadowed(m)}


def shadowed(model: nn.Module, before: Mapping[str, Any]) -> str | None:
    """The name of a patched module whose forward somebody has replaced on the instance since, around the patched one; None if there is none.

    Args:
        before: `own_forwards` of the model when it was patched: those go around what was there.
    """
    found = own_forwards(model).items()
    return next((name or "the model" for name, f in found if isinstance(model.get_submodule(name), Patched) and before.get(name) is not f), None)


def called(model: nn.Module) -> list[str]:
    """What patched modules call, or compute at once, because a framework (or anybody) has put hooks or a wrapper on it: one note for each class."""
    groups: dict[tuple[str, str], list[str]] = {}
    notes = []
    for fqn, module in model.named_modules():
        if isinstance(module, Patched) and module.takes_children:
            found = {name: by for name, child in module._modules.items() if child is not None and (by := _by(child)) is not None}
            if found:
                what = f"{', '.join(found)} ({', '.join(dict.fromkeys(found.values()))})"
                groups.setdefault((original_class(module).__name__, what), []).append(fqn)
        elif isinstance(module, PatchedHead) and _leaves_early(model, module):
            notes.append(f"{fqn}: FSDP frees its weight before the loss, so the logits are computed; a unit that holds head and loss would need none")
    return notes + [
        f"{fqns[0]}{f' and {len(fqns) - 1} more' if fqns[1:] else ''} ({name}): what has hooks or a wrapper since the patch is called by itself: {what}"
        for (name, what), fqns in groups.items()
    ]


def _leaves_early(model: nn.Module, head: nn.Module) -> bool:
    return frees_inside(model, head) or (isinstance(head, FSDPModule) and not Unit.of(head).stays)


def _by(child: nn.Module) -> str | None:
    """Who has put hooks or a wrapper on a module: the package of the first hook; None if nobody has."""
    if isinstance(child, (FullyShardedDataParallel, FSDPModule)):
        return "FSDP"
    if is_bare(child):
        return None
    hooks = [h for table in (child._forward_pre_hooks, child._forward_hooks, child._backward_hooks, child._backward_pre_hooks) for h in table.values()]
    return _package(hooks[0]) if hooks else _package(vars(child)["forward"]) if is_shadowed(child) else "hooks for all modules"


def _package(function: Any) -> str:
    while not isinstance(function, FunctionType) and hasattr(function, "func"):  # functools.partial
        function = function.func
    return str(getattr(function, "__module__", None) or type(function).__module__).partition(".")[0]

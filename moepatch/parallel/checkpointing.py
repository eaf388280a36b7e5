"""Activation checkpointing that recomputes the experts but not the dispatch.

Recomputing a layer in the backward pass would send every token across the ranks a second time and wait for the device once more. With
`save_dispatch` the recompute finds what the ranks had received::

    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": moepatch.parallel.checkpointing.save_dispatch})

It costs the memory of the rows received and combined by each layer. Any ``torch.utils.checkpoint.checkpoint(…, use_reentrant=False,
context_fn=save_dispatch)`` will do. Without it checkpointing works as well: the sort is stable, so the recompute routes identically.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

#: The exchange itself, and what makes the host wait to plan it: the counts that it reads and the list of rows to send.
_SAVED = frozenset({
    torch.ops._c10d_functional.all_to_all_single.default,
    torch.ops._c10d_functional.wait_tensor.default,
    torch.ops.aten.nonzero.default,
})


def save_dispatch() -> tuple[AbstractContextManager, AbstractContextManager]:
    """The `context_fn` of a checkpoint: contexts for the forward pass and for its recompute."""
    return create_selective_checkpoint_contexts(policy)


def policy(context, op, *args, **kwargs) -> CheckpointPolicy:
    """Saves what the dispatch has received and recomputes everything else; for users who combine it with a policy of their own."""
    if op in _SAVED or (op is torch.ops.aten._to_copy.default and kwargs.get("device") == torch.device("cpu")):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE

"""The model around a head whose loss is fused: it knows whether there are labels."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch

from .head import deferring


class Labelled:
    """Mixed into the class of a patched ``PreTrainedModel``: a forward pass with labels lets patched heads defer their logits.

    The forward keeps its signature, which transformers' Trainer reads. PEFT calls ``model.forward`` and not the model, so hooks would not do.
    """

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "_moepatch_parts" in vars(cls):
            cls.forward = _with_deferring(super(Labelled, cls).forward)


def _with_deferring(forward):
    names = list(inspect.signature(forward).parameters)
    position = names.index("labels") - 1 if "labels" in names else None  # among the arguments after self

    @functools.wraps(forward)
    def labelled(self, *args, **kwargs):
        forward = super(Labelled, self).forward  # as it is now: somebody may have given the class another one
        labels = kwargs.get("labels") if position is None or len(args) <= position else args[position]
        if labels is None or torch.compiler.is_compiling():
            return forward(*args, **kwargs)
        with deferring(kwargs.get("num_items_in_batch"), self):
            return forward(*args, **kwargs)

    return labelled

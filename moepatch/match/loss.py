"""Recognises the head of a causal language model: the linear layer whose output a loss is computed of."""

from __future__ import annotations

import inspect

from torch import nn
from transformers import PreTrainedModel

from ..layers.loss.spec import LossSpec
from ..registry import register_matcher
from ..scan import Found, Scan
from ..site import Site
from ..surgery import original_class


@register_matcher("loss", priority=10)
def match_loss(found: Found, scan: Scan, memo: dict) -> Site | None:
    """See the module's docstring. Nothing has to be tried: what is neither a cross-entropy nor known on the way to it gets ordinary logits."""
    head = found.module
    if type(head) is not nn.Linear or head.weight.ndim != 2:
        return None
    if "heads" not in memo:
        memo["heads"] = {id(output) for model in _outermost(scan.model) if (output := _output(model)) is not None}
    if id(head) not in memo["heads"]:
        return None
    vocab, hidden = head.weight.shape
    return Site(
        kind="loss",
        fqns=found.fqns,
        class_name=type(head).__name__,
        spec=LossSpec(hidden=hidden, vocab=vocab, bias=head.bias is not None),
        now="logits in memory",
        dtype=str(head.weight.dtype).removeprefix("torch."),
        device=str(head.weight.device),
    )


def _outermost(module: nn.Module) -> list[PreTrainedModel]:
    """The transformers models in a tree that are not inside another one: they are told whether there are labels."""
    if isinstance(module, PreTrainedModel):
        return [module]
    return [model for child in module.children() for model in _outermost(child)]


def _output(model: PreTrainedModel) -> nn.Module | None:
    """The module that makes the logits of a model that takes labels."""
    if "labels" not in inspect.signature(original_class(model).forward).parameters:
        return None
    return model.get_output_embeddings()

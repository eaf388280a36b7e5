"""Recognises the head of a causal language model: the linear layer whose output a loss is computed of."""

from __future__ import annotations

import inspect

from torch import nn
from transformers import PreTrainedModel

from ..layers.loss.spec import LossSpec
from ..registry import register_matcher
from ..scan import Found, Scan
from ..site import Left, Site
from ..surgery import original_class
from .experts import left
from .near import in_the_way


@register_matcher("loss", priority=10)
def match_loss(found: Found, scan: Scan, memo: dict) -> Site | Left | None:
    """See the module's docstring. Nothing has to be tried: what is neither a cross-entropy nor known on the way to it gets ordinary logits."""
    head = found.module
    if "heads" not in memo:
        outputs = [(model.get_output_embeddings(), _takes_labels(model)) for model in _outermost(scan.model)]
        memo["heads"] = {id(output): labels for output, labels in outputs if output is not None}
    if id(head) not in memo["heads"]:
        return None
    if not memo["heads"][id(head)]:
        return left(found, "loss", "its model's forward takes no labels")
    if type(head) is not nn.Linear or head.weight.ndim != 2:
        return left(found, "loss", in_the_way(head) or f"it is a {type(head).__name__}, not a Linear")
    if (reason := in_the_way(head)) is not None:
        return left(found, "loss", reason)
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


def _takes_labels(model: PreTrainedModel) -> bool:
    return "labels" in inspect.signature(original_class(model).forward).parameters

"""Attention functions for transformers' own interface, under moepatch's own names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ...registry import compute
from .function import CHAINS, attention_function
from .masks import attention_mask

#: How the names begin that a configuration's ``_attn_implementation`` takes.
PREFIX = "moepatch_"


def name_of(backend: str) -> str:
    """The name of a backend in transformers' two registries, functions and masks; it is added to them if need be.

    Entries of others are left as they are. A backend of another package is a function as transformers wants one, and gets the masks that
    transformers makes for ``sdpa``.
    """
    name = PREFIX + backend
    if name not in AttentionInterface._global_mapping:
        own = backend in CHAINS
        AttentionMaskInterface.register(name, attention_mask if own else sdpa_mask)
        AttentionInterface.register(name, attention_function(backend) if own else _late(backend))
    return name


def _late(backend: str) -> Callable[..., Any]:
    """What another package has registered under a name, whenever that was."""

    def attention(*args, **kwargs):
        return compute("attention", backend)(*args, **kwargs)

    return attention


def register_names() -> None:
    """Adds the names of moepatch's own backends."""
    for backend in CHAINS:
        name_of(backend)

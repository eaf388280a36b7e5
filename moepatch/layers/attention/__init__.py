"""Attention functions for transformers' own interface, under moepatch's own names."""

from __future__ import annotations

from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from .function import CHAINS, attention_function
from .masks import attention_mask

#: From backends to the names that a configuration's ``_attn_implementation`` takes.
NAMES = {backend: f"moepatch_{backend}" for backend in CHAINS}


def register() -> None:
    """Adds the names to transformers' two registries, functions and masks. Entries of others are left as they are."""
    for backend, name in NAMES.items():
        if name not in AttentionInterface._global_mapping:
            AttentionInterface.register(name, attention_function(backend))
            AttentionMaskInterface.register(name, attention_mask)

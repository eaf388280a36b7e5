"""The rows of the table ``attention``; importing this module registers them."""

from __future__ import annotations

import functools

from ...registry import register_backend
from .function import CHAINS, attention_function, kernels
from .kernel import why_not_all

# Milliseconds differ by a few percent between the libraries, host time by far more: torch's operators first. `optimize` measures.
_ROWS = {
    "cudnn": (70, "cuDNN inside torch; its FlashAttention for windows and packed sequences"),
    "te": (65, "Transformer Engine's DotProductAttention, then as cudnn"),
    "fa4": (60, "FlashAttention 4 (CuTe): windows, packing, sinks and softcap in one kernel"),
    "torch": (50, "scaled_dot_product_attention with transformers' masks: anywhere"),
    "reference": (0, "written out, softmax in fp32: anything, slow"),
}


def _why_not(backend, spec, dtype, device):
    own = {"cudnn": 2}.get(backend, 1)  # torch has cuDNN and FlashAttention inside
    return why_not_all(kernels(backend), own, spec, dtype, device) if CHAINS[backend] else None


for _name, (_rank, _serves) in _ROWS.items():
    register_backend("attention", _name, rank=_rank, serves=_serves, why_not=functools.partial(_why_not, _name))(functools.partial(attention_function, _name))

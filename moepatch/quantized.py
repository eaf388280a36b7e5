"""Weights that are kept quantized: how they are told from weights that moepatch computes with, and how they are called.

What is quantized keeps its own code: only the library that has packed numbers knows how to compute with them. It is told by the tensors, a
dtype that nobody trains in or a kind of tensor of its own, or by a layer that has no matrix where a linear layer has one. Names decide about
the words only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.parametrize import ParametrizationList

from .surgery import is_bare

#: What weights are computed with.
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
#: What to do about quantized experts where nobody knows how the model was quantized.
QUANTIZED_HINT = "They keep their own code, and the rest of the model is patched. Load the model with its weights dequantized to have them patched."
_PLAIN = (nn.Parameter, Tensor)
_KNOWN = (*_PLAIN, nn.UninitializedParameter, DTensor)
_LINEAR = re.compile(r"Linear")
_BITS = re.compile(r"(\d+)[ _]?bit", re.IGNORECASE)
_FORM = re.compile(r"(?P<kind>mxfp|nvfp|float|fp|nf|uint|int)(?P<bits>\d+)", re.IGNORECASE)
_OF_TRANSFORMERS = "transformers.integrations."


class Packed(nn.Parameter):
    """Stands on the meta device for a parameter that will be quantized once it is loaded.

    Attributes:
        words: how, see `kept`.
    """

    def __new__(cls, parameter: nn.Parameter, words: str):
        made = super().__new__(cls, parameter.detach(), requires_grad=False)
        made.words = words
        return made


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether parameters (or what ``torch.func`` puts in their place; None for one that is not there) are torch's own tensors of floats.

    >>> is_plain(nn.Parameter(torch.zeros(2)), None)
    True
    """
    return all(t is None or type(t) in _PLAIN and t.dtype in FLOATS for t in tensors)


def is_kept(tensor: Tensor | None) -> bool:
    """Whether a parameter is quantized: of a dtype that nobody trains in, or of a kind that neither torch.nn nor sharding knows."""
    return tensor is not None and (type(tensor) not in _KNOWN or tensor.dtype not in FLOATS)


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether not calling a layer, but computing with its weight and bias, does what it does: torch's own class, no hooks, plain numbers."""
    return type(layer) is nn.Linear and is_bare(layer) and is_plain(layer.weight, layer.bias)


def kept(module: nn.Module) -> str | None:
    """How a module keeps its own weights, if quantized: ``4-bit (bitsandbytes)``. None for plain weights, and for none.

    >>> layer = nn.Linear(2, 2)
    >>> layer.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    >>> kept(layer), kept(nn.Linear(2, 2))
    ('int8', None)
    """
    # A parameter that is unpacked at each access: whose it is says the class that does it.
    cls = type(module[0] if isinstance(module, ParametrizationList) and len(module) else module)
    for tensor in module._parameters.values():
        if is_kept(tensor):
            return _words(cls, tensor)
    matrices = any(p is not None and p.ndim > 1 for p in module._parameters.values())
    # Layers that are only computed with keep packed numbers elsewhere: in buffers, or in attributes.
    integers = any(b is not None and not b.is_floating_point() for b in module._buffers.values())
    packed = bool(_LINEAR.search(cls.__name__)) and (integers or cls.__module__.startswith("torch.ao."))
    loaded = cls.__module__.startswith(_OF_TRANSFORMERS) and _FORM.search(cls.__name__)
    return _words(cls, None) if loaded or packed and not matrices else None


def kept_inside(module: nn.Module, only: Iterable[str] | None = None) -> str | None:
    """The same of a module and of all modules in it, as a sentence without its end; None if nothing is quantized.

    Args:
        module: whatever.
        only: relative names of the modules that count; None: all.

    >>> mlp = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> mlp[1].weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    >>> kept_inside(mlp)
    '1.weight is int8'
    """
    inner = {name: part for name, part in module.named_modules() if only is None or name in only}
    found = {name: words for name, part in inner.items() if (words := kept(part)) is not None}
    if not found:
        return None
    forms = " and ".join(dict.fromkeys(found.values()))
    if len(found) > 1 or "" in found:
        return f"its weights are {forms}"
    (name,) = found
    return f"{next((f'{name}.{leaf}' for leaf, p in inner[name]._parameters.items() if is_kept(p)), name)} is {forms}"


def _words(cls: type[nn.Module], tensor: Tensor | None) -> str:
    """``4-bit (bitsandbytes)``: the form by the names of the classes, else by the dtype, and whose it is."""
    if isinstance(tensor, Packed):
        return tensor.words
    own = tensor is not None and type(tensor) not in _KNOWN
    names = f"{cls.__name__} {type(tensor).__name__}" if own else cls.__name__
    bits, form = _BITS.search(names), _FORM.search(names)
    if bits is not None:
        words = f"{bits[1]}-bit"
    elif form is not None:
        words = form[0].lower() if form["kind"].lower() in ("float", "int", "uint") else form[0].upper()
    elif tensor is not None and tensor.dtype not in FLOATS:
        words = str(tensor.dtype).removeprefix("torch.")
    else:
        words = type(tensor).__name__ if own else "packed"
    if not own and tensor is not None and bits is None and form is None:
        return words
    path = (type(tensor) if own else cls).__module__.split(".")
    return words if path == ["__main__"] else f"{words} ({'.'.join(path[: 2 if path[0] == 'torch' else 1])})"

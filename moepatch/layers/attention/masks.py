"""The mask that moepatch's attention functions get: built once a forward, never dense unless something needs it so.

transformers asks a mask function with a predicate (``mask_function``) that it has put together from a few factories. The predicate is
read back into what it was made from: causal, window, chunks, packed sequences. What cannot be read becomes transformers' own dense mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers import masking_utils as hf

from .packing import Packing
from .spec import CAUSAL, FULL, Window


class Mask:
    """Causality, window and sequences of a batch, for all layers of one type.

    Where a family looks into its mask (slices it, gives it to a torch function, asks for its shape) it stands for the dense mask ``[B, 1, S, S]``
    that transformers would have made for the attention function that the configuration names, which is built then.

    Attributes:
        window: how far a query sees.
    """

    def __init__(self, window: Window, arguments: dict[str, Any], packing: Packing | None = None, segments_BS: Tensor | None = None):
        self.window = window
        self._arguments = arguments
        self._packing = packing
        self._segments_BS = segments_BS
        self._dense: Tensor | None = None

    @property
    def packed(self) -> bool:
        """Whether rows hold padding, or several sequences."""
        return self._packing is not None or self._segments_BS is not None

    @property
    def is_padded(self) -> bool:
        """Whether some positions hold no token."""
        return self._packing is not None and self._packing.index_T is not None

    @property
    def packing(self) -> Packing | None:
        """Where the sequences lie; None if every row is one. The first call may wait for the device."""
        if self._packing is None and self._segments_BS is not None:
            self._packing = Packing.of_segments(self._segments_BS)
        return self._packing

    def dense(self) -> Tensor:
        """Boolean ``[B, 1, S, S]``, True where a query sees a key; built at the first call."""
        if torch.compiler.is_compiling():  # a graph that saw whether it is there already would be another one when it is recomputed
            return self._built()
        if self._dense is None:
            self._dense = self._built()
        return self._dense

    def _built(self) -> Tensor:
        return hf.sdpa_mask(**{**self._arguments, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})

    def to(self, device, non_blocking: bool = False) -> Mask:
        """On another device: what accelerate calls where layers are spread over devices."""
        moved = {k: v.to(device, non_blocking=non_blocking) if isinstance(v, Tensor) else v for k, v in self._arguments.items()}
        packing = None if self.packing is None else self.packing.to(device, non_blocking)
        mask = Mask(self.window, moved, packing)
        mask._dense = self.dense().to(device, non_blocking=non_blocking)
        return mask

    def _as_named(self) -> Tensor:
        """For the family: boolean, or what it adds to its scores itself."""
        config = self._arguments.get("config")
        if config is None or config._attn_implementation_internal != "eager":
            return self.dense()
        return hf.eager_mask(**{**self._arguments, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})

    def __getitem__(self, index) -> Tensor:
        return self._as_named()[index]

    def __getattr__(self, name: str):
        if name.startswith("_"):  # copy and pickle ask for methods before there are attributes
            raise AttributeError(name)
        return getattr(self._as_named(), name)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map(lambda leaf: leaf._as_named() if isinstance(leaf, cls) else leaf, (args, kwargs or {}))
        return func(*args, **kwargs)


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable = hf.causal_mask_function,
    attention_mask: Tensor | Mask | None = None,
    **others: Any,
) -> Mask | Tensor | None:
    """The mask function behind every name of moepatch; arguments as `transformers.masking_utils.sdpa_mask`.

    Returns:
        None for whole causal sequences; a `Mask` for windows, packed or padded sequences and bidirectional attention; transformers' dense
        mask with a cache that holds something, under torch.compile of a whole model, and for every other pattern.
    """
    if isinstance(attention_mask, Mask):  # `generate` has asked already, and the model asks again
        return attention_mask
    arguments = dict(
        others,
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
    )
    whole = type(q_offset) is int and (q_offset, kv_offset) == (0, 0) and q_length == kv_length
    pattern = read_pattern(mask_function) if whole and not torch.compiler.is_compiling() else None
    mask = None if pattern is None or _wants_dense(pattern, others) else _mask(pattern, arguments)
    if mask is None:
        # With 1 < q_length < kv_length transformers says None for a cache that is empty so far; ours would align to the cache's end.
        skip = others.get("allow_is_causal_skip", True) and (q_length == 1 or q_length == kv_length)
        return hf.sdpa_mask(**{**arguments, "allow_is_causal_skip": skip})
    return None if mask.window == CAUSAL and not mask.packed else mask


def _wants_dense(pattern: Pattern, others: dict[str, Any]) -> bool:
    """Whether the family has said that it computes with the mask, or builds it from a predicate of its own."""
    if others.get("use_vmap", False):
        return True
    return pattern.segments_BS is None and not (others.get("allow_is_causal_skip", True) or others.get("allow_is_bidirectional_skip", False))


def _mask(pattern: Pattern, arguments: dict[str, Any]) -> Mask | None:
    """The mask of a pattern; None if it has to be dense."""
    length, padding_BS, device = arguments["kv_length"], arguments["attention_mask"], torch.device(arguments.get("device", "cpu"))
    left, right = pattern.window
    window = (-1 if left >= length - 1 else left, -1 if right >= length - 1 else right)
    packing = None
    if padding_BS is not None:
        if padding_BS.shape != (arguments["batch_size"], length) or padding_BS.device.type == "meta":
            return None
        real_BS = padding_BS.cpu()
        if not bool(real_BS.all()):
            packing = Packing.of_padding(real_BS, device)
            # Without causality padding may be that of other keys than the queries' own (cross attention).
            if packing is None or pattern.chunk is not None or pattern.window[1] != 0:
                return None
    if pattern.chunk is not None and pattern.chunk < length:
        if pattern.segments_BS is not None:
            return None
        full, rest = divmod(length, pattern.chunk)
        packing = Packing.of_lengths(([pattern.chunk] * full + [rest] * (rest > 0)) * arguments["batch_size"], device)
    return Mask(window, arguments, packing, pattern.segments_BS)


@dataclass(frozen=True, eq=False)
class Pattern:
    """What a predicate of transformers was made from.

    Attributes:
        window: how far a query sees.
        chunk: it sees no further than its own chunk of so many positions; None: no chunks.
        segments_BS: it sees its own sequence only; None: every row is one.
    """

    window: Window = FULL
    chunk: int | None = None
    segments_BS: Tensor | None = None

    def and_(self, other: Pattern) -> Pattern | None:
        """Both at once; None if that is not a pattern."""
        if (self.chunk is not None and other.chunk is not None) or (self.segments_BS is not None and other.segments_BS is not None):
            return None
        window = tuple(b if a == -1 else a if b == -1 else min(a, b) for a, b in zip(self.window, other.window, strict=True))
        return Pattern(
            window,
            self.chunk if other.chunk is None else other.chunk,
            self.segments_BS if other.segments_BS is None else other.segments_BS,
        )


_AND = hf.and_masks(hf.causal_mask_function).__code__
_PARTS: dict[Any, Callable[[dict[str, Any]], Pattern]] = {
    hf.causal_mask_function.__code__: lambda cells: Pattern(CAUSAL),
    hf.bidirectional_mask_function.__code__: lambda cells: Pattern(FULL),
    hf.sliding_window_overlay(1).__code__: lambda cells: Pattern((cells["sliding_window"] - 1, -1)),
    hf.sliding_window_bidirectional_overlay(1).__code__: lambda cells: Pattern((cells["sliding_window"],) * 2),
    hf.chunked_overlay(1, None).__code__: lambda cells: Pattern(chunk=cells["chunk_size"]),
    hf.packed_sequence_mask_function(None).__code__: lambda cells: Pattern(segments_BS=cells["packed_sequence_mask"]),
}
# Positions that restart with each sequence, where the version has them: within a sequence they differ as the indices do.
_REMAP = hf.remap_positions_for_packed_sequence(None, None).__code__ if hasattr(hf, "remap_positions_for_packed_sequence") else None


def read_pattern(function: Callable) -> Pattern | None:
    """What a predicate of transformers was made from; None for any other function.

    >>> read_pattern(hf.sliding_window_causal_mask_function(4)).window
    (3, 0)
    """
    code = function.__code__ if hasattr(function, "__code__") else None
    cells = dict(zip(code.co_freevars, (c.cell_contents for c in function.__closure__ or ()), strict=True)) if code is not None else {}
    if code in _PARTS:
        return _PARTS[code](cells)
    if code is not None and code is _REMAP:
        return read_pattern(cells["mask_function"])
    if code is not _AND:
        return None
    pattern: Pattern | None = Pattern()
    for part in cells["mask_functions"]:
        read = read_pattern(part)
        pattern = None if pattern is None or read is None else pattern.and_(read)
    return pattern

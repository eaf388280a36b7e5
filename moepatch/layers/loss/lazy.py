"""Tensors that autograd knows like any other, and whose numbers are made when an operator asks for them: below autograd, in `__torch_dispatch__`."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from ...errors import MoePatchError

aten = torch.ops.aten


class Numbers:
    """What a lazy tensor and its aliases hold: nothing yet, or ordinary numbers without a graph.

    Args:
        make: makes them, at each call anew.
        base: for a view of other numbers: those. `make` then cuts it out of them.
        replayed: whether a CUDA graph replays what they come from, and so changes what `make` makes. Who looks at them while it is captured has
            memory that each replay fills; who looks later gets those of the last replay, made for this look.
    """

    def __init__(self, make: Callable[..., Tensor], base: Numbers | None = None, replayed: bool = False):
        self._make, self._base, self.replayed = make, base, replayed
        self._value: Tensor | None = None

    @property
    def made(self) -> bool:
        """Whether somebody has looked at them, or at what they are a view of: from then on somebody may write into them."""
        return self._value is not None or (self._base is not None and self._base.made)

    def value(self) -> Tensor:
        """The numbers as they are now. Views share memory, as views do."""
        if self._value is not None:
            return self._value
        value = self._make() if self._base is None else self._make(self._base.value())
        if not self.passing:
            self._value = value
        return value

    @property
    def passing(self) -> bool:
        """Whether `value` makes them for one look, so that what is written into them is lost."""
        return self.replayed and not self.made and not torch.cuda.is_current_stream_capturing()

    def fresh(self) -> Tensor:
        """The numbers as they were made, whatever has been written into them since. Not to be written into."""
        if not self.made:
            return self.value()
        return self._make() if self._base is None else self._make(self._base.fresh())

    def replaced(self, value: Tensor) -> Numbers:
        """Others, for a tensor that has had these until now."""
        found = Numbers(self.fresh)
        found._value = value
        return found


class Lazy(Tensor):
    """See the module's docstring. Subclasses say in `_follow` which operators make something lazy out of it.

    Nothing of it is cut off autograd's graph: it is what comes out of an autograd function, and operators on it have their usual nodes.
    """

    _numbers: Numbers

    @classmethod
    def _wrap(cls, shape, strides, offset: int, dtype: torch.dtype, device: torch.device, numbers: Numbers):
        made = torch.Tensor._make_wrapper_subclass(cls, shape, strides=strides, storage_offset=offset, dtype=dtype, device=device)
        made._numbers = numbers
        torch._C._set_throw_on_mutable_data_ptr(made)  # what reads memory past all operators gets an error instead of no memory
        return made

    def _set(self, value: Tensor) -> None:
        """``self.data = value``: what shared memory with it keeps the old numbers."""
        if value.shape != self.shape or value.dtype != self.dtype or value.device != self.device:
            raise _fixed(self, f"`.data = ` a tensor {tuple(value.shape)} in {value.dtype} on {value.device}")
        self._numbers = self._numbers.replaced(value._numbers.value() if isinstance(value, Lazy) else value.detach())

    def _follow(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """What an operator on it gives without its numbers, or NotImplemented."""
        raise NotImplementedError

    def __repr__(self, **options):
        found = Tensor.__repr__(_in_memory(self), **options)
        return found if self.grad_fn is None else found.replace(f"grad_fn=<{_Ordinary.__name__}Backward>", f"grad_fn=<{self.grad_fn.name()}>")

    @classmethod
    @torch.compiler.disable
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func == _SET_DATA:  # torch makes another object of it at each look
            return args[0]._set(*args[1:])
        if func in _MEMORY:
            args, kwargs = tree_map(_in_memory, args), tree_map(_in_memory, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return _torchs_own(func)(*args, **kwargs)

    @classmethod
    @torch.compiler.disable
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for lazy in args[:2]:
            if isinstance(lazy, Lazy) and not lazy._numbers.made:
                followed = lazy._follow(func, args, kwargs)
                if followed is NotImplemented and torch.is_inference_mode_enabled():  # nobody has taken operators apart there
                    followed = func.decompose(*args, **kwargs)
                if followed is not NotImplemented:
                    return followed
        if func in _LIKE:
            return func(*tree_map(_stand_in, args), **tree_map(_stand_in, kwargs))
        if func._schema.is_mutable and isinstance(args[0], Lazy) and args[0]._numbers.passing:
            raise _fixed(args[0], f"{func} writes into what a CUDA graph replays, and nobody had looked at it when that was captured")
        owners = {}

        def ordinary(leaf):
            if not isinstance(leaf, Lazy):
                return leaf
            value = leaf._numbers.value()
            owners[id(value)] = leaf
            return value

        found = func(*tree_map(ordinary, args), **tree_map(ordinary, kwargs))
        if not func._schema.is_mutable:
            return found
        for lazy in owners.values():
            if lazy._numbers.value().shape != lazy.shape:
                raise _fixed(lazy, f"{func} changes its shape")
        return tree_map(lambda leaf: owners.get(id(leaf), leaf), found)  # what writes into a tensor returns that tensor


def alike(lazy: Lazy, func: Callable, args: tuple, kwargs: dict) -> tuple[tuple, tuple, int]:
    """Shape, strides and offset of what an operator makes of a lazy tensor, its first argument: a view, a copy, or the same elementwise."""
    empty = torch.empty_strided(lazy.shape, lazy.stride(), dtype=lazy.dtype, device="meta")
    if not is_view(func) and func not in (aten.clone.default, aten._unsafe_view.default):
        return tuple(lazy.shape), torch.empty_like(empty).stride(), 0
    found = func(empty, *args[1:], **kwargs)
    return tuple(found.shape), found.stride(), found.storage_offset() + (lazy.storage_offset() if is_view(func) else 0)


def is_view(func: Callable) -> bool:
    """Whether an operator returns a view of its first argument."""
    returns = func._schema.returns
    return len(returns) == 1 and returns[0].alias_info is not None and not returns[0].alias_info.is_write


def _fixed(lazy: Lazy, what: str) -> MoePatchError:
    return MoePatchError(
        f"A tensor {tuple(lazy.shape)} in {lazy.dtype}, whose numbers moepatch computes when somebody looks at them, cannot become another in place: "
        f"{what}. Take an ordinary tensor first, `logits + 0`, or leave the loss unpatched: optimize(model, loss=None)."
    )


class _Ordinary(torch.autograd.Function):
    """An ordinary tensor in the place of a lazy one, in the same graph and the same memory."""

    @staticmethod
    def forward(ctx, lazy):
        return lazy._numbers.value().detach()

    @staticmethod
    def backward(ctx, grad):
        return grad


def _in_memory(leaf: Any) -> Any:
    """For functions that read memory and are no operators."""
    return _Ordinary.apply(leaf) if isinstance(leaf, Lazy) else leaf


def _stand_in(leaf: Any) -> Any:
    """For operators that look at shape, dtype and device alone."""
    return torch.empty((), dtype=leaf.dtype, device=leaf.device).expand(leaf.shape) if isinstance(leaf, Lazy) else leaf


#: torch's own functions by name. Where somebody has put another function in the place of one of these, the one names the other when it meets a
#: lazy tensor, because it looks for its own name.
_OWN = {name: value for name, value in vars(F).items() if isinstance(value, FunctionType)}


def _torchs_own(func: Callable) -> Callable:
    """The function that was really called: what stands in its place has been called already, and called this one."""
    if not isinstance(func, FunctionType) or _OWN.get(func.__name__) is func:
        return func
    return next((_OWN[name] for name, value in vars(F).items() if value is func and name in _OWN), func)


_SET_DATA = Tensor.data.__set__
_MEMORY = {
    *(Tensor.numpy, Tensor.__array__, Tensor.tolist, Tensor.data_ptr, Tensor.untyped_storage, Tensor.storage, Tensor._typed_storage),
    *(Tensor.__reduce_ex__, Tensor.__deepcopy__, Tensor.__dlpack__, Tensor.__cuda_array_interface__.__get__),
    *(Tensor.share_memory_, Tensor.is_shared, Tensor.apply_, Tensor.map_, Tensor.map2_, Tensor.storage_type),
}

_LIKE = {
    *(aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.rand_like.default),
    *(aten.randn_like.default, aten.new_empty.default, aten.new_zeros.default, aten.new_ones.default, aten.new_full.default),
    aten.new_empty_strided.default,
}

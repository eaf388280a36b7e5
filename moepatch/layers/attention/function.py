"""The functions behind transformers' attention interface, one for each name of moepatch.

A name stands for a list of kernels. A call goes to the first that serves it; what none serves (a cache, a dense mask, dropout, a bias,
weights that are asked for, the CPU) goes to `exact`. No choice looks at tensors' values, so nothing waits for the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ...autocast import autocast_dtype
from .exact import dense_mask, plain_attention, sdpa_attention, with_borders
from .kernel import How, Kernel, Raw, first_that_serves
from .masks import Mask
from .packing import Packing
from .spec import CAUSAL, FULL, AttentionSpec

#: Which kernels a backend tries, in this order.
CHAINS: dict[str, tuple[str, ...]] = {
    "reference": (),
    "torch": (),
    "cudnn": ("cudnn", "flash"),
    "te": ("te", "cudnn", "flash"),
    "fa4": ("fa4", "cudnn", "flash"),
}

#: What chooses the kernel, of every function that was made.
_CHOOSERS: dict[Callable, Callable[..., Kernel | None]] = {}


@functools.cache
def kernels(backend: str) -> tuple[Kernel, ...]:
    """The kernels of a backend; importing them imports no library."""
    from .fa4 import FA4
    from .te import TE
    from .torch_kernels import CUDNN, FLASH

    known = {"cudnn": CUDNN, "flash": FLASH, "te": TE, "fa4": FA4}
    return tuple(known[name] for name in CHAINS[backend])


def attention_function(backend: str, chain: Callable[[], Sequence[Kernel]] | None = None) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """A function for transformers' interface.

    Args:
        backend: a key of `CHAINS`.
        chain: gives the kernels instead of that backend's own, for tests.
    """
    # Made beforehand: a tracer that comes by here can make no caches.
    return _FUNCTIONS[backend] if chain is None else _made(backend, chain)


#: Whether torch.compile can look at what a cache returns. Where it cannot, kernels are called outside its graphs: a break per attention.
TRACEABLE = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 12)


def _made(backend: str, chain: Callable[[], Sequence[Kernel]]) -> Callable[..., tuple[Tensor, Tensor | None]]:
    choose = _chooser(chain)

    def by_kernel(query: Tensor, key: Tensor, value: Tensor, how: How, packed: bool, packing: Packing | None) -> Tensor | None:
        """The result ``[B, S, H, Dv]`` of the first kernel that serves, or None."""
        dims = query.shape[1], key.shape[1], query.shape[3], value.shape[3]
        kernel = choose(*dims, how.window, how.sinks is not None, how.softcap, packed, query.dtype, query.device)
        if kernel is None or not query.dtype == key.dtype == value.dtype:
            return None
        return _run_packed(kernel, query, key, value, how, packing) if packed else kernel.run(query, key, value, how).contiguous()

    by_kernel = by_kernel if TRACEABLE else torch.compiler.disable(by_kernel)

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Mask | Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        position_bias: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        max_length_q: int | None = None,
        output_attentions: bool | None = None,
        **unused,
    ) -> tuple[Tensor, Tensor | None]:
        """As transformers' own: q ``[B, H, S, D]``, k and v ``[B, G, K, D]`` to ``[B, S, H, Dv]`` and weights, or None in their place."""
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        weights = _wants_weights(module) if output_attentions is None else output_attentions
        borders = _borders(cu_seq_lens_q, max_length_q, attention_mask, query)
        if not (weights or dropout or position_bias is not None or isinstance(attention_mask, Tensor)) and _is_whole(query, key):
            query, key, value = _autocast(query, key, value)
            window = attention_mask.window if attention_mask is not None else CAUSAL if causal else FULL
            packed = borders is not None or (attention_mask is not None and attention_mask.packed)
            out = by_kernel(query, key, value, How(scale, window, s_aux, softcap), packed, (borders or attention_mask.packing) if packed else None)
            if out is not None:
                return out, None
        mask, causal = dense_mask(attention_mask, query, key, causal)
        if borders is not None:
            mask, causal = with_borders(mask, borders.cu_seqlens, query.shape[2], causal), False
        if backend == "reference" or weights or softcap is not None or s_aux is not None or position_bias is not None:
            extras = {"softcap": softcap, "sinks_H": s_aux, "bias": position_bias}
            out, shares = plain_attention(query, key, value, mask, scale=scale, causal=causal, dropout=dropout, **extras)
            return out, shares if weights else None
        return sdpa_attention(query, key, value, mask, scale=scale, causal=causal, dropout=dropout), None

    attention.__name__ = attention.__qualname__ = f"moepatch_{backend}"
    _CHOOSERS[attention] = choose
    return attention


def direct(
    attend: Callable,
    module: nn.Module,
    form: tuple,
    mask: Mask | Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    output_attentions: bool | None = None,
    **unused,
) -> tuple[Raw, How] | None:
    """The kernel under a function of ours and how it has to be called, for who calls it without autograd; None where that is not enough.

    Args:
        attend: what transformers' interface names.
        form: S, heads, key heads, head dim, value dim, dtype and device.
        mask, rest: as the function would get them.
    """
    choose = _CHOOSERS.get(attend)
    if choose is None or dropout or position_bias is not None or cu_seq_lens_q is not None or isinstance(mask, Tensor):
        return None
    length, heads, kv_heads, dim, value_dim, dtype, device = form
    if length < 2 or dim != value_dim or (mask is not None and mask.packed):
        return None
    if _wants_weights(module) if output_attentions is None else output_attentions:
        return None
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    window = mask.window if mask is not None else CAUSAL if causal else FULL
    kernel = choose(heads, kv_heads, dim, value_dim, window, s_aux is not None, softcap, False, dtype, device)
    raw = kernel.raw() if kernel is not None else None
    if raw is None:
        return None
    return raw, How(dim**-0.5 if scaling is None else scaling, window, s_aux, softcap)


def _chooser(chain: Callable[[], Sequence[Kernel]]) -> Callable[..., Kernel | None]:
    """The first kernel for a form of attention, remembered; under torch.compile it is asked while tracing."""

    @functools.cache
    def served(heads, kv_heads, head_dim, v_head_dim, window, sinks, softcap, packed, dtype, device) -> Kernel | None:
        left, right = window
        spec = AttentionSpec(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            v_head_dim=v_head_dim,
            causal=right == 0,
            window=None if left < 0 else left + 1,
            sinks=sinks,
            softcap=softcap,
            packed=packed,
        )
        return first_that_serves(chain(), spec, dtype, device)

    @torch.compiler.assume_constant_result
    def choose(*form) -> Kernel | None:
        return served(*form)

    return choose


def _is_whole(query: Tensor, key: Tensor) -> bool:
    """Whether the queries are those of the keys' positions: no cache, and more than a kernel's overhead is worth."""
    return 1 < query.shape[2] == key.shape[2] and query.shape[0] == key.shape[0]


def _wants_weights(module: nn.Module) -> bool:
    config = getattr(module, "config", None)
    return config is not None and config.output_attentions


def _borders(cu_seqlens: Tensor | None, max_len: int | None, mask: Mask | Tensor | None, query: Tensor) -> Packing | None:
    """The sequences that the caller says to have packed in one row; the mask is for those who do not say."""
    if cu_seqlens is None or query.shape[0] != 1 or not (mask is None or (isinstance(mask, Mask) and not mask.is_padded)):
        return None
    # A length on the device would have to be waited for: the row's own is an upper bound.
    return Packing(cu_seqlens.to(torch.int32), max_len if isinstance(max_len, int) else query.shape[2])


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    dtype = autocast_dtype(tensors[0].device)
    return tensors if dtype is None else tuple(t.to(dtype) for t in tensors)


def _run_packed(kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, how: How, packing: Packing) -> Tensor:
    how = how._replace(cu_seqlens=packing.cu_seqlens, max_len=packing.max_len)
    out_THD = kernel.run(packing.pack(query), packing.pack(key), packing.pack(value), how)
    return packing.unpack(out_THD.contiguous(), query.shape[0], query.shape[2])


_FUNCTIONS = {backend: _made(backend, functools.partial(kernels, backend)) for backend in CHAINS}

"""Routing that is forced, for benchmarks, and routing that is counted: of any model, patched or not, sharded or not.

Both stand at the one call that nearly every family makes, ``experts(hidden, topk_ids, topk_weights)``: as hooks, so that the model and
its patch stay what they are, and leaving the context takes them off again.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .experts.module import SeesRoutes
from .routed import argument_names, routed_layers
from .routing_record import RoutingRecord

#: Makes ids ``[T, K]`` from ((layer, E), T, K).
Deal = Callable[[tuple[int, int], int, int], Tensor]


@contextmanager
def balanced_routing(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Replaces every router's choice by random distinct experts at exactly equal load, for benchmarks.

    Loads of a layer's experts differ by at most one token. The routing weights stay the router's own, with their gradient. The draw of a layer depends on
    the seed, the layer, the rank and the number of tokens, not on the call: so the recompute of activation checkpointing, a CUDA graph and every
    other stack that is measured on the same tokens see the same. It is made on the host when a number of tokens is first seen and kept on
    the device, where it costs nothing: no launch, no wait. On several ranks each draws for its own tokens.

    Args:
        model: patched or not, sharded or not. It can be patched or restored again only after the context.
        seed: of all draws.

    Raises:
        MoePatchError: some of its experts are not called with ids; they are named.

    >>> with moepatch.balanced_routing(model):                         # doctest: +SKIP
    ...     model(**batch, labels=labels).loss.backward()
    """
    with _forced(model, balanced_deal(seed)):
        yield


@contextmanager
def hot_routing(model: nn.Module, seed: int = 0, exponent: float = 1.0) -> Iterator[None]:
    """Replaces every router's choice by distinct experts of which few are popular (Zipf): the r-th of a layer by ``r ** -exponent``.

    Which experts are popular differs from layer to layer and is the same on all ranks. For the rest see `balanced_routing`.
    """
    with _forced(model, hot_deal(seed, exponent)):
        yield


@contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingRecord]:
    """Counts the tokens of every expert in every layer while the context is open.

    Counting stays on the device: no wait, two small launches a layer. What activation checkpointing computes a second time is counted once. On several
    ranks the record has this rank's tokens; `RoutingRecord.all_reduce` adds up those of all.

    Raises:
        MoePatchError: some of its experts are not called with ids; they are named.

    >>> with moepatch.record_routing(model) as routing:                # doctest: +SKIP
    ...     model(**batch)
    >>> print(routing)                                                 # doctest: +SKIP
    """
    layers = routed_layers(model)
    record = RoutingRecord(tuple(layer.name for layer in layers), [torch.zeros(layer.num_experts + 1, dtype=torch.int64) for layer in layers])
    handles = []
    for index, layer in enumerate(layers):
        seen = _SeenScores(record, index) if layer.scored else _SeenIds(record, index, argument_names(layer.module))
        handles.append(layer.module.register_forward_hook(seen, with_kwargs=True))
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def balanced_deal(seed: int) -> Deal:
    """What `balanced_routing` draws, for models whose routing is forced in another way."""
    return lambda layer, tokens, top_k: balanced_ids(tokens, top_k, layer[1], _seed("balanced", seed, _rank(), layer[0], tokens))


def hot_deal(seed: int, exponent: float = 1.0) -> Deal:
    """What `hot_routing` draws, for models whose routing is forced in another way."""

    def deal(layer: tuple[int, int], tokens: int, top_k: int) -> Tensor:
        ranks = torch.randperm(layer[1], generator=_generator(_seed("popular", seed, layer[0])))
        return hot_ids(tokens, top_k, -exponent * (ranks + 1.0).log(), _seed("hot", seed, _rank(), layer[0], tokens))

    return deal


def balanced_ids(tokens: int, top_k: int, experts: int, seed: int) -> Tensor:
    """``ids [T, K]``: distinct experts for each token, whose loads differ by at most one.

    A random order of all experts is dealt round and round, K to a token, until a deal ends where the order does; then comes another order.
    As K is at most E, no token gets an expert twice.
    """
    generator = _generator(seed)
    dealt = math.lcm(top_k, experts)
    orders = torch.rand(-(-tokens * top_k // dealt), experts, generator=generator, dtype=torch.float32).argsort(dim=1)
    ids_TK = orders[:, torch.arange(dealt) % experts].reshape(-1, top_k)[:tokens]
    return ids_TK[torch.randperm(tokens, generator=generator)]


def hot_ids(tokens: int, top_k: int, logits_E: Tensor, seed: int) -> Tensor:
    """``ids [T, K]``: distinct experts for each token, drawn without replacement with the odds ``exp(logits)``."""
    # The largest of logits plus Gumbel noise are such a draw.
    noise_TE = -torch.rand(tokens, len(logits_E), generator=_generator(seed), dtype=torch.float32).clamp(min=1e-30).log()
    return (logits_E - noise_TE.clamp(min=1e-30).log()).topk(top_k, dim=1).indices


@contextmanager
def _forced(model: nn.Module, deal: Deal) -> Iterator[None]:
    """Hooks on all layers."""
    handles = []
    for index, layer in enumerate(routed_layers(model)):
        drawn = Drawn((index, layer.num_experts), deal)
        if layer.scored:
            handles.append(layer.module.register_forward_hook(_ForceScores(drawn, layer.top_k)))
        else:
            handles.append(layer.module.register_forward_pre_hook(_ForceIds(drawn, argument_names(layer.module)), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Drawn:
    """The draws of one layer, by number of tokens: made once, kept on the device."""

    def __init__(self, layer: tuple[int, int], deal: Deal):
        self.layer, self.deal = layer, deal
        self.kept: dict[tuple[int, ...], Tensor] = {}

    def like(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Ids ``[..., K]``."""
        ids = self.kept.get(shape)
        if ids is None or ids.dtype is not dtype or ids.device != device:
            drawn = self.deal(self.layer, math.prod(shape[:-1]), shape[-1])
            ids = self.kept[shape] = drawn.view(shape).to(device=device, dtype=dtype)
        return ids


@dataclass(frozen=True)
class _ForceIds(SeesRoutes):
    """Pre-hook of an experts module: other ids, the same weights."""

    drawn: Drawn
    names: tuple[str, ...]

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if len(args) > 1:
            return (args[0], self._instead_of(args[1]), *args[2:]), kwargs
        return args, {**kwargs, self.names[1]: self._instead_of(kwargs[self.names[1]])}

    def _instead_of(self, topk_ids: Tensor) -> Tensor:
        return self.drawn.like(topk_ids.shape, topk_ids.dtype, topk_ids.device)


@dataclass(frozen=True)
class _ForceScores:
    """Hook of a router that returns ``(scores, …)``: each token's scores move to other experts."""

    drawn: Drawn
    top_k: int

    def __call__(self, module: nn.Module, args: tuple, output: tuple) -> tuple:
        scores_TE = output[0]
        ids_TK = self.drawn.like((*scores_TE.shape[:-1], self.top_k), torch.int64, scores_TE.device)
        chosen_TK = scores_TE.topk(self.top_k, dim=-1).values
        return torch.zeros_like(scores_TE).scatter(-1, ids_TK, chosen_TK), *output[1:]


@dataclass(frozen=True)
class _SeenIds(SeesRoutes):
    """Hook of an experts module that counts; after the call, so that it sees what other hooks made of the ids."""

    record: RoutingRecord
    index: int
    names: tuple[str, ...]

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        if not _recomputing():
            _count(self.record, self.index, args[1] if len(args) > 1 else kwargs[self.names[1]])


@dataclass(frozen=True)
class _SeenScores:
    """Hook of a router that returns ``(scores, …)``; counts scores above 0."""

    record: RoutingRecord
    index: int

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: tuple) -> None:
        if not _recomputing():
            counts = self.record.counts[self.index] = self.record.counts[self.index].to(output[0].device)
            counts[:-1] += (output[0] > 0).flatten(0, -2).sum(0)


@torch.no_grad()
def _count(record: RoutingRecord, index: int, topk_ids: Tensor) -> None:
    counts = record.counts[index] = record.counts[index].to(topk_ids.device)
    none = len(counts) - 1
    ids = topk_ids.reshape(-1).long()
    counts.scatter_add_(0, torch.where(ids < 0, none, ids.clamp(max=none)), counts.new_ones(1).expand(len(ids)))


def _recomputing() -> bool:
    """Whether a backward pass is running: a forward inside one is activation checkpointing's."""
    return torch._C._current_graph_task_id() != -1


def _seed(*parts: object) -> int:
    return zlib.crc32(repr(parts).encode())


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0

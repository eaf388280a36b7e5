"""What share of a model's step is patched: by FLOPs and by modules.

**The work of a token**, in floating point operations of the forward pass (a backward pass is twice that everywhere, so shares are the same):

- a module with weights: 2 × its parameters, as every one is multiplied and added once a token; of routed experts the share that works on one
  token, K / E (identity experts count among E);
- attention: the scores and their sum over values, 2 × keys × heads × (D of queries + D of values), where a token sees half of
  `SEQUENCE` keys (all of them where the module says that it is not causal, and at most its window);
- embeddings: none, they are looked up. The recurrence of state-space mixers is left out: it is small beside their projections.

Each module is taken to be called once a token. Work is patched if the module that owns the weights is in a patched site, called by patched
code (as an attention block's projections are), or for scores if the attention function of its model is. Where nothing says how many experts
a token has, patched experts count as one and others as all, so that the share is at least what is said.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from .estimate import count_experts, site_top_k
from .kinds import KINDS
from .scan import Scan
from .quantized import kept
from .site import Left, Refusal, Site

#: The length of the sequences that attention is counted for.
SEQUENCE = 4096

#: A site by kind and first name.
Key = tuple[str, str]


@dataclass(frozen=True)
class Part:
    """Work that is patched together: by any of the same sites.

    Attributes:
        sites: the sites that cover it, by kind and name; empty: nothing does.
        flops: of one token, forward.
        modules: how many modules with weights it is.
    """

    sites: tuple[Key, ...]
    flops: int
    modules: int


@dataclass(frozen=True)
class Share:
    """How much of a step is patched; the module's docstring says how it is counted.

    Attributes:
        flops: of one token, forward, of the whole model.
        patched_flops: of those the patched.
        modules: modules that own weights, embeddings not among them.
        patched_modules: of those the patched.
        exact: False if it is a lower bound, because nothing says how many experts a token has.
    """

    flops: int
    patched_flops: int
    modules: int
    patched_modules: int
    exact: bool = True

    @property
    def share(self) -> float:
        """Patched FLOPs over all of them, 0 to 1."""
        return self.patched_flops / self.flops if self.flops else 0.0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "of_flops": self.share,
            "exact": self.exact,
            "flops_per_token": self.flops,
            "patched_flops_per_token": self.patched_flops,
            "sequence_length": SEQUENCE,
            "modules": self.modules,
            "patched_modules": self.patched_modules,
        }


@dataclass(frozen=True)
class Work:
    """All work of a model, by what would patch it."""

    parts: tuple[Part, ...] = ()
    exact: bool = True

    def share(self, patched: Iterable[Site]) -> Share:
        """The share that these sites patch."""
        keys = {(site.kind, site.fqn) for site in patched}
        done = [part for part in self.parts if not keys.isdisjoint(part.sites)]
        sums = (sum(p.flops for p in self.parts), sum(p.flops for p in done), sum(p.modules for p in self.parts), sum(p.modules for p in done))
        return Share(*sums, self.exact or not done)


def work_of(scan: Scan, sites: list[Site], refusals: list[Refusal], left: list[Left]) -> Work:
    """The work of a model.

    Args:
        scan: the model.
        sites: what may be patched.
        refusals, left: what is not; they say where experts and attention are.
    """
    model = scan.model
    cover: dict[int, list[Key]] = {}
    for site in sites:
        module = model.get_submodule(site.fqn)
        for inner in [module] if KINDS[site.kind].only_itself else module.modules():
            cover.setdefault(id(inner), []).append((site.kind, site.fqn))
    routed, exact = _routed(model, sites, refusals)
    sums: dict[tuple[Key, ...], list[int]] = {}

    def add(keys: tuple[Key, ...], flops: int, modules: int) -> None:
        total = sums.setdefault(keys, [0, 0])
        total[0] += flops
        total[1] += modules

    for found in scan:
        module = found.module
        parameters = [p for p in module._parameters.values() if p is not None]
        if parameters and not isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            # Two numbers of four bits may be one that is counted.
            packed = isinstance(module, nn.Linear) and kept(module) is not None
            flops = 2 * module.in_features * module.out_features if packed else sum(2 * round(p.numel() * routed.get(id(p), 1)) for p in parameters)
            add(tuple(cover.get(id(module), ())), flops, 1)
    functions = [s for s in sites if s.kind == "attention_function"]
    for fqn, flops in _scores(model, sites, left).items():
        config = vars(model.get_submodule(fqn)).get("config", scan)  # what shares a model's configuration asks it for its function
        function = next((s for s in functions if vars(model.get_submodule(s.fqn)).get("config") is config), None)
        add(() if function is None else ((function.kind, function.fqn),), flops, 0)
    return Work(tuple(Part(keys, *totals) for keys, totals in sums.items()), exact)


def _routed(model: nn.Module, sites: list[Site], refusals: list[Refusal]) -> tuple[dict[int, float], bool]:
    """The share of a token's work by id of parameter, for those of routed experts; and whether it is known everywhere."""
    shares: dict[int, float] = {}
    exact = True
    for site in sites:
        kind = KINDS[site.kind]
        if kind.dense:
            continue
        if kind.widths is None:  # nothing says what its experts are
            exact = False
            continue
        spec = kind.computes(site.spec)
        choices = spec.num_experts + vars(spec).get("identity_experts", 0)
        chosen = site_top_k(model, site.fqn, site.spec)
        exact = exact and chosen is not None
        holder = ".".join(filter(None, (site.fqn, kind.holder(site.spec))))
        shares |= {id(p): min(chosen or 1, choices) / choices for p in model.get_submodule(holder).parameters()}
    for refusal in refusals:
        module = model.get_submodule(refusal.fqn)
        counted, chosen = count_experts(module), site_top_k(model, refusal.fqn, None)
        if counted is None or chosen is None:
            exact = False
            continue
        listed = isinstance(module, (nn.ModuleList, nn.ModuleDict))
        shares |= {id(p): min(chosen, counted[1]) / max(1, counted[1]) for p in module.parameters() if listed or p.ndim >= 3}
    return shares, exact


def _scores(model: nn.Module, sites: list[Site], left: list[Left]) -> dict[str, int]:
    """What attention costs a token beside its weights, by the name of the module."""
    costs: dict[str, int] = {}
    for site in sites:
        if site.kind in ("attention_block", "latent"):
            heads = site.spec.heads
            costs[site.fqn] = heads.heads * (heads.head_dim + heads.value_dim)
    for near in left:
        if near.kind in ("attention_block", "latent"):
            costs[near.fqn] = 2 * _width(model.get_submodule(near.fqn))
    return {fqn: 2 * _keys(model.get_submodule(fqn)) * width for fqn, width in costs.items()}


def _width(attention: nn.Module) -> int:
    """Heads × D of an attention module of unknown form, told by its attributes or by what goes into its last linear layer."""
    places = [vars(attention), vars(vars(attention).get("config", attention))]
    for values in places:
        heads = next((values[k] for k in ("num_heads", "num_attention_heads", "n_heads") if type(values.get(k)) is int), None)
        dim = next((values[k] for k in ("head_dim", "attention_head_size", "key_value_proj_dim") if type(values.get(k)) is int), None)
        if heads and dim:
            return heads * dim
    widths = [m.in_features for m in attention.modules() if type(vars(m).get("in_features")) is int]
    return widths[-1] if widths else 0


def _keys(attention: nn.Module) -> int:
    """How many keys a token sees on average."""
    keys = SEQUENCE if getattr(attention, "is_causal", True) is False else SEQUENCE // 2
    window = getattr(attention, "sliding_window", None)
    return min(keys, window) if type(window) is int and window > 0 else keys

"""Near misses: what has the name or the weights of a kind, and keeps its own forward.

A matcher that tried a module says itself what was in the way (`Left`). This is the net below the matchers, for modules that none of them
considered. Names decide here, but only about what is *mentioned*: nothing is patched because of a name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ..kinds import KINDS
from ..quantized import kept, kept_inside
from ..scan import Found, Scan
from ..site import Left, Refusal, Site
from ..surgery import Patched

#: Names of classes, then of attributes, by what they stand for.
_CLASSES = {
    "router": re.compile(r"(Router|Gate|Gating)\d*$"),
    "norm": re.compile(r"norm", re.IGNORECASE),
    "mixer": re.compile(r"Mixer|Mamba|Delta_?Net|SSM|ShortConv|TimeMix|Retention", re.IGNORECASE),
    "attention": re.compile(r"attention|attn", re.IGNORECASE),
    "mlp": re.compile(r"mlp|feed_?forward|ffn|dense(gated)?act|intermediate$", re.IGNORECASE),
}
_ATTRIBUTES = {
    "router": re.compile(r"^(router|gate|gating|wg)$"),
    "norm": re.compile(r"norm|^ln(_|\d|$)|_ln$", re.IGNORECASE),
    "mixer": re.compile(r"^(mixer|mamba|ssm|linear_attn)$"),
    "attention": re.compile(r"(attn|attention)\d*$", re.IGNORECASE),
    "mlp": re.compile(r"^(mlp|ffn|feed_?forward|shared_experts?|shared_mlp)$"),
}
_HEADS = re.compile(r"^(lm_head|embed_out)$")
_LINEAR = re.compile(r"Linear(_\w+)?$|Linear\d|Conv1D$")
_LAYER = re.compile(r"(Layer|Block)(V?\d+)?$")
#: Names of children that only modules of a kind have.
_ATTENTION_CHILDREN = (
    {"q_proj", "k_proj", "v_proj"}, {"query", "key", "value"}, {"q", "k", "v"}, {"to_q", "to_k", "to_v"}, {"wq", "wk", "wv"},
    {"q_lin", "k_lin", "v_lin"}, {"qkv"}, {"qkv_proj"}, {"query_key_value"}, {"c_attn"}, {"Wqkv"}, {"wqkv"}, {"kv_b_proj"},
)  # fmt: skip
_MLP_CHILDREN = (
    {"up_proj", "down_proj"}, {"gate_up_proj", "down_proj"}, {"fc1", "fc2"}, {"w1", "w2"}, {"c_fc", "c_proj"}, {"wi", "wo"}, {"wi_0", "wo"},
    {"dense_h_to_4h", "dense_4h_to_h"}, {"fc_in", "fc_out"}, {"lin1", "lin2"}, {"linear1", "linear2"}, {"up", "down"},
)  # fmt: skip
#: What a near miss of each sort is not looked for in: a module that holds one of these is their holder, not one of them.
_HOLDS = {
    "attention": {"attention"}, "mixer": {"attention", "mixer", "mlp", "mixture"}, "router": {"router"}, "norm": {"attention", "mixer", "mixture"},
    "mlp": {"attention", "mixer", "mlp", "router", "mixture"}, "head": set(), "mixture": {"mixture"},
}  # fmt: skip
_SORTS = {
    "attention_block": "attention", "latent": "attention", "ssd_mixer": "mixer", "delta_mixer": "mixer", "selective_mixer": "mixer",
    "mlp": "mlp", "norm": "norm", "router": "router", "loss": "head", "experts": "mixture", "expert_list": "mixture",
    "scored_block": "mixture", "parallel_linear": "mixture",
}  # fmt: skip
#: How the sorts are called in sentences.
_WORDS = {"attention": "attention", "mixer": "mixer", "mlp": "MLP", "norm": "norm", "router": "router", "mixture": "experts"}


def named(found: Found, sort: str) -> bool:
    """Whether the class or the attribute of a module is called as modules of a sort (a key of `_CLASSES`) are."""
    return bool(_CLASSES[sort].search(type(found.module).__name__) or _ATTRIBUTES[sort].search(found.fqn.rpartition(".")[2]))


def class_name(module: nn.Module) -> str:
    """The class of a module, without adapters around it."""
    inner = getattr(module, "base_layer", None)
    return class_name(inner) if isinstance(inner, nn.Module) else type(module).__name__


def in_the_way(module: nn.Module) -> str | None:
    """What keeps every matcher from a module, whatever its kind: quantized weights, an adapter, layers that are not torch's own. None without such.

    >>> class Linear4bit(nn.Linear): pass
    >>> in_the_way(nn.ModuleDict({"q_proj": Linear4bit(2, 2), "k_proj": Linear4bit(2, 2)}))
    'its projections are Linear4bit, not Linear'
    """
    quantized = kept_inside(module)
    if quantized is not None:
        return quantized
    name = next((name for name, inner in module.named_modules() if isinstance(getattr(inner, "base_layer", None), nn.Module)), None)
    if name is not None:
        adapter = type(module.get_submodule(name)).__name__
        what = "LoRA layer" if "lora" in adapter.lower() or "lora_A" in dict(module.get_submodule(name).named_children()) else f"{adapter}, an adapter,"
        return f"a {what} stands at {name or 'its place'}"
    name, parametrized = next(((name, inner) for name, inner in module.named_modules() if is_parametrized(inner)), (None, None))
    if name is not None:
        weight, (made, *_) = next(iter(parametrized.parametrizations.items()))
        return f"{'.'.join(filter(None, (name, weight)))} is parametrized ({type(made).__name__})"
    odd = {name: inner for name, inner in module.named_modules() if name and _linear_like(inner)}
    if odd:
        classes = ", ".join(dict.fromkeys(type(inner).__name__ for inner in odd.values()))
        return f"its projections are {classes}, not Linear" if len(odd) > 1 else f"{next(iter(odd))} is a {classes}, not a Linear"
    for name, p in module.named_parameters():
        if p.numel() == 0:
            return f"{name} holds no numbers (its shape is {list(p.shape)})"
    return None


def _linear_like(module: nn.Module) -> bool:
    """A layer that stands where a linear layer does, and is something else."""
    if type(module) is nn.Linear or type(module).__module__.startswith("torch.nn."):
        return False
    return isinstance(module, nn.Linear) or bool(_LINEAR.search(type(module).__name__)) and next(module.parameters(), None) is not None


def covered(scan: Scan, sites: Iterable[Site], refusals: Iterable[Refusal] = ()) -> set[int]:
    """The ids of the modules that sites patch, or that are refused whole."""
    ids: set[int] = set()
    for answer in (*sites, *refusals):
        module = scan.model.get_submodule(answer.fqn)
        alone = isinstance(answer, Site) and KINDS[answer.kind].only_itself
        ids |= {id(module)} if alone else {id(m) for m in module.modules()}
    return ids


def near_misses(scan: Scan, sites: list[Site], refusals: list[Refusal], left: list[Left]) -> list[Left]:
    """Every module that is nearly of a kind, in the order of the tree: what matchers said, and what none of them considered.

    Args:
        scan: the model.
        sites, refusals: what the matchers took, and refused.
        left: what they nearly took.

    A module inside one that is mentioned, patched or refused is not mentioned itself.
    """
    done = covered(scan, sites, refusals)
    holders: dict[str, set[int]] = {sort: set() for sort in _HOLDS}

    def hold(answers: Iterable[Site | Refusal | Left]) -> None:
        for answer in answers:
            sort = "mixture" if isinstance(answer, Refusal) else _SORTS.get(answer.kind)
            if sort is not None:
                holders[sort] |= scan.above(scan.of(scan.model.get_submodule(answer.fqn)))

    hold((*sites, *refusals))
    own = {id(scan.model.get_submodule(n.fqn)): n for n in left}
    # What a matcher nearly took may be a shell around what it took: an adapter around a router.
    noted = {key: n for key, n in own.items() if key not in done and key not in holders.get(_SORTS.get(n.kind), ())}
    hold(noted.values())
    for found in reversed(scan.found):
        key = id(found.module)
        if key in done or key in noted or not found.fqn or isinstance(found.module, Patched):
            continue
        sort = _sort(found, scan)
        if sort is None or any(key in holders[other] for other in _HOLDS[sort]):
            continue
        noted[key] = Left(kind=_kind(sort, found.module), fqns=found.fqns, class_name=class_name(found.module), reason=_reason(sort, found))
        holders[sort] |= scan.above(found)
    noted |= _layers(scan, sites, noted, holders, done)
    outer = {key for key, n in noted.items() if not (n.kind in KINDS and KINDS[n.kind].only_itself)}
    return [noted[id(f.module)] for f in scan if id(f.module) in noted and not scan.above(f) & outer]


def _sort(found: Found, scan: Scan) -> str | None:
    """What a module is by its class, else by its weights, else by its attribute; None for what has no weights of such a form."""
    module, attribute = found.module, found.fqn.rpartition(".")[2]
    if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Embedding)) or next(module.parameters(), None) is None and kept_inside(module) is None:
        return None
    if _HEADS.search(attribute):
        return "head"
    for sort, pattern in _CLASSES.items():
        if pattern.search(type(module).__name__) and _has_weights(sort, found, scan):
            return sort
    if len(_stacks(module)) > 1 and len({p.shape[0] for p in _stacks(module)}) == 1:
        return "mixture"
    children = set(module._modules)
    if {"A_log", "dt_bias"} & set(module._parameters) or "conv1d" in children:
        return "mixer"
    if any(names <= children for names in _ATTENTION_CHILDREN):
        return "attention"
    if any(names <= children for names in _MLP_CHILDREN) and _has_weights("mlp", found, scan):
        return "mlp"
    if _vectors(module) and {"weight", "scale", "gamma"} & set(module._parameters) and any("eps" in k for k, v in vars(module).items() if type(v) is float):
        return "norm"
    return next((sort for sort, pattern in _ATTRIBUTES.items() if pattern.search(attribute) and _has_weights(sort, found, scan)), None)


def _has_weights(sort: str, found: Found, scan: Scan) -> bool:
    """Whether a module has weights such as modules of a sort have: vectors for a norm, matrices for all others, several where it has projections."""
    module = found.module
    matrices = sum(p.ndim >= 2 for p in module.parameters()) or sum(kept(part) is not None for part in module.modules())
    if sort == "norm":
        return _vectors(module) or bool(module._modules) and type(module).__name__.endswith("Norm")
    if sort == "router":
        return matrices > 0 and (type(module) is not nn.Linear or _chooses(found, scan))
    if sort == "mlp":
        return matrices > (0 if type(module).__name__.endswith("Intermediate") else 1) and not any(_calls_attention(m) for m in module.modules())
    return matrices > 1 and not isinstance(module, nn.Linear)


def _stacks(module: nn.Module) -> list[nn.Parameter]:
    """Its own weights of several matrices each."""
    return [p for p in module._parameters.values() if p is not None and p.ndim == 3 and p.shape[0] > 1 and not isinstance(module, nn.modules.conv._ConvNd)]


def _vectors(module: nn.Module) -> bool:
    """Only vectors, of its own."""
    return not module._modules and bool(module._parameters) and all(p is None or p.ndim == 1 for p in module._parameters.values())


def _calls_attention(module: nn.Module) -> bool:
    return bool(_CLASSES["attention"].search(type(module).__name__)) or any(names <= set(module._modules) for names in _ATTENTION_CHILDREN)


def _chooses(found: Found, scan: Scan) -> bool:
    """A plain linear layer with as many outputs as there are experts beside it."""
    for parent, _ in found.parents:
        for sibling in (m for m in parent.modules() if m is not parent):
            stacked = {p.shape[0] for p in sibling.parameters(recurse=False) if p.ndim == 3}
            listed = {len(sibling)} if isinstance(sibling, (nn.ModuleList, nn.ModuleDict)) else set()
            if found.module.out_features in stacked | listed and found.module.out_features > 1:
                return True
    return False


def _kind(sort: str, module: nn.Module) -> str:
    """The name of the kind that a module of a sort comes closest to."""
    if sort == "attention":
        return "latent" if "kv_b_proj" in module._modules else "attention_block"
    if sort == "mixer":
        states = module._parameters.get("A_log")
        delta = "delta" in type(module).__name__.lower() or any("qkv" in name for name in module._modules)
        return "delta_mixer" if delta else "selective_mixer" if states is not None and states.ndim == 2 else "ssd_mixer"
    return {"head": "loss", "mixture": "experts"}.get(sort, sort)


def _reason(sort: str, found: Found) -> str:
    """The one thing that was in the way of a module that no matcher considered."""
    module = found.module
    general = in_the_way(module)
    if general is not None:
        return general
    if sort == "head":
        if type(module) is not nn.Linear:
            return f"it is a {type(module).__name__}, not a Linear"
        return "it is not what get_output_embeddings() of a transformers model with labels returns"
    if sort == "router" and type(module) is nn.Linear:
        return "it is a Linear, whose scores the module around it turns into a choice"
    weighty = [name for name, child in module._modules.items() if child is not None and next(child.parameters(), None) is not None]
    parts = ", ".join([*module._parameters, *weighty][:6])
    return f"no matcher takes a module of this form ({_WORDS[sort]} with {parts})"


def _layers(scan: Scan, sites: list[Site], noted: dict[int, Left], holders: dict[str, set[int]], done: set[int]) -> dict[int, Left]:
    """The elements of lists that hold attention, a mixer, an MLP or a mixture, and are no residual layers that moepatch knows."""
    parts = set.union(*(holders[sort] for sort in ("attention", "mixer", "mlp", "mixture")))
    normed = {id(scan.model.get_submodule(s.fqn)) for s in sites if s.kind == "norm"}
    layers: dict[int, Left] = {}
    taken = [scan.of(scan.model.get_submodule(s.fqn)) for s in sites if s.kind == "residual"]
    above = set().union(*map(scan.above, (*taken, *(scan.of(scan.model.get_submodule(n.fqn)) for n in noted.values() if n.kind == "residual"))))
    for found in reversed(scan.found):
        key = id(found.module)
        if key in done or key in noted or key in above or key not in parts or not _is_layer(found) or isinstance(found.module, Patched):
            continue
        layers[key] = Left(kind="residual", fqns=found.fqns, class_name=type(found.module).__name__, reason=_no_residual(found.module, normed))
        above |= scan.above(found)
    return layers


def _is_layer(found: Found) -> bool:
    """An element of a list, called a layer or a block, or with a norm among its children."""
    name = type(found.module).__name__
    listed = any(isinstance(parent, nn.ModuleList) for parent, _ in found.parents) and not isinstance(found.module, (nn.ModuleList, nn.Sequential))
    return listed and bool(_LAYER.search(name) or any(_norm_children(found.module)))


def _norm_children(layer: nn.Module) -> Iterator[str]:
    for name, child in layer._modules.items():
        if child is not None and _vectors(child) and (_CLASSES["norm"].search(type(child).__name__) or _ATTRIBUTES["norm"].search(name)):
            yield name


def _no_residual(layer: nn.Module, normed: set[int]) -> str:
    """Why a layer is no pre-norm layer with a residual sum."""
    norms = list(_norm_children(layer))
    if not norms:
        return "none of its children is a norm"
    odd = next((name for name in norms if id(layer._modules[name]) not in normed), None)
    if odd is not None:
        return f"its norm {odd} ({type(layer._modules[odd]).__name__}) keeps its own forward"
    if len(norms) > 2:
        return f"it has {len(norms)} norms, and a layer that is known has one or two"
    return "it adds up something else than h + child(norm(h))"

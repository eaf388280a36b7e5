"""Recognises blocks that loop over a list of gated MLPs (see `experts.expert_list`), by their structure and by a trial of a scale model."""

from __future__ import annotations

import inspect
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .. import trial
from ..errors import in_words
from ..experts.expert_list import ExpertListSpec
from ..experts.spec import ExpertsSpec
from ..kinds import KINDS, trial_tokens
from ..layout.experts import fused_layout
from ..quantized import kept_inside
from ..registry import register_matcher
from ..replica import random_fill, replica, size_map
from ..scan import Found, Scan
from ..site import Left, Refusal, Site
from ..surgery import what_is_hung_on
from .experts import left, make_site, refusal, takes
from .near import in_the_way
from .probe import candidates, fingerprint, finite_numbers, misfit
from .suspects import is_list
from .witness import Objection


@register_matcher("expert_list", priority=70)
def match_expert_list(found: Found, scan: Scan, memo: dict) -> Site | Refusal | Left | None:
    """See the module's docstring."""
    block = found.module
    children, lists, routers = _parts(block)
    reason = _why_no_form(block, children, lists, routers) or _what_would_be_lost(block, lists[0], scan, memo)
    if reason is not None:
        return left(found, "expert_list", reason) if any(is_list(scan.of(child)) for child in children.values()) else None
    key = ("expert_list", fingerprint(block), _dtypes(block))
    if key not in memo:
        memo[key] = _with_linear(_read(block, routers[0], lists[0]), block)
    reading = memo[key]
    if isinstance(reading, str):
        return refusal(found, reading)
    paths = tuple(f"{reading.experts_name}.{path}" for weight in reading.weights().values() for path in weight.names)
    return make_site(found, "expert_list", reading, paths)


def _parts(block: nn.Module) -> tuple[dict[str, nn.Module], list[str], list[str]]:
    """The children of a block, and the names of those that may be its experts and its router."""
    children = dict(block.named_children())
    lists = [name for name, child in children.items() if isinstance(child, nn.ModuleList) and len(child) > 1 and _is_gated_mlp(child[0])]
    return children, lists, [name for name, child in children.items() if _is_linear(child)]


def _why_no_form(block: nn.Module, children: dict[str, nn.Module], lists: list[str], routers: list[str]) -> str | None:
    """None for a router, a list of equal gated MLPs of as many elements, and one argument; else what of that is amiss."""
    if (quantized := kept_inside(block)) is not None:
        return quantized
    hung = next((words for name, child in children.items() if isinstance(child, nn.ModuleList) and (words := _hung_on(child, name))), None)
    if not lists:
        return in_the_way(block) or hung or "its experts are separate modules, and none of them a gated MLP of three linear layers without biases"
    if len(lists) > 1:
        return f"it has {len(lists)} lists of experts ({', '.join(lists)})"
    if len(routers) != 1:
        beside = f"its experts are separate modules, and beside them stand {len(routers)} linear layers without bias, where one router is known"
        return in_the_way(block) or beside
    others = [name for name in children if name not in (*lists, *routers)]
    if others:
        return f"beside its router {routers[0]} and its list of experts {lists[0]} it has {', '.join(others)}"
    if not takes(block, 1):
        return f"it is called with ({', '.join(list(inspect.signature(type(block).forward).parameters)[1:])}), not with tokens alone"
    experts, rows = children[lists[0]], children[routers[0]].weight.shape[0]
    if rows != len(experts):
        return f"its router {routers[0]} has {rows} outputs for {len(experts)} experts"
    drops = next((f"{name}, p={m.p}" for name, m in block.named_modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0), None)
    if drops is not None:
        return f"it drops numbers out in training ({drops})"
    whole = next((name for name, b in children[lists[0]].named_buffers() if not b.is_floating_point()), None)
    if whole is not None:  # a trial has others, and nobody would notice when they change
        return f"its experts have a buffer that may decide what they compute ({lists[0]}.{whole})"
    if len({fingerprint(expert) for expert in experts}) > 1:
        return in_the_way(experts) or hung or f"its experts {lists[0]} are not all alike"
    return hung


def _what_would_be_lost(block: nn.Module, name: str, scan: Scan, memo: dict) -> str | None:
    """What a list is to others than this block, and would not be when it is patched; None if nothing."""
    experts = block._modules[name]
    places = list(experts._modules)
    numbers: dict[int, str] = {}
    for place, expert in experts._modules.items():
        if id(expert) in numbers:
            return f"experts {numbers[id(expert)]} and {place} of {name} are one module"
        numbers[id(expert)] = place
    owners: dict[int, str] = {}
    for place in places:
        for path, parameter in experts._modules[place].named_parameters():
            if id(parameter) in owners:
                return f"{name}.{owners[id(parameter)]} and {name}.{place}.{path} are one parameter"
            owners[id(parameter)] = f"{place}.{path}"
    if "memory" not in memo:
        memo["memory"] = Counter(p.data_ptr() for p in scan.model.parameters() if type(p) is nn.Parameter and not p.is_meta and p.numel())
    shared = next((path for path, p in experts.named_parameters() if not p.is_meta and memo["memory"][p.data_ptr()] > 1), None)
    if shared is not None:
        return f"{name}.{shared} shares its memory with another parameter"
    # Who else holds the list finds it as it was; but it can be patched in one way only.
    own = fingerprint(block), _dtypes(block)
    blocks = [parent for parent, _ in scan.of(experts).parents if _why_no_form(parent, *_parts(parent)) is None]
    other = next((scan.of(parent).fqn for parent in blocks if (fingerprint(parent), _dtypes(parent)) != own), None)
    return None if other is None else f"its list of experts {name} is that of {other or 'the model'}, too, which is another kind of block"


def _dtypes(module: nn.Module) -> tuple[torch.dtype, ...]:
    return tuple(p.dtype for p in module.parameters())


def _hung_on(experts: nn.ModuleList, name: str) -> str | None:
    """What is hung on the elements of a list. Nobody calls the list itself."""
    return next((words for place, expert in experts._modules.items() if (words := what_is_hung_on(expert, f"{name}.{place}"))), None)


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear and module.bias is None


def _is_gated_mlp(module: nn.Module) -> bool:
    """Three linear layers that may be gate, up and down projection, and nothing else with weights."""
    return len(list(module.parameters())) == 3 and next(_roles(module), None) is not None


def _roles(expert: nn.Module) -> Iterator[tuple[str, str, str, int, int]]:
    """Names of gate, up and down projection in every way that their shapes allow, with H and I."""
    layers = {name: tuple(m.weight.shape) for name, m in expert.named_children() if _is_linear(m)}
    for gate, up, down in itertools.permutations(layers) if len(layers) == 3 else ():
        hidden, intermediate = layers[down]
        if layers[gate] == layers[up] == (intermediate, hidden):
            yield gate, up, down, hidden, intermediate


def _read(block: nn.Module, router: str, experts: str) -> ExpertListSpec | str:
    """The spec that computes what the block does, or why there is none."""
    mlps = block.get_submodule(experts)
    reason, objected = "it says nowhere how many experts a token has", False
    for gate, up, down, hidden, intermediate in _roles(mlps[0]):
        # The list keeps its length: a scale model has all experts, but narrow ones. It trains, so that what only training does shows.
        sizes = size_map(num_experts=len(mlps), hidden=hidden, intermediate=intermediate, experts=len(mlps))
        small = replica(block, sizes, random_fill(torch.Generator().manual_seed(0))).train()
        returns_logits = _returns_logits(small, sizes.get(hidden, hidden))
        if isinstance(returns_logits, str):
            return returns_logits
        layout = fused_layout(up="gate_up_proj", down="down_proj", gated=True)
        numbers = finite_numbers(mlps[0])
        for activation, top_k, normalised in itertools.product(candidates(True, numbers), _top_k(block, len(mlps)), (True, False)):
            spec = ExpertListSpec(
                experts=ExpertsSpec(num_experts=len(mlps), hidden=hidden, intermediate=intermediate, layout=layout, activation=activation),
                top_k=top_k,
                normalised=normalised,
                returns_logits=returns_logits,
                router_name=router,
                experts_name=experts,
                gate_name=gate,
                up_name=up,
                down_name=down,
            )
            misfitting = misfit(small, "expert_list", spec.resized(sizes), {})
            if misfitting is None:
                return replace(spec, idle_zero=_idle_zero(small, spec, sizes.get(hidden, hidden)))
            # The reading that computes the same of ordinary numbers has most to say.
            if not objected:
                objected = isinstance(misfitting, Objection)
                reason = f"it does not compute a softmax top-k mixture of its experts: {misfitting}"
    return reason


def _with_linear(spec: ExpertListSpec | str, block: nn.Module) -> ExpertListSpec | str:
    """The spec with what the router computes in, which shows in the model's own dtypes only."""
    router_dtype = None if isinstance(spec, str) else block.get_submodule(spec.router_name).weight.dtype
    dtype = next(p.dtype for p in block.get_submodule(spec.experts_name).parameters()) if router_dtype else None
    if dtype == router_dtype in (None, torch.float32, torch.float64):
        return spec
    generator, own = torch.Generator().manual_seed(0), spec.experts
    sizes = size_map(num_experts=own.num_experts, hidden=own.hidden, intermediate=own.intermediate, experts=own.num_experts)
    small = replica(block, sizes, lambda tensor, shape: random_fill(generator, tensor.dtype)(tensor, shape))
    call = KINDS["expert_list"].trial(spec.resized(sizes), dtype, torch.device("cpu"), generator)
    try:
        with torch.no_grad(), _Linears() as seen:
            trial.eager_forward(small)(small, *call.args)
    except Exception as error:  # a family's code may fail in any way on dtypes that do not go together
        return f"its own code does not run with a router in {_name(router_dtype)} and experts in {_name(dtype)} ({in_words(error)})"
    computed = next((x for x, shape in seen.found if shape[0] == own.num_experts), dtype)
    if computed == dtype:
        return spec
    return replace(spec, linear="weight" if computed == router_dtype else "float")


def _idle_zero(block: nn.Module, spec: ExpertListSpec, hidden: int) -> bool:
    """Whether the block calls experts without tokens, so that their weights get gradients."""
    token = trial_tokens(hidden, torch.float32, torch.device("cpu"), torch.Generator().manual_seed(0))[:1, :1]
    y = trial.returned_tensors(trial.eager_forward(block)(block, token))
    weights = list(block.get_submodule(spec.experts_name).parameters())
    return all(g is not None for g in torch.autograd.grad(next(iter(y.values())).sum(), weights, allow_unused=True))


class _Linears(TorchFunctionMode):
    """Sees the linears that are computed: the dtype of the input, and the shape of the matrix."""

    def __init__(self):
        super().__init__()
        self.found: list[tuple[torch.dtype, torch.Size]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is nn.functional.linear and len(args) > 1:
            self.found.append((args[0].dtype, args[1].shape))
        return func(*args, **(kwargs or {}))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _returns_logits(block: nn.Module, hidden: int) -> bool | str:
    try:
        with torch.no_grad():
            out = block(trial_tokens(hidden, torch.float32, torch.device("cpu"), torch.Generator().manual_seed(0)))
    except Exception as error:  # a family's code may fail in any way on sizes that are not its own
        return f"a scale model of it cannot be run ({type(error).__name__}: {error})"
    if isinstance(out, torch.Tensor):
        return False
    return True if isinstance(out, tuple) and len(out) == 2 else f"it returns a {type(out).__name__}"


def _top_k(block: nn.Module, num_experts: int) -> list[int]:
    """Integers of the block that may be the number of experts per token."""
    return sorted({v for v in vars(block).values() if type(v) is int and 0 < v < num_experts})

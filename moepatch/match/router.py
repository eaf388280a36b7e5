"""Recognises routers: a module without children, with one matrix ``[E, H]``, that makes of tokens ``(logits, weights, ids)``.

What it computes is found by trying: every formula that its numbers allow is compared with it, in fp32, in bf16 and with both mixed, in
training and not; then the scale model forward and backward.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from .. import trial
from ..layers.router import GROUP_SCORES, LINEARS, RESULTS, ROUTER, RouterSpec, Routing, reference_router
from ..registry import register_matcher
from ..replica import random_fill, replica
from ..scan import Found, Scan
from ..site import Left, Refusal, Site
from .experts import left, make_site, takes
from .known import known
from .near import in_the_way, named
from .probe import fingerprint, finite_numbers, misfit

#: The width at which wide routers are tried.
_NARROW = 16
#: No router has more experts. Embeddings and heads of models have this form, too.
_MOST_EXPERTS = 4096
#: What families add to a sum that might be 0.
_TINY = 1e-20
#: How many numbers of a bf16 result may round differently. A router that rounds somewhere else differs in a quarter or more of them.
_ROUNDING_SLACK = 0.02


@register_matcher("router", priority=25)
def match_router(found: Found, scan: Scan, memo: dict) -> Site | Refusal | Left | None:
    """See the module's docstring."""
    module = found.module
    reading = _reading(module, memo)
    if isinstance(reading, RouterSpec):
        return make_site(found, "router", reading, (reading.weight,))
    has_matrix = any(p.ndim == 2 for p in module.parameters())
    return left(found, "router", reading) if has_matrix and named(found, "router") and type(module) is not nn.Linear else None


def read_router(module: nn.Module, memo: dict) -> RouterSpec | None:
    """The router that a module is, or None."""
    reading = _reading(module, memo)
    return reading if isinstance(reading, RouterSpec) else None


def _reading(module: nn.Module, memo: dict) -> RouterSpec | str:
    """The router that a module is, or why it is none that is known."""
    reason = _why_no_form(module)
    if reason is not None:
        return reason
    key = ("router", fingerprint(module))
    if key not in memo:
        memo[key] = known("router", module, _read, _matrices(module)[0])
    return memo[key]


def _matrices(module: nn.Module) -> list[str]:
    return [name for name, p in module._parameters.items() if p is not None and p.ndim == 2]


def _why_no_form(module: nn.Module) -> str | None:
    """None for one matrix, beside it only vectors as long as the matrix is high, no children and one argument; else what of that is amiss."""
    tensors = {name: t for name, t in (*module._parameters.items(), *module._buffers.items()) if t is not None}
    if module._modules:
        return in_the_way(module) or f"it has children ({', '.join(module._modules)}), and the routers that are known have none"
    matrices = _matrices(module)
    if len(matrices) != 1:
        return f"it has {len(matrices)} matrices, and a router has one"
    odd = next((name for name, t in tensors.items() if not t.is_floating_point()), None)
    if odd is not None:
        return f"its {odd} is {str(tensors[odd].dtype).removeprefix('torch.')}"
    experts = module._parameters[matrices[0]].shape[0]
    vector = next((name for name, t in tensors.items() if name != matrices[0] and tuple(t.shape) != (experts,)), None)
    if vector is not None:
        return f"its {vector} {list(tensors[vector].shape)} is no vector of {experts} numbers, one for each expert"
    if not 1 < experts <= _MOST_EXPERTS:
        return f"it would choose of {experts} experts, and at most {_MOST_EXPERTS} are known" if experts > 1 else "it would choose of one expert"
    if not takes(module, 1):
        return f"it is called with ({', '.join(list(inspect.signature(trial.eager_forward(module)).parameters)[1:])}), not with tokens alone"
    return in_the_way(module)


def _read(module: nn.Module, matrix: str) -> RouterSpec | str:
    """The spec that computes what the module does, or why there is none."""
    experts, hidden = module._parameters[matrix].shape
    sizes = {hidden: _NARROW} if hidden > _NARROW and hidden != experts else {}
    trials = _Trials(module, matrix, sizes)
    if trials.top_k is None:
        return "it does not return (logits [T, E], weights [T, K], ids [T, K])"
    base = RouterSpec(num_experts=experts, hidden=hidden, top_k=trials.top_k, weight=matrix, flattens=trials.flattens)
    # A softmax made to sum to 1 is one over the chosen logits but for rounding: the family's own way comes first.
    formulas = sorted((spec for spec in _formulas(module, base) if trials.same_formula(spec)), key=trials.share_off)
    reason = "it chooses and weighs by no formula that is known" if not formulas else "in bfloat16 it rounds elsewhere than the routers that are known"
    for spec in itertools.chain.from_iterable(map(_roundings, formulas)):
        if trials.same_rounding(spec):
            misfitting = misfit(module, "router", spec, sizes)
            if misfitting is None:
                return spec
            reason = f"patched it would compute something else: {misfitting}"
    return reason


def _formulas(module: nn.Module, base: RouterSpec) -> Iterator[RouterSpec]:
    """Every router that the form of the module allows, before rounding; the simpler ones first."""
    vectors = [name for name, t in (*module._parameters.items(), *module._buffers.items()) if t is not None and name != base.weight]
    # Every vector is either the linear's bias or the correction; more than two have no role.
    roles = [pair for pair in dict.fromkeys(itertools.permutations([*vectors, None, None], 2)) if set(pair) - {None} == set(vectors)]
    scales = list(dict.fromkeys([1.0, *finite_numbers(module)]))
    for (bias, correction), scale, groups, in_order in itertools.product(roles, scales, _groupings(module, base.num_experts), (True, False)):
        spec = replace(base, bias=bias, correction=correction, scale=scale, sorted=in_order, **groups)
        if correction is None and not groups:
            yield replace(spec, score="chosen", renormalise=True)
        yield replace(spec, score="softmax")
        yield replace(spec, score="softmax", renormalise=True)
        yield replace(spec, score="sigmoid")
        for eps in (0.0, _TINY):
            yield replace(spec, score="sigmoid", renormalise=True, eps=eps)


def _groupings(module: nn.Module, experts: int) -> Iterator[dict]:
    """No groups, and every way to limit the choice that the integers of the module allow."""
    yield {}
    integers = sorted({v for v in vars(module).values() if type(v) is int})
    for groups, chosen in itertools.permutations(integers, 2):
        if 0 < chosen < groups < experts and experts % groups == 0:
            for score, zeroed in itertools.product(GROUP_SCORES, (False, True)):
                yield {"groups": groups, "chosen_groups": chosen, "group_score": score, "zeroed": zeroed}


def _roundings(formula: RouterSpec) -> Iterator[RouterSpec]:
    """A formula with every place where families round."""
    for linear, wide, result in itertools.product(LINEARS, (False, True), RESULTS):
        if not (wide and linear == "float"):
            yield replace(formula, linear=linear, wide_logits=wide, result=result)


class _Trials:
    """A scale model of a module in several precisions, and what it made of tokens.

    Attributes:
        top_k: how many experts a token has; None if the module is no router.
        flattens: whether it takes tokens in sequences.
    """

    def __init__(self, module: nn.Module, matrix: str, sizes: dict[int, int]):
        self.module, self.matrix, self.sizes = module, matrix, sizes
        self.runs: dict[tuple, tuple] = {}
        self.top_k, self.flattens = None, False
        theirs = self._run("usual", torch.float32, torch.float32, True)[-1]
        if theirs is not None and theirs[2].shape[1] <= theirs[0].shape[1]:
            self.top_k = theirs[2].shape[1]
            self.flattens = self._run("sequences", torch.float32, torch.float32, True)[-1] is not None

    def same_formula(self, spec: RouterSpec) -> bool:
        """Whether outputs agree in fp32, in training and not, for usual tokens and for some whose scores are next to nothing."""
        return all(_agree(*self._both(spec, tokens, torch.float32, torch.float32, training)) for tokens in ("usual", "small") for training in (True, False))

    def share_off(self, spec: RouterSpec) -> float:
        """The share of fp32 weights that are not equal to the last bit."""
        theirs, ours = self._both(spec, "usual", torch.float32, torch.float32, True)
        return (theirs[1] != ours[1]).float().mean().item()

    def same_rounding(self, spec: RouterSpec) -> bool:
        """Whether dtypes and bf16 numbers agree, also where only the tokens or only the weight is bf16, which both may refuse, and under autocast."""
        low, wide = torch.bfloat16, torch.float32
        mixes = [(low, low, False), (low, wide, False), (wide, low, False), *([] if spec.linear == "float" else [(wide, wide, True)])]
        return all(_agree(*self._both(spec, "usual", x, weight, True, autocast), slack=_ROUNDING_SLACK) for x, weight, autocast in mixes)

    def _both(
        self, spec: RouterSpec, tokens: str, dtype: torch.dtype, weight_dtype: torch.dtype, training: bool, autocast: bool = False
    ) -> tuple[Routing | None, Routing | None]:
        copy, x, theirs = self._run(tokens, dtype, weight_dtype, training, autocast)
        tensors = [None if name is None else getattr(copy, name) for name in (spec.weight, spec.bias, spec.correction)]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            try:
                return theirs, reference_router(x, *tensors, spec.resized(self.sizes))
            except Exception:  # a linear of two dtypes, or more groups than there are
                return theirs, None

    def _run(
        self, tokens: str, dtype: torch.dtype, weight_dtype: torch.dtype, training: bool, autocast: bool = False
    ) -> tuple[nn.Module, Tensor, Routing | None]:
        """The copy, what it was given, and what it returned; None if that is no routing."""
        key = (tokens, dtype, weight_dtype, training, autocast)
        if key not in self.runs:
            generator = torch.Generator().manual_seed(0)
            copy = replica(self.module, self.sizes, random_fill(generator)).train(training)
            weight = copy._parameters[self.matrix]
            # Tokens that point against all rows of the weight have logits around log(_TINY).
            lean = 3 / math.sqrt(weight.shape[1])
            weight.data -= lean
            small = -math.log(_TINY) / (lean * weight.shape[1])
            copy._parameters = {name: None if p is None else nn.Parameter(p.data.to(weight_dtype)) for name, p in copy._parameters.items()}
            x = torch.randn(96, weight.shape[1], generator=generator, dtype=torch.float32)
            x = {"usual": x, "small": x / 4 + small, "sequences": x.unflatten(0, (2, 48))}[tokens].to(dtype)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                try:
                    theirs = trial.eager_forward(copy)(copy, x)
                except Exception:  # whatever it is, it is not a router
                    theirs = None
            self.runs[key] = copy, x, theirs if _is_routing(theirs, x, weight.shape[0]) else None
        return self.runs[key]


def _is_routing(result: object, x: Tensor, experts: int) -> bool:
    """Whether it is ``(logits [T, E], weights [T, K], ids [T, K])``."""
    if type(result) is not tuple or len(result) != 3 or not all(isinstance(t, Tensor) and t.ndim == 2 for t in result):
        return False
    logits, weights, ids = result
    tokens = x.numel() // x.shape[-1]
    return tuple(logits.shape) == (tokens, experts) and weights.shape == ids.shape and ids.shape[0] == tokens and ids.dtype == torch.int64


def _agree(theirs: Routing | None, ours: Routing | None, slack: float = 0.0) -> bool:
    """Whether two routings choose the same experts in the same order, with the same numbers but for a share of `slack` and fp32 rounding."""
    if theirs is None or ours is None:
        return theirs is ours
    if any(a.dtype != b.dtype or a.shape != b.shape for a, b in zip(theirs, ours, strict=True)):
        return False
    same = [1 - torch.isclose(a, b, rtol=1e-5, atol=1e-35, equal_nan=True).float().mean().item() for a, b in zip(theirs[:2], ours[:2], strict=True)]
    return torch.equal(theirs[2], ours[2]) and max(same) <= slack

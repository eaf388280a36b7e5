"""Routers: found by what they compute, the patched module against the family's, the kernels in Triton's interpreter."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import compare
import pytest
import torch
import zoo
from interpreter import needs_triton, passes_in_the_interpreter
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from moepatch import trial
from moepatch.kernels import router as kernels
from moepatch.layers.router import ROUTER, PatchedRouter, RouterSpec, reference_choice, reference_router, result_dtype
from moepatch.match.router import read_router
from moepatch.scan import Scan
from moepatch.surgery import Journal, InjectClass


def spec(experts=16, top_k=4, hidden=32, **options):
    return RouterSpec(**{"num_experts": experts, "hidden": hidden, "top_k": top_k, "weight": "weight", **options})


CORRECTED = {"score": "sigmoid", "renormalise": True, "eps": 1e-20, "scale": 2.5, "correction": "correction", "sorted": False}
GROUPED = {"groups": 4, "chosen_groups": 2}
#: Options of a spec by name.
FORMS = {
    "softmax": {},
    "softmax, sum 1": {"renormalise": True, "result": "logits"},
    "softmax, corrected": {"correction": "correction", "renormalise": True, "scale": 0.5},
    "softmax, groups by best": {**GROUPED, "group_score": "max", "zeroed": True},
    "softmax, sum 1, groups": {**GROUPED, "renormalise": True, "zeroed": True},
    "chosen": {"score": "chosen", "renormalise": True, "result": "logits"},
    "sigmoid": {"score": "sigmoid"},
    "sigmoid, sum 1": {"score": "sigmoid", "renormalise": True, "scale": 3.0},
    "sigmoid, corrected": CORRECTED,
    "sigmoid, corrected, groups": {**CORRECTED, **GROUPED},
}


def distinct_logits(tokens, experts, dtype, device="cpu", seed=0):
    """Random logits without two that are equal in one token: a random order of steps that fp16 and bf16 can tell apart."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(tokens, experts, generator=generator).argsort(-1)
    steps = torch.linspace(-4, 4, experts) if experts <= 64 else _narrowing(experts)
    return steps[order].to(device=device, dtype=dtype)


def _narrowing(experts):
    """As many different numbers that bf16 has, about as normal logits are spread: 64 a power of two on either side of 0."""
    each = 0.125 * 2 ** (torch.arange(experts // 2) / 64).floor() * (1 + torch.arange(experts // 2) % 64 / 64)
    return torch.cat([each, -each, torch.zeros(experts % 2)])


def given(form, tokens, experts, top_k, dtype, device="cpu"):
    """The spec, logits, the correction or None, and cotangents of logits and weights."""
    made = spec(experts, top_k, **FORMS[form])
    generator = torch.Generator().manual_seed(1)
    correction = (torch.randn(experts, generator=generator) * 0.1).to(device) if made.correction else None
    dlogits, dweights = torch.randn(tokens, experts, generator=generator).to(device, dtype), torch.randn(tokens, experts, generator=generator).to(device)
    return made, distinct_logits(tokens, experts, dtype, device), correction, dlogits, dweights


def chosen(function, made, logits, correction, dlogits, dweights):
    """The weights at their experts' places, the ids and the gradient of the logits; with `dlogits` None none comes from the logits."""
    logits = logits.detach().requires_grad_()
    dtype = result_dtype(logits, logits, made)
    if function is reference_choice:
        passed, (weights, ids) = logits, reference_choice(logits, correction, made, dtype)
    else:
        passed, weights, ids = kernels._Router.apply(logits, correction, made, dtype)
    dense = torch.zeros(logits.shape, dtype=weights.dtype, device=logits.device).scatter(-1, ids, weights)
    outputs, cotangents = ([dense], [dweights.to(dtype)]) if dlogits is None else ([passed, dense], [dlogits, dweights.to(dtype)])
    (grad,) = torch.autograd.grad(outputs, logits, cotangents)
    return {"weights": dense.detach(), "grad": grad, "ids": ids, "sorted": weights.detach()}


def wide_step(
    function, tokens, experts, top_k, hidden, form, reads=("weights", "logits"), dtype=torch.bfloat16, device="cpu", weight_dtype=torch.bfloat16, linear="float"
):
    """A step of a router whose linear is computed in fp32, from bf16 tokens and a weight in `weight_dtype`: ids, logits, weights, gradients by name.

    Args:
        reads: what the loss reads.
        dtype: float64 to hold the same numbers and compute with them so.
    """
    generator = torch.Generator().manual_seed(2)
    made = spec(experts, top_k, hidden, **FORMS[form], linear=linear if dtype == torch.bfloat16 else "own")
    x = torch.randn(tokens, hidden, generator=generator).bfloat16().to(device, dtype).requires_grad_()
    weight = torch.randn(experts, hidden, generator=generator).mul(0.3).to(weight_dtype)
    weight = weight.to(device, weight_dtype if dtype == torch.bfloat16 else dtype).requires_grad_()
    correction = (torch.randn(experts, generator=generator) * 0.1).to(device) if made.correction else None
    dweights, dlogits = (torch.randn(tokens, experts, generator=generator).to(device) for _ in range(2))
    logits, weights, ids = function(x, weight, None, correction, made)
    dense = torch.zeros(logits.shape, dtype=weights.dtype, device=device).scatter(-1, ids, weights)
    loss = sum({"weights": (dense * dweights).sum(), "logits": (logits * dlogits).sum()}[name] for name in reads)
    dx, dweight = torch.autograd.grad(loss, (x, weight))
    return {"ids": ids, "logits": logits.detach(), "weights": dense.detach(), "dx": dx, "dweight": dweight}


def check_wide_step(tokens, experts, top_k, hidden, form, reads=("weights", "logits"), device="cpu", **options):
    """Ours and the family's fp32 linear against float64: fp32 results to 2e-6, gradients that are rounded to bf16 as closely as the family's.

    A weight in fp32 is three matrices, and tensor cores cut bits off where they add: 2.8e-6 was seen with 2688 numbers in a row.
    """
    near = 4e-6 if device == "cuda" and options.get("weight_dtype") == torch.float32 else 2e-6
    truth = wide_step(reference_router, tokens, experts, top_k, hidden, form, reads, torch.float64, device, **options)
    theirs, ours = (wide_step(f, tokens, experts, top_k, hidden, form, reads, device=device, **options) for f in (reference_router, kernels.router))
    assert torch.equal(ours["ids"].sort(-1)[0], truth["ids"].sort(-1)[0])
    assert ours["logits"].dtype == torch.float32 and compare.error(ours["logits"].double(), truth["logits"]) < near
    assert compare.error(ours["weights"].double(), truth["weights"].double()) < near
    for key, dtype in {"dx": torch.bfloat16, "dweight": options.get("weight_dtype", torch.bfloat16)}.items():
        assert ours[key].dtype == dtype
        own = compare.error(theirs[key].double(), truth[key])
        limit = max(near, 1.5 * own) if dtype == torch.float32 else 1.02 * own  # scores next to 1 cancel, in the family's fp32 too
        assert compare.error(ours[key].double(), truth[key]) <= limit, key


def check_parts(device="cpu"):
    """Three bf16 numbers are an fp32 number, whatever its size."""
    wide = torch.randn(3, 700, generator=torch.Generator().manual_seed(0)).mul(10.0 ** torch.arange(-17, 18, 17).unsqueeze(1)).to(device)
    wide[0, :4] = torch.tensor([0.0, -1.0, 1 + 2**-23, 3.0e38])
    parts = kernels.in_parts(wide, 3)
    assert parts.shape == (3, 3, 700) and parts.dtype == torch.bfloat16 and torch.equal(parts.double().sum(0), wide.double())
    assert (parts[1].abs() <= parts[0].abs() * 2**-7).all()


# --- matching ------------------------------------------------------------------------------------------------------------------------

#: What the routers of families are: score, sum 1, corrected, groups, linear, result.
FOUND = {
    "qwen2_moe": ("softmax", False, False, 0, "own", "logits"),
    "qwen3_moe": ("softmax", False, False, 0, "own", "logits"),
    "olmoe": ("softmax", False, False, 0, "own", "logits"),
    "qwen3_next": ("softmax", True, False, 0, "own", "logits"),
    "mixtral": ("softmax", True, False, 0, "own", "scores"),
    "gpt_oss": ("chosen", True, False, 0, "own", "logits"),
    "deepseek_v3": ("sigmoid", True, True, 0, "float", "scores"),
    "glm4_moe": ("sigmoid", True, True, 0, "float", "scores"),
    "nemotron_h": ("sigmoid", True, True, 0, "float", "scores"),
    "llama4_text": None,
    "dbrx": None,
    "zaya": None,
    "phimoe": None,
}


def short(found):
    return (found.score, found.renormalise, bool(found.correction), found.groups, found.linear, found.result)


def found_routers(model):
    memo: dict = {}
    read = [(found.module, read_router(found.module, memo)) for found in Scan(model)]
    return [(module, made) for module, made in read if made is not None]


@pytest.mark.parametrize("name", FOUND)
def test_routers_of_families_are_found_by_what_they_compute(name):
    if zoo.available(name) is not None:
        pytest.skip(zoo.available(name))
    found = {short(made) for _, made in found_routers(zoo.build(name))}
    assert found == ({FOUND[name]} if FOUND[name] else set())


def test_real_sizes_and_groups():
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    sizes = {"num_experts_per_tok": 8, "num_local_experts": 256, "hidden_size": 7168}
    with torch.device("meta"):
        module = DeepseekV3TopkRouter(SimpleNamespace(**sizes, routed_scaling_factor=2.5, n_group=8, topk_group=4, norm_topk_prob=True))
    made = read_router(module, {})
    assert (made.groups, made.chosen_groups, made.group_score, made.zeroed, made.scale, made.eps) == (8, 4, "sum", False, 2.5, 1e-20)
    assert made.num_experts == 256 and made.hidden == 7168 and made.top_k == 8


class Plain(nn.Module):
    """A router of our own, whose parts tests replace."""

    def __init__(self):
        super().__init__()
        self.weight, self.k, self.factor = nn.Parameter(torch.randn(12, 24)), 3, 1.5

    def forward(self, x):
        logits = F.linear(x, self.weight)
        weights, ids = logits.softmax(-1, dtype=torch.float32).topk(self.k)
        return logits, weights * self.factor, ids


class Jitter(Plain):
    def forward(self, x):
        return super().forward(x * torch.empty_like(x).uniform_(0.9, 1.1) if self.training else x)


class Probabilities(Plain):
    def forward(self, x):
        logits, weights, ids = super().forward(x)
        return logits.softmax(-1), weights, ids


class Four(Plain):
    def forward(self, x):
        return *super().forward(x), x


class LowScores(Plain):
    def forward(self, x):
        logits = F.linear(x, self.weight)
        weights, ids = logits.softmax(-1).topk(self.k)
        return logits, weights * self.factor, ids


class Detached(Plain):
    def forward(self, x):
        logits, weights, ids = super().forward(x)
        return logits, weights.detach() + 0 * weights, ids


class Second(Plain):
    """Takes the experts from the second on."""

    def forward(self, x):
        logits = F.linear(x, self.weight)
        weights, ids = logits.softmax(-1, dtype=torch.float32).topk(self.k + 1)
        return logits, weights[:, 1:] * self.factor, ids[:, 1:]


def test_what_computes_something_else_is_left_alone():
    made = read_router(Plain(), {})
    assert made.scale == 1.5 and made.top_k == 3 and made.result == "scores"
    for other in (Jitter, Probabilities, Four, LowScores, Detached, Second):
        assert read_router(other().train(), {}) is None and (other is Jitter or read_router(other().eval(), {}) is None)
    assert read_router(Jitter().eval(), {}) is None
    assert read_router(nn.Linear(8, 4), {}) is None


# --- the patched module --------------------------------------------------------------------------------------------------------------


def patched(module, backend="reference"):
    return trial.inject(module, ROUTER.injections(read_router(module, {}), backend, None))


def test_hooks_state_and_undo():
    module, journal = Plain(), Journal()
    made = read_router(module, {})
    seen = []
    handle = module.register_forward_hook(lambda m, args, out: seen.append(out[0]))
    (mixin, state) = ROUTER.injections(made, "reference", None)[""]
    x = torch.randn(5, 24)
    before = module(x)
    journal.do(InjectClass(module, mixin, state))
    assert isinstance(module, Plain) and isinstance(module, PatchedRouter) and "reference" in repr(module) and "top-3" in repr(module)
    module(x)
    assert len(seen) == 2
    handle.remove()
    for twin in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(twin) is type(module) and all(torch.equal(a, b) for a, b in zip(twin(x=x), before, strict=True))
    journal.undo()
    assert type(module) is Plain


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_autocast_sequences_and_compile(backend):
    """On the CPU the kernels' function does in torch what the reference does."""
    name = "qwen3_moe"
    original = next(module for module, _ in found_routers(zoo.build(name)))
    ours = patched(copy.deepcopy(original), backend)
    x = torch.randn(2, 7, 64)
    for context in (torch.autocast("cpu", torch.bfloat16), torch.no_grad(), torch.enable_grad()):
        with context:
            theirs, got = original(x), ours(x)
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, theirs, strict=True))
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    assert all(torch.equal(a, b) for a, b in zip(compiled(x), original(x), strict=True))


def test_a_trial_does_not_count_ties():
    """Equal logits at the border of the choice: two right routers may choose differently."""
    module = Plain()
    module.weight.data = module.weight.data[:1].expand(12, -1).clone()
    logits, dense = ROUTER.call(module, torch.randn(6, 24))
    assert logits.shape == (6, 12) and not dense.any()


def test_a_replaced_weight_is_used():
    module = patched(Plain())
    x = torch.randn(4, 24)
    module.weight = nn.Parameter(torch.randn(12, 24))
    assert torch.equal(module(x)[0], F.linear(x, module.weight))


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_a_parametrized_weight_is_used():
    """As PEFT does for ``target_parameters``."""
    module = patched(Plain())
    x, weight = torch.randn(4, 24), module.weight.detach().clone()
    parametrize.register_parametrization(module, "weight", Doubled())
    assert isinstance(module, PatchedRouter) and torch.equal(module(x)[0], F.linear(x, 2 * weight))


def test_limits():
    assert kernels.too_large(spec(512, 10)) is None and kernels.too_large(spec(2048, 10)) and kernels.too_large(spec(64, 33))
    assert kernels.too_large(spec(96, 4, groups=8, chosen_groups=2)) and kernels.too_large(spec(60, 4)) is None


# --- the kernels, in Triton's interpreter --------------------------------------------------------------------------------------------


def check(form, tokens, experts, top_k, dtype, added=True):
    """Ours against plain torch on distinct logits: the same experts, weights to a rounding, gradients closely."""
    made, logits, correction, dlogits, dweights = given(form, tokens, experts, top_k, dtype)
    dlogits = dlogits if added else None
    ours, truth = (chosen(f, made, logits, correction, dlogits, dweights) for f in (kernels._Router, reference_choice))
    assert torch.equal(ours["ids"].sort(-1)[0], truth["ids"].sort(-1)[0]), (form, experts, top_k, dtype)
    if made.correction is None and not made.groups:
        assert (ours["sorted"].diff(dim=-1) <= 0).all()
    for key in ("weights", "grad"):
        assert ours[key].dtype == truth[key].dtype
        limit = 3e-6 if dtype == torch.float32 else 1e-3
        assert compare.error(ours[key].float(), truth[key].float()) < limit, (form, experts, top_k, dtype, key)


def check_ties_and_extremes():
    """Ties go to the lowest expert; -0 is 0; infinities and NaN leave ids within bounds, NaN first as in torch.topk."""
    for dtype in (torch.float32, torch.float16):
        logits = torch.tensor([[1.0, 2, 2, 2, 0, 1], [0.0, -0.0, 0.0, -0.0, -1, -1], [-7.0] * 6], dtype=dtype)
        ids = kernels._Router.apply(logits, None, spec(6, 4), torch.float32)[2]
        assert ids.tolist() == [[1, 2, 3, 0], [0, 1, 2, 3], [0, 1, 2, 3]]
        odd = torch.tensor([[float("-inf")] * 5 + [0.0], [1, float("inf"), 0, float("nan"), 2, float("-inf")]], dtype=dtype)
        ids = kernels._Router.apply(odd, None, spec(6, 3), torch.float32)[2]
        assert ids.tolist() == [[5, 0, 1], [3, 1, 4]]


def check_module():
    """The whole function, with the linear, sequences and all gradients."""
    generator = torch.Generator().manual_seed(0)
    made = spec(12, 3, bias="bias", renormalise=True)
    leaves = [torch.randn(shape, generator=generator).requires_grad_() for shape in ((2, 9, 32), (12, 32), (12,))]
    results = []
    for function in (kernels.router, reference_router):
        logits, weights, ids = function(*leaves, None, made)
        loss = (weights * torch.arange(1.0, 4)).sum() + logits.square().mean()
        results.append((logits.detach(), weights.detach(), ids, *torch.autograd.grad(loss, leaves)))
    assert all(compare.error(a, b) < 3e-6 for a, b in zip(*results, strict=True))


def check_no_wide_copy():
    """A weight in fp32 takes the bf16 GEMMs, but not under autocast, which would round it."""
    x, weight = torch.randn(5, 32).bfloat16().requires_grad_(), torch.randn(16, 32, requires_grad=True)
    for linear in ("float", "weight"):
        made = spec(linear=linear)
        assert kernels.router(x, weight, None, None, made)[0].grad_fn.name() == "_WideRouterBackward"
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(kernels.router(x, weight, None, None, made)[0], F.linear(x, weight))


def check_kernels():
    """fp16, since Triton's interpreter truncates to bf16 where GPUs round."""
    done = 0
    for form in FORMS:
        for tokens, experts, top_k, dtype in ((5, 16, 4, torch.float32), (70, 16, 3, torch.float16), (33, 64, 8, torch.float32)):
            check(form, tokens, experts, top_k, dtype, added=tokens != 33)
            done += 1
        if "groups" not in form:
            for experts, top_k in ((12, 1), (60, 5), (513, 10), (3, 3)):
                check(form, 7, experts, top_k, torch.float32)
                done += 1
    check_ties_and_extremes()
    check_module()
    for form in ("sigmoid, corrected", "sigmoid, corrected, groups", "softmax"):
        for reads in (("weights", "logits"), ("weights",), ("logits",)):
            check_wide_step(37, 16, 3, 32, form, reads)
            done += 1
            check_wide_step(37, 16, 3, 32, form, reads, weight_dtype=torch.float32)
            check_wide_step(5, 16, 3, 33, form, reads, weight_dtype=torch.float32, linear="weight")
            done += 2
    check_parts()
    check_no_wide_copy()
    print(f"{done} cases agree")


@needs_triton
def test_kernels_in_tritons_interpreter():
    passes_in_the_interpreter(__file__, "85 cases agree")


if __name__ == "__main__":
    check_kernels()

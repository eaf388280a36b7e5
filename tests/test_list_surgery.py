"""Whatever is done to a list of experts, before the patch or after it: the patched model does what plain does, or the site is refused in words."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import replace

import compare
import pytest
import torch
from listed import E, H, listed
from ranks import on_ranks
from test_interrupts import DO, Interrupt, places
from test_parallel import mesh_of
from torch import nn
from torch.nn.utils import parametrizations, prune

import moepatch
from moepatch.experts.listed import HELD

IDS = torch.randint(0, 32, (3, 7), generator=torch.Generator().manual_seed(0))
#: So few tokens that experts are left without any.
FEW = torch.tensor([[5, 5]])


def experts_of(model, layer=0):
    return model.layers[layer].mlp.experts


def is_patched(model, layer=0):
    return isinstance(model.layers[layer].mlp, moepatch.Patched)


def trained(model, ids=IDS, steps=2, optimizer=None):
    """Losses of some steps with weight decay, and the gradients of the first; None stays None."""
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters()], lr=0.01, weight_decay=0.3)
    losses, grads = [], {}
    for _ in range(steps):
        loss = model(ids)
        loss.backward()
        losses.append(loss.detach())
        grads = grads or {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(losses), grads


def assert_same(plain, patched, ids=IDS, **options):
    """Both train alike: losses, gradients (none where plain has none) and weights, under the same names."""
    (theirs, their_grads), (ours, our_grads) = trained(plain, ids, **options), trained(patched, ids, **options)
    assert compare.error(ours, theirs) <= 1e-5
    assert list(our_grads) == list(their_grads)
    assert {n for n, g in our_grads.items() if g is None} == {n for n, g in their_grads.items() if g is None}
    for name, grad in their_grads.items():
        if grad is not None and grad.abs().max() > 1e-6:
            assert compare.error(our_grads[name], grad) <= 1e-4, name
    wanted = plain.state_dict()
    assert list(patched.state_dict()) == list(wanted)
    for name, value in patched.state_dict().items():
        assert compare.error(value, wanted[name]) <= 1e-4, name


def pair():
    plain = listed()
    return plain, copy.deepcopy(plain)


# --- hooks -----------------------------------------------------------------------------------------------------------------------------


def _log(log, what):
    def hook(module, *args):
        log.append((what, *(tuple(a.shape) if isinstance(a, torch.Tensor) else len(a) for a in args)))

    return hook


def _grad_log(log):
    def hook(grad):
        log.append(round(float(grad.norm()), 4))

    return hook


MODULE_HOOKS = {
    "forward": lambda m, log: m.register_forward_hook(_log(log, "forward")),
    "pre": lambda m, log: m.register_forward_pre_hook(_log(log, "pre")),
    "backward": lambda m, log: m.register_full_backward_hook(_log(log, "backward")),
    "backward pre": lambda m, log: m.register_full_backward_pre_hook(_log(log, "backward pre")),
    "changes": lambda m, log: m.register_forward_hook(lambda m, a, out: out * 2),
}
PLACES = {
    "expert": lambda block: block.experts[1],
    "linear": lambda block: block.experts[2].w2,
    "act_fn": lambda block: block.experts[0].act_fn,
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("hook", MODULE_HOOKS)
def test_hooks_that_are_put_on_later_are_called(hook, place):
    logs = [], []
    models = pair()
    moepatch.optimize(models[1])
    for model, log in zip(models, logs, strict=True):
        handle = MODULE_HOOKS[hook](PLACES[place](model.layers[0].mlp), log)
    assert_same(*models)
    assert sorted(logs[0]) == sorted(logs[1]) and (logs[0] or hook == "changes")
    handle.remove()
    assert torch.equal(*(m(IDS) * 0 for m in models))


@pytest.mark.parametrize("place", PLACES)
def test_hooks_that_are_there_cost_their_site(place):
    logs = [], []
    models = pair()
    for model, log in zip(models, logs, strict=True):
        MODULE_HOOKS["forward"](PLACES[place](model.layers[0].mlp), log)
    moepatch.optimize(models[1])
    assert (is_patched(models[1], 0), is_patched(models[1], 1)) == (False, True)
    (refusal,) = moepatch.report(models[1]).plan.refusals
    name = {"expert": "experts.1", "linear": "experts.2.w2", "act_fn": "experts.0.act_fn"}[place]
    assert f"{name} has a forward hook (_log.<locals>.hook)" in refusal.reason and refusal.fqn == "layers.0.mlp.experts"
    assert_same(*models)
    assert sorted(logs[0]) == sorted(logs[1]) != []


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("place", ["gate", "experts", "block"])
def test_hooks_around_the_experts(place, when):
    """Nobody calls the list, so hooks on it are never called."""
    logs = [], []
    models = pair()
    if when == "after":
        moepatch.optimize(models[1])
    for model, log in zip(models, logs, strict=True):
        block = model.layers[0].mlp
        MODULE_HOOKS["forward"]({"gate": block.gate, "experts": block.experts, "block": block}[place], log)
    if when == "before":
        moepatch.optimize(models[1])
    assert is_patched(models[1])
    assert_same(*models)
    assert logs[0] == logs[1] and bool(logs[0]) == (place != "experts")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("ids", [IDS, FEW], ids=["all experts", "few experts"])
@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_gradients_are_called(hook, ids, when):
    logs = [], []
    models = pair()
    if when == "after":
        moepatch.optimize(models[1])
    for model, log in zip(models, logs, strict=True):
        for name, p in experts_of(model).named_parameters():
            note = _grad_log(log)
            getattr(p, hook)(note if hook == "register_hook" else lambda p, note=note: note(p.grad))
    if when == "before":
        moepatch.optimize(models[1])
    assert is_patched(models[1])
    assert_same(*models, ids=ids)
    assert sorted(logs[0]) == pytest.approx(sorted(logs[1]), rel=1e-3) and logs[0]


def test_a_hook_on_a_gradient_may_change_it():
    models = pair()
    moepatch.optimize(models[1])
    for model in models:
        experts_of(model)[3].w2.weight.register_hook(lambda grad: grad * 10)
    assert_same(*models)


# --- what is trained -------------------------------------------------------------------------------------------------------------------

FROZEN = {
    "one expert": lambda experts: experts[2].requires_grad_(False),
    "one matrix": lambda experts: experts[1].w3.weight.requires_grad_(False),
    "all but one": lambda experts: [e.requires_grad_(False) for e in list(experts)[1:]],
    "all": lambda experts: experts.requires_grad_(False),
    "down": lambda experts: [e.w2.requires_grad_(False) for e in experts],
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen_experts_stay_as_they_are(frozen, when):
    models = pair()
    if when == "after":
        moepatch.optimize(models[1])
    for model in models:
        FROZEN[frozen](experts_of(model))
    if when == "before":
        moepatch.optimize(models[1])
    before = {n: p.detach().clone() for n, p in models[1].named_parameters() if not p.requires_grad}
    assert is_patched(models[1]) and before
    assert_same(*models)
    for name, value in before.items():
        assert models[1].get_parameter(name).grad is None and torch.equal(models[1].get_parameter(name), value)
    moepatch.restore(models[1])
    assert_same(*models)


def test_experts_without_tokens_have_no_gradient():
    models = pair()
    moepatch.optimize(models[1])
    assert any(p.grad is None for p in (models[0](FEW).backward(), *models[0].parameters())[1:])
    models[0].zero_grad()
    assert_same(*models, ids=FEW)


def test_experts_that_are_called_without_tokens_have_gradients_of_zeros():
    class Calls(type(listed().layers[0].mlp)):
        def forward(self, hidden_states):
            flat = hidden_states.flatten(0, 1)
            logits = self.gate(flat)
            weights, chosen = torch.topk(logits.softmax(-1, dtype=torch.float), self.top_k)
            weights = weights / weights.sum(-1, keepdim=True)
            final = torch.zeros_like(flat)
            for index, expert in enumerate(self.experts):
                token, slot = torch.where(chosen == index)
                final.index_add_(0, token, expert(flat[token]) * weights[token, slot, None])
            return final.view_as(hidden_states), logits

    models = pair()
    for model in models:
        for layer in model.layers:
            layer.mlp.__class__ = Calls
    moepatch.optimize(models[1])
    assert moepatch.report(models[1]).patched and isinstance(models[1].layers[0].mlp, moepatch.Patched)
    assert_same(*models, ids=FEW)


def test_optimizers_and_gradients_from_before_the_patch_go_on():
    models = pair()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.1) for m in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        trained(model, steps=1, optimizer=optimizer)
        model(IDS).backward()
    before = dict(models[1].named_parameters())
    moepatch.optimize(models[1])
    assert all(p is before[n] and p.grad is not None for n, p in models[1].named_parameters())
    for change in (None, lambda: moepatch.restore(models[1])):
        for model, optimizer in zip(models, optimizers, strict=True):
            for _ in range(2):
                model(IDS).backward()
                optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        for name, value in models[0].state_dict().items():
            assert compare.error(models[1].state_dict()[name], value) <= 1e-4, name
        if change is not None:
            change()
    assert all(p is before[n] for n, p in models[1].named_parameters())
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in models[1].parameters())


def test_two_optimizers_and_accumulation():
    models = pair()
    moepatch.optimize(models[1])
    for model in models:
        chosen = list(experts_of(model)[0].parameters())
        rest = [p for p in model.parameters() if not any(p is c for c in chosen)]
        first, second = torch.optim.SGD(chosen, lr=0.1), torch.optim.Adam(rest, lr=0.01)
        for ids in (IDS, FEW, IDS):
            model(ids).backward()
            first.step()
            second.step()
            second.zero_grad()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        first.step()
    for name, value in models[0].state_dict().items():
        assert compare.error(models[1].state_dict()[name], value) <= 2e-5, name


def test_a_weight_that_is_changed_before_the_backward_pass_is_an_error_as_with_plain():
    models = pair()
    moepatch.optimize(models[1])
    for model in models:
        loss = model(IDS)
        with torch.no_grad():
            experts_of(model, 1)[int(model.layers[1].mlp.gate.weight.shape[0]) - 1].w2.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


# --- what the list is made of ----------------------------------------------------------------------------------------------------------


def _buffered(block):
    for expert in block.experts:
        expert.register_buffer("seen", torch.ones(1))


class _Scaled(type(listed().layers[0].mlp.experts[0])):
    def forward(self, x):
        return super().forward(x) * self.scale


def _scaled(block):
    for i, expert in enumerate(block.experts):
        expert.__class__, expert.scale = _Scaled, 1.0 + i


def _dropping(block, p):
    for expert in block.experts:
        expert.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(p))


def _wider(block):
    block.experts[1].w1, block.experts[1].w3 = nn.Linear(H, 32, bias=False), nn.Linear(H, 32, bias=False)
    block.experts[1].w2 = nn.Linear(32, H, bias=False)


def _lora(block, which):
    from peft.tuners.lora import LoraConfig, LoraModel  # noqa: F401
    from peft.tuners.lora.layer import Linear

    for i in which:
        block.experts[i].w1 = Linear(block.experts[i].w1, "default", config=LoraConfig(r=2), r=2, lora_alpha=4)


class _Tagged(nn.Parameter):
    pass


def _tie(block):
    block.experts[3].w1.weight = block.experts[0].w1.weight


def _flagged(block):
    for expert in block.experts:
        expert.register_buffer("flag", torch.tensor(True))


def _same_memory(block):
    block.experts[3].w1.weight.data = block.experts[0].w1.weight.data


#: What is done to the first layer's block, and words of the refusal; None: it is patched all the same.
FORMS = {
    "buffers": (_buffered, None),
    "flags in buffers": (_flagged, "its experts have a buffer that may decide what they compute (experts.0.flag)"),
    "a dropout of 0": (lambda block: _dropping(block, 0.0), None),
    "two indices, one expert": (lambda block: block.experts.__setitem__(3, block.experts[1]), "experts 1 and 3 of experts are one module"),
    "two experts, one weight": (_tie, "experts.0.w1.weight and experts.3.w1.weight are one parameter"),
    "two weights, one memory": (_same_memory, "experts.0.w1.weight shares its memory with another parameter"),
    "other sizes": (_wider, "its experts experts are not all alike"),
    "other attributes": (_scaled, "its experts experts are not all alike"),
    "dropout": (lambda block: _dropping(block, 0.5), "it drops numbers out in training (experts.0.act_fn.1, p=0.5)"),
    "another class": (lambda block: setattr(block.experts[2], "__class__", type("Mine", (type(block.experts[2]),), {})), "not all alike"),
    "mixed dtypes": (lambda block: block.experts[2].double(), "its weights have mixed dtypes (experts.0.w1.weight float32, experts.2.w1.weight float64)"),
    "mixed dtypes inside": (lambda block: [e.w2.double() for e in block.experts], "mixed dtypes"),
    "weight_norm": (lambda block: [parametrizations.weight_norm(e.w1) for e in block.experts], "experts.0.w1.weight is parametrized (_WeightNorm)"),
    "weight_norm of one": (lambda block: parametrizations.weight_norm(block.experts[2].w1), "2.w1.weight is parametrized (_WeightNorm)"),
    "spectral_norm": (lambda block: [nn.utils.spectral_norm(e.w1) for e in block.experts], "forward pre-hook (SpectralNorm)"),
    "old weight_norm": (lambda block: [nn.utils.weight_norm(e.w1) for e in block.experts], "forward pre-hook (WeightNorm)"),
    "pruned": (lambda block: prune.l1_unstructured(block.experts[1].w2, "weight", 0.5), "forward pre-hook (L1Unstructured)"),
    "a forward of its own": (lambda block: setattr(block.experts[1], "forward", lambda x: x), "experts.1 has a forward of its own"),
    "LoRA": (lambda block: _lora(block, range(E)), "LoRA layer stands at"),
    "LoRA of one": (lambda block: _lora(block, [2]), "LoRA layer stands at 2.w1"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_forms_of_lists(form):
    change, words = FORMS[form]
    models = pair()
    for model in models:
        torch.manual_seed(0)
        change(model.layers[0].mlp)
    ties = [len({id(p) for p in experts_of(m).parameters()}) for m in models]
    assert ties[0] == ties[1]
    moepatch.optimize(models[1])
    assert is_patched(models[1], 0) == (words is None) and is_patched(models[1], 1)
    if words is not None:
        assert any(words in r.reason for r in moepatch.report(models[1]).plan.refusals), [r.reason for r in moepatch.report(models[1]).plan.refusals]
    if "dtypes" not in form and form != "dropout":
        assert_same(*models)
    moepatch.restore(models[1])
    assert list(models[1].state_dict()) == list(models[0].state_dict())


@pytest.mark.parametrize("tied", ["embedding", "another list"])
def test_weights_that_are_tied_to_something_outside_stay_tied(tied):
    models = pair()
    for model in models:
        if tied == "embedding":
            model.extra = nn.Linear(H, 24, bias=False)
            model.extra.weight = experts_of(model)[1].w1.weight
        else:
            experts_of(model, 1)[2].w2.weight = experts_of(model, 0)[0].w2.weight
    moepatch.optimize(models[1])
    assert is_patched(models[1], 0) and is_patched(models[1], 1)
    assert_same(*models)
    if tied == "embedding":
        assert models[1].extra.weight is experts_of(models[1])[1].w1.weight
    else:
        assert experts_of(models[1], 1)[2].w2.weight is experts_of(models[1], 0)[0].w2.weight


def test_two_blocks_may_share_a_list():
    models = pair()
    for model in models:
        model.layers[1].mlp.experts = model.layers[0].mlp.experts
    moepatch.optimize(models[1])
    assert is_patched(models[1], 0) and is_patched(models[1], 1) and experts_of(models[1], 0) is experts_of(models[1], 1)
    assert_same(*models)
    copied = copy.deepcopy(models[1])
    assert experts_of(copied, 0) is experts_of(copied, 1) and torch.equal(copied(IDS), models[1](IDS))
    moepatch.restore(models[1])
    assert type(experts_of(models[1])) is nn.ModuleList
    assert_same(*models)


def test_a_shared_list_has_one_backend():
    model = listed()
    model.layers[1].mlp.experts = model.layers[0].mlp.experts
    plan = moepatch.plan(model)
    (pattern,) = [p for p in plan.patterns if p.site.kind == "expert_list"]
    others = [p for p in plan.patterns if p is not pattern]
    two = [replace(pattern, sites=(site,), backend=name) for site, name in zip(pattern.sites, ("torch", "reference"), strict=True)]
    with pytest.raises(moepatch.CheckFailed, match=r"layers\.1\.mlp\.experts: it is layers\.0\.mlp's too, and the plan has another backend there"):
        moepatch.optimize(model, plan=replace(plan, patterns=(*two, *others)))
    moepatch.optimize(model, plan=plan.without("layers.1.mlp"))
    assert is_patched(model, 0) and not is_patched(model, 1)
    plain = listed()
    plain.layers[1].mlp.experts = plain.layers[0].mlp.experts
    assert_same(plain, model)


def test_blocks_of_two_kinds_may_not_share_a_list():
    models = pair()
    for model in models:
        model.layers[1].mlp.top_k, model.layers[1].mlp.experts = 1, model.layers[0].mlp.experts
        model.more = copy.deepcopy(model.layers[0].mlp)
    moepatch.optimize(models[1])
    assert not is_patched(models[1], 0) and not is_patched(models[1], 1)
    assert "its list of experts experts is that of layers.1.mlp, too, which is another kind of block" in moepatch.report(models[1]).plan.refusals[0].reason
    assert_same(*models)


# --- what is done to a patched list ----------------------------------------------------------------------------------------------------


def _replace_one(block):
    torch.manual_seed(3)
    block.experts[1] = type(block.experts[0])()


def _grow(block):
    with torch.no_grad():
        for expert in block.experts:
            expert.w1.weight, expert.w3.weight, expert.w2.weight = (
                nn.Parameter(torch.cat([w, w], dim)) for w, dim in ((expert.w1.weight, 0), (expert.w3.weight, 0), (expert.w2.weight, 1))
            )


def _cut(block):
    for expert in block.experts:
        expert.w1.weight.data, expert.w3.weight.data = expert.w1.weight.data[:20], expert.w3.weight.data[:20]
        expert.w2.weight.data = expert.w2.weight.data[:, :20]


def _biased(block):
    block.experts[0].w1.bias = nn.Parameter(torch.ones(24))


def _swap(block):
    block.experts[0], block.experts[1] = block.experts[1], block.experts[0]


#: What may happen to a block after the patch.
LATER = {
    "another activation": lambda block: setattr(block.experts[1], "act_fn", nn.GELU()),
    "another expert": _replace_one,
    "an expert for two indices": lambda block: block.experts.__setitem__(0, block.experts[1]),
    "wider experts": _grow,
    "narrower experts": _cut,
    "LoRA": lambda block: _lora(block, range(E)),
    "LoRA of one": lambda block: _lora(block, [1]),
    "weight_norm": lambda block: parametrizations.weight_norm(block.experts[1].w1),
    "pruned": lambda block: prune.l1_unstructured(block.experts[1].w2, "weight", 0.5),
    "a bias": _biased,
    "a forward": lambda block: setattr(block.experts[1], "forward", lambda x: x * 2),
    "tied weights": _tie,
    "new weights": lambda block: setattr(block.experts[2].w1, "weight", nn.Parameter(block.experts[2].w1.weight * 2)),
    "other memory": lambda block: setattr(block.experts[2].w1.weight, "data", block.experts[2].w1.weight.data * 2),
    "written in place": lambda block: block.experts[2].w1.weight.data.mul_(2),
    "transposed memory": lambda block: setattr(block.experts[2].w1.weight, "data", block.experts[2].w1.weight.data.t().contiguous().t()),
    "a swapped pair": _swap,
}


#: What the report says from then on.
SAID = {
    "another activation": "1.act_fn is GELU",
    "another expert": "1 is Expert",
    "LoRA of one": "1.w1 is Linear",
    "weight_norm": "1.w1 has a parametrized weight (_WeightNorm)",
    "pruned": "1.w2 has a forward pre-hook (L1Unstructured)",
    "a forward": "1 has a forward of its own",
    "narrower experts": "the experts' weights is of several, or of others",
}


@pytest.mark.parametrize("later", LATER)
def test_what_happens_later_has_plains_effect(later):
    models = pair()
    moepatch.optimize(models[1])
    for model in models:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            LATER[later](model.layers[0].mlp)
    assert_same(*models)
    words = SAID.get(later)
    report = " ".join(str(moepatch.report(models[1])).split())  # it is as wide as the terminal
    assert words is None or words in report and "the family's own code computes there" in report, report
    moepatch.restore(models[1])
    assert type(experts_of(models[1])) is nn.ModuleList
    assert_same(*models)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_patched_list_moves_to_another_dtype_and_stays_together(dtype):
    models = pair()
    moepatch.optimize(models[1])
    buffers = vars(experts_of(models[1]))[HELD].joined
    for model in models:
        model.to(dtype)
    ours, theirs = models[1](IDS), models[0](IDS)
    assert ours.dtype == theirs.dtype and compare.error(ours, theirs) <= (1e-12 if dtype == torch.float64 else 2e-2)
    held = vars(experts_of(models[1]))[HELD]
    assert held.joined and held.joined is not buffers
    assert all(wholes.numbers is held.joined[name][0] for name, wholes in held.wholes().items())


def test_a_list_is_read_as_a_list():
    models = pair()
    moepatch.optimize(models[1])
    plain, experts = (experts_of(m) for m in models)
    assert len(experts) == E and isinstance(experts, nn.ModuleList) and len(experts[1:3]) == 2 and len(list(experts)) == E
    assert [n for n, _ in models[1].named_modules()] == [n for n, _ in models[0].named_modules()]
    assert [n for n, _ in models[1].named_parameters()] == [n for n, _ in models[0].named_parameters()]
    x = torch.randn(5, H)
    for mine, theirs in zip(experts, plain, strict=True):
        assert torch.equal(mine(x), theirs(x)) and torch.equal(mine.w2.weight, theirs.w2.weight)
    assert "Expert" in repr(experts)


def _pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": _pickled}


@pytest.mark.parametrize("how", COPIES)
def test_copies_are_models_of_their_own(how):
    models = pair()
    moepatch.optimize(models[1])
    copied = COPIES[how](models[1])
    held = vars(experts_of(copied))[HELD]
    assert held.joined and held is not vars(experts_of(models[1]))[HELD]
    assert {p.data_ptr() for p in copied.parameters()}.isdisjoint(p.data_ptr() for p in models[1].parameters())
    assert_same(models[0], copied)
    assert torch.equal(listed()(IDS), moepatch.restore(models[1])(IDS))
    moepatch.restore(copied)
    assert type(experts_of(copied)) is nn.ModuleList and torch.isclose(copied(IDS), models[0](IDS))


def test_states_go_from_one_to_the_other():
    models = pair()
    moepatch.optimize(models[1])
    trained(models[0])
    file = io.BytesIO()
    torch.save(models[1].state_dict(), file)
    plain = io.BytesIO()
    torch.save(models[0].state_dict(), plain)
    assert file.tell() <= 1.2 * plain.tell()
    assert not models[1].load_state_dict(models[0].state_dict(), strict=True).missing_keys
    assert compare.error(models[1](IDS), models[0](IDS)) <= 1e-5
    with pytest.raises(RuntimeError, match=r"Missing key.*layers\.1\.mlp\.experts\.2\.w1\.weight"):
        models[1].load_state_dict({k: v for k, v in models[0].state_dict().items() if k != "layers.1.mlp.experts.2.w1.weight"})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        models[1].load_state_dict({**models[0].state_dict(), "layers.1.mlp.experts.9.w1.weight": torch.ones(1)})
    models[1].load_state_dict({k: v * 0.5 for k, v in models[0].state_dict().items()}, assign=True)
    models[0].load_state_dict({k: v * 0.5 for k, v in models[0].state_dict().items()})
    assert_same(*models)


def test_averaged_copies():
    models = pair()
    moepatch.optimize(models[1])
    averages = [torch.optim.swa_utils.AveragedModel(m, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)) for m in models]
    for model, average in zip(models, averages, strict=True):
        for _ in range(2):
            trained(model, steps=1)
            average.update_parameters(model)
    assert compare.error(averages[1](IDS), averages[0](IDS)) <= 1e-5
    for name, value in averages[0].state_dict().items():
        assert compare.error(averages[1].state_dict()[name].float(), value.float()) <= 1e-5, name


@pytest.mark.parametrize("call", ["grad", "functional_call", "checkpoint", "compile"])
def test_other_ways_to_call(call):
    models = pair()
    moepatch.optimize(models[1])
    results = []
    for model in models:
        weights = {n: p.detach() * 1.1 for n, p in model.named_parameters()}
        if call == "grad":
            grads = torch.func.grad(lambda w, model=model: torch.func.functional_call(model, w, IDS))(weights)
        elif call == "functional_call":
            leaves = {n: w.requires_grad_() for n, w in weights.items()}
            grads = dict(zip(leaves, torch.autograd.grad(torch.func.functional_call(model, leaves, IDS), list(leaves.values())), strict=True))
        else:
            if call == "compile":
                loss = torch.compile(model, backend="eager")(IDS)
            else:
                loss = torch.utils.checkpoint.checkpoint(model, IDS, use_reentrant=False)
            loss.backward()
            grads = {n: p.grad for n, p in model.named_parameters()}
        results.append(grads)
    for name, grad in results[0].items():
        assert compare.error(results[1][name], grad) <= 1e-4, name


def test_weights_that_stand_in_for_one_call_leave_the_others_beside_each_other():
    models = pair()
    moepatch.optimize(models[1])
    for model in models:
        torch.func.functional_call(model, {n: p.detach() * 1.1 for n, p in model.named_parameters()}, IDS)
    assert len(vars(experts_of(models[1]))[HELD].joined) == 2
    assert_same(*models)


@pytest.mark.parametrize("when", ["before", "after"])
def test_what_a_compiled_list_reads_has_changed(when):
    models = pair()
    moepatch.optimize(models[1])
    compiled = torch.compile(models[1], backend="eager")
    if when == "after":
        assert compare.error(compiled(IDS), models[0](IDS)) <= 1e-5
    for model in models:
        experts_of(model)[2].act_fn = nn.GELU()
    assert compare.error(compiled(IDS), models[0](IDS)) <= 1e-5


def test_weights_that_lie_apart_are_said_to():
    model = listed()
    moepatch.optimize(model)
    assert not moepatch.report(model).notes
    model.load_state_dict(model.state_dict(), assign=True)
    model.load_state_dict({n: v.clone() for n, v in model.state_dict().items()}, assign=True)
    model(IDS)
    (note,) = moepatch.report(model).notes
    assert "layers.{0,1}.mlp.experts: the weights of the experts lie apart" in note
    model.to(IDS.device)
    model(IDS)
    assert not moepatch.report(model).notes


def test_hooks_on_all_experts_are_one_note():
    model = listed()
    moepatch.optimize(model)
    for module in model.modules():
        module.register_forward_pre_hook(lambda *unused: None)
    model(IDS)
    (note,) = [note for note in moepatch.report(model).notes if "family's own code" in note]
    assert note.startswith("layers.{0,1}.mlp.experts: an expert is called with more than its weights (0 has a forward pre-hook")


def test_meta_lists_are_patched_and_filled():
    with torch.device("meta"):
        model = type(listed())()
    moepatch.optimize(model)
    assert is_patched(model)
    model.to_empty(device="cpu")
    plain = listed()
    model.load_state_dict(plain.state_dict())
    assert vars(experts_of(model))[HELD].joined
    assert_same(plain, model)


def test_routing_is_recorded_and_forced():
    models = pair()
    moepatch.optimize(models[1])
    with moepatch.record_routing(models[1]) as record:
        models[1](IDS)
    assert [layer.tokens for layer in record.layers] == [2 * IDS.numel()] * 2
    with moepatch.balanced_routing(models[1]), moepatch.record_routing(models[1]) as record:
        models[1](IDS).backward()
    assert all(layer.tokens_E.max() - layer.tokens_E.min() <= 1 for layer in record.layers)


# --- interrupts and meshes -------------------------------------------------------------------------------------------------------------


def test_an_interrupt_leaves_the_list_as_it_was():
    model = listed()
    parameters, values = dict(model.named_parameters()), copy.deepcopy(model.state_dict())

    def assert_untouched():
        assert type(experts_of(model)) is nn.ModuleList and HELD not in vars(experts_of(model))
        for name, p in model.named_parameters():
            assert p is parameters[name] and torch.equal(p, values[name]) and p.untyped_storage().nbytes() == p.nbytes

    options = {"verify": False, "measure": False, "norm": None}
    with Interrupt(DO | {"join"}) as watched:
        moepatch.optimize(model, **options)
    moepatch.restore(model)
    assert_untouched()
    for at in places(watched.seen):
        with pytest.raises(KeyboardInterrupt), Interrupt(DO | {"join"}, at):
            moepatch.optimize(model, **options)
        if "_moepatch_patch" in vars(model):
            moepatch.restore(model)
        assert_untouched()


def _hooked(model):
    experts_of(model)[2].w2.weight.register_hook(lambda grad: grad * 2)


def _tied(model):
    model.layers[0].extra = nn.Linear(H, 24, bias=False)
    model.layers[0].extra.weight = experts_of(model)[1].w1.weight


def _shared(model):
    model.layers[0].more = nn.ModuleList([experts_of(model)])


#: What is lost where experts are stacked, and words for it.
LOST_ON_A_MESH = {
    "frozen": (lambda model: experts_of(model)[2].requires_grad_(False), "some of its experts are frozen and some are not (experts.2.w1.weight is)"),
    "hooked": (_hooked, "experts.2.w2.weight has a hook on its gradient (_hooked.<locals>.<lambda>)"),
    "tied": (_tied, "one of its experts' weights is that of layers.0.extra.weight, too"),
    "shared": (_shared, "its list of experts experts is part of another module, too"),
    "buffers": (lambda model: _buffered(model.layers[0].mlp), "its experts have buffers (experts.0.seen)"),
}


def on_a_mesh():
    torch.set_num_threads(1)
    mesh = mesh_of({"ep": 2})
    for change, words in LOST_ON_A_MESH.values():
        plain, model = listed(), listed()
        change(plain), change(model)
        moepatch.optimize(model, mesh, norm=None)
        assert not is_patched(model, 0) and is_patched(model, 1)
        (refusal,) = moepatch.report(model).plan.refusals
        assert words in refusal.reason, refusal.reason
        ours = model(IDS)
        assert compare.error(ours, plain(IDS)) <= 1e-5
        ours.backward()
        frozen = [p for p in model.parameters() if not p.requires_grad]
        assert all(p.grad is None for p in frozen) and len(frozen) == 3 * (change is LOST_ON_A_MESH["frozen"][0])
        with pytest.raises(moepatch.MoePatchError, match=r"Expert 0 is no module of its own now: on a mesh.*gate_up_proj, down_proj"):
            experts_of(model, 1)[0]
        with pytest.raises(moepatch.MoePatchError, match="no module of its own"):
            list(experts_of(model, 1))
        assert len(experts_of(model, 1)) == E and "gate_up" not in repr(experts_of(model, 0)) and repr(model)
        if change is not _shared:
            moepatch.restore(model)
            assert len(list(experts_of(model, 1))) == E and compare.error(model(IDS), plain(IDS)) <= 1e-5


def test_on_a_mesh_what_would_be_lost_costs_its_site():
    on_ranks(2, on_a_mesh)


# --- dtypes of the router --------------------------------------------------------------------------------------------------------------


def _wide_gate(block):
    block.gate.float()


class _Casts(type(listed().layers[0].mlp)):
    """Its gate computes in its own dtype."""

    def forward(self, hidden_states):
        flat = hidden_states.view(-1, hidden_states.shape[-1])
        logits = self.compute(flat)
        weights, chosen = torch.topk(torch.softmax(logits, dim=1, dtype=torch.float), self.top_k, dim=-1)
        weights = (weights / weights.sum(dim=-1, keepdim=True)).to(flat.dtype)
        final = torch.zeros_like(flat)
        for index in range(self.num_experts):
            token, slot = torch.where(chosen == index)
            if len(token):
                final.index_add_(0, token, self.experts[index](flat[token]) * weights[token, slot, None])
        return final.view_as(hidden_states), logits

    def compute(self, flat):
        return self.gate(flat.to(self.gate.weight.dtype))


class _Float(_Casts):
    def compute(self, flat):
        return nn.functional.linear(flat.float(), self.gate.weight.float())


class _FloatInput(_Casts):
    def compute(self, flat):
        return self.gate(flat.float())


#: The block's class and whether its gate is kept in fp32; and words of the refusal, or None.
GATES = {
    "kept and called in fp32": (_Casts, True, None),
    "kept in fp32, given fp32": (_FloatInput, True, None),
    "computed in fp32": (_Float, False, None),
    "kept and computed in fp32": (_Float, True, None),
    "kept in fp32, called in bf16": (None, True, "its own code does not run with a router in float32 and experts in bfloat16"),
    "kept in bf16, given fp32": (_FloatInput, False, "its own code does not run with a router in bfloat16 and experts in bfloat16"),
    "all in bf16": (None, False, None),
}


@pytest.mark.parametrize("gate", GATES)
def test_routers_of_another_dtype(gate):
    cls, wide, words = GATES[gate]
    models = pair()
    for model in models:
        model.bfloat16()
        for layer in model.layers:
            layer.mlp.__class__ = cls or type(layer.mlp)
            if wide:
                layer.mlp.gate.float()
    if words is None:
        moepatch.optimize(models[1])
        assert is_patched(models[1]) and moepatch.report(models[1]).patched == 2
        for got, wanted in zip(*(m.layers[0].mlp(torch.randn(2, 9, H, generator=torch.Generator().manual_seed(1)).bfloat16()) for m in models), strict=True):
            assert got.dtype == wanted.dtype and compare.error(got.float(), wanted.float()) <= 1e-2
        for name, grad in trained(models[0], steps=1)[1].items():
            assert grad is None or torch.isfinite(grad).all()
        trained(models[1], steps=1)
    else:
        with pytest.raises(moepatch.NothingMatched) as caught:
            moepatch.optimize(models[1])
        assert words in str(caught.value)

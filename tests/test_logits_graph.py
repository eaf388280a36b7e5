"""Deferred logits as a node of autograd: by whatever road somebody takes them, the loss and every gradient are those of the unpatched model.

Each road is a function of a model and its inputs that runs a backward pass. `FREE` are those that make no logits and no gradient of logits.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager

import compare
import pytest
import test_loss
import torch
import transformers
import zoo
from ranks import on_ranks
from test_loss import patch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from moepatch.errors import MoePatchError
from moepatch.layers.loss import deferred
from moepatch.layers.loss.deferred import DeferredLogits
from moepatch.layers.loss.gradient import DeferredGradient
from moepatch.layers.loss.head import Head

VOCAB = 120


def build(name, tied, **options):
    torch.manual_seed(0)
    common = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2,
    }  # fmt: skip
    config = transformers.AutoConfig.for_model(name, **common, tie_word_embeddings=tied, **options)
    config._attn_implementation = config._experts_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config)
    zoo.randomize_(model)
    return model.train()


MODELS = {
    "plain": lambda: build("qwen3_moe", False),
    "plain, tied": lambda: build("qwen3_moe", True),
    "softcap": lambda: build("gemma2", False, final_logit_softcapping=2.0),
    "softcap, tied": lambda: build("gemma2", True, final_logit_softcapping=2.0),
    "scaled": lambda: build("granitemoe", False, logits_scaling=4.0),
    "scaled, tied": lambda: build("granitemoe", True, logits_scaling=4.0),
}


@pytest.fixture(scope="module")
def pairs():
    """Models by name, each beside itself, patched."""
    made = {}
    for name, make in MODELS.items():
        plain = make()
        patched = copy.deepcopy(plain)
        patch(patched)
        made[name] = plain, patched
    return made


def inputs():
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids.masked_fill(torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.3, -100)}


def entropy(logits, reduction="mean", **options):
    return F.cross_entropy(logits[:, :-1].float().reshape(-1, VOCAB), inputs()["labels"][:, 1:].reshape(-1), reduction=reduction, **options)


class Same(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


class Detached(torch.autograd.Function):
    """As DeepSpeed's ZeRO-3 has them."""

    @staticmethod
    def forward(x):
        return x.detach()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        return grads


class Cloned(torch.autograd.Function):
    """As DDP's sink."""

    @staticmethod
    def forward(ctx, *tensors):
        ctx.set_materialize_grads(False)
        return tuple(t.clone() for t in tensors)

    @staticmethod
    def backward(ctx, *grads):
        return grads


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


@contextmanager
def hooked(modules, hook, kind="forward_hook"):
    handles = [getattr(module, f"register_{kind}")(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def finish(loss, *others):
    loss.backward()
    return [loss, *others]


def road_loss(m, x):
    return finish(m(**x).loss)


def road_another_loss_beside_it(m, x):
    out = m(**x)
    return finish(out.loss + 0.5 * entropy(out.logits))


def road_two_halves(m, x):
    logits = m(**x).logits
    y = x["labels"]
    return finish(sum(F.cross_entropy(logits[:, part].flatten(0, 1), y[:, part].flatten()) for part in (slice(0, 4), slice(4, None))))


def road_sequences_one_by_one(m, x):
    logits = m(**x).logits
    return finish(sum(F.cross_entropy(logits[i], x["labels"][i], reduction="sum") for i in range(2)))


def road_function(m, x):
    return finish(entropy(Same.apply(m(**x).logits)))


def road_clone(m, x):
    out = m(**x)
    loss, logits = Cloned.apply(out.loss, out.logits)
    return finish(loss)


def road_zero3(m, x):
    """Every module's inputs and outputs pass through a function."""

    def wrap(module, args, out=None):
        found = args if out is None else out
        if torch.is_tensor(found):
            return Detached.apply(found) if found.requires_grad else None
        return tuple(Detached.apply(t) if torch.is_tensor(t) and t.requires_grad else t for t in found) if isinstance(found, tuple) else None

    with hooked(m.modules(), wrap), hooked(m.modules(), wrap, "forward_pre_hook"):
        return finish(m(**x).loss)


def road_emptied_weight(m, x):
    """What frees weights after their module's forward, and brings them back before its backward."""
    weight = m.lm_head.weight
    kept, gone = weight.data, torch.empty(0)

    def before(module, args):
        weight.data = kept

    def after(module, args, out):
        weight.data = gone
        out.register_hook(lambda grad: before(None, None))

    with hooked([m.lm_head], before, "forward_pre_hook"), hooked([m.lm_head], after):
        return finish(m(**x).loss)


def road_freed_weight(m, x):
    """The same, by the memory itself, as FSDP does it."""
    weight = m.lm_head.weight
    kept, size = weight.detach().clone(), weight.untyped_storage().size()

    def before(module, args):
        weight.untyped_storage().resize_(size)
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(weight):
            weight.copy_(kept)

    def after(module, args, out):
        weight.untyped_storage().resize_(0)
        if out.requires_grad:
            out.register_hook(lambda grad: before(None, None))

    with hooked([m.lm_head], before, "forward_pre_hook"), hooked([m.lm_head], after):
        return finish(m(**x).loss)


def road_retained(m, x):
    out = m(**x)
    out.logits.retain_grad()
    out.loss.backward()
    return [out.loss, out.logits.grad]


def road_retained_unseen(m, x):
    out = m(**x)
    out.logits.retain_grad()
    return finish(out.loss)


def road_gradient_of_logits(m, x):
    out = m(**x)
    (grad,) = torch.autograd.grad(out.loss, out.logits, retain_graph=True)
    return finish(out.loss, grad)


def road_gradient_of_logits_handed_back(m, x):
    out = m(**x)
    (grad,) = torch.autograd.grad(out.loss, out.logits, retain_graph=True)
    out.logits.backward(grad)
    return [out.loss]


def road_a_leaf_between(m, x):
    logits = m(**x).logits
    leaf = logits.detach().requires_grad_()
    loss = entropy(leaf)
    loss.backward()
    logits.backward(leaf.grad)
    return [loss]


def road_hook_that_reads(m, x):
    out, seen = m(**x), []
    out.logits.register_hook(lambda grad: seen.append(grad.norm()))
    return finish(out.loss, *seen)


def road_hook_that_changes(m, x):
    out = m(**x)
    out.logits.register_hook(lambda grad: grad.clamp(-0.01, 0.01) * 2)
    return finish(out.loss)


def road_hook_that_writes(m, x):
    out = m(**x)
    out.logits.register_hook(lambda grad: grad.mul_(3.0))
    return finish(out.loss)


def road_hook_that_scales(m, x):
    """By the very numbers that families scale by, at each step between the head and the loss."""
    z = m(**x).logits
    z.register_hook(lambda grad: grad * 4.0)
    y = z * 4.0
    y.register_hook(lambda grad: grad * 4.0)
    return finish(entropy(y / 2.0))


def road_function_that_doubles(m, x):
    return finish(entropy(Doubled.apply(m(**x).logits)))


def road_function_on_the_heads_output(m, x):
    with hooked([m.lm_head], lambda module, args, out: Doubled.apply(out)):
        return finish(m(**x).loss)


def road_full_backward_hook(m, x):
    seen = []
    with hooked([m.lm_head], lambda module, grads, of: seen.extend([grads[0], of[0]]), "full_backward_hook"):
        return finish(m(**x).loss) + seen


def road_full_backward_hook_unread(m, x):
    with hooked([m.lm_head], lambda module, grads, of: None, "full_backward_hook"):
        return finish(m(**x).loss)


def road_full_backward_pre_hook(m, x):
    with hooked([m.lm_head], lambda module, of: (of[0] * 2,), "full_backward_pre_hook"):
        return finish(m(**x).loss)


def road_two_backwards(m, x):
    loss = m(**x).loss
    loss.backward(retain_graph=True)
    return finish(loss)


def road_argmax_first(m, x):
    out = m(**x)
    return finish(out.loss, (out.logits.argmax(-1) == x["labels"]).float().mean())


def road_z_loss(m, x):
    out = m(**x)
    return finish(out.loss + 1e-2 * out.logits.float().logsumexp(-1).square().mean())


def road_distillation(m, x):
    out = m(**x)
    teacher = torch.randn(out.logits.shape, generator=torch.Generator().manual_seed(3)).log_softmax(-1)
    return finish(out.loss + F.kl_div(out.logits.log_softmax(-1), teacher, log_target=True, reduction="batchmean"))


def road_smoothed(m, x):
    return finish(entropy(m(**x).logits, label_smoothing=0.1))


def road_class_weights(m, x):
    return finish(entropy(m(**x).logits, weight=torch.linspace(0.5, 2, VOCAB)))


def road_per_token(m, x):
    return finish((entropy(m(**x).logits, "none") * torch.linspace(0, 1, 16)).sum())


def road_log_probabilities(m, x):
    """As preference losses take them."""
    logp = m(**x).logits[:, :-1].log_softmax(-1).gather(-1, x["input_ids"][:, 1:, None]).squeeze(-1)
    return finish(-F.logsigmoid(logp.sum(-1)[0] - logp.sum(-1)[1]))


def road_learned_temperature(m, x):
    temperature = torch.tensor(1.5, requires_grad=True)
    loss = entropy(m(**x).logits * temperature)
    loss.backward()
    return [loss, temperature.grad]


def road_reentrant_checkpoint(m, x):
    embedded = m.get_input_embeddings()(x["input_ids"])
    out = checkpoint(lambda e: m(inputs_embeds=e, labels=x["labels"]).logits, embedded, use_reentrant=True)
    return finish(entropy(out))


def road_reentrant_checkpoint_of_the_loss(m, x):
    embedded = m.get_input_embeddings()(x["input_ids"])
    return finish(checkpoint(lambda e: m(inputs_embeds=e, labels=x["labels"]).loss, embedded, use_reentrant=True))


def road_checkpoint(m, x):
    return finish(checkpoint(lambda ids: m(input_ids=ids, labels=x["labels"]).loss, x["input_ids"], use_reentrant=False))


def road_replaced_cross_entropy(m, x):
    own, calls = F.cross_entropy, []

    def twice(*args, **kwargs):
        calls.append(1)
        return 2 * own(*args, **kwargs)

    F.cross_entropy = twice
    try:
        return finish(m(**x).loss, torch.tensor(len(calls)))
    finally:
        F.cross_entropy = own


def road_replaced_softmax(m, x):
    own = F.log_softmax
    F.log_softmax = lambda *args, **kwargs: 2 * own(*args, **kwargs)
    try:
        logp = F.log_softmax(m(**x).logits, -1)
        return finish(logp.gather(-1, x["input_ids"][..., None]).mean())
    finally:
        F.log_softmax = own


def road_gradient_penalty(m, x):
    loss = m(**x).loss
    weight = m.lm_head.weight
    (grad,) = torch.autograd.grad(loss, weight, create_graph=True)
    return finish(loss + grad.square().sum(), grad)


def road_gradient_penalty_of_logits(m, x):
    out = m(**x)
    (grad,) = torch.autograd.grad(out.loss, out.logits, create_graph=True)
    return finish(out.loss + 100 * grad.square().sum(), grad)


def road_written_into(m, x):
    out = m(**x)
    logits = out.logits * 1.0
    logits[..., 5] = -3.0
    return finish(entropy(logits) + out.loss)


def road_view_written_into(m, x):
    logits = m(**x).logits * 2.0
    cut = logits[:, :-1]
    cut.mul_(0.5)
    return finish(entropy(logits) + cut.square().mean())


def road_written_into_behind_a_view(m, x):
    logits = m(**x).logits * 2.0
    cut = logits[:, 1:]
    logits[..., 7] *= 0.25
    return finish(F.cross_entropy(cut.flatten(0, 1), x["input_ids"][:, 1:].flatten()))


def road_written_into_after_the_loss(m, x):
    out = m(**x)
    grads = []
    out.logits.register_hook(lambda grad: grads.append(grad + 0))
    with torch.no_grad():
        out.logits.fill_(3.0)
    return finish(out.loss, *grads)


def road_saved_tensor_hooks(m, x):
    """As what offloads activations: everything that is saved is copied."""
    with torch.autograd.graph.saved_tensors_hooks(lambda t: torch.empty_like(t).copy_(t), lambda t: t):
        return finish(m(**x).loss)


def road_function_transform(m, x):
    parameters = {name: p.detach().clone() for name, p in m.named_parameters()}
    grads, loss = torch.func.grad_and_value(lambda p: torch.func.functional_call(m, p, (), x).loss)(parameters)
    for name, p in m.named_parameters():
        p.grad = grads[name]
    return [loss]


def road_transform_of_the_logits(m, x):
    out = m(**x)
    grad = torch.func.grad(lambda z: z.float().logsumexp(-1).sum())(out.logits.detach())
    return finish((out.logits * grad).sum(), torch.vmap(lambda z: z.sum())(out.logits))


def road_functional_call(m, x):
    parameters = {name: p.detach().clone().requires_grad_() for name, p in m.named_parameters()}
    loss = torch.func.functional_call(m, parameters, (), x).loss
    loss.backward()
    for name, p in m.named_parameters():
        p.grad = parameters[name].grad
    return [loss]


def road_forward_mode(m, x):
    from torch.autograd import forward_ad

    with forward_ad.dual_level():
        embedded = m.get_input_embeddings()(x["input_ids"]).detach()
        dual = forward_ad.make_dual(embedded, torch.ones_like(embedded))
        loss = m(inputs_embeds=dual, labels=x["labels"]).loss
        value, tangent = forward_ad.unpack_dual(loss)
    return [value, tangent, *finish(m(**x).loss)]


def road_anomaly_mode(m, x):
    with torch.autograd.detect_anomaly(check_nan=True):
        return finish(m(**x).loss)


def road_autocast(m, x):
    with torch.autocast("cpu", torch.bfloat16):
        out = m(**x)
    return finish(out.loss * 0 + out.logits.float().square().mean())


def road_widened_outputs(m, x):
    """accelerate's wrapper of the forward."""
    from accelerate.utils.operations import convert_outputs_to_fp32

    out = convert_outputs_to_fp32(m.forward)(**x)
    return finish(out.loss, out.logits)


def road_gradient_accumulated_in_the_graph(m, x):
    out = m(**x)
    loss = (out.loss / 2 + entropy(out.logits) / 3) * 5
    loss.backward(inputs=[m.lm_head.weight])
    return [loss]


def road_inference_of_a_copy(m, x):
    out = m(**x)
    kept = copy.deepcopy(out.logits.detach())
    return finish(out.loss, kept, torch.from_numpy(out.logits.detach().numpy()), torch.tensor(out.logits.tolist()))


def road_compiled_loss(m, x):
    loss = torch.compile(lambda z, y: F.cross_entropy(z.float().view(-1, VOCAB), y.view(-1)), backend="aot_eager")
    try:
        return finish(loss(m(**x).logits, x["labels"]))
    finally:
        torch._dynamo.reset()


ROADS = {name.removeprefix("road_"): road for name, road in list(globals().items()) if name.startswith("road_")}
FREE = {
    *("loss", "another_loss_beside_it", "two_halves", "sequences_one_by_one", "function", "clone", "zero3", "emptied_weight", "retained_unseen"),
    *("gradient_of_logits_handed_back", "a_leaf_between", "full_backward_hook_unread", "replaced_cross_entropy", "saved_tensor_hooks", "functional_call"),
    *("checkpoint",),
}


@contextmanager
def counted(monkeypatch):
    """How often logits, gradients of logits and their products were computed."""
    counts = {"logits": 0, "gradients": 0, "products": 0}

    def counting(what, function):
        def call(*args, **kwargs):
            counts[what] += 1
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patched:
        patched.setattr(Head, "logits", counting("logits", Head.logits))
        patched.setattr(deferred, "_gradient", counting("gradients", deferred._gradient))
        patched.setattr(deferred, "_linear_backward", counting("products", deferred._linear_backward))
        yield counts


def walk(road, model):
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    found = [t.detach() + 0 for t in ROADS[road](model, inputs())]
    return found, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("road", ROADS)
def test_roads(road, name, pairs, monkeypatch):
    if road == "widened_outputs":
        pytest.importorskip("accelerate")
    plain, patched = copy.deepcopy(pairs[name])
    wanted, truths = walk(road, plain)
    with counted(monkeypatch) as counts:
        found, grads = walk(road, patched)
    assert len(found) == len(wanted)
    for a, z in zip(found, wanted, strict=True):
        assert type(a) is torch.Tensor and a.dtype == z.dtype and compare.error(a, z) <= 1e-5
    assert any(grad is not None for grad in truths.values())
    for key, truth in truths.items():
        assert (grads[key] is None) == (truth is None), key
        assert truth is None or compare.error(grads[key], truth) <= 2e-5, key
    if road in FREE:
        assert counts == {"logits": 0, "gradients": 0, "products": 0}

"""The whole attention module as one function: numbers and gradients of the long way, and when the long way is taken."""

from __future__ import annotations

import dataclasses

import compare
import pytest
import test_attention_block
import torch
import zoo
from torch import nn
from transformers import DynamicCache

from moepatch.kernels import rope as kernels
from moepatch.layers import attention_block
from moepatch.layers.attention.exact import plain_attention
from moepatch.layers.attention.masks import Mask
from moepatch.layers.attention_block import PatchedAttentionBlock
from moepatch.layers.rope import reference_heads

FAMILIES = ("qwen3_moe", "mixtral", "gpt_oss", "olmoe", "glm4_moe", "nemotron_h")


class Written:
    """An attention written out, behind the interface of a kernel without autograd."""

    own_sinks = False

    def __init__(self, tokens_first):
        self.tokens_first = tokens_first

    def by_head(self, out):
        return out.transpose(1, 2) if self.tokens_first else out

    def lse_by_head(self, lse):
        return lse

    def _whole(self, q, k, v, how):
        q, k, v = (self.by_head(t) for t in (q, k, v))
        mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
        mask = mask if how.window[0] < 0 else mask.triu(-how.window[0])
        scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * how.scale
        lse = scores.masked_fill(~mask, -torch.inf).logsumexp(-1)
        return self.by_head(plain_attention(q, k, v, mask[None, None], scale=how.scale)[0].transpose(1, 2)), lse

    def forward(self, q, k, v, how):
        out, lse = self._whole(q, k, v, how)
        return out.contiguous() if self.tokens_first else out, lse, ()

    def backward(self, grad, q, k, v, out, lse, rest, how):
        """From the result and log-sum-exp that are given, as kernels do it."""
        q, k, v, grad, out = (self.by_head(t) for t in (q, k, v, grad, out))
        times = q.shape[1] // k.shape[1]
        wide_k, wide_v = (t.repeat_interleave(times, 1) for t in (k, v))
        mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
        mask = mask if how.window[0] < 0 else mask.triu(-how.window[0])
        shares = (q @ wide_k.mT * how.scale - lse.unsqueeze(-1)).exp() * mask
        dscores = shares * (grad @ wide_v.mT - (grad * out).sum(-1, keepdim=True)) * how.scale
        grads = dscores @ wide_k, *(t.unflatten(1, (-1, times)).sum(2) for t in (dscores.mT @ q, shares.mT @ grad))
        return tuple(self.by_head(g) for g in grads)


def heads_forward(*args):
    q, k, *_ = reference_heads(*args)
    return q.transpose(1, 2).contiguous(), k.transpose(1, 2).contiguous()


def turn_heads(joint, spec, cos, sin):
    q, k, *_ = reference_heads(joint, spec, None, None, cos, sin)
    joint[..., : sum(spec.splits[:2])] = torch.cat([t.transpose(1, 2).flatten(2) for t in (q, k)], -1)


def heads_backward(joint, spec, q_weight, k_weight, cos, sin, grads):
    shape = grads[0].shape[0], grads[0].shape[2], sum(spec.splits)
    leaves = [t if t is None else t.detach().requires_grad_() for t in (joint if joint is not None else torch.zeros(shape), q_weight, k_weight)]
    with torch.enable_grad():
        outs = reference_heads(leaves[0], spec, *leaves[1:], cos, sin)[:3]
        wanted = [t for t in leaves if t is not None]
        found = list(torch.autograd.grad(outs, wanted, grads[:3]))
    return tuple(None if t is None else found.pop(0) for t in leaves)


@pytest.fixture
def calls(monkeypatch):
    """Lets the kernels' launches be done by the reference; counts the modules that were computed at once."""

    def direct(attend, module, form, mask, *, scaling, s_aux=None, **rest):
        window = mask.window if isinstance(mask, Mask) else (-1, 0)
        return (Written(tokens_first), attention_block_how(scaling, window, s_aux)) if isinstance(mask, Mask | None) else None

    tokens_first, done = False, []
    from moepatch.layers.attention.kernel import How as attention_block_how

    def counted(*args):
        done.append(1)
        return span(*args)

    span = attention_block.attention_span
    for name, function in (("heads_forward", heads_forward), ("turn_heads", turn_heads), ("heads_backward", heads_backward)):
        monkeypatch.setattr(kernels, name, function)
    monkeypatch.setattr(attention_block, "direct", direct)
    monkeypatch.setattr(attention_block, "attention_span", counted)

    def choose(first):
        nonlocal tokens_first
        tokens_first = first

    return done, choose


def patched(name):
    model = test_attention_block.build(name)
    model.config._attn_implementation, model.config.use_cache = "moepatch_reference", False
    test_attention_block.patch(model)
    blocks = [m for m in model.modules() if isinstance(m, PatchedAttentionBlock)]
    return model, blocks


def at_once(blocks):
    for block in blocks:
        block._moepatch = dataclasses.replace(block._moepatch, backend="triton")


@pytest.mark.parametrize("tokens_first", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_numbers_and_gradients_are_those_of_the_long_way(name, tokens_first, calls):
    if name in zoo.FAMILIES and (reason := zoo.available(name)) is not None:
        pytest.skip(reason)
    done, choose = calls
    choose(tokens_first)
    model, blocks = patched(name)
    before = test_attention_block.step(name, model)
    assert not done
    at_once(blocks)
    after = test_attention_block.step(name, model)
    assert len(done) == len(blocks)
    assert before.keys() == after.keys()
    assert not {key: e for key in before if (e := compare.error(after[key], before[key])) > 1e-5}


def test_frozen_weights_get_no_gradient(calls):
    model, blocks = patched("qwen3_moe")
    at_once(blocks)
    whole = test_attention_block.step("qwen3_moe", model)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_("k_proj" in key or "q_norm" in key)
    some = test_attention_block.step("qwen3_moe", model)
    assert {key for key in some if key != "logits"} == {key for key, p in model.named_parameters() if p.requires_grad}
    assert all(compare.error(some[key], whole[key]) < 1e-6 for key in some)


@pytest.mark.parametrize("what", ["hook", "lora", "autocast", "filled cache"])
def test_what_is_more_than_it_was_goes_the_long_way(what, calls, monkeypatch):
    done, _ = calls
    model, blocks = patched("qwen3_moe")
    at_once(blocks)
    long = []
    monkeypatch.setattr(PatchedAttentionBlock, "_heads", lambda *args: long.append(1) or 1 / 0)
    for block in blocks:
        if what == "hook":
            block.o_proj.register_forward_hook(lambda *args: None)
        elif what == "lora":
            block.q_proj = nn.Sequential(block.q_proj)
    given = test_attention_block.inputs("qwen3_moe", model)
    if what == "filled cache":
        cache, part = DynamicCache(config=model.config), torch.randn(2, blocks[0].config.num_key_value_heads, 3, blocks[0].head_dim)
        for layer in range(len(blocks)):
            cache.update(part, part, layer)
        given |= {"past_key_values": cache, "use_cache": True}
    with torch.autocast("cpu", torch.bfloat16, enabled=what == "autocast"), pytest.raises(ZeroDivisionError):
        model(**given)
    assert long and not done


@pytest.mark.parametrize("tokens_first", [False, True])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_a_cache_that_the_forward_makes_is_filled_and_differentiable(name, tokens_first, calls):
    """transformers makes one in training, too, unless it is told not to. gpt-oss has windows."""
    done, choose = calls
    choose(tokens_first)
    model, blocks = patched(name)
    given = {**test_attention_block.inputs(name, model), "use_cache": True}

    def step(with_logits=True):
        model.zero_grad(set_to_none=True)
        out = model(**given)
        kept = [t for layer in out.past_key_values.layers for t in (layer.keys, layer.values)]
        generator = torch.Generator().manual_seed(0)
        loss = sum((t * torch.randn(t.shape, generator=generator)).sum() for t in kept)
        (loss + out.loss if with_logits else loss).backward()
        return {**{str(i): t.detach() for i, t in enumerate(kept)}, **{key: p.grad for key, p in model.named_parameters() if p.grad is not None}}

    before, only = step(), step(with_logits=False)
    assert not done
    at_once(blocks)
    after, only_after = step(), step(with_logits=False)
    assert len(done) == 2 * len(blocks)
    assert before.keys() == after.keys()
    assert not {key: e for key in before if (e := compare.error(after[key], before[key])) > 1e-5}
    # The last layer's output has no part in the caches.
    assert not {key: e for key in only if (e := compare.error(only_after[key], only[key])) > 1e-5}

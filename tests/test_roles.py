"""What an argument is called decides nothing: attention modules and mixers whose arguments have names of their own, caches of every kind."""

from __future__ import annotations

import inspect

import compare
import pytest
import torch
import zoo
from torch import nn
from transformers import DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: F401  (an attention module's own code is looked up here)
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention
from transformers.models.jamba.modeling_jamba import JambaMambaMixer
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention, apply_rotary_pos_emb, eager_attention_forward
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

import moepatch
from moepatch import trial
from moepatch.layers.attention_block import PatchedAttentionBlock
from moepatch.layers.latent import PatchedLatent
from moepatch.layers.mixers.delta import PatchedDelta
from moepatch.layers.mixers.selective import PatchedSelective
from moepatch.layers.mixers.ssd import PatchedSSD
from moepatch.layers.roles import ByRole, decorated


class _Computed(Qwen3MoeAttention):
    """Writes out what its base does: subclasses call it with whatever they are called with."""

    def _compute(self, x, rotary, hidden_keys, memory, update, handed):
        shape = (*x.shape[:-1], -1, self.head_dim)
        q, k = self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2), self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2)
        v = self.v_proj(x).view(shape).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, *rotary)
        if memory is not None:
            k, v = update(memory, k, v)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        y, weights = attend(self, q, k, v, hidden_keys, dropout=dropout, scaling=self.scaling, sliding_window=self.sliding_window, **handed)
        return self.o_proj(y.reshape(*x.shape[:-1], -1).contiguous()), weights


class Renamed(_Computed):
    """No name is the family's, and the tokens are not the first."""

    def forward(self, rotary, x, hidden_keys, *, memory=None, **rest):
        return self._compute(x, rotary, hidden_keys, memory, lambda m, k, v: m.update(k, v, self.layer_idx), rest)


class TellsTheCache(_Computed):
    def forward(self, x, rotary, hidden_keys, memory=None, **rest):
        return self._compute(x, rotary, hidden_keys, memory, lambda m, k, v: m.update(k, v, layer_idx=self.layer_idx, kwargs=rest), rest)


class HandsOn(_Computed):
    """An argument becomes a keyword of another name, another one is not used, and the cache gets one, too."""

    def forward(self, x, rotary, hidden_keys, memory=None, flavour=7, unused=None, **rest):
        return self._compute(x, rotary, hidden_keys, memory, lambda m, k, v: m.update(k, v, self.layer_idx, flavour), {"taste": flavour, **rest})


class Closed(_Computed):
    def forward(self, x, rotary, hidden_keys, memory=None):
        return self._compute(x, rotary, hidden_keys, memory, lambda m, k, v: m.update(k, v, self.layer_idx), {})


class LooksAtTheCache(_Computed):
    def forward(self, x, rotary, hidden_keys, memory=None, **rest):
        x = x * 2 if memory is not None and memory.get_seq_length() > 5 else x
        return self._compute(x, rotary, hidden_keys, memory, lambda m, k, v: m.update(k, v, self.layer_idx), rest)


class Branches(_Computed):
    def forward(self, x, rotary, hidden_keys, memory=None, louder=None, **rest):
        x = x if louder is None else 2 * x
        return self._compute(x, rotary, hidden_keys, memory, lambda m, k, v: m.update(k, v, self.layer_idx), rest)


class FromNowhere(_Computed):
    def forward(self, x, rotary, hidden_keys, memory=None, **rest):
        return self._compute(x, rotary, hidden_keys, memory, lambda m, k, v: m.update(k, v, self.layer_idx, object()), rest)


class RenamedLatent(DeepseekV3Attention):
    def forward(self, x, rotary, hidden_keys, memory=None, **rest):
        return super().forward(x, rotary, hidden_keys, memory, **rest)


def mixer(base):
    class RenamedMixer(base):
        def forward(self, x, memory=None, kept=None, **rest):
            return super().forward(x, memory, kept, **rest)

    return RenamedMixer


_NAMES = {"hidden_states": "x", "position_embeddings": "rotary", "past_key_values": "memory", "cache_params": "memory", "cache": "memory"}
#: A family, the class whose modules get other arguments, what they become, and what they are patched with.
CASES = {
    "no name is the family's": ("qwen3_moe", Qwen3MoeAttention, Renamed, PatchedAttentionBlock),
    "the cache is told": ("qwen3_moe", Qwen3MoeAttention, TellsTheCache, PatchedAttentionBlock),
    "handed on": ("qwen3_moe", Qwen3MoeAttention, HandsOn, PatchedAttentionBlock),
    "closed": ("qwen3_moe", Qwen3MoeAttention, Closed, PatchedAttentionBlock),
    "latent": ("deepseek_v3", DeepseekV3Attention, RenamedLatent, PatchedLatent),
    "ssd": ("nemotron_h", NemotronHMamba2Mixer, mixer(NemotronHMamba2Mixer), PatchedSSD),
    "delta": ("qwen3_next", Qwen3NextGatedDeltaNet, mixer(Qwen3NextGatedDeltaNet), PatchedDelta),
    "selective": ("jamba", JambaMambaMixer, mixer(JambaMambaMixer), PatchedSelective),
}


def renamed(name, before, after):
    """A model whose modules of one class are of another one, and are called by its names."""
    model = zoo.build(name)
    names = list(inspect.signature(after.forward).parameters)
    masks = "kept" if "kept" in names else "hidden_keys"

    def rename(module, args, kwargs):
        kwargs = {{"attention_mask": masks, **_NAMES}.get(key, key): value for key, value in kwargs.items()}
        if args:  # tokens come first in every family
            kwargs["x"], args = args[0], ()
        return args, kwargs if "rest" in names else {key: value for key, value in kwargs.items() if key in names}

    for module in model.modules():
        if type(module) is before:
            module.__class__ = after
            module.register_forward_pre_hook(rename, with_kwargs=True)
    return model


def tokens(model, **options):
    ids = torch.randint(3, zoo.VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return model.eval().generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0, **options)


@pytest.mark.parametrize("case", CASES)
def test_a_module_with_names_of_its_own_is_patched_and_exact(case):
    """In training, and generating with a cache that grows and a static one."""
    name, before, after, mixin = CASES[case]
    model = renamed(name, before, after)
    caches = [{}] if "mixers" in mixin.__module__ else [{}, {"cache_implementation": "static"}]
    outputs, grads = compare.step(name, model.train())
    made = [tokens(model, **options) for options in caches]
    moepatch.optimize(model.train(), verify=False)
    assert {type(m)._moepatch_parts[0] for m in model.modules() if isinstance(m, after)} == {mixin}
    ours, our_grads = compare.step(name, model)
    assert {key: e for key, truth in outputs.items() if (e := compare.error(ours[key], truth)) > 1e-5} == {}
    assert {key: e for key, truth in grads.items() if (e := compare.error(our_grads[key], truth)) > 1e-5} == {}
    assert all(torch.equal(tokens(model, **options), truth) for options, truth in zip(caches, made, strict=True))


@pytest.mark.parametrize(
    ("after", "reason"),
    [
        (LooksAtTheCache, "the argument `memory` decides what the module does"),
        (Branches, "the argument `louder` decides what the module does"),
        (FromNowhere, "the cache gets argument 3, which comes from nowhere that is known"),
    ],
)
def test_an_argument_that_decides_something_is_named(after, reason):
    found = moepatch.plan(renamed("qwen3_moe", Qwen3MoeAttention, after))
    assert "attention_block" not in {pattern.site.kind for pattern in found.patterns}
    assert {near.reason for near in found.left if near.kind == "attention_block"} == {reason}


def first(model, mixin):
    return next(m for m in model.modules() if isinstance(m, mixin))


class Changes:
    """A cache that changes the keywords of the call, as those of continuous batching do."""

    def __init__(self):
        self.given = []

    def update(self, key, value, *args, **kwargs):
        self.given.append((args, dict(kwargs.get("kwargs", {}))))
        if "kwargs" in kwargs:
            kwargs["kwargs"]["scores_bias"] = 3
        return key, value


@pytest.mark.parametrize("case", ["the cache is told", "handed on"])
def test_what_a_cache_is_given_and_changes(case):
    """It gets the dict that the attention function's keywords are taken from afterwards."""
    name, before, after, mixin = CASES[case]
    plain = renamed(name, before, after)
    patched = moepatch.optimize(renamed(name, before, after), verify=False)
    seen = []
    names = "rotary x hidden_keys memory".split()
    x, tables = torch.randn(2, 5, 64), (torch.randn(1, 5, 16), torch.randn(1, 5, 16))
    for module in (first(plain, after), first(patched, mixin)):
        module.config._attn_implementation_internal = "moepatch_recorder"
        module._moepatch_given, module._moepatch_attempt, cache = [], False, Changes()
        module(**dict(zip(names, (tables, x, None, cache), strict=True)), colour="red")
        seen.append((module._moepatch_given[0], cache.given))
    (theirs, told), (ours, told_too) = seen
    assert told == told_too and len(told) == 1 and ours.keys() == theirs.keys() and ours["colour"] == "red"
    if case == "handed on":
        assert ours["taste"] == 7 and told[0][0] == (0, 7)
    else:
        assert ours["scores_bias"] == 3 and told[0][1] == {"colour": "red"}


def test_calls_that_the_family_refuses_are_refused_in_its_words():
    name, before, after, mixin = CASES["closed"]
    module = first(moepatch.optimize(renamed(name, before, after), verify=False), mixin)
    forward = type(module).forward
    x, tables = torch.randn(2, 5, 64), (torch.randn(1, 5, 16), torch.randn(1, 5, 16))
    for args, kwargs in [((x,), {}), ((x, tables, None, None, None), {}), ((x, tables, None), {"colour": 1}), ((x, tables, None), {"x": x})]:
        with pytest.raises(TypeError, match="forward"):
            forward(module, *args, **kwargs)


#: What 5.24 called otherwise before.
FORMER = {
    "qwen3_moe": ("past_key_values", PatchedAttentionBlock),
    "deepseek_v3": ("past_key_values", PatchedLatent),
    "nemotron_h": ("cache_params", PatchedSSD),
}


@pytest.mark.parametrize("name", FORMER)
def test_former_names_go_on_working(name):
    """They do what they do in the family's own forward, warnings included."""
    old, mixin = FORMER[name]
    model = zoo.build(name)
    module = next(m for m in model.modules() if isinstance(m, (NemotronHMamba2Mixer, Qwen3MoeAttention, DeepseekV3Attention)))
    if old in inspect.signature(trial.eager_forward(module)).parameters:
        pytest.skip("the names of transformers ≥ 5.24")
    x, tables = torch.randn(2, 5, 64), (torch.randn(1, 5, 8 if name == "deepseek_v3" else 16), torch.randn(1, 5, 8 if name == "deepseek_v3" else 16))
    given = {} if name == "nemotron_h" else {"position_embeddings": tables, "attention_mask": None}

    def kept(**names):
        cache = fresh(model)
        y = module(hidden_states=x, **given, **{key: cache if value is None else value for key, value in names.items()})
        return [y[0] if isinstance(y, tuple) else y, *states(cache)]

    before = kept(cache=None)
    moepatch.optimize(model.eval(), verify=False)
    assert isinstance(module, mixin)
    with pytest.warns(FutureWarning, match=f"`{old}` is deprecated .* Use `cache` instead"):
        after = kept(**{old: None})
    assert all(compare.error(a, b) < 1e-5 for a, b in zip(after, before, strict=True)) and len(before) > 1
    with pytest.warns(FutureWarning, match="Both"):
        assert len(kept(**{old: "nothing", "cache": None})) == len(before)


def fresh(model):
    return DynamicCache(config=model.config)


def states(cache):
    known = (t for layer in cache.layers for name in ("keys", "values", "conv_states", "recurrent_states") for t in [vars(layer).get(name)])
    flat = (t for value in known if value is not None for t in (value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]))
    return [t for t in flat if isinstance(t, torch.Tensor) and t.numel()]


def test_decorators_are_put_around_another_function():
    def louder(by):
        def decorator(function):
            def wrapped(self, *args, **kwargs):
                return function(self, *args, **kwargs) * by

            wrapped.__wrapped__ = function
            return wrapped

        return decorator

    @louder(2)
    @louder(5)
    def outer(self, x):
        return x

    assert decorated(outer, lambda self, x: x + 1)(None, 2) == 30 and outer(None, 2) == 20
    assert issubclass(PatchedAttentionBlock, ByRole) and issubclass(PatchedLatent, ByRole)


@pytest.mark.parametrize("implementation", ["static", "dynamic"])
def test_a_static_cache_of_the_callers(implementation):
    """Prefill and one more token, with positions that a static cache counts itself."""
    model = zoo.build("gpt_oss").eval()  # with windows
    ids = torch.randint(3, zoo.VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))

    def logits():
        cache = StaticCache(config=model.config, max_cache_len=16) if implementation == "static" else fresh(model)
        with torch.no_grad():
            return [model(part, past_key_values=cache, use_cache=True).logits for part in (ids[:, :8], ids[:, 8:])]

    before = logits()
    moepatch.optimize(model, verify=False)
    assert isinstance(first(model, PatchedAttentionBlock), nn.Module)
    assert all(compare.error(a, b) < 1e-5 for a, b in zip(logits(), before, strict=True))

"""What changes after the patch of that which a family reads at each call: a patched model does what plain does, and the report says so."""

from __future__ import annotations

import copy
import io
import pickle

import compare
import pytest
import torch
import zoo
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3_file

import moepatch
from moepatch.surgery import Patched


@pytest.fixture(scope="module")
def pairs():
    """``pairs(name)``: a plain model and a patched copy, made once; tests put back what they change."""
    made = {}

    def pair(name):
        if name not in made:
            plain = zoo.build(name).train()
            made[name] = plain, moepatch.optimize(copy.deepcopy(plain), verify=False, measure=False)
        return made[name]

    return pair


def logits(name, model):
    torch.manual_seed(0)
    with torch.no_grad():
        return zoo.first_float(model(**{key: value for key, value in zoo.inputs(name, model).items() if key != "labels"}))


def alike(name, plain, patched):
    return compare.error(logits(name, patched), logits(name, plain)) < 1e-5


class changed:
    """While it is entered, an attribute, or an entry of a dict, of all modules of a class is another one, in both models."""

    def __init__(self, models, where, name, value):
        self.holders = [holder for model in models for holder in where(model)]
        self.name, self.value = name, value

    def __enter__(self):
        assert self.holders
        self.before = [getattr(holder, self.name) for holder in self.holders]
        for holder in self.holders:
            setattr(holder, self.name, self.value(getattr(holder, self.name)) if callable(self.value) else self.value)

    def __exit__(self, *raised):
        for holder, value in zip(self.holders, self.before, strict=True):
            setattr(holder, self.name, value)


def named(end):
    return lambda model: [module for fqn, module in model.named_modules() if fqn.endswith(end)]


#: Family, modules by the end of their names, attribute, value or function of the old one, what the report says.
ROWS = {
    "top_k": ("qwen3_moe", "mlp.gate", "top_k", 4, "top_k is 4 and was 2"),
    "norm_topk_prob": ("qwen3_moe", "mlp.gate", "norm_topk_prob", lambda old: not old, "norm_topk_prob"),
    "eps": ("qwen3_moe", "input_layernorm", "variance_epsilon", 0.3, "variance_epsilon is 0.3"),
    "eps of a norm inside attention": ("qwen3_moe", "q_norm", "variance_epsilon", 0.3, "variance_epsilon is 0.3"),
    "activation": ("qwen3_moe", "mlp.experts", "act_fn", lambda old: nn.GELU(), "act_fn is GELU and was SiLUActivation"),
    "scaling of attention": ("qwen3_moe", "self_attn", "scaling", 0.7, None),
    "limit": ("gpt_oss", "mlp.experts", "limit", 0.05, "limit is 0.05"),
    "alpha": ("gpt_oss", "mlp.experts", "alpha", 0.3, "alpha is 0.3"),
    "routed_scaling_factor": ("deepseek_v3", "mlp", "routed_scaling_factor", 3.5, None),
    "activation of a dense MLP": ("deepseek_v3", "layers.0.mlp", "act_fn", lambda old: nn.Tanh(), "act_fn is Tanh"),
    "residual_multiplier": ("granitemoe", "layers.1", "residual_multiplier", 3.0, None),
    "top_k of a scored block": ("llama4_text", "feed_forward.router", "top_k", 2, None),
}


@pytest.mark.parametrize("row", ROWS)
def test_a_value_that_is_changed_after_the_patch_counts(pairs, row):
    name, end, attribute, value, words = ROWS[row]
    if zoo.available(name) is not None:
        pytest.skip(zoo.available(name))
    plain, patched = pairs(name)
    before = logits(name, plain)
    with changed((plain, patched), named(end), attribute, value):
        moved = compare.error(logits(name, plain), before)
        assert moved > 1e-4, "the change does nothing"
        assert alike(name, plain, patched)
        if words is not None:
            assert any(words in note and end in note and "family's own code computes" in note for note in moepatch.report(patched).notes)
    assert alike(name, plain, patched)
    assert not any(module.changes() for module in patched.modules() if isinstance(module, Patched))
    if words is not None:
        assert any("for a time" in note for note in moepatch.report(patched).notes)

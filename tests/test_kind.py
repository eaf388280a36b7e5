"""How modules of a kind are set up to be timed: as they run after `optimize`, and in a training step."""

from __future__ import annotations

import pytest
import torch
import zoo

import moepatch
from moepatch.kinds import KINDS
from moepatch.layout.adjacent import adjacent
from moepatch.replica import random_fill, replica
from moepatch.trial import run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def patterns():
    """Of models whose attention is plain, and latent; by the name of their kind."""
    models = [zoo.build(name) for name in ("qwen2_moe", "deepseek_v3")]
    return {pattern.site.kind: (model, pattern.site) for model in models for pattern in moepatch.plan(model).patterns}


def copied(module):
    return replica(module, {}, random_fill(torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(("kind", "leaf"), [("attention_block", "weight"), ("attention_block", "bias"), ("mlp", "weight")])
def test_weights_lie_as_optimize_leaves_them(patterns, kind, leaf):
    model, site = patterns[kind]
    kind, original = KINDS[kind], model.get_submodule(site.fqn)
    before = {name: p.data_ptr() for name, p in original.named_parameters()}
    names = [f"{name}.{leaf}" for name in site.spec.inputs]
    tried, timed = (make(original, site.spec, "reference", copied) for make in (kind.subject, kind.at_work))
    assert adjacent(*map(tried.get_parameter, names)) is None and adjacent(*map(timed.get_parameter, names)) is not None
    assert {name: p.data_ptr() for name, p in original.named_parameters()} == before
    family = kind.at_work(original, site.spec, None, copied)
    assert adjacent(*map(family.get_parameter, names)) is None


@pytest.mark.parametrize("kind", ["attention_block", "latent"])
def test_tables_get_no_gradient_where_backends_are_timed(patterns, kind):
    model, site = patterns[kind]
    arguments = site.spec, torch.float32, CPU, torch.Generator().manual_seed(0)
    timed, tried = KINDS[kind].bench(*arguments, 24), KINDS[kind].trial(*arguments)
    call = timed.trainable()
    assert [leaf.requires_grad for leaf in call.leaves()] == [True] and call.leaves()[0] is call.kwargs["hidden_states"]
    assert not any(table.requires_grad for table in call.kwargs["position_embeddings"])
    assert len(tried.leaves()) == 3  # a trial compares all gradients
    found = run(KINDS[kind].at_work(model.get_submodule(site.fqn), site.spec, "reference", copied), timed)
    assert "grad input 0" in found and "grad input 1" not in found

"""What patched attention modules go on doing, of whatever kind: checks for tests that know how to build, feed and patch a model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import compare
import pytest
import torch
import zoo
from torch import nn


class Behaviour(NamedTuple):
    """The checks.

    Attributes:
        build: a model by name.
        inputs: ``(name, model)`` to what its forward takes.
        patch: patches all attention modules and returns the journal.
        patched: the modules that are.
    """

    build: Callable[[str], nn.Module]
    inputs: Callable[[str, nn.Module], dict[str, Any]]
    patch: Callable[[nn.Module], Any]
    patched: Callable[[nn.Module], list[nn.Module]]

    def step(self, name, model):
        """Logits and gradients."""
        model.zero_grad(set_to_none=True)
        torch.manual_seed(0)
        out = model(**self.inputs(name, model))
        zoo.loss(out).backward()
        return {"logits": out.logits.detach()} | {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    def computes_the_same(self, name, look):
        """Numbers, names and parameters; ``look(model)`` sees the patched one. The way back is exact."""
        model = self.build(name)
        model.set_attn_implementation("eager")
        before = self.step(name, model)
        keys, parameters = list(model.state_dict()), dict(model.named_parameters())
        journal = self.patch(model)
        look(model)
        after = self.step(name, model)
        assert before.keys() == after.keys()
        assert not {key: e for key in before if (e := compare.error(after[key], before[key])) > 1e-5}
        assert list(model.state_dict()) == keys and all(p is parameters[key] for key, p in model.named_parameters())
        journal.undo()
        assert not self.patched(model)
        assert all(torch.equal(value, before[key]) for key, value in self.step(name, model).items())

    def generates_with_a_cache(self, name):
        """The same tokens, from padded prompts."""
        model = self.build(name).eval()
        ids = torch.randint(3, zoo.VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))
        mask = torch.ones_like(ids)
        mask[0, :3] = 0

        def made():
            return model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)

        before = made()
        self.patch(model)
        assert torch.equal(made(), before)

    def checkpoints(self, name):
        """Recomputed layers have the same gradients, bit by bit."""
        model = self.build(name)
        self.patch(model)
        before = self.step(name, model)
        model.gradient_checkpointing_enable()
        assert all(torch.equal(value, before[key]) for key, value in self.step(name, model).items())

    def drops_out_and_returns_weights(self, name):
        """With the family's random numbers."""
        model = self.build(name)
        model.set_attn_implementation("eager")
        for module in model.modules():
            if "attention_dropout" in vars(module):
                module.attention_dropout = 0.5
        given = self.inputs(name, model)

        def run():
            torch.manual_seed(3)
            out = model(**given, output_attentions=True)
            return [out.logits, *out.attentions]

        before = run()
        self.patch(model)
        assert all(compare.error(a, b) < 1e-5 for a, b in zip(run(), before, strict=True))

    def takes_lora_later(self, name, targets):
        """Layers of peft that are put on after the patch are called and trained."""
        peft = pytest.importorskip("peft")
        model = self.build(name)
        self.patch(model)
        before = self.step(name, model)["logits"]
        tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, r=4))
        factors = {key: p for key, p in tuned.named_parameters() if "lora_B" in key}
        assert {key.split(".lora_B")[0].rpartition(".")[2] for key in factors} == set(targets)
        assert compare.error(self.step(name, tuned)["logits"], before) < 1e-5
        for p in factors.values():
            nn.init.normal_(p, std=0.5)
        assert compare.error(self.step(name, tuned)["logits"], before) > 1e-3
        assert all(p.grad.norm() > 0 for p in factors.values())

    def calls_hooks(self, name, child):
        """Of a child, put on before the patch and taken off after it."""
        model = self.build(name)
        plain = self.step(name, model)["logits"]
        handles = [m.register_forward_hook(lambda m, args, out: out * 1.5) for n, m in model.named_modules() if n.endswith(child)]
        before = self.step(name, model)
        self.patch(model)
        assert compare.error(before["logits"], plain) > 1e-3
        assert all(compare.error(value, before[key]) < 1e-5 for key, value in self.step(name, model).items())
        for handle in handles:
            handle.remove()
        assert compare.error(self.step(name, model)["logits"], plain) < 1e-5

    def copies_and_pickles(self, name):
        """Twins are patched and compute the same."""
        model = self.build(name)
        self.patch(model)
        before = self.step(name, model)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert self.patched(twin)
            assert all(torch.equal(value, before[key]) for key, value in self.step(name, twin).items())

    def follows_autocast(self, name):
        """Computes in its dtype, no worse than the family does; gradients are those of the parameters' dtype."""
        model = self.build(name)
        given = self.inputs(name, model)
        truth = model(**given).logits
        with torch.autocast("cpu", torch.bfloat16):
            theirs = model(**given).logits
            self.patch(model)
            seen = []
            model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda m, args, out: seen.append((args[0].dtype, out.dtype)))
            out = model(**given)
        out.loss.backward()
        assert seen == [(torch.bfloat16, torch.bfloat16)]
        assert compare.error(out.logits, truth) <= 1.5 * compare.error(theirs, truth)
        assert all(p.grad is not None and p.grad.dtype is torch.float32 for n, p in model.named_parameters() if "self_attn" in n)

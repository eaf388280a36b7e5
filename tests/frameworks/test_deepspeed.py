"""A patched model in DeepSpeed's hands, on two ranks: what training does to every weight is what it does to the plain model's."""

from __future__ import annotations

import pytest

pytest.importorskip("deepspeed")

import torch
import torch.distributed as dist
import zero
import zoo
from compare import error
from listed import listed
from ranks import on_ranks
from torch import nn

import moepatch
from moepatch.experts.listed import HELD

#: Stage, family, whether the head is tied, gradient checkpointing (None, or whether it is reentrant), arguments of `optimize`.
TRAINED = [
    (0, "qwen3_moe", False, None, {}),
    (1, "gpt_oss", False, None, {}),
    (2, "qwen3_moe", True, True, {}),
    (3, "qwen3_moe", False, None, {"loss": None}),
    (3, "qwen3_moe", True, False, {}),
    (3, "gpt_oss", False, True, {}),
    (3, "deepseek_v3", False, None, {}),
    (3, "nemotron_h", False, None, {}),  # its convolution's weight is read without calling it, where nobody hooks it
]


def given(name: str, model: nn.Module) -> dict:
    """Inputs and labels of this rank."""
    ids = zoo.inputs(name, model, seed=dist.get_rank())["input_ids"]
    return {"input_ids": ids, "labels": ids}


def built(name: str, tied: bool = False, reentrant: bool | None = None) -> nn.Module:
    model = zoo.build(name, tie_word_embeddings=tied).train()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model


def steps(model: nn.Module, name: str, stage: int):
    """Losses of two steps, and what they have done to the weights."""
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    made = zero.engine(model, stage)
    losses = zero.trained(made, given(name, model))
    return losses, {key: p - before[key] for key, p in zero.whole(model).items()}


def far(case: tuple) -> list[str]:
    """Where a patched model ends elsewhere than the plain one."""
    stage, name, tied, reentrant, options = case
    losses, truth = steps(built(name, tied, reentrant), name, stage)
    patched = moepatch.optimize(built(name, tied, reentrant), measure=False, verify=False, **options)
    found_losses, found = steps(patched, name, stage)
    errors = {key: error(found[key], moved) for key, moved in truth.items()}
    assert min(moved.norm() for key, moved in truth.items() if "bias" not in key) > 0, "a weight of the plain model was not trained"
    said = [f"{case}: {key} moved otherwise by {value:.1e}" for key, value in errors.items() if value > 5e-5]
    return said + [f"{case}: losses {found_losses}, not {losses}"] * (max(abs(a - b) for a, b in zip(losses, found_losses)) > 5e-5)


def all_trained() -> list[str]:
    return [words for case in TRAINED for words in far(case)]


def engines() -> None:
    """What DeepSpeed does before the patch is named; what it does after it goes on once the patch is undone."""
    for stage, words in ((1, "flat memory that DeepSpeed's ZeRO updates"), (3, "keeps it in parts")):
        model = built("qwen3_moe")
        made = zero.engine(model, stage)
        for whole, why in ((model, words), (made, "DeepSpeedEngine of DeepSpeed")):
            with pytest.raises(moepatch.CheckFailed, match=f"{why}.*before deepspeed.initialize"):
                moepatch.optimize(whole)
    model = built("qwen3_moe")
    zero.deepspeed.zero.Init(module=model, config_dict_or_path=zero.settings(3))
    with pytest.raises(moepatch.CheckFailed, match="without zero.Init"):
        moepatch.optimize(model)
    for stage in (2, 3):
        results = []
        for patched in (False, True):
            model = built("qwen3_moe")
            made = zero.engine(moepatch.optimize(model, measure=False, verify=False) if patched else model, stage)
            zero.trained(made, given("qwen3_moe", model), 1)
            if patched:
                notes = " ".join(moepatch.report(model).notes)
                assert ("is called by itself: q_proj (deepspeed)" in notes or "q_proj, k_proj, v_proj" in notes) == (stage == 3), notes
                moepatch.restore(model)
            zero.trained(made, given("qwen3_moe", model), 1)
            results.append(zero.whole(model))
        for key, value in results[0].items():
            assert error(results[1][key], value) <= 1e-5, (stage, key)


def a_list() -> None:
    """Experts of a list under ZeRO-3, which hooks each of them: the family's loop calls them, and nothing keeps their weights whole."""
    results = []
    for patched in (False, True):
        model, ids = listed(), torch.arange(4, 28).view(2, 12)
        made = zero.engine(moepatch.optimize(model, measure=False) if patched else model, 3, lr=0.1)
        for _ in range(2):
            made.backward(made(ids))
            made.step()
        results.append(zero.whole(model))
    assert all(error(results[1][key], value) <= 1e-5 for key, value in results[0].items())
    assert all(not layer.mlp.experts.__dict__[HELD].joined for layer in model.layers)
    (note,) = [note for note in moepatch.report(model).notes if "mlp.experts" in note]
    assert "layers.{0,1}.mlp.experts: " in note and "the family's own code computes there" in note


def test_a_list_of_experts():
    on_ranks(2, a_list)


def test_before_and_after():
    on_ranks(2, engines)


def test_two_steps_do_what_they_do_to_the_plain_model():
    assert on_ranks(2, all_trained) == [[], []]

"""A patched model in DeepSpeed's hands, on two ranks: what training does to every weight is what it does to the plain model's."""

from __future__ import annotations

import pytest

pytest.importorskip("deepspeed")

import torch
import torch.distributed as dist
import zero
import zoo
from compare import error
from ranks import on_ranks

import moepatch

CASES = [("qwen3_moe", False), ("qwen3_moe", True), ("gpt_oss", False), ("deepseek_v3", False)]


def given(name: str, model) -> dict:
    """Inputs and labels of this rank."""
    ids = zoo.inputs(name, model, seed=dist.get_rank())["input_ids"]
    return {"input_ids": ids, "labels": ids}


def steps(name: str, tied: bool, stage: int, patched: bool):
    """Losses of two steps, and what they have done to the weights."""
    model = zoo.build(name, tie_word_embeddings=tied).train()
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    if patched:
        moepatch.optimize(model)
    made = zero.engine(model, stage)
    losses = zero.trained(made, given(name, model))
    return losses, {key: p - before[key] for key, p in zero.whole(model).items()}


def compare(stage: int) -> None:
    for name, tied in CASES:
        (losses, truth), (found_losses, found) = (steps(name, tied, stage, patched) for patched in (False, True))
        torch.testing.assert_close(torch.tensor(found_losses), torch.tensor(losses), rtol=1e-5, atol=0)
        for key, moved in truth.items():
            assert error(found[key], moved) <= 2e-5, (name, tied, key, error(found[key], moved))


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_two_steps_do_what_they_do_to_the_plain_model(stage):
    on_ranks(2, compare, stage)

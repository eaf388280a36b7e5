"""accelerate and transformers' Trainer take a sharded model as it is, and do with it what they do with a model in one process."""

from __future__ import annotations

import os

import compare
import pytest
import torch
import torch.distributed as dist
import transformers
import zoo
from ranks import on_ranks
from test_parallel import batch, check_gradients, mesh_of, whole
from torch.distributed.fsdp import FSDPModule

import moepatch

EP2 = {"ep": 2}


def launched():
    """What torchrun would have put into the environment besides the ranks."""
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500", "LOCAL_WORLD_SIZE": str(dist.get_world_size())}


def accelerated():
    from accelerate import Accelerator

    launched()

    ranks = dist.get_world_size()
    truth = zoo.build("qwen3_moe")
    for micro in range(2):
        for r in range(ranks):
            (zoo.loss(truth(**batch("qwen3_moe", truth, r + 10 * micro))) / ranks / 2).backward()
    wanted = torch.nn.utils.clip_grad_norm_(truth.parameters(), 0.1)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = moepatch.optimize(zoo.build("qwen3_moe"), mesh_of(EP2), verify=False)
    prepared, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    assert prepared is model and isinstance(model, FSDPModule) and accelerator.num_processes == 2
    for micro in range(2):
        with accelerator.accumulate(prepared):
            accelerator.backward(zoo.loss(prepared(**batch("qwen3_moe", model, dist.get_rank() + 10 * micro))))
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(prepared.parameters(), 0.1)
                check_gradients(model, {key: p.grad for key, p in truth.named_parameters()})
            optimizer.step()
    assert abs(whole(norm) / wanted - 1) <= 1e-5
    assert accelerator.unwrap_model(prepared) is model


def test_accelerate_takes_the_model_as_it_is():
    pytest.importorskip("accelerate")
    on_ranks(2, accelerated)


STEPS, ROWS = 4, 2


def rows(model):
    """A data set in which every row has labels for the same number of tokens."""
    made = zoo.inputs("qwen3_moe", model, batch=STEPS * ROWS * 2, seed=7)
    return [{key: value[i] for key, value in made.items()} for i in range(STEPS * ROWS * 2)]


def trained(model, batch_size, folder, callbacks=(), **options):
    """Losses and gradient norms of a Trainer's steps."""
    from transformers import Trainer, TrainingArguments

    # Rows are dealt out in order, so that two ranks of `batch_size` see what one process of twice as many sees.
    settings = {"learning_rate": 1e-3, "adam_epsilon": 1e-3, "max_grad_norm": 0.5, "logging_steps": 1, "save_strategy": "no", **options}
    arguments = TrainingArguments(
        folder, max_steps=STEPS, per_device_train_batch_size=batch_size, use_cpu=True, report_to=[], disable_tqdm=True,
        train_sampling_strategy="sequential", **settings,
    )
    trainer = Trainer(model, arguments, train_dataset=rows(model), callbacks=list(callbacks))
    trainer.train()
    assert trainer.model is model and trainer.model_wrapped is model
    return [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "grad_norm" in entry]


def trainer_on_ranks(folder, options):
    launched()
    model = moepatch.optimize(zoo.build("qwen3_moe"), mesh_of(EP2), verify=False)
    steps = trained(model, ROWS // options.get("gradient_accumulation_steps", 1), folder, **options)
    return steps, {key: whole(p).detach() for key, p in model.named_parameters()}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_trainer_takes_the_model_as_it_is(tmp_path, accumulate):
    pytest.importorskip("accelerate")
    model = zoo.build("qwen3_moe")
    wanted = trained(model, ROWS * 2, str(tmp_path))
    for steps, weights in on_ranks(2, trainer_on_ranks, str(tmp_path), {"gradient_accumulation_steps": accumulate}):
        assert len(steps) == STEPS
        for (loss, norm), (loss_1, norm_1) in zip(steps, wanted, strict=True):
            assert abs(loss / loss_1 - 1) <= 1e-5 and abs(norm / norm_1 - 1) <= 1e-4
        assert max(compare.error(weights[key], p.detach()) for key, p in model.named_parameters()) <= 1e-5


def trainer_saves(folder, callback):
    from moepatch.parallel.trainer import SaveOnAllRanks

    launched()
    model = moepatch.optimize(zoo.build("qwen3_moe"), mesh_of(EP2), verify=False)
    callbacks = [SaveOnAllRanks()] if callback else []
    trained(model, ROWS, folder, callbacks, save_strategy="steps", save_steps=STEPS, save_only_model=True)
    return {key: whole(p).detach() for key, p in model.named_parameters()}


@pytest.mark.parametrize("callback", [True, False])
def test_trainer_saves_a_standard_checkpoint(tmp_path, callback):
    pytest.importorskip("accelerate")
    if not callback and not hasattr(transformers.PreTrainedModel, "is_distributed_loading_by_transformers"):
        pytest.skip(f"Trainer of transformers {transformers.__version__} saves on rank 0 only; SaveOnAllRanks is for it")
    weights = on_ranks(2, trainer_saves, str(tmp_path), callback)[0]
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{STEPS}", dtype=torch.float32)
    assert all(torch.equal(p, weights[key]) for key, p in saved.named_parameters())

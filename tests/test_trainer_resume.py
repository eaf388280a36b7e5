"""Trainer on a mesh saves, resumes and goes back to the best model as in one process, with adapters of peft and without."""

from __future__ import annotations

import json
from pathlib import Path

import compare
import pytest
import torch
import torch.distributed as dist
import transformers
import zoo
from ranks import on_ranks
from safetensors.torch import load_file
from test_parallel import mesh_of, whole
from test_trainer import STEPS, launched, rows
from torch.distributed.tensor import DTensor

import moepatch

pytest.importorskip("accelerate")
if not hasattr(transformers.PreTrainedModel, "is_distributed_loading_by_transformers"):
    pytest.skip(f"Trainer of transformers {transformers.__version__} saves on rank 0 only", allow_module_level=True)


def plain():
    return zoo.build("qwen3_moe")


def adapted():
    """Adapters, and a head that is trained whole."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(zoo.build("qwen3_moe"), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"]))
    for key, p in model.named_parameters():
        if "lora_" in key:
            zoo._randomize_(key, p.data, 1)
    return model


def trainer_of(model, folder, ranks, **options):
    from transformers import Trainer, TrainingArguments

    settings = {"learning_rate": 1e-2, "adam_epsilon": 1e-3, "max_grad_norm": 0.5, "logging_steps": 1, "save_strategy": "steps", "save_steps": 2, **options}
    arguments = TrainingArguments(
        str(folder), max_steps=STEPS, per_device_train_batch_size=4 // ranks, use_cpu=True, report_to=[], disable_tqdm=True,
        train_sampling_strategy="sequential", **settings,
    )  # fmt: skip
    data = rows(model.get_base_model() if hasattr(model, "peft_config") else model)
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data[:4])


def weights(model):
    return {key: whole(p).detach().clone() for key, p in model.named_parameters() if p.requires_grad}


def same(a, b, limit=0.0):
    assert a.keys() == b.keys()
    for key in a:
        assert compare.error(a[key], b[key]) <= limit if limit else torch.equal(a[key], b[key]), key


def resumed(folder, dims, steps_of_one):
    """A run that is broken off in the middle and resumed in another process ends where the uninterrupted one ends: bit by bit."""
    launched()
    for name in ("plain", "adapted"):
        here = Path(folder, name)
        model = moepatch.optimize(globals()[name](), mesh_of(dims), verify=False)
        trainer = trainer_of(model, here, 2)
        trainer.train()
        last = weights(model)
        if name == "adapted":
            files_of_one_process(model, here / f"checkpoint-{STEPS}", adapted)
        again = moepatch.optimize(globals()[name](), mesh_of(dims), verify=False)
        trainer = trainer_of(again, here, 2)
        trainer.train(resume_from_checkpoint=str(here / "checkpoint-2"))
        same(weights(again), last)
        saved = torch.load(here / "checkpoint-2" / "scheduler.pt")
        assert saved["last_epoch"] == 2
        assert len([e for e in trainer.state.log_history if "grad_norm" in e]) == STEPS
        if steps_of_one:
            same(last, torch.load(Path(folder, f"{name}.pt")), 1e-5)
            # the checkpoint of one process, with its optimizer.pt
            other = moepatch.optimize(globals()[name](), mesh_of(dims), verify=False)
            trainer_of(other, here, 2).train(resume_from_checkpoint=str(Path(folder, f"one-{name}", "checkpoint-2")))
            same(weights(other), last, 1e-5)
        assert all(isinstance(p, DTensor) for p in model.parameters())


def files_of_one_process(model, directory, make):
    one = make()
    with torch.no_grad():
        for key, p in one.named_parameters():
            p.copy_(whole(model.get_parameter(key)))
    target = directory / f"one-{dist.get_rank()}"
    one.save_pretrained(target)
    mine, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (directory, target))
    same(mine, theirs)
    assert len(mine) == 9
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (directory, target)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("dims", [{"ep": 2}, {"dp_shard": 2, "ep": 1}])
def test_a_resumed_run_ends_where_the_uninterrupted_one_ends(tmp_path, dims):
    pytest.importorskip("peft")
    one = dims == {"ep": 2}
    for name in ("plain", "adapted") if one else ():
        model = globals()[name]()
        trainer_of(model, tmp_path / f"one-{name}", 1).train()
        torch.save(weights(model), tmp_path / f"{name}.pt")
    on_ranks(2, resumed, str(tmp_path), dims, one)
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(zoo.build("qwen3_moe"), tmp_path / "adapted" / f"checkpoint-{STEPS}", is_trainable=True)
    if one:
        same(weights(loaded), torch.load(tmp_path / "adapted.pt"), 1e-5)


def best(folder):
    """The loss goes down, and the largest is asked for: the first checkpoint is the best, and the model goes back to it."""
    launched()
    for name in ("plain", "adapted"):
        model = moepatch.optimize(globals()[name](), mesh_of({"ep": 2}), verify=False)
        options = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
        trainer = trainer_of(model, Path(folder, name), 2, greater_is_better=True, save_only_model=name == "plain", **options)
        seen = []

        class Look(transformers.TrainerCallback):
            def on_save(self, args, state, control, model=None, **kwargs):
                seen.append(weights(model))  # noqa: B023

        trainer.add_callback(Look())
        trainer.train()
        best = int(trainer.state.best_model_checkpoint.rpartition("-")[2])
        assert best < STEPS
        same(weights(model), seen[best - 1])
        assert not all(torch.equal(a, b) for a, b in zip(seen[-1].values(), seen[best - 1].values(), strict=True))


def test_the_best_model_at_the_end(tmp_path):
    pytest.importorskip("peft")
    on_ranks(2, best, str(tmp_path))


def loaded(folder):
    """``load_state_dict`` of whole tensors: the model's names, those of a checkpoint, and files that each have a part of a layer's experts."""
    from transformers.trainer_utils import load_sharded_checkpoint

    truth = {key: p.detach() for key, p in zoo.build("qwen3_moe", seed=3).named_parameters()}
    for dims, ways in (({"ep": 2}, ("own", "checkpoint", "files")), ({"dp_shard": 2, "ep": 1}, ("checkpoint",))):
        for way in ways:
            model = moepatch.optimize(plain(), mesh_of(dims), verify=False)
            with torch.no_grad():
                model(**zoo.inputs("qwen3_moe", model))
            if way == "own":
                result = model.load_state_dict(truth)
            elif way == "checkpoint":
                result = model.load_state_dict(load_file(Path(folder, "one", "model.safetensors")), True)
            else:
                load_sharded_checkpoint(model, str(Path(folder, "many")), strict=False)
            assert way == "files" or not result.missing_keys and not result.unexpected_keys
            same(weights(model), truth)
            assert not vars(model).get("_moepatch_waiting")
    result = model.load_state_dict({"nothing": torch.zeros(1)}, strict=False)
    assert result.unexpected_keys == ["nothing"] and len(result.missing_keys) == len(model.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({"lm_head.weight": torch.zeros(3, 3)}, strict=False)


def test_whole_tensors_are_loaded_into_a_sharded_model(tmp_path):
    model = zoo.build("qwen3_moe", seed=3)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="60KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    on_ranks(2, loaded, str(tmp_path))

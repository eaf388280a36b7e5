"""TRL on two gloo ranks: its trainers take the steps that they take on a model sharded by FSDP2 alone."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
import zoo
from ranks import on_ranks

pytest.importorskip("trl")
pytest.importorskip("datasets")

from test_parallel import batch, mesh_of, whole  # noqa: E402

import moepatch  # noqa: E402

STEPS, ROWS = 2, 2


def fsdp2(model):
    """A unit a layer and one for the rest."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh_of({"ep": 2}))
    return fully_shard(model, mesh=mesh_of({"ep": 2}))


WAYS = {
    "fsdp2": fsdp2,
    "ep2": lambda model: moepatch.optimize(model, mesh_of({"ep": 2}), verify=False),
    "shard2": lambda model: moepatch.optimize(model, mesh_of({"dp_shard": 2, "ep": 1}), verify=False),
    "ep2, loss=None": lambda model: moepatch.optimize(model, mesh_of({"ep": 2}), verify=False, loss=None),
}


def close(found, truth, limit=2e-5):
    assert found.keys() == truth.keys()
    for key, value in truth.items():
        error = (found[key] - value).norm() / value.norm().clamp(min=1e-12)
        assert error <= limit, f"{key}: {error:.1e}"


def fused_head():
    """The gradients of TRL's own fused head."""
    from trl.trainer.utils import add_fused_lm_head

    truth = None
    for name, tied in [(name, tied) for tied in (False, True) for name in WAYS]:
        truth = None if name == "fsdp2" else truth
        model = WAYS[name](zoo.build("qwen3_moe", tie_word_embeddings=tied))
        add_fused_lm_head(model, outputs=("log_probs", "entropy"))
        ids = batch("qwen3_moe", model, dist.get_rank())["input_ids"]
        out = model(input_ids=ids, labels=ids, fused_lm_head=True)
        (out.loss + out.log_probs.pow(2).mean()).backward()
        found = {key: whole(p.grad) for key, p in model.named_parameters()}
        truth = truth or found
        close(found, truth)


def test_the_fused_head():
    on_ranks(2, fused_head)


def tokenizer(vocabulary):
    """Words are numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {str(i): i for i in range(vocabulary)}
    made = Tokenizer(models.WordLevel(words, unk_token="0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="0", pad_token="1", eos_token="2")


def words(seed, length, count):
    made = torch.Generator().manual_seed(seed)
    return [" ".join(map(str, torch.randint(3, 90, (length,), generator=made).tolist())) for _ in range(count)]


def sft(model, arguments):
    import datasets
    from trl import SFTConfig, SFTTrainer

    data = datasets.Dataset.from_dict({"text": words(0, 12, STEPS * ROWS * 2)})
    return SFTTrainer(model, SFTConfig(**arguments, max_length=32), train_dataset=data, processing_class=tokenizer(100))


def dpo(model, arguments):
    import datasets
    from trl import DPOConfig, DPOTrainer

    count = STEPS * ROWS * 2
    data = datasets.Dataset.from_dict({"prompt": words(1, 5, count), "chosen": words(2, 6, count), "rejected": words(3, 7, count)})
    reference = zoo.build("qwen3_moe", vocab_size=100, seed=1)  # TRL makes one from the name of a checkpoint, or hashes weights that are whole
    return DPOTrainer(model, reference, args=DPOConfig(**arguments), train_dataset=data, processing_class=tokenizer(100))


def grpo(model, arguments):
    import datasets
    from trl import GRPOConfig, GRPOTrainer

    data = datasets.Dataset.from_dict({"prompt": words(4, 5, STEPS * ROWS * 2)})

    def reward(completions, **kwargs):
        return [float(sum(map(int, c.split())) % 7) for c in completions]

    options = {"num_generations": 2, "max_completion_length": 6, "temperature": 1.0, "beta": 0.0}
    return GRPOTrainer(model, reward, args=GRPOConfig(**arguments, **options), train_dataset=data, processing_class=tokenizer(100))


TRAINERS = {"sft": sft, "dpo": dpo, "grpo": grpo}


def steps(trainer, way, folder):
    """Losses, gradient norms and weights."""
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500", "LOCAL_WORLD_SIZE": "2"}
    arguments = {
        "output_dir": folder, "max_steps": STEPS, "per_device_train_batch_size": ROWS, "use_cpu": True, "report_to": [], "disable_tqdm": True,
        "save_strategy": "no", "logging_steps": 1, "learning_rate": 1e-2, "adam_epsilon": 1e-3, "max_grad_norm": 0.5, "bf16": False, "shuffle_dataset": False,
        "gradient_checkpointing": False, "seed": 5,
    }  # fmt: skip
    made = zoo.build("qwen3_moe", vocab_size=100)
    made.config.eos_token_id = made.generation_config.eos_token_id = 2
    made.generation_config.pad_token_id = 1
    model = WAYS[way](made)
    if way == "fsdp2":  # what a sharded model has to say to Trainer, without moepatch
        model._is_accelerate_prepared = True
        type(model).is_distributed_loading_by_transformers = True
    if trainer != "grpo":
        arguments.pop("shuffle_dataset")
    torch.manual_seed(5 + dist.get_rank())
    made = TRAINERS[trainer](model, arguments)
    made.train()
    logs = [(entry["loss"], entry["grad_norm"]) for entry in made.state.log_history if "grad_norm" in entry]
    return logs, {key: whole(p).detach() for key, p in model.named_parameters()}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_steps_are_those_of_fsdp2_alone(trainer, tmp_path):
    wanted, weights = on_ranks(2, steps, trainer, "fsdp2", str(tmp_path))[0]
    assert len(wanted) == STEPS
    for way in ("ep2", "shard2") if trainer == "sft" else ("ep2",):
        logs, found = on_ranks(2, steps, trainer, way, str(tmp_path))[0]
        for (loss, norm), (loss_1, norm_1) in zip(logs, wanted, strict=True):
            assert abs(loss - loss_1) <= 1e-5 * max(abs(loss_1), 0.1) and abs(norm / norm_1 - 1) <= 1e-4
        close(found, weights)

"""Packages of other stacks, as far as the benchmark's adapters call them: their names and signatures, with next to nothing behind them."""

from __future__ import annotations

import contextlib
import importlib.machinery
import sys
import types
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn


def install(monkeypatch, modules: dict[str, dict]) -> None:
    """Puts modules of these names and contents where imports find them."""
    names = {".".join(name.split(".")[:depth]) for name in modules for depth in range(1, name.count(".") + 2)}
    for name in names:
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__path__ = []
        vars(module).update(modules.get(name, {}))
        monkeypatch.setitem(sys.modules, name, module)


@dataclass(kw_only=True)
class BackendConfig:
    """AutoModel's, as far as it is looked at."""

    attn: str = "sdpa"
    linear: str = "torch"
    rms_norm: str = "torch_fp32"
    experts: str = "torch"
    dispatcher: str = "torch"
    fake_balanced_gate: bool = False
    enable_hf_state_dict_adapter: bool = True


class Gate(nn.Module):
    """AutoModel's router: ``(weights [T, K], ids [T, K], auxiliary loss)``."""

    def __init__(self, hidden: int, experts: int, top_k: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, hidden))
        self.n_experts, self.top_k = experts, top_k

    def forward(self, x_TH):
        weights_TK, ids_TK = (x_TH @ self.weight.t()).softmax(-1).topk(self.top_k)
        return weights_TK, ids_TK, None


class MoE(nn.Module):
    """AutoModel's block; remembers the ids that it was given."""

    def __init__(self, hidden: int, experts: int, top_k: int):
        super().__init__()
        self.gate = Gate(hidden, experts, top_k)
        self.seen: list[torch.Tensor] = []

    def forward(self, x_BTH):
        weights_TK, ids_TK, _ = self.gate(x_BTH.flatten(0, 1))
        self.seen.append(ids_TK)
        return x_BTH * (weights_TK * (1 + ids_TK)).sum(-1).view(*x_BTH.shape[:2], 1)


class AutoModelForCausalLM(nn.Module):
    """A model of AutoModel's: logits, and an initialisation of its own."""

    built: ClassVar[list[nn.Module]] = []

    def __init__(self, config, backend: BackendConfig, moe_overrides: dict):
        super().__init__()
        self.backend, self.moe_overrides = backend, moe_overrides
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(MoE(config.hidden_size, config.num_experts, config.num_experts_per_tok) for _ in range(config.num_hidden_layers))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.built.append(self)

    def forward(self, input_ids):
        hidden = self.embed_tokens(input_ids)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return types.SimpleNamespace(logits=self.lm_head(hidden))


def automodel(monkeypatch) -> types.SimpleNamespace:
    """Installs a `nemo_automodel` that knows Qwen3's mixture. Returns the models that were built of it, and how often its buffer was freed."""
    log = types.SimpleNamespace(built=[], freed=0)
    monkeypatch.setattr(AutoModelForCausalLM, "built", log.built)

    @contextlib.contextmanager
    def init_empty_weights():
        with torch.device("meta"):
            yield

    def free_buffer():
        log.freed += 1

    class Registry:
        def resolve_custom_model_cls(self, architecture, config):
            return AutoModelForCausalLM if architecture == "Qwen3MoeForCausalLM" else None

    class Checkpointer:
        @staticmethod
        def initialize_model_weights(model, device):
            model.to_empty(device=device)

    components = "nemo_automodel.components"
    install(
        monkeypatch,
        {
            "nemo_automodel._transformers.registry": {"ModelRegistry": Registry()},
            f"{components}.models.common": {"BackendConfig": BackendConfig},
            f"{components}.utils.model_utils": {"init_empty_weights": init_empty_weights},
            f"{components}.checkpoint.checkpointing": {"Checkpointer": Checkpointer},
            f"{components}.moe.layers": {"Gate": Gate, "MoE": MoE},
            f"{components}.moe.megatron.fused_a2a": {"free_buffer": free_buffer},
        },
    )
    return log


class TokenRouter(Gate):
    """AutoEP's router: ``(weights [T, K], ids [T, K], tokens of each expert [E])``."""

    def forward(self, x_TH):
        weights_TK, ids_TK, _ = super().forward(x_TH)
        return weights_TK, ids_TK, ids_TK.flatten().bincount(minlength=self.n_experts).int()


class AutoEPMoELayer(nn.Module):
    """AutoEP's block; remembers ids and counts."""

    def __init__(self, block: nn.Module, config):
        super().__init__()
        self.num_experts = config.num_experts
        self.router = TokenRouter(config.hidden_size, config.num_experts, config.num_experts_per_tok)
        self.router.weight.data = block.gate.weight.data
        self.seen: list[tuple] = []

    def forward(self, x_BTH):
        weights_TK, ids_TK, counts_E = self.router(x_BTH.flatten(0, 1))
        self.seen.append((ids_TK, counts_E))
        return x_BTH * weights_TK.sum(-1).view(*x_BTH.shape[:2], 1)


class Engine(nn.Module):
    """What `deepspeed.initialize` returns; remembers which gradients it was asked to reduce."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.module, self.reduced, self.destroyed = model, [], False

    def allreduce_gradients(self):
        self.reduced.append([name for name, p in self.module.named_parameters() if p.grad is not None])

    def destroy(self):
        self.destroyed = True


def deepspeed(monkeypatch) -> types.SimpleNamespace:
    """Installs a `deepspeed` that knows Qwen3's mixture. Returns its engines and the settings that they were made with."""
    log = types.SimpleNamespace(engines=[], settings=[])

    def initialize(model, config):
        for layer in model.model.layers:
            layer.mlp = AutoEPMoELayer(layer.mlp, model.config)
        log.engines.append(Engine(model))
        log.settings.append(config)
        return log.engines[-1], None, None, None

    def preset_name_for_hf_model_type(model_type):
        return "qwen3_moe" if model_type == "qwen3_moe" else None

    install(
        monkeypatch,
        {
            "deepspeed": {"initialize": initialize},
            "deepspeed.module_inject.auto_ep_presets.registry": {"preset_name_for_hf_model_type": preset_name_for_hf_model_type},
            "deepspeed.module_inject.auto_ep_layer": {"AutoEPMoELayer": AutoEPMoELayer},
        },
    )
    return log

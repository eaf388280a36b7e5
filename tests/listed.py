"""A small model whose experts are a list of MLPs, as transformers had them before v5: a loop over those that some token chose."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

H, I, E, K, V = 16, 24, 4, 2, 32


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1 = nn.Linear(H, I, bias=False)
        self.w2 = nn.Linear(I, H, bias=False)
        self.w3 = nn.Linear(H, I, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.w2(self.act_fn(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, normalised=True, tuple_out=True):
        super().__init__()
        self.num_experts, self.top_k, self.normalised, self.tuple_out = E, K, normalised, tuple_out
        self.gate = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList([Expert() for _ in range(E)])

    def forward(self, hidden_states):
        batch, seq, hidden = hidden_states.shape
        hidden_states = hidden_states.view(-1, hidden)
        router_logits = self.gate(hidden_states)
        weights = F.softmax(router_logits, dim=1, dtype=torch.float)
        weights, selected = torch.topk(weights, self.top_k, dim=-1)
        if self.normalised:
            weights /= weights.sum(dim=-1, keepdim=True)
        weights = weights.to(hidden_states.dtype)
        final = torch.zeros_like(hidden_states)
        mask = F.one_hot(selected, num_classes=self.num_experts).permute(2, 1, 0)
        for index in mask.sum(dim=(1, 2)).nonzero().flatten().tolist():  # the loop that depends on the data
            slot, token = torch.where(mask[index])
            out = self.experts[index](hidden_states[token]) * weights[token, slot, None]
            final.index_add_(0, token, out.to(hidden_states.dtype))
        final = final.view(batch, seq, hidden)
        return (final, router_logits) if self.tuple_out else final


class Layer(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.norm = nn.LayerNorm(H)
        self.mlp = Block(**options)

    def forward(self, x):
        out = self.mlp(self.norm(x))
        return x + (out[0] if isinstance(out, tuple) else out)


class Listed(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.embed = nn.Embedding(V, H)
        self.layers = nn.ModuleList([Layer(**options) for _ in range(2)])
        self.head = nn.Linear(H, V, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


def listed(seed=0, **options):
    torch.manual_seed(seed)
    model = Listed(**options)
    with torch.no_grad():
        for layer in model.layers:  # experts that differ enough for the router to choose by token
            layer.mlp.gate.weight.mul_(20)
    return model


def routed_apart(rank):
    """Rank 0 has one token, repeated, and so K experts; rank 1 has many tokens and all experts."""
    return torch.full((1, 12), 5) if rank == 0 else torch.arange(4, 28).view(2, 12)

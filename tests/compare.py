"""Running models and comparing what comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from unittest import mock

import torch
import zoo
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from moepatch import registry
from moepatch.layers.router import reference_router


def step(name: str, model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """One forward and backward on the family's fixed input: floating outputs by name, gradients by parameter (0 where None)."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)  # some families draw noise in their forward
    output = model(**zoo.inputs(name, model))
    zoo.loss(output).backward()
    outputs = {key: value.detach().float() for key, value in output.items() if torch.is_tensor(value) and value.is_floating_point()}
    grads = {key: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for key, p in model.named_parameters()}
    return outputs, grads


def error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """``|value - truth| / |truth|``; the plain norm where the truth is 0."""
    assert value.shape == truth.shape
    value, truth = value.double(), truth.double()
    norm = truth.norm().item()
    return (value - truth).norm().item() / (norm if norm else 1.0)


def together(values: dict[str, torch.Tensor], truths: dict[str, torch.Tensor]) -> float:
    """The relative error of many tensors as if they were one."""
    flat = [torch.cat([t.double().flatten() for t in (tensors[key] for key in truths)]) for tensors in (values, truths)]
    return error(*flat)


@contextmanager
def implementation(model: nn.Module, name: str):
    """transformers' own experts implementation for the time of a block, where the family has the switch."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config") and hasattr(m.config, "_experts_implementation_internal")}
    before = {key: config._experts_implementation_internal for key, config in configs.items()}
    try:
        for config in configs.values():
            config._experts_implementation_internal = name
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation_internal = before[key]


@contextmanager
def rounding_noise(model: nn.Module, names: Iterable[str], seed: int):
    """Moves what these modules return by at most two units in the last place of fp32: what an equally good implementation may do."""
    generator = torch.Generator().manual_seed(seed)

    def moved(leaf):
        if not (torch.is_tensor(leaf) and leaf.is_floating_point()):
            return leaf
        return leaf * (1 + 2.0**-22 * (2 * torch.rand(leaf.shape, generator=generator).to(leaf) - 1))

    handles = [model.get_submodule(name).register_forward_hook(lambda m, args, out: tree_map(moved, out)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


#: Kinds whose sites are whole layers or models: what they compute themselves is inside of no module that noise could be put on.
_AROUND = ("residual", "attention_function", "loss")


def noise(name: str, model: nn.Module, plan, grads: dict[str, torch.Tensor]) -> dict[str, float]:
    """How far each gradient of an unpatched model moves between equally good ways to compute the modules that a plan patches."""
    moved = []
    for own in ("grouped_mm", "batched_mm"):
        with implementation(model, own):
            moved.append(step(name, model)[1])
    names = [fqn for p in plan.patterns if p.backend and p.site.kind not in _AROUND for fqn in p.fqns]
    for seed in range(6):
        with implementation(model, "eager"), rounding_noise(model, names, seed):
            moved.append(step(name, model)[1])
    return {key: max(error(m[key], truth) for m in moved) for key, truth in grads.items()}


def check_fp32(truth: tuple, found: tuple, noise: Callable[[], dict[str, float]], limit: float = 1e-5) -> float:
    """Results of `step`, patched and not: equal to `limit`; the largest error of a gradient.

    Some gradients are sums that cancel: they move by more than that when anything before them moves by a rounding error. Those may
    differ by half again as much as `noise` says that they do; it is called if it is needed.
    """
    for key, value in truth[0].items():
        assert error(found[0][key], value) <= limit, (key, error(found[0][key], value))
    errors = {key: error(found[1][key], value) for key, value in truth[1].items()}
    if max(errors.values()) > limit:
        usual = noise()
        bad = {key: (value, usual[key]) for key, value in errors.items() if value > max(limit, 1.5 * usual[key])}
        assert not bad, bad
    return max(errors.values())


def parts(model: nn.Module, *results: tuple) -> dict[str, list[dict]]:
    """Results of `step` by group: the outputs, the gradients of the experts, all other gradients."""
    experts = set(zoo.expert_parameters(model))
    return {
        "outputs": [outputs for outputs, _ in results],
        "expert gradients": [{k: g for k, g in grads.items() if k in experts} for _, grads in results],
        "other gradients": [{k: g for k, g in grads.items() if k not in experts} for _, grads in results],
    }


class PinnedRouting(TorchFunctionMode):
    """Makes routers choose what they chose in an earlier forward: precision decides between two nearly equal experts, not our subject.

    ``with PinnedRouting(model) as pins`` records, ``with PinnedRouting(other, pins)`` replays, as often as the model is called. Only
    calls of topk, max and argmax inside modules named gate or router, or around those that are linears, are pinned; the values still
    flow, with their gradients. A replay may leave calls out: what was recorded for tensors of other shapes is passed over. Our kernels
    for routers call none of these, so plain torch stands in for them.
    """

    def __init__(self, model: nn.Module, recorded: PinnedRouting | None = None):
        super().__init__()
        self.choices: dict[str, list[tuple[torch.Size, torch.Tensor]]] = {} if recorded is None else recorded.choices
        self.replaying = recorded is not None
        self.inside: list[str] = []
        self.handles = []
        self.plain = mock.patch.dict(registry._LOADED, {("router", "triton"): reference_router})
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in ("gate", "router"):
                if type(module) is nn.Linear:  # what is around it chooses
                    name = name.rpartition(".")[0]
                    module = model.get_submodule(name)
                self.handles.append(module.register_forward_pre_hook(lambda m, args, name=name: self._enter(name)))
                self.handles.append(module.register_forward_hook(lambda m, args, out: self.inside.pop() and None))

    def _enter(self, name: str) -> None:
        self.inside.append(name)
        if not self.replaying:
            self.choices[name] = []
        self.position = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if not self.inside or name not in ("topk", "max", "argmax") or (name == "max" and not isinstance(out, tuple)):
            return out
        indices = out if name == "argmax" else out[1]
        if not self.replaying:
            self.choices[self.inside[-1]].append((args[0].shape, indices))
            return out
        recorded = self.choices[self.inside[-1]]
        self.position = next(i for i in range(self.position, len(recorded)) if recorded[i][0] == args[0].shape)
        pinned = recorded[self.position][1]
        self.position += 1
        if name == "argmax":
            return pinned
        dim = (kwargs or {}).get("dim", args[2] if name == "topk" and len(args) > 2 else args[1] if name == "max" and len(args) > 1 else -1)
        index = pinned if pinned.ndim == args[0].ndim else pinned.unsqueeze(dim)
        values = args[0].gather(dim, index)
        return type(out)((values if pinned.ndim == args[0].ndim else values.squeeze(dim), pinned))

    def __enter__(self):
        self.plain.start()
        return super().__enter__()

    def __exit__(self, *exc):
        self.plain.stop()
        for handle in self.handles:
            handle.remove()
        return super().__exit__(*exc)

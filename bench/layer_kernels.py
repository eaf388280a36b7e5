"""The kernels by themselves: share of the copy bandwidth of norms and rope, attention with and without sinks, memory of the loss.

Inputs and results rotate among sets that together exceed the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from layer_floors import attention_flops
from layer_timing import Ceilings, copy_ms, gradients, peak_mib, timed
from torch import Tensor

from moepatch.layers.attention.kind import AttentionCalls
from moepatch.layers.attention.kind import bench as attention_call
from moepatch.layers.attention.spec import AttentionSpec, AttentionUse
from moepatch.layers.norm import NormSpec
from moepatch.registry import backends, compute

_SETS = 12


def measure(tokens: int, repeats: int, device: torch.device, machine: Ceilings) -> Iterator[dict]:
    """One row a kernel and direction."""
    large = device.type == "cuda"
    for width in (2048, 4096, 7168) if large else (64,):
        yield from norms(tokens, width, repeats, device)
    yield from norms(tokens * 32, 128, repeats, device)
    if large:
        yield from heads(tokens, repeats, device)
    yield from sinks(tokens, repeats, device, machine)
    vocab = 151_936 if large else 512
    for count in (tokens, 4 * tokens):
        yield from loss(count, 2048 if large else 64, vocab, device, machine)


def norms(rows: int, width: int, repeats: int, device: torch.device) -> Iterator[dict]:
    """The plain norm of every backend; of moepatch's own kernel also the forms that are fused with the residual stream."""
    spec = NormSpec(width=width, eps=1e-6, weight="weight", cast="before")
    dtype = torch.bfloat16
    weight = torch.randn(width, device=device).to(dtype).requires_grad_()
    xs = [torch.randn(rows, width, device=device).to(dtype).requires_grad_() for _ in range(_SETS)]
    others = [torch.randn(rows, width, device=device).to(dtype).requires_grad_() for _ in range(_SETS)]
    size = rows * width * xs[0].element_size()
    label = {"part": "kernel", "layer": "norm", "spec": f"{rows} × {width}"}
    for backend in backends("norm"):
        if backend.why_not(spec, dtype, device) is None and (backend.name != "reference" or device.type == "cpu"):
            run = compute("norm", backend.name)
            named = label | {"stack": backend.name}
            yield from _both(
                named, lambda i, run=run: [run(xs[i % _SETS], weight, spec)], lambda i: [xs[i % _SETS], weight], (2, 3), size, repeats, device
            )
    if device.type == "cuda":
        from moepatch.kernels.norm import add_norm, fork_norm

        added, forked = (label | {"layer": layer, "stack": "triton"} for layer in ("add + norm", "fork + norm"))
        yield from _both(
            added,
            lambda i: list(add_norm(xs[i % _SETS], others[i % _SETS], weight, spec)),
            lambda i: [xs[i % _SETS], others[i % _SETS], weight],
            (4, 4), size, repeats, device,
        )  # fmt: skip
        yield from _both(
            forked, lambda i: list(fork_norm(xs[i % _SETS], weight, spec)), lambda i: [xs[i % _SETS], weight], (2, 4), size, repeats, device
        )


def heads(tokens: int, repeats: int, device: torch.device) -> Iterator[dict]:
    """Norms and rope of query and key heads in one pass, 32/4 heads of 128 out of one projection."""
    from moepatch.kernels.rope import heads_backward, heads_forward
    from moepatch.layers.rope import HeadNorm, HeadsSpec

    dtype = torch.bfloat16
    for norm in (HeadNorm("head", 1e-6, 0.0, True), None):
        spec = HeadsSpec(32, 4, 128, 128, norm, "half")
        joints = [torch.randn(1, tokens, 40 * 128, device=device).to(dtype) for _ in range(_SETS)]
        weights = [torch.randn(128, device=device).to(dtype) if norm else None for _ in range(2)]
        angles = torch.outer(torch.arange(tokens, device=device), 1e6 ** (-torch.arange(0, 128, 2, device=device) / 128)).repeat(1, 2)[None]
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        q, k = heads_forward(joints[0], spec, *weights, cos, sin)
        grads = [(*(torch.randn_like(t).transpose(1, 2) for t in (q, k, k)), None) for _ in range(_SETS)]
        size = joints[0].numel() * joints[0].element_size()
        label = {"part": "kernel", "layer": "q/k norm + rope" if norm else "rope", "spec": f"{tokens} × (32 + 4) × 128", "stack": "triton"}
        forward = timed(_rotating(lambda i, j=joints, s=spec, w=weights, c=cos, n=sin: heads_forward(j[i % _SETS], s, *w, c, n)), repeats, device)
        yield _row(label | {"note": "forward"}, forward, copy_ms(2 * size * 36 // 40, device))
        going_back = _rotating(lambda i, j=joints, s=spec, w=weights, c=cos, n=sin, g=grads: heads_backward(j[i % _SETS], s, *w, c, n, g[i % _SETS]))
        backward = timed(going_back, repeats, device)
        yield _row(label | {"note": "backward"}, backward, copy_ms((3 if norm else 2) * size * 36 // 40 + 2 * size * 4 // 40, device))


def sinks(tokens: int, repeats: int, device: torch.device, machine: Ceilings) -> Iterator[dict]:
    """Attention forms of gpt-oss, with and without sinks and window, and of the other models; every backend that serves them."""
    common = {"causal": True}
    forms = {
        "plain": AttentionSpec(heads=32, kv_heads=4, head_dim=128, v_head_dim=128, **common),
        "no sinks": AttentionSpec(heads=64, kv_heads=8, head_dim=64, v_head_dim=64, **common),
        "sinks": AttentionSpec(heads=64, kv_heads=8, head_dim=64, v_head_dim=64, sinks=True, **common),
        "window": AttentionSpec(heads=64, kv_heads=8, head_dim=64, v_head_dim=64, window=128, **common),
        "window, sinks": AttentionSpec(heads=64, kv_heads=8, head_dim=64, v_head_dim=64, window=128, sinks=True, **common),
        "latent": AttentionSpec(heads=128, kv_heads=128, head_dim=192, v_head_dim=128, **common),
    }
    for name, form in forms.items():
        use = AttentionUse(((form, 1),))
        for backend in backends("attention"):
            if backend.name == "reference" or backend.why_not(use, torch.bfloat16, device) is not None:
                continue
            calls = AttentionCalls(use, backend.name)
            call = attention_call(use, torch.bfloat16, device, torch.Generator().manual_seed(0), tokens).trainable()
            g = torch.randn_like(calls(*call.args)[0])
            both = timed(lambda i, c=calls, a=call, g=g: gradients(c(*a.args), a.leaves(), [g]), repeats, device)
            flops = 3.5 * attention_flops(form, tokens)
            row = _row({"part": "kernel", "layer": "attention", "spec": f"{name}: {form.describe()}", "stack": backend.name}, both, flops / machine.flops)
            on_device, on_wall = flops / both.busy_ms / 1e9, flops / both.ms / 1e9
            yield row | {"tflops": round(on_device, 1), "note": f"{on_device:.0f} TFLOP/s on the device, {on_wall:.0f} on the wall"}


def loss(tokens: int, hidden: int, vocab: int, device: torch.device, machine: Ceilings) -> Iterator[dict]:
    """The fused loss: time, and memory beside inputs and the gradients that are its results."""
    from moepatch.layers.loss.module import with_loss
    from moepatch.layers.loss.spec import LossSpec
    from moepatch.layers.loss.module import LOSS

    spec = LossSpec(hidden=hidden, vocab=vocab, bias=False)
    dtype = torch.bfloat16
    head = torch.nn.Linear(hidden, vocab, bias=False, device=device, dtype=dtype)
    call = LOSS.bench(spec, dtype, device, torch.Generator().manual_seed(0), tokens).trainable()
    results = (call.args[0].numel() + head.weight.numel()) * head.weight.element_size() / 2**20
    least = 3 * 2 * tokens * hidden * vocab / machine.flops
    for backend in backends("loss"):
        if backend.why_not(spec, dtype, device) is not None:
            continue
        copy = LOSS.subject(head, spec, backend.name, _same)

        def step(copy=copy) -> None:
            made = with_loss(copy, *call.args)
            gradients([made], [call.args[0], copy.weight], [torch.ones_like(made)])

        label = {"part": "kernel", "layer": "loss", "spec": f"{tokens} × {hidden} × {vocab}", "stack": backend.name}
        try:
            both = timed(lambda i, step=step: step(), 3, device)
            peak = peak_mib(step, device)
        except torch.cuda.OutOfMemoryError:
            yield label | {"error": "does not fit"}
            continue
        extra = None if peak is None else peak - results
        row = _row(label, both, least)
        yield row if extra is None else row | {"peak_mib": round(extra, 1), "note": f"{extra:.0f} MiB beside its results ({results:.0f} MiB)"}


def _same(module: torch.nn.Module) -> torch.nn.Module:
    copy = torch.nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    copy.weight = module.weight
    return copy


def _both(
    label: dict,
    forward: Callable[[int], list[Tensor]],
    leaves: Callable[[int], list[Tensor]],
    passes: tuple[int, int],
    size: int,
    repeats: int,
    device: torch.device,
) -> Iterator[dict]:
    """Rows for forward and backward, each timed by itself: what one leaves in the cache, the other would pay for."""
    alone = timed(_rotating(forward), repeats, device)
    yield _row(label | {"note": "forward"}, alone, copy_ms(passes[0] * size, device))
    made = [forward(i) for i in range(_SETS)]
    cotangents = [[torch.randn_like(o) for o in outputs] for outputs in made]
    back = timed(_rotating(lambda i: torch.autograd.grad(made[i % _SETS], leaves(i), cotangents[i % _SETS], retain_graph=True)), repeats, device)
    yield _row(label | {"note": "backward"}, back, copy_ms(passes[1] * size, device))


def _rotating(run: Callable[[int], object]) -> Callable[[int], None]:
    """`run` with its latest results kept: a buffer that is written again at once stays in the cache, and its bytes never reach the memory."""
    ring: list = [None] * _SETS

    def kept(i: int) -> None:
        ring[i % _SETS] = run(i)

    return kept


def _row(label: dict, timing, least: float) -> dict:
    return label | {"ms": round(timing.ms, 4), "device_ms": round(timing.busy_ms, 4), "launches": timing.launches, "floor_ms": round(least, 4)}

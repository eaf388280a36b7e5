"""On a CUDA GPU: FP8 projections of Transformer Engine, three ways with rounded layers as "theirs"; no waiting, training, speed."""

from __future__ import annotations

import statistics
import time

import compare
import pytest
import torch

pytest.importorskip("transformer_engine")

import test_te_linear as cpu
from torch.nn import functional as F

import moepatch
from moepatch.experts.activation import Activation
from moepatch.layers.fp8 import round_linear_layers, rounded_linear
from moepatch.layers.mlp import MlpSpec, MlpWeights, triton_mlp
from moepatch.layers.te_linear import te_linear, te_mlp
from moepatch.layout.adjacent import joint_linear

pytestmark = pytest.mark.gpu


def numbers(*shape, dtype=torch.bfloat16, seed=0, scale=1.0):
    generator = torch.Generator("cuda").manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator, device="cuda") * scale).to(dtype).requires_grad_()


def three_ways(function, rounded, leaves):
    """fp32 of the same numbers is the truth; ours may be 1.5 times as far from it as the same GEMMs of numbers rounded to FP8."""
    def both(f, tensors):
        y = f(*tensors)
        dy = torch.randn(y.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
        return y.detach(), *torch.autograd.grad(y, tensors, dy.to(y.dtype))

    wide = [t.detach().float().requires_grad_() for t in leaves]
    rows = []
    for i, (ours, theirs, truth) in enumerate(zip(both(function, leaves), both(rounded, leaves), both(rounded_exact(rounded), wide), strict=True)):
        error, limit = compare.error(ours, truth), 1.5 * compare.error(theirs, truth)
        rows.append(f"{'output' if i == 0 else tuple(leaves[i - 1].shape)}: {error:.4f} (limit {limit:.4f})")
        assert ours.shape == truth.shape and ours.isfinite().all()
        assert error <= max(limit, 1e-2) and error < 0.15, rows
    print("; ".join(rows))


def rounded_exact(function):
    """The same function without rounding."""
    return lambda *tensors: function(*tensors, linear=F.linear)


def split(tensors, biased):
    weights = tensors[: len(tensors) // (2 if biased else 1)]
    return weights, tensors[len(weights) :]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [(2048,), (2048, 512, 512), (704, 704)])
@pytest.mark.parametrize("count", [512, 1001])
def test_linear_layers(rows, biased, count, dtype):
    leaves = [numbers(count, 1024, dtype=dtype), *(numbers(n, 1024, dtype=dtype, seed=i, scale=0.03) for i, n in enumerate(rows))]
    leaves += [numbers(n, dtype=dtype, seed=i) for i, n in enumerate(rows)] if biased else []

    def plain(x, *tensors, linear=rounded_linear):
        weights, biases = split(tensors, biased)
        return linear(x, torch.cat(weights), torch.cat(biases) if biased else None)

    three_ways(lambda x, *tensors: te_linear(x, *split(tensors, biased)), plain, leaves)


def test_weights_side_by_side_are_not_copied():
    whole, x = numbers(3072, 1024).detach(), numbers(512, 1024)
    weights = [w.requires_grad_() for w in whole.split((2048, 512, 512))]
    apart = [w.detach().clone().requires_grad_() for w in weights]
    grads = [torch.autograd.grad(te_linear(x, ws).float().square().mean(), [x, *ws]) for ws in (weights, apart)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        y = te_linear(x, weights)
    # y, the rounded tokens and weights, no third copy of the weights
    assert torch.cuda.max_memory_allocated() - before < y.numel() * 2 + x.numel() * 2 + 2 * whole.numel() + 2**20


@pytest.mark.parametrize("form", ["separate", "none"])
def test_mlps(form):
    activation, names = (Activation("swiglu"), ("gate", "up")) if form == "separate" else (Activation("relu2"), ("up",))
    spec = MlpSpec(hidden=1024, intermediate=1408, activation=activation, gate_form=form, inputs=names, down="down")
    leaves = [numbers(512, 1024), *(numbers(1408, 1024, seed=i, scale=0.03) for i in range(len(names))), numbers(1024, 1408, scale=0.03)]

    def plain(x, *weights, linear=rounded_linear):
        *inputs, down = weights
        pre = [linear(x, w) for w in inputs]
        return linear(F.silu(pre[0]) * pre[1] if len(pre) == 2 else F.relu(pre[0]).square(), down)

    three_ways(lambda x, *ws: te_mlp(x, MlpWeights(tuple(ws[:-1]), (), ws[-1], None), spec), plain, leaves)


def big(**overrides):
    return cpu.llama(hidden_size=1024, intermediate_size=1408, num_attention_heads=8, num_key_value_heads=4, **overrides).to("cuda", torch.bfloat16)


def test_a_model_is_verified_trains_and_comes_back():
    model = big()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    moepatch.optimize(model, measure=False, **cpu.BY_NAME)
    report = moepatch.report(model)
    assert {p.site.kind for p in report.plan.patterns if p.backend == "te_fp8"} == {"linear", "mlp", "attention_block"}
    rows = [d for v in report.verified if v.backend == "te_fp8" for d in v.differences]
    print([(d.what, round(d.ours, 4), round(d.limit, 4)) for d in rows])
    assert rows and all(0.005 < d.ours <= d.limit for d in rows if d.what == "output")
    restored = moepatch.restore(model).state_dict()
    assert all(torch.equal(t, before[name]) for name, t in restored.items())


def test_gradients_of_a_model():
    ids = torch.randint(0, 64, (4, 64), generator=torch.Generator().manual_seed(1)).cuda()
    models = [big().float(), big(), moepatch.optimize(big(), measure=False, **cpu.BY_NAME)]
    for layer in models[1].model.layers:
        round_linear_layers(layer)
    grads = []
    for model in models:
        model(ids, labels=ids).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    truth, theirs, ours = grads
    worst = {name: (compare.error(ours[name], truth[name]), compare.error(theirs[name], truth[name])) for name in truth}
    assert all(mine <= 1.5 * other for mine, other in worst.values()), worst


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_goes_down_as_in_bf16(checkpointing):
    ids = torch.randint(0, 64, (4, 64), generator=torch.Generator().manual_seed(1)).cuda()
    curves = []
    for fp8 in (False, True):
        model = big().train()
        if fp8:
            moepatch.optimize(model, measure=False, **cpu.BY_NAME)
        if checkpointing:
            model.gradient_checkpointing_enable()
        optimizer, curve = torch.optim.AdamW(model.parameters(), lr=3e-4), []
        for _ in range(20):
            loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.detach())
        curves.append(torch.stack(curve).tolist())
    plain, ours = curves
    print("bf16", plain[::5], "fp8", ours[::5])
    assert plain[-1] < 0.8 * plain[0] and abs(ours[-1] - plain[-1]) < 0.1 * plain[0], curves


def test_nothing_waits_for_the_device():
    x, w = numbers(512, 1024), [numbers(2048, 1024), numbers(512, 1024)]
    for _ in range(2):
        te_linear(x, w).backward(torch.ones(512, 2560, device="cuda", dtype=torch.bfloat16))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        te_linear(x, w).backward(torch.ones(512, 2560, device="cuda", dtype=torch.bfloat16))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiled():
    x, w = numbers(512, 1024), [numbers(2048, 1024), numbers(512, 1024)]
    torch._dynamo.reset()
    compiled = torch.compile(te_linear)
    for _ in range(2):
        ours, eager = compiled(x, w), te_linear(x, w)
        assert compare.error(ours, eager) < 1e-2
        pairs = zip(*(torch.autograd.grad(y.float().square().mean(), [x, *w]) for y in (ours, eager)), strict=True)
        assert all(compare.error(a, b) < 2e-2 for a, b in pairs)
    print("graph breaks:", sum(torch._dynamo.utils.counters["graph_break"].values()))


def milliseconds(step, rounds=5, calls=5):
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            step()
        host = (time.perf_counter() - start) * 1000 / calls
        torch.cuda.synchronize()
        times.append(((time.perf_counter() - start) * 1000 / calls, host))
    return statistics.median(t for t, _ in times), statistics.median(h for _, h in times)


@pytest.mark.parametrize(("tokens", "hidden", "intermediate"), [(4096, 2048, 6144), (8192, 4096, 14336)])
def test_speed_is_printed(tokens, hidden, intermediate):
    """What it buys is a number for the report, not a bar: small widths are bound by the host."""
    spec = MlpSpec(hidden=hidden, intermediate=intermediate, activation=Activation("swiglu"), gate_form="separate", inputs=("gate", "up"), down="down")
    both = numbers(2 * intermediate, hidden, scale=0.02).detach()
    weights = MlpWeights(tuple(w.requires_grad_() for w in both.split(intermediate)), (), numbers(hidden, intermediate, scale=0.02), None)
    x = numbers(tokens, hidden)
    qkv = [w.requires_grad_() for w in numbers(2 * hidden, hidden, scale=0.02).detach().split((hidden, hidden // 2, hidden // 2))]
    leaves, dy, dqkv = [x, *weights.inputs, weights.down], torch.randn_like(x), torch.randn(tokens, 2 * hidden, device="cuda", dtype=x.dtype)
    runs = {
        "mlp bf16": lambda: torch.autograd.grad(triton_mlp(x, weights, spec), leaves, dy),
        "mlp fp8": lambda: torch.autograd.grad(te_mlp(x, weights, spec), leaves, dy),
        "qkv bf16": lambda: torch.autograd.grad(joint_linear(x, qkv), [x, *qkv], dqkv),
        "qkv fp8": lambda: torch.autograd.grad(te_linear(x, qkv), [x, *qkv], dqkv),
    }
    for name, run in runs.items():
        milliseconds(run, rounds=1)
        total, host = milliseconds(run)
        print(f"T={tokens} H={hidden} I={intermediate} {name}: {total:.3f} ms forward and backward, {host:.3f} ms of the host")

"""Mixers on a GPU: three-way in bf16 at real shapes, and how much faster than transformers' torch code."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from moepatch import registry, trial
from moepatch.kernels import conv
from moepatch.kinds import KINDS
from moepatch.layers.mixers import backends  # noqa: F401  (fills the tables)
from moepatch.layers.mixers.delta import DELTA_MIXER, DeltaWeights
from moepatch.layers.mixers.selective import SELECTIVE_MIXER
from moepatch.layers.mixers.ssd import SSD_MIXER
from moepatch.match import mixers
from moepatch.replica import replica
from moepatch.scan import Scan

pytestmark = pytest.mark.gpu
for kind in (SSD_MIXER, DELTA_MIXER, SELECTIVE_MIXER):
    KINDS.setdefault(kind.name, kind)

CUDA = torch.device("cuda")


def nano(**changes):
    """The Mamba-2 mixer of Nemotron 3 Nano."""
    from transformers.models.nemotron_h import modeling_nemotron_h as family

    sizes = {"hidden_size": 2688, "mamba_num_heads": 64, "mamba_head_dim": 64, "n_groups": 8, "ssm_state_size": 128, "conv_kernel": 4, "chunk_size": 128}
    config = family.NemotronHConfig(**{**sizes, **changes}, layers_block_type=["mamba", "attention"], vocab_size=64)
    return family.NemotronHMamba2Mixer(config, layer_idx=0), mixers.match_ssd


def granite():
    """A mixer of Granite 4's kind: one group of heads, so that programs share it."""
    return nano(hidden_size=1536, mamba_num_heads=48, n_groups=1, chunk_size=256)


def qwen():
    """The delta-rule mixer of Qwen3-Next."""
    from transformers.models.qwen3_next import modeling_qwen3_next as family

    config = family.Qwen3NextConfig(hidden_size=2048, layer_types=["linear_attention", "full_attention"], num_hidden_layers=2, vocab_size=64)
    return family.Qwen3NextGatedDeltaNet(config, layer_idx=0), mixers.match_delta


def jamba():
    """A selective mixer of Jamba's kind, a quarter as wide: transformers needs a kernel or ten for each token."""
    from transformers.models.jamba import modeling_jamba as family

    config = family.JambaConfig(hidden_size=1024, mamba_d_state=16, mamba_dt_rank=64, vocab_size=64)
    return family.JambaMambaMixer(config, layer_idx=0), mixers.match_selective


def prepared(make):
    """A mixer in bf16 on the GPU with parameters of usual sizes, and its spec."""
    torch.manual_seed(0)
    module, match = make()
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.ndim == 2 and name != "A_log":
                p.copy_(torch.randn(p.shape) * p.shape[1] ** -0.5)
            elif "conv1d.weight" in name:
                p.copy_(torch.randn(p.shape) * 0.5)
            elif name == "dt_bias" or name.endswith("dt_proj.bias"):
                p.copy_(torch.empty(p.shape).uniform_(-4, 0))
    (found,) = [f for f in Scan(module) if f.module is module]
    site = match(found, Scan(module), {})
    assert site is not None
    return module.to(CUDA, torch.bfloat16), site.kind, site.spec


def copied(module, dtype):
    return replica(module, {}, lambda tensor, shape: tensor.detach().to(dtype, copy=True))


def available(kind, spec, name):
    if name not in {b.name for b in registry.backends(KINDS[kind].backends)}:
        pytest.skip(f"no backend {name} for {kind}")
    why = registry.backend(KINDS[kind].backends, name).why_not(spec, torch.bfloat16, CUDA)
    if why is not None:
        pytest.skip(why)


@pytest.mark.parametrize("backend", ["torch", "triton", "fla"])
@pytest.mark.parametrize("make, tokens", [(nano, 700), (granite, 300), (qwen, 700), (jamba, 130)])
def test_error_is_at_most_half_again_that_of_transformers(make, tokens, backend):
    module, kind, spec = prepared(make)
    available(kind, spec, backend)
    generator = torch.Generator().manual_seed(0)
    call = KINDS[kind].bench(spec, torch.bfloat16, CUDA, generator, 2 * tokens, sequences=2)
    mask = torch.ones(2, tokens, dtype=torch.long, device=CUDA)
    mask[0, :50] = 0
    call = trial.Call(call.args, {"attention_mask": mask})
    eager = trial.eager_forward(module)
    truth = trial.run(copied(module, torch.float32), call.mapped(lambda t: t.float()), forward=eager)
    theirs = trial.run(copied(module, torch.bfloat16), call, forward=eager)
    ours = trial.run(trial.inject(copied(module, torch.bfloat16), KINDS[kind].injections(spec, backend, None)), call)
    rows = trial.differences(truth, ours, theirs)
    print(f"\n{spec.describe()} {backend}: " + ", ".join(f"{d.what} {d.ours / max(d.theirs, 1e-9):.2f}" for d in rows))
    assert [d for d in rows if not d.ok] == []


@pytest.mark.parametrize("tokens", [1, 300])
def test_flash_linear_attention_hands_on_the_same_state(tokens):
    """The factors of its products are bf16, ours are not."""
    module, kind, spec = prepared(qwen)
    available(kind, spec, "fla")
    generator = torch.Generator(CUDA).manual_seed(0)
    widths = (spec.channels, spec.value_heads, spec.value_heads)
    mixed, decay, strength = (torch.randn(2, tokens, width, device=CUDA, generator=generator) for width in widths)
    found = []
    for name, dtype in (("reference", torch.float64), ("fla", torch.bfloat16)):
        weights = DeltaWeights(module.conv1d.weight.squeeze(1).to(dtype), None)
        g = -torch.nn.functional.softplus(decay)
        rows = registry.compute("delta", name)(mixed.bfloat16().to(dtype), weights, g, strength.bfloat16().sigmoid().to(dtype), spec, True)
        found.append([t.detach().double() for t in rows])
    for truth, ours in zip(*found, strict=True):
        assert ours.shape == truth.shape and (ours - truth).norm() <= 1e-2 * truth.norm()


def test_fp32_on_the_gpu():
    module, kind, spec = prepared(jamba)
    call = KINDS[kind].bench(spec, torch.float32, CUDA, torch.Generator().manual_seed(0), 200, sequences=2)
    wide = copied(module, torch.float32)
    truth = trial.run(copied(module, torch.float64), call.mapped(lambda t: t.double()), forward=trial.eager_forward(module))
    theirs = trial.run(wide, call, forward=trial.eager_forward(module))
    ours = trial.run(trial.inject(copied(module, torch.float32), KINDS[kind].injections(spec, "triton", None)), call)
    rows = trial.differences(truth, ours, theirs)
    print(f"\n{spec.describe()} fp32: " + ", ".join(f"{d.what} {d.ours:.1e} ({d.theirs:.1e})" for d in rows))
    assert [d for d in rows if d.ours > max(3e-5, 1.5 * d.theirs)] == []


@pytest.mark.parametrize("tokens", [33, 4096])
def test_tiny_heads(tokens):
    """Heads and states as small as a matrix product takes, and a length of many chunks. Several calls, for a gradient of 8 numbers is off by luck."""
    module, kind, spec = prepared(
        lambda: nano(hidden_size=64, mamba_num_heads=8, mamba_head_dim=16, n_groups=2, ssm_state_size=16, chunk_size=32)
    )
    eager = trial.eager_forward(module)
    twin = trial.inject(copied(module, torch.bfloat16), KINDS[kind].injections(spec, "triton", None))
    results = []
    for seed in range(6):
        call = KINDS[kind].bench(spec, torch.bfloat16, CUDA, torch.Generator().manual_seed(seed), tokens)
        truth = trial.run(copied(module, torch.float64), call.mapped(lambda t: t.double()), forward=eager)
        results.append((truth, trial.run(twin, call), trial.run(copied(module, torch.bfloat16), call, forward=eager)))
        torch.cuda.synchronize()
    rows = trial.differences(*({what: torch.cat([r[i][what].flatten() for r in results]) for what in results[0][0]} for i in range(3)))
    print(f"\n{spec.describe()} {tokens}: " + ", ".join(f"{d.what} {d.ours:.1e} ({d.theirs:.1e})" for d in rows))
    assert [d for d in rows if not d.ok] == []


def test_convolution():
    for batch, tokens, channels in ((1, 4096, 6144), (3, 77, 200)):
        x = torch.randn(batch, tokens, channels + 64, device=CUDA)[..., 8 : 8 + channels]
        weight, bias = torch.randn(channels, 4, device=CUDA), torch.randn(channels, device=CUDA)
        mask = (torch.rand(batch, tokens, device=CUDA) > 0.2).float()
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        y, ours = conv.reference_conv(*leaves, mask), conv.causal_conv(*leaves, mask)
        up = torch.randn_like(ours)
        torch.testing.assert_close(ours, y, rtol=1e-4, atol=1e-4)
        for a, b in zip(torch.autograd.grad(ours, leaves, up), torch.autograd.grad(y, leaves, up), strict=True):
            assert ((a - b).norm() / b.norm()).item() < 1e-4


def milliseconds(module, x, repeats):
    def step():
        module(x).backward(torch.ones_like(x))

    step()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeats


@pytest.mark.timing
@pytest.mark.parametrize("make, tokens", [(nano, 4096), (qwen, 4096), (jamba, 512)])
def test_speed(make, tokens):
    module, kind, spec = prepared(make)
    x = torch.randn(1, tokens, spec.hidden, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    own = milliseconds(module, x, 2)
    times = {}
    for backend in registry.backends(KINDS[kind].backends):
        if backend.why_not(spec, torch.bfloat16, CUDA) is None:
            twin = trial.inject(copied(module, torch.bfloat16), KINDS[kind].injections(spec, backend.name, None))
            times[backend.name] = milliseconds(twin, x, 10 if kind == "ssd_mixer" else 3)
    parts = ", ".join(f"{name} {t:.2f} ms ({own / t:.0f}×)" for name, t in times.items())
    print(f"\n{spec.describe()}, {tokens} tokens, forward+backward: transformers {own:.2f} ms, {parts}")
    if kind != "delta_mixer":
        assert own / times["triton"] >= 10

"""On a CUDA GPU: the kernels of latent attention's heads against fp64, whole patched modules three ways, speed against a copy."""

from __future__ import annotations

import compare
import pytest
import torch
import transformers
from test_gpu_attention_block import milliseconds
from test_latent import SPECS, apart, check_heads, check_selective_checkpointing, check_tables, heads_and_grads, operands, patch

from moepatch.layers.attention import name_of, register_names
from moepatch.layers.attention.function import kernels
from moepatch.layers.attention.spec import AttentionSpec
from moepatch.layers.latent_heads import LatentHeads, reference_latent

pytestmark = pytest.mark.gpu

V3 = LatentHeads(128, 128, 64, 128, "pairs to halves")
SHAPES = {
    "DeepSeek-V3": V3,
    "DeepSeek-V2-Lite": LatentHeads(16, 128, 64, 128, "pairs, complex"),
    "MiniCPM3": LatentHeads(40, 64, 32, 64, "half"),
    "Kimi Linear": LatentHeads(32, 128, 64, 128, "none"),
    "GLM-4.7-Flash": LatentHeads(20, 192, 64, 256, "pairs to halves"),
    "LongCat-Flash": LatentHeads(64, 128, 64, 128, "pairs to halves", q_scale=2.0),
}


def heads():
    from moepatch.layers.latent_backends import triton_latent

    return triton_latent


@pytest.mark.parametrize("name", SHAPES)
def test_bf16_heads_of_model_shapes(name):
    check_heads(heads(), SHAPES[name], torch.bfloat16, device="cuda", owned=True, sequence=65)


def test_small_odd_heads_in_fp32():
    """A compile takes about a second, so this takes some of them."""
    for spec, owned in ((SPECS[1], False), (SPECS[2], True), (SPECS[5], False)):
        check_heads(heads(), spec, torch.float32, device="cuda", owned=owned)


@pytest.mark.parametrize(("batch", "sequence"), [(1, 1), (3, 1), (1, 17)])
def test_few_tokens(batch, sequence):
    check_heads(heads(), V3, torch.bfloat16, device="cuda", batch=batch, sequence=sequence)


def test_in_place_or_not_and_twice_the_same():
    """Numbers change places in a row of the queries; the gradient of the shared key is summed in one order."""
    given = operands(V3, torch.bfloat16, "cuda", batch=1, sequence=4096)
    first = heads_and_grads(heads(), V3, *given)
    for owned in (True, True, False):
        assert all(torch.equal(a, b) for a, b in zip(first, heads_and_grads(heads(), V3, *given, owned=owned), strict=True))


def test_gradients_of_any_strides():
    for spec in (V3, SHAPES["Kimi Linear"]):
        given = operands(spec, torch.float32, "cuda")
        both = (heads_and_grads(f, spec, *given, grads=apart) for f in (heads(), reference_latent))
        assert all(compare.error(a, b) < 1e-5 for a, b in zip(*both, strict=True))


def test_tables_and_selective_checkpointing():
    check_tables(heads(), "cuda")
    check_selective_checkpointing(heads(), SPECS[0], "cuda")


def test_nothing_waits_for_the_device():
    q, kv, down, cos, sin = (t.requires_grad_(i < 3) for i, t in enumerate(operands(V3, torch.bfloat16, "cuda", sequence=64)))

    def run():
        outs = heads()(q * 1, kv, down[..., 7:], V3, cos, sin, True)
        torch.autograd.grad(outs, (q, kv, down), outs)

    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


CONFIGS = {
    "DeepSeek-V3": (transformers.DeepseekV3Config, transformers.DeepseekV3Model, {"first_k_dense_replace": 1}),
    "DeepSeek-V2": (transformers.DeepseekV2Config, transformers.DeepseekV2Model, {"first_k_dense_replace": 1, "head_dim": 64}),
}


def module_run(name, dtype, attention, backend=None, sequence=192):
    """Result and gradients of one attention module with DeepSeek's heads, eight of them."""
    config, cls, extra = CONFIGS[name]
    sizes = dict(hidden_size=1024, num_attention_heads=8, num_key_value_heads=8, q_lora_rank=384, kv_lora_rank=128, intermediate_size=64)
    config = config(num_hidden_layers=1, vocab_size=64, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, **sizes, **extra)
    model = cls(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.data = (torch.randn(p.shape, generator=generator) * (0.2 if p.ndim == 1 else p.shape[-1] ** -0.5) + (p.ndim == 1)).bfloat16().to(dtype)
    model.cuda().train()
    register_names()
    model.config._attn_implementation = attention
    x = torch.randn(2, sequence, config.hidden_size, generator=generator).bfloat16().to("cuda", dtype)
    cotangent = torch.randn(x.shape, generator=generator).bfloat16().to("cuda", dtype)
    tables = model.rotary_emb(x, position_ids=torch.arange(sequence, device="cuda")[None])
    if backend is not None:
        assert patch(model, backend).steps
    module = model.layers[0].self_attn
    y, _ = module(hidden_states=x.requires_grad_(), position_embeddings=tables, attention_mask=None)
    y.backward(cotangent)
    return {"y": y.detach(), "x": x.grad} | {key: p.grad for key, p in module.named_parameters()}


@pytest.mark.parametrize("attention", ["cudnn", "fa4", "torch"])
@pytest.mark.parametrize("name", CONFIGS)
def test_modules_in_bf16(name, attention):
    """With the attention kernels, to which values go as a view."""
    form = AttentionSpec(heads=8, kv_heads=8, head_dim=192, v_head_dim=128)
    if attention != "torch" and (why := kernels(attention)[0].why_not(form, torch.bfloat16, torch.device("cuda"))) is not None:
        pytest.skip(why)
    truth, theirs = module_run(name, torch.float32, "sdpa"), module_run(name, torch.bfloat16, name_of(attention))
    ours = module_run(name, torch.bfloat16, name_of(attention), "triton")
    assert not {
        key: (e, own) for key, value in truth.items() if (e := compare.error(ours[key], value)) > max(1.5 * (own := compare.error(theirs[key], value)), 1e-5)
    }


@pytest.mark.timing
@pytest.mark.parametrize("name", ["DeepSeek-V3", "Kimi Linear"])
def test_heads_run_at_the_speed_of_a_copy(name, capsys):
    """At 4096 tokens; the test asks for half of a copy's bandwidth, so that a shared machine does not fail it."""
    from moepatch.kernels.latent import latent_backward, latent_forward

    spec, tokens, lines = SHAPES[name], 4096, []
    q, kv, down, cos, sin = operands(spec, torch.bfloat16, "cuda", batch=1, sequence=tokens)
    shared = down[..., 7:].contiguous()
    rows = 2 * tokens * spec.heads
    changed = 0 if spec.rope == "none" else 1
    keys = spec.nope + spec.head_dim
    bytes_of = {
        "forward, in place": rows * (2 * spec.rope_dim * changed + keys),
        "forward": rows * (2 * spec.head_dim * changed + keys),
        "backward": rows * (2 * spec.head_dim * changed + spec.head_dim + spec.value_dim + spec.nope + spec.value_dim),
    }
    out = latent_forward(q, kv, shared, spec, cos, sin, False)
    by_token = [torch.randn_like(o.contiguous()) for o in out]
    dtypes = (torch.bfloat16,) * 3
    calls = {
        "forward, in place": lambda: latent_forward(q, kv, shared, spec, cos, sin, True),
        "forward": lambda: latent_forward(q, kv, shared, spec, cos, sin, False),
        "backward": lambda: latent_backward(*by_token, spec, cos, sin, dtypes),
    }
    ours = {key: milliseconds(call) for key, call in calls.items()}
    for key, size in bytes_of.items():
        source = torch.empty(size // 2, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        copy = milliseconds(lambda source=source, target=target: target.copy_(source))
        lines.append(f"{name} {key}: {ours[key] * 1e3:.0f} µs, a copy of the same bytes {copy * 1e3:.0f} µs")
        assert ours[key] < 2 * copy, lines
    leaves = [t.requires_grad_() for t in (q, kv, shared)]
    for label, function in (("ours", heads()), ("plain torch", reference_latent)):
        both = milliseconds(lambda function=function: torch.autograd.grad(function(*leaves, spec, cos, sin), leaves, [g.transpose(1, 2) for g in by_token]), 10)
        lines.append(f"{name} forward and backward, {label}: {both * 1e3:.0f} µs")
    with capsys.disabled():
        print("\n" + "\n".join(lines))

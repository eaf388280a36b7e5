"""Attention modules: which are taken, the numbers of patched models, and the kernels of heads against their reference."""

from __future__ import annotations

import itertools

import compare
import pytest
import torch
import transformers
import zoo
from attention_behaviour import Behaviour
from interpreter import needs_triton, passes_in_the_interpreter

import moepatch
from moepatch import kinds
from moepatch.layers import attention_block_backends, norm_backends  # noqa: F401  (they register)
from moepatch.layers.attention_block import ATTENTION_BLOCK, PatchedAttentionBlock
from moepatch.layers.norm import NORM
from moepatch.layers.rope import ROPES, HeadNorm, HeadsSpec, reference_heads
from moepatch.match.attention_block import _sizes, match_attention_block
from moepatch.scan import Scan
from moepatch.site import Site
from moepatch.surgery import InjectClass, Journal

for kind in (NORM, ATTENTION_BLOCK):
    kinds.KINDS.setdefault(kind.name, kind)

#: What is read from each family: how its first and its last attention module treat heads.
READINGS = {
    "qwen3_moe": "norm head, rope half",
    "qwen2_moe": "rope half",
    "mixtral": "rope half",
    "olmoe": "norm full, rope half",
    "gpt_oss": "rope half, narrow tables",
    "glm4_moe": "rope half, partial",
    "dots1": "norm head, rope half",
    "ernie4_5_moe": "rope interleaved",
    "cohere2_moe": "rope interleaved, paired tables",
    "granitemoe": "rope half",
    "phimoe": "rope half",
    "minimax_m2": "norm full, rope half, partial",
    "hunyuan_v1_moe": "norm after, rope half",
    "nemotron_h": "no rope",
    "jamba": "no rope",
    "qwen3_next": "norm head, rope half, partial, gated",
    "afmoe": "norm head, rope half, gated",
    "lfm2_moe": "norm head, rope half",
}
DENSE = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {}),
    "gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM, {}),
    "gemma3": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM, {}),
}


def build(name):
    if name not in DENSE:
        return zoo.build(name)
    config, model, extra = DENSE[name]
    known = {key: value for key, value in zoo.COMMON.items() if key in config().to_dict()}
    built = model(config(**{**known, "num_hidden_layers": 2, **extra})).train()
    zoo.randomize_(built)
    return built


def inputs(name, model):
    if name not in DENSE:
        return zoo.inputs(name, model)
    return zoo.INPUTS["text"](model, 2, 12, torch.Generator().manual_seed(0))


def sites(model):
    scan, memo = Scan(model), {}
    found = ((f.module, match_attention_block(f, scan, memo)) for f in scan)
    return [(module, site) for module, site in found if isinstance(site, Site)]


def patch(model, backend="reference"):
    """The journal of a model whose attention modules have all been patched."""
    journal = Journal()
    for module, site in sites(model):
        for relative, (mixin, state) in ATTENTION_BLOCK.injections(site.spec, backend, None).items():
            journal.do(InjectClass(module.get_submodule(relative), mixin, state))
        for step in ATTENTION_BLOCK.relayout(module, site.spec):
            journal.do(step)
    return journal


def patched(model):
    return [m for m in model.modules() if isinstance(m, PatchedAttentionBlock)]


BEHAVIOUR = Behaviour(build, inputs, patch, patched)
step = BEHAVIOUR.step


@pytest.mark.parametrize("name", [*READINGS, *DENSE])
def test_a_patched_model_computes_the_same(name):
    if name in zoo.FAMILIES and (reason := zoo.available(name)) is not None:
        pytest.skip(reason)

    def look(model):
        found = patched(model)
        assert found and all("Attention" not in type(m).__name__ or m in found for m in model.modules() if "q_proj" in m._modules)
        if name in READINGS:
            assert found[0]._moepatch.spec.describe().endswith("×16, " + READINGS[name])

    BEHAVIOUR.computes_the_same(name, look)


@pytest.mark.parametrize("name", ["deepseek_v3", "dbrx", "zaya", "gemma4"])
def test_other_attention_is_left_as_it_is(name):
    assert zoo.available(name) is not None or not sites(zoo.build(name))


def test_a_limit_on_the_projections_is_not_overlooked():
    model = zoo.build("olmoe")
    model.config.clip_qkv = 8.0
    assert not sites(model)


def test_layers_are_read_once():
    model, memo = zoo.build("qwen3_moe"), {}
    scan = Scan(model)
    specs = [s.spec for f in scan if isinstance(s := match_attention_block(f, scan, memo), Site)]
    assert len(specs) == 2 and specs[0] is specs[1]


def test_a_scale_model_is_as_good_as_the_module():
    """Wide modules, on the meta device, are tried at other sizes."""
    config = transformers.Qwen3MoeConfig(hidden_size=2048, num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_hidden_layers=1, num_experts=4)
    with torch.device("meta"):
        model = transformers.Qwen3MoeForCausalLM(config)
    ((_, site),) = sites(model)
    assert site.spec.describe() == "H=2048 heads=32/4×128, norm head, rope half"
    config = transformers.GptOssConfig(num_hidden_layers=1, num_local_experts=4)  # 64 heads of 64, window of 128
    with torch.device("meta"):
        model = transformers.GptOssForCausalLM(config)
    ((_, site),) = sites(model)
    assert site.spec.describe() == "H=2880 heads=64/8×64, rope half, narrow tables"


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "cohere2_moe", "llama"])
def test_generate_with_a_cache(name):
    BEHAVIOUR.generates_with_a_cache(name)


def test_gradient_checkpointing():
    BEHAVIOUR.checkpoints("qwen3_moe")


def test_dropout_and_weights_are_those_of_the_family():
    BEHAVIOUR.drops_out_and_returns_weights("qwen3_moe")


def test_lora_put_on_later_takes_part():
    BEHAVIOUR.takes_lora_later("qwen3_moe", ["q_proj", "o_proj"])


@pytest.mark.parametrize("child", ["v_proj", "q_norm", "o_proj"])
def test_hooks_on_children_take_part(child):
    BEHAVIOUR.calls_hooks("qwen3_moe", child)


def test_copies_and_pickles():
    BEHAVIOUR.copies_and_pickles("gpt_oss")


def test_autocast_computes_in_its_dtype():
    BEHAVIOUR.follows_autocast("qwen3_moe")


def test_positional_arguments_and_modules_without_rotation():
    model = zoo.build("granitemoehybrid")
    ((module, _), *_) = sites(model)
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    before = module(hidden_states=x, attention_mask=None, position_embeddings=None)[0]
    patch(model)
    assert compare.error(module(hidden_states=x, attention_mask=None, position_embeddings=None)[0], before) < 1e-5
    model = zoo.build("mixtral")
    ((module, _), *_) = sites(model)
    tables = torch.randn(1, 5, 16), torch.randn(1, 5, 16)
    before = module(x, tables, None)[0]
    patch(model)
    assert compare.error(module(x, tables, None)[0], before) < 1e-5


# --- kernels -------------------------------------------------------------------------------------------------------------------------


def specs():
    """Norms, rotations with the widths of their tables, with and without a gate, at sizes that are and are not powers of two."""
    ropes = [("half", 12), ("half, narrow tables", 8), ("interleaved", 8), ("interleaved, paired tables", 16), ("half", 16), ("none", 0)]
    for i, (place, (rope, table)) in enumerate(itertools.product((None, "head", "full", "after"), ropes)):
        gated = (i + i // len(ropes)) % 2 == 1
        norm = None if place is None else HeadNorm(place, 1e-5, float(gated), not gated)
        heads, kv_heads, value_dim = (3, 1, 8) if gated else (4, 2, 16)
        yield HeadsSpec(heads, kv_heads, 16, value_dim, norm, rope, gated), table


def operands(spec, table, dtype, device="cpu", batch=2, sequence=5):
    """The joint projection, the norms' weights and the tables, at random; tables are shared by all sequences where there is a gate."""
    generator = torch.Generator().manual_seed(0)

    def made(*shape, center=0.0, scale=1.0):
        return (center + scale * torch.randn(*shape, generator=generator)).to(device, dtype)

    norm = spec.norm
    widths = [count * spec.head_dim if norm and norm.place == "full" else spec.head_dim for count in (spec.heads, spec.kv_heads)]
    weights = [made(width, center=1 - norm.offset, scale=0.2) if norm else None for width in widths]
    tables = [made(1 if spec.gated else batch, sequence, table) if table else None for _ in range(2)]
    return [made(batch, sequence, sum(spec.splits)), *weights, *tables]


def heads_and_grads(function, spec, joint, q_weight, k_weight, cos, sin):
    """Outputs, and the gradients of the projection and the weights for a fixed cotangent."""
    leaves = [t.detach().clone().requires_grad_() for t in (joint, q_weight, k_weight) if t is not None]
    outs = [o for o in function(leaves[0], spec, *(leaves[1:] or (None, None)), cos, sin) if o is not None]
    generator = torch.Generator().manual_seed(1)
    grads = torch.autograd.grad(outs, leaves, [torch.randn(o.shape, generator=generator).to(o) for o in outs])
    return [*(o.detach() for o in outs), *grads]


def check_heads(function, spec, table, dtype, slack=1.5, device="cpu", **shape):
    """Three ways: fp64, the reference in `dtype`, and `function`."""
    given = operands(spec, table, dtype, device, **shape)
    wide = [None if t is None else t.double() for t in given]
    rows = zip(*(heads_and_grads(f, spec, *a) for f, a in ((function, given), (reference_heads, given), (reference_heads, wide))), strict=True)
    for i, (ours, theirs, truth) in enumerate(rows):
        assert ours.dtype == dtype and compare.error(ours, truth) <= max(slack * compare.error(theirs, truth), 1e-6), (spec, table, dtype, i)


def check_tables():
    """Tables that want gradients get them."""
    from moepatch.layers.attention_block_backends import triton_heads

    spec = HeadsSpec(4, 2, 16, 16, HeadNorm("head", 1e-5, 0.0, True), "half")
    grads = []
    for function in (triton_heads, reference_heads):
        joint, *weights, cos, sin = (t.requires_grad_() for t in operands(spec, 16, torch.float32))
        q, k, *_ = function(joint, spec, *weights, cos, sin)
        grads.append(torch.autograd.grad((q.sin() + 1).sum() + k.square().sum(), (cos, sin, joint)))
    assert all(compare.error(a, b) < 1e-5 for a, b in zip(*grads, strict=True))


def check_rows():
    """The backward kernel of the usual heads: several tiles for each program, tails, one sequence and more, offsets of 64 bits."""
    from moepatch.kernels import rope
    from moepatch.layers.attention_block_backends import triton_heads

    rope._TILE, far = (256, 4, 3, 1), rope._FAR
    for heads, kv_heads, d, value_dim, how, offset in ((4, 2, 32, 32, "half", 0.0), (5, 1, 16, 48, "half", 1.0), (6, 3, 64, 24, "half, narrow tables", 0.0)):
        spec, table = HeadsSpec(heads, kv_heads, d, value_dim, HeadNorm("head", 1e-5, offset, True), how), d // ROPES[how].width
        for batch, sequence in ((1, 1), (1, 37), (3, 13)):
            rope._FAR = far if sequence == 37 else 0
            check_heads(triton_heads, spec, table, torch.float32, batch=batch, sequence=sequence)
    # As few programs as take no longer than all of them, for tokens that no division comes out even for.
    for tokens in (1, 7, 333, 4096, 100_003):
        for most in (4, 6, 264):
            programs = rope._shares(tokens, spec, 32, most)
            assert min(programs) >= 1 and sum(programs) <= most
    assert sum(rope._shares(100_003, spec, 32, 264)) > 250


def check_turned(spec, table, dtype=torch.float32, device="cpu", **shape):
    """In place: the heads that the other way returns, to the bit, and nothing else moved."""
    from moepatch.kernels.rope import heads_forward, turn_heads

    joint, _, _, cos, sin = operands(spec, table, dtype, device, **shape)
    q, k = heads_forward(joint, spec, None, None, cos, sin)
    turned = joint.clone()
    turn_heads(turned, spec, cos, sin)
    assert torch.equal(turned, torch.cat((q.flatten(2), k.flatten(2), joint[..., -spec.splits[2] :]), -1)), (spec, table)


def check_kernels():
    from moepatch.layers.attention_block_backends import triton_heads

    cases = 0
    for spec, table in specs():
        check_heads(triton_heads, spec, table, torch.float32)
        cases += 1
        if spec.norm is None and spec.rope != "none" and not spec.gated:
            check_turned(spec, table)
            cases += 1
    for place in ("head", "full"):  # the interpreter rounds towards zero
        check_heads(triton_heads, HeadsSpec(4, 2, 16, 16, HeadNorm(place, 1e-5, 0.0, True), "half"), 16, torch.bfloat16, slack=3.5)
        cases += 1
    # More than one block of tokens.
    check_heads(triton_heads, HeadsSpec(4, 2, 64, 64, HeadNorm("after", 1e-5, 0.0, True), "half"), 64, torch.float32, sequence=19)
    check_heads(triton_heads, HeadsSpec(4, 2, 64, 64, None, "half"), 64, torch.float32, sequence=19)
    check_tables()
    check_rows()
    print(f"{cases} cases equal")


@pytest.mark.parametrize("rope", ROPES)
def test_rotations_keep_lengths(rope):
    x, angles = torch.randn(2, 5, 3, 16), torch.randn(1, 5, 16 // ROPES[rope].width)
    if rope == "half":
        angles = angles[..., :8].repeat(1, 1, 2)
    if "paired" in rope:
        angles = angles[..., :8].repeat_interleave(2, -1)
    from moepatch.layers.rope import rotate

    assert torch.allclose(rotate(x, angles.cos(), angles.sin(), rope).norm(dim=-1), x.norm(dim=-1), rtol=1e-5)


@needs_triton
def test_kernels_in_tritons_interpreter():
    passes_in_the_interpreter(__file__, "cases equal")


if __name__ == "__main__":
    from interpreter import let_tensors_bound_loops

    let_tensors_bound_loops()
    check_kernels()


@pytest.mark.parametrize(("heads", "kv_heads"), [(64, 8), (64, 64), (128, 8), (64, 1)])
def test_heads_that_are_as_many_as_they_are_wide_are_tried_on_a_small_model(heads, kv_heads):
    width = heads
    config = transformers.Qwen3Config(
        hidden_size=80, intermediate_size=96, num_hidden_layers=1, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=width, vocab_size=64
    )
    with torch.device("meta"):
        model = transformers.Qwen3ForCausalLM(config)
    (pattern,) = [p for p in moepatch.plan(model).patterns if p.site.kind == "attention_block"]
    sizes = _sizes(pattern.site.spec)
    assert sizes[width] == 16 and pattern.site.spec.resized(sizes).heads.heads * 16 == sizes[heads * width]

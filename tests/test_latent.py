"""Attention modules with latents: which are taken, the numbers of patched models, and the kernels of heads against their reference."""

from __future__ import annotations

from functools import partial

import compare
import pytest
import torch
import transformers
import zoo
from attention_behaviour import Behaviour
from interpreter import needs_triton, passes_in_the_interpreter
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import DynamicCache

import moepatch
from moepatch.layers.latent import LATENT, PatchedLatent, random_tables
from moepatch.layers.latent_heads import TURNS, LatentHeads, reference_latent, tables_of
from moepatch.match.latent import match_latent
from moepatch.scan import Scan
from moepatch.site import Site
from moepatch.surgery import InjectClass, Journal

#: What is read from each family, and how many of its modules are taken.
READINGS = {
    "axk1": ("rope pairs to halves", 3),
    "bailing_hybrid": ("rope pairs to halves, gated", 1),
    "deepseek_v2": ("rope pairs, complex", 3),
    "deepseek_v3": ("rope pairs to halves", 3),
    "glm4_moe_lite": ("rope pairs to halves", 3),
    "kimi_linear": ("no rope", 1),
    "longcat_flash": ("rope pairs to halves, scaled", 4),
    "youtu": ("rope pairs to halves", 2),
    "minicpm3": ("rope half", 2),
    "deepseek_v3, plain": ("rope half", 2),
    "deepseek_v3, q_proj": ("rope pairs to halves", 2),
    "deepseek_v3, biases": ("rope pairs to halves", 2),
}
MORE = {
    "youtu": ("youtu", {}),
    "minicpm3": ("minicpm3", {}),
    "deepseek_v3, plain": ("deepseek_v3", {"rope_interleave": False}),
    "deepseek_v3, q_proj": ("deepseek_v3", {"q_lora_rank": None}),
    "deepseek_v3, biases": ("deepseek_v3", {"attention_bias": True, "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "mscale_all_dim": 1.0,
                            "mscale": 0.7, "rope_theta": 1e4, "original_max_position_embeddings": 32}}),
}  # fmt: skip


def build(name):
    if name not in MORE:
        return zoo.build(name)
    kind, extra = MORE[name]
    config = transformers.models.auto.configuration_auto.CONFIG_MAPPING[kind]
    wanted = {**zoo.COMMON, **zoo.MLA, "num_hidden_layers": 2, "head_dim": zoo.COMMON["qk_rope_head_dim"], **extra}
    known = config().to_dict()
    built = transformers.AutoModelForCausalLM.from_config(config(**{key: value for key, value in wanted.items() if key in known})).train()
    zoo.randomize_(built)
    return built


def available(name):
    return None if name in MORE else zoo.available(name)


def inputs(name, model):
    return zoo.INPUTS["text"](model, 2, 12, torch.Generator().manual_seed(0)) if name in MORE else zoo.inputs(name, model)


def sites(model):
    scan, memo = Scan(model), {}
    found = ((f.module, match_latent(f, scan, memo)) for f in scan)
    return [(module, site) for module, site in found if isinstance(site, Site)]


def patch(model, backend="reference"):
    """The journal of a model whose attention modules have all been patched."""
    journal = Journal()
    for module, site in sites(model):
        for relative, (mixin, state) in LATENT.injections(site.spec, backend, None).items():
            journal.do(InjectClass(module.get_submodule(relative), mixin, state))
    return journal


def patched(model):
    return [m for m in model.modules() if isinstance(m, PatchedLatent)]


BEHAVIOUR = Behaviour(build, inputs, patch, patched)
step = BEHAVIOUR.step


@pytest.mark.parametrize("name", READINGS)
def test_a_patched_model_computes_the_same(name):
    if (reason := available(name)) is not None:
        pytest.skip(reason)

    def look(model):
        words, count = READINGS[name]
        assert len(patched(model)) == count and patched(model)[0]._moepatch.spec.describe().endswith(f"latent 16, {words}")

    BEHAVIOUR.computes_the_same(name, look)


@pytest.mark.parametrize("name", ["deepseek_v32", "glm_moe_dsa", "hy_v4", "axk2", "mistral4", "qwen3_moe"])
def test_other_attention_is_left_as_it_is(name):
    assert zoo.available(name) is not None or not sites(zoo.build(name))


def test_a_scale_model_is_as_good_as_the_module():
    """Wide modules, on the meta device, are tried at other sizes; here as many heads as dims."""
    with torch.device("meta"):
        model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(num_hidden_layers=2, first_k_dense_replace=2))
    (_, first), (_, second) = sites(model)
    assert first.spec is second.spec
    assert first.spec.describe() == "H=7168 heads=128×(128+64) values 128 latent 512, rope pairs to halves"


def test_optimize_takes_it():
    model = zoo.build("deepseek_v3")
    before = step("deepseek_v3", model)
    model = moepatch.optimize(model, latent="reference")
    assert len(patched(model)) == 3 and "attention: latent, low-rank q" in str(moepatch.report(model))
    assert compare.error(step("deepseek_v3", model)["logits"], before["logits"]) < 1e-5
    moepatch.restore(model)
    assert not patched(moepatch.optimize(model, latent=None))


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2", "longcat_flash", "kimi_linear", "minicpm3"])
def test_generate_with_a_cache(name):
    BEHAVIOUR.generates_with_a_cache(name)


def test_a_cache_of_a_training_step_holds_what_it_did():
    model = zoo.build("deepseek_v3")
    given = inputs("deepseek_v3", model)
    caches = []
    for change in (lambda model: None, patch):
        change(model)
        cache = DynamicCache(config=model.config)
        model(**given, past_key_values=cache, use_cache=True)
        caches.append([t for layer in cache.layers for t in (layer.keys, layer.values)])
    assert len(caches[0]) == 6 and all(compare.error(a, b) < 1e-5 for a, b in zip(*caches, strict=True))


def test_gradient_checkpointing():
    BEHAVIOUR.checkpoints("deepseek_v3")


def test_dropout_and_weights_are_those_of_the_family():
    BEHAVIOUR.drops_out_and_returns_weights("deepseek_v3")


def test_lora_put_on_later_takes_part():
    BEHAVIOUR.takes_lora_later("deepseek_v3", ["q_b_proj", "kv_b_proj"])


@pytest.mark.parametrize("child", ["q_b_proj", "kv_a_layernorm", "kv_b_proj", "o_proj"])
def test_hooks_on_children_take_part(child):
    BEHAVIOUR.calls_hooks("deepseek_v3", child)


def test_copies_and_pickles():
    BEHAVIOUR.copies_and_pickles("longcat_flash")


def test_autocast_computes_in_its_dtype():
    BEHAVIOUR.follows_autocast("deepseek_v3")


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2"])
def test_positional_arguments_and_padding(name):
    """A padded batch goes to the attention function with the mask that the family would give it."""
    model = zoo.build(name)
    given = inputs(name, model)
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    given["attention_mask"][1, :5] = 0
    module, x = sites(model)[0][0], torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    tables = random_tables(sites(model)[0][1].spec.heads, 1, 5, torch.Generator().manual_seed(1))
    roles = sites(model)[0][1].spec.roles
    order = [tables if p == roles.tables else None for p in roles.names[1:]]
    before = model(**given).logits, module(x, *order)[0]
    patch(model)
    assert all(compare.error(a, b) < 1e-5 for a, b in zip((model(**given).logits, module(x, *order)[0]), before, strict=True))


def test_a_compiled_module():
    model = zoo.build("deepseek_v3")
    module = sites(model)[0][0]
    x, tables = torch.randn(2, 5, 64), (torch.randn(1, 5, 8), torch.randn(1, 5, 8))
    before = module(x, tables, None)[0]
    patch(model, "triton")  # traced as plain torch
    assert compare.error(torch.compile(module, backend="aot_eager", fullgraph=True)(x, tables, None)[0], before) < 1e-5


# --- kernels -------------------------------------------------------------------------------------------------------------------------

#: Heads, sizes that are and are not powers of two, every rotation, with and without a scale.
SPECS = [
    LatentHeads(4, 16, 8, 16, "pairs to halves"),
    LatentHeads(3, 12, 6, 20, "half"),
    LatentHeads(5, 8, 20, 4, "pairs, complex"),
    LatentHeads(2, 24, 4, 8, "none"),
    LatentHeads(2, 16, 16, 16, "pairs to halves", q_scale=2.5),
    LatentHeads(1, 4, 2, 6, "none", q_scale=0.5),
    LatentHeads(3, 40, 12, 24, "half", q_scale=1.25),
]


def operands(spec, dtype, device="cpu", batch=2, sequence=5):
    """The projections (the shared key as a slice, as the family has it) and the tables, at random."""
    generator = torch.Generator().manual_seed(0)

    def made(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    q, kv = made(batch, sequence, spec.heads * spec.head_dim), made(batch, sequence, spec.heads * (spec.nope + spec.value_dim))
    down = made(batch, sequence, spec.rope_dim + 7)
    if spec.rope == "none":
        return q, kv, down, None, None
    cos, sin = tables_of(random_tables(spec, batch if spec.heads % 2 else 1, sequence, generator, device))
    return q, kv, down, *((cos, sin) if TURNS[spec.rope].complex else (cos.to(device, dtype), sin.to(device, dtype)))


def heads_and_grads(function, spec, q, kv, down, cos, sin, *, owned=False, grads=None):
    """Outputs, and the gradients of the three projections for a fixed cotangent."""
    leaves = [t.detach().clone().requires_grad_() for t in (q, kv, down)]
    outs = function(leaves[0] * 1 if owned else leaves[0], leaves[1], leaves[2][..., 7:], spec, cos, sin, owned)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(o.shape, generator=generator).to(o) for o in outs] if grads is None else grads(outs)
    return [*(o.detach() for o in outs), *torch.autograd.grad(outs, leaves, cotangents)]


def check_heads(function, spec, dtype, slack=1.5, device="cpu", owned=False, **shape):
    """Three ways: fp64, the reference in `dtype`, and `function`."""
    given = operands(spec, dtype, device, **shape)
    wide = [None if t is None else t.double() for t in given]
    ours = heads_and_grads(function, spec, *given, owned=owned)
    rows = zip(ours, heads_and_grads(reference_latent, spec, *given), heads_and_grads(reference_latent, spec, *wide), strict=True)
    for i, (own, theirs, truth) in enumerate(rows):
        assert own.dtype == dtype and compare.error(own, truth) <= max(slack * compare.error(theirs, truth), 1e-6), (spec, dtype, owned, i)


def apart(outs):
    """Cotangents of strange strides: heads first, every second number, and none for the values."""
    return [torch.ones_like(outs[0]).cumsum(-1).contiguous(), torch.ones(*outs[1].shape[:-1], 2 * outs[1].shape[-1]).to(outs[1])[..., ::2], outs[2].detach()]


def check_strides(function):
    for spec in (SPECS[0], SPECS[3]):
        given = operands(spec, torch.float32)
        both = (heads_and_grads(f, spec, *given, grads=apart) for f in (function, reference_latent))
        assert all(compare.error(a, b) < 1e-5 for a, b in zip(*both, strict=True))


def check_views(function, spec):
    """Values are a view of their projection; queries are put where they came from, if nobody else looks at them."""
    q, kv, down, cos, sin = operands(spec, torch.float32)
    before = q.clone()
    outs = function(q, kv, down[..., 7:], spec, cos, sin)
    assert torch.equal(q, before) and outs[2].data_ptr() == kv.data_ptr() + 4 * spec.nope
    again = function(q, kv, down[..., 7:], spec, cos, sin, True)
    assert again[0].data_ptr() == q.data_ptr() and all(torch.equal(a, b) for a, b in zip(outs, again, strict=True))


def check_tables(function, device="cpu"):
    """Tables that want gradients get them, and the projections theirs."""
    grads = []
    for f in (function, reference_latent):
        leaves = [t.requires_grad_() for t in operands(SPECS[0], torch.float32, device)]
        q, kv, down, cos, sin = leaves
        q, k, _ = f(q * 1, kv, down[..., 7:], SPECS[0], cos, sin, True)
        grads.append(torch.autograd.grad((q.sin() + 1).sum() + k.square().sum(), leaves))
    assert all(compare.error(a, b) < 1e-5 for a, b in zip(*grads, strict=True))


def check_selective_checkpointing(function, spec, device="cpu"):
    """It keeps results of products and hands them out again: they must not have been changed."""
    q, kv, down, cos, sin = operands(spec, torch.float32, device)
    x, weight = torch.randn(2, 5, 11, device=device), torch.randn(q.shape[-1], 11, device=device, requires_grad=True)

    def layer(x, weight):
        return sum(o.sin().sum() for o in function(nn.functional.linear(x, weight), kv, down[..., 7:], spec, cos, sin, True))

    def keep(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if "mm" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE

    (plain,) = torch.autograd.grad(layer(x, weight), weight)
    y = checkpoint(layer, x, weight, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, keep))
    assert compare.error(torch.autograd.grad(y, weight)[0], plain) < 1e-6


def check_kernels():
    from moepatch.layers.latent_backends import triton_latent

    cases = 0
    for spec in SPECS:
        for owned in (False, True):
            check_heads(triton_latent, spec, torch.float32, owned=owned)
            cases += 1
    for spec in SPECS[:3]:  # the interpreter rounds towards zero
        check_heads(triton_latent, spec, torch.bfloat16, slack=3.5)
        cases += 1
    # More than one tile of rows.
    check_heads(triton_latent, LatentHeads(5, 128, 64, 128, "pairs to halves"), torch.float32, owned=True, sequence=23)
    check_strides(triton_latent)
    check_tables(triton_latent)
    check_views(triton_latent, SPECS[0])
    check_selective_checkpointing(triton_latent, SPECS[0])
    print(f"{cases} cases equal")


@pytest.mark.parametrize("rope", TURNS)
def test_rotations_keep_lengths(rope):
    spec = LatentHeads(3, 4, 16, 8, rope)
    q, kv, down, *_ = operands(spec, torch.float32)
    angles = torch.randn(1, 5, 8)
    angles = angles.repeat(1, 1, 2) if TURNS[rope].whole else angles
    ours, *_ = reference_latent(q, kv, down[..., 7:], spec, angles.cos(), angles.sin())
    assert torch.allclose(ours.transpose(1, 2).flatten(2).norm(dim=-1), q.norm(dim=-1), rtol=1e-5)


@needs_triton
def test_kernels_in_tritons_interpreter():
    passes_in_the_interpreter(__file__, "cases equal")


if __name__ == "__main__":
    from interpreter import let_tensors_bound_loops

    let_tensors_bound_loops()
    check_kernels()

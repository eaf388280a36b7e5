"""Attention functions on the CPU: what `eager` computes, for every form of mask, by every path that does not need a GPU.

The kernels' own path (windows, packing, sinks around a log-sum-exp) is taken with a twin of theirs that is written out.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import inspect
import os
import pickle
import subprocess
import sys

import attention_twin
import compare
import pytest
import torch
import transformers
import zoo
from transformers import AttentionInterface, masking_utils
from transformers.masking_utils import AttentionMaskInterface
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeModel

import moepatch
from moepatch.layers.attention import CHAINS, attention_function, attention_mask, name_of, register_names
from moepatch.layers.attention import sink_kernels as kernels
from moepatch.layers.attention.exact import plain_attention
from moepatch.layers.attention.kernel import How
from moepatch.layers.attention.kind import ATTENTION_FUNCTION, AttentionCalls, trial
from moepatch.layers.attention.masks import Mask, read_pattern
from moepatch.layers.attention.packing import Packing
from moepatch.layers.attention.sinks import with_sinks
from moepatch.layers.attention.spec import CAUSAL, AttentionSpec, AttentionUse
from moepatch.layers.attention.torch_kernels import why_older_cudnn
from moepatch.match.attention_function import left_alone, looks, match_attention_function
from moepatch.scan import Scan
from moepatch.surgery import Journal

TWIN = "moepatch_twin"
SEQ = 24  # three windows of the zoo's models

FAMILIES = [
    "qwen3_moe", "gpt_oss", "mixtral", "deepseek_v3", "glm4_moe", "llama4_text", "nemotron_h", "granitemoe_swa", "granitemoehybrid", "mimo_v2_flash",
    "flint", "afmoe", "openai_privacy_filter", "inkling", "gemma2",
]  # fmt: skip
CASES = ["whole", "left padding", "right padding", "packed", "dense mask"]


@pytest.fixture(autouse=True)
def twin():
    """The name of the twin, for the time of a test."""
    register_names()
    AttentionInterface.register(TWIN, attention_function("torch", lambda: (attention_twin.TWIN,)))
    AttentionMaskInterface.register(TWIN, attention_mask)
    attention_twin.calls.clear()
    yield
    del AttentionInterface._global_mapping[TWIN], AttentionMaskInterface._global_mapping[TWIN]


def build(name, **settings):
    if name == "gemma2":
        config = transformers.Gemma2Config(
            vocab_size=zoo.VOCAB, hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
            sliding_window=8, attn_logit_softcapping=2.0, query_pre_attn_scalar=16, pad_token_id=0, **settings,
        )  # fmt: skip
        model = transformers.Gemma2ForCausalLM(config)
        zoo.randomize_(model)
        return model.train()
    if zoo.available(name) is not None:
        pytest.skip(zoo.available(name))
    if name == "llama4_text":
        settings = {"attention_chunk_size": 8, **settings}
    return zoo.build(name, **settings)


def sites(model):
    scan, memo = Scan(model), {}
    return [site for found in scan if (site := match_attention_function(found, scan, memo)) is not None]


@contextlib.contextmanager
def attention(model, name):
    """All attention of a model by one name."""
    before = [(config := model.get_submodule(site.fqn).config, config._attn_implementation_internal) for site in sites(model)]
    assert before
    for config, _ in before:
        config._attn_implementation_internal = name
    try:
        yield
    finally:
        for config, name in before:
            config._attn_implementation_internal = name


def inputs(case, model):
    ids = torch.randint(3, zoo.VOCAB, (1 if case == "packed" else 3, SEQ), generator=torch.Generator().manual_seed(1))
    labels = ids % model.config.num_labels if "Token" in type(model).__name__ else ids.clone()
    made = {"input_ids": ids, "labels": labels, "use_cache": False}
    if case == "packed":
        lengths = (5, 11, SEQ - 16)
        made["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
    elif case == "dense mask":
        seen = torch.rand(3, 1, SEQ, SEQ, generator=torch.Generator().manual_seed(2)) < 0.7
        made["attention_mask"] = torch.where(seen | torch.eye(SEQ, dtype=torch.bool), 0.0, torch.finfo(torch.float32).min).tril_()
    else:
        mask = torch.ones_like(ids)
        for row, hidden in enumerate((0, 5, 13) if "padding" in case else ()):
            part = slice(0, hidden) if case == "left padding" else slice(SEQ - hidden, None)
            mask[row, part] = 0
        made["attention_mask"] = mask
        # What a model says at padding is nobody's business: that goes for the token after it too, which would be foretold from there.
        first = (mask.cumsum(1) == 1) & (mask == 1)
        made["labels"] = labels.masked_fill((mask == 0) | first, -100)
    if "use_cache" not in type(model).forward.__code__.co_varnames and "Token" in type(model).__name__:
        del made["use_cache"]
    return made


def step(model, given):
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    out = model(**given)
    out.loss.backward()
    real = given["labels"] != -100
    return out.logits.detach()[real], {key: torch.zeros_like(p) if p.grad is None else p.grad.clone() for key, p in model.named_parameters()}


def same(model, given, name):
    # One token's choice between two experts that are nearly equal is not the subject.
    with attention(model, "eager"), compare.PinnedRouting(model) as pins:
        logits, grads = step(model, given)
    with attention(model, name), compare.PinnedRouting(model, pins):
        found, found_grads = step(model, given)
    assert all(g.isfinite().all() for g in found_grads.values())
    assert compare.error(found, logits) < 1e-5
    assert compare.together(found_grads, grads) < 1e-5


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FAMILIES)
def test_families_compute_what_eager_computes(name, case):
    model = build(name)
    given = inputs(case, model)
    for implementation in ("moepatch_torch", TWIN):
        same(model, given, implementation)
    # Dense by design: what has a bias or a softcap, padding of two-sided attention, and chunks that meet padding or packing.
    dense = {"inkling": CASES, "gemma2": CASES, "openai_privacy_filter": CASES[1:3], "llama4_text": CASES[1:4]}.get(name, ())
    if case != "dense mask" and case not in dense:
        assert attention_twin.calls
    packed = "padding" in case or (case == "packed" and name in ("qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe"))
    if packed and case not in dense:
        assert all(how.cu_seqlens is not None for how in attention_twin.calls)


@pytest.mark.parametrize("backend", CHAINS)
def test_every_backend_falls_back_where_its_kernels_do_not_serve(backend):
    model = build("gpt_oss")
    same(model, inputs("left padding", model), name_of(backend))


def test_all_families_that_are_taken_compute_what_they_did():
    taken = 0
    for name in zoo.FAMILIES:
        if zoo.available(name) is not None:
            continue
        model = zoo.build(name)
        if not sites(model):
            continue
        taken += 1
        logits, grads = compare.step(name, model)
        with attention(model, TWIN):
            found, found_grads = compare.step(name, model)
        for key, value in logits.items():
            assert compare.error(found[key], value) < 2e-5, (name, key)
        assert compare.together(found_grads, grads) < 2e-5, name
    assert taken >= 40


# --------------------------------------------------------------------------------------------------------- single calls


def tensors(heads=4, kv_heads=2, length=20, dim=16, v_dim=None, batch=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads, dim), (kv_heads, dim), (kv_heads, v_dim or dim))
    return [torch.randn(batch, length, h, d, generator=generator, dtype=dtype).transpose(1, 2).requires_grad_() for h, d in shapes]


def grads_of(out, leaves, seed=1):
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=out.dtype)
    return torch.autograd.grad((out * cotangent).sum(), leaves)


@pytest.mark.parametrize("window", [(-1, 0), (5, 0), (3, 3), (-1, -1)])
@pytest.mark.parametrize("v_dim", [16, 8])
@pytest.mark.parametrize("packed", [False, True])
def test_sinks_around_a_kernel_that_returns_the_log_sum_exp(window, v_dim, packed):
    q, k, v = tensors(v_dim=v_dim, batch=1)
    sinks = torch.randn(4, generator=torch.Generator().manual_seed(3), dtype=torch.float64).mul(3).requires_grad_()
    seen = attention_twin.visible(20, window)
    how = How(0.3, window, sinks)
    raw = attention_twin.PlainRaw()
    if packed:
        packing = Packing.of_lengths([7, 12, 1], torch.device("cpu"))
        segment = torch.tensor([0] * 7 + [1] * 12 + [2])
        seen = seen & (segment[:, None] == segment)
        how = how._replace(cu_seqlens=packing.cu_seqlens, max_len=packing.max_len)
        ours = packing.unpack(with_sinks(raw, packing.pack(q), packing.pack(k), packing.pack(v), how), 1, 20)
    else:
        ours = with_sinks(raw, q, k, v, how).transpose(1, 2)
    truth, _ = plain_attention(q, k, v, seen[None, None], scale=0.3, sinks_H=sinks)
    assert compare.error(ours, truth) < 1e-5
    for found, wanted in zip(grads_of(ours, (q, k, v, sinks)), grads_of(truth, (q, k, v, sinks)), strict=True):
        assert compare.error(found, wanted) < 1e-5


def test_sinks_around_torchs_flash_attention_for_the_cpu():
    q, k, v = tensors(kv_heads=4, dtype=torch.float32, length=40)
    sinks = torch.randn(4).requires_grad_()
    ours = with_sinks(attention_twin.CpuFlashRaw(), q, k, v, How(0.25, CAUSAL, sinks)).transpose(1, 2)
    truth, _ = plain_attention(q, k, v, None, scale=0.25, causal=True, sinks_H=sinks)
    assert compare.error(ours, truth) < 1e-5
    for found, wanted in zip(grads_of(ours, (q, k, v, sinks)), grads_of(truth, (q, k, v, sinks)), strict=True):
        assert compare.error(found, wanted) < 1e-5


def test_sinks_that_are_far_above_or_below_the_scores_stay_finite():
    q, k, v = tensors(dtype=torch.float32)
    sinks = torch.tensor([-200.0, 200.0, 0.0, 30.0]).requires_grad_()
    out = with_sinks(attention_twin.PlainRaw(), q, k, v, How(0.25, CAUSAL, sinks))
    assert all(t.isfinite().all() for t in (out, *grads_of(out, (q, k, v, sinks))))
    assert out[:, 1].abs().max() < 1e-30


@pytest.mark.parametrize("form", ["softcap", "sinks", "bias", "window", "unequal dims"])
@pytest.mark.parametrize("backend", ["torch", "cudnn", "te", "fa4"])
def test_single_calls_equal_the_reference(backend, form):
    q, k, v = tensors(v_dim=8 if form == "unequal dims" else None)
    options = {
        "softcap": {"softcap": 1.5},
        "sinks": {"s_aux": torch.randn(4, dtype=torch.float64).requires_grad_()},
        "bias": {"position_bias": torch.randn(1, 4, 20, 20, dtype=torch.float64).requires_grad_()},
    }.get(form, {})
    mask = attention_mask(2, 20, 20, mask_function=masking_utils.sliding_window_causal_mask_function(5)) if form == "window" else None
    leaves = (q, k, v, *(t for t in options.values() if torch.is_tensor(t)))
    module = torch.nn.Module()
    ours, theirs = (attention_function(name)(module, q, k, v, mask, scaling=0.3, **options)[0] for name in (backend, "reference"))
    assert compare.error(ours, theirs) < 1e-9
    for found, wanted in zip(grads_of(ours, leaves), grads_of(theirs, leaves), strict=True):
        assert compare.error(found, wanted) < 1e-9


def test_a_mask_by_cu_seqlens_needs_no_position_ids():
    q, k, v = tensors(batch=1)
    cu = torch.tensor([0, 6, 20], dtype=torch.int32)
    module = torch.nn.Module()
    ours = [attention_function("torch", lambda: c)(module, q, k, v, None, cu_seq_lens_q=cu, max_length_q=14)[0] for c in ((), (attention_twin.TWIN,))]
    alone = [attention_function("torch")(module, q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], None)[0] for a, b in ((0, 6), (6, 20))]
    assert attention_twin.calls[-1].max_len == 14
    assert all(compare.error(o, torch.cat(alone, 1)) < 1e-9 for o in ours)


def test_rows_without_any_key_have_finite_gradients():
    q, k, v = tensors()
    mask = torch.ones(2, 1, 20, 20, dtype=torch.bool).tril()
    mask[0, :, :6] = False
    for options in ({}, {"s_aux": torch.zeros(4, dtype=torch.float64)}, {"softcap": 2.0}):
        out = attention_function("torch")(torch.nn.Module(), q, k, v, mask, **options)[0]
        assert all(t.isfinite().all() for t in (out, *grads_of(out, (q, k, v))))


def test_dropout_is_unbiased_and_gone_in_eval():
    q, k, v = tensors(dtype=torch.float32, batch=1)
    plain = attention_function("torch")(torch.nn.Module(), q, k, v, None)[0]
    for options in ({}, {"s_aux": torch.full((4,), -50.0)}):
        torch.manual_seed(0)
        draws = [attention_function("torch", lambda: (attention_twin.TWIN,))(torch.nn.Module(), q, k, v, None, dropout=0.3, **options)[0] for _ in range(400)]
        assert not torch.equal(draws[0], draws[1])
        assert compare.error(torch.stack(draws).mean(0), plain) < 0.06
    assert not attention_twin.calls


def test_autocast_computes_in_its_dtype():
    q, k, v = tensors(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention_function("torch", lambda: (attention_twin.TWIN,))(torch.nn.Module(), q, k, v.bfloat16(), None)[0]
    assert out.dtype == torch.bfloat16 and attention_twin.calls


# --------------------------------------------------------------------------------------------------------------- masks


def test_plain_causal_batches_have_no_mask_and_nothing_is_built():
    assert attention_mask(2, 9, 9) is None
    assert attention_mask(2, 9, 9, attention_mask=torch.ones(2, 9, dtype=torch.bool)) is None
    wide = masking_utils.sliding_window_causal_mask_function(9)
    assert attention_mask(2, 9, 9, mask_function=wide, local_size=9) is None


def test_masks_are_what_transformers_builds_and_are_built_once():
    real = torch.ones(2, 9, dtype=torch.bool)
    real[1, :4] = False
    narrow = masking_utils.sliding_window_causal_mask_function(3)
    mask = attention_mask(2, 9, 9, mask_function=narrow, attention_mask=real, local_size=3)
    truth = masking_utils.sdpa_mask(2, 9, 9, mask_function=narrow, attention_mask=real, allow_is_causal_skip=False)
    assert isinstance(mask, Mask) and mask.window == (2, 0) and mask.is_padded
    assert torch.equal(mask.dense(), truth) and mask.dense() is mask.dense()
    assert torch.equal(mask[:, :, -1:], truth[:, :, -1:]) and mask.shape == truth.shape
    assert torch.equal(torch.logical_not(mask), ~truth)
    assert mask.packing.cu_seqlens.tolist() == [0, 9, 14] and mask.packing.max_len == 9
    assert mask.packing is mask.packing and torch.equal(mask.to("cpu").dense(), truth)
    assert torch.equal(copy.deepcopy(mask).dense(), truth)


def test_holes_in_a_row_are_a_dense_mask():
    real = torch.ones(1, 9, dtype=torch.bool)
    real[0, 4] = False
    assert torch.is_tensor(attention_mask(1, 9, 9, attention_mask=real))
    assert torch.is_tensor(attention_mask(1, 9, 9, attention_mask=torch.zeros(1, 9, dtype=torch.bool)))


def test_whoever_wants_a_dense_mask_gets_it():
    assert torch.is_tensor(attention_mask(1, 9, 9, allow_is_causal_skip=False))
    assert torch.is_tensor(attention_mask(1, 9, 9, mask_function=lambda b, h, q, k: q >= k, allow_is_causal_skip=False, use_vmap=True))
    assert torch.is_tensor(attention_mask(1, 3, 9, q_offset=6))
    assert torch.is_tensor(attention_mask(1, 3, 9))  # an empty static cache
    assert attention_mask(1, 1, 9, q_offset=8) is None


def test_chunks_are_packed_without_asking_the_device():
    mask = attention_mask(2, 9, 9, mask_function=masking_utils.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.long)))
    assert mask.packing.cu_seqlens.tolist() == [0, 4, 8, 9, 13, 17, 18] and mask.packing.index_T is None


def test_patterns_of_strangers_are_not_read():
    assert read_pattern(lambda b, h, q, k: q >= k) is None
    assert read_pattern(masking_utils.or_masks(masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function)) is None
    assert read_pattern(masking_utils.and_masks(masking_utils.causal_mask_function, lambda b, h, q, k: q >= k)) is None
    assert read_pattern(torch.nn.Identity()) is None
    both = masking_utils.and_masks(masking_utils.sliding_window_causal_mask_function(4), masking_utils.packed_sequence_mask_function(torch.zeros(1, 3)))
    assert read_pattern(both).window == (3, 0) and read_pattern(both).segments_BS is not None


# --------------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "mixtral", "deepseek_v3", "llama4_text", "gemma4_text", "gemma2"])
def test_generate_says_what_eager_says(name, cache):
    model = build(name).eval()
    if name == "llama4_text" and cache == "static" and zoo._version(transformers.__version__) < (5, 23):
        pytest.skip("this transformers cannot do that with any attention")
    ids = torch.randint(3, zoo.VOCAB, (2, 14), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    said = {}
    for implementation in ("eager", "moepatch_torch", TWIN):
        with attention(model, implementation):
            options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True, "eos_token_id": None}
            said[implementation] = model.generate(ids, attention_mask=mask, cache_implementation=cache, **options)
    for implementation in ("moepatch_torch", TWIN):
        assert torch.equal(said[implementation].sequences, said["eager"].sequences)
        assert all(compare.error(a, b) < 1e-5 for a, b in zip(said[implementation].logits, said["eager"].logits, strict=True))


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_attentions_come_out_when_they_are_asked_for(name):
    model = build(name).eval()
    given = {"input_ids": torch.arange(3, 15)[None], "output_attentions": True}
    with attention(model, "eager"):
        wanted = model(**given).attentions
    with attention(model, TWIN):
        found = model(**given).attentions
    assert len(found) == len(wanted) == 2
    assert all(compare.error(a, b) < 1e-5 for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model = build("gpt_oss")
    given = inputs("left padding", model)
    with attention(model, TWIN):
        logits, grads = step(model, given)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        found, found_grads = step(model, given)
    assert compare.error(found, logits) < 1e-6 and compare.together(found_grads, grads) < 1e-6


@pytest.mark.parametrize("case", ["whole", "left padding"])
def test_compiled_layers_have_one_graph(case):
    model = build("mixtral")
    given = inputs(case, model)
    with attention(model, "moepatch_torch"):
        logits, grads = step(model, given)
        for layer in model.model.layers:
            layer.self_attn.compile(backend="aot_eager", fullgraph=True)
        found, found_grads = step(model, given)
    assert compare.error(found, logits) < 1e-6 and compare.together(found_grads, grads) < 1e-5


def test_the_step_is_undone_exactly_and_nested_configurations_keep_theirs():
    model = zoo.build("qwen3_vl_moe")
    before = {name: config._attn_implementation for name, config in configurations(model)}
    found = sites(model)
    assert [site.fqn for site in found] == ["model.visual", "model.language_model"]
    (step_,) = ATTENTION_FUNCTION.steps(model.model.language_model, found[1].spec, "torch")
    text, journal = model.model.language_model, Journal()
    journal.do(step_)
    for look in looks(model):
        journal.do(look)
    assert {name: config._attn_implementation for name, config in configurations(model)} == before
    def look(*unused):
        attention = text.layers[0].self_attn
        seen.extend(c._attn_implementation for c in (attention.config, text.config, model.config.text_config, model.config, model.config.vision_config))

    seen = []
    text.layers[0].self_attn.q_proj.register_forward_hook(look)
    assert match_attention_function(Scan(model).of(model.model.language_model), Scan(model), {}) is None  # it has been patched
    model(**zoo.inputs("qwen3_vl_moe", model))
    assert seen == ["moepatch_torch"] * 3 + ["sdpa"] * 2
    assert "moepatch" not in model.config.to_json_string()
    journal.undo()
    assert {name: config._attn_implementation for name, config in configurations(model)} == before
    assert not any("_moepatch" in key for module in model.modules() for key in vars(module))
    journal.do(step_)
    model.set_attn_implementation("eager")
    journal.undo()
    assert model.config.text_config._attn_implementation == "eager"  # the user's later choice


def configurations(model):
    return [(name, m.config) for name, m in model.named_modules() if "config" in vars(m)]


def test_what_the_user_chose_is_left_alone_and_said():
    model = zoo.build("qwen3_moe")
    model.set_attn_implementation("eager")
    assert sites(model) == [] and left_alone(model) == {"model": "attn_implementation='eager' was chosen by the user"}
    dsa = zoo.build("deepseek_v32")
    assert sites(dsa) == [] and "something else for each attn_implementation" in left_alone(dsa)["model"]


def test_forms_are_read_off_the_calls():
    spec = AttentionSpec(heads=4, kv_heads=2, head_dim=16, v_head_dim=16)
    (site,) = sites(build("gpt_oss"))
    windowed, full = (form for form, count in site.spec.forms)
    assert (windowed.window, windowed.sinks, full.window, full.sinks) == (8, True, None, True)
    (site,) = sites(build("gemma2"))
    assert site.spec.forms[0][0].softcap == 2.0
    (site,) = sites(build("qwen3_moe"))
    assert site.spec == AttentionUse(((spec, 2),)) and site.spec.to_dict()["layout"] == "plain"
    (site,) = sites(zoo.build("deepseek_v3", qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16, qk_head_dim=24))
    assert (site.spec.forms[0][0].head_dim, site.spec.forms[0][0].v_head_dim) == (24, 16)


def test_an_older_cudnn_than_torchs_is_refused_in_words():
    """Transformer Engine loads the system's for the whole process: replayed in a CUDA graph, torch's backward pass then writes anywhere."""
    assert why_older_cudnn((9, 19, 0), (9, 19, 0)) is None and why_older_cudnn((9, 14, 0), (9, 19, 2)) is None
    assert "cuDNN 9.14.0 is loaded and torch was built with 9.19.0" in why_older_cudnn((9, 19, 0), (9, 14, 0))
    assert "cuDNN 10.0.0" in why_older_cudnn((9, 19, 0), (10, 0, 0))


def test_a_pickled_model_finds_its_function_in_another_process(tmp_path):
    model = build("gpt_oss")
    given = inputs("whole", model)
    model.set_attn_implementation("moepatch_torch")
    model.eval()
    (tmp_path / "model").write_bytes(pickle.dumps((model, given, model(**given).logits)))
    code = "import pickle, sys, torch, moepatch.layers.attention.kind; m, x, y = pickle.load(open(sys.argv[1], 'rb')); assert torch.equal(m(**x).logits, y)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model")], check=True, cwd=os.path.dirname(os.path.dirname(__file__)))


def test_the_stand_in_tries_every_form():
    spec = AttentionSpec(heads=4, kv_heads=2, head_dim=16, v_head_dim=8)
    forms = [spec, AttentionSpec(heads=4, kv_heads=2, head_dim=16, v_head_dim=16, window=128, sinks=True)]
    forms.append(AttentionSpec(heads=4, kv_heads=4, head_dim=16, v_head_dim=16, causal=False, softcap=2.0))
    use = AttentionUse(tuple((form, 1) for form in forms))
    call = trial(use, torch.float32, torch.device("cpu"), torch.Generator().manual_seed(0)).trainable()
    ours, theirs = (AttentionCalls(use, backend)(*call.args) for backend in ("torch", "reference"))
    assert len(ours) == 3
    for a, b in zip(ours, theirs, strict=True):
        assert compare.error(a.detach(), b.detach()) < 1e-5
    assert "window 128 sinks" in use.describe() and use.resized({16: 32}).forms[0][0].head_dim == 32


# --------------------------------------------------------------------------------------------------------------- Triton


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs these kernels themselves in test_gpu_attention.py")
def test_kernels_in_the_interpreter():
    code = "import test_attention; test_attention.interpreted()"
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *filter(None, [os.environ.get("PYTHONPATH")])])}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, cwd=os.path.dirname(os.path.dirname(__file__)))


def interpreted():
    """Runs the Triton kernels on the CPU, against their references."""
    for dim, order in ((16, (0, 1, 2, 3)), (24, (0, 2, 1, 3))):
        batch, heads, length = 2, 3, 70
        shape = torch.tensor((batch, heads, length, dim))[list(order)].tolist()
        out, grad = (torch.randn(shape).permute(order) for _ in range(2))
        lse, sinks = torch.randn(batch, heads, length), torch.randn(heads) * 3
        ours, ours_lse, wanted, wanted_lse = out.clone(), torch.empty_like(lse), out.clone(), torch.empty_like(lse)
        kernels.rescale_on_device(ours, lse, sinks, ours_lse)
        kernels._rescale_reference(wanted, lse, sinks, wanted_lse)
        assert compare.error(ours, wanted) < 1e-6 and compare.error(ours_lse, wanted_lse) < 1e-6
        found = kernels.gradient_on_device(grad, ours, ours_lse, sinks)
        assert compare.error(found, kernels._gradient_reference(grad, wanted, wanted_lse, sinks)) < 1e-5

@pytest.mark.parametrize("case", ["whole", "packed"])
@pytest.mark.parametrize("base", [False, True], ids=["whole-model", "base-model"])
def test_positions_that_the_model_counts_are_not_looked_at(case, base, monkeypatch):
    """transformers' look at position ids waits for the device, once a step."""
    model, looks = zoo.build("qwen3_moe"), []
    given = inputs(case, model)
    for name in ("attention_mask", *(("labels",) if base else ())):
        given.pop(name, None)
    model = model.model if base else model
    truth = model(**given)[0]
    look = masking_utils.find_packed_sequence_indices
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: looks.append(position_ids) or look(position_ids))
    moepatch.optimize(model, measure=False)
    inner = model if base else model.model
    assert type(inner).__name__ == "Qwen3MoeModel" and inspect.signature(inner.forward) == inspect.signature(Qwen3MoeModel(inner.config).forward)
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        looks.clear()
        found = twin(**given)[0]
        assert len(looks) == (case == "packed")
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-5)
    moepatch.restore(model)
    assert type(inner) is Qwen3MoeModel and "_moepatch" not in vars(inner)
    model(**given)
    assert len(looks) == 1 + (case == "packed")


def test_a_forward_or_a_mask_function_that_is_put_there_after_the_patch_is_called(monkeypatch):
    model, calls = zoo.build("qwen3_moe"), []
    given = zoo.inputs("qwen3_moe", model)
    moepatch.optimize(model, measure=False)
    model(**given)
    module = sys.modules[Qwen3MoeModel.__module__]
    make, forward = module.create_causal_mask, Qwen3MoeModel.forward
    monkeypatch.setattr(module, "create_causal_mask", lambda *args, **kwargs: calls.append("mask") or make(*args, **kwargs))
    model(**given)
    monkeypatch.setattr(Qwen3MoeModel, "forward", lambda self, *args, **kwargs: calls.append("forward") or forward(self, *args, **kwargs))
    model(**given)
    assert calls == ["mask", "forward", "mask"]

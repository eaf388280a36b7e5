"""What changes after the patch of that which a family reads at each call: a patched model does what plain does, and the report says so."""

from __future__ import annotations

import copy
import functools
import gc
import io
import pickle
import weakref

import compare
import listed
import pytest
import read_values
import torch
import zoo
from torch import nn
from transformers import AttentionInterface
from transformers.activations import GELUTanh
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3_file

import moepatch
from moepatch.layers.attention.sight import choices
from moepatch.surgery import Patched


@pytest.fixture(scope="module")
def pairs():
    """``pairs(name)``: a plain model and a patched copy, made once; tests put back what they change."""
    made = {}

    def pair(name):
        if name not in made:
            plain = zoo.build(name).train()
            made[name] = plain, moepatch.optimize(copy.deepcopy(plain), verify=False, measure=False)
        return made[name]

    return pair


def logits(name, model):
    torch.manual_seed(0)
    with torch.no_grad():
        return zoo.first_float(model(**{key: value for key, value in zoo.inputs(name, model).items() if key != "labels"}))


def alike(name, plain, patched):
    return compare.error(logits(name, patched), logits(name, plain)) < 1e-5


class changed:
    """While it is entered, an attribute, or an entry of a dict, of all modules of a class is another one, in both models."""

    def __init__(self, models, where, name, value):
        self.holders = [holder for model in models for holder in where(model)]
        self.name, self.value = name, value

    def __enter__(self):
        assert self.holders
        self.before = [getattr(holder, self.name) for holder in self.holders]
        for holder in self.holders:
            setattr(holder, self.name, self.value(getattr(holder, self.name)) if callable(self.value) else self.value)

    def __exit__(self, *raised):
        for holder, value in zip(self.holders, self.before, strict=True):
            setattr(holder, self.name, value)


def named(end):
    return lambda model: [module for fqn, module in model.named_modules() if fqn.endswith(end)]


#: Family, modules by the end of their names, attribute, value or function of the old one, what the report says.
ROWS = {
    "top_k": ("qwen3_moe", "mlp.gate", "top_k", 4, "top_k is 4 and was 2"),
    "norm_topk_prob": ("qwen3_moe", "mlp.gate", "norm_topk_prob", lambda old: not old, "norm_topk_prob"),
    "eps": ("qwen3_moe", "input_layernorm", "variance_epsilon", 0.3, "variance_epsilon is 0.3"),
    "eps of a norm inside attention": ("qwen3_moe", "q_norm", "variance_epsilon", 0.3, "variance_epsilon is 0.3"),
    "activation": ("qwen3_moe", "mlp.experts", "act_fn", lambda old: nn.GELU(), "act_fn is GELU and was SiLUActivation"),
    "scaling of attention": ("qwen3_moe", "self_attn", "scaling", 0.7, None),
    "limit": ("gpt_oss", "mlp.experts", "limit", 0.05, "limit is 0.05"),
    "alpha": ("gpt_oss", "mlp.experts", "alpha", 0.3, "alpha is 0.3"),
    "routed_scaling_factor": ("deepseek_v3", "mlp.gate", "routed_scaling_factor", 3.5, None),
    "activation of a dense MLP": ("deepseek_v3", "layers.0.mlp", "act_fn", lambda old: nn.Tanh(), "act_fn is Tanh"),
    "residual_multiplier": ("granitemoe", "layers.1", "residual_multiplier", 3.0, None),
    "top_k of a scored block": ("llama4_text", "feed_forward.router", "top_k", 3, None),
}


@pytest.mark.parametrize("row", ROWS)
def test_a_value_that_is_changed_after_the_patch_counts(pairs, row):
    name, end, attribute, value, words = ROWS[row]
    if zoo.available(name) is not None:
        pytest.skip(zoo.available(name))
    plain, patched = pairs(name)
    before = logits(name, plain)
    with changed((plain, patched), named(end), attribute, value):
        moved = compare.error(logits(name, plain), before)
        assert moved > 1e-4, "the change does nothing"
        assert alike(name, plain, patched)
        if words is not None:
            assert any(words in note and end in note and "family's own code computes" in note for note in moepatch.report(patched).notes)
    assert alike(name, plain, patched)
    assert not any(module.changes() for module in patched.modules() if isinstance(module, Patched))
    if words is not None:
        assert any("for a time" in note for note in moepatch.report(patched).notes)


def scaled(function):
    def made(*args, **kwargs):
        return torch.utils._pytree.tree_map(lambda t: t * 1.25 if torch.is_tensor(t) and t.is_floating_point() else t, function(*args, **kwargs))

    return made


#: Something of the family's file, a name in it.
FUNCTIONS = {
    "a router's forward": (qwen3_file.Qwen3MoeTopKRouter, "forward"),
    "an activation's forward": (type(zoo.build("qwen3_moe").model.layers[0].mlp.experts.act_fn), "forward"),
    "a norm's forward": (qwen3_file.Qwen3MoeRMSNorm, "forward"),
    "a method of the experts": (qwen3_file.Qwen3MoeExperts, "_apply_gate"),
    "the forward of experts": (qwen3_file.Qwen3MoeExperts, "forward"),
    "the forward of attention": (qwen3_file.Qwen3MoeAttention, "forward"),
    "the forward of a layer": (qwen3_file.Qwen3MoeDecoderLayer, "forward"),
    "the forward of a block that is not patched": (qwen3_file.Qwen3MoeSparseMoeBlock, "forward"),
    "the forward of torch's linear layers": (nn.Linear, "forward"),
    "a function of the file": (qwen3_file, "apply_rotary_pos_emb"),
    "a function that such a function calls": (qwen3_file, "rotate_half"),
}


@pytest.mark.parametrize("row", FUNCTIONS)
def test_a_function_that_is_replaced_after_the_patch_counts(pairs, row, monkeypatch):
    plain, patched = pairs("qwen3_moe")
    before = logits("qwen3_moe", plain)
    with monkeypatch.context() as patch:
        holder, name = FUNCTIONS[row]
        patch.setattr(holder, name, scaled(getattr(holder, name)))
        assert compare.error(logits("qwen3_moe", plain), before) > 1e-4
        assert alike("qwen3_moe", plain, patched)
    assert alike("qwen3_moe", plain, patched)


SETTINGS = {"scale": 1.0}


class ReadsSettings(qwen3_file.Qwen3MoeRMSNorm):
    def forward(self, hidden_states):
        return SETTINGS["scale"] * super().forward(hidden_states)


def test_a_constant_of_the_file_counts(monkeypatch):
    plain = zoo.build("qwen3_moe").train()
    for norm in named("input_layernorm")(plain):
        norm.__class__ = ReadsSettings
    patched = moepatch.optimize(copy.deepcopy(plain), verify=False, measure=False)
    assert all(isinstance(norm, Patched) for norm in named("input_layernorm")(patched))
    before = logits("qwen3_moe", plain)
    monkeypatch.setitem(SETTINGS, "scale", 1.5)
    assert compare.error(logits("qwen3_moe", plain), before) > 1e-4 and alike("qwen3_moe", plain, patched)


def test_a_forward_of_one_module_counts(pairs):
    plain, patched = pairs("qwen3_moe")
    for end in ("mlp.gate", "q_norm", "mlp.experts", "input_layernorm", "act_fn", "self_attn"):
        for model in (plain, patched):
            module = named(end)(model)[0]
            module.forward = scaled(module.forward)
        try:
            assert alike("qwen3_moe", plain, patched), end
        finally:
            for model in (plain, patched):
                del named(end)(model)[0].forward


def test_hooks_on_an_activation_are_called(pairs):
    plain, patched = pairs("qwen3_moe")
    before = logits("qwen3_moe", plain)
    handles = [m.register_forward_hook(lambda module, args, out: out * 1.5) for model in (plain, patched) for m in named("act_fn")(model)]
    assert compare.error(logits("qwen3_moe", plain), before) > 1e-4 and alike("qwen3_moe", plain, patched)
    for handle in handles:
        handle.remove()
    assert alike("qwen3_moe", plain, patched)


def test_a_norm_that_is_taken_out_is_out(pairs):
    for end in ("q_norm", "input_layernorm"):
        models = [copy.deepcopy(model) for model in pairs("qwen3_moe")]
        for model in models:
            for name, parent in list(model.named_modules()):
                if end in parent._modules:
                    setattr(parent, end, nn.Identity())
        assert alike("qwen3_moe", *models)


def resized(model, count):
    """Experts cut off, or more of them, as pruning and upcycling do."""
    for gate, experts in zip(named("mlp.gate")(model), named("mlp.experts")(model), strict=True):
        for module in (gate, experts):
            for p in module.parameters(recurse=False):
                p.data = torch.cat([p.data, 0.7 * p.data])[:count].clone()
            module.num_experts = count


@pytest.mark.parametrize("count", [6, 12])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_experts_that_are_pruned_or_grown_count(backend, count):
    plain = zoo.build("qwen3_moe").train()
    patched = moepatch.optimize(copy.deepcopy(plain), experts=backend, verify=False, measure=False)
    before = logits("qwen3_moe", plain)
    for model in (plain, patched):
        resized(model, count)
    assert compare.error(logits("qwen3_moe", plain), before) > 1e-4 and alike("qwen3_moe", plain, patched)
    assert any(f"is [{count}, " in note for note in moepatch.report(patched).notes)


def test_a_value_of_a_shared_configuration_counts():
    """MiniMax-like blocks read their configuration; here one is made that does."""
    plain = zoo.build("qwen3_moe").train()
    for gate in named("mlp.gate")(plain):
        gate.__class__ = ReadsConfig
        gate.config = plain.config
    patched = moepatch.optimize(copy.deepcopy(plain), verify=False, measure=False)
    assert alike("qwen3_moe", plain, patched) and all(isinstance(gate, Patched) for gate in named("mlp.gate")(patched))
    for model in (plain, patched):
        model.config.norm_topk_prob = not model.config.norm_topk_prob
    assert alike("qwen3_moe", plain, patched)
    assert any("config.norm_topk_prob is" in note for note in moepatch.report(patched).notes)
    for model in (plain, patched):
        model.config.dtype = "what saving writes"
    assert not named("mlp.gate")(patched)[0].changes()[1:]


class ReadsConfig(qwen3_file.Qwen3MoeTopKRouter):
    def forward(self, hidden_states):
        config = self.config
        logits = nn.functional.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
        weights, ids = logits.softmax(-1, dtype=torch.float).topk(self.top_k, dim=-1)
        if config.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights.to(logits.dtype), ids


@pytest.fixture
def counted():
    """How often transformers' own function for experts has run, which is what ``grouped_mm`` names meanwhile."""
    calls, own = [], ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    ExpertsInterface.register("grouped_mm", lambda self, *args: calls.append(1) or own(self, *args))
    yield calls
    ExpertsInterface.register("grouped_mm", own)


def set_top(model):
    model.set_experts_implementation("grouped_mm")


def set_inside(model):
    model.model.set_experts_implementation("grouped_mm")


def set_in_config(model):
    model.config._experts_implementation = "grouped_mm"


def set_by_dict(model):
    model.set_experts_implementation({"": "grouped_mm"})


@pytest.mark.parametrize("choose", [set_top, set_inside, set_in_config, set_by_dict])
def test_choosing_the_experts_function_that_stood_at_the_patch_counts(choose, counted):
    plain = zoo.build("qwen3_moe").train()
    patched = moepatch.optimize(copy.deepcopy(plain), verify=False, measure=False)
    assert patched.config._experts_implementation == "grouped_mm"
    assert alike("qwen3_moe", plain, patched) and len(counted) == 2
    twins = [patched, copy.deepcopy(patched), pickle.loads(pickle.dumps(patched))]
    before = patched.get_experts_implementation()
    for twin in twins:
        del counted[:]
        logits("qwen3_moe", twin)
        assert not counted
        choose(twin)
        for model in (twin, copy.deepcopy(twin), pickle.loads(pickle.dumps(twin))):
            del counted[:]
            logits("qwen3_moe", model)
            assert len(counted) == 2
        assert any("by choice" in note for note in moepatch.report(twin).notes)
    patched.set_experts_implementation(before)  # as `generate` puts it back
    del counted[:]
    logits("qwen3_moe", patched)
    assert not counted


def test_a_function_that_is_registered_anew_counts(pairs):
    plain, patched = pairs("qwen3_moe")
    own, before = ALL_EXPERTS_FUNCTIONS["grouped_mm"], logits("qwen3_moe", plain)
    ExpertsInterface.register("grouped_mm", scaled(own))
    try:
        assert compare.error(logits("qwen3_moe", plain), before) > 1e-4 and alike("qwen3_moe", plain, patched)
    finally:
        ExpertsInterface.register("grouped_mm", own)


def test_copies_and_pickles_know_what_was_read_at_the_patch(pairs):
    plain, patched = pairs("qwen3_moe")
    twins = [copy.deepcopy(patched), pickle.loads(pickle.dumps(patched))]
    buffer = io.BytesIO()
    torch.save(patched, buffer)
    twins.append(torch.load(io.BytesIO(buffer.getvalue()), weights_only=False))
    with changed((plain,), named("mlp.gate"), "top_k", 4):
        for twin in twins:
            assert not any(module.changes() for module in twin.modules() if isinstance(module, Patched))
            with changed((twin,), named("mlp.gate"), "top_k", 4):
                assert alike("qwen3_moe", plain, twin)
                again = pickle.loads(pickle.dumps(twin))
                assert alike("qwen3_moe", plain, again) and named("mlp.gate")(again)[0].changes()
    assert not any(module.changes() for module in patched.modules() if isinstance(module, Patched))


def test_restoring_forgets_the_watch():
    patched = moepatch.optimize(zoo.build("qwen3_moe"), verify=False, measure=False)
    moepatch.restore(patched)
    assert not any("_moepatch_watch" in vars(module) for module in patched.modules())


def test_what_says_nothing_of_results_is_no_change(pairs, tmp_path):
    _, patched = pairs("qwen3_moe")
    patched = copy.deepcopy(patched)
    patched.gradient_checkpointing_enable()
    patched.config.use_cache = False
    patched.save_pretrained(tmp_path)
    patched.train().requires_grad_(False).requires_grad_(True)
    patched.resize_token_embeddings(zoo.VOCAB + 3)
    patched.to(torch.float64).to(torch.float32)
    patched.generation_config.max_length = 7
    for module in patched.modules():
        module.an_attribute_of_somebody_else = 1
    assert {name: module.changes() for name, module in patched.named_modules() if isinstance(module, Patched) and module.changes()} == {}


def test_gradients_are_plains_after_a_change(pairs):
    plain, patched = (copy.deepcopy(model) for model in pairs("qwen3_moe"))
    with changed((plain, patched), named("mlp.gate"), "top_k", 4), changed((plain, patched), named("mlp.experts"), "act_fn", lambda old: nn.GELU()):
        (_, theirs), (_, ours) = (compare.step("qwen3_moe", model) for model in (plain, patched))
    assert compare.together(ours, theirs) < 1e-5


@pytest.mark.parametrize("name", ["dbrx", "gpt_oss", "jetmoe", "openai_privacy_filter", "qwen3_moe"])
def test_everything_that_a_family_reads_counts(name):
    """All families: ``python tests/read_values.py``."""
    if zoo.available(name) is not None:
        pytest.skip(zoo.available(name))
    found = list(read_values.outcomes(name))
    assert sum(outcome.what == "as plain" for outcome in found) > 1
    assert [f"{o.what}: {o.read}: {o.detail}" for o in found if not o.ok] == []


def test_a_block_with_a_list_of_experts_follows():
    plain = listed.listed()
    patched = moepatch.optimize(copy.deepcopy(plain), verify=False, measure=False)
    ids = torch.arange(8).view(2, 4)
    before = patched(ids)
    blocks = lambda model: [m for m in model.modules() if hasattr(m, "top_k")]  # noqa: E731
    with changed((plain, patched), blocks, "top_k", 1):
        assert compare.error(plain(ids), before) > 1e-5 and compare.error(patched(ids), plain(ids)) < 1e-6
        assert any("top_k is 1 and was 2" in note for note in moepatch.report(patched).notes)
    assert torch.equal(patched(ids), before)


def test_a_compiled_module_is_compiled_anew():
    plain = zoo.build("qwen3_moe").train()
    patched = moepatch.optimize(copy.deepcopy(plain), verify=False, measure=False)
    gates = [named("mlp.gate")(model)[0] for model in (plain, patched)]
    x = torch.randn(5, zoo.COMMON["hidden_size"])
    torch._dynamo.reset()
    compiled = torch.compile(gates[1], backend="eager", fullgraph=True)
    for change in ({"top_k": 4}, {"top_k": 2}, {"norm_topk_prob": False}):
        for name, value in change.items():
            for gate in gates:
                setattr(gate, name, value)
        assert all(compare.error(a, b) < 1e-5 for a, b in zip(compiled(x), gates[0](x), strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qwen3_file.Qwen3MoeTopKRouter, "forward", scaled(qwen3_file.Qwen3MoeTopKRouter.forward))
        assert all(compare.error(a, b) < 1e-5 for a, b in zip(compiled(x), gates[0](x), strict=True))


@pytest.mark.parametrize("what", ["instance", "config", "in the class's container", "class method"])
def test_a_compiled_module_notices_what_lies_on_a_class_or_nowhere(everywhere, what, monkeypatch):
    plain, patched = (named("mlp.gate")(model)[0] for model in everywhere)
    x = torch.randn(5, zoo.COMMON["hidden_size"])
    torch._dynamo.reset()
    compiled, before = torch.compile(patched, backend="eager", fullgraph=True), plain(x)[1]
    assert compare.error(compiled(x)[1], before) < 1e-5
    with monkeypatch.context() as patch:
        change_everywhere(what, everywhere, patch)
        assert plain(x)[1].shape != before.shape or compare.error(plain(x)[1], before) > 1e-4
        assert compare.error(compiled(x)[1], plain(x)[1]) < 1e-5


@pytest.mark.parametrize("what", ["hook", "forward", "registered", "chosen"])
def test_compiled_experts_notice_what_is_changed_around_them(pairs, what, monkeypatch):
    both = [copy.deepcopy(model) for model in pairs("qwen3_moe")]
    plain, patched = (named("mlp.experts")(model)[0] for model in both)
    args = torch.randn(5, zoo.COMMON["hidden_size"]), torch.tensor([[0, 1]] * 5), torch.full((5, 2), 0.5)
    torch._dynamo.reset()
    compiled, before = torch.compile(patched, backend="eager"), plain(*args)
    if what != "hook":  # as for any compiled module, hooks that come later are not seen
        assert compare.error(compiled(*args), before) < 1e-5
    with monkeypatch.context() as patch:
        for model, experts in zip(both, (plain, patched), strict=True):
            if what == "hook":
                experts.act_fn.register_forward_hook(lambda module, given, out: out * 1.5)
            elif what == "forward":
                experts.act_fn.forward = scaled(experts.act_fn.forward)
            elif what == "chosen":
                patch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "batched_mm", scaled(ALL_EXPERTS_FUNCTIONS["batched_mm"]))
                model.set_experts_implementation("batched_mm")
        if what == "registered":
            patch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "grouped_mm", scaled(ALL_EXPERTS_FUNCTIONS["grouped_mm"]))
        assert compare.error(plain(*args), before) > 1e-4 and compare.error(compiled(*args), plain(*args)) < 1e-5


def set_attention_top(model):
    model.set_attn_implementation("sdpa")


def set_attention_inside(model):
    model.model.set_attn_implementation("sdpa")


def set_attention_in_config(model):
    model.config._attn_implementation = "sdpa"


@pytest.mark.parametrize("choose", [set_attention_top, set_attention_inside, set_attention_in_config])
def test_choosing_the_attention_function_that_stood_at_the_patch_counts(choose, pairs):
    _, patched = pairs("qwen3_moe")
    calls, own = [], AttentionInterface()["sdpa"]

    def counting(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    AttentionInterface.register("sdpa", counting)
    try:
        model = moepatch.optimize(zoo.build("qwen3_moe"), verify=False, measure=False)
        for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert twin.config._attn_implementation == "sdpa"
            logits("qwen3_moe", twin)
            assert not calls
            choose(twin)
            for again in (twin, copy.deepcopy(twin), pickle.loads(pickle.dumps(twin))):
                logits("qwen3_moe", again)
                assert len(calls) == 2
                del calls[:]
    finally:
        AttentionInterface.register("sdpa", own)


def test_an_attention_function_that_is_registered_anew_counts(pairs):
    plain, patched = pairs("qwen3_moe")
    own, before = AttentionInterface()["sdpa"], logits("qwen3_moe", plain)
    AttentionInterface.register("sdpa", scaled(own))
    try:
        assert compare.error(logits("qwen3_moe", plain), before) > 1e-4 and alike("qwen3_moe", plain, patched)
        assert any(note.startswith("attention: ") for note in moepatch.report(patched).notes)
    finally:
        AttentionInterface.register("sdpa", own)
    assert alike("qwen3_moe", plain, patched)


@pytest.mark.parametrize("how", ["config", "argument"])
def test_attention_weights_that_are_asked_for_after_the_patch_are_returned(how):
    plain = zoo.build("gpt_oss").eval()
    patched = moepatch.optimize(copy.deepcopy(plain), verify=False, measure=False)
    inputs = {key: value for key, value in zoo.inputs("gpt_oss", plain).items() if key != "labels"}
    if how == "argument":
        inputs["output_attentions"] = True
    for model in (plain, patched):
        if how == "config":
            model.config.output_attentions = True
    with torch.no_grad():
        theirs, ours = (model(**inputs) for model in (plain, patched))
    assert compare.error(ours.logits, theirs.logits) < 1e-5 and len(ours.attentions) == len(theirs.attentions) > 0
    assert all(compare.error(a, b) < 1e-5 for a, b in zip(ours.attentions, theirs.attentions, strict=True))


class ReadsEverywhere(qwen3_file.Qwen3MoeTopKRouter):
    """Reads a method and a container of its class, and what nobody has set yet of itself and of a configuration."""

    options = {"norm": True}

    @classmethod
    def scores(cls, logits):
        return logits.softmax(-1, dtype=torch.float)

    def forward(self, hidden_states):
        logits = nn.functional.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
        weights, ids = self.scores(logits).topk(getattr(self, "chosen", None) or self.top_k, dim=-1)
        if self.options["norm"] and getattr(self.config, "sums_to_one", True):
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights.to(logits.dtype), ids


@pytest.fixture(scope="module")
def everywhere():
    plain = zoo.build("qwen3_moe").train()
    for gate in named("mlp.gate")(plain):
        gate.__class__, gate.config = ReadsEverywhere, plain.config
    patched = moepatch.optimize(copy.deepcopy(plain), verify=False, measure=False)
    assert all(isinstance(gate, Patched) and not gate.changes() for gate in named("mlp.gate")(patched))
    return plain, patched


def change_everywhere(what, models, patch):
    """Changes one of the things that the routers of `everywhere` read."""
    for model in models if what == "config" else ():
        patch.setattr(model.config, "sums_to_one", False, raising=False)
    for gate in [gate for model in models for gate in named("mlp.gate")(model)] if what == "instance" else ():
        patch.setattr(gate, "chosen", 4, raising=False)
    if what == "in the class's container":
        patch.setitem(ReadsEverywhere.options, "norm", False)
    if what == "class method":
        patch.setattr(ReadsEverywhere, "scores", classmethod(lambda cls, logits: logits.sigmoid()))


@pytest.mark.parametrize("what", ["nothing", "instance", "config", "in the class's container", "class method"])
def test_what_lies_on_a_class_or_nowhere_at_the_patch_counts(everywhere, what, monkeypatch):
    plain, patched = everywhere
    before = logits("qwen3_moe", plain)
    with monkeypatch.context() as patch:
        change_everywhere(what, everywhere, patch)
        assert (compare.error(logits("qwen3_moe", plain), before) > 1e-4) == (what != "nothing")
        assert alike("qwen3_moe", plain, patched)
        assert all(bool(gate.changes()) == (what != "nothing") for gate in named("mlp.gate")(patched))
        again = pickle.loads(pickle.dumps(patched))
        assert alike("qwen3_moe", plain, again)
    assert alike("qwen3_moe", plain, patched) and not any(gate.changes() for gate in named("mlp.gate")(patched))


def test_what_changes_at_each_step_is_kept_once(pairs):
    _, patched = pairs("qwen3_moe")
    gate = copy.deepcopy(named("mlp.gate")(patched)[0])
    tokens = torch.ones(3, gate.weight.shape[1])
    for step in range(1, 40):
        gate.top_k = 1 + step % 7
        gate(tokens)
    (change,) = (change for change in gate.met() if change.what == "top_k")
    assert change.now == str(1 + 39 % 7)


def replica(model):
    """What ``DataParallel`` calls once on each device, here on the CPU."""
    modules = list(model.modules())
    made = {id(module): module._replicate_for_data_parallel() for module in modules}
    for module in modules:
        copied = made[id(module)]
        copied._modules.update({name: child and made[id(child)] for name, child in module._modules.items()})
        copied._former_parameters = {}
        for own, tensors in ((copied._parameters, module._parameters), (copied._buffers, module._buffers)):
            for name, tensor in tensors.items():
                own.update({name: None}) if tensor is None else setattr(copied, name, tensor.detach().clone())
    return made[id(model)]


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_replicas_of_data_parallel_are_asked_nothing_of_their_own(pairs, name):
    plain, patched = pairs(name)
    inputs = {key: value for key, value in zoo.inputs(name, plain).items() if key != "labels"}

    def alike(model):
        with torch.no_grad():
            return compare.error(zoo.first_float(model(**inputs)), zoo.first_float(plain(**inputs))) < 1e-5

    made = replica(patched)
    assert alike(made)
    assert not any(module.changes() or module.met() for module in made.modules() if isinstance(module, Patched))
    kept = [weakref.ref(module) for module in made.modules()]
    with changed((plain, patched), named("mlp.experts"), "act_fn", lambda old: nn.Tanh()):
        changed_one = replica(patched)
        assert alike(changed_one) and all(module.changes() for module in named("mlp.experts")(changed_one))
    del made
    gc.collect()
    assert not any(module() is not None for module in kept)


def test_choices_for_a_configuration_that_is_not_there_are_passed_over_as_on_plain():
    model = moepatch.optimize(zoo.build("qwen3_moe"), verify=False, measure=False)
    model.set_experts_implementation({"vision_config": "eager"})
    model.set_attn_implementation({"vision_config": "eager"})
    assert not any(module.changes() for module in model.modules() if isinstance(module, Patched))
    assert all(choice.stands for choice in choices(model))
    model.set_attn_implementation({"": "sdpa"})
    assert not any(choice.stands for choice in choices(model))


@pytest.mark.parametrize("row", ["a router's forward", "a method of the experts", "a function of the file"])
def test_what_was_replaced_before_a_pickle_is_loaded_counts(pairs, row, monkeypatch):
    plain, patched = pairs("qwen3_moe")
    written = pickle.dumps(patched)
    holder, name = FUNCTIONS[row]
    with monkeypatch.context() as patch:
        patch.setattr(holder, name, scaled(getattr(holder, name)))
        assert alike("qwen3_moe", plain, pickle.loads(written))
        again = pickle.loads(pickle.dumps(pickle.loads(written)))
        assert alike("qwen3_moe", plain, again)
    assert alike("qwen3_moe", plain, again) and not any(module.changes() for module in again.modules() if isinstance(module, Patched))


def test_a_function_that_is_an_object_stays_the_same_one_in_copies_and_pickles():
    plain = zoo.build("qwen3_moe").train()
    for experts in named("mlp.experts")(plain):
        experts.act_fn = GELUTanh()
    patched = moepatch.optimize(copy.deepcopy(plain), verify=False, measure=False)
    for twin in (copy.deepcopy(patched), pickle.loads(pickle.dumps(patched)), pickle.loads(pickle.dumps(copy.deepcopy(patched)))):
        assert not any(module.changes() for module in twin.modules() if isinstance(module, Patched))
        for model in (plain, twin):
            named("act_fn")(model)[0].act = functools.partial(nn.functional.gelu, approximate="none")
        assert alike("qwen3_moe", plain, twin) and named("mlp.experts")(twin)[0].changes()
        again = pickle.loads(pickle.dumps(twin))
        assert alike("qwen3_moe", plain, again) and named("mlp.experts")(again)[0].changes()
        named("act_fn")(plain)[0].act = named("act_fn")(plain)[1].act

"""A patched model in the hands of those who look at names, classes, configurations, pickles and storages; plain beside it."""

from __future__ import annotations

import abc
import copy
import functools
import inspect
import io
import json
import os
import pickle
import subprocess
import sys

import compare
import listed
import pytest
import torch
import zoo
from accelerate import infer_auto_device_map
from accelerate.utils import find_tied_parameters
from accelerate.utils.dataclasses import FullyShardedDataParallelPlugin, get_module_class_from_name
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from accelerate.utils.other import clean_state_dict_for_safetensors
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file, save_model
from torch.distributed.fsdp.wrap import ModuleWrapPolicy, transformer_auto_wrap_policy
from torch.func import functional_call, grad, vmap
from torch.nn.utils.parametrize import register_parametrization
from transformers import AutoModelForCausalLM, trainer_pt_utils

import moepatch
from moepatch.layers.attention.function import _FUNCTIONS
from moepatch.layout.adjacent import adjacent
from moepatch.surgery import Patched, original_of, patched_class

FAMILIES = ("qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h")


@functools.cache
def _both(name):
    plain = zoo.build(name)
    return plain, moepatch.optimize(copy.deepcopy(plain), measure=False)


@pytest.fixture(params=FAMILIES)
def both(request):
    """A plain model and its patched twin; not to be changed."""
    return _both(request.param)


@pytest.fixture
def qwen():
    return _both("qwen3_moe")


IDS = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))


# --- classes -------------------------------------------------------------------------------------------------------------------------


def wrapped(model, policy):
    return [name for name, module in model.named_modules() if policy(module)]


def test_classes_are_found_by_their_names(both):
    plain, patched = both
    for cls in {type(m) for m in plain.modules() if type(m).__module__.startswith("transformers")}:
        for find in (get_module_class_from_name, trainer_pt_utils.get_module_class_from_name):
            assert original_of(find(patched, cls.__name__)) is cls
    assert [type(m).__name__ for m in patched.modules()] == [type(m).__name__ for m in plain.modules()]
    assert [type(m).__qualname__ for m in patched.modules()] == [type(m).__qualname__ for m in plain.modules()]
    assert all(isinstance(m, type(patched.get_submodule(name))) and isinstance(patched.get_submodule(name), type(m)) for name, m in plain.named_modules())


def test_layers_are_wrapped_as_on_plain(both):
    plain, patched = both
    layer = type(plain.model.layers[0])
    plugins = [FullyShardedDataParallelPlugin(fsdp_version=1, auto_wrap_policy="transformer_based_wrap") for _ in range(2)]
    found = []
    for model, plugin in zip(both, plugins, strict=True):
        plugin.set_auto_wrap_policy(model)
        found.append(wrapped(model, lambda m, plugin=plugin: plugin.auto_wrap_policy(module=m, recurse=False, nonwrapped_numel=0)))
    assert found[0] == found[1] != []
    second = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    policies = [fsdp2_prepare_auto_wrap_policy(second, model) for model in both]
    assert wrapped(patched, policies[1]) == wrapped(plain, policies[0]) == found[0]
    for classes in ({layer}, {type(patched.model.layers[0])}):
        by_class = functools.partial(transformer_auto_wrap_policy, recurse=False, nonwrapped_numel=0, transformer_layer_cls=classes)
        assert wrapped(patched, by_class) == wrapped(plain, by_class)
        policy = ModuleWrapPolicy(classes)
        assert len(policy._run_policy(patched, set(), {})) == len(policy._run_policy(plain, set(), {})) > 0


def test_layers_of_one_class_are_one_class_though_not_all_are_patched():
    model = zoo.build("qwen3_moe")
    plan = moepatch.plan(model, measure=False)
    moepatch.optimize(model, plan=plan.without("model.layers.1"))
    first, second = model.model.layers
    assert type(first) is not type(second) and isinstance(second, type(first)) and issubclass(type(second), type(first))
    assert not isinstance(model, type(first)) and not isinstance(first.self_attn, type(first))


def test_abstract_classes_ask_their_subclasses():
    """Among them is the patched one, which asks the class underneath: such as peft's wrappers of experts' parameters on a mesh."""

    class Abstract(torch.nn.Module, abc.ABC):
        pass

    class Layer(Abstract):
        pass

    cls = patched_class(type("Mixin", (Patched,), {}), Layer)
    unknown = type("Unknown", (torch.nn.Module,), {})
    assert not issubclass(unknown, Abstract) and not isinstance(unknown(), Layer) and not isinstance(unknown(), cls)
    assert issubclass(cls, Abstract) and issubclass(Layer, cls) and isinstance(Layer(), cls)


def test_device_maps_split_where_plains_do(both):
    plain, patched = both
    maps = [
        infer_auto_device_map(m, {0: 200_000, 1: 200_000, "cpu": 10**9}, no_split_module_classes=list(m._no_split_modules or ()))
        for m in both
    ]  # fmt: skip
    assert maps[0] == maps[1] and len(set(maps[0].values())) > 1


def test_a_model_made_of_the_class_is_an_ordinary_one(both, tmp_path):
    plain, patched = both
    cls, config = type(plain), patched.config
    patched.save_pretrained(tmp_path)
    with torch.random.fork_rng():
        made = [type(patched)(config), type(patched)._from_config(config), type(patched).from_pretrained(tmp_path), patched.__class__(copy.deepcopy(config))]
        made += [AutoModelForCausalLM.from_config(config), type(patched.model)(config)]
        layers = [type(m)(config, 0) for m in patched.model.layers]
    for twin in made[:5]:
        assert type(twin) is cls and repr(twin) == repr(plain) and not any("moepatch" in key for m in twin.modules() for key in vars(m))
        assert [type(m) for m in twin.modules()] == [type(m) for m in plain.modules()]
    assert type(made[5]) is type(plain.model) and all(type(m) is type(plain.model.layers[0]) for m in layers)
    assert compare.error(made[2].eval()(IDS).logits, copy.deepcopy(plain).eval()(IDS).logits) < 1e-6
    assert type(moepatch.optimize(made[2], measure=False)).__name__ == cls.__name__


def test_a_class_statement_over_a_patched_class_extends_the_familys(qwen):
    plain, patched = qwen

    class Mine(type(patched)):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    made = Mine(plain.config)
    made.load_state_dict(plain.state_dict())
    assert inspect.signature(type(patched)) == inspect.signature(type(plain)) and inspect.getsource(type(patched)) == inspect.getsource(type(plain))
    assert Mine.__mro__[1] is type(plain) and torch.equal(made(IDS).logits, plain(IDS).logits)


# --- pickles -------------------------------------------------------------------------------------------------------------------------

ELSEWHERE = """
import pickle, sys, torch
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "moepatch":
            raise ImportError("there is no moepatch")
sys.meta_path.insert(0, Nothing())
models = [pickle.load(open(sys.argv[1] + "/pickled", "rb")), torch.load(sys.argv[1] + "/saved", weights_only=False)]
ids, logits, layer, config = torch.load(sys.argv[1] + "/others", weights_only=False)
for model in models:
    assert torch.equal(model(ids).logits, logits), (model(ids).logits - logits).abs().max()
    assert "moepatch" not in repr(model) and not any("moepatch" in key for m in model.modules() for key in vars(m))
    assert type(model).__module__.startswith("transformers.models.") and type(model)(config).config._attn_implementation == config._attn_implementation
    model(ids, labels=ids).loss.backward()
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())
assert not any("moepatch" in key for key in vars(layer))
"""


def test_a_pickle_is_an_ordinary_model_without_moepatch_and_a_patched_one_with_it(both, tmp_path):
    plain, patched = both
    patched = copy.deepcopy(patched)
    patched.config.eos_token_id = 7
    with open(tmp_path / "pickled", "wb") as file:
        pickle.dump(patched, file)
    torch.save(patched, tmp_path / "saved")
    torch.save((IDS, plain(IDS).logits.detach(), patched.model.layers[0], patched.config), tmp_path / "others")
    env = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", ELSEWHERE, str(tmp_path)], check=True, env=env, cwd=tmp_path)
    for twin in (pickle.loads((tmp_path / "pickled").read_bytes()), torch.load(tmp_path / "saved", weights_only=False), copy.deepcopy(patched)):
        assert [type(m) for m in twin.modules()] == [type(m) for m in patched.modules()] and repr(twin) == repr(patched)
        assert compare.error(twin(IDS).logits.detach(), patched(IDS).logits.detach()) < 1e-6
        names = ("layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj")
        weights = [[w.weight for name, w in m.named_modules() if name.endswith(names)] for m in (patched, twin)]
        assert all((adjacent(*w) is None) == (adjacent(*weights[0]) is None) for w in weights if w)
        assert twin.config is twin.model.config and twin.config is not patched.config
        moepatch.restore(twin)
        assert torch.equal(twin(IDS).logits, plain(IDS).logits) and not any("moepatch" in key for m in twin.modules() for key in vars(m))


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_copies_with_something_around_or_inside(qwen):
    plain, patched = qwen
    parametrized = [copy.deepcopy(m) for m in qwen]
    for model in parametrized:
        register_parametrization(model.model.norm, "weight", Doubled())
        register_parametrization(model.model.layers[0].self_attn.q_proj, "weight", Doubled())
    truth, *found = (copy.deepcopy(model)(IDS).logits for model in parametrized)
    assert compare.error(found[0].detach(), truth.detach()) < 1e-5
    assert compare.error(copy.copy(patched)(IDS).logits.detach(), plain(IDS).logits.detach()) < 1e-5
    adapter = LoraConfig(r=4, target_modules=["q_proj"])
    around = moepatch.optimize(get_peft_model(copy.deepcopy(plain), adapter), measure=False)
    for twin in (pickle.loads(pickle.dumps(around)), copy.deepcopy(around)):
        assert moepatch.report(twin).patched == moepatch.report(around).patched
        assert compare.error(twin(IDS).logits.detach(), plain(IDS).logits.detach()) < 1e-5


# --- the configuration ---------------------------------------------------------------------------------------------------------------


def contents(config):
    return {key: contents(value) if hasattr(value, "to_dict") else copy.deepcopy(value) for key, value in vars(config).items()}


@pytest.mark.parametrize("name", [*FAMILIES, "qwen3_vl_moe", "gemma4"])
def test_the_users_configuration_is_left_alone_and_may_be_shared(name, monkeypatch):
    """The second model goes on with what the configuration names."""
    config = zoo.config(name)
    first = zoo.build(name)
    config = first.config
    second = copy.deepcopy(first, {id(config): config, **{id(value): value for value in vars(config).values() if hasattr(value, "to_dict")}})
    assert second.config is config
    before, held = contents(config), {n: m.config for n, m in first.named_modules() if "config" in vars(m)}
    given = zoo.inputs(name, first)
    truth = second(**given).loss.detach()
    moepatch.optimize(first, measure=False)
    assert contents(config) == before and "moepatch" not in config.to_json_string() and "moepatch" not in repr(config)
    assert all(m.config is held[n] for n, m in first.named_modules() if n in held)
    assert compare.error(first(**given).loss.detach(), truth) < 1e-5
    calls = []
    for function in _FUNCTIONS.values():
        monkeypatch.setattr(sys.modules["transformers"].AttentionInterface, "_global_mapping", {
            key: (lambda *a, value=value, **k: calls.append(1) or value(*a, **k)) if value is function else value
            for key, value in sys.modules["transformers"].AttentionInterface._global_mapping.items()
        })  # fmt: skip
    assert torch.equal(second(**given).loss, truth) and not calls
    first(**given)
    assert calls and contents(config) == before
    assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict() and json.loads(config.to_json_string())


def uses(model, monkeypatch):
    """How many of a forward's attentions are moepatch's."""
    calls = []
    mapping = sys.modules["transformers"].AttentionInterface._global_mapping
    with monkeypatch.context() as patch:
        for key, value in list(mapping.items()):
            if key.startswith("moepatch_"):
                patch.setitem(mapping, key, lambda *a, value=value, **k: calls.append(1) or value(*a, **k))
        model(IDS)
    return len(calls)


def test_what_is_chosen_after_the_patch_is_the_users_choice(monkeypatch):
    for choose in (
        lambda m: m.set_attn_implementation("sdpa"),  # what it was
        lambda m: m.model.set_attn_implementation("sdpa"),
        lambda m: m.set_attn_implementation({"": "sdpa"}),
        lambda m: m.set_attn_implementation("eager"),
        lambda m: setattr(m.config, "_attn_implementation", "eager"),
    ):
        model = copy.deepcopy(_both("qwen3_moe")[1])
        assert uses(model, monkeypatch) == 2 and uses(copy.deepcopy(model), monkeypatch) == 2
        choose(model)
        assert uses(model, monkeypatch) == 0 and uses(copy.deepcopy(model), monkeypatch) == 0
        now = model.config._attn_implementation
        assert uses(pickle.loads(pickle.dumps(model)), monkeypatch) == 0
        moepatch.restore(model)
        assert model.config._attn_implementation == now
    model = copy.deepcopy(_both("qwen3_moe")[1])
    model.config = copy.deepcopy(model.config)
    model.model.config = copy.deepcopy(model.config)
    assert uses(model, monkeypatch) == 2


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_generate_with_router_logits(name, cache):
    """Tokens where plain has some, and its error where it fails: with a static cache it looks for padding in a mask of four axes."""
    models = [copy.deepcopy(m).eval() for m in _both(name)]

    def made(model, ids):
        options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": cache, "output_router_logits": True}
        options |= {"pad_token_id": 0, "eos_token_id": None}
        try:
            return model.generate(ids, **options).tolist()
        except (RuntimeError, AttributeError) as error:
            return str(error)

    answers = [[made(model, ids) for model in models] for ids in (IDS, IDS[:1])]
    assert all(a == b for a, b in answers) and (name != "qwen3_moe" or not isinstance(answers[1][0], str))


# --- transforms, tracers, storages ---------------------------------------------------------------------------------------------------


def test_function_transforms_and_tracers_run_the_familys_code(both):
    plain, patched = both

    def gradients(model):
        def loss(parameters, ids):
            return functional_call(model, parameters, (), {"input_ids": ids, "labels": ids, "use_cache": False}).loss

        parameters = dict(model.named_parameters())
        return grad(loss)(parameters, IDS)

    found, truth = gradients(patched), gradients(plain)
    assert found.keys() == truth.keys() and all(torch.equal(found[key], value) for key, value in truth.items())


def test_vmap_trace_and_export(qwen):
    plain, patched = (copy.deepcopy(m).eval() for m in qwen)

    class Logits(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(input_ids=ids, use_cache=False).logits

    def per_sample(model):
        def loss(parameters, ids):
            return functional_call(model, parameters, (), {"input_ids": ids[None], "labels": ids[None], "use_cache": False}).loss

        return vmap(grad(loss), (None, 0))(dict(model.named_parameters()), IDS)

    found, truth = per_sample(patched), per_sample(plain)
    assert all(compare.error(found[key], value) < 1e-5 for key, value in truth.items())
    traced = [torch.jit.trace(Logits(model), (IDS,), check_trace=False)(IDS.flip(0)) for model in (patched, plain)]
    assert torch.equal(*traced)
    with torch.no_grad():
        for strict in (False, True):
            exported = torch.export.export(Logits(patched), (IDS,), strict=strict).module()
            assert compare.error(exported(IDS), plain(IDS).logits) < 1e-5


def test_a_list_of_experts_is_looked_through_too():
    plain = listed.listed()
    patched = moepatch.optimize(copy.deepcopy(plain), measure=False)
    x = torch.randint(0, listed.V, (2, 5), generator=torch.Generator().manual_seed(0))
    found = [
        grad(lambda ps, model=model: functional_call(model, ps, (x,)).square().mean())({k: p for k, p in model.named_parameters() if "expert" not in k})
        for model in (patched, plain)
    ]  # fmt: skip
    assert all(compare.error(found[0][key], value) < 1e-5 for key, value in found[1].items())


def test_second_derivatives_are_refused_in_words(qwen):
    plain, patched = (copy.deepcopy(m) for m in qwen)
    for loss in (lambda m: m(IDS).logits.sum(), lambda m: m(IDS).logits.square().mean()):
        for wanted in ("lm_head.weight", "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.gate.weight"):
            first = torch.autograd.grad(loss(patched), patched.model.layers[1].self_attn.v_proj.weight, create_graph=True)[0]
            with pytest.raises(moepatch.MoePatchError, match="Second derivatives do not go through"):
                torch.autograd.grad(first.square().sum(), patched.get_parameter(wanted), allow_unused=True)
    # Who asks for a graph and does not use it gets what it always got.
    loss(patched).backward(create_graph=True)
    loss(plain).backward()
    for name, p in plain.named_parameters():
        assert p.grad is None or compare.error(patched.get_parameter(name).grad.detach(), p.grad) < 1e-5


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.tell()


def test_weights_look_as_separate_as_they_are(both, tmp_path):
    plain, patched = both
    named, usual = dict(patched.named_parameters()), dict(plain.named_parameters())
    assert clean_state_dict_for_safetensors(dict(named)).keys() == clean_state_dict_for_safetensors(dict(usual)).keys()
    assert {key: saved(p) for key, p in named.items()} == {key: saved(p) for key, p in usual.items()}
    assert saved(patched.state_dict()) == saved(plain.state_dict())
    assert find_tied_parameters(patched) == find_tied_parameters(plain) == []
    assert len({p.untyped_storage()._cdata for p in named.values()}) == len(named)
    save_file({key: p.detach() for key, p in named.items()}, tmp_path / "parameters")
    save_model(patched, tmp_path / "model")
    for path in ("parameters", "model"):
        assert all(torch.equal(value, usual[key] if key in usual else plain.state_dict()[key]) for key, value in load_file(tmp_path / path).items())
    cloned = {key: value.clone() for key, value in patched.state_dict().items()}
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in cloned.items())


def test_weights_of_a_list_of_experts_are_saved_as_they_were():
    plain = listed.listed()
    patched = moepatch.optimize(copy.deepcopy(plain), measure=False)
    state, usual = patched.state_dict(), plain.state_dict()
    assert {key: saved(value) for key, value in state.items()} == {key: saved(value) for key, value in usual.items()}
    assert clean_state_dict_for_safetensors(dict(state)).keys() == usual.keys()


@pytest.mark.parametrize("name, targets", [("listed", ["gate"]), ("llama4_text", ["router"]), ("phimoe", ["router"]), ("switch_transformers", ["classifier"])])
def test_an_adapted_router_is_what_is_in_the_way(name, targets):
    model = listed.listed() if name == "listed" else zoo.build(name)
    plan = moepatch.plan(inject_adapter_in_model(LoraConfig(r=4, target_modules=targets), model), measure=False)
    reasons = [*(r.reason for r in plan.refusals), *(left.reason for left in plan.left if left.kind == "router")]
    assert reasons and all("a LoRA layer stands at" in reason for reason in reasons)


def test_a_copy_of_a_module_that_is_patched_by_itself():
    mlp = moepatch.optimize(zoo.build("deepseek_v3").model.layers[0].mlp, verify=False, measure=False)
    for made in (copy.deepcopy(mlp), pickle.loads(pickle.dumps(mlp))):
        assert adjacent(made.gate_proj.weight, made.up_proj.weight) is not None
        assert made.gate_proj.weight.data_ptr() != mlp.gate_proj.weight.data_ptr() and moepatch.report(made).patched == 1
        assert type(moepatch.restore(made)).__name__ == "DeepseekV3MLP"

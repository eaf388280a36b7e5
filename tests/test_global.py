"""Nothing global: importing and using moepatch leaves torch and transformers as they were, also from several threads and in any context."""

from __future__ import annotations

import ast
import gc
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import zoo
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeForCausalLM

import moepatch
from moepatch.parallel.twin import meta_twin

HERE = Path(__file__).parent
PACKAGE = Path(moepatch.__file__).parent
#: What may be new: entries under moepatch's own names in tables that are there for that, and torch's own notes of them.
ALLOWED = re.compile(r"""\['moepatch[_:][^]]*'\] is new|\['?"?moepatch/|^torch\.ops\._dir\[:\]|^torch\.jit\._builtins\._builtin_table\[\d+\] is new""")
#: What makes tensors, on the default device and in the default dtype of the moment.
_MAKES = {"arange", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randint", "randn", "scalar_tensor", "tensor", "zeros", "cartesian_prod"}
#: Of these, what makes whole numbers, or has the dtype of what it is given.
_WHOLE = {"arange", "randint", "cartesian_prod"}


@pytest.mark.parametrize("what", ["import", "use", "threads"])
def test_nothing_of_torch_or_transformers_is_changed(what):
    """Four models in as many threads, ten rounds: planned, patched, verified, run and restored."""
    run = subprocess.run([sys.executable, HERE / "global_state.py", what], capture_output=True, text=True, cwd=HERE, timeout=900)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["raised"] == []
    assert [change for change in found["changes"] if not ALLOWED.search(change)] == []


@pytest.mark.parametrize("around", ["torch.device('meta')", "torch.inference_mode()", "half(), meta()"])
def test_it_can_be_imported_in_any_context(around):
    code = f"""
import contextlib, torch, zoo

@contextlib.contextmanager
def half():
    torch.set_default_dtype(torch.float16)
    yield
    torch.set_default_dtype(torch.float32)

@contextlib.contextmanager
def meta():
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)

with {around}:
    import moepatch
for family in ("qwen3_moe", "gpt_oss"):
    model = zoo.build(family)
    given = zoo.inputs(family, model)
    truth = model(**given).logits
    moepatch.optimize(model, measure=False)
    assert moepatch.report(model).plan.mixture[0].backend == "torch" and not moepatch.report(model).plan.refusals
    torch.testing.assert_close(model(**given).logits, truth, rtol=1e-4, atol=1e-5)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE, timeout=900)
    assert run.returncode == 0, run.stderr


def modules() -> list[str]:
    return [module.name for module in pkgutil.walk_packages([str(PACKAGE)], "moepatch.")]


def at_import(tree: ast.Module):
    """The expressions that importing a module evaluates: not those in the bodies of functions."""
    todo = [tree]
    while todo:
        node = todo.pop()
        yield node
        inner = [*node.args.defaults, *filter(None, node.args.kw_defaults)] if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) else None
        todo += [*inner, *getattr(node, "decorator_list", ())] if inner is not None else ast.iter_child_nodes(node)


@pytest.mark.parametrize("name", modules())
def test_no_tensor_is_made_at_import(name):
    path = PACKAGE.parent / name.replace(".", "/")
    tree = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())
    for node in at_import(tree):
        made = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
        assert not (made and node.func.attr in _MAKES), f"{name}:{node.lineno} makes a tensor when it is imported"


@pytest.mark.parametrize("name", modules())
def test_every_tensor_says_its_dtype(name):
    """The default dtype is the caller's, and one for all threads: nothing here depends on it or sets it."""
    path = PACKAGE.parent / name.replace(".", "/")
    source = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
    assert "set_default_dtype" not in source
    if name != "moepatch.match.around":  # what is kept for a process is kept for one default dtype
        assert "default_dtype" not in source
    for node in ast.walk(ast.parse(source)):
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) and called.value.id == "torch" and called.attr in _MAKES - _WHOLE:
            assert any(keyword.arg == "dtype" for keyword in node.keywords), f"{name}:{node.lineno} makes a tensor of the default dtype"


def test_a_module_and_a_function_never_share_a_public_name():
    """``import moepatch.X as x`` gives what ``moepatch.X`` is, whoever was first."""
    inner = {name.removeprefix("moepatch.") for name in modules()}
    assert not set(moepatch.__all__) & inner
    for name in modules():
        if name == "moepatch.__main__" or name.endswith("_jit") or ".symm_mem" in name:
            continue
        try:
            module = importlib.import_module(name)
        except ImportError:  # an optional library
            continue
        assert getattr(importlib.import_module(name.rpartition(".")[0]), name.rpartition(".")[2]) is module
    for name in moepatch.__all__:
        assert not isinstance(getattr(moepatch, name), type(sys))


def test_classes_that_were_made_for_a_patch_go_with_it():
    class Family(Qwen3MoeForCausalLM):
        pass

    model = Family(zoo.config("qwen3_moe"))
    zoo.randomize_(model)
    moepatch.optimize(model, measure=False)
    given = zoo.inputs("qwen3_moe", model)
    model(**given)
    made, family = weakref.ref(type(model)), weakref.ref(Family)
    assert made().__mro__[1] is not Family and made() is not Family
    moepatch.restore(model)
    assert type(model) is Family
    gc.collect()
    assert made() is None
    del model, Family, given
    gc.collect()
    assert family() is None


def test_a_twin_has_the_models_dtypes_and_sets_no_default():
    model = zoo.build("qwen3_moe", dtype=torch.bfloat16)
    model.model.layers[0].mlp.gate.weight.data = model.model.layers[0].mlp.gate.weight.data.float()
    twin = meta_twin(moepatch.optimize(model, verify=False, measure=False))
    wanted = {name: t.dtype for name, t in (*model.named_parameters(), *model.named_buffers())}
    assert {name: t.dtype for name, t in (*twin.named_parameters(), *twin.named_buffers())} == wanted
    assert torch.get_default_dtype() is torch.float32 and set(wanted.values()) == {torch.bfloat16, torch.float32}


@pytest.mark.parametrize("name", modules())
def test_trials_say_whose_formulas_are_torchs(name):
    """A call without a module would be a TypeError, which a matcher takes for a module that is not its own."""
    path = PACKAGE.parent / name.replace(".", "/")
    for node in ast.walk(ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())):
        called = node.func if isinstance(node, ast.Call) else None
        if getattr(called, "attr", getattr(called, "id", None)) == "torch_formulas":
            assert node.args, f"{name}:{node.lineno} calls torch_formulas() without a module"

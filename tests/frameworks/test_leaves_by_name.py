"""DeepSpeed's look-ups by class and by name find in a patched model what they find in a plain one."""

from __future__ import annotations

import copy

import pytest

deepspeed = pytest.importorskip("deepspeed")

import zoo  # noqa: E402
from accelerate.utils import DeepSpeedPlugin  # noqa: E402
from deepspeed.utils import get_z3_leaf_modules, set_z3_leaf_modules  # noqa: E402

import moepatch  # noqa: E402


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_leaf_modules_of_zero_3_are_plains(name):
    plain = zoo.build(name)
    block = type(plain.model.layers[0].mlp)
    for leaf in (block, block.__name__, f"{block.__module__}.{block.__qualname__}", "accelerate"):
        models = copy.deepcopy(plain), moepatch.optimize(copy.deepcopy(plain), measure=False)
        for model in models:
            if leaf == "accelerate":
                DeepSpeedPlugin(zero_stage=3, transformer_moe_cls_names=block.__name__).set_moe_leaf_modules(model)
            else:
                set_z3_leaf_modules(model, [leaf])
        found = [[n for n, m in model.named_modules() if any(m is leaf_module for leaf_module in get_z3_leaf_modules(model))] for model in models]
        assert found[0] == found[1] and len(found[0]) == len(plain.model.layers)

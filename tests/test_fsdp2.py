"""What moepatch takes of FSDP2 that torch does not promise: it is there, it does what moepatch wants, it stands in one file, and its lack is said."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import zoo
from ranks import on_ranks
from test_parallel import mesh_of
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from torch.distributed.tensor import DTensor

import moepatch
from moepatch.parallel import fsdp2
from moepatch.parallel.fsdp2 import NEEDED, Root, Unit

PRODUCT = Path(moepatch.__file__).parent


def missing():
    return fsdp2._missing(mesh_of({"ep": 1})["ep"]), fsdp2.why_not(mesh_of({"ep": 1})["ep"])


def test_every_name_is_there():
    assert on_ranks(1, missing) == [([], None)], "this torch has dropped names of FSDP2 that moepatch needs: see moepatch/parallel/fsdp2.py"


def test_the_list_names_all_that_is_used():
    text = (PRODUCT / "parallel" / "fsdp2.py").read_text()
    code = text[text.index("@dataclass") :]
    public = "all_states|iter_forward_root|post_backward_final_callback_queued|fsdp_params|sharded_param|all_gather_outputs"
    used = set(re.findall(rf"\.(_[a-z]\w+|{public})\b", code))
    either_or = {"_get_fsdp_state", "_fsdp_param_group", "_fsdp_param_groups"}  # the first is asked for, of the others one is enough
    assert used - either_or <= {name for names in NEEDED.values() for name in names}
    unused = {name for names in NEEDED.values() for name in names if not re.search(rf"\b{name}\b", code)}
    assert not unused, f"nobody needs {unused}"


def test_no_other_file_mentions_them():
    names = {name for names in NEEDED.values() for name in names if name.startswith("_")} | {
        "_fsdp_param_group",
        "_fully_shard",
        "_composable_state",
        "_get_fsdp_state",
        "all_states",
        "iter_forward_root",
        "post_backward_final_callback_queued",
        "fsdp_params",
        "sharded_param",
        "unsharded_param",
        "unsharded_accumulated_grad",
        "post_forward_mesh_info",
        "wait_for_unshard",
        "reset_iter_state",
    }
    pattern = re.compile(r"(?<!\w)(" + "|".join(sorted(names)) + r")s?(?!\w)")
    found = [
        f"{path.relative_to(PRODUCT)}:{number}: {match[1]}"
        for path in sorted(PRODUCT.rglob("*.py"))
        if path.name != "fsdp2.py"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if (match := pattern.search(line))
    ]
    assert not found, found


def without(names):
    """A model on a torch that lacks one of them: said before anything is changed, with the name and the version."""
    said = {}
    for owner, name in names:
        model, mesh = zoo.build("qwen3_moe"), mesh_of({"ep": 1})
        types = [type(m) for m in model.modules()]
        kept = owner.__dict__[name]
        if name in ("_pre_forward", "_post_forward"):  # fully_shard itself wants them: other arguments
            setattr(owner, name, lambda self: None)
        else:
            delattr(owner, name)
        try:
            with pytest.raises(moepatch.CheckFailed) as error:
                moepatch.optimize(model, mesh, verify=False)
        finally:
            setattr(owner, name, kept)
        said[name] = str(error.value)
        assert [type(m) for m in model.modules()] == types and not any(isinstance(p, DTensor) for p in model.parameters())
    return said


def test_a_torch_without_one_is_refused_in_words():
    methods = [name for name, call in NEEDED["unit"].items() if call is not None]
    names = [(FSDPState, name) for name in methods] + [(FSDPParamGroup, name) for name in ("reshard", "wait_for_unshard", "is_unsharded")]
    names.append((FSDPModule, "_get_fsdp_state"))
    for name, text in on_ranks(1, without, names)[0].items():
        assert name in text and f"torch {torch.__version__} lacks" in text and "without a mesh" in text, text


def test_other_arguments_are_a_lack_too():
    class State:
        def _pre_forward(self, module):
            """One argument instead of three."""

    assert not fsdp2._serves(State(), "_pre_forward", NEEDED["unit"]["_pre_forward"])
    assert fsdp2._serves(State(), "_pre_forward", ("module",)) and not fsdp2._serves(State(), "_post_forward", None)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.outer(torch.tanh(self.inner(x)))


def semantics():
    """What the names do, one after the other, on a unit in a root."""
    model, mesh, x = Two(), mesh_of({"dp": 2}), torch.randn(3, 4)
    fully_shard(model.inner, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    unit = Unit.of(model.inner)
    assert unit == Unit.of(model.inner) and not unit.stays and Unit.of(model).stays
    root = Root.of(model)
    assert root.units == [Unit.of(model), unit] and not root.backward_broke_off and not root.forward_broke_off()
    assert fsdp2.gathered(model) == {}
    unit.gather()
    whole = model.inner.weight
    assert not isinstance(whole, DTensor)
    stepped = fsdp2.gathered(model)[id(whole)]
    assert isinstance(stepped, DTensor) and torch.equal(stepped.full_tensor(), whole)
    unit.part()
    assert isinstance(model.inner.weight, DTensor)
    y = model(x)
    assert isinstance(model.inner.weight, DTensor) and not isinstance(model.outer.weight, DTensor)
    states = []
    x_grad = y.register_hook(lambda grad: states.append((unit.in_backward, root.backward_broke_off)))
    model.outer.weight.register_hook(lambda grad: states.append((Unit.of(model).in_backward, root.backward_broke_off)))
    y.sum().backward()
    x_grad.remove()
    assert states == [(False, True), (True, True)] or states == [(False, False), (True, True)], states
    assert not unit.in_backward and not root.backward_broke_off
    assert all(isinstance(p.grad, DTensor) for p in model.parameters())
    model.zero_grad()
    # Kept by one rank, then given up.
    model.set_requires_gradient_sync(False)
    model(x).sum().backward()
    model.set_requires_gradient_sync(True)
    fsdp2.drop_unreduced(model)
    model(x).sum().backward()
    once = [p.grad.full_tensor() for p in model.parameters()]
    model.zero_grad()
    model(x).sum().backward()
    assert all(torch.equal(a, p.grad.full_tensor()) for a, p in zip(once, model.parameters(), strict=True))
    model.zero_grad()
    # A forward and a backward that break off.
    handle = model.outer.register_forward_pre_hook(stop)
    with pytest.raises(ZeroDivisionError):
        model(x)
    handle.remove()
    assert root.forward_broke_off() and not root.forward_broke_off()
    for u in root.units:
        u.begin_anew(forget=True)
    handle = model.inner.register_forward_pre_hook(lambda module, args: None)
    y = model(x)
    handle.remove()
    y.register_hook(stop)
    with pytest.raises(ZeroDivisionError):
        y.sum().backward()
    y = model(x)
    if root.backward_broke_off:
        root.end_backward(model)
    assert not root.backward_broke_off
    for u in root.units:
        u.begin_anew(forget=True)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    model(x).sum().backward()
    assert all(torch.equal(a, p.grad.full_tensor()) for a, p in zip(once, model.parameters(), strict=True))


def stop(*args):
    raise ZeroDivisionError


def test_what_the_names_do():
    on_ranks(2, semantics)


def no_views():
    """FSDP2 warns where a unit returns a view, which loses its hook if somebody adds to it in place; experts are units of their own here."""
    model = moepatch.optimize(zoo.build("qwen2_moe"), mesh_of({"dp_shard": 2, "ep": 1}), verify=False)
    block = model.model.layers[0].mlp.experts
    assert isinstance(block, FSDPModule)
    inputs = zoo.inputs("qwen2_moe", model, seed=dist.get_rank())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="FSDP2-wrapped module")
        model(**inputs).logits.sum().backward()


def test_units_return_no_views():
    on_ranks(2, no_views)


@pytest.mark.parametrize("several", [True, False])
def test_a_unit_may_have_several_groups(several):
    """torch 2.12 and later: the name for one group raises where there are several."""

    class State:
        @property
        def _fsdp_param_group(self):
            raise AssertionError("several")

    class Old:
        _fsdp_param_group = None

    state = State() if several else Old()
    if several:
        state._fsdp_param_groups = [mock.Mock(post_forward_mesh_info=None), mock.Mock(post_forward_mesh_info=1)]
    unit = Unit(state)
    assert len(unit.groups) == (2 if several else 0) and unit.stays is not several

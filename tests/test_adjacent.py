"""Weights beside each other: exactly undone, invisible to checkpoints, and one GEMM whose gradients are those of several."""

from __future__ import annotations

import copy
import os
import pickle

import compare
import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn
from torch.nn import functional as F

from moepatch.layout import adjacent as adjacent_module
from moepatch.layout.adjacent import Adjacent, adjacent, joined, joint_linear

ROWS, K = (6, 2, 3), 5


class Three(nn.Module):
    def __init__(self, bias=False):
        super().__init__()
        for name, rows in zip("qkv", ROWS, strict=True):
            self.add_module(name, nn.Linear(K, rows, bias))

    def forward(self, x):
        return joint_linear(x, self.leaves("weight"), self.leaves("bias") if self.q.bias is not None else None)

    def leaves(self, leaf):
        return [getattr(self._modules[name], leaf) for name in "qkv"]


def names(leaf="weight"):
    return tuple(f"{name}.{leaf}" for name in "qkv")


def made(bias=False):
    torch.manual_seed(0)
    module = Three(bias)
    for leaf in ("weight", "bias") if bias else ("weight",):
        Adjacent(module, names(leaf)).do()
    return module


def test_done_and_undone_exactly():
    module = Three()
    before, parameters = {k: v.clone() for k, v in module.state_dict().items()}, list(module.parameters())
    assert adjacent(*module.leaves("weight")) is None
    step = Adjacent(module, names())
    step.do()
    whole = adjacent(*module.leaves("weight"))
    assert torch.equal(whole, torch.cat(module.leaves("weight"))) and whole.data_ptr() == module.q.weight.data_ptr()
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
    step.undo()
    assert adjacent(*module.leaves("weight")) is None
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    assert len({p.untyped_storage().data_ptr() for p in parameters}) == 3 and all(p.untyped_storage().nbytes() == p.nbytes for p in parameters)


def test_nothing_happens_where_weights_differ_or_hold_nothing():
    mixed, meta = Three(), Three().to("meta")
    mixed.k.to(torch.bfloat16)
    for module in (mixed, meta):
        pointers = [p.data_ptr() for p in module.parameters()]
        step = Adjacent(module, names())
        step.do()
        step.undo()
        assert [p.data_ptr() for p in module.parameters()] == pointers


def test_order_gaps_and_strangers_are_seen():
    buffer = torch.randn(9, 4)
    assert adjacent(buffer[:3], buffer[3:5], buffer[5:]).shape == (9, 4)
    assert adjacent(buffer[3:5], buffer[:3]) is None and adjacent(buffer[:3], buffer[4:]) is None
    assert adjacent(buffer[:, :2], buffer[:, 2:]) is None and adjacent(buffer[:3], buffer[3:].clone()) is None
    assert adjacent(buffer[:3], buffer[3:].view(torch.int32)) is None
    assert torch.equal(joined([buffer[4:], buffer[:1]]), torch.cat([buffer[4:], buffer[:1]])) and joined([buffer]) is buffer


def test_checkpoints_are_the_usual_ones(tmp_path):
    """`save_file` refuses tensors that share numbers: slices of one buffer do not, and each is written as what it is."""
    module = made(bias=True)
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == module.state_dict().keys() and all(torch.equal(found[key], value) for key, value in module.state_dict().items())
    torch.save(module.state_dict(), tmp_path / "model.pt")
    other = made(bias=True)
    other.load_state_dict({key: value + 1 for key, value in torch.load(tmp_path / "model.pt").items()})
    assert adjacent(*other.leaves("weight")) is not None and torch.equal(other.k.weight, module.k.weight + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_checkpoints_of_those_who_look_at_storages(dtype, tmp_path):
    """Both take tensors of one storage for one weight with several names: safetensors would refuse the model, accelerate drop weights."""
    from accelerate.utils.other import clean_state_dict_for_safetensors

    module = made(bias=True).to(dtype)
    made_again = Three(bias=True).to(dtype)
    Adjacent(module, names()).do()
    assert adjacent(*module.leaves("weight")) is not None
    state = module.state_dict()
    assert clean_state_dict_for_safetensors(dict(state)).keys() == state.keys()
    save_model(module, tmp_path / "model.safetensors")
    load_model(made_again, tmp_path / "model.safetensors")
    for key, parameter in module.named_parameters():
        assert torch.equal(made_again.get_parameter(key).float(), parameter.float())
        assert state[key].dtype == dtype and state[key].shape == parameter.shape and state[key].data_ptr() == parameter.data_ptr()
    Adjacent(made_again, names()).do()
    load_model(made_again, tmp_path / "model.safetensors")
    assert adjacent(*made_again.leaves("weight")) is not None


def test_a_state_dict_is_still_the_weights():
    """They may be written through, outlive their model, and are the parameters themselves where those are asked for."""
    module = made(bias=True)
    state = module.state_dict(prefix="model.")
    state["model.k.weight"].fill_(3.0)
    assert (module.k.weight == 3.0).all() and not (module.q.weight == 3.0).any()
    assert module.state_dict(keep_vars=True)["k.weight"] is module.k.weight
    again, copied = pickle.loads(pickle.dumps(module)), copy.deepcopy(module)
    assert all(torch.equal(value, state["model." + key]) for other in (again, copied) for key, value in other.state_dict().items())
    del module
    assert (state["model.k.weight"] == 3.0).all()


def test_each_has_a_storage_of_its_own(tmp_path):
    """Many take tensors of one storage for one weight with several names, or write the whole of it for each."""
    from accelerate.utils.other import clean_state_dict_for_safetensors

    module, plain = made(bias=True), Three(bias=True)
    named, usual = dict(module.named_parameters()), dict(plain.named_parameters())
    assert clean_state_dict_for_safetensors(dict(named)).keys() == named.keys()
    for name, parameter in named.items():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes and parameter.storage_offset() == 0
        torch.save(parameter, tmp_path / "a"), torch.save(usual[name], tmp_path / "b")
        assert os.path.getsize(tmp_path / "a") == os.path.getsize(tmp_path / "b")
    module.share_memory()  # moves each by itself
    assert torch.equal(module(torch.ones(2, K)), torch.cat([module._modules[name](torch.ones(2, K)) for name in "qkv"], -1))


def test_the_buffer_goes_with_the_last_that_uses_it():
    module = made()
    reference = adjacent_module._BUFFERS[module.q.weight.data_ptr()]
    whole, before = adjacent(*module.leaves("weight")), torch.cat(module.leaves("weight"))
    for parameter in module.parameters():
        parameter.data = torch.empty(0)
    assert torch.equal(whole, before) and not reference.expired()
    del whole
    assert reference.expired()
    module = made()
    assert adjacent(*module.leaves("weight")) is not None and all(not kept.expired() for kept in adjacent_module._BUFFERS.values())


def test_a_patched_model_is_saved_as_before(tmp_path):
    import test_attention_block

    model = test_attention_block.build("qwen3")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    test_attention_block.patch(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).state_dict()
    assert again.keys() == before.keys() and all(torch.equal(again[key], value) for key, value in before.items())


def gradients(function, x, module):
    x = x.detach().requires_grad_()
    for parameter in module.parameters():
        parameter.grad = None
    y = function(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype))
    return {"y": y.detach(), "x": x.grad, **{key: p.grad for key, p in module.named_parameters()}}


def same(ours, plain):
    assert ours.keys() == plain.keys()
    for key, value in plain.items():
        assert (ours[key] is None) == (value is None), key
        assert value is None or compare.error(ours[key], value) < 1e-5, key


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [(), ("q.weight",), ("k.weight", "v.weight", "q.bias"), ("q.weight", "k.weight", "v.weight")])
@pytest.mark.parametrize("apart", [False, True])
def test_gradients_are_those_of_three_layers(bias, frozen, apart):
    module = made(bias)
    if apart:
        module.k.weight.data = module.k.weight.data.clone()
        assert adjacent(*module.leaves("weight")) is None
    for key, parameter in module.named_parameters():
        parameter.requires_grad_(key not in frozen)
    x = torch.randn(2, 7, K)

    def plain(x):
        return torch.cat([module._modules[name](x) for name in "qkv"], -1)

    same(gradients(module, x, module), gradients(plain, x, module))


def test_training_keeps_them_together_and_moving_them_does_not_matter():
    module, x = made(), torch.randn(4, K)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    for _ in range(2):
        module(x).square().sum().backward()
        optimizer.step()
    assert adjacent(*module.leaves("weight")) is not None
    module.double()
    assert torch.equal(module(x.double()), F.linear(x.double(), torch.cat(module.leaves("weight"))))


def test_no_grad_and_no_batch():
    module, x = made(bias=True), torch.randn(K)
    with torch.no_grad():
        y = module(x)
    assert y.shape == (sum(ROWS),) and not y.requires_grad
    assert compare.error(y, torch.cat([module._modules[name](x) for name in "qkv"])) < 1e-6


def test_compiles_in_one_piece():
    module, x = made(bias=True), torch.randn(2, 7, K)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    same(gradients(compiled, x, module), gradients(module, x, module))

"""The fused loss on the CPU: its arithmetic, logits that wait until somebody looks, and whole models that cannot tell the difference."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import io
import math
import itertools
import pickle
import weakref

import compare
import pytest
import torch
import transformers
import zoo
from interpreter import needs_triton, passes_in_the_interpreter
from ranks import on_ranks
from torch import nn
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

import moepatch
from moepatch import registry, surgery
from moepatch.errors import MoePatchError
from moepatch.kernels import cross_entropy as kernels
from moepatch.layers.loss import backends, chunked  # noqa: F401  (registers the backends)
from moepatch.layers.loss import head as head_module
from moepatch.layers.loss.chunked import WORKSPACE, Formula, chunk_rows, linear_cross_entropy
from moepatch.layers.loss.deferred import DeferredLogits, defer
from moepatch.layers.loss.labelled import Labelled
from moepatch.layers.loss.module import LossState, PatchedHead, with_loss
from moepatch.layers.loss.reference import linear_cross_entropy as reference
from moepatch.layers.loss.spec import LossSpec
from moepatch.match.loss import match_loss
from moepatch.scan import Scan
from moepatch.site import Site
from moepatch.surgery import InjectClass, Journal, Patched

T, H, V = 50, 24, 77


# --- the arithmetic ------------------------------------------------------------------------------------------------------------------


def problem(dtype=torch.float32, tokens=T, bias=False, scale=1.0, vocab=V, ignored=True):
    """Hidden states, weight, bias, labels; leaves."""
    g = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, H, generator=g).to(dtype).requires_grad_()
    w = (torch.randn(vocab, H, generator=g) * scale).to(dtype).requires_grad_()
    b = torch.randn(vocab, generator=g).to(dtype).requires_grad_() if bias else None
    labels = torch.randint(0, vocab, (tokens,), generator=g)
    if ignored:
        labels[::5] = -100
    return x, w, b, labels


def gradients(loss, *leaves):
    leaves = [t for t in leaves if t is not None and t.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


FORMULAS = {
    "mean": Formula(),
    "sum": Formula(mean=False),
    "scale": Formula(scale=0.3),
    "softcap": Formula(softcap=3.0),
    "scale, softcap, sum": Formula(scale=-0.7, softcap=2.0, mean=False),
    "another index": Formula(ignore_index=5),
}


@pytest.mark.parametrize("rows", [7, 16, T])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("formula", FORMULAS)
def test_loss_and_gradients_are_those_of_plain_logits(formula, bias, rows):
    x, w, b, labels = problem(torch.float64, bias=bias)
    labels = labels if formula != "another index" else labels.clamp(min=0)
    formula = FORMULAS[formula]
    truth = gradients(reference(x, w, b, labels, formula), x, w, b)
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        leaves = [t if t is None else t.detach().to(dtype).requires_grad_() for t in (x, w, b)]
        loss = linear_cross_entropy(*leaves, labels, formula, workspace=rows * 80 * dtype.itemsize)
        assert loss.dtype == dtype
        for ours, true in zip(gradients(loss, *leaves), truth, strict=True):
            assert ours.dtype == dtype and compare.error(ours, true) <= limit


@pytest.mark.parametrize("wants", list(itertools.product([False, True], repeat=3)))
def test_only_the_gradients_that_are_wanted(wants):
    tensors = [t.detach().requires_grad_(want) for t, want in zip(problem(bias=True)[:3], wants, strict=True)]
    labels = problem()[3]
    loss = linear_cross_entropy(*tensors, labels, Formula(), workspace=16 * 80 * 4)
    assert loss.requires_grad == any(wants)
    if any(wants):
        for ours, true in zip(gradients(loss, *tensors), gradients(reference(*tensors, labels, Formula()), *tensors), strict=True):
            assert compare.error(ours, true) <= 1e-5


def test_without_gradients_no_gradient_is_computed(monkeypatch):
    x, w, b, labels = problem()
    seen = []
    monkeypatch.setattr(chunked, "cross_entropy_rows", lambda *args, grads: seen.append(grads) or kernels.cross_entropy_rows(*args, grads=grads))
    with torch.no_grad():
        loss = linear_cross_entropy(x, w, b, labels, Formula())
    assert seen == [False] and not loss.requires_grad and compare.error(loss, reference(x, w, b, labels, Formula())) <= 1e-6


@pytest.mark.parametrize("mean", [True, False])
def test_no_label_counts(mean):
    x, w, b, labels = problem()
    labels = torch.full_like(labels, -100)
    ours, theirs = (gradients(f(x, w, b, labels, Formula(mean=mean)), x, w) for f in (linear_cross_entropy, reference))
    for a, z in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, z, equal_nan=True)
    assert ours[0].isnan() == mean


def test_no_tokens():
    x, w, b, labels = problem(tokens=0)
    loss, dx, dw = gradients(linear_cross_entropy(x, w, b, labels, Formula(mean=False)), x, w)
    assert loss == 0 and dx.shape == (0, H) and (dw == 0).all()


def test_the_gradient_of_the_loss_scales_and_the_graph_can_be_used_again():
    x, w, b, labels = problem(bias=True)
    loss, plain = (f(x, w, b, labels, Formula()) for f in (linear_cross_entropy, reference))
    for factor in (1.0, 2.5, 1.0):
        ours, theirs = (torch.autograd.grad(value * factor, (x, w, b), retain_graph=True) for value in (loss, plain))
        assert all(compare.error(a, z) <= 1e-5 for a, z in zip(ours, theirs, strict=True))
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    loss = linear_cross_entropy(x, w, b, labels, Formula())
    loss += 1  # as families add their auxiliary loss
    assert compare.error(loss, plain + 1) <= 1e-6


@pytest.mark.parametrize("really", [7.0, 3.0])
def test_a_sum_that_is_divided_later_needs_no_scaling(really, monkeypatch):
    """And is right where something else happens to it."""
    x, w, b, labels = problem(bias=True)
    factors = []
    monkeypatch.setattr(chunked, "scale_in_place", lambda t, factor: factors.append(float(factor)) or t.mul_(factor))
    wanted = gradients(reference(x, w, b, labels, Formula(mean=False)) / really, x, w, b)
    found = gradients(linear_cross_entropy(x, w, b, labels, Formula(mean=False, items=torch.tensor(7))) / really, x, w, b)
    assert all(compare.error(a, z) <= 1e-5 for a, z in zip(found, wanted, strict=True))
    assert all(abs(factor - 7 / really) < 1e-6 for factor in factors) and len(factors) == 3


def test_gradients_are_not_copied_on_their_way(monkeypatch):
    x, w, b, labels = problem(bias=True)
    seen = []
    monkeypatch.setattr(chunked, "scale_in_place", lambda t, factor: seen.append(t.data_ptr()))
    linear_cross_entropy(x, w, b, labels, Formula()).backward()
    assert seen == [t.grad.data_ptr() for t in (x, w, b)]


def test_second_derivatives():
    tensors = [t.detach().double().requires_grad_() for t in problem(tokens=4, bias=True, vocab=9)[:3]]
    labels = torch.tensor([1, -100, 8, 3])
    assert torch.autograd.gradgradcheck(lambda x, w, b: linear_cross_entropy(x, w, b, labels, Formula(softcap=2.0)), tensors)


@pytest.mark.parametrize("rows", [16, 104, 256, 512])
@pytest.mark.parametrize("formula", ["mean", "sum", "scale, softcap, sum"])
def test_low_precision_is_no_worse_than_plain_logits(formula, rows):
    """With many chunks too: they add up the weight's gradient in fp32."""
    formula = FORMULAS[formula]
    x, w, b, labels = problem(torch.bfloat16, tokens=512, scale=0.3)
    exact = [t.detach().double().requires_grad_() for t in (x, w)]
    truth = gradients(reference(*exact, None, labels, formula), *exact)
    theirs = gradients(reference(x, w, None, labels, formula), x, w)
    ours = gradients(linear_cross_entropy(x, w, None, labels, formula, workspace=rows * 80 * 2), x, w)
    for a, z, true in zip(ours, theirs, truth, strict=True):
        assert a.dtype == z.dtype
        assert compare.error(a, true) <= max(1.5 * compare.error(z, true), 1e-5)


def test_in_fp16_small_gradients_survive_until_the_loss_is_scaled():
    x, w, _, labels = problem(torch.float16, tokens=2000, scale=0.1)
    exact = [t.detach().double().requires_grad_() for t in (x, w)]
    factor = 2.0**14
    truth = gradients(reference(*exact, None, labels, Formula()) * factor, *exact)
    theirs = gradients(reference(x, w, None, labels, Formula()) * factor, x, w)
    ours = gradients(linear_cross_entropy(x, w, None, labels, Formula()) * factor, x, w)
    assert all(compare.error(a, t) <= max(1.5 * compare.error(z, t), 1e-4) for a, z, t in zip(ours, theirs, truth, strict=True))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [512, 4096])
@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("factor", [2.0**-10, 1.0, 2.0**10])
def test_in_fp16_sums_are_divided_before_they_are_rounded(factor, mean, rows, bias):
    """Finite wherever plain logits are, and as near to the truth: 4,096 rows that all say the same have a sum that fp16 cannot hold."""
    g = torch.Generator().manual_seed(0)
    x = (40 + 0.1 * torch.randn(4096, 32, generator=g)).half().requires_grad_()
    w = (0.002 * torch.randn(64, 32, generator=g)).half().requires_grad_()
    b = torch.zeros(64).half().requires_grad_() if bias else None
    labels = torch.full((4096,), 7)
    formula, factor = Formula(mean=mean), factor if mean else factor / 4096
    exact = [t if t is None else t.detach().double().requires_grad_() for t in (x, w, b)]
    truth = gradients(reference(*exact, labels, formula) * factor, *exact)
    theirs = gradients(reference(x, w, b, labels, formula) * factor, x, w, b)
    ours = gradients(linear_cross_entropy(x, w, b, labels, formula, workspace=rows * 64 * 2) * factor, x, w, b)
    for a, z, true in zip(ours, theirs, truth, strict=True):
        if z.isfinite().all():
            assert a.isfinite().all() and compare.error(a, true) <= max(1.5 * compare.error(z, true), 1e-3)


@pytest.mark.parametrize(("tokens", "vocab"), [(16384, 151936), (4096, 151936), (8192, 262144), (100, 151936), (16384, 32000), (5000, 50257)])
def test_chunks_fit_into_the_buffer_and_are_even(tokens, vocab):
    rows = chunk_rows(tokens, vocab, 2, WORKSPACE)
    chunks = -(-tokens // rows)
    assert rows * vocab * 2 <= WORKSPACE and rows <= tokens
    assert chunks == 1 or rows % 128 == 0
    assert chunks <= tokens * vocab * 2 / WORKSPACE * 1.15 + 1
    assert chunk_rows(16384, 151936, 2, WORKSPACE) == 3328 and chunk_rows(4096, 151936, 2, WORKSPACE) == 2048


# --- logits that wait ----------------------------------------------------------------------------------------------------------------


def deferred(dtype=torch.float32, bias=False, backend="chunked"):
    """Deferred logits ``[2, 6, V]`` and ordinary ones, with their hidden states, of one head."""
    torch.manual_seed(0)
    head = nn.Linear(H, V, bias=bias, dtype=dtype)
    hidden = torch.randn(2, 6, H, dtype=dtype)
    a, z = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    return defer(head, a, registry.compute("loss", backend)), head(z), a, z


def is_made(x):
    return x._numbers.made


FACTS = {
    "shape": lambda x: x.shape, "size": lambda x: (x.size(), x.size(-1)), "dim": lambda x: x.dim(), "len": len, "dtype": lambda x: x.dtype,
    "device": lambda x: x.device, "numel": lambda x: x.numel(), "is_floating_point": lambda x: torch.is_floating_point(x), "stride": lambda x: x.stride(),
    "requires_grad": lambda x: x.requires_grad, "isinstance": lambda x: isinstance(x, torch.Tensor), "is_tensor": torch.is_tensor, "ndim": lambda x: x.ndim,
    "itemsize": lambda x: x.element_size(), "contiguous": lambda x: x.is_contiguous(), "shapes": lambda x: (x[..., :-1, :].shape, x.view(-1, V).shape),
    "to": lambda x: (x.to(x.device).shape, x.float().dtype, x.to(torch.float32).dtype),
}  # fmt: skip
VALUES = {
    "cut": lambda x: x[..., :-1, :], "cut twice": lambda x: x[:, 1:][0], "one token": lambda x: x[:, -1], "vocabulary": lambda x: x[..., :5],
    "mask": lambda x: x[torch.tensor([[True, False] * 3] * 2)], "middle": lambda x: x[1, ..., 2:, :], "all dims": lambda x: x[0, 1, 2],
    "new axis": lambda x: x[:, None], "trailing": lambda x: x[0, 1, 2, ...], "scale": lambda x: x * 3.0, "half": lambda x: 0.5 * x, "over": lambda x: x / 7,
    "softcap": lambda x: torch.tanh(x / 30.0) * 30.0, "tensor": lambda x: x * torch.tensor(2.0), "rounded": lambda x: torch.div(x, 2, rounding_mode="floor"),
    "double": lambda x: x.double(), "bf16": lambda x: x.bfloat16(), "to": lambda x: x.to(torch.float64, copy=True),
    "type": lambda x: x.type("torch.DoubleTensor"),
    "view": lambda x: x.view(-1, V), "reshape": lambda x: x.reshape((12, -1)), "other view": lambda x: x.view(2, -1), "flat": lambda x: x.flatten(0, 1),
    "argmax": lambda x: x.argmax(-1), "softmax": lambda x: F.log_softmax(x.float(), -1), "sum": lambda x: x.sum(), "cat": lambda x: torch.cat([x, x]),
    "detach": lambda x: x.detach(), "clone": lambda x: x.clone(), "add": lambda x: x + 1, "radd": lambda x: torch.ones(V) + x, "gather": lambda x: x.mT,
    "in place": lambda x: (x * 1).mul_(2), "list": lambda x: torch.tensor(x.tolist()), "stack": lambda x: torch.stack([*x]), "pad": lambda x: F.pad(x, (0, 1)),
    "smoothed": lambda x: F.cross_entropy(x.view(-1, V), torch.arange(12), label_smoothing=0.1), "numpy": lambda x: torch.from_numpy(x.detach().numpy()),
    "none": lambda x: F.cross_entropy(x.view(-1, V), torch.arange(12), reduction="none"), "data": lambda x: x.data,
    "transposed": lambda x: F.cross_entropy(x.transpose(1, 2), torch.arange(12).view(2, 6)), "copy": lambda x: copy.deepcopy(x.detach()),
    "soft": lambda x: F.cross_entropy(x.view(-1, V), torch.full((12, V), 1 / V)),
    "weights": lambda x: F.cross_entropy(x.view(-1, V), torch.arange(12), torch.ones(V)),
}  # fmt: skip


@pytest.mark.parametrize("what", FACTS)
def test_facts_are_known_without_the_logits(what):
    x, plain, *_ = deferred()
    assert FACTS[what](x) == FACTS[what](plain) and not is_made(x)


@pytest.mark.parametrize("what", VALUES)
def test_whatever_is_done_to_them_gives_what_ordinary_logits_give(what):
    x, plain, a, z = deferred()
    ours, theirs = VALUES[what](x), VALUES[what](plain)
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype and ours.requires_grad == theirs.requires_grad
    seen = ours + 0 if ours.is_floating_point() else ours
    assert type(seen) is torch.Tensor and torch.equal(seen, theirs)
    if ours.requires_grad:
        g = torch.randn(theirs.shape, dtype=theirs.dtype)
        (grad,), (true,) = torch.autograd.grad(seen, a, g), torch.autograd.grad(theirs, z, g)
        assert torch.equal(grad, true)


ENTROPIES = {
    "plain": lambda x, t: F.cross_entropy(x.view(-1, V), t.view(-1)),
    "module": lambda x, t: nn.CrossEntropyLoss()(x.reshape(-1, V), t.view(-1)),
    "shifted": lambda x, t: F.cross_entropy(x[..., :-1, :].contiguous().view(-1, V), t[..., 1:].reshape(-1), reduction="sum"),
    "capped": lambda x, t: F.cross_entropy((torch.tanh(x / 2.0) * 2.0).float().view(-1, V), t.view(-1), ignore_index=3),
    "scaled and capped": lambda x, t: F.cross_entropy((torch.tanh(x * 0.3 / 2.0) * 3.0 / 2).view(-1, V), t.view(-1), ignore_index=3),
    "size(-1)": lambda x, t: F.cross_entropy(x.float().view(-1, x.size(-1)), t.view(-1).to(x.device)),
    "hf": lambda x, t: ForCausalLMLoss(x, t, V),
    "hf items": lambda x, t: ForCausalLMLoss(x, t, V, num_items_in_batch=torch.tensor(7)),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("what", ENTROPIES)
def test_cross_entropy_needs_no_logits(what, bias):
    x, plain, a, z = deferred(bias=bias)
    target = torch.arange(12).view(2, 6)
    ours, theirs = ENTROPIES[what](x, target), ENTROPIES[what](plain, target)
    assert not is_made(x) and type(ours) is torch.Tensor and ours.dtype == theirs.dtype
    assert compare.error(ours, theirs) <= 1e-6
    (grad,), (true,) = torch.autograd.grad(ours, a), torch.autograd.grad(theirs, z)
    assert compare.error(grad, true) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_in_low_precision_that_nobody_widens(dtype):
    """The gradient of a rounded loss is divided by the number of labels before it is rounded."""
    torch.manual_seed(0)
    head, hidden, labels = nn.Linear(H, V, bias=False), torch.randn(1, 999, H), torch.arange(999) % V
    results = []
    for kind in (torch.float64, dtype, dtype):
        module, x = copy.deepcopy(head).to(dtype).to(kind), hidden.to(dtype).to(kind).requires_grad_()
        z = module(x) if len(results) < 2 else defer(module, x, registry.compute("loss", "chunked"))
        loss = F.cross_entropy(z[0, 1:], labels[1:])
        assert loss.dtype == kind
        results.append(gradients(loss * 64, x, module.weight))
    for true, theirs, ours in zip(*results, strict=True):
        assert compare.error(ours, true) <= max(1.5 * compare.error(theirs, true), 1e-5)


def test_they_have_a_graph_like_ordinary_logits():
    x, plain, *_ = deferred()
    assert x.grad_fn is not None and not x.is_leaf and x.requires_grad == plain.requires_grad and not is_made(x)


def test_writing_into_them_shows_in_the_loss():
    x, plain, *_ = deferred()
    for logits in (x, plain):
        with torch.no_grad():
            logits[..., 3] = -50.0
    target = torch.full((12,), 3)
    assert torch.equal(F.cross_entropy(x.view(-1, V), target), F.cross_entropy(plain.view(-1, V), target)) and is_made(x)


def test_they_print_pickle_save_and_copy_as_ordinary_logits():
    x, plain, *_ = deferred()
    x, plain = x[0], plain[0]
    assert repr(x) == repr(plain)
    file = io.BytesIO()
    torch.save({"logits": deferred()[0][0]}, file)
    file.seek(0)
    assert torch.equal(torch.load(file)["logits"], plain)
    loaded = pickle.loads(pickle.dumps(deferred()[0]))
    assert type(loaded) is torch.Tensor and torch.equal(loaded[0], plain)
    with pytest.raises(RuntimeError, match="deepcopy"):  # as for any tensor with a graph
        copy.deepcopy(deferred()[0])


def test_hooks_wait_with_the_logits():
    x, plain, a, z = deferred()
    seen = []
    x.register_hook(lambda g: seen.append(g.clone()))
    handle = x.register_hook(lambda g: seen.append("removed"))
    handle.remove()
    assert not is_made(x)
    x.sum().backward()
    assert len(seen) == 1 and (seen[0] == 1).all()


def test_modes_are_those_of_the_forward_pass():
    x, plain, *_ = deferred()
    with torch.no_grad():
        seen = x[..., :-1, :]
        assert seen.detach().shape == (2, 5, V)
    assert (x + 0).requires_grad
    head = nn.Linear(H, V)
    with torch.inference_mode():
        quiet = defer(nn.Linear(H, V), torch.randn(2, H), None)
    assert not quiet.requires_grad and (quiet + 0).shape == (2, V)
    with torch.autocast("cpu", torch.bfloat16):
        low = defer(head, torch.randn(2, H), None)
        assert low.dtype == torch.bfloat16
    assert (low + 0).dtype == torch.bfloat16


def no_grad_mul(t):
    with torch.no_grad():
        t.mul_(2)


CHANGES = {
    "optimizer": lambda head, hidden: no_grad_mul(head.weight),
    "data": lambda head, hidden: head.weight.data.add_(1e-3),
    "memory": lambda head, hidden: head.weight.detach().numpy().__imul__(2),
    "bias": lambda head, hidden: head.bias.data.add_(1e-3),
    "hidden": lambda head, hidden: no_grad_mul(hidden),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_logits_of_what_has_changed_are_refused(change):
    x, _, hidden, _ = deferred(bias=True)
    loss = F.cross_entropy(x.view(-1, V), torch.arange(12))
    x.retain_grad()
    loss.backward()
    change(x._steps.head.module, hidden)
    for look in (lambda: x.sum(), lambda: x.grad.sum(), lambda: x.detach().float().tolist(), lambda: repr(x)):
        with pytest.raises(MoePatchError, match=r"before `optimizer.step\(\)`"):
            look()


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("gradients", [True, False])
def test_a_loss_of_what_has_changed_is_refused(change, gradients):
    """Somebody's own loss, or one more, of the logits of a forward pass before ``optimizer.step()``."""
    x, _, hidden, _ = deferred(bias=True)
    change(x._steps.head.module, hidden)
    with torch.set_grad_enabled(gradients), pytest.raises(MoePatchError, match="nor can a loss of them"):
        F.cross_entropy(x.view(-1, V), torch.arange(12))


def test_what_a_cuda_graph_replays_is_made_anew_for_each_look(monkeypatch):
    """A replay writes other hidden states into the same memory, and nothing on the host sees it."""
    monkeypatch.setattr(head_module, "_is_capturing", lambda x: True)
    x, _, hidden, _ = deferred()
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    head, rows = x._steps.head.module, x.detach()[:, 1:]
    for _ in range(3):
        hidden.data.add_(1)
        with torch.no_grad():
            wanted = head(hidden)
        assert torch.equal(x + 0, wanted) and torch.equal(rows.float() + 0, wanted[:, 1:])
    for write in (lambda: x.detach().mul_(2), lambda: rows.view(2, -1, V).fill_(0)):
        with pytest.raises(MoePatchError, match="CUDA graph replays"):
            write()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    seen = x + 0  # while it is captured: memory that each replay fills
    assert x._numbers.value() is x._numbers.value() and torch.equal(seen, x._numbers.value())


def test_other_memory_in_the_place_of_the_weights_changes_nothing():
    x, plain, *_ = deferred()
    head = x._steps.head.module
    head.weight.data = torch.zeros_like(head.weight)
    assert torch.equal(x + 0, plain)
    x, plain, *_ = deferred()
    x._steps.head.module.to(torch.float64)
    assert torch.equal(x + 0, plain)


def test_operators_that_change_a_shape_in_place_are_refused():
    x, *_ = deferred()
    with pytest.raises(MoePatchError, match="changes its shape"):
        x.detach().resize_(3)
    with pytest.raises(MoePatchError, match=r"`.data = ` a tensor \(3,\)"):
        x.data = torch.zeros(3)


def test_data_is_set_as_that_of_ordinary_logits():
    x, plain, a, z = deferred()
    seen, old = [], []
    for logits in (x, plain):
        old.append(logits.detach())
        before = F.cross_entropy(logits.view(-1, V), torch.arange(12))
        logits.data = torch.ones_like(logits.detach() + 0)
        after = F.cross_entropy(logits.view(-1, V), torch.arange(12))
        seen.append((before, after, logits.sum(), *torch.autograd.grad(before + after, a if logits is x else z)))
    for ours, theirs in zip((*seen[0], old[0]), (*seen[1], old[1]), strict=True):
        assert torch.allclose(ours + 0, theirs, atol=1e-6)


def test_who_reads_memory_past_all_operators_gets_an_error():
    """And not what lies at address 0, which ends the process."""
    with pytest.raises(RuntimeError, match="data pointer"):
        torch.utils.dlpack.to_dlpack(deferred()[0].detach())


def test_nothing_holds_itself():
    """Who drops output and loss frees hidden states and logits at once: no circle waits for the garbage collector."""
    for make in (lambda: deferred()[0], lambda: torch.tanh(deferred()[0][:, 1:].float() / 3.0) * 3.0):
        made = make()
        head = weakref.ref(made._steps.head)
        gc.collect()
        gc.disable()
        try:
            loss = F.cross_entropy(made.flatten(0, 1), torch.zeros(made.shape[:2].numel(), dtype=torch.long)) + made.sum()
            loss.backward()
            del made, loss
            assert head() is None
        finally:
            gc.enable()


@pytest.mark.parametrize("road", [lambda x: x, lambda x: torch.tanh(x[:, 1:].float() / 3.0) * 3.0, lambda x: x.double()])
def test_a_loss_that_is_kept_keeps_nothing_after_its_backward(road):
    """As torch's own nodes let go of what they have saved, unless the graph is retained."""
    x, plain, *_ = deferred()
    head = weakref.ref(x._steps.head)
    x, plain = road(x), road(plain)
    ours, theirs = (F.cross_entropy(z.flatten(0, 1), torch.arange(z.shape[:2].numel())) for z in (x, plain))
    del x, plain
    for loss in (ours, theirs):
        loss.backward(retain_graph=True)
        loss.backward()
    gc.collect()
    assert head() is None
    for loss in (ours, theirs):
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()


@pytest.mark.parametrize("detached", [False, True])
def test_a_loss_without_gradients_prepares_none(detached, monkeypatch):
    """A metric of a training step: the logits would have a gradient, this loss of them has none."""
    x, plain, *_ = deferred()
    monkeypatch.setattr(chunked._Sum, "add", lambda *_: pytest.fail("a gradient was computed"))
    with torch.set_grad_enabled(detached):
        ours, theirs = (F.cross_entropy((z.detach() if detached else z).view(-1, V), torch.arange(12)) for z in (x, plain))
    assert compare.error(ours, theirs) <= 1e-6 and not is_made(x) and not ours.requires_grad


@pytest.mark.parametrize("factor", [0, 0.0, -1, math.inf, math.nan])
def test_odd_factors(factor):
    x, plain, a, z = deferred()
    for road in (lambda y: y * factor, lambda y: torch.tanh(y) * factor, lambda y: torch.tanh(y * factor) * 2.0, lambda y: torch.tanh(y) / (factor or 1)):
        ours, theirs = (F.cross_entropy(road(y).view(-1, V), torch.arange(12)) for y in (x, plain))
        assert torch.allclose(ours, theirs, equal_nan=True), (ours, theirs)
        (grad,), (true,) = torch.autograd.grad(ours, a, retain_graph=True), torch.autograd.grad(theirs, z, retain_graph=True)
        assert torch.allclose(grad, true, atol=1e-6, equal_nan=True)


# --- models --------------------------------------------------------------------------------------------------------------------------


class LabelledModel(Labelled, Patched):
    keeps_name = True


@pytest.fixture(autouse=True)
def small_chunks():
    """A backend whose buffer holds a few rows of tiny models."""
    registry.register_backend("loss", "small", rank=-1)(lambda: functools.partial(linear_cross_entropy, workspace=5 * 144 * 4))
    yield
    registry.unregister("small", "loss")


def patch(model, backend="chunked"):
    """What `optimize` does about the loss, and the way back."""
    (site,) = [site for found in Scan(model) if isinstance(site := match_loss(found, Scan(model), {}), Site)]
    journal = Journal()
    journal.do(InjectClass(model.get_submodule(site.fqn), PatchedHead, LossState(site.spec, backend)))
    journal.do(InjectClass(model, LabelledModel, "labels"))
    return journal


def labelled(name, model, seed=0, **options):
    inputs = {k: v for k, v in zoo.inputs(name, model, seed=seed, **options).items() if k != "labels"}
    labels = torch.randint(0, model.get_output_embeddings().weight.shape[0] - 1, inputs["input_ids"].shape, generator=torch.Generator().manual_seed(seed))
    labels[0, :3] = -100
    return inputs | {"labels": labels}


def train(model, *args, **inputs):
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    output = model(*args, **inputs)
    output[0].backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return output, grads


def check_same(found, wanted, limit=1e-5):
    (output, grads), (plain, truths) = found, wanted
    assert compare.error(output[0].detach(), plain[0].detach()) <= 1e-6
    assert grads.keys() == truths.keys()
    for name, truth in truths.items():
        assert (grads[name] is None) == (truth is None), name
        assert truth is None or compare.error(grads[name], truth) <= limit, name


def check_model(model, *args, backend="small", **inputs):
    """Patched against unpatched; the logits are not made by the step, and are the same bits when they are."""
    wanted = train(model, *args, **inputs)
    journal = patch(model, backend)
    found = train(model, *args, **inputs)
    check_same(found, wanted)
    ours = found[0]["logits"] if isinstance(found[0], dict) else found[0][1]
    theirs = wanted[0]["logits"] if isinstance(wanted[0], dict) else wanted[0][1]
    assert isinstance(ours, DeferredLogits) and not is_made(ours)
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert torch.equal(ours.detach(), theirs)
    journal.undo()
    check_same(train(model, *args, **inputs), wanted, limit=0)


FAMILIES = ["qwen3_moe", "mixtral", "gpt_oss", "granitemoe", "deepseek_v3", "nemotron_h", "olmoe", "glm4_moe", "cohere2_moe", "jamba", "llama4_text"]
FAMILIES += ["qwen3_vl_moe"]


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    if zoo.available(name) is not None:
        pytest.skip(zoo.available(name))
    model = zoo.build(name)
    check_model(model, **labelled(name, model))


def dense(name, **config):
    torch.manual_seed(0)
    common = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.AutoConfig.for_model(name, **{**common, "head_dim": 8, "pad_token_id": 0, **config})
    model = transformers.AutoModelForCausalLM.from_config(config)
    zoo.randomize_(model)
    return model.train()


DENSE = {
    "softcap": ("gemma2", {"final_logit_softcapping": 2.0}),
    "scaled": ("cohere", {"logit_scale": 0.25}),
    "divided": ("granite", {"logits_scaling": 8.0}),
    "bias": ("phi", {"num_key_value_heads": 4}),
    "tied": ("qwen3", {"tie_word_embeddings": True}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 1, "n_head": 4}),
}


def tokens(model, shape=(2, 12)):
    ids = torch.randint(3, 127, shape, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids.masked_fill(torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.3, -100)}


@pytest.mark.parametrize("kind", DENSE)
def test_what_families_do_to_logits(kind):
    model = dense(DENSE[kind][0], **DENSE[kind][1])
    check_model(model, **tokens(model))


def test_a_family_that_calls_cross_entropy_itself():
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, dropout_rate=0.0, decoder_start_token_id=0)
    model = transformers.T5ForConditionalGeneration(config)
    zoo.randomize_(model)
    check_model(model, **tokens(model))


OPTIONS = {
    "items": {"num_items_in_batch": 7},
    "items on the device": {"num_items_in_batch": torch.tensor(7)},
    "another index": {"ignore_index": 5},
    "shifted": {"shift_labels": torch.arange(24).view(2, 12)},
    "tuple": {"return_dict": False},
    "states": {"output_hidden_states": True},
    "aux": {"output_router_logits": True},
    "keep": {"logits_to_keep": 6},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options(option, qwen3):
    inputs = labelled("qwen3_moe", qwen3)
    if option == "another index":
        inputs["labels"] = inputs["labels"].clamp(min=0)
    if option == "keep":
        inputs["labels"] = inputs["labels"][:, -6:]
    check_model(qwen3, **inputs, **OPTIONS[option])


@pytest.mark.parametrize("items", [7, torch.tensor(7)])
def test_what_the_loss_is_divided_by_is_known_beforehand(items, qwen3, monkeypatch):
    patch(qwen3)
    factors = []
    monkeypatch.setattr(chunked, "scale_in_place", lambda t, factor: factors.append(float(factor)))
    train(qwen3, **labelled("qwen3_moe", qwen3), num_items_in_batch=items)
    assert len(factors) == 2 and all(abs(factor - 1) < 1e-6 for factor in factors)


def test_labels_by_position(qwen3):
    inputs = labelled("qwen3_moe", qwen3)
    names = list(inspect.signature(qwen3.forward).parameters)
    check_model(qwen3, *[inputs.get(name) for name in names[: names.index("labels") + 1]])


def test_no_label_counts_in_a_model(qwen3):
    inputs = labelled("qwen3_moe", qwen3) | {"labels": torch.full((2, 12), -100)}
    plain = qwen3(**inputs).loss
    patch(qwen3)
    assert plain.isnan() and qwen3(**inputs).loss.isnan()


def test_a_forward_that_the_class_is_given_later_is_called(qwen3, monkeypatch):
    inputs = labelled("qwen3_moe", qwen3)
    forward, calls = type(qwen3).forward, []
    patch(qwen3)  # makes the class, which the next model of the family gets too
    monkeypatch.setattr(surgery.original_class(qwen3), "forward", lambda self, *args, **kwargs: calls.append(self) or forward(self, *args, **kwargs))
    qwen3(**inputs)
    assert calls == [qwen3]


def test_without_labels_nothing_is_deferred(qwen3):
    inputs = labelled("qwen3_moe", qwen3)
    labels = inputs.pop("labels")
    qwen3.eval()
    plain, made = qwen3(**inputs).logits, qwen3.generate(**inputs, max_new_tokens=4, do_sample=False)
    patch(qwen3)
    for logits in (qwen3(**inputs).logits, qwen3(**inputs, labels=None).logits, qwen3.forward(**inputs).logits):
        assert type(logits) is torch.Tensor and torch.equal(logits, plain)
    assert torch.equal(qwen3.generate(**inputs, max_new_tokens=4, do_sample=False), made)
    assert isinstance(qwen3.forward(**inputs, labels=labels).logits, DeferredLogits)  # peft calls forward


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation(mode, qwen3):
    inputs = labelled("qwen3_moe", qwen3)
    with mode():
        plain = qwen3(**inputs)
        patch(qwen3)
        output = qwen3(**inputs)
        assert compare.error(output.loss, plain.loss) <= 1e-6 and not output.loss.requires_grad and not is_made(output.logits)
        assert torch.equal(output.logits.argmax(-1), plain.logits.argmax(-1))
    assert torch.equal(output.logits, plain.logits)


def test_a_custom_loss_on_the_logits(qwen3):
    def step():
        qwen3.zero_grad(set_to_none=True)
        output = qwen3(**labelled("qwen3_moe", qwen3))
        (output.loss + 1e-3 * output.logits.float().logsumexp(-1).square().mean()).backward()
        return output, {name: p.grad for name, p in qwen3.named_parameters()}

    wanted = step()
    patch(qwen3)
    check_same(step(), wanted)


def test_gradient_accumulation_and_checkpointing(qwen3):
    def steps():
        qwen3.zero_grad(set_to_none=True)
        for seed in range(3):
            output = qwen3(**labelled("qwen3_moe", qwen3, seed))
            (output.loss / 3).backward()
        return output, {name: p.grad for name, p in qwen3.named_parameters()}

    wanted = steps()
    patch(qwen3)
    check_same(steps(), wanted)
    qwen3.gradient_checkpointing_enable()
    check_same(steps(), wanted)


@pytest.mark.parametrize("requires", ["head only", "no head", "one layer"])
def test_frozen_parts(requires, qwen3):
    for name, p in qwen3.named_parameters():
        p.requires_grad_(("lm_head" in name) == (requires == "head only") if requires != "one layer" else "layers.1.self_attn" in name)
    check_model(qwen3, **labelled("qwen3_moe", qwen3))


TARGETS = {
    "attention": {"target_modules": ["q_proj"]},
    "the head too": {"target_modules": ["q_proj", "lm_head"]},
    "the head whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_lora_put_on_later(targets, qwen3):
    peft = pytest.importorskip("peft")
    inputs = labelled("qwen3_moe", qwen3)

    def adapted(model):
        torch.manual_seed(0)
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, task_type="CAUSAL_LM", lora_dropout=0.0, init_lora_weights=False, **targets))
        return train(model, **inputs)

    wanted = adapted(copy.deepcopy(qwen3))
    patch(qwen3)
    found = adapted(qwen3)
    check_same(found, wanted)
    assert isinstance(found[0].logits, DeferredLogits) == ("lm_head" not in targets["target_modules"])
    assert torch.equal(found[0].logits.detach(), wanted[0].logits)


def test_autocast_and_bf16_by_the_three_way_rule(qwen3):
    # Above the head everything is the same code: its output and gradients are what is compared.
    for dtype, autocast in ((torch.bfloat16, False), (torch.float32, True)):
        head = nn.Linear(H, V, bias=False, dtype=dtype)
        hidden, labels = torch.randn(60, H), torch.randint(0, V, (60,))
        exact = copy.deepcopy(head).double()
        results = []
        for module, x in ((exact, hidden.to(dtype).double()), (head, hidden.to(dtype)), (copy.deepcopy(head), hidden.to(dtype))):
            if len(results) == 2:
                InjectClass(module, PatchedHead, LossState(LossSpec(hidden=H, vocab=V, bias=False), "small")).do()
            x.requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast and bool(results)):
                loss = with_loss(module, x, labels)
            results.append(gradients(loss, x, module.weight))
        for true, theirs, ours in zip(*results, strict=True):
            assert ours.dtype == theirs.dtype
            assert compare.error(ours, true) <= max(1.5 * compare.error(theirs, true), 1e-5)


def test_a_compiled_model_has_ordinary_logits(qwen3):
    model = dense("qwen3")
    inputs = tokens(model)
    wanted = train(model, **inputs)
    patch(model)
    torch._dynamo.reset()
    check_same(train(torch.compile(model, backend="aot_eager", fullgraph=True), **inputs)[:1] + train(model, **inputs)[1:], wanted)
    model.compile(backend="aot_eager")
    output = model(**inputs)
    assert type(output.logits) is torch.Tensor and compare.error(output.loss, wanted[0].loss) <= 1e-6
    torch._dynamo.reset()


def test_hooks_on_the_head_see_logits(qwen3):
    inputs = labelled("qwen3_moe", qwen3)
    plain = qwen3(**inputs).loss
    patch(qwen3)
    seen = []
    qwen3.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.abs().max()) or out * 1)
    assert compare.error(qwen3(**inputs).loss, plain) <= 1e-6 and seen[0] > 0


@pytest.mark.parametrize("where", ["head", "everywhere"])
@pytest.mark.parametrize("kind", ["full_backward_hook", "full_backward_pre_hook"])
def test_hooks_on_the_gradient_of_the_head(qwen3, where, kind):
    inputs = labelled("qwen3_moe", qwen3)
    seen = []

    def hook(module, *grads):
        if module is qwen3.lm_head:
            seen.append(tuple(grads[-1][0].shape))

    handle = getattr(qwen3.lm_head, f"register_{kind}")(hook) if where == "head" else getattr(nn.modules.module, f"register_module_{kind}")(hook)
    try:
        wanted = train(qwen3, **inputs)
        patch(qwen3)
        check_same(train(qwen3, **inputs), wanted)
    finally:
        handle.remove()
    assert len(seen) == 2 and len(set(seen)) == 1


def test_copies_and_pickles_of_a_patched_model(qwen3):
    inputs = labelled("qwen3_moe", qwen3)
    wanted = train(qwen3, **inputs)
    patch(qwen3)
    for made in (copy.deepcopy(qwen3), pickle.loads(pickle.dumps(qwen3))):
        made.zero_grad()
        found = train(made, **inputs)
        check_same(found, wanted)
        assert isinstance(found[0].logits, DeferredLogits) and type(made).__name__ == type(qwen3).__name__
    assert "[moepatch: loss=chunked]" in repr(qwen3.lm_head)


def test_restore_leaves_nothing(qwen3):
    before = [(type(m), set(vars(m))) for m in qwen3.modules()]
    signature = inspect.signature(qwen3.forward)
    journal = patch(qwen3)
    assert inspect.signature(qwen3.forward) == signature
    journal.undo()
    assert [(type(m), set(vars(m))) for m in qwen3.modules()] == before


def test_trainer_trains_evaluates_and_predicts(tmp_path, qwen3):
    pytest.importorskip("accelerate")
    rows = [{k: v[0] for k, v in labelled("qwen3_moe", qwen3, seed, batch=1).items()} for seed in range(6)]

    def fit(model, metrics):
        args = transformers.TrainingArguments(
            tmp_path, max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2, report_to=[], use_cpu=True, save_strategy="no", seed=1,
            learning_rate=1e-3, disable_tqdm=True, logging_steps=1,
        )  # fmt: skip
        trainer = transformers.Trainer(model, args, train_dataset=rows, eval_dataset=rows, compute_metrics=metrics)
        trainer.train()
        return trainer.state.log_history, trainer.evaluate(), trainer.predict(rows)

    plain, patched = qwen3, copy.deepcopy(qwen3)
    patch(patched)
    metrics = lambda p: {"mean": float(abs(p.predictions).mean())}  # noqa: E731
    wanted, found = fit(plain, metrics), fit(patched, metrics)
    for a, z in zip(found[0][:2], wanted[0][:2], strict=True):
        assert abs(a["loss"] - z["loss"]) < 1e-4 and abs(a["grad_norm"] - z["grad_norm"]) < 1e-4 * z["grad_norm"]
    assert abs(found[1]["eval_loss"] - wanted[1]["eval_loss"]) < 1e-4 and abs(found[1]["eval_mean"] - wanted[1]["eval_mean"]) < 1e-4
    assert abs(found[2].predictions - wanted[2].predictions).max() < 1e-2


def test_matched_are_heads_of_models_with_labels():
    def sites(model):
        return [site for found in Scan(model) if isinstance(site := match_loss(found, Scan(model), {}), Site)]

    (site,) = sites(dense("qwen3", tie_word_embeddings=True).to("meta"))
    assert (site.fqn, site.spec, site.device) == ("lm_head", LossSpec(hidden=32, vocab=128, bias=False), "meta")
    assert site.spec.describe() == "cross-entropy of 32 → 128" and site.spec.resized({32: 8}).hidden == 8
    assert site.spec.to_dict()["layout"] == "head"
    model = dense("qwen3")
    assert sites(model.model) == [] and sites(nn.Linear(3, 4)) == []
    assert [s.fqn for s in sites(nn.Sequential(model))] == ["0.lm_head"]
    model.lm_head = nn.Sequential(model.lm_head)
    assert sites(model) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimize_verifies_the_loss_and_restore_undoes_it(dtype):
    model = zoo.build("qwen3_moe", dtype=dtype)
    before = [type(m) for m in model.modules()]
    inputs = labelled("qwen3_moe", model)
    moepatch.optimize(model)
    (verified,) = [v for v in moepatch.report(model).verified if v.fqn == "lm_head"]
    assert verified.ok and verified.backend == "chunked" and {d.what for d in verified.differences} == {"output", "grad input 0", "grad weight"}
    output = model(**inputs)
    assert isinstance(output.logits, DeferredLogits)
    output.loss.backward()
    moepatch.restore(model)
    assert [type(m) for m in model.modules()] == before and type(model(**inputs).logits) is torch.Tensor


def test_a_backend_that_computes_something_else_is_rolled_back():
    registry.register_backend("loss", "wrong", rank=-1)(lambda: lambda x, w, b, labels, formula: reference(x, w, b, labels, formula) * 1.01)
    model = zoo.build("qwen3_moe")
    try:
        with pytest.raises(moepatch.MoePatchError, match="lm_head"):
            moepatch.optimize(model, loss="wrong")
    finally:
        registry.unregister("wrong", "loss")
    assert type(model.lm_head) is nn.Linear


def test_the_loss_can_be_left_alone():
    model = moepatch.optimize(zoo.build("qwen3_moe"), loss=None)
    assert type(model.lm_head) is nn.Linear


# --- sharded -------------------------------------------------------------------------------------------------------------------------


def sharded(reshard):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    rank, ranks = dist.get_rank(), dist.get_world_size()
    truth = dense("qwen3", tie_word_embeddings=True)
    logits = []
    for r in range(ranks):
        output = truth(**tokens(truth, (2, 8 + r)))
        (output.loss / ranks).backward()
        logits.append((output.loss.detach(), output.logits.detach()))
    model = dense("qwen3", tie_word_embeddings=True)
    patch(model)
    mesh = init_device_mesh("cpu", (ranks,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
    output = model(**tokens(model, (2, 8 + rank)))
    assert isinstance(output.logits, DeferredLogits)
    output.loss.backward()
    assert not is_made(output.logits)
    assert compare.error(output.loss.detach(), logits[rank][0]) <= 1e-6
    assert compare.error(output.logits.detach(), logits[rank][1]) <= 1e-6  # from the shards, which every rank does
    for (name, p), q in zip(model.named_parameters(), truth.parameters(), strict=True):
        assert compare.error(p.grad.full_tensor(), q.grad) <= 1e-5, name
    late = model(**tokens(model, (2, 8 + rank))).logits
    with torch.no_grad():
        for p in model.parameters():
            p.data.add_(0.1)
    with pytest.raises(MoePatchError, match="has changed since"):
        late.sum()


@pytest.mark.parametrize("reshard", [False, True])
def test_a_head_that_fsdp2_shards(reshard):
    on_ranks(2, sharded, reshard)


def unit_of_its_own():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    truth, model = dense("qwen3"), dense("qwen3")
    truth(**tokens(truth)).loss.backward()
    patch(model)
    fully_shard(model.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    output = model(**tokens(model))
    assert type(output.logits) is torch.Tensor
    output.loss.backward()
    for p, q in zip(model.parameters(), truth.parameters(), strict=True):
        assert compare.error(p.grad.full_tensor(), q.grad) <= 1e-5


def test_a_head_that_is_an_fsdp2_unit_of_its_own_has_ordinary_logits():
    on_ranks(2, unit_of_its_own)


# --- the kernels ---------------------------------------------------------------------------------------------------------------------


def check_kernels():
    """The Triton kernels against their reference, also where V is no multiple of anything."""
    done = 0
    cases = itertools.product((7, 1000, 1024, 5003, 20000), (torch.float32, torch.float16), (None, 3.0), (1.0, 0.25), (True, False), (True, False))
    for vocab, dtype, softcap, scale, divide, grads in cases:
        g = torch.Generator().manual_seed(done)
        buffer = (torch.randn(5, -(-vocab // 16) * 16, generator=g) * 4).to(dtype)
        labels = torch.randint(0, vocab, (5,), generator=g)
        labels[2], labels[4] = -100, vocab - 1
        results = []
        for function in (kernels.cross_entropy_rows_reference, kernels.launch_rows):
            z, loss = buffer.clone()[:, :vocab], torch.full((5,), float("nan"))
            function(z, labels, loss, torch.tensor(4) if divide else None, Formula(-100, scale, softcap), grads=grads)
            results.append((z, loss))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-4 if dtype == torch.float32 else 2e-3, atol=1e-5)
        assert grads or torch.equal(results[1][0], buffer[:, :vocab])
        done += 1
    loss = torch.zeros(1)
    kernels.launch_rows(torch.zeros(1, 16), torch.tensor([16]), loss, None, Formula(), grads=True)
    assert loss.isnan()  # a label outside of the vocabulary
    x = torch.randn(10001)
    for factor in (0.5, 1.0, -3.0, 1 + 1e-7):
        y = x.clone()
        kernels.launch_scale(y, torch.tensor(factor))
        assert torch.equal(y, x * (1.0 if abs(factor - 1) < 1e-6 else factor))
    print(f"{done} cases equal")


@needs_triton
def test_kernels_in_tritons_interpreter():
    passes_in_the_interpreter(__file__, "160 cases equal")


if __name__ == "__main__":
    check_kernels()

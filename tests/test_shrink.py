"""Saved tensors lose the rows that nobody has, and nothing else."""

from __future__ import annotations

import pytest
import torch

from moepatch.experts import shrink


@pytest.fixture(autouse=True)
def nothing_waits():
    shrink._waiting.clear()
    yield
    shrink._waiting.clear()


class Saves(torch.autograd.Function):
    """Keeps its input's double, of which the first rows count, and reads them in the backward pass."""

    @staticmethod
    def forward(ctx, x, ends, ranks):
        kept = x * 2
        ctx.save_for_backward(kept)
        ctx.rows = int(ends[-1])
        shrink.cut_later(kept, ends, ranks)
        return x.sum()

    @staticmethod
    def backward(ctx, grad):
        (kept,) = ctx.saved_tensors
        Saves.bytes = kept.untyped_storage().nbytes()
        out = torch.zeros(kept.shape)
        out[: ctx.rows] = torch.empty(0).set_(kept.untyped_storage(), 0, (ctx.rows, kept.shape[1]), kept.stride())
        return out * grad, None, None


@pytest.mark.parametrize(("ranks", "rows", "cut"), [(8, 100, True), (8, 5000, False), (2, 100, False), (4, 0, True)])
def test_the_storage_is_cut_when_it_is_worth_it_and_what_counts_stays(ranks, rows, cut):
    x = torch.randn(8000, 4, requires_grad=True)
    loss = Saves.apply(x, torch.tensor([0, rows // 2, rows]), ranks)
    shrink._cut_known(0)
    loss.backward()
    assert Saves.bytes == ((rows + shrink.SLACK) * 16 if cut else 8000 * 16)
    assert torch.equal(x.grad[:rows], 2 * x.detach()[:rows])


def test_what_is_gone_is_left_alone_and_what_has_not_arrived_waits():
    class Later:
        here = False

        def query(self):
            return self.here

    x = torch.zeros(8000, 4)
    shrink.cut_later(x, torch.tensor([10]), 8)
    shrink.cut_later(torch.zeros(8000, 4), torch.tensor([10]), 8)  # cuts the first, and is freed at once
    assert x.untyped_storage().nbytes() == (10 + shrink.SLACK) * 16
    later, y = Later(), torch.zeros(8000, 4)
    shrink.cut_later(y, torch.tensor([10]), 8)
    shrink._waiting[-1] = shrink._waiting[-1]._replace(arrived=later)
    shrink._cut_known(0)
    assert y.untyped_storage().nbytes() == y.numel() * 4
    later.here = True
    shrink._cut_known(0)
    assert y.untyped_storage().nbytes() == (10 + shrink.SLACK) * 16 and not shrink._waiting

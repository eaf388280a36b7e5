"""The grouped products of `gemm` on Transformer Engine: one GEMM an expert, in bf16 or FP8, for groups whose sizes the host knows.

In FP8 every expert's rows, and its matrix, get one scale at each call, that of their largest number (current scaling). All are E4M3,
gradients too: with scales so local they need digits more than range, and the routing weights' gradient is made of them. The GEMM wants
rows in multiples of 16, so groups are padded with zeros, which change no scale and no sum.
"""

from __future__ import annotations

import functools
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.routes import Routing
from ..layers.te_linear import MULTIPLE


class Groups(NamedTuple):
    """How rows that are sorted by expert fall into groups, and their products (`fused.Gemms`).

    Attributes:
        splits: rows of each expert, on the host.
        padded: the same as multiples of 16 in FP8.
        place_R: for each row its place among padded rows; None where nothing is padded. Rows of nobody have any place.
        fp8: round the operands.
    """

    splits: list[int]
    padded: list[int]
    place_R: Tensor | None
    fp8: bool

    def rows_times(self, x_RA: Tensor, w_EBA: Tensor, *, of_gradients: bool = False) -> Tensor:
        """``y_RB``: each row times its expert's matrix. Rows of nobody are undefined.

        Args:
            x_RA: contiguous rows.
            w_EBA: matrices ``[E, B, A]``, or a transposed view of such.
            of_gradients: the rows are gradients, whose sums are kept in full precision in FP8 too.
        """
        y_RB = x_RA.new_empty(x_RA.shape[0], w_EBA.shape[1])
        some = [expert for expert, rows in enumerate(self.splits) if rows]
        if not some:
            return y_RB
        as_stored = w_EBA.stride(-1) == 1
        stored = w_EBA if as_stored else w_EBA.mT
        matrices = _matrices(stored.contiguous(), self, columnwise=not as_stored)
        x = _padded(x_RA, self)
        out = y_RB[: sum(self.splits)] if self.place_R is None else x.new_empty(x.shape[0], w_EBA.shape[1])
        sizes = [self.padded[expert] for expert in some]
        rows = _rows(x, sizes, self, columnwise=False)
        _library().gemm(
            [matrices[expert] for expert in some], rows, [out], [None] * len(some), x_RA.dtype,
            layout="TN" if as_stored else "NN", m_splits=sizes, single_output=True, use_split_accumulator=of_gradients,
        )  # fmt: skip
        return y_RB if self.place_R is None else out.index_select(0, self.place_R)

    def weight_gradient(self, grad_RB: Tensor, x_RA: Tensor, weight_EBA: Tensor) -> Tensor:
        """``dL/dW [E, B, A]`` with the memory order of the weight; exactly 0 for an expert without rows."""
        as_stored = weight_EBA.stride(-1) == 1
        experts, width_b, width_a = weight_EBA.shape
        stored = weight_EBA.new_empty((experts, width_b, width_a) if as_stored else (experts, width_a, width_b))
        some = [expert for expert, rows in enumerate(self.splits) if rows]
        for expert in set(range(experts)).difference(some):
            stored[expert].zero_()
        if some:
            sizes = [self.padded[expert] for expert in some]
            grads = _rows(_padded(grad_RB, self), sizes, self, columnwise=True)
            rows = _rows(_padded(x_RA, self), sizes, self, columnwise=True)
            first, second = (rows, grads) if as_stored else (grads, rows)
            _library().gemm(
                first, second, [stored[expert] for expert in some], [None] * len(some), weight_EBA.dtype,
                layout="NT", m_splits=sizes, use_split_accumulator=True,
            )  # fmt: skip
        return stored if as_stored else stored.mT


def groups_of(routing: Routing, fp8: bool) -> Groups:
    """Waits for the device: the library launches one GEMM an expert, and the host has to know its rows."""
    ends = routing.ends.tolist()
    splits = [end - start for start, end in pairwise(ends)]
    padded = [-(-rows // MULTIPLE) * MULTIPLE if fp8 else rows for rows in splits]
    if padded == splits or not ends[-1]:
        return Groups(splits, splits, None, fp8)
    starts = [0, *accumulate(padded)]
    shift_E = [to - start for to, start in zip(starts, ends, strict=True)]
    row_R = torch.arange(routing.expert_R.shape[0], device=routing.ends.device)
    place_R = row_R + row_R.new_tensor(shift_E).index_select(0, routing.expert_R)
    return Groups(splits, padded, place_R.clamp_(max=starts[-1] - 1), fp8)


def _padded(x_RA: Tensor, groups: Groups) -> Tensor:
    count = sum(groups.splits)
    if groups.place_R is None:
        return x_RA[:count]
    return x_RA.new_zeros(sum(groups.padded), x_RA.shape[1]).index_copy_(0, groups.place_R[:count], x_RA[:count])


def _rows(x: Tensor, sizes: list[int], groups: Groups, columnwise: bool) -> list:
    """The groups that have rows, as operands. In FP8 an operand is read along its rows, or from a transposed copy."""
    if not groups.fp8:
        return list(x.split(sizes))
    return _library().split_quantize(x, sizes, list(_quantizers(len(sizes), columnwise)))


def _matrices(stored: Tensor, groups: Groups, columnwise: bool) -> list:
    if not groups.fp8:
        return list(stored.unbind(0))
    experts, rows, _ = stored.shape
    return _library().split_quantize(stored.flatten(0, 1), [rows] * experts, list(_quantizers(experts, columnwise)))


@functools.cache
def _quantizers(count: int, columnwise: bool) -> tuple:
    library = _library()
    # The library makes the copy that is read along columns beside the other one only.
    made = tuple(library.quantizer(library.dtypes.kFloat8E4M3, torch.device("cuda"), rowwise=True, columnwise=columnwise) for _ in range(count))
    for quantizer in made:
        quantizer.internal = True  # results need not be tensors for autograd
    return made


class _Library(NamedTuple):
    gemm: object
    split_quantize: object
    quantizer: type
    dtypes: type


@functools.cache
def _library() -> _Library:
    """The functions of Transformer Engine that are used."""
    import transformer_engine.pytorch  # noqa: F401  (loads the extension below)
    import transformer_engine_torch
    from transformer_engine.pytorch.cpp_extensions import general_grouped_gemm
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer

    return _Library(general_grouped_gemm, transformer_engine_torch.split_quantize, Float8CurrentScalingQuantizer, transformer_engine_torch.DType)

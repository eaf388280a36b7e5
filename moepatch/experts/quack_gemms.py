"""The six GEMMs of an expert layer as QuACK takes them: what each needs to be compiled, to be tried in some tiles, and to be named.

R rows sorted by expert, gathered from T tokens by ``routing.token_R``. Pre-activations alternate gate and up, whatever the weights do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.routes import Routing
from .quack_epilogues import Epilogues
from .quack_tiles import Gemm, Problem

_FEW = 8  # rows of a call that is made for its kernel


class Library(NamedTuple):
    """The functions of QuACK that are used."""

    default_config: Callable
    gemm_tuned: Callable
    run_gemm_plan: Callable
    run_gemm_epi_plan: Callable


@functools.cache
def library() -> Library:
    """Imports QuACK, which takes seconds."""
    from quack.gemm import run_gemm_plan
    from quack.gemm_config import default_config
    from quack.gemm_interface import gemm_tuned
    from quack.gemm_runtime.host import run_gemm_epi_plan

    return Library(default_config, gemm_tuned, run_gemm_plan, run_gemm_epi_plan)


class Differentiation(NamedTuple):
    """A plan, and dot products in parts: one for each column of tiles."""

    plan: Any
    dot_RP: Tensor


class Size(NamedTuple):
    """How large a problem is, where its operands stand for larger ones: rows of all experts, and experts."""

    rows: int
    experts: int


def activation(x_TH: Tensor, up_ENH: Tensor, bias_EN: Tensor | None, routing: Routing, epilogues: Epilogues, halves: bool, into: tuple, size: Size) -> Gemm:
    """Up projection and activation; `into` are the pre-activation ``[R, N]`` and ``h [R, I]``. `Gemm.run` returns the plan."""
    pre_RN, h_RI = into
    n, hidden = up_ENH.shape[1:]
    values = {"h": h_RI} if bias_EN is None else {"h": h_RI, "bias": bias_EN}
    epilogue = epilogues.forward if bias_EN is None else epilogues.forward_with_bias
    keywords = {"cu_seqlens_m": routing.ends, "A_idx": routing.token_R, "concat_layout": ("B",) if halves else None}
    facts = (*_facts(up_ENH), str(epilogues.activation), *(["halves"] if halves else []), *([] if bias_EN is None else ["bias"]))
    problem = _problem(
        "up projection", facts, (size.experts, n, hidden), size,
        n=n, k=hidden, gather=True, pairs=epilogues.gated, outputs=2, device=x_TH.device,
    )  # fmt: skip
    return Gemm(problem, lambda tiles: _with_epilogue(epilogue, x_TH, up_ENH, pre_RN, None, values, keywords, tiles))


def differentiation(grad_TH: Tensor, down_EHI: Tensor, pre_RN: Tensor, routing: Routing, epilogues: Epilogues, into: tuple, size: Size) -> Gemm:
    """Through down projection and activation; `into` are ``dL/dpre [R, N]`` and ``weight*h [R, I]``. `Gemm.run` returns a `Differentiation`."""
    grad_pre_RN, h_RI = into
    hidden, width = down_EHI.shape[1:]
    keywords = {"cu_seqlens_m": routing.ends, "A_idx": routing.token_R, "b_kn": True}

    def run(tiles):
        shapes = {name: op.sink_alloc_shape((pre_RN.shape[0],), width, tiles.tile_m, tiles.tile_n) for name, op in epilogues.backward.sinks.items()}
        sums = {name: routing.weights_R.new_empty(shape) for name, shape in shapes.items()}
        values = {"h": h_RI, "weight": routing.weights_R, **sums}
        return Differentiation(_with_epilogue(epilogues.backward, grad_TH, down_EHI, grad_pre_RN, pre_RN, values, keywords, tiles), sums["dot"])

    facts = (*_facts(down_EHI), str(epilogues.activation))
    problem = _problem(
        "down projection's gradient", facts, (size.experts, hidden, width), size,
        n=width, k=hidden, gather=True, pairs=epilogues.gated, outputs=5 if epilogues.gated else 3, device=grad_TH.device,
    )  # fmt: skip
    return Gemm(problem, run)


def projection(a_RK: Tensor, w_ENK: Tensor, routing: Routing, halves: bool, out_RN: Tensor, size: Size) -> Gemm:
    """Each row times its expert's matrix. `Gemm.run` returns the plan."""
    n, k = w_ENK.shape[1:]
    keywords = {"cu_seqlens_m": routing.ends, "concat_layout": ("B",) if halves else None}
    facts = (*_facts(w_ENK), *(["halves"] if halves else []))
    problem = _problem("projection", facts, (size.experts, n, k), size, n=n, k=k, device=a_RK.device)
    return Gemm(problem, lambda tiles: _plain(a_RK, w_ENK.mT, out_RN, keywords, tiles))


def outer_sums(x_TM: Tensor, y_RN: Tensor, into_EMN: Tensor, routing: Routing, halves: bool, size: Size) -> Gemm:
    """A weight gradient. `Gemm.run` returns the plan."""
    m, n = into_EMN.shape[1:]
    keywords = {"cu_seqlens_k": routing.ends, "A_idx": routing.token_R, "concat_layout": ("out",) if halves else None}
    facts = (*_facts(into_EMN), *(["halves"] if halves else []))
    problem = _problem("weight gradient", facts, (size.experts, m, n), size, n=n, k=size.rows / size.experts, m=m, gather=True, device=x_TM.device)
    return Gemm(problem, lambda tiles: _plain(x_TM.mT, y_RN, into_EMN, keywords, tiles))


def layer(
    x_TH: Tensor, up_ENH: Tensor, bias_EN: Tensor | None, down_EHI: Tensor, routing: Routing, epilogues: Epilogues, halves: bool, size: Size, train: bool
) -> list[Gemm]:
    """The two GEMMs of a layer's forward pass, and with `train` the four of its backward pass, with results of their own to write into."""
    rows, width = routing.token_R.shape[0], up_ENH.shape[1]
    pre_RN, h_RI = x_TH.new_zeros(rows, width), x_TH.new_zeros(rows, down_EHI.shape[2])
    out_RH = x_TH.new_empty(rows, x_TH.shape[1])
    forward = [
        activation(x_TH, up_ENH, bias_EN, routing, epilogues, halves, (pre_RN, h_RI), size),
        projection(h_RI, down_EHI, routing, False, out_RH, size),
    ]
    if not train:
        return forward
    return [
        *forward,
        differentiation(x_TH, down_EHI, pre_RN, routing, epilogues, (torch.empty_like(pre_RN), torch.empty_like(h_RI)), size),
        outer_sums(x_TH, h_RI, empty_like(down_EHI), routing, False, size),
        outer_sums(x_TH, pre_RN, empty_like(up_ENH).mT, routing, halves, size),
        projection(pre_RN, up_ENH.mT, routing, halves, out_RH, size),
    ]


def small_layer(
    x_TH: Tensor, up_ENH: Tensor, bias_EN: Tensor | None, down_EHI: Tensor, epilogues: Epilogues, halves: bool, size: Size, train: bool
) -> list[Gemm]:
    """`layer` on a few rows of one expert: the kernels are the same ones, since none depends on a size."""
    few = torch.arange(_FEW, dtype=torch.int32, device=x_TH.device)
    ends = torch.zeros(2, dtype=torch.int32, device=x_TH.device)
    ends[1] = _FEW
    routing = Routing(few, few, few, torch.zeros_like(few), ends, torch.ones_like(few, dtype=torch.float32), 1)
    bias = None if bias_EN is None else bias_EN[:1]
    return layer(x_TH.new_zeros(_FEW, x_TH.shape[1]), up_ENH[:1], bias, down_EHI[:1], routing, epilogues, halves, size, train)


def empty_like(w_ENK: Tensor) -> Tensor:
    """With the memory order of a weight, so that autograd keeps it as its gradient without a copy."""
    experts, n, k = w_ENK.shape
    return w_ENK.new_empty(experts, n, k) if w_ENK.stride(-1) == 1 else w_ENK.new_empty(experts, k, n).mT


def _problem(name: str, facts: tuple, shape: tuple, size: Size, *, n, k, device, m=None, gather=False, pairs=False, outputs=1) -> Problem:
    ragged = "m" if m is None else "k"
    m = size.rows / size.experts if m is None else m
    return Problem(f"{name} {shape}", ", ".join(facts), size.rows, m, n, k, ragged, gather, pairs, outputs, device)


def _facts(w: Tensor) -> tuple[str, str]:
    return str(w.dtype).removeprefix("torch."), "rows contiguous" if w.stride(-1) == 1 else "columns contiguous"


def _plain(a: Tensor, b: Tensor, out: Tensor, keywords: dict, tiles: Any) -> Any:
    """`b` is ``[E, K, N]`` or ``[R, N]``."""
    return library().gemm_tuned.fn(a, b, out, config=tiles, **keywords)[-1]


def _with_epilogue(epilogue: Any, a: Tensor, b: Tensor, d: Tensor, c: Tensor | None, values: dict, keywords: dict, tiles: Any) -> Any:
    return epilogue.gemm(
        a, b, d, c, epi_args=values, tile_M=tiles.tile_m, tile_N=tiles.tile_n, tile_K=tiles.tile_k,
        cluster_M=tiles.cluster_m, cluster_N=tiles.cluster_n, pingpong=tiles.pingpong, max_swizzle_size=tiles.max_swizzle_size, **keywords,
    )  # fmt: skip

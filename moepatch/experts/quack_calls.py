"""QuACK's grouped GEMMs with the gather and the activation inside, at little cost per call.

QuACK's own entry points look up a plan by the metadata of every tensor in each call, and a plan for each new number of tokens is tuned
anew. A plan does not depend on the number of rows, so here it is kept by the matrices and the order of magnitude of the rows: the first
call of a class chooses its tiles (see `quack_tiles`) and compiles, and the others only launch.

R rows sorted by expert, gathered from T tokens by ``routing.token_R``. Pre-activations alternate gate and up, whatever the weights do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendUnavailable
from ..kernels.routes import Routing
from . import quack_gemms, quack_tiles
from .quack_epilogues import Epilogues
from .quack_gemms import Size, library
from .quack_tiles import Gemm

#: Below so many rows the choice of tiles hardly matters, and QuACK's default is taken.
TUNED_FROM = 8192

_PLANS: dict[tuple, Any] = {}


def activate(
    x_TH: Tensor, up_ENH: Tensor, bias_EN: Tensor | None, routing: Routing, epilogues: Epilogues, halves: bool, down_EHI: Tensor, train: bool
) -> tuple[Tensor, Tensor]:
    """The pre-activation ``[R, N]`` of gathered tokens and the activation ``h [R, I]``.

    Args:
        bias_EN: in the order of the pre-activation.
        halves: in `up_ENH` all gates come before all ups; otherwise they alternate, or there are none.
        down_EHI, train: say which GEMMs follow; the first call compiles them together with this one.
    """
    rows, width = routing.token_R.shape[0], up_ENH.shape[1]
    pre_RN = x_TH.new_empty(rows, width)
    h_RI = x_TH.new_empty(rows, width // 2 if epilogues.gated else width)
    key = ("activate", epilogues, halves, bias_EN is None, rows.bit_length(), *_class(x_TH, up_ENH))
    plan = _PLANS.get(key)
    if plan is None:
        size = Size(rows, up_ENH.shape[0])
        gemm = quack_gemms.activation(x_TH, up_ENH, bias_EN, routing, epilogues, halves, (pre_RN, h_RI), size)
        _PLANS[key] = _first(gemm, lambda: quack_gemms.small_layer(x_TH, up_ENH, bias_EN, down_EHI, epilogues, halves, size, train)[1:])
    else:
        values = {"h": h_RI} if bias_EN is None else {"h": h_RI, "bias": bias_EN}
        library().run_gemm_epi_plan(plan, x_TH, up_ENH, pre_RN, None, values, cu_seqlens_m=routing.ends, A_idx=routing.token_R)
    return pre_RN, h_RI


def differentiate(
    grad_TH: Tensor, down_EHI: Tensor, pre_RN: Tensor, routing: Routing, epilogues: Epilogues
) -> tuple[Tensor, Tensor, Tensor]:
    """Through the down projection and the activation: ``dL/dpre [R, N]``, ``weight*h [R, I]``, and ``<h, dL/d(weight*h)>`` in parts ``[R, P]``."""
    rows, width = pre_RN.shape[0], down_EHI.shape[2]
    grad_pre_RN, h_RI = torch.empty_like(pre_RN), pre_RN.new_empty(rows, width)
    key = ("differentiate", epilogues, rows.bit_length(), *_class(grad_TH, down_EHI))
    found = _PLANS.get(key)
    if found is None:
        size = Size(rows, down_EHI.shape[0])
        plan, dot_RP = _first(quack_gemms.differentiation(grad_TH, down_EHI, pre_RN, routing, epilogues, (grad_pre_RN, h_RI), size))
        _PLANS[key] = plan, dot_RP.shape[1]
    else:
        plan, parts = found
        dot_RP = routing.weights_R.new_empty(rows, parts)
        values = {"h": h_RI, "weight": routing.weights_R, "dot": dot_RP}
        library().run_gemm_epi_plan(plan, grad_TH, down_EHI, grad_pre_RN, pre_RN, values, cu_seqlens_m=routing.ends, A_idx=routing.token_R)
    return grad_pre_RN, h_RI, dot_RP


def project(a_RK: Tensor, w_ENK: Tensor, routing: Routing, halves: bool = False) -> Tensor:
    """``[R, N]``: each row times its expert's matrix; `halves`: along K the matrix has halves and the rows alternate."""
    rows = a_RK.shape[0]
    out_RN = a_RK.new_empty(rows, w_ENK.shape[1])
    key = ("project", halves, rows.bit_length(), *_class(a_RK, w_ENK))
    plan = _PLANS.get(key)
    if plan is None:
        _PLANS[key] = _first(quack_gemms.projection(a_RK, w_ENK, routing, halves, out_RN, Size(rows, w_ENK.shape[0])))
    else:
        library().run_gemm_plan(plan, a_RK, w_ENK, out_RN, None, cu_seqlens_m=routing.ends)
    return out_RN


def outer_sums(x_TM: Tensor, y_RN: Tensor, into_EMN: Tensor, routing: Routing, halves: bool = False) -> None:
    """Writes for each expert the sum of ``x_t y_r^T`` over its rows, t being r's token: a weight gradient, 0 for an expert without rows.

    Args:
        halves: along N `into_EMN` has halves and the rows alternate.
    """
    rows = y_RN.shape[0]
    key = ("sums", halves, rows.bit_length(), *_class(x_TM, into_EMN))
    plan = _PLANS.get(key)
    if plan is None:
        _PLANS[key] = _first(quack_gemms.outer_sums(x_TM, y_RN, into_EMN, routing, halves, Size(rows, into_EMN.shape[0])))
    else:
        library().run_gemm_plan(plan, x_TM.mT, y_RN.mT, into_EMN, None, cu_seqlens_k=routing.ends, A_idx=routing.token_R)


def _class(x: Tensor, w: Tensor) -> tuple:
    """What a compiled kernel depends on: dtype, device, the matrices' shape and which of their axes is contiguous."""
    return x.dtype, x.device, w.shape, w.stride(-1) == 1


def _first(gemm: Gemm, together_with: Callable[[], Sequence[Gemm]] = tuple) -> Any:
    """The first call of a class: chooses tiles, compiles and computes. Returns what `Gemm.run` does."""
    problem = gemm.problem
    try:
        tiles = library().default_config(problem.device) if problem.rows < TUNED_FROM else quack_tiles.chosen(gemm, together_with)
        return gemm.run(tiles)
    except Exception as error:
        raise BackendUnavailable(
            f"QuACK failed at the {problem.name} with {problem.rows} rows: {type(error).__name__}: {error}. "
            "Choose another backend, such as experts='triton'."
        ) from error

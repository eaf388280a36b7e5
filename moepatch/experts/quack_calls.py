"""QuACK's grouped GEMMs with the gather and the activation inside, at little cost per call.

QuACK's own entry points look up a plan by the metadata of every tensor in each call, and a plan for each new number of tokens is tuned
anew. A plan does not depend on the number of rows, so here it is kept by the matrices and the order of magnitude of the rows: the first
call of a class tunes (QuACK remembers its measurements on disk), and the others only launch.

R rows sorted by expert, gathered from T tokens by ``routing.token_R``. Pre-activations alternate gate and up, whatever the weights do.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import BackendUnavailable
from ..kernels.routes import Routing
from .quack_epilogues import Epilogues

#: Below so many rows the choice of tiles hardly matters, and QuACK's default is taken.
TUNED_FROM = 8192

_PLANS: dict[tuple, Any] = {}


class _Differentiation(NamedTuple):
    """A plan with the number of column tiles, each of which leaves a part of every row's dot product."""

    plan: Any
    parts: int


class _Library(NamedTuple):
    default_config: Callable
    gemm_tuned: Callable
    run_gemm_plan: Callable
    tuned_mod_gemm: Callable
    sink_arg_shapes: Callable
    run_gemm_epi_plan: Callable


@functools.cache
def library() -> _Library:
    """The functions of QuACK that are used; the import takes seconds."""
    from quack.gemm import run_gemm_plan
    from quack.gemm_config import default_config
    from quack.gemm_interface import gemm_tuned
    from quack.gemm_runtime.autotune import sink_arg_shapes, tuned_mod_gemm
    from quack.gemm_runtime.host import run_gemm_epi_plan

    return _Library(default_config, gemm_tuned, run_gemm_plan, tuned_mod_gemm, sink_arg_shapes, run_gemm_epi_plan)


def activate(
    x_TH: Tensor, up_ENH: Tensor, bias_EN: Tensor | None, routing: Routing, epilogues: Epilogues, halves: bool
) -> tuple[Tensor, Tensor]:
    """The pre-activation ``[R, N]`` of gathered tokens and the activation ``h [R, I]``.

    Args:
        bias_EN: in the order of the pre-activation.
        halves: in `up_ENH` all gates come before all ups; otherwise they alternate, or there are none.
    """
    rows, width = routing.token_R.shape[0], up_ENH.shape[1]
    pre_RN = x_TH.new_empty(rows, width)
    h_RI = x_TH.new_empty(rows, width // 2 if epilogues.gated else width)
    values = {"h": h_RI} if bias_EN is None else {"h": h_RI, "bias": bias_EN}
    key = ("activate", epilogues, halves, bias_EN is None, rows.bit_length(), *_class(x_TH, up_ENH))
    plan = _PLANS.get(key)
    if plan is None:
        epilogue = epilogues.forward if bias_EN is None else epilogues.forward_with_bias
        keywords = {"cu_seqlens_m": routing.ends, "A_idx": routing.token_R, "concat_layout": ("B",) if halves else None}
        _PLANS[key] = _first(
            f"up projection {tuple(up_ENH.shape)}", rows, lambda tune: _epilogue_plan(epilogue, x_TH, up_ENH, pre_RN, None, values, keywords, tune)[0]
        )
    else:
        library().run_gemm_epi_plan(plan, x_TH, up_ENH, pre_RN, None, values, cu_seqlens_m=routing.ends, A_idx=routing.token_R)
    return pre_RN, h_RI


def differentiate(
    grad_TH: Tensor, down_EHI: Tensor, pre_RN: Tensor, routing: Routing, epilogues: Epilogues
) -> tuple[Tensor, Tensor, Tensor]:
    """Through the down projection and the activation: ``dL/dpre [R, N]``, ``weight*h [R, I]``, and ``<h, dL/d(weight*h)>`` in parts ``[R, P]``."""
    rows, width = pre_RN.shape[0], down_EHI.shape[2]
    grad_pre_RN, h_RI = torch.empty_like(pre_RN), pre_RN.new_empty(rows, width)
    values = {"h": h_RI, "weight": routing.weights_R}
    key = ("differentiate", epilogues, rows.bit_length(), *_class(grad_TH, down_EHI))
    found = _PLANS.get(key)
    if found is None:
        keywords = {"cu_seqlens_m": routing.ends, "A_idx": routing.token_R, "b_kn": True}

        def build(tune: bool) -> _Differentiation:
            plan, dots = _epilogue_plan(epilogues.backward, grad_TH, down_EHI, grad_pre_RN, pre_RN, values, keywords, tune, sums_over=width)
            values["dot"] = dots.contiguous()
            return _Differentiation(plan, dots.shape[-1])

        _PLANS[key] = _first(f"down projection's gradient {tuple(down_EHI.shape)}", rows, build)
    else:
        values["dot"] = routing.weights_R.new_empty(rows, found.parts)
        library().run_gemm_epi_plan(
            found.plan, grad_TH, down_EHI, grad_pre_RN, pre_RN, values, cu_seqlens_m=routing.ends, A_idx=routing.token_R
        )
    return grad_pre_RN, h_RI, values["dot"]


def project(a_RK: Tensor, w_ENK: Tensor, routing: Routing, halves: bool = False) -> Tensor:
    """``[R, N]``: each row times its expert's matrix; `halves`: along K the matrix has halves and the rows alternate."""
    rows = a_RK.shape[0]
    out_RN = a_RK.new_empty(rows, w_ENK.shape[1])
    key = ("project", halves, rows.bit_length(), *_class(a_RK, w_ENK))
    plan = _PLANS.get(key)
    if plan is None:
        keywords = {"cu_seqlens_m": routing.ends, "concat_layout": ("B",) if halves else None}
        _PLANS[key] = _first(f"projection {tuple(w_ENK.shape)}", rows, lambda tune: _plain_plan(a_RK, w_ENK.mT, out_RN, keywords, tune))
    else:
        library().run_gemm_plan(plan, a_RK, w_ENK, out_RN, None, cu_seqlens_m=routing.ends)
    return out_RN


def outer_sums(x_TM: Tensor, y_RN: Tensor, into_EMN: Tensor, routing: Routing, halves: bool = False) -> None:
    """Writes for each expert the sum of ``x_t y_r^T`` over its rows, t being r's token: a weight gradient, 0 for an expert without rows.

    Args:
        halves: along N `into_EMN` has halves and the rows alternate.
    """
    x_MT, rows = x_TM.mT, y_RN.shape[0]
    key = ("sums", halves, rows.bit_length(), *_class(x_TM, into_EMN))
    plan = _PLANS.get(key)
    if plan is None:
        keywords = {"cu_seqlens_k": routing.ends, "A_idx": routing.token_R, "concat_layout": ("out",) if halves else None}
        _PLANS[key] = _first(f"weight gradient {tuple(into_EMN.shape)}", rows, lambda tune: _plain_plan(x_MT, y_RN, into_EMN, keywords, tune))
    else:
        library().run_gemm_plan(plan, x_MT, y_RN.mT, into_EMN, None, cu_seqlens_k=routing.ends, A_idx=routing.token_R)


def _class(x: Tensor, w: Tensor) -> tuple:
    """What a compiled kernel depends on: dtype, device, the matrices' shape and which of their axes is contiguous."""
    return x.dtype, x.device, w.shape, w.stride(-1) == 1


def _first(what: str, rows: int, build: Callable[[bool], Any]) -> Any:
    """The first call of a class: compiles, tunes and computes."""
    tune, start = rows >= TUNED_FROM, time.perf_counter()
    if tune:
        print(f"moepatch: QuACK looks for the best tiles for the {what} with {rows} rows ...", end="", file=sys.stderr, flush=True)
    try:
        plan = build(tune)
    except Exception as error:
        raise BackendUnavailable(
            f"QuACK failed at the {what} with {rows} rows: {type(error).__name__}: {error}. Choose another backend, such as experts='triton'."
        ) from error
    if tune:
        print(f" {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    return plan


def _plain_plan(a: Tensor, b: Tensor, out: Tensor, keywords: dict, tune: bool) -> Any:
    """Computes, and returns the plan; `b` is ``[E, K, N]`` or ``[R, N]``."""
    if tune:
        return library().gemm_tuned(a, b, out, **keywords)[-1]
    return library().gemm_tuned.fn(a, b, out, config=library().default_config(a.device), **keywords)[-1]


def _epilogue_plan(
    epilogue: Any, a: Tensor, b: Tensor, d: Tensor, c: Tensor | None, values: dict, keywords: dict, tune: bool, sums_over: int = 0
) -> tuple[Any, Tensor | None]:
    """Computes, and returns the plan and the parts of the dot products over `sums_over` columns, if there are any."""
    rows = d.shape[0]
    if tune:
        shapes = library().sink_arg_shapes(epilogue, rows, sums_over, device=a.device) if sums_over else {}
        sums = {name: d.new_empty(shape, dtype=torch.float32) for name, shape in shapes.items()}
        done = library().tuned_mod_gemm(epilogue, a, b, d, c, epi_args={**values, **sums}, **keywords)
        return done.plan, done.sinks.get("dot")
    tiles = library().default_config(a.device)
    shapes = {name: op.sink_alloc_shape((rows,), sums_over, tiles.tile_m, tiles.tile_n) for name, op in epilogue.sinks.items()}
    sums = {name: d.new_empty(shape, dtype=torch.float32) for name, shape in shapes.items()}
    plan = epilogue.gemm(
        a, b, d, c, epi_args={**values, **sums}, tile_M=tiles.tile_m, tile_N=tiles.tile_n, tile_K=tiles.tile_k,
        cluster_M=tiles.cluster_m, cluster_N=tiles.cluster_n, pingpong=tiles.pingpong, max_swizzle_size=tiles.max_swizzle_size, **keywords,
    )  # fmt: skip
    return plan, sums.get("dot")

"""moepatch: make a loaded Hugging Face mixture-of-experts model fast and scalable, in place.

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    model = moepatch.optimize(model)
    print(moepatch.report(model))
    ...
    moepatch.restore(model)
"""

from . import builtin  # noqa: F401  (registers moepatch's own matchers and backends)
from .api import optimize, plan, report, restore
from .errors import (
    BackendUnavailable,
    CheckFailed,
    CheckpointError,
    LayoutError,
    LeftAlone,
    MoePatchError,
    NothingMatched,
    NumericMismatch,
    PlanMismatch,
    Problem,
)
from .inspection import Inspection, inspect
from .kind import Kind
from .parallel.clip import clip_grad_norm_
from .parallel.load import load_checkpoint
from .parallel.mesh import make_mesh
from .planning import Plan
from .registry import register_backend, register_kind, register_matcher
from .reporting import Report
from .routing import balanced_routing, hot_routing, record_routing
from .site import Left, Refusal, Site
from .surgery import Patched
from .trial import Call

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "Call",
    "CheckFailed",
    "CheckpointError",
    "Inspection",
    "Kind",
    "LayoutError",
    "Left",
    "LeftAlone",
    "MoePatchError",
    "NothingMatched",
    "NumericMismatch",
    "Patched",
    "Plan",
    "PlanMismatch",
    "Problem",
    "Refusal",
    "Report",
    "Site",
    "balanced_routing",
    "clip_grad_norm_",
    "hot_routing",
    "inspect",
    "load_checkpoint",
    "make_mesh",
    "optimize",
    "plan",
    "record_routing",
    "register_backend",
    "register_kind",
    "register_matcher",
    "report",
    "restore",
]

"""`inspect`: what moepatch would do to a model, loaded or not, with sizes and with what this machine has to offer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from . import api, registry, source
from .check import check_model
from .errors import CheckFailed, MoePatchError, PlanMismatch
from .estimate import Estimate, estimate
from .needs import best_device
from .plainly import runs_plainly
from .planning import SCHEMA_VERSION, Plan, make_plan
from .quantized import kept
from .source import Weights
from .stored import Quantization

#: Keywords of `inspect` for what-if tables.
WHAT_IF: tuple[str, ...] = ()


#: What a configuration says beside the model's sizes.
_NO_SIZES = {"model_type", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version"}


@dataclass(frozen=True)
class BackendRow:
    """One backend as seen from this machine, whatever the model.

    Attributes:
        table: which kind of module it serves.
        name: as in ``optimize(model, experts=name)``.
        serves: one line for people.
        why_not: None if it is available.
    """

    table: str
    name: str
    serves: str
    why_not: str | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"table": self.table, "name": self.name, "serves": self.serves, "available": self.why_not is None, "why_not": self.why_not}


@dataclass(frozen=True)
class Inspection:
    """What moepatch knows about a model without changing it.

    Attributes:
        model_class: the model's class name.
        model_type: transformers' name of the family; None for a model without a configuration.
        plan: what `optimize` would do, or did.
        estimate: sizes.
        backends: what this machine has to offer, with reasons for absence.
        warnings: what to know before training.
        source: where the model came from, in words.
        weights: what the headers of a directory's files say; None for anything but a directory with safetensors files.
        patched: whether the model was patched already.
    """

    model_class: str
    model_type: str | None
    plan: Plan
    estimate: Estimate
    backends: tuple[BackendRow, ...]
    warnings: tuple[str, ...]
    source: str
    weights: Weights | None = None
    patched: bool = False

    @property
    def exit_code(self) -> int:
        """For the shell: 0 if everything that looks like a mixture of experts is served, 2 if some of it is, 3 if nothing of it or of the model is."""
        plan = self.plan
        served = [pattern for pattern in plan.mixture if pattern.backend]
        whole = len(served) == len(plan.mixture) and not plan.refusals and not plan.mixture_left
        if not any(pattern.backend for pattern in plan.patterns) or not (served or whole):
            return 3
        return 0 if whole else 2

    def to_dict(self) -> dict[str, Any]:
        """For JSON. Keys may be added; `schema_version` goes up when one changes its meaning or goes away."""
        plan = self.plan.to_dict()
        return {
            "schema_version": SCHEMA_VERSION,
            "model_class": self.model_class,
            "model_type": self.model_type,
            "source": self.source,
            "patched": self.patched,
            "patterns": plan["patterns"],
            "refusals": plan["refusals"],
            "left": plan["left"],
            "share": plan["share"],
            "estimate": self.estimate.to_dict(),
            "weights": None if self.weights is None else self.weights.to_dict(),
            "backends": [row.to_dict() for row in self.backends],
            "warnings": list(self.warnings),
            "exit_code": self.exit_code,
        }

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        from .render.terminal import text_of_inspection

        return text_of_inspection(self)

    def _repr_html_(self) -> str:
        from .render.html import html_of_inspection

        return html_of_inspection(self)

    def _repr_pretty_(self, printer, cycle: bool) -> None:
        """IPython's plain text: what `print` shows."""
        printer.text(str(self))


@runs_plainly
def inspect(model: nn.Module | PreTrainedConfig | str | os.PathLike, **what_if: object) -> Inspection:
    """What moepatch would do to a model, loaded or not even downloaded whole. Changes nothing, reads no weights, runs no remote code.

    Args:
        model: a module (patched or not, on any device), a configuration, a directory with a ``config.json``, or the path of such a file.
        what_if: none exist yet.

    Raises:
        CheckpointError: a file is missing, unreadable or not understood.
        PlanMismatch: an unknown keyword.
        MoePatchError: `model` is none of the above.

    >>> inspection = moepatch.inspect("path/to/Qwen3-30B-A3B")          # doctest: +SKIP
    >>> print(inspection, inspection.estimate.active_params)            # doctest: +SKIP
    """
    for name in what_if:
        raise PlanMismatch(f"inspect() has no option {name!r}. Options are: {', '.join(WHAT_IF) or 'none yet'}.")
    if isinstance(model, nn.Module):
        return _of_module(model)
    if isinstance(model, PreTrainedConfig):
        where = type(model).__name__
        return _of_config(model, where, f"{where}, on the meta device")
    if isinstance(model, (str, os.PathLike)):
        return _of_path(Path(model))
    takes = "a torch.nn.Module, a PreTrainedConfig, a directory or the path of a config.json"
    raise MoePatchError(f"inspect() takes {takes}; this is a {type(model).__name__}.")


def backend_rows(device: torch.device | None = None, dtype: torch.dtype = torch.bfloat16) -> tuple[BackendRow, ...]:
    """Every backend, available or why not.

    Args:
        device: where it would compute; None for this machine's best.
        dtype: of the weights.
    """
    if device is None or device.type == "meta":
        device = best_device()
    rows = [
        BackendRow(table, backend.name, backend.serves, registry.reason_against(backend, None, dtype, device))
        for table in registry.tables()
        for backend in registry.backends(table)
    ]
    return tuple(rows)


def _of_module(model: nn.Module) -> Inspection:
    patch = api.patch_of(model)
    plan = patch.report.plan if patch is not None else make_plan(model)
    config = vars(model).get("config")
    first = next(model.parameters(), None)
    return Inspection(
        model_class=plan.model_class,
        model_type=config.model_type if isinstance(config, PreTrainedConfig) else None,
        plan=plan,
        estimate=estimate(model, plan),
        backends=backend_rows() if first is None else backend_rows(first.device),
        warnings=tuple(_forbidden(model)) if patch is None else (),
        source="a patched model" if patch is not None else "a loaded model",
        patched=patch is not None,
    )


def _of_config(
    config: PreTrainedConfig, where: str, words: str, weights: Weights | None = None, warnings: tuple[str, ...] = ()
) -> Inspection:
    model = source.meta_model(config, where)
    quantization = Quantization.of(config)
    if quantization is not None:
        quantization.mark(model)
    plan = make_plan(model)
    return Inspection(
        model_class=type(model).__name__,
        model_type=config.model_type or None,
        plan=plan,
        estimate=estimate(model, plan),
        backends=backend_rows(dtype=model.dtype if model.dtype.is_floating_point else torch.bfloat16),
        warnings=(*warnings, *_of_settings(config, model, weights)),
        source=words,
        weights=weights,
    )


def _of_path(path: Path) -> Inspection:
    file = source.config_path(path)
    config, data = source.read_config(file)
    weights = source.read_weights(path) if path.is_dir() else None
    return _of_config(config, str(file), _words(path, weights), weights, tuple(_of_files(data, weights)))


def _words(path: Path, weights: Weights | None) -> str:
    if not path.is_dir():
        return f"{path}, on the meta device"
    if weights is None:
        others = sorted(p.name for p in path.glob("*.bin"))
        return f"{path}, " + (f"weights not in safetensors files ({others[0]}, …)" if others else "no weights")
    count = len(weights.files)
    return f"{path}, {count} safetensors file{'s' if count > 1 else ''}, {weights.tensors} tensors (headers only were read)"


def _of_files(data: dict[str, Any], weights: Weights | None) -> Iterator[str]:
    if not set(data) - _NO_SIZES:
        yield "the configuration gives no sizes: these are the defaults of its class"
    if "auto_map" in data:
        yield "the checkpoint brings its own code (auto_map), which was not run: this is transformers' own class for its model type"
    if weights is not None and weights.short:
        listed = ", ".join(weights.short[:3]) + (", …" if len(weights.short) > 3 else "")
        yield f"{len(weights.short)} of {len(weights.files)} files end before their data does ({listed})"


def _of_settings(config: PreTrainedConfig, model: nn.Module, weights: Weights | None) -> Iterator[str]:
    """What a configuration, and the files beside it, give reason to warn of."""
    quantization = Quantization.of(config)
    if quantization is not None:
        yield quantization.warning()
    elif weights is not None and (stored := next(iter(weights.bytes_by_dtype))) != str(model.dtype).removeprefix("torch."):
        yield f"the files hold {stored}; the sizes here are those of {str(model.dtype).removeprefix('torch.')}"
    named = source.architectures(config)
    if named and type(model).__name__ not in named:
        yield f"architectures names {named[0]}, which is no model of this transformers; this is {type(model).__name__}"


def _forbidden(model: nn.Module) -> Iterator[str]:
    """What `optimize` would refuse to start with, and what it would leave alone because it is quantized, as warnings."""
    try:
        check_model(model)
    except CheckFailed as error:
        for problem in error.problems:
            yield f"optimize() would refuse: {problem}"
    quantized = {name: words for name, module in model.named_modules() if (words := kept(module)) is not None}
    for words in dict.fromkeys(quantized.values()):
        names = [name for name, own in quantized.items() if own == words]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"the weights of {names[0] or 'the model'}{more} are {words}: they cannot be trained (adapters beside them can), and keep their own code"
    inner = next((name for name, module in model.named_modules() if name and api.patch_of(module) is not None), None)
    if inner is not None:
        yield f"{inner!r} inside it is patched: moepatch.inspect(model.get_submodule({inner!r})) says how"

"""Finding out what a module computes by trying it: on a scale model for whole modules, on a grid of numbers for activations.

Nothing here reads weights, so a model on the meta device is matched just like a loaded one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .. import trial
from ..experts.activation import FORMULAS, Activation, split_gate
from ..kind import Kind
from ..kinds import KINDS
from ..layout.experts import ExpertsLayout
from ..replica import random_fill, replica
from ..stand_in import CLOSED
from .around import numbers_of
from .settled import settled, value_of
from .witness import Objection, Witness, regimes, words_of

#: Tokens of a call with all experts.
_MANY = 1000
#: Numbers of a tensor that are compared one by one.
_FEW = 4096
#: Whose objects on a module say nothing of what its family's forward computes.
_OTHERS = CLOSED | {"accelerate", "deepspeed", "peft"}
#: Where a limit shows that no attribute tells.
_FAR = (-1000.0, -100.0, 0.0, 1.0, 100.0, 1000.0)


def misfit(module: nn.Module, kind: str, spec, sizes: dict[int, int]) -> str | None:
    """None if `spec` computes what `module` does, else how the two differ.

    A scale model of the module (random weights, CPU, fp32) runs forward and backward in its family's own code and as a patched twin on the
    `reference` backend; everything that is returned and all gradients have to agree, and no gradient may be there that nobody asked for.
    If they do, a second witness looks at calls of every other kind (see `witness`); what it says is an `Objection`.
    """
    generator = torch.Generator().manual_seed(0)
    made = KINDS[kind]
    scaled, witness = spec.resized(sizes), _witness(module, made, spec, sizes, generator)
    call = made.trial(scaled, torch.float32, torch.device("cpu"), generator)
    with torch.random.fork_rng(devices=[]):
        try:
            theirs = trial.run(witness.original, call, forward=witness.forward, hidden=True)
            ours = trial.run(witness.twin, call, hidden=True)
        except Exception as error:  # a family's code may fail in any way on a layout that is not its own
            return f"a scale model of it cannot be run ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        reason = words_of(trial.differences(theirs, ours))
        if reason is not None:
            return reason
        return settled(witness, (kind, made.regimes, made.bench, scaled), call, lambda: regimes(made, scaled, call, witness.original, generator))


def misfit_of_all(module: nn.Module, kind: str, spec, sizes: dict[int, int]) -> Objection | None:
    """As `misfit` for a module of which a smaller one has been compared: only calls that are its kind's own, without gradients."""
    generator = torch.Generator().manual_seed(0)
    witness, scaled = replace(_witness(module, KINDS[kind], spec, sizes, generator), theirs=None, ours=None), spec.resized(sizes)
    calls = list(KINDS[kind].regimes(scaled, torch.float32, torch.device("cpu"), generator))
    # The more tokens the more experts have some, up to what costs too much.
    counts = [call.leaves()[0].numel() // call.leaves()[0].shape[-1] for _, call in calls]
    most = sorted((i for i, count in enumerate(counts) if count <= _MANY), key=lambda i: -counts[i])[:3]
    with torch.random.fork_rng(devices=[]):
        for what, call in (calls[i] for i in most):
            for training in (False, True):
                reason = witness.unlike(call, training)
                if reason is not None:
                    return Objection(f"{what} of {KINDS[kind].computes(spec).num_experts} in {'training' if training else 'evaluation'} {reason}")
    return None


def _witness(module: nn.Module, kind: Kind, spec, sizes: dict[int, int], generator: torch.Generator) -> Witness:
    original = replica(module, sizes, random_fill(generator)).train()
    twin = replica(original, {}, lambda tensor, shape: tensor.detach().clone())
    trial.inject(twin, kind.injections(spec.resized(sizes), "reference", None))
    return Witness(original, twin, trial.eager_forward(original))


def is_shape(reason: str) -> bool:
    """Whether a reason of `misfit` is that something of another form is returned."""
    return reason.startswith(f"it {trial.FORM}")


def recognise(gate: Callable[[Tensor], Tensor], layout: ExpertsLayout, numbers: list[float]) -> Activation | None:
    """Which written-out activation a family's own function computes, or None.

    Args:
        gate: the family's function of a pre-activation in its own form.
        layout: tells that form.
        numbers: values that may be parameters of the formula (limits, slopes).
    """
    reach = max(30.0, *(2 * abs(n) for n in numbers if abs(n) < 1e3)) if numbers else 30.0
    generator = torch.Generator().manual_seed(0)
    line = torch.linspace(-reach, reach, 241, dtype=torch.float32)
    spread = torch.randn(256, 2, generator=generator, dtype=torch.float32) * 3
    pairs = torch.cat([
        spread, torch.cartesian_prod(line[::8], line[::8]), torch.stack([line, line.flip(0)], -1),
        torch.tensor([*itertools.product(_FAR, _FAR)], dtype=torch.float32),
    ])  # fmt: skip
    gated = layout.gate_form != "none"
    # [R, 2] is a canonical pre-activation of width I = 1; without a gate only the first column is used.
    # In double precision: erf cancels where its argument is negative.
    pre = (pairs if gated else pairs[:, :1]).double()
    try:
        with torch.no_grad():
            wanted = gate(layout.to_family(pre))
    except Exception:  # whatever it is, it is not a function of the pre-activation alone
        return None
    first, second = split_gate((pre,), "concatenated" if gated else "none")
    for activation in candidates(gated, numbers):
        got = activation.forward(first, second)
        if got.shape == wanted.shape and torch.allclose(got, wanted.to(got.dtype), rtol=1e-5, atol=1e-6):
            return activation
    return None


def candidates(gated: bool, numbers: list[float]) -> Iterator[Activation]:
    """Every written-out activation, with every way to fill its parameters from `numbers`."""
    for name, formula in FORMULAS.items():
        if formula.gated == gated:
            for chosen in itertools.permutations(numbers, len(formula.numbers)):
                yield Activation(name, chosen)


def finite_numbers(module: nn.Module) -> list[float]:
    """The finite floats among the plain attributes of a module and its children, each once."""
    values = [v for part in module.modules() for v in vars(part).values() if type(v) is float and math.isfinite(v)]
    return list(dict.fromkeys(values))


def fingerprint(module: nn.Module) -> tuple:
    """Equal for modules that behave equally but for their weights: class, attributes, shapes, children."""
    own = sorted(vars(module).items())
    plain = tuple((k, _value(v)) for k, v in own if _is_plain(v) or not k.startswith("_") and _has_numbers(v) or _is_record(v))
    shapes = tuple((name, None if p is None else tuple(p.shape)) for name, p in module._parameters.items())
    children = tuple((name, None if child is None else fingerprint(child)) for name, child in module._modules.items())
    return type(module), plain, shapes, children


def _is_plain(value) -> bool:
    return isinstance(value, (int, float, str, bool)) or (callable(value) and not isinstance(value, nn.Module))


def _has_numbers(value) -> bool:
    """Whether it is something else that may hold numbers."""
    return isinstance(value, (Tensor, tuple, list, dict))


def _is_record(value) -> bool:
    """Whether it is an object with attributes that a forward may read: a configuration, or something of the family's own."""
    if callable(value) or isinstance(value, (Tensor, nn.Module, Mapping, list, tuple, set)) or not hasattr(value, "__dict__"):
        return False
    return isinstance(value, SimpleNamespace) or type(value).__module__.partition(".")[0] not in _OTHERS


def _value(value):
    """What is equal for equal values."""
    if _is_record(value):  # of configurations a model has one or a few, and to compare them number by number takes long
        return id(value) if isinstance(value, PreTrainedConfig) else value_of(value, 2) or id(value)
    if isinstance(value, Tensor):
        return numbers_of(value, _FEW) or (tuple(value.shape), value.dtype, id(value))
    return value if isinstance(value, (int, float, str, bool)) else repr(value)

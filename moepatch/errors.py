"""Every error a user can cause. Each message names the module, the numbers, and what to do."""

from __future__ import annotations

from dataclasses import dataclass


def in_words(error: BaseException) -> str:
    """An exception on one line: its class and how its message begins."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


class MoePatchError(ValueError):
    """Base of all errors that moepatch raises on purpose. The model is as it was before the call."""


class NothingMatched(MoePatchError):
    """No module of the model could be patched."""


class LeftAlone(MoePatchError):
    """``optimize(…, strict=True)`` would leave something alone that nobody asked it to; the message says what, how often and why."""


class PlanMismatch(MoePatchError):
    """A plan that was passed in does not fit the model, or an override names something unknown."""


class BackendUnavailable(MoePatchError):
    """A backend was asked for by name and cannot serve here; the message says why."""


class LayoutError(MoePatchError):
    """A reversible weight operation was given tensors of the wrong number or shape."""


class CheckpointError(MoePatchError):
    """A checkpoint directory or a config file is missing, incomplete or unreadable."""


class NumericMismatch(MoePatchError):
    """A backend that was asked for by name does not compute what the untouched module does; everything was rolled back."""


@dataclass(frozen=True)
class Problem:
    """One reason why a model must not be changed.

    Attributes:
        code: short and stable, for programs: ``wrapped``, ``quantized``, ``offloaded``, ``compiled``, ``patched``, ``optimizer``, ``mesh``,
            ``torch``, ``fake``, ``inference``, ``plan``.
        where: the module's name, or ``model``.
        message: what is wrong, with the numbers.
        hint: what to do instead.
    """

    code: str
    where: str
    message: str
    hint: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message} {self.hint}"


class CheckFailed(MoePatchError):
    """One or more `Problem`s, all found before anything was changed.

    Attributes:
        problems: every problem, in the order of the module tree.
    """

    def __init__(self, problems: tuple[Problem, ...]):
        self.problems = tuple(problems)
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        super().__init__(f"moepatch changed nothing, because of {len(self.problems)} problem(s):\n{lines}")

    def __reduce__(self):
        return type(self), (self.problems,)

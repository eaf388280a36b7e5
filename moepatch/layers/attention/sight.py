"""How the modules of one model get another attention function than its configuration names.

transformers finds the attention function, and the function that makes its masks, by a name in a configuration. That configuration is the
user's, is saved with the model, and may be that of other models as well, so moepatch leaves it as it is. While the forward of a patched model
or of one of its attention modules runs, these modules see a view of their configuration in its place: the same contents, those that change
later too, but for the name, which is moepatch's as long as the configuration says what it said at the patch. All others see the configuration.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ...surgery import InjectClass, Patched, is_traced
from ...watch import Change, Watch, marked
from . import name_of

#: How transformers' configurations keep which function computes attention.
ATTENTION_CHOICE = "_attn_implementation_internal"


@dataclass(eq=False)
class Choice:
    """The attention function of the modules that share one configuration.

    Attributes:
        config: the configuration.
        found: the name in it at the time of the patch: this very string, for one that is set later is the user's choice, be it equal.
        backend: which of moepatch's functions takes that one's place.
        stands: not any more once the user has chosen a function, be it the same.
        watch: of the function that the name stands for; None while it is not known.
    """

    config: PreTrainedConfig
    found: str | None
    backend: str
    stands: bool = True
    watch: Watch | None = None

    def __post_init__(self):
        self._mark()

    def name(self, now: str | None) -> str | None:
        """What a configuration that says `now` is seen to say."""
        return name_of(self.backend) if self.stands and now is self.found and not self._replaced() else now

    def changes(self) -> tuple[Change, ...]:
        """What of the function that the name stood for is another one: as long as there is something, that function computes."""
        return () if self.watch is None else self.watch.changes(self)

    def _replaced(self) -> bool:
        watch = self.watch
        return watch is not None and (watch.changed_in_graph(self) if torch.compiler.is_compiling() else watch.changed(self))

    def _mark(self) -> None:
        kept = vars(self.config)
        if self.found is not None and kept.get(ATTENTION_CHOICE) == self.found:
            self.found = kept[ATTENTION_CHOICE] = marked(kept[ATTENTION_CHOICE])

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "stands": self.stands and vars(self.config).get(ATTENTION_CHOICE) is self.found}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.stands:
            self._mark()


class Sight:
    """What one module sees in the place of its configuration.

    Args:
        config: the module's.
        own: the choice for its own configuration; None for a model around such modules whose own configuration is another one.
        inside: the choices for configurations that are inside its own.
    """

    def __init__(self, config: PreTrainedConfig, own: Choice | None, inside: tuple[Choice, ...] = ()):
        self.config, self.own, self.inside = config, own, inside
        # Made here: torch.compile, which may be the first that comes by, can make no classes.
        self._seen = view(config, own, inside)

    def of(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The view of the module's present configuration, which may have been exchanged."""
        if config is not self.config:
            self.__init__(config, self.own, self.inside)
        return self._seen

    def __reduce__(self):
        return Sight, (self.config, self.own, self.inside)


class _View:
    """Mixed into the class of a configuration: the view shares the attributes of the configuration, and copies and pickles of it are that one's."""

    __slots__ = ()

    def __init_subclass__(cls, **kwargs: Any):
        """Does nothing: to transformers this is no class of configurations."""

    def __new__(cls, *args, **kwargs):
        """An ordinary configuration: what a configuration's own code makes of its class."""
        return cls._moepatch_class(*args, **kwargs)

    @property
    def _attn_implementation(self):
        config, own, _ = self._moepatch_view
        return config._attn_implementation if own is None else own.name(config._attn_implementation)

    @_attn_implementation.setter
    def _attn_implementation(self, value):
        self._moepatch_view[0]._attn_implementation = value

    def __eq__(self, other):
        return self._moepatch_view[0] == other

    def __copy__(self):
        return copy.copy(self._moepatch_view[0])

    def __deepcopy__(self, memo):
        return copy.deepcopy(self._moepatch_view[0], memo)

    def __reduce_ex__(self, protocol):
        return self._moepatch_view[0].__reduce_ex__(protocol)


class _Outer(_View):
    """A view of a configuration that holds others which are seen otherwise."""

    __slots__ = ()

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if not isinstance(value, PreTrainedConfig):
            return value
        _, _, inside = object.__getattribute__(self, "_moepatch_view")
        return view(value, next((choice for choice in inside if choice.config is value), None), inside)


def view(config: PreTrainedConfig, own: Choice | None, inside: tuple[Choice, ...] = ()) -> PreTrainedConfig:
    """A view of a configuration; arguments as of `Sight`."""
    made = object.__new__(_view_class(type(config), _Outer if inside else _View))
    object.__setattr__(made, "__dict__", vars(config))
    object.__setattr__(made, "_moepatch_view", (config, own, inside))
    return made


@functools.lru_cache(maxsize=256)
def _view_class(cls: type[PreTrainedConfig], mixin: type) -> type[PreTrainedConfig]:
    described = {"__slots__": ("_moepatch_view",), "__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls)(cls.__name__, (mixin, cls), {**described, "__hash__": cls.__hash__, "_moepatch_class": cls})


class _Looking(threading.local):
    on = False


_looking = _Looking()


class Looker(Patched):
    """A module that sees a view of its configuration while its forward runs, or that of a model around it."""

    stands_aside = False
    _moepatch_sight: Sight

    @property
    def config(self) -> PreTrainedConfig:
        """The configuration, or the view."""
        try:
            config = self.__dict__["config"]
        except KeyError:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute 'config'") from None
        if (_looking.on or torch.compiler.is_compiling()) and not is_traced():
            return self.__dict__["_moepatch_sight"].of(config)
        return config

    @config.setter
    def config(self, value: PreTrainedConfig) -> None:
        self.__dict__["config"] = value

    @config.deleter
    def config(self) -> None:
        del self.__dict__["config"]


def looking(forward: Callable[..., Any], /, *args, **kwargs) -> Any:
    """What a forward returns while views are seen on this thread."""
    if torch.compiler.is_compiling():
        return forward(*args, **kwargs)
    before, _looking.on = _looking.on, True
    try:
        return forward(*args, **kwargs)
    finally:
        _looking.on = before


class LookingAttention(Looker):
    """An attention module, patched otherwise or not."""

    def forward(self, *args, **kwargs):
        """As the module's."""
        return looking(super().forward, *args, **kwargs)


class LookingModel(Looker):
    """A transformers model around attention modules, which may make their masks. Its forward keeps its signature."""

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "_moepatch_parts" in vars(cls) and issubclass(cls._moepatch_parts[0], LookingModel):
            cls.forward = cls._moepatch_parts[0].wrapped(cls._moepatch_parts[1].forward)

    @staticmethod
    def wrapped(forward: Callable[..., Any]) -> Callable[..., Any]:
        """The forward of the patched class over one with `forward`."""

        @functools.wraps(forward)
        def looked(self, *args, **kwargs):
            return looking(super(LookingModel, self).forward, *args, **kwargs)

        return looked

    def set_attn_implementation(self, attn_implementation: str | dict, *args, **kwargs) -> None:
        """As transformers' own. Whatever is chosen is the user's choice from then on, also if it is what the configuration says already."""
        super().set_attn_implementation(attn_implementation, *args, **kwargs)
        configs = list(_named(self.config, attn_implementation)) if isinstance(attn_implementation, dict) else None
        for choice in choices(self):
            if configs is None or any(choice.config is config for config in configs):
                choice.stands = False


def _named(config: PreTrainedConfig, asked: dict[str, Any]) -> Iterator[PreTrainedConfig]:
    """The configurations that a dict of choices speaks of. As in transformers, a choice for one inside is one for those in it, a dict names some of
    them, and a name that is not there is passed over."""
    for key, choice in asked.items():
        inner = getattr(config, key, None) if key else config
        if isinstance(choice, dict):
            yield from () if inner is None else _named(inner, choice)
        elif inner is not None:
            yield inner
            yield from _named(inner, dict.fromkeys(inner.sub_configs, choice)) if key else ()


def choices(model: nn.Module) -> Iterator[Choice]:
    """The choices that the modules of a model see by."""
    for module in model.modules():
        sight = vars(module).get("_moepatch_sight")
        if sight is not None:
            yield from (sight.inside if sight.own is None else (sight.own, *sight.inside))


@dataclass
class Look:
    """The step that has a module see a view.

    Attributes:
        module: has a ``config``.
        mixin: a `Looker`.
        sight: what it sees.
        inner: the step that changes its class.
        before: the sight that it had.
    """

    module: nn.Module
    mixin: type[Looker]
    sight: Sight
    inner: InjectClass | None = None
    before: Sight | None = None

    def do(self) -> None:
        """Gives it the sight, and if it has none yet the class."""
        self.before = vars(self.module).get("_moepatch_sight")
        vars(self.module)["_moepatch_sight"] = self.sight
        if not isinstance(self.module, self.mixin):
            said = None if "_moepatch" in vars(self.module) else "attention function"
            self.inner = InjectClass(self.module, self.mixin, said)
            self.inner.do()

    def undo(self) -> None:
        """Takes them."""
        if self.inner is not None:
            self.inner.undo()
        if self.before is None:
            vars(self.module).pop("_moepatch_sight", None)
        else:
            vars(self.module)["_moepatch_sight"] = self.before

"""Recognises models whose attention goes through transformers' interface, so that a name in the configuration decides what computes it.

The modules that share one configuration are one site, at the model that holds them: it builds the masks. Their code says how they call the
interface. A module that looks at the name itself, computes with its mask, or hands on arguments that only the family's function acts on is
left as it is, and with it all modules that share its configuration.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import textwrap
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from ..layers.attention import PREFIX
from ..layers.attention.function import attention_function
from ..layers.attention.sight import Look, LookingAttention, LookingModel, Sight
from ..layers.attention.spec import AttentionSpec, AttentionUse
from ..layers.attention_block import EAGER, attention_functions
from ..registry import register_matcher
from ..scan import Found, Scan
from ..site import Site
from ..surgery import original_class
from ..watch import Watch, watch_functions

#: What moepatch's functions act on, though not under this name: windows are in the masks, keys are packed as queries are.
_SAID_OTHERWISE = frozenset("sliding_window cu_seq_lens_k max_length_k".split())
#: The place of the mask among the arguments of an attention function.
_MASK = 4
_OTHERS = frozenset({"sdpa", "flex_attention"})


@register_matcher("attention_function", priority=30, around=True)
def match_attention_function(found: Found, scan: Scan, memo: dict) -> Site | None:
    """See the module's docstring."""
    if "attention_function" not in memo:
        memo["attention_function"] = {id(group.owner): group for group in _groups(scan)}
    group = memo["attention_function"].get(id(found.module))
    if group is None or group.why_not is not None:
        return None
    parameter = next(group.members[0].parameters(), None)
    return Site(
        kind="attention_function",
        fqns=found.fqns,
        class_name=type(found.module).__name__,
        spec=AttentionUse(tuple(Counter(_spec(module) for module in group.members).items())),
        now=group.owner.config._attn_implementation or "eager",
        dtype="float32" if parameter is None else str(parameter.dtype).removeprefix("torch."),
        device="cpu" if parameter is None else str(parameter.device),
    )


def left_alone(model: nn.Module) -> dict[str, str]:
    """The submodels whose attention goes through the interface and is left as it is, with the reason in words."""
    scan = Scan(model)
    return {scan.of(g.owner).fqn: g.why_not for g in _groups(scan) if g.why_not is not None}


def looks(model: nn.Module) -> Iterator[Look]:
    """Steps for all that has to see another attention function, beside the models whose sites are patched: attention modules, and the models
    around them, which may make masks."""
    scan = Scan(model)
    groups = [(g, vars(g.owner)["_moepatch_sight"].own) for g in _groups(scan) if "_moepatch_sight" in vars(g.owner)]
    for group, choice in groups:
        choice.watch = _watched(group, choice.found)
        for member in group.members:
            yield Look(member, LookingAttention, Sight(member.config, choice))
    around = {id(group.owner): scan.above(scan.of(group.owner)) | {id(group.owner)} for group, _ in groups}
    for found in scan:
        outer = found.module
        seen = [choice for group, choice in groups if id(outer) in around[id(group.owner)]] if isinstance(outer, PreTrainedModel) else []
        if seen:
            own = next((choice for choice in seen if choice.config is outer.config), None)
            yield Look(outer, LookingModel, Sight(outer.config, own, tuple(choice for choice in seen if choice is not own)))


def _watched(group: _Group, name: str | None) -> Watch:
    """What the attention function was that these modules would call."""
    forwards = [inspect.unwrap(cls.forward) for cls in dict.fromkeys(map(original_class, group.members))]
    registry, _ = attention_functions(original_class(group.members[0]))
    files = {sys.modules[f.__globals__["__name__"]] for f in forwards}
    return watch_functions(registry, name, [(file, EAGER, vars(file)[EAGER]) for file in files])


@dataclass(frozen=True, eq=False)
class _Group:
    """The attention modules of one configuration.

    Attributes:
        owner: the innermost model with this configuration that holds them all.
        members: the modules.
        why_not: why they are left as they are, or None.
    """

    owner: PreTrainedModel
    members: tuple[nn.Module, ...]
    why_not: str | None


def _groups(scan: Scan) -> Iterator[_Group]:
    by_config: dict[int, list[Found]] = {}
    for found in scan:
        if "config" in vars(found.module) and _interface_calls(original_class(found.module)):
            by_config.setdefault(id(found.module.config), []).append(found)
    for members in by_config.values():
        above = set.intersection(*(scan.above(found) for found in members))
        config = members[0].module.config
        owners = [f.module for f in scan if id(f.module) in above and isinstance(f.module, PreTrainedModel) and f.module.config is config]
        if owners:
            yield _Group(owners[-1], tuple(found.module for found in members), _why_not(owners[-1], members))


def _why_not(owner: PreTrainedModel, members: list[Found]) -> str | None:
    """Why the function of these modules is not exchanged."""
    for found in members:
        reason = _odd(original_class(found.module))
        if reason is not None:
            return f"{found.fqn} {reason}"
        if _spec(found.module) is None:
            return f"{found.fqn} does not say how many heads it has, and how wide they are"
    forms = [_spec(found.module) for found in members]
    if not owner._supports_sdpa and not any(form.sinks or form.softcap is not None for form in forms):
        return "its family has no fused attention, and the reason is neither sinks nor a softcap"
    sight, now = vars(owner).get("_moepatch_sight"), owner.config._attn_implementation
    if sight is not None and sight.own is not None:
        now = sight.own.name(now)
    if now is not None and now.startswith(PREFIX):
        return f"its attention runs on {now!r} already"
    # Without a choice of the user's, transformers takes sdpa where the family has it and eager elsewhere.
    usual = (None, "sdpa") if owner._supports_sdpa else (None, "eager")
    return None if now in usual else f"attn_implementation={now!r} was chosen by the user"


def _odd(cls: type[nn.Module]) -> str | None:
    """What in the code of an attention module is not known, or None."""
    if _OTHERS & _strings(cls):
        return "does something else for each attn_implementation"
    for call in _interface_calls(cls):
        unknown = sorted(name for name in set(call.keywords) - _acted_on() if _acts_on(cls, name))
        if unknown:
            return f"hands {', '.join(unknown)} to the attention function"
        if call.computes_with_mask:
            return "computes with its attention mask"
    return None


@functools.cache
def _acted_on() -> frozenset[str]:
    """Keywords of a call of the interface that moepatch's functions act on."""
    return frozenset(inspect.signature(attention_function("reference")).parameters) | _SAID_OTHERWISE


def _acts_on(cls: type[nn.Module], keyword: str) -> bool:
    """Whether what computes a class's attention now looks at a keyword. What it ignores may be called anything, and moepatch ignores it, too."""
    functions = attention_functions(cls)
    if functions is None:
        return True
    registry, eager = functions
    return any(keyword in inspect.signature(f).parameters or keyword in _strings_of(inspect.unwrap(f).__code__) for f in (eager, registry["sdpa"]))


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of the interface in a module's forward.

    Attributes:
        keywords: from the keywords of the call to the expressions behind them.
        computes_with_mask: the forward does something with its mask besides handing it on.
        names: what the expressions may name, besides ``self``.
    """

    keywords: dict[str, ast.expr]
    computes_with_mask: bool
    names: dict[str, Any]


_CALLS: weakref.WeakKeyDictionary[type, tuple[_Call, ...]] = weakref.WeakKeyDictionary()


def _interface_calls(cls: type[nn.Module]) -> tuple[_Call, ...]:
    """The calls of transformers' attention interface in a class's forward; none if it has no source."""
    if cls not in _CALLS:
        _CALLS[cls] = tuple(_read(inspect.unwrap(cls.forward)))
    return _CALLS[cls]


def _read(forward: FunctionType) -> Iterator[_Call]:
    interfaces = {name for name in forward.__code__.co_names if isinstance(forward.__globals__.get(name), AttentionInterface)}
    if not interfaces:
        return
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, SyntaxError):
        return
    nodes = list(ast.walk(tree))
    assigned = {
        target.id
        for node in nodes
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None and interfaces & _loads(node.value)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    calls = [node for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in assigned]
    for call in calls:
        keywords = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg is not None}
        mask = call.args[_MASK] if len(call.args) > _MASK else keywords.get("attention_mask")
        yield _Call(keywords, _is_computed(mask, calls, nodes), forward.__globals__)


def _is_computed(mask: ast.expr | None, calls: list[ast.Call], nodes: list[ast.AST]) -> bool:
    """Whether a forward does anything with what it hands on as its mask but handing it on."""
    if mask is None or isinstance(mask, ast.Constant):
        return False
    if not isinstance(mask, ast.Name):
        return True
    handed_on = sum(isinstance(a, ast.Name) and a.id == mask.id for c in calls for a in (*c.args, *(k.value for k in c.keywords)))
    return handed_on != sum(isinstance(node, ast.Name) and node.id == mask.id for node in nodes)


def _loads(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def _strings(cls: type[nn.Module]) -> frozenset[str]:
    """Every string in the code of a class's own methods."""
    bases = [base for base in cls.__mro__ if base is not nn.Module and issubclass(base, nn.Module)]
    codes = (inspect.unwrap(f).__code__ for base in bases for f in vars(base).values() if isinstance(f, FunctionType))
    return frozenset().union(*map(_strings_of, codes))


@functools.cache
def _strings_of(code: CodeType) -> frozenset[str]:
    """Every string in some code."""
    pending, found = [code], set()
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            found.add(item)
        elif isinstance(item, CodeType):
            pending += item.co_consts
        elif isinstance(item, (tuple, frozenset)):
            pending += item
    return frozenset(found)


def _spec(module: nn.Module) -> AttentionSpec | None:
    """The form of one attention: sizes by the names that transformers gives them, the rest by what the call hands over."""
    plain, config = vars(module), vars(module.config)
    call = _interface_calls(original_class(module))[0]
    heads = plain.get("num_heads") or plain.get("num_attention_heads") or config.get("num_attention_heads")
    head_dim = plain.get("qk_head_dim") or plain.get("head_dim") or config.get("head_dim")
    if not heads or not head_dim:
        return None
    window = _handed(call, "sliding_window", module)
    softcap = _handed(call, "softcap", module)
    return AttentionSpec(
        heads=heads,
        kv_heads=heads // plain.get("num_key_value_groups", 1),
        head_dim=head_dim,
        v_head_dim=plain.get("v_head_dim") or head_dim,
        causal=bool(plain.get("is_causal", True)),
        window=window if type(window) is int else None,
        sinks=_handed(call, "s_aux", module) is not None,
        softcap=float(softcap) if isinstance(softcap, (int, float)) else None,
    )


def _handed(call: _Call, keyword: str, module: nn.Module) -> Any:
    """The value of a keyword that depends on the module alone; None for any other."""
    node = call.keywords.get(keyword)
    if node is None or not _loads(node) <= {"self", "getattr"}:
        return None
    try:
        return eval(compile(ast.Expression(node), "<attention>", "eval"), call.names, {"self": module})  # the family's own expression
    except Exception:  # whatever it needs, it is not on the module yet
        return None

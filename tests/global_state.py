"""What a process shares: every attribute of torch's and transformers' modules and classes, registries' entries, and torch's settings.

Run as a script it is a process of its own: it takes a snapshot, imports moepatch, uses it in one thread and in several, and prints as JSON
what is not as it was. ``python tests/global_state.py import|use|threads``.
"""

from __future__ import annotations

import copy
import importlib
import json
import logging
import os
import pickle
import signal
import sys
import threading
import types
import warnings
from typing import Any

import torch
import transformers
import zoo

#: A number that counts what anybody does, and what transformers makes when the next of its modules is imported.
COUNTERS = ("torch.utils.hooks.RemovableHandle.next_id", "transformers.utils.auto_docstring._re_model_task")
#: What moepatch imports of torch anyway, and what registers operators when it is imported.
IMPORTED = ("torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed.device_mesh", "torch.distributed._symmetric_memory")
FAMILIES = ("qwen3_moe", "nemotron_h", "mixtral", "gpt_oss")


def snapshot() -> dict[str, Any]:
    """Everything by name. Values are kept, so that no other object can get the identity of one."""
    state = {}
    for name, module in sorted(sys.modules.items()):
        if isinstance(module, types.ModuleType) and name.partition(".")[0] in ("torch", "transformers"):
            for key, value in list(vars(module).items()):
                _add(state, f"{name}.{key}", value)
                if isinstance(value, type) and value.__module__ == name:
                    for inner, content in list(vars(value).items()):
                        _add(state, f"{name}.{key}.{inner}", content)
    for group, mapping in (("copyreg", pickle.dispatch_table), ("environ", dict(os.environ)), ("settings", settings())):
        state.update({f"{group}.{key}": value for key, value in mapping.items()})
    return state


def _add(state: dict[str, Any], name: str, value: Any) -> None:
    state[name] = value
    if type(value) is dict and not name.endswith(("__dict__", "__builtins__")):  # not transformers' lazy mappings, which import what they are asked for
        state.update({f"{name}[{key!r}]": entry for key, entry in list(value.items()) if isinstance(key, (str, type, int))})
    elif isinstance(value, (set, frozenset)):
        state.update({f"{name}[{key!r}]": key for key in value})
    elif isinstance(value, list):
        state[f"{name}[:]"] = list(value)


def settings() -> dict[str, Any]:
    """What torch, logging, warnings and signals are set to in this process."""
    return {
        "dtype": torch.get_default_dtype(),
        "device": str(torch.get_default_device()),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "rng": torch.get_rng_state().tolist(),
        "threads": torch.get_num_threads(),
        "matmul": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn": (torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32),
        "flash": (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()),
        "verbosity": transformers.logging.get_verbosity(),
        **{f"level of {name}": logger.level for name, logger in logging.root.manager.loggerDict.items() if isinstance(logger, logging.Logger)},
        "filters": list(warnings.filters),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)],
    }


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names whose values are not what they were, and the names that are new where nobody but moepatch puts any."""
    found = []
    for name, value in before.items():
        if name not in after:
            found.append(f"{name} is gone")
        elif name not in COUNTERS and not _same(value, after[name]):
            found.append(f"{name}: {str(value)[:80]} is {str(after[name])[:80]}")
    return found + [f"{name} is new" for name in after.keys() - before.keys() if _is_registry_entry(name, before)]


def _same(a: Any, b: Any) -> bool:
    if type(a) is list and type(b) is list:
        return len(a) == len(b) and all(map(_same, a, b))
    return a is b or type(a) is type(b) and (_plain(a) and a == b or isinstance(a, (staticmethod, classmethod)) and a.__func__ is b.__func__)


def _plain(value: Any) -> bool:
    return isinstance(value, (int, float, str, bytes, bool, tuple, torch.dtype))


def _is_registry_entry(name: str, before: dict[str, Any]) -> bool:
    """A new entry in what existed before; modules that are imported later bring names of their own."""
    return name.endswith("]") and name.rpartition("[")[0] in before


def use(family: str, model: torch.nn.Module, given: dict[str, Any]) -> None:
    """Plans, optimizes, runs and restores a model."""
    import moepatch

    configured = copy.deepcopy(vars(model.config))
    moepatch.plan(model, measure=False)
    assert vars(model.config) == configured, "a plan has changed the configuration"
    moepatch.optimize(model, measure=False)
    zoo.loss(model(**given)).backward()
    str(moepatch.report(model)), str(moepatch.inspect(model))
    moepatch.restore(model)
    assert vars(model.config) == configured, "the configuration is not what it was"


def in_threads(models: dict[str, tuple], rounds: int) -> list[str]:
    """Uses a copy of every model at once, in rounds; returns what was raised."""
    raised: list[str] = []

    def one(family: str, model: torch.nn.Module, given: dict[str, Any]) -> None:
        try:
            use(family, model, given)
        except BaseException as error:
            raised.append(f"{family}: {type(error).__name__}: {error}")

    for _ in range(rounds):
        threads = [threading.Thread(target=one, args=(family, *copy.deepcopy(made))) for family, made in models.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return raised


def main(what: str) -> None:
    """Prints what has changed, as JSON."""
    warnings.simplefilter("ignore")
    for name in IMPORTED:
        importlib.import_module(name)
    # What the families and the operators of a step import and count lazily is there before the first snapshot.
    models = {}
    for family in FAMILIES:
        model = zoo.build(family)
        models[family] = model, zoo.inputs(family, model)
        zoo.loss(model(**models[family][1])).backward()
    before = snapshot()
    import moepatch

    raised = []
    if what == "use":
        for family, made in models.items():
            use(family, *made)
    elif what == "threads":
        raised = in_threads(models, 10)
    moved = changes(before, snapshot())
    print(json.dumps({"raised": raised, "changes": moved, "moepatch": moepatch.__version__}))


if __name__ == "__main__":
    main(sys.argv[1])

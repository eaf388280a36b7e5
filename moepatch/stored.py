"""Quantized checkpoints: what their configuration says, which modules transformers will keep quantized, and the option that undoes it.

All of it is known before anything is loaded, and without the library that the weights are quantized for.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from .quantized import QUANTIZED_HINT, Packed
from .site import Refusal

#: Methods that quantize linear layers while a model is loaded, and leave experts that are stacked in one parameter as they are.
_LINEAR_ONLY = frozenset("bitsandbytes eetq higgs hqq quanto torchao".split())
#: Methods that quantize stacked experts, and no linear layer.
_EXPERTS_ONLY = frozenset({"mxfp4"})
#: Under which names methods list what they leave alone.
_SKIPPED = ("modules_to_not_convert", "llm_int8_skip_modules", "ignore", "exclude")
#: What modules of transformers' own say of their weights.
_OWN = re.compile(r"\b(\w+) \(transformers\)")
_FORM = re.compile(r"(?P<kind>mxfp|nvfp|float|fp|int|uint)(?P<bits>\d+)", re.IGNORECASE)


@dataclass(frozen=True)
class Quantization:
    """What a configuration says of quantized weights.

    Attributes:
        method: as transformers calls it.
        settings: everything that is said.
    """

    method: str
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, config: PreTrainedConfig | Mapping[str, Any], always: bool = False) -> Quantization | None:
        """That of a model, or of its text model; None if nothing is said, or (unless `always`) that plain weights are made of it."""
        fields = config if isinstance(config, Mapping) else vars(config)
        for part in (fields, fields.get("text_config")):
            part = vars(part) if isinstance(part, PreTrainedConfig) else part
            said = part.get("quantization_config") if isinstance(part, Mapping) else None
            if said:
                settings = said if isinstance(said, Mapping) else said.to_dict()
                method = settings.get("quant_method", "unnamed method")
                if settings.get("dequantize") is True and not always:
                    return None
                return cls(str(method.value if isinstance(method, Enum) else method), settings)
        return None

    @property
    def key(self) -> str:
        """The method in transformers' tables."""
        if self.method != "bitsandbytes":
            return self.method
        return self.method + ("_4bit" if self.settings.get("load_in_4bit") or not self.settings.get("load_in_8bit") else "_8bit")

    @property
    def is_known(self) -> bool:
        """Whether transformers knows the method; else it loads the weights as if nothing was said."""
        return self.key in AUTO_QUANTIZATION_CONFIG_MAPPING

    @property
    def words(self) -> str:
        """How its weights are kept: ``4-bit (bitsandbytes)``, ``MXFP4 (transformers)``."""
        if self.method == "bitsandbytes":
            return f"{self.key[-4]}-bit (bitsandbytes)"
        form = _FORM.fullmatch(self.method)
        if form is not None:
            return f"{self.method.upper()} (transformers)"
        form = _FORM.search(str(self.settings.get("quant_type", "")))
        bits = self.settings.get("bits")
        return f"{form[0].lower() if form else f'{bits}-bit' if isinstance(bits, int) else 'packed'} ({self.method})"

    @property
    def option(self) -> str | None:
        """What to give ``from_pretrained`` for plain weights; None where there is nothing."""
        cls = AUTO_QUANTIZATION_CONFIG_MAPPING.get(self.key)
        if cls is None or "dequantize" not in inspect.signature(cls).parameters:
            return None
        return f"quantization_config={cls.__name__}(dequantize=True)"

    @property
    def packs_experts(self) -> bool:
        """Whether experts that are stacked in one parameter are quantized."""
        return self.is_known and (self.method not in _LINEAR_ONLY or "expert" in str(self.settings.get("quant_type", "")))

    @property
    def hint(self) -> str:
        """What somebody can do who wants to have the experts patched."""
        if self.option is None:
            without = f"transformers has no option that makes plain weights of {self.method} while loading."
            return f"{without} They keep their own code, and the rest of the model is patched."
        return f"Load it with {self.option}, or with moepatch.load_checkpoint, and the experts are patched too. As they are they keep their own code."

    def mark(self, model: PreTrainedModel) -> None:
        """Puts `Packed` in the place of what transformers will quantize of a model on the meta device."""
        if not self.is_known:
            return
        listed = next((self.settings[name] for name in _SKIPPED if self.settings.get(name) is not None), None)
        patterns = [p.removeprefix("re:") for p in HfQuantizer.get_modules_to_not_convert(model, listed, model._keep_in_fp32_modules)]
        for name, module in model.named_modules():
            if not should_convert_module(name, patterns):
                continue
            stacks = [key for key, p in module._parameters.items() if p is not None and p.ndim == 3 and p.shape[0] > 1]
            if type(module) is nn.Linear and self.method not in _EXPERTS_ONLY:
                module.weight = Packed(module.weight, self.words)
            elif len(stacks) > 1 and self.packs_experts and not isinstance(module, nn.modules.conv._ConvNd):
                for key in stacks:
                    module._parameters[key] = Packed(module._parameters[key], self.words)

    def warning(self) -> str:
        """What to know before training."""
        what = f"the checkpoint is quantized ({self.method}): "
        sizes = "the sizes here are those of plain weights"
        if not self.is_known:
            return f"{what}training needs dequantized weights, and transformers does not know the method; {sizes}"
        if self.packs_experts and self.option is not None:
            return f"{what}training needs dequantized weights: load it with {self.option}, or with moepatch.load_checkpoint; {sizes}"
        rest = "the rest is patched" if self.packs_experts else "everything else is patched and trained beside it"
        plain = ", and transformers has no option that makes plain weights of it while loading"
        if self.option is not None:
            plain = f"; {self.option} makes plain weights of it"
        return f"{what}what it quantizes keeps its own code, {rest}{plain}; {sizes}"


def advised(refusals: list[Refusal], model: nn.Module) -> list[Refusal]:
    """The refusals with the option that makes plain weights, where weights are quantized and the model's configuration says how, or their class."""
    config = vars(model).get("config")
    said = Quantization.of(config) if isinstance(config, PreTrainedConfig) else None

    def found(refusal: Refusal) -> Quantization | None:
        own = _OWN.search(refusal.reason)
        return said or (Quantization(own[1].lower(), {}) if own is not None else None)

    return [replace(r, hint=found(r).hint) if r.hint == QUANTIZED_HINT and found(r) is not None else r for r in refusals]

"""Filling a model from a checkpoint, each rank reading its own parts only."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from ..errors import CheckpointError, MoePatchError
from ..quantized import kept
from .agree import together
from .dequantize import block_of, dequantizer, forget_quantization
from .fsdp2 import part
from .pieces import box_of, local_part
from .recipes import Files, Recipe, checked_recipes, find_files, opened, plain_mapping
from .save import sharding_mesh
from .twin import computed_buffers, meta_twin

_WHAT = "load_checkpoint()"


def load_checkpoint(
    model: PreTrainedModel, path: str | Path, *, device: str | torch.device | None = None, progress: bool | None = None
) -> PreTrainedModel:
    """Fills a model in place. For models too large for one process: build on the meta device, `optimize`, then this.

    Args:
        model: patched or not, sharded or not, on the meta device or with weights. If sharded, every rank calls this, and each reads no more
            than the parts that it holds.
        path: a directory with ``model.safetensors`` or ``model.safetensors.index.json``, per expert or fused. A quantized checkpoint (MXFP4 as
            of gpt-oss, FP8 with scales as of DeepSeek-V3) becomes plain weights of the model's dtype, by transformers' own conversions.
        device: for a model on the meta device that is not sharded; the CPU if None. A sharded one goes where its mesh is.
        progress: a progress bar on rank 0; if None, where stderr is a terminal.

    Returns:
        The same object. If the checkpoint was quantized, its configuration no longer says so (``quantization_config``).

    Raises:
        CheckpointError: no checkpoint, missing or additional tensors, other shapes, quantized by a method without such a conversion, a model
            that keeps its weights quantized; the model is unchanged. A failure while weights are read puts a model from the meta device back there.
        RankFailed: another rank failed.

    >>> with torch.device("meta"):                                     # doctest: +SKIP
    ...     model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    >>> model = moepatch.optimize(model, mesh)                         # doctest: +SKIP
    >>> moepatch.load_checkpoint(model, path)                          # doctest: +SKIP
    """
    if not isinstance(model, PreTrainedModel):
        raise MoePatchError(f"load_checkpoint() fills a transformers model; this is a {type(model).__name__}.")
    mesh = sharding_mesh(model)
    rank = dist.get_rank() if mesh is not None else 0
    with opened() as open_file:
        with together(_WHAT, mesh):
            _check_plain(model)
            files = Files(open_file, find_files(Path(path), open_file))
            twin = meta_twin(model)
            quantizer = dequantizer(Path(path), model.config)
            mapping = get_model_conversion_mapping(twin, hf_quantizer=quantizer)
            names = Names.of(model, twin)
            recipes = checked_recipes(twin, mapping, names.shapes, files, block_of(quantizer))
            was_meta = any(t.device.type == "meta" for t in [*model.parameters(), *model.buffers()])
            buffers = computed_buffers(twin) if was_meta else {}
        try:
            with together(_WHAT, mesh):
                if was_meta:
                    _allocate(model, _device(mesh, device))
                    _widen(model, twin)
                show = Console(stderr=True).is_terminal if progress is None else progress
                _fill(model, Names.of(model, twin), twin, recipes, files, show and rank == 0)
                for name, value in buffers.items():
                    model.get_buffer(name).copy_(value)
        except BaseException:
            # A model that is half filled would run, and compute nonsense.
            if was_meta:
                _allocate(model, torch.device("meta"))
            raise
    # Saving turns round what loading did.
    if quantizer is not None:
        mapping = plain_mapping(twin, recipes, names.shapes)
        forget_quantization(model.config)
    model._weight_conversions = [transform for transform in mapping if transform.was_used()]
    return model


def _check_plain(model: nn.Module) -> None:
    """Raises for a model that keeps its weights quantized: only transformers' own loading knows how to pack them."""
    for name, module in model.named_modules():
        if (words := kept(module)) is not None:
            raise CheckpointError(
                f"{name or 'The model'}: its weights are {words}, and load_checkpoint() fills plain weights only. "
                "Load such a model with from_pretrained, or build it without quantization."
            )


@dataclass(frozen=True)
class Names:
    """Where the tensors of the unpatched model are in the model.

    Attributes:
        shapes: every name, to something with the whole's shape; names of tied weights lead to the same object.
        direct: those that the model has itself.
        kept: the others that this rank's state dict has, by the module that translates them, such as a list of experts that is stacked.
    """

    shapes: dict[str, Tensor]
    direct: dict[str, Tensor]
    kept: dict[str, list[str]]

    @classmethod
    def of(cls, model: nn.Module, twin: nn.Module) -> Names:
        """Finds them.

        Raises:
            CheckpointError: the model has parameters that the unpatched one does not have, such as adapters.
        """
        for module in model.modules():
            if isinstance(module, FSDPModule):
                part(module)  # a forward leaves the outermost parameters whole
        parameters = dict(model.named_parameters(remove_duplicate=False))
        found = parameters | dict(model.named_buffers(remove_duplicate=False))
        expected, modules = twin.state_dict(), dict(model.named_modules(remove_duplicate=False))
        kept: dict[str, list[str]] = {}
        for name in model.state_dict():
            if name in expected and name not in found:
                path = name
                while path not in modules:
                    path = path.rpartition(".")[0]
                kept.setdefault(path, []).append(name)
        alien = [name for name in parameters if name not in expected and name.rpartition(".")[0] not in kept]
        alien = [name for name in alien if local_part(parameters[name]).numel()]
        if alien:
            which = f"{len(alien)} parameters that no checkpoint of it has: {', '.join(alien[:5])}"
            raise CheckpointError(f"The model has {which}. Load the checkpoint before adding them.")
        direct = {name: tensor for name, tensor in found.items() if name in expected}
        return cls({name: direct.get(name, shape) for name, shape in expected.items()}, direct, kept)


def _fill(model: nn.Module, names: Names, twin: PreTrainedModel, recipes: list[Recipe], files: Files, show: bool) -> None:
    """Reads and converts what this rank has, one recipe at a time."""
    module_of = {name: path for path, kept in names.kept.items() for name in kept}
    waiting: dict[str, dict[str, Tensor]] = {path: {} for path in names.kept}
    with Progress(console=Console(stderr=True), transient=True, disable=not show) as bar, torch.no_grad():
        for recipe in bar.track(recipes, description="reading weights"):
            for name, value in _values(recipe, names, twin, files, module_of).items():
                if name in names.direct:
                    local_part(names.direct[name]).copy_(value)
                elif name in module_of:
                    path = module_of[name]
                    waiting[path][name.removeprefix(f"{path}.")] = value
                    if len(waiting[path]) == len(names.kept[path]):
                        model.get_submodule(path).load_state_dict(waiting.pop(path), strict=False)


def _values(recipe: Recipe, names: Names, twin: PreTrainedModel, files: Files, module_of: dict[str, str]) -> dict[str, Tensor]:
    """This rank's parts of what a recipe makes; nothing of what it has no part in is read."""
    into = names.direct.get(recipe.name)
    sources = [key for key, _ in recipe.sources]
    device = local_part(into).device if into is not None else torch.device("cpu")
    if recipe.converter is None:
        if into is None and recipe.name not in module_of:
            return {}
        return {recipe.name: files.read(sources[0], None if into is None else box_of(into), device)}
    if into is not None and len(recipe.converter.target_patterns) == 1:
        box = box_of(into)
        if box.size and box.size[1:] == tuple(into.shape[1:]):
            rows = recipe.rows(files, box.offset[0], box.offset[0] + box.size[0], tuple(into.shape), device) if box.size[0] else {}
            if rows is not None:
                return recipe.convert(twin, rows) if rows else {}
    made = recipe.convert(twin, {key: files.read(key, None, device) for key in sources})
    return {name: value[box_of(names.direct[name]).index] if name in names.direct else value for name, value in made.items()}


def _allocate(model: nn.Module, device: torch.device) -> None:
    """Memory for every parameter and buffer, with tied weights tied."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, name))
    model.to_empty(device=device)
    for (first, first_name), *others in places.values():
        for module, name in others:
            module._parameters[name] = first._parameters[first_name]


def _widen(model: nn.Module, twin: PreTrainedModel) -> None:
    """Buffers that their family keeps in fp32 (what is added to a router's scores, and decides) become so, as in ``from_pretrained``."""
    plan = {name.replace("*", ".*"): dtype for name, dtype in twin._get_dtype_plan(twin.dtype).items()}
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            dtype = next((dtype for pattern, dtype in plan.items() if re.search(pattern, f"{path}.{name}")), None)
            if dtype is not None and buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(dtype)


def _device(mesh: DeviceMesh | None, device: str | torch.device | None) -> torch.device:
    if mesh is None:
        return torch.device(device or "cpu")
    kind = mesh.device_type
    return torch.device("cpu") if kind == "cpu" else torch.device(kind, torch.get_device_module(kind).current_device())

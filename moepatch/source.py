"""Where `inspect` gets a model that nobody has loaded: a configuration becomes modules on the meta device, a directory's headers numbers.

Only local files are read, no code of a checkpoint is run, and of its weights nothing but the headers is touched.
"""

from __future__ import annotations

import copy
import difflib
import json
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from .errors import CheckpointError

#: A header larger than this is no header: it is 100 times what the largest models have.
_HEADER_LIMIT = 1 << 30

_DTYPES = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    **{f"{short}{bits}": f"{word}{bits}" for short, word in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)},
}

#: What a model can be made in. A configuration may also name what its files are quantized to.
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

#: Where transformers lists the classes for a configuration.
_CAUSAL, _IMAGE_TEXT = "MODEL_FOR_CAUSAL_LM_MAPPING", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING"
_OTHERS = ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING", "MODEL_MAPPING")

_BUILDING = threading.RLock()


@dataclass(frozen=True)
class Weights:
    """What the headers of a directory's safetensors files say.

    Attributes:
        files: their names.
        tensors: how many tensors they name.
        bytes_by_dtype: bytes of these tensors by dtype, the largest first.
        short: files that end before their data does (headers alone, broken downloads).
    """

    files: tuple[str, ...]
    tensors: int
    bytes_by_dtype: dict[str, int]
    short: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"files": list(self.files), "tensors": self.tensors, "bytes_by_dtype": self.bytes_by_dtype, "short": list(self.short)}


def config_path(path: Path) -> Path:
    """The configuration file at a path to it or to its directory.

    Raises:
        CheckpointError: there is none.
    """
    if not path.exists():
        hint = "moepatch reads local files: download the model first, for example with `hf download`."
        raise CheckpointError(f"{path}: there is no such file or directory. {hint}")
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"{path}: the directory has no config.json.")
    return file


def read_config(file: Path) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """The configuration in a file, and the file's own content.

    Raises:
        CheckpointError: it is not valid JSON, names a model type that transformers does not know, or is refused by its class.
    """
    data = _read_json(file)
    kind = data.get("model_type")
    if not isinstance(kind, str):
        raise CheckpointError(f"{file}: it has no model_type, so nothing says which model it configures.")
    if kind not in CONFIG_MAPPING:
        raise CheckpointError(f"{file}: {_unknown(kind, data)}")
    settings = {k: v for k, v in copy.deepcopy(data).items() if k not in ("attn_implementation", "_attn_implementation", "auto_map")}
    # "auto" asks for the files' own dtype, which is a question for the headers.
    settings = {k: v for k, v in settings.items() if not (k in ("dtype", "torch_dtype") and v == "auto")}
    with _wrapped(f"{file}: {CONFIG_MAPPING[kind].__name__} refuses it"):
        return CONFIG_MAPPING[kind].from_dict(settings), data


def meta_model(config: PreTrainedConfig, where: str) -> nn.Module:
    """The model of a configuration, on the meta device, in the configuration's dtype or bfloat16.

    Args:
        config: not changed.
        where: what errors call it.

    Raises:
        CheckpointError: transformers has no model for it, or the model's class refuses it.
    """
    cls = _model_class(config, where)
    config = copy.deepcopy(config)
    nested = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    dtype = next((c.dtype for c in (config, *nested) if c.dtype in _FLOATS), torch.bfloat16)
    with _wrapped(f"{where}: {cls.__name__} refuses it"), building(), torch.device("meta"):
        return cls._from_config(config, dtype=dtype)


def architectures(config: PreTrainedConfig) -> list[str]:
    """The class names in a configuration."""
    named = config.architectures or ()
    return [name for name in ((named,) if isinstance(named, str) else named) if isinstance(name, str)]


def read_weights(directory: Path) -> Weights | None:
    """Reads the headers of a directory's safetensors files; None if it has none.

    Raises:
        CheckpointError: files that the index names are missing, or a file is not a safetensors file.
    """
    files = _weight_files(directory)
    sizes, tensors, short = Counter(), 0, []
    for file in files:
        header, start = _read_header(file)
        end = start
        for entry in header.values():
            begin, stop = entry["data_offsets"]
            sizes[_DTYPES.get(entry["dtype"], entry["dtype"].lower())] += stop - begin
            end = max(end, start + stop)
        tensors += len(header)
        short += [file.name] if file.stat().st_size < end else []
    return Weights(tuple(f.name for f in files), tensors, dict(sizes.most_common()), tuple(short)) if files else None


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        names = _read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise CheckpointError(f"{index}: it has no weight_map from tensors to files.")
        files = [directory / name for name in sorted(set(names.values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            listed = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            raise CheckpointError(f"{directory}: {len(missing)} of {len(files)} shards named by {index.name} are missing: {listed}.")
        return files
    single = directory / "model.safetensors"
    return [single] if single.is_file() else sorted(directory.glob("*.safetensors"))


def _read_header(file: Path) -> tuple[dict[str, Any], int]:
    """The entries of a safetensors header by tensor, and where the data begins."""
    with file.open("rb") as stream, _wrapped(f"{file}: its header is not that of a safetensors file"):
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0]
        if length > min(_HEADER_LIMIT, file.stat().st_size - 8):
            raise ValueError(f"it would be {length} bytes long, the file has {file.stat().st_size}")
        header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        if not all(isinstance(entry["dtype"], str) and len(entry["data_offsets"]) == 2 for entry in header.values()):
            raise ValueError("an entry has no dtype or no data_offsets")
        return header, 8 + length


def _read_json(file: Path) -> dict[str, Any]:
    with _wrapped(f"{file}: it cannot be read as JSON"):
        data = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(data, dict):
        raise CheckpointError(f"{file}: it holds a JSON {type(data).__name__}, not an object.")
    return data


def _unknown(kind: str, data: dict[str, Any]) -> str:
    text = f"transformers {transformers.__version__} does not know the model type {kind!r}"
    if "auto_map" in data:
        return (
            f"{text}, and the code that the checkpoint brings (auto_map) is not run by inspect. "
            "Load the model yourself, with trust_remote_code if you trust it, and call moepatch.inspect(model)."
        )
    close = difflib.get_close_matches(kind, CONFIG_MAPPING.keys(), n=1)
    return f"{text}.{f' Did you mean {close[0]!r}?' if close else ''} A newer transformers may know it."


def _model_class(config: PreTrainedConfig, where: str) -> type[PreTrainedModel]:
    for name in architectures(config):
        cls = getattr(transformers, name) if hasattr(transformers, name) else None
        if isinstance(cls, type) and issubclass(cls, PreTrainedModel):
            return cls
    # Some configurations of several parts are listed under their language model as well, whose class wants the text part alone.
    for mapping in (_IMAGE_TEXT, _CAUSAL, *_OTHERS) if config.sub_configs else (_CAUSAL, _IMAGE_TEXT, *_OTHERS):
        classes = getattr(transformers, mapping)
        if type(config) in classes:
            found = classes[type(config)]
            return found[0] if isinstance(found, tuple) else found
    hint = "Load the model and call moepatch.inspect(model)."
    raise CheckpointError(f"{where}: transformers {transformers.__version__} has no model for {type(config).__name__}. {hint}")


@contextmanager
def _wrapped(what: str) -> Iterator[None]:
    """Turns any exception into a CheckpointError that begins with `what` and ends with the first sentence of the cause."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # a configuration can be wrong in as many ways as there are classes that read one
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # Validation errors name the field on their first line and what is wrong with it on the second.
        words = " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])
        raise CheckpointError(f"{what}: {type(error).__name__}: {words or 'without a message'}") from error


@contextmanager
def building() -> Iterator[None]:
    """Around the construction of a transformers model: while it lasts transformers replaces torch's init functions, for all threads."""
    with _BUILDING:
        yield

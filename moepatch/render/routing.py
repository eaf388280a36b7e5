"""Recorded routing as text, as HTML and as a figure."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

from ..errors import MoePatchError

if TYPE_CHECKING:
    from ..routing import LayerLoad

_COLUMNS = ("layer", "tokens", "experts", "entropy", "max/mean", "dead")
#: Loads from nothing to this many times the mean have shades of their own.
_DARKEST = 4.0
_CELL = "padding:2px 12px 2px 0;border:0;background:transparent;text-align:right;"


def text_of_routing(layers: Sequence[LayerLoad]) -> str:
    """One line per layer."""
    from .terminal import _text

    columns = [Column(Text(name, "bold"), justify="right" if name != "layer" else "left") for name in _COLUMNS]
    table = Table(*columns, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for layer in layers:
        table.add_row(*_cells(layer))
    return _text(Group(table))


def html_of_routing(layers: Sequence[LayerLoad]) -> str:
    """The same with a strip for each layer: an expert is the darker, the more tokens it got; white is none."""
    head = "".join(f'<th style="{_CELL}opacity:.75;">{escape(name)}</th>' for name in (*_COLUMNS, "load of each expert"))
    rows = "".join(f"<tr>{_html_cells(layer)}<td>{_strip(layer)}</td></tr>" for layer in layers)
    return f'<table style="font-size:12px;color:inherit;border-collapse:collapse;"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'


def _html_cells(layer: LayerLoad) -> str:
    return "".join(f'<td style="{_CELL}">{escape(cell)}</td>' for cell in _cells(layer))


def figure_of_routing(layers: Sequence[LayerLoad]):
    """Layers × experts as a matplotlib figure."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MoePatchError("heatmap() needs matplotlib: pip install moepatch[notebook].") from error
    width = max(len(layer.tokens_E) for layer in layers)
    loads = [(_relative(layer) + [float("nan")] * width)[:width] for layer in layers]
    figure = Figure(figsize=(min(16, 4 + width / 16), min(14, 1.6 + len(layers) / 4)), layout="constrained")
    axes = figure.add_subplot()
    brightest = max(2.0, min(8.0, max(layer.max_over_mean for layer in layers)))
    image = axes.imshow(loads, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0, vmax=brightest)
    axes.set(xlabel="expert", ylabel="layer", yticks=range(len(layers)), yticklabels=[layer.name for layer in layers])
    axes.tick_params(axis="y", labelsize=7)
    figure.colorbar(image, label="tokens over the layer's mean")
    return figure


def _cells(layer: LayerLoad) -> tuple[str, ...]:
    return (layer.name, f"{layer.tokens:,}", str(len(layer.tokens_E)), f"{layer.entropy:.3f}", f"{layer.max_over_mean:.2f}", str(layer.dead))


def _relative(layer: LayerLoad) -> list[float]:
    """Each expert's load over the mean."""
    return (layer.tokens_E.double() * len(layer.tokens_E) / max(1, layer.tokens)).tolist()


def _strip(layer: LayerLoad) -> str:
    """A picture one pixel high, blue with the load as its opacity, so that it is legible on white and on black."""
    pixels = b"".join(bytes((40, 110, 200, min(255, round(255 * load / _DARKEST)))) for load in _relative(layer))
    parts = (b"IHDR", struct.pack(">IIBBBBB", len(layer.tokens_E), 1, 8, 6, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0" + pixels)), (b"IEND", b"")
    png = b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts)
    title = f"most: {int(layer.tokens_E.max())}, least: {int(layer.tokens_E.min())}"
    style = "width:420px;height:12px;image-rendering:pixelated;outline:1px solid rgba(128,128,128,.35)"
    return f'<img title="{title}" style="{style}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'

"""What autocast asks for on a device."""

from __future__ import annotations

import torch


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast computes in there, or None where it is off. The meta device has no autocast, and torch raises when asked."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None

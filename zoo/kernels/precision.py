"""Where autocast must not round."""

import contextlib
from typing import Any

import torch


def without_autocast(x: Any) -> contextlib.AbstractContextManager:
    """A context in which operations on tensors like x keep the dtypes that they are given."""
    # The meta device computes nothing, and torch knows no autocast for it; a symbol has no device.
    if isinstance(x, torch.fx.Proxy) or x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)

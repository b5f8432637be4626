"""Tensor functions: each has a reference in plain torch, the definition of correct, and a fast implementation."""

from zoo.kernels.context_broadcast.api import context_broadcast

__all__ = ["context_broadcast"]

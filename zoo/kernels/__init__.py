"""Tensor functions: each has a reference in plain torch, the definition of correct, and a fast implementation.

`explain(name, *arguments)` says which of them impl="auto" takes, and why.
"""

from zoo.kernels.context_broadcast.api import context_broadcast
from zoo.kernels.depthwise_conv2d.api import depthwise_conv2d
from zoo.kernels.dispatch import explain
from zoo.kernels.focused_linear_attention.api import focused_linear_attention
from zoo.kernels.halo_attention.api import halo_attention
from zoo.kernels.lambda_attention.api import lambda_attention

__all__ = [
    "context_broadcast",
    "depthwise_conv2d",
    "explain",
    "focused_linear_attention",
    "halo_attention",
    "lambda_attention",
]

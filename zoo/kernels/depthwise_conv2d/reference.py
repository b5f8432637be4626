"""The definition of correct, in plain torch: what cuDNN, on the CPU oneDNN, answer for the dtype of x."""

import torch.nn.functional as F
from torch import Tensor


def depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 0
) -> Tensor:
    """See zoo.kernels.depthwise_conv2d."""
    # type_as and not to(x.dtype), which symbolic tracing does not see.
    if bias is not None:
        bias = bias.type_as(x)
    return F.conv2d(x, weight.type_as(x), bias, stride, padding, groups=weight.shape[0])

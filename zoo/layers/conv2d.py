"""Convolutions by whichever way is fast on a GPU, and torch's own everywhere else."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import kernels

_HALF = (torch.bfloat16, torch.float16)


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    """F.conv2d of maps x (B, C, H, W) with weight (C, 1, kh, kw), one kernel a channel, and bias (C,).

    Maps on a GPU go to `zoo.kernels.depthwise_conv2d` where that is faster.
    """
    if torch.jit.is_scripting():
        return F.conv2d(x, weight, bias, padding=padding, groups=weight.shape[0])
    else:
        return _depthwise(x, weight, bias, padding)


@torch.jit.unused
def _depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    dtype = _dtype(x, weight)
    if dtype is not None and x.dim() == 4:
        x = x.to(dtype)
        if kernels.takes_kernel("depthwise_conv2d", x, weight, bias, 1, padding):
            return kernels.depthwise_conv2d(x, weight, bias, 1, padding)
    return F.conv2d(x, weight, bias, padding=padding, groups=weight.shape[0])


def _dtype(x: Tensor, weight: Tensor) -> torch.dtype | None:
    """In which torch convolves tensors on a GPU; None elsewhere, and for dtypes that it refuses."""
    if isinstance(x, torch.fx.Proxy) or not x.is_cuda:
        return None
    if torch.is_autocast_enabled("cuda") and torch.float64 not in (x.dtype, weight.dtype):
        return torch.get_autocast_dtype("cuda")
    return x.dtype if x.dtype == weight.dtype else None


class Conv2d(nn.Conv2d):
    """nn.Conv2d, with its arguments and answers: maps (B, in_channels, H, W) -> (B, out_channels, H', W').

    One kernel a channel goes to `depthwise`. Dense ones in half precision inside torch.compile, whose channels are no
    multiple of eight, go where cuDNN would first copy whole maps to fill them up: channels that stay zero (28 in
    SHViT-S4 become 32) are written along with what comes before, and small windows of images (27 numbers) are written
    out as the rows of one matrix product.
    """

    def forward(self, input: Tensor) -> Tensor:
        return self.convolve(input)

    def convolve(self, x: Tensor) -> Tensor:
        """What `forward` answers, for classes that add to it: TorchScript knows no super()."""
        if torch.jit.is_scripting():
            return self._conv_forward(x, self.weight, self.bias)
        else:
            return self._fastest(x)

    @torch.jit.unused
    def _fastest(self, x: Tensor) -> Tensor:
        dtype = _dtype(x, self.weight)
        if dtype is not None and x.dim() == 4 and self.padding_mode == "zeros":
            if self._one_a_channel():
                return _depthwise(x, self.weight, self.bias, int(self.padding[0]))
            uneven = self.groups == 1 and (self.in_channels % 8 or self.out_channels % 8)
            if uneven and dtype in _HALF and torch.compiler.is_compiling():
                return self._of_few(x.to(dtype)) if self._few() else self._in_eights(x)
        return self._conv_forward(x, self.weight, self.bias)

    def _one_a_channel(self) -> bool:
        square = isinstance(self.padding, tuple) and self.padding[0] == self.padding[1]
        plain = square and self.stride == (1, 1) and self.dilation == (1, 1)
        return plain and 1 < self.groups == self.in_channels == self.out_channels

    def _few(self) -> bool:
        """Whether this is a convolution of images, of small patches."""
        columns = self.in_channels * self.kernel_size[0] * self.kernel_size[1]
        return self.in_channels < 8 and columns <= 64 and isinstance(self.padding, tuple) and self.dilation == (1, 1)

    def _of_few(self, x: Tensor) -> Tensor:
        down, right = (int(side) for side in self.padding)
        (kh, kw), (stride_h, stride_w) = self.kernel_size, self.stride
        windows = F.pad(x, (right, right, down, down)).unfold(2, kh, stride_h).unfold(3, kw, stride_w)
        patches = windows.permute(0, 2, 3, 1, 4, 5).flatten(3)
        before, after = -patches.shape[3] % 8, -self.out_channels % 8
        weight = F.pad(self.weight.flatten(1), (0, before, 0, after))
        bias = None if self.bias is None else F.pad(self.bias, (0, after))
        out = F.linear(F.pad(patches, (0, before)), weight, bias)
        return F.pad(out, (0, -after)).permute(0, 3, 1, 2)

    def _in_eights(self, x: Tensor) -> Tensor:
        before, after = -self.in_channels % 8, -self.out_channels % 8
        weight = F.pad(self.weight, (0, 0, 0, 0, 0, before, 0, after))
        bias = None if self.bias is None else F.pad(self.bias, (0, after))
        out = self._conv_forward(F.pad(x, (0, 0, 0, 0, 0, before)), weight, bias)
        # Cut by a pad: the gradient of a slice would be a map that is not channels-last, and cuDNN would turn it.
        return F.pad(out, (0, 0, 0, 0, 0, -after))

"""Convolutions by whichever way is fast on a GPU, and torch's own everywhere else."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.kernels.dispatch import elsewhere, kernel_for

_HALF = (torch.bfloat16, torch.float16)


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    """F.conv2d of maps x (B, C, H, W) with weight (C, 1, kh, kw), one kernel a channel, and bias (C,).

    Maps on a GPU go to `zoo.kernels.depthwise_conv2d` where that is faster.
    """
    if torch.jit.is_scripting():
        return F.conv2d(x, weight, bias, padding=padding, groups=weight.shape[0])
    else:
        return _depthwise(x, weight, bias, padding, _dtype(x, weight))


@torch.jit.unused
def _depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, dtype: torch.dtype | None) -> Tensor:
    if dtype is not None:
        given = (x.to(dtype), weight, bias, 1, padding)
        kernel = kernel_for("depthwise_conv2d", *given)
        if kernel is not None:
            return kernel(*given)
    return F.conv2d(x, weight, bias, padding=padding, groups=weight.shape[0])


@torch.jit.unused
def _dtype(x: Tensor, weight: Tensor) -> torch.dtype | None:
    """In which torch convolves maps on a GPU; None where it is left to torch: elsewhere, exported, or float64."""
    if elsewhere(x) or x.dim() != 4:
        return None
    if not (x.is_floating_point() and weight.is_floating_point()) or torch.float64 in (x.dtype, weight.dtype):
        return None
    if torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda")
    return x.dtype if x.dtype == weight.dtype else None


class Conv2d(nn.Conv2d):
    """nn.Conv2d, with its arguments and answers: maps (B, in_channels, H, W) -> (B, out_channels, H', W').

    One kernel a channel goes to `depthwise`. Dense ones in half precision inside torch.compile, whose channels are no
    multiple of eight, go where cuDNN would first copy whole maps to fill them up: channels that stay zero (28 in
    SHViT-S4 become 32) are written along with what comes before, and small windows of images (27 numbers, stride 2) are
    written out as the rows of one matrix product. torch.fx traces into it, unlike nn.Conv2d.
    """

    def forward(self, input: Tensor) -> Tensor:
        return self.convolve(input)

    def convolve(self, x: Tensor) -> Tensor:
        """What `forward` answers, for classes that add to it: TorchScript knows no super()."""
        if torch.jit.is_scripting():
            return self._conv_forward(x, self.weight, self.bias)
        else:
            return self._fastest(x, self.weight, self.bias)

    # Weights are handed down: a parametrization computes them, or changes its state, at every look.
    @torch.jit.unused
    def _fastest(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        dtype = _dtype(x, weight)
        if dtype is not None and self._one_a_channel():
            return _depthwise(x, weight, bias, int(self.padding[0]), dtype)
        uneven = self.in_channels % 8 or self.out_channels % 8
        dense = self.groups == 1 and isinstance(self.padding, tuple) and self.padding_mode == "zeros"
        if dtype is None or not (uneven and dense and dtype in _HALF and torch.compiler.is_compiling()):
            return self._conv_forward(x, weight, bias)
        more = -self.out_channels % 8
        way = self._of_few if self._few() else self._in_eights
        maps = way(x.to(dtype), weight, None if bias is None else F.pad(bias, (0, more)))
        # Cut by a pad: the gradient of a slice would be a map that is not channels-last, and cuDNN would turn it.
        return F.pad(maps, (0, 0, 0, 0, 0, -more)) if more else maps

    def _in_eights(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        before = -self.in_channels % 8
        weight = F.pad(weight, (0, 0, 0, 0, 0, before, 0, -self.out_channels % 8))
        return self._conv_forward(F.pad(x, (0, 0, 0, 0, 0, before)), weight, bias)

    def _one_a_channel(self) -> bool:
        square = isinstance(self.padding, tuple) and self.padding[0] == self.padding[1]
        plain = square and self.padding_mode == "zeros" and self.stride == (1, 1) and self.dilation == (1, 1)
        return plain and 1 < self.groups == self.in_channels == self.out_channels

    def _few(self) -> bool:
        """Whether the windows of these few channels, written out, are no more numbers than eight channels would be."""
        if self.in_channels >= 8 or self.dilation != (1, 1) or not isinstance(self.stride, tuple):
            return False
        numbers = self.in_channels * self.kernel_size[0] * self.kernel_size[1]
        return numbers + -numbers % 8 <= 8 * self.stride[0] * self.stride[1]

    def _of_few(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        down, right = (int(side) for side in self.padding)
        (kh, kw), (stride_h, stride_w) = self.kernel_size, self.stride
        windows = F.pad(x, (right, right, down, down)).unfold(2, kh, stride_h).unfold(3, kw, stride_w)
        rows = windows.permute(0, 2, 3, 1, 4, 5).flatten(3)
        before = -rows.shape[3] % 8
        weight = F.pad(weight.flatten(1), (0, before, 0, -self.out_channels % 8))
        return F.linear(F.pad(rows, (0, before)), weight, bias).permute(0, 3, 1, 2)

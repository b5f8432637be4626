"""lambda_attention against a loop over positions in float64, forward and gradients, and messages for wrong sizes."""

import pytest
import torch

from zoo.kernels import lambda_attention


def tensors(height, width, down, right, depth, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, height, width, 2, 4), (2, height, width, depth, 3), (down, right, 4, depth)]
    return [torch.randn(shape, dtype=dtype, generator=generator).requires_grad_() for shape in shapes]


def loop(q, v, table):
    """The docstring's equation, one query and one key at a time."""
    down, right = table.shape[0] // 2, table.shape[1] // 2
    height, width = q.shape[1:3]
    out = []
    for y in range(height):
        for x in range(width):
            total = torch.zeros(q.shape[0], q.shape[3], v.shape[4], dtype=q.dtype)
            for a in range(height):
                for b in range(width):
                    if abs(a - y) <= down and abs(b - x) <= right:
                        total = total + (q[:, y, x] @ table[a - y + down, b - x + right]) @ v[:, a, b]
            out.append(total)
    return torch.stack(out, 1).unflatten(1, (height, width))


@pytest.mark.parametrize(
    "case",
    [
        (5, 7, 3, 3, 1),
        (5, 4, 9, 9, 2),
        (4, 4, 7, 7, 1),
        (1, 1, 1, 1, 1),
        (1, 6, 5, 5, 4),
        (11, 12, 3, 5, 2),
        (9, 17, 1, 3, 1),
    ],
)
def test_equals_the_loop_with_every_gradient(case):
    inputs = tensors(*case)
    want, got = loop(*inputs), lambda_attention(*inputs)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)  # float64 on both sides
    grad = torch.randn(want.shape, dtype=want.dtype, generator=torch.Generator().manual_seed(1))
    for a, b in zip(torch.autograd.grad(got, inputs, grad), torch.autograd.grad(want, inputs, grad), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_strides_may_be_any():
    q, v, table = (t.detach() for t in tensors(5, 6, 3, 3, 1))
    joined = torch.cat([q.flatten(3), v.flatten(3)], -1).permute(0, 3, 1, 2)
    parts = joined.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).split([8, 3], -1)
    got = lambda_attention(parts[0].unflatten(-1, (2, 4)), parts[1].unflatten(-1, (1, 3)), table)
    torch.testing.assert_close(got, loop(q, v, table), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.float32, 2**-20), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)]
)
def test_low_precision_keeps_its_dtype_and_most_of_its_digits(dtype, rounding):
    inputs = [t.detach().to(dtype) for t in tensors(9, 5, 5, 5, 1)]
    want = loop(*[t.double() for t in inputs])
    got = lambda_attention(*inputs)
    assert got.dtype == dtype
    # float32 inside: the answer's own rounding is left, in float32 that of sums over 100 products as well
    assert (got.double() - want).abs().max() <= rounding * want.abs().max()


def test_zero_images_give_an_empty_answer():
    q, v, table = (t.detach() for t in tensors(4, 4, 3, 3, 1))
    assert lambda_attention(q[:0], v[:0], table).shape == (0, 4, 4, 2, 3)


def test_sizes_that_do_not_fit_are_named():
    q, v, table = (t.detach() for t in tensors(4, 5, 3, 3, 1))
    with pytest.raises(ValueError, match="different maps"):
        lambda_attention(q[:, :3], v, table)
    with pytest.raises(ValueError, match="odd"):
        lambda_attention(q, v, table[:2])
    with pytest.raises(ValueError, match="key depth 4 and intra-depth 1"):
        lambda_attention(q, v, table[:, :, :3])

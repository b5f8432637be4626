"""halo_attention against a loop over positions in float64, forward and gradients, and the messages for wrong sizes."""

import pytest
import torch

from zoo.kernels import halo_attention


def ceil(a, b):
    return -(-a // b)


def tensors(height, width, block, halo, stride, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [
        (2, ceil(height, stride), ceil(width, stride), 2, 4),
        (2, height, width, 2, 4),
        (2, height, width, 2, 3),
        (2 * (block + 2 * halo) - 1, 4),
        (2 * (block + 2 * halo) - 1, 4),
    ]
    return [torch.randn(shape, dtype=dtype, generator=generator).requires_grad_() for shape in shapes]


def loop(q, k, v, height_rel, width_rel, block, halo, scale, stride=1, scale_rel=False, mask=True):
    """The docstring's equation, one query and one key at a time."""
    height, width = k.shape[1:3]
    window, side = block + 2 * halo, block // stride
    rows = []
    for y in range(q.shape[1]):
        for x in range(q.shape[2]):
            corner_y, corner_x = y // side * block - halo, x // side * block - halo
            i, j = y % side, x % side
            query, logits, values = q[:, y, x], [], []
            for a in range(window):
                for b in range(window):
                    down, right = corner_y + a, corner_x + b
                    inside = 0 <= down < height and 0 <= right < width
                    near = -halo <= down < height + halo and -halo <= right < width + halo
                    if not (inside or (near and not mask)):
                        continue
                    key = k[:, down, right] if inside else torch.zeros_like(query)
                    value = v[:, down, right] if inside else torch.zeros_like(v[:, 0, 0])
                    logit = scale * (query * key).sum(-1)
                    if width_rel is not None:
                        place = query @ width_rel[b - j + window - 1] + query @ height_rel[a - i + window - 1]
                        logit = logit + (scale if scale_rel else 1.0) * place
                    logits.append(logit)
                    values.append(value)
            weights = torch.stack(logits, -1).softmax(-1)
            rows.append(torch.einsum("bhm,mbhd->bhd", weights, torch.stack(values)))
    return torch.stack(rows, 1).unflatten(1, q.shape[1:3])


CASES = [
    # height, width, block, halo, stride, scale_rel, mask
    (8, 8, 4, 2, 1, False, False),
    (8, 8, 4, 2, 1, False, True),
    (5, 7, 4, 1, 1, True, True),
    (5, 7, 4, 3, 1, False, False),
    (5, 7, 4, 2, 2, False, False),
    (6, 9, 6, 1, 3, True, False),
    (1, 1, 4, 3, 1, False, True),
    (7, 3, 2, 0, 1, False, False),
    (3, 10, 8, 3, 1, False, True),
]


@pytest.mark.parametrize("case", CASES)
def test_equals_the_loop_with_every_gradient(case):
    height, width, block, halo, stride, scale_rel, mask = case
    inputs = tensors(height, width, block, halo, stride)
    want = loop(*inputs, block, halo, 0.3, stride, scale_rel, mask)
    got = halo_attention(*inputs, block, halo, 0.3, stride, scale_rel, mask)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)  # float64 on both sides
    grad = torch.randn(want.shape, dtype=want.dtype, generator=torch.Generator().manual_seed(1))
    for a, b in zip(torch.autograd.grad(got, inputs, grad), torch.autograd.grad(want, inputs, grad), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_positions_may_be_absent_and_strides_any():
    q, k, v, _, _ = tensors(5, 6, 4, 1, 1)
    want = loop(q, k, v, None, None, 4, 1, 0.5)
    # One map whose channels hold keys and values of each head side by side, as a channels-last convolution leaves them.
    joined = torch.cat([k, v], -1).flatten(3).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    views = joined.permute(0, 2, 3, 1).unflatten(-1, (2, 7)).split([4, 3], -1)
    got = halo_attention(q, *views, None, None, 4, 1, 0.5)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_low_precision_keeps_its_dtype_and_most_of_its_digits(dtype, tolerance):
    inputs = [t.detach().to(dtype) for t in tensors(9, 5, 4, 2, 1)]
    want = loop(*[t.double() for t in inputs], 4, 2, 0.5)
    got = halo_attention(*inputs, 4, 2, 0.5)
    assert got.dtype == dtype
    # float32 inside: what is left is the rounding of the answer, of order 1, to a half ulp of its dtype
    assert (got.double() - want).abs().max() <= tolerance


def test_zero_images_give_an_empty_answer():
    q, k, v, height_rel, width_rel = (t.detach() for t in tensors(4, 4, 4, 1, 1))
    assert halo_attention(q[:0], k[:0], v[:0], height_rel, width_rel, 4, 1, 0.5).shape == (0, 4, 4, 2, 3)


def test_sizes_that_do_not_fit_are_named():
    q, k, v, height_rel, width_rel = (t.detach() for t in tensors(4, 6, 4, 1, 1))
    with pytest.raises(ValueError, match="stride must divide block"):
        halo_attention(q, k, v, None, None, 4, 1, 0.5, 3)
    with pytest.raises(ValueError, match="there must be 2 x 3"):
        halo_attention(q, k, v, None, None, 4, 1, 0.5, 2)
    with pytest.raises(ValueError, match="need \\[15, 4\\]"):
        halo_attention(q, k, v, height_rel, width_rel, 4, 2, 0.5)
    with pytest.raises(ValueError, match="both"):
        halo_attention(q, k, v, height_rel, None, 4, 1, 0.5)
    with pytest.raises(ValueError, match="do not fit"):
        halo_attention(q, k[..., :3], v, None, None, 4, 1, 0.5)

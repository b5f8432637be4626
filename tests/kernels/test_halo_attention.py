"""halo_attention against a loop over positions in float64, forward and gradients, and the messages for wrong sizes."""

import functools
import os

import pytest
import torch

from zoo.kernels import dispatch, halo_attention

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def ceil(a, b):
    return -(-a // b)


def tensors(height, width, block, halo, stride, dtype=torch.float64, seed=0, dk=4, dv=3):
    generator = torch.Generator().manual_seed(seed)
    shapes = [
        (2, ceil(height, stride), ceil(width, stride), 2, dk),
        (2, height, width, 2, dk),
        (2, height, width, 2, dv),
        (2 * (block + 2 * halo) - 1, dk),
        (2 * (block + 2 * halo) - 1, dk),
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


def test_what_takes_no_part_stays_out_however_low_the_other_logits():
    q, k, v, height_rel, width_rel = tensors(3, 5, 4, 1, 1)
    q, k = 300 * q.abs(), -300 * k.abs()  # logits down to -1e6
    want = loop(q, k, v, height_rel, width_rel, 4, 1, 1.0)
    got = halo_attention(q, k, v, height_rel, width_rel, 4, 1, 1.0)
    torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)  # float64 logits of 1e6 have 1e-10 left


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
    for wrong in ((q, k[..., :3], v), (q[:1], k, v), (q, k[:1], v[:1]), (q, k, v[:, :, :, :1])):
        with pytest.raises(ValueError, match="do not fit"):
            halo_attention(*wrong, None, None, 4, 1, 0.5)
    with pytest.raises(ValueError, match="images, rows, columns, heads, channels"):
        halo_attention(q[0], k[0], v[0], None, None, 4, 1, 0.5)


@pytest.fixture
def triton(triton_device, monkeypatch):
    """The public op by its Triton code; in the interpreter, dispatch and the registered ops take tensors of the CPU."""
    if triton_device == "cpu":
        from zoo.kernels.halo_attention import api, triton_impl

        api._op.register_kernel("cpu", triton_impl.forward)
        api._op_backward.register_kernel("cpu", triton_impl.backward)
        monkeypatch.setattr(dispatch, "elsewhere", lambda x: False)
    return functools.partial(halo_attention, impl="triton")


def distance(got, want):
    return ((got.cpu().double() - want).norm() / want.norm().clamp_min(1e-30)).item()


# Of the norm. float32: the products of three tf32 numbers keep 21 bits. Below: operands, weights and logits' gradients
# rounded to the dtype, in sums over a window, and each window's share of a key's gradient rounded once more.
BOUND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def agrees(function, inputs, options, device, dtype, layout=lambda t: t, bound=None):
    """Whether answer and gradients of `function` are the loop's at the same, rounded, inputs.

    The tables are float32 and the kernel rounds them to the dtype of q: so does the loop, since with one key and a
    border of zeros that rounding alone moves the answer by more than the bound.
    """
    given = [t.detach().to(dtype if t.ndim == 5 else torch.float32) for t in inputs]
    exact = [t.to(dtype).double().requires_grad_() for t in given]
    want = loop(*exact, *options)
    grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    wanted = [want, *torch.autograd.grad(want, exact, grad.double())]
    given = [layout(t.to(device)).requires_grad_() for t in given]
    got = function(*given, *options)
    results = [got, *torch.autograd.grad(got, given, layout(grad.to(device)))]
    errors = [distance(a, b) for a, b in zip(results[:4], wanted[:4], strict=True)]
    # Both tables sum the same logits' gradients, each along one axis: rounding enters both alike, while the sums of
    # one may cancel, as they do with a single key in a border of zeros.
    errors.append(distance(*(torch.cat([t.cpu().double() for t in pair[4:]]) for pair in (results, wanted))))
    assert [t.dtype for t in results] == [dtype, *(t.dtype for t in given)]
    assert max(errors) <= (bound or BOUND[dtype]), errors


def channels_last(t):
    """The same values, as a permuted view of a channels-last map."""
    return t.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2) if t.ndim == 5 else t


# dk, dv, and a case: what a warp or a tile of the kernel meets for the first time somewhere
TRITON_CASES = [
    (4, 3, (5, 7, 4, 1, 1, True, True)),
    (4, 3, (5, 7, 4, 3, 1, False, False)),  # the border reaches beyond the next block
    (16, 16, (9, 5, 4, 1, 2, False, True)),
    (4, 20, (6, 9, 6, 1, 3, True, False)),
    (32, 8, (1, 1, 8, 3, 1, False, False)),
    (4, 3, (7, 3, 2, 0, 1, False, False)),
    pytest.param(
        (8, 8, (7, 4, 12, 3, 1, False, True)), marks=pytest.mark.slow
    ),  # several tiles of queries, windows of more than 16 columns
    (8, 8, (7, 3, 10, 3, 1, False, False)),  # 100 queries at once
]


@pytest.mark.gpu
# The interpreter takes seconds for each, and a GPU none.
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, pytest.param(torch.float16, marks=[pytest.mark.slow] if INTERPRETED else []), torch.bfloat16],
)
@pytest.mark.parametrize("case", TRITON_CASES)
def test_triton_equals_the_loop_with_every_gradient(case, dtype, triton, triton_device, poisoned):
    dk, dv, (height, width, block, halo, stride, scale_rel, mask) = case
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies the bits of bfloat16 as if they were numbers")
    if INTERPRETED and dtype == torch.float16 and block > 4:
        pytest.skip("the interpreter is slow; the GPU runs this")
    inputs = tensors(height, width, block, halo, stride, dk=dk, dv=dv)
    agrees(triton, inputs, (block, halo, 0.3, stride, scale_rel, mask), triton_device, dtype)


@pytest.mark.gpu
def test_triton_takes_any_strides(triton, triton_device, poisoned):
    agrees(triton, tensors(5, 6, 4, 1, 1), (4, 1, 0.5), triton_device, torch.float32, channels_last)


@pytest.mark.gpu
@pytest.mark.parametrize("block", [8, 10])
@pytest.mark.parametrize(("dk", "dv"), [(16, 16), (32, 32), (64, 64), (64, 128), (128, 256)])
@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_triton_at_the_heads_of_networks(dk, dv, block, dtype, triton, triton_device, poisoned):
    if dk <= 64 or dtype != torch.float32:
        agrees(triton, tensors(7, 11, block, 3, 1, dk=dk, dv=dv), (block, 3, dk**-0.5), triton_device, dtype)


@pytest.mark.gpu
def test_triton_without_positions(triton, triton_device, poisoned):
    def function(q, k, v, *options):
        return triton(q, k, v, None, None, *options)

    q, k, v, _, _ = (t.detach().float() for t in tensors(5, 6, 4, 1, 1))
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    want = loop(*exact, None, None, 4, 1, 0.5)
    wanted = torch.autograd.grad(want.square().sum(), exact)
    given = [t.to(triton_device).requires_grad_() for t in (q, k, v)]
    got = function(*given, 4, 1, 0.5)
    assert distance(got, want) <= BOUND[torch.float32]
    for one, other in zip(torch.autograd.grad(got.square().sum(), given), wanted, strict=True):
        assert distance(one, other) <= BOUND[torch.float32]


@pytest.mark.gpu
def test_triton_backward_in_parts_of_the_batch_and_runs_of_blocks(triton, triton_device, poisoned, monkeypatch):
    from zoo.kernels.halo_attention import triton_impl

    monkeypatch.setattr(triton_impl, "SCRATCH", 1)  # one image at a time
    tuned = triton_impl.tuning(True, 4, 16, 4)._replace(run=3)  # blocks in a program; the map has 4
    monkeypatch.setattr(triton_impl, "tuning", lambda *_: tuned)
    agrees(triton, tensors(5, 7, 4, 1, 1), (4, 1, 0.3), triton_device, torch.float32)
    # Steps beyond the last block, whose queries are zeros, beside a real block's sums of exp(-144) and less.
    # Logits down to some -500 with 21 bits are off by 2e-4, and so are their exponentials; what went wrong were NaNs.
    q, k, v, height_rel, width_rel = (t.detach() for t in tensors(5, 7, 4, 1, 1))
    q, k = 1 + q.abs(), -120 - k.abs()
    low = [t.requires_grad_() for t in (q, k, v, height_rel, width_rel)]
    agrees(triton, low, (4, 1, 0.3), triton_device, torch.float32, bound=1e-3)


@pytest.mark.gpu
def test_triton_gradient_of_nothing_is_zero(triton, triton_device, poisoned):
    given = [t.detach().float().to(triton_device) for t in tensors(4, 4, 4, 1, 1)]
    given = [(t[:0] if t.ndim == 5 else t).requires_grad_() for t in given]
    triton(*given, 4, 1, 0.5).sum().backward()
    assert given[1].grad.shape == (0, 4, 4, 2, 4)
    assert torch.equal(given[3].grad, torch.zeros_like(given[3]))


@pytest.mark.gpu
def test_triton_gives_equal_bits_every_time(triton, triton_device):
    runs = []
    for _ in range(2):
        given = [t.detach().float().to(triton_device).requires_grad_() for t in tensors(5, 3, 4, 1, 1)]
        out = triton(*given, 4, 1, 0.5)
        out.square().sum().backward()
        runs.append([out, *(t.grad for t in given)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.gpu
@pytest.mark.slow
def test_triton_ops_are_registered_as_torch_wants(triton, triton_device):
    """torch's own checks: schema, fake tensors against real ones, autograd, AOT with fixed and changing sizes."""
    given = [t.detach().float().to(triton_device).requires_grad_() for t in tensors(3, 2, 2, 1, 2)]
    options = (2, 1, 0.5, 2, False, True)
    torch.library.opcheck(torch.ops.zoo.halo_attention.default, (*given, *options))
    torch.library.opcheck(torch.ops.zoo.halo_attention.default, (*given[:3], None, None, *options))
    given = [t.detach() for t in given]
    out, lse = torch.ops.zoo.halo_attention(*given, *options)
    arguments = (torch.ones_like(out), *given, out, lse, *options)
    torch.library.opcheck(torch.ops.zoo.halo_attention_backward.default, arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_triton_op_stays_whole_under_compile(dynamic, triton, triton_device):
    backend = "aot_eager" if triton_device == "cpu" else "inductor"
    compiled = torch.compile(triton, fullgraph=True, backend=backend, dynamic=dynamic)
    for height, width in ((3, 2), (4, 5)):
        results = []
        for function in (triton, compiled):
            given = [t.detach().float().to(triton_device).requires_grad_() for t in tensors(height, width, 4, 1, 1)]
            out = function(*given, 4, 1, 0.5)
            out.square().sum().backward()
            results.append([out, *(t.grad for t in given)])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)  # torch's own bound for float32


@pytest.mark.gpu
def test_what_the_kernel_refuses_is_named(triton, triton_device):
    q, k, v, height_rel, width_rel = (t.detach().to(triton_device) for t in tensors(4, 4, 4, 1, 1))
    with pytest.raises(RuntimeError, match=r"float64.*takes one of float32"):
        triton(q, k, v, height_rel, width_rel, 4, 1, 0.5)
    wide = v.float().repeat(1, 1, 1, 1, 43)
    with pytest.raises(RuntimeError, match="4 and 129 channels"):
        triton(q.float(), k.float(), wide, None, None, 4, 1, 0.5)
    with pytest.raises(RuntimeError, match="66 keys wide"):
        triton(q.float(), k.float(), v.float(), None, None, 4, 31, 0.5)

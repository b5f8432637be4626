"""lambda_attention against a loop over positions in float64, forward and gradients, and messages for wrong sizes."""

import os

import pytest
import torch

from zoo.kernels import dispatch, lambda_attention
from zoo.kernels.lambda_attention import reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


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
    for wrong in ((q[0], v[0], table), (q, v, table[..., 0])):
        with pytest.raises(ValueError, match="five, five and four sizes"):
            lambda_attention(*wrong)


def peak(step):
    """Most bytes that tensors made during `step` held at once."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def test_memory_of_the_reference_does_not_grow_with_the_batch(monkeypatch):
    """Forward and backward of a batch whose logits, 4 bytes each, would be 10 times what they need."""
    monkeypatch.setattr(reference, "LOGITS", 2 * 16**4)  # of two images in two heads: one image each time
    inputs = [t.detach().float().requires_grad_() for t in tensors(16, 16, 31, 31, 1)]
    peaks = {}
    for images in (2, 16):
        q, v = (t.detach().repeat(images // 2, 1, 1, 1, 1).requires_grad_() for t in inputs[:2])
        peaks[images] = peak(lambda given=(q, v, inputs[2]): lambda_attention(*given).sum().backward())
    of_logits = 2 * 16**4 * 4  # one image's
    # What 14 images more cost are a few tensors of the size of q and v, together a tenth of the logits of one.
    assert peaks[16] - peaks[2] < 2 * of_logits
    assert peaks[2] > of_logits  # the measure sees them
    whole = peak(lambda: reference._lambda_attention(q, v, inputs[2], 8).sum().backward())
    assert whole - peaks[16] > 10 * of_logits


def test_chunks_change_nothing(monkeypatch):
    inputs = tensors(5, 7, 5, 3, 2)
    want = lambda_attention(*inputs)
    grad = torch.randn(want.shape, dtype=want.dtype, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad(want, inputs, grad)
    monkeypatch.setattr(reference, "LOGITS", 1)
    got = lambda_attention(*inputs)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)  # float64 sums in another order
    for a, b in zip(torch.autograd.grad(got, inputs, grad), wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


# float32 products of three tf32 ones; below, operands and the answer are rounded, and so are gradients of lambdas.
BOUND = {torch.float32: 5e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
DTYPES = [
    torch.float32,
    # The interpreter takes seconds for each, and a GPU none.
    pytest.param(torch.float16, marks=[pytest.mark.slow] if INTERPRETED else []),
    pytest.param(
        torch.bfloat16, marks=pytest.mark.skipif(INTERPRETED, reason="the interpreter has no products of bfloat16")
    ),
]
on_gpu = pytest.mark.skipif(INTERPRETED, reason="needs a real GPU: the interpreter takes minutes for it")


def error(got, want):
    """Relative, of the whole tensor; NaN where anything was left unwritten."""
    return ((got.detach().cpu().double() - want).norm() / want.norm().clamp_min(1e-30)).item()


@pytest.fixture
def triton(triton_device, monkeypatch):
    """The public op by its Triton code; the interpreter's tensors are on the CPU and its tiles are small."""
    if triton_device == "cpu":
        from zoo.kernels.lambda_attention import api, triton_impl

        api._op.register_kernel("cpu", triton_impl.forward)
        api._op_backward.register_kernel("cpu", triton_impl.backward)
        monkeypatch.setattr(dispatch, "elsewhere", lambda x: False)
        for name, value in {"ROWS": 32, "COLUMNS": 32, "STEP": 32}.items():
            monkeypatch.setattr(triton_impl, name, value)
        triton_impl.cuts.cache_clear()
    return lambda *given: lambda_attention(*given, impl="triton")


def compare(triton, device, inputs, bound):
    """The op and its gradients against the loop, from what the inputs are worth in their dtypes."""
    exact = [t.detach().double().requires_grad_() for t in inputs]
    want = loop(*exact)
    given = [t.detach().to(device).requires_grad_() for t in inputs]
    got = triton(*given)
    assert got.dtype == inputs[1].dtype
    assert error(got, want) <= bound
    grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).to(got.dtype)
    wanted = torch.autograd.grad(want, exact, grad.double())
    for tensor, a, b in zip(given, torch.autograd.grad(got, given, grad.to(device)), wanted, strict=True):
        assert a.dtype == tensor.dtype
        assert error(a, b) <= bound


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case",
    [
        (1, 1, 1, 1, 1),
        (5, 4, 9, 9, 2),
        pytest.param((6, 9, 3, 5, 1), marks=pytest.mark.slow),
        *(pytest.param(case, marks=on_gpu) for case in [(9, 17, 1, 3, 4), (13, 8, 11, 9, 1), (19, 21, 9, 9, 1)]),
    ],
)
def test_triton_equals_the_loop_with_every_gradient(case, dtype, triton, triton_device, poisoned):
    compare(triton, triton_device, tensors(*case, dtype=dtype), BOUND[dtype])


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [1, 3, 16])
@pytest.mark.parametrize(("key", "channels"), [(16, 130), (33, 32), (64, 5)])
def test_triton_at_other_depths(heads, key, channels, dtype, triton, triton_device, poisoned):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 7, 9, heads, key), (2, 7, 9, 1, channels), (5, 3, key, 1)]
    inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    compare(triton, triton_device, inputs, BOUND[dtype])


@pytest.mark.gpu
@pytest.mark.slow
def test_triton_takes_any_strides_and_dtypes_of_their_own(triton, triton_device, poisoned):
    q, v, table = (t.detach() for t in tensors(5, 6, 3, 3, 1, dtype=torch.float16))
    q = q.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)  # the view of an NCHW map
    v = torch.cat([v, v], -1).transpose(1, 2).contiguous().transpose(1, 2)[..., :3]
    compare(triton, triton_device, [q, v, table.float().permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)], 1e-3)


@pytest.mark.gpu
@pytest.mark.slow
def test_triton_works_on_large_maps_in_bands(triton, triton_device, poisoned, monkeypatch):
    from zoo.kernels.lambda_attention import triton_impl

    monkeypatch.setattr(triton_impl, "EXPANDED", 2**11)
    triton_impl.cuts.cache_clear()
    assert len(triton_impl.cuts(5, 4, (9, 7), 16, 1, False)) > 1
    compare(triton, triton_device, tensors(5, 4, 9, 7, 1, dtype=torch.float32), BOUND[torch.float32])
    triton_impl.cuts.cache_clear()


@pytest.mark.gpu
def test_triton_of_nothing_is_nothing(triton, triton_device):
    q, v, table = (t.detach().float().to(triton_device).requires_grad_() for t in tensors(4, 4, 3, 3, 1))
    out = triton(q[:0], v[:0], table)
    assert out.shape == (0, 4, 4, 2, 3)
    out.sum().backward()
    assert not table.grad.any()


@pytest.mark.gpu
@pytest.mark.slow
def test_triton_gives_equal_bits_every_time(triton, triton_device):
    given = [t.detach().float().to(triton_device).requires_grad_() for t in tensors(3, 4, 3, 3, 1)]
    runs = []
    for _ in range(2):
        out = triton(*given)
        runs.append((out, *torch.autograd.grad(out.square().sum(), given)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.gpu
def test_triton_op_is_registered_as_torch_wants(triton, triton_device):
    given = [t.detach().float().to(triton_device).requires_grad_() for t in tensors(3, 2, 3, 3, 1)]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    tests += () if INTERPRETED else ("test_aot_dispatch_dynamic",)
    torch.library.opcheck(torch.ops.zoo.lambda_attention.default, tuple(given), test_utils=tests)


@pytest.mark.gpu
@pytest.mark.slow
def test_triton_op_stays_whole_under_compile(triton, triton_device):
    backend = "aot_eager" if triton_device == "cpu" else "inductor"
    compiled = torch.compile(triton, fullgraph=True, backend=backend)
    given = [t.detach().float().to(triton_device).requires_grad_() for t in tensors(3, 4, 3, 3, 1)]
    results = []
    for function in (triton, compiled):
        out = function(*given)
        results.append((out, *torch.autograd.grad(out.square().sum(), given)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)  # torch's own bound for float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_the_gpu_auto_means_the_kernel_and_memory_stays_small():
    """All positions of 32 x 32, batch 128: lambdas of every place would be 134 MB in bfloat16, logits 1.1 GB."""
    shapes = [(128, 32, 32, 4, 16), (128, 32, 32, 1, 32)]
    q, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes)
    table = torch.randn(63, 63, 16, 1, device="cuda", requires_grad=True)
    grad = torch.randn(128, 32, 32, 4, 32, device="cuda", dtype=torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = lambda_attention(q, v, table)
    # The answer and the table seen from every place.
    assert torch.cuda.max_memory_allocated() - before < 2**20 * 110
    out.backward(grad)
    # Gradients as large as q, v and the answer; the table as a matrix twice, its gradient in float32.
    assert torch.cuda.max_memory_allocated() - before < 2**20 * 200


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_new_batch_sizes_compile_nothing(monkeypatch):
    import triton

    compiled = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **given: compiled.append(given["repr"]))
    table = torch.randn(5, 5, 16, 1, device="cuda", requires_grad=True)
    kernels = []
    for batch in (2, 1, 3, 4, 5, 7, 8, 16, 31, 32):
        q, v = (torch.randn(batch, 16, 16, n, 16, device="cuda", requires_grad=True) for n in (4, 1))
        lambda_attention(q, v, table).sum().backward()
        kernels.append(len(compiled))
    assert kernels == [kernels[0]] * 10


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda q, v, table: (q.double(), v, table), "q is torch.float64"),
        (lambda q, v, table: (q, v, table.to("meta")), "the table is on meta"),
        (lambda q, v, table: (q.repeat(1, 1, 1, 9, 1), v, table), "18 heads"),
    ],
)
def test_what_rules_the_kernel_out_is_named(change, said):
    from zoo.kernels.lambda_attention import api

    given = [t.detach().float() for t in tensors(4, 5, 3, 3, 1)]
    assert api._unsupported(*given) is None
    assert said in api._unsupported(*change(*given))

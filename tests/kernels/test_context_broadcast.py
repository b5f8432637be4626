"""The op against loops in float64: values, every gradient, and what the paper says of it."""

import os

import pytest
import torch

from zoo import kernels
from zoo.kernels import dispatch
from zoo.kernels.context_broadcast import reference

# (B, N, C): one token, odd sizes within one block and over several, nothing at all.
SIZES = [(1, 1, 1), (2, 7, 13), (3, 33, 65), (1, 65, 130), (0, 5, 8)]
# float32: sums of up to 600 terms in an order that rounds like a tree. Below: one rounding of the answer.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def loops(x, scale):
    """float64, token by token."""
    out = torch.empty(x.shape, dtype=torch.float64)
    for b in range(x.shape[0]):
        mean = sum(x[b, n].double() for n in range(x.shape[1])) / x.shape[1]
        for n in range(x.shape[1]):
            out[b, n] = (x[b, n].double() + (mean if scale is None else scale.double() * mean)) / 2
    return out


def loops_backward(x, scale, grad):
    """(grad of x, grad of scale) in float64, from the chain rule written out by hand."""
    x, grad = x.double(), grad.double()
    grad_x = torch.empty_like(x)
    grad_scale = torch.zeros(x.shape[2], dtype=torch.float64)
    for b in range(x.shape[0]):
        of_mean = sum(grad[b, n] for n in range(x.shape[1])) / 2
        grad_scale += of_mean * sum(x[b, n] for n in range(x.shape[1])) / x.shape[1]
        for n in range(x.shape[1]):
            grad_x[b, n] = grad[b, n] / 2 + of_mean * (1.0 if scale is None else scale.double()) / x.shape[1]
    return grad_x, grad_scale


def make(size, scaled, dtype=torch.float32):
    return torch.randn(size).to(dtype), torch.randn(size[2]) if scaled else None


def strided(size, dtype):
    """(name, tensor of this size) in every memory order that a caller may have."""
    b, n, c = size
    return {
        "dense": torch.randn(size).to(dtype),
        "slice": torch.randn(b, n + 3, 2 * c).to(dtype)[:, 1:-2, ::2],
        "map": torch.randn(b, c, n).to(dtype).transpose(1, 2),
        "tokens first": torch.randn(n, b, c).to(dtype).transpose(0, 1),
        "expanded": torch.randn(b, 1, c).to(dtype).expand(size),
    }


def error(got, want):
    """Largest deviation in units of the largest value, so that cancellation in one element does not count double."""
    if not want.numel():
        return 0.0
    return ((got.cpu().double() - want).abs().max() / want.abs().max().clamp_min(1e-30)).item()


def rounded_once(got, want):
    """Whether the answer was rounded to its dtype at the end alone: a sum rounded on the way misses many elements.

    float32 sums may fall on the other side of a rounding boundary, in about one element of 2^13 for float16.
    """
    return got.dtype == torch.float32 or (got.cpu() != want.to(got.dtype)).sum() <= 0.005 * got.numel()


def to(device, *tensors):
    return [None if tensor is None else tensor.to(device) for tensor in tensors]


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("size", [*SIZES, (2, 197, 192)])
def test_reference_is_the_equation(size, scaled):
    x, scale = make(size, scaled)
    for dtype in TOLERANCE:
        got = kernels.context_broadcast(x.to(dtype), scale)
        assert got.dtype == dtype
        want = loops(x.to(dtype), scale)
        assert error(got, want) <= TOLERANCE[dtype]
        assert rounded_once(got, want)


def test_reference_gradients_are_exact():
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(kernels.context_broadcast, (x, scale))
    grad = torch.randn(2, 5, 3, dtype=torch.float64)
    kernels.context_broadcast(x, scale).backward(grad)
    want = loops_backward(x.detach(), scale.detach(), grad)
    torch.testing.assert_close((x.grad, scale.grad), want)  # float64 rounding


def test_properties_of_the_paper():
    """Constant sequences stay, the mean token stays, deviations from it are halved."""
    x = torch.randn(2, 9, 4, dtype=torch.float64)
    constant = x[:, :1].expand(-1, 9, -1)
    torch.testing.assert_close(kernels.context_broadcast(constant), constant)
    y = kernels.context_broadcast(x)
    torch.testing.assert_close(y.mean(1), x.mean(1))
    torch.testing.assert_close(y - y.mean(1, keepdim=True), (x - x.mean(1, keepdim=True)) / 2)


def test_autocast_leaves_the_dtype_of_tokens_alone():
    x, scale = make((2, 5, 3), True)
    with torch.autocast("cpu", torch.bfloat16):
        assert kernels.context_broadcast(x, scale).dtype == torch.float32
        assert kernels.context_broadcast(x.bfloat16(), scale).dtype == torch.bfloat16


@pytest.fixture
def triton(triton_device, monkeypatch):
    """The public op by its Triton code; in the interpreter, dispatch and the registered op take tensors of the CPU."""
    if triton_device == "cpu":
        from zoo.kernels.context_broadcast import api, triton_impl

        api._op.register_kernel("cpu", triton_impl.forward)
        monkeypatch.setattr(dispatch, "elsewhere", lambda x: False)
    return lambda x, scale: kernels.context_broadcast(x, scale, impl="triton")


@pytest.fixture(params=["registers", "loop"])
def path(request, triton_device, monkeypatch):
    """Both forms of the kernel, at sizes for which one alone would be chosen."""
    from zoo.kernels.context_broadcast import triton_impl

    if request.param == "loop":
        monkeypatch.setattr(triton_impl, "RESIDENT_TOKENS", 0)
    assert triton_impl.blocks(65)[0] == (request.param == "registers")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_triton_is_the_equation(size, scaled, dtype, triton, path, triton_device, poisoned):
    # The interpreter cuts float32 to bfloat16 instead of rounding: twice the error there.
    bound = TOLERANCE[dtype] * (2 if INTERPRETED else 1)
    _, scale = make(size, scaled)
    for kind, x in strided(size, dtype).items():
        got = triton(*to(triton_device, x, scale))
        assert got.dtype == dtype
        assert got.is_contiguous()
        assert error(got, loops(x, scale)) <= bound, kind


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_triton_gradients(size, scaled, dtype, triton, triton_device, poisoned):
    bound = TOLERANCE[dtype] * (2 if INTERPRETED else 1)
    x, scale = make(size, scaled, dtype)
    # "expanded" is what sum() and mean() send back.
    for kind, grad in ((k, g) for k, g in strided(size, dtype).items() if k in ("dense", "map", "expanded")):
        given = [None if t is None else t.detach().requires_grad_() for t in to(triton_device, x, scale)]
        triton(*given).backward(grad.to(triton_device))
        want_x, want_scale = loops_backward(x, scale, grad)
        assert given[0].grad.dtype == dtype
        assert error(given[0].grad, want_x) <= bound, kind
        if scaled:
            # Products of two means in float32, summed over the batch, where they may cancel.
            assert error(given[1].grad, want_scale) <= 1e-5, kind


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [(1, 512, 3), (1, 513, 70), (2, 197, 192)])
def test_triton_at_sizes_of_networks(size, dtype, triton, triton_device, poisoned):
    x, scale = make(size, True, dtype)
    got, want = triton(*to(triton_device, x, scale)), loops(x, scale)
    assert error(got, want) <= TOLERANCE[dtype] * (2 if INTERPRETED else 1)
    # See above: the interpreter does not round to bfloat16.
    assert rounded_once(got, want) or (INTERPRETED and dtype == torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(0, 5, 8), (2, 0, 3), (2, 5, 0)])
def test_triton_gradient_of_nothing_is_zero(size, triton, triton_device, poisoned):
    x, scale = (tensor.requires_grad_() for tensor in to(triton_device, *make(size, True)))
    triton(x, scale).sum().backward()
    assert x.grad.shape == size
    assert torch.equal(scale.grad, torch.zeros_like(scale))


@pytest.mark.gpu
def test_triton_gradient_of_one_input_alone(triton, triton_device):
    x, scale = to(triton_device, *make((2, 7, 13), True))
    both = [tensor.clone().requires_grad_() for tensor in (x, scale)]
    triton(*both).square().sum().backward()
    for index in (0, 1):
        given = [x, scale]
        given[index] = given[index].clone().requires_grad_()
        triton(*given).square().sum().backward()
        assert torch.equal(given[index].grad, both[index].grad)
    scale16 = scale.bfloat16().requires_grad_()
    triton(x, scale16).sum().backward()
    assert scale16.grad.dtype == torch.bfloat16


@pytest.mark.gpu
def test_triton_second_derivatives(triton, triton_device):
    def double_backward(function, *given):
        given = [tensor.detach().requires_grad_() for tensor in given]
        first = torch.autograd.grad(function(*given).pow(3).sum(), given, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), given)

    x, scale = make((2, 7, 13), True)
    got = double_backward(triton, *to(triton_device, x, scale))
    want = double_backward(lambda x, s: (x + s * x.mean(1, keepdim=True)) / 2, x.double(), scale.double())
    for one, other in zip(got, want, strict=True):
        assert error(one, other) <= 1e-5  # float32 through two backward passes


@pytest.mark.gpu
def test_triton_gives_equal_bits_every_time(triton, triton_device):
    x, scale = to(triton_device, *make((3, 33, 65), True))
    runs = []
    for _ in range(2):
        given = [tensor.clone().requires_grad_() for tensor in (x, scale)]
        y = triton(*given)
        y.square().sum().backward()
        runs.append((y, given[0].grad, given[1].grad))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("scaled", [False, True])
def test_triton_op_is_registered_as_torch_wants(scaled, triton, triton_device):
    """torch's own checks: schema, fake tensors against real ones, autograd, AOT with fixed and changing sizes."""
    for x in (torch.randn(2, 7, 13), torch.randn(2, 13, 7).transpose(1, 2), torch.randn(0, 5, 8)):
        scale = torch.randn(x.shape[2]).to(triton_device).requires_grad_() if scaled else None
        given = x.to(triton_device).detach().requires_grad_()
        torch.library.opcheck(torch.ops.zoo.context_broadcast.default, (given, scale))


@pytest.mark.gpu
@pytest.mark.parametrize("dynamic", [False, True])
def test_triton_op_stays_whole_under_compile(dynamic, triton, triton_device):
    backend = "aot_eager" if triton_device == "cpu" else "inductor"
    compiled = torch.compile(triton, fullgraph=True, backend=backend, dynamic=dynamic)
    for size in ((2, 7, 13), (3, 9, 13)):
        x, scale = make(size, True)
        results = []
        for function in (triton, compiled):
            given = [tensor.detach().requires_grad_() for tensor in to(triton_device, x, scale)]
            y = function(*given)
            y.backward(torch.ones_like(y))
            results.append((y, given[0].grad, given[1].grad))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)  # torch's own bound for float32: sums in another order


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_the_gpu_auto_means_the_kernel_in_eager_mode_and_nothing_changes():
    from zoo.kernels.context_broadcast import triton_impl

    calls = []
    real = triton_impl.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_impl, "forward", lambda *given: calls.append(1) or real(*given))
        for dtype, bound in TOLERANCE.items():
            x, scale = to("cuda", *make((4, 197, 192), True, dtype))
            with torch.autocast("cuda", torch.bfloat16):
                got = kernels.context_broadcast(x, scale)
            assert got.dtype == dtype
            assert error(got, reference.context_broadcast(x.cpu().double(), scale.cpu())) <= bound
        assert len(calls) == len(TOLERANCE)
        kernels.context_broadcast(x.double(), scale)
        kernels.context_broadcast(x, scale, impl="reference")
        assert len(calls) == len(TOLERANCE)

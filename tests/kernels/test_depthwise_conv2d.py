"""depthwise_conv2d against loops over outputs and taps in float64, forward and every gradient."""

import hashlib
import os
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from zoo.kernels import depthwise_conv2d, dispatch, explain

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
on_gpu = pytest.mark.skipif(INTERPRETED, reason="needs a real GPU: the interpreter takes minutes for it")

# (B, C, H, W), (kh, kw), padding: one place, odd sizes over several tiles, sides that differ, maps below the kernel.
CASES = [
    ((1, 1, 1, 1), (1, 1), 0),
    ((2, 13, 7, 9), (3, 3), 1),
    ((3, 5, 6, 5), (5, 3), 2),
    ((2, 3, 9, 10), (2, 4), 1),
    ((2, 4, 3, 2), (5, 5), 2),
    ((1, 20, 9, 6), (5, 5), 0),
]
# float32: sums of up to 17 * 17 terms, of weights over a batch. Below: operands are given, one rounding of the answer.
BOUND = {torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def drawn(size, kernel, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [size, (size[1], 1, *kernel), size[1:2]]
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes]


def loop(x, weight, bias, stride, padding):
    """The sum, output by output and tap by tap."""
    batch, channels, height, width = x.shape
    kh, kw = weight.shape[2:]
    rows = []
    for i in range(0, height + 2 * padding - kh + 1, stride):
        row = []
        for j in range(0, width + 2 * padding - kw + 1, stride):
            total = torch.zeros(batch, channels, dtype=torch.float64) + (0 if bias is None else bias)
            for u in range(kh):
                for v in range(kw):
                    y, z = i + u - padding, j + v - padding
                    if 0 <= y < height and 0 <= z < width:
                        total = total + weight[:, 0, u, v] * x[:, :, y, z]
            row.append(total)
        rows.append(torch.stack(row, dim=-1))
    return torch.stack(rows, dim=-2)


def gradient_of(shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("size", "kernel", "padding"), CASES)
def test_equals_the_loop_with_every_gradient(size, kernel, padding, stride):
    inputs = [t.requires_grad_() for t in drawn(size, kernel)]
    want, got = loop(*inputs, stride, padding), depthwise_conv2d(*inputs, stride, padding)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-10)  # float64 on both sides
    grad = gradient_of(want.shape)
    for a, b in zip(torch.autograd.grad(got, inputs, grad), torch.autograd.grad(want, inputs, grad), strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_keeps_the_dtype_of_maps_and_sums_in_float32(dtype):
    x, weight, bias = drawn((2, 13, 7, 9), (5, 5), dtype)
    got = depthwise_conv2d(x, weight.float(), bias.float(), padding=2)
    assert got.dtype == dtype
    assert error(got, loop(x.double(), weight.double(), bias.double(), 1, 2)) <= BOUND[dtype]


def test_arguments_that_do_not_fit_are_named():
    x, weight, bias = drawn((1, 3, 5, 4), (3, 3))
    for given, said in (
        ((x[0], weight, bias), r"x \[3, 5, 4\] of torch.float64; it must be \(B, C, H, W\)"),
        ((x.long(), weight, bias), r"of torch.int64; it must be"),
        ((x, weight[:2], bias), r"weight \[2, 1, 3, 3\]; for 3 channels it must be \[3, 1"),
        ((x, weight.expand(3, 3, 3, 3), bias), r"weight \[3, 3, 3, 3\]"),
        ((x, weight[:, :, :0], bias), r"weight \[3, 1, 0, 3\].* none of them 0"),
        ((x[:, :0], weight[:0], bias[:0]), r"none of them 0"),
        ((x, weight.to("meta"), bias), "weight is torch.float64 on meta; it must be floating point on cpu"),
        ((x, weight, bias.long()), "bias is torch.int64 on cpu"),
        ((x, weight, bias[:2]), r"bias \[2\]; it must be \[3\]"),
        ((x, weight, bias, 0), "stride=0; it must be one integer of at least 1"),
        ((x, weight, bias, (2, 2)), r"stride=\(2, 2\); it must be one integer"),
        ((x, weight, bias, 1, -1), "padding=-1; it must be one integer of at least 0"),
        ((x, weight, bias, 1, "same"), "padding='same'"),
        (
            (x[..., :2], weight, bias),
            r"do not fit into maps of \[5, 2\] with padding=0; take padding of at .* 1",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            depthwise_conv2d(*given)


def fakes(dtype=torch.bfloat16, layout=torch.channels_last, kernel=9, channels=64, stride=1):
    with FakeTensorMode():
        x = torch.empty(2, channels, 8, 8, device="cuda", dtype=dtype).contiguous(memory_format=layout)
        weight = torch.empty(channels, 1, kernel, kernel, device="cuda")
    return x, weight, None, stride, kernel // 2


def test_auto_takes_the_kernel_where_cudnn_is_slow_and_says_why_not_elsewhere(monkeypatch):
    entry = dispatch.OPS["depthwise_conv2d"]
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    monkeypatch.setattr(dispatch, "DEFAULT", "auto")
    for compiling, taken, refused in ((False, (9, 11, 17), 7), (True, (3, 5, 17), 1)):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
        for kernel in taken:
            assert dispatch.kernel_for("depthwise_conv2d", *fakes(kernel=kernel)) is entry.triton
        for left, why in (
            (fakes(dtype=torch.float32), "left to float32"),
            (fakes(layout=torch.contiguous_format), "not channels-last"),
            (fakes(kernel=refused), f"kernels below {taken[0]} x {taken[0]}"),
            (fakes(channels=24), "fewer than 32 channels"),
        ):
            assert explain("depthwise_conv2d", *left).startswith("reference: ")
            assert why in explain("depthwise_conv2d", *left)
            assert dispatch.kernel_for("depthwise_conv2d", *left) is None
            assert dispatch._takes_triton(entry, "triton", left)  # it can, and says nothing
        assert explain("depthwise_conv2d", *fakes()) == "triton"
        assert explain("depthwise_conv2d", *fakes(stride=2)) == "reference: stride=2, and the kernel takes 1"


def test_a_graph_names_the_code_that_it_takes(monkeypatch):
    """Else torch's cache on disk would answer with kernels of another release."""
    from zoo.kernels.depthwise_conv2d import api

    folder, graphs = Path(api.__file__).parent, []
    code = hashlib.sha256((folder / "triton_impl.py").read_bytes() + (folder / "triton_kernels.py").read_bytes())

    def caught(graph, inputs):
        graphs.append(graph)
        raise NotImplementedError("nothing is run without a GPU")

    monkeypatch.setattr(dispatch, "_takes_triton", lambda *_: True)
    x, weight, bias = drawn((1, 3, 5, 4), (3, 3), torch.float32)
    with pytest.raises(Exception, match="nothing is run without a GPU"):
        torch.compile(lambda x: depthwise_conv2d(x, weight, bias, 1, 1), backend=caught, fullgraph=True)(x)
    (call,) = [node for node in graphs[0].graph.nodes if "depthwise_conv2d" in str(node.target)]
    assert call.args[-1] == code.hexdigest()[:16]


def test_what_rules_the_kernel_out_is_told(monkeypatch):
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    monkeypatch.setattr(dispatch, "elsewhere", lambda x: False)
    x, weight, bias = drawn((1, 3, 20, 20), (3, 3), torch.float32)
    for given, said in (
        ((x.double(), weight, bias), r"x is torch\.float64"),
        ((x, weight, bias, 2), "stride=2"),
        ((x, weight, bias, 1, 3), r"\[3, 3\] with padding=3"),
        ((x, x[:, :, :19, :19].transpose(0, 1), bias, 1, 9), r"\[19, 19\] with padding=9"),
    ):
        with pytest.raises(RuntimeError, match=said):
            depthwise_conv2d(*given, impl="triton")
    with FakeTensorMode():
        huge = torch.empty(1, 128, 4096, 4096, device="cuda", dtype=torch.bfloat16)
        with pytest.raises(RuntimeError, match=r"an image of \[128, 4096, 4096\] spans 2147483648 numbers"):
            depthwise_conv2d(huge, torch.empty(128, 1, 9, 9, device="cuda"), None, 1, 4, impl="triton")


def error(got, want):
    """Relative, of the whole tensor; NaN where anything was left unwritten."""
    return ((got.detach().cpu().double() - want.detach()).norm() / want.detach().norm().clamp_min(1e-30)).item()


@pytest.fixture
def triton(triton_device, monkeypatch):
    """The public op by its Triton code, with several images a program; the interpreter's tensors are on the CPU."""
    from zoo.kernels.depthwise_conv2d import api, triton_impl

    monkeypatch.setattr(triton_impl, "PROGRAMS", 2)
    monkeypatch.setattr(triton_impl, "STEPS", 8)
    if triton_device == "cpu":
        api._op.register_kernel("cpu", triton_impl.forward)
        api._op_weights.register_kernel("cpu", triton_impl.weights_grad)
        monkeypatch.setattr(dispatch, "elsewhere", lambda x: False)
    return lambda *given: depthwise_conv2d(*given, impl="triton")


def compare(triton, device, inputs, padding):
    """The op and its gradients against the loop, from what the inputs are worth in their dtypes."""
    exact = [None if t is None else t.detach().double().requires_grad_() for t in inputs]
    want = loop(*exact, 1, padding)
    given = [None if t is None else t.detach().to(device).requires_grad_() for t in inputs]
    got = triton(*given, 1, padding)
    assert got.dtype == inputs[0].dtype
    assert got.is_contiguous(memory_format=torch.channels_last)
    # The interpreter cuts float32 to bfloat16 instead of rounding: twice the error there.
    bound = BOUND[got.dtype] * (2 if INTERPRETED and got.dtype == torch.bfloat16 else 1)
    assert error(got, want) <= bound
    grad = gradient_of(want.shape).to(got.dtype)
    leaves, wanted = [t for t in given if t is not None], [t for t in exact if t is not None]
    wanted = torch.autograd.grad(want, wanted, grad.double())
    for tensor, a, b in zip(leaves, torch.autograd.grad(got, leaves, grad.to(device)), wanted, strict=True):
        assert a.dtype == tensor.dtype
        assert error(a, b) <= bound


@pytest.mark.gpu
# The interpreter takes seconds for each, and a GPU none.
@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.bfloat16,
        pytest.param(torch.float16, marks=[pytest.mark.slow] if INTERPRETED else []),
    ],
)
@pytest.mark.parametrize(
    ("size", "kernel", "padding"),
    [
        *CASES,
        ((3, 2, 4, 4), (9, 9), 4),
        ((2, 33, 6, 5), (3, 3), 1),
        pytest.param((1, 2, 4, 5), (17, 17), 8, marks=pytest.mark.slow),
        *(
            pytest.param(*case, marks=on_gpu)
            for case in [((3, 70, 17, 19), (7, 7), 3), ((5, 128, 14, 14), (11, 11), 5), ((9, 65, 30, 9), (5, 5), 2)]
        ),
    ],
)
def test_triton_equals_the_loop_with_every_gradient(size, kernel, padding, dtype, triton, triton_device, poisoned):
    compare(triton, triton_device, drawn(size, kernel, dtype), padding)


@pytest.mark.gpu
def test_triton_without_bias(triton, triton_device, poisoned):
    x, weight, _ = drawn((2, 13, 7, 9), (3, 3), torch.float32)
    compare(triton, triton_device, [x, weight, None], 1)


@pytest.mark.gpu
def test_triton_takes_any_strides(triton, triton_device, poisoned):
    x, weight, bias = drawn((2, 12, 6, 7), (3, 3), torch.float32)
    packed = torch.cat([x, x, x], dim=1).to(memory_format=torch.channels_last).chunk(3, dim=1)[1]
    tokens = x.flatten(2).transpose(1, 2).contiguous().transpose(1, 2).unflatten(2, (6, 7))
    wide = torch.zeros(2, 12, 12, 7)[:, :, ::2].copy_(x)
    turned = weight.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    for maps in (packed, tokens, wide, x.transpose(2, 3).contiguous().transpose(2, 3)):
        compare(triton, triton_device, [maps, turned, torch.stack([bias, bias], dim=1)[:, 0]], 1)


@pytest.mark.gpu
def test_triton_takes_gradients_of_any_strides(triton, triton_device, poisoned):
    inputs = [t.to(triton_device).requires_grad_() for t in drawn((2, 12, 6, 7), (3, 3), torch.float32)]
    out = triton(*inputs, 1, 1)
    want = torch.autograd.grad(out.square().sum(), inputs, retain_graph=True)
    plain = (2 * out.detach()).contiguous()
    for a, b in zip(torch.autograd.grad(out, inputs, plain, retain_graph=True), want, strict=True):
        assert error(a, b.cpu().double()) <= 1e-6  # the sum for the bias goes another way
    expanded = torch.autograd.grad(out.sum(), inputs)  # a gradient of strides zero
    for a, b in zip(expanded, torch.autograd.grad(loop_of(inputs), inputs), strict=True):
        assert error(a, b.cpu().double()) <= BOUND[torch.float32]


def loop_of(inputs):
    return loop(*(t.cpu().double() for t in inputs), 1, 1).sum()


@pytest.mark.gpu
def test_triton_of_nothing_is_nothing(triton, triton_device, poisoned):
    x, weight, bias = (t.to(triton_device).requires_grad_() for t in drawn((2, 12, 6, 7), (3, 3), torch.float32))
    out = triton(x[:0], weight, bias, 1, 1)
    assert out.shape == (0, 12, 6, 7)
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), (x, weight, bias)))


@pytest.mark.gpu
def test_triton_second_derivatives(triton, triton_device):
    def double_backward(function, given):
        first = torch.autograd.grad(function(*given, 1, 2).pow(3).sum(), given, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), given)

    inputs = drawn((2, 5, 6, 4), (3, 5), torch.float32)
    got = double_backward(triton, [t.to(triton_device).requires_grad_() for t in inputs])
    want = double_backward(loop, [t.double().requires_grad_() for t in inputs])
    for a, b in zip(got, want, strict=True):
        assert error(a, b) <= 1e-5  # float32 through two backward passes


@pytest.mark.gpu
def test_triton_gives_equal_bits_every_time(triton, triton_device):
    inputs = [t.to(triton_device).requires_grad_() for t in drawn((3, 2, 4, 4), (3, 3), torch.float32)]
    runs = [torch.autograd.grad(triton(*inputs, 1, 1).square().sum(), inputs) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.gpu
def test_triton_passes_the_checks_of_torch_for_registered_ops(triton, triton_device):
    """Fake tensors, autograd registration and AOT dispatch agree with what the kernels do."""
    x, weight, bias = (t.to(triton_device).requires_grad_() for t in drawn((2, 5, 6, 4), (3, 5), torch.float32))
    torch.library.opcheck(torch.ops.zoo.depthwise_conv2d.default, (x, weight, bias, 1, 2, False, "code"))
    grad = torch.randn(2, 5, 6, 4).to(triton_device).requires_grad_()
    torch.library.opcheck(torch.ops.zoo.depthwise_conv2d_weights.default, (grad, x, weight, 1, 2))

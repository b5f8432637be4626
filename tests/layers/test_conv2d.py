"""Conv2d and depthwise answer what nn.Conv2d and F.conv2d do, whichever way they take."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from zoo import kernels
from zoo.kernels import dispatch
from zoo.layers import conv2d
from zoo.layers.conv2d import Conv2d

NEAR = {"atol": 1e-5, "rtol": 1e-5}  # float32, the same sums in another order

# in, out, kernel and options: a stem, one kernel a channel, and everything that the kernel does not take.
CONVS = [
    (3, 28, 3, {"stride": 2, "padding": 1, "bias": False}),
    (3, 20, (3, 4), {"stride": (2, 4), "padding": (1, 2)}),
    (28, 16, 3, {"stride": 2, "padding": 1}),
    (28, 16, (1, 3), {"padding": "same"}),
    (6, 6, 3, {"padding": 1, "groups": 6}),
    (6, 6, 5, {"padding": 2, "groups": 6, "bias": False}),
    (6, 6, 3, {"padding": 1, "groups": 6, "stride": 2}),
    (6, 6, 3, {"padding": 2, "groups": 6, "dilation": 2}),
    (6, 6, 3, {"padding": (1, 2), "groups": 6}),
    (6, 6, 3, {"padding": "same", "groups": 6}),
    (6, 6, 3, {"padding": 1, "groups": 6, "padding_mode": "reflect"}),
    (6, 12, 3, {"padding": 1, "groups": 6}),
    (6, 12, 3, {"padding": 1, "groups": 3}),
    (1, 1, 3, {"padding": 1}),
]
convs = pytest.mark.parametrize(("before", "after", "kernel", "options"), CONVS, ids=str)


def pair(before, after, kernel, options, **factory):
    theirs = nn.Conv2d(before, after, kernel, **options, **factory)
    ours = Conv2d(before, after, kernel, **options, **factory)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def compare(ours, theirs, x, near, run=None, wanted=None):
    """Answers and gradients of x and all parameters, in the dtypes in which torch gives them."""
    results = []
    for conv, call in ((theirs, wanted or theirs), (ours, ours if run is None else run)):
        leaf = x.detach().clone().requires_grad_()
        out = call(leaf)
        weights = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)
        grads = torch.autograd.grad((out.float() * weights).sum(), [leaf, *conv.parameters()])
        results.append([out, *grads])
    for want, got in zip(*results, strict=True):
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        scale = want.abs().max().item()
        assert (got - want).abs().max() <= near["atol"] + near["rtol"] * scale


@convs
def test_answers_as_torch_does(before, after, kernel, options):
    ours, theirs = pair(before, after, kernel, options)
    assert repr(ours) == repr(theirs)
    for size in ((2, before, 8, 9), (before, 8, 9)):
        x = torch.randn(size)
        assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.double()(x.double()), theirs.double()(x.double()))


@convs
def test_what_a_gpu_would_take_answers_as_torch_does(before, after, kernel, options, monkeypatch):
    """Every way, with the dtype that decides as if x were on a GPU."""
    taken = []
    monkeypatch.setattr(conv2d, "_dtype", lambda x, weight: x.dtype if x.dim() == 4 else None)
    monkeypatch.setattr(conv2d, "_HALF", (torch.float32,))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    convolved, written_out = Conv2d._conv_forward, Conv2d._of_few

    def convolving(self, x, weight, bias):
        if x.shape[-3] > self.in_channels or weight.shape[0] > self.out_channels:
            taken.append("channels")
        return convolved(self, x, weight, bias)

    monkeypatch.setattr(Conv2d, "_conv_forward", convolving)
    monkeypatch.setattr(Conv2d, "_of_few", lambda *given: taken.append("windows") or written_out(*given))

    def taking(name, *_):
        taken.append(name)
        return getattr(kernels, name)

    monkeypatch.setattr(conv2d, "kernel_for", taking)
    ours, theirs = pair(before, after, kernel, options)
    compare(ours, theirs, torch.randn(2, before, 8, 9), NEAR)
    alone = options.get("groups", 1) == before == after > 1 and set(options) <= {"padding", "groups", "bias"}
    expected = "depthwise_conv2d" if alone and options["padding"] in (1, 2) else None
    if "groups" not in options and options["padding"] != "same":
        expected = "windows" if before == 3 else "channels"
    assert taken == ([expected] if expected else [])
    taken.clear()
    ours(torch.randn(before, 8, 9))
    assert not taken  # maps without a batch are torch's


@convs
def test_what_is_exported_on_a_gpu_is_torchs_convolution(before, after, kernel, options):
    with FakeTensorMode(allow_non_fake_inputs=True):
        kind = nn.Conv2d, Conv2d
        made = [one(before, after, kernel, **options, device="cuda", dtype=torch.bfloat16) for one in kind]
        x = torch.empty(2, before, 8, 9, device="cuda", dtype=torch.bfloat16)
        graphs = [torch.export.export(conv, (x,)).graph for conv in made]
    ours, theirs = ([node.target for node in graph.nodes if node.op == "call_function"] for graph in graphs)
    assert ours == theirs


def test_a_parametrization_is_asked_once():
    class Counted(nn.Module):
        calls = 0

        def forward(self, weight):
            Counted.calls += 1
            return weight

    conv = nn.utils.parametrize.register_parametrization(Conv2d(4, 4, 3, groups=4), "weight", Counted())
    before = Counted.calls
    conv(torch.randn(1, 4, 5, 5))
    assert Counted.calls == before + 1


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.complex64, torch.float64])
def test_dtypes_are_left_to_torch_that_autocast_does_not_cast(dtype, monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
    with FakeTensorMode():
        x, weight = torch.empty(1, 4, 5, 5, device="cuda"), torch.empty(4, 4, 3, 3, device="cuda")
        assert conv2d._dtype(x, weight) == torch.bfloat16
        assert conv2d._dtype(x.to(dtype), weight) is None
        assert conv2d._dtype(x, weight.to(dtype)) is None


def test_channels_are_filled_up_to_eights(monkeypatch):
    seen = []
    conv = Conv2d(3, 28, 3, padding=1)
    own = conv._conv_forward
    monkeypatch.setattr(
        conv, "_conv_forward", lambda x, weight, bias: seen.append((x, weight, bias)) or own(x, weight, bias)
    )
    monkeypatch.setattr(conv2d, "_dtype", lambda x, weight: x.dtype)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with torch.no_grad():
        out = conv.bfloat16()(torch.randn(2, 3, 8, 9).bfloat16())
    ((x, weight, bias),) = seen
    assert (x.shape[1], weight.shape, bias.shape) == (8, (32, 8, 3, 3), (32,))
    assert conv.weight.shape == (28, 3, 3, 3)
    assert not weight[28:].any()
    assert not bias[28:].any()
    assert out.shape == (2, 28, 8, 9)


@convs
def test_scripts_and_traces(before, after, kernel, options):
    ours, theirs = pair(before, after, kernel, options)
    x = torch.randn(2, before, 8, 9)
    for made in (torch.jit.script(ours), torch.jit.trace(ours, x), torch.fx.symbolic_trace(ours)):
        assert torch.equal(made(x), theirs(x))
    torch._dynamo.reset()  # many kinds of one class: torch compiles eight
    graph = torch.export.export(ours, (x,)).module()
    assert torch.equal(graph(x), theirs(x))
    torch.testing.assert_close(torch.compile(ours, fullgraph=True, backend="aot_eager")(x), theirs(x), **NEAR)


def test_a_compiled_graph_holds_the_kernel_and_what_fills_channels_up(monkeypatch):
    """As far as torch traces without a GPU: in one graph, with the dtype that decides as if there were one."""
    graphs = []

    def caught(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        raise NotImplementedError("nothing is run without a GPU")

    monkeypatch.setattr(conv2d, "_dtype", lambda x, weight: x.dtype)
    monkeypatch.setattr(conv2d, "_HALF", (torch.float32,))
    monkeypatch.setattr(dispatch, "elsewhere", lambda x: False)
    monkeypatch.setattr(dispatch, "DEFAULT", "triton")
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    torch._dynamo.reset()
    for conv in (Conv2d(64, 64, 3, padding=1, groups=64), Conv2d(3, 28, 3, stride=2, padding=1), Conv2d(28, 8, 1)):
        with pytest.raises(Exception, match="nothing is run without a GPU"):
            torch.compile(conv, backend=caught, fullgraph=True)(torch.randn(2, conv.in_channels, 8, 9))
    assert [name for name in graphs[0] if "depthwise_conv2d" in name]
    assert [name for name in graphs[1] if "linear" in name]
    assert [name for name in graphs[2] if "conv" in name]
    assert all([name for name in graph if "pad" in name] for graph in graphs[1:])


def test_a_function_for_tokens_scripts():
    x, weight, bias = torch.randn(2, 4, 5, 6), torch.randn(4, 1, 3, 3), torch.randn(4)
    want = F.conv2d(x, weight, bias, padding=1, groups=4)
    assert torch.equal(conv2d.depthwise(x, weight, bias, 1), want)
    assert torch.equal(torch.jit.script(conv2d.depthwise)(x, weight, bias, 1), want)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: torch has one way here")


@pytest.mark.gpu
@needs_cuda
@convs
def test_on_a_gpu_in_half_precision(before, after, kernel, options):
    """Under autocast and in bfloat16 throughout, eager and compiled, and float64 under autocast."""
    # bfloat16 operands are the same; the answer, and what torch rounds on the way to a gradient, once each.
    torch._dynamo.reset()
    near = {"atol": 1e-2, "rtol": 2**-7}
    x = torch.randn(2, before, 8, 9, device="cuda").contiguous(memory_format=torch.channels_last)
    for dtype, autocast in ((torch.float32, True), (torch.bfloat16, False)):
        ours, theirs = pair(before, after, kernel, options, device="cuda", dtype=dtype)
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast), dispatch.standing_for("auto"):
            compare(ours, theirs, x.to(dtype), near)
            compare(ours, theirs, x.to(dtype), near, torch.compile(ours, fullgraph=True))
    with torch.autocast("cuda", torch.bfloat16):
        ours, theirs = pair(before, after, kernel, options, device="cuda", dtype=torch.float64)
        compare(ours, theirs, x.double(), NEAR)


@pytest.mark.gpu
@needs_cuda
def test_dtypes_that_torch_refuses_are_refused():
    conv = Conv2d(64, 64, 3, padding=1, groups=64, device="cuda")
    with pytest.raises(RuntimeError, match="type"):
        conv(torch.randn(2, 64, 8, 8, device="cuda", dtype=torch.bfloat16))


@pytest.mark.gpu
@needs_cuda
def test_autocast_reaches_the_kernel():
    ours, theirs = pair(64, 64, 9, {"padding": 4, "groups": 64}, device="cuda")
    x = torch.randn(2, 64, 12, 11, device="cuda").contiguous(memory_format=torch.channels_last)
    with torch.autocast("cuda", torch.bfloat16), torch.profiler.profile() as profile:
        compare(ours, theirs, x, {"atol": 2e-2, "rtol": 2**-7})
    assert "zoo::depthwise_conv2d" in {event.key for event in profile.key_averages()}


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("kernel", [3, 5, 9])
def test_torch_compile_launches_the_kernel_by_itself(kernel):
    """Of maps that are dense, part of wider ones, or written by what comes before; answers and all gradients."""
    torch._dynamo.reset()
    ours, theirs = pair(64, 64, kernel, {"padding": kernel // 2, "groups": 64}, device="cuda")
    x = torch.randn(3, 192, 12, 11, device="cuda").contiguous(memory_format=torch.channels_last)

    def around(conv):
        return lambda x: conv(x.chunk(3, dim=1)[1]).tanh() + conv(x[:, :64] * 1.5)

    compiled = torch.compile(around(ours), fullgraph=True)
    with torch.autocast("cuda", torch.bfloat16):
        # Two convolutions, each rounded, and their gradients added in bfloat16.
        compare(ours, theirs, x, {"atol": 4e-2, "rtol": 2**-6}, compiled, around(theirs))
        with torch.profiler.profile() as profile:
            compiled(x.requires_grad_()).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert any("convolve" in name for name in names), names
    assert not any("zoo::" in name for name in names), names

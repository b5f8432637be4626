"""ConvNorm answers, and counts, as torch's convolution and norm do, whichever way it takes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import prune

from zoo.kernels import dispatch
from zoo.layers import conv2d, conv_norm
from zoo.layers.conv_norm import ConvNorm

NEAR = {"atol": 1e-4, "rtol": 1e-5}  # float32: sums over a batch in another order, divided by a deviation


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Decides as in half precision in torch.compile; the list of channel counts that reach the norm filled up."""
    filled, own = [], conv_norm._normalised
    monkeypatch.setattr(conv2d, "_dtype", lambda x, weight: x.dtype)
    monkeypatch.setattr(conv2d, "_HALF", (torch.float32,))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(conv_norm, "_normalised", lambda *given: filled.append(given[0].shape[1]) or own(*given))
    return filled


def made(before=3, after=28, bias=False, **factory):
    ours = ConvNorm(before, after, 3, 2, bias=bias)
    ours.bn.momentum, ours.bn.eps = 0.37, 1e-2
    with torch.no_grad():
        for values in (ours.bn.weight, ours.bn.bias, ours.bn.running_mean, ours.bn.running_var):
            values.copy_(torch.rand(after) + 0.5)
    return ours.to(**factory)


def plain(ours):
    """A copy that calls its two layers as they are."""
    theirs = copy.deepcopy(ours)
    theirs.forward = lambda x: theirs.bn(theirs.conv(x))
    return theirs


def trained(net, x, call=None):
    """Two steps: answers, gradients of x and all parameters, and what the norm counted."""
    results, call = [], net if call is None else call
    for factor in (1, 2):
        leaf = (x * factor).requires_grad_()
        out = call(leaf)
        weights = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)
        results += [out, *torch.autograd.grad((out.float() * weights).sum(), [leaf, *net.parameters()])]
    return [*results, *(buffer.clone() for buffer in net.buffers())]


def near(got, want, atol, rtol):
    for one, other in zip(got, want, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        torch.testing.assert_close(one, other, atol=atol * max(1, other.abs().max().item()), rtol=rtol)


def compiled(net, backend, widths):
    """torch.compile in one graph; `widths` is told the channels that come to every norm in it."""

    def compile_fx(graph, inputs):
        norms = [node for node in graph.graph.nodes if node.target is F.batch_norm]
        widths.extend(node.args[0].meta["example_value"].shape[1] for node in norms)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    torch._dynamo.reset()
    return torch.compile(net, fullgraph=True, backend=compile_fx)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("before", "after", "widths"), [(3, 28, [32, 32]), (28, 12, [16, 16]), (28, 16, []), (8, 16, [])]
)
def test_training_is_torchs(before, after, widths, bias, as_on_a_gpu):
    ours = made(before, after, bias)
    theirs = nn.Sequential(nn.Conv2d(before, after, 3, 2, 1, bias=bias), nn.BatchNorm2d(after, 1e-2, 0.37))
    theirs.load_state_dict({name.replace("conv", "0").replace("bn", "1"): v for name, v in ours.state_dict().items()})
    x = torch.randn(2, before, 8, 9)
    near(trained(ours, x), trained(theirs, x), **NEAR)
    assert as_on_a_gpu == widths
    ours.eval(), theirs.eval()
    as_on_a_gpu.clear()
    torch.testing.assert_close(ours(x), theirs(x), **NEAR)
    assert not as_on_a_gpu  # a norm by constants is no sum over maps


class Doubled(nn.BatchNorm2d):
    def forward(self, input):
        return 2 * super().forward(input)


def replaced(**layers):
    return lambda net: [setattr(net, name, make()) for name, make in layers.items()]


def without(*names):
    return lambda net: [setattr(net.bn, name, None) for name in names]


CHANGES = {
    "no momentum": without("momentum"),
    "no weight": without("weight"),
    "no bias": without("bias"),
    "nothing counted": without("num_batches_tracked"),
    "no running mean and variance": without("running_mean", "running_var"),
    "no affine norm": replaced(bn=lambda: nn.BatchNorm2d(28, affine=False)),
    "no running statistics": replaced(bn=lambda: nn.BatchNorm2d(28, track_running_stats=False)),
    "another norm": replaced(bn=lambda: nn.GroupNorm(4, 28)),
    "a norm of the user's": replaced(bn=lambda: Doubled(28)),
    "another convolution": replaced(conv=lambda: nn.Conv2d(3, 28, 3, stride=2, padding=1)),
    "parametrized": lambda net: nn.utils.parametrize.register_parametrization(net.conv, "weight", nn.Tanh()),
    "pruned": lambda net: prune.l1_unstructured(net.conv, "weight", 0.5),
    "a hook on the norm": lambda net: net.bn.register_forward_hook(lambda module, given, out: 2 * out),
    "a hook on gradients": lambda net: net.conv.register_full_backward_hook(lambda module, given, out: None),
    "a hook before gradients": lambda net: net.bn.register_full_backward_pre_hook(lambda module, out: (2 * out[0],)),
    "a call of its own": lambda net: setattr(net.bn, "forward", lambda x: nn.BatchNorm2d.forward(net.bn, 2 * x)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_layers_and_listeners_find_what_they_expect(change, as_on_a_gpu):
    torch.manual_seed(0)
    ours = made()
    torch.manual_seed(0)
    theirs = made()
    theirs.forward = lambda x: theirs.bn(theirs.conv(x))
    for net in (ours, theirs):
        torch.manual_seed(1)
        CHANGES[change](net)
    x = torch.randn(2, 3, 8, 9)
    near(trained(ours, x), trained(theirs, x), **NEAR)
    assert not as_on_a_gpu


def test_listeners_at_all_modules_are_heard(as_on_a_gpu):
    with_hook = register_module_forward_hook(lambda module, given, out: 0 * out if module is ours.bn else None)
    try:
        ours = made()
        assert not ours(torch.randn(2, 3, 8, 9)).any()
    finally:
        with_hook.remove()
    ours(torch.randn(2, 3, 8, 9))
    assert as_on_a_gpu == [32]


@pytest.mark.parametrize("channels", [17, 25, 30])
def test_a_norm_that_does_not_fit_is_refused(channels, as_on_a_gpu):
    ours = made()
    ours.bn = nn.BatchNorm2d(channels)
    with pytest.raises(RuntimeError, match=f"should contain 28 elements not {channels}"):
        ours(torch.randn(2, 3, 8, 9))


def test_scripts_traces_and_exports():
    ours = made()
    x = torch.randn(2, 3, 8, 9)
    want = plain(ours)(x)
    for make in (torch.jit.script, torch.fx.symbolic_trace, lambda net: torch.export.export(net, (x,)).module()):
        torch.testing.assert_close(make(copy.deepcopy(ours))(x), want, **NEAR)


@pytest.mark.parametrize(("before", "after", "width"), [(3, 28, 32), (28, 12, 16), (28, 16, 16)])
def test_compiles_as_one_graph(before, after, width, monkeypatch):
    """With what decides as if it were on a GPU, in bfloat16, which two ways round at different places."""
    monkeypatch.setattr(conv2d, "elsewhere", lambda x: False)
    ours = made(before, after, dtype=torch.bfloat16)
    theirs, widths = plain(ours), []
    x = torch.randn(2, before, 8, 9).bfloat16()
    got = trained(ours, x, compiled(ours, "aot_eager", widths))
    near(got, trained(theirs, x), atol=2e-2, rtol=2**-6)
    assert widths == [width]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: channels are filled up on a GPU alone")
@pytest.mark.parametrize(("before", "after", "width"), [(3, 28, 32), (28, 12, 16), (28, 16, 16)])
def test_on_a_gpu_in_half_precision(before, after, width):
    """Compiled, under autocast: as near to float64 as torch's own layers are, uncompiled."""
    torch.manual_seed(0)
    ours = made(before, after, device="cuda")
    theirs, exact = plain(ours), plain(ours.double())
    ours.float()
    x = torch.randn(4, before, 18, 20, device="cuda").contiguous(memory_format=torch.channels_last)
    want, widths = trained(exact, x.double()), []
    with torch.autocast("cuda", torch.bfloat16), dispatch.standing_for("auto"):
        got, peer = trained(ours, x, compiled(ours, "inductor", widths)), trained(theirs, x)
    assert widths == [width]
    for one, other, true in zip(got, peer, want, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        # Both round the same operands to bfloat16 and sum in orders of their own: twice the peer's error, and half of
        # bfloat16's last place, by which the peer may be luckier.
        error, allowed = ((value.double() - true).abs().max().item() for value in (one, other))
        assert error <= 2 * allowed + 2**-9 * true.abs().max().item()

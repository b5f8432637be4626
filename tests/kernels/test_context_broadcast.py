"""The op against loops in float64, the Triton code through its interpreter, and the choice between them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from zoo import kernels
from zoo.kernels import dispatch

ROOT = Path(__file__).resolve().parents[2]
# (B, N, C): one token, odd sizes over one block and over several, nothing at all, a ViT's size.
SIZES = [(1, 1, 1), (2, 7, 13), (3, 33, 65), (0, 5, 8), (2, 197, 192)]
# float32 sums of up to 197 terms; one rounding of the answer in the lower precisions.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def loops(x, scale):
    """float64, token by token."""
    out = torch.empty(x.shape, dtype=torch.float64)
    for b in range(x.shape[0]):
        mean = sum(x[b, n].double() for n in range(x.shape[1])) / x.shape[1]
        for n in range(x.shape[1]):
            out[b, n] = (x[b, n].double() + (mean if scale is None else scale.double() * mean)) / 2
    return out


def make(size, scaled, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(sum(size))
    x = torch.randn(size, generator=generator).to(device, dtype)
    return x, torch.randn(size[2], generator=generator).to(device) if scaled else None


def error(got, want):
    if not want.numel():
        return 0.0
    return ((got.cpu().double() - want).abs().max() / want.abs().max().clamp_min(1e-30)).item()


def gradients(function, x, scale, weight):
    x = x.detach().clone().requires_grad_()
    scale = None if scale is None else scale.detach().clone().requires_grad_()
    (function(x, scale).double() * weight.to(x.device)).sum().backward()
    return x.grad, None if scale is None else scale.grad


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_reference_is_the_equation(size, scaled):
    x, scale = make(size, scaled)
    for dtype in TOLERANCE:
        got = kernels.context_broadcast(x.to(dtype), scale)
        assert got.dtype == dtype
        assert error(got, loops(x.to(dtype), scale)) <= TOLERANCE[dtype]


def test_reference_gradients_are_exact():
    x, scale = make((2, 5, 3), True)
    x, scale = x.double().requires_grad_(), scale.double().requires_grad_()
    assert torch.autograd.gradcheck(kernels.context_broadcast, (x, scale))


def test_properties_of_the_paper():
    """Constant sequences stay, the mean token stays, deviations from it are halved."""
    x = torch.randn(2, 9, 4, dtype=torch.float64)
    constant = x[:, :1].expand(-1, 9, -1)
    torch.testing.assert_close(kernels.context_broadcast(constant), constant)
    y = kernels.context_broadcast(x)
    torch.testing.assert_close(y.mean(1), x.mean(1))
    torch.testing.assert_close(y - y.mean(1, keepdim=True), (x - x.mean(1, keepdim=True)) / 2)


# The interpreter cuts float32 to bfloat16 instead of rounding: twice the error there.
INTERPRETED = """
import torch
from zoo.kernels.context_broadcast import triton_impl
real = torch.empty
def poisoned(*args, **kwargs):
    return real(*args, **kwargs).fill_(float("nan"))
for size in ((1, 1, 1), (2, 7, 13), (3, 33, 65), (0, 5, 8)):
    for scaled in (False, True):
        for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 2**-7), (torch.float16, 2**-11)):
            x = torch.randn(size).to(dtype)
            wide = torch.randn(size[0], size[1] + 3, 2 * size[2]).to(dtype)
            scale = torch.randn(size[2]) if scaled else None
            for given in (x, wide[:, 1:-2, ::2]):
                torch.empty = poisoned
                y, mean = triton_impl.forward(given, scale)
                torch.empty = real
                want_mean = given.double().mean(1)
                want = (given.double() + (want_mean if scale is None else want_mean * scale.double())[:, None]) / 2
                if not y.numel():
                    continue
                assert ((y.double() - want).abs().max() / want.abs().max()) <= bound, (size, scaled, dtype)
                assert (mean - want_mean).abs().max() <= 1e-5
print("interpreted")
"""


@pytest.mark.skipif(not dispatch.HAS_TRITON, reason="triton is not installed")
def test_triton_code_in_its_interpreter():
    environment = dict(os.environ, TRITON_INTERPRET="1", PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES="")
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.stdout == "interpreted\n", done.stderr[-3000:]


def test_an_explicit_choice_never_falls_back():
    x, _ = make((2, 5, 3), False)
    reason = "tensor is on cpu" if dispatch.HAS_TRITON else "triton is not installed"
    with pytest.raises(RuntimeError, match=reason):
        kernels.context_broadcast(x, impl="triton")
    with pytest.raises(ValueError, match=r"impl='fast'; valid: auto, reference, triton"):
        kernels.context_broadcast(x, impl="fast")


def test_graphs_take_the_reference():
    class Net(torch.nn.Module):
        def forward(self, x):
            return kernels.context_broadcast(x)

    x, _ = make((2, 5, 3), False)
    want = kernels.context_broadcast(x)
    assert torch.equal(torch.compile(Net(), fullgraph=True, backend="aot_eager")(x), want)
    assert torch.equal(torch.fx.symbolic_trace(Net())(x), want)
    exported = torch.export.export(Net(), (x,))
    assert torch.equal(exported.module()(x), want)
    assert not [node for node in exported.graph.nodes if "zoo" in str(node.target)]


def run(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=dict(os.environ, PYTHONPATH=str(ROOT), **environment),
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def test_environment_sets_the_default_at_import():
    code = "from zoo.kernels import dispatch; print(dispatch.DEFAULT)"
    assert run(code, ZOO_KERNELS="reference") == (0, "reference\n")
    status, output = run(code, ZOO_KERNELS="fastest")
    assert status != 0
    assert "ZOO_KERNELS='fastest'; valid: auto, reference, triton" in output


def test_imports_without_triton():
    code = "import sys; sys.modules['triton'] = None; import torch\n"
    code += "import importlib.util; find = importlib.util.find_spec\n"
    code += "importlib.util.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
    code += "from zoo import kernels; x = torch.ones(1, 2, 3); print(kernels.context_broadcast(x).sum().item())\n"
    code += "try: kernels.context_broadcast(x, impl='triton')\nexcept RuntimeError as error: print(error)"
    status, output = run(code)
    assert status == 0, output
    assert output.startswith("6.0\n")
    assert "triton is not installed" in output


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_on_the_gpu(size, scaled):
    x, scale = make(size, scaled, device="cuda")
    weight = torch.randn(size, dtype=torch.float64)
    wide = torch.randn(size[0], size[1] + 3, 2 * size[2], device="cuda")

    def triton(x, scale):
        return kernels.context_broadcast(x, scale, impl="triton")

    for dtype, bound in TOLERANCE.items():
        for given in (x.to(dtype), wide[:, 1:-2, ::2].to(dtype)):
            torch.full((size[0] * size[1] * size[2] * 4,), float("nan"), device="cuda")  # poison what empty may reuse
            assert error(triton(given, scale), loops(given.cpu(), None if scale is None else scale.cpu())) <= bound
            got = gradients(triton, given, scale, weight)
            double = given.cpu().double(), None if scale is None else scale.cpu().double()
            want = gradients(loops_differentiable, *double, weight)
            # The gradient that comes in is rounded once more than the answer.
            assert error(got[0], want[0]) <= 2 * bound
            if scaled:
                # A sum over the batch of products of means, which may cancel.
                assert error(got[1], want[1]) <= max(8 * bound, 1e-5)
    compiled = torch.compile(triton, fullgraph=True)
    assert torch.equal(compiled(x, scale), triton(x, scale))
    with torch.autocast("cuda", torch.bfloat16):
        assert kernels.context_broadcast(x, scale).dtype == torch.float32


def loops_differentiable(x, scale):
    """float64 autograd of the equation."""
    mean = x.sum(1, keepdim=True) / x.shape[1]
    return (x + (mean if scale is None else mean * scale)) / 2

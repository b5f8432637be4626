"""Shapes that change do not compile, or tune, for ever: at the first use of a kernel, and then no more."""

import time

import pytest
import torch

from zoo import kernels

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing is compiled here")


def variants():
    """How many binaries every kernel of ours has by now."""
    import triton

    from zoo.kernels.depthwise_conv2d import triton_kernels as depthwise_kernels
    from zoo.kernels.focused_linear_attention import triton_kernels as focused_kernels
    from zoo.kernels.halo_attention import triton_kernels
    from zoo.kernels.lambda_attention import triton_gradients, triton_lambdas

    found = {}
    for module in (depthwise_kernels, focused_kernels, triton_kernels, triton_lambdas, triton_gradients):
        for name, function in vars(module).items():
            if isinstance(function, triton.runtime.JITFunction) and not name.startswith("_"):
                found[name] = sum(len(cache[0]) for cache in function.device_caches.values())
    return found


def halo(batch):
    q, k, v = (torch.randn(batch, 16, 16, 2, 16, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    tables = [torch.randn(27, 16, device="cuda") for _ in range(2)]
    leaves = [t.requires_grad_() for t in (q, k, v, *tables)]
    kernels.halo_attention(*leaves, 8, 3, 0.25, impl="triton").sum().backward()


def position_lambdas(batch):
    q = torch.randn(batch, 16, 16, 2, 16, device="cuda", dtype=torch.bfloat16)
    v = torch.randn(batch, 16, 16, 1, 32, device="cuda", dtype=torch.bfloat16)
    leaves = [t.requires_grad_() for t in (q, v, torch.randn(9, 9, 16, 1, device="cuda"))]
    kernels.lambda_attention(*leaves, impl="triton").sum().backward()


def focused(batch):
    leaves = [torch.randn(batch, 196, 3 * 96, device="cuda", dtype=torch.bfloat16), torch.randn(1, 196, 96).cuda()]
    qkv, positions, scale = (t.requires_grad_() for t in (*leaves, torch.rand(96, device="cuda") + 0.5))
    kernels.focused_linear_attention(*qkv.chunk(3, dim=2), positions, scale, 3, impl="triton").sum().backward()


def depthwise(batch):
    x = torch.randn(batch, 14, 14, 64, device="cuda", dtype=torch.bfloat16).permute(0, 3, 1, 2)
    # 9 x 9: the gradient of weights is ours, too; of maps it is the same kernel, compiled for turned weights.
    leaves = [t.requires_grad_() for t in (x, torch.randn(64, 1, 9, 9, device="cuda"))]
    kernels.depthwise_conv2d(*leaves, None, 1, 4, impl="triton").sum().backward()


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("step", [depthwise, focused, halo, position_lambdas])
def test_ten_batch_sizes_compile_a_kernel_twice_at_most(step):
    before = variants()
    start = time.perf_counter()
    step(1)
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    for batch in (2, 3, 5, 8, 16, 31, 64, 100, 512):
        step(batch)
    torch.cuda.synchronize()
    # Twice: backward leaves fewer sums of the tables where there are blocks enough to share.
    grown = {name: count - before.get(name, 0) for name, count in variants().items()}
    assert max(grown.values()) <= 2, grown
    assert any(grown.values()) or any(before.values())
    # Seconds, not minutes, on any host: there is no search among candidates.
    assert first < 60


@pytest.mark.gpu
@needs_cuda
def test_maps_of_other_sizes_compile_nothing_new():
    def run(side):
        t = [torch.randn(2, side, side, 2, 16, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        tables = [torch.randn(27, 16, device="cuda") for _ in range(2)]
        kernels.halo_attention(*t, *tables, 8, 3, 0.25, impl="triton")

        x = torch.randn(2, side, side, 64, device="cuda", dtype=torch.bfloat16).permute(0, 3, 1, 2)
        leaves = [t.requires_grad_() for t in (x, torch.randn(64, 1, 9, 9, device="cuda"))]
        kernels.depthwise_conv2d(*leaves, None, 1, 4, impl="triton").sum().backward()

    run(16)
    before = variants()
    for side in (8, 24, 40, 56):
        run(side)
    assert variants() == before

"""The cases of ops and of single layers."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from tools.bench.cases import Cost, FunctionCase, Unavailable, Workload, register

HALF = 2  # bytes of a number in bfloat16


def draw(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    """Random numbers, never zeros: those hide what is not written, and can run faster than data do."""
    return torch.randn(shape, device=device).to(dtype).requires_grad_()


def build_op(name: str, side: str, device: str, **sizes: Any) -> Workload:
    """An op of zoo.kernels by its public function, or by its reference."""
    import zoo.kernels
    from zoo.kernels.dispatch import OPS

    if name not in OPS:
        raise Unavailable(f"zoo.kernels has no op {name}")
    constants = tuple(sizes.get(key) for key in CONSTANTS.get(name, ()))
    call = getattr(zoo.kernels, name) if side == "ours" else OPS[name].reference
    if side == "ours" and device == "cuda":
        # The kernel is what there is to time, also where "auto" takes the reference.
        call = partial(call, impl="triton")
    return Workload(lambda *tensors: call(*tensors, *constants))


# Arguments of an op that are no tensors, by their place.
CONSTANTS = {
    "depthwise_conv2d": ("bias", "stride", "padding"),
    "focused_linear_attention": ("heads", "power"),
    "halo_attention": ("block", "halo", "scale", "stride", "scale_rel", "mask"),
}


def register_op(name: str, title: str, op: str, sizes: dict, quick: dict, inputs, cost, batched) -> None:
    build = partial(build_op, op)
    register(FunctionCase(name, "op", title, op, sizes, sizes | quick, inputs, build, cost, batched, "reference"))


# Mean token


def mean_inputs(side: str, dtype: torch.dtype, device: str, batch: int, tokens: int, channels: int) -> tuple:
    x = draw(batch, tokens, channels, dtype=dtype, device=device)
    return x, torch.rand(channels, device=device).add_(0.5).requires_grad_()


def mean_cost(batch: int, tokens: int, channels: int) -> Cost:
    numbers = batch * tokens * channels
    return Cost(2 * numbers * HALF, 3 * numbers, 2 * numbers * HALF, 3 * numbers)


for tokens, channels in ((197, 384), (197, 768), (3136, 64)):
    register_op(
        f"context_broadcast_{tokens}x{channels}",
        f"context_broadcast, {tokens} tokens of {channels}",
        "context_broadcast",
        {"batch": 128, "tokens": tokens, "channels": channels},
        {"batch": 3, "tokens": 5, "channels": 8},
        mean_inputs,
        mean_cost,
        (0,),
    )


# Focused linear attention


def focused_cost(batch: int, tokens: int, heads: int, depth: int, power: int) -> Cost:
    """Two products of d x d sums with every token and head; backward makes four, and the three gradients."""
    numbers, table = batch * tokens * heads * depth, tokens * heads * depth * 4
    return Cost(4 * numbers * HALF + table, 4 * numbers * depth, 7 * numbers * HALF + 2 * table, 8 * numbers * depth)


def focused_inputs(
    side: str, dtype: torch.dtype, device: str, batch: int, tokens: int, heads: int, depth: int, power: int
) -> tuple:
    channels = heads * depth
    make = partial(draw, batch, tokens, channels, dtype=dtype, device=device)
    table = draw(1, tokens, channels, dtype=torch.float32, device=device)
    return make(), make(), make(), table, torch.rand(channels, device=device).add_(0.5).requires_grad_()


# The stages of FLatten-Swin-T and, of 64 channels a head, the third one of FLatten-PVT.
for tokens, heads, depth in ((3136, 3, 32), (784, 6, 32), (196, 5, 64)):
    register_op(
        f"focused_linear_attention_{tokens}x{heads * depth}",
        f"focused_linear_attention, {tokens} tokens, {heads} heads of {depth}",
        "focused_linear_attention",
        {"batch": 128, "tokens": tokens, "heads": heads, "depth": depth, "power": 3},
        {"batch": 2, "tokens": 9, "heads": 2, "depth": 4},
        focused_inputs,
        focused_cost,
        (0, 1, 2),
    )


# Depthwise convolution


def depthwise_inputs(
    side: str, dtype: torch.dtype, device: str, batch: int, channels: int, size: int, kernel: int, **_: Any
) -> tuple:
    x = torch.randn(batch, channels, size, size, device=device).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    return x, draw(channels, 1, kernel, kernel, dtype=torch.float32, device=device)


def depthwise_cost(batch: int, channels: int, size: int, kernel: int, **_: Any) -> Cost:
    numbers = batch * channels * size**2
    flops = 2 * numbers * kernel**2
    return Cost(2 * numbers * HALF, flops, 3 * numbers * HALF, 2 * flops)


# Of UniFormer, SHViT and FLatten, and larger kernels.
DEPTHWISE = (
    (64, 56, 3),
    (64, 56, 5),
    (128, 28, 5),
    (224, 16, 3),
    (96, 56, 5),
    (96, 56, 7),
    (128, 28, 9),
    (128, 28, 17),
)
for channels, size, kernel in DEPTHWISE:
    register_op(
        f"depthwise_conv2d_c{channels}_{size}_k{kernel}",
        f"depthwise_conv2d, C{channels} {size}x{size}, {kernel} x {kernel}",
        "depthwise_conv2d",
        {"batch": 128, "channels": channels, "size": size, "kernel": kernel, "stride": 1, "padding": kernel // 2},
        {"batch": 2, "channels": 4, "size": 6},
        depthwise_inputs,
        depthwise_cost,
        (0,),
    )


# Attention in blocks with a halo


def halo_pairs(size: int, block: int, halo: int) -> int:
    """Queries times the keys inside the map that they see, along one axis."""
    total = 0
    for first in range(0, size, block):
        keys = min(size, first + block + halo) - max(0, first - halo)
        total += min(block, size - first) * keys
    return total


def halo_cost(batch: int, size: int, heads: int, dk: int, dv: int, block: int, halo: int, **_: Any) -> Cost:
    pairs, places = batch * heads * halo_pairs(size, block, halo) ** 2, batch * heads * size**2
    window = block + 2 * halo
    relative = 2 * places * 2 * window * dk  # one product with the part of either table that a query sees
    forward = 2 * pairs * (dk + dv) + relative
    return Cost(
        places * (2 * dk + 2 * dv) * HALF,
        forward,
        places * (4 * dk + 3 * dv) * HALF,
        4 * pairs * (dk + dv) + 2 * relative,
    )


def halo_inputs(
    side: str,
    dtype: torch.dtype,
    device: str,
    batch: int,
    size: int,
    heads: int,
    dk: int,
    dv: int,
    block: int,
    halo: int,
    **_: Any,
) -> tuple:
    make = partial(draw, dtype=dtype, device=device)
    tables = [make(2 * (block + 2 * halo) - 1, dk) for _ in range(2)]
    return make(batch, size, size, heads, dk), *(make(batch, size, size, heads, d) for d in (dk, dv)), *tables


for channels, size, heads, halo in ((64, 64, 4, 3), (128, 32, 8, 3), (256, 16, 8, 2)):
    depth = channels // heads
    register_op(
        f"halo_attention_c{channels}_{size}",
        f"halo_attention, {size}x{size}, {heads} heads of {depth}, block 8, halo {halo}",
        "halo_attention",
        {"batch": 128, "size": size, "heads": heads, "dk": depth, "dv": depth, "block": 8, "halo": halo}
        | {"scale": depth**-0.5, "stride": 1, "scale_rel": False, "mask": True},
        {"batch": 2, "size": 5, "heads": 2, "dk": 4, "dv": 8, "block": 4, "halo": 1},
        halo_inputs,
        halo_cost,
        (0, 1, 2),
    )


# Position lambdas


def lambda_pairs(size: int, reach: int) -> int:
    """Queries times the places inside the map within reach, along one axis."""
    return sum(min(size, place + reach + 1) - max(0, place - reach) for place in range(size))


def lambda_cost(batch: int, size: int, heads: int, k: int, u: int, dv: int, reach: int) -> Cost:
    pairs, places = lambda_pairs(size, reach) ** 2, size**2
    # Logits of pairs by the queries, or one (k, dv) lambda a place: whichever is less work.
    by_logits = heads * u * pairs * (k + dv)
    by_lambdas = k * dv * (u * pairs + heads * places)
    flops = 2 * batch * min(by_logits, by_lambdas)
    table = (2 * reach + 1) ** 2 * k * u * 4
    q, v, out = (batch * places * n * HALF for n in (heads * k, u * dv, heads * dv))
    return Cost(q + v + out + table, flops, 2 * q + 2 * v + out + 2 * table, 2 * flops)


def lambda_inputs(
    side: str, dtype: torch.dtype, device: str, batch: int, size: int, heads: int, k: int, u: int, dv: int, reach: int
) -> tuple:
    make = partial(draw, dtype=dtype, device=device)
    table = draw(2 * reach + 1, 2 * reach + 1, k, u, dtype=torch.float32, device=device)
    return make(batch, size, size, heads, k), make(batch, size, size, u, dv), table


for channels, size, reach in ((128, 32, 4), (128, 32, 31), (256, 16, 15)):
    register_op(
        f"lambda_attention_c{channels}_{size}_" + ("local" if reach < size - 1 else "global"),
        f"lambda_attention, {size}x{size}, 4 heads, k 16, v {channels // 4}, reach {reach}",
        "lambda_attention",
        {"batch": 128, "size": size, "heads": 4, "k": 16, "u": 1, "dv": channels // 4, "reach": reach},
        {"batch": 2, "size": 5, "heads": 2, "k": 4, "u": 1, "dv": 8, "reach": min(reach, 4)},
        lambda_inputs,
        lambda_cost,
        (0, 1),
    )


# timm's layers, projections included, and the same layers after zoo.accelerate


def build_layer(make, side: str, device: str, **sizes: Any) -> Workload:
    torch.manual_seed(0)
    module = make(**sizes).to(device)
    if side == "ours":
        import zoo

        module = zoo.accelerate(module)
    return Workload(module, list(module.parameters()), module, autocast=True)


def layer_inputs(side: str, dtype: torch.dtype, device: str, batch: int, channels: int, size: int, **_: Any) -> tuple:
    x = torch.randn(batch, channels, size, size, device=device).to(dtype)
    # timm's LambdaLayer refuses channels-last maps, and its HaloAttn is as fast without.
    layout = torch.channels_last if side == "ours" else torch.contiguous_format
    return (x.contiguous(memory_format=layout).requires_grad_(),)


def with_projections(cost: Cost, batch: int, channels: int, out: int, size: int, widths: int) -> Cost:
    """A layer reads its input and writes its output; what lies between need not leave the chip."""
    places = batch * size**2
    weights, flops = channels * widths * 4, 2 * places * channels * widths
    x, y = places * channels * HALF, places * out * HALF
    return Cost(x + y + weights, cost.forward_flops + flops, 2 * x + y + 2 * weights, cost.backward_flops + 2 * flops)


def halo_layer(channels: int, heads: int, halo: int, block: int, **_: Any) -> torch.nn.Module:
    from timm.layers.halo_attn import HaloAttn

    return HaloAttn(channels, num_heads=heads, block_size=block, halo_size=halo)


def halo_layer_cost(batch: int, channels: int, size: int, heads: int, halo: int, block: int) -> Cost:
    depth = channels // heads
    return with_projections(
        halo_cost(batch, size, heads, depth, depth, block, halo), batch, channels, channels, size, 3 * channels
    )


def lambda_layer(channels: int, size: int, kernel: int | None, heads: int = 4, **_: Any) -> torch.nn.Module:
    from timm.layers.lambda_layer import LambdaLayer

    return LambdaLayer(channels, feat_size=(size, size), num_heads=heads, dim_head=16, r=kernel)


def lambda_layer_cost(batch: int, channels: int, size: int, kernel: int | None, heads: int = 4) -> Cost:
    reach, depth = kernel // 2 if kernel else size - 1, channels // heads
    cost = lambda_cost(batch, size, heads, 16, 1, depth, reach)
    content = 2 * batch * size**2 * 16 * depth * (1 + heads)  # k^T v, and its answer to the queries
    cost = Cost(
        cost.forward_bytes, cost.forward_flops + content, cost.backward_bytes, cost.backward_flops + 2 * content
    )
    return with_projections(cost, batch, channels, channels, size, heads * 16 + 16 + depth)


def register_layer(name: str, title: str, op: str, sizes: dict, quick: dict, make, cost) -> None:
    build = partial(build_layer, make)
    register(FunctionCase(name, "layer", title, op, sizes, sizes | quick, layer_inputs, build, cost, (0,), "timm"))


for channels, size, heads, halo in ((64, 64, 4, 3), (128, 32, 8, 3), (256, 32, 8, 3), (256, 16, 8, 2), (512, 16, 8, 2)):
    register_layer(
        f"halo_layer_c{channels}_{size}",
        f"HaloAttn C{channels} {size}x{size}, {heads} heads, block 8, halo {halo}",
        "halo_attention",
        {"batch": 128, "channels": channels, "size": size, "heads": heads, "halo": halo, "block": 8},
        {"batch": 2, "channels": 16, "size": 8, "heads": 2, "halo": 1, "block": 4},
        halo_layer,
        halo_layer_cost,
    )

for channels, size in ((128, 32), (256, 32), (256, 16)):
    for kernel in (9, None):
        register_layer(
            f"lambda_layer_c{channels}_{size}_" + ("local" if kernel else "global"),
            f"LambdaLayer C{channels} {size}x{size}, 4 heads, k 16, " + (f"r {kernel}" if kernel else "global"),
            "lambda_attention",
            {"batch": 128, "channels": channels, "size": size, "kernel": kernel},
            {"batch": 2, "channels": 16, "size": 6, "kernel": 3 if kernel else None},
            lambda_layer,
            lambda_layer_cost,
        )

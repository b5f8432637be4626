"""The cases of attention mechanisms: each of the registry beside softmax attention, at 64 x 64 tokens."""

import math
from functools import partial

import torch
from torch import Tensor, nn

from tools.bench.cases import Cost, FunctionCase, Workload, register
from tools.bench.ops import HALF
from zoo.attention import AttentionSpec, attention_spec, create_attention, list_attentions
from zoo.attention.registry import with_defaults

SIZES = {"batch": 4, "channels": 256, "side": 64, "heads": 4}
QUICK = {"batch": 2, "channels": 16, "side": 6, "heads": 4}
# Here rounding decides which tokens see which or on which side of a ReLU a number is, or a gradient is a small rest of
# large ones: they are off by 0.03 to 0.4 in bfloat16, zeros would be off by 1.
ROUGH = {"moba", "mosa", "routing", "threshold_relative", "neural", "rela", "rela_gated", "selective", "single_head"}
TOLERANCE = {"bfloat16": 2e-2, "float16": 4e-3, "float32": 2e-3}


def make(name: str, channels: int, side: int, heads: int) -> nn.Module:
    """The mechanism with its default options, but for the heads."""
    options = with_defaults(name, {}, {"num_heads": heads})
    return create_attention(name, channels, grid_size=(side, side), **options)


def build(name: str, which: str, device: str, batch: int, channels: int, side: int, heads: int) -> Workload:
    torch.manual_seed(0)
    module = make("softmax" if which == "softmax" else name, channels, side, heads).to(device)

    def call(x: Tensor) -> Tensor:
        return module(x, (side, side))

    return Workload(call, list(module.parameters()), module, autocast=True)


def inputs(
    which: str, dtype: torch.dtype, device: str, batch: int, channels: int, side: int, heads: int
) -> tuple[Tensor]:
    return (torch.randn(batch, side * side, channels, device=device).to(dtype).requires_grad_(),)


def multiply_adds(spec: AttentionSpec, tokens: float, channels: float) -> float:
    """What the cost formula of a mechanism says; inside a wrapper is softmax attention, windows and stripes are 7."""

    def inner(N: float, C: float = channels) -> float:
        return 4 * N * C**2 + 2 * N**2 * C

    side = math.sqrt(tokens)
    known = {"N": tokens, "C": channels, "H": side, "W": side, "w": 7, "s": 7, "inner": inner}
    return eval(spec.cost.replace("N=", ""), known)


def growth(spec: AttentionSpec) -> str:
    """How the cost grows with the number of tokens N, where these are many."""
    # One doubling far out, where lower powers are gone.
    power = math.log2(multiply_adds(spec, 2.0**41, 64) / multiply_adds(spec, 2.0**40, 64))
    power = round(2 * power) / 2
    return "constant" if power == 0 else "N" if power == 1 else f"N^{power:g}"


def cost(name: str, batch: int, channels: int, side: int, heads: int) -> Cost:
    """Input, output and weights move once; the arithmetic is what the mechanism declares, and twice that backward."""
    tokens = batch * side**2
    flops = 2 * batch * multiply_adds(attention_spec(name), side**2, channels)
    with torch.device("meta"):
        weights = 4 * sum(p.numel() for p in make(name, channels, side, heads).parameters())
    moved = tokens * channels * HALF
    return Cost(2 * moved + weights, flops, 3 * moved + 2 * weights, 2 * flops)


for name in list_attentions():
    spec = attention_spec(name)
    register(
        FunctionCase(
            f"attention_{name}",
            "attention",
            name,
            "",
            SIZES,
            QUICK,
            inputs,
            partial(build, name),
            partial(cost, name),
            (0,),
            "softmax",
            dict.fromkeys(TOLERANCE, 0.5) if name in ROUGH else TOLERANCE,
            {"growth": growth(spec), "forms_map": spec.forms_map},
        )
    )

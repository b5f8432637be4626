"""Where the time of one step of a network goes, and whether the host or the GPU is the limit."""

import re
from collections import defaultdict
from collections.abc import Iterable
from functools import partial

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from tools.bench import machine
from tools.bench.cases import CASES, NetworkCase
from tools.bench.networks import create
from tools.bench.run import Options
from tools.bench.run_network import NOT_OF_PASS, build_inference, build_training
from tools.bench.timing import measure

# Group -> names of kernels (GPU) or operators (CPU) that belong to it; the first that matches counts.
GROUPS = (
    ("change of layout", r"nchwToNhwc|nhwcToNchw|nchw_to_nhwc|nhwc_to_nchw|convertTensor"),
    ("ours", r"zoo::|context_broadcast|focused_linear_attention|halo_attention|lambda_attention"),
    ("depthwise convolution", r"depthwise|dwconv|conv2d_c1_k1|grouped_direct"),
    ("attention of torch", r"fmha|flash|scaled_dot_product|mem_eff|cutlassF|cutlassB"),
    ("batch norm", r"batch_norm|batchnorm|bn_fw|bn_bw"),
    ("layer norm", r"layer_norm|layernorm|GammaBeta"),
    ("softmax and loss", r"softmax|nll_loss|cross_entropy"),
    ("fused by torch.compile", r"^triton_"),
    ("convolution", r"conv|wgrad|dgrad|implicit|fprop|xmma_.*nhwc|winograd"),
    ("matrix product", r"gemm|gemv|cutlass|nvjet|cublas|aten::(addmm|mm|bmm|linear|matmul|baddbmm)|splitK"),
    ("copy, cast, concatenation", r"copy|Memcpy|Memset|memset|CatArray|aten::(cat|to|contiguous|clone|fill_|zero_)"),
    ("pooling and resizing", r"pool|upsample|interpolate"),
    ("reduction", r"reduce|aten::(sum|mean|norm)"),
    ("pointwise", r"elementwise|pointwise|aten::(add|mul|gelu|relu|silu|hardswish|sub|div)|vectorized"),
)


def group_of(name: str, own: frozenset[str] = frozenset()) -> str:
    """The group of a kernel by its name; `own` are the names of our Triton kernels."""
    if name in own:
        return "ours"
    return next((group for group, pattern in GROUPS if re.search(pattern, name, re.IGNORECASE)), "other")


def own_kernels() -> frozenset[str]:
    """Names of the Triton functions in zoo.kernels, which the profiler shows bare."""
    from tools.bench.machine import ROOT

    # `_compiled` is triton.jit with options, where a file has many.
    pattern = r"@(?:triton\.jit|_compiled)\b[^\n]*\n(?:\s*@[^\n]*\n)*\s*def (\w+)"
    sources = (path.read_text(encoding="utf-8") for path in (ROOT / "zoo" / "kernels").rglob("*.py"))
    return frozenset(name for text in sources for name in re.findall(pattern, text))


def case_of(name: str) -> NetworkCase:
    """The case of that name, or one for a network of timm's registry.

    Raises:
        ValueError: there is neither.
    """
    known = CASES.get(name)
    if isinstance(known, NetworkCase):
        return known
    import timm

    import zoo  # noqa: F401

    if known is not None or not timm.is_model(name):
        networks = ", ".join(case.name for case in CASES.values() if isinstance(case, NetworkCase))
        raise ValueError(f"{name!r} is no network; there are {networks}, and timm's own names")
    size = timm.get_pretrained_cfg(name).input_size[-1]
    return NetworkCase(name, "network", name, partial(create, name, False), name, img_size=size, quick_size=size)


def busy_ms(spans: Iterable[tuple[float, float]]) -> float:
    """Milliseconds covered by spans (start, end) in microseconds, overlaps counted once."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total / 1e3


def collect(step, steps: int, device: str) -> tuple[dict[str, tuple[float, int]], float]:
    """{kernel or operator: (ms, count) a step}, and the ms a step in which the GPU (or the CPU) was busy."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with torch_profile(activities=activities) as watched:
        for _ in range(steps):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
    found: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    spans = []
    for event in watched.events():
        if device == "cuda":
            # Spans of annotations and of whole graphs lie over the kernels in them.
            if event.device_type != DeviceType.CUDA or getattr(event, "is_user_annotation", False):
                continue
            spent = event.time_range.elapsed_us()
            spans.append((event.time_range.start, event.time_range.end))
        else:
            spent = event.self_cpu_time_total
        ms, count = found[event.name]
        found[event.name] = (ms + spent / 1e3 / steps, count + 1)
    if device != "cuda":
        return found, sum(ms for ms, _ in found.values())
    return found, busy_ms(spans) / steps


def profile(name: str, device: str, mode: str, side: str, what: str, quick: bool, top: int) -> int:
    """Prints the groups of kernels of a step, the largest kernels, and which of host and GPU is the limit.

    Args:
        what: the step, "training" or "inference".

    Raises:
        ValueError: there is no such network, or it has no such side or no such mode.
    """
    case = case_of(name)
    if (case.ours if side == "ours" else case.peer) is None:
        raise ValueError(f"{name} has no side {side!r}")
    if (mode, what) in NOT_OF_PASS:
        raise ValueError(f"mode {mode!r} is not one of {what}; take eager or compile")
    options = Options(device, quick)
    print(machine.said(machine.about(device, "")))
    if what == "training":
        _, step, batch, _, _ = build_training(case, side, mode, options, check=False)
    else:
        step, batch, _ = build_inference(case, side, mode, options, check=False)
    wall = measure([step], device, quick).median_ms
    steps = 1 if quick else 5
    found, busy = collect(step, steps, device)
    speed = 1e3 * batch / wall
    print(f"{case.title} ({side}, {mode}), {what}, batch {batch}: {wall:.2f} ms a step, {speed:,.0f} images/s")
    print_groups(found, steps)
    total = sum(ms for ms, _ in found.values())
    print(f"\n{'ms':>9} {'share':>6} {'count':>6}  the {min(top, len(found))} largest")
    for kernel, (ms, count) in sorted(found.items(), key=lambda item: -item[1][0])[:top]:
        print(f"{ms:9.3f} {ms / total:6.1%} {count / steps:6.0f}  {kernel[:120]}")
    if device == "cuda":
        share = busy / wall
        limit = (
            "the GPU is the limit" if share > 0.9 else "the host is the limit: fewer, larger launches or CUDA graphs"
        )
        print(f"\nGPU busy {busy:.2f} of {wall:.2f} ms ({share:.0%}): {limit}")
    else:
        print(f"\nCPU time {busy:.2f} ms a step under the profiler, {wall:.2f} ms of wall clock without it; no GPU")
    return 0


def print_groups(found: dict[str, tuple[float, int]], steps: int) -> None:
    """The table of groups, largest first."""
    own = own_kernels()
    groups: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    for kernel, (ms, count) in found.items():
        group = group_of(kernel, own)
        groups[group] = (groups[group][0] + ms, groups[group][1] + count)
    total = sum(ms for ms, _ in groups.values())
    print(f"\n{'ms':>9} {'share':>6} {'count':>6}  group")
    for group, (ms, count) in sorted(groups.items(), key=lambda item: -item[1][0]):
        print(f"{ms:9.3f} {ms / total:6.1%} {count / steps:6.0f}  {group}")

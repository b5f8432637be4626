"""How long and how much: medians over repeats, peak memory, and the two rates of the device."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median, lowest and highest of `repeats` means over `calls` calls each."""

    median_ms: float
    low_ms: float
    high_ms: float
    repeats: int
    calls: int

    def record(self) -> dict:
        return asdict(self)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def span(call: Callable[[], object], device: str) -> float:
    """Milliseconds of one call, by events on the GPU."""
    if device != "cuda":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    call()
    events[1].record()
    events[1].synchronize()
    return events[0].elapsed_time(events[1])


def measure(calls: Sequence[Callable[[], object]], device: str, quick: bool = False) -> Timing:
    """Times calls that do the same on different data, in turn, so that the data do not sit in the cache."""
    turn = cycle(calls)

    def several(count: int) -> None:
        for _ in range(count):
            next(turn)()

    repeats, group_ms, warm_ms = (3, 1.0, 0.0) if quick else (9, 60.0, 300.0)
    several(1 if quick else 2)
    synchronize(device)
    # Warm until clocks have settled, which also says how many calls fill a group that outlasts the events' grain.
    spent, done, count = 0.0, 0, 1
    while not done or spent < warm_ms:
        spent, done = spent + span(partial(several, count), device), done + count
        count = min(2 * count, 64)
    size = max(1, min(200, round(group_ms * done / max(spent, 1e-6))))
    times = sorted(span(partial(several, size), device) / size for _ in range(repeats))
    return Timing(statistics.median(times), times[0], times[-1], repeats, size)


class Memory:
    """Peak gigabytes allocated on the GPU beyond what was there when this was made; None elsewhere."""

    def __init__(self, device: str):
        self._cuda = device == "cuda"
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._base = torch.cuda.memory_allocated()

    def restart(self) -> None:
        """Forgets the peak so far, not what was there at the start."""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()

    def peak_gb(self) -> float | None:
        if not self._cuda:
            return None
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - self._base) / 1e9


@dataclass(frozen=True)
class Rates:
    """What the device was seen to do at best, in this run: the two rates behind every floor."""

    bytes_per_second: float
    flops_per_second: float
    how: str

    def floor_ms(self, moved: float, flops: float) -> float:
        return 1e3 * max(moved / self.bytes_per_second, flops / self.flops_per_second)


def rates(device: str, quick: bool = False) -> Rates:
    """Times a large copy and a large product of bfloat16 matrices."""
    mib, side = (1024, 8192) if device == "cuda" else (16, 256)
    if quick:
        mib, side = min(mib, 16), min(side, 256)
    source = torch.empty(mib << 20, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copy = measure([lambda: target.copy_(source)], device, quick)
    a, b = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
    product = measure([lambda: a @ b], device, quick)
    return Rates(
        2 * source.numel() / (1e-3 * copy.low_ms),
        2 * side**3 / (1e-3 * product.low_ms),
        f"copy of {mib} MiB (read + written), bfloat16 product of {side} x {side} matrices; best repeat of each",
    )

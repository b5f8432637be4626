"""What every record of tools/anomaly_bench.py says of the machine it was made on."""

import argparse
import os
import platform
import resource
import sys
from pathlib import Path

import torch


def versions() -> dict[str, str]:
    """Of all that a figure hangs on."""
    import timm

    import zoo

    found = {"torch": torch.__version__, "timm": timm.__version__, "attnzoo": zoo.__version__}
    return found | {"python": platform.python_version()}


def hardware(device: str) -> str:
    """Device and number of CPU cores, in words."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if device == "cuda":
        return f"1 x {torch.cuda.get_device_name(0)}, {cores} CPU cores"
    try:
        with open("/proc/cpuinfo") as lines:
            name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {cores} CPU cores, {torch.get_num_threads()} threads"


def public(args: argparse.Namespace, defaults: argparse.Namespace) -> list[str]:
    """The arguments of `run` that say what was measured: in one spelling, without where files lie on this machine."""
    words = ["run", args.config, "--data", "magnetic_tile", "--weights", "efficientnet_lite0_in1k.safetensors"]
    # A list of what is named, not of what is hidden: an abbreviated or an added option that holds a path stays out.
    for name in ("split", "normals", "without", "drawings", "seed", "device", "threads"):
        value = getattr(args, name)
        if value != getattr(defaults, name):
            words += [f"--{name}", str(value)]
    return words


def memory(field: str) -> float:
    """VmRSS (now) or VmHWM (at most) of this process in MB; its peak where the system does not tell them apart."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Not getrusage: there a child starts from the peak of its parent.
        line = next(line for line in status.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6

"""record.json: the facts of a run, gathered once, read by the results table and by people."""

import json
import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from zoo.tasks.plain import plain
from zoo.tasks.seeds import run_seed

# What the record says of the network, where the task knows it.
_HEAD = ("method", "head", "layers", "head_options", "loss")
_NETWORK = (*_HEAD, "backbone", "attn", "attn_options", "backbone_options", "img_size")


def facts_of_run(trainer: Trainer, task: LightningModule) -> dict[str, Any]:
    """What is known without measuring: command, seed, hardware, versions, network."""
    hparams = task.hparams
    data = getattr(trainer, "datamodule", None)
    network = getattr(task, "backbone", task)
    return {
        "command": command_line(),
        "recipe": recipe_of(sys.argv[1:]),
        "seed": run_seed(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(trainer),
        "versions": {name: installed(name) for name in ("torch", "timm", "lightning", "attnzoo")}
        | {"python": platform.python_version()},
        "precision": str(trainer.precision),
        **{name: hparams[name] for name in _NETWORK if name in hparams},
        "patch_size": patch_size(network),
        "parameters": sum(p.numel() for p in network.parameters()),
        "batch_size": plain(data.hparams.get("batch_size")) if data is not None else None,
    }


def command_line() -> str:
    """The command as typed, quoted where a shell needs it."""
    return shlex.join(["zoo", *sys.argv[1:]])


def recipe_of(arguments: list[str]) -> str | None:
    """The last --config of a command line."""
    recipe = None
    for argument, following in pairwise([*arguments, ""]):
        if argument in ("--config", "-c"):
            recipe = following
        elif argument.startswith("--config="):
            recipe = argument.removeprefix("--config=")
    return recipe


def patch_size(backbone: Any) -> int | list[int] | None:
    """Side of a patch where the backbone cuts the image into patches."""
    size = plain(getattr(getattr(backbone, "patch_embed", None), "patch_size", None))
    if isinstance(size, list) and len(set(size)) == 1:
        return size[0]
    return size


def hardware(trainer: Trainer) -> str:
    """Device and number of CPU cores, in words."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if trainer.strategy.root_device.type == "cuda":
        name = torch.cuda.get_device_name(trainer.strategy.root_device)
        return f"{trainer.world_size} x {name}, {cores} CPU cores"
    return f"{_cpu_name()}, {cores} CPU cores"


def installed(distribution: str) -> str | None:
    """Version of an installed distribution; None where it only lies on the path."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        if distribution == "attnzoo":
            import zoo

            return zoo.__version__
        return None


def peak_memory_gb(trainer: Trainer) -> float:
    """Most memory the process had: of the GPU where there is one, else of the host. 1 GB = 1e9 bytes."""
    if trainer.strategy.root_device.type == "cuda":
        return torch.cuda.max_memory_allocated(trainer.strategy.root_device) / 1e9
    try:
        import resource
    except ImportError:
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def write_record(folder: Path, facts: dict[str, Any], add: bool) -> Path:
    """Writes `facts` as folder/record.json, or adds them to it: `zoo test` adds to what `zoo fit` wrote."""
    path = folder / "record.json"
    known = json.loads(path.read_text()) if add and path.is_file() else {}
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(known | facts, indent=1, ensure_ascii=False) + "\n")
    partial.replace(path)
    return path


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()

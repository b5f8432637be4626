"""ONNX export of a trained task, checked against torch before the file gets its name."""

import contextlib
import copy
import errno
import importlib
import io
import logging
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo.errors import UsageError, missing_extra, unknown
from zoo.export.metadata import PREPROCESSING, build_metadata

# The opset that torch's exporter is written in: anything newer goes through a converter and gains nothing here.
OPSET = 18
# float32 has 24 bits, and a deep network in another order of summation keeps about 14 of them; a wrong operator,
# constant or layout costs all of them.
TOLERANCE = 1e-4
# The graph is traced with 2 images: 1 catches a squeezed batch, the others one that was frozen.
BATCH_SIZES = (1, 3, 8)


class ExportError(RuntimeError):
    """The network cannot be exported, or the exported graph computes something else than torch."""


@dataclass(frozen=True)
class ExportResult:
    """A verified file.

    `max_error` is the largest difference of any logit from torch's, `max_relative_error` the same as a part of the
    largest logit (of 1 where the logits are smaller), over `images` images.
    """

    path: Path
    size_bytes: int
    max_error: float
    max_relative_error: float
    images: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.size_bytes / 1e6:.1f} MB, checked on {self.images} images: largest difference from "
            f"torch {self.max_error:.1e} ({self.max_relative_error:.1e} of the largest logit); {self.seconds:.1f} s"
        )


def to_onnx(
    source: str | os.PathLike | nn.Module,
    path: str | os.PathLike,
    *,
    preprocess: Mapping[str, Any] | None = None,
    opset: int = OPSET,
    tolerance: float = TOLERANCE,
    batch_sizes: Sequence[int] = BATCH_SIZES,
) -> ExportResult:
    """Writes one ONNX file: `images` uint8 (batch, C, H, W) -> `logits` float32 (batch, classes), any batch size.

    Normalisation is inside the graph, and the metadata says what running it on pictures takes. The file gets its name
    only after onnxruntime has computed with it what torch computes; on any failure nothing is left behind, and a file
    that was there before stays.

    Args:
        source: a checkpoint of a run, or a task (anything with `inference` and `export_meta`); a task is not changed.
        path: the file to write, ending in .onnx.
        preprocess: crop_pct, crop_mode and interpolation of evaluation; those of the run's data when absent.
        tolerance: allowed difference from torch, as a part of the largest logit.
        batch_sizes: numbers of images to check with.

    Raises:
        UsageError: bad source or path, or the export extra is not installed.
        ExportError: the network cannot be exported, or the graph differs from torch.
        OSError: the file cannot be written to the end.
    """
    start = time.monotonic()
    _need_packages()
    for name in preprocess or {}:
        if name not in PREPROCESSING:
            raise unknown("preprocessing option", name, PREPROCESSING)
    path = Path(path)
    with _partial_file(path) as partial:
        task, data = _resolve(source)
        meta = task.export_meta()
        metadata = build_metadata(meta, data | dict(preprocess or {}))
        task = _separate_copy(task)
        shape = (int(meta["in_chans"]), *(int(side) for side in meta["img_size"]))
        model = _export(_Inference(_fused(task)), shape, metadata, opset)
        check = _Check(_Inference(task), shape, len(meta["class_names"]), tolerance)
        error, relative = check(_serialised(model), batch_sizes)
        model.metadata_props.add(key="zoo.max_relative_error", value=f"{relative:.3e}")
        content = _serialised(model)
        _write(partial, content)
        os.replace(partial, path)
    return ExportResult(path, len(content), error, relative, sum(batch_sizes), time.monotonic() - start)


class _Inference(nn.Module):
    def __init__(self, task: nn.Module):
        super().__init__()
        self.task = task.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.task.inference(images)


def _fused(task: nn.Module) -> nn.Module:
    """The task as it is exported: a backbone that can fold its branches for inference does so, in a copy."""
    if not callable(getattr(getattr(task, "backbone", None), "fuse", None)):
        return task
    task = copy.deepcopy(task)
    task.backbone.fuse()
    return task


def _separate_copy(task: nn.Module) -> nn.Module:
    # A task in a run holds its trainer, and with it the data: copy what computes, share nothing that fusing changes.
    twin = copy.copy(task)
    for name in ("_modules", "_parameters", "_buffers"):
        twin.__dict__[name] = copy.deepcopy(task.__dict__[name])
    for name in ("_trainer", "_fabric"):
        if name in twin.__dict__:
            twin.__dict__[name] = None
    return twin.cpu().float()


def _need_packages() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise missing_extra("export", package) from error


def _resolve(source: str | os.PathLike | nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    if isinstance(source, nn.Module):
        if not hasattr(source, "inference") or not hasattr(source, "export_meta"):
            raise UsageError(
                f"a {type(source).__name__} cannot be exported: give a checkpoint of a run, or a task such as "
                "zoo.tasks.Classification"
            )
        return source, {}
    source = Path(source)
    if source.is_dir():
        best = source / "checkpoints" / "best.ckpt"
        hint = f"; give its checkpoint {best}" if best.is_file() else "; give a checkpoint inside it"
        raise UsageError(f"{source} is a folder{hint}")
    from zoo.tasks import load_task

    return load_task(source)


@contextlib.contextmanager
def _partial_file(path: Path) -> Iterator[Path]:
    """An empty file beside `path` that is gone at the end, whatever happens: a full export takes a while, so a folder
    that cannot be written to is found out before it.
    """
    if path.is_dir() or path.suffix != ".onnx":
        example = path / "model.onnx" if path.is_dir() else path.with_name(path.name + ".onnx")
        raise UsageError(f"{path} is no name for the file: it ends in .onnx, for instance {example}")
    if not path.parent.is_dir():
        raise UsageError(f"the folder {path.parent} does not exist: make it, or choose another")
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.touch()
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise UsageError(f"{path.parent} cannot be written to: {error.strerror}") from error
    try:
        yield partial
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _export(network: nn.Module, shape: tuple[int, ...], metadata: Mapping[str, str], opset: int) -> Any:
    example = torch.zeros(2, *shape, dtype=torch.uint8)
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                network,
                (example,),
                dynamo=True,
                dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
                input_names=["images"],
                output_names=["logits"],
                opset_version=opset,
                verbose=False,
            )
        model = program.model_proto
    except Exception as error:  # the exporter, torch.export and the protobuf writer each have errors of their own
        raise ExportError(f"the network cannot be exported to ONNX: {_short(error)}") from error
    _forget_origins(model.graph)
    for function in model.functions:
        _forget_origins(function)
    del model.metadata_props[:]
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    return model


def _serialised(model: Any) -> bytes:
    try:
        return model.SerializeToString(deterministic=True)
    except ValueError as error:
        raise ExportError("the network is larger than the 2 GB that one ONNX file can hold") from error


def _forget_origins(graph: Any) -> None:
    # The exporter notes for every node where in the source it came from: paths of this machine, and much text.
    for field in ("input", "output", "value_info", "initializer", "node"):
        for item in getattr(graph, field, ()):
            if not isinstance(item, str):
                del item.metadata_props[:]
                item.doc_string = ""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _forget_origins(attribute.g)
    del graph.metadata_props[:]


@dataclass(frozen=True)
class _Check:
    """Compares an exported graph with the network in torch, both on the CPU."""

    network: nn.Module
    shape: tuple[int, ...]
    classes: int
    tolerance: float

    def __call__(self, content: bytes, batch_sizes: Sequence[int]) -> tuple[float, float]:
        """Largest error, and largest error relative to the logits; raises ExportError where the two disagree."""
        import onnx
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        try:
            onnx.checker.check_model(content, full_check=True)
            session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # neither package gives its exceptions a base of its own
            raise ExportError(f"onnxruntime cannot open the exported graph: {_short(error)}") from error
        found = [self._compare(session, batch, seed) for seed, batch in enumerate(batch_sizes)]
        return max(error for error, _ in found), max(relative for _, relative in found)

    def _compare(self, session: Any, batch: int, seed: int) -> tuple[float, float]:
        images = check_images(batch, self.shape, seed)
        with torch.inference_mode():
            expected = self.network(torch.from_numpy(images)).numpy()
        if not np.isfinite(expected).all():
            raise ExportError("the network itself gives NaN or infinite logits: its weights are damaged")
        try:
            (actual,) = session.run(None, {"images": images})
        except Exception as error:
            raise ExportError(f"the exported graph fails on a batch of {batch}: {_short(error)}") from error
        if not expected.shape == actual.shape == (batch, self.classes):
            raise ExportError(
                f"a batch of {batch} gives {actual.shape} from the exported graph and {expected.shape} from torch, "
                f"where {(batch, self.classes)} is expected"
            )
        difference = float(np.abs(actual - expected).max())
        relative = difference / max(float(np.abs(expected).max()), 1.0)
        if not relative <= self.tolerance:
            raise ExportError(
                f"onnxruntime and torch differ by {difference:.2e} on a batch of {batch}, which is {relative:.1e} of "
                f"the largest logit and more than the {self.tolerance:.0e} allowed; no file was written"
            )
        return difference, relative


def check_images(batch: int, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Images uint8 (batch, C, H, W): noise, black, white, a slope and a grid by turns, the same for the same seed."""
    channels, height, width = shape
    rows, columns = np.mgrid[:height, :width]
    patterns = [
        None,
        (rows * 255 // max(height - 1, 1) + columns) % 256,
        ((rows // 4 + columns // 4) % 2) * 255,
        np.zeros((height, width)),
        np.full((height, width), 255),
    ]
    images = np.random.default_rng(seed).integers(0, 256, (batch, *shape), dtype=np.uint8)
    for index in range(batch):
        pattern = patterns[(index + seed) % len(patterns)]
        if pattern is not None:
            images[index] = np.stack([np.roll(pattern, 3 * channel, axis=1) for channel in range(channels)])
    return images


def _write(partial: Path, content: bytes) -> None:
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, f"the model could not be written ({error.strerror})", str(partial.parent)) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter's progress, tips and deprecation warnings off the terminal."""
    names = [name for name in logging.root.manager.loggerDict if name.split(".")[0] in ("torch", "onnxscript")]
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx", "torch.export", *names)]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _short(error: Exception) -> str:
    """The innermost cause in one line: the exporter wraps it in pages of advice to its developers."""
    while error.__cause__ is not None:
        error = error.__cause__  # type: ignore[assignment]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__

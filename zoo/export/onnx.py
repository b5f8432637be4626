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

import torch
from torch import nn

from zoo.errors import UsageError, missing_extra, unknown
from zoo.export.check import Check, ExportError, short
from zoo.export.graphs import Graph, graph_of, threshold_of
from zoo.export.half import Loss, halve, measure
from zoo.export.metadata import PREPROCESSING, build_metadata
from zoo.export.same import translations, with_same_padding

__all__ = ["OPSET", "TOLERANCE", "ExportError", "ExportResult", "to_onnx"]

# The opset that torch's exporter is written in: anything newer goes through a converter and gains nothing here.
OPSET = 18
# float32 has 24 bits, and a deep network in another order of summation keeps about 14 of them; a wrong operator,
# constant or layout costs all of them.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class ExportResult:
    """A verified file.

    `max_error` is the largest difference of any output from torch's, `max_relative_error` the same as a part of the
    largest logit (of 1 where the logits are smaller) or map value (of the threshold where that is larger), over
    `images` images. Both are of the graph before its weights became `half`, whose cost is `loss`.
    """

    path: Path
    size_bytes: int
    max_error: float
    max_relative_error: float
    images: int
    seconds: float
    unit: str = "logit"
    loss: Loss | None = None

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.size_bytes / 1e6:.1f} MB, checked on {self.images} images: largest difference from "
            f"torch {self.max_error:.1e} ({self.max_relative_error:.1e} of the largest {self.unit}); "
            f"{self.seconds:.1f} s" + (f"\n{self.loss}" if self.loss else "")
        )


def to_onnx(
    source: str | os.PathLike | nn.Module,
    path: str | os.PathLike,
    *,
    preprocess: Mapping[str, Any] | None = None,
    opset: int = OPSET,
    tolerance: float = TOLERANCE,
    batch_sizes: Sequence[int] | None = None,
    half: bool = False,
) -> ExportResult:
    """Writes one ONNX file of `images` uint8 (batch, C, H, W), any batch size.

    Classification: `logits` float32 (batch, classes), of images at the model's own size. Anomaly detection: `score`
    float32 (batch,) and `map` float32 (batch, 1, H, W), of images of any size. Segmentation: `logits` float32
    (batch, classes, H, W), of images of any size where the encoder takes any, else of its own; windows, which larger
    images are looked at through, are the business of the program that runs the file.

    Normalisation is inside the graph, and the metadata says what running it on pictures takes. The file gets its name
    only after onnxruntime has computed with it what torch computes; on any failure nothing is left behind, and a file
    that was there before stays.

    Args:
        source: a checkpoint of a run, or a task (anything with `inference` and `export_meta`); a task is not changed.
        path: the file to write, ending in .onnx.
        preprocess: crop_pct, crop_mode and interpolation of evaluation; those of the run's data when absent.
            Classification only.
        tolerance: allowed difference from torch, as a part of the largest logit or map value.
        batch_sizes: numbers of images to check with, at each of two image sizes where any size will do.
        half: store weights as 16-bit numbers, and measure what that costs. Anomaly detection only.

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
        graph = graph_of(meta, data)
        _refuse_options_of_others(graph, preprocess, half)
        metadata = build_metadata(meta, data | dict(preprocess or {}))
        task = _separate_copy(task)
        traced = with_same_padding(_fused(task)) if 2 in graph.free else _fused(task)
        model = _export(graph.network(traced), graph, metadata, opset)
        network, cases = graph.network(task), graph.cases(batch_sizes)
        error, relative = Check(network, graph, tolerance)(_serialised(model), cases)
        model.metadata_props.add(key="zoo.max_relative_error", value=f"{relative:.3e}")
        loss = None
        if half:
            halve(model)
            loss = measure(_serialised(model), network, data, graph.shape, threshold_of(meta))
            model.metadata_props.add(key="zoo.half_loss", value=loss.as_json())
        content = _serialised(model)
        _write(partial, content)
        os.replace(partial, path)
    images = sum(case[0] for case in cases)
    return ExportResult(path, len(content), error, relative, images, time.monotonic() - start, graph.unit, loss)


def _refuse_options_of_others(graph: Graph, preprocess: Mapping[str, Any] | None, half: bool) -> None:
    if graph.task == "anomaly_detection" and preprocess:
        raise UsageError("preprocess: an anomaly detector resizes inside its graph; leave these options away")
    if graph.task == "segmentation" and preprocess:
        raise UsageError("preprocess: segmentation takes images as they are; leave these options away")
    if graph.task != "anomaly_detection" and half:
        raise UsageError("half: 16-bit weights are for anomaly detection; export this model without them")


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
        # A task in a run: what its data did to images belongs to it, as in the run's checkpoints.
        data = getattr(getattr(source, "_trainer", None), "datamodule", None)
        return source, dict(getattr(data, "hparams", {}))
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


def _export(network: nn.Module, graph: Graph, metadata: Mapping[str, str], opset: int) -> Any:
    free = {dimension: torch.export.Dim(name, min=1) for dimension, name in graph.free.items()}
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                network,
                (graph.example(),),
                dynamo=True,
                dynamic_shapes={"images": free},
                input_names=["images"],
                output_names=list(graph.outputs),
                opset_version=opset,
                custom_translation_table=translations(),
                verbose=False,
            )
        model = program.model_proto
    except Exception as error:  # the exporter, torch.export and the protobuf writer each have errors of their own
        raise ExportError(f"the network cannot be exported to ONNX: {short(error)}") from error
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

"""The check of an exported graph: onnxruntime computes with it what torch computes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from zoo.export.graphs import Graph

# Share of pixels whose two largest logits may be so close that rounding decides.
OTHER_CLASS = 1e-4


class ExportError(RuntimeError):
    """The network cannot be exported, or the exported graph computes something else than torch."""


@dataclass(frozen=True)
class Check:
    """Compares an exported graph with the network in torch, both on the CPU."""

    network: nn.Module
    graph: Graph
    tolerance: float

    def __call__(self, content: bytes, cases: Sequence[tuple[int, ...]]) -> tuple[float, float]:
        """Largest error, and largest error relative to the outputs; raises ExportError where the two disagree."""
        import onnx

        try:
            onnx.checker.check_model(content, full_check=True)
        except Exception as error:  # onnx gives its exceptions no base of their own
            raise ExportError(f"the exported graph is no valid ONNX: {short(error)}") from error
        session = open_session(content)
        found = [self._compare(session, case, seed) for seed, case in enumerate(cases)]
        return max(error for error, _ in found), max(relative for _, relative in found)

    def _compare(self, session: Any, case: tuple[int, ...], seed: int) -> tuple[float, float]:
        images = check_images(case[0], case[1:], seed)
        expected = outputs_of(self.network, images)
        if not all(np.isfinite(values).all() for values in expected):
            kind = "maps" if self.graph.task == "anomaly_detection" else "logits"
            raise ExportError(f"the network itself gives NaN or infinite {kind}: its weights are damaged")
        place = f"a batch of {case[0]}" + (f" of {case[3]}x{case[2]} pixels" if 2 in self.graph.free else "")
        try:
            actual = session.run(None, {"images": images})
        except Exception as error:
            raise ExportError(f"the exported graph fails on {place}: {short(error)}") from error
        wanted = self.graph.shapes(case)
        if not [value.shape for value in expected] == [value.shape for value in actual] == wanted:
            raise ExportError(
                f"{place} gives {[value.shape for value in actual]} from the exported graph and "
                f"{[value.shape for value in expected]} from torch, where {wanted} is expected"
            )
        pairs = [self._error(*pair) for pair in zip(actual, expected, strict=True)]
        difference, relative = max(error for error, _ in pairs), max(part for _, part in pairs)
        if not relative <= self.tolerance:
            raise ExportError(
                f"onnxruntime and torch differ by {difference:.2e} on {place}, which is {relative:.1e} of the largest "
                f"{self.graph.unit} and more than the {self.tolerance:.0e} allowed; no file was written"
            )
        if self.graph.task == "segmentation":
            self._compare_classes(actual[0], expected[0], place)
        return difference, relative

    def _compare_classes(self, actual: np.ndarray, expected: np.ndarray, place: str) -> None:
        # Only where the two largest logits are as close as the error may the class be another.
        others = actual.argmax(1) != expected.argmax(1)
        if others.mean() > OTHER_CLASS:
            raise ExportError(
                f"onnxruntime and torch name different classes in {int(others.sum())} of {others.size} pixels of "
                f"{place}, more than the {OTHER_CLASS:.2%} allowed; no file was written"
            )

    def _error(self, actual: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
        difference = float(np.abs(actual - expected).max())
        return difference, difference / max(float(np.abs(expected).max()), self.graph.floor, 1e-12)


def open_session(content: bytes) -> Any:
    """An onnxruntime session of a serialised graph, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exceptions share no base
        raise ExportError(f"onnxruntime cannot open the exported graph: {short(error)}") from error


def outputs_of(network: nn.Module, images: np.ndarray, device: torch.device | str = "cpu") -> list[np.ndarray]:
    """The outputs of a network that gives one Tensor or several, as torch computes them on a device."""
    with torch.inference_mode():
        found = network(torch.from_numpy(images).to(device))
    return [value.cpu().numpy() for value in ([found] if isinstance(found, torch.Tensor) else found)]


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


def short(error: BaseException) -> str:
    """The innermost cause in one line: the exporter wraps it in pages of advice to its developers."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__

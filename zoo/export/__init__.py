"""Export of trained tasks to one verified ONNX file, and the program that runs it without torch."""

import importlib

# Loaded on first use: reading what a file says takes neither torch's exporter nor onnx.
_PUBLIC = {
    "ExportError": "onnx",
    "ExportResult": "onnx",
    "to_onnx": "onnx",
    "bundle": "bundling",
    "Predictor": "predictor",
    "PredictorError": "predictor",
}
__all__ = ["ExportError", "ExportResult", "Predictor", "PredictorError", "bundle", "to_onnx"]


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"zoo.export.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'zoo.export' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *_PUBLIC})

"""`zoo predict`: names images with an exported model or a checkpoint, through the program that a bundle holds too."""

from pathlib import Path
from typing import Any

from zoo.commands.runs import find_checkpoint


def run(command: str, arguments: list[str]) -> int:
    """Runs `zoo predict`; returns the exit status."""
    from zoo.commands.quiet import quiet
    from zoo.export import predictor

    quiet()
    return predictor.main(arguments, open_model=_open, prog=f"zoo {command}")


def _open(model: str) -> Any:
    """The predictor of an .onnx file, of a checkpoint, or of a run by its name or folder."""
    if Path(model).suffix == ".onnx":
        from zoo.export.predictor import Predictor

        return Predictor(model)
    from zoo.export.checkpoint import open_model

    return open_model(find_checkpoint(model))

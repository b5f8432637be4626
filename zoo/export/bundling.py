"""A folder with all that running an exported model takes: nothing of zoo or torch."""

import contextlib
import errno
import os
import shutil
from pathlib import Path

from zoo.errors import UsageError
from zoo.export import predictor

REQUIREMENTS = """\
numpy>=1.26        # runs on every Python that predictor.py runs on
pillow>=10.0       # Image.Resampling as an enumeration by name
onnxruntime>=1.20  # numpy 2
"""
README = """\
{name}: an image model with its weights, and the one program that runs it.

    pip install -r requirements.txt
    python predictor.py {name} IMAGES_OR_FOLDERS... --out results

The first line is needed once. The second {does}
`python predictor.py --help` lists the options.
In Python: from predictor import Predictor; Predictor("{name}").predict(["a.jpg", "b.png"])
"""
DOES = {
    "classification": "prints the most probable classes of each image and writes\nresults/predictions.csv.",
    "anomaly_detection": "says of each image whether it is good or defect, writes\n"
    "results/predictions.csv, and a picture of where the defects are into results/heatmaps.",
    "segmentation": "names the class of every pixel: writes results/predictions.csv with the\n"
    "share of each class, masks of class numbers into results/masks, and pictures into results/overlays.",
}


def bundle(onnx_path: str | os.PathLike, directory: str | os.PathLike) -> Path:
    """Fills a folder with the model, under its own name, predictor.py, requirements.txt and README.txt.

    The folder is made when it is absent; files of these names in it are replaced, others stay. Returns the folder.

    Raises:
        UsageError: `onnx_path` is no exported model, or the folder cannot be written to.
        OSError: the disk is full.
    """
    onnx_path, directory = Path(onnx_path), Path(directory)
    try:
        does = DOES[predictor.Predictor(onnx_path).task]
    except predictor.PredictorError as error:
        raise UsageError(str(error)) from error
    name = onnx_path.name
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _place(directory / name, onnx_path)
        _place(directory / "predictor.py", Path(predictor.__file__))
        for file, text in (("requirements.txt", REQUIREMENTS), ("README.txt", README.format(name=name, does=does))):
            (directory / file).write_text(text, encoding="utf-8")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UsageError(f"{directory} cannot be filled: {error.strerror or error}") from error
    return directory


def _place(target: Path, source: Path) -> None:
    if target.exists() and target.samefile(source):
        return
    partial = target.with_name(f".{target.name}.part")
    try:
        shutil.copyfile(source, partial)
        os.replace(partial, target)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()

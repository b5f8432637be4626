"""Runs a model that `zoo export` made: python predictor.py model.onnx IMAGES_OR_FOLDERS...

One self-contained file: it needs numpy, pillow and onnxruntime, and neither zoo nor torch.
"""

import argparse
import contextlib
import csv
import difflib
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

FORMAT = 1  # of the metadata; a higher one in a file means that this program is older than the file
EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm")
ORIENTATION = 0x0112  # the EXIF tag
ROWS = 50  # a longer table is cut on the terminal when the CSV file holds all of it


class PredictorError(ValueError):
    """Bad input; the message is complete on its own."""


@dataclass(frozen=True)
class Prediction:
    """The most probable class of one image, and the `top` ones, best first, as (label, probability)."""

    label: str
    probability: float
    top: tuple[tuple[str, float], ...]


class ClassificationOutput:
    """What the outputs of a classification model mean, and how they are shown."""

    def __init__(self, metadata: dict[str, str]):
        self.class_names: list[str] = json.loads(metadata["zoo.class_names"])

    def results(self, outputs: Sequence[np.ndarray], top: int) -> list[Prediction]:
        """Of logits (B, classes)."""
        logits = outputs[0].astype(np.float64)
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = powers / powers.sum(axis=1, keepdims=True)
        results = []
        for row in probabilities:
            best = np.argsort(-row, kind="stable")[: max(top, 1)]
            pairs = tuple((self.class_names[i], float(row[i])) for i in best)
            results.append(Prediction(*pairs[0], pairs))
        return results

    def columns(self, top: int) -> list[str]:
        """Of the CSV file, after the path."""
        numbers = range(2, min(top, len(self.class_names)) + 1)
        return ["label", "probability", *(f"{name}_{n}" for n in numbers for name in ("label", "probability"))]

    def cells(self, result: Prediction) -> list[str]:
        """The values under `columns`."""
        return [cell for label, probability in result.top for cell in (label, f"{probability:.6f}")]

    def text(self, result: Prediction) -> str:
        """The line of one image on the terminal."""
        width = min(max(map(len, self.class_names)), 30)
        others = ", ".join(f"{label} {probability:.1%}" for label, probability in result.top[1:])
        return f"{result.label:<{width}}  {result.probability:6.1%}" + (f"  ({others})" if others else "")


TASKS = {"classification": ClassificationOutput}


class Predictor:
    """A model with everything it takes to run it on pictures.

    Args:
        model_path: a file that `zoo export` made.
        providers: onnxruntime's execution providers, best first; CUDA where it is installed, else the CPU.

    Raises:
        PredictorError: no such file, no ONNX file of ours, or one that this program is too old for.
    """

    def __init__(self, model_path: str | os.PathLike, providers: Sequence[str] | None = None):
        self.metadata, self._run = self._open(Path(model_path), providers)
        try:
            if int(self.metadata["zoo.format"]) > FORMAT:
                raise PredictorError(
                    f"{model_path} has format {self.metadata['zoo.format']}, but this predictor.py reads up to "
                    f"{FORMAT}: use the predictor.py that was exported with the model, or a newer one"
                )
            self.task = self.metadata["zoo.task"]
            if self.task not in TASKS:
                raise PredictorError(f"{model_path} is for the task {self.task!r}; known here: {', '.join(TASKS)}")
            self.output = TASKS[self.task](self.metadata)
            height, width = json.loads(self.metadata["zoo.img_size"])
            self.img_size = (int(height), int(width))
            self.in_chans = int(self.metadata["zoo.in_chans"])
            self.crop_pct = float(self.metadata["zoo.crop_pct"])
            self.crop_mode = self.metadata["zoo.crop_mode"]
            self.resample = Image.Resampling[self.metadata["zoo.interpolation"].upper()]
            self.fill = tuple(json.loads(self.metadata["zoo.border_fill"]))
        except PredictorError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise PredictorError(
                f"{model_path} is not a model that `zoo export` made: its metadata lacks or garbles {error}"
            ) from error
        if self.in_chans not in (1, 3):
            raise PredictorError(f"{model_path} takes images of {self.in_chans} channels; pictures have 1 or 3")

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of the logits."""
        return list(self.output.class_names)

    def _open(self, path: Path, providers: Sequence[str] | None) -> tuple[dict[str, str], Callable]:
        """The metadata, and the function from uint8 (B, C, H, W) to the list of outputs."""
        if not path.is_file():
            raise PredictorError(f"there is no model file at {path}")
        try:
            import onnxruntime
        except ImportError as error:
            raise PredictorError("this needs onnxruntime: pip install onnxruntime (zoo: attnzoo[export])") from error
        available = onnxruntime.get_available_providers()
        if providers is None:
            providers = [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in available]
        for name in providers:
            if name not in available:
                raise PredictorError(f"onnxruntime has no provider {name!r} here; it has {', '.join(available)}")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # warnings about its own optimisations are of no use to a person
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
        except Exception as error:  # onnxruntime's own exceptions share no base
            reason = " ".join(str(error).split())[:200]
            raise PredictorError(f"{path} is no ONNX file that onnxruntime can open: {reason}") from error
        name = session.get_inputs()[0].name
        return session.get_modelmeta().custom_metadata_map, lambda batch: session.run(None, {name: batch})

    def preprocess(self, image: Any) -> np.ndarray:
        """Pixels, uint8 (C, H, W), as the model's validation saw them.

        Args:
            image: a path, a PIL image, or an array uint8 (H, W) or (H, W, 1, 3 or 4).
        """
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image)
        if isinstance(image, Image.Image):
            return self._fit(upright(image, self.in_chans))
        with Image.open(image) as opened:
            return self._fit(upright(opened, self.in_chans))

    def _fit(self, image: Image.Image) -> np.ndarray:
        # The same arithmetic and rounding as timm's evaluation transform, to the bit.
        scaled = [math.floor(side / self.crop_pct) for side in self.img_size]
        sides = (image.height, image.width)
        if self.crop_mode == "squash":
            size = scaled
        elif self.crop_mode == "center" and scaled[0] == scaled[1]:
            longer = int(scaled[0] * max(sides) / min(sides))
            size = [scaled[0], longer] if image.height <= image.width else [longer, scaled[0]]
        else:
            choose = max if self.crop_mode == "border" else min
            ratio = choose(side / target for side, target in zip(sides, scaled, strict=True))
            size = [max(round(side / ratio), 1) for side in sides]
        if size[0] * size[1] > 2 * (Image.MAX_IMAGE_PIXELS or math.inf):
            raise ValueError(f"{image.width}x{image.height} is too long and thin to be resized")
        if tuple(size) != sides:
            image = image.resize((size[1], size[0]), self.resample)
        image = centre(image, self.img_size, self.fill if self.crop_mode == "border" else None)
        pixels = np.asarray(image, dtype=np.uint8)
        return np.ascontiguousarray(np.moveaxis(pixels, 2, 0) if pixels.ndim == 3 else pixels[None])

    def run(self, batch: np.ndarray) -> list[np.ndarray]:
        """The model's raw outputs of preprocessed pixels, uint8 (B, C, H, W)."""
        try:
            return self._run(batch)
        except Exception as error:  # onnxruntime's own exceptions share no base
            raise RuntimeError(f"the model failed on a batch of shape {batch.shape}: {error}") from error

    def predict(self, images: Any, top: int = 5, batch_size: int = 32) -> list[Prediction]:
        """One result per image, in order.

        Args:
            images: one image, or a sequence of them, each as `preprocess` takes it.

        Raises:
            PredictorError: an image cannot be read.
        """
        if isinstance(images, (str, os.PathLike, Image.Image, np.ndarray)):
            images = [images]
        results = []
        for image, result in self.stream(images, top, batch_size):
            if isinstance(result, Exception):
                raise PredictorError(f"{image} cannot be read: {reason_of(result)}") from result
            results.append(result)
        return results

    def stream(self, images: Iterable[Any], top: int = 5, batch_size: int = 32) -> Iterator[tuple[Any, Any]]:
        """Pairs (image, result) in order; an image that cannot be read has the exception as its result.

        Threads decode ahead of the model, a few batches at most, so memory stays small however many images there are.
        """
        for group in _groups(self._decoded(images, 2 * batch_size), batch_size):
            batch = [pixels for _, pixels in group if not isinstance(pixels, Exception)]
            results = iter(self.output.results(self.run(np.stack(batch)), top) if batch else ())
            for image, pixels in group:
                yield image, pixels if isinstance(pixels, Exception) else next(results)

    def _decoded(self, images: Iterable[Any], ahead: int) -> Iterator[tuple[Any, Any]]:
        pool = ThreadPoolExecutor(min(os.cpu_count() or 1, 16))
        waiting: deque = deque()
        try:
            for image in images:
                waiting.append((image, pool.submit(self._attempt, image)))
                if len(waiting) > ahead:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _attempt(self, image: Any) -> np.ndarray | Exception:
        try:
            return self.preprocess(image)
        except Exception as error:  # damaged files surface as OSError, SyntaxError, ValueError, struct.error, ...
            return error

    def accuracy(self, folder: str | os.PathLike, batch_size: int = 32) -> "Accuracy":
        """Top-1 and top-5 accuracy over a folder of class folders.

        Raises:
            PredictorError: a folder is named like none of the classes, or no image can be read.
        """
        counted = Accuracy()
        images = labelled(find_images([folder]), self.class_names)
        for path, result in self.stream(images, 5, batch_size):
            counted.add(images[path], result)
        counted.check()
        return counted


@dataclass
class Accuracy:
    """Counts of images, of those whose class was the first or among the first five guesses, and of unreadable ones."""

    images: int = 0
    first: int = 0
    among_five: int = 0
    skipped: int = 0

    def add(self, target: str, result: Any) -> None:
        if isinstance(result, Exception):
            self.skipped += 1
            return
        self.images += 1
        self.first += result.label == target
        self.among_five += target in [label for label, _ in result.top[:5]]

    def check(self) -> None:
        if not self.images:
            raise PredictorError(f"none of the {self.skipped} images can be read")

    @property
    def top1(self) -> float:
        return self.first / self.images

    @property
    def top5(self) -> float:
        return self.among_five / self.images


def upright(image: Image.Image, in_chans: int) -> Image.Image:
    """As RGB (or grey, for in_chans 1) and turned as its EXIF orientation asks; transparency is dropped."""
    try:
        turned = image.getexif().get(ORIENTATION, 1) != 1
    except Exception:  # garbled EXIF surfaces as SyntaxError, struct.error, ...; the picture itself may be fine
        turned = False
    if turned:
        image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        # The high byte, which is what PIL keeps of 16-bit colour; its own conversion of 16-bit grey clips at 255.
        image = Image.fromarray((np.clip(np.asarray(image), 0, 65535) >> 8).astype(np.uint8))
    return image.convert("L" if in_chans == 1 else "RGB")


def centre(image: Image.Image, size: tuple[int, int], fill: tuple[int, ...] | None) -> Image.Image:
    """The middle (height, width) of an image, padded with black, or `fill`, where it is too small."""
    height, width = size
    if width > image.width or height > image.height:
        canvas = (max(width, image.width), max(height, image.height))
        colour = fill or (0,) * len(image.getbands())
        padded = Image.new(image.mode, canvas, colour if len(colour) > 1 else colour[0])
        padded.paste(image, ((canvas[0] - image.width) // 2, (canvas[1] - image.height) // 2))
        image = padded
    top, left = round((image.height - height) / 2), round((image.width - width) / 2)
    return image.crop((left, top, left + width, top + height))


def find_images(places: Iterable[str | os.PathLike]) -> list[Path]:
    """Files as given, and the images in folders and their subfolders, by name.

    Raises:
        PredictorError: a place does not exist, or there is no image at all.
    """
    found = []
    for place in map(Path, places):
        if place.is_dir():
            files = (path for path in place.rglob("*") if path.suffix.lower() in EXTENSIONS)
            inside = sorted(path for path in files if not path.name.startswith(".") and path.is_file())
            if not inside:
                raise PredictorError(f"there is no image in {place} (looked for {' '.join(EXTENSIONS)})")
            found += inside
        elif place.is_file():
            found.append(place)
        else:
            raise PredictorError(f"there is no image or folder at {place}")
    return found


def labelled(paths: Iterable[Path], class_names: Sequence[str]) -> dict[Path, str]:
    """The class of each image: the name of the folder it lies in.

    Raises:
        PredictorError: a folder is named like none of the classes.
    """
    known = set(class_names)
    for path in paths:
        name = path.parent.name
        if name not in known:
            close = difflib.get_close_matches(name, class_names, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise PredictorError(
                f"{path.parent} is named like no class of the model.{hint} "
                f"With --labels images lie in one folder per class: {', '.join(list(class_names)[:10])}"
                + (", ..." if len(class_names) > 10 else "")
            )
    return {path: path.parent.name for path in paths}


def reason_of(error: Exception) -> str:
    """One line about why an image could not be read."""
    if type(error).__name__ == "UnidentifiedImageError":
        return "it is no image that Pillow knows"
    return " ".join(str(error).split())[:200] or type(error).__name__


def _groups(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    group = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


class Progress:
    """Says on stderr how far a long run has come: in place on a terminal, elsewhere one line every half minute."""

    def __init__(self, total: int):
        self.total, self.done, self.start = total, 0, time.monotonic()
        self.live = sys.stderr.isatty()
        self.next = self.start + (0.5 if self.live else 30.0)

    def step(self) -> None:
        self.done += 1
        now = time.monotonic()
        if now >= self.next:
            self.next = now + (0.2 if self.live else 30.0)
            line = f"{self.done:,} of {self.total:,} images, {self.done / (now - self.start):,.0f} images/s"
            print(f"\r{line}\033[K" if self.live else line, end="" if self.live else "\n", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line of its own on stderr, clear of the progress line."""
        print(f"\r\033[K{text}" if self.live else text, file=sys.stderr)

    def end(self, skipped: int) -> None:
        rate = self.done / max(time.monotonic() - self.start, 1e-9)
        lost = f", {skipped} skipped because they could not be read" if skipped else ""
        self.say(f"{self.done:,} images, {rate:,.0f} images/s{lost}")


@contextlib.contextmanager
def _table(folder: str | None, header: list[str]) -> Iterator[Callable[[list[str]], None]]:
    """A writer of rows into FOLDER/predictions.csv, which appears when it is complete."""
    if folder is None:
        yield lambda row: None
        return
    target = Path(folder) / "predictions.csv"
    partial = target.with_name(f".{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # A path may hold bytes that are no UTF-8; they go into the file as they came.
        file = open(partial, "w", encoding="utf-8", errors="surrogateescape", newline="")  # noqa: SIM115
    except OSError as error:
        raise PredictorError(f"{folder} cannot be written to: {error.strerror or error}") from error
    try:
        with file:
            writer = csv.writer(file)
            writer.writerow(header)
            yield writer.writerow
        os.replace(partial, target)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def _command(arguments: argparse.Namespace, predictor: Predictor) -> None:
    paths = find_images(arguments.images)
    targets = labelled(paths, predictor.class_names) if arguments.labels else {}
    counted, progress, skipped = Accuracy(), Progress(len(paths)), 0
    width = min(max(len(str(path)) for path in paths), 60)
    rows = 0 if arguments.labels else ROWS if arguments.out else len(paths)
    header = ["path", *predictor.output.columns(arguments.top), *(["target"] if targets else [])]
    with _table(arguments.out, header) as write:
        for number, (path, result) in enumerate(
            predictor.stream(paths, max(arguments.top, 5 if targets else 1), arguments.batch)
        ):
            progress.step()
            if targets:
                counted.add(targets[path], result)
            if isinstance(result, Exception):
                skipped += 1
                progress.say(f"skipped {path}: {reason_of(result)}")
                continue
            cells = predictor.output.cells(result)[: len(header) - 1 - bool(targets)]
            write([str(path), *cells, *([targets[path]] if targets else [])])
            if number < rows:
                print(f"{path!s:<{width}}  {predictor.output.text(result)}", flush=True)
        if skipped == len(paths):
            raise PredictorError(f"none of the {len(paths)} images can be read")
    if 0 < rows < len(paths):
        print(f"... and {len(paths) - rows:,} more")
    progress.end(skipped)
    if targets:
        print(f"top-1 {counted.top1:.2%}  ({counted.first} of {counted.images})")
        if len(predictor.class_names) > 5:
            print(f"top-5 {counted.top5:.2%}  ({counted.among_five} of {counted.images})")
    if arguments.out:
        print(f"written: {Path(arguments.out) / 'predictions.csv'}")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def main(
    argv: Sequence[str] | None = None,
    open_model: Callable[[str], Predictor] = Predictor,
    prog: str | None = None,
) -> int:
    """The command line; returns the exit status: 0 done (with skips too), 2 bad input, 1 failure while running."""
    parser = argparse.ArgumentParser(prog, description="Runs a model that `zoo export` made on images.")
    parser.add_argument("model", help="the exported model")
    parser.add_argument("images", nargs="+", help="image files, and folders that are searched for images")
    parser.add_argument("--out", metavar="DIR", help="write predictions.csv into this folder")
    parser.add_argument("--top", type=_positive, default=5, metavar="K", help="classes per image (default 5)")
    parser.add_argument("--batch", type=_positive, default=32, metavar="N", help="images at a time (default 32)")
    parser.add_argument("--labels", action="store_true", help="images lie in one folder per class: print the accuracy")
    try:
        arguments = parser.parse_args(argv)
        _command(arguments, open_model(arguments.model))
    except SystemExit as end:  # argparse has said what is wrong, or printed its help
        return int(end.code or 0)
    except PredictorError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader, `head` for instance, has seen enough; Python would complain once more while it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 1
    except (OSError, MemoryError, RuntimeError) as error:
        print(f"error: {error or type(error).__name__}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.exit(main())

"""Runs a model that `zoo export` made: python predictor.py model.onnx IMAGES_OR_FOLDERS...

One self-contained file, to be copied beside a model: it needs numpy, pillow and onnxruntime, and neither zoo nor
torch. That is why it is longer than the other files of this project and imports nothing of them.
"""

import argparse
import contextlib
import csv
import difflib
import itertools
import json
import math
import os
import sys
import time
from collections import Counter, deque
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
INNER = 1 << 19  # pixels at a time at a detector's own size: a bank's distances take a hundred times their memory
LOGITS = 1 << 24  # at a time, pixels x classes of a segmentation: what its layers make takes ten times their memory
WINDOW = 512  # side of the windows that an image too large for that is looked at through
PIXELS = 1 << 22  # at a time, of images or tiles of any size: what the model makes of more would not fit everywhere


class PredictorError(ValueError):
    """Bad input; the message is complete on its own."""


@dataclass(frozen=True)
class Prediction:
    """The most probable class of one image, and the `top` ones, best first, as (label, probability)."""

    label: str
    probability: float
    top: tuple[tuple[str, float], ...]


class Classification:
    """How a classification model is run on pictures, what its outputs mean, and how they are shown."""

    def __init__(self, metadata: dict[str, str]):
        height, width = json.loads(metadata["zoo.img_size"])
        self.img_size = (int(height), int(width))
        self.class_names: list[str] = json.loads(metadata["zoo.class_names"])
        self.crop_pct = float(metadata["zoo.crop_pct"])
        self.crop_mode = metadata["zoo.crop_mode"]
        self.resample = Image.Resampling[metadata["zoo.interpolation"].upper()]
        self.fill = tuple(json.loads(metadata["zoo.border_fill"]))

    def fit(self, image: Image.Image) -> np.ndarray:
        """Pixels, uint8 (C, *img_size), of an upright image."""
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
        return _planes(centre(image, self.img_size, self.fill if self.crop_mode == "border" else None))

    def answers(self, batch: list[np.ndarray], run: Callable, top: int, batch_size: int) -> Iterator[Prediction]:
        """One result per image of `fit`; `run` is the model."""
        return iter(self.results(run(np.stack(batch)), top))

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


def _planes(image: Image.Image) -> np.ndarray:
    """uint8 (C, H, W)."""
    pixels = np.asarray(image, dtype=np.uint8)
    return np.ascontiguousarray(np.moveaxis(pixels, 2, 0) if pixels.ndim == 3 else pixels[None])


@dataclass(frozen=True)
class Inspection:
    """What an anomaly detector says about one image.

    Attributes:
        score: of the whole image; comparable with `threshold` alone.
        label: "defect" where the score is above the threshold, else "good".
        area: share of the image whose map is above the threshold of pixels, 0 to 1.
        map: float32 (H, W), higher where the image is less like the good ones.
        pixels: the image, uint8 (C, H, W).
    """

    score: float
    label: str
    area: float
    map: np.ndarray
    pixels: np.ndarray
    threshold: float
    pixel_threshold: float

    def overlay(self) -> Image.Image:
        """The image with its map in colours: none far below the threshold, yellow around it, red from twice it on;
        what lies above it has a white outline.
        """
        photo = Image.fromarray(np.moveaxis(np.broadcast_to(self.pixels, (3, *self.map.shape)), 0, 2).copy())
        scale = 127.5 / max(abs(self.pixel_threshold), 1e-12)
        # One byte per pixel and tables from there on: a photo of 100 million pixels stays a few hundred megabytes.
        level = np.clip(self.map * np.float32(scale), 0, 255).astype(np.uint8)
        mixed = Image.composite(Image.fromarray(_COLOURS[level]), photo, Image.fromarray(_OPACITY[level]))
        # A line of one pixel would not be seen in a large photo that is shown small.
        edge = outline(self.map > self.pixel_threshold, max(1, min(self.map.shape) // 400))
        mixed.paste((255, 255, 255), mask=Image.fromarray(edge))
        return mixed


def _colours() -> tuple[np.ndarray, np.ndarray]:
    """Colour uint8 (256, 3) and opacity uint8 (256,) of a map's levels; the threshold is at 127.5."""
    levels = np.arange(256)
    stops, colours = (
        (0, 64, 128, 192, 255),
        ((20, 30, 140), (0, 150, 190), (250, 220, 40), (250, 110, 20), (200, 0, 20)),
    )
    mixed = np.stack([np.interp(levels, stops, channel) for channel in zip(*colours, strict=True)], axis=1)
    return mixed.round().astype(np.uint8), np.interp(levels, (48, 128, 255), (0, 120, 170)).round().astype(np.uint8)


_COLOURS, _OPACITY = _colours()


def outline(inside: np.ndarray, width: int = 1) -> np.ndarray:
    """Uint8 (H, W): 255 on the outermost `width` pixels of a bool (H, W) region, along the edge of the image too, but
    nowhere when the region is all of it.
    """
    if inside.all():
        return np.zeros(inside.shape, np.uint8)
    core = inside
    for _ in range(width):
        framed = np.pad(core, 1)
        core = core & framed[:-2, 1:-1] & framed[2:, 1:-1] & framed[1:-1, :-2] & framed[1:-1, 2:]
    return (inside & ~core).astype(np.uint8) * 255


class AnomalyDetection:
    """How an anomaly detector is run on pictures of any size, what its outputs mean, and how they are shown."""

    class_names = ("good", "defect")
    folders = ("heatmaps",)
    made = "heat maps"

    def __init__(self, metadata: dict[str, str]):
        height, width = json.loads(metadata["zoo.img_size"])
        self.img_size = (int(height), int(width))
        self.threshold = float(metadata["zoo.threshold"])
        self.pixel_threshold = float(metadata["zoo.pixel_threshold"])
        self.tile: int | None = None
        self.overlap = 0
        tile, overlap = json.loads(metadata["zoo.tile"]), json.loads(metadata["zoo.tile_overlap"])
        if tile is not None:
            self.use_tiles(int(tile), overlap)

    def use_tiles(self, tile: int | None, overlap: int | None = None) -> None:
        """Looks at overlapping square tiles from now on, and no longer at whole images.

        The model sees each tile at its own input size, so its threshold holds for tiles of the size it was trained on.

        Args:
            tile: side in pixels; the present one when absent.
            overlap: pixels that neighbours share at least; a quarter of the tile when absent.

        Raises:
            PredictorError: no such tiling.
        """
        tile = self.tile if tile is None else tile
        if tile is None or tile < 2:
            raise PredictorError(f"a tile of {tile} pixels: tiles have at least 2 (--tile N)")
        overlap = tile // 4 if overlap is None else int(overlap)
        if not 0 <= overlap <= tile // 2:
            raise PredictorError(f"an overlap of {overlap} pixels: tiles of {tile} share 0 to {tile // 2}")
        self.tile, self.overlap = tile, overlap

    def fit(self, image: Image.Image) -> np.ndarray:
        """Pixels, uint8 (C, H, W), of an upright image at its own size."""
        return _planes(image)

    def answers(self, batch: list[np.ndarray], run: Callable, top: int, batch_size: int) -> Iterator[Inspection]:
        """One result per image of `fit`, in order; images of one size in a row go through the model together."""
        if self.tile is not None:
            for image in batch:
                yield self._inspection(image, *self._tiled(image, run, batch_size))
            return
        while batch:
            same = _of_one_shape(batch[: self._at_once(batch_size, batch[0][0].size)])
            batch = batch[len(same) :]
            scores, maps = run(np.stack(same))
            for image, score, anomaly_map in zip(same, scores, maps, strict=True):
                yield self._inspection(image, float(score), anomaly_map[0])

    def _at_once(self, batch_size: int, pixels: int) -> int:
        return max(1, min(batch_size, PIXELS // pixels, INNER // math.prod(self.img_size)))

    def _inspection(self, image: np.ndarray, score: float, anomaly_map: np.ndarray) -> Inspection:
        area = float((anomaly_map > self.pixel_threshold).mean())
        label = "defect" if score > self.threshold else "good"
        return Inspection(score, label, area, anomaly_map, image, self.threshold, self.pixel_threshold)

    def _tiled(self, image: np.ndarray, run: Callable, batch_size: int) -> tuple[float, np.ndarray]:
        """The largest score of any tile, and the tiles' maps, blended where they overlap."""
        tile = self.tile or 0
        height, width = image.shape[1:]
        # An image smaller than a tile is continued by its edge, so that its texture keeps the scale the model knows.
        grown = ((0, 0), (0, max(tile - height, 0)), (0, max(tile - width, 0)))
        image = np.pad(image, grown, mode="edge") if max(grown[1][1], grown[2][1]) else image
        places = [
            (top, left)
            for top in tile_starts(image.shape[1], tile, self.overlap)
            for left in tile_starts(image.shape[2], tile, self.overlap)
        ]
        ramp = tile_ramp(tile, self.overlap)
        window = ramp[:, None] * ramp
        total, weight = np.zeros(image.shape[1:], np.float32), np.zeros(image.shape[1:], np.float32)
        best = -math.inf
        step = self._at_once(batch_size, tile**2)
        for first in range(0, len(places), step):
            some = places[first : first + step]
            scores, maps = run(np.stack([image[:, y : y + tile, x : x + tile] for y, x in some]))
            best = max(best, float(scores.max()))
            for (y, x), anomaly_map in zip(some, maps, strict=True):
                total[y : y + tile, x : x + tile] += window * anomaly_map[0]
                weight[y : y + tile, x : x + tile] += window
        total /= weight
        return best, total[:height, :width]

    def pictures(self, result: Inspection) -> tuple[Image.Image, ...]:
        """One for each of `folders`."""
        return (result.overlay(),)

    def columns(self) -> list[str]:
        """Of the CSV file, after the path."""
        return ["score", "label", "area"]

    def cells(self, result: Inspection) -> list[str]:
        """The values under `columns`."""
        return [f"{result.score:.6g}", result.label, f"{result.area:.6f}"]

    def text(self, result: Inspection) -> str:
        """The line of one image on the terminal."""
        return f"{result.label:<6}  score {result.score:<10.5g}  {result.area:6.2%} of the area"


def _of_one_shape(images: list[np.ndarray]) -> list[np.ndarray]:
    return list(itertools.takewhile(lambda image: image.shape == images[0].shape, images))


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """First pixels of tiles that cover a length, evenly spread; neighbours share `overlap` pixels or more."""
    if length <= tile:
        return [0]
    count = math.ceil((length - overlap) / (tile - overlap))
    return [round(index * (length - tile) / (count - 1)) for index in range(count)]


def tile_ramp(tile: int, overlap: int) -> np.ndarray:
    """Weight float32 (tile,) of a tile's pixels: 1 in the middle, falling over the overlap towards both ends."""
    to_the_end = np.minimum(np.arange(tile) + 0.5, tile - np.arange(tile) - 0.5)
    return np.minimum(to_the_end / max(overlap, 1), 1.0).astype(np.float32)


@dataclass(frozen=True)
class Segments:
    """What a segmentation model says about one image.

    Attributes:
        classes: (H, W), class numbers: uint8, or uint16 where there are more than 256 classes.
        shares: of the image's pixels, 0 to 1, for each class.
        palette: a colour (red, green, blue) for each class.
        pixels: the image, uint8 (C, H, W).
    """

    classes: np.ndarray
    shares: tuple[float, ...]
    palette: np.ndarray
    pixels: np.ndarray

    def mask(self) -> Image.Image:
        """Class numbers as a picture: with the colours of the classes as its palette where 8 bits are enough."""
        picture = Image.fromarray(self.classes)
        if self.classes.dtype == np.uint8:
            picture.putpalette(self.palette.tobytes())
        return picture

    def overlay(self) -> Image.Image:
        """The image with the colours of the classes laid over it by half."""
        photo = np.moveaxis(np.broadcast_to(self.pixels, (3, *self.classes.shape)), 0, 2)
        return Image.blend(Image.fromarray(photo.copy()), Image.fromarray(self.palette[self.classes]), 0.5)


class Segmentation:
    """How a segmentation model is run on pictures of any size, what its outputs mean, and how they are shown."""

    folders = ("masks", "overlays")
    made = "masks and overlays"

    def __init__(self, metadata: dict[str, str]):
        height, width = json.loads(metadata["zoo.img_size"])
        self.img_size = (int(height), int(width))
        self.class_names: list[str] = json.loads(metadata["zoo.class_names"])
        self.palette = np.array(json.loads(metadata["zoo.palette"]), np.uint8).reshape(len(self.class_names), 3)
        self.any_size = bool(json.loads(metadata["zoo.any_size"]))
        window = json.loads(metadata["zoo.window"])
        self.window = (int(window[0]), int(window[1])) if window else None
        self.overlap = int(json.loads(metadata["zoo.window_overlap"]) or 0)
        self.eval_size = json.loads(metadata["zoo.eval_size"])

    def use_tiles(self, tile: int | None, overlap: int | None = None) -> None:
        """Looks through windows of so many pixels from now on, or with another overlap.

        Raises:
            PredictorError: no such windows.
        """
        window = self.window if tile is None else (tile, tile)
        if window is None:
            raise PredictorError("an overlap without windows: give their side too (--tile N)")
        if not self.any_size and window != self.img_size:
            height, width = self.img_size
            raise PredictorError(
                f"windows of {tile} pixels: this model takes {height} x {width} alone; leave --tile out"
            )
        overlap = min(window) // 4 if overlap is None else overlap
        if min(window) < 2 or not 0 <= overlap <= min(window) // 2:
            raise PredictorError(f"windows of {min(window)} pixels have at least 2 and share 0 to {min(window) // 2}")
        self.window, self.overlap = window, overlap

    def fit(self, image: Image.Image) -> np.ndarray:
        """Pixels, uint8 (C, H, W), of an upright image at its own size."""
        return _planes(image)

    def answers(self, batch: list[np.ndarray], run: Callable, top: int, batch_size: int) -> Iterator[Segments]:
        """One result per image of `fit`, in order; images of one size in a row go through the model together."""
        while batch:
            seen = [self._resized(image) for image in batch]
            pixels = seen[0][0].size
            if self.window is not None or pixels > 1 << 20 or pixels * len(self.class_names) > LOGITS:
                yield self._segments(self._by_windows(seen[0], run, batch_size), batch[0])
                batch = batch[1:]
                continue
            same = _of_one_shape(seen[: max(1, min(batch_size, LOGITS // (pixels * len(self.class_names))))])
            for image, logits in zip(batch, run(np.stack(same))[0], strict=False):
                yield self._segments(logits.argmax(0), image)
            batch = batch[len(same) :]

    def _resized(self, image: np.ndarray) -> np.ndarray:
        if self.eval_size is None or list(image.shape[1:]) == self.eval_size:
            return image
        height, width = self.eval_size
        picture = Image.fromarray(np.moveaxis(image, 0, 2) if len(image) == 3 else image[0])
        return _planes(picture.resize((width, height), Image.Resampling.BILINEAR))

    def _segments(self, classes: np.ndarray, image: np.ndarray) -> Segments:
        if classes.shape != image.shape[1:]:
            rows, columns = (
                np.minimum(((np.arange(to) + 0.5) * (of / to)).astype(np.int64), of - 1)
                for to, of in zip(image.shape[1:], classes.shape, strict=True)
            )
            classes = classes[rows[:, None], columns]
        counts = np.bincount(classes.ravel(), minlength=len(self.class_names))
        kind = np.uint8 if len(self.class_names) <= 256 else np.uint16
        return Segments(classes.astype(kind), tuple((counts / classes.size).tolist()), self.palette, image)

    def _by_windows(self, image: np.ndarray, run: Callable, batch_size: int) -> np.ndarray:
        """Classes (H, W): the largest weighted sum of the logits of all windows there, held for one row of them."""
        size = image.shape[1:]
        if self.window is not None:
            (height, width), overlap = self.window, self.overlap
        else:
            # Nothing is continued that the model takes as it is: an image of many classes may well be smaller.
            (height, width), overlap = (min(WINDOW, side) for side in size), WINDOW // 4
        # An image smaller than a window is continued by its edge.
        image = np.pad(image, ((0, 0), (0, max(height - size[0], 0)), (0, max(width - size[1], 0))), mode="edge")
        weights = tile_ramp(height, overlap)[:, None] * tile_ramp(width, overlap)
        tops, lefts = tile_starts(image.shape[1], height, overlap), tile_starts(image.shape[2], width, overlap)
        at_once = max(1, min(batch_size, LOGITS // (height * width * len(self.class_names) * 4)))
        found = np.empty(image.shape[1:], np.uint16)
        band = np.zeros((len(self.class_names), height, image.shape[2]), np.float32)
        for top, below in zip(tops, [*tops[1:], tops[-1] + height], strict=True):
            for first in range(0, len(lefts), at_once):
                some = lefts[first : first + at_once]
                (logits,) = run(np.stack([image[:, top : top + height, x : x + width] for x in some]))
                for x, values in zip(some, logits, strict=True):
                    band[:, :, x : x + width] += weights * values
            done = below - top
            found[top:below] = band[:, :done].argmax(0)
            band[:, : height - done] = band[:, done:].copy()
            band[:, height - done :] = 0
        return found[: size[0], : size[1]]

    def pictures(self, result: Segments) -> tuple[Image.Image, ...]:
        """One for each of `folders`."""
        return result.mask(), result.overlay()

    def columns(self) -> list[str]:
        """Of the CSV file, after the path: the classes."""
        return list(self.class_names)

    def cells(self, result: Segments) -> list[str]:
        """The values under `columns`: shares of the image."""
        return [f"{share:.6f}" for share in result.shares]

    def text(self, result: Segments) -> str:
        """The line of one image on the terminal: its largest classes."""
        largest = sorted(range(len(result.shares)), key=lambda n: -result.shares[n])[:5]
        return ", ".join(f"{self.class_names[n]} {result.shares[n]:.1%}" for n in largest if result.shares[n])


TASKS: dict[str, type] = {
    "classification": Classification,
    "anomaly_detection": AnomalyDetection,
    "segmentation": Segmentation,
}


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
            self.img_size: tuple[int, int] = self.output.img_size
            if isinstance(self.output, Classification):
                self.crop_pct, self.crop_mode = self.output.crop_pct, self.output.crop_mode
                self.resample = self.output.resample
            self.in_chans = int(self.metadata["zoo.in_chans"])
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
        """Names of the classes, in the order of their numbers; good and defect of an anomaly detector."""
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
        """Pixels, uint8 (C, H, W), as the model's validation saw them; of an anomaly detector the image's own.

        Args:
            image: a path, a PIL image, or an array uint8 (H, W) or (H, W, 1, 3 or 4).
        """
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image)
        if isinstance(image, Image.Image):
            return self.output.fit(upright(image, self.in_chans))
        with Image.open(image) as opened:
            return self.output.fit(upright(opened, self.in_chans))

    def run(self, batch: np.ndarray) -> list[np.ndarray]:
        """The model's raw outputs of preprocessed pixels, uint8 (B, C, H, W)."""
        try:
            return self._run(batch)
        except Exception as error:  # onnxruntime's own exceptions share no base
            raise RuntimeError(f"the model failed on a batch of shape {batch.shape}: {error}") from error

    def predict(self, images: Any, top: int = 5, batch_size: int = 32) -> list[Any]:
        """One result per image, in order: a Prediction with the `top` classes, an Inspection, or Segments.

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

        Threads decode ahead of the model, a few batches at most and fewer of large images, so memory stays small
        however many images there are.
        """
        for group in _groups(self._decoded(images, 2 * batch_size), batch_size):
            batch = [pixels for _, pixels in group if not isinstance(pixels, Exception)]
            results = self.output.answers(batch, self.run, top, batch_size) if batch else iter(())
            for image, pixels in group:
                yield image, pixels if isinstance(pixels, Exception) else next(results)

    def _decoded(self, images: Iterable[Any], most: int) -> Iterator[tuple[Any, Any]]:
        workers = min(os.cpu_count() or 1, 16)
        pool = ThreadPoolExecutor(workers)
        waiting: deque = deque()
        ahead = min(workers, most)  # until the first images say how large they are
        try:
            for image in images:
                waiting.append((image, pool.submit(self._attempt, image)))
                while len(waiting) > ahead:
                    first, future = waiting.popleft()
                    pixels = future.result()
                    if not isinstance(pixels, Exception):
                        ahead = max(1, min(most, 2 * PIXELS // max(pixels[0].size, 1)))
                    yield first, pixels
                    del pixels
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
        if self.task != "classification":
            raise PredictorError(f"a model of the task {self.task!r} has no classes to count the accuracy of")
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
    if image.mode == "F":
        # PIL's own conversion would clip what lies outside 0 to 255, so that pictures of 0 to 1 became black.
        raise ValueError("its pixels are floating-point numbers; save it with 8 or 16 bits")
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


def _groups(items: Iterable[tuple[Any, Any]], size: int) -> Iterator[list[Any]]:
    """Of up to `size` pairs (image, pixels or exception), fewer where the images are large."""
    group, pixels = [], 0
    for item in items:
        group.append(item)
        pixels += 0 if isinstance(item[1], Exception) else item[1][0].size
        if len(group) == size or pixels >= PIXELS:
            yield group
            group, pixels = [], 0
    if group:
        yield group


class Progress:
    """Says on stderr how far a long run has come: in place on a terminal, elsewhere one line every half minute."""

    def __init__(self, total: int):
        self.total, self.done, self.skipped, self.start = total, 0, 0, time.monotonic()
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

    def end(self) -> None:
        rate = self.done / max(time.monotonic() - self.start, 1e-9)
        lost = f", {self.skipped} skipped because they could not be read" if self.skipped else ""
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


def _results(
    arguments: argparse.Namespace, predictor: Predictor, paths: Sequence[Path], progress: Progress, top: int
) -> Iterator[tuple[Path, Any]]:
    """Pairs (path, result) of the images that can be read; says which cannot.

    Raises:
        PredictorError: none can.
    """
    for path, result in predictor.stream(paths, top, arguments.batch):
        progress.step()
        if isinstance(result, Exception):
            progress.skipped += 1
            progress.say(f"skipped {path}: {reason_of(result)}")
        yield path, result
    if progress.skipped == len(paths):
        raise PredictorError(f"none of the {len(paths)} images can be read")


def _refuse(arguments: argparse.Namespace, names: Iterable[str], kind: str) -> None:
    # Not by truth: an overlap of 0 was given too.
    given = [f"--{n}" for n in names if (value := getattr(arguments, n)) is not None and value is not False]
    if given:
        raise PredictorError(f"{' and '.join(given)}: only for models of {kind}, which {arguments.model} is not")


def _classify(arguments: argparse.Namespace, predictor: Predictor) -> None:
    _refuse(arguments, ("tile", "overlap"), "defects or segmentation")
    top = arguments.top or 5
    paths = find_images(arguments.images)
    targets = labelled(paths, predictor.class_names) if arguments.labels else {}
    counted, progress = Accuracy(), Progress(len(paths))
    width = min(max(len(str(path)) for path in paths), 60)
    rows = 0 if arguments.labels else ROWS if arguments.out else len(paths)
    header = ["path", *predictor.output.columns(top), *(["target"] if targets else [])]
    with _table(arguments.out, header) as write:
        results = _results(arguments, predictor, paths, progress, max(top, 5 if targets else 1))
        for number, (path, result) in enumerate(results):
            if targets:
                counted.add(targets[path], result)
            if isinstance(result, Exception):
                continue
            cells = predictor.output.cells(result)[: len(header) - 1 - bool(targets)]
            write([str(path), *cells, *([targets[path]] if targets else [])])
            if number < rows:
                print(f"{path!s:<{width}}  {predictor.output.text(result)}", flush=True)
    if 0 < rows < len(paths):
        print(f"... and {len(paths) - rows:,} more")
    progress.end()
    if targets:
        print(f"top-1 {counted.top1:.2%}  ({counted.first} of {counted.images})")
        if len(predictor.class_names) > 5:
            print(f"top-5 {counted.top5:.2%}  ({counted.among_five} of {counted.images})")
    if arguments.out:
        print(f"written: {Path(arguments.out) / 'predictions.csv'}")


def _inspect(arguments: argparse.Namespace, predictor: Predictor) -> None:
    _refuse(arguments, ("top", "labels"), "classes")
    output = predictor.output
    if arguments.tile is not None or arguments.overlap is not None:
        output.use_tiles(arguments.tile, arguments.overlap)
    paths = find_images(arguments.images)
    progress, seen = Progress(len(paths)), Counter[str]()
    width = min(max(len(str(path)) for path in paths), 60)
    rows = ROWS if arguments.out else len(paths)
    folders = [Path(arguments.out) / name for name in output.folders] if arguments.out else []
    names = picture_names(paths)
    with _table(arguments.out, ["path", *output.columns()]) as write:
        for number, (path, result) in enumerate(_results(arguments, predictor, paths, progress, 1)):
            if isinstance(result, Exception):
                continue
            seen[getattr(result, "label", "")] += 1
            for folder, picture in zip(folders, output.pictures(result) if folders else (), strict=True):
                _save(picture, folder / names[path])
            write([str(path), *output.cells(result)])
            if number < rows:
                print(f"{path!s:<{width}}  {output.text(result)}", flush=True)
    if 0 < rows < len(paths):
        print(f"... and {len(paths) - rows:,} more")
    progress.end()
    if predictor.task == "anomaly_detection":
        print(f"{seen['defect']:,} defect, {seen['good']:,} good; the threshold is {output.threshold:.6g}")
    if folders:
        where = " and ".join(map(str, folders))
        print(f"written: {Path(arguments.out) / 'predictions.csv'} and {seen.total():,} {output.made} in {where}")


def picture_names(paths: Sequence[Path]) -> dict[Path, Path]:
    """A name of its own, ending in .png, for the heat map of each image, in the images' own subfolders."""
    parents = [str(path.absolute().parent) for path in paths]
    try:
        base = Path(os.path.commonpath(parents))
    except ValueError:  # images on different drives
        base = Path()
    found: dict[Path, Path] = {}
    taken: set[Path] = set()
    for path, parent in zip(paths, parents, strict=True):
        inside = Path(os.path.relpath(parent, base)) if base.parts else Path()
        name = inside / f"{path.stem}.png"
        count = 2
        while name in taken:
            name = inside / f"{path.name}.png" if count == 2 else inside / f"{path.name}.{count}.png"
            count += 1
        taken.add(name)
        found[path] = name
    return found


def _save(image: Image.Image, path: Path) -> None:
    partial = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(partial, format="PNG", compress_level=3)  # a little larger than at 6, in half the time
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def _whole(text: str) -> int:
    return 0 if text == "0" else _positive(text)


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
    parser.add_argument(
        "--out", metavar="DIR", help="write predictions.csv, and heat maps, or masks and overlays, into this folder"
    )
    parser.add_argument("--batch", type=_positive, default=32, metavar="N", help="images at a time (default 32)")
    classes = parser.add_argument_group("models of classes")
    classes.add_argument("--top", type=_positive, metavar="K", help="classes per image (default 5)")
    classes.add_argument("--labels", action="store_true", help="images lie in one folder per class: print the accuracy")
    tiles = parser.add_argument_group("models of defects and of segmentation")
    tiles.add_argument("--tile", type=_positive, metavar="N", help="look at tiles of N pixels, not at whole images")
    tiles.add_argument("--overlap", type=_whole, metavar="N", help="pixels that tiles share (default a quarter)")
    try:
        arguments = parser.parse_args(argv)
        predictor = open_model(arguments.model)
        (_classify if predictor.task == "classification" else _inspect)(arguments, predictor)
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

"""Segmentation data: images with a class for every pixel, from folders, cropped and changed the same way everywhere."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from zoo.data.augmentation import SceneAugmentation
from zoo.data.holdout import hold_out
from zoo.data.labelled import check_reading, leave_out
from zoo.data.masks import size_of
from zoo.data.sampler import EpochSampler
from zoo.data.segmentation_classes import ClassList, make_classes, read_classes, read_lines, read_values
from zoo.data.segmentation_images import KEPT_BYTES, Pixels, SceneLoader, Scenes, count_classes
from zoo.data.segmentation_layouts import LAYOUTS, Found, Scene, open_scenes
from zoo.data.sources import resolve_root
from zoo.errors import UsageError, unknown

_DEFAULT_SHARE = 0.1
_PEEK = 32  # masks that are looked at before a run starts
_AUGMENT = ("hflip", "vflip", "rotate", "brightness", "contrast", "saturation", "hue")
WEIGHTS = ("median", "inverse")


class Segmentation(LightningDataModule):
    """Images and, for each, a mask with the class of every pixel.

    Batches are {"image": uint8 (B, C, H, W), "mask": int64 (B, H, W) with `ignore_index` where there is no class,
    "path": list of str}. In training they are crops of one size. In validation and test they are whole images, a batch
    of them where all of a split have one size, else one by one. Everything random is a function of (seed, epoch,
    index), whatever the number of workers.

    Args:
        root: a folder in one of the layouts of data/README.md, or `samples:segmentation`.
        layout: splits, kinds, flat, voc, or auto to see from the folders.
        classes: lines `NAME`, `NAME = VALUE` or `NAME = RED GREEN BLUE`, or a text file of them; when absent
            classes.txt in `root`. `ignore = VALUE` is for pixels without a class.
        ignore_index: value of pixels without a class in mask files, and in what comes out.
        first_value: value of the first class in mask files, where lines do not say it; smaller ones are no class.
        in_chans: 3, or 1 for grey.
        crop_size: side, or (height, width), of the training crops.
        eval_size: side, or (height, width), that images and masks of validation and test are resized to; None leaves
            them as they are.
        batch_size, num_workers: of a process.
        val_split: share of train held out for validation, the same for every seed, near copies together; when absent,
            the dataset's own validation images, else a tenth.
        seed: of order and augmentation.
        on_error: "skip" leaves unreadable images out and counts them in `skipped`, "raise" stops at the first.
        preload: keep decoded images in memory, up to 4 GiB.
        scale: smallest and largest factor of a training image's size, before it is cropped.
        hflip, vflip: how often training images are flipped.
        rotate: training images are turned by up to so many degrees.
        brightness, contrast, saturation: of training images change by up to this fraction.
        hue: of training images changes by up to this share of the circle of colours.

    Attributes:
        skipped: why each image was left out that could not be read.
        blank: paths of the images met so far of which no pixel has a class; a loss has nothing to learn from them.

    Raises:
        UsageError: an option is out of its range, or (when first asked for) the data is not as described.
    """

    def __init__(
        self,
        root: str = "",
        layout: str = "auto",
        classes: list[str] | str | None = None,
        ignore_index: int = 255,
        first_value: int = 0,
        in_chans: int = 3,
        crop_size: int | tuple[int, int] = 256,
        eval_size: int | tuple[int, int] | None = None,
        batch_size: int = 8,
        num_workers: int = 2,
        val_split: float | None = None,
        seed: int = 0,
        on_error: str = "skip",
        preload: bool = False,
        scale: tuple[float, float] = (1.0, 1.0),
        hflip: float = 0.0,
        vflip: float = 0.0,
        rotate: float = 0.0,
        brightness: float = 0.0,
        contrast: float = 0.0,
        saturation: float = 0.0,
        hue: float = 0.0,
    ):
        super().__init__()
        self.save_hyperparameters(logger=False)
        _check(self.hparams)
        self.skipped: dict[str, str] = {}
        self.blank: set[str] = set()
        self._found: Found | None = None
        self._classes: ClassList | None = None
        self._parts: dict[str, list[Scene]] | None = None
        self._kept: dict[str, dict[int, Pixels]] = {}
        self._room = KEPT_BYTES

    @property
    def class_names(self) -> list[str]:
        """Names of the classes in the order of their numbers."""
        return self._class_list().names

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    @property
    def palette(self) -> list[tuple[int, int, int]]:
        """A colour (red, green, blue) for each class: that of the masks, or one that differs from the others."""
        return self._class_list().palette

    @property
    def ignore_index(self) -> int:
        """What stands for no class in batches."""
        return self.hparams.ignore_index

    @property
    def in_chans(self) -> int:
        """Channels of the images."""
        return self.hparams.in_chans

    @property
    def has_test(self) -> bool:
        """Whether there are images with masks to test on."""
        return "test" in self._open().splits

    def check(self) -> None:
        """Looks at the folders, the classes and some of the masks.

        Raises:
            UsageError: the data is not as described.
        """
        classes = self._class_list()
        seen: set[int] = set()
        for split, scenes in self._split().items():
            for scene in scenes[:: max(1, len(scenes) // _PEEK)]:
                try:
                    labels = np.unique(read_classes(scene.mask, scene.path, size_of(scene.path), classes))
                except UsageError:
                    raise
                except Exception:  # damaged: reading reports it
                    continue
                if split == "train":
                    seen.update(labels.tolist())
        present = seen - {classes.void}
        if classes.void in seen and len(classes.names) > 1 and len(present) < 2:
            what = f"only {classes.names[present.pop()]!r}" if present else "no class"
            raise UsageError(
                f"the masks hold {what}, and pixels that are ignored. If {self.ignore_index} stands for a class, write "
                f"'NAME = {self.ignore_index}' for it into classes.txt or --data.classes"
            )

    def class_weights(self, kind: str = "median") -> list[float]:
        """A weight for each class, counted from all masks of train, with n_c its pixels among n that have a class.

        "inverse" gives n / (K n_c) for the K classes that occur. "median" gives median(f) / f_c, where f_c is n_c
        divided by the pixels of the images that show the class (Eigen and Fergus 2015). A class that
        does not occur gets 0.

        Raises:
            UsageError: an unknown kind, or no pixel has a class.
        """
        if kind not in WEIGHTS:
            raise unknown("kind of class weights", kind, WEIGHTS)
        pixels, around = count_classes(self._split()["train"], self._class_list())
        there = pixels > 0
        if not there.any():
            raise UsageError("no pixel of the training masks has a class")
        if not there.all():
            missing = [name for name, known in zip(self.class_names, there, strict=True) if not known]
            rank_zero_warn(f"the training masks show no pixel of {', '.join(missing[:10])}: their weight is 0")
        share = pixels[there] / around[there]
        weights = np.zeros(len(pixels))
        weights[there] = np.median(share) / share if kind == "median" else pixels.sum() / (there.sum() * pixels[there])
        return weights.tolist()

    def train_dataloader(self) -> DataLoader:
        hparams, classes = self.hparams, self._class_list()
        options = {name: hparams[name] for name in _AUGMENT}
        augment = SceneAugmentation(_pair(hparams.crop_size), hparams.in_chans, classes.void, hparams.scale, **options)
        scenes = self._scenes("train", hparams.seed, augment)
        sampler = EpochSampler(len(scenes), hparams.seed, True, *self._place())
        full = len(sampler) >= hparams.batch_size
        if not full:
            rank_zero_warn(f"batch_size={hparams.batch_size} is more than the {len(sampler)} images to train on")
        # A last batch of one image has no statistics for a batch norm over a map of one pixel.
        return self._loader(scenes, sampler, hparams.batch_size, drop_last=full)

    def val_dataloader(self) -> DataLoader:
        return self._judged("val")

    def test_dataloader(self) -> DataLoader:
        if not self.has_test:
            raise UsageError("there are no images with masks to test on; add test/images and test/masks beside train")
        return self._judged("test")

    def predict_dataloader(self) -> DataLoader:
        return self._judged("test" if self.has_test else "val")

    def _open(self) -> Found:
        if self._found is None:
            root = resolve_root(self.hparams.root, "train/images and train/masks, or images and masks")
            self._found = open_scenes(root, self.hparams.layout)
        return self._found

    def _class_list(self) -> ClassList:
        if self._classes is None:
            hparams, found = self.hparams, self._open()
            lines, where = hparams.classes, "--data.classes"
            path = Path(resolve_root(hparams.root)) / "classes.txt"
            if isinstance(lines, str):
                path = Path(lines).expanduser()
                lines, where = read_lines(path), str(path)
            elif lines is None and path.is_file():
                lines, where = read_lines(path), str(path)
            elif lines is None and found.class_lines is not None:
                lines, where = found.class_lines, f"layout {found.layout}"
            elif lines is None:
                raise UsageError(_no_classes(path, found.splits["train"]))
            classes = make_classes(lines, where, hparams.ignore_index, hparams.first_value)
            if 0 <= hparams.ignore_index < len(classes.names):
                raise UsageError(
                    f"ignore_index={hparams.ignore_index} is the number of the class "
                    f"{classes.names[hparams.ignore_index]!r}; leave it at 255, and where 0 in mask files is no class "
                    "give --data.first_value 1"
                )
            self._classes = classes
        return self._classes

    def _split(self) -> dict[str, list[Scene]]:
        """Scenes to train on, to validate on ("val") and, where there are any, to test on."""
        if self._parts is None:
            parts, share = dict(self._open().splits), self.hparams.val_split
            if share is not None or "val" not in parts:
                share = _DEFAULT_SHARE if share is None else share
                parts["train"], parts["val"] = hold_out(parts["train"], share, "val", "images")
                rank_zero_info(f"{len(parts['val'])} images of train are held out for validation")
            self._parts = parts
        return self._parts

    def _scenes(self, split: str, seed: int | None = None, augment: SceneAugmentation | None = None) -> Scenes:
        hparams = self.hparams
        size = None if augment is not None or hparams.eval_size is None else _pair(hparams.eval_size)
        chosen = self._split()[split]
        scenes = Scenes(chosen, self._class_list(), hparams.in_chans, hparams.ignore_index, seed, augment, size)
        if hparams.preload and split in self._kept:
            scenes.kept = self._kept[split]
        elif hparams.preload:
            self._room -= scenes.preload(self._room)
            self._kept[split] = scenes.kept
        return scenes

    def _judged(self, split: str) -> DataLoader:
        scenes = self._scenes(split)
        sampler = EpochSampler(len(scenes), self.hparams.seed, False, *self._place())
        alike = scenes.size is not None or _of_one_size(scenes.scenes)
        return self._loader(scenes, sampler, self.hparams.batch_size if alike else 1)

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def _loader(self, scenes: Scenes, sampler: EpochSampler, batch_size: int, **arguments: Any) -> DataLoader:
        workers = self.hparams.num_workers
        return SceneLoader(
            scenes,
            sampler=sampler,
            batch_size=batch_size,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.hparams.seed),
            on_unreadable=self._unreadable,
            on_blank=self._blank,
            **arguments,
        )

    def _unreadable(self, name: str, reason: str) -> None:
        leave_out(self.skipped, self.hparams.on_error, name, reason)

    def _blank(self, path: str) -> None:
        if path not in self.blank:
            self.blank.add(path)
            rank_zero_warn(f"no pixel of {path} has a class: there is nothing to learn from or to measure there")


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def _of_one_size(scenes: Sequence[Scene]) -> bool:
    sizes = set()
    for scene in scenes:
        try:
            sizes.add(size_of(scene.path))
        except Exception:  # damaged: reading reports it
            continue
        if len(sizes) > 1:
            return False
    return True


def _no_classes(path: Path, scenes: Sequence[Scene]) -> str:
    message = (
        f"the classes have no names: write them into {str(path)!r}, one a line, or give --data.classes '[sky, road]'"
    )
    try:
        values = np.unique(read_values(scenes[0].mask, False)).tolist()
    except Exception:  # coloured or damaged
        return message
    return f"{message}. The mask {scenes[0].mask!r} holds the values {', '.join(map(str, values[:20]))}"


def _check(given: Any) -> None:
    """Raises UsageError for a value out of its range."""
    for name in ("crop_size", "eval_size"):
        if given[name] is not None and min(_pair(given[name])) < 1:
            raise UsageError(f"{name}={given[name]}: give a positive side, or (height, width)")
    check_reading(given, LAYOUTS)
    if given.first_value < 0:
        raise UsageError(f"first_value={given.first_value}: it must be 0 or more")
    if len(given.scale) != 2 or not 0 < given.scale[0] <= given.scale[1]:
        raise UsageError(f"scale={given.scale}: give the smallest and the largest factor, for instance [0.5, 2.0]")
    if not 0 <= given.saturation < 1:
        raise UsageError(f"saturation={given.saturation}: a change lies between 0 (off) and 1")
    if not 0 <= given.hue <= 0.5:
        raise UsageError(f"hue={given.hue}: a share of the circle of colours lies between 0 (off) and 0.5")
    if given.in_chans == 1 and (given.saturation or given.hue):
        raise UsageError("saturation and hue are of coloured images; with in_chans=1 leave them at 0")

"""Anomaly detection data: good images to learn from, drawn defects to validate by, real ones only to test on."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from zoo.data.anomaly_images import GoodImages, GoodTiles, JudgedImages, Look, TileSampler
from zoo.data.anomaly_layouts import LAYOUTS, Layout, Photo, open_layout
from zoo.data.augmentation import Augmentation
from zoo.data.dicts import DictLoader
from zoo.data.holdout import hold_out
from zoo.data.labelled import check_reading, leave_out
from zoo.data.masks import check_size
from zoo.data.sampler import EpochSampler
from zoo.data.sources import resolve_root
from zoo.data.tiling import check_tiles
from zoo.errors import UsageError, unknown

_DEFAULT_SHARE = 0.1
_AUGMENT = ("hflip", "vflip", "rotate", "brightness", "contrast")


class AnomalyDetection(LightningDataModule):
    """Good images to learn from, and good and defective ones to judge a detector by.

    Training batches are {"image": uint8 (B, C, H, W), "path": list of str}. Those of validation and test also hold
    "mask" bool (B, 1, H, W), "label" int64 (B,) (0 good, 1 defective), "kind" (list: "good", a folder of defects,
    "synthetic") and "has_mask" bool (B,): False where a defect has no mask. Everything random is a function of (seed,
    epoch, index), whatever the number of workers.

    Validation never sees a real defect: it is made of good images held out of train, each also with a drawn defect.

    With `tile`, training batches hold tiles of the images' own pixels, resized to img_size; validation and test give
    one whole image at its own size a batch, and "tile" and "tile_overlap", for `zoo.data.tiling.inspect_by_tiles`.

    Args:
        root: a folder in one of the layouts of data/README.md, or `samples:NAME`.
        category: the category, where root holds several.
        layout: mvtec, mvtec_ad2, visa, folders, or auto to see from the folders.
        bad, masks: for plain folders: of defective images and of their masks, where they have other names than bad/
            and masks/.
        img_size: side, or (height, width), that a detector sees; masks and metrics have it too, unless there are tiles.
        in_chans: 3, or 1 for grey.
        resize: "stretch" to img_size, or "pad": keep the shape, at the top left, and go on with the last pixels,
            which are neither measured nor reported.
        tile: side in pixels of the tiles that large images are looked at in; None for whole images.
        tile_overlap: pixels that neighbouring tiles share; a quarter of a tile when absent.
        batch_size, num_workers: of a process.
        val_split: share of the good images held out for validation, the same for every seed, near copies together;
            when absent, the dataset's own validation images, else a tenth.
        test_split: share of the good images held out to test on, only for plain folders with a folder of bad ones.
        synthetic: whether validation has drawn defects.
        seed: of order, augmentation and drawn defects.
        on_error: "skip" leaves unreadable images out and counts them in `skipped`, "raise" stops at the first.
        hflip, vflip: how often training images are flipped.
        rotate: training images are turned by up to so many degrees.
        brightness, contrast: of training images change by up to this fraction.

    Raises:
        UsageError: an option is out of its range, or (when first asked for) the data is not as described.
    """

    def __init__(
        self,
        root: str = "",
        category: str | None = None,
        layout: str = "auto",
        bad: str = "",
        masks: str = "",
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        resize: str = "stretch",
        tile: int | None = None,
        tile_overlap: int | None = None,
        batch_size: int = 8,
        num_workers: int = 2,
        val_split: float | None = None,
        test_split: float = 0.2,
        synthetic: bool = True,
        seed: int = 0,
        on_error: str = "skip",
        hflip: float = 0.0,
        vflip: float = 0.0,
        rotate: float = 0.0,
        brightness: float = 0.0,
        contrast: float = 0.0,
    ):
        super().__init__()
        self.save_hyperparameters(logger=False)
        _check(self.hparams)
        self.skipped: dict[str, str] = {}
        self._layout: Layout | None = None
        self._parts: tuple[list[Photo], list[Photo], list[Photo]] | None = None

    @property
    def has_test(self) -> bool:
        """Whether there are images to test on."""
        return self._open().has_test()

    def check(self) -> None:
        """Looks at the folders, and at the images as far as their split needs it.

        Raises:
            UsageError: the data is not as described.
        """
        self._split()

    def train_dataloader(self) -> DataLoader:
        photos, _, _ = self._split()
        hparams, look = self.hparams, self._look()
        options = {name: hparams[name] for name in _AUGMENT if hparams[name]}
        images = (GoodImages if look.tile is None else GoodTiles)(
            photos, look, hparams.seed, Augmentation(**options) if options else None
        )
        rank, world = self._place()
        sampler: EpochSampler
        if isinstance(images, GoodTiles):
            rank_zero_info(f"{len(images)} tiles of {look.tile} pixels in {len(photos)} good images")
            sampler = TileSampler(images.counts, hparams.seed, rank, world)
        else:
            sampler = EpochSampler(len(images), hparams.seed, True, rank, world)
        return self._loader(images, sampler, hparams.batch_size)

    def val_dataloader(self) -> DataLoader:
        _, photos, _ = self._split()
        spoilt = list(range(len(photos))) if self.hparams.synthetic else []
        return self._judged(JudgedImages(photos, self._look(), spoilt, self.hparams.seed))

    def test_dataloader(self) -> DataLoader:
        layout = self._open()
        photos = (self._split()[2] if layout.holds_out else []) + self._unlearned()
        bare = [photo.path for photo in photos if photo.label and photo.mask is None]
        if bare:
            rank_zero_warn(
                f"{len(bare)} defective images have no mask, such as {bare[0]}: they count as images, not by pixels"
            )
        for photo in photos:
            if photo.mask is not None:
                check_size(photo.mask, photo.path)
        return self._judged(JudgedImages(photos, self._look()))

    def predict_dataloader(self) -> DataLoader:
        return self.test_dataloader() if self.has_test else self.val_dataloader()

    def _open(self) -> Layout:
        if self._layout is None:
            hparams = self.hparams
            root = resolve_root(hparams.root, "good images, or with train/good/*")
            self._layout = open_layout(root, hparams.category, hparams.layout, hparams.bad, hparams.masks)
        return self._layout

    def _split(self) -> tuple[list[Photo], list[Photo], list[Photo]]:
        """Good images to train on, to validate on, and, where none lie apart, to test on."""
        if self._parts is not None:
            return self._parts
        layout, share = self._open(), self.hparams.val_split
        train, val = layout.train(), []
        test: list[Photo] = []
        if layout.holds_out and layout.has_test():
            train, test = hold_out(train, self.hparams.test_split, "test")
            rank_zero_info(f"{len(test)} of the good images are held out to be tested on with the bad ones")
        if share is None:
            val = layout.val()
        if not val:
            train, val = hold_out(train, _DEFAULT_SHARE if share is None else share, "val")
        drawn = ", each also with a drawn defect" if self.hparams.synthetic else ""
        rank_zero_info(f"{len(train)} good images to train on, {len(val)} to validate on{drawn}")
        self._parts = train, val, test
        return self._parts

    def _unlearned(self) -> list[Photo]:
        """The layout's own images to test on; UsageError when one, links followed, is also to train or validate on."""
        layout = self._open()
        good = layout.train() + (layout.val() if self.hparams.val_split is None else [])
        learned = {Path(photo.path).resolve(): photo.path for photo in good}
        photos = layout.test()
        for photo in photos:
            twin = learned.get(Path(photo.path).resolve())
            if twin is not None:
                raise UsageError(
                    f"{photo.path!r}, to test on, is the same file as {twin!r}, a good image to train or validate on; "
                    "a test on what was learned says nothing. Take it out of one of the two"
                )
        return photos

    def _look(self) -> Look:
        hparams = self.hparams
        tile, overlap = hparams.tile, 0
        if tile is not None:
            tile, overlap = check_tiles(tile, hparams.tile_overlap)
        return Look(_pair(hparams.img_size), hparams.resize, hparams.in_chans, tile, overlap)

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def _judged(self, images: JudgedImages) -> DataLoader:
        look = images.look
        sampler = EpochSampler(len(images), self.hparams.seed, False, *self._place())
        if look.tile is None:
            return self._loader(images, sampler, self.hparams.batch_size)
        # Images of different sizes make no batch; their tiles do.
        return self._loader(images, sampler, 1, {"tile": look.tile, "tile_overlap": look.overlap})

    def _loader(
        self, images: Any, sampler: EpochSampler, batch_size: int, always: dict[str, Any] | None = None
    ) -> DataLoader:
        workers = self.hparams.num_workers
        return DictLoader(
            images,
            sampler=sampler,
            batch_size=batch_size,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.hparams.seed),
            on_unreadable=self._unreadable,
            always=always,
        )

    def _unreadable(self, name: str, reason: str) -> None:
        leave_out(self.skipped, self.hparams.on_error, name, reason)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def _check(given: Any) -> None:
    """Raises UsageError for a value out of its range."""
    if min(_pair(given.img_size)) < 1:
        raise UsageError(f"img_size={given.img_size}: give a positive side, or (height, width)")
    check_reading(given, LAYOUTS)
    if given.resize not in ("stretch", "pad"):
        raise unknown("resize", given.resize, ("stretch", "pad"))
    if given.tile is not None:
        check_tiles(given.tile, given.tile_overlap)
    if not 0 < given.test_split < 1:
        raise UsageError(f"test_split={given.test_split}: a share of the good images lies between 0 and 1")

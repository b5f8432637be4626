"""Image classification data: folders or named datasets, timm's transforms, mixup, one class map, no surprises."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Mixup, create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from torchvision.transforms.functional import pil_to_tensor

from zoo.data.labelled import LabelledImages, leave_out, seed_all
from zoo.data.preload import PreloadedImages, PreloadedLoader, preload, random_crop_flip
from zoo.data.sampler import EpochSampler, ResumableLoader, collate, mix
from zoo.data.sources import Source, find_split, open_folder, open_named, resolve_root, share_of, train_folder
from zoo.errors import UsageError, unknown

_DEFAULT_SHARE = 0.1


class ImageClassification(LightningDataModule):
    """Images with one label each.

    Batches reach a task as (images float32 (B, C, H, W) in [0, 1], not normalised; targets int64 (B,), or float
    (B, classes) where mixup or cutmix are on in training). Everything random is a function of (seed, epoch, index),
    whatever the number of workers.

    Args:
        root: a folder with train/CLASS/*.jpg (and val/, test/), a folder of class folders, or `samples:NAME`.
        dataset: "" for folders, else a name that timm's create_dataset takes: `torch/cifar10`, `hfds/...`, `wds/...`.
        train_split: folder or split to train on.
        val_split: folder or split to validate on; a number is a share of train, the same for every seed; None is the
            folder `val` or `validation` where there is one, else a tenth of train.
        test_split: folder or split of `zoo test`; None for none.
        img_size: side, or (height, width), of the images.
        in_chans: 3, or 1 for grey.
        batch_size, num_workers: of a process.
        seed: of order, augmentation and mixing.
        on_error: "skip" leaves unreadable images out and counts them in `skipped`, "raise" stops at the first.
        download: whether a named dataset may be fetched.
        preload: keep the decoded training images in memory and crop and flip them on the device: for images of one
            small size. Of the training transforms, scale, ratio, hflip, erasing and mixing are done this way.
        num_classes: for named datasets that do not name their classes.
        scale, ratio, hflip, vflip, color_jitter, auto_augment, train_crop_mode, interpolation, re_prob, re_mode,
            re_count, crop_pct, crop_mode: as timm's create_transform takes them. Erasing happens on the device.
        mixup, cutmix, mixup_prob, mixup_switch_prob: as timm's Mixup takes them.

    Raises:
        UsageError: an option is out of its range, or (when first asked for) the data is not as described.
    """

    def __init__(
        self,
        root: str = "",
        dataset: str = "",
        train_split: str = "train",
        val_split: float | str | None = None,
        test_split: str | None = None,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        batch_size: int = 64,
        num_workers: int = 2,
        seed: int = 0,
        on_error: str = "skip",
        download: bool = False,
        preload: bool = False,
        num_classes: int | None = None,
        scale: tuple[float, float] | None = None,
        ratio: tuple[float, float] | None = None,
        hflip: float = 0.5,
        vflip: float = 0.0,
        color_jitter: float | None = None,
        auto_augment: str | None = None,
        train_crop_mode: str | None = None,
        interpolation: str = "bicubic",
        re_prob: float = 0.0,
        re_mode: str = "const",
        re_count: int = 1,
        crop_pct: float | None = None,
        crop_mode: str | None = None,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mixup_prob: float = 1.0,
        mixup_switch_prob: float = 0.5,
    ):
        super().__init__()
        val_split = _share(val_split)
        self.save_hyperparameters(logger=False)
        _check(self.hparams)
        self.skipped: dict[str, str] = {}
        self._train: tuple[Source | IterableDataset, list[int], list[int]] | None = None
        self._mixup: Mixup | None = None

    @property
    def class_names(self) -> list[str]:
        """Names of train's classes in the order of the targets."""
        named = getattr(self._open_train()[0], "class_to_idx", None)
        if named:
            return [str(name) for name, _ in sorted(named.items(), key=lambda item: item[1])]
        if self.hparams.num_classes is None:
            raise UsageError(f"dataset {self.hparams.dataset!r} does not name its classes; give --data.num_classes N")
        return [str(number) for number in range(self.hparams.num_classes)]

    @property
    def num_classes(self) -> int:
        """How many classes train has."""
        return len(self.class_names)

    def train_dataloader(self) -> DataLoader:
        source, kept, _ = self._open_train()
        return self._loader(source, kept, training=True)

    def val_dataloader(self) -> DataLoader:
        source, _, held = self._open_train()
        if held:
            return self._loader(source, held)
        split = self.hparams.val_split
        return self._loader(*self._open_split(split if split is not None else "val"))

    def test_dataloader(self) -> DataLoader:
        if self.hparams.test_split is None:
            raise UsageError("there is no test split; give --data.test_split NAME (a folder beside train)")
        return self._loader(*self._open_split(self.hparams.test_split))

    def predict_dataloader(self) -> DataLoader:
        return self.test_dataloader() if self.hparams.test_split is not None else self.val_dataloader()

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        images, targets = batch
        images = images.float().div_(255)
        trainer, hparams = self.trainer, self.hparams
        if trainer is None or not trainer.training or not (self._mixes or hparams.re_prob or hparams.preload):
            return images, targets
        place = mix("batch", hparams.seed, trainer.current_epoch, trainer.fit_loop.batch_idx, trainer.global_rank)
        return self.augment(images, targets, place)

    def augment(self, images: Tensor, targets: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Cropping (of preloaded images), erasing and mixing of a training batch, a function of `seed` alone."""
        hparams = self.hparams
        if hparams.preload:
            scale, ratio = hparams.scale or (0.08, 1.0), hparams.ratio or (3 / 4, 4 / 3)
            bicubic = hparams.interpolation == "bicubic"
            images = random_crop_flip(images, _pair(hparams.img_size), scale, ratio, hparams.hflip, bicubic, seed)
        seed_all(seed)
        if images.is_cuda:
            torch.cuda.manual_seed(seed)
        if hparams.re_prob:
            mean, std = (images.new_tensor(v)[: images.shape[1], None, None] for v in _STATISTICS)
            erase = RandomErasing(
                hparams.re_prob, mode=hparams.re_mode, max_count=hparams.re_count, device=images.device
            )
            images = erase((images - mean) / std).mul_(std).add_(mean).clamp_(0, 1)
        if not self._mixes:
            return images, targets
        if self._mixup is None:
            self._mixup = Mixup(
                hparams.mixup,
                hparams.cutmix,
                prob=hparams.mixup_prob,
                switch_prob=hparams.mixup_switch_prob,
                label_smoothing=0.0,
                num_classes=self.num_classes,
            )
        # timm mixes pairs; the odd one of a batch that lost an unreadable image stays as it is.
        even = len(images) // 2 * 2
        mixed, soft = self._mixup(images[:even], targets[:even]) if even else (images[:0], images.new_zeros(0))
        if even == len(images):
            return mixed, soft
        rest = F.one_hot(targets[even:], self.num_classes).to(images.dtype)
        return torch.cat([mixed, images[even:]]), torch.cat([soft, rest]) if even else rest

    @property
    def _mixes(self) -> bool:
        return self.hparams.mixup_prob > 0 and (self.hparams.mixup > 0 or self.hparams.cutmix > 0)

    def _open_train(self) -> tuple[Source | IterableDataset, list[int], list[int]]:
        """The source of train, the numbers to train on and those held out for validation."""
        if self._train is not None:
            return self._train
        hparams = self.hparams
        share = hparams.val_split if isinstance(hparams.val_split, float) else None
        if hparams.dataset:
            source = self._named(hparams.train_split, training=True)
            if hparams.val_split is None:
                share = _DEFAULT_SHARE
        else:
            root = resolve_root(hparams.root)
            folder = train_folder(root, hparams.train_split)
            source = open_folder(folder)
            if hparams.val_split is None and (folder == root or find_split(root, "val") is None):
                share = _DEFAULT_SHARE
                rank_zero_info(f"no validation folder: {share:.0%} of every class of train is held out for validation")
        kept: list[int] = []
        held: list[int] = []
        if isinstance(source, Source):
            kept = list(range(len(source)))
            if share is not None:
                kept, held = share_of(source, share)
        elif share is not None:
            raise UsageError(f"dataset {hparams.dataset!r} is a stream and cannot be split; give --data.val_split NAME")
        self._train = source, kept, held
        return self._train

    def _open_split(self, split: str) -> tuple[Source | IterableDataset, list[int]]:
        if self.hparams.dataset:
            source = self._named(split, training=False)
            own, theirs = self._open_train()[0], getattr(source, "class_to_idx", None)
            ours: Any = getattr(own, "class_to_idx", None) or theirs
            if theirs and theirs != ours:
                odd = ", ".join(sorted(set(theirs) ^ set(ours))[:10])
                raise UsageError(
                    f"split {split!r} of {self.hparams.dataset!r} has other classes than train (differing: {odd}); "
                    "give the folders themselves as --data.root, without --data.dataset"
                )
        else:
            root = resolve_root(self.hparams.root)
            folder = find_split(root, split)
            if folder is None:
                there = [path.name for path in root.iterdir() if path.is_dir()]
                raise unknown(f"split of {self.hparams.root!r}:", split, there)
            class_map = {name: index for index, name in enumerate(self.class_names)}
            source = open_folder(folder, class_map)
            missing = sorted(set(class_map) - {self.class_names[target] for target in source.targets or ()})
            if missing:
                rank_zero_warn(f"{folder.name} has no images of {len(missing)} of train's classes: {missing[:10]}")
        return source, list(range(len(source))) if isinstance(source, Source) else []

    def _named(self, split: str, training: bool) -> Source | IterableDataset:
        hparams = self.hparams
        return open_named(
            hparams.dataset,
            hparams.root,
            split,
            hparams.download,
            is_training=training,
            batch_size=hparams.batch_size,
            seed=hparams.seed,
            input_img_mode="L" if hparams.in_chans == 1 else "RGB",
        )

    def transform(self, training: bool) -> Callable:
        """timm's transform from a PIL image to uint8 (C, H, W)."""
        hparams = self.hparams
        height, width = _pair(hparams.img_size)
        common = {
            "input_size": (hparams.in_chans, height, width),
            "interpolation": hparams.interpolation,
            "normalize": False,
        }
        if not training:
            if common["interpolation"] == "random":
                common["interpolation"] = "bilinear"
            fill = {"mean": (sum(IMAGENET_DEFAULT_MEAN) / 3,)} if hparams.in_chans == 1 else {}
            return create_transform(
                is_training=False, crop_pct=hparams.crop_pct, crop_mode=hparams.crop_mode, **common, **fill
            )
        names = ("scale", "ratio", "hflip", "vflip", "color_jitter", "auto_augment", "train_crop_mode")
        try:
            return create_transform(is_training=True, **common, **{name: hparams[name] for name in names})
        except (AssertionError, ValueError, KeyError, AttributeError) as error:
            raise UsageError(f"timm cannot make the training transform: {error!r}") from error

    def _loader(self, source: Source | IterableDataset, numbers: list[int], training: bool = False) -> DataLoader:
        hparams = self.hparams
        workers = hparams.num_workers
        arguments: dict[str, Any] = {
            "batch_size": hparams.batch_size,
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "pin_memory": torch.cuda.is_available(),
            "drop_last": training,
            "generator": torch.Generator().manual_seed(hparams.seed),
        }
        if not isinstance(source, Source):
            return self._stream(source, training, arguments)
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
        images: LabelledImages | PreloadedImages
        if training and hparams.preload:
            raw = LabelledImages(source, numbers, pil_to_tensor, hparams.in_chans, None)
            images = preload(raw, workers, self._unreadable)
        else:
            seed = hparams.seed if training else None
            images = LabelledImages(source, numbers, self.transform(training), hparams.in_chans, seed)
        sampler = EpochSampler(len(images), hparams.seed, shuffle=training, rank=rank, world=world)
        arguments["drop_last"] = training and len(sampler) >= hparams.batch_size
        if training and len(sampler) < hparams.batch_size:
            rank_zero_warn(f"batch_size={hparams.batch_size} is more than the {len(sampler)} images to train on")
        if isinstance(images, PreloadedImages):
            arguments = {name: arguments[name] for name in ("batch_size", "drop_last")}
            return PreloadedLoader(images, sampler=sampler, **arguments)
        return ResumableLoader(images, sampler=sampler, on_unreadable=self._unreadable, **arguments)

    def _stream(self, source: IterableDataset, training: bool, arguments: dict[str, Any]) -> DataLoader:
        if training:
            rank_zero_warn("a streamed dataset cannot be resumed in the middle of an epoch: it starts that epoch again")
        source.transform = self.transform(training)  # type: ignore[attr-defined]
        return DataLoader(source, collate_fn=_collate_stream, **arguments)

    def _unreadable(self, name: str, reason: str) -> None:
        leave_out(self.skipped, self.hparams.on_error, name, reason)


_STATISTICS = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def _collate_stream(samples: Sequence[Any]) -> tuple[Tensor, Tensor]:
    images, targets, _ = collate(samples)
    return images, targets


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def _share(split: float | str | None) -> float | str | None:
    """A share written as text, as a number; anything else as it is."""
    try:
        number = float(split or "")
    except ValueError:
        return split
    return number if 0 < number < 1 else split


def _check(given: Any) -> None:
    """Raises UsageError for a value out of its range."""
    if min(_pair(given.img_size)) < 1:
        raise UsageError(f"img_size={given.img_size}: give a positive side, or (height, width)")
    if given.in_chans not in (1, 3):
        raise UsageError(f"in_chans={given.in_chans}: images are read with 3 channels, or 1 for grey")
    if given.batch_size < 1:
        raise UsageError(f"batch_size={given.batch_size}: it must be at least 1")
    if given.num_workers < 0:
        raise UsageError(f"num_workers={given.num_workers}: it must be 0 or more")
    if given.on_error not in ("skip", "raise"):
        raise unknown("on_error", given.on_error, ("skip", "raise"))
    share = given.val_split
    if isinstance(share, (int, float)) and not 0 < share < 1:
        raise UsageError(f"val_split={share}: a share of train lies between 0 and 1; or give the name of a split")
    for name in ("hflip", "vflip", "re_prob", "mixup_prob", "mixup_switch_prob"):
        if not 0 <= given[name] <= 1:
            raise UsageError(f"{name}={given[name]}: a probability lies between 0 and 1")
    for name in ("mixup", "cutmix"):
        if given[name] < 0:
            raise UsageError(f"{name}={given[name]}: it must be 0 (off) or more")
    if given.preload:
        on = [name for name in ("vflip", "color_jitter", "auto_augment", "train_crop_mode") if given[name]]
        if on:
            raise UsageError(f"preload does not do {', '.join(on)}; turn that off, or use --data.preload false")
    if given.crop_pct is not None and not 0 < given.crop_pct <= 1:
        raise UsageError(f"crop_pct={given.crop_pct}: it lies in (0, 1]")
    if given.crop_mode not in (None, "center", "squash", "border"):
        raise unknown("crop_mode", given.crop_mode, ("center", "squash", "border"))
    if given.interpolation not in ("bilinear", "bicubic", "nearest", "lanczos", "box", "hamming", "random"):
        raise unknown("interpolation", given.interpolation, ("bilinear", "bicubic", "nearest", "lanczos", "random"))
    if given.train_crop_mode not in (None, "rrc", "rkrc", "rkrr"):
        raise unknown("train_crop_mode", given.train_crop_mode, ("rrc", "rkrc", "rkrr"))
    if given.re_mode not in ("const", "rand", "pixel"):
        raise unknown("re_mode", given.re_mode, ("const", "rand", "pixel"))

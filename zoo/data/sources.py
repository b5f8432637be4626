"""Where images come from: folders of class folders, or any dataset that timm knows by name."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import timm.data
import torch
from timm.data.readers.img_extensions import get_img_extensions
from timm.utils.misc import natural_key
from torch.utils.data import IterableDataset

from zoo.data.images import open_image
from zoo.errors import UsageError, unknown
from zoo.resources import samples_dir

SYNONYMS = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid"),
    "test": ("test", "testing"),
}
_PREFIXES = ("torch", "hfds", "hfids", "tfds", "wds")


class Source:
    """Labelled images by number.

    Attributes:
        class_to_idx: number of each class; None where the dataset does not name them.
        targets: the class number of every image, in order; None where only reading tells.
    """

    def __init__(self, dataset: Any):
        self.dataset = dataset
        self.reader = getattr(dataset, "reader", None)
        holder = dataset if self.reader is None else self.reader
        self.class_to_idx: dict[str, int] | None = getattr(holder, "class_to_idx", None) or None
        names = getattr(dataset, "classes", None)
        if self.class_to_idx is None and names:
            self.class_to_idx = {str(name): index for index, name in enumerate(names)}
        samples = getattr(self.reader, "samples", None)
        targets = [target for _, target in samples] if samples else getattr(dataset, "targets", None)
        self.targets = None if targets is None else [int(target) for target in targets]

    def __len__(self) -> int:
        return len(self.dataset if self.reader is None else self.reader)

    def name(self, index: int) -> str:
        """The file of an image, or its number where it has none."""
        if self.reader is not None:
            try:
                return str(self.reader.filename(index, absolute=True))
            except (AssertionError, NotImplementedError, KeyError, AttributeError):
                pass
        return f"image {index}"

    def load(self, index: int, in_chans: int) -> tuple[Any, int]:
        """The decoded picture and its class number; whatever PIL raises for a damaged file."""
        if self.reader is None:
            image, target = self.dataset[index]
            return open_image(image, in_chans), int(target)
        stream, target = self.reader[index]
        try:
            return open_image(stream, in_chans), -1 if target is None else int(target)
        finally:
            if hasattr(stream, "close"):
                stream.close()


def resolve_root(root: str, holds: str = "train/CLASS/*.jpg") -> Path:
    """The folder that `root` names; `samples:NAME` is a folder of the bundled images.

    Args:
        holds: what should lie in it, for messages.

    Raises:
        UsageError: there is no such folder.
    """
    if root.startswith("samples:"):
        path = samples_dir() / root.removeprefix("samples:")
        if not path.is_dir():
            raise unknown("bundled samples", root, [f"samples:{found.name}" for found in samples_dir().iterdir()])
        return path
    if not root:
        raise UsageError(f"no data: give --data.root FOLDER (a folder with {holds})")
    path = Path(root).expanduser()
    if not path.exists():
        raise UsageError(f"the data folder {root!r} does not exist; give --data.root FOLDER")
    if not path.is_dir():
        raise UsageError(f"--data.root {root!r} is a file; give the folder that holds {holds}")
    return path


def find_split(root: Path, split: str) -> Path | None:
    """The folder of a split, under its own name or a synonym; None where there is none."""
    for name in (split, *SYNONYMS.get(split, ())):
        if (root / name).is_dir():
            return root / name
    return None


def train_folder(root: Path, split: str) -> Path:
    """The folder of class folders to train on: root/train, or `root` itself where it holds no splits.

    Raises:
        UsageError: there is no such split.
    """
    found = find_split(root, split)
    if found is not None:
        return found
    folders = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise UsageError(f"the data folder {str(root)!r} is empty of class folders; it should hold train/CLASS/*.jpg")
    splits = [name for names in SYNONYMS.values() for name in names]
    if split not in SYNONYMS["train"] or any(name in splits for name in folders):
        raise unknown(f"split of {str(root)!r}:", split, folders)
    return root


def open_folder(folder: Path, class_to_idx: dict[str, int] | None = None) -> Source:
    """The images under a folder of class folders.

    Args:
        folder: holds one folder a class; images may lie deeper.
        class_to_idx: train's class map; None to make it from the folders.

    Raises:
        UsageError: no images, images outside class folders, an empty class, a single class, or a class that train
            does not have.
    """
    extensions = get_img_extensions(as_set=True)
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    empty = [path.name for path in classes if not _has_image(path, extensions)]
    if len(empty) == len(classes):
        loose = any(path.suffix.lower() in extensions for path in folder.iterdir())
        what = "images outside class folders" if loose else "no images in class folders"
        raise UsageError(
            f"{str(folder)!r} holds {what}; it should hold CLASS/*.jpg (extensions: {' '.join(sorted(extensions))})"
        )
    if class_to_idx is None and empty:
        raise UsageError(f"class {empty[0]!r} in {str(folder)!r} holds no images; add some or remove the folder")
    dataset = timm.data.create_dataset("", root=str(folder), search_split=False)
    # timm names a class after the innermost folder and takes astray images for a class without a name.
    start = len(str(folder)) + 1
    inside = [(path, path[start:].split(os.sep)) for path, _ in dataset.reader.samples]
    inside = [(path, parts) for path, parts in inside if not any(part.startswith(".") for part in parts)]
    astray = [path for path, parts in inside if len(parts) == 1]
    if astray:
        raise UsageError(
            f"{astray[0]!r} and {len(astray) - 1} more are images outside class folders; move or remove them"
        )
    found = sorted({parts[0] for _, parts in inside}, key=natural_key)
    if class_to_idx is None and len(found) < 2:
        raise UsageError(f"{str(folder)!r} holds one class, {found[0]!r}; a classifier needs at least two")
    extra = [name for name in found if class_to_idx is not None and name not in class_to_idx]
    if extra:
        raise UsageError(
            f"{str(folder)!r} has the class {extra[0]!r}, which train does not have; classes of train: "
            + ", ".join(list(class_to_idx or ())[:40])
        )
    class_map = class_to_idx or {name: number for number, name in enumerate(found)}
    dataset.reader.samples = [(path, class_map[parts[0]]) for path, parts in inside]
    dataset.reader.class_to_idx = class_map
    return Source(dataset)


def _has_image(folder: Path, extensions: Iterable[str]) -> bool:
    return any(
        path.suffix.lower() in extensions and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        for path in folder.rglob("*")
    )


def open_named(name: str, root: str, split: str, download: bool, **options: Any) -> Source | IterableDataset:
    """A dataset that timm knows by name, such as `torch/cifar10`.

    Raises:
        UsageError: timm does not know it, its package is missing, or its files are not there.
    """
    prefix = name.partition("/")[0].lower()
    if prefix not in _PREFIXES:
        raise unknown("dataset", name, [f"{prefix}/NAME" for prefix in _PREFIXES])
    if prefix in ("hfds", "hfids") and not download:  # timm's readers ask the hub whatever `download` says
        raise UsageError(f"dataset {name!r} comes from the Hugging Face hub; --data.download true allows that")
    try:
        dataset = timm.data.create_dataset(name, root=root or None, split=split, download=download, **options)
    except ImportError as error:
        raise UsageError(f"dataset {name!r} needs a package that is not installed: {error}") from error
    except (RuntimeError, AssertionError, FileNotFoundError, ValueError, TypeError, KeyError) as error:
        hint = "" if download else " If it is not there yet, --data.download true fetches it into --data.root."
        text = " ".join(str(error).split())
        raise UsageError(f"dataset {name!r}, split {split!r}, cannot be opened in {root!r}: {text}.{hint}") from error
    return dataset if isinstance(dataset, IterableDataset) else Source(dataset)


def share_of(source: Source, share: float) -> tuple[list[int], list[int]]:
    """Numbers of the images to train on and to validate on: `share` of every class, the same for every seed.

    Raises:
        UsageError: a class is too small to give and keep an image.
    """
    labels = source.targets or [source.load(index, 3)[1] for index in range(len(source))]
    generator = torch.Generator().manual_seed(0)
    members: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        members.setdefault(label, []).append(index)
    kept, held = [], []
    for _, numbers in sorted(members.items()):
        count = max(1, round(share * len(numbers)))
        if count >= len(numbers):
            raise UsageError(
                f"a share of {share} of a class of {len(numbers)} images leaves nothing to train on; "
                "add images, or give a validation folder"
            )
        order = torch.randperm(len(numbers), generator=generator).tolist()
        held += [numbers[i] for i in order[:count]]
        kept += [numbers[i] for i in order[count:]]
    return sorted(kept), sorted(held)

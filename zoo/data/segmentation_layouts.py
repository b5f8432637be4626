"""How images and their masks lie in folders: by split, by kind, in one folder each, or as Pascal VOC's."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from zoo.data.anomaly_layouts import EXTENSIONS, images_in
from zoo.data.sources import SYNONYMS, find_split
from zoo.errors import UsageError, unknown

IMAGES = ("images", "image", "imgs", "img")
MASKS = ("masks", "mask", "labels", "label", "annotations")
LAYOUTS = ("splits", "kinds", "flat", "voc")
_VOC = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor"
)
SPLITS = tuple(SYNONYMS)
_COCO = {"train": ("train2017", "train2014"), "val": ("val2017", "val2014"), "test": ()}


class Scene(NamedTuple):
    """An image and the file that says the class of each of its pixels."""

    path: str
    mask: str


class Found(NamedTuple):
    """What lies in the folders.

    Attributes:
        layout: of `LAYOUTS`.
        splits: scenes of "train" and, where there are any, "val" and "test".
        class_lines: names of classes where the layout itself knows them.
    """

    layout: str
    splits: dict[str, list[Scene]]
    class_lines: list[str] | None = None


def open_scenes(root: Path, layout: str = "auto") -> Found:
    """The images under `root` with their masks.

    Args:
        layout: "splits" for {train,val,test}/{images,masks}, "kinds" for {images,masks}/{train,val,test}, "flat" for
            images/ and masks/ alone, "voc" for Pascal VOC's folders, "auto" to see from the folders.

    Raises:
        UsageError: nothing is laid out so, or a mask is without its image or an image without its mask.
    """
    if layout not in ("auto", *LAYOUTS):
        raise unknown("layout", layout, ("auto", *LAYOUTS))
    for kind in LAYOUTS if layout == "auto" else (layout,):
        found = _READERS[kind](root)
        if found is not None:
            return found
    there = sorted(path.name for path in root.iterdir() if not path.name.startswith("."))
    raise UsageError(
        f"{str(root)!r} holds {', '.join(there[:8]) or 'nothing'}; it should hold {{train,val,test}}/{{images,masks}}, "
        "or {images,masks}/{train,val,test}, or images and masks, or Pascal VOC's VOCdevkit (--data.layout splits, "
        "kinds, flat or voc)"
    )


def _splits(root: Path) -> Found | None:
    folders = {split: find_split(root, split) for split in SPLITS}
    pairs = {split: (_named(folder, IMAGES), _named(folder, MASKS)) for split, folder in folders.items() if folder}
    if "train" not in pairs or pairs["train"] == (None, None):
        return None
    return Found("splits", _pair_all(pairs, {split: str(folder) for split, folder in folders.items()}))


def _kinds(root: Path) -> Found | None:
    images, masks = _named(root, IMAGES), _named(root, MASKS)
    if images is None or masks is None or _split_of(images, "train") is None:
        return None
    pairs = {split: (_split_of(images, split), _split_of(masks, split)) for split in SPLITS}
    return Found("kinds", _pair_all({split: pair for split, pair in pairs.items() if any(pair)}, {}))


def _flat(root: Path) -> Found | None:
    images, masks = _named(root, IMAGES), _named(root, MASKS)
    if images is None or masks is None:
        return None
    return Found("flat", {"train": pair_by_name(images, masks)})


def _voc(root: Path) -> Found | None:
    """Through torchvision's reader of the lists in ImageSets/Segmentation."""
    if (root / "ImageSets" / "Segmentation").is_dir():
        years = [root]
    else:
        kit = root if root.name == "VOCdevkit" else root / "VOCdevkit"
        years = sorted(path.parent.parent for path in kit.glob("VOC*/ImageSets/Segmentation"))
    if not years:
        return None
    if len(years) > 1:
        raise UsageError(f"{str(root)!r} holds several years; give one, for instance --data.root {years[-1]}")
    folder = years[0]
    year = folder.name.removeprefix("VOC")
    if folder.parent.name != "VOCdevkit" or not year.isdigit():
        raise UsageError(f"Pascal VOC lies in VOCdevkit/VOC2012 (or another year), not in {str(folder)!r}")
    from torchvision.datasets import VOCSegmentation

    splits = {}
    # The masks of later years' test images are not public.
    for split in SPLITS if year == "2007" else ("train", "val"):
        if (folder / "ImageSets" / "Segmentation" / f"{split}.txt").is_file():
            try:
                listed = VOCSegmentation(str(folder.parent.parent), year, split)
            except (ValueError, RuntimeError) as error:
                raise UsageError(f"Pascal VOC in {str(folder)!r} cannot be opened: {error}") from error
            splits[split] = [Scene(*pair) for pair in zip(listed.images, listed.masks, strict=True)]
    missing = [path for scenes in splits.values() for scene in scenes for path in scene if not Path(path).is_file()]
    if missing:
        raise UsageError(f"{missing[0]!r} does not exist, but the lists in ImageSets/Segmentation name it")
    if not splits.get("train"):
        raise UsageError(f"{str(folder / 'ImageSets' / 'Segmentation')!r} has no train.txt with images")
    return Found("voc", {split: scenes for split, scenes in splits.items() if scenes}, _VOC.split())


_READERS = {"splits": _splits, "kinds": _kinds, "flat": _flat, "voc": _voc}


def pair_by_name(images: Path, masks: Path) -> list[Scene]:
    """Images with the masks of the same place and name, whatever the ending, `_mask` after the name or not.

    Raises:
        UsageError: there are none, one is without the other, or two have one name.
    """
    pictures, labels = (_by_name(folder) for folder in (images, masks))
    if not pictures:
        raise UsageError(f"there are no images in {str(images)!r} ({' '.join(EXTENSIONS)})")
    scenes, used, bare = [], set(), []
    for name, path in pictures.items():
        found = next((other for other in (name, f"{name}_mask") if other in labels), None)
        if found is None:
            bare.append(path)
        else:
            used.add(found)
            scenes.append(Scene(str(path), str(labels[found])))
    orphans = [path for name, path in labels.items() if name not in used]
    _refuse(orphans, "mask", "image", images)
    _refuse(bare, "image", "mask", masks)
    return scenes


def _pair_all(pairs: dict[str, tuple[Path | None, Path | None]], names: dict[str, str]) -> dict[str, list[Scene]]:
    splits = {}
    for split, (images, masks) in pairs.items():
        if images is None and masks is None:
            continue
        if images is None or masks is None:
            if split == "test" and images is not None:
                continue  # images whose masks are kept secret
            there, missing = (masks, "images") if images is None else (images, "masks")
            raise UsageError(
                f"the folder {str(there)!r} has no {missing} beside it; add {missing}/ "
                f"({' or '.join(IMAGES if missing == 'images' else MASKS)}) {_where(split, names)}"
            )
        splits[split] = pair_by_name(images, masks)
    return splits


def _where(split: str, names: dict[str, str]) -> str:
    return f"in {names[split]!r}" if split in names else f"with a folder {split!r}"


def _by_name(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in images_in(folder):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in found:
            raise UsageError(f"{str(found[name])!r} and {str(path)!r} have one name; which one is it? Remove the other")
        found[name] = path
    return found


def _refuse(alone: list[Path], kind: str, other: str, folder: Path) -> None:
    if alone:
        more = f" (and {len(alone) - 1} more)" if len(alone) > 1 else ""
        name = alone[0].stem.removesuffix("_mask") if kind == "mask" else alone[0].stem
        raise UsageError(
            f"the {kind} {str(alone[0])!r}{more} has no {other}: there is no {name!r} in {str(folder)!r}; add the "
            f"{other} or remove the {kind}"
        )


def _split_of(folder: Path, split: str) -> Path | None:
    names = [folder / name for name in _COCO[split] if (folder / name).is_dir()]
    return find_split(folder, split) or (names[0] if names else None)


def _named(folder: Path | None, names: Iterable[str]) -> Path | None:
    if folder is None:
        return None
    there = {path.name.lower(): path for path in folder.iterdir() if path.is_dir()}
    return next((there[name] for name in names if name in there), None)

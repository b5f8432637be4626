"""How images of good and defective things lie in folders: MVTec AD and its like, MVTec AD 2, VisA, or plain folders."""

import csv
from collections.abc import Iterable
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

from zoo.data.anomaly_pairs import match_masks, refuse_orphans
from zoo.errors import UsageError, unknown

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm")
GOOD = ("good", "ok", "normal")
BAD = ("bad", "defect", "defects", "defective", "anomaly", "anomalous", "ng", "ko")
VALIDATION = ("validation", "val", "valid")
MASKS = ("masks", "mask", "ground_truth")


class Photo(NamedTuple):
    """One image and what is known of it.

    Attributes:
        path: of the image.
        label: 0 good, 1 defective.
        kind: "good", or the name of the kind of defect.
        mask: path of the picture of its defect, where there is one.
        numbered: the mask numbers kinds of defect, so any value but 0 is one; otherwise it must be binary.
    """

    path: str
    label: int = 0
    kind: str = "good"
    mask: str | None = None
    numbered: bool = False


class Layout:
    """One category of a dataset.

    Attributes:
        holds_out: good images to test on do not lie apart, so they have to be taken from train's.
    """

    holds_out = False

    def __init__(self, folder: Path):
        self.folder = folder

    @staticmethod
    def fits(folder: Path) -> bool:
        """Whether a folder looks like a category of this layout."""
        raise NotImplementedError

    def train(self) -> list[Photo]:
        """Good images to learn from; UsageError when there are none or others lie among them."""
        raise NotImplementedError

    def val(self) -> list[Photo]:
        """Good images that the dataset itself sets apart for validation."""
        return []

    def has_test(self) -> bool:
        """Whether there are images to test on."""
        raise NotImplementedError

    def test(self) -> list[Photo]:
        """Good and defective images to test on; UsageError when there are none or a mask is without its image."""
        raise NotImplementedError


class MVTec(Layout):
    """train/good, perhaps validation/good, test/{good,KIND}, ground_truth/KIND/NAME_mask.png (or NAME.png)."""

    test_name, masks_name = "test", "ground_truth"

    @staticmethod
    def fits(folder: Path) -> bool:
        return (folder / "train").is_dir()

    def train(self) -> list[Photo]:
        return _good_only(self.folder / "train", self.folder / self.test_name)

    def val(self) -> list[Photo]:
        folder = _named(self.folder, VALIDATION)
        return _good_only(folder, self.folder / self.test_name) if folder is not None else []

    def has_test(self) -> bool:
        return any(images_in(self.folder / self.test_name))

    def test(self) -> list[Photo]:
        folder = self.folder / self.test_name
        kinds = [name for name in _folders(folder) if name != self.masks_name]
        loose = _loose(folder)
        if loose:
            raise UsageError(
                f"{str(loose[0])!r} lies beside the folders of kinds; move it to {folder}/good or a defect's"
            )
        root = self._masks()
        if root is not None:
            loose = _loose(root)
            if loose:
                raise UsageError(
                    f"the mask {str(loose[0])!r} lies beside the folders of kinds; move it to {root}/KIND, where its "
                    f"image is in {folder}/KIND"
                )
            for extra in sorted(set(_folders(root)) - set(kinds)):
                refuse_orphans(list(images_in(root / extra)), folder / extra)
        photos = []
        for kind in kinds:
            masks = None if root is None else root / kind
            if kind.lower() in GOOD:
                images = _good_images(folder / kind, folder)
                # Some datasets give good images masks without a defect: they say nothing, but one without its image
                # says that an image is missing or lies elsewhere.
                _masks_of(images, folder / kind, masks)
                photos += [Photo(str(path)) for path in images]
            else:
                photos += _defects(folder / kind, masks, kind)
        if not photos:
            raise UsageError(f"there are no test images in {str(folder)!r}; it should hold good/* and KIND_OF_DEFECT/*")
        return photos

    def _masks(self) -> Path | None:
        folder = self.folder / self.masks_name
        return folder if folder.is_dir() else None


class MVTecAD2(MVTec):
    """train/good, validation/good, test_public/{good,bad}, test_public/ground_truth/bad/NAME_mask.png.

    The images of the private tests have no labels and are left alone.
    """

    test_name = "test_public"

    @staticmethod
    def fits(folder: Path) -> bool:
        return (folder / "train").is_dir() and (folder / "test_public").is_dir()

    def _masks(self) -> Path | None:
        folder = self.folder / self.test_name / self.masks_name
        return folder if folder.is_dir() else None


class VisA(Layout):
    """CATEGORY/Data/Images/{Normal,Anomaly} and Data/Masks/Anomaly, split by split_csv/1cls.csv beside CATEGORY."""

    @staticmethod
    def fits(folder: Path) -> bool:
        return (folder / "Data" / "Images").is_dir()

    def train(self) -> list[Photo]:
        photos = self._rows("train")
        bad = [photo for photo in photos if photo.label]
        if bad:
            raise UsageError(f"{self._table} puts {bad[0].path!r}, which is no good image, into train")
        if not photos:
            raise UsageError(f"{self._table} names no images to train on for {self.folder.name!r}")
        return photos

    def has_test(self) -> bool:
        return bool(self._rows("test"))

    def test(self) -> list[Photo]:
        photos = self._rows("test")
        masks = images_in(self.folder / "Data" / "Masks")
        used = {photo.mask for photo in photos}
        refuse_orphans([path for path in masks if str(path) not in used], self.folder / "Data" / "Images")
        return photos

    @property
    def _table(self) -> Path:
        return self.folder.parent / "split_csv" / "1cls.csv"

    def _rows(self, split: str) -> list[Photo]:
        if not self._table.is_file():
            raise UsageError(f"VisA's split is missing: {str(self._table)!r}; it comes with the dataset")
        columns = {"object", "split", "label", "image", "mask"}
        with open(self._table, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if not columns <= set(reader.fieldnames or ()):
                raise UsageError(f"{str(self._table)!r} should have the columns {', '.join(sorted(columns))}")
            rows = [row for row in reader if row["object"] == self.folder.name and row["split"] == split]
        root = self.folder.parent
        for row in rows:
            for name in filter(None, (row["image"], row["mask"])):
                if not (root / name).is_file():
                    raise UsageError(f"{str(root / name)!r} does not exist, but {self._table.name} names it")
        good = [row["label"] == "normal" for row in rows]
        return [
            Photo(str(root / row["image"]))
            if fine
            else Photo(
                str(root / row["image"]), 1, row["label"], str(root / row["mask"]) if row["mask"] else None, True
            )
            for row, fine in zip(rows, good, strict=True)
        ]


class Folders(Layout):
    """Good images in the folder itself or in good/; defective ones, perhaps in folders by kind, and masks by choice.

    Args:
        folder: of the good images, or of good/, bad/ and masks/.
        bad: folder of defective images, beside or inside `folder` or anywhere; bad/ where there is one.
        masks: folder of their masks: the same names, `_mask` after them or not; masks/ where there is one.

    Raises:
        UsageError: a folder named does not exist, or one image would be two of good, defective and a mask.
    """

    holds_out = True

    def __init__(self, folder: Path, bad: str = "", masks: str = ""):
        super().__init__(folder)
        self.bad = _chosen(folder, bad, BAD, "bad")
        self.masks = _chosen(folder, masks, MASKS, "masks")
        self._check_apart()

    def _check_apart(self) -> None:
        good = _named(self.folder, GOOD)
        places = {"good images": good or self.folder, "defective images": self.bad, "masks": self.masks}
        there = [(what, path, path.resolve()) for what, path in places.items() if path is not None]
        for (what, path, real), (other, around, outer) in permutations(there, 2):
            # Good images that lie loose in a folder are those directly in it: what lies deeper is none of them.
            apart = good is None and other == "good images" and real != outer
            if real.is_relative_to(outer) and not apart:
                where = "is also" if real == outer else f"lies inside {str(around)!r},"
                raise UsageError(
                    f"{str(path)!r}, the folder of {what}, {where} that of {other}: its images would be both. "
                    f"Keep them apart, such as in {self.folder}/{{good,bad,masks}}, or name other folders with "
                    "--data.bad and --data.masks"
                )

    @staticmethod
    def fits(folder: Path) -> bool:
        return bool(_named(folder, GOOD) or _loose(folder))

    def train(self) -> list[Photo]:
        good = _named(self.folder, GOOD)
        loose = _loose(self.folder)
        if good is not None:
            if loose:
                raise UsageError(
                    f"{str(loose[0])!r} lies beside {good.name}/; move it into {good.name}/ or out of the way"
                )
            images = _good_images(good, self.bad or self.folder / "bad")
        else:
            ours = [path.resolve() for path in (self.bad, self.masks) if path is not None]
            root = self.folder.resolve()
            others = [
                path.relative_to(root)
                for path in images_in(root)
                if path.parent != root and not any(path.is_relative_to(one) for one in ours)
            ]
            if others:
                raise UsageError(
                    f"{str(self.folder / others[0].parent)!r}: are its images good or not? Good ones go into "
                    f"{self.folder / 'good'}, defective ones into {self.folder / 'bad'}"
                )
            images = loose
        if not images:
            raise _no_good(self.folder if good is None else good)
        return [Photo(str(path)) for path in images]

    def has_test(self) -> bool:
        return self.bad is not None and any(images_in(self.bad))

    def test(self) -> list[Photo]:
        if self.bad is None or not self.has_test():
            raise UsageError(
                f"there are no defective images to test on; put some into {str(self.folder / 'bad')!r}, or name their "
                "folder with --data.bad"
            )
        photos = _defects(self.bad, self.masks, "bad")
        inside = [Path(photo.path).relative_to(self.bad).parts for photo in photos]
        return [p._replace(kind=parts[0]) if len(parts) > 1 else p for p, parts in zip(photos, inside, strict=True)]


LAYOUTS = {"mvtec_ad2": MVTecAD2, "mvtec": MVTec, "visa": VisA, "folders": Folders}


def open_layout(root: Path, category: str | None, layout: str, bad: str = "", masks: str = "") -> Layout:
    """The category of a dataset in `root`, which holds categories or is one.

    Args:
        category: its name; None where `root` is or holds just one.
        layout: of `LAYOUTS`, or "auto" to see from the folders.
        bad, masks: as `Folders` takes them.

    Raises:
        UsageError: no such category or layout, or nothing that looks like one.
    """
    if layout != "auto" and layout not in LAYOUTS:
        raise unknown("layout", layout, ("auto", *LAYOUTS))
    kinds = [MVTecAD2, MVTec, VisA] if layout == "auto" else [LAYOUTS[layout]]
    if bad or masks:
        if layout not in ("auto", "folders"):
            raise UsageError(f"--data.bad and --data.masks go with --data.layout folders, not {layout}")
        kinds = []
    for kind in kinds:
        if kind is not Folders and kind.fits(root):
            if category not in (None, root.name):
                raise UsageError(f"{str(root)!r} is one category itself; leave --data.category {category} out")
            return kind(root)
        names = [name for name in _folders(root) if kind is not Folders and kind.fits(root / name)]
        if names:
            return kind(root / _one_of(names, category, root))
    if layout in ("auto", "folders"):
        return _folders_layout(root, category, bad, masks)
    raise UsageError(f"{str(root)!r} is not laid out as {layout}: {_first_line(LAYOUTS[layout])}")


def _folders_layout(root: Path, category: str | None, bad: str, masks: str) -> Layout:
    if category is not None:
        if category not in _folders(root):
            raise unknown(f"category of {str(root)!r}:", category, _folders(root))
        root = root / category
    if not Folders.fits(root):
        names = _folders(root)
        found = f"the folders {', '.join(names[:8])}" if names else "nothing"
        raise UsageError(
            f"there are no good images in {str(root)!r}; it holds {found}. It should hold good images, or good/* "
            "(and bad/*), or train/good/* (and test/KIND/*), or one such folder a category"
        )
    return Folders(root, bad, masks)


def _one_of(names: list[str], category: str | None, root: Path) -> str:
    if category is None:
        if len(names) > 1:
            raise UsageError(
                f"{str(root)!r} holds {len(names)} categories; give --data.category, one of {', '.join(names)}"
            )
        return names[0]
    if category not in names:
        raise unknown(f"category of {str(root)!r}:", category, names)
    return category


def images_in(folder: Path) -> Iterable[Path]:
    """All images under a folder, sorted; hidden files and folders are none."""
    for path in sorted(folder.rglob("*")):
        if _is_image(path) and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS and path.is_file()


def _loose(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _is_image(path) and not path.name.startswith("."))


def _folders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _named(folder: Path, names: Iterable[str]) -> Path | None:
    there = {name.lower(): name for name in _folders(folder)}
    return next((folder / there[name] for name in names if name in there), None)


def _chosen(folder: Path, given: str, usual: Iterable[str], option: str) -> Path | None:
    if not given:
        return _named(folder, usual)
    for path in (folder / given, Path(given).expanduser()):
        if path.is_dir():
            return path
    raise UsageError(f"--data.{option} {given!r} is no folder, neither here nor in {str(folder)!r}")


def _good_only(folder: Path, defects: Path) -> list[Photo]:
    others = [name for name in _folders(folder) if name.lower() not in GOOD]
    if others:
        raise UsageError(
            f"{str(folder / others[0])!r} lies among the good images: {folder.name} may hold good/* only. Move "
            f"defective images to {str(defects / others[0])!r}, good ones to {str(folder / 'good')!r}"
        )
    loose = _loose(folder)
    if loose and _folders(folder):
        raise UsageError(f"{str(loose[0])!r} lies beside good/, good or not; move it into good/ or out of the way")
    images = _good_images(folder, defects)
    if not images:
        raise _no_good(folder / "good")
    return [Photo(str(path)) for path in images]


def _good_images(folder: Path, defects: Path) -> list[Path]:
    """Images under a folder of good ones; UsageError where their folder is called as one of `defects` or `BAD`."""
    named = {name.lower() for name in (*BAD, *_folders(defects))} - set(GOOD)
    images = list(images_in(folder))
    for path in images:
        for name in path.relative_to(folder).parts[:-1]:
            if name.lower() in named:
                raise UsageError(
                    f"{str(path)!r} lies among the good images, in a folder {name!r} as defects have. Move defective "
                    f"images to {str(defects / name)!r}; if these are good, give their folder another name"
                )
    return images


def _no_good(folder: Path) -> UsageError:
    return UsageError(
        f"there are no good images in {str(folder)!r}; a detector learns from good ones alone. Put some there "
        f"({' '.join(EXTENSIONS)})"
    )


def _defects(folder: Path, masks: Path | None, kind: str) -> list[Photo]:
    images = list(images_in(folder))
    found = _masks_of(images, folder, masks)
    return [Photo(str(path), 1, kind, mask) for path, mask in zip(images, found, strict=True)]


def _masks_of(images: list[Path], folder: Path, masks: Path | None) -> list[str | None]:
    return [None] * len(images) if masks is None else match_masks(images, folder, list(images_in(masks)), masks)


def _first_line(kind: type) -> str:
    return (kind.__doc__ or "").strip().splitlines()[0]

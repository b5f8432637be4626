"""Which classes masks have, which values or colours stand for them, and masks as numbers of classes."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from zoo.data.masks import other_size
from zoo.errors import UsageError

# Stands for pixels without a class in a list of classes.
IGNORE = "ignore"
_STRANGE = -2  # what a value becomes that stands for nothing
# Without a bright red, which says "wrong" in pictures.
_DISTINCT = (
    *((45, 45, 45), (60, 180, 75), (67, 99, 216), (255, 225, 25), (145, 30, 180), (66, 212, 244), (245, 130, 49)),
    *((240, 50, 230), (191, 239, 69), (0, 128, 128), (250, 190, 212), (128, 0, 0), (154, 99, 36), (220, 190, 255)),
    *((170, 255, 195), (0, 0, 117), (128, 128, 0), (255, 250, 200), (0, 90, 0), (255, 155, 140)),
)
_LINE = re.compile(r"\s*(?P<name>.*?)\s*(?:=\s*(?P<value>\d+)(?:[\s,]+(?P<green>\d+)[\s,]+(?P<blue>\d+))?)?\s*")


class ClassList(NamedTuple):
    """Classes, and how mask files say them.

    Attributes:
        names: of the classes, in the order of their numbers.
        codes: int64, ascending: the values (or colours, as red * 65536 + green * 256 + blue) that mask files may hold.
        labels: int64, class number for each code, -1 for no class.
        coloured: whether codes are colours.
        palette: a colour (red, green, blue) for each class.
    """

    names: list[str]
    codes: np.ndarray
    labels: np.ndarray
    coloured: bool
    palette: list[tuple[int, int, int]]

    @property
    def dtype(self) -> type:
        """Of masks that are kept: its largest value stands for no class."""
        return np.uint8 if len(self.names) < 256 else np.uint16

    @property
    def void(self) -> int:
        """What stands for no class in a mask that is kept."""
        return int(np.iinfo(self.dtype).max)


def make_classes(lines: Sequence[str], where: str, ignore_index: int, first_value: int = 0) -> ClassList:
    """A list of classes from lines `NAME`, `NAME = VALUE` or `NAME = RED GREEN BLUE`.

    A class without a value has the next number, from `first_value`. The name `ignore`, with a value or a colour, stands
    for pixels without a class and may be there several times.

    Args:
        where: the lines come from, for messages.
        ignore_index: a value of pixels without a class, unless the lines give it to a class.
        first_value: the value of the first class; smaller ones are no class.

    Raises:
        UsageError: a line cannot be read, values and colours are mixed, or something is there twice.
    """
    names: list[str] = []
    known: dict[int, int] = {}
    colours: list[bool] = []
    for number, line in enumerate(lines, 1):
        if not str(line).strip():
            continue
        name, code, coloured = _parse(str(line), f"line {number} of {where}")
        if coloured is not None:
            colours.append(coloured)
        if name == IGNORE:
            if code is None:
                raise UsageError(f"line {number} of {where}: say which pixels are ignored, for instance 'ignore = 255'")
            label = -1
        else:
            if name in names:
                raise UsageError(f"line {number} of {where}: the class {name!r} is there twice")
            label = len(names)
            names.append(name)
            if code is None:
                colours.append(False)
                code = label + first_value
        if known.get(code, label) != label:
            shown = _shown(code, bool(coloured))
            raise UsageError(f"line {number} of {where}: {shown} already stands for another class")
        known[code] = label
    if not names:
        raise UsageError(f"{where} names no class; write one name a line")
    if len(set(colours)) > 1:
        raise UsageError(
            f"{where}: some classes have a colour and others not; give each 'NAME = RED GREEN BLUE', or none of them"
        )
    coloured = colours[0]
    if not coloured:
        for value in (*range(first_value), ignore_index):
            if value >= 0:
                known.setdefault(value, -1)
    codes = np.array(sorted(known), dtype=np.int64)
    labels = np.array([known[code] for code in sorted(known)], dtype=np.int64)
    by_label = {label: code for code, label in known.items()}
    palette = [_rgb(by_label[n]) for n in range(len(names))] if coloured else default_palette(len(names))
    return ClassList(names, codes, labels, coloured, palette)


def default_palette(count: int) -> list[tuple[int, int, int]]:
    """Colours for the numbers from 0 on, which is dark for the background that it often is; no two of them alike.

    The first 20 are easily told apart; of Pascal VOC's, which come after them, many are shades of dark red, green and
    blue.
    """
    return list(dict.fromkeys([*_DISTINCT, *(_voc_colour(number) for number in range(count))]))[:count]


def read_lines(path: Path) -> list[str]:
    """Lines of a text file of classes.

    Raises:
        UsageError: it is no text.
    """
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the list of classes {str(path)!r} cannot be read: {error}") from error


def read_classes(path: str, image: str, size: tuple[int, int], classes: ClassList) -> np.ndarray:
    """Class numbers (H, W) of a mask file, of `classes.dtype`, with `classes.void` where there is none.

    Indices of a palette are taken as they are, unless classes have colours; grey masks may have 1 to 32 bits.

    Args:
        path: of the mask.
        image: of its image, for messages.
        size: (height, width) of the image.

    Raises:
        UsageError: it has another size than its image, or values or colours that stand for nothing.
        OSError and others of PIL: the file is damaged or no image.
    """
    values = read_values(path, classes.coloured)
    if values.shape != tuple(size):
        raise other_size(path, values.shape, image, size)
    labels = _look_up(values, classes)
    wrong = labels == _STRANGE
    if wrong.any():
        raise _strange(path, values[wrong], classes)
    labels[labels < 0] = classes.void
    return labels.astype(classes.dtype)


def _look_up(values: np.ndarray, classes: ClassList) -> np.ndarray:
    """int32 class numbers of values, -1 for no class, `_STRANGE` for values that stand for nothing."""
    if values.dtype in (np.uint8, np.uint16):
        # A search takes ten times as long.
        every = np.full(np.iinfo(values.dtype).max + 1, _STRANGE, np.int32)
        known = classes.codes < len(every)
        every[classes.codes[known]] = classes.labels[known]
        return every[values]
    place = np.minimum(np.searchsorted(classes.codes, values), len(classes.codes) - 1)
    return np.where(classes.codes[place] == values, classes.labels[place], _STRANGE).astype(np.int32)


def read_values(path: str, coloured: bool) -> np.ndarray:
    """Whole numbers (H, W) of a mask file: its values, or colours as red * 65536 + green * 256 + blue.

    Raises:
        UsageError: a coloured picture where numbers are wanted, or values that are no whole numbers.
        OSError and others of PIL: the file is damaged or no image.
    """
    with Image.open(path) as opened:
        picture = ImageOps.exif_transpose(opened)
        if not coloured and (picture.mode in ("1", "L", "P", "I", "F") or picture.mode.startswith("I;16")):
            values = np.asarray(picture)
        else:
            values = np.asarray(picture.convert("RGB"))
    if values.ndim == 2:
        if values.dtype in (np.uint8, np.uint16):
            return values
        whole = values.astype(np.int64)
        if values.dtype.kind == "f" and (whole != values).any():
            raise UsageError(f"the mask {path!r} holds fractions; it should hold the number of a class at every pixel")
        return whole
    red, green, blue = (values[..., n] for n in range(3))
    if coloured:
        return (red.astype(np.int32) << 16) + (green.astype(np.int32) << 8) + blue
    if (red != green).any() or (red != blue).any():
        raise UsageError(
            f"the mask {path!r} is coloured, and nothing says which class a colour is: write 'NAME = RED GREEN BLUE' "
            "for each class into classes.txt, or give such lines as --data.classes"
        )
    return red


def _parse(line: str, where: str) -> tuple[str, int | None, bool | None]:
    """(name, code or None, whether the code is a colour or None)."""
    found = _LINE.fullmatch(line)
    if found is None or not found["name"]:
        raise UsageError(f"{where} is {line!r}; it should be 'NAME', 'NAME = VALUE' or 'NAME = RED GREEN BLUE'")
    if "=" in found["name"]:
        raise UsageError(f"{where} is {line!r}; after '=' comes one number, or red, green and blue")
    if found["value"] is None:
        return found["name"], None, None
    value = int(found["value"])
    if found["green"] is None:
        return found["name"], value, False
    parts = value, int(found["green"]), int(found["blue"])
    if max(parts) > 255:
        raise UsageError(f"{where} is {line!r}; red, green and blue go from 0 to 255")
    return found["name"], (parts[0] << 16) + (parts[1] << 8) + parts[2], True


def _strange(path: str, values: np.ndarray, classes: ClassList) -> UsageError:
    found, counts = np.unique(values, return_counts=True)
    few = ", ".join(
        f"{_shown(v, classes.coloured)} in {n} pixels" for v, n in list(zip(found, counts, strict=True))[:4]
    )
    more = f" and {len(found) - 4} more" if len(found) > 4 else ""
    known = ", ".join(
        f"{_shown(c, classes.coloured)} {'no class' if n < 0 else classes.names[n]}"
        for c, n in list(zip(classes.codes, classes.labels, strict=True))[:12]
    )
    known += ", ..." if len(classes.codes) > 12 else ""
    hint = " JPEG blurs the edges of masks: save them as PNG." if path.lower().endswith((".jpg", ".jpeg")) else ""
    return UsageError(
        f"the mask {path!r} holds {few}{more}, which stand for no class. Known: {known}. Mend the mask, or the list of "
        f"classes ('ignore = VALUE' for pixels without a class).{hint}"
    )


def _shown(code: int, coloured: bool) -> str:
    return "{} {} {}".format(*_rgb(code)) if coloured else str(code)


def _rgb(code: int) -> tuple[int, int, int]:
    return int(code) >> 16, int(code) >> 8 & 255, int(code) & 255


def _voc_colour(number: int) -> tuple[int, int, int]:
    parts = [0, 0, 0]
    for step in range(8):
        for channel in range(3):
            parts[channel] |= (number >> channel & 1) << 7 - step
        number >>= 3
    return parts[0], parts[1], parts[2]

"""Which mask belongs to which image of a defect."""

from pathlib import Path

from zoo.errors import UsageError


def match_masks(images: list[Path], folder: Path, masks: list[Path], root: Path) -> list[str | None]:
    """The mask of each image, None where it has none.

    A mask has its image's place and name, with or without `_mask` after it, whatever the endings.

    Args:
        images: of defects, under `folder`.
        masks: their masks, under `root`.

    Raises:
        UsageError: a mask is without its image, or it is open which mask or image is meant.
    """
    there: dict[str, Path] = {}
    for path in masks:
        first = there.setdefault(_stem(path, root), path)
        if first != path:
            raise UsageError(
                f"{str(first)!r} and {str(path)!r} are masks of one image, which may have one only; remove the other"
            )
    taken: dict[str, Path] = {}
    found = []
    for path in images:
        stem = _stem(path, folder)
        name = next((name for name in (stem + "_mask", stem) if name in there), None)
        found.append(None if name is None else str(there[name]))
        if name is not None and taken.setdefault(name, path) != path:
            raise UsageError(
                f"the mask {str(there[name])!r} fits two images, {str(taken[name])!r} and {str(path)!r}; a mask has "
                "one. Give the images different names and the mask that of its own, or remove one"
            )
    refuse_orphans([path for name, path in there.items() if name not in taken], folder)
    return found


def refuse_orphans(masks: list[Path], folder: Path) -> None:
    """Raises UsageError when there are masks left without an image in `folder`."""
    if masks:
        more = f" (and {len(masks) - 1} more)" if len(masks) > 1 else ""
        name = masks[0].stem.removesuffix("_mask")
        raise UsageError(
            f"the mask {str(masks[0])!r}{more} has no image: there is no {name!r} in {str(folder)!r}; add the image or "
            "remove the mask"
        )


def _stem(path: Path, folder: Path) -> str:
    return path.relative_to(folder).with_suffix("").as_posix()

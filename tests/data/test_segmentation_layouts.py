"""Where images and their masks are found, and what is said of folders that are not as they should be."""

from pathlib import Path

import pytest
from PIL import Image

from zoo.data.segmentation_layouts import open_scenes
from zoo.errors import UsageError


def tree(root: Path, *names: str) -> Path:
    """Tiny pictures; texts where a name ends in .txt, of the words after a colon."""
    for name in names:
        name, _, words = name.partition(":")
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".txt"):
            (root / name).write_text("\n".join(words.split()))
        else:
            Image.new("L", (4, 4)).save(root / name)
    return root


def seen(found, root):
    return {
        split: [tuple(Path(path).relative_to(root).as_posix() for path in scene) for scene in scenes]
        for split, scenes in found.splits.items()
    }


def test_by_split(tmp_path):
    root = tree(tmp_path, "train/images/a.jpg", "train/images/lot/a.png", "train/masks/a.png", "train/masks/lot/a.png")
    tree(root, "valid/imgs/b.bmp", "valid/labels/b_mask.png", "testing/images/c.png", "testing/masks/c.tif")
    tree(root, "train/images/.hidden/x.png", "train/images/._a.png", "train/masks/.x.png")
    found = open_scenes(root)
    assert found.layout == "splits"
    assert seen(found, root) == {
        "train": [("train/images/a.jpg", "train/masks/a.png"), ("train/images/lot/a.png", "train/masks/lot/a.png")],
        "val": [("valid/imgs/b.bmp", "valid/labels/b_mask.png")],
        "test": [("testing/images/c.png", "testing/masks/c.tif")],
    }


@pytest.mark.parametrize(
    ("images", "masks", "train", "val"),
    [
        ("images", "masks", "train", "val"),
        ("images", "annotations", "training", "validation"),  # ADE20K's
        ("images", "annotations", "train2017", "val2017"),  # COCO's, with its pixel maps
    ],
)
def test_by_kind(tmp_path, images, masks, train, val):
    root = tree(tmp_path, f"{images}/{train}/a.jpg", f"{masks}/{train}/a.png")
    tree(root, f"{images}/{val}/b.jpg", f"{masks}/{val}/b.png", f"{images}/test/c.jpg")
    found = open_scenes(root)
    assert found.layout == "kinds"
    assert seen(found, root) == {
        "train": [(f"{images}/{train}/a.jpg", f"{masks}/{train}/a.png")],
        "val": [(f"{images}/{val}/b.jpg", f"{masks}/{val}/b.png")],
    }


def test_flat(tmp_path):
    root = tree(tmp_path, "images/a.jpg", "images/b.jpg", "masks/a.png", "masks/b_mask.gif")
    found = open_scenes(root)
    assert found.layout == "flat"
    assert seen(found, root) == {"train": [("images/a.jpg", "masks/a.png"), ("images/b.jpg", "masks/b_mask.gif")]}


def test_test_images_without_masks_are_left_alone(tmp_path):
    root = tree(tmp_path, "train/images/a.jpg", "train/masks/a.png", "test/images/b.jpg")
    assert set(open_scenes(root).splits) == {"train"}


VOC = (
    *("JPEGImages/a.jpg", "JPEGImages/b.jpg", "JPEGImages/c.jpg", "SegmentationClass/a.png", "SegmentationClass/b.png"),
    *("ImageSets/Segmentation/train.txt:a", "ImageSets/Segmentation/val.txt:b", "ImageSets/Segmentation/test.txt:c"),
)


@pytest.mark.parametrize("root", [".", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_pascal_voc_through_torchvision(tmp_path, root):
    year = tree(tmp_path / "VOCdevkit" / "VOC2012", *VOC)
    found = open_scenes(tmp_path / root)
    assert found.layout == "voc"
    assert seen(found, year) == {
        "train": [("JPEGImages/a.jpg", "SegmentationClass/a.png")],
        "val": [("JPEGImages/b.jpg", "SegmentationClass/b.png")],
    }
    assert len(found.class_lines) == 21
    assert found.class_lines[15] == "person"


def test_pascal_voc_2007_has_test_masks(tmp_path):
    year = tree(tmp_path / "VOCdevkit" / "VOC2007", *VOC, "SegmentationClass/c.png")
    assert seen(open_scenes(tmp_path), year)["test"] == [("JPEGImages/c.jpg", "SegmentationClass/c.png")]


def test_pascal_voc_that_is_not_whole(tmp_path):
    year = tree(tmp_path / "VOCdevkit" / "VOC2012", *VOC)
    (year / "SegmentationClass" / "b.png").unlink()
    with pytest.raises(UsageError, match=r"SegmentationClass/b\.png' does not exist, but the lists"):
        open_scenes(tmp_path)
    tree(tmp_path / "VOCdevkit" / "VOC2007", *VOC)
    with pytest.raises(UsageError, match=r"several years; give one, for instance --data.root .*VOC2012"):
        open_scenes(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    year.rename(tmp_path / "elsewhere" / "VOC2012")
    with pytest.raises(UsageError, match="lies in VOCdevkit/VOC2012"):
        open_scenes(tmp_path / "elsewhere" / "VOC2012")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("train/images/a.jpg", "train/masks/a.png", "train/masks/b.png"), r"the mask .*b\.png' has no image: .* 'b'"),
        (("train/images/a.jpg", "train/images/b.jpg", "train/masks/a.png"), r"the image .*b\.jpg' has no mask: .* 'b'"),
        (
            ("images/a.jpg", "masks/a.png", "masks/b_mask.png", "masks/c_mask.png"),
            r"b_mask\.png' \(and 1 more\) has no image: there is no 'b' in",
        ),
        (("images/a.jpg", "images/a.png", "masks/a.png"), r"a\.jpg' and .*a\.png' have one name"),
        (("train/images/a.jpg", "val/images/a.jpg"), r"images' has no masks beside it; add masks/ \(masks or mask"),
        (("train/masks/a.png",), "has no images beside it; add images/"),
        (
            ("train/images/a.jpg", "train/masks/a.png", "val/images/a.jpg"),
            r"val/images' has no masks beside it; add .* in '.*val'",
        ),
        (("images/train/a.jpg", "masks/val/a.png"), "has no masks beside it; .* with a folder 'train'"),
        (("images/notes.txt:x", "masks/a.png"), r"no images in .*images' \(\.png"),
        (("photos/a.jpg",), r"holds photos; it should hold \{train,val,test\}/\{images,masks\}"),
        (("read.txt:x",), r"holds read.txt; it should hold"),
    ],
)
def test_folders_that_are_not_as_they_should_be(tmp_path, names, message):
    root = tree(tmp_path, *names)
    with pytest.raises(UsageError, match=message):
        open_scenes(root)


def test_a_layout_by_name(tmp_path):
    root = tree(tmp_path, "images/train/a.jpg", "masks/train/a.png")
    assert open_scenes(root, "kinds").layout == "kinds"
    with pytest.raises(UsageError, match="it should hold"):
        open_scenes(root, "splits")
    with pytest.raises(UsageError, match=r"unknown layout 'kind'. Did you mean 'kinds'"):
        open_scenes(root, "kind")

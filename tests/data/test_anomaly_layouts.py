"""Where images of each layout are found, and what is said of folders that are not as they should be."""

import csv
from pathlib import Path

import pytest
from PIL import Image

from zoo.data import AnomalyDetection
from zoo.data.anomaly_layouts import open_layout
from zoo.errors import UsageError


def tree(root: Path, *names: str) -> Path:
    """Tiny pictures; "a/b*3.png" are three of them."""
    for name in names:
        stem, _, rest = name.partition("*")
        count, _, ending = rest.partition(".")
        files = [f"{stem}{n}.{ending}" for n in range(int(count))] if rest else [name]
        for file in files:
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (4, 4)).save(root / file)
    return root


def seen(photos, root) -> list[tuple]:
    def short(path):
        return None if path is None else Path(path).relative_to(root).as_posix()

    return [(short(p.path), p.label, p.kind, short(p.mask)) for p in photos]


MVTEC = (
    *("train/good/*3.png", "test/good/0.png", "test/hole/0.png", "test/hole/1.jpg", "test/dent/0.png"),
    *("ground_truth/hole/0_mask.png", "ground_truth/hole/1.png"),
)


def test_mvtec(tmp_path):
    root = tree(tmp_path, *MVTEC)
    layout = open_layout(root, None, "auto")
    assert seen(layout.train(), root) == [(f"train/good/{n}.png", 0, "good", None) for n in range(3)]
    assert layout.val() == []
    assert layout.has_test()
    assert not layout.holds_out
    assert seen(layout.test(), root) == [
        ("test/dent/0.png", 1, "dent", None),
        ("test/good/0.png", 0, "good", None),
        ("test/hole/0.png", 1, "hole", "ground_truth/hole/0_mask.png"),
        ("test/hole/1.jpg", 1, "hole", "ground_truth/hole/1.png"),
    ]


def test_names_of_good_folders_and_deeper_and_hidden_images(tmp_path):
    root = tree(tmp_path, "train/OK/lot1/0.png", "train/OK/lot2/0.BMP", "test/ok/0.png", "test/ko/0.png")
    tree(root, "train/OK/.thumbs/0.png", "train/.cache/0.png", "train/OK/._0.png")
    layout = open_layout(root, None, "mvtec")
    assert [row[0] for row in seen(layout.train(), root)] == ["train/OK/lot1/0.png", "train/OK/lot2/0.BMP"]
    assert [row[1:3] for row in seen(layout.test(), root)] == [(1, "ko"), (0, "good")]


def test_train_without_a_test_folder(tmp_path):
    layout = open_layout(tree(tmp_path, "train/*2.png"), None, "auto")
    assert len(layout.train()) == 2
    assert not layout.has_test()
    with pytest.raises(UsageError, match=r"no test images in .*test'; it should hold good"):
        layout.test()


@pytest.mark.parametrize("name", ["validation", "val", "valid/good"])
def test_own_validation_images(tmp_path, name):
    root = tree(tmp_path, *MVTEC, f"{name}/*2.png")
    assert [row[0] for row in seen(open_layout(root, None, "auto").val(), root)] == [
        f"{name}/{n}.png" for n in range(2)
    ]


def test_mvtec_ad_2(tmp_path):
    root = tree(tmp_path / "ad2", "can/train/good/*2.png", "can/validation/good/*2.png")
    tree(root / "can", "test_public/good/0.png", "test_public/bad/0.png", "test_public/ground_truth/bad/0_mask.png")
    tree(root / "can", "test_private/0.png", "test_private_mixed/0.png")
    layout = open_layout(root, "can", "auto")
    can = root / "can"
    assert len(layout.train()) == 2
    assert [row[0] for row in seen(layout.val(), can)] == ["validation/good/0.png", "validation/good/1.png"]
    assert seen(layout.test(), can) == [
        ("test_public/bad/0.png", 1, "bad", "test_public/ground_truth/bad/0_mask.png"),
        ("test_public/good/0.png", 0, "good", None),
    ]
    tree(can, "validation/scratch/0.png")
    with pytest.raises(UsageError, match=r"validation/scratch' lies among the good images"):
        layout.val()


def visa(root: Path, rows: list[list[str]] | None = None) -> Path:
    tree(
        root, "candle/Data/Images/Normal/*3.JPG", "candle/Data/Images/Anomaly/0.JPG", "candle/Data/Masks/Anomaly/0.png"
    )
    tree(root, "pcb1/Data/Images/Normal/0.JPG")
    (root / "split_csv").mkdir()
    normal, masks = "candle/Data/Images/Normal", "candle/Data/Masks/Anomaly"
    rows = rows or [
        ["candle", "train", "normal", f"{normal}/0.JPG", ""],
        ["candle", "train", "normal", f"{normal}/2.JPG", ""],
        ["candle", "test", "normal", f"{normal}/1.JPG", ""],
        ["candle", "test", "anomaly", "candle/Data/Images/Anomaly/0.JPG", f"{masks}/0.png"],
        ["pcb1", "train", "normal", "pcb1/Data/Images/Normal/0.JPG", ""],
    ]
    with open(root / "split_csv" / "1cls.csv", "w", newline="") as file:
        csv.writer(file).writerows([["object", "split", "label", "image", "mask"], *rows])
    return root


@pytest.mark.parametrize("inside", [False, True])
def test_visa(tmp_path, inside):
    root = visa(tmp_path / "visa")
    layout = open_layout(root / "candle", None, "auto") if inside else open_layout(root, "candle", "auto")
    train, test = "candle/Data/Images/Normal", "candle/Data/Images/Anomaly"
    assert [row[0] for row in seen(layout.train(), root)] == [f"{train}/0.JPG", f"{train}/2.JPG"]
    assert seen(layout.test(), root) == [
        (f"{train}/1.JPG", 0, "good", None),
        (f"{test}/0.JPG", 1, "anomaly", "candle/Data/Masks/Anomaly/0.png"),
    ]
    assert [photo.numbered for photo in layout.test()] == [False, True]


@pytest.mark.parametrize(
    ("rows", "split", "words"),
    [
        (
            [["candle", "train", "normal", "candle/Data/Images/Normal/9.JPG", ""]],
            "train",
            "Normal/9.JPG' does not exist",
        ),
        (
            [["candle", "train", "anomaly", "candle/Data/Images/Anomaly/0.JPG", ""]],
            "train",
            "no good image, into train",
        ),
        ([["other", "train", "normal", "x", ""]], "train", "no images to train on for 'candle'"),
        ([["candle", "test", "normal", "candle/Data/Images/Normal/0.JPG", ""]], "test", "Anomaly/0.png' has no image"),
    ],
)
def test_visa_with_a_wrong_table(tmp_path, rows, split, words):
    layout = open_layout(visa(tmp_path, rows), "candle", "visa")
    with pytest.raises(UsageError, match=words):
        layout.train() if split == "train" else layout.test()


def test_visa_without_its_table_or_its_columns(tmp_path):
    root = visa(tmp_path)
    table = root / "split_csv" / "1cls.csv"
    table.write_text("object,split\n")
    with pytest.raises(UsageError, match="should have the columns image, label, mask, object, split"):
        open_layout(root, "candle", "auto").train()
    table.unlink()
    with pytest.raises(UsageError, match=r"1cls.csv'; it comes with the dataset"):
        open_layout(root, "candle", "auto").train()


@pytest.mark.parametrize("good", ["", "good/", "Normal/"])
def test_plain_folders(tmp_path, good):
    root = tree(tmp_path, f"{good}*3.png", "bad/0.png", "bad/dent/0.png", "bad/dent/1.png", "masks/dent/0.png")
    layout = open_layout(root, None, "auto")
    assert layout.holds_out
    assert [row[0] for row in seen(layout.train(), root)] == [f"{good}{n}.png" for n in range(3)]
    assert seen(layout.test(), root) == [
        ("bad/0.png", 1, "bad", None),
        ("bad/dent/0.png", 1, "dent", "masks/dent/0.png"),
        ("bad/dent/1.png", 1, "dent", None),
    ]


def test_plain_folders_by_name(tmp_path):
    root = tree(tmp_path, "OK/*2.png", "NOK/0.png", "truth/0_mask.png")
    for bad, masks in (("../NOK", "../truth"), (str(root / "NOK"), str(root / "truth"))):
        layout = open_layout(root / "OK", None, "auto", bad, masks)
        assert len(layout.train()) == 2
        (photo,) = layout.test()
        assert Path(photo.mask).name == "0_mask.png"
    with pytest.raises(UsageError, match=r"--data\.bad 'NG' is no folder"):
        open_layout(root / "OK", None, "auto", "NG")
    with pytest.raises(UsageError, match=r"go with --data.layout folders, not mvtec"):
        open_layout(root / "OK", None, "mvtec", "NOK")


def test_a_folder_of_good_images_alone(tmp_path):
    layout = open_layout(tree(tmp_path, "*2.png"), None, "auto")
    assert len(layout.train()) == 2
    assert not layout.has_test()
    with pytest.raises(UsageError, match=r"no defective images to test on; put some into .*bad'"):
        layout.test()


def test_categories(tmp_path):
    root = tmp_path / "all"
    for name in ("bottle", "cable", "capsule"):
        tree(root / name, *MVTEC)
    assert open_layout(root, "cable", "auto").folder == root / "cable"
    assert open_layout(root / "cable", None, "auto").folder == root / "cable"
    assert open_layout(root / "cable", "cable", "auto").folder == root / "cable"
    with pytest.raises(UsageError, match=r"holds 3 categories; give --data\.category, one of bottle, cable, capsule"):
        open_layout(root, None, "auto")
    with pytest.raises(UsageError, match=r"'capsul'\. Did you mean 'capsule'"):
        open_layout(root, "capsul", "auto")
    with pytest.raises(UsageError, match=r"is one category itself; leave --data.category cable out"):
        open_layout(root / "bottle", "cable", "auto")
    with pytest.raises(UsageError, match="is not laid out as visa: CATEGORY/Data"):
        open_layout(root, None, "visa")
    with pytest.raises(UsageError, match=r"'mvtek'\. Did you mean 'mvtec'"):
        open_layout(root, None, "mvtek")


def test_categories_of_plain_folders(tmp_path):
    root = tree(tmp_path, "nuts/good/*2.png", "bolts/good/*2.png")
    assert open_layout(root, "nuts", "auto").folder == root / "nuts"
    with pytest.raises(UsageError, match=r"'nut'\. Did you mean 'nuts'"):
        open_layout(root, "nut", "auto")
    with pytest.raises(UsageError, match=r"no good images in .*; it holds the folders bolts, nuts"):
        open_layout(root, None, "auto")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["train/scratch/0.png", "train/good/0.png"], r"train/scratch' lies among the good images.*test/scratch"),
        (["test/hole/0.png", "train/good/readme.gif.txt"], "no good images in .*train/good'; a detector learns"),
        (["0.png", "scratch/0.png"], r"scratch': are its images good or not"),
        (["0.png", "good/0.png"], r"0.png' lies beside good/"),
        (["train/0.png", "train/good/0.png"], r"train/0.png' lies beside good/"),
        (["bad/0.png"], "no good images in .*; it holds the folders bad"),
        (["bad/0.png", "good/x.txt"], "no good images in .*good'; a detector learns"),
        (["notes/x.txt"], "no good images in .*; it holds the folders notes"),
        ([], "no good images in .*; it holds nothing"),
    ],
)
def test_what_train_may_not_be(tmp_path, names, words):
    (tmp_path / "train").mkdir() if any(name.startswith("train") for name in names) else None
    for name in names:
        if name.endswith(".txt"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("x")
        else:
            tree(tmp_path, name)
    with pytest.raises(UsageError, match=words) as caught:
        open_layout(tmp_path, None, "auto").train()
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            "ground_truth/hole/7_mask.png",
            r"ground_truth/hole/7_mask\.png' has no image: there is no '7' in .*test/hole'",
        ),
        ("ground_truth/crack/*2_mask.png", r"crack/0_mask\.png' \(and 1 more\) has no image.*test/crack'"),
        ("test/0.png", r"test/0\.png' lies beside the folders of kinds"),
        ("ground_truth/good/7_mask.png", r"ground_truth/good/7_mask\.png' has no image.*no '7' in .*test/good'"),
        ("ground_truth/7_mask.png", r"ground_truth/7_mask\.png' lies beside the folders of kinds; move it to .*KIND"),
        ("test/hole/0.jpg", r"hole/0_mask\.png' fits two images, .*hole/0\.jpg' and .*hole/0\.png'"),
        ("ground_truth/hole/0_mask.bmp", r"hole/0_mask\.bmp' and .*hole/0_mask\.png' are masks of one image"),
        ("test/good/hole/9.png", r"good/hole/9\.png' lies among the good images, in a folder 'hole' as defects have"),
    ],
)
def test_what_test_may_not_be(tmp_path, more, words):
    root = tree(tmp_path, *MVTEC)
    if "*" in more:
        for n in range(2):
            tree(root, more.replace("*2", str(n)))
    else:
        tree(root, more)
    layout = open_layout(root, None, "auto")
    assert len(layout.train()) == 3
    with pytest.raises(UsageError, match=words):
        layout.test()


def test_mask_without_image_in_plain_folders(tmp_path):
    root = tree(tmp_path, "good/*2.png", "bad/0.png", "masks/0_mask.png", "masks/5_mask.png")
    with pytest.raises(UsageError, match=r"masks/5_mask\.png' has no image: there is no '5' in .*bad'"):
        open_layout(root, None, "auto").test()


def test_good_images_may_have_masks_and_images_without_one_may_share_a_name(tmp_path):
    root = tree(tmp_path, *MVTEC, "ground_truth/good/0_mask.png", "test/dent/0.jpg")
    rows = seen(open_layout(root, None, "auto").test(), root)
    assert ("test/good/0.png", 0, "good", None) in rows
    assert [row for row in rows if row[2] == "dent"] == [
        ("test/dent/0.jpg", 1, "dent", None),
        ("test/dent/0.png", 1, "dent", None),
    ]


@pytest.mark.parametrize("bad", ["good/scratch", "good", ".", "..", "link"])
def test_a_folder_of_bad_images_may_not_share_images_with_that_of_good_ones(tmp_path, bad):
    root = tree(tmp_path / "nuts", "good/*3.png", "good/scratch/*2.png")
    (root / "link").symlink_to(root / "good" / "scratch")
    words = "folder of (defective|good) images, (is also|lies inside .*) that of (defective|good) images: its"
    with pytest.raises(UsageError, match=words) as caught:
        open_layout(root, None, "auto", bad)
    assert str(root / "good") in str(caught.value)
    assert f"apart, such as in {root}/{{good,bad,masks}}" in str(caught.value)


@pytest.mark.parametrize(
    ("bad", "masks", "words"),
    [
        (".", "", "nuts', the folder of good images, is also that of defective images"),
        ("..", "", "nuts', the folder of good images, lies inside .*, that of defective images"),
        ("spoilt", "spoilt/masks", "masks', the folder of masks, lies inside .*spoilt', that of defective images"),
        ("spoilt", ".", "nuts', the folder of good images, is also that of masks"),
    ],
)
def test_loose_good_images_may_not_be_bad_ones_or_masks(tmp_path, bad, masks, words):
    root = tree(tmp_path / "nuts", "*3.png", "spoilt/0.png", "spoilt/masks/0.png")
    with pytest.raises(UsageError, match=words):
        open_layout(root, None, "auto", bad, masks)


@pytest.mark.parametrize("bad", ["defects/scratch", "./defects/scratch/", "nuts/defects/scratch", "absolute", "link"])
def test_bad_images_inside_a_folder_of_loose_good_ones_however_written(tmp_path, monkeypatch, bad):
    root = tree(tmp_path / "nuts", "*3.png", "defects/scratch/*2.png", "defects/truth/0_mask.png")
    (tmp_path / "link").symlink_to(root / "defects" / "scratch")
    monkeypatch.chdir(tmp_path)
    bad = {"absolute": str(root / "defects" / "scratch"), "link": str(tmp_path / "link")}.get(bad, bad)
    layout = open_layout(Path("nuts"), None, "auto", bad, str(root / "defects" / "truth"))
    assert [photo.path for photo in layout.train()] == [f"nuts/{n}.png" for n in range(3)]
    assert [Path(photo.path).resolve() for photo in layout.test()] == [
        root / "defects" / "scratch" / f"{n}.png" for n in range(2)
    ]
    assert [photo.mask is None for photo in layout.test()] == [False, True]
    tree(root, "defects/dent/0.png")
    with pytest.raises(UsageError, match="'nuts/defects/dent': are its images good or not"):
        layout.train()


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["good/0.png", "good/NG/1.png"], r"good/NG/1\.png' lies among the good images, .*'NG' as defects.*bad/NG'"),
        (["good/0.png", "good/lot1/dent/1.png", "bad/dent/2.png"], r"a folder 'dent' as defects have.*to .*bad/dent'"),
        (["train/good/0.png", "train/good/dent/1.png", "test/dent/2.png"], r"'dent' as defects have.*test/dent'; if"),
        (["train/good/defects/1.png"], r"a folder 'defects' as defects have"),
    ],
)
def test_folders_of_good_images_are_not_called_as_defects(tmp_path, names, words):
    with pytest.raises(UsageError, match=words):
        open_layout(tree(tmp_path, *names), None, "auto").train()


def test_own_validation_images_are_not_called_as_defects(tmp_path):
    layout = open_layout(tree(tmp_path, *MVTEC, "val/good/hole/0.png"), None, "auto")
    with pytest.raises(UsageError, match="'hole' as defects have"):
        layout.val()


@pytest.mark.filterwarnings("ignore:.*have no mask")
def test_a_file_is_not_both_learned_from_and_tested_on(tmp_path):
    root = tree(tmp_path, *MVTEC, "val/*2.png")
    (root / "test" / "hole" / "9.png").symlink_to(root / "val" / "1.png")
    with pytest.raises(UsageError, match=r"hole/9\.png', to test on, is the same file as .*val/1\.png', a good image"):
        AnomalyDetection(str(root), num_workers=0).test_dataloader()
    # Where validation images are held out of train, those of val/ are not used.
    assert len(AnomalyDetection(str(root), num_workers=0, val_split=0.4).test_dataloader().dataset) == 5
    (root / "test" / "good" / "9.png").symlink_to(root / "train" / "good" / "2.png")
    with pytest.raises(UsageError, match=r"good/9\.png', to test on, is the same file as .*train/good/2\.png'"):
        AnomalyDetection(str(root), num_workers=0, val_split=0.4).test_dataloader()

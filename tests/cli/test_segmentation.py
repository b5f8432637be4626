"""A class for every pixel from the first command to the last, on drawn images; bad input is one sentence."""

import contextlib
import csv
import io
import json
import shutil
import warnings

import numpy as np
import pytest
from PIL import Image

from zoo.cli import main

LINES = "ground = 0 0 0\nsquare = 250 0 0\nstripe = 0 0 250\nignore = 9 9 9\n"


def draw(generator, size=(40, 48)):
    height, width = size
    pixels = generator.integers(0, 60, (height, width, 3)).astype("uint8")
    mask = np.zeros((height, width, 3), "uint8")
    row, top, left = (int(v) for v in generator.integers(0, 24, 3))
    mask[row : row + 6] = (0, 0, 250)
    mask[top : top + 14, left : left + 14] = (250, 0, 0)
    mask[:, :2] = 9
    pixels[mask[..., 2] == 250, 1] += 150
    pixels[mask[..., 0] == 250] += 180
    return Image.fromarray(pixels), Image.fromarray(mask)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """16 images of 40 x 48 to train on, 4 to validate and 4 to test on; coloured masks."""
    root, generator = tmp_path_factory.mktemp("scenes"), np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 4), ("test", 4)):
        for folder in ("images", "masks"):
            (root / split / folder).mkdir(parents=True)
        for index in range(count):
            image, mask = draw(generator)
            image.save(root / split / "images" / f"{index:03d}.png")
            mask.save(root / split / "masks" / f"{index:03d}.png")
    (root / "classes.txt").write_text(LINES)
    return root


def line(root, *more):
    """`zoo fit` with a shipped recipe, small."""
    return [
        *("fit", "--config", "segmentation/camvid", "--data.root", str(root), "--run", "x"),
        *("--data.crop_size", "32", "--data.num_workers", "0", "--data.batch_size", "8", "--data.scale", "[1, 1.2]"),
        *("--model.backbone", "test_efficientnet", "--model.lr", "1e-2", "--trainer.accelerator", "cpu"),
        *("--model.head_options", "{pyramid_channels: 32, hidden_channels: 64}", "--trainer.precision", "32-true"),
        *("--trainer.max_epochs", "12", "--trainer.check_val_every_n_epoch", "6", "--model.warmup_epochs", "1"),
        *more,
    ]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, scenes):
    """Run folder of a finished fit and what it printed; not to be written into."""
    folder, out = tmp_path_factory.mktemp("fit"), io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(out):
        assert main(line(scenes, "--run", str(folder / "x"))) == 0
    return folder / "x", out.getvalue()


@pytest.fixture
def run(fitted, tmp_path):
    """A copy of the finished run, as runs/x."""
    shutil.copytree(fitted[0], tmp_path / "runs" / "x")
    return tmp_path / "runs" / "x"


def test_a_fit_says_and_leaves_what_a_person_looks_for(fitted):
    folder, out = fitted
    assert "fpn on test_efficientnet" in out
    assert "3 classes" in out
    for words in ("mIoU", "validation.html", "zoo export", "zoo test --run", "stripe"):
        assert words in out
    record = json.loads((folder / "record.json").read_text())
    assert record["head"] == "fpn"
    assert set(record["val"]["per_class"]) == {"ground", "square", "stripe"}
    assert record["val"]["miou"] > 0.5  # a third is guessing
    with open(folder / "metrics.csv", newline="") as file:
        values = [float(row["val/miou"]) for row in csv.DictReader(file) if row["val/miou"]]
    assert len(values) == 2
    assert len(list((folder / "pictures").glob("val_*.png"))) == 4


def test_test_export_and_predict_agree(zoo, run, scenes, tmp_path):
    tested = zoo("test", "--run", "x")
    assert tested.status == 0, tested.err
    assert "report.html" in tested.out
    record = json.loads((run / "record.json").read_text())
    written = zoo("export", "x", "model.onnx")
    assert written.status == 0, written.err
    told = zoo("predict", "model.onnx", str(scenes / "test" / "images"), "--out", "out")
    assert told.status == 0, told.err
    right, union = np.zeros(3), np.zeros(3)
    colours = np.array([(0, 0, 0), (250, 0, 0), (0, 0, 250)])
    for path in sorted((tmp_path / "out" / "masks").glob("*.png")):
        classes = np.asarray(Image.open(path))
        drawn = np.asarray(Image.open(scenes / "test" / "masks" / path.name))
        for number, colour in enumerate(colours):
            truth, found = (drawn == colour).all(2), (classes == number) & (drawn != 9).all(2)
            right[number] += (truth & found).sum()
            union[number] += (truth | found).sum()
    # What the files of the deployed model say is what the run's own test said.
    assert (right / union).mean() == pytest.approx(record["test"]["miou"], abs=1e-3)
    with Image.open(tmp_path / "out" / "masks" / "000.png") as mask:
        assert mask.getpalette()[3:6] == [250, 0, 0]


def test_validate_on_other_data_and_at_another_size(zoo, run, scenes):
    done = zoo("validate", "--run", "x", "--data.eval_size", "[24, 30]")
    assert done.status == 0, done.err
    assert "mIoU" in done.out
    windowed = zoo("validate", "--run", "x", "--model.window", "32")
    assert windowed.status == 0, windowed.err


def spoil(scenes, folder, how):
    root = folder / "spoilt"
    shutil.copytree(scenes, root)
    masks, images = root / "train" / "masks", root / "train" / "images"
    if how == "mask without image":
        (images / "003.png").unlink()
    elif how == "image without mask":
        (masks / "003.png").unlink()
    elif how == "colour":
        mask = np.asarray(Image.open(masks / "000.png")).copy()
        mask[:2, :5] = (1, 2, 3)
        Image.fromarray(mask).save(masks / "000.png")
    elif how == "size":
        Image.new("RGB", (20, 20)).save(masks / "000.png")
    elif how == "value":
        (root / "classes.txt").write_text("ground\nsquare\nstripe\n")
        for path in root.rglob("masks/*.png"):
            Image.fromarray(np.full((40, 48), 7 if path.name == "000.png" else 1, "uint8")).save(path)
    elif how == "classes":
        (root / "classes.txt").unlink()
    return root


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("mask without image", ["003.png"]),
        ("image without mask", ["003.png"]),
        ("colour", ["000.png", "1 2 3 in 10 pixels"]),
        ("value", ["000.png", "7 in 1920 pixels"]),
        ("size", ["000.png", "20 x 20", "40 x 48"]),
        ("classes", ["classes.txt"]),
    ],
)
def test_bad_data_is_one_sentence_and_leaves_no_run(zoo, scenes, tmp_path, how, words):
    done = zoo(*line(spoil(scenes, tmp_path, how)))
    assert done.status == 2
    for word in words:
        assert word in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--model.head", "fpm"], ["fpm", "fpn"]),
        (["--model.head_options", "{width: 3}"], ["width", "pyramid_channels"]),
        (["--model.backbone", "resnet19"], ["resnet19", "resnet18"]),
        (["--model.backbone", "test_maxvit", "--data.crop_size", "30"], ["30 x 30", "32 x 32"]),
        (["--model.loss", "dise"], ["dise", "dice"]),
        (["--model.metrics", "[hd96]"], ["hd96", "hd95"]),
        (["--model.window_overlap", "9"], ["window"]),
        (["--model.class_weights", "[1, 2]"], ["2 entries for 3 classes"]),
        (["--model.class_weights", "mean"], ["mean", "median"]),
        (["--model.img_size", "32"], ["model.img_size", "--data.crop_size"]),
        (["--model.palette", "[[1, 2, 3]]"], ["model.palette"]),
        (["--data.ignore_index", "1"], ["ignore_index"]),
        (["--data.crop_size", "0"], ["crop_size"]),
    ],
)
def test_bad_options_are_one_sentence_and_leave_no_run(zoo, scenes, tmp_path, more, words):
    done = zoo(*line(scenes, *more))
    assert done.status == 2
    for word in words:
        assert word in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()

"""A detector of anomalies from the first command to the last, on drawn images: fit, test, export, predict."""

import contextlib
import csv
import io
import json
import shutil
import warnings

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from zoo.cli import main

METHODS = ("l2bt", "memory_bank")


def draw(folder, generator, defective=False):
    pixels = generator.integers(90, 120, (32, 32, 3)).astype("uint8")
    pixels[::4] += 60
    mask = np.zeros((32, 32), dtype="uint8")
    if defective:
        top, left = generator.integers(0, 24, 2)
        mask[top : top + 8, left : left + 8] = 255
        pixels[mask > 0] = 240
    return Image.fromarray(pixels), Image.fromarray(mask)


@pytest.fixture(scope="module")
def cloth(tmp_path_factory):
    """MVTec's layout: 24 good images to train on, 4 good and 4 with a spot to test on."""
    root = tmp_path_factory.mktemp("cloth")
    generator = np.random.default_rng(0)
    for folder in ("train/good", "test/good", "test/spot", "ground_truth/spot"):
        (root / folder).mkdir(parents=True)
    for index in range(24):
        draw(root, generator)[0].save(root / "train" / "good" / f"{index:03d}.png")
    for index in range(4):
        draw(root, generator)[0].save(root / "test" / "good" / f"{index:03d}.png")
        image, mask = draw(root, generator, defective=True)
        image.save(root / "test" / "spot" / f"{index:03d}.png")
        mask.save(root / "ground_truth" / "spot" / f"{index:03d}_mask.png")
    return root


def line(method, root, *more):
    """`zoo fit` with the shipped recipe, small."""
    return [
        *("fit", "--config", f"anomaly/{method}", "--data.root", str(root), "--run", "x"),
        *("--data.img_size", "32", "--data.num_workers", "0", "--data.batch_size", "4"),
        *("--model.backbone", "test_efficientnet", "--model.layers", "[1, 2]", "--trainer.accelerator", "cpu"),
        *(["--trainer.max_epochs", "2"] if method == "l2bt" else []),
        *more,
    ]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, cloth):
    """Method -> run folder of a finished fit and what it printed; not to be written into."""
    done = {}
    for method in METHODS:
        folder = tmp_path_factory.mktemp(method)
        out = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(out):
            assert main(line(method, cloth, "--run", str(folder / "x"))) == 0
        done[method] = folder / "x", out.getvalue()
    return done


@pytest.fixture
def run(fitted, tmp_path):
    """Copies a finished run to runs/x and gives its folder."""

    def copy(method):
        shutil.copytree(fitted[method][0], tmp_path / "runs" / "x")
        return tmp_path / "runs" / "x"

    return copy


@pytest.mark.parametrize("method", METHODS)
def test_a_fit_says_and_leaves_what_a_person_looks_for(fitted, method):
    folder, out = fitted[method]
    assert f"{method} on test_efficientnet" in out
    for words in ("images", "pixels", "model.onnx", "zoo test --run", "synthetic defects"):
        assert words in out
    best = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    assert torch.isfinite(best["state_dict"]["threshold"])
    record = json.loads((folder / "record.json").read_text())
    assert record["method"] == method
    assert record["backbone"] == "test_efficientnet"
    assert 0 <= record["val"]["image_auroc"] <= 1
    with open(folder / "metrics.csv", newline="") as file:
        assert [row for row in csv.DictReader(file) if row["val/selection"]]


@pytest.mark.parametrize("method", METHODS)
def test_test_and_validate(zoo, run, method):
    folder = run(method)
    before = (folder / "checkpoints" / "best.ckpt").read_bytes()
    tested = zoo("test", "--run", "x")
    assert tested.status == 0, tested.err
    assert "taken from validation images alone" in tested.out
    assert "report.html" in tested.out
    record = json.loads((folder / "record.json").read_text())
    assert {"image_auroc", "pixel_auroc", "aupro_0.3", "f1"} <= set(record["test"])
    assert (folder / "report.html").is_file()
    # The figures differ from those of validation, and the checkpoint is what it was.
    assert record["test"]["good_score"] != record["val"]["good_score"]
    assert (folder / "checkpoints" / "best.ckpt").read_bytes() == before
    validated = zoo("validate", "--run", "x")
    assert validated.status == 0, validated.err
    assert "synthetic defects" in validated.out


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_export_and_predict(zoo, run, cloth, tmp_path, method):
    pytest.importorskip("onnxruntime", reason="the export extra is not installed")
    run(method)
    done = zoo("export", "x", "model.onnx")
    assert done.status == 0, done.err
    picture = str(cloth / "test" / "spot" / "000.png")
    answers = [zoo("predict", model, picture, "--out", name) for name, model in (("a", "model.onnx"), ("b", "x"))]
    assert [answer.status for answer in answers] == [0, 0], answers
    tables = []
    for name in "ab":
        (table,) = (tmp_path / name).glob("*.csv")
        with open(table, newline="") as file:
            tables.append(next(csv.DictReader(file)))
    # The same pixels through onnxruntime and through torch: the exported map is held to 1e-4.
    assert float(tables[0]["score"]) == pytest.approx(float(tables[1]["score"]), rel=1e-3)


def test_resume_of_a_bank_that_is_done(zoo, run):
    run("memory_bank")
    again = zoo("fit", "--run", "x", "--resume")
    assert again.status == 0, again.err
    assert "trained to its end already" in again.out


def test_a_longer_fit_goes_on(zoo, run, tmp_path):
    run("l2bt")
    again = zoo("fit", "--run", "x", "--resume", "--trainer.max_epochs", "3")
    assert again.status == 0, again.err
    assert yaml.safe_load((tmp_path / "runs" / "x" / "config.yaml").read_text())["trainer"]["max_epochs"] == 3


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--model.method", "l2b"], "l2bt"),
        (["--model.layerz", "[1]"], "layers"),
        (["--data.root", "nowhere"], "nowhere"),
        (["--model.class_names", "[a]"], "class_names"),
    ],
)
def test_wrong_lines_end_with_a_sentence_and_status_2(zoo, cloth, more, words):
    done = zoo(*line("l2bt", cloth, *more))
    assert done.status == 2
    assert words in done.err
    assert "Traceback" not in done.err


def test_data_that_is_not_as_described_leaves_no_run(zoo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = zoo(*line("l2bt", tmp_path / "nowhere"))
    assert shown.status == 2
    assert "does not exist" in shown.err
    assert not (tmp_path / "runs").exists()


def test_a_bank_refuses_a_second_epoch(zoo, cloth):
    done = zoo(*line("memory_bank", cloth, "--trainer.max_epochs", "2"))
    assert done.status == 2
    assert "max_epochs 1" in done.err


def test_test_images_do_not_reach_a_run(zoo, cloth, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(cloth, other)
    # Every test image becomes another one, every mask all of the image, and the good ones are called defective.
    generator = np.random.default_rng(1)
    for path in sorted((other / "test").rglob("*.png")):
        draw(other, generator, defective=True)[0].save(path)
    for path in (other / "ground_truth").rglob("*.png"):
        Image.new("L", (32, 32), 255).save(path)
    (other / "test" / "good").rename(other / "test" / "broken")
    ends = []
    for root, name in ((cloth, "one"), (other, "two")):
        done = zoo(*line("l2bt", root, "--run", name, "--trainer.max_epochs", "1"))
        assert done.status == 0, done.err
        if name == "one":
            assert zoo("test", "--run", name).status == 0
        files = [
            torch.load(tmp_path / "runs" / name / "checkpoints" / f, weights_only=True)
            for f in ("best.ckpt", "last.ckpt")
        ]
        ends.append([file["state_dict"] for file in files])
    for one, two in zip(*ends, strict=True):
        assert all(torch.equal(one[k], two[k]) for k in one)

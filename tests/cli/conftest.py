"""Runs the command line in process, in a folder of its own, on a handful of generated images."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from zoo.cli import main

CLASSES = ("dark", "light", "striped")


@dataclass
class Result:
    status: int
    out: str
    err: str


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """Folder with train/CLASS and val/CLASS: 8 and 4 images a class, 24 x 24."""
    folder = tmp_path_factory.mktemp("images")
    draw(folder)
    return folder


def draw(folder: Path, classes=CLASSES) -> None:
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for number, name in enumerate(classes):
            target = folder / split / name
            target.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 60, (24, 24, 3)).astype("uint8")
                pixels[:: (99, 1, 4)[number % 3]] += 150
                Image.fromarray(pixels).save(target / f"{index}.png")


def settings(images: Path) -> dict:
    """A recipe of two epochs of three updates each."""
    return {
        "seed_everything": 3,
        "trainer": {"accelerator": "cpu", "max_epochs": 2, "num_sanity_val_steps": 0},
        "model": {
            "class_path": "zoo.tasks.Classification",
            "init_args": {
                "backbone": "zoo_vit_tiny_patch16_224",
                "backbone_options": {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2},
                "warmup_epochs": 0,
            },
        },
        "data": {
            "class_path": "zoo.data.ImageClassification",
            "init_args": {"root": str(images), "img_size": 16, "batch_size": 8, "num_workers": 0, "test_split": "val"},
        },
    }


@pytest.fixture
def recipe(tmp_path, images) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings(images)))
    return str(path)


@pytest.fixture
def zoo(capsys, tmp_path, monkeypatch):
    """Calls the command line in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["zoo"])
    monkeypatch.delenv("ZOO_DEBUG", raising=False)

    def call(*arguments: str) -> Result:
        capsys.readouterr()
        with warnings.catch_warnings():
            status = main(list(arguments))
        captured = capsys.readouterr()
        return Result(status, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def finished(tmp_path_factory, images) -> Path:
    """The run folder of a finished fit; not to be written into."""
    folder = tmp_path_factory.mktemp("finished")
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings(images)))
    with warnings.catch_warnings():
        assert main(["fit", "--config", str(path), "--run", str(folder / "run")]) == 0
    return folder / "run"

"""Tiny images on disk."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from zoo.data import AnomalyDetection, ImageClassification, Segmentation

from . import anomalies
from .scenes import CLASSES, put


@pytest.fixture(autouse=True)
def stop_workers(monkeypatch):
    """Ends workers with their test: left to the garbage collector, torch may wait 5 seconds for each of them."""
    loaders = []

    def remembering(make):
        def remember(self, *args, **options):
            loaders.append(make(self, *args, **options))
            return loaders[-1]

        return remember

    for kind in (AnomalyDetection, ImageClassification, Segmentation):
        monkeypatch.setattr(kind, "_loader", remembering(kind._loader))
    yield
    for loader in loaders:
        if loader._iterator is not None:
            loader._iterator._shutdown_workers()


@pytest.fixture
def write(tmp_path) -> Callable[..., Path]:
    """Writes {"train/a": 3, ...}: so many PNG pictures of noise in each folder; the same pixels for the same names."""

    def write(folders: dict[str, int], size: tuple[int, int] = (12, 10), name: str = "data") -> Path:
        root = tmp_path / name
        for folder, count in folders.items():
            (root / folder).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                rng = np.random.default_rng([*map(ord, folder), number])
                pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / folder / f"{number:02d}.png")
        return root

    return write


@pytest.fixture
def running() -> Callable[..., SimpleNamespace]:
    """What a data module asks of a trainer."""

    def running(training: bool = True, epoch: int = 0, batch: int = 0, rank: int = 0) -> SimpleNamespace:
        loop = SimpleNamespace(batch_idx=batch)
        return SimpleNamespace(training=training, current_epoch=epoch, fit_loop=loop, global_rank=rank, world_size=1)

    return running


@pytest.fixture
def root(tmp_path) -> Path:
    """Drawn images with masks in train, val and test."""
    for split, numbers in (("train", range(12)), ("val", range(20, 25)), ("test", range(30, 33))):
        for number in numbers:
            put(tmp_path / split, number)
    (tmp_path / "classes.txt").write_text(CLASSES)
    return tmp_path


@pytest.fixture
def mvtec(write, tmp_path) -> Path:
    """20 good images to train on, 3 to test on, 2 with a hole of known place; of a third with a dent no mask."""
    root = write({"train/good": 20, "test/good": 3, "test/hole": 2, "test/dent": 1}, size=(20, 24))
    (root / "ground_truth" / "hole").mkdir(parents=True)
    for number in range(2):
        mask = np.zeros(anomalies.SIZE, np.uint8)
        mask[4:10, 5 + number : 13] = 255
        Image.fromarray(mask).save(root / "ground_truth" / "hole" / f"{number:02d}_mask.png")
    return root

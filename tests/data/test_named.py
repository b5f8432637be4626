"""Datasets by name: torchvision's folder, a stream, and names that cannot be opened."""

import shutil

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from torch.utils.data import IterableDataset

from zoo.data import ImageClassification
from zoo.errors import UsageError


def make(root, dataset="torch/image_folder", **options):
    options = {"img_size": 8, "batch_size": 2, "num_workers": 0} | options
    return ImageClassification(str(root), dataset=dataset, **options)


def targets_of(loader) -> list[int]:
    return [int(target) for _, targets in loader for target in targets]


def test_torch_image_folder(write):
    data = make(write({"train/a": 10, "train/b": 10, "val/a": 2, "val/b": 1}), val_split="val")
    assert data.class_names == ["a", "b"]
    assert sorted(targets_of(data.train_dataloader())) == [0] * 10 + [1] * 10
    assert targets_of(data.val_dataloader()) == [0, 0, 1]


def test_named_dataset_without_val_split_holds_a_tenth_out(write):
    data = make(write({"train/a": 10, "train/b": 20}))
    assert targets_of(data.val_dataloader()) == [0, 1, 1]
    assert len(data.train_dataloader().dataset) == 27


@pytest.mark.parametrize("other", ["val/b", "val/zebra"])
def test_named_dataset_whose_splits_number_their_classes_differently_is_an_error(write, other):
    data = make(write({"train/a": 2, "train/b": 2, other: 1}), val_split="val")
    with pytest.raises(UsageError, match=r"split 'val' .* has other classes than train .differing: a"):
        data.val_dataloader()


def test_named_dataset_names_a_damaged_image(write):
    root = write({"train/a": 4, "train/b": 4, "val/a": 1, "val/b": 1})
    (root / "val" / "b" / "00.png").write_bytes(b"damaged")
    data = make(root, val_split="val")
    with pytest.warns(UserWarning, match="left out"):
        assert targets_of(data.val_dataloader()) == [0]
    assert len(data.skipped) == 1


@pytest.mark.parametrize("name", ["torch/cifar10", "torch/nonsense", "hfds/nonsense", "wds/nonsense", "tfds/nonsense"])
def test_what_cannot_be_opened_is_a_plain_message(tmp_path, name):
    with pytest.raises(UsageError, match=name):
        _ = make(tmp_path, dataset=name).class_names
    assert not list(tmp_path.iterdir())  # and nothing was fetched


@pytest.mark.parametrize("name", ["hfds/cifar10", "hfids/cifar10", "HFDS/cifar10"])
def test_hub_is_asked_only_when_downloads_are_allowed(monkeypatch, name):
    asked = []
    monkeypatch.setattr(timm.data, "create_dataset", lambda *names, **options: asked.append(names) or Stream(5))
    with pytest.raises(UsageError, match=r"--data\.download true"):
        _ = make("", dataset=name, val_split="test", num_classes=2).class_names
    assert not asked
    assert make("", dataset=name, val_split="test", num_classes=2, download=True).class_names == ["0", "1"]
    assert asked == [(name,)]


class Stream(IterableDataset):
    """Pictures of one tone each: 10, 20, ..., of the classes 0, 1, 0, ..."""

    transform = None

    def __init__(self, count: int):
        self.count = count

    def __iter__(self):
        for number in range(self.count):
            tone = np.full((8, 8, 3), 10 * (number + 1), np.uint8)
            yield self.transform(Image.fromarray(tone)), number % 2


@pytest.fixture
def streams(monkeypatch):
    asked = []

    def create(name, **options):
        asked.append((name, options["split"], options["is_training"]))
        return Stream(5)

    monkeypatch.setattr(timm.data, "create_dataset", create)
    return asked


def test_stream_gives_batches_of_bytes_and_validates_on_all_of_it(streams):
    data = make("", dataset="wds/pictures", val_split="val", num_classes=2)
    assert data.class_names == ["0", "1"]
    with pytest.warns(UserWarning, match="cannot be resumed"):
        train = list(data.train_dataloader())
    assert [len(targets) for _, targets in train] == [2, 2]
    validation = list(data.val_dataloader())
    assert torch.cat([targets for _, targets in validation]).tolist() == [0, 1, 0, 1, 0]
    images = torch.cat([images for images, _ in validation])
    assert images.dtype == torch.uint8
    assert images[:, 0, 4, 4].tolist() == [10, 20, 30, 40, 50]
    assert streams == [("wds/pictures", "train", True), ("wds/pictures", "val", False)]


def test_stream_cannot_be_split_and_must_say_how_many_classes(streams):
    for share in (None, 0.2):
        with pytest.raises(UsageError, match=r"is a stream and cannot be split; give --data\.val_split"):
            make("", dataset="wds/pictures", val_split=share, num_classes=2).train_dataloader()
    with pytest.raises(UsageError, match=r"give --data\.num_classes N"):
        _ = make("", dataset="wds/pictures", val_split="val").class_names


def test_missing_split_of_a_named_dataset_is_an_error(write):
    root = write({"train/a": 2, "train/b": 2, "val/a": 1, "val/b": 1})
    data = make(root, val_split="val")
    assert data.class_names == ["a", "b"]
    shutil.rmtree(root / "val")
    with pytest.raises(UsageError, match="split 'val'"):  # torchvision would take `train` for a class
        data.val_dataloader()

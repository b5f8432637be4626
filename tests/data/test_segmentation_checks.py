"""The data module of segmentation: classes and splits that are found or counted, and data that is not as described."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zoo.errors import UsageError

from .scenes import CHANGES, SIZE, epoch_of, make, names, put, truth_of


def test_held_out_images_are_the_same_for_every_seed(tmp_path):
    for number in range(12):
        put(tmp_path, number)
    held = set()
    for seed in (0, 1):
        data = make(tmp_path, classes=["sky", "road", "car"], val_split=0.25, seed=seed)
        assert not data.has_test
        trained, validated = names(epoch_of(data.train_dataloader())), names(data.val_dataloader())
        assert len(trained) == 8, "whole batches of the 9 that are left"
        assert len(validated) == 3
        assert not set(trained) & set(validated)
        held.add(tuple(validated))
        with pytest.raises(UsageError, match="no images with masks to test on"):
            data.test_dataloader()
    assert len(held) == 1


def test_a_share_takes_the_place_of_the_folder(root):
    data = make(root, val_split=0.25)
    assert set(names(data.val_dataloader())) < {f"{n:02d}" for n in range(12)}


def test_class_weights_are_counted_from_train(root):
    put(root / "train", 12, np.full(SIZE, 2, np.uint8))
    put(root / "val", 26, np.full(SIZE, 1, np.uint8))
    masks = [truth_of(n) for n in range(12)] + [np.full(SIZE, 2)]
    counts = np.array([sum((mask == c).sum() for mask in masks) for c in range(3)])
    data = make(root)
    np.testing.assert_allclose(data.class_weights("inverse"), counts.sum() / (3 * counts))
    shown = np.array([sum((m != 255).sum() for m in masks if (m == c).any()) for c in range(3)])
    assert shown[0] < shown[2]
    frequency = counts / shown
    np.testing.assert_allclose(data.class_weights(), np.median(frequency) / frequency)
    with pytest.raises(UsageError, match="unknown kind of class weights 'mean'"):
        data.class_weights("mean")


def test_the_weight_of_a_class_that_is_nowhere(root):
    data = make(root, classes=["sky", "road", "car", "boat"])
    with pytest.warns(UserWarning, match="no pixel of boat: their weight is 0"):
        weights = data.class_weights("inverse")
    assert weights[3] == 0
    np.testing.assert_allclose(weights[:3], make(root).class_weights("inverse"))


@pytest.mark.parametrize("workers", [0, 1])
def test_images_without_any_class_are_named_and_counted(root, workers):
    put(root / "train", 5, np.full(SIZE, 255, np.uint8))
    put(root / "val", 22, np.full(SIZE, 255, np.uint8))
    data = make(root, num_workers=workers, **CHANGES)
    with pytest.warns(UserWarning, match=r"no pixel of .*05\.png has a class"):
        batches = epoch_of(data.train_dataloader())
    assert len(names(batches)) == 12
    list(data.val_dataloader())
    assert {Path(path).stem for path in data.blank} == {"05", "22"}
    mask = next(b["mask"][b["path"].index(p)] for b in batches for p in b["path"] if p.endswith("05.png"))
    assert mask.eq(255).all()


def damage(path):
    path.write_bytes(path.read_bytes()[:50])


@pytest.mark.parametrize("kind", ["images", "masks"])
@pytest.mark.parametrize("preload", [False, True])
def test_damaged_files_are_left_out_and_named(root, kind, preload):
    damage(root / "train" / kind / "03.png")
    damage(root / "val" / kind / "21.png")
    data = make(root, batch_size=3, preload=preload)
    data.check()
    with pytest.warns(UserWarning, match=r"left out, cannot be read: .*03\.png"):
        batches = epoch_of(data.train_dataloader())
    assert sorted(names(batches)) == [f"{n:02d}" for n in range(12) if n != 3]
    assert names(data.val_dataloader()) == ["20", "22", "23", "24"]
    assert {Path(path).stem for path in data.skipped} == {"03", "21"}
    assert len(data.class_weights()) == 3
    with pytest.raises(UsageError, match=r"03\.png cannot be read: .*--data.on_error skip"):
        epoch_of(make(root, on_error="raise").train_dataloader())


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("preload", [False, True])
def test_masks_that_contradict_stop_the_run(root, workers, preload):
    strange = truth_of(7)
    strange[4, 4:9] = 3
    put(root / "train", 7, strange)
    with pytest.raises(UsageError, match=r"masks/07\.png' holds 3 in 5 pixels, which stand for no class"):
        epoch_of(make(root, num_workers=workers, preload=preload, on_error="skip").train_dataloader())
    with pytest.raises(UsageError, match="holds 3 in 5 pixels"):
        make(root).class_weights()
    with pytest.raises(UsageError, match="holds 3 in 5 pixels"):
        make(root).check()


def test_a_mask_of_another_size(root):
    Image.fromarray(truth_of(0, (26, 20))).save(root / "val" / "masks" / "20.png")
    with pytest.raises(UsageError, match=r"masks/20\.png' has 26 x 20 pixels .* has 20 x 26"):
        make(root).check()
    with pytest.raises(UsageError, match="must have the size of its image"):
        list(make(root).val_dataloader())


def test_255_for_a_class_is_not_taken_for_nothing(tmp_path):
    for number in range(4):
        put(tmp_path, number, np.where(truth_of(number) == 1, 255, 0).astype(np.uint8))
    with pytest.raises(UsageError, match=r"hold only 'cell', and pixels that are ignored. If 255 stands for a class"):
        make(tmp_path, classes=["cell", "membrane"]).check()
    data = make(tmp_path, classes=["cell", "membrane = 255"])
    data.check()
    assert next(iter(data.val_dataloader()))["mask"].unique().tolist() == [0, 1]


def test_classes_come_from_somewhere(root, tmp_path):
    other = tmp_path / "others.txt"
    other.write_text("﻿a\nb\nc\n", encoding="utf-8")
    assert make(root, classes=str(other)).class_names == ["a", "b", "c"]
    assert make(root, classes=["x", "y", "z"]).class_names == ["x", "y", "z"]
    with pytest.raises(UsageError, match=r"cannot be read: .*No such file"):
        make(root, classes=str(tmp_path / "none.txt")).check()
    (root / "classes.txt").unlink()
    with pytest.raises(UsageError, match=r"write them into .*classes\.txt'.* holds the values 0, 1, 2, 255"):
        make(root).check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_size": 0}, "crop_size=0: give a positive side"),
        ({"eval_size": (8, -1)}, "eval_size"),
        ({"in_chans": 4}, "in_chans=4"),
        ({"layout": "split"}, "unknown layout 'split'. Did you mean 'splits'"),
        ({"on_error": "stop"}, "unknown on_error"),
        ({"batch_size": 0}, "batch_size=0: it must be 1 or more"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"val_split": 1.0}, "val_split=1.0"),
        ({"scale": (2.0, 0.5)}, "smallest and the largest factor"),
        ({"scale": (0.0, 1.0)}, "smallest and the largest factor"),
        ({"hflip": 2}, "hflip=2"),
        ({"rotate": -1}, "rotate=-1"),
        ({"brightness": 1.0}, "brightness=1.0"),
        ({"hue": 0.7}, "hue=0.7"),
        ({"in_chans": 1, "hue": 0.1}, "of coloured images"),
        ({"ignore_index": 1}, "ignore_index=1 is the number of the class 'road'"),
        ({"root": ""}, "no data: give --data.root"),
        ({"root": "samples:none"}, "unknown bundled samples"),
    ],
)
def test_options_that_cannot_be(root, options, message):
    with pytest.raises(UsageError, match=message):
        make(**({"root": root} | options)).check()

"""Layouts of folders, the one class map, the share held out, and wrong inputs."""

import jsonargparse
import numpy as np
import pytest

from zoo.data import ImageClassification
from zoo.errors import UsageError

THREE = {"train/a": 3, "train/b": 3, "train/c": 3}


def make(root, **options):
    return ImageClassification(str(root), **({"img_size": 8, "batch_size": 2, "num_workers": 0} | options))


def targets_of(loader) -> list[int]:
    return [int(target) for _, targets in loader for target in targets]


def names_of(loader) -> set[str]:
    """Files that a loader reads, as CLASS/NAME."""
    images = loader.dataset
    return {"/".join(images.source.name(number).split("/")[-2:]) for number in images.numbers}


@pytest.mark.parametrize("split", ["val", "test"])
def test_class_missing_in_a_split_keeps_the_numbers_of_train_and_warns(write, split):
    root = write(THREE | {"val/a": 1, "val/b": 1, "val/c": 1} | {"test/a": 1, "test/b": 1, "test/c": 1})
    for file in (root / split / "a").iterdir():
        file.unlink()
    (root / split / "a").rmdir()
    data = make(root, test_split="test")
    with pytest.warns(UserWarning, match=rf"{split} has no images of 1 of train's classes: \['a'\]"):
        loader = data.val_dataloader() if split == "val" else data.test_dataloader()
    assert targets_of(loader) == [1, 2]
    assert data.class_names == ["a", "b", "c"]


@pytest.mark.parametrize("split", ["val", "test"])
def test_empty_class_folder_in_a_split_is_a_missing_class(write, split):
    root = write(THREE | {f"{split}/a": 0, f"{split}/b": 1, f"{split}/c": 1})
    data = make(root, val_split="val" if split == "val" else None, test_split="test")
    with pytest.warns(UserWarning, match=r"\['a'\]"):
        loader = data.val_dataloader() if split == "val" else data.test_dataloader()
    assert targets_of(loader) == [1, 2]


@pytest.mark.parametrize("split", ["val", "test"])
def test_class_that_train_lacks_is_an_error_that_names_it(write, split):
    data = make(write(THREE | {f"{split}/a": 1, f"{split}/zebra": 1}), test_split="test")
    with pytest.raises(UsageError, match=r"'zebra', which train does not have; classes of train: a, b, c"):
        data.val_dataloader() if split == "val" else data.test_dataloader()


def test_classes_are_in_natural_order(write):
    assert make(write({f"train/{name}": 2 for name in ("10", "9", "1")})).class_names == ["1", "9", "10"]


@pytest.mark.parametrize("name", ["val", "validation", "valid"])
def test_validation_folder_is_found_by_its_usual_names(write, name):
    data = make(write(THREE | {f"{name}/{c}": 2 for c in "abc"}))
    assert targets_of(data.val_dataloader()) == [0, 0, 1, 1, 2, 2]
    assert len(data.train_dataloader().dataset) == 9


@pytest.mark.parametrize("prefix", ["train/", "training/", ""])
def test_without_a_validation_folder_a_tenth_of_each_class_is_held_out(write, prefix):
    data = make(write({f"{prefix}{c}": 20 for c in "ab"}))
    assert targets_of(data.val_dataloader()) == [0, 0, 1, 1]
    assert sorted(targets_of(data.train_dataloader())) == [0] * 18 + [1] * 18
    assert not names_of(data.val_dataloader()) & names_of(data.train_dataloader())


def test_images_may_lie_deeper_in_their_class_folder(write):
    data = make(write({"train/cat/old": 2, "train/cat/new": 2, "train/dog/old": 3, "val/cat/x": 1, "val/dog": 1}))
    assert data.class_names == ["cat", "dog"]
    assert sorted(targets_of(data.train_dataloader())) in ([0] * 4 + [1] * 2, [0] * 3 + [1] * 3)  # the last one drops
    assert data.train_dataloader().dataset.source.targets == [0] * 4 + [1] * 3
    assert targets_of(data.val_dataloader()) == [0, 1]


def test_hidden_folders_and_files_are_no_data(write):
    root = write(THREE | {"train/.thumbs": 2, "train/a/.cache": 1})
    (root / "train" / "a" / "00.png").rename(root / "train" / "a" / "._00.png")
    data = make(root, val_split="train")
    assert data.class_names == ["a", "b", "c"]
    assert data.train_dataloader().dataset.source.targets == [0, 0, 1, 1, 1, 2, 2, 2]


def test_share_is_stratified_disjoint_complete_and_the_same_for_every_seed(write):
    root = write({"train/a": 20, "train/b": 10, "train/c": 4})
    first, second = make(root, val_split=0.25, seed=0), make(root, val_split=0.25, seed=7)
    held, kept = names_of(first.val_dataloader()), names_of(first.train_dataloader())
    assert sorted(name[0] for name in held) == ["a"] * 5 + ["b"] * 2 + ["c"]
    assert not held & kept
    assert len(held | kept) == 34
    assert names_of(second.val_dataloader()) == held


def test_share_is_used_even_beside_a_validation_folder(write):
    data = make(write({"train/a": 10, "train/b": 10, "val/a": 1, "val/b": 1}), val_split=0.3)
    assert targets_of(data.val_dataloader()) == [0, 0, 0, 1, 1, 1]


def test_share_that_leaves_nothing_is_an_error(write):
    with pytest.raises(UsageError, match="leaves nothing to train on"):
        make(write({"train/a": 5, "train/b": 1}), val_split=0.1).train_dataloader()


@pytest.mark.parametrize(("text", "value"), [("0.1", 0.1), ("1e-1", 0.1), ("val", "val"), ("null", None)])
def test_command_line_reads_a_number_as_a_share(text, value):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ImageClassification, "data")
    given = parser.parse_args(["--data.val_split", text]).data.val_split
    assert given == value
    assert type(given) is type(value)


def test_share_as_text_is_a_share(write):
    data = make(write({"train/a": 10, "train/b": 10}), val_split="0.3")
    assert targets_of(data.val_dataloader()) == [0, 0, 0, 1, 1, 1]


def test_folder_named_like_a_number_is_still_a_split(write):
    data = make(write({"train/a": 4, "train/b": 4, "2017/a": 1, "2017/b": 1}), val_split="2017")
    assert targets_of(data.val_dataloader()) == [0, 1]


def test_roots_that_are_no_data(write, tmp_path):
    file = tmp_path / "file.txt"
    file.write_text("x")
    (tmp_path / "empty").mkdir()
    for root, message in [
        ("", "give --data.root"),
        (tmp_path / "nowhere", "nowhere' does not exist"),
        (file, "file.txt' is a file"),
        (tmp_path / "empty", "is empty of class folders"),
        (write({"train": 2}, name="loose"), "images outside class folders"),
        (write({"train": 1, "train/a": 2, "train/b": 2}, name="mixed"), "00.png.* images outside class folders"),
        (write({"train": 0}, name="bare"), "no images in class folders"),
        (write({"train/a": 2, "train/b": 0}, name="hollow"), "class 'b' in .* holds no images"),
        (write({"train/a": 2}, name="lonely"), "holds one class, 'a'"),
    ]:
        with pytest.raises(UsageError, match=message):
            _ = make(root).class_names


def test_unknown_splits_name_the_valid_ones(write):
    root = write(THREE | {"val/a": 1, "holdout/a": 1})
    with pytest.raises(UsageError, match=r"'trian'.*'train'.*Valid: holdout, train, val"):
        _ = make(root, train_split="trian").class_names
    with pytest.raises(UsageError, match=r"'hold'.*'holdout'.*Valid: holdout, train, val"):
        make(root, val_split="hold").val_dataloader()
    with pytest.raises(UsageError, match=r"'test'.*Valid: holdout, train, val"):
        make(root, test_split="test").test_dataloader()
    with pytest.raises(UsageError, match=r"--data\.test_split"):
        make(root).test_dataloader()
    with pytest.raises(UsageError, match=r"'train'.*Valid: val"):
        _ = make(write({"val/a": 1}, name="only_val")).class_names


def test_unknown_samples_and_datasets_name_the_valid_ones():
    with pytest.raises(UsageError, match=r"'samples:clasification'.*'samples:classification'"):
        _ = make("samples:clasification").class_names
    with pytest.raises(UsageError, match=r"'torhc/cifar10'.*Valid: hfds/NAME, .*torch/NAME"):
        _ = make("", dataset="torhc/cifar10").class_names


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("img_size", 0, "positive side"),
        ("img_size", (8, -1), "positive side"),
        ("in_chans", 2, "3 channels, or 1"),
        ("batch_size", 0, "at least 1"),
        ("num_workers", -1, "0 or more"),
        ("on_error", "ignore", "Valid: raise, skip"),
        ("val_split", 0.0, "between 0 and 1"),
        ("val_split", 1.0, "between 0 and 1"),
        ("val_split", 2, "between 0 and 1"),
        ("val_split", float("nan"), "between 0 and 1"),
        *[(name, 1.5, "probability") for name in ("hflip", "vflip", "re_prob", "mixup_prob", "mixup_switch_prob")],
        *[(name, -0.5, "probability") for name in ("hflip", "vflip", "re_prob", "mixup_prob", "mixup_switch_prob")],
        ("mixup", -1.0, "0 .off. or more"),
        ("cutmix", -1.0, "0 .off. or more"),
        ("crop_pct", 0.0, r"\(0, 1\]"),
        ("crop_pct", 1.2, r"\(0, 1\]"),
        ("crop_mode", "middle", "Valid: border, center, squash"),
        ("interpolation", "bicubik", "Did you mean 'bicubic'"),
        ("train_crop_mode", "crop", "Valid: rkrc, rkrr, rrc"),
        ("re_mode", "black", "Valid: const, pixel, rand"),
    ],
)
def test_values_out_of_range(option, value, message):
    with pytest.raises(UsageError, match=message) as caught:
        ImageClassification("x", **{option: value})
    assert option in str(caught.value)


def test_bad_auto_augment_is_a_plain_message(write):
    with pytest.raises(UsageError, match="training transform"):
        make(write(THREE), auto_augment="nonsense-m9", val_split=0.4).train_dataloader()


def test_hyperparameters_are_plain(write):
    plain = (int, float, str, bool, tuple, type(None))
    data = make(write(THREE), val_split=0.4)
    data.train_dataloader()
    assert all(isinstance(value, plain) for value in data.hparams.values())
    assert not any(isinstance(value, np.generic) for value in data.hparams.values())

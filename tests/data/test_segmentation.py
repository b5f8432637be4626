"""The data module of segmentation: what batches hold, where they come from, and that nothing is left to chance."""

from pathlib import Path
from types import SimpleNamespace

import jsonargparse
import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image

from zoo.data import Segmentation
from zoo.data.augmentation import SceneAugmentation
from zoo.errors import UsageError

SIZE = (20, 26)  # height, width
CLASSES = "sky\nroad\ncar\n"
CHANGES = {"scale": (0.6, 1.8), "hflip": 0.5, "vflip": 0.5, "rotate": 20, "brightness": 0.2, "contrast": 0.2}
COLOUR = {"saturation": 0.3, "hue": 0.1}


def truth_of(number, size=SIZE):
    """Rectangles of classes 1 and 2 on 0, and a corner without a class."""
    mask = np.zeros(size, np.uint8)
    mask[3 : 9 + number % 4, 4:15] = 1
    mask[11:18, 8 + number % 5 : 24] = 2
    mask[0, -3:] = 255
    return mask


def put(folder: Path, number: int, mask=None, size=SIZE):
    """An image whose pixels tell the class (60 a class, 240 for none) and its mask."""
    mask = truth_of(number, size) if mask is None else mask
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    values = np.where(mask == 255, 240, mask * 60).astype(np.uint8)
    Image.fromarray(np.stack([values, values, np.full_like(values, number)], -1)).save(
        folder / "images" / f"{number:02d}.png"
    )
    Image.fromarray(mask).save(folder / "masks" / f"{number:02d}.png")


@pytest.fixture
def root(tmp_path) -> Path:
    for split, numbers in (("train", range(12)), ("val", range(20, 25)), ("test", range(30, 33))):
        for number in numbers:
            put(tmp_path / split, number)
    (tmp_path / "classes.txt").write_text(CLASSES)
    return tmp_path


def make(root, **options):
    return Segmentation(str(root), **({"crop_size": (16, 20), "batch_size": 4, "num_workers": 0} | options))


def epoch_of(loader, epoch=0):
    loader.sampler.set_epoch(epoch)
    return list(loader)


def names(batches):
    return [Path(path).stem for batch in batches for path in batch["path"]]


def same(first, second):
    return len(first) == len(second) and all(
        a["path"] == b["path"] and torch.equal(a["image"], b["image"]) and torch.equal(a["mask"], b["mask"])
        for a, b in zip(first, second, strict=True)
    )


def test_training_batches_are_crops(root):
    data = make(root)
    data.check()
    batches = epoch_of(data.train_dataloader())
    assert [len(batch["path"]) for batch in batches] == [4, 4, 4]
    assert sorted(names(batches)) == [f"{n:02d}" for n in range(12)]
    for batch in batches:
        assert set(batch) == {"image", "mask", "path"}
        assert (batch["image"].dtype, batch["image"].shape) == (torch.uint8, (4, 3, 16, 20))
        assert (batch["mask"].dtype, batch["mask"].shape) == (torch.int64, (4, 16, 20))
        # Nothing but a crop is on, and the pixels tell the class.
        expected = (batch["image"][:, 0] // 60).long().where(batch["image"][:, 0] != 240, 255)
        assert torch.equal(batch["mask"], expected)
        assert [int(n) for n in batch["image"][:, 2, 0, 0]] == [int(Path(path).stem) for path in batch["path"]]


def test_validation_and_test_are_whole_images_in_order(root):
    data = make(root)
    assert data.has_test
    for loader, numbers in ((data.val_dataloader(), range(20, 25)), (data.test_dataloader(), range(30, 33))):
        batches = list(loader)
        assert names(batches) == [str(n) for n in numbers]
        assert [len(batch["path"]) for batch in batches] == ([4, 1] if len(numbers) == 5 else [3])
        masks = torch.cat([batch["mask"] for batch in batches])
        assert np.array_equal(masks.numpy(), np.stack([truth_of(n) for n in numbers]))
        assert torch.cat([batch["image"] for batch in batches])[:, 2, 0, 0].tolist() == list(numbers)
    assert names(data.predict_dataloader()) == ["30", "31", "32"]


def test_what_tasks_ask_of_it(root):
    data = make(root, ignore_index=-100, classes=["sky = 0", "road = 1", "car = 2", "ignore = 255"])
    assert (data.class_names, data.num_classes, data.in_chans) == (["sky", "road", "car"], 3, 3)
    assert data.palette == [(0, 0, 0), (128, 0, 0), (0, 128, 0)]
    assert data.ignore_index == -100
    mask = next(iter(data.val_dataloader()))["mask"]
    assert mask.unique().tolist() == [-100, 0, 1, 2]


def test_images_of_different_sizes_come_one_by_one_unless_resized(root):
    put(root / "val", 25, size=(30, 26))
    batches = list(make(root).val_dataloader())
    assert [tuple(batch["image"].shape) for batch in batches] == [(1, 3, 20, 26)] * 5 + [(1, 3, 30, 26)]
    batches = list(make(root, eval_size=(10, 13)).val_dataloader())
    assert [tuple(batch["mask"].shape) for batch in batches] == [(4, 10, 13), (2, 10, 13)]
    # Every other pixel's corner is the middle of four: the lower right one of them.
    assert np.array_equal(batches[0]["mask"][0], truth_of(20)[1::2, 1::2])


def test_grey_and_16_bit_images(root):
    wide = np.arange(20 * 26, dtype=np.uint16).reshape(SIZE) * 100
    Image.fromarray(wide).save(root / "val" / "images" / "20.png")
    for channels in (1, 3):
        batch = next(iter(make(root, in_chans=channels).val_dataloader()))
        assert batch["image"].shape == (4, channels, *SIZE)
        assert np.array_equal(batch["image"][0, 0].numpy(), wide >> 8)
    batch = next(iter(make(root, in_chans=1, **CHANGES).train_dataloader()))
    assert batch["image"].shape == (4, 1, 16, 20)


def test_everything_random_is_of_seed_epoch_and_index(root):
    options = CHANGES | COLOUR
    whole = epoch_of(make(root, **options).train_dataloader(), 3)
    assert same(whole, epoch_of(make(root, num_workers=2, **options).train_dataloader(), 3))
    assert same(whole, epoch_of(make(root, preload=True, **options).train_dataloader(), 3))
    for seed, epoch in ((1, 3), (0, 4)):
        changed = epoch_of(make(root, seed=seed, **options).train_dataloader(), epoch)
        assert names(changed) != names(whole)
        place = names(changed).index(names(whole)[0])
        assert not torch.equal(changed[place // 4]["image"][place % 4], whole[0]["image"][0])


def test_an_epoch_goes_on_where_it_was_left(root):
    loader = make(root, **CHANGES).train_dataloader()
    whole = epoch_of(loader, 2)
    loader.sampler.set_epoch(2)
    iterator = iter(loader)
    next(iterator)
    state = loader.state_dict()
    again = make(root, **CHANGES).train_dataloader()
    again.load_state_dict(state)
    assert same(epoch_of(again, 2), whole[1:])


def test_preloaded_images_do_not_change(root):
    data = make(root, preload=True, **CHANGES)
    loader = data.train_dataloader()
    assert len(loader.dataset.kept) == 12
    for batch in epoch_of(loader):
        batch["image"].zero_()
        batch["mask"].zero_()
    assert same(epoch_of(loader), epoch_of(make(root, **CHANGES).train_dataloader()))
    val = data.val_dataloader()
    next(iter(val))["image"].zero_()
    assert same(list(val), list(make(root).val_dataloader()))
    assert data.train_dataloader().dataset.kept is loader.dataset.kept, "a second loader decodes nothing again"


def test_preloading_is_bounded(root, monkeypatch):
    monkeypatch.setattr("zoo.data.segmentation.KEPT_BYTES", 5 * 20 * 26 * 4)
    data = make(root, preload=True)
    loader, val = data.train_dataloader(), data.val_dataloader()
    assert len(loader.dataset.kept) == 5
    assert len(val.dataset.kept) == 0
    assert same(epoch_of(loader), epoch_of(make(root).train_dataloader()))


@pytest.mark.parametrize("options", [{"scale": (0.5, 2.0)}, {"rotate": 30}, {"hflip": 1.0, "vflip": 1.0}])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_masks_move_with_images(options, dtype):
    """A disc of known place in both: where one goes the other goes, to a quarter of a pixel on average."""
    y, x = np.mgrid[:90, :120]
    disc = ((y - 40) ** 2 + (x - 70) ** 2 < 22**2).astype(dtype)
    image = np.repeat(disc[..., None].astype(np.uint8) * 200, 3, axis=2)
    void = np.iinfo(dtype).max
    augment = SceneAugmentation((200, 260), 3, void, **options)
    shifts, areas = [], []
    for seed in range(20):
        pixels, mask = augment(image, disc, seed)
        assert pixels.shape == (200, 260, 3)
        assert mask.shape == (200, 260)
        assert mask.dtype == dtype
        weight = pixels[..., 0] * (mask != void) / 200.0
        inside = mask == 1
        centres = [np.array(np.nonzero(part)).mean(1) for part in (weight > 0.5, inside)]
        shifts.append(centres[0] - centres[1])
        areas.append(weight.sum() / inside.sum())
        outside = mask == void
        assert outside.any()
        assert (pixels[outside] == (124, 116, 104)).all()
    assert np.abs(np.mean(shifts, axis=0)).max() < 0.25
    assert np.allclose(areas, 1, atol=0.05)


def test_scale_crop_and_flip_reach_their_ranges():
    image = np.zeros((64, 64, 3), np.uint8)
    image[16:48, 16:32] = 255
    mask = (image[..., 0] > 0).astype(np.uint8)
    sizes, sides = [], []
    scaled = SceneAugmentation((160, 160), 3, 255, scale=(0.5, 2.0))
    flipped = SceneAugmentation((64, 64), 3, 255, hflip=0.5)
    for seed in range(80):
        _, labels = scaled(image, mask, seed)
        sizes.append(float(np.sqrt((labels == 1).sum() / mask.sum())))
        sides.append(bool(flipped(image, mask, seed)[1][32, 20]))
    assert 0.45 < min(sizes) < 0.6
    assert 1.9 < max(sizes) < 2.05
    assert 20 < sum(sides) < 60
    places = {tuple(SceneAugmentation((8, 8), 3, 255)(image, mask, seed)[1].ravel()) for seed in range(40)}
    assert len(places) > 5


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


def test_bundled_samples():
    data = make("samples:segmentation", crop_size=96)
    data.check()
    assert data.class_names == ["background", "disc", "bar", "triangle"]
    assert next(iter(data.train_dataloader()))["image"].shape == (4, 3, 96, 96)
    assert len(names(data.val_dataloader())) == 16


def test_two_processes_share_an_epoch(root):
    shares = []
    for rank in (0, 1):
        data = make(root, batch_size=2)
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2)
        shares.append(names(epoch_of(data.train_dataloader(), 1)))
    assert sorted(shares[0] + shares[1]) == [f"{n:02d}" for n in range(12)]


def test_options_from_a_recipe(root):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Segmentation, "data")
    given = [
        "--data.root",
        str(root),
        "--data.crop_size",
        "[16,20]",
        "--data.scale",
        "[0.5,2]",
        "--data.classes",
        "[a,b,c]",
    ]
    data = parser.instantiate(parser.parse_args(given)).data
    assert data.class_names == ["a", "b", "c"]
    assert tuple(data.hparams.crop_size) == (16, 20)
    assert tuple(data.hparams.scale) == (0.5, 2)
    assert len(names(epoch_of(data.train_dataloader()))) == 8


class Counter(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = {"train": [], "val": [], "test": []}

    def training_step(self, batch, batch_idx):
        self.seen["train"].append((self.current_epoch, tuple(batch["path"]), int(batch["mask"].sum())))
        return self.weight * 0

    def validation_step(self, batch, batch_idx):
        self.seen["val"] += batch["path"]

    def test_step(self, batch, batch_idx):
        self.seen["test"] += batch["path"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def run(root, data, **options):
    counter = Counter()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(accelerator="cpu", max_epochs=2, num_sanity_val_steps=0, **quiet, **options)
    trainer.fit(counter, datamodule=data)
    return trainer, counter


def test_with_a_trainer(root):
    data = make(root, **CHANGES)
    trainer, counter = run(root, data)
    trainer.test(counter, datamodule=data, verbose=False)
    assert [epoch for epoch, _, _ in counter.seen["train"]] == [0, 0, 0, 1, 1, 1]
    assert len({sums for _, _, sums in counter.seen["train"]}) == 6
    assert len(counter.seen["val"]) == 10
    assert len(counter.seen["test"]) == 3


@pytest.mark.filterwarnings("ignore:.*overfit_batches")
def test_overfit_batches_makes_a_loader_of_its_own(root):
    _, counter = run(root, make(root), overfit_batches=1)
    first, second = counter.seen["train"]
    assert first[1:] == second[1:]

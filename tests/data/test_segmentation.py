"""The data module of segmentation: what batches hold, and that nothing is left to chance."""

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

from .scenes import CHANGES, SIZE, epoch_of, make, names, put, same, truth_of

COLOUR = {"saturation": 0.3, "hue": 0.1}


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
    # Dark for what is often the background, and no bright red, which says "wrong" in pictures.
    assert data.palette == [(45, 45, 45), (60, 180, 75), (67, 99, 216)]
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

"""The data module of anomaly detection: what batches hold, where they come from, and that nothing is left to chance."""

from pathlib import Path

import jsonargparse
import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image

from zoo.data import AnomalyDetection, anomaly_images
from zoo.data.anomaly_images import KEPT, TileSampler
from zoo.data.tiling import places
from zoo.errors import UsageError

from .anomalies import SIZE, epoch_of, make


def paths(batches) -> list[str]:
    return ["/".join(path.split("/")[-3:]) for batch in batches for path in batch["path"]]


def same(first, second) -> bool:
    return len(first) == len(second) and all(
        a["path"] == b["path"] and all(torch.equal(a[k], b[k]) for k in a if isinstance(a[k], torch.Tensor))
        for a, b in zip(first, second, strict=True)
    )


def pixels_of(root, name) -> np.ndarray:
    return np.asarray(Image.open(root / name)).transpose(2, 0, 1)


def test_training_batches_are_the_good_images_but_those_held_out(mvtec):
    data = make(mvtec)
    batches = epoch_of(data.train_dataloader())
    assert [len(batch["path"]) for batch in batches] == [4, 4, 4, 4, 2]
    assert all(set(batch) == {"image", "path"} for batch in batches)
    seen, held = paths(batches), paths(data.val_dataloader())
    assert len(set(seen)) == 18
    assert set(seen) | set(held) == {f"train/good/{n:02d}.png" for n in range(20)}
    assert not set(seen) & set(held)
    for batch in batches:
        assert (batch["image"].dtype, batch["image"].shape[1:]) == (torch.uint8, (3, *SIZE))
        for image, path in zip(batch["image"], batch["path"], strict=True):
            assert np.array_equal(image.numpy(), pixels_of(Path("/"), path))


def test_validation_is_held_out_images_each_with_a_drawn_defect(mvtec):
    batches = list(make(mvtec, val_split=0.2).val_dataloader())
    joined = {k: torch.cat([batch[k] for batch in batches]) for k in ("image", "mask", "label", "has_mask")}
    names, kinds = paths(batches), [kind for batch in batches for kind in batch["kind"]]
    assert kinds == ["good"] * 4 + ["synthetic"] * 4
    assert names[:4] == names[4:]
    assert all(name.startswith("train/good") for name in names)
    assert joined["label"].tolist() == [0] * 4 + [1] * 4
    assert joined["label"].dtype == torch.int64
    assert (joined["mask"].dtype, joined["mask"].shape) == (torch.bool, (8, 1, *SIZE))
    assert joined["has_mask"].tolist() == [True] * 8
    assert not joined["mask"][:4].any()
    good, spoilt, mask = joined["image"][:4], joined["image"][4:], joined["mask"][4:]
    assert mask.flatten(1).any(1).all()
    assert torch.equal(good.masked_fill(mask, 0), spoilt.masked_fill(mask, 0))
    assert (good != spoilt).any(1, keepdim=True)[mask].float().mean() > 0.9


def test_validation_without_drawn_defects(mvtec):
    (batch,) = make(mvtec, synthetic=False).val_dataloader()
    assert batch["kind"] == ["good"] * 2


def test_held_out_images_are_the_same_for_every_seed_and_drawn_defects_are_not(mvtec):
    one, two, again = (list(make(mvtec, seed=seed).val_dataloader()) for seed in (0, 1, 0))
    assert paths(one) == paths(two)
    assert same(one, again)
    assert not torch.equal(one[0]["mask"], two[0]["mask"])


def test_test_batches_have_masks_kinds_and_labels(mvtec):
    data = make(mvtec)
    assert data.has_test
    with pytest.warns(UserWarning, match=r"1 defective images have no mask, such as .*dent/00\.png"):
        batches = list(data.test_dataloader())
    mask = torch.cat([batch["mask"] for batch in batches])
    kinds = [kind for batch in batches for kind in batch["kind"]]
    assert kinds == ["dent", "good", "good", "good", "hole", "hole"]
    assert torch.cat([batch["label"] for batch in batches]).tolist() == [1, 0, 0, 0, 1, 1]
    assert torch.cat([batch["has_mask"] for batch in batches]).tolist() == [False, True, True, True, True, True]
    for number in range(2):
        expected = torch.zeros(SIZE, dtype=torch.bool)
        expected[4:10, 5 + number : 13] = True
        assert torch.equal(mask[4 + number, 0], expected)
    assert not mask[:4].any()


@pytest.mark.filterwarnings("ignore")
def test_train_and_validation_do_not_open_the_test_folder(mvtec):
    whole = make(mvtec)
    before = epoch_of(whole.train_dataloader()), list(whole.val_dataloader())
    for path in (mvtec / "test").rglob("*.png"):
        path.write_bytes(b"no image")
    (mvtec / "ground_truth" / "ghost").mkdir()
    (mvtec / "ground_truth" / "ghost" / "0_mask.png").write_bytes(b"no image")
    data = make(mvtec)
    assert same(before[0], epoch_of(data.train_dataloader()))
    assert same(before[1], list(data.val_dataloader()))
    assert data.skipped == {}


SHAKEN = {"hflip": 0.5, "vflip": 0.5, "rotate": 20.0, "brightness": 0.2, "contrast": 0.2}


@pytest.mark.parametrize("options", [SHAKEN, SHAKEN | {"tile": 10, "tile_overlap": 3, "img_size": 8}])
def test_batches_do_not_depend_on_workers_and_change_with_the_epoch(mvtec, options):
    alone, helped = make(mvtec, **options).train_dataloader(), make(mvtec, num_workers=2, **options).train_dataloader()
    for epoch in (0, 1):
        torch.manual_seed(epoch)  # the state of the main process has no say
        assert same(epoch_of(alone, epoch), epoch_of(helped, epoch))
    assert not same(epoch_of(alone, 0), epoch_of(alone, 1))
    assert not same(epoch_of(alone, 0), epoch_of(make(mvtec, seed=1, **options).train_dataloader(), 0))


def test_changes_of_one_image_depend_on_seed_and_epoch_alone(mvtec):
    images = make(mvtec, **SHAKEN).train_dataloader().dataset
    first = images[0, 3]["image"]
    other = make(mvtec, seed=1, **SHAKEN).train_dataloader().dataset[0, 3]["image"]
    assert torch.equal(first, images[0, 3]["image"])
    assert not torch.equal(first, images[1, 3]["image"])
    assert not torch.equal(first, other)


class Listener(LightningModule):
    """Notes its batches; saves a checkpoint after the update `save_at`."""

    def __init__(self, path=None, save_at=-1):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.path, self.save_at, self.seen = path, save_at, []

    def training_step(self, batch, number):
        self.seen.append((self.current_epoch, number, batch["image"].numpy().tobytes(), tuple(batch["path"])))
        return self.weight * batch["image"].float().mean()

    def validation_step(self, batch, number):
        assert batch["mask"].dtype == torch.bool

    def on_train_batch_end(self, *_):
        if self.trainer.global_step == self.save_at:
            self.trainer.save_checkpoint(self.path)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [SHAKEN, {"tile": 14, "tile_overlap": 0, "batch_size": 16}])
def test_resumed_training_sees_the_remaining_batches_bit_for_bit(mvtec, tmp_path, options):
    def fit(module, checkpoint=None, epochs=2):
        off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        trainer = Trainer(accelerator="cpu", default_root_dir=tmp_path, max_epochs=epochs, **off)
        trainer.fit(module, datamodule=make(mvtec, **options), ckpt_path=checkpoint, weights_only=True)
        return module.seen

    whole = fit(Listener())
    assert len(whole) == 10
    for done in (2, 5, 7):  # within the first epoch, at its end, within the second
        path = tmp_path / f"{done}.ckpt"
        fit(Listener(path, done))
        assert fit(Listener(), path) == whole[done:]


@pytest.mark.parametrize("chans", [1, 3])
def test_a_photo_is_decoded_once_for_all_epochs(mvtec, monkeypatch, chans):
    """To decode 12 megapixels takes longer than all else; what is kept must not change by what is done to a batch."""
    opened = []
    true = anomaly_images.open_image
    monkeypatch.setattr(
        anomaly_images, "open_image", lambda path, in_chans: opened.append(path) or true(path, in_chans)
    )
    data = make(mvtec, in_chans=chans, img_size=(12, 10))
    for loader, photos in ((data.train_dataloader(), 18), (data.val_dataloader(), 2)):
        first = epoch_of(loader, 1)
        kept = [batch["image"].clone() for batch in first]
        for batch in first:
            batch["image"].fill_(0)
        assert all(torch.equal(batch["image"], image) for batch, image in zip(epoch_of(loader, 1), kept, strict=True))
        assert len(opened) == len(set(opened)) == photos
        opened.clear()


def test_tiles_are_those_that_prediction_looks_at(mvtec):
    loader = make(mvtec, tile=10, tile_overlap=2, img_size=10).train_dataloader()
    batches = epoch_of(loader)
    assert 0 < len(loader.dataset._kept) <= KEPT  # 4 of 18: decoded photos are large
    found: dict[str, set] = {}
    for batch in batches:
        for image, path in zip(batch["image"], batch["path"], strict=True):
            found.setdefault(path, set()).add(image.numpy().tobytes())
    assert len(found) == 18
    for path, tiles in found.items():
        pixels = pixels_of(Path("/"), path)
        assert tiles == {pixels[:, y : y + 10, x : x + 10].tobytes() for y, x in places(SIZE, 10, 2)}
    assert sum(len(batch["path"]) for batch in batches) == 18 * 9
    assert len(set(paths(batches)[: 4 * 9])) == 4  # so that a photo is not decoded for each of its tiles


def test_tiles_of_images_smaller_than_a_tile(mvtec):
    (batch, *_) = epoch_of(make(mvtec, tile=32, img_size=32).train_dataloader())
    pixels = pixels_of(Path("/"), batch["path"][0])
    assert np.array_equal(batch["image"][0].numpy(), np.pad(pixels, ((0, 0), (0, 8), (0, 12)), mode="edge"))


@pytest.mark.filterwarnings("ignore")
def test_images_are_judged_at_their_own_size_where_there_are_tiles(mvtec):
    data = make(mvtec, tile=16, img_size=8)
    for loader, count in ((data.val_dataloader(), 4), (data.test_dataloader(), 6)):
        batches = list(loader)
        assert len(batches) == count
        for batch in batches:
            assert (batch["image"].shape, batch["mask"].shape) == ((1, 3, *SIZE), (1, 1, *SIZE))
            assert (batch["tile"], batch["tile_overlap"]) == (16, 4)


def test_drawn_defects_are_as_large_as_tiles_show_them(mvtec):
    for batch in make(mvtec, tile=10, val_split=0.5).val_dataloader():
        for axis in (2, 3):
            assert batch["mask"].any(axis).sum() <= 3  # 30 % of a tile


def test_tile_sampler_sees_every_tile_once_and_few_images_at_a_time():
    counts = [3, 5, 1, 7, 2, 4, 6, 2, 9]
    sampler = TileSampler(counts, seed=3)
    owner = np.repeat(np.arange(9), counts)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        keys = list(sampler)
        orders.append([index for _, index in keys])
        assert sorted(orders[-1]) == list(range(sum(counts)))
        assert {key[0] for key in keys} == {epoch}
        first = {image: min(n for n, i in enumerate(orders[-1]) if owner[i] == image) for image in range(9)}
        last = {image: max(n for n, i in enumerate(orders[-1]) if owner[i] == image) for image in range(9)}
        assert max(sum(first[i] <= n <= last[i] for i in range(9)) for n in range(sum(counts))) <= 4
    assert orders[0] != orders[1] != orders[2]
    ranks = [[index for _, index in TileSampler(counts, 3, rank, 2)] for rank in range(2)]
    assert sorted({*ranks[0], *ranks[1]}) == list(range(sum(counts)))
    assert len(ranks[0]) == len(ranks[1])


@pytest.mark.parametrize("chans", [1, 3])
def test_grey_transparent_and_deep_images_are_taken(tmp_path, chans):
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, SIZE, dtype=np.uint8)
    kinds = {
        "grey": Image.fromarray(grey),
        "clear": Image.fromarray(np.dstack([grey, grey, grey, 255 - grey])),
        "deep": Image.fromarray(grey.astype(np.uint16) * 256 + 7),
        "pair": Image.fromarray(np.dstack([grey, 255 - grey])),
    }
    for name, image in kinds.items():
        image.save(tmp_path / f"{name}.png")
    for loader in (make(tmp_path, in_chans=chans).train_dataloader(), make(tmp_path, in_chans=chans).val_dataloader()):
        for batch in loader:
            for image, path, kind in zip(batch["image"], batch["path"], batch.get("kind", ["good"] * 4), strict=False):
                assert image.shape == (chans, *SIZE)
                if kind == "good":
                    assert np.array_equal(image.numpy(), np.broadcast_to(grey, (chans, *SIZE))), path


@pytest.mark.filterwarnings("ignore")
def test_masks_are_binary_at_every_size(mvtec):
    for options in ({"img_size": (7, 9)}, {"img_size": (50, 41)}, {"img_size": (30, 90), "resize": "pad"}):
        for batch in make(mvtec, **options).test_dataloader():
            assert batch["mask"].dtype == torch.bool
            assert batch["mask"].shape[2:] == options["img_size"]
            holes = [n for n, kind in enumerate(batch["kind"]) if kind == "hole"]
            assert batch["mask"][holes].flatten(1).any(1).all()


@pytest.mark.filterwarnings("ignore")
def test_padding_puts_the_image_at_the_top_left_and_its_mask_with_it(mvtec):
    *_, batch = make(mvtec, img_size=(48, 60), resize="pad").test_dataloader()
    mask = batch["mask"][-1, 0]  # the image has 24 x 20 pixels and doubles
    expected = torch.zeros(48, 60, dtype=torch.bool)
    expected[8:20, 12:26] = True
    assert torch.equal(mask, expected)
    image = batch["image"][-1]
    assert torch.equal(image[:, :, 40:], image[:, :, 39:40].expand(3, 48, 20))


def test_good_images_to_test_on_are_held_out_where_they_do_not_lie_apart(write):
    root = write({"good": 20, "bad": 4}, size=(20, 24))
    data = make(root)
    train, val = paths(epoch_of(data.train_dataloader())), set(paths(data.val_dataloader()))
    with pytest.warns(UserWarning, match="4 defective images have no mask"):
        test = paths(data.test_dataloader())
    good = [name for name in test if "/good/" in name]
    assert (len(train), len(val), len(good), len(test)) == (14, 2, 4, 8)
    assert len({*train, *val, *good}) == 20


def test_without_defective_images_all_good_ones_are_learned_from(write):
    data = make(write({"good": 20}))
    assert not data.has_test
    assert len(paths(epoch_of(data.train_dataloader()))) == 18
    with pytest.raises(UsageError, match="no defective images to test on"):
        data.test_dataloader()
    assert paths(data.predict_dataloader()) == paths(data.val_dataloader())


def test_validation_images_of_the_dataset_are_used_unless_a_share_is_asked_for(write):
    folders = {"can/train/good": 10, "can/validation/good": 3, "can/test_public/good": 1, "can/test_public/bad": 1}
    root = write(folders, size=(20, 24))
    data = make(root)
    assert set(paths(data.val_dataloader())) == {f"validation/good/{n:02d}.png" for n in range(3)}
    assert len(paths(epoch_of(data.train_dataloader()))) == 10
    assert all(name.startswith("train/") for name in paths(make(root, val_split=0.2).val_dataloader()))


def test_bundled_samples(recwarn):
    data = make("samples:anomaly", img_size=64)
    assert len(paths(epoch_of(data.train_dataloader()))) == 36
    batches = list(data.test_dataloader())
    kinds = [kind for batch in batches for kind in batch["kind"]]
    assert {kind: kinds.count(kind) for kind in kinds} == {"good": 12, "blob": 8, "dent": 8, "scratch": 8}
    assert torch.cat([batch["has_mask"] for batch in batches]).all()
    assert not [one for one in recwarn if "mask" in str(one.message)]
    with pytest.raises(UsageError, match=r"'fabrik'\. Did you mean 'fabric'"):
        make("samples:anomaly", category="fabrik").train_dataloader()


def test_hyperparameters_are_plain_and_the_command_line_reads_them(mvtec):
    data = make(mvtec, tile=12)
    data.train_dataloader()
    assert all(type(value) in (int, float, str, bool, tuple, type(None)) for value in data.hparams.values())
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(AnomalyDetection, "data")
    given = parser.parse_args(["--data.tile", "256", "--data.val_split", "0.2", "--data.synthetic", "false"]).data
    assert (given.tile, given.tile_overlap, given.val_split, given.synthetic) == (256, None, 0.2, False)

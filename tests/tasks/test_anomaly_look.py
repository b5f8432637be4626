"""A threshold holds for images looked at as those that it was taken from: at their size, whole or by tiles."""

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from zoo.errors import UsageError


class Sized(LightningDataModule):
    """Test images of a size, of a data module that says how they are looked at."""

    def __init__(self, img_size=32, tile=None, tile_overlap=None, resize="stretch"):
        super().__init__()
        self.save_hyperparameters()

    def _loader(self, labels, **more):
        size = self.hparams.img_size
        images = torch.randint(0, 256, (len(labels), 3, size, size), dtype=torch.uint8)
        masks = torch.zeros(len(labels), 1, size, size, dtype=torch.bool)
        masks[:, :, :8, :8] = torch.tensor(labels).bool()[:, None, None, None]
        keys = {"kind": "good", "has_mask": True, "path": "a.png"}
        samples = [{"image": i, "mask": m, "label": n, **keys} for i, m, n in zip(images, masks, labels, strict=True)]
        return DataLoader(samples, batch_size=1)

    def train_dataloader(self):
        return self._loader([0, 0, 0])

    def val_dataloader(self):
        return self._loader([0, 1])

    def test_dataloader(self):
        return self._loader([0, 1])


WHOLE = {"img_size": 32}
TILED = {"img_size": 32, "tile": 16, "tile_overlap": 4}


@pytest.fixture(scope="module")
def sized(tmp_path_factory, anomaly):
    """Tells the checkpoint of a run whose data has these options."""
    made = {}

    def checkpoint(options):
        key = tuple(options.items())
        if key not in made:
            made[key] = tmp_path_factory.mktemp("sized") / "run.ckpt"
            trainer = anomaly.trainer(made[key].parent, max_epochs=1)
            trainer.fit(anomaly.task("memory_bank"), datamodule=Sized(**options))
            trainer.save_checkpoint(made[key])
        return str(made[key])

    return checkpoint


@pytest.mark.parametrize(
    ("trained", "tested", "words"),
    [
        (WHOLE, {"img_size": 64}, r"trained with img_size \[32, 32\].*test with img_size \[64, 64\].*zoo fit"),
        (WHOLE, WHOLE | {"tile": 16}, r"resize stretch,.*tile 16, tile_overlap 4"),
        (WHOLE, WHOLE | {"resize": "pad"}, r"resize stretch,.*resize pad"),
        (TILED, WHOLE, r"tile 16, tile_overlap 4,.*resize stretch"),
        (TILED, TILED | {"tile": 24}, r"tile 16,.*tile 24"),
        (TILED, TILED | {"tile_overlap": 8}, r"tile_overlap 4,.*tile_overlap 8"),
    ],
)
def test_a_threshold_does_not_judge_what_is_looked_at_otherwise(trained, tested, words, sized, anomaly, tmp_path):
    task = anomaly.task("memory_bank", img_size=tested["img_size"])
    with pytest.raises(UsageError, match=words):
        anomaly.trainer(tmp_path).test(task, datamodule=Sized(**tested), ckpt_path=sized(trained), verbose=False)


@pytest.mark.parametrize(
    ("trained", "tested"),
    # A quarter of a tile is what an absent overlap is; tiles are stretched whatever `resize` says.
    [(WHOLE, WHOLE), (WHOLE, WHOLE | {"tile_overlap": 4}), (TILED, {"img_size": 32, "tile": 16, "resize": "pad"})],
)
def test_options_without_effect_do_not_stop_a_test(trained, tested, sized, anomaly, tmp_path):
    trainer = anomaly.trainer(tmp_path)
    task = anomaly.task("memory_bank")
    trainer.test(task, datamodule=Sized(**tested), ckpt_path=sized(trained), verbose=False)
    assert "test/f1" in trainer.callback_metrics


def test_validation_at_another_size_takes_a_threshold_of_its_own(sized, anomaly, tmp_path):
    task, trainer = anomaly.task("memory_bank", img_size=64), anomaly.trainer(tmp_path)
    trainer.validate(task, datamodule=Sized(img_size=64), ckpt_path=sized(WHOLE), verbose=False)
    assert float(trainer.callback_metrics["val/threshold"]) != float(
        torch.load(sized(WHOLE), weights_only=True)["state_dict"]["threshold"]
    )

"""A tiny run of segmentation: drawn squares and stripes, a small network."""

import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, Dataset, default_collate

sys.path.insert(0, str(Path(__file__).parent))
from tiny_run import trainer

from zoo.tasks import Segmentation

SIZE = 32
NAMES = ["ground", "square", "stripe"]
VOID = 200


class Scenes(Dataset):
    """Dark noise with a bright square and a coloured stripe; every fourth image has a strip without a class."""

    def __init__(self, length, seed, size=(SIZE, SIZE)):
        self.length, self.seed, self.size = length, seed, size

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(1000 * self.seed + index)
        height, width = self.size
        image = torch.randint(0, 60, (3, height, width), generator=generator, dtype=torch.uint8)
        mask = torch.zeros(height, width, dtype=torch.int64)
        top, left, row = (int(v) for v in torch.randint(0, min(self.size) - 12, (3,), generator=generator))
        mask[row : row + 4] = 2
        mask[top : top + 12, left : left + 12] = 1
        image[:, mask == 1] += 180
        image[1, mask == 2] += 150
        if index % 4 == 0:
            mask[:, :3] = VOID
        return {"image": image, "mask": mask, "path": f"{self.seed}/{index:03d}.png"}


class Data(LightningDataModule):
    """16 images to train on, 6 to validate and 7 to test on."""

    class_names, ignore_index = NAMES, VOID

    def __init__(self, size=(SIZE, SIZE), batch_size=4):
        super().__init__()
        self.size, self.batch_size, self.skipped = size, batch_size, {}

    def _loader(self, length, seed, size, shuffle=False):
        return DataLoader(Scenes(length, seed, size), self.batch_size, shuffle, collate_fn=default_collate)

    def train_dataloader(self):
        return self._loader(16, 1, (SIZE, SIZE), shuffle=True)

    def val_dataloader(self):
        return self._loader(6, 2, self.size)

    def test_dataloader(self):
        return self._loader(7, 3, self.size)

    def class_weights(self, kind):
        return {"median": [0.5, 1.0, 2.0], "inverse": [1.0, 2.0, 4.0]}[kind]


def task(**arguments):
    small = {
        "head": "fpn",
        "backbone": "test_efficientnet",
        "head_options": {"pyramid_channels": 32, "hidden_channels": 32, "dropout": 0.0},
        "class_names": NAMES,
        "ignore_index": VOID,
        "img_size": SIZE,
        "lr": 1e-2,
    }
    return Segmentation(**(small | arguments))


def fitted(folder, data=None, callbacks=(), epochs=3, **arguments):
    """A task after a fit, and its trainer."""
    seed_everything(7, verbose=False)
    made, runner = task(**arguments), trainer(folder, callbacks, max_epochs=epochs)
    runner.fit(made, datamodule=data or Data())
    return made, runner


def best(folder):
    return ModelCheckpoint(str(Path(folder) / "checkpoints"), "best", monitor="val/miou", mode="max")

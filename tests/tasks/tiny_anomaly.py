"""A tiny run of anomaly detection: drawn cloth, resumable loader, both methods; also a program to be killed.

As a program: tiny_anomaly.py FOLDER METHOD full|die|resume [BATCHES UNTIL DEATH].
"""

import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import Dataset, default_collate

sys.path.insert(0, str(Path(__file__).parent))
from tiny_run import Die, EpochOrder, Loader, trainer

from zoo.tasks import AnomalyDetection
from zoo.tasks.callbacks import LastCheckpoint

SIZE = 32
TINY = {
    "l2bt": {"backbone": "test_efficientnet", "layers": [1, 2], "lr": 1e-2},
    "memory_bank": {"backbone": "test_efficientnet", "layers": [1, 2]},
}


class Cloth(Dataset):
    """Stripes with noise; from number `good` on, each with a bright spot in a place of its own.

    Args:
        bare: without mask and label, as for training.
        lie: 1 gives good images for defective ones and the other way round, masks included.
    """

    def __init__(self, length: int, good: int, seed: int, bare: bool = False, lie: bool = False):
        self.length, self.good, self.seed, self.bare, self.lie = length, good, seed, bare, lie

    def __len__(self):
        return self.length

    def __getitem__(self, item):
        index = item[1] if isinstance(item, tuple) else item
        generator = torch.Generator().manual_seed(1000 * self.seed + index)
        image = torch.randint(90, 120, (3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
        image[:, ::4] += 60
        sample = {"image": image, "path": f"{self.seed}/{index:03d}.png"}
        if self.bare:
            return sample
        mask = torch.zeros(1, SIZE, SIZE, dtype=torch.bool)
        defective = index >= self.good
        if defective:
            top, left = (int(v) for v in torch.randint(0, SIZE - 8, (2,), generator=generator))
            mask[:, top : top + 8, left : left + 8] = True
            image[:, mask[0]] = 240
        if self.lie:
            mask, defective = ~mask, not defective
        kind = "spot" if defective else "good"
        return sample | {"mask": mask, "label": int(defective), "kind": kind, "has_mask": True}


class Data(LightningDataModule):
    """24 good images to train on; 4 good and 4 spotted ones to validate, 5 and 7 to test on."""

    def __init__(self, length=24, batch_size=4, workers=0, val_good=4, val_length=8, test_seed=3, test_lie=False):
        super().__init__()
        self.save_hyperparameters()
        self.skipped = {}

    def _loader(self, data, shuffle=False):
        h = self.hparams
        order = EpochOrder(len(data), shuffle)
        return Loader(data, h.batch_size, sampler=order, num_workers=h.workers, collate_fn=default_collate)

    def train_dataloader(self):
        return self._loader(Cloth(self.hparams.length, self.hparams.length, 1, bare=True), shuffle=True)

    def val_dataloader(self):
        return self._loader(Cloth(self.hparams.val_length, self.hparams.val_good, 2))

    def test_dataloader(self):
        return self._loader(Cloth(12, 5, self.hparams.test_seed, lie=self.hparams.test_lie))


def task(method="l2bt", **arguments):
    return AnomalyDetection(**({"method": method, "img_size": SIZE} | TINY[method] | arguments))


def run_callbacks(folder):
    checkpoints = str(Path(folder) / "checkpoints")
    best = ModelCheckpoint(checkpoints, "best", monitor="val/selection", mode="max", enable_version_counter=False)
    return [best, LastCheckpoint(every_n_train_steps=2, dirpath=checkpoints)]


def epochs(method):
    return 3 if method == "l2bt" else 1


def fitted(folder, method="l2bt", data=None, callbacks=(), seed=7, **arguments):
    """A task after a fit, and its trainer."""
    seed_everything(seed, verbose=False)
    made, runner = task(method, **arguments), trainer(folder, callbacks, max_epochs=epochs(method))
    runner.fit(made, datamodule=data or Data())
    return made, runner


def differing(expected, got):
    """Keys of two states whose values are not the same bits; a bank's state also holds a dict."""
    assert expected.keys() == got.keys()

    def same(a, b):
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

    return [key for key, value in expected.items() if not same(value, got[key])]


def main(folder: str, method: str, mode: str, batches: str = "0") -> None:
    torch.set_num_threads(1)
    seed_everything(7, verbose=False)
    callbacks = run_callbacks(folder) + ([Die(int(batches))] if mode == "die" else [])
    last = Path(folder) / "checkpoints" / "last.ckpt"
    trainer(folder, callbacks, max_epochs=epochs(method)).fit(
        task(method), datamodule=Data(workers=2), ckpt_path=str(last) if mode == "resume" else None
    )


if __name__ == "__main__":
    main(*sys.argv[1:])

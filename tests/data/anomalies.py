"""What tests of anomaly data share: the size of their images, a data module over them, and its batches."""

from zoo.data import AnomalyDetection

SIZE = (24, 20)  # height, width


def make(root, **options):
    return AnomalyDetection(str(root), **({"img_size": SIZE, "batch_size": 4, "num_workers": 0} | options))


def epoch_of(loader, epoch: int = 0) -> list[dict]:
    loader.sampler.set_epoch(epoch)
    return list(loader)

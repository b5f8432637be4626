"""A task that has what export asks for and nothing else, and one exported model that many tests run."""

import functools

import pytest
import timm
import torch
from torch import nn

CLASSES = ["plane", "car", "bird", "cat", "deer", "døg", "frog, green"]


@pytest.fixture(autouse=True, scope="session")
def operators_of_onnx():
    """What torch's operators are in ONNX is read once, not in every export, a fifth of whose time it took."""
    from torch.onnx._internal.exporter._registration import onnxscript_apis

    read = onnxscript_apis.get_torchlib_ops
    onnxscript_apis.get_torchlib_ops = functools.cache(read)
    yield
    onnxscript_apis.get_torchlib_ops = read


def convolution(in_chans):
    """A network that exports in a second, for tests of everything but the network."""
    return nn.Sequential(
        nn.Conv2d(in_chans, 32, 5, stride=2), nn.GELU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 7)
    )


class TinyTask(nn.Module):
    """A network, of timm's or the small one here, with normalisation inside its inference."""

    def __init__(self, backbone="convolution", img_size=(32, 32), in_chans=3, mean=0.4, std=0.3, **options):
        super().__init__()
        if backbone == "convolution":
            network = convolution(in_chans)
        else:
            network = timm.create_model(backbone, num_classes=len(CLASSES), in_chans=in_chans, **options)
        # Larger weights than at initialisation: logits of a trained network's size, so that errors have one to show in.
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        self.name, self.backbone, self.img_size, self.in_chans = backbone, network, img_size, in_chans
        self.register_buffer("mean", torch.full((in_chans, 1, 1), mean), persistent=False)
        self.std = std
        self.eval()

    def inference(self, images):
        images = images.to(self.mean.dtype) / 255 if images.dtype == torch.uint8 else images
        return self.backbone((images - self.mean) / self.std).float()

    def export_meta(self):
        return {
            "task": "classification",
            "backbone": self.name,
            "class_names": CLASSES,
            "img_size": list(self.img_size),
            "in_chans": self.in_chans,
            "mean": self.mean.flatten().tolist(),
            "std": [self.std] * self.in_chans,
        }


@pytest.fixture(scope="session")
def task():
    torch.manual_seed(0)
    return TinyTask("test_vit")


@pytest.fixture
def small():
    return TinyTask()


@pytest.fixture(scope="session")
def model(task, tmp_path_factory):
    """Path of the exported tiny task."""
    from zoo.export import to_onnx

    path = tmp_path_factory.mktemp("model") / "tiny.onnx"
    to_onnx(task, path, preprocess={"crop_pct": 0.9, "interpolation": "bicubic"})
    return path

"""A stand-in for a trained anomaly detector: what export asks of one, and a network that exports in a second."""

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Output(NamedTuple):
    score: Tensor
    map: Tensor


class TinyDetector(nn.Module):
    """Distance of two convolutions' features, as a student's from its teacher's; img_size is not square on purpose."""

    def __init__(self, img_size=(32, 40), in_chans=3, threshold=9.5, width=64):
        super().__init__()
        torch.manual_seed(0)
        self.teacher = nn.Conv2d(in_chans, width, 5, stride=4, padding=2)
        self.student = nn.Conv2d(in_chans, width, 3, stride=4, padding=1)
        self.register_buffer("mean", torch.full((in_chans, 1, 1), 0.4))
        self.img_size, self.in_chans, self.threshold = img_size, in_chans, threshold
        self.eval()

    def inference(self, images):
        images = (images - self.mean) / 0.3
        assert images.shape[-2:] == self.img_size
        distance = (self.teacher(images) - self.student(images)).square().sum(1, keepdim=True).sqrt()
        anomaly_map = F.interpolate(distance, self.img_size, mode="bilinear", align_corners=False)
        return Output(anomaly_map.flatten(1).topk(5).values.mean(1), anomaly_map)

    def export_meta(self):
        return {
            "task": "anomaly_detection",
            "method": "tiny",
            "backbone": "convolution",
            "layers": [0, 1],
            "img_size": list(self.img_size),
            "in_chans": self.in_chans,
            "mean": self.mean.flatten().tolist(),
            "std": [0.3] * self.in_chans,
            "threshold": self.threshold,
        }


class Brightness(TinyDetector):
    """Its map is the mean of the channels, so what tiles do to a map shows as what they do to a picture."""

    def inference(self, images):
        anomaly_map = images.mean(1, keepdim=True)
        return Output(anomaly_map.flatten(1).amax(1), anomaly_map)


def in_float64(task, images):
    """Score and map of images uint8 (B, C, H, W) in float64, with torchvision's filter around the task's network."""
    task = copy.deepcopy(task).double()
    pixels = torch.tensor(images).double() / 255
    with torch.no_grad():
        small = F.interpolate(pixels, task.img_size, mode="bilinear", antialias=True)
        score, anomaly_map = task.inference(small)
        large = F.interpolate(anomaly_map, images.shape[-2:], mode="bilinear", antialias=True)
    return score.numpy(), large.numpy()

"""A task for images of any size: shrunk to its own size on the way in, its map brought back on the way out."""

import torch
from torch import Tensor, nn


class AnySize(nn.Module):
    """`inference` of an anomaly detection task, for images of any size.

    The score is the one at the model's size, so it stays comparable with the task's threshold.

    Args:
        task: has `inference(images float32 (B, C, h, w) in [0, 1]) -> (score (B,), map (B, 1, h, w))`.
        img_size: (h, w), the size the task works at.
    """

    def __init__(self, task: nn.Module, img_size: tuple[int, int]):
        super().__init__()
        self.task = task.eval()
        self.img_size = img_size

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Score float32 (B,) and map float32 (B, 1, H, W) of images uint8 (B, C, H, W), any H and W."""
        height, width = images.shape[-2:]
        score, anomaly_map = self.task.inference(resize(images.float() / 255, self.img_size))
        return score.float(), resize(anomaly_map.float(), (height, width))


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, averaging over what one output pixel covers where it shrinks; float (B, C, H, W) -> (B, C, *size).

    What Pillow's and torchvision's antialiased bilinear filter compute, without rounding in between. Two products with
    small matrices, so that one graph serves every size and no runtime's own idea of antialiasing matters.
    """
    return (
        _weights(images.shape[-2], size[0], images.device)
        @ images
        @ _weights(images.shape[-1], size[1], images.device).T
    )


def _weights(given: int, wanted: int, device: torch.device) -> Tensor:
    """(wanted, given): each row holds one output pixel's triangle of weights, which sum to 1."""
    scale = given / wanted
    centres = (torch.arange(wanted, dtype=torch.float32, device=device) + 0.5) * scale
    places = torch.arange(given, dtype=torch.float32, device=device) + 0.5
    # `sym_max` and not `max`: the sizes are symbols while the graph is made.
    weights = (1 - (places[None] - centres[:, None]).abs() / torch.sym_max(scale, 1.0)).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)

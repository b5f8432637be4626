"""What every segmentation head is, and an encoder and a head as one network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from zoo.features import FeaturePyramid


@dataclass(frozen=True)
class Foreign:
    """A released file taken apart.

    Attributes:
        encoder: entries of the encoder, as its own authors name them.
        rest: the other entries, by the names that a `Segmenter` has for them.
        options: of the head, with which the file was trained.
        absent: beginnings of names that such a file lacks.
    """

    encoder: Mapping[str, Tensor]
    rest: Mapping[str, Tensor]
    options: Mapping[str, Any]
    absent: tuple[str, ...] = ()


class SegmentationHead(nn.Module):
    """Base of the heads: maps of an encoder, finest first -> logits of the images' size.

    A head is made of the maps' channels, the number of classes and its own options, and fills `levels`.
    """

    # Reductions of the maps that it wants by default.
    levels: tuple[int, ...] = (4, 8, 16, 32)

    def forward(self, features: Sequence[Tensor], size: tuple[int, int]) -> Tensor | list[Tensor]:
        """Maps (B, C_i, h_i, w_i) of images of `size` (H, W) -> logits (B, classes, H, W).

        In training with deep supervision a list of such logits, the main ones first.
        """
        raise NotImplementedError

    @classmethod
    def stem(cls, in_chans: int, **options: Any) -> nn.Module | None:
        """What turns the images into those of three channels before the encoder, given the head's options, if any."""
        return None

    @classmethod
    def read(cls, state: Mapping[str, Tensor]) -> Foreign | None:
        """The parts of a file that the paper's authors released for this head; None if it is no such file."""
        return None


class Segmenter(nn.Module):
    """An encoder and a head: normalised images (B, C, H, W) -> logits (B, num_classes, H, W).

    Args:
        encoder: makes the maps.
        head: makes logits of them.
        num_classes: how many.
        mean, std: per channel, of images in [0, 1], as the encoder wants them normalised.
        stem: goes before the encoder, if anything does.
    """

    def __init__(
        self,
        encoder: FeaturePyramid,
        head: SegmentationHead,
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        stem: nn.Module | None = None,
    ):
        super().__init__()
        self.stem = stem
        self.encoder = encoder
        self.head = head
        self.num_classes, self.mean, self.std = num_classes, list(mean), list(std)

    @property
    def img_size(self) -> tuple[int, int]:
        """(height, width) that the encoder was made for."""
        return self.encoder.img_size

    @property
    def any_size(self) -> bool:
        """Whether images of other sizes work, odd ones included."""
        return self.encoder.any_size

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        """Logits of the images' own size; in training with deep supervision a list of them, the main ones first.

        Raises:
            UsageError: the encoder cannot take images of this size; says which it can.
        """
        size = (images.shape[2], images.shape[3])
        if self.stem is not None:
            images = self.stem(images)
        return self.head(self.encoder(images), size)

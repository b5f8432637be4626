"""What every method of anomaly detection is: a frozen teacher, and a head that learns from its maps of good images."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zoo.errors import UsageError

Progress = Callable[[int, int], None]


class AnomalyOutput(NamedTuple):
    """score (B,) and map (B, 1, H, W), float32; the higher, the less normal."""

    score: Tensor
    map: Tensor


class AnomalyHead(nn.Module):
    """Base of the methods. They fill `needs_gradient`, and either `loss` or `update`, and `detect`.

    Whether it is fitted is part of the state, so that loaded weights are as good as learned ones.
    """

    needs_gradient: bool
    fitted: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("fitted", torch.tensor(False))
        # The same as a Python value, which an exported graph can ask without looking into a tensor.
        self._ready = False

    def loss(self, features: Sequence[Tensor]) -> Tensor:
        """What gradient methods minimise over maps (B, C, H, W) of good images."""
        raise UsageError(f"{type(self).__name__} learns without gradients: call update and finalize")

    def update(self, features: Sequence[Tensor]) -> None:
        """Shows a bank the maps (B, C, H, W) of good images."""
        raise UsageError(f"{type(self).__name__} learns by gradients: minimise its loss")

    def finalize(self, progress: Progress | None = None) -> None:
        """Ends learning, for now.

        Args:
            progress: called with the number of steps done and of all, where there are some.
        """
        self._ready = True
        self.fitted.fill_(True)

    def detect(self, features: Sequence[Tensor], size: tuple[int, int]) -> AnomalyOutput:
        """The answer to maps of images of `size` (H, W)."""
        raise NotImplementedError

    def forward(self, features: Sequence[Tensor], size: tuple[int, int]) -> AnomalyOutput:
        """Maps (B, C, H, W) of images of `size` -> scores and maps of that size.

        Raises:
            UsageError: nothing was learned yet.
        """
        if not self._ready:
            raise UsageError(f"this {type(self).__name__} has learned nothing yet: fit it, or load fitted weights")
        with torch.autocast(features[0].device.type, enabled=False):
            return self.detect([map_.float() for map_ in features], size)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[arg-type]
        self._ready = bool(self.fitted)


class Detector(nn.Module):
    """A teacher and a head: images in, scores and maps out.

    Args:
        teacher: images (B, in_chans, H, W) -> list of maps (B, C, h, w). It is frozen: always in evaluation mode, no
            gradients.
        head: what learns.
        mean, std: per channel, of images in [0, 1], as the teacher wants them normalised.
        img_size: (height, width) that the teacher is made for.
    """

    def __init__(
        self,
        teacher: nn.Module,
        head: AnomalyHead,
        mean: Sequence[float],
        std: Sequence[float],
        img_size: tuple[int, int],
    ):
        super().__init__()
        self.teacher = teacher.requires_grad_(False).eval()
        self.head = head
        self.mean, self.std, self.img_size = list(mean), list(std), tuple(img_size)

    def train(self, mode: bool = True) -> "Detector":
        super().train(mode)
        self.teacher.eval()
        return self

    def features(self, images: Tensor) -> list[Tensor]:
        """The teacher's maps of normalised images (B, C, H, W).

        Raises:
            UsageError: images of another number of dimensions.
        """
        if images.ndim != 4:
            raise UsageError(f"images have the shape {tuple(images.shape)}: give a batch (B, C, H, W), also of one")
        with torch.no_grad():
            return self.teacher(images)

    def loss(self, images: Tensor) -> Tensor:
        """What a gradient method minimises over normalised good images (B, C, H, W)."""
        return self.head.loss(self.features(images))

    def update(self, images: Tensor) -> None:
        """Shows a bank normalised good images (B, C, H, W)."""
        self.head.update(self.features(images))

    def finalize(self, progress: Progress | None = None) -> None:
        """Ends learning; a bank is made here. See `AnomalyHead.finalize`."""
        self.head.finalize(progress)

    def forward(self, images: Tensor, size: tuple[int, int] | None = None) -> AnomalyOutput:
        """Normalised images (B, C, H, W) -> scores (B,) and maps (B, 1, *size), of the images' own size if None.

        Raises:
            UsageError: nothing was learned yet.
        """
        return self.head(self.features(images), size or (images.shape[2], images.shape[3]))

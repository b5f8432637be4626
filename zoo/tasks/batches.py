"""What a batch holds, whatever the task: a dict with "image", a pair (images, targets), or the images alone."""

from collections.abc import Mapping
from typing import Any


def images_of(batch: Any) -> Any:
    """The images of a batch."""
    if isinstance(batch, Mapping):
        return batch["image"]
    return batch[0] if isinstance(batch, (tuple, list)) else batch


def images_in(batch: Any) -> int:
    """How many images a batch has."""
    return len(images_of(batch))

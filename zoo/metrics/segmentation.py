"""How well the classes of pixels are told apart: IoU and Dice from counts, over a whole data set or by image."""

import re
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from zoo.errors import UsageError, unknown

EMPTY = ("strict", "macmd")
# Values of images are summed as whole numbers of this part: they add up to the same in any order and on any device.
_UNIT = 2.0**-32


class PixelClasses(Metric):
    """What the metrics of segmentation share: classes, and pixels that count for nothing.

    Pixels whose truth is `ignore_index` are left out, whatever is predicted there.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def __init__(
        self, num_classes: int, ignore_index: int = 255, classes: Sequence[int] | None = None, **kwargs: Any
    ) -> None:
        """Args:
            num_classes: K.
            ignore_index: class number of pixels without a class.
            classes: those that the mean is over, for instance [1, 2] without a background 0; all when absent.
            kwargs: torchmetrics' own, such as `sync_on_compute`.

        Raises:
            UsageError: numbers that do not fit together.
        """
        super().__init__(**kwargs)
        if num_classes < 2:
            raise UsageError(f"num_classes is {num_classes}: give at least 2, one of them for the background")
        if 0 <= ignore_index < num_classes:
            raise UsageError(f"ignore_index is {ignore_index}, which is one of the {num_classes} classes; give another")
        chosen = list(range(num_classes)) if classes is None else list(classes)
        if not chosen or any(not 0 <= number < num_classes for number in chosen):
            raise UsageError(f"classes are {chosen}: give at least one number from 0 to {num_classes - 1}")
        self.num_classes, self.ignore_index, self.classes = num_classes, ignore_index, chosen

    def _checked(self, preds: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(predicted classes, true ones, where they count), each (B, H, W): int64 (0 where not), int64, bool.

        Raises:
            UsageError: other shapes or types, or a class that does not exist.
        """
        k = self.num_classes
        if preds.is_floating_point() and preds.ndim == 4:
            if preds.shape[1] != k:
                raise UsageError(f"logits {tuple(preds.shape)} do not have {k} channels, one a class")
            preds = preds.argmax(1)
        if preds.is_floating_point() or target.is_floating_point() or preds.shape != target.shape or preds.ndim != 3:
            raise UsageError(
                f"predictions {tuple(preds.shape)} ({preds.dtype}) and truth {tuple(target.shape)} ({target.dtype}) do "
                f"not belong together: give class numbers (B, H, W), or logits (B, {k}, H, W), and class numbers "
                "(B, H, W) of the same size"
            )
        valid = target != self.ignore_index
        preds, target = (values.long().where(valid, 0) for values in (preds, target))
        for what, values in (("truth", target), ("predictions", preds)):
            for value in (int(value) for value in values.aminmax()) if values.numel() else ():
                if not 0 <= value < k:
                    raise UsageError(
                        f"the {what} hold class {value} in {int((values == value).sum())} pixels; there are {k} "
                        f"classes, 0 to {k - 1}, and {self.ignore_index} for none"
                    )
        return preds, target, valid

    def _mean(self, values: Tensor) -> Tensor:
        """Mean of (K,) over the chosen classes that are not NaN; NaN where none is left."""
        return self._shown(values[self.classes].nanmean())

    def _shown(self, values: Tensor) -> Tensor:
        return values.float().to(self.device)


class Confusion(PixelClasses):
    """One table of true against predicted classes over all images, (K, K) int64."""

    confusion: Tensor

    def __init__(
        self, num_classes: int, ignore_index: int = 255, classes: Sequence[int] | None = None, **kwargs: Any
    ) -> None:
        """Args: as `PixelClasses`."""
        super().__init__(num_classes, ignore_index, classes, **kwargs)
        self.add_state("confusion", torch.zeros(num_classes, num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Takes class numbers (B, H, W), or logits (B, K, H, W), and true class numbers (B, H, W).

        Raises:
            UsageError: other shapes or types, or a class that does not exist.
        """
        self.confusion += table(*self._checked(preds, target), self.num_classes)

    def _sides(self) -> tuple[Tensor, Tensor, Tensor]:
        """(right, predicted, true) pixels of each class, float64 (K,)."""
        counts = self.confusion.cpu().double()
        return counts.diagonal(), counts.sum(0), counts.sum(1)


class MeanIoU(Confusion):
    """Mean over classes of intersection / union, counted over all images together, not averaged over images.

    A class that is neither true nor predicted anywhere has no IoU (NaN) and is left out of the mean; one that is only
    predicted has IoU 0. Without any pixel that counts every value is NaN.

    Source: Everingham et al. 2015, "The Pascal Visual Object Classes Challenge: A Retrospective" (IJCV).
    """

    def compute(self) -> dict[str, Tensor]:
        """{"miou": scalar, "iou_per_class": (K,), "pixel_accuracy": scalar}, float32."""
        right, predicted, true = self._sides()
        iou = right / (predicted + true - right)
        return {
            "miou": self._mean(iou),
            "iou_per_class": self._shown(iou),
            "pixel_accuracy": self._shown(right.sum() / true.sum()),
        }


class DiceScore(Confusion):
    """Mean over classes of 2 x intersection / (predicted + true), counted over all images together.

    A class that is neither true nor predicted anywhere is left out of the mean; one that is only one of both has 0.
    """

    def compute(self) -> dict[str, Tensor]:
        """{"dice": scalar, "dice_per_class": (K,)}, float32."""
        right, predicted, true = self._sides()
        dice = 2 * right / (predicted + true)
        return {"dice": self._mean(dice), "dice_per_class": self._shown(dice)}


class PerImage(PixelClasses):
    """A value for each image and class, averaged over images, then over classes; bounded state, (K,) sums and counts.

    What counts where an image and its prediction do not both show a class is chosen by `empty`: "strict" leaves out an
    image where neither does, and gives the worst value where only one does; "macmd" is the bookkeeping of MACMD's
    released evaluation (and of others of its field): 0 where the truth or both are without the prediction, and `alarm`
    where the prediction is without the truth. That flatters models that find what is not there.
    """

    alarm: ClassVar[float]
    name: ClassVar[str]

    def __init__(
        self,
        num_classes: int,
        ignore_index: int = 255,
        classes: Sequence[int] | None = None,
        empty: str = "strict",
        _variant: str = "",
        **kwargs: Any,
    ) -> None:
        """Args: as `PixelClasses`, and
            empty: "strict" or "macmd".
            _variant: of a subclass: what else its values depend on.

        Raises:
            UsageError: an unknown `empty`.
        """
        super().__init__(num_classes, ignore_index, classes, **kwargs)
        if empty not in EMPTY:
            raise unknown(f"empty of {type(self).__name__}", empty, EMPTY)
        self.empty = empty
        # A collection shares states of equal names and contents: what differs in meaning differs in name.
        self._states = [re.sub(r"\W", "_", f"{self.name}_{empty}_{_variant}{part}") for part in ("sums", "images")]
        for name in self._states:
            self.add_state(name, torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Takes what `MeanIoU.update` takes.

        Raises:
            UsageError: other shapes or types, or a class that does not exist.
        """
        for pred, true, valid in zip(*self._checked(preds, target), strict=True):
            if not bool(valid.any()):
                continue
            values = self._values(pred, true, valid)
            parts = (values.nan_to_num() / _UNIT).round().long(), (~values.isnan()).long()
            for name, part in zip(self._states, parts, strict=True):
                setattr(self, name, getattr(self, name) + part.to(self.device))

    def _values(self, pred: Tensor, true: Tensor, valid: Tensor) -> Tensor:
        """Of one image (H, W), float64 (K,) on the CPU; NaN for a class that does not count."""
        raise NotImplementedError

    def _without(self, predicted: bool, true: bool, worst: float) -> float:
        """The value of a class that the prediction, the truth or both lack."""
        if self.empty == "macmd":
            return self.alarm if predicted else 0.0
        return worst if predicted or true else float("nan")

    def compute(self) -> dict[str, Tensor]:
        """{NAME: scalar, NAME_per_class: (K,)}, float32; NaN for a class that counted in no image."""
        sums, images = (getattr(self, name).cpu().double() for name in self._states)
        values = sums * _UNIT / images
        return {self.name: self._mean(values), f"{self.name}_per_class": self._shown(values)}


class DicePerImage(PerImage):
    """Dice of every image and class, averaged over images, then over classes; "dice_image" and "dice_image_per_class".

    With `empty="macmd"` a class that is only predicted counts 1, and one that neither shows 0.
    """

    alarm = 1.0
    name = "dice_image"

    def _values(self, pred: Tensor, true: Tensor, valid: Tensor) -> Tensor:
        counts = table(pred, true, valid, self.num_classes).cpu().double()
        right, predicted, truly = counts.diagonal(), counts.sum(0), counts.sum(1)
        dice = 2 * right / (predicted + truly)
        for number in torch.nonzero((predicted == 0) | (truly == 0)).flatten().tolist():
            dice[number] = self._without(bool(predicted[number] > 0), bool(truly[number] > 0), 0.0)
        return dice


def table(preds: Tensor, target: Tensor, valid: Tensor, num_classes: int) -> Tensor:
    """Pixels of each true (row) and predicted (column) class, int64 (K, K), from class numbers of any shape."""
    # Pixels that do not count have a place of their own: to pick out the others would take longer than to count.
    nowhere = num_classes**2
    cells = (target * num_classes + preds).where(valid, nowhere).flatten()
    return torch.bincount(cells, minlength=nowhere + 1)[:nowhere].view(num_classes, num_classes)

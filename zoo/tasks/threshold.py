"""From which score on an image counts as defective: decided on validation images alone."""

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from zoo.errors import UsageError


def choose_threshold(scores: Tensor, defective: Tensor, false_alarms: float) -> float:
    """The threshold for `score > threshold`, in the middle of the gap it lies in.

    With defects among the images: the one with the largest F1; of several, the one in the widest gap. Without: the
    quantile that the share `false_alarms` of the good images exceeds.

    Args:
        scores: (N,), finite.
        defective: bool (N,).
        false_alarms: in [0, 1).

    Raises:
        UsageError: there are no images, or a score is not finite.
    """
    scores = scores.detach().double().cpu().flatten()
    defective = defective.cpu().flatten().bool()
    if len(scores) == 0:
        raise UsageError("there are no validation images to take the threshold from")
    if not bool(torch.isfinite(scores).all()):
        raise UsageError("a validation image has a score that is not finite; no threshold can be taken from it")
    if not bool(defective.any()):
        return float(torch.quantile(scores, 1 - false_alarms).float())
    return _best_f1(scores, defective)


def _best_f1(scores: Tensor, defective: Tensor) -> float:
    values, place = scores.unique(return_inverse=True)
    bad = torch.zeros(len(values), dtype=torch.float64).index_add_(0, place, defective.double())
    every = torch.zeros(len(values), dtype=torch.float64).index_add_(0, place, torch.ones_like(scores))
    # Cut k calls values k, k + 1, ... defective; cut 0 calls everything so.
    found, called = bad.flip(0).cumsum(0).flip(0), every.flip(0).cumsum(0).flip(0)
    f1 = 2 * found / (called + bad.sum())
    gaps = torch.cat([torch.zeros(1, dtype=torch.float64), values.diff()])
    best = int(torch.where(f1 >= f1.max() - 1e-12, gaps, -torch.ones_like(gaps)).argmax())
    upper = values[best]
    lower = values[best - 1] if best else upper - upper.abs().clamp(min=1e-6)
    middle = ((lower + upper) / 2).float()
    # Between neighbouring floats there is no middle: then the lower one, which `>` leaves below.
    return float(middle if middle.double() < upper else lower.float())


class KeptScores(Metric):
    """All scores and labels of an epoch, over all devices: (scores float32 (N,), defective bool (N,)).

    One number an image, so its size is bounded by the number of images.
    """

    full_state_update = False
    scores: list[Tensor]
    defective: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("scores", default=[], dist_reduce_fx="cat")
        self.add_state("defective", default=[], dist_reduce_fx="cat")

    def update(self, scores: Tensor, defective: Tensor) -> None:
        self.scores.append(scores.detach().float())
        self.defective.append(defective.bool())

    def compute(self) -> tuple[Tensor, Tensor]:
        if not self.scores:
            return torch.zeros(0), torch.zeros(0, dtype=torch.bool)
        return dim_zero_cat(self.scores), dim_zero_cat(self.defective)

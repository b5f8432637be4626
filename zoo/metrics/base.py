"""The state that the metrics share: two sets of binned scores, and what is checked of the input."""

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import rank_zero_warn

from zoo.errors import UsageError
from zoo.metrics.bins import DEFAULT_MAX_BINS, SMALLEST_MAX_BINS, WAITING_PER_BIN, Bins, absorb

# What every value of this room is exact to, against the computation that keeps all scores.
EXACT_TO = 1e-4


class BinnedScores(Metric):
    """Scores of good and of defective pixels or images, in at most `max_bins` bins each.

    Scores count as float32: half precision and bfloat16 exactly, float64 rounded. While the distinct scores of a kind
    number at most `max_bins` nothing is lost. Beyond that scores that agree in their leading bits share a bin, and
    `compute` bounds what this can change from the bins themselves; if that is more than 1e-4, it warns and says so.
    State: at most 12 bytes a bin (16 of components), and 4 bytes (8) for each of the scores that wait to be
    binned, at most `WAITING_PER_BIN` for each bin.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    # Good ones first. A collection shares states of equal names and contents: what differs in meaning differs in name.
    key_types: ClassVar[dict[str, torch.dtype]]

    def __init__(self, max_bins: int = DEFAULT_MAX_BINS, **kwargs: Any) -> None:
        """Args:
            max_bins: from 16,384; memory and time grow with it, errors shrink.
            kwargs: torchmetrics' own, such as `sync_on_compute`.

        Raises:
            UsageError: `max_bins` too small.
        """
        super().__init__(**kwargs)
        if max_bins < SMALLEST_MAX_BINS:
            raise UsageError(f"max_bins is {max_bins}, which is too coarse: give at least {SMALLEST_MAX_BINS}.")
        self.max_bins = max_bins
        for kind in self.key_types:
            for part in ("fresh", "key", "count"):
                self.add_state(f"{kind}_{part}", [], dist_reduce_fx="cat")
            self.add_state(f"{kind}_level", torch.tensor(0), dist_reduce_fx="max")
        self._fill_empty()

    def reset(self) -> None:
        """Forgets all scores."""
        super().reset()
        self._fill_empty()

    def _fill_empty(self) -> None:
        # A process that saw nothing takes part in the exchange with the right dtype; torchmetrics would send float32.
        for kind, key_type in self.key_types.items():
            types = {"fresh": key_type, "key": key_type, "count": torch.int64}
            for part, dtype in types.items():
                setattr(self, f"{kind}_{part}", [torch.zeros(0, dtype=dtype, device=self.device)])

    def _add(self, kind: str, keys: np.ndarray) -> None:
        """Takes keys (n,) and bins all that wait when they are many."""
        waiting = getattr(self, f"{kind}_fresh")
        waiting.append(torch.from_numpy(keys).to(self.device))
        if sum(len(part) for part in waiting) < WAITING_PER_BIN * self.max_bins:
            return
        bins = self._bins(kind)
        parts = {"fresh": bins.key[:0], "key": bins.key, "count": bins.counts}
        for part, values in parts.items():
            setattr(self, f"{kind}_{part}", [torch.from_numpy(values).to(self.device)])
        setattr(self, f"{kind}_level", torch.tensor(bins.level, device=self.device))

    def _bins(self, kind: str) -> Bins:
        """All scores of a kind, binned; the state stays as it is."""
        fresh, key, count = (joined(getattr(self, f"{kind}_{part}")) for part in ("fresh", "key", "count"))
        return absorb(Bins(key, count, int(getattr(self, f"{kind}_level"))), fresh, self.max_bins)

    def _warn(self, error: float) -> None:
        """Says that a value may be further off than promised."""
        if error > EXACT_TO:
            rank_zero_warn(
                f"{type(self).__name__} is only certain to {error:.1g}: so many different scores lie so close together "
                f"that {self.max_bins} bins cannot tell them apart. Give more, such as max_bins={4 * self.max_bins}.",
                UserWarning,
            )

    def _value(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float32, device=self.device)


def joined(state: list[Tensor] | Tensor) -> np.ndarray:
    """A list state, or what an exchange between processes made of it, as one array."""
    return (state if isinstance(state, Tensor) else torch.cat(state) if len(state) > 1 else state[0]).cpu().numpy()


def checked_scores(scores: Tensor, what: str) -> np.ndarray:
    """Scores of any shape as float32 on the CPU.

    Raises:
        UsageError: a score is not finite.
    """
    values = scores.detach().to("cpu", torch.float32).contiguous()
    # The sum is a tenth of the work; one that overflows is no proof.
    if not torch.isfinite(values.sum()) and (bad := int((~torch.isfinite(values)).sum())):
        raise UsageError(
            f"{bad} of {values.numel()} values of the {what} are not finite numbers (as float32), so they have no "
            "rank. Look for a division by zero or an overflow where they are made, for instance in half precision."
        )
    return values.numpy()


def checked_flags(flags: Tensor, what: str) -> np.ndarray:
    """Which pixels or images are defective, as bool on the CPU.

    Raises:
        UsageError: neither bool nor only zeros and ones.
    """
    values = flags.detach().cpu()
    if values.dtype != torch.bool and not ((values == 0) | (values == 1)).all():
        raise UsageError(
            f"the {what} hold values from {values.min().item():g} to {values.max().item():g}; they must be bool, or 0 "
            "for good and 1 for defective. Compare with a threshold first, for instance masks > 127."
        )
    return values.bool().contiguous().numpy()


def checked_maps(maps: Tensor, masks: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Maps as float32 and masks as bool, both (B, H, W) on the CPU.

    Raises:
        UsageError: other shapes, scores that are not finite, masks that are not binary.
    """
    shapes = [tuple(x.shape[:1] + x.shape[2:] if x.ndim == 4 and x.shape[1] == 1 else x.shape) for x in (maps, masks)]
    if len(shapes[0]) != 3 or shapes[0] != shapes[1]:
        raise UsageError(
            f"maps {tuple(maps.shape)} and masks {tuple(masks.shape)} do not belong together: both must be "
            "(B, 1, H, W) or (B, H, W), of one size. Resize the maps to the masks, not the masks to the maps."
        )
    values = checked_scores(maps, "maps"), checked_flags(masks, "masks")
    return values[0].reshape(shapes[0]), values[1].reshape(shapes[0])

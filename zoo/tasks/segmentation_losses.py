"""Losses of segmentation over the pixels that have a class; without any, 0 with gradients of 0."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import UsageError, unknown

# MACMD's configuration for several classes (and TransUNet's before it with 0.5 each).
_CE_SHARE, _DICE_SHARE = 0.4, 0.6


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = 255,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Mean of w_t (-log softmax_t) over pixels, as a weighted mean; as torch's own where any pixel has a class.

    Args:
        logits: (B, K, H, W), of any floating type; computed in float32.
        target: int64 (B, H, W), class numbers, or `ignore_index`.
        class_weights: (K,).
        label_smoothing: share of the target that is spread over all classes, 0 to 1.

    Returns:
        Scalar, float32.
    """
    total = F.cross_entropy(
        logits.float(),
        target,
        weight=class_weights,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="sum",
    )
    return _divide(total, _weights(target, ignore_index, class_weights).sum())


def focal(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = 255,
    class_weights: Tensor | None = None,
    gamma: float = 2.0,
) -> Tensor:
    """Weighted mean of (1 - p_t)^gamma (-log p_t) over pixels, p = softmax; gamma 0 is the cross-entropy.

    Args: as `cross_entropy`.

    Source: Lin et al. 2017, "Focal Loss for Dense Object Detection" (arXiv 1708.02002), for several classes.
    """
    losses = F.cross_entropy(logits.float(), target, ignore_index=ignore_index, reduction="none")
    weights = _weights(target, ignore_index, class_weights)
    # p_t near 1 as 1 - exp(-loss) keeps its digits, and its power needs a base above 0 for a gradient.
    missed = (-torch.expm1(-losses)).clamp(min=1e-12)
    return _divide((weights * missed**gamma * losses).sum(), weights.sum())


def dice(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = 255,
    class_weights: Tensor | None = None,
    activation: str = "softmax",
    smooth: float = 1e-5,
) -> Tensor:
    """Mean over classes of 1 - (2 sum(p t) + smooth) / (sum(p^2) + sum(t^2) + smooth), sums over the whole batch.

    Args: as `cross_entropy`, and
        activation: "softmax" over the classes, or "sigmoid" of each alone.

    Source: Milletari et al. 2016, "V-Net" (arXiv 1606.04797), for several classes.
    """
    logits = logits.float()
    valid = (target != ignore_index)[:, None]
    hot = _one_hot(target, logits.shape[1])
    p = (logits.softmax(1) if activation == "softmax" else logits.sigmoid()) * valid
    overlap, sizes = (p * hot).sum((0, 2, 3)), (p * p).sum((0, 2, 3)) + hot.sum((0, 2, 3))
    losses = 1 - (2 * overlap + smooth) / (sizes + smooth)
    if class_weights is None:
        return losses.mean()
    return _divide((losses * class_weights).sum(), class_weights.sum())


def binary_cross_entropy(
    logits: Tensor, target: Tensor, *, ignore_index: int = 255, class_weights: Tensor | None = None
) -> Tensor:
    """Mean over pixels and (weighted) classes of the cross-entropy of "this class" against "another".

    Args: as `cross_entropy`.
    """
    logits = logits.float()
    valid = (target != ignore_index)[:, None]
    losses = F.binary_cross_entropy_with_logits(logits, _one_hot(target, logits.shape[1]).float(), reduction="none")
    by_class = _divide((losses * valid).sum((0, 2, 3)), valid.sum())
    return by_class.mean() if class_weights is None else _divide((by_class * class_weights).sum(), class_weights.sum())


def ce_dice(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = 255,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """0.4 x `cross_entropy` + 0.6 x `dice`.

    Args: as `cross_entropy`.
    """
    common = {"ignore_index": ignore_index, "class_weights": class_weights}
    first = cross_entropy(logits, target, label_smoothing=label_smoothing, **common)  # type: ignore[arg-type]
    return _CE_SHARE * first + _DICE_SHARE * dice(logits, target, **common)  # type: ignore[arg-type]


def bce_dice(logits: Tensor, target: Tensor, *, ignore_index: int = 255, class_weights: Tensor | None = None) -> Tensor:
    """`binary_cross_entropy` + `dice` of sigmoids with smooth = 1.

    Args: as `cross_entropy`.
    """
    common = {"ignore_index": ignore_index, "class_weights": class_weights}
    first = binary_cross_entropy(logits, target, **common)  # type: ignore[arg-type]
    return first + dice(logits, target, activation="sigmoid", smooth=1.0, **common)  # type: ignore[arg-type]


LOSSES: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": cross_entropy,
    "focal": focal,
    "dice": dice,
    "bce_dice": bce_dice,
    "ce_dice": ce_dice,
}
_SMOOTHED = ("cross_entropy", "ce_dice")


def segmentation_loss(
    name: str,
    logits: Tensor | Sequence[Tensor],
    target: Tensor,
    *,
    ignore_index: int = 255,
    class_weights: Tensor | Sequence[float] | None = None,
    weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """A loss by name, summed over the outputs of deep supervision.

    Args:
        name: of `LOSSES`.
        logits: (B, K, H, W), or several of them, of any floating type; computed in float32.
        target: int64 (B, H, W), class numbers, or `ignore_index`, whose pixels count for nothing.
        class_weights: (K,), a weight for each class.
        weights: of each output, 1 when absent; unused where logits are one tensor.
        label_smoothing: of the cross-entropy in it.

    Returns:
        Scalar, float32. 0, with gradients of 0, where no pixel has a class.

    Raises:
        UsageError: an unknown name, or sizes and weights that do not fit.
    """
    if name not in LOSSES:
        raise unknown("loss", name, LOSSES)
    if label_smoothing and name not in _SMOOTHED:
        raise UsageError(f"loss {name!r} has no labels to smooth; label_smoothing goes with {' and '.join(_SMOOTHED)}")
    single = isinstance(logits, Tensor)
    outputs: list[Tensor] = [logits] if single else list(logits)  # type: ignore[list-item]
    for output in outputs:
        if output.ndim != 4 or output.shape[:1] + output.shape[2:] != target.shape:
            raise UsageError(
                f"logits {tuple(output.shape)} and truth {tuple(target.shape)} do not belong together: they must be "
                "(B, K, H, W) and (B, H, W)"
            )
        if output.shape[1] < 2:
            raise UsageError(
                f"logits {tuple(output.shape)} are of one class, which no other is told from: give two, one of "
                "them for the background"
            )
    factors = [1.0] * len(outputs) if weights is None or single else list(weights)
    if len(factors) != len(outputs):
        raise UsageError(f"there are {len(outputs)} outputs but {len(factors)} weights for them; give one each")
    options: dict = {"ignore_index": ignore_index}
    if class_weights is not None:
        # Not by torch.tensor in every step: what is given on the device stays there.
        options["class_weights"] = torch.as_tensor(class_weights, dtype=torch.float32, device=target.device)
        if options["class_weights"].shape != outputs[0].shape[1:2]:
            raise UsageError(f"there are {outputs[0].shape[1]} classes but {len(class_weights)} weights for them")
    if label_smoothing:
        options["label_smoothing"] = label_smoothing
    losses = [factor * LOSSES[name](output, target, **options) for factor, output in zip(factors, outputs, strict=True)]
    return torch.stack(losses).sum()


def _weights(target: Tensor, ignore_index: int, class_weights: Tensor | None) -> Tensor:
    """Weight of each pixel, float32 (B, H, W): that of its class, 0 without one."""
    valid = target != ignore_index
    if class_weights is None:
        return valid.float()
    return class_weights[target.where(valid, 0)] * valid


def _one_hot(target: Tensor, num_classes: int) -> Tensor:
    """Bool (B, K, H, W); nowhere True where there is no class."""
    return target[:, None] == torch.arange(num_classes, device=target.device)[:, None, None]


def _divide(total: Tensor, count: Tensor) -> Tensor:
    """A mean, or 0 of nothing."""
    return total / (count + (count == 0))

"""Losses of segmentation against loops over pixels in float64, written from the equations."""

import math

import pytest
import torch
from torch import Tensor

from zoo.errors import UsageError
from zoo.tasks.segmentation_losses import LOSSES, binary_cross_entropy, focal, segmentation_loss

K, VOID = 4, 255
WEIGHTS = [0.5, 2.0, 1.0, 0.25]


def batch(seed=0, size=(5, 6)) -> tuple[Tensor, Tensor]:
    """Logits float64, and truth with ignored pixels and without class 3."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(2, K, *size, generator=generator, dtype=torch.float64)
    target = torch.randint(0, K - 1, (2, *size), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.2] = VOID
    return logits, target


def pixels(logits, target):
    """(logits of a pixel as floats, its class) of all pixels that have one."""
    for image, truth in zip(logits, target, strict=True):
        for y in range(truth.shape[0]):
            for x in range(truth.shape[1]):
                if truth[y, x] != VOID:
                    yield image[:, y, x].tolist(), int(truth[y, x])


def softmax(values):
    sums = sum(math.exp(v) for v in values)
    return [math.exp(v) / sums for v in values]


def sigmoid(values):
    return [1 / (1 + math.exp(-v)) for v in values]


def loop_cross_entropy(logits, target, w, smoothing=0.0):
    total = count = 0.0
    for values, label in pixels(logits, target):
        p = softmax(values)
        total -= (1 - smoothing) * w[label] * math.log(p[label])
        total -= smoothing / K * sum(w[c] * math.log(p[c]) for c in range(K))
        count += w[label]
    return total / count


def loop_focal(logits, target, w, gamma=2.0):
    total = count = 0.0
    for values, label in pixels(logits, target):
        p = softmax(values)[label]
        total -= w[label] * (1 - p) ** gamma * math.log(p)
        count += w[label]
    return total / count


def loop_dice(logits, target, w, activation=softmax, smooth=1e-5):
    overlap, squares = [0.0] * K, [0.0] * K
    for values, label in pixels(logits, target):
        for c, p in enumerate(activation(values)):
            overlap[c] += p * (c == label)
            squares[c] += p * p + (c == label)
    losses = [1 - (2 * i + smooth) / (s + smooth) for i, s in zip(overlap, squares, strict=True)]
    return sum(a * b for a, b in zip(losses, w, strict=True)) / sum(w)


def loop_bce(logits, target, w):
    total, count = [0.0] * K, 0
    for values, label in pixels(logits, target):
        for c, p in enumerate(sigmoid(values)):
            total[c] -= math.log(p if c == label else 1 - p)
        count += 1
    return sum(a * b / count for a, b in zip(total, w, strict=True)) / sum(w)


LOOPS = {
    "cross_entropy": loop_cross_entropy,
    "focal": loop_focal,
    "dice": loop_dice,
    "bce_dice": lambda *args: loop_bce(*args) + loop_dice(*args, sigmoid, 1.0),
    "ce_dice": lambda *args: 0.4 * loop_cross_entropy(*args) + 0.6 * loop_dice(*args),
}
# float32 sums over 60 pixels, against float64.
CLOSE = {"rel": 2e-6, "abs": 1e-7}


def test_every_loss_has_its_loop():
    assert set(LOOPS) == set(LOSSES)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_value_equals_the_loop(name, weights):
    logits, target = batch()
    value = segmentation_loss(name, logits.float(), target, ignore_index=VOID, class_weights=weights)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(LOOPS[name](logits, target, weights or [1.0] * K), **CLOSE)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_gradient_equals_that_of_the_loop(name, weights):
    """By central differences of the loop in float64, at a few places."""
    logits, target = batch()
    given = logits.float().requires_grad_()
    segmentation_loss(name, given, target, class_weights=weights).backward()
    for place in ((0, 0, 1, 2), (0, 3, 4, 0), (1, 1, 2, 5), (1, 2, 0, 3)):
        sides = []
        for step in (1e-5, -1e-5):
            moved = logits.clone()
            moved[place] += step
            sides.append(LOOPS[name](moved, target, weights or [1.0] * K))
        # 1e-8 for the cancellation of the two sides.
        assert float(given.grad[place]) == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_label_smoothing(weights):
    logits, target = batch()
    value = segmentation_loss("cross_entropy", logits.float(), target, class_weights=weights, label_smoothing=0.1)
    assert float(value) == pytest.approx(loop_cross_entropy(logits, target, weights or [1.0] * K, 0.1), **CLOSE)
    both = segmentation_loss("ce_dice", logits.float(), target, label_smoothing=0.1)
    plain = [1.0] * K
    expected = 0.4 * loop_cross_entropy(logits, target, plain, 0.1) + 0.6 * loop_dice(logits, target, plain)
    assert float(both) == pytest.approx(expected, **CLOSE)


@pytest.mark.parametrize("weights", [None, torch.tensor(WEIGHTS)])
def test_cross_entropy_is_torchs_own(weights):
    logits, target = batch()
    for smoothing in (0.0, 0.2):
        expected = torch.nn.functional.cross_entropy(
            logits.float(), target, weight=weights, ignore_index=VOID, label_smoothing=smoothing
        )
        value = segmentation_loss(
            "cross_entropy", logits.float(), target, class_weights=weights, label_smoothing=smoothing
        )
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 3.0])
def test_focal_by_gamma(gamma):
    logits, target = batch()
    value = focal(logits.float(), target, gamma=gamma)
    assert float(value) == pytest.approx(loop_focal(logits, target, [1.0] * K, gamma), **CLOSE)


def test_focal_of_certain_pixels_has_a_gradient():
    """A power below 1 is steep at 0: where p_t is 1 to float32's last digit its slope would be infinite."""
    _, target = batch()
    given = torch.nn.functional.one_hot(target.where(target != VOID, 0), K).permute(0, 3, 1, 2).float() * 100
    given.requires_grad_()
    focal(given, target, gamma=0.5).backward()
    assert given.grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("weights", [None, WEIGHTS, [0.0] * K])
def test_nothing_to_learn_from_is_zero_with_gradients_of_zero(name, weights):
    logits, target = batch()
    given = logits.float().requires_grad_()
    loss = segmentation_loss(name, [given, given], torch.full_like(target, VOID), class_weights=weights)
    loss.backward()
    assert float(loss.detach()) == 0
    assert given.grad.eq(0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_ignored_pixels_change_nothing(name):
    logits, target = batch()
    given = logits.float().requires_grad_()
    loss = segmentation_loss(name, given, target)
    loss.backward()
    void = (target == VOID)[:, None].expand_as(given)
    assert given.grad[void].eq(0).all()
    assert given.grad[~void].ne(0).any()
    other = torch.where(void, 50 * torch.randn_like(given), given.detach())
    assert torch.equal(segmentation_loss(name, other, target), loss)
    negative = target.where(target != VOID, -100)
    assert torch.equal(segmentation_loss(name, given, negative, ignore_index=-100), loss)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("scale", [1.0, 200.0])
def test_half_precision_and_certain_logits(name, scale):
    """The sums are of float32: what is lost is what bfloat16 lost of the logits; gradients stay finite."""
    logits, target = batch(size=(64, 64))
    half = (scale * logits).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = segmentation_loss(name, half, target, class_weights=WEIGHTS)
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, segmentation_loss(name, half.detach().float(), target, class_weights=WEIGHTS))
    assert half.grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_perfect_and_certain_is_almost_nothing(name):
    _, target = batch()
    hot = torch.nn.functional.one_hot(target.where(target != VOID, 0), K).permute(0, 3, 1, 2).float()
    # Class 3 is nowhere: with smooth = 1e-5 its loss is near 0 only where its probability is far below that.
    assert float(segmentation_loss(name, 60 * hot - 30, target)) < 1e-5


def test_deep_supervision_adds_weighted_outputs():
    logits, target = batch()
    outputs = [logits.float(), -logits.float(), 0.3 * logits.float()]
    parts = [float(segmentation_loss("ce_dice", output, target)) for output in outputs]
    assert float(segmentation_loss("ce_dice", outputs, target)) == pytest.approx(sum(parts), rel=1e-6)
    value = float(segmentation_loss("ce_dice", outputs, target, weights=[1, 0.4, 0]))
    assert value == pytest.approx(parts[0] + 0.4 * parts[1], rel=1e-6)
    assert float(segmentation_loss("ce_dice", outputs[0], target, weights=[1, 0.4, 0.4])) == pytest.approx(parts[0])


def test_binary_cross_entropy_of_one_class_against_the_rest():
    logits, target = batch()
    value = binary_cross_entropy(logits.float(), target, class_weights=torch.tensor([0.0, 1.0, 0.0, 0.0]))
    assert float(value) == pytest.approx(loop_bce(logits, target, [0.0, 1.0, 0.0, 0.0]), **CLOSE)


def test_wrong_input():
    logits, target = batch()
    with pytest.raises(UsageError, match=r"unknown loss 'dise'. Did you mean 'dice'"):
        segmentation_loss("dise", logits, target)
    with pytest.raises(UsageError, match="do not belong together"):
        segmentation_loss("dice", logits[..., :3], target)
    # Of one class, every pixel that is not 0 would be taught to be what 0 is not, in silence.
    with pytest.raises(UsageError, match="give two, one of them for the background"):
        segmentation_loss("bce_dice", logits[:, :1], target.clamp(max=1))
    with pytest.raises(UsageError, match="2 outputs but 3 weights"):
        segmentation_loss("dice", [logits, logits], target, weights=[1, 1, 1])
    with pytest.raises(UsageError, match="4 classes but 2 weights"):
        segmentation_loss("dice", logits, target, class_weights=[1, 2])
    with pytest.raises(UsageError, match="no labels to smooth"):
        segmentation_loss("focal", logits, target, label_smoothing=0.1)

"""Metrics of segmentation against loops written from their definitions, against torchmetrics and scikit-learn, and
whatever way the images come in."""

import copy
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score
from torchmetrics import MetricCollection
from torchmetrics.segmentation import DiceScore as TheirDice
from torchmetrics.segmentation import HausdorffDistance as TheirHausdorff
from torchmetrics.segmentation import MeanIoU as TheirIoU

from zoo.errors import UsageError
from zoo.metrics import BoundaryF1, DicePerImage, DiceScore, HausdorffDistance95, MeanIoU

K, VOID = 5, 255
KINDS = [MeanIoU, DiceScore, DicePerImage, HausdorffDistance95, BoundaryF1]
NAMES = {
    MeanIoU: "iou_per_class",
    DiceScore: "dice_per_class",
    DicePerImage: "dice_image_per_class",
    HausdorffDistance95: "hd95_per_class",
    BoundaryF1: "boundary_f1_per_class",
}


def scenes(count=6, size=(17, 22), seed=0, void=True):
    """Predictions and truth in smooth patches; class 3 is only predicted, class 4 nowhere; the last image has no
    class."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(2, count, 3, 5, 6, generator=generator)
    coarse[1] = 0.7 * coarse[0] + 0.3 * coarse[1]
    preds, target = (torch.nn.functional.interpolate(c, size, mode="bilinear").argmax(1) for c in coarse)
    preds[1, 2:5, 3:7] = 3
    preds[2], target[2] = preds[2].clamp(max=1), target[2].clamp(max=1)
    target[3] = target[3].clamp(min=1)
    if void:
        target[torch.rand(target.shape, generator=generator) < 0.1] = VOID
        target[-1] = VOID
    return preds, target


def outline(mask, valid, beyond):
    """Pixels of a mask with a 4-neighbour outside it; `beyond`: whether ignored pixels and the outer world are."""
    height, width = mask.shape
    found = []
    for y in range(height):
        for x in range(width):
            if not mask[y, x]:
                continue
            for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                inside = 0 <= v < height and 0 <= u < width
                known = inside and (beyond or valid[v, u])
                if (known and not mask[v, u]) or (beyond and not inside):
                    found.append((y, x))
                    break
    return found


def nearest(one, other):
    return [min(math.dist(a, b) for b in other) for a in one]


def hd95(pred, true, valid):
    if not pred.any() and not true.any():
        return None
    if not pred.any() or not true.any():
        return math.hypot(*pred.shape)
    a, b = (outline(mask, valid, True) for mask in (pred, true))
    both = sorted(nearest(a, b) + nearest(b, a))
    place = 0.95 * (len(both) - 1)
    low = int(place)
    return both[low] + (place - low) * (both[min(low + 1, len(both) - 1)] - both[low])


def boundary_f1(pred, true, valid, reach):
    a, b = (outline(mask, valid, False) for mask in (pred, true))
    if not a and not b:
        return None
    if not a or not b:
        return 0.0
    precision, recall = (np.mean([d <= reach for d in nearest(*pair)]) for pair in ((a, b), (b, a)))
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


def dice_of(pred, true, valid):
    return None if not (pred | true).any() else 2 * (pred & true).sum() / (pred.sum() + true.sum())


def by_class(one, preds, target, number, images):
    values = []
    for n in images:
        valid = (target[n] != VOID).numpy()
        if valid.any():
            masks = (valid & (part[n].numpy() == number) for part in (preds, target))
            values.append(one(*masks, valid))
    values = [value for value in values if value is not None]
    return np.mean(values) if values else math.nan


ORACLES = {
    DicePerImage: dice_of,
    HausdorffDistance95: hd95,
    BoundaryF1: lambda *masks: boundary_f1(*masks, 0.0075 * math.hypot(17, 22)),
}


@pytest.mark.parametrize("kind", list(ORACLES))
def test_by_image_equals_loops(kind):
    preds, target = scenes()
    metric = kind(K)
    metric.update(preds, target)
    expected = [by_class(ORACLES[kind], preds, target, number, range(6)) for number in range(K)]
    result = metric.compute()
    # float32 of values up to the diagonal, 27.8.
    np.testing.assert_allclose(result[NAMES[kind]], expected, rtol=1e-6)
    assert math.isnan(expected[4])
    assert result[metric.name] == pytest.approx(np.nanmean(expected), rel=1e-6)


@pytest.mark.parametrize("reach", [1, 1.5, 3, 0.05])
def test_tolerance_in_pixels_or_as_a_share(reach):
    preds, target = scenes()
    metric = BoundaryF1(K, tolerance=reach)
    metric.update(preds, target)
    pixels = reach if reach >= 1 else reach * math.hypot(17, 22)
    expected = by_class(lambda *masks: boundary_f1(*masks, pixels), preds, target, 1, range(6))
    assert metric.compute()["boundary_f1_per_class"][1] == pytest.approx(expected, rel=1e-6)


def test_iou_and_dice_are_those_of_all_pixels_together():
    preds, target = scenes()
    valid = target != VOID
    p, t = preds[valid].numpy(), target[valid].numpy()
    iou, dice = MeanIoU(K), DiceScore(K)
    for metric in (iou, dice):
        metric.update(preds, target)
    expected = jaccard_score(t, p, labels=range(4), average=None)
    result = iou.compute()
    np.testing.assert_allclose(result["iou_per_class"], [*expected, math.nan], rtol=1e-6)
    assert expected[3] == 0, "a class that is only predicted counts"
    assert result["miou"] == pytest.approx(expected.mean(), rel=1e-6)
    assert result["pixel_accuracy"] == pytest.approx((p == t).mean(), rel=1e-6)
    np.testing.assert_allclose(dice.compute()["dice_per_class"][:4], 2 * expected / (1 + expected), rtol=1e-6)
    by_image = DicePerImage(K)
    by_image.update(preds, target)
    assert abs(by_image.compute()["dice_image"] - dice.compute()["dice"]) > 1e-3, "the two are not the same thing"


def test_torchmetrics_agrees_where_it_means_the_same():
    """One image, no ignored pixels, all classes there: then its means over images are counts over all."""
    preds, target = (part[:1].clamp(max=2) for part in scenes(void=False))
    assert set(preds.unique().tolist()) == set(target.unique().tolist()) == {0, 1, 2}
    ours, theirs = MeanIoU(3), TheirIoU(3, input_format="index", per_class=True)
    for metric in (ours, theirs):
        metric.update(preds, target)
    np.testing.assert_allclose(ours.compute()["iou_per_class"], theirs.compute(), rtol=1e-6)
    ours, theirs = DiceScore(3), TheirDice(3, input_format="index", average="macro")
    for metric in (ours, theirs):
        metric.update(preds, target)
    assert ours.compute()["dice"] == pytest.approx(float(theirs.compute()), rel=1e-6)


def test_torchmetrics_largest_distance_bounds_the_percentile():
    """Two squares, three pixels apart sideways, then with a thin spike that only the largest distance sees whole."""
    preds, target = torch.zeros(2, 1, 40, 40, dtype=torch.int64)
    target[0, 5:25, 5:25] = 1
    preds[0, 5:25, 8:28] = 1
    ours, theirs = HausdorffDistance95(2, classes=[1]), TheirHausdorff(2, input_format="index")
    for metric in (ours, theirs):
        metric.update(preds, target)
    assert float(theirs.compute()) == 3
    assert ours.compute()["hd95"] == 3
    preds[0, 14, 28:38] = 1  # a thin spike of 10 pixels is more than 5 % of 172
    ours.reset()
    ours.update(preds, target)
    assert 3 < ours.compute()["hd95"] < 13


def fed(metric, preds, target, parts):
    for part in parts:
        metric.update(preds[part], target[part])
    return metric


def flat(result):
    return torch.cat([value.reshape(-1) for value in result.values()])


def same(one, other):
    return torch.equal(one.nan_to_num(-7), other.nan_to_num(-7))


@pytest.mark.parametrize("kind", KINDS)
def test_any_batches_and_order_give_the_same_bits_and_compute_changes_nothing(kind):
    preds, target = scenes()
    metric = fed(kind(K), preds, target, [slice(None)])
    whole = flat(metric.compute())
    assert whole.isfinite().any()
    for parts in ([[n] for n in range(6)], [[0, 1], [2, 3, 4, 5]], [[], [5, 1, 2, 3], [4, 0]]):
        assert same(flat(fed(kind(K), preds, target, parts).compute()), whole)
    metric._computed = None
    assert same(flat(metric.compute()), whole)
    metric.reset()
    assert same(flat(fed(metric, preds, target, [slice(None)]).compute()), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_processes_add_up(kind):
    """States that are summed, as an exchange between processes does, one of which saw nothing."""
    preds, target = scenes()
    whole = flat(fed(kind(K), preds, target, [slice(None)]).compute())
    parts = [fed(kind(K), preds, target, [part]) for part in (slice(0, 4), slice(4, 6))]
    parts.append(kind(K))
    metric = copy.deepcopy(parts[0])
    for other in parts[1:]:
        metric.merge_state(copy.deepcopy(other))
    assert same(flat(metric.compute()), whole)
    incoming = {name: [getattr(part, name) for part in parts[1:]] for name in parts[0]._reductions}
    order = iter(incoming.values())
    synced = kind(K, dist_sync_fn=lambda x, group=None: [x, *next(order)], distributed_available_fn=lambda: True)
    fed(synced, preds, target, [slice(0, 4)])
    assert same(flat(synced.compute()), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_predicted_where_there_is_no_class_does_not_matter(kind):
    preds, target = scenes()
    other = preds.where(target != VOID, 200)
    assert same(
        flat(fed(kind(K), other, target, [slice(None)]).compute()),
        flat(fed(kind(K), preds, target, [slice(None)]).compute()),
    )
    nothing = fed(kind(K), preds, torch.full_like(target, VOID), [slice(None)])
    assert flat(nothing.compute()).isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def test_perfect_predictions(kind):
    _, target = scenes(void=False)
    result = fed(kind(K), target, target, [slice(None)]).compute()
    best = 0.0 if kind is HausdorffDistance95 else 1.0
    there = result[NAMES[kind]][:3]
    assert there.tolist() == [best] * 3
    assert float(next(iter(result.values()))) == best


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_other_types(kind):
    preds, target = scenes()
    logits = torch.nn.functional.one_hot(preds, K).permute(0, 3, 1, 2).to(torch.bfloat16)
    whole = flat(fed(kind(K), preds, target, [slice(None)]).compute())
    assert same(flat(fed(kind(K), logits, target, [slice(None)]).compute()), whole)
    assert same(flat(fed(kind(K), preds.to(torch.int32), target.to(torch.uint8), [slice(None)]).compute()), whole)
    negative = target.where(target != VOID, -100)
    assert same(flat(fed(kind(K, ignore_index=-100), preds, negative, [slice(None)]).compute()), whole)


def test_the_mean_is_over_chosen_classes():
    preds, target = scenes()
    result = fed(DiceScore(K, classes=[1, 2]), preds, target, [slice(None)]).compute()
    assert result["dice"] == pytest.approx(float(result["dice_per_class"][1:3].mean()), rel=1e-6)


def one_sided():
    """Class 1: right in image 0, in neither of image 1, only predicted in 2, only true in 3."""
    preds, target = torch.zeros(2, 4, 6, 8, dtype=torch.int64)
    for image in (0, 2):
        preds[image, 1:3, 1:4] = 1
    for image in (0, 3):
        target[image, 1:3, 1:4] = 1
    return preds, target


@pytest.mark.parametrize(
    ("kind", "strict", "macmd"),
    [
        # Over three images (image 1 says nothing), or over four with 0 for all but an alarm.
        (DicePerImage, 1 / 3, (1 + 0 + 1 + 0) / 4),
        (HausdorffDistance95, (0 + 10 + 10) / 3, 0.0),
        (BoundaryF1, 1 / 3, 1 / 4),
    ],
)
def test_rules_for_empty_sides(kind, strict, macmd):
    for empty, expected in (("strict", strict), ("macmd", macmd)):
        metric = fed(kind(2, classes=[1], empty=empty), *one_sided(), [slice(None)])
        assert next(iter(metric.compute().values())) == pytest.approx(expected, rel=1e-6)
        nothing = torch.zeros(1, 6, 8, dtype=torch.int64)
        metric.update(nothing, nothing + VOID)
        assert next(iter(metric.compute().values())) == pytest.approx(expected, rel=1e-6), "an image without any class"
    with pytest.raises(UsageError, match=r"unknown empty of .* 'zero'"):
        kind(2, empty="zero")


def test_a_collection_counts_once():
    preds, target = scenes()
    kinds = {"iou": MeanIoU(K), "dice": DiceScore(K), "image": DicePerImage(K), "hd": HausdorffDistance95(K)}
    alone = {name: fed(copy.deepcopy(metric), preds, target, [slice(None)]).compute() for name, metric in kinds.items()}
    collection = MetricCollection(kinds)
    fed(collection, preds, target, [[0, 1], [2, 3, 4, 5]])
    together = collection.compute()
    for values in alone.values():
        for key, value in values.items():
            assert same(together[key], value)
    assert sorted(len(group) for group in collection.compute_groups.values()) == [1, 1, 2]


def test_a_collection_keeps_apart_what_differs_in_meaning():
    """After perfect predictions all these have equal sums; torchmetrics would take them for one from then on."""
    kinds = {
        "dice": DicePerImage(2),
        "other dice": DicePerImage(2, empty="macmd"),
        "near": BoundaryF1(2, tolerance=1),
        "far": BoundaryF1(2, tolerance=3),
    }
    collection = MetricCollection({name: metric.clone() for name, metric in kinds.items()})
    target = torch.zeros(1, 16, 16, dtype=torch.int64)
    target[0, 4:9, 4:9] = 1
    for preds, true in ((target, target), (target.roll((2, 2), (1, 2)), target), (target, torch.zeros_like(target))):
        collection.update(preds, true)
        for metric in kinds.values():
            metric.update(preds, true)
    together = collection.compute()
    for name, metric in kinds.items():
        value = metric.compute()[metric.name]
        found = [v for key, v in together.items() if key.startswith(name) and not key.endswith("class")]
        assert found == [value]
    assert len({float(metric.compute()[metric.name]) for metric in kinds.values()}) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_state_is_bounded(kind):
    metric = kind(K)
    sizes = set()
    for seed in range(3):
        metric.update(*scenes(seed=seed))
        sizes.add(sum(getattr(metric, name).nbytes for name in metric._reductions))
    assert len(sizes) == 1
    assert sizes.pop() <= 8 * K * K


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_input(kind):
    preds, target = scenes()
    for bad in (preds[:, :5], preds[0], preds.float(), torch.rand(6, 3, 17, 22)):
        with pytest.raises(UsageError, match=r"do not belong together|do not have 5 channels"):
            kind(K).update(bad, target)
    strange = target.clone()
    strange[0, :2, :3] = 9
    with pytest.raises(UsageError, match="truth hold class 9 in 6 pixels; there are 5 classes"):
        kind(K).update(preds, strange)
    with pytest.raises(UsageError, match="predictions hold class -1 in "):
        kind(K).update(preds - 1, target)
    for options, what in (
        ({"num_classes": 1}, "at least 2"),
        ({"num_classes": 300}, "one of the 300 classes"),
        ({"num_classes": K, "classes": [5]}, "from 0 to 4"),
        ({"num_classes": K, "classes": []}, "at least one number"),
    ):
        with pytest.raises(UsageError, match=what):
            kind(**options)
    with pytest.raises(UsageError, match="tolerance is 0"):
        BoundaryF1(K, tolerance=0)

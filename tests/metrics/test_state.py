"""State of the metrics: batches, order, processes, checks of the input, size, and the stated error beyond the cap."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from torchmetrics import MetricCollection

from zoo.errors import UsageError
from zoo.metrics import AUPRO, ImageAUPR, ImageAUROC, ImageF1Max, PixelAUPR, PixelAUROC, PixelF1Max, base
from zoo.metrics.bins import DEFAULT_MAX_BINS, SMALLEST_MAX_BINS

PIXEL = [AUPRO, PixelAUROC, PixelAUPR, PixelF1Max]
IMAGE = [ImageAUROC, ImageAUPR, ImageF1Max]
LIMITS = (0.3, 0.1, 0.05, 0.01)
SMALL = SMALLEST_MAX_BINS
WAITING = 3

pytestmark = pytest.mark.filterwarnings("ignore:.*only certain to")


@pytest.fixture(autouse=True)
def often(monkeypatch):
    """Binning in the midst of these few pixels, not at their end alone."""
    monkeypatch.setattr(base, "WAITING_PER_BIN", WAITING)


def make(kind, **options):
    return kind(max_bins=SMALL, **options)


def photos(oracles, name="normal", seed=8, count=8, side=128):
    """131,072 pixels, far more than the cap."""
    maps, masks = oracles.photos(name, seed, count, side)
    return torch.from_numpy(maps)[:, None], torch.from_numpy(masks)[:, None]


def fed(metric, maps, masks, parts):
    for part in parts:
        metric.update(maps[part], masks[part])
    return metric


def flat(result):
    return torch.stack(list(result.values())) if isinstance(result, dict) else result[None]


@pytest.mark.parametrize("kind", PIXEL)
@pytest.mark.parametrize("name", ["normal", "ties", "peak and spread"])
def test_any_batches_and_order_give_the_same_bits(oracles, kind, name):
    maps, masks = photos(oracles, name)
    whole = flat(fed(make(kind), maps, masks, [slice(None)]).compute())
    for parts in ([[i] for i in range(8)], [[7, 2, 5], [0], [6, 1, 4, 3]], [slice(0, 0), slice(4, 8), slice(0, 4)]):
        assert torch.equal(flat(fed(make(kind), maps, masks, parts).compute()), whole)


@pytest.mark.parametrize("kind", PIXEL)
def test_compute_twice_and_in_between(oracles, kind):
    """compute neither changes the state nor is disturbed by what follows."""
    maps, masks = photos(oracles)
    metric = fed(make(kind), maps, masks, [slice(0, 4)])
    first = flat(metric.compute())
    metric._computed = None
    assert torch.equal(flat(metric.compute()), first)
    fed(metric, maps, masks, [slice(4, 8)])
    assert torch.equal(flat(metric.compute()), flat(fed(make(kind), maps, masks, [slice(None)]).compute()))
    metric.reset()
    assert torch.equal(flat(fed(metric, maps, masks, [slice(0, 4)]).compute()), first)


@pytest.mark.parametrize("kind", PIXEL)
def test_forward_gives_the_batch_and_keeps_all(oracles, kind):
    maps, masks = photos(oracles)
    metric = make(kind)
    for part in (slice(0, 5), slice(5, 8)):
        assert torch.equal(flat(metric(maps[part], masks[part])), flat(fed(make(kind), maps, masks, [part]).compute()))
    assert torch.equal(flat(metric.compute()), flat(fed(make(kind), maps, masks, [slice(None)]).compute()))


@pytest.mark.parametrize("kind", PIXEL)
def test_merged_states_equal_one(oracles, kind):
    """As Metric.forward and merge_state reduce two states; one of three has seen nothing, one is coarse already."""
    maps, masks = photos(oracles, count=24)
    whole = fed(make(kind), maps, masks, [slice(None)])
    assert int(whole.good_pixels_level) > 0, "the waiting scores were never binned"
    parts = [make(kind), fed(make(kind), maps, masks, [slice(0, 20)]), fed(make(kind), maps, masks, [slice(20, 24)])]
    for first, second, third in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        metric = copy.deepcopy(parts[first])
        metric.merge_state(copy.deepcopy(parts[second]))
        metric.merge_state(copy.deepcopy(parts[third]))
        assert torch.equal(flat(metric.compute()), flat(whole.compute()))


@pytest.mark.parametrize("kind", PIXEL)
def test_exchange_between_processes(oracles, kind):
    """torchmetrics' own synchronisation, with a gather that returns the states of two processes, one empty too."""
    maps, masks = photos(oracles, count=24)
    whole = flat(fed(make(kind), maps, masks, [slice(None)]).compute())
    for split in (10, 24):
        other = fed(make(kind), maps, masks, [slice(split, 24)] if split < 24 else [])
        incoming = iter([state_of(other, name) for name in other._reductions])
        metric = fed(
            make(
                kind,
                dist_sync_fn=lambda x, group=None, incoming=incoming: paired(x, next(incoming)),
                distributed_available_fn=lambda: True,
            ),
            maps,
            masks,
            [slice(0, split)],
        )
        assert torch.equal(flat(metric.compute()), whole)
        assert isinstance(metric.good_pixels_key, list), "the own state must come back after the exchange"


def state_of(metric, name):
    state = getattr(metric, name)
    return torch.cat(state) if isinstance(state, list) else state


def paired(own, other):
    assert own.dtype == other.dtype, "a process without data must send the type that the others send"
    return [own, other]


def two_processes(rank, folder, maps, masks):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results = {}
    for kind in PIXEL:
        metric = make(kind)
        # The second process has one image, then none.
        for name, mine in (("uneven", [slice(0, 7), slice(7, 8)][rank]), ("empty", [slice(0, 8), slice(0, 0)][rank])):
            metric.reset()
            metric.update(maps[mine], masks[mine])
            results[kind.__name__, name] = flat(metric.compute())
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_real_processes(oracles, tmp_path):
    """gloo pads uneven states and cuts them again: every process ends with the answer of one that saw all."""
    maps, masks = photos(oracles)
    context = torch.multiprocessing.get_context("fork")
    workers = [context.Process(target=two_processes, args=(rank, tmp_path, maps, masks)) for rank in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    for rank in (0, 1):
        results = torch.load(tmp_path / f"{rank}.pt")
        for kind in PIXEL:
            whole = flat(fed(make(kind), maps, masks, [slice(None)]).compute())
            assert torch.equal(results[kind.__name__, "uneven"], whole)
            assert torch.equal(results[kind.__name__, "empty"], whole)


def test_pickle_and_collection(oracles):
    """In a collection metrics of one state share it: a second definition costs no second pass. The first image has no
    defect, so all states hold the same numbers there, and still AU-PRO and the rankings must not share."""
    maps, masks = photos(oracles, count=3)
    kinds = {
        "all": make(AUPRO),
        "positions": make(AUPRO, thresholds=99),
        "sizes": make(AUPRO, sizes="quartiles"),
        "auroc": make(PixelAUROC),
        "aupr": make(PixelAUPR),
    }
    alone = {name: fed(copy.deepcopy(metric), maps, masks, [slice(None)]).compute() for name, metric in kinds.items()}
    collection = pickle.loads(pickle.dumps(MetricCollection(kinds)))
    fed(collection, maps, masks, [[0], [1, 2]])
    assert sorted(len(group) for group in collection.compute_groups.values()) == [2, 3]
    together = collection.compute()
    for name in ("auroc", "aupr"):
        assert torch.equal(together[name], alone[name])
    for limit in LIMITS:
        assert torch.equal(together[f"all_aupro_{limit:g}"], alone["all"][f"aupro_{limit:g}"])
        assert torch.equal(together[f"positions_aupro_{limit:g}"], alone["positions"][f"aupro_{limit:g}"])
        assert torch.equal(together[f"sizes_aupro_q1_{limit:g}"], alone["sizes"][f"aupro_q1_{limit:g}"])


def size_of(metric):
    states = [getattr(metric, name) for name in metric._reductions]
    return sum(part.nbytes for state in states for part in (state if isinstance(state, list) else [state]))


@pytest.mark.parametrize("kind", PIXEL)
def test_state_is_bounded(oracles, kind):
    """The promised bytes a bin and a waiting score, for both kinds, however many scores."""
    metric = make(kind)
    keys = {"good": 4, "bad": 8 if kind is AUPRO else 4}
    bound = sum((size + 8) * SMALL + WAITING * SMALL * size for size in keys.values()) + 64
    for seed in range(16):
        metric.update(*photos(oracles, seed=seed, count=4))
        assert size_of(metric) <= bound
    assert int(metric.good_pixels_level) > 0


@pytest.mark.parametrize("kind", [*PIXEL, *IMAGE])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_scores_that_are_not_finite_are_refused(kind, value):
    metric = kind()
    shape = (2, 1, 4, 4) if kind in PIXEL else (6,)
    scores, flags = torch.rand(shape, dtype=torch.float64), torch.arange(32 if kind in PIXEL else 6).reshape(shape) > 3
    scores.view(-1)[3] = value
    with pytest.raises(UsageError, match=f"1 of {scores.numel()} values .* not finite"):
        metric.update(scores, flags)
    assert size_of(metric) == size_of(kind())


@pytest.mark.parametrize("kind", PIXEL)
def test_maps_and_masks_must_fit(kind):
    maps = torch.rand(2, 1, 8, 8)
    for masks in (torch.zeros(2, 1, 8, 9), torch.zeros(2, 3, 8, 8), torch.zeros(8, 8), torch.zeros(1, 1, 8, 8)):
        with pytest.raises(UsageError, match="do not belong together"):
            kind().update(maps, masks.bool())
    with pytest.raises(UsageError, match="masks hold values from 0 to 255"):
        kind().update(maps, torch.tensor([0, 255]).repeat(64).view(2, 1, 8, 8))


@pytest.mark.parametrize("kind", IMAGE)
def test_scores_and_targets_must_fit(kind):
    for targets in (torch.zeros(3), torch.zeros(4, 1), torch.zeros(4, 4)):
        with pytest.raises(UsageError, match="do not belong together"):
            kind().update(torch.rand(4), targets)
    with pytest.raises(UsageError, match="targets hold values from 0 to 2"):
        kind().update(torch.rand(3), torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.uint8])
def test_types_of_scores_and_masks(oracles, dtype):
    """Any type of scores, masks as numbers, with and without the channel, and gradients attached."""
    maps, masks = photos(oracles, "plain", count=3, side=32)
    maps = (maps * 50).to(dtype)
    expected = flat(fed(make(AUPRO), maps.float(), masks, [slice(None)]).compute())
    assert torch.equal(flat(fed(make(AUPRO), maps[:, 0], masks.long(), [slice(None)]).compute()), expected)
    if dtype.is_floating_point:
        attached = maps.clone().requires_grad_()
        assert torch.equal(flat(fed(make(AUPRO), attached, masks.float(), [slice(None)]).compute()), expected)


def exact(oracles, maps, masks):
    """What each metric would answer with all scores kept."""
    maps, masks = maps[:, 0].numpy(), masks[:, 0].numpy()
    pixels, flags = maps.ravel().astype(np.float64), masks.ravel()
    return {
        "all": oracles.many_pixels(maps, masks, LIMITS),
        "positions": oracles.many_positions(maps, masks, LIMITS, 99),
        "auroc": [roc_auc_score(flags, pixels)],
        "aupr": [average_precision_score(flags, pixels)],
    }


def metrics(max_bins):
    return {
        "all": AUPRO(LIMITS, max_bins=max_bins),
        "positions": AUPRO(LIMITS, thresholds=99, max_bins=max_bins),
        "auroc": PixelAUROC(max_bins=max_bins),
        "aupr": PixelAUPR(max_bins=max_bins),
    }


def test_the_stated_error_holds(oracles, distribution, monkeypatch):
    """With the smallest cap, so that bins are coarse: the true value lies within the error that the metric states, and
    a warning comes exactly where that is above 1e-4."""
    maps, masks = photos(oracles, distribution)
    expected = exact(oracles, maps, masks)
    for name, metric in metrics(SMALL).items():
        stated = []
        warn = type(metric)._warn
        monkeypatch.setattr(metric, "_warn", lambda error, m=metric, s=stated, w=warn: (s.append(error), w(m, error)))
        metric.update(maps, masks)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            values = flat(metric.compute()).tolist()
        assert any("only certain to" in str(warning.message) for warning in caught) == (stated[0] > 1e-4)
        # 1e-7 for the rounding of the answer to float32.
        np.testing.assert_allclose(values, expected[name], rtol=0, atol=stated[0] + 1e-7)
        if distribution in ("ties", "constant"):
            assert stated[0] == 0


@pytest.mark.slow
def test_exact_to_a_ten_thousandth_with_many_pixels(oracles, distribution):
    """16.8 million pixels in the default bins, which are eight times fewer, without a warning."""
    maps, masks = photos(oracles, distribution, count=16, side=1024)
    expected = exact(oracles, maps, masks)
    for name, metric in metrics(DEFAULT_MAX_BINS).items():
        fed(metric, maps, masks, [slice(0, 5), slice(5, 16)])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            values = flat(metric.compute()).tolist()
        np.testing.assert_allclose(values, expected[name], rtol=0, atol=1e-4)

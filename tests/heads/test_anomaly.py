"""L2BT and the memory bank against recorded answers, brute force and their own contracts."""

import importlib.util
import json
from pathlib import Path

import pytest
import scipy.ndimage
import torch

from zoo.errors import UsageError
from zoo.heads import create_detector, list_heads
from zoo.heads.anomaly import L2BT, AnomalyOutput, MemoryBank
from zoo.heads.anomaly.l2bt import Student
from zoo.heads.anomaly.maps import box_means, gaussian, resize, top_mean
from zoo.heads.anomaly.memory_bank import Reservoir, k_centres, nearest
from zoo.heads.anomaly.teacher import Teacher

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
needs_golden = pytest.mark.skipif(
    not GOLDEN.is_dir(),
    reason="the authors' recorded answers lie beside the project, in ../shared/golden, and are absent here",
)


def recorded(name):
    spec = importlib.util.spec_from_file_location("check", GOLDEN / "check.py")
    check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check)
    return check, json.loads((GOLDEN / f"{name}.json").read_text())


def worst(check, golden, answers):
    """The largest relative error, of strided samples too."""
    outputs = golden["outputs"]
    errors = {key: check.error(answers[value.get("of", key)], value) for key, value in outputs.items()}
    assert len(errors) == len(outputs) > 1
    return max(errors.values()), errors


@needs_golden
@torch.inference_mode()
def test_students_are_the_authors():
    check, golden = recorded("l2bt_student")
    student = Student(384, 384)
    student.load_state_dict(check.state_dict(golden), strict=True)
    x = check.image(golden["input"]["seed"], golden["input"]["shape"])
    answers = {"logits": student(x), "hidden1": torch.nn.functional.gelu(student.input(x))}
    error, errors = worst(check, golden, answers)
    assert error <= 2e-6, errors  # float32 noise of three products of 384 terms


@needs_golden
@torch.inference_mode()
def test_the_map_the_score_and_the_loss_are_the_authors():
    check, golden = recorded("l2bt_map")
    head = L2BT([384, 384])
    missing = head.load_state_dict(check.state_dict(golden), strict=False)
    assert missing.missing_keys == ["fitted"]  # our own
    assert not missing.unexpected_keys
    early, late = (check.image(seed, (1, 64, 384)) for seed in (1234, 1235))
    raw = head.distances(early, late).view(1, 1, 8, 8)
    large = resize(raw, (112, 112))
    blurred = box_means(large)
    cropped = blurred[:, :, 8:104]
    loss = head.loss([tokens.transpose(1, 2).unflatten(2, (8, 8)) for tokens in (early, late)])
    answers = {"logits": raw, "upsampled": large, "blurred": blurred, "map": cropped[0, 0]}
    answers["score_and_loss"] = torch.stack([top_mean(cropped, 0.001)[0], loss])
    error, errors = worst(check, golden, answers)
    assert error <= 5e-6, errors  # float32 noise


def test_the_gaussian_is_scipys():
    maps = torch.rand(2, 1, 30, 21, dtype=torch.float64)
    want = [scipy.ndimage.gaussian_filter(map_[0].numpy(), 2.0, mode="nearest", truncate=4.0) for map_ in maps]
    assert abs(gaussian(maps, 2.0)[:, 0].numpy() - want).max() < 1e-12


def test_nearest_neighbours_equal_brute_force(monkeypatch):
    monkeypatch.setattr("zoo.heads.anomaly.memory_bank.BLOCK", 7)
    rows, bank = torch.randn(11, 5), torch.randn(40, 5)
    distances = torch.cdist(rows.double(), bank.double()).sort(dim=1).values
    for neighbours in (1, 3):
        torch.testing.assert_close(nearest(rows, bank, neighbours).double(), distances[:, :neighbours].mean(1))
    assert nearest(rows, bank[:2], 5).shape == (11,)


@pytest.mark.parametrize("neighbours", [1, 5])
def test_nearest_neighbours_far_from_zero_are_exact(neighbours):
    """What all places share, as the large channels of transformers, must not take the digits that tell them apart."""
    generator = torch.Generator().manual_seed(0)
    rows, bank = (torch.randn(n, 150, generator=generator) + 100 for n in (200, 3000))
    rows[:, 7] += 300
    bank[:, 7] += 300
    far = [(bank.double() - row).norm(dim=1).sort().values[:neighbours].mean() for row in rows.double()]
    # Differences of numbers near 100 and 400 in float32, over distances of about 15.
    torch.testing.assert_close(nearest(rows, bank, neighbours).double(), torch.stack(far), atol=0, rtol=1e-5)


def test_centres_are_the_farthest_from_those_before():
    rows = torch.randn(60, 6, generator=torch.Generator().manual_seed(1))
    chosen = k_centres(rows, 12).tolist()
    assert len(set(chosen)) == 12
    distances = torch.cdist(rows.double(), rows.double())
    for count in range(1, 12):
        to_chosen = distances[:, chosen[:count]].min(dim=1).values
        assert to_chosen[chosen[count]] == pytest.approx(to_chosen.max().item(), rel=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: compares its choice with the CPU's")
def test_centres_chosen_on_a_gpu_are_those_of_the_cpu():
    rows = torch.randn(500, 200, generator=torch.Generator().manual_seed(1))
    chosen = k_centres(rows.cuda(), 40)
    assert chosen.device.type == "cpu"
    assert torch.equal(chosen, k_centres(rows, 40))


def test_the_reservoir_is_bounded_and_even():
    reservoir = Reservoir(100, seed=0)
    for start in range(0, 1000, 50):
        reservoir.add(torch.arange(start, start + 50).float()[:, None])
    rows = reservoir.take()[:, 0]
    assert len(rows) == 100
    assert reservoir.seen == 1000
    # An even draw of 100 out of 0 ... 999: mean 500, standard error about 29.
    assert abs(rows.mean() - 500) < 4 * 29
    assert torch.equal(rows, rows.sort().values)


@pytest.mark.parametrize("method", list_heads("anomaly"))
@pytest.mark.parametrize(
    "backbone", ["resnet10t", "vit_tiny_patch16_224", "zoo_shvit_s1", "swin_tiny_patch4_window7_224"]
)
def test_a_detector_learns_answers_and_comes_back(method, backbone):
    small = {"depth": 3, "embed_dim": 24, "num_heads": 2} if backbone.startswith("vit") else {}
    detector = create_detector(method, backbone, img_size=64, backbone_options=small, **options(method))
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(UsageError, match="has learned nothing yet"):
        detector(images)
    learn(detector, images)
    detector.eval()
    answer = detector(images)
    assert isinstance(answer, AnomalyOutput)
    assert answer.score.shape == (3,)
    assert answer.map.shape == (3, 1, 64, 64)
    assert answer.map.dtype == answer.score.dtype == torch.float32
    assert detector(images, (50, 70)).map.shape == (3, 1, 50, 70)
    # One image's answer does not depend on the others.
    torch.testing.assert_close(detector(images[1:2]).map, answer.map[1:2], atol=1e-5, rtol=1e-4)
    fresh = create_detector(method, backbone, img_size=64, backbone_options=small, **options(method))
    fresh.load_state_dict(detector.state_dict())
    assert torch.equal(fresh.eval()(images).map, answer.map)
    assert not [p for p in detector.teacher.parameters() if p.requires_grad]
    assert not any(module.training for module in detector.train().teacher.modules())


def test_maps_as_wide_as_they_have_channels_are_turned():
    """Swin's first map of 384 pixels: 96 x 96 places of 96 channels, channels last."""
    teacher = Teacher("swin_tiny_patch4_window7_224", [0], (384, 384)).eval()
    image = torch.randn(1, 3, 384, 384, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(teacher(image)[0], teacher.network(image)[0].permute(0, 3, 1, 2))


@pytest.mark.parametrize("given", [{"features_only": False}, {"pretrained": True}, {"in_chans": 1}])
def test_options_that_have_arguments_of_their_own_are_refused(given):
    with pytest.raises(UsageError, match=f"backbone_options holds {next(iter(given))}"):
        create_detector("l2bt", "resnet10t", backbone_options=given)


def options(method):
    return {"coreset": 0.5} if method == "memory_bank" else {}


def learn(detector, images):
    if detector.head.needs_gradient:
        optimizer = torch.optim.Adam(detector.head.parameters(), 1e-3)
        losses = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = detector.loss(images)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
    else:
        detector.update(images)
    detector.finalize()


def test_a_bank_of_everything_finds_nothing_new_and_a_changed_place():
    detector = create_detector("memory_bank", "resnet10t", img_size=64, coreset=1.0, sigma=0)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    detector.update(images)
    detector.finalize()
    known = detector(images).score
    changed = images.clone()
    changed[:, :, 40:, 40:] += 3
    answer = detector(changed)
    assert known.max() < 1e-5 * answer.score.min()
    assert answer.map[:, :, 44:, 44:].mean() > 3 * answer.map[:, :, :16, :16].mean()


@pytest.mark.parametrize(("top", "count"), [(0.0, 1), (0.1, 6)])
def test_the_score_of_a_bank_is_that_of_the_farthest_places(top, count):
    """64 places against a bank by brute force; smoothing and the size of the image change the map alone."""
    generator = torch.Generator().manual_seed(0)
    seen, new = (torch.randn(1, 4, 8, 8, generator=generator) for _ in range(2))
    places = [maps[0].flatten(1).t().double() for maps in (new, seen)]
    far = torch.cdist(*places).min(dim=1).values.sort(descending=True).values
    for sigma, size in ((0.0, (8, 8)), (4.0, (8, 8)), (4.0, (30, 50))):
        head = MemoryBank([4], coreset=1.0, pool=1, sigma=sigma, top=top)
        head.update([seen])
        head.finalize()
        assert head([new], size).score.item() == pytest.approx(far[:count].mean().item(), rel=1e-5)


def test_a_bank_that_is_still_filling_goes_on_from_its_state(tmp_path):
    """Cut after any image, through a file: the same bank. Smaller than what is seen, so that draws matter."""
    maps = [torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(n)) for n in range(5)]
    whole = MemoryBank([4], coreset=0.1, max_places=70)
    for map_ in maps:
        whole.update([map_])
    whole.finalize()
    for cut in range(6):
        first = MemoryBank([4], coreset=0.1, max_places=70)
        for map_ in maps[:cut]:
            first.update([map_])
        torch.save(first.state_dict(), tmp_path / "half.pt")
        second = MemoryBank([4], coreset=0.1, max_places=70)
        second.load_state_dict(torch.load(tmp_path / "half.pt", weights_only=True))
        for map_ in maps[cut:]:
            second.update([map_])
        second.finalize()
        assert torch.equal(second.bank, whole.bank)
    assert len(whole.bank) == 32
    assert whole.get_extra_state() == {}


def test_directions_alone_do_not_see_light():
    """Twice as bright a map is the same place."""
    maps = torch.rand(1, 4, 6, 6)
    for normalize, same in ((True, True), (False, False)):
        head = MemoryBank([4], pool=1, normalize=normalize)
        places = head.places([maps])
        assert torch.allclose(places, head.places([2 * maps])) == same
    torch.testing.assert_close(places, maps)


@pytest.mark.parametrize("pool", [3, 5])
def test_neighbours_beyond_the_border_are_zeros(pool):
    """scipy's mean over a square in float64: at a border the vectors are as much shorter as neighbours are missing."""
    maps = torch.randn(2, 4, 7, 6, generator=torch.Generator().manual_seed(0))
    size = (1, 1, pool, pool)
    expected = scipy.ndimage.uniform_filter(maps.double().numpy(), size, mode="constant", cval=0.0)
    torch.testing.assert_close(MemoryBank([4], pool=pool).places([maps]), torch.from_numpy(expected).float())


def test_progress_of_the_coreset_is_told():
    head = MemoryBank([4], coreset=1.0)
    head.update([torch.randn(2, 4, 10, 10)])
    told = []
    head.finalize(lambda done, of: told.append((done, of)))
    assert told[-1] == (200, 200)
    assert len(told) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "l2bd"}, r"unknown method.*l2bt"),
        ({"backbone": "resnet10"}, r"unknown backbone.*resnet10t"),
        ({"layers": [1]}, r"two layers, not 1"),
        ({"layers": [1, 9]}, r"different numbers from 0 to 4"),
        ({"layers": [2, 1]}, r"ascending"),
        ({"img_size": 0}, r"img_size=0"),
        ({"pretrained": "/none/w.pth"}, r"no weights file"),
        ({"smoth": True}, r"unknown option of l2bt.*smooth"),
        ({"top": 2.0}, r"top=2.0"),
        ({"method": "memory_bank", "coreset": 0.0}, r"coreset=0.0"),
        ({"method": "memory_bank", "neighbours": 0}, r"neighbours=0"),
        ({"method": "memory_bank", "pool": 2}, r"pool=2: give an odd side"),
        ({"method": "memory_bank", "sigma": -3.0}, r"sigma=-3.0: give pixels"),
        ({"backbone_options": {"dept": 1}}, r"dept"),
    ],
)
def test_wrong_usage_is_a_sentence(arguments, message):
    given = {"method": "l2bt", "backbone": "resnet10t"} | arguments
    with pytest.raises(UsageError, match=message):
        create_detector(given.pop("method"), given.pop("backbone"), **given)


@pytest.mark.parametrize("shape", [(3, 64, 64), (64, 64), (1, 1, 3, 64, 64)])
def test_images_come_in_batches(shape):
    """A network of convolutions alone would take one image without a batch and answer nonsense."""
    detector = create_detector("memory_bank", "resnet10t", img_size=64)
    with pytest.raises(UsageError, match=r"give a batch \(B, C, H, W\)"):
        detector.update(torch.zeros(shape))


def test_an_empty_bank_is_refused():
    with pytest.raises(UsageError, match="shown no image"):
        create_detector("memory_bank", "resnet10t", img_size=64).finalize()

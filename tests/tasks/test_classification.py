"""The task against plain torch and timm: inference, loss, schedule, freezing, weights, errors."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import Timer
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from zoo.errors import UsageError
from zoo.tasks import Classification, NonFiniteLossError, load_task
from zoo.tasks.backbone import create_backbone
from zoo.tasks.threads import share_cores

SMALL_RESNET = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_width": 8}


def test_inference_normalises_as_the_backbone_wants(tiny):
    task = tiny.task().eval()
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    config = task.backbone.pretrained_cfg
    mean, std = (torch.tensor(config[k], dtype=torch.float64).view(3, 1, 1) for k in ("mean", "std"))
    normalised = ((images.double() / 255 - mean) / std).float()
    with torch.no_grad():
        expected = task.backbone(normalised)
        # float32 arithmetic on values of order 1, through two blocks
        torch.testing.assert_close(task.inference(images), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(task.inference(images.float() / 255), expected, atol=1e-5, rtol=1e-5)


def test_one_channel_gets_the_mean_of_the_statistics():
    task = Classification("resnet10t", ["a", "b"], img_size=32, in_chans=1, mean=[0.1, 0.2, 0.6], std=[0.5, 0.5, 0.5])
    assert task.export_meta()["mean"] == pytest.approx([0.3])
    assert task.inference(torch.zeros(2, 1, 32, 32, dtype=torch.uint8)).shape == (2, 2)


def test_tables_of_positions_are_made_for_the_size_of_the_images():
    """A recipe at 64 px must not resize tables made for the size of the network's name at every step."""
    network = create_backbone("zoo_flatten_pvt_tiny", num_classes=2, img_size=(64, 32))
    assert network.stages[0].pos_embed.shape[1] == 16 * 8
    assert network.stages[3].pos_embed.shape[1] == 2 * 1


def test_loss_of_a_step_with_hard_and_soft_targets(tiny, tmp_path):
    losses = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            losses.append((outputs["loss"].detach(), batch, task))

    for mixup in (False, True):
        losses.clear()
        options = tiny.SMALL | {"drop_path_rate": 0.0, "proj_drop_rate": 0.0}
        task = tiny.task(lr=0.0, weight_decay=0.0, warmup_lr=0.0, label_smoothing=0.2, backbone_options=options)
        trainer = tiny.trainer(tmp_path, [Look()], max_steps=1, limit_val_batches=0)
        trainer.fit(task, datamodule=tiny.Data(mixup=mixup))
        loss, (images, targets), task = losses[0]
        with torch.no_grad():
            log_p = task.inference(images).double().log_softmax(-1)
        target = targets.double() if mixup else F.one_hot(targets, 3).double()
        assert mixup == (targets.ndim == 2)
        expected = -((0.8 * target + 0.2 / 3) * log_p).sum(-1).mean()
        assert float(loss) == pytest.approx(float(expected), rel=1e-5)  # float32 against float64


class Rates(Callback):
    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, task, optimizer):
        self.seen.append([g["lr"] / g.get("lr_scale", 1.0) for g in optimizer.param_groups])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_cosine_with_warmup_per_update(tiny, tmp_path, accumulate):
    rates = Rates()
    task = tiny.task(lr=0.1, warmup_epochs=1, warmup_lr=0.01, min_lr=0.02, layer_decay=0.5)
    trainer = tiny.trainer(tmp_path, [rates], accumulate_grad_batches=accumulate, limit_val_batches=0, max_epochs=3)
    trainer.fit(task, datamodule=tiny.Data())
    epoch = 6 // accumulate
    total = 3 * epoch
    expected = [
        0.01 + 0.09 * k / epoch if k < epoch else 0.02 + 0.04 * (1 + math.cos(math.pi * k / total))
        for k in range(total)
    ]
    assert len(rates.seen) == total
    for seen, value in zip(rates.seen, expected, strict=True):
        assert seen == pytest.approx([value] * len(seen), rel=1e-9)


def test_layer_decay_follows_the_backbones_layers(tiny, tmp_path):
    task = tiny.task(layer_decay=0.5)
    scales = {}
    by_id = {id(p): n for n, p in task.backbone.named_parameters()}
    for group in task.configure_optimizers().param_groups:
        scales |= {by_id[id(p)]: group["lr_scale"] for p in group["params"]}
    # Depth 2: embedding, block 0, block 1, norm and head; each half of the one above it.
    top = scales["head.weight"]
    assert top == 1.0
    assert scales["blocks.1.mlp.fc1.weight"] / scales["blocks.0.mlp.fc1.weight"] == pytest.approx(2)
    assert scales["blocks.0.mlp.fc1.weight"] / scales["patch_embed.proj.weight"] == pytest.approx(2)
    assert set(scales) == {n for n, _ in task.backbone.named_parameters()}


def test_the_clock_anneals_fully_and_ends_with_a_validation(tiny, tmp_path):
    class Clock(Callback):
        def on_train_batch_start(self, trainer, task, batch, batch_idx):
            timer._start_time["train"] -= 100.0  # every batch takes 100 s of the run's time

    timer = Timer(duration={"seconds": 4000}, verbose=False)
    rates = Rates()
    callbacks = [timer, rates, Clock(), *tiny.run_callbacks(tmp_path)]
    trainer = tiny.trainer(tmp_path, callbacks, max_epochs=-1, check_val_every_n_epoch=1000)
    task = tiny.task(lr=0.1, warmup_epochs=10, warmup_lr=0.0)
    trainer.fit(task, datamodule=tiny.Data())
    steps = trainer.global_step
    assert 39 <= steps <= 40  # 40 batches, less what the machine itself took, far from 100 s
    lrs = [r[0] for r in rates.seen]
    # Warm-up is 10 of 100, a tenth of the time, so four batches: the first ends less than half-way up.
    assert lrs[0] < 0.05
    assert lrs[-1] < 0.1 * 0.5 * (1 + math.cos(math.pi * 37 / 40))
    assert "val/top1" in trainer.callback_metrics
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == steps


def test_a_run_of_so_many_steps_ends_with_a_validation(tiny, tmp_path):
    trainer = tiny.trainer(tmp_path, max_epochs=-1, max_steps=2, check_val_every_n_epoch=1000)
    trainer.fit(tiny.task(), datamodule=tiny.Data())
    assert trainer.global_step == 2
    assert "val/top1" in trainer.callback_metrics


def test_a_clock_with_time_to_spare_changes_nothing(tiny, tmp_path):
    rates = []
    for callbacks in ([], [Timer(duration={"hours": 1}, verbose=False)]):
        seen = Rates()
        trainer = tiny.trainer(tmp_path, [seen, *callbacks], limit_val_batches=0)
        trainer.fit(tiny.task(), datamodule=tiny.Data())
        rates.append(seen.seen)
    assert rates[0] == rates[1]


def test_a_clock_that_cuts_the_epochs_anneals_fully(tiny, tmp_path):
    timer = Timer(duration={"seconds": 1000}, verbose=False)
    trainer = tiny.trainer(tmp_path, [timer], max_epochs=50)
    task = tiny.task(lr=0.1)

    class Clock(Callback):
        def on_train_batch_start(self, trainer, task, batch, batch_idx):
            timer._start_time["train"] -= 100.0

    rates = Rates()
    trainer.callbacks += [Clock(), rates]
    trainer.fit(task, datamodule=tiny.Data())
    assert trainer.global_step == 10  # of 300
    # At 1000 of 1000 seconds: the end. One batch before: (0.9 - 0.1) / 0.9 of the way.
    assert rates.seen[-1][0] < 1e-4
    assert rates.seen[-2][0] == pytest.approx(0.05 * (1 + math.cos(math.pi * 8 / 9)), rel=0.02)


def test_a_limit_of_epochs_ends_with_a_validation_too(tiny, tmp_path):
    trainer = tiny.trainer(tmp_path, max_epochs=3, check_val_every_n_epoch=100)
    trainer.fit(tiny.task(), datamodule=tiny.Data())
    assert "val/top1" in trainer.callback_metrics


def test_a_schedule_needs_an_end(tiny, tmp_path):
    trainer = tiny.trainer(tmp_path, max_epochs=-1)
    with pytest.raises(UsageError, match="max_epochs"):
        trainer.fit(tiny.task(), datamodule=tiny.Data())


def test_freeze_trains_the_head_only_and_keeps_running_statistics(tiny, tmp_path):
    class Snapshots(Callback):
        def __init__(self):
            self.states = []

        def on_train_epoch_end(self, trainer, task):
            self.states.append({k: v.clone() for k, v in task.backbone.state_dict().items()})

    snapshots = Snapshots()
    task = Classification(
        "resnet10t", tiny.CLASSES, img_size=16, freeze_epochs=2, lr=1e-2, backbone_options=SMALL_RESNET
    )
    start = {k: v.clone() for k, v in task.backbone.state_dict().items()}
    trainer = tiny.trainer(tmp_path, [snapshots], max_epochs=3)
    trainer.fit(task, datamodule=tiny.Data())
    for state in snapshots.states[:2]:
        changed = {k for k in state if not torch.equal(state[k], start[k])}
        assert changed == {"fc.weight", "fc.bias"}
    changed = {k for k in start if not torch.equal(snapshots.states[2][k], start[k])}
    assert any("running_mean" in k for k in changed)
    assert {n for n, _ in task.backbone.named_parameters()} <= changed
    names = {id(p): n for n, p in task.backbone.named_parameters()}
    grouped = {names[id(p)] for g in trainer.optimizers[0].param_groups for p in g["params"]}
    assert grouped == set(names.values())


@pytest.mark.parametrize(("set_to", "workers", "expected"), [(8, 0, 4), (8, 1, 3), (8, 9, 1), (2, 1, 2), (1, 0, 1)])
def test_threads_leave_a_core_to_each_reading_process(monkeypatch, set_to, workers, expected):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(4)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: set_to)
    given = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    share_cores(workers)
    assert given == [expected]


def test_compile_keeps_the_keys_and_the_result(tiny, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, *a, **k: compiled.append(self))
    task = tiny.task(compile=True)
    keys = list(task.state_dict())
    task.trainer = tiny.trainer(tmp_path)
    task.setup("fit")
    assert compiled == list(task.backbone.blocks)
    assert list(task.state_dict()) == keys
    compiled.clear()
    other = Classification("resnet10t", tiny.CLASSES, img_size=32, compile=True, backbone_options=SMALL_RESNET)
    other.trainer = task.trainer
    other.setup("fit")
    assert compiled == [other.backbone]


@pytest.mark.slow
def test_a_compiled_run_equals_an_eager_one(tiny, tmp_path):
    options = tiny.SMALL | {"drop_path_rate": 0.0, "proj_drop_rate": 0.0}
    ends = []
    for compile in (False, True):
        seed_everything(3, verbose=False)
        task = tiny.task(compile=compile, backbone_options=options)
        tiny.trainer(tmp_path, max_epochs=1).fit(task, datamodule=tiny.Data())
        ends.append(task.backbone.head.weight.detach().clone())
    # Same maths in another order: six updates of 5e-3 by Adam, whose step is insensitive to rounding.
    torch.testing.assert_close(ends[1], ends[0], atol=1e-4, rtol=1e-3)


class TestWeights:
    def test_a_file_of_the_same_network_loads_all_but_the_head(self, tiny, tmp_path):
        source = timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=16, **tiny.SMALL)
        torch.save({"model": source.state_dict()}, tmp_path / "w.pth")
        save_file(source.state_dict(), tmp_path / "w.safetensors")
        for name in ("w.pth", "w.safetensors"):
            task = tiny.task(pretrained=str(tmp_path / name))
            own, theirs = task.backbone.state_dict(), source.state_dict()
            assert own["head.weight"].shape == (3, 16)
            for key in set(own) - {"head.weight", "head.bias"}:
                assert torch.equal(own[key], theirs[key]), key

    def test_equal_classes_keep_the_head(self, tiny, tmp_path):
        source = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=16, **tiny.SMALL)
        torch.save(source.state_dict(), tmp_path / "w.pth")
        task = tiny.task(pretrained=str(tmp_path / "w.pth"))
        assert torch.equal(task.backbone.head.weight, source.head.weight)

    def test_a_headless_file_and_another_size(self, tiny, tmp_path):
        source = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, **tiny.SMALL)
        torch.save(source.state_dict(), tmp_path / "w.pth")
        task = tiny.task(pretrained=str(tmp_path / "w.pth"))
        assert torch.equal(task.backbone.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)

    def test_a_checkpoint_of_a_run(self, tiny, tmp_path):
        task = tiny.task()
        trainer = tiny.trainer(tmp_path, max_steps=1, limit_val_batches=0)
        trainer.fit(task, datamodule=tiny.Data())
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        fine = tiny.task(pretrained=str(tmp_path / "a.ckpt"), class_names=["x", "y"])
        assert torch.equal(fine.backbone.blocks[0].mlp.fc1.weight, task.backbone.blocks[0].mlp.fc1.weight)

    @pytest.mark.parametrize("classes", [3, 5])
    def test_another_architecture_says_what_does_not_fit(self, tiny, tmp_path, classes):
        source = timm.create_model(
            "vit_tiny_patch16_224", num_classes=classes, img_size=16, **tiny.SMALL | {"depth": 3}
        )
        torch.save(source.state_dict(), tmp_path / "w.pth")
        with pytest.raises(UsageError, match=r"do not fit.*blocks\.2"):
            tiny.task(pretrained=str(tmp_path / "w.pth"))

    def test_files_that_are_none(self, tiny, tmp_path):
        with pytest.raises(UsageError, match="no weights file"):
            tiny.task(pretrained=str(tmp_path / "missing.pth"))
        (tmp_path / "text.pth").write_text("hello")
        with pytest.raises(UsageError, match="damaged"):
            tiny.task(pretrained=str(tmp_path / "text.pth"))
        torch.save({"a": 1}, tmp_path / "empty.pth")
        with pytest.raises(UsageError, match="no weights"):
            tiny.task(pretrained=str(tmp_path / "empty.pth"))

    def test_no_published_weights(self):
        with pytest.raises(UsageError, match="no downloadable weights"):
            Classification("vit_small_patch16_18x2_224", ["a", "b"], pretrained=True, img_size=32)


class TestUsage:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"backbone": "resnet5o"}, "unknown backbone 'resnet5o'.*'resnet50'"),
            ({"backbone": "zoo_vit_tinny_patch16_224"}, "unknown backbone"),
            ({"optimizer": "adamww"}, "'adamw'"),
            ({"scheduler": "cosin"}, "'cosine'"),
            ({"class_names": []}, "class_names is empty"),
            ({"class_names": ["a", "a"]}, "twice"),
            ({"lr": -1.0}, "lr=-1.0"),
            ({"label_smoothing": 1.0}, "label_smoothing"),
            ({"layer_decay": 0.0}, "layer_decay"),
            ({"img_size": 0}, "img_size=0"),
            ({"mean": [0.5]}, "mean has 1 values"),
            ({"backbone_options": {"dept": 3}}, "'dept'"),
            ({"backbone_options": {"img_size": 3}}, "as an argument of the task"),
            ({"backbone_options": {"embed_dim": 16, "num_heads": 3}}, "cannot be made"),
            ({"backbone": "resnet10t", "backbone_options": None, "attn": "uniform"}, "no exchangeable attention"),
            ({"backbone": "inception_v3", "backbone_options": None}, "cannot take images of 16 x 16"),
        ],
    )
    def test_bad_values_are_usage_errors(self, tiny, arguments, message):
        with pytest.raises(UsageError, match=message):
            tiny.task(**arguments)

    def test_bad_optimizer_option(self, tiny, tmp_path):
        with pytest.raises(UsageError, match="momentun"):
            tiny.trainer(tmp_path).fit(tiny.task(optimizer_options={"momentun": 1}), datamodule=tiny.Data())

    def test_bad_scheduler_option(self, tiny, tmp_path):
        with pytest.raises(UsageError, match="cycles"):
            tiny.trainer(tmp_path).fit(tiny.task(scheduler_options={"cycles": 1}), datamodule=tiny.Data())


class TestNonFinite:
    def test_stops_before_the_weights_and_names_the_step(self, tiny, tmp_path):
        class Poison(Callback):
            def on_train_batch_start(self, trainer, task, batch, batch_idx):
                if trainer.global_step == 9:
                    batch[0][0, 0, 0, 0] = float("nan")
                    self.before = {k: v.clone() for k, v in task.state_dict().items()}

        poison, task = Poison(), tiny.task()
        trainer = tiny.trainer(tmp_path, [poison, *tiny.run_callbacks(tmp_path)])
        with pytest.raises(NonFiniteLossError, match="step 9"):
            trainer.fit(task, datamodule=tiny.Data())
        assert not issubclass(NonFiniteLossError, UsageError)
        for key, value in task.state_dict().items():
            assert torch.equal(value, poison.before[key])
        saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
        assert saved["global_step"] == 8
        assert all(torch.isfinite(v).all() for v in saved["state_dict"].values())

    def test_weights_that_are_not_finite_are_not_saved(self, tiny, tmp_path):
        class Break(Callback):
            def on_train_batch_end(self, trainer, task, *_):
                if trainer.global_step == 4:
                    task.backbone.head.bias.data[0] = float("inf")

        trainer = tiny.trainer(tmp_path, [Break(), *tiny.run_callbacks(tmp_path)])
        with pytest.raises(NonFiniteLossError, match="step 4"):
            trainer.fit(tiny.task(), datamodule=tiny.Data())
        assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_on_a_gpu_within_a_few_steps(self, tiny, tmp_path):
        class Poison(Callback):
            def on_train_batch_start(self, trainer, task, batch, batch_idx):
                if trainer.global_step == 9:
                    batch[0][0, 0, 0, 0] = float("nan")

        trainer = tiny.trainer(tmp_path, [Poison(), *tiny.run_callbacks(tmp_path)], accelerator="gpu", devices=1)
        with pytest.raises(NonFiniteLossError, match="step 9"):
            trainer.fit(tiny.task(), datamodule=tiny.Data())
        assert trainer.global_step <= 14
        assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 8


def test_evaluation_counts_what_plain_arithmetic_counts(tiny, tmp_path):
    task, data = tiny.task(), tiny.Data(val_length=11)
    trainer = tiny.trainer(tmp_path)
    trainer.fit(task, datamodule=data)
    (result,) = trainer.test(task, datamodule=data, verbose=False)
    task.eval()
    with torch.no_grad():
        images, targets = zip(*[data.test_dataloader().dataset[i] for i in range(11)], strict=True)
        logits = task.inference(torch.stack(images)).double()
    targets = torch.tensor(targets)
    right = (logits.argmax(1) == targets).double()
    assert result["test/top1"] == pytest.approx(float(right.mean()), abs=1e-6)
    assert result["test/top5"] == 1.0  # three classes
    per_class = [float(right[targets == c].mean()) for c in range(3)]
    assert result["test/class_mean"] == pytest.approx(sum(per_class) / 3, abs=1e-6)
    assert task.test_per_class.compute().tolist() == pytest.approx(per_class, abs=1e-6)
    assert result["test/loss"] == pytest.approx(float(F.cross_entropy(logits, targets)), rel=1e-5)
    predicted = torch.cat(trainer.predict(task, DataLoader(tiny.Images(11), batch_size=4)))
    torch.testing.assert_close(predicted, logits.softmax(1).float(), atol=1e-5, rtol=1e-4)


def test_ema_is_what_validation_sees_and_what_a_checkpoint_gives(tiny, tmp_path):
    seen = {}

    class Look(Callback):
        def on_validation_batch_start(self, trainer, task, *_):
            seen["validated"] = task.backbone.head.weight.detach().clone()

        def on_train_batch_end(self, trainer, task, *_):
            # Independent average: decay 0.9, the first update copies.
            weight = task.backbone.head.weight.detach().double()
            seen["average"] = 0.9 * seen["average"] + 0.1 * weight if "average" in seen else weight
            seen["raw"] = weight

    trainer = tiny.trainer(tmp_path, [Look(), *tiny.run_callbacks(tmp_path)], max_epochs=2)
    task = tiny.task()
    trainer.fit(task, datamodule=tiny.Data())
    loaded, _ = load_task(tmp_path / "checkpoints" / "last.ckpt")
    for weight in (seen["validated"], loaded.backbone.head.weight, task.backbone.head.weight):
        # twelve float32 averages
        torch.testing.assert_close(weight.detach().double(), seen["average"], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(seen["raw"], seen["average"], atol=1e-4)


def test_accuracies_stay_apart_after_a_first_batch_without_a_mistake():
    from zoo.tasks.classification import _metrics

    targets = torch.arange(60) % 6
    perfect = torch.nn.functional.one_hot(targets, 6).float()
    second = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
    metrics = _metrics(6)
    metrics.update(perfect, targets)
    metrics.update(second, targets)
    got = metrics.compute()
    logits, all_targets = torch.cat([perfect, second]), targets.repeat(2)
    ranks = (logits > logits.gather(1, all_targets[:, None])).sum(1)
    right = (ranks == 0).double()
    # float32 sums of a few dozen ones are exact; the last division rounds.
    assert got["top1"] == pytest.approx(float(right.mean()), abs=1e-6)
    assert got["top5"] == pytest.approx(float((ranks < 5).double().mean()), abs=1e-6)
    by_class = [float(right[all_targets == number].mean()) for number in range(6)]
    assert got["class_mean"] == pytest.approx(sum(by_class) / 6, abs=1e-6)

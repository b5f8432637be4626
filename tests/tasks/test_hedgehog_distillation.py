"""A network with softmax attention becomes one with Hedgehog attention: first its maps learn, then all of it."""

import copy

import pytest
import torch
from lightning.pytorch import Callback, seed_everything

from zoo.errors import UsageError
from zoo.tasks.callbacks import HedgehogDistillation

VIT = {"backbone": "zoo_vit_tiny_patch16_224"}


class Watch(Callback):
    """States at the end of every epoch, and the losses of every step."""

    def __init__(self):
        self.states, self.losses, self.steps = [], [], []

    def on_train_batch_end(self, trainer, task, outputs, *_):
        self.steps.append(float(outputs["loss"]))
        self.losses.append(float(trainer.callback_metrics.get("train/distillation", -1)))

    def on_train_epoch_end(self, trainer, task):
        self.states.append(copy.deepcopy(task.backbone.state_dict()))


@pytest.fixture(scope="module")
def softmax_file(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("softmax")
    seed_everything(1, verbose=False)
    task = tiny.task(**VIT)
    with torch.no_grad():  # attention that looks somewhere, as that of a trained network
        for block in task.backbone.blocks:
            block.attn.qkv.weight[:32] *= 20
    torch.save({"state_dict": task.backbone.state_dict()}, folder / "softmax.pth")
    return folder / "softmax.pth"


def is_map(key):
    return key.endswith(("q_map", "q_offset", "k_map", "k_offset"))


def changed(before, after):
    return {key for key in before if not torch.equal(before[key], after[key])}


def test_maps_learn_first_then_all(tiny, softmax_file, tmp_path):
    seed_everything(1, verbose=False)
    task = tiny.task(**VIT, attn="hedgehog", pretrained=str(softmax_file), warmup_epochs=0)
    start, watch = copy.deepcopy(task.backbone.state_dict()), Watch()
    trainer = tiny.trainer(tmp_path, [HedgehogDistillation(epochs=2), watch], max_epochs=3)
    trainer.fit(task, datamodule=tiny.Data())
    maps = {key for key in start if is_map(key)}
    assert maps
    assert changed(start, watch.states[1]) == maps
    assert changed(watch.states[1], watch.states[2]) - maps
    # Six steps an epoch: those of the first two minimise the distance, which falls; the third has the task's loss.
    assert watch.steps[:12] == pytest.approx(watch.losses[:12], rel=1e-6)
    assert sum(watch.losses[6:12]) < sum(watch.losses[:6])
    assert watch.steps[12:] != pytest.approx(watch.losses[12:], rel=1e-3)
    # Nothing is left behind.
    assert "training_step" not in vars(task)
    assert all(p.requires_grad for p in task.parameters())
    assert not any(module._forward_hooks for module in task.backbone.modules())


def test_training_answers_as_with_softmax(tiny, softmax_file, tmp_path):
    """The task's own loss, logged in the first step, is that of the network with softmax, without dropout."""
    found = {}

    class Look(Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            if trainer.global_step == 1:
                found.update(loss=float(trainer.callback_metrics["train/loss"]), batch=batch)

    task = tiny.task(**VIT, attn="hedgehog", pretrained=str(softmax_file))
    tiny.trainer(tmp_path, [HedgehogDistillation(epochs=1), Look()], max_epochs=1).fit(
        task, datamodule=tiny.Data(mixup=False)
    )
    teacher = tiny.task(**VIT, pretrained=str(softmax_file)).eval()
    images, targets = found["batch"]
    with torch.no_grad():
        want = torch.nn.functional.cross_entropy(teacher.inference(images), targets)
    # Two orders of the same float32 sums.
    assert found["loss"] == pytest.approx(float(want), rel=1e-5)


def test_a_run_resumed_after_its_first_epochs_does_not_distil(tiny, softmax_file, tmp_path):
    task = tiny.task(**VIT, attn="hedgehog", pretrained=str(softmax_file))
    trainer = tiny.trainer(tmp_path, [HedgehogDistillation(epochs=1)], max_epochs=1)
    trainer.fit(task, datamodule=tiny.Data())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    watch, again = Watch(), tiny.task(**VIT, attn="hedgehog")
    trainer = tiny.trainer(tmp_path, [HedgehogDistillation(epochs=1), watch], max_epochs=2)
    trainer.fit(again, datamodule=tiny.Data(), ckpt_path=tmp_path / "one.ckpt")
    assert watch.losses == [-1] * 6
    assert changed(task.backbone.state_dict(), watch.states[0]) - {key for key in watch.states[0] if is_map(key)}


def test_mistakes_are_refused(tiny, tmp_path):
    with pytest.raises(UsageError, match="epochs=0"):
        HedgehogDistillation(epochs=0)
    with pytest.raises(UsageError, match="attn: hedgehog"):
        tiny.trainer(tmp_path, [HedgehogDistillation()]).fit(tiny.task(**VIT), datamodule=tiny.Data())
    with pytest.raises(UsageError, match="compile: false"):
        tiny.trainer(tmp_path, [HedgehogDistillation()]).fit(
            tiny.task(**VIT, attn="hedgehog", compile=True), datamodule=tiny.Data()
        )

"""Every shipped recipe against the real signatures: parsed, then made, and one batch taken through the network."""

from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

ROOT = Path(__file__).parents[2] / "recipes"
ALL = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.yaml"))
# What `zoo compare` reads names a recipe and is none; its own test is that of the command.
COMPARISONS = [name for name in ALL if name.startswith("compare/")]
RECIPES = [name for name in ALL if name not in COMPARISONS]


def img_size(data):
    return data.init_args.crop_size if "crop_size" in data.init_args else data.init_args.img_size


class Cli(LightningCLI):
    def add_arguments_to_parser(self, parser):
        parser.link_arguments("data", "model.init_args.img_size", compute_fn=img_size)
        parser.link_arguments("data.init_args.in_chans", "model.init_args.in_chans")

    def instantiate_classes(self):
        """Parsing is one test, making another."""


@pytest.fixture(autouse=True)
def no_arguments_of_pytest(monkeypatch):
    monkeypatch.setattr("sys.argv", ["zoo"])


def parse(name, *arguments):
    return Cli(
        args=["--config", str(ROOT / name), "--trainer.accelerator", "cpu", *arguments],
        run=False,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=None,
        auto_configure_optimizers=False,
        parser_kwargs={"exit_on_error": False},
    )


def test_recipes_are_shipped():
    assert {"quickstart.yaml", "classification/cifar10_vit_tiny.yaml", "anomaly/l2bt.yaml"} <= set(RECIPES)


@pytest.mark.parametrize("name", ALL)
def test_a_recipe_says_what_it_is(name):
    lines = (ROOT / name).read_text().splitlines()
    head = "\n".join(line for line in lines[:20] if line.startswith("#"))
    command = f"zoo {'compare' if name in COMPARISONS else 'fit'} --config {name.removesuffix('.yaml')}"
    assert command in head
    for word in ("second", "minute"):
        if word in head:
            break
    else:
        pytest.fail(f"{name} does not say how long it takes")
    content = yaml.safe_load("\n".join(lines))
    if name not in COMPARISONS:
        assert set(content) == {"seed_everything", "trainer", "model", "data"}


CLASSIFIERS = [name for name in RECIPES if not name.startswith(("anomaly/", "segmentation/"))]
SEGMENTERS = [name for name in RECIPES if name.startswith("segmentation/")]
DETECTORS = [name for name in RECIPES if name.startswith("anomaly/")]


@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_s_recipe_parses_and_its_teacher_takes_the_images(name):
    cli = parse(name)
    made = cli.parser.instantiate_classes(cli.config)
    size, task = cli.config.data.init_args.img_size, made.model
    assert task.hparams["img_size"] == [size, size]
    # Nothing is downloaded by a recipe, and a bank sees every image once.
    assert task.hparams["pretrained"] is False
    assert task.automatic_optimization or cli.config.trainer.max_epochs == 1
    learn = task.detector.loss if task.automatic_optimization else task.detector.update
    learn(torch.rand(2, 3, size, size))


@pytest.mark.parametrize("name", SEGMENTERS)
def test_a_segmenter_s_recipe_parses_and_its_network_learns(name):
    cli = parse(name, "--model.init_args.class_names", "[a, b, c]", "--data.init_args.crop_size", "64")
    task = cli.parser.instantiate_classes(cli.config).model
    # Nothing is downloaded by a recipe.
    assert task.hparams["pretrained"] is False
    task.train()
    outputs = task.segmenter(torch.rand(2, task.hparams["in_chans"], 64, 64))
    loss = task._loss(outputs, torch.randint(0, 3, (2, 64, 64)), training=True)
    loss.backward()
    assert torch.isfinite(loss)
    with torch.no_grad():
        images = torch.zeros(1, task.hparams["in_chans"], 64, 96, dtype=torch.uint8)
        assert task.eval().inference(images).shape == (1, 3, 64, 96)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_recipe_parses_and_its_network_works(name):
    cli = parse(name, "--model.init_args.class_names", "[a, b, c]")
    made = cli.parser.instantiate_classes(cli.config)
    size = cli.config.data.init_args.img_size
    task = made.model.eval()
    assert task.inference(torch.zeros(2, 3, size, size, dtype=torch.uint8)).shape == (2, 3)
    assert task.hparams["img_size"] == [size, size]


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("wrong", ["--model.init_args.lrr=1", "--data.init_args.batchsize=3", "--trainer.epochs=1"])
def test_an_option_that_does_not_exist_is_refused(name, wrong):
    with pytest.raises(Exception, match=r"lrr|batchsize|epochs"):
        parse(name, wrong)

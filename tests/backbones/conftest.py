"""What tests of several families share: the recorded answers of the authors' networks."""

import importlib.util
import json
from functools import cached_property
from pathlib import Path

import pytest
import timm
import torch

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"


class Golden:
    """One recorded network: `name` is ours, `shapes` are those of the authors' file."""

    def __init__(self, path):
        self.content = json.loads(path.read_text())
        self.name = f"zoo_{self.content['our_name']}"
        self.shapes = {key: tuple(shape) for key, (shape, _) in self.content["state_dict"].items()}

    @cached_property
    def check(self):
        spec = importlib.util.spec_from_file_location("check", GOLDEN / "check.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def load(self, folder, wrap=None):
        """Our network with the authors' weights, from a file as they release it."""
        state = self.check.state_dict(self.content)
        torch.save({wrap: state} if wrap else state, folder / "authors.pth")
        overlay = {"file": str(folder / "authors.pth")}
        return timm.create_model(self.name, pretrained=True, pretrained_cfg_overlay=overlay).eval()

    @torch.inference_mode()
    def errors(self, model):
        """How far logits and the map of every stage are from what is recorded, relative to its largest value."""
        x = self.check.image(self.content["input"]["seed"], self.content["input"]["shape"])
        maps = model.forward_intermediates(x, intermediates_only=True)
        answers = {"logits": model(x)} | {f"stage{stage + 1}": map_ for stage, map_ in enumerate(maps)}
        recorded = self.content["outputs"]
        return {key: self.check.error(answers[key], recorded[key]) for key in answers.keys() & recorded.keys()}


def pytest_generate_tests(metafunc):
    """A test that takes `golden` runs for every record whose name begins with its module's GOLDENS."""
    if "golden" in metafunc.fixturenames:
        paths = sorted(GOLDEN.glob(f"{metafunc.module.GOLDENS}_*.json"))
        absent = pytest.param(
            None,
            marks=pytest.mark.skip(
                reason="the authors' recorded answers lie beside the project, in ../shared/golden, and are absent here"
            ),
        )
        records = [pytest.param(Golden(path), id=path.stem) for path in paths]
        metafunc.parametrize("golden", records or [absent])


@pytest.fixture
def step_losses():
    """Losses of a training step in float32 and bf16, contiguous and channels last; every gradient is finite.

    The network of `make()` has to answer by its input: black images must move the loss by more than `tolerance`, so
    that the four cannot agree by ignoring what they see.
    """

    def losses(make, x, y, tolerance):
        def step(x, dtype, format_, gradients=True):
            model = make().train().to(memory_format=format_)
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
                loss = torch.nn.functional.cross_entropy(model(x.to(memory_format=format_)), y)
            if gradients:
                loss.backward()
                assert all(p.grad.isfinite().all() for p in model.parameters())
            return loss.item()

        formats = (torch.contiguous_format, torch.channels_last)
        found = [step(x, dtype, format_) for dtype in (torch.float32, torch.bfloat16) for format_ in formats]
        black = step(torch.zeros_like(x), torch.float32, formats[0], gradients=False)
        assert abs(black - found[0]) > tolerance * found[0]
        return found

    return losses

"""CUDA graphs and fused optimizers: the same training as without them."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import zoo  # noqa: F401  (registers the networks)
from zoo.errors import UsageError
from zoo.tasks import speed
from zoo.tasks.speed import TrainingGraph

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


class Net(nn.Module):
    """Convolution, BatchNorm, dropout, pooling."""

    def __init__(self, drop: float):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(drop)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.drop(self.norm(self.conv(x)).relu().mean((2, 3))))


def train(net, batches, graph: bool):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    captured, losses = None, []
    for step, images in enumerate(batches):
        torch.cuda.manual_seed(step)
        if graph and captured is None:
            captured = TrainingGraph(net, images)
        loss = net(images).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return captured, losses


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_a_graph_trains_as_eager_does(drop):
    torch.manual_seed(0)
    eager = Net(drop).cuda().train()
    graphed = copy.deepcopy(eager)
    # The fourth batch is smaller, as one with an unreadable image is.
    batches = [torch.randn(n, 3, 9, 9, device="cuda") for n in (6, 6, 6, 5, 6)]
    _, want = train(eager, batches, graph=False)
    captured, got = train(graphed, batches, graph=True)
    # The same kernels on the same numbers; cuDNN may choose another algorithm under capture: float32 noise.
    assert got == pytest.approx(want, rel=1e-5)
    for (name, a), b in zip(eager.state_dict().items(), graphed.state_dict().values(), strict=True):
        assert torch.allclose(a.float(), b.float(), atol=1e-6, rtol=1e-5), name
    assert len(set(want)) == 5
    captured.release()
    assert "forward" not in vars(graphed)
    assert torch.isfinite(graphed(batches[0])).all()


@pytest.mark.parametrize(("version", "mended"), [("2.11.0+cu130", False), ("2.13.1", False), ("2.14.1", True)])
def test_one_fusion_is_off_where_torch_gets_its_gradients_wrong(version, mended, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    block, plain = Net(0.0), Net(0.0)
    block.scale = nn.Parameter(torch.zeros(1, 1, 8))
    assert (speed._options(block) is None) == mended
    assert speed._options(plain) is None


class Staged(nn.Module):
    """A stem, and two stages of a change of the map and two blocks each."""

    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.stages = nn.Sequential(self.stage(), self.stage())
        self.head = nn.Linear(4, 2)

    @staticmethod
    def stage():
        stage = nn.Module()
        stage.downsample = nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(1, 4))
        stage.blocks = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)])
        return stage


def test_blocks_are_compiled_and_what_lies_between_them():
    network = Staged()
    keys = list(network.state_dict())
    speed.compile_in_place(network)
    compiled = {name for name, module in network.named_modules() if module._compiled_call_impl is not None}
    stages = {f"stages.{i}.{part}" for i in (0, 1) for part in ("downsample", "blocks.0", "blocks.1")}
    # One layer alone, such as the head, has nothing to fuse.
    assert compiled == {"patch_embed", *stages}
    assert list(network.state_dict()) == keys
    whole = Net(0.0)
    speed.compile_in_place(whole)
    assert whole._compiled_call_impl is not None


def test_every_part_is_one_graph_and_equal_blocks_share_theirs(monkeypatch):
    """On the oldest torch too, which of itself takes a row of layers apart."""
    graphs, own = [], torch.compile

    def caught(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda call, **_: own(call, dynamic=False, backend=caught))
    torch._dynamo.reset()
    network = timm.create_model("zoo_shvit_s1", depths=(1, 3, 1), num_classes=0)
    x = torch.randn(2, 3, 64, 64)
    want = network(x)
    speed.compile_in_place(network)
    assert torch.equal(network(x), want)
    # The stem, and a change of the map and equal blocks of each stage; the first stage has no change of the map.
    assert [graph.count(F.batch_norm) for graph in graphs] == [4, 3, 9, 5, 9, 5]


@pytest.mark.parametrize(
    ("model", "trainer", "named"),
    [({"freeze_epochs": 1}, {}, "freeze_epochs"), ({}, {"accumulate_grad_batches": 2}, "accumulate_grad_batches")],
)
def test_what_a_graph_cannot_do_is_said_before_training(tiny, tmp_path, model, trainer, named):
    task = tiny.task(cuda_graph=True, **model)
    with pytest.raises(UsageError, match=named):
        tiny.trainer(tmp_path, **trainer).fit(task, datamodule=tiny.Data())


def test_fused_optimizers_clip_as_others_do(tiny, tmp_path):
    weights = []
    for fused, clip in ((False, 1e-3), (True, 1e-3), (True, None)):
        torch.manual_seed(0)
        # Plain SGD: what AdamW does hardly depends on the size of the gradients.
        task = tiny.task(optimizer="sgd", lr=0.1, warmup_epochs=0.0, optimizer_options={"fused": fused})
        tiny.trainer(tmp_path, max_steps=3, gradient_clip_val=clip).fit(task, datamodule=tiny.Data())
        weights.append(torch.cat([p.detach().flatten() for p in task.backbone.parameters()]))
    # float32 noise of three steps of at most 1e-4 each
    assert torch.allclose(weights[0], weights[1], atol=1e-7)
    assert not torch.allclose(weights[0], weights[2], atol=1e-4)

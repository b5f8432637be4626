"""Masks of heads: what a mask does to every mechanism, which heads it takes, and a run with it."""

import copy

import pytest
import timm
import torch
from lightning.pytorch import Trainer

from zoo import attention_spec, create_attention, list_attentions
from zoo.errors import UsageError
from zoo.tasks.callbacks import HeadMask

from .tiny_run import Data, task, trainer

DIM, HEADS = 16, 4


def build(name):
    torch.manual_seed(0)
    options = {"num_heads": HEADS} if "num_heads" in attention_spec(name).options else {}
    if attention_spec(name).wrapper:
        options = {"inner_options": {"num_heads": HEADS}}
    return create_attention(name, DIM, grid_size=(4, 6), **options).double().eval()


class Fixed(HeadMask):
    """Gates as a test sets them."""

    def attach(self, network):
        super().attach(network)
        self.layers = [layer for layer in network.modules() if layer._forward_pre_hooks]

    def set(self, gates):
        parts = torch.as_tensor(gates, dtype=torch.float64).split([gate.heads for gate in self._gates])
        for gate, part in zip(self._gates, parts, strict=True):
            gate.value = part


def without_head(attention, head):
    """A copy whose projection takes nothing from one head, by its weights; None where no projection follows."""
    twin = copy.deepcopy(attention)
    for module in twin.modules():
        for layer, heads in module.head_layers() if hasattr(module, "head_layers") else ():
            if 0 <= head < heads:
                if attention_spec("mosa").cls is type(module):
                    module.proj.data[head] = 0
                elif isinstance(layer, torch.nn.Identity):
                    return None
                else:
                    width = layer.weight.shape[1] // heads
                    layer.weight.data[:, head * width : (head + 1) * width] = 0
            head -= heads
    return twin


@pytest.mark.parametrize("name", list_attentions())
def test_a_masked_head_is_one_that_the_projection_does_not_see(name):
    attention = build(name)
    x = torch.randn(2, 24, DIM, dtype=torch.float64)
    mask = Fixed()
    if name in ("uniform", "local_relation", "single_head"):
        with pytest.raises(UsageError, match="no attention with heads"):
            mask.attach(attention)
        return
    twins = [without_head(attention, head) for head in range(HEADS)]
    full = attention(x, (4, 6))
    mask.attach(attention)
    mask.set(torch.zeros(HEADS))
    torch.testing.assert_close(attention(x, (4, 6)), full)
    # Training for the gates alone: norms and centroids that learn would differ from call to call.
    for gate_layer in mask.layers:
        gate_layer.train()
    for head, twin in enumerate(twins):
        gates = torch.ones(HEADS)
        gates[head] = 0
        mask.set(gates)
        masked = attention(x, (4, 6))
        assert not torch.allclose(masked, full)
        if twin is not None:
            # The same sums but for one that is zero; some mechanisms keep weights in float32.
            torch.testing.assert_close(masked, twin(x, (4, 6)), rtol=1e-5, atol=1e-6)
    mask.set(torch.zeros(HEADS))
    # Only the bias of the projection is left: the same in every token.
    nothing = attention(x, (4, 6))
    torch.testing.assert_close(nothing, nothing[:1, :1].expand_as(nothing))
    mask.set(torch.ones(HEADS))
    torch.testing.assert_close(attention(x, (4, 6)), full)
    mask.detach()
    assert not any(layer._forward_pre_hooks for layer in attention.modules())


def opened(mask, heads, step):
    mask._open = torch.ones(heads)
    mask.close(step)
    return mask._open


def test_as_many_heads_as_the_rate_at_random_in_every_step():
    masks = [opened(HeadMask(0.25), 12, step) for step in range(200)]
    assert all((mask == 0).sum() == 3 and (mask == 1).sum() == 9 for mask in masks)
    # Each head is masked 50 times of 200 on average, with a standard deviation of 6.
    assert all(25 < (torch.stack(masks)[:, head] == 0).sum() < 75 for head in range(12))
    assert torch.equal(opened(HeadMask(0.25), 12, 7), masks[7])


def test_no_head_and_all_heads():
    assert opened(HeadMask(0.0), 12, 0).tolist() == [1.0] * 12
    assert opened(HeadMask(1.0), 12, 0).tolist() == [0.0] * 12


def test_rescaled_heads_are_dropout_of_heads():
    gates = opened(HeadMask(0.25, rescale=True), 12, 3)
    assert gates.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert gates.mean() == pytest.approx(1.0)


def test_the_most_important_heads_of_the_step_before():
    mask = HeadMask(0.5, by="importance")
    assert opened(mask, 4, 0).tolist() == [1.0] * 4
    mask.load_state_dict({"importance": torch.tensor([0.1, 3.0, 2.0, 0.5])})
    assert opened(mask, 4, 1).tolist() == [1.0, 0.0, 0.0, 1.0]


class Fit:
    """What `on_train_start` and `on_after_backward` ask of a trainer and a task."""

    device = torch.device("cpu")

    class strategy:
        @staticmethod
        def reduce(value, reduce_op):
            return value


def test_importance_is_the_gradient_of_the_gate():
    """|sum of o * dL/do| for the answer o of a head, by hand from the gradient of the projection's input."""
    model = timm.create_model(
        "zoo_vit_tiny_patch16_224", img_size=32, embed_dim=16, depth=2, num_heads=2, num_classes=3
    )
    mask, seen = HeadMask(by="importance"), []
    mask.attach(model.train())
    mask.on_train_start(Fit, Fit)
    mask.close(0)
    for block in model.blocks:

        def keep(_, arguments):
            arguments[0].retain_grad()
            seen.append(arguments[0])

        block.attn.proj.register_forward_pre_hook(keep)
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    mask.on_after_backward(Fit, Fit)
    want = [(o * o.grad).unflatten(-1, (2, 8)).sum(dim=(0, 1, 3)).abs() for o in seen]
    torch.testing.assert_close(mask.importance, torch.cat(want), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("by", ["random", "importance"])
def test_a_run_with_it(tmp_path, by):
    mask = HeadMask(0.25, by=by)
    run = task(backbone="zoo_vit_tiny_patch16_224")
    trainer(tmp_path, [mask], max_epochs=2).fit(run, datamodule=Data(12))
    assert (mask._open == 0).sum() == 1
    assert (mask.importance is None) == (by == "random")
    assert not run.backbone.blocks[0].attn.proj._forward_pre_hooks


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"rate": 1.5}, "between 0 and 1"),
        ({"rate": 1.0, "rescale": True}, "below 1 with rescale"),
        ({"by": "importanc"}, "Did you mean 'importance'"),
    ],
)
def test_wrong_arguments_are_named(arguments, named):
    with pytest.raises(UsageError, match=named):
        HeadMask(**arguments)


def test_gradients_of_gates_are_not_to_be_had_from_a_cuda_graph():
    run = task(cuda_graph=True)
    with pytest.raises(UsageError, match="cuda_graph: false"):
        HeadMask(by="importance").setup(Trainer(logger=False), run, "fit")

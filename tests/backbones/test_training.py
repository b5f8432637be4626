"""Every network learns eight images by heart in fewer than sixty steps: gradients reach where they are needed.

By default a small network of each kind; `-m slow` runs every registered name.
"""

import pytest
import timm
import torch
from torch import nn

import zoo  # noqa: F401  (registers the networks)

QUICK = (
    "zoo_vit_tiny_patch16_224",
    "zoo_vit_tiny_cbs_patch16_224",
    "zoo_pvt_v2_b0",
    "zoo_flatten_pvt_v2_b0",
    "zoo_shvit_s1",
    "zoo_uniformer_xxs",
    "zoo_attention_resnet50",
    "zoo_lambda_resnet50",
)
STEPS = 59


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in timm.list_models("zoo_*")],
)
def test_learns_eight_images_by_heart(name):
    torch.manual_seed(1)
    model = timm.create_model(name, img_size=64, num_classes=8).train()
    x, y = torch.randn(8, 3, 64, 64), torch.arange(8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        # A linear start keeps the first steps, whose direction Adam barely knows, from doing harm.
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 10)
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if losses[-1] < 0.1:
            return
    # A guess is worth log 8 = 2.08.
    pytest.fail(f"the loss is {losses[-1]:.2f} after {STEPS} steps, from {losses[0]:.2f}")

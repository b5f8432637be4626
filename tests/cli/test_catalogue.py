"""`zoo list` and `zoo info` against counts made by hand and against timm."""

import re
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from zoo import list_attentions
from zoo.catalogue import attentions_in, backbone_facts, count_macs, list_backbones, match
from zoo.published import PUBLISHED_TOP1
from zoo.resources import recipes


def vit_macs(dim: int, depth: int, tokens: int, patch: int, classes: int) -> int:
    """From the equations of a ViT: embedding, projections, the two products of the attention, MLP of ratio 4, head."""
    embed = (tokens - 1) * dim * 3 * patch**2
    block = tokens * dim * (3 * dim + dim + 8 * dim) + 2 * tokens**2 * dim
    return embed + depth * block + dim * classes


def test_macs_of_a_vit_equal_a_count_by_hand():
    facts = backbone_facts("zoo_vit_tiny_patch16_224")
    assert facts.macs == vit_macs(192, 12, 197, 16, 1000)
    assert facts.macs == pytest.approx(1.25e9, rel=0.01)


def test_macs_of_a_resnet_are_the_published_ones():
    # 4.09 GMACs: torchvision's table of weights for ResNet50, rounded to two digits.
    assert backbone_facts("resnet50").macs == pytest.approx(4.09e9, abs=0.005e9)


def test_macs_count_products_of_convolutions_and_groups():
    # 10 x 10 outputs of 6 channels, each from 3 x 3 x (4 / 2) inputs; then 600 -> 5.
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.Flatten(), nn.Linear(600, 5))
    assert count_macs(model, (4, 10, 10)) == 10 * 10 * 6 * 3 * 3 * 2 + 600 * 5


# Counting multiply-adds runs the network: seconds for deep ones. One of each family, the others with the slow tests.
QUICK = {
    "zoo_attention_resnet50",
    "zoo_cswin_tiny",
    "zoo_flatten_pvt_tiny",
    "zoo_flatten_swin_tiny",
    "zoo_halonet_h0",
    "zoo_lambda_resnet26t",
    "zoo_pvt_v2_b0",
    "zoo_shvit_s1",
    "zoo_swin_tiny_patch4_window7_224",
    "zoo_uniformer_xxs",
    "zoo_vit_tiny_cb_patch16_224",
}


def test_quick_names_exist():
    assert set(list_backbones()) > QUICK


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in list_backbones()]
)
def test_info_of_every_backbone(zoo, name):
    shown = zoo("info", name)
    assert shown.status == 0, shown.err
    with torch.device("meta"):
        parameters = sum(p.numel() for p in timm.create_model(name).parameters())
    assert f"{parameters / 1e6:.2f} M" in shown.out
    assert re.search(r"multiply-adds +\d+\.\d\d G", shown.out)
    for fact in ("paper", "licence", "input", "attention", "published top-1 %"):
        assert re.search(rf"^{fact} +(?!not recorded)\S", shown.out, re.MULTILINE), fact
    assert "arXiv" in shown.out


def test_published_accuracies_belong_to_networks_that_exist(zoo):
    assert set(PUBLISHED_TOP1) <= set(list_backbones())
    shown = zoo("list", "backbones", "zoo_shvit_s3")
    assert re.search(r"zoo_shvit_s3 .* 77\.4 ", shown.out)  # the authors' table
    assert "none recorded" in zoo("info", "zoo_vit_tiny_cb_patch16_224").out


SPECS = Path(__file__).parents[3] / "shared" / "specs"


@pytest.mark.skipif(
    not SPECS.is_dir(),
    reason="the authors' published tables lie beside the project, in ../shared/specs, and are absent here",
)
@pytest.mark.parametrize(("family", "rows"), [("uniformer", 10), ("shvit", 4), ("flatten", 7)])
def test_published_accuracies_are_those_of_the_authors(family, rows):
    """The column top-1 of the tables of variants; rows of two networks and figures of a plot are left out."""
    found = {}
    for line in (SPECS / f"{family}.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if (line.startswith("|") and cells[0] == "variant") or cells[0] == "our name":
            column = cells.index("top-1")
        elif re.fullmatch(r"(uniformer|shvit|flatten)_\w+( \(TL\))?", cells[0]) and len(cells) > column:
            name = "zoo_" + cells[0].removesuffix(" (TL)") + ("_tl" if cells[0].endswith("(TL)") else "")
            values = re.findall(r"\d\d\.\d(?=@224|$| \(TL\)| \(log)", cells[column])
            if values:
                found[name] = float(values[-1])
    assert len(found) >= rows, found
    assert {name: PUBLISHED_TOP1.get(name) for name in found} == found


def test_attention_inside_a_network_is_named():
    model = timm.create_model("zoo_vit_tiny_patch16_224", depth=2, attn=["uniform", None])
    assert attentions_in(model) == ("uniform", "softmax")


@pytest.mark.parametrize("name", list_attentions())
def test_info_of_every_attention(zoo, name):
    shown = zoo("info", name)
    assert shown.status == 0, shown.err
    assert f"--model.attn {name}" in shown.out
    assert "arXiv" in shown.out or "paper" in shown.out


def test_info_of_a_recipe_is_the_recipe(zoo):
    assert recipes()["quickstart"].read_text() in zoo("info", "quickstart").out


def test_list_shows_all_of_each_kind(zoo):
    shown = zoo("list").out.split()
    assert {*list_backbones(), *list_attentions(), *recipes()} <= set(shown)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (None, ["zoo_a_tiny", "zoo_b_small", "zoo_b_tiny"]),
        ("tiny", ["zoo_a_tiny", "zoo_b_tiny"]),
        ("zoo_b*", ["zoo_b_small", "zoo_b_tiny"]),
        ("b_tin?", []),
        ("*b_tin?", ["zoo_b_tiny"]),
    ],
)
def test_patterns(pattern, expected):
    assert match(pattern, ["zoo_b_tiny", "zoo_a_tiny", "zoo_b_small"]) == expected


def test_list_takes_a_pattern(zoo):
    names = [line.split()[0] for line in zoo("list", "backbones", "zoo_vit_*_patch16_224").out.splitlines()[1:]]
    assert names == timm.list_models("zoo_vit_*_patch16_224")
    assert [line.split()[0] for line in zoo("list", "recipes", "cifar").out.splitlines()[1:]] == [
        name for name in recipes() if "cifar" in name
    ]


def test_list_of_attentions_shows_cost_and_hosts(zoo):
    columns, row = zoo("list", "attentions", "single_head").out.splitlines()
    assert columns.split()[:2] == ["attention", "paper"]
    for words in ("arXiv 2401.16456", "N**2*(16 + round(C/4.67))", "bias, key_mask"):
        assert words in row
    assert row.endswith("vit without class token, attention_resnet, swin windows")


def test_counting_leaves_the_model_alone():
    model = timm.create_model("zoo_vit_tiny_patch16_224", depth=1, num_classes=2).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    count_macs(model, (3, 224, 224))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())

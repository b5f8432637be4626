"""What is asked of every stage: any mechanism in any network, or a sentence that says why not."""

import pytest
import timm
import torch
from timm.models._features_fx import get_notrace_functions, get_notrace_modules
from torchvision.models.feature_extraction import NodePathTracer

import zoo
from zoo.catalogue import list_backbones
from zoo.errors import UsageError

SMALLEST = (
    *("zoo_vit_tiny_patch16_224", "zoo_pvt_tiny", "zoo_pvt_v2_b0", "zoo_swin_tiny_patch4_window7_224"),
    *("zoo_cswin_tiny", "zoo_shvit_s1", "zoo_uniformer_small", "zoo_uniformer_xxs", "zoo_attention_resnet50"),
)
SHALLOW = {"_vit_": {"depth": 1}, "shvit": {"depths": (1, 1, 1)}}
NAMES = [pytest.param(n, marks=() if n in SMALLEST else pytest.mark.slow) for n in list_backbones()]


@pytest.mark.parametrize("attn", zoo.list_attentions())
@pytest.mark.parametrize("name", NAMES)
def test_any_mechanism_is_built_or_refused_with_a_sentence(name, attn):
    refusal = None
    with torch.device("meta"):
        try:
            timm.create_model(name, attn=attn, **({"depth": 2} if "_vit_" in name else {}))
        except UsageError as error:
            refusal = str(error)
    # The classifier of the plain ViT looks at the class token, and an odd number of heads has no halves.
    may = "_vit_" in name or (attn == "cross_window" and "halves the heads" in str(refusal))
    # A Swin of even windows hands their side on.
    may = may or (attn == "multi_scale_window" and "odd size" in str(refusal))
    assert refusal is None or (may and attn in refusal), refusal


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("zoo_pvt_tiny", {"attn": 3}, r"attn=3: give the name"),
        ("zoo_pvt_tiny", {"attn": ["softmax", 3, None, None]}, r"attn=.*3.*: give the name"),
        ("zoo_pvt_tiny", {"attn": ""}, r"unknown attention ''"),
        ("zoo_swin_tiny_patch4_window7_224", {"attn": ["", None, None, None]}, r"unknown attention ''"),
        ("zoo_shvit_s1", {"attn": ["", None, None]}, r"unknown attention ''"),
        ("zoo_uniformer_small", {"attn": ["", None, None, None]}, r"unknown attention ''"),
        ("zoo_vit_tiny_patch16_224", {"attn": [""] * 12}, r"unknown attention ''"),
        ("zoo_pvt_tiny", {"attn_options": ["a"] * 4}, r"attn_options=.*give a mapping"),
        ("zoo_vit_tiny_patch16_224", {"attn_options": ["a"] * 12}, r"attn_options=.*for all blocks"),
        ("zoo_shvit_s1", {"attn_options": [{"qk_dim": 8}, None, None]}, r"first stage, which has no attention"),
        ("zoo_pvt_tiny", {"num_heads": (1, 2)}, r"num_heads has 2 entries, but there are 4 stages"),
        ("zoo_pvt_tiny", {"mlp_ratios": (1, 2)}, r"mlp_ratios has 2 entries"),
        ("zoo_pvt_v2_b0", {"sr_ratios": (1, 2)}, r"sr_ratios has 2 entries"),
        ("zoo_pvt_v2_b0", {"embed_dims": (8, 16)}, r"embed_dims has 2 entries"),
        ("zoo_cswin_tiny", {"stripe_widths": (1, 2)}, r"stripe_widths has 2 entries"),
        ("zoo_shvit_s1", {"partial_dims": (32, 48)}, r"partial_dims has 2 entries, but there are 3 stages"),
        ("zoo_uniformer_small", {"embed_dims": (32, 64)}, r"embed_dims has 2 entries"),
        ("zoo_uniformer_small", {"attn": "softmax", "attn_options": {"dim_out": 5}}, r"5 channels.*leave out dim_out"),
        ("zoo_vit_tiny_patch16_224", {"attn_options": {"dim_out": 6}}, r"6 channels.*leave out dim_out"),
        *((name, {"num_classes": -1}, r"num_classes=-1") for name in SMALLEST),
    ],
)
def test_wrong_options_are_sentences(name, options, message):
    with torch.device("meta"), pytest.raises(UsageError, match=message):
        timm.create_model(name, **options)


@pytest.mark.parametrize("name", SMALLEST)
@torch.inference_mode()
def test_torchscript_answers_the_same(name):
    """timm's wish for every network but those that say otherwise; another size than the one it was made for."""
    options = next((o for part, o in SHALLOW.items() if part in name), {"depths": (1, 1, 1, 1)})
    model = timm.create_model(name, **options).eval()
    x = torch.randn(2, 3, 64, 96)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", SMALLEST)
@torch.inference_mode()
def test_fx_traces_it_as_timm_does(name):
    """With timm's leaves: what looks at the size, the layout or the device of a tensor is one."""
    options = next((o for part, o in SHALLOW.items() if part in name), {"depths": (1, 1, 1, 1)})
    model = timm.create_model(name, **options).eval()
    tracer = NodePathTracer(
        leaf_modules=get_notrace_modules(), autowrap_functions=get_notrace_functions(), param_shapes_constant=True
    )
    traced = torch.fx.GraphModule(model, tracer.trace(model))
    x = torch.randn(2, 3, *timm.get_pretrained_cfg(name).input_size[1:])
    torch.testing.assert_close(traced(x), model(x), atol=1e-5, rtol=1e-4)  # the same arithmetic

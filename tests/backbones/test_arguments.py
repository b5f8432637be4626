"""Every argument of every `zoo_*` network changes something, and rates of dropout act in training alone."""

import copy
import fnmatch
import inspect

import torch

from .networks import NEAR, create, each, images, shaken

RATES = ("drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate")
# Another value for every argument of every constructor; a dict where the comparison needs more than the one argument.
OTHER = {
    "img_size": 96,
    "patch_size": {"vit": 4, "pyramid": 2},
    "in_chans": 4,
    "num_classes": 7,
    "global_pool": "max",
    "embed_dim": 48,
    "embed_dims": {
        "zoo_shvit_*": (64, 96, 128),
        "zoo_uniformer_*": (64, 128, 448, 448),
        "pyramid": (48, 96, 240, 384),
    },
    "depth": 3,
    "depths": {"zoo_shvit_*": (1, 2, 1), "pyramid": (1, 2, 1, 1)},
    "num_heads": {"zoo_*cswin*": (2, 2, 2, 2), "vit": 4, "pyramid": (1, 1, 1, 1)},
    "mlp_ratio": 2.5,
    "mlp_ratios": (1, 2, 3, 1),
    "sr_ratios": (4, 4, 2, 1),
    "window_size": 5,
    "stripe_widths": (2, 4, 2, None),
    "qkv_bias": False,
    "qk_norm": True,
    "init_values": {"zoo_uniformer_large_ls": (None, None, 0.1, 0.1), "*": 0.1},
    "head_dim": 4,
    "conv_stem": {"zoo_uniformer_*plus*": False, "zoo_uniformer_x*": False, "*": True},
    "conv_down": {"zoo_uniformer_*plus*": False, "*": True},
    "aux_head": {"*_tl": False, "zoo_uniformer_large_ls": False, "*": True},
    "stem_dims": (16,),
    "widths": (16, 32, 48, 64),
    "expansion": 0.75,
    "value_ratio": 0.5,
    "mixers": ("conv", "conv", "conv", "conv"),
    "mixer_options": {
        "zoo_halonet*": {"halo": {"halo_size": 1}},
        "zoo_lambda_*": {"lambda": {"kernel_size": 5}},
        "*": {"softmax": {"qkv_bias": False}},
    },
    "avg_down": {"zoo_lambda_resnet26t": True, "zoo_lambda_*": False, "*": True},
    "se": {f"zoo_lambda_resnet{layers}": False for layers in (101, 152, 200)} | {"*": True},
    "final_dim": 40,
    "partial_dims": (4, 8, 8),
    "qk_dim": 8,
    "class_token": False,
    "attn": "uniform",
    "attn_share": ((0, 1),),
    "attn_options": {
        "zoo_shvit_*": {"qk_dim": 8},
        "zoo_halonet*": {"halo_size": 1},
        "zoo_lambda_*": {"dim_key": 8},
        "*": {"qkv_bias": False},
    },
    "cb": {"zoo_vit_*_cb_*": "cbs", "vit": "cb"},
    "norm_layer": torch.nn.Identity,
    "act_layer": torch.nn.ReLU,
    **dict.fromkeys(RATES, 0.6),
}
# Arguments without effect until another attention is chosen: one with a table over the whole grid, or softmax.
IDLE = {
    "img_size": (
        *("zoo_pvt_v2_*", "zoo_swin_*", "zoo_cswin_*", "zoo_flatten_*", "zoo_shvit_*", "zoo_uniformer_*"),
        *("zoo_attention_*", "zoo_halonet*", "zoo_lambda_*"),
    ),
    # There is no block that mixes with a convolution.
    "se": ("zoo_halonet_*", "zoo_lambda_resnet50"),
    "attn_drop_rate": ("zoo_flatten_pvt_*",),
    "sr_ratios": ("zoo_flatten_pvt_*",),
    # Refused by networks that shrink their tokens.
    "init_values": ("zoo_uniformer_x*",),
    "aux_head": ("zoo_uniformer_x*",),
}


def arguments(name):
    """Those of the constructor, and of the one that it hands the others to."""
    found = []
    for cls in type(create(name)).__mro__:
        parameters = inspect.signature(cls).parameters.values()
        found += [one.name for one in parameters if one.kind is not one.VAR_KEYWORD]
        if len(parameters) and all(one.kind is not one.VAR_KEYWORD for one in parameters):
            break
    return found


@each
def test_dropout(name):
    x = images(batch=4)
    still = shaken(create(name))
    expected = still(x)
    state = copy.deepcopy(still.state_dict())  # training moves the statistics of BatchNorm
    still.train()
    # Two runs of the same operations.
    assert torch.equal(still(x), still(x)), "there is noise without any dropout"
    for rate in set(RATES) & set(arguments(name)):
        if idle(name, rate):
            continue
        model = create(name, **{rate: 0.6})
        model.load_state_dict(state)
        assert torch.equal(model(x), expected), f"{rate} acts in evaluation"
        model.train()
        assert not torch.allclose(model(x), model(x)), f"{rate} is ignored"


def idle(name, argument):
    return any(fnmatch.fnmatch(name, pattern) for pattern in IDLE.get(argument, ()))


def other(name, argument):
    value = OTHER[argument]
    if not isinstance(value, dict):
        return value
    kind = "vit" if name.startswith("zoo_vit_") else "pyramid"
    return next(found for pattern, found in value.items() if pattern == kind or fnmatch.fnmatch(name, pattern))


def differ(one, two):
    """Whether two networks differ in their parameters' shapes or, with the same parameters, in what they answer."""
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (one, two)]
    if shapes[0] != shapes[1]:
        return True
    two.load_state_dict(one.state_dict())
    outputs = []
    for model in (one.train(), two.train()):
        torch.manual_seed(5)
        # Two places at least in the last map, for poolings to differ.
        outputs.append(model(images(64, 96, batch=4)))
    return outputs[0].shape != outputs[1].shape or not torch.allclose(*outputs, **NEAR)


@each
def test_every_argument_changes_something(name):
    for argument in arguments(name):
        assert argument in OTHER, f"{argument} is new; give another value of it in OTHER"
        if idle(name, argument):
            continue
        rest = {"global_pool": "avg"} if argument == "class_token" else {}
        changed = create(name, **rest, **{argument: other(name, argument)})
        assert differ(shaken(create(name, **rest)), changed), f"{argument} changes nothing"

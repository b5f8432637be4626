"""The networks of the FLatten paper against what their authors measured and recorded, and their hosts against timm."""

import re

import pytest
import timm
import torch

import zoo  # noqa: F401  (registers the models)
from zoo.backbones import cswin, pvt, pvt_v2, swin
from zoo.catalogue import count_macs

# Depths, parameters in millions and multiply-adds in billions at the native size.
MEASURED = {
    "zoo_flatten_pvt_tiny": ((2, 2, 2, 2), 12.151, 2.037),
    "zoo_flatten_pvt_small": ((3, 4, 6, 3), 21.670, 4.030),
    "zoo_flatten_pvt_medium": ((3, 4, 18, 3), 37.242, 7.036),
    "zoo_flatten_pvt_large": ((3, 8, 27, 3), 50.649, 10.380),
    "zoo_flatten_pvt_v2_b0": ((2, 2, 2, 2), 3.595, 0.580),
    "zoo_flatten_pvt_v2_b1": ((2, 2, 2, 2), 12.931, 2.219),
    "zoo_flatten_pvt_v2_b2": ((3, 4, 6, 3), 22.548, 4.251),
    "zoo_flatten_pvt_v2_b3": ((3, 4, 18, 3), 38.274, 7.284),
    "zoo_flatten_pvt_v2_b4": ((3, 8, 27, 3), 51.837, 10.677),
    "zoo_flatten_swin_tiny": ((2, 2, 6, 2), 29.192, 4.483),
    "zoo_flatten_swin_small": ((2, 2, 18, 2), 50.510, 8.734),
    "zoo_flatten_swin_base": ((2, 2, 18, 2), 88.972, 15.421),
    "zoo_flatten_swin_base_384": ((2, 2, 18, 2), 91.434, 46.382),
    "zoo_flatten_cswin_tiny": ((2, 4, 18, 1), 21.202, 4.324),
    "zoo_flatten_cswin_small": ((2, 4, 32, 2), 35.452, 6.783),
    "zoo_flatten_cswin_base": ((3, 6, 29, 2), 74.867, 14.913),
    "zoo_flatten_cswin_base_384": ((3, 6, 29, 2), 78.369, 46.305),
}
each = pytest.mark.parametrize("name", MEASURED)
GOLDENS = "flatten"


def empty(name, **options):
    with torch.device("meta"):
        return timm.create_model(name, **options).eval()


@each
def test_parameters_are_the_measured_ones(name):
    model = empty(name)
    count = sum(p.numel() for p in model.parameters())
    if "_pvt_" in name and "v2" not in name:
        # The authors count a LayerNorm that their forward never applies.
        count += 2 * model.num_features
    assert round(count / 1e6, 3) == MEASURED[name][1]


# Counting runs the network once at its own size: the large ones with the slow tests.
@pytest.mark.parametrize(
    "name",
    [
        name if name.endswith(("_tiny", "_b0", "_b1", "_pvt_small")) else pytest.param(name, marks=pytest.mark.slow)
        for name in MEASURED
    ],
)
def test_multiply_adds_are_the_measured_ones(name):
    model = empty(name)
    size = model.default_cfg["input_size"]
    macs = count_macs(model, size)
    side = size[1] // 4
    for stage in model.stages:
        linear = [block for block in stage.blocks if type(block.attn).__name__ == "FocusedLinearAttention"]
        # q times the mean of k: a product of matrices with the authors, in float32 and elementwise here.
        macs += len(linear) * side**2 * stage.blocks[0].attn.dim
        side //= 2
    assert round(macs / 1e9, 3) == MEASURED[name][2]


def linear_layer(key, rows, columns, bias=True):
    return {f"{key}.weight": (rows, columns)} | ({f"{key}.bias": (rows,)} if bias else {})


def norm(key, dim):
    return {f"{key}.weight": (dim,), f"{key}.bias": (dim,)}


def conv(key, dim, before, size):
    return {f"{key}.weight": (dim, before, size, size), f"{key}.bias": (dim,)}


def focused(key, dim, count, width):
    shapes = {f"{key}.scale": (1, 1, dim), f"{key}.positional_encoding": (1, count, dim)}
    return shapes | conv(f"{key}.dwc", width, 1, 5)


def pvt_file(name, depths, dims, heads, side):
    """Section 4 of the specification, PVT and PVTv2."""
    second, shapes, before = "v2" in name, {}, 3
    for stage, (depth, dim, ratio) in enumerate(zip(depths, dims, (8, 8, 4, 4), strict=True)):
        number, kernel = stage + 1, (7, 3, 3, 3)[stage] if second else (4, 2, 2, 2)[stage]
        shapes |= conv(f"patch_embed{number}.proj", dim, before, kernel) | norm(f"patch_embed{number}.norm", dim)
        if not second:
            shapes[f"pos_embed{number}"] = (1, side * side, dim)
        for index in range(depth):
            block = f"block{number}.{index}"
            shapes |= norm(f"{block}.norm1", dim) | norm(f"{block}.norm2", dim)
            shapes |= focused(f"{block}.attn", dim, side * side, dim // heads[stage])
            shapes |= linear_layer(f"{block}.attn.q", dim, dim) | linear_layer(f"{block}.attn.kv", 2 * dim, dim)
            shapes |= linear_layer(f"{block}.attn.proj", dim, dim)
            shapes |= linear_layer(f"{block}.mlp.fc1", ratio * dim, dim) | linear_layer(
                f"{block}.mlp.fc2", dim, ratio * dim
            )
            if second:
                shapes |= conv(f"{block}.mlp.dwconv.dwconv", ratio * dim, 1, 3)
        if second:
            shapes |= norm(f"norm{number}", dim)
        before, side = dim, side // 2
    return shapes | linear_layer("head", 1000, before) | ({} if second else norm("norm", before))


def swin_file(name, depths, dims, heads, side):
    """Section 4 of the specification, Swin; windows of 7, or 12 at 384 pixels."""
    window = 12 if "384" in name else 7
    shapes = conv("patch_embed.proj", dims[0], 3, 4) | norm("patch_embed.norm", dims[0])
    for stage, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
        for index in range(depth):
            block = f"layers.{stage}.blocks.{index}"
            shapes |= norm(f"{block}.norm1", dim) | norm(f"{block}.norm2", dim)
            shapes |= linear_layer(f"{block}.attn.qkv", 3 * dim, dim) | linear_layer(f"{block}.attn.proj", dim, dim)
            shapes |= linear_layer(f"{block}.mlp.fc1", 4 * dim, dim) | linear_layer(f"{block}.mlp.fc2", dim, 4 * dim)
            if stage < 2:
                shapes |= focused(f"{block}.attn", dim, side * side, dim // heads[stage])
                continue
            shapes[f"{block}.attn.relative_position_bias_table"] = ((2 * window - 1) ** 2, heads[stage])
            shapes[f"{block}.attn.relative_position_index"] = (window**2, window**2)
            if stage == 2 and index % 2:
                shapes[f"{block}.attn_mask"] = (4, window**2, window**2)
        if stage < 3:
            merge = f"layers.{stage}.downsample"
            shapes |= linear_layer(f"{merge}.reduction", 2 * dim, 4 * dim, bias=False) | norm(f"{merge}.norm", 4 * dim)
        side //= 2
    return shapes | norm("norm", dims[-1]) | linear_layer("head", 1000, dims[-1])


def cswin_file(name, depths, dims, heads, side):
    """Section 4 of the specification, CSWin."""
    shapes = conv("stage1_conv_embed.0", dims[0], 3, 7) | norm("stage1_conv_embed.2", dims[0])
    for stage, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
        for index in range(depth):
            block = f"stage{stage + 1}.{index}"
            shapes |= norm(f"{block}.norm1", dim) | norm(f"{block}.norm2", dim)
            shapes |= linear_layer(f"{block}.qkv", 3 * dim, dim) | linear_layer(f"{block}.proj", dim, dim)
            shapes |= linear_layer(f"{block}.mlp.fc1", 4 * dim, dim) | linear_layer(f"{block}.mlp.fc2", dim, 4 * dim)
            if stage < 2:
                shapes |= focused(f"{block}.attns.0", dim, side * side, dim // heads[stage])
            branches = 2 if stage == 2 else 1
            for branch in range(branches):
                shapes |= conv(f"{block}.attns.{branch}.get_v", dim // branches, 1, 3)
        if stage < 3:
            merge = f"merge{stage + 1}"
            shapes |= conv(f"{merge}.conv", 2 * dim, dim, 3) | norm(f"{merge}.norm", 2 * dim)
        side //= 2
    return shapes | norm("norm", dims[-1]) | linear_layer("head", 1000, dims[-1])


def authors_file(name):
    """Keys and shapes of the authors' checkpoint, and our filter for it."""
    depths, side = MEASURED[name][0], 96 if "384" in name else 56
    base = "base" in name
    if "_pvt_" in name:
        dims = (32, 64, 160, 256) if name.endswith("b0") else (64, 128, 320, 512)
        return pvt_file(name, depths, dims, (1, 2, 5, 8), side), pvt_v2 if "v2" in name else pvt
    first = {("swin", False): 96, ("swin", True): 128, ("cswin", False): 64, ("cswin", True): 96}
    kind = "cswin" if "cswin" in name else "swin"
    heads = {"swin": (4, 8, 16, 32) if base else (3, 6, 12, 24), "cswin": (4, 8, 16, 32) if base else (2, 4, 8, 16)}
    dims = [first[kind, base] * 2**stage for stage in range(4)]
    write = swin_file if kind == "swin" else cswin_file
    return write(name, depths, dims, heads[kind], side), swin if kind == "swin" else cswin


@each
def test_every_entry_of_the_authors_file_finds_its_place(name):
    """Not one entry is left over or missing, and each shape fits, for all variants: read without their weights."""
    shapes, module = authors_file(name)
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    model = empty(name)
    loaded = module.checkpoint_filter_fn({"model": state}, model)
    assert {key: value.shape for key, value in loaded.items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }


def test_answers_are_the_authors(golden, tmp_path):
    """Logits and the map of every stage, from a checkpoint in the authors' format."""
    assert authors_file(golden.name)[0] == golden.shapes
    errors = golden.errors(golden.load(tmp_path, wrap="model"))
    assert len(errors) == 5
    # float32 noise of a dozen blocks; a wrong positional encoding shows as 3 % in the sharp ones.
    assert max(errors.values()) < 5e-6, errors


@pytest.mark.parametrize("wrap", [None, "state_dict", "model_ema", "state_dict_ema"])
@torch.no_grad()
def test_bare_and_wrapped_files_load(wrap, tmp_path):
    """A small Swin in the authors' layout, with tables that the network computes for itself, poisoned."""
    options = {"embed_dim": 8, "num_heads": (1, 2, 4, 8), "img_size": 64, "depths": (1, 1, 2, 1), "window_size": 2}
    model = timm.create_model("zoo_flatten_swin_tiny", **options).eval()
    state = {}
    for key, value in model.state_dict().items():
        value = torch.randn(value.shape)
        key = key.replace("stages.", "layers.").replace("attn.inner.", "attn.").replace("head.fc.", "head.")
        key = re.sub(r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", key)
        state[key] = value
    state["layers.2.blocks.1.attn_mask"] = torch.full((4, 4, 4), 7.0)
    state["layers.2.blocks.0.attn.relative_position_index"] = torch.zeros(4, 4, dtype=torch.int64)
    path = tmp_path / "file.pth"
    torch.save(state if wrap is None else {wrap: state, "epoch": 3}, path)
    overlay = {"file": str(path)}
    loaded = timm.create_model("zoo_flatten_swin_tiny", pretrained=True, pretrained_cfg_overlay=overlay, **options)
    got = loaded.state_dict()
    assert torch.equal(got["stages.1.downsample.reduction.weight"], state["layers.0.downsample.reduction.weight"])
    assert torch.equal(got["stages.2.blocks.1.attn.inner.qkv.weight"], state["layers.2.blocks.1.attn.qkv.weight"])
    assert loaded(torch.randn(1, 3, 64, 64)).isfinite().all()


@torch.no_grad()
def fill(model):
    generator = torch.Generator().manual_seed(0)
    for key, value in model.named_parameters():
        noise = torch.randn(value.shape, generator=generator)
        value.copy_(noise / value[0].numel() ** 0.5 if value.ndim > 1 else 0.1 * noise + key.endswith("weight"))


@pytest.mark.parametrize(
    ("ours", "theirs", "module", "size"),
    [
        ("zoo_swin_tiny_patch4_window7_224", "swin_tiny_patch4_window7_224", swin, 224),
        ("zoo_pvt_v2_b0", "pvt_v2_b0", pvt_v2, 224),
        ("zoo_pvt_v2_b0", "pvt_v2_b0", pvt_v2, 128),
        pytest.param("zoo_pvt_v2_b2", "pvt_v2_b2", pvt_v2, 224, marks=pytest.mark.slow),
        pytest.param("zoo_pvt_v2_b3", "pvt_v2_b3", pvt_v2, 224, marks=pytest.mark.slow),
        pytest.param("zoo_pvt_v2_b4", "pvt_v2_b4", pvt_v2, 224, marks=pytest.mark.slow),
        pytest.param("zoo_pvt_v2_b1", "pvt_v2_b1", pvt_v2, 224, marks=pytest.mark.slow),
        *(
            pytest.param(f"zoo_{name}", name, swin, size, marks=pytest.mark.slow)
            for name, size in (
                ("swin_small_patch4_window7_224", 224),
                ("swin_base_patch4_window7_224", 224),
                ("swin_base_patch4_window12_384", 384),
            )
        ),
    ],
)
@torch.inference_mode()
def test_plain_hosts_are_timms_networks(ours, theirs, module, size):
    reference = timm.create_model(theirs).eval()
    fill(reference)
    model = timm.create_model(ours).eval()
    model.load_state_dict(module.checkpoint_filter_fn(reference.state_dict(), model), strict=True)
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    got, want = model(x), reference(x)
    # float32 noise: both take the same products, in windows of another order. Swin-B has 24 blocks of 128 channels and
    # more, twice the blocks of Swin-T and longer sums, at 2.7e-6 to 5.4e-6 where the others stay below 1.3e-6.
    assert (got - want).abs().max() <= 2e-6 * want.abs().max() * (4 if "swin_base" in ours else 1)


@pytest.mark.parametrize(
    ("name", "params", "gmacs"),
    # As their papers print them: PVTv2 (arXiv 2106.13797), Swin (2103.14030), CSWin (2107.00652), ImageNet tables.
    [
        ("zoo_pvt_v2_b2", 25.4, 4.0),
        ("zoo_swin_tiny_patch4_window7_224", 29, 4.5),
        pytest.param("zoo_swin_base_patch4_window12_384", 88, 47.0, marks=pytest.mark.slow),
        ("zoo_cswin_tiny", 23, 4.3),
        ("zoo_cswin_small", 35, 6.9),
        pytest.param("zoo_cswin_base", 78, 15.0, marks=pytest.mark.slow),
        pytest.param("zoo_cswin_base_384", 78, 47.0, marks=pytest.mark.slow),
    ],
)
def test_plain_hosts_have_the_published_size(name, params, gmacs):
    model = empty(name)
    # Printed with two digits, and rounded up.
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(params, rel=0.03)
    assert count_macs(model, model.default_cfg["input_size"]) / 1e9 == pytest.approx(gmacs, rel=0.02)


@pytest.mark.slow
@each
@torch.inference_mode()
def test_every_variant_answers(name):
    model = timm.create_model(name).eval()
    assert model(torch.randn(1, *model.default_cfg["input_size"])).isfinite().all()

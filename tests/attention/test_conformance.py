"""What every registered mechanism must keep, whatever its mathematics: a new entry is tested by being registered."""

import copy
import pickle

import pytest
import timm
import torch

from zoo.attention import attention_spec, create_attention, list_attentions

from .loops import pairs_resized

DIM = 32
SIZES = [(1, 1), (7, 13), (14, 14)]
# Wrappers stand for themselves over their default inner mechanism, and once over another one.
CASES = [(name, {}) for name in list_attentions()] + [
    ("window", {"inner": "uniform"}),
    ("shifted_window", {"inner": "uniform"}),
    ("cross_window", {"inner": "uniform"}),
    ("window", {"rel_pos_bias": True, "window_size": 3}),
    ("shifted_window", {"rel_pos_bias": True, "window_size": (4, 5)}),
    ("softmax", {"sr_ratio": 2}),
    ("softmax", {"lepe": 3}),
    ("cross_window", {"inner_options": {"lepe": 3}}),
    ("cross_window", {"inner": "focused_linear"}),
    ("shifted_window", {"inner": "focused_linear", "window_size": 5}),
    ("focused_linear", {"lepe": 3}),
    ("window", {"inner": "local_relation"}),
    ("cross_window", {"inner": "local_relation"}),
    ("shifted_window", {"inner": "single_head", "window_size": 5}),
    ("halo", {"preset": "lucidrains", "block_size": 5}),
    ("halo", {"block_size": 4, "halo_size": 1, "stride": 2}),
    ("halo", {"block_size": 3, "stride": 2}),
    ("lambda", {"intra_depth": 2, "kernel_size": 3, "stride": 2}),
    ("lambda", {"kernel_size": None, "num_heads": 2, "proj": False}),
    ("grouped_query", {"kv_heads": 1}),
    ("grouped_query", {"num_heads": 4, "kv_heads": 4}),
    ("window", {"inner": "grouped_query", "rel_pos_bias": True, "window_size": 3}),
    ("cross_window", {"inner": "grouped_query"}),
    ("head_embedding", {"combine": "add"}),
    ("shifted_window", {"inner": "super", "window_size": 5}),
    ("shifted_window", {"inner": "persistent_memory", "window_size": 5}),
    ("shifted_window", {"inner": "rela", "window_size": 5}),
    ("shifted_window", {"inner": "normalized", "window_size": 5}),
    ("normalized", {"gelu": False, "num_heads": 2}),
    ("inverse_distance", {"power": 6.0, "learn_power": True}),
    ("neural", {"width": 5, "num_heads": 2}),
    ("efficient", {"normalisation": "scaling", "key_dim": 16, "value_dim": 40}),
    ("hedgehog", {"qk_norm": True, "num_heads": 2}),
    ("multi_token", {"query_kernel": 1, "key_kernel": 5, "head_group": 2, "norm": False}),
    ("shifted_window", {"inner": "multi_token", "window_size": 5}),
]
CASES += [
    ("sparse_strided", {"pattern": "union"}),
    ("sparse_fixed", {"summary": "spaced"}),
    ("multi_scale_window", {"layer_group": 0}),
    ("moba", {"block_size": 3, "top_blocks": 2}),
    ("window", {"inner": "moba", "rel_pos_bias": True}),
    ("mosa", {"dense_heads": 2, "head_dim": 6}),
    ("cross_window", {"inner": "mosa"}),
    ("routing", {"local_heads": 0, "clusters": 3}),
    ("routing", {"normalized": False, "window_size": 4}),
    ("threshold_relative", {"distance": "euclidean"}),
    ("relational", {"library_size": 9, "symmetric": True, "num_relations": 2}),
    ("relational", {"relational_heads": 8, "num_heads": 8}),
    ("shifted_window", {"inner": "relational", "rel_pos_bias": True}),
]
IDS = ["-".join([name, *(f"{key}={value}" for key, value in options.items())]) for name, options in CASES]
each_case = pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)

# Another value for every option; a float that dropout uses is compared in training.
OTHER = {
    "num_heads": 2,
    "dim_out": 16,
    "sr_ratio": 2,
    "lepe": 3,
    "focusing_factor": 2,
    "kernel_size": 3,
    "partial_dim": 5,
    "qk_dim": 8,
    "attn_drop": 0.5,
    "proj_drop": 0.5,
    "block_size": 5,
    "halo_size": 1,
    "stride": 2,
    "dim_head": 3,
    "qk_ratio": 0.5,
    "preset": "lucidrains",
    "mask": False,
    "scale_rel": True,
    "kv_by_head": False,
    "dim_key": 8,
    "intra_depth": 2,
    "inner": "uniform",
    "inner_options": {"qkv_bias": False},
    "window_size": 3,
    "shift_size": 1,
    "stripe_width": 2,
    "kv_heads": 1,
    "combine": "add",
    "slots": 3,
    "reference_keys": 196,
    "power": 4.0,
    "eps": 0.5,
    "width": 5,
    "normalisation": "scaling",
    "key_dim": 8,
    "value_dim": 16,
    "query_kernel": 1,
    "key_kernel": 5,
    "head_group": 2,
}
OTHER |= {
    "pattern": "union",
    "summary_size": 3,
    "summary": "spaced",
    "layer_group": 1,
    "top_blocks": 2,
    "head_dim": 6,
    "sparsity": 3,
    "dense_heads": 2,
    "clusters": 3,
    "local_heads": 1,
    "distance": "euclidean",
    "relational_heads": 2,
    "num_relations": 2,
    "max_offset": 2,
    "library_size": 3,
}
# Rows of weights that may sum to less than 1: a small number in the normaliser. Their own tests say by how much.
FALL_SHORT = {"focused_linear"}
# A token that no head or cluster takes, and a query with nothing above the threshold, have rows of zeros.
FALL_SHORT |= {"mosa", "routing", "threshold_relative"}
# They choose tokens by comparison, and rounded inputs turn near ties round.
CHOOSE = {"moba", "mosa", "routing", "threshold_relative"}
# The rest of a row is memory's.
FALL_SHORT |= {"persistent_memory"}
# Affinities of any sign and sum.
SIGNED = {"local_relation", "lambda"}
SIGNED |= {"scaling", "multi_token", "rela", "rela_gated", "normalized"}


def kinds(name, options):
    """What a case is: its name, that of the mechanism inside, and what its options name."""
    return {name, *(value for value in options.values() if isinstance(value, str))}


def build(name, options, **framework):
    torch.manual_seed(1)
    return create_attention(name, DIM, **framework, **options).eval()


def prefixes(name, options):
    spec = attention_spec(name)
    # A wrapper puts prefix tokens into every window, where only a mechanism that mixes them can take them.
    mixed = not spec.wrapper or attention_spec({**spec.options, **options}["inner"]).prefix == "mix"
    return (0, 1) if spec.prefix != "refuse" and mixed else (0,)


def assert_near_in_low_precision(name, options, got, want):
    """bf16 keeps 8 bits of projections and values of order 1; the longest sum here is 91 values."""
    if not {name, options.get("inner")} & CHOOSE:
        torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.05)
        return
    # What one token of another choice changes is its share in a small group of them: a few answers, by a part.
    apart = (got.float() - want).abs() > 0.05 + 0.05 * want.abs()
    assert apart.float().mean() < 0.1
    assert (got.float() - want).norm() < 0.2 * want.norm()


def tokens(grid, prefix=0, batch=2, dtype=torch.float32, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, prefix + grid[0] * grid[1], DIM, generator=generator).to(dtype)


@each_case
@pytest.mark.parametrize("grid", SIZES)
def test_any_grid_with_and_without_prefix(name, options, grid):
    for prefix in prefixes(name, options):
        attention = build(name, options, num_prefix_tokens=prefix)
        x = tokens(grid, prefix)
        out = attention(x, grid)
        rows, columns = attention.out_grid(grid)
        assert out.shape == (2, prefix + rows * columns, attention.dim_out)
        assert out.isfinite().all()
        if attention_spec(name).prefix == "pass" and prefix:
            assert torch.equal(out[:, :prefix], x[:, :prefix])


@each_case
def test_tables_follow_the_grid(name, options):
    """What was made for 7 x 7 answers at 7 x 13 as what was made for that grid, its tables resized by timm."""
    small, large = (build(name, options, grid_size=size) for size in ((7, 7), (7, 13)))
    state = small.state_dict()
    for key, value in large.state_dict().items():
        if state[key].shape != value.shape:
            table = torch.randn(state[key].shape, generator=torch.Generator().manual_seed(7))
            state[key] = table
            small.load_state_dict({key: table}, strict=False)
            if table.ndim == 2:  # numbers for all pairs of places
                state[key] = pairs_resized(table, (7, 7), (7, 13))
            elif table.ndim == 4:  # a table of offsets, (2 * 7 - 1, 2 * 7 - 1, ...)
                rows = timm.layers.resample_abs_pos_embed(table.view(1, 169, -1), [13, 25], [13, 13], 0)
                state[key] = rows.view(value.shape)
            else:
                state[key] = timm.layers.resample_abs_pos_embed(table, [7, 13], [7, 7], num_prefix_tokens=0)
    large.load_state_dict(state, strict=True)
    x = tokens((7, 13))
    # The same arithmetic on both sides, up to where the resize happens: float32 noise.
    torch.testing.assert_close(small(x, (7, 13)), large(x, (7, 13)), rtol=1e-5, atol=1e-5)


@each_case
def test_both_layouts_agree(name, options):
    grid = (7, 13)
    x = tokens(grid)
    flat = build(name, options, layout="tokens")(x, grid)
    shaped = build(name, options, layout="map")(x.transpose(1, 2).unflatten(2, grid).contiguous())
    # The sums run over other memory layouts: float32 noise.
    torch.testing.assert_close(shaped.flatten(2).transpose(1, 2), flat, rtol=1e-5, atol=1e-5)


@each_case
def test_can_be_made_channels_last_with_its_network(name, options):
    attention = build(name, options)
    x = tokens((7, 13))
    want = attention(x, (7, 13))
    # Weights of four axes move in memory; of five torch knows no such layout. float32 noise of another order of sums.
    got = attention.to(memory_format=torch.channels_last)(x, (7, 13))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@each_case
def test_independent_of_the_rest_of_the_batch(name, options):
    grid = (7, 13)
    attention = build(name, options)
    x = tokens(grid, batch=3)
    torch.testing.assert_close(attention(x, grid)[1:2], attention(x[1:2], grid), rtol=1e-5, atol=1e-6)
    assert torch.equal(attention(x, grid), attention(x, grid))


@each_case
def test_every_parameter_gets_a_gradient(name, options):
    grid = (14, 14)
    for prefix in prefixes(name, options):
        attention = build(name, options, num_prefix_tokens=prefix).train()
        x = tokens(grid, prefix).requires_grad_()
        # A plain sum would leave what softmax normalises away without a gradient.
        weight = torch.randn(attention(x, grid).shape, generator=torch.Generator().manual_seed(3))
        (attention(x, grid) * weight).sum().backward()
        silent = [key for key, p in attention.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert not silent
        assert x.grad.isfinite().all()


@each_case
def test_key_mask_hides_keys_or_is_refused(name, options):
    grid = (7, 13)
    for prefix in prefixes(name, options):
        attention = build(name, options, num_prefix_tokens=prefix)
        x = tokens(grid, prefix)
        mask = torch.ones(2, x.shape[1], dtype=torch.bool)
        mask[:, prefix + 5 : prefix + 9] = False
        if "key_mask" not in attention_spec(name).supports:
            with pytest.raises(ValueError, match=r"mask"):
                attention(x, grid, key_mask=mask)
            continue
        changed = x.clone()
        changed[~mask] = 7.0
        before, after = attention(x, grid, key_mask=mask), attention(changed, grid, key_mask=mask)
        torch.testing.assert_close(before[mask], after[mask], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(attention(x, grid)[mask], attention(changed, grid)[mask], atol=1e-4)
        # One row for the whole batch means the same as a row for each image.
        assert torch.equal(attention(x, grid, key_mask=mask[:1]), before)
        # Not one key: no NaN, neither in the answer nor in a gradient.
        x.requires_grad_()
        empty = attention(x, grid, key_mask=torch.zeros_like(mask))
        empty.sum().backward()
        assert empty.isfinite().all()
        assert x.grad.isfinite().all()


@each_case
def test_bias_is_taken_or_refused(name, options):
    grid = (7, 13)
    attention = build(name, options)
    x = tokens(grid)
    keys = attention.attention_map(x, grid).shape[-1]
    bias = torch.randn(1, 1, x.shape[1], keys, generator=torch.Generator().manual_seed(4))
    if "bias" in attention_spec(name).supports:
        want = attention(x, grid, bias=bias)
        assert not torch.allclose(want, attention(x, grid), atol=1e-4)
        # Broadcasting asks for no leading axes, and for no axis to be longer than 1.
        for same in (bias[0], bias[0, 0]):
            assert torch.equal(attention(x, grid, bias=same), want)
            assert torch.equal(attention.attention_map(x, grid, bias=same), attention.attention_map(x, grid, bias=bias))
        of_keys = attention(x, grid, bias=bias[:, :, :1].expand_as(bias))
        for same in (bias[:, :, :1], bias[0, 0, 0]):
            torch.testing.assert_close(attention(x, grid, bias=same), of_keys, rtol=1e-5, atol=1e-5)
    else:
        with pytest.raises(ValueError, match="bias"):
            attention(x, grid, bias=bias)


@each_case
def test_attention_map_rows_are_weights(name, options):
    grid = (5, 6)
    for prefix in prefixes(name, options):
        attention = build(name, options, num_prefix_tokens=prefix)
        weights = attention.attention_map(tokens(grid, prefix), grid)
        assert weights.shape[0] == 2
        rows, columns = attention.out_grid(grid)
        assert weights.shape[2:] == (prefix + rows * columns, weights.shape[3])
        sums = weights.sum(-1)
        if kinds(name, options) & SIGNED:
            continue
        if kinds(name, options) & FALL_SHORT:
            assert weights.min() >= 0
            assert 0 < sums.max() <= 1 + 1e-5
            continue
        torch.testing.assert_close(sums, torch.ones_like(sums), rtol=1e-5, atol=1e-5)


@each_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_near_and_leaves_weights_in_float32(name, options, dtype):
    grid = (5, 6)
    attention = build(name, options)
    x = tokens(grid)
    with torch.autocast("cpu", dtype), torch.no_grad():
        out, weights = attention(x, grid), attention.attention_map(x, grid)
    assert_near_in_low_precision(name, options, out, attention(x, grid))
    assert weights.dtype == torch.float32
    if not kinds(name, options) & (SIGNED | FALL_SHORT):
        # Not rounded on the way: sums of 30 float32 weights.
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]), rtol=1e-6, atol=2e-6)


@each_case
def test_no_images_give_no_answers(name, options):
    attention = build(name, options)
    assert attention(tokens((5, 6))[:0], (5, 6)).shape == (0, *attention(tokens((5, 6)), (5, 6)).shape[1:])


@each_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_finite_and_near(name, options, dtype):
    grid = (7, 13)
    attention = build(name, options)
    x = tokens(grid)
    low = copy.deepcopy(attention).to(dtype)(x.to(dtype), grid)
    assert low.dtype == dtype
    assert_near_in_low_precision(name, options, low, attention(x, grid))
    # Where products of two or three projections are the answer itself, float16 ends earlier.
    large = (30 if kinds(name, options) & {"lambda", "relational", "scaling"} else 300) * x
    assert copy.deepcopy(attention).to(dtype)(large.to(dtype), grid).isfinite().all()
    with torch.autocast("cpu", dtype), torch.no_grad():
        assert attention(large, grid).isfinite().all()


# Seconds each: of every mechanism its defaults, the other options with the slow tests.
@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(*case, id=key, marks=pytest.mark.slow if case[1] else ())
        for key, case in zip(IDS, CASES, strict=True)
    ],
)
def test_compiles_as_one_graph(name, options):
    torch._dynamo.reset()
    grid = (7, 13)
    prefix = max(prefixes(name, options))
    attention = build(name, options, num_prefix_tokens=prefix)
    x = tokens(grid, prefix)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, grid), attention(x, grid), rtol=1e-5, atol=1e-5)


@each_case
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
def test_scripts_copies_and_pickles(name, options):
    grid = (7, 13)
    attention = build(name, options)
    x = tokens(grid)
    want = attention(x, grid)
    torch.testing.assert_close(torch.jit.script(attention)(x, grid), want, rtol=1e-5, atol=1e-5)
    assert torch.equal(copy.deepcopy(attention)(x, grid), want)
    assert torch.equal(pickle.loads(pickle.dumps(attention))(x, grid), want)


@pytest.mark.parametrize("name", list_attentions())
def test_every_option_changes_something(name):
    grid = (7, 13)
    spec = attention_spec(name)
    plain = {key for key, default in spec.options.items() if not isinstance(default, bool)}
    assert plain <= set(OTHER), "give each new option another value in OTHER"
    base = build(name, {})
    for option in spec.options:
        default = spec.options[option]
        other = build(name, {option: (not default) if isinstance(default, bool) else OTHER[option]})
        same_state = {key: p.shape for key, p in base.named_parameters()} == {
            key: p.shape for key, p in other.named_parameters()
        }
        outs = []
        for attention in (base, other):
            torch.manual_seed(5)
            outs.append(attention.train("drop" in option)(tokens(grid), grid))
        assert not same_state or outs[0].shape != outs[1].shape or not torch.allclose(*outs, atol=1e-5), option


@pytest.mark.parametrize("name", [name for name in list_attentions() if attention_spec(name).wrapper])
def test_tokens_of_no_known_grid_are_refused(name):
    with pytest.raises(ValueError, match="pass grid="):
        build(name, {})(tokens((7, 13)))

"""The bench tool: right answers are timed, and wrong ones are caught."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tools.bench import __main__ as cli  # noqa: E402
from tools.bench import attentions, machine, networks, ops, report, run, run_network  # noqa: E402
from tools.bench.cases import CASES, Cost, FunctionCase, NetworkCase, Unavailable, Workload, select  # noqa: E402
from tools.bench.run import Options, run_case  # noqa: E402
from tools.bench.timing import Rates, measure, rates  # noqa: E402
from zoo.kernels.dispatch import OPS  # noqa: E402

QUICK = Options("cpu", quick=True, compare=("timm", "eager"), rates=Rates(1e9, 1e9, "given"))


def test_every_op_has_a_case_with_its_cost():
    for name in OPS:
        cases = [case for case in CASES.values() if isinstance(case, FunctionCase) and case.op == name]
        assert any(case.kind == "op" for case in cases), f"tools/bench/ops.py has no case of {name}"
        for case in cases:
            for what in ("forward", "forward+backward"):
                assert all(number > 0 for number in case.cost(**case.sizes).of(what))


def test_every_mechanism_has_a_case_beside_softmax_at_4096_tokens():
    from zoo.attention import attention_spec, list_attentions

    cases = {case.title: case for case in CASES.values() if case.kind == "attention"}
    assert list(cases) == list_attentions()
    for name, case in cases.items():
        assert case.sizes["side"] ** 2 == 4096
        # Their sizes are within what the mechanisms let themselves be asked for.
        assert case.sizes["batch"] * case.sizes["heads"] * 4096**2 * 3 < 2**31
        assert case.about["forms_map"] == attention_spec(name).forms_map
        assert all(number > 0 for number in case.cost(**case.sizes).of("forward+backward"))
    growth = {name: case.about["growth"] for name, case in cases.items()}
    assert growth["uniform"] == "constant"
    # Stripes of 7 rows or columns hold sqrt(N) tokens, whose pairs are counted.
    assert growth["cross_window"] == "N^1.5"
    assert {growth[name] for name in ("efficient", "hedgehog", "focused_linear", "halo", "window")} == {"N"}
    assert {growth[name] for name in ("softmax", "moba", "sparse_fixed", "neural")} == {"N^2"}


def test_floor_of_a_mechanism_by_hand():
    cost = attentions.cost("softmax", batch=3, channels=8, side=4, heads=2)
    assert cost.forward_flops == 2 * 3 * (4 * 16 * 8**2 + 2 * 16**2 * 8)
    weights = 4 * (8 * 24 + 24 + 8 * 8 + 8)
    assert cost.forward_bytes == 2 * (3 * 16 * 8) * 2 + weights


@pytest.mark.parametrize(
    "name", ["window", *(pytest.param(name, marks=pytest.mark.slow) for name in ("efficient", "routing", "super"))]
)
def test_a_mechanism_is_timed_in_training_beside_softmax(name):
    rows = list(run_case(CASES[f"attention_{name}"], replace(QUICK, compare=("softmax", "compile", "graph"))))
    done = [(row["side"], row["mode"], row["pass"]) for row in rows if row["status"] == "ok"]
    assert done == [(side, "eager", "forward+backward") for side in ("ours", "softmax")]
    graphs = [(row["side"], row["status"]) for row in rows if row["mode"] == "graph"]
    assert [side for side, _ in graphs] == ["ours", "softmax"]
    assert rows[0]["check"]["error"] < rows[0]["check"]["tolerance"]


def test_what_an_op_is_compared_with_is_replayed_too():
    (case,) = [case for case in CASES.values() if case.name == "depthwise_conv2d_c64_56_k5"]
    sides = run.function_sides(case, ("eager", "graph"))
    assert sides == [(side, mode) for mode in ("eager", "graph") for side in ("ours", "reference")]


def test_floor_of_halo_attention_is_that_of_the_reasoning_by_hand():
    # 4 x 4 map, blocks of 2, halo 1: each of the 2 blocks of an axis has 2 queries that see 3 keys of the map.
    assert ops.halo_pairs(4, 2, 1) == 2 * 3 + 2 * 3
    # 5: the last block has one query, and sees itself and the key before.
    assert ops.halo_pairs(5, 2, 1) == 2 * 3 + 2 * 4 + 1 * 2
    cost = ops.halo_cost(batch=3, size=4, heads=2, dk=8, dv=16, block=2, halo=1)
    assert cost.forward_bytes == 2 * (3 * 16 * 2) * (8 + 8 + 16 + 16)
    pairs = 3 * 2 * 12**2
    assert cost.forward_flops == 2 * pairs * (8 + 16) + 2 * (3 * 16 * 2) * 2 * 4 * 8


def test_pairs_of_lambda_attention_by_counting():
    for size, reach in ((5, 1), (5, 4), (7, 2)):
        seen = sum(abs(m - n) <= reach for m in range(size) for n in range(size))
        assert ops.lambda_pairs(size, reach) == seen


def test_a_right_op_is_checked_and_timed():
    rows = list(run_case(CASES["context_broadcast_197x384"], QUICK))
    assert [(row["side"], row["pass"]) for row in rows if row["status"] == "ok"] == [
        *(("ours", what) for what in ("forward", "forward+backward")),
        *(("reference", what) for what in ("forward", "forward+backward")),
    ]
    for row in rows:
        timing = row["timing"]
        assert 0 < timing["low_ms"] <= timing["median_ms"] <= timing["high_ms"]
        assert row["share"] == pytest.approx(row["floor_ms"] / timing["median_ms"])
    assert rows[0]["check"]["error"] < rows[0]["check"]["tolerance"]


def toy(call, **changes):
    """A case of y = 2 x, computed by `call`."""
    case = FunctionCase(
        name="toy",
        kind="op",
        title="toy",
        op="toy",
        sizes={},
        quick={},
        inputs=lambda side, dtype, device: (torch.randn(4, 3).to(dtype).requires_grad_(),),
        build=lambda side, device: Workload(call if side == "ours" else lambda x: 2 * x),
        cost=lambda: Cost(1e6, 1.0, 1e6, 1.0),
        batched=(0,),
        peer="reference",
    )
    return replace(case, **changes)


class HalfGradient(torch.autograd.Function):
    """2 x with the gradient of x."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return grad


class ForwardOff(torch.autograd.Function):
    """2.1 x with the gradient of 2 x."""

    @staticmethod
    def forward(ctx, x):
        return 2.1 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def last_image_unwritten(x):
    out = 2 * x
    return torch.cat([out[:-1], out[-1:] * float("nan")]) if len(x) > 2 else out


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda x: 2.1 * x, "is off by 0.05 of its size; 0.02 is allowed"),
        (ForwardOff.apply, "the output is off by 0.04"),
        (HalfGradient.apply, "the gradient of input 0"),
        (last_image_unwritten, "off by inf"),
    ],
)
def test_a_wrong_op_gets_no_time(call, reason):
    rows = [row for row in run_case(toy(call), QUICK) if row["side"] == "ours"]
    assert [row["status"] for row in rows] == ["wrong"]
    assert reason in rows[0]["reason"]
    assert "timing" not in rows[0]


def test_wrong_failing_and_absent_cases_stop_no_other(tmp_path, capsys):
    def crash(x):
        raise RuntimeError("boom\nwith a long tail")

    def absent(side, device):
        raise Unavailable("not built yet")

    cases = [
        toy(lambda x: 3 * x, name="wrong"),
        toy(crash, name="crash"),
        toy(crash, name="absent", build=absent),
        toy(lambda x: 2 * x, name="right"),
    ]
    assert cli.execute(cases, QUICK, "a command", tmp_path) == 1
    said = capsys.readouterr().out
    assert "wrong or failed: wrong, crash\n" in said
    assert "RuntimeError: boom" in said
    records = {record["case"]: record for record in machine.load(tmp_path)}
    ours = {
        name: [row["status"] for row in record["rows"] if row["side"] == "ours"] for name, record in records.items()
    }
    assert ours == {"wrong": ["wrong"], "crash": ["failed"], "absent": ["unavailable"], "right": ["ok", "ok"]}
    assert cli.execute(cases[2:], QUICK, "a command", None) == 0
    page = report.render(list(records.values()))
    assert "- toy (ours, eager): unavailable: not built yet" in page


def test_the_budget_names_what_it_leaves_out(tmp_path, capsys):
    assert (
        cli.main(["ops", "context_broadcast", "--quick", "--device", "cpu", "--budget", "0", "--out", str(tmp_path)])
        == 0
    )
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.endswith("context_broadcast_197x384, context_broadcast_197x768, context_broadcast_3136x64")
    assert not list(tmp_path.glob("*.json"))


class Net(nn.Module):
    """Logits of the mean pixel, with a fault to switch on."""

    def __init__(self, fault=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 1000)
        self.fault = fault

    def forward(self, x):
        x = self.norm(self.conv(x))
        return self.head((x + self.fault * x.flip(-1) ** 2).mean((2, 3)))


def small(fault):
    return NetworkCase(
        "net",
        "network",
        "net",
        lambda size: Net(fault),
        "net",
        lambda size: Net(),
        "timm net",
        reference=lambda size: Net(),
    )


def test_a_network_is_checked_and_timed():
    rows = list(run_case(small(0.0), QUICK))
    assert [(r["side"], r["pass"], r["status"]) for r in rows] == [
        (side, what, "ok") for side in ("ours", "timm") for what in ("inference", "training")
    ]
    for one in rows:
        assert one["images_per_second"] == pytest.approx(1e3 * one["batch"] / one["timing"]["median_ms"])


def test_one_pass_of_a_network_alone():
    rows = list(run_case(small(0.0), replace(QUICK, passes=("inference",))))
    assert [(r["side"], r["pass"]) for r in rows] == [("ours", "inference"), ("timm", "inference")]


@pytest.mark.parametrize(("more", "passes"), [([], ("inference", "training")), (["--pass", "training"], ("training",))])
def test_the_command_line_hands_passes_on(more, passes, monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "execute", lambda cases, options, command, *_: seen.append((options.passes, command)) or 0)
    assert cli.main(["networks", "zoo_shvit_s4", "--device", "cpu", "--quick", *more]) == 0
    assert [one[0] for one in seen] == [passes]
    assert ("--pass training" in seen[0][1]) == bool(more)


def test_a_wrong_network_gets_no_speed():
    rows = list(run_case(small(0.5), QUICK))
    assert [(r["side"], r["status"]) for r in rows] == [("ours", "wrong")] * 2 + [("timm", "ok")] * 2
    assert "images_per_second" not in rows[0]


def test_a_training_mode_that_loses_a_gradient_gets_no_speed(monkeypatch):
    def prepare(network, mode):
        return (lambda x: network(x).detach() + 0 * network.head.bias.sum()) if mode == "recipe" else network

    monkeypatch.setattr(run_network, "prepare", prepare)
    rows = list(run_case(small(0.0), replace(QUICK, compare=("recipe",))))
    assert [(r["mode"], r["status"]) for r in rows] == [("recipe", "wrong")]
    assert "the gradient of all parameters" in rows[0]["reason"]


def test_recipe_mode_uses_what_the_recipes_use():
    from zoo.tasks import speed

    assert run_network.speed().TrainingGraph.__doc__ == speed.TrainingGraph.__doc__


@pytest.mark.slow  # minutes where a processor has no bfloat16
def test_one_network_of_ours_runs():
    rows = list(run_case(CASES["zoo_shvit_s4"], replace(QUICK, compare=("eager",))))
    assert [(r["side"], r["mode"], r["pass"], r["status"]) for r in rows] == [
        ("ours", "eager", "inference", "ok"),
        ("ours", "eager", "training", "ok"),
    ]


def test_networks_that_start_at_zero_are_woken():
    norm = nn.BatchNorm2d(4)
    nn.init.zeros_(norm.weight)
    networks.wake(norm)
    assert norm.weight.abs().min() > 0.05


def test_select_names_what_there_is():
    assert [case.name for case in select(("headline",), "shvit")] == ["headline_shvit_s4"]
    with pytest.raises(ValueError, match="headline_lambda_resnet50"):
        select(("headline",), "nothing_like_it")


def test_usage_errors_exit_with_2(capsys):
    for command in (["ops", "nothing_like_it", "--device", "cpu"], ["ops", "--compare", "tim", "--device", "cpu"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(command)
        assert stop.value.code == 2


def test_list_prints_every_case(capsys):
    assert cli.main(["list"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in CASES)


def test_measure_is_the_time_of_one_call():
    import time

    timing = measure([lambda: time.sleep(0.004)], "cpu", quick=True)
    # Sleeping never takes less; a busy machine makes it more.
    assert 4.0 <= timing.low_ms <= timing.median_ms < 40.0


def test_rates_are_positive_and_give_the_larger_floor():
    found = rates("cpu", quick=True)
    assert found.bytes_per_second > 0
    assert found.flops_per_second > 0
    assert Rates(1e9, 1e12, "").floor_ms(1e6, 1e6) == pytest.approx(1.0)
    assert Rates(1e9, 1e12, "").floor_ms(1e3, 1e10) == pytest.approx(10.0)


def test_sets_of_inputs_that_take_turns_fit_into_memory():
    assert run.rotations(1e6, 0.0, 0.0) == 7
    assert run.rotations(100e6, 0.0, 0.0) == 1
    assert run.rotations(1e9, 0.0, 0.0) == 0
    # A graph that keeps 28 GB: two more fit into 75 GB with something to spare.
    assert run.rotations(1e6, 28e9, 75e9) == 2
    assert run.rotations(1e6, 28e9, 20e9) == 0
    assert run.kept(None, "graph") == run.kept(28.0, "eager") == (0.0, 0.0)


def test_a_network_is_replayed_in_inference_alone_and_on_both_sides(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda network, **options: asked.append(options) or network)
    rows = list(run_case(small(0.0), replace(QUICK, compare=("timm", "graph"))))
    assert [(row["side"], row["mode"], row["pass"]) for row in rows] == [
        ("ours", "graph", "inference"),
        ("timm", "graph", "inference"),
    ]
    assert asked == 2 * [{"mode": "reduce-overhead"}]


@pytest.mark.parametrize(
    ("mode", "order"), [("compile", ["step", "restart", "step"]), ("graph", ["restart", "step", "step"])]
)
def test_memory_counts_the_step_that_allocates(mode, order, monkeypatch):
    """A graph's is the one that torch records, of the first two; of others the second, after what a first one needs."""
    seen = []

    class Memory:
        def __init__(self, device):
            self.restart = lambda: seen.append("restart")
            self.peak_gb = lambda: 1.0

    monkeypatch.setattr(run_network, "Memory", Memory)
    monkeypatch.setattr(run_network, "build_inference", lambda *_: (lambda: seen.append("step"), 1, {}))
    run_network._inference(None, "ours", mode, Options("cpu", True, ("eager",)))
    assert seen[:3] == order
